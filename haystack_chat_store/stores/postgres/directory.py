# SPDX-License-Identifier: Apache-2.0
"""
Whole histories: the directory of them, their titles, how many there are, and erasing them.
"""

import math
import uuid
from collections.abc import Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.stores.postgres.base import AFTER_ALL_IDS, PostgresOperations
from haystack_chat_store.stores.postgres.statements import BEGIN_READING, INFINITY, READ_WHOLE_TABLES
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Unchanged
from haystack_chat_store.types import StoreStatistics

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres.connections import Session

# So many histories with a prefix are looked up and sorted at first, or walked past by time. Then more are.
_TRIED_AT_FIRST = 256
# What is deleted in one transaction: so many histories, or fewer if they have more messages.
_HISTORIES_PER_STEP = 1_000
_MESSAGES_PER_STEP = 100_000
_EPOCH = date(1970, 1, 1)


class Directory(PostgresOperations):
    """
    The operations on whole histories.
    """

    async def _delete(self, session: "Session", chat_history_id: str) -> None:
        await session.in_transaction(self._delete_histories, [self._history_key(chat_history_id)])

    async def _delete_all(self, session: "Session") -> None:
        """
        Delete in steps, each with a time limit of its own, so that any number of histories can be deleted.
        """
        last_id = ""
        while found := await session.fetch(
            self._statements.next_histories, [self.namespace, last_id, _HISTORIES_PER_STEP]
        ):
            step = _step(found)
            last_id = step[-1][0]
            await session.in_transaction(self._delete_histories, [key for _, key, _ in step])
            session.renew_deadline()

    async def _history(self, session: "Session", chat_history_id: str) -> HistoryRow | None:
        rows = await session.fetch(self._statements.history, [self._history_key(chat_history_id)])
        return HistoryRow(*rows[0]) if rows else None

    async def _histories(
        self, session: "Session", prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """
        Do what `_histories` has to.

        Where few histories have the prefix, they are looked up by it and sorted; where many do, some are soon met on
        the walk by time. Which it is shows when both are tried, neither at a greater cost than the other. The page is
        always the result of one statement, which is right whatever was found out before.
        """
        updated_at, chat_history_id = before or (INFINITY, AFTER_ALL_IDS)
        parameters = self._with_prefix(prefix) | {"updated_at": updated_at, "id": chat_history_id, "limit": limit}
        few, statement = _TRIED_AT_FIRST, self._statements.histories
        while prefix:
            parameters |= {"few": few, "near": limit + few}
            ((have_prefix, follow),) = await session.fetch(self._statements.have_more, parameters)
            if not have_prefix:
                statement = self._statements.histories_of_few
            if not have_prefix or not follow:
                break
            rows = await session.fetch(self._statements.histories_near, parameters)
            if len(rows) == limit:
                return [HistoryRow(*row) for row in rows]
            few *= 4
        return [HistoryRow(*row) for row in await session.fetch(statement, parameters)]

    async def _histories_by_id(self, session: "Session", prefix: str, after: str, limit: int) -> list[HistoryRow]:
        parameters = {**self._with_prefix(prefix), "after": after, "limit": limit}
        return [HistoryRow(*row) for row in await session.fetch(self._statements.histories_by_id, parameters)]

    async def _update_history(
        self, session: "Session", chat_history_id: str, title: str | Unchanged | None, meta: str | Unchanged | None
    ) -> HistoryRow | None:
        parameters = {
            "key": self._history_key(chat_history_id),
            "has_title": title is not UNCHANGED,
            "title": None if title is UNCHANGED else title,
            "has_meta": meta is not UNCHANGED,
            "meta": None if meta is UNCHANGED else meta,
        }
        rows = await session.fetch(self._statements.update_history, parameters)
        return HistoryRow(*rows[0]) if rows else None

    async def _statistics(self, session: "Session", prefix: str) -> StoreStatistics:
        return await session.in_transaction(self._summed_up, prefix, begin=BEGIN_READING)

    async def _summed_up(self, session: "Session", prefix: str) -> StoreStatistics:
        await session.run(READ_WHOLE_TABLES)
        parameters = self._with_prefix(prefix)
        ((histories, messages, rounds),) = await session.fetch(self._statements.totals, parameters)
        ((size,),) = await session.fetch(self._statements.size_on_disk)
        per_day = await session.fetch(self._statements.per_day, parameters)
        days = {_EPOCH + timedelta(days=day): count for day, count in per_day}
        return StoreStatistics(histories, messages, rounds, size, days)

    async def _erase_some(self, session: "Session", prefix: str, updated_before: int | None, limit: int) -> int:
        parameters = {**self._with_prefix(prefix), "limit": limit}
        statement = self._statements.erasable_by_prefix
        if updated_before is not None:
            parameters["updated_before"] = updated_before
            statement = self._statements.erasable_by_age
        erased = 0
        while not erased and (found := await session.fetch(statement, parameters)):
            keys = [key for _, key, _ in _step(found)]
            erased = await session.in_transaction(self._delete_histories, keys, updated_before)
        return erased

    async def _vacuum(self, session: "Session") -> None:
        """
        Rewrite the tables and their indexes, however long it takes.
        """
        for statement in (self._statements.vacuum_messages, self._statements.vacuum_histories):
            session.renew_deadline(math.inf)
            if not await session.vacuum(statement):
                raise UnsupportedOperationError(
                    "What was deleted is deleted, but its bytes stay in the server's files for a while: this role may "
                    "not vacuum the tables. Let their owner run VACUUM FULL."
                )

    async def _delete_histories(
        self, session: "Session", keys: Sequence[uuid.UUID], updated_before: int | None = None
    ) -> int:
        """
        Delete histories, but only those that have not changed since a time, if that is given. Return their number.
        """
        if updated_before is None:
            rows = await session.fetch(self._statements.delete_histories, [keys])
        else:
            parameters = {"keys": keys, "updated_before": updated_before}
            rows = await session.fetch(self._statements.delete_old_histories, parameters)
        await session.run(self._statements.delete_messages, [[key for (key,) in rows]])
        return len(rows)


def _step(found: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """
    Return the first of these histories, which together have not too many messages, or one that alone has.
    """
    messages = 0
    for index, (_, _, count) in enumerate(found):
        messages += count
        if index and messages > _MESSAGES_PER_STEP:
            return found[:index]
    return found
