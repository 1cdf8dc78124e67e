# SPDX-License-Identifier: Apache-2.0
"""
The operations on whole histories: listing, titles, statistics, erasing.
"""

import sqlite3
from collections.abc import Sequence
from itertools import accumulate
from math import inf

from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Unchanged, end_of_prefix
from haystack_chat_store.stores.sqlite.database import Database
from haystack_chat_store.stores.sqlite.messages import FIRST_TIME, LAST_TIME, delete_history
from haystack_chat_store.stores.sqlite.texts import all_readable
from haystack_chat_store.stores.times import datetime_of
from haystack_chat_store.types import StoreStatistics

# What is no time, but a text or the like, is greater than all times. Read as an integer, it has the same place.
_SELECT_HISTORY = """
    SELECT chat_history_id, message_count, round_count, created_at,
        CAST(max(min(updated_at, 0x4000000000000000), -0x4000000000000000) AS INTEGER),
        CAST(title AS TEXT), iif(typeof(meta) = 'null', NULL, CAST(meta AS TEXT))
    FROM chat_histories
"""
_HISTORY = _SELECT_HISTORY + "WHERE namespace = ? AND chat_history_id = ?"
_HISTORIES_BY_ID = f"""
    {_SELECT_HISTORY}
    WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ?
        AND is_readable(CAST(chat_history_id AS BLOB))  -- else the walk would come to it again and again
    ORDER BY chat_history_id LIMIT ?
"""
# A page of the directory is found in one of two ways. A column with a + before it is not looked for in an index.
_WALK_BY_TIME = f"""
    {_SELECT_HISTORY} INDEXED BY chat_histories_by_time
    WHERE namespace = ? AND (updated_at, chat_history_id) < (?, ?) AND (updated_at, chat_history_id) >= (?, ?)
        AND +chat_history_id >= ? AND +chat_history_id < ?
    ORDER BY updated_at DESC, chat_history_id DESC LIMIT ?
"""
_SORT_BY_TIME = f"""
    {_SELECT_HISTORY}
    WHERE namespace = ? AND (+updated_at, +chat_history_id) < (?, ?) AND chat_history_id >= ? AND chat_history_id < ?
    ORDER BY +updated_at DESC, +chat_history_id DESC LIMIT ?
"""
_PLACE_FURTHER_ON = """
    SELECT updated_at, chat_history_id FROM chat_histories INDEXED BY chat_histories_by_time
    WHERE namespace = ? AND (updated_at, chat_history_id) < (?, ?)
    ORDER BY updated_at DESC, chat_history_id DESC LIMIT 1 OFFSET ?
"""
_COUNT_UP_TO = """
    SELECT count(*) FROM (
        SELECT 1 FROM chat_histories WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ? LIMIT ?
    )
"""
_UPDATE_HISTORY = """
    UPDATE chat_histories SET title = iif(?, title, ?), meta = iif(?, meta, ?)
    WHERE namespace = ? AND chat_history_id = ?
"""
_TOTALS = """
    SELECT count(*), coalesce(sum(message_count), 0), coalesce(sum(round_count), 0)
    FROM chat_histories WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ?
"""
_MESSAGES_PER_DAY = """
    SELECT (created_at - (created_at % ?4 + ?4) % ?4) AS day, count(*) FROM (
        SELECT CAST(iif(chat_messages.created_at BETWEEN ?5 AND ?6, chat_messages.created_at, 0) AS INTEGER)
            AS created_at
        FROM chat_histories
            CROSS JOIN chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
        WHERE namespace = ?1 AND chat_history_id >= ?2 AND chat_history_id < ?3
    )
    GROUP BY day ORDER BY day
"""
_SIZE = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
_KEYS_BY_ID = """
    SELECT history_key, CAST(message_count AS INTEGER) FROM chat_histories
    WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ? LIMIT ?
"""
_OLD_KEYS = """
    SELECT history_key, CAST(message_count AS INTEGER) FROM chat_histories INDEXED BY chat_histories_by_time
    WHERE namespace = ? AND +chat_history_id >= ? AND +chat_history_id < ? AND updated_at < ? LIMIT ?
"""

# Of all histories, the one updated last first, whatever stands in place of a time.
_BEGINNING, _END = (b"\xff" * 16, ""), (-inf, "")
# After all ids, those that are no texts included.
_AFTER_ALL = b"\xff" * 1024
_DAY = 24 * 60 * 60 * 1_000_000

# So many histories with a prefix are looked up and sorted at first, or walked past in the index by time. Then more are.
_TRIED_AT_FIRST = 256
# So many messages are deleted at once, or one history: with search, in about a second, in which all others wait.
_MESSAGES_PER_STEP = 10_000


