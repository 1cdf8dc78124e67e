# SPDX-License-Identifier: Apache-2.0
"""
Messages that are copied or imported: they wait in the target's bucket until all are there, and then appear at once.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from haystack_chat_store.errors import ChatMessageStoreError, MessageDecodingError
from haystack_chat_store.stores.conflicts import duplicate, history_not_found, message_not_found
from haystack_chat_store.stores.redis.keys import Keys, bucket_of
from haystack_chat_store.stores.redis.reading import Part, read_part, read_position
from haystack_chat_store.stores.redis.schema import BATCH_SIZE, GAP, TIME_LENGTH, letters_of, new_name
from haystack_chat_store.stores.redis.scripts import directory as of_directory
from haystack_chat_store.stores.redis.scripts import staging as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import HistoryRow, MessageRow, branch_origin

# How long messages wait for those that follow, in milliseconds. After a crash, they are gone after this time.
_WAITING_TIME = 600_000


class Stage:
    """
    Messages that wait to become part of a history. At the end of the `async with` they are discarded, unless they have.
    """

    def __init__(self, session: Session, keys: Keys, chat_history_id: str) -> None:
        """
        Begin without any messages.

        :param chat_history_id: The history that the messages are for.
        """
        bucket = bucket_of(chat_history_id)
        self.name = new_name()
        self.keys = keys.of_staged(bucket, self.name)
        self.length = 0
        self.rounds = 0
        self.gaps = 0
        self._session = session
        self._keys = keys
        self._target_id = chat_history_id
        self._own_keys = [keys.of_bucket(bucket).schema_version, *self.keys]

    async def __aenter__(self) -> "Stage":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.length:
            with suppress(ChatMessageStoreError):  # then they expire
                await self._session.run(scripts.DISCARD, self._own_keys)

    async def add(self, rows: Sequence[MessageRow]) -> None:
        """
        Add messages. A row without a role is a gap.

        :raises DuplicateMessageError: If two messages have the same id.
        :raises MessageDecodingError: If a message has no id.
        """
        for first in range(0, len(rows), BATCH_SIZE):
            batch = rows[first : first + BATCH_SIZE]
            for row in batch:
                if row.role and not row.message_id:
                    raise MessageDecodingError(f"The message at position {row.position} is damaged and has no id.")
            letters = letters_of(row.role or GAP for row in batch)
            duplicate_id = await self._session.run(
                scripts.STAGE,
                self._own_keys,
                [
                    self.length,
                    _WAITING_TIME,
                    letters,
                    "\x00".join(row.message_id for row in batch if row.role),
                    "".join(f"{row.created_at:0{TIME_LENGTH}d}" for row in batch),
                    *(row.content for row in batch),
                ],
            )
            if duplicate_id:
                raise duplicate(duplicate_id)
            self.length += len(batch)
            self.rounds += letters.count("u")
            self.gaps += letters.count(GAP)

    async def add_history(self, source_id: str, until_message_id: str | None, *, gaps: bool = False) -> Part | None:
        """
        Add the messages of a history as of one moment.

        :param gaps: Whether each message keeps its position.
        :returns: The first messages and the history's state, or `None` if it was edited or handed over meanwhile.
        :raises ChatHistoryNotFoundError: If there is no such history.
        :raises MessageNotFoundError: If it does not have `until_message_id`.
        """
        first = part = await read_part(self._session, self._keys, source_id, BATCH_SIZE, after=-1)
        if not part.exists:
            raise history_not_found(source_id)
        end = part.next_position
        if until_message_id is not None:
            position = await read_position(self._session, self._keys, source_id, until_message_id)
            if position is None:
                raise message_not_found(until_message_id)
            end = position + 1
        rows, last_id = part.rows, None
        while rows and part.state == first.state:
            own = [row for row in rows if row.position < end]
            await self.add(_with_gaps(own, self.length) if gaps else own)
            last, last_id = rows[-1].position, own[-1].message_id if own else last_id
            if last >= end - 1:
                break
            part = await read_part(self._session, self._keys, source_id, BATCH_SIZE, after=last, before=end)
            rows = part.rows
        if part.state != first.state or last_id != (until_message_id or last_id):
            return None
        if gaps:
            await self.add(_with_gaps([], self.length, end))
        return first

    async def finish(
        self,
        expected_revision: int | None,
        lifetime: int | str,
        history: HistoryRow | None = None,
        *,
        user_id: str | None = None,
        further: Mapping[str, str] = MappingProxyType({}),
        least_revision: int = 0,
    ) -> Any:
        """
        Append the waiting messages to the history, and return what the script returns.

        :param expected_revision: The revision that the history must have, or `None` if it must have no messages.
        :param lifetime: After how many milliseconds the history expires, or 0 for never, or @ and the time.
        :param history: Title, meta and times for a new history. Times of 0 stand for now.
        :param user_id: The user of a new history, or `None`.
        :param further: Further fields of a history that is new or must have no messages.
        :param least_revision: A revision that the history is to exceed.
        """
        values: dict[str, str | None] = {"chat_history_id": self._target_id, "user_id": user_id, **further}
        changed_at = ""
        if history is not None:
            changed_at = str(history.updated_at or "now")
            values |= {"created_at": str(history.created_at or "") or None, "title": history.title}
            values["meta"] = history.meta
        fields = [each for name, value in values.items() if value is not None for each in (name, value)]
        counts: list[str | int] = [self.length, self.rounds, "" if expected_revision is None else expected_revision]
        ends: list[str | int] = [least_revision, self.gaps, self._keys.user]
        arguments: list[str | int] = [self._target_id, lifetime, *counts, new_name(), changed_at, *fields, *ends]
        await note_branch(self._session, self._keys, self._target_id, values.get("meta"))
        answer = await self._session.run(scripts.FINISH, [*self._keys.to_write(self._target_id), *self.keys], arguments)
        if isinstance(answer, int):
            self.length = 0  # no messages wait any more
        return answer


async def note_branch(session: Session, keys: Keys, chat_history_id: str, meta: str | None) -> None:
    """Before a history becomes a branch, note in the bucket of its origin that this has branches."""
    origin = branch_origin(chat_history_id, meta)
    if origin is not None:
        await session.run(of_directory.NOTE_ORIGIN, keys.of_bucket_of(origin), [origin])


async def fence(session: Session, keys: Keys, chat_history_id: str, name: str) -> None:
    """Discard the messages that wait for a history under a name. The client that has sent them cannot finish then."""
    bucket = bucket_of(chat_history_id)
    await session.run(
        scripts.FENCE, [keys.of_bucket(bucket).schema_version, *keys.of_staged(bucket, name)], [_WAITING_TIME]
    )


def _with_gaps(rows: Sequence[MessageRow], start: int, end: int | None = None) -> list[MessageRow]:
    """
    Return messages with a gap at each position between them that has none. A gap has no role.

    :param start: The first position.
    :param end: The position after the last one, or `None` if the last message is the end.
    """
    by_position = {row.position: row for row in rows}
    end = rows[-1].position + 1 if rows and end is None else end or start
    return [
        by_position.get(position) or MessageRow(position=position, created_at=0, message_id="", role="", content="")
        for position in range(start, end)
    ]
