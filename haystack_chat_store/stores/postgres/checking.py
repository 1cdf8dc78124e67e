# SPDX-License-Identifier: Apache-2.0
"""
The operation that finds what does not fit together, recounts and indexes again.

PostgreSQL itself sees to it that no position and no message id is there twice.
"""

import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from haystack import logging

from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.faults import MAX_FAULTS_OF_KIND, FaultList, kind_of, more_faults
from haystack_chat_store.stores.postgres.histories import NEXT_QUESTIONS, find_previews
from haystack_chat_store.stores.postgres.schema import BEGINNING
from haystack_chat_store.stores.postgres.search import index_next
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import BEGIN_READING, READ_WHOLE_TABLES, Statement
from haystack_chat_store.stores.postgres.terms import title_tsvector, tsvectors
from haystack_chat_store.stores.previews import beginning_of_content, kept_row, preview_faults
from haystack_chat_store.stores.rows import MessageRow, Scope, branch_origin
from haystack_chat_store.types import Fault

logger = logging.getLogger(__name__)

_MISCOUNTED = Statement("""
    SELECT h.history_key, chat_history_id, next_position, message_count, round_count,
        messages, rounds, coalesce(last, -1)
    FROM {histories} AS h CROSS JOIN LATERAL (
        SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds, max(position) AS last
        FROM {messages} AS m WHERE m.history_key = h.history_key
    ) AS counted
    WHERE namespace = %s
        AND (message_count <> messages OR round_count <> rounds OR next_position <= coalesce(last, -1))
    ORDER BY chat_history_id COLLATE "C"
""")
_ORPHANS = Statement("""
    SELECT history_key, count(*) FROM {messages} AS m
    WHERE NOT EXISTS (SELECT FROM {histories} AS h WHERE h.history_key = m.history_key)
    GROUP BY history_key ORDER BY history_key
""")
_UNREADABLE_TIMES = Statement("""
    SELECT history_key, chat_history_id FROM {histories}
    WHERE namespace = %s AND NOT ({created_at_is_readable} AND {updated_at_is_readable}) ORDER BY {by_id}
""")
_DESCRIBED = Statement("""
    SELECT h.history_key, chat_history_id, title, meta, branch_of, preview, last_role, last_text,
        last_at IS NOT DISTINCT FROM said.created_at
            OR said.created_at NOT BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00',
        question.content, said.role, said.content
    FROM {histories} AS h
    LEFT JOIN LATERAL (
        SELECT content FROM {messages} AS m WHERE m.history_key = h.history_key AND role = 'user'
        ORDER BY position LIMIT 1
    ) AS question ON true
    LEFT JOIN LATERAL (
        SELECT role, content, created_at FROM {messages} AS m
        WHERE m.history_key = h.history_key AND role <> 'system' AND position >= 0 ORDER BY position DESC LIMIT 1
    ) AS said ON true
    WHERE namespace = %s AND h.history_key > %s ORDER BY h.history_key LIMIT %s
""")
_MISMATCHED_TITLES = Statement("""
    SELECT h.history_key FROM {histories} AS h
    JOIN unnest(%s::uuid[], %s::text[]) AS sent (history_key, terms) USING (history_key)
    WHERE title_terms IS DISTINCT FROM terms::tsvector
""")
_ROWS = Statement("""
    SELECT m.history_key, position, content, chat_history_id
    FROM {messages} AS m JOIN {histories} AS h USING (history_key)
    WHERE namespace = %s AND (m.history_key, position) > (%s, %s)
    ORDER BY m.history_key, position LIMIT %s
""")
_MISMATCHED = Statement("""
    SELECT place FROM {messages} AS m
    JOIN unnest(%s::uuid[], %s::bigint[], %s::text[]) WITH ORDINALITY AS sent (history_key, position, terms, place)
        ON m.history_key = sent.history_key AND m.position = sent.position
    WHERE search_terms <> terms::tsvector ORDER BY place
""")
_LOCK_KEY = Statement("SELECT FROM {histories} WHERE history_key = %s FOR UPDATE")
_RECOUNT = Statement("""
    UPDATE {histories} SET message_count = messages, round_count = rounds,
        next_position = greatest(next_position, last + 1)
    FROM (
        SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds, max(position) AS last
        FROM {messages} WHERE history_key = %(key)s
    ) AS counted
    WHERE history_key = %(key)s
""")
_TITLE_AND_META = Statement("SELECT chat_history_id, title, meta FROM {histories} WHERE history_key = %s FOR UPDATE")
_DESCRIBE_ANEW = Statement("""
    UPDATE {histories} SET title_terms = %s::tsvector, branch_of = %s WHERE history_key = %s
""")
_FORGET_TERMS = Statement("""
    UPDATE {messages} SET search_terms = NULL WHERE history_key = %s AND position = %s
""")

