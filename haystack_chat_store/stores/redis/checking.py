# SPDX-License-Identifier: Apache-2.0
"""
Finding and mending what does not fit together: what something else has changed, or a server has evicted.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.redis.base import GAP, ROLES, STEP, described, moment, new_name, number
from haystack_chat_store.stores.redis.copying import RedisCopying
from haystack_chat_store.stores.redis.keys import BUCKETS, bucket_of
from haystack_chat_store.stores.redis.scripts import TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import checking as scripts
from haystack_chat_store.stores.rows import MessageRow
from haystack_chat_store.types import Fault
from haystack_chat_store.validation import microseconds

if TYPE_CHECKING:
    from haystack_chat_store.stores.redis.connections import Session

# A history that others write to all the time is looked at so often before what was found is reported, mended or not.
_ATTEMPTS = 10


class _Seen(NamedTuple):
    """
    What the script INSPECT returns of a history.
    """

    chat_history_id: str
    next_position: str
    message_count: str
    round_count: str
    created_at: str
    updated_at: str
    expires_at: str
    version: str
    edits: str
    contents: int
    roles: int
    message_ids: int
    times: int
    score: str
    name_score: str
    expiry_score: str
    expiring_keys: int
    keys: int
    schema_version: str

    def end(self) -> int:
        """
        Return the position after the last.
        """
        return max(number(self.next_position), self.contents)

    def joined(self) -> str:
        """
        Return this as the script MEND compares it.
        """
        return " ".join(map(str, self))


class _Message(NamedTuple):
    """
    A message as it should be, or a gap, which has no role.

    :param content: What is to be stored instead of its content, or `None`.
    """

    message_id: str
    role: str
    time: int | None
    content: str | None


_NO_MESSAGE = _Message("", "", None, "")


class _Findings:
    """
    What is wrong with a history, and how it should be.
    """

    def __init__(self, seen: _Seen, index: Mapping[str, int]) -> None:
        """
        Begin without faults.

        :param index: The positions by the messages' ids, as stored.
        """
        self.faults: list[Fault] = []
        self.messages: list[_Message] = []
        self.needs_rewriting = False
        self._seen = seen
        self._index = index
        self._ids_by_position = {position: message_id for message_id, position in index.items()}
        self._ids: set[str] = set()
        has_all_times = seen.times == TIME_LENGTH * seen.end() or not (seen.times or seen.version)
        self._is_even = seen.contents == seen.roles == seen.end() and has_all_times
        if not self._is_even:
            self._add("not all of its keys have equally many messages")

    def look_at(self, contents: Sequence[str], roles: str, times: str, count: int) -> None:
        """
        Find what is wrong with the messages that follow.

        :param count: How many places there are.
        """
        for index in range(count):
            letter = roles[index : index + 1]
            time = moment(times[index * TIME_LENGTH : (index + 1) * TIME_LENGTH])
            content = contents[index] if index < len(contents) else None
            message = _NO_MESSAGE if not content else self._message(content, letter)
            if not content and (content is None or letter != GAP):
                self._add("is gone", len(self.messages))
            elif time is None and self._is_even and self._seen.times:
                self._add("its time is none", len(self.messages))
            self.messages.append(message._replace(time=time))

    def _message(self, content: str, letter: str) -> _Message:
        position = len(self.messages)
        told = described(content)
        message_id, role = told or (self._ids_by_position.get(position, ""), ROLES.get(letter, "assistant"))
        replacement = None
        if not message_id:
            self._add("cannot be read, and its id is lost", position)
            message_id = new_name()
        elif message_id in self._ids:
            self._add("has the id of another message", position)
            message_id = new_name()
            replacement = None if told is None else _with_id(content, message_id)
        elif self._index.get(message_id) != position:
            self._add("is not found by its id", position)
        if self._is_even and role != ROLES.get(letter):
            self._add("is noted with another role", position)
        self._ids.add(message_id)
        return _Message(message_id, role, None, replacement)

    def conclude(self, chat_history_id: str) -> None:
        """
        Find what is wrong with the counters and the lists, when all messages have been looked at.
        """
        seen = self._seen
        strays = len(self._index.keys() - self._ids)
        if strays:
            self._add(f"its index has {strays} ids that no message has")
        expected = {"next_position": len(self.messages), "message_count": len(self._ids), "round_count": self.rounds()}
        for name, value in expected.items():
            if getattr(seen, name) != str(value):
                self._add(f"its {name} is {getattr(seen, name) or 'lost'}, and should be {value}", is_in_messages=False)
        for name in ("created_at", "updated_at"):
            if moment(getattr(seen, name)) is None:
                self._add(f"its {name} is no time", is_in_messages=False)
        if seen.chat_history_id != chat_history_id:
            self._add("its id is not noted", is_in_messages=False)
        self._look_at_lists()
        self.needs_rewriting |= bool(self.faults) and not seen.version  # it has no times yet, or has lost its hash

    def _look_at_lists(self) -> None:
        seen = self._seen
        if not seen.score or float(seen.score) != float(moment(seen.updated_at) or 0):
            self._add("is missing in the directory, or in a wrong place of it", is_in_messages=False)
        if not seen.name_score:
            self._add("is missing among the names", is_in_messages=False)
        if not seen.schema_version:
            self._add("the schema version of its bucket is lost", is_in_messages=False)
        expiring_keys = seen.keys if seen.expires_at else 0
        if number(seen.expires_at) != float(seen.expiry_score or 0) or seen.expiring_keys != expiring_keys:
            self._add("not all of it expires at the same time", is_in_messages=False)

    def rounds(self) -> int:
        """
        Return the number of user messages.
        """
        return sum(message.role == "user" for message in self.messages)

    def fields(self, chat_history_id: str) -> dict[str, str | int]:
        """
        Return what the hash of the history should hold.
        """
        times = [message.time for message in self.messages if message.time is not None]
        created_at, updated_at = moment(self._seen.created_at), moment(self._seen.updated_at)
        if created_at is None:
            now = microseconds(datetime.now(timezone.utc), "now")
            created_at = min(times, default=now if updated_at is None else updated_at)
        return {
            "chat_history_id": chat_history_id,
            "next_position": len(self.messages),
            "message_count": len(self._ids),
            "round_count": self.rounds(),
            "created_at": created_at,
            "updated_at": max(times, default=created_at) if updated_at is None else updated_at,
        }

    def _add(self, description: str, position: int | None = None, *, is_in_messages: bool = True) -> None:
        what = "The chat history" if position is None else "The message"
        text = f"{what}: {description}."
        self.faults.append(Fault(None, position, text, is_repaired=False))
        self.needs_rewriting |= is_in_messages


class RedisChecking(RedisCopying):
    """
    The operations that look after a store.
    """

    async def _faults(self, session: "Session", repair: bool) -> list[Fault]:
        faults: list[Fault] = []
        unnamed: dict[str, None] = {}
        for bucket in range(BUCKETS):
            after: str | None = ""
            while after is not None:
                after, listed = await self._next_ids(session, bucket, "", after)
                for chat_history_id in listed:
                    faults += await self._checked(session, chat_history_id, repair)
            unnamed.update(dict.fromkeys(await self._unnamed(session, bucket)))
        unnamed.update(dict.fromkeys(await self._unlisted(session)))
        for chat_history_id in unnamed:
            faults += await self._checked(session, chat_history_id, repair)
        return faults

    async def _remove(self, session: "Session", chat_history_id: str, positions: Sequence[int]) -> None:
        if positions:
            bucket, history = self._keys_of(chat_history_id)
            index = await self._index(session, bucket.schema_version, history)
            wanted = set(positions)
            gone = [message_id for message_id, position in index.items() if position in wanted]
            await self._remove_ids(session, chat_history_id, gone)

    # ------------------------------------------------------------------ which histories there are

    async def _unnamed(self, session: "Session", bucket: int) -> list[str]:
        """
        Return the ids in a bucket's directory, or among what is to expire, that are not among its names.
        """
        found: dict[str, None] = {}
        for which in (2, 3):
            first, has_more = 0, 1
            while has_more:
                keys = self._keys.of_bucket(bucket)
                has_more, unnamed = await session.run(scripts.UNNAMED, keys, [which, first, STEP])
                found.update(dict.fromkeys(unnamed))
                first += STEP
        return list(found)

    async def _unlisted(self, session: "Session") -> list[str]:
        """
        Return the ids of histories that have keys, but are not among the names.
        """
        found: dict[str, None] = {}
        for address in await session.masters():
            cursor = ""
            while cursor != "0":
                cursor, keys = await session.ask(
                    address, "SCAN", cursor or "0", "MATCH", self._keys.pattern(), "COUNT", STEP
                )
                by_bucket: dict[int, dict[str, None]] = {}
                for chat_history_id in filter(None, map(self._keys.history_of, keys)):
                    by_bucket.setdefault(bucket_of(chat_history_id), {})[chat_history_id] = None
                for bucket, members in by_bucket.items():
                    unlisted = await session.run(scripts.UNLISTED, self._keys.of_bucket(bucket), list(members))
                    found.update(dict.fromkeys(unlisted))
        return list(found)

    # ------------------------------------------------------------------ looking at one, and mending it

    async def _checked(self, session: "Session", chat_history_id: str, repair: bool) -> list[Fault]:
        """
        Return the faults of a history. What others write meanwhile is neither taken for one nor lost.
        """
        faults: list[Fault] = []
        for _ in range(_ATTEMPTS):
            seen = await self._inspected(session, chat_history_id)
            if seen is None:
                return []
            if isinstance(seen, str):
                return [Fault(chat_history_id, None, seen, is_repaired=False)]
            findings = await self._examined(session, chat_history_id, seen)
            faults = [fault._replace(chat_history_id=chat_history_id) for fault in findings.faults]
            if not faults:
                return []
            if repair:
                if await self._mended(session, chat_history_id, seen, findings):
                    return [fault._replace(is_repaired=True) for fault in faults]
            elif await self._inspected(session, chat_history_id) == seen:
                return faults
        return faults

    async def _inspected(self, session: "Session", chat_history_id: str) -> "_Seen | str | None":
        bucket, history = self._keys_of(chat_history_id)
        found = await session.run(scripts.INSPECT, [*bucket, *history], [chat_history_id])
        if found == ["foreign"]:
            return "The chat history: one of its keys holds something else."
        return None if found == ["expired"] else _Seen(*found)

    async def _examined(self, session: "Session", chat_history_id: str, seen: _Seen) -> _Findings:
        bucket, history = self._keys_of(chat_history_id)
        if not seen.keys:
            findings = _Findings(seen, {})
            if seen.score or seen.name_score or seen.expiry_score:
                findings.faults = [Fault(None, None, "The chat history: is listed, but not there.", is_repaired=False)]
            return findings
        index = await self._index(session, bucket.schema_version, history)
        findings = _Findings(seen, index)
        for first in range(0, seen.end(), STEP):
            count = min(STEP, seen.end() - first)
            raw = await self._raw(session, chat_history_id, first, count)
            await session.aside(findings.look_at, *raw, count)
        findings.conclude(chat_history_id)
        return findings

    async def _raw(
        self, session: "Session", chat_history_id: str, first: int, count: int
    ) -> tuple[list[str], str, str]:
        bucket, history = self._keys_of(chat_history_id)
        keys = [bucket.schema_version, *history]
        contents, roles, times = await session.run(scripts.RAW, keys, [first, first + count - 1])
        return contents, roles, times

    async def _mended(self, session: "Session", chat_history_id: str, seen: _Seen, findings: _Findings) -> bool:
        """
        Make a history what it should be, and return whether that has worked: nobody has written to it meanwhile.
        """
        bucket, history = self._keys_of(chat_history_id)
        fields = findings.fields(chat_history_id)
        async with self._stage(session, chat_history_id) as stage:
            if findings.needs_rewriting:
                for first in range(0, len(findings.messages), STEP):
                    messages = findings.messages[first : first + STEP]
                    contents, *_ = await self._raw(session, chat_history_id, first, len(messages))
                    await stage.add(_rows(first, messages, contents, int(fields["created_at"])))
            how = ("new" if findings.needs_rewriting else "old") if seen.keys else "none"
            expires_at = seen.expires_at if number(seen.expires_at) else seen.expiry_score
            values = [value for field in fields.items() for value in field]
            arguments = [chat_history_id, seen.joined(), how, expires_at, fields["updated_at"], *values]
            if not await session.run(scripts.MEND, [*bucket, *history, *stage.keys], arguments):
                return False
            stage.length = 0  # nothing waits any more
            return True


def _rows(first: int, messages: Sequence[_Message], contents: Sequence[str], created_at: int) -> list[MessageRow]:
    rows = []
    for index, message in enumerate(messages):
        content = contents[index] if message.content is None and index < len(contents) else message.content or ""
        time = created_at if message.time is None else message.time
        rows.append(MessageRow(first + index, time, message.message_id, message.role, content))
    return rows


def _with_id(content: str, message_id: str) -> str:
    message = json.loads(content)
    message["meta"][MESSAGE_ID_KEY] = message_id
    return json.dumps(message)
