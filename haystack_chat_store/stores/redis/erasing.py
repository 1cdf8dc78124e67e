# SPDX-License-Identifier: Apache-2.0
"""The operations that delete whole histories."""

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.stores.redis.branches import delete_branches
from haystack_chat_store.stores.redis.histories import delete_histories, next_ids
from haystack_chat_store.stores.redis.keys import BUCKETS, bucket_of
from haystack_chat_store.stores.redis.operations import RedisOperations, server_info
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import Scope

# How many histories one script deletes.
_ERASED_PER_STEP = 100


class Erasing(RedisOperations):
    """The operations that delete whole histories."""

    async def delete(self, session: Session, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        """Delete the keys of a history, and its entries in the lists of its bucket, then its branches."""
        keys = self.keys(scope)
        deleted = await delete_histories(
            session,
            keys,
            bucket_of(chat_history_id),
            [chat_history_id],
            expected_revision=expected_revision,
            only_own=True,
        )
        await delete_branches(session, keys, chat_history_id, deleted)

    async def delete_all(self, session: Session, scope: Scope) -> bool:
        """Go through the buckets, and delete all that each of them lists by then."""
        keys = self.keys(scope)
        for bucket in range(BUCKETS):
            found = await session.run(scripts.ALL, keys.of_bucket(bucket))
            if not found and not keys.user:
                await session.run(scripts.FORGET_ORIGINS, keys.of_bucket(bucket))
            for first in range(0, len(found), _ERASED_PER_STEP):
                await delete_histories(session, keys, bucket, found[first : first + _ERASED_PER_STEP])
        return False

    async def erase_some(
        self, session: Session, scope: Scope, prefix: str, updated_before: int | None, limit: int
    ) -> int:
        """Go through the buckets: by age if only the age matters, otherwise by id."""
        keys = self.keys(scope)
        erased = 0
        for bucket in range(BUCKETS):
            after: str | None = ""
            seen: set[str] = set()
            while after is not None:
                count = min(limit - erased, _ERASED_PER_STEP)
                if prefix or (updated_before is None and not keys.user):
                    after, found = await next_ids(session, keys, bucket, prefix, after, count, updated_before)
                else:
                    before = "+inf" if updated_before is None else updated_before
                    found = await session.run(scripts.OLDEST, keys.of_bucket(bucket), [before, count, keys.user])
                    after = None if seen.issuperset(found) else ""  # else it cannot be deleted
                    seen.update(found)
                if found:
                    erased += (await delete_histories(session, keys, bucket, found, updated_before)).number
                if erased == limit:
                    return erased
        return erased

    async def vacuum(self, session: Session, scope: Scope) -> None:  # noqa: ARG002  (its files hold all namespaces)
        """Have every server write its files anew."""
        await _wait_for_files(session)  # the file being written now may have been begun before the deletion
        has_log = any(info.get("aof_enabled") != "0" for info in await server_info(session, "persistence"))
        has_snapshots = any(settings[1:2] != [""] for settings in await session.ask_masters("CONFIG", "GET", "save"))
        for is_used, command in ((has_log, "BGREWRITEAOF"), (has_snapshots, "BGSAVE")):
            if is_used:
                await session.ask_masters(command)
                await _wait_for_files(session)


async def _wait_for_files(session: Session) -> None:
    """Wait until no server writes a file in the background."""
    while True:
        infos = await server_info(session, "persistence")
        for info in infos:
            for what in ("aof_last_bgrewrite_status", "rdb_last_bgsave_status"):
                if info.get(what, "ok") != "ok":
                    raise StoreUnavailableError(
                        f"A Redis server could not write its files anew ({what}: {info[what]}). Its log says why. "
                        "What was deleted may still be in them."
                    )
        at_work = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
        if not any(info.get(what, "0") != "0" for info in infos for what in at_work):
            return
        await session.pause()