_BATCH_SIZE = 1_000

# How many faults of a kind a repair finds at once. Then it looks again.
_REPAIRED_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class _Found:
    """A fault, and the function that repairs it in a transaction, if there is one."""

    chat_history_id: str | None
    position: int | None
    description: str
    key: uuid.UUID
    repair: Callable[[Session, "_Found"], Awaitable[None]] | None = None

    def fault(self, *, is_repaired: bool) -> Fault:
        return Fault(
            chat_history_id=self.chat_history_id,
            position=self.position,
            description=self.description,
            is_repaired=is_repaired,
        )


class Checking(Engine[Session]):
    """The operations that check a namespace."""

    async def check(self, session: Session, scope: Scope) -> list[Fault]:
        """Look at everything as of one moment."""
        return await self._check(session, scope, repair=False)

    async def repair(self, session: Session, scope: Scope) -> list[Fault]:
        """Look at everything as of one moment. Then repair one fault after the other."""
        return await self._check(session, scope, repair=True)

    @staticmethod
    async def _check(session: Session, scope: Scope, *, repair: bool) -> list[Fault]:
        faults = FaultList(each for each in session.found_earlier if each.is_repaired)
        found = await session.in_transaction(_find_faults, scope, repair, begin=BEGIN_READING)
        while repair:
            repaired = [each for each in found.kept if each.repair is not None]
            faults.extend(each.fault(is_repaired=True) for each in repaired)
            session.faults = list(faults)
            for each in repaired:
                if each.repair is not None:
                    session.renew_deadline()
                    await session.in_transaction(each.repair, each, is_result=lambda _: False)
            if not (left := found.left_to_repair):
                break
            found = await session.in_transaction(_find_faults, scope, repair, begin=BEGIN_READING)
            if found.left_to_repair >= left:  # what cannot be repaired after all
                break
        faults.extend(each.fault(is_repaired=False) for each in found.kept if not repair or each.repair is None)
        faults.extend(found.more())
        session.faults = list(faults)
        while repair and session.database.is_indexed and await index_next(session, _BATCH_SIZE):
            session.renew_deadline()
        if mended := sum(fault.count for fault in faults if fault.is_repaired):
            number = sum(fault.count for fault in faults)
            logger.info("Repaired {repaired} of {found} faults.", repaired=mended, found=number)
        return list(faults)


class _Findings:
    """The faults that were found, up to a number of each kind, and how many more there are."""

    def __init__(self, repair: bool) -> None:
        self.kept: list[_Found] = []
        self._repair = repair
        self._numbers: Counter[tuple[str, bool]] = Counter()

    def append(self, found: _Found) -> None:
        kind = kind_of(found.description), found.repair is not None
        self._numbers[kind] += 1
        if self._numbers[kind] <= self._limit(kind[1]):
            self.kept.append(found)

    def _limit(self, can_be_repaired: bool) -> int:
        return _REPAIRED_AT_ONCE if self._repair and can_be_repaired else MAX_FAULTS_OF_KIND

    def _left(self) -> Iterator[tuple[str, bool, int]]:
        """Yield of each kind that has more faults than were kept whether it can be repaired, and their number."""
        for (kind, can_be_repaired), number in self._numbers.items():
            if number > self._limit(can_be_repaired):
                yield kind, can_be_repaired, number - self._limit(can_be_repaired)

    @property
    def left_to_repair(self) -> int:
        """The number of faults that can be repaired and were not kept."""
        return sum(number for _, can_be_repaired, number in self._left() if can_be_repaired)

    def more(self) -> list[Fault]:
        """Return the faults that stand for those that were not kept. None of them was repaired."""
        return [more_faults(kind, number, is_repaired=False) for kind, _, number in self._left()]


async def _find_faults(session: Session, scope: Scope, repair: bool) -> _Findings:
    await session.run(READ_WHOLE_TABLES)
    found = _Findings(repair)
    await _wrong_counters(session, scope, found)
    await _orphans(session, found)
    await _unreadable_times(session, scope, found)
    await _wrong_descriptions(session, scope, found)
    await _wrong_terms(session, scope, found)
    return found


