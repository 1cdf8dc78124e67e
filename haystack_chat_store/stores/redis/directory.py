# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories: the directory of them, titles, meta and users."""

from haystack_chat_store.stores.conflicts import no_access
from haystack_chat_store.stores.redis.branches import HandingOver, hand_over_branches
from haystack_chat_store.stores.redis.documents import index_written, prepare_index
from haystack_chat_store.stores.redis.failures import changed_each_time, contradicting
from haystack_chat_store.stores.redis.histories import listed_history, read_histories
from haystack_chat_store.stores.redis.listing import newest_histories, next_histories
from haystack_chat_store.stores.redis.operations import RedisOperations, lifetime
from haystack_chat_store.stores.redis.schema import BATCH_SIZE
from haystack_chat_store.stores.redis.scripts import directory as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.staging import Stage, note_branch
from haystack_chat_store.stores.redis.statistics import count_all
from haystack_chat_store.stores.rows import UNCHANGED, HistoryChange, HistoryRow, Scope
from haystack_chat_store.types import StoreStatistics

# How often the creation of a history begins again because it was deleted meanwhile.
_CREATE_ATTEMPTS = 10


class Directory(RedisOperations):
    """The operations on whole histories."""

    async def history(self, session: Session, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Read the hash of a history."""
        found = await read_histories(session, self.keys(scope), [chat_history_id])
        return found[chat_history_id].row if found else None

    async def histories(
        self, session: Session, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """Merge the newest histories of all buckets."""
        keys, with_branches = self.keys(scope), scope.with_branches
        return await newest_histories(session, keys, prefix, before, limit, with_branches=with_branches)

    async def histories_by_id(
        self, session: Session, scope: Scope, prefix: str, after: str, limit: int
    ) -> list[HistoryRow]:
        """Merge the next histories of all buckets."""
        keys, with_branches = self.keys(scope), scope.with_branches
        return await next_histories(session, keys, prefix, after, limit, with_branches=with_branches)

    async def update_history(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        change: HistoryChange,
    ) -> HistoryRow | None:
        """
        Set and delete fields of the hash of a history. Keys of the meta are set only if it is still the same.

        Branches get another user before the history does, so that a repeated call finishes what another one began.
        Those that were made meanwhile get it afterwards.
        """
        keys, handing_over = self.keys(scope), None
        if change.user_id is not UNCHANGED:
            found = await read_histories(session, keys, [chat_history_id])
            before = next((each.row.user_id for each in found.values()), change.user_id)
            handing_over = HandingOver(before, change.user_id)
            await hand_over_branches(session, keys, chat_history_id, handing_over, set())
        names = [*keys.of_bucket_of(chat_history_id), keys.of_history(chat_history_id).counters]
        while True:
            meta, required = change.meta, ""
            if change.merged is not None:
                found = await read_histories(session, keys, [chat_history_id], of_all=True)
                stored = next((each.row.meta for each in found.values()), None)
                meta, required = change.new_meta(stored), f"={stored or ''}"
            wanted = (("title", change.title), ("meta", meta), ("user_id", change.user_id))
            changes = {name: value for name, value in wanted if value is not UNCHANGED}
            if isinstance(meta, str):
                await note_branch(session, keys, chat_history_id, meta)
            values = [each for name, value in changes.items() if value is not None for each in (name, str(value))]
            deleted = [name for name, value in changes.items() if value is None]
            default_title = "" if change.default_title is None else f"={change.default_title}"
            arguments: list[str | int] = [
                chat_history_id,
                len(values),
                *values,
                *deleted,
                default_title,
                required,
                keys.user,
            ]
            fields = await session.run(scripts.UPDATE, names, arguments)
            if fields == ["ACCESS"]:
                raise no_access()
            if fields != ["CHANGED"]:
                updated = listed_history(chat_history_id, fields)
                if updated is not None and handing_over is not None:
                    await hand_over_branches(session, keys, chat_history_id, handing_over, set())
                if change.user_id is not UNCHANGED:
                    await index_written(self, session, keys, chat_history_id)
                return None if updated is None else updated.row

    async def create_history(self, session: Session, scope: Scope, history: HistoryRow) -> tuple[HistoryRow, bool]:
        """Make a history with the script that ends an import, without messages."""
        keys, new_id = self.keys(scope), history.chat_history_id
        await prepare_index(self, session, keys)
        user_id = history.user_id if scope.user_id is None else scope.user_id
        for _ in range(_CREATE_ATTEMPTS):
            stage = Stage(session, keys, new_id)
            answer = await stage.finish(0, lifetime(scope), history, user_id=user_id)
            if not isinstance(answer, int) and answer[0] == "ACCESS":
                raise no_access()
            found = await read_histories(session, keys, [new_id])
            if new_id in found:  # unless it was deleted just now
                return found[new_id].row, isinstance(answer, int)
        raise (changed_each_time if isinstance(answer, int) else contradicting)(new_id)

    async def namespaces(self, session: Session, scope: Scope) -> list[str]:
        """Look through the keys of all servers for the lists of histories."""
        keys = self.keys(scope)
        found: set[str | None] = set()
        for address in await session.masters():
            cursor = ""
            while cursor != "0":
                options = "MATCH", keys.directories_pattern(), "COUNT", BATCH_SIZE
                cursor, names = await session.ask(address, "SCAN", cursor or "0", *options)
                found.update(map(keys.namespace_of, names))
        return sorted(filter(None, found))

    async def statistics(self, session: Session, scope: Scope, prefix: str) -> StoreStatistics:
        """Add up the counters of all histories, and count the times of their messages by day."""
        return await count_all(session, self.keys(scope), prefix, with_branches=scope.with_branches)