class DirectoryOperations(Engine[Database]):
    """
    The operations on whole histories.
    """

    namespace: str

    def _history(self, session: Database, chat_history_id: str) -> HistoryRow | None:
        with session.connection() as connection, all_readable(connection):
            found = connection.execute(_HISTORY, (self.namespace, chat_history_id)).fetchone()
            return None if found is None else HistoryRow(*found)

    def _histories(
        self, session: Database, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        try:
            with session.snapshot() as connection:
                return self._listed(connection, prefix, before, limit)
        except sqlite3.OperationalError as error:
            if "Could not decode" not in str(error):
                raise
        with session.snapshot() as connection, all_readable(connection):  # which takes a third longer
            return self._listed(connection, prefix, before, limit)

    def _listed(
        self, connection: sqlite3.Connection, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """
        Do what `_histories` has to.

        Where few histories have the prefix, they are looked up by it and sorted; where many do, some are soon met on
        the walk by time. Which it is shows when both are tried, neither at a greater cost than the other.
        """
        place, ids = before or _BEGINNING, id_range(prefix)
        few = _TRIED_AT_FIRST

        def walk(end: tuple[float, str]) -> list[HistoryRow]:
            rows = connection.execute(_WALK_BY_TIME, (self.namespace, *place, *end, *ids, limit))
            return list(map(HistoryRow._make, rows))

        while prefix:
            (count,) = connection.execute(_COUNT_UP_TO, (self.namespace, *ids, few + 1)).fetchone()
            if count <= few:
                rows = connection.execute(_SORT_BY_TIME, (self.namespace, *place, *ids, limit))
                return list(map(HistoryRow._make, rows))
            values = (self.namespace, *place, limit + few)
            end = connection.execute(_PLACE_FURTHER_ON, values).fetchone()
            if end is None:
                break
            found = walk(end)
            if len(found) == limit:
                return found
            few *= 4
        return walk(_END)

    def _histories_by_id(self, session: Database, prefix: str, after: str, limit: int) -> list[HistoryRow]:
        first, end = id_range(prefix)
        first = max(first, f"{after}\x00")  # the least text that is greater than `after`
        with session.connection() as connection, all_readable(connection):
            rows = connection.execute(_HISTORIES_BY_ID, (self.namespace, first, end, limit))
            return list(map(HistoryRow._make, rows))

    def _update_history(
        self, session: Database, chat_history_id: str, title: str | Unchanged | None, meta: str | Unchanged | None
    ) -> HistoryRow | None:
        history = (self.namespace, chat_history_id)
        changes = [
            each for value in (title, meta) for each in (value is UNCHANGED, None if value is UNCHANGED else value)
        ]
        with session.transaction() as connection, all_readable(connection):
            connection.execute(_UPDATE_HISTORY, (*changes, *history))
            found = connection.execute(_HISTORY, history).fetchone()
        return None if found is None else HistoryRow(*found)

    def _statistics(self, session: Database, prefix: str) -> StoreStatistics:
        first, end = id_range(prefix)
        histories = (self.namespace, first, end or _AFTER_ALL)
        with session.snapshot() as connection:
            count, messages, rounds = connection.execute(_TOTALS, histories).fetchone()
            (size,) = connection.execute(_SIZE).fetchone()
            days = connection.execute(_MESSAGES_PER_DAY, (*histories, _DAY, FIRST_TIME, LAST_TIME)).fetchall()
        return StoreStatistics(count, messages, rounds, size, {datetime_of(day).date(): count for day, count in days})

    def _erase_some(self, session: Database, prefix: str, updated_before: int | None, limit: int) -> int:
        histories = (self.namespace, *id_range(prefix))
        with session.transaction() as connection:
            if updated_before is None:
                found = connection.execute(_KEYS_BY_ID, (*histories, limit)).fetchall()
            else:
                found = connection.execute(_OLD_KEYS, (*histories, updated_before, limit)).fetchall()
            keys = _step(found)
            for history_key in keys:
                delete_history(connection, history_key)
        if len(keys) < len(found) or len(found) == limit:
            session.give_way()
        return len(keys)


def _step(found: Sequence[tuple[int, int]]) -> list[int]:
    """
    Return the keys of the first of these histories, which together have not too many messages, or of one that has.
    """
    ends = accumulate(count for _, count in found)
    keys = [key for (key, _), end in zip(found, ends, strict=True) if end <= _MESSAGES_PER_STEP]
    return keys or [key for key, _ in found[:1]]


def id_range(prefix: str) -> tuple[str, str | bytes]:
    """
    Return the first id that begins with a prefix, and the first thing after all of them: at the end, a blob.
    """
    end = end_of_prefix(prefix)
    return prefix, b"" if end is None else end
