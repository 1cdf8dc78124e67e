# SPDX-License-Identifier: Apache-2.0
"""
Copying and importing histories: messages wait in the target's bucket until all are there.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from haystack_chat_store.errors import ChatMessageStoreError, MessageDecodingError, StoreUnavailableError
from haystack_chat_store.stores.conflicts import (
    check_count,
    duplicate,
    history_has_messages,
    history_not_found,
    message_not_found,
)
from haystack_chat_store.stores.redis.base import GAP, STEP, RedisOperations, letters_of, new_name
from haystack_chat_store.stores.redis.directory import RedisDirectory
from haystack_chat_store.stores.redis.keys import StagedKeys, bucket_of
from haystack_chat_store.stores.redis.scripts import TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import messages as of_messages
from haystack_chat_store.stores.redis.scripts import staging as scripts
from haystack_chat_store.stores.rows import HistoryRow, MessageRow

if TYPE_CHECKING:
    from haystack_chat_store.stores.redis.connections import Session

# So long, in milliseconds, messages wait for those that follow. What a crash has left is gone after that.
_WAITING_TIME = 600_000
# A history that others edit all the time is read so often before a copy is given up.
_ATTEMPTS = 10


class Stage:
    """
    Messages that wait to become a history's. They are given up at the end of the `async with` unless they have.
    """

    def __init__(self, session: "Session", schema_version: str, keys: StagedKeys) -> None:
        """
        Begin without any.
        """
        self.keys = keys
        self.length = 0
        self.rounds = 0
        self._session = session
        self._schema_version = schema_version

    async def __aenter__(self) -> "Stage":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.length:
            with suppress(ChatMessageStoreError):  # then they go when their time is over
                await self._session.run(scripts.DISCARD, [self._schema_version, *self.keys])

    async def add(self, rows: Sequence[MessageRow]) -> None:
        """
        Add messages, and gaps: those without a role.

        :raises DuplicateMessageError: If an id is there twice.
        :raises MessageDecodingError: If a message has no id.
        """
        for first in range(0, len(rows), STEP):
            some = rows[first : first + STEP]
            for row in some:
                if row.role and not row.message_id:
                    raise MessageDecodingError(f"The message at position {row.position} is damaged and has no id.")
            letters = letters_of([row.role or GAP for row in some])
            found = await self._session.run(
                scripts.STAGE,
                [self._schema_version, *self.keys],
                [
                    self.length,
                    _WAITING_TIME,
                    letters,
                    "\x00".join(row.message_id for row in some if row.role),
                    "".join(f"{row.created_at:0{TIME_LENGTH}d}" for row in some),
                    *(row.content for row in some),
                ],
            )
            if found:
                raise duplicate(found)
            self.length += len(some)
            self.rounds += letters.count("u")

    async def add_history(
        self, operations: RedisOperations, chat_history_id: str, until_message_id: str | None
    ) -> bool:
        """
        Add the messages of a history as of one moment, and return whether that has worked: nobody has edited it.

        :raises ChatHistoryNotFoundError: If there is none.
        :raises MessageNotFoundError: If it does not have `until_message_id`.
        """
        part = await operations._part(self._session, chat_history_id, STEP, after=-1)
        if not part.exists:
            raise history_not_found(chat_history_id)
        end, state = part.next_position, part.state
        if until_message_id is not None:
            (position,) = await operations._positions(self._session, chat_history_id, [until_message_id])
            if position is None:
                raise message_not_found(until_message_id)
            end = position + 1
        rows = part.rows
        last = None
        while rows and part.state == state:
            last = rows[-1]
            await self.add([row for row in rows if row.position < end])
            if last.position >= end - 1:
                break
            part = await operations._part(self._session, chat_history_id, STEP, after=last.position, before=end)
            rows = part.rows
        return part.state == state


class RedisCopying(RedisDirectory):
    """
    The operations that bring many messages at once.
    """

    async def _copy(self, session: "Session", source_id: str, target_id: str, until_message_id: str | None) -> int:
        if until_message_id is None and bucket_of(source_id) == bucket_of(target_id):
            copied = await self._fork(session, source_id, target_id)
            if copied is not None:
                return copied
        for _ in range(_ATTEMPTS):
            async with self._stage(session, target_id) as stage:
                if await stage.add_history(self, source_id, until_message_id):
                    answer = await self._finish(session, stage, target_id, 0)
                    if not isinstance(answer, int):
                        raise history_has_messages(target_id)
                    return answer
        raise StoreUnavailableError(
            "The history was edited each time while it was being copied. Nothing was copied. Try again."
        )

    async def _import(
        self, session: "Session", history: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_count: int
    ) -> int:
        bucket, keys = self._keys_of(history.chat_history_id)
        count = await session.run(of_messages.COUNT, [bucket.schema_version, *keys])
        if count != expected_count:
            raise check_count(expected_count, count)
        remaining = iter(batches)
        async with self._stage(session, history.chat_history_id) as stage:
            while (rows := await session.aside(next, remaining, None)) is not None:
                await stage.add(rows)
            answer = await self._finish(session, stage, history.chat_history_id, expected_count, history)
            if not isinstance(answer, int):
                raise duplicate(answer[1]) if answer[0] == "DUPLICATE" else check_count(expected_count, answer[1])
            return answer

    async def _import_several(
        self, session: "Session", histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        there = await self._described(session, [history.chat_history_id for history, _ in histories])
        for each in there.values():
            raise check_count(0, each.row.message_count)
        return sum([await self._import(session, history, [rows], 0) for history, rows in histories])

    async def _fork(self, session: "Session", source_id: str, target_id: str) -> int | None:
        """
        Copy a whole history inside its bucket; but if its messages would get other positions, return `None`.
        """
        bucket, target = self._keys_of(target_id)
        keys = [*bucket, *target, *self._keys.of_history(source_id)]
        answer = await session.run(scripts.FORK, keys, [target_id, self._lifetime(), new_name()])
        if answer == ["NONE"]:
            raise history_not_found(source_id)
        if isinstance(answer, int):
            return answer
        if answer[0] == "CHANGED":
            raise history_has_messages(target_id)
        return None

    async def _finish(
        self,
        session: "Session",
        stage: Stage,
        chat_history_id: str,
        expected_count: int,
        history: HistoryRow | None = None,
    ) -> Any:
        """
        Append what waits to a history, and return what the script returns.

        :param history: What a new history gets.
        """
        fields, changed_at = ["chat_history_id", chat_history_id], ""
        if history is not None:
            changed_at = str(history.updated_at)
            values = ("created_at", str(history.created_at)), ("title", history.title), ("meta", history.meta)
            fields += [each for name, value in values if value is not None for each in (name, value)]
        bucket, keys = self._keys_of(chat_history_id)
        counts = [stage.length, stage.rounds, expected_count]
        arguments: list[str | int] = [chat_history_id, self._lifetime(), *counts, new_name(), changed_at, *fields]
        answer = await session.run(scripts.FINISH, [*bucket, *keys, *stage.keys], arguments)
        if isinstance(answer, int):
            stage.length = 0  # nothing waits any more
        return answer

    def _stage(self, session: "Session", chat_history_id: str) -> Stage:
        bucket = bucket_of(chat_history_id)
        keys = self._keys.of_staged(bucket, new_name())
        return Stage(session, self._keys.of_bucket(bucket).schema_version, keys)
