# SPDX-License-Identifier: Apache-2.0
"""
Looking for what does not fit together, and mending it.

PostgreSQL itself sees to it that no position and no message id is there twice.
"""

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from haystack.dataclasses import ChatRole

from haystack_chat_store import validation
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.json_values import parse_json
from haystack_chat_store.stores.postgres.base import BEGINNING, MAX_POSITION, history_key
from haystack_chat_store.stores.postgres.search import Search
from haystack_chat_store.stores.postgres.statements import BEGIN_READING, READ_WHOLE_TABLES
from haystack_chat_store.stores.postgres.terms import tsvectors
from haystack_chat_store.stores.rows import RECOVERED
from haystack_chat_store.types import Fault

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres.connections import Session

_ROWS_AT_ONCE = 1_000
_NO_CREATION = "Its time of creation is none."
_NO_CHANGE = "Its time of change is none."


class _Found(NamedTuple):
    """
    A fault, and what mends it.

    :param mend: Gets the session and the place, in a transaction. Returns whether it has mended the fault.
    """

    chat_history_id: str | None
    position: int | None
    description: str
    mend: "Callable[[Session, str | None, uuid.UUID, int | None], Awaitable[bool]]"
    history_key: uuid.UUID


class Checking(Search):
    """
    The operation that checks a namespace.
    """

    async def _faults(self, session: "Session", repair: bool) -> list[Fault]:
        """
        Look at everything as of one moment, then mend one thing after the other.
        """
        found = await session.in_transaction(self._look_for_faults, repair, begin=BEGIN_READING)
        faults = []
        for fault in found:
            is_repaired = False
            if repair:
                session.renew_deadline()
                place = (fault.chat_history_id, fault.history_key, fault.position)
                is_repaired = await session.in_transaction(fault.mend, *place)
            faults.append(Fault(*fault[:3], is_repaired))
        while repair and session.pool.is_indexed and await self._index_some(session, _ROWS_AT_ONCE):
            session.renew_deadline()
        return faults

    async def _look_for_faults(self, session: "Session", repair: bool) -> list[_Found]:
        await session.run(READ_WHOLE_TABLES)
        return [
            *await self._wrong_counters(session),
            *await self._wrong_keys(session),
            *await self._orphans(session),
            *await self._unreadable_times(session),
            *await self._wrong_rows(session, repair),
        ]

    async def _wrong_counters(self, session: "Session") -> list[_Found]:
        found = []
        for key, history, next_position, count, round_count, messages, rounds, last in await session.fetch(
            self._statements.miscounted, [self.namespace]
        ):
            if count != messages:
                wrong = f"It is said to have {count} messages, but has {messages}."
                found.append(_Found(history, None, wrong, self._recount, key))
            if round_count != rounds:
                wrong = f"It is said to have {round_count} rounds, but has {rounds}."
                found.append(_Found(history, None, wrong, self._recount, key))
            if next_position <= last:
                wrong = f"Its next position is {next_position}, but its last message has the position {last}."
                found.append(_Found(history, None, wrong, self._recount, key))
        return found

    async def _wrong_keys(self, session: "Session") -> list[_Found]:
        found, last = [], ("", BEGINNING[0])
        while rows := await session.fetch(self._statements.keys, [self.namespace, *last, _ROWS_AT_ONCE]):
            session.renew_deadline()
            last = rows[-1]
            for history, key in rows:
                if key != self._history_key(history):
                    wrong = f"It has the history_key {key}, which is not that of its id: no call finds it."
                    found.append(_Found(history, None, wrong, self._move, key))
        return found

    async def _orphans(self, session: "Session") -> list[_Found]:
        return [
            _Found(
                None,
                None,
                f"{count} messages have the history_key {key}, which no history has. Repaired, they are {name!r} of "
                f"the namespace {RECOVERED!r}.",
                partial(self._recover, name),
                key,
            )
            for key, count in await session.fetch(self._statements.orphans)
            for name in (f"{key}, {time.time_ns() // 1000}",)
        ]

    async def _unreadable_times(self, session: "Session") -> list[_Found]:
        """
        Find times that are not datetime's. Those of messages first, for a history's are mended after them.
        """
        session.renew_deadline()
        found = [
            _Found(history, position, _NO_CREATION, self._mend_message_time, key)
            for key, position, history in await session.fetch(
                self._statements.unreadable_message_times, [self.namespace]
            )
        ]
        for key, history, has_creation, has_change in await session.fetch(
            self._statements.unreadable_times, [self.namespace]
        ):
            if not has_creation:
                found.append(_Found(history, None, _NO_CREATION, self._mend_times, key))
            if not has_change:
                found.append(_Found(history, None, _NO_CHANGE, self._mend_times, key))
        return found

    async def _wrong_rows(self, session: "Session", repair: bool) -> list[_Found]:
        """
        Find messages whose rows do not say what their contents do.
        """
        found: list[_Found] = []
        last: Sequence[Any] = BEGINNING
        has_search = session.pool.has_search
        while (repair or has_search) and (
            rows := await session.fetch(self._statements.rows, [self.namespace, *last, _ROWS_AT_ONCE])
        ):
            session.renew_deadline()
            last = rows[-1][:2]
            if repair:  # else the caller, who reads all messages, says so too
                for key, position, history in await session.aside(_unlike_their_contents, rows):
                    wrong = "Its row had another id or role than its text."
                    found.append(_Found(history, position, wrong, self._mend_row, key))
            if has_search:
                keys, positions = [row[0] for row in rows], [row[1] for row in rows]
                terms = await session.aside(tsvectors, [row[2] for row in rows])
                for (place,) in await session.fetch(self._statements.mismatched, [keys, positions, terms]):
                    key, position, _, history, *_ = rows[place - 1]
                    wrong = "The search index has other words than the message."
                    found.append(_Found(history, position, wrong, self._forget_terms, key))
        return found

    async def _recount(self, session: "Session", _history: str | None, key: uuid.UUID, _position: int | None) -> bool:
        await session.fetch(self._statements.lock_history, [key])
        await session.run(self._statements.recount, {"key": key})
        return True

    async def _move(self, session: "Session", history: str | None, key: uuid.UUID, _position: int | None) -> bool:
        """
        Give a history the key of its id, and its messages as well, unless it has found those again by that.
        """
        keys = {"wrong": key, "right": self._history_key(history or "")}
        await session.fetch(self._statements.lock_history, [key])
        if await session.fetch(self._statements.key_is_taken, keys) != [(False,)]:
            return False
        await session.run(self._statements.move_history, keys)
        await session.run(self._statements.move_messages, keys)
        await session.run(self._statements.recount, {"key": keys["right"]})
        return True

    async def _recover(
        self, name: str, session: "Session", _history: str | None, key: uuid.UUID, _position: int | None
    ) -> bool:
        """
        Give messages a new history in a namespace of its own, unless theirs is back: nobody can say whose they are.
        """
        right = history_key(RECOVERED, name)
        if not (await session.run(self._statements.move_orphans, {"wrong": key, "right": right})).rowcount:
            return False
        await session.run(self._statements.make_recovered, {"key": right, "namespace": RECOVERED, "id": name})
        await session.run(self._statements.recount, {"key": right})
        return await self._mend_times(session, name, right, None)

    async def _mend_row(self, session: "Session", _history: str | None, key: uuid.UUID, position: int | None) -> bool:
        await session.fetch(self._statements.lock_history, [key])
        rows = await session.fetch(self._statements.page_after, [key, (position or 0) - 1, 1])
        for place, _, _, _, content in rows:
            said = _said(content)
            if place == position and said is not None:
                message_id, role = said
                row = {"key": key, "position": position, "message_id": message_id, "role": role}
                mended = await session.run(self._statements.mend_row, row)
                await session.run(self._statements.recount, {"key": key})
                return bool(mended.rowcount)
        return False

    async def _forget_terms(
        self, session: "Session", _history: str | None, key: uuid.UUID, position: int | None
    ) -> bool:
        """
        Have a message indexed again, with all others that are not.
        """
        await session.run(self._statements.forget_terms, [key, position])
        return True

    async def _mend_message_time(
        self, session: "Session", _history: str | None, key: uuid.UUID, position: int | None
    ) -> bool:
        await session.fetch(self._statements.lock_history, [key])
        parameters = {"key": key, "position": position, "end": MAX_POSITION}
        await session.run(self._statements.mend_message_time, parameters)
        return True

    async def _mend_times(
        self, session: "Session", _history: str | None, key: uuid.UUID, _position: int | None
    ) -> bool:
        await session.fetch(self._statements.lock_history, [key])
        await session.run(self._statements.mend_times, {"key": key, "end": MAX_POSITION})
        return True


def _unlike_their_contents(rows: Sequence[tuple[Any, ...]]) -> list[tuple[uuid.UUID, int, str]]:
    return [
        (key, position, history)
        for key, position, content, history, *row in rows
        if _said(content) not in (tuple(row), None)
    ]


def _said(content: str) -> tuple[str, str] | None:
    """
    Return the id and the role that a stored message gives itself, or `None` if it has none that a row can have.
    """
    try:
        message = parse_json(content)
        role = ChatRole(message["role"]).value
        return validation.validated_id(message["meta"][MESSAGE_ID_KEY], MESSAGE_ID_KEY), role
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
