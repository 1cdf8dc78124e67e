# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories: the directory of them, titles, statistics, and erasing."""

import math
import uuid
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import starmap
from typing import Any

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.stores.conflicts import check_revision
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import (
    AFTER_ALL_IDS,
    AFTER_ALL_TIMES,
    BEGIN_READING,
    READ_WHOLE_TABLES,
    prefix_parameters,
)
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Scope, Unchanged, branch_origin
from haystack_chat_store.types import StoreStatistics

# Up to this many histories are sorted, or passed on the walk by time. If they do not suffice, four times as many are.
_FIRST_TRY = 256
# How many histories one transaction deletes. It deletes fewer if they have more messages than this.
_DELETE_BATCH_SIZE = 1_000
_DELETE_BATCH_MESSAGES = 100_000
_EPOCH = date(1970, 1, 1)


class Directory(Engine[Session]):
    """The operations on whole histories."""

    async def delete(self, session: Session, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        """Delete a history and its branches, with their messages, in one transaction."""
        await session.in_transaction(_delete_expected, scope, chat_history_id, expected_revision)

    async def delete_all(self, session: Session, scope: Scope) -> bool:
        """Delete in batches, each with a time limit of its own, so that any number of histories can be deleted."""
        last_id = ""
        while found := await session.fetch(
            session.statements.next_histories, [scope.namespace, last_id, _DELETE_BATCH_SIZE]
        ):
            batch = _delete_batch(found)
            last_id = batch[-1][0]
            await session.in_transaction(_delete_histories, [key for _, key, _ in batch])
            session.renew_deadline()
        return False

    async def history(self, session: Session, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Return one history, or `None` if it does not exist."""
        key = history_key(scope, chat_history_id)
        rows = await session.fetch(session.statements.history, [key], prepare=True)
        return HistoryRow(*rows[0]) if rows else None

    async def histories(
        self, session: Session, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """
        Sort the histories with the prefix if they are few, and walk by time if they are many.

        Both are tried with growing limits until one completes. The page is always the result of one statement.
        """
        statements = session.statements
        updated_at, chat_history_id = before or (AFTER_ALL_TIMES, AFTER_ALL_IDS)
        parameters = prefix_parameters(scope, prefix) | {
            "updated_at": updated_at,
            "id": chat_history_id,
            "limit": limit,
        }
        if not prefix:
            return list(starmap(HistoryRow, await session.fetch(statements.all_histories, parameters, prepare=True)))
        few, statement = _FIRST_TRY, statements.histories
        while True:
            parameters |= {"few": few, "near": limit + few}
            ((have_prefix, follow),) = await session.fetch(statements.have_more, parameters)
            if not have_prefix:
                statement = statements.histories_of_few
            if not have_prefix or not follow:
                break
            rows = await session.fetch(statements.histories_near, parameters)
            if len(rows) == limit:
                return list(starmap(HistoryRow, rows))
            few *= 4
        return list(starmap(HistoryRow, await session.fetch(statement, parameters)))

    async def histories_by_id(
        self, session: Session, scope: Scope, prefix: str, after: str, limit: int
    ) -> list[HistoryRow]:
        """Walk along the index by id."""
        parameters = {**prefix_parameters(scope, prefix), "after": after, "limit": limit}
        return list(starmap(HistoryRow, await session.fetch(session.statements.histories_by_id, parameters)))

    async def update_history(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        title: str | Unchanged | None,
        meta: str | Unchanged | None,
    ) -> HistoryRow | None:
        """Set both in one statement."""
        parameters = {
            "key": history_key(scope, chat_history_id),
            "has_title": title is not UNCHANGED,
            "title": None if title is UNCHANGED else title,
            "has_meta": meta is not UNCHANGED,
            "meta": None if meta is UNCHANGED else meta,
            "branch_of": None if meta is UNCHANGED else branch_origin(chat_history_id, meta),
        }
        rows = await session.fetch(session.statements.update_history, parameters)
        return HistoryRow(*rows[0]) if rows else None

    async def statistics(self, session: Session, scope: Scope, prefix: str) -> StoreStatistics:
        """Count every message, as of one moment."""
        return await session.in_transaction(_statistics, prefix_parameters(scope, prefix), begin=BEGIN_READING)

    async def erase_some(
        self, session: Session, scope: Scope, prefix: str, updated_before: int | None, limit: int
    ) -> int:
        """Delete a batch of histories, but none that changes meanwhile and is then too new."""
        parameters = {**prefix_parameters(scope, prefix), "limit": limit}
        statement = session.statements.erasable_by_prefix
        if updated_before is not None:
            parameters["updated_before"] = updated_before
            statement = session.statements.erasable_by_age
        erased = 0
        while not erased and (found := await session.fetch(statement, parameters)):
            keys = [key for _, key, _ in _delete_batch(found)]
            erased = await session.in_transaction(_delete_histories, keys, updated_before)
        return erased

    async def vacuum(self, session: Session, scope: Scope) -> None:  # noqa: ARG002  (the tables of all namespaces)
        """Rewrite the tables and their indexes, however long it takes."""
        for statement in (session.statements.vacuum_messages, session.statements.vacuum_histories):
            session.renew_deadline(math.inf)
            if not await session.vacuum(statement):
                raise UnsupportedOperationError("This role may not vacuum the tables. Let their owner run VACUUM FULL.")


async def _statistics(session: Session, parameters: dict[str, Any]) -> StoreStatistics:
    await session.run(READ_WHOLE_TABLES)
    ((histories, messages, rounds),) = await session.fetch(session.statements.totals, parameters)
    ((size,),) = await session.fetch(session.statements.size_on_disk)
    per_day = await session.fetch(session.statements.per_day, parameters)
    return StoreStatistics(
        chat_histories=histories,
        messages=messages,
        rounds=rounds,
        size=size,
        messages_per_day={_EPOCH + timedelta(days=day): count for day, count in per_day},
    )


async def _delete_expected(session: Session, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
    """
    Delete a history and its branches, and theirs.

    If it has another revision, raise an error, which undoes the transaction.
    """
    key = history_key(scope, chat_history_id)
    for _, revision in await session.fetch(session.statements.delete_histories, {"keys": [key]}):
        check_revision(expected_revision, revision)
        await session.run(session.statements.delete_messages, [[key]])
    ids = [chat_history_id]
    while found := await session.fetch(session.statements.branches, {"namespace": scope.namespace, "ids": ids}):
        await _delete_histories(session, [key for _, key in found])
        ids = [branch for branch, _ in found]


async def _delete_histories(session: Session, keys: Sequence[uuid.UUID], updated_before: int | None = None) -> int:
    """Delete histories, but only those that have not changed since a time, if that is given. Return their number."""
    if updated_before is None:
        rows = await session.fetch(session.statements.delete_histories, {"keys": keys})
    else:
        parameters = {"keys": keys, "updated_before": updated_before}
        rows = await session.fetch(session.statements.delete_old_histories, parameters)
    await session.run(session.statements.delete_messages, [[key for key, _ in rows]])
    return len(rows)


def _delete_batch(found: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Return the first of these histories: as many as have not too many messages together, and at least one."""
    messages = 0
    for index, (_, _, count) in enumerate(found):
        messages += count
        if index and messages > _DELETE_BATCH_MESSAGES:
            return found[:index]
    return found
