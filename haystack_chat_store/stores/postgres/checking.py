# SPDX-License-Identifier: Apache-2.0
"""
The operation that finds what does not fit together, recounts and indexes again.

PostgreSQL itself sees to it that no position and no message id is there twice.
"""

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from haystack import logging

from haystack_chat_store.ids import BRANCH_OF_KEY
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.schema import BEGINNING
from haystack_chat_store.stores.postgres.search import index_next
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import BEGIN_READING, READ_WHOLE_TABLES
from haystack_chat_store.stores.postgres.terms import tsvectors
from haystack_chat_store.stores.rows import WRONG_BRANCH, Scope, branch_origin
from haystack_chat_store.types import Fault

logger = logging.getLogger(__name__)

_BATCH_SIZE = 1_000


@dataclass(frozen=True)
class _Found:
    """A fault, and the function that repairs it in a transaction, if there is one."""

    chat_history_id: str | None
    position: int | None
    description: str
    key: uuid.UUID
    repair: Callable[[Session, "_Found"], Awaitable[None]] | None = None


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
        faults: list[Fault] = []
        for found in await session.in_transaction(_find_faults, scope, begin=BEGIN_READING):
            is_repaired = repair and found.repair is not None
            if repair and found.repair is not None:
                session.renew_deadline()
                await session.in_transaction(found.repair, found, is_result=lambda _: False)
            faults.append(
                Fault(
                    chat_history_id=found.chat_history_id,
                    position=found.position,
                    description=found.description,
                    is_repaired=is_repaired,
                )
            )
        while repair and session.database.is_indexed and await index_next(session, _BATCH_SIZE):
            session.renew_deadline()
        if repaired := sum(fault.is_repaired for fault in faults):
            logger.info("Repaired {repaired} of {found} faults.", repaired=repaired, found=len(faults))
        return faults


async def _find_faults(session: Session, scope: Scope) -> list[_Found]:
    await session.run(READ_WHOLE_TABLES)
    return [
        *await _wrong_counters(session, scope),
        *await _orphans(session),
        *await _unreadable_times(session, scope),
        *await _wrong_branches(session, scope),
        *await _wrong_terms(session, scope),
    ]


async def _wrong_counters(session: Session, scope: Scope) -> list[_Found]:
    found = []
    for key, history, next_position, count, round_count, messages, rounds, last in await session.fetch(
        session.statements.miscounted, [scope.namespace]
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
    return found


async def _orphans(session: Session) -> list[_Found]:
    return [
        _Found(None, None, f"{count} messages have the history_key {key}, which no history has.", key)
        for key, count in await session.fetch(session.statements.orphans)
    ]


async def _unreadable_times(session: Session, scope: Scope) -> list[_Found]:
    """Find histories with times that Python's `datetime` does not have. The caller checks those of messages."""
    session.renew_deadline()
    return [
        _Found(history, None, "Its times cannot be read.", key)
        for key, history in await session.fetch(session.statements.unreadable_times, [scope.namespace])
    ]


async def _wrong_branches(session: Session, scope: Scope) -> list[_Found]:
    """Find histories whose column says otherwise than their meta which history they branched off."""
    session.renew_deadline()
    return [
        _Found(history, None, WRONG_BRANCH, key, _set_origin)
        for key, history, meta, branch_of in await session.fetch(
            session.statements.origins, [scope.namespace, BRANCH_OF_KEY]
        )
        if branch_of != branch_origin(history, meta)
    ]


async def _wrong_terms(session: Session, scope: Scope) -> list[_Found]:
    """Find messages whose terms in the search index are not those of their contents."""
    found: list[_Found] = []
    last: Sequence[Any] = BEGINNING
    while session.database.has_search and (
        rows := await session.fetch(session.statements.rows, [scope.namespace, *last, _BATCH_SIZE])
    ):
        session.renew_deadline()
        last = rows[-1][:2]
        keys, positions = [row[0] for row in rows], [row[1] for row in rows]
        terms = await session.to_thread(tsvectors, [row[2] for row in rows])
        for (place,) in await session.fetch(session.statements.mismatched, [keys, positions, terms]):
            key, position, _, history = rows[place - 1]
            wrong = "The search index has other words than the message."
            found.append(_Found(history, position, wrong, key, _forget_terms))
    return found


async def _recount(session: Session, found: _Found) -> None:
    await session.fetch(session.statements.lock_key, [found.key])
    await session.run(session.statements.recount, {"key": found.key})


async def _set_origin(session: Session, found: _Found) -> None:
    """Set the column by the meta as it is now."""
    for history, meta in await session.fetch(session.statements.lock_origin, [found.key]):
        await session.run(session.statements.set_origin, [branch_origin(history, meta), found.key])


async def _forget_terms(session: Session, found: _Found) -> None:
    """Remove the terms of a message, which is then indexed again with all others that have none."""
    await session.run(session.statements.forget_terms, [found.key, found.position])
