# SPDX-License-Identifier: Apache-2.0
"""
The operation that finds and repairs damage: what another program has changed, or the server has evicted.

A damaged history is rebuilt from its contents: each message states its id and its role. All else is counted again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from haystack import logging

from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.redis.directory import next_ids
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys, bucket_of
from haystack_chat_store.stores.redis.operations import RedisOperations
from haystack_chat_store.stores.redis.reading import read_ids
from haystack_chat_store.stores.redis.schema import (
    BATCH_SIZE,
    GAP,
    ROLES,
    TIME_LENGTH,
    id_and_role,
    new_name,
    number,
    valid_time,
)
from haystack_chat_store.stores.redis.scripts import checking as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.staging import Stage
from haystack_chat_store.stores.rows import MessageRow, Scope
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.types import Fault

logger = logging.getLogger(__name__)

# How often a history is looked at again because others write to it, before its faults are reported unrepaired.
_ATTEMPTS = 10


@dataclass(frozen=True)
class _Inspected:
    """What the script INSPECT returns of a history."""

    chat_history_id: str
    next_position: str
    message_count: str
    round_count: str
    created_at: str
    updated_at: str
    expires_at: str
    edits: str
    contents_length: int
    roles_length: int
    index_length: int
    times_length: int
    directory_time: str
    name_score: str
    expiries_time: str
    expiring_keys: int
    keys: int
    schema_version: str

    def end(self) -> int:
        """Return the position after the last message."""
        return max(number(self.next_position), self.contents_length)

    def has_even_keys(self) -> bool:
        """Whether all keys have equally many messages."""
        end = self.end()
        return self.contents_length == self.roles_length == end and self.times_length == TIME_LENGTH * end

    def joined(self) -> str:
        """Return this as the script REBUILD compares it."""
        return " ".join(map(str, vars(self).values()))


@dataclass(frozen=True, kw_only=True)
class _Message:
    """
    A message as it should be stored, or a gap, which has no role.

    :param content: What is to be stored in place of its content, or `None` to keep it.
    """

    message_id: str = ""
    role: str = ""
    time: int | None = None
    content: str | None = None


class _Examination:
    """Finds the faults of a history, and how it should be."""

    def __init__(self, inspected: _Inspected, index: Mapping[str, int]) -> None:
        """
        Begin without faults.

        :param index: The stored positions of the message ids.
        """
        self.inspected = inspected
        self.faults: list[Fault] = []
        self.messages: list[_Message] = []
        self._index = index
        self._ids_by_position = {position: message_id for message_id, position in index.items()}
        self._ids: set[str] = set()
        self._is_even = inspected.has_even_keys()
        if not self._is_even:
            self._add("not all of its keys have equally many messages")

    def examine(self, contents: Sequence[str], roles: str, times: str, count: int) -> None:
        """
        Find the faults of the messages that follow.

        :param count: How many positions there are.
        """
        for index in range(count):
            letter = roles[index : index + 1]
            time = valid_time(times[index * TIME_LENGTH : (index + 1) * TIME_LENGTH])
            content = contents[index] if index < len(contents) else None
            message = self._message(content, letter) if content else _Message()
            if not content and (content is None or letter != GAP):
                self._add("is gone", len(self.messages))
            elif time is None and self._is_even:
                self._add("its time is none", len(self.messages))
            self.messages.append(replace(message, time=time))

    def conclude(self, chat_history_id: str) -> None:
        """Find the faults of the counters and the lists, when all messages have been examined."""
        inspected = self.inspected
        strays = len(self._index.keys() - self._ids)
        if strays:
            self._add(f"its index has {strays} ids that no message has")
        for name, value in self._counts().items():
            stored = getattr(inspected, name)
            if stored != str(value):
                self._add(f"its {name} is {stored or 'lost'}, and should be {value}")
        for name in ("created_at", "updated_at"):
            if valid_time(getattr(inspected, name)) is None:
                self._add(f"its {name} is no time")
        self._examine_lists(chat_history_id)

    def fields(self, chat_history_id: str) -> dict[str, str | int]:
        """Return what the hash of the history should hold."""
        times = [message.time for message in self.messages if message.time is not None]
        created_at, updated_at = valid_time(self.inspected.created_at), valid_time(self.inspected.updated_at)
        if created_at is None:
            created_at = min(times, default=microseconds_now() if updated_at is None else updated_at)
        return {
            "chat_history_id": chat_history_id,
            **self._counts(),
            "created_at": created_at,
            "updated_at": max(times, default=created_at) if updated_at is None else updated_at,
        }

    def _examine_lists(self, chat_history_id: str) -> None:
        inspected = self.inspected
        if inspected.chat_history_id != chat_history_id:
            self._add("its id is not noted")
        updated_at = float(valid_time(inspected.updated_at) or 0)
        if not inspected.directory_time or float(inspected.directory_time) != updated_at:
            self._add("is missing in the directory, or in a wrong place of it")
        if not inspected.name_score:
            self._add("is missing among the names")
        if not inspected.schema_version:
            self._add("the schema version of its bucket is lost")
        expiring_keys = inspected.keys if inspected.expires_at else 0
        has_same_expiry = number(inspected.expires_at) == float(inspected.expiries_time or 0)
        if not has_same_expiry or inspected.expiring_keys != expiring_keys:
            self._add("not all of it expires at the same time")

    def _message(self, content: str, letter: str) -> _Message:
        position = len(self.messages)
        stated = id_and_role(content)
        message_id, role = stated or (self._ids_by_position.get(position, ""), ROLES.get(letter, "assistant"))
        replacement = None
        if not message_id:
            self._add("cannot be read, and its id is lost", position)
            message_id = new_name()
        elif message_id in self._ids:
            self._add("has the id of another message", position)
            message_id = new_name()
            replacement = None if stated is None else _with_id(content, message_id)
        elif self._index.get(message_id) != position:
            self._add("is not found by its id", position)
        if self._is_even and role != ROLES.get(letter):
            self._add("is noted with another role", position)
        self._ids.add(message_id)
        return _Message(message_id=message_id, role=role, content=replacement)

    def _counts(self) -> dict[str, int]:
        rounds = sum(message.role == "user" for message in self.messages)
        return {"next_position": len(self.messages), "message_count": len(self._ids), "round_count": rounds}

    def _add(self, description: str, position: int | None = None) -> None:
        what = "The chat history" if position is None else "The message"
        self.faults.append(
            Fault(chat_history_id=None, position=position, description=f"{what}: {description}.", is_repaired=False)
        )


class Checking(RedisOperations):
    """The operation that finds and repairs damage."""

    async def check(self, session: Session, scope: Scope, repair: bool) -> list[Fault]:
        """Check each history by itself: those with names, those in other lists, and those whose keys a scan finds."""
        keys = self.keys(scope)
        faults: list[Fault] = []
        unnamed: dict[str, None] = {}
        for bucket in range(BUCKETS):
            after: str | None = ""
            while after is not None:
                after, ids = await next_ids(session, keys, bucket, "", after)
                for chat_history_id in ids:
                    faults += await check_history(session, keys, chat_history_id, repair)
            unnamed.update(dict.fromkeys(await _listed_unnamed(session, keys, bucket)))
        unnamed.update(dict.fromkeys(await _scanned_unnamed(session, keys)))
        for chat_history_id in unnamed:
            faults += await check_history(session, keys, chat_history_id, repair)
        return faults


async def check_history(session: Session, keys: Keys, chat_history_id: str, repair: bool) -> list[Fault]:
    """Return the faults of a history. What others write meanwhile is neither taken for a fault nor lost."""
    faults: list[Fault] = []
    for _ in range(_ATTEMPTS):
        inspected = await _inspect(session, keys, chat_history_id)
        if inspected is None:
            return []
        if isinstance(inspected, Fault):
            return [inspected]
        examination = await examine_history(session, keys, chat_history_id, inspected)
        faults = [replace(fault, chat_history_id=chat_history_id) for fault in examination.faults]
        if not faults:
            return []
        if repair:
            if await _rebuild(session, keys, chat_history_id, examination):
                logger.info("Repaired {count} faults of a chat history in Redis.", count=len(faults))
                return [replace(fault, is_repaired=True) for fault in faults]
        elif await _inspect(session, keys, chat_history_id) == inspected:
            return faults
    return faults


async def examine_history(session: Session, keys: Keys, chat_history_id: str, inspected: _Inspected) -> _Examination:
    """Read all of a history and find its faults."""
    if not inspected.keys:
        examination = _Examination(inspected, {})
        if inspected.directory_time or inspected.name_score or inspected.expiries_time:
            description = "The chat history: is listed, but not there."
            examination.faults = [
                Fault(chat_history_id=None, position=None, description=description, is_repaired=False)
            ]
        return examination
    examination = _Examination(inspected, await read_ids(session, keys, chat_history_id))
    for first in range(0, inspected.end(), BATCH_SIZE):
        count = min(BATCH_SIZE, inspected.end() - first)
        raw = await read_raw(session, keys, chat_history_id, first, count)
        await session.to_thread(examination.examine, *raw, count)
    examination.conclude(chat_history_id)
    return examination


async def read_raw(
    session: Session, keys: Keys, chat_history_id: str, first: int, count: int
) -> tuple[list[str], str, str]:
    """Return the contents, the letters of roles and the times at some positions."""
    contents, roles, times = await session.run(scripts.RAW, keys.to_read(chat_history_id), [first, first + count - 1])
    return contents, roles, times


async def _inspect(session: Session, keys: Keys, chat_history_id: str) -> _Inspected | Fault | None:
    found = await session.run(scripts.INSPECT, keys.to_write(chat_history_id), [chat_history_id])
    if found == ["foreign"]:
        description = "The chat history: one of its keys holds something else."
        return Fault(chat_history_id=chat_history_id, position=None, description=description, is_repaired=False)
    return None if found == ["expired"] else _Inspected(*found)


async def _rebuild(session: Session, keys: Keys, chat_history_id: str, examination: _Examination) -> bool:
    """Put the history in order, and return True. Return False, and change nothing, if it was written to meanwhile."""
    inspected, messages = examination.inspected, examination.messages
    fields = examination.fields(chat_history_id)
    async with Stage(session, keys, chat_history_id) as stage:
        for first in range(0, len(messages), BATCH_SIZE):
            batch = messages[first : first + BATCH_SIZE]
            contents, *_ = await read_raw(session, keys, chat_history_id, first, len(batch))
            await stage.add(_rows(first, batch, contents, int(fields["created_at"])))
        expires_at = inspected.expires_at if number(inspected.expires_at) else inspected.expiries_time
        values = [value for field in fields.items() for value in field] if inspected.keys else []
        arguments = [chat_history_id, inspected.joined(), expires_at, fields["updated_at"], *values]
        names = [*keys.to_write(chat_history_id), *stage.keys]
        if not await session.run(scripts.REBUILD, names, arguments):
            return False
        stage.length = 0  # no messages wait any more
        return True


async def _listed_unnamed(session: Session, keys: Keys, bucket: int) -> list[str]:
    """Return the ids in a bucket's directory and expiries that its names lack."""
    found: dict[str, None] = {}
    for number_of_list in (2, 3):
        first, has_more = 0, 1
        while has_more:
            arguments = [number_of_list, first, BATCH_SIZE]
            has_more, unnamed = await session.run(scripts.LISTED_UNNAMED, keys.of_bucket(bucket), arguments)
            found.update(dict.fromkeys(unnamed))
            first += BATCH_SIZE
    return list(found)


