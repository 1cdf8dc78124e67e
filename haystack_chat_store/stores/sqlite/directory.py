# SPDX-License-Identifier: Apache-2.0
"""
The operations on whole histories: listing, titles, statistics, erasing.
"""

import sqlite3
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import Any

from haystack_chat_store.errors import StoreTimeoutError
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Scope, Unchanged, end_of_prefix
from haystack_chat_store.stores.sqlite import schema
from haystack_chat_store.stores.sqlite.connections import Database
from haystack_chat_store.stores.sqlite.schema import FIRST_TIME, LAST_TIME
from haystack_chat_store.stores.sqlite.texts import all_readable
from haystack_chat_store.stores.sqlite.writing import delete_history
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

_MERGE_INDEX = "INSERT INTO chat_message_terms (chat_message_terms) VALUES ('optimize')"

# Of all histories, the one updated last first, whatever stands in place of a time.
_BEGINNING, _END = (b"\xff" * 16, ""), (-inf, "")
# After all ids, those that are no texts included.
_AFTER_ALL = b"\xff" * 1024
_DAY = 24 * 60 * 60 * 1_000_000

# So many histories with a prefix are looked up and sorted at first, or walked past in the index by time. Then more are.
_TRIED_AT_FIRST = 256
# So many messages are deleted at once, or one history: with search, in about a second, in which all others wait.
_MESSAGES_PER_STEP = 10_000


class Directory(Engine[Database]):
    """
    The operations on whole histories.
    """

    def history(self, session: Database, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """
        Look a history up by its id.
        """
        with session.connection() as connection, all_readable(connection):
            found = connection.execute(_HISTORY, (scope.namespace, chat_history_id)).fetchone()
            return None if found is None else _history_row(found)

    def histories(
        self, session: Database, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """
        Read the histories in the order of the index by time, or sort those that have the prefix.
        """
        try:
            with session.snapshot() as connection:
                return _listed(connection, scope, prefix, before, limit)
        except sqlite3.OperationalError as error:
            if "Could not decode" not in str(error):
                raise
        with session.snapshot() as connection, all_readable(connection):  # which takes a third longer
            return _listed(connection, scope, prefix, before, limit)

    def histories_by_id(self, session: Database, scope: Scope, prefix: str, after: str, limit: int) -> list[HistoryRow]:
        """
        Read the histories in the order of their ids.
        """
        first, end = id_range(prefix)
        first = max(first, f"{after}\x00")  # the least text that is greater than `after`
        with session.connection() as connection, all_readable(connection):
            rows = connection.execute(_HISTORIES_BY_ID, (scope.namespace, first, end, limit))
            return list(map(_history_row, rows))

    def update_history(
        self,
        session: Database,
        scope: Scope,
        chat_history_id: str,
        title: str | Unchanged | None,
        meta: str | Unchanged | None,
    ) -> HistoryRow | None:
        """
        Change the row, and read it.
        """
        history = (scope.namespace, chat_history_id)
        changes = [
            each for value in (title, meta) for each in (value is UNCHANGED, None if value is UNCHANGED else value)
        ]
        with session.transaction() as connection, all_readable(connection):
            connection.execute(_UPDATE_HISTORY, (*changes, *history))
            found = connection.execute(_HISTORY, history).fetchone()
        return None if found is None else _history_row(found)

    def statistics(self, session: Database, scope: Scope, prefix: str) -> StoreStatistics:
        """
        Count everything as of one moment.
        """
        first, end = id_range(prefix)
        histories = (scope.namespace, first, end or _AFTER_ALL)
        with session.snapshot() as connection:
            count, messages, rounds = connection.execute(_TOTALS, histories).fetchone()
            (size,) = connection.execute(_SIZE).fetchone()
            days = connection.execute(_MESSAGES_PER_DAY, (*histories, _DAY, FIRST_TIME, LAST_TIME)).fetchall()
        return StoreStatistics(
            chat_histories=count,
            messages=messages,
            rounds=rounds,
            size=size,
            messages_per_day={datetime_of(day).date(): messages for day, messages in days},
        )

    def erase_some(self, session: Database, scope: Scope, prefix: str, updated_before: int | None, limit: int) -> int:
        """
        Delete histories, and give way to other writers if there may be more.
        """
        histories = (scope.namespace, *id_range(prefix))
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

    def vacuum(self, session: Database, scope: Scope) -> None:
        """
        Write the file anew, and empty the log beside it.
        """
        with session.sole_writer() as connection:
            if schema.has_index(connection):
                connection.execute(_MERGE_INDEX)  # which leaves out the terms of what was deleted
            connection.execute("VACUUM")
            is_busy, _, _ = connection.execute("PRAGMA wal_checkpoint (TRUNCATE)").fetchone()
        if is_busy:
            raise StoreTimeoutError(
                "What was deleted is still in the log beside the file, since others have been reading all the time. "
                "Try again."
            )


def _history_row(row: Sequence[Any]) -> HistoryRow:
    chat_history_id, message_count, round_count, created_at, updated_at, title, meta = row
    return HistoryRow(
        chat_history_id=chat_history_id,
        message_count=message_count,
        round_count=round_count,
        created_at=created_at,
        updated_at=updated_at,
        title=title,
        meta=meta,
    )


def _listed(
    connection: sqlite3.Connection, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
) -> list[HistoryRow]:
    """
    Return a page of the directory.

    Where few histories have the prefix, they are looked up by it and sorted; where many do, some are soon met on
    the walk by time. Which it is shows when both are tried, neither at a greater cost than the other.
    """
    place, ids = before or _BEGINNING, id_range(prefix)
    few = _TRIED_AT_FIRST

    def walk(end: tuple[float, str]) -> list[HistoryRow]:
        rows = connection.execute(_WALK_BY_TIME, (scope.namespace, *place, *end, *ids, limit))
        return list(map(_history_row, rows))

    while prefix:
        (count,) = connection.execute(_COUNT_UP_TO, (scope.namespace, *ids, few + 1)).fetchone()
        if count <= few:
            rows = connection.execute(_SORT_BY_TIME, (scope.namespace, *place, *ids, limit))
            return list(map(_history_row, rows))
        values = (scope.namespace, *place, limit + few)
        end = connection.execute(_PLACE_FURTHER_ON, values).fetchone()
        if end is None:
            break
        found = walk(end)
        if len(found) == limit:
            return found
        few *= 4
    return walk(_END)


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
