# SPDX-License-Identifier: Apache-2.0
"""The operations that change what was said."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.stores.conflicts import (
    check_revision,
    duplicate,
    history_exists,
    history_has_messages,
    message_not_found,
)
from haystack_chat_store.stores.redis.directory import delete_branches, delete_histories, read_histories
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys, bucket_of
from haystack_chat_store.stores.redis.operations import RedisOperations
from haystack_chat_store.stores.redis.reading import read_ids, read_part, read_positions
from haystack_chat_store.stores.redis.schema import BATCH_SIZE, letters_of, new_name
from haystack_chat_store.stores.redis.scripts import directory as of_directory
from haystack_chat_store.stores.redis.scripts import messages as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.staging import Stage
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope

# How many histories `delete_all` deletes by one script.
_DELETED_HISTORIES_PER_STEP = 100
# How often a copy begins again because its source was edited.
_COPY_ATTEMPTS = 10


class Writing(RedisOperations):
    """The operations that change what was said."""

    async def append(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_revision: int | None,
    ) -> int:
        """Append and replace by one script."""
        answer = await session.run(
            scripts.WRITE,
            self.keys(scope).to_write(chat_history_id),
            [
                chat_history_id,
                self.lifetime(),
                letters_of(message.role for message in messages),
                "\x00".join(message.message_id for message in messages),
                policy.value,
                "" if expected_revision is None else expected_revision,
                new_name(),
                *(message.content for message in messages),
            ],
        )
        return written(answer, expected_revision)

    async def delete(self, session: Session, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        """Delete the keys of a history, and its entries in the lists of its bucket, then its branches."""
        keys = self.keys(scope)
        await delete_histories(
            session, keys, bucket_of(chat_history_id), [chat_history_id], expected_revision=expected_revision
        )
        await delete_branches(session, keys, chat_history_id)

    async def delete_all(self, session: Session, scope: Scope) -> bool:
        """Go through the buckets, and delete all that each of them lists by then."""
        keys = self.keys(scope)
        for bucket in range(BUCKETS):
            found = await session.run(of_directory.ALL, keys.of_bucket(bucket))
            for first in range(0, len(found), _DELETED_HISTORIES_PER_STEP):
                await delete_histories(session, keys, bucket, found[first : first + _DELETED_HISTORIES_PER_STEP])
        return False

    async def delete_messages(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
        expected_revision: int | None,
    ) -> None:
        """Delete by ids. Of a message and all that follow it, the ids are read first."""
        keys = self.keys(scope)
        if from_message_id is None:
            answer = await remove_ids(session, keys, chat_history_id, message_ids or (), expected_revision)
            written(answer, expected_revision)
            return

        async def remove(ids: Sequence[str], next_position: int) -> Any:
            return await remove_ids(
                session,
                keys,
                chat_history_id,
                ids,
                expected_revision,
                required=from_message_id,
                next_position=next_position,
            )

        await _with_ids_from(session, keys, chat_history_id, from_message_id, remove, expected_revision)

    async def replace(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        from_message_id: str,
        messages: Sequence[EncodedMessage],
        expected_revision: int | None,
    ) -> int:
        """Delete and append by one script. The ids to delete are read first."""
        keys, call = self.keys(scope), new_name()

        async def replace(ids: Sequence[str], next_position: int) -> Any:
            return await session.run(
                scripts.REPLACE,
                keys.to_write(chat_history_id),
                [
                    chat_history_id,
                    from_message_id,
                    next_position,
                    call,
                    "\x00".join(ids),
                    "" if expected_revision is None else expected_revision,
                    self.lifetime(),
                    letters_of(message.role for message in messages),
                    "\x00".join(message.message_id for message in messages),
                    *(message.content for message in messages),
                ],
            )

        return await _with_ids_from(session, keys, chat_history_id, from_message_id, replace, expected_revision)

    async def remove(self, session: Session, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
        """Delete the messages that the index has at these positions."""
        if positions:
            keys = self.keys(scope)
            wanted = set(positions)
            index = await read_ids(session, keys, chat_history_id)
            ids = [message_id for message_id, position in index.items() if position in wanted]
            await remove_ids(session, keys, chat_history_id, ids)

    # ------------------------------------------------------------------ copying and importing

    async def copy(
        self, session: Session, scope: Scope, source_id: str, target_id: str, until_message_id: str | None
    ) -> int:
        """Read the source and stage its messages, again if the source is edited meanwhile."""
        keys = self.keys(scope)
        for _ in range(_COPY_ATTEMPTS):
            async with Stage(session, keys, target_id) as stage:
                if await stage.add_history(source_id, until_message_id):
                    answer = await stage.finish(None, self.lifetime())
                    if not isinstance(answer, int):
                        raise history_has_messages(target_id)
                    return answer
        raise StoreUnavailableError(
            "The history was edited each time while it was being copied. Nothing was copied. Try again."
        )

    async def import_history(
        self,
        session: Session,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_revision: int,
    ) -> int:
        """Stage the messages, and append them by one script when all have come."""
        keys = self.keys(scope)
        found = await read_histories(session, keys, [history.chat_history_id])
        check_revision(expected_revision, next((each.row.revision for each in found.values()), 0))
        remaining = iter(batches)
        async with Stage(session, keys, history.chat_history_id) as stage:
            while (rows := await session.to_thread(next, remaining, None)) is not None:
                await stage.add(rows)
            answer = await stage.finish(expected_revision, self.lifetime(), history)
            return written(answer, expected_revision)

    async def import_histories(
        self, session: Session, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        """Import one after the other, if none of them exists."""
        ids = [history.chat_history_id for history, _ in histories]
        for existing_id in await read_histories(session, self.keys(scope), ids):
            raise history_exists(existing_id)
        return sum([await self.import_history(session, scope, history, [rows], 0) for history, rows in histories])


async def remove_ids(
    session: Session,
    keys: Keys,
    chat_history_id: str,
    message_ids: Sequence[str],
    expected_revision: int | None = None,
    *,
    required: str = "",
    next_position: int | None = None,
) -> Any:
    """
    Delete messages by their ids, and return how many there were, or why nothing was deleted.

    :param expected_revision: The revision that the history must have, or `None` for any.
    :param required: The id of a message that the history must have, and which is deleted with all that follow it.
    :param next_position: The history's next position, if nothing may have been appended meanwhile.
    """
    position, revision = ("" if each is None else each for each in (next_position, expected_revision))
    arguments = [chat_history_id, required, position, new_name(), "\x00".join(message_ids), revision]
    return await session.run(scripts.REMOVE, keys.to_write(chat_history_id), arguments)


async def _with_ids_from(
    session: Session,
    keys: Keys,
    chat_history_id: str,
    from_message_id: str,
    change: Callable[[Sequence[str], int], Awaitable[Any]],
    expected_revision: int | None,
) -> int:
    """
    Read the ids of a message and all that follow it, and make a change with them, until no message comes meanwhile.

    :param change: Gets the ids, and the next position of the history: no ids and 0 if it does not have the message.
        Returns what the script returns.
    :returns: The number that the script returns.
    """
    ids: list[str] = []
    first: int | None = None
    while True:
        next_position = 0
        if first is None:
            (first,) = await read_positions(session, keys, chat_history_id, [from_message_id])
        if first is not None:
            part = await read_part(session, keys, chat_history_id, BATCH_SIZE, after=first - 1)
            ids += [row.message_id for row in part.rows]
            first = part.rows[-1].position + 1 if part.rows else part.next_position
            next_position = part.next_position
            if first < next_position:
                continue
        answer = await change(ids, next_position)
        if answer == ["MISSING"]:
            raise message_not_found(from_message_id)
        if answer == ["OTHERS"]:
            ids, first = [], None
        elif answer != ["MORE"]:
            return written(answer, expected_revision)


def written(answer: Any, expected_revision: int | None) -> int:
    """Return how many messages a script has written, or raise the error for the reason why it has written nothing."""
    if isinstance(answer, int):
        return answer
    reason, found = answer
    if reason == "CHANGED":
        check_revision(expected_revision, found)
    raise duplicate(found)