async def _scanned_unnamed(session: Session, keys: Keys) -> list[str]:
    """Return the ids of histories that have keys, but that the names lack."""
    found: dict[str, None] = {}
    for address in await session.masters():
        cursor = ""
        while cursor != "0":
            cursor, names = await session.ask(
                address, "SCAN", cursor or "0", "MATCH", keys.pattern(), "COUNT", BATCH_SIZE
            )
            by_bucket: dict[int, dict[str, None]] = {}
            for chat_history_id in filter(None, map(keys.history_of, names)):
                by_bucket.setdefault(bucket_of(chat_history_id), {})[chat_history_id] = None
            for bucket, members in by_bucket.items():
                unnamed = await session.run(scripts.UNNAMED, keys.of_bucket(bucket), list(members))
                found.update(dict.fromkeys(unnamed))
    return list(found)


def _rows(first: int, messages: Sequence[_Message], contents: Sequence[str], created_at: int) -> list[MessageRow]:
    """Return messages as they are staged."""
    rows = []
    for index, message in enumerate(messages):
        content = contents[index] if message.content is None and index < len(contents) else message.content or ""
        rows.append(
            MessageRow(
                position=first + index,
                created_at=created_at if message.time is None else message.time,
                message_id=message.message_id,
                role=message.role,
                content=content,
            )
        )
    return rows


def _with_id(content: str, message_id: str) -> str:
    message = json.loads(content)
    message["meta"][MESSAGE_ID_KEY] = message_id
    return json.dumps(message)