async def _wrong_counters(session: Session, scope: Scope, found: _Findings) -> None:
    for key, history, next_position, count, round_count, messages, rounds, last in await session.fetch(
        _MISCOUNTED, [scope.namespace]
    ):
        if count != messages:
            wrong = f"Its counter says {count} messages, but it has {messages}."
            found.append(_Found(history, None, wrong, key, _recount))
        if round_count != rounds:
            wrong = f"Its counter says {round_count} rounds, but it has {rounds}."
            found.append(_Found(history, None, wrong, key, _recount))
        if next_position <= last:
            wrong = f"Its next position is {next_position}, but its last message has the position {last}."
            found.append(_Found(history, None, wrong, key, _recount))


async def _orphans(session: Session, found: _Findings) -> None:
    session.renew_deadline()
    for key, count in await session.fetch(_ORPHANS):
        found.append(_Found(None, None, f"{count} messages have the history_key {key}, which no history has.", key))


async def _unreadable_times(session: Session, scope: Scope, found: _Findings) -> None:
    """Find histories with times that Python's `datetime` does not have. The caller checks those of messages."""
    session.renew_deadline()
    for key, history in await session.fetch(_UNREADABLE_TIMES, [scope.namespace]):
        found.append(_Found(history, None, "Its times cannot be read.", key))


async def _wrong_descriptions(session: Session, scope: Scope, found: _Findings) -> None:
    """Find histories whose previews, terms of titles or origins are not those of their messages, titles and metas."""
    last: uuid.UUID = BEGINNING[0]
    while rows := await session.fetch(_DESCRIBED, [scope.namespace, last, _BATCH_SIZE]):
        session.renew_deadline()
        last = rows[-1][0]
        names = {key: history for key, history, *_ in rows}
        terms = [title_tsvector(row[2]) for row in rows]
        for (key,) in await session.fetch(_MISMATCHED_TITLES, [list(names), terms]):
            wrong = "The search index has other words than its title."
            found.append(_Found(names[key], None, wrong, key, _describe_anew))
        for key, history, _, meta, branch_of, *previews in rows:
            if branch_of != branch_origin(history, meta):
                wrong = "It is listed as a branch of another history than its meta names, or as none."
                found.append(_Found(history, None, wrong, key, _describe_anew))
            for wrong in await _wrong_previews(session, key, history, *previews):
                found.append(_Found(history, None, wrong, key, _find_previews))


async def _wrong_previews(
    session: Session,
    key: uuid.UUID,
    chat_history_id: str,
    preview: str | None,
    last_role: str | None,
    last_text: str | None,
    is_time_right: bool,
    question: str | None,
    role: str | None,
    content: str,
) -> list[str]:
    questions = [] if question is None else [question]
    batch, position = list(questions), -1
    while batch and not any(map(beginning_of_content, batch)):  # the next ones may have text
        more = await session.fetch(NEXT_QUESTIONS, [key, position])
        batch, position = [each for _, each in more], more[-1][0] if more else position
        questions += batch
    last_at = None if role is None and is_time_right else 0
    row = kept_row(chat_history_id, preview, last_role, last_text, last_at)
    last = None
    if role is not None:
        last = MessageRow(position=0, created_at=0 if is_time_right else 1, message_id="", role=role, content=content)
    return [f"{each.capitalize()}." for each in preview_faults(row, questions, last)]


async def _wrong_terms(session: Session, scope: Scope, found: _Findings) -> None:
    """Find messages whose terms in the search index are not those of their contents."""
    last: Sequence[Any] = BEGINNING
    while session.database.has_search and (rows := await session.fetch(_ROWS, [scope.namespace, *last, _BATCH_SIZE])):
        session.renew_deadline()
        last = rows[-1][:2]
        keys, positions = [row[0] for row in rows], [row[1] for row in rows]
        terms = await session.to_thread(tsvectors, [row[2] for row in rows])
        for (place,) in await session.fetch(_MISMATCHED, [keys, positions, terms]):
            key, position, _, history = rows[place - 1]
            wrong = "The search index has other words than the message."
            found.append(_Found(history, position, wrong, key, _forget_terms))


async def _recount(session: Session, found: _Found) -> None:
    await session.fetch(_LOCK_KEY, [found.key])
    await session.run(_RECOUNT, {"key": found.key})


async def _find_previews(session: Session, found: _Found) -> None:
    await session.fetch(_LOCK_KEY, [found.key])
    await find_previews(session, found.key)


async def _describe_anew(session: Session, found: _Found) -> None:
    for history, title, meta in await session.fetch(_TITLE_AND_META, [found.key]):
        described = [title_tsvector(title), branch_origin(history, meta), found.key]
        await session.run(_DESCRIBE_ANEW, described)


async def _forget_terms(session: Session, found: _Found) -> None:
    """Remove the terms of a message, which is then indexed again with all others that have none."""
    await session.run(_FORGET_TERMS, [found.key, found.position])
