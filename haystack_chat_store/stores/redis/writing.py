# SPDX-License-Identifier: Apache-2.0
"""The operations that change what was said."""

from collections.abc import Iterable, Sequence
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.stores.conflicts import (
    check_count,
    duplicate,
    history_exists,
    history_has_messages,
    message_not_found,
)
from haystack_chat_store.stores.redis.directory import delete_histories, read_histories
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
        expected_count: int | None,
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
                "" if expected_count is None else expected_count,
                new_name(),
                *(message.content for message in messages),
            ],
        )
        return written(answer, expected_count)

    async def delete(self, session: Session, scope: Scope, chat_history_id: str) -> None:
        """Delete the keys of a history, and its entries in the lists of its bucket."""
        await delete_histories(session, self.keys(scope), bucket_of(chat_history_id), [chat_history_id])

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
    ) -> None:
        """Delete by ids. Of a message and all that follow it, the ids are read first, until none has come meanwhile."""
        keys = self.keys(scope)
        if from_message_id is None:
            await remove_ids(session, keys, chat_history_id, message_ids or ())
            return
        (first,) = await read_positions(session, keys, chat_history_id, [from_message_id])
        if first is None:
            raise message_not_found(from_message_id)
        ids: list[str] = []
        answer: Any = None
        while not isinstance(answer, int):
            part = await read_part(session, keys, chat_history_id, BATCH_SIZE, after=first - 1)
            ids += [row.message_id for row in part.rows]
            first = part.rows[-1].position + 1 if part.rows else part.next_position
            if first >= part.next_position:
                answer = await remove_ids(
                    session, keys, chat_history_id, ids, required=from_message_id, next_position=part.next_position
                )
                if answer == ["MISSING"]:
                    raise message_not_found(from_message_id)

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
                    answer = await stage.finish(0, self.lifetime())
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
        expected_count: int,
    ) -> int:
        """Stage the messages, and append them by one script when all have come."""
        keys = self.keys(scope)
        check_count(expected_count, await session.run(scripts.COUNT, keys.to_read(history.chat_history_id)))
        remaining = iter(batches)
        async with Stage(session, keys, history.chat_history_id) as stage:
            while (rows := await session.to_thread(next, remaining, None)) is not None:
                await stage.add(rows)
            answer = await stage.finish(expected_count, self.lifetime(), history)
            return written(answer, expected_count)

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
    *,
    required: str = "",
    next_position: int | None = None,
) -> Any:
    """
    Delete messages by their ids, and return how many there were, or why nothing was deleted.

    :param required: The id of a message that the history must have, and which is deleted with all that follow it.
    :param next_position: The history's next position, if nothing may have been appended meanwhile.
    """
    expected = "" if next_position is None else next_position
    arguments = [chat_history_id, required, expected, new_name(), "\x00".join(message_ids)]
    return await session.run(scripts.REMOVE, keys.to_write(chat_history_id), arguments)


def written(answer: Any, expected_count: int | None) -> int:
    """Return how many messages a script has written, or raise the error for the reason why it has written nothing."""
    if isinstance(answer, int):
        return answer
    reason, found = answer
    if reason == "CHANGED":
        check_count(expected_count, found)
    raise duplicate(found)
