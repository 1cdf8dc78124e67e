# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories: listing, titles, statistics, erasing."""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, starmap
from math import inf
from typing import Any

from haystack_chat_store.errors import StoreTimeoutError
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Scope, Unchanged, branch_origin, end_of_prefix
from haystack_chat_store.stores.sqlite import failures
from haystack_chat_store.stores.sqlite.connections import Database, readable_rows
from haystack_chat_store.stores.sqlite.histories import Histories
from haystack_chat_store.stores.sqlite.term_index import TermIndex
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.types import StoreStatistics

_SELECT_HISTORY = """
    SELECT chat_history_id, created_at, updated_at, message_count, round_count, title, meta, revision
    FROM haystack_chat_histories
"""
_HISTORY = _SELECT_HISTORY + "WHERE namespace = ? AND chat_history_id = ?"
_HISTORIES_BY_ID = f"""
    {_SELECT_HISTORY}
    WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ? {{condition}}
    ORDER BY chat_history_id LIMIT ?
"""
# A page of the directory is found in one of two ways. A column with a + before it is not looked for in an index.
_WALK_BY_TIME = f"""
    {_SELECT_HISTORY} INDEXED BY haystack_chat_histories_by_time
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
    SELECT updated_at, chat_history_id FROM haystack_chat_histories INDEXED BY haystack_chat_histories_by_time
    WHERE namespace = ? AND (updated_at, chat_history_id) < (?, ?)
    ORDER BY updated_at DESC, chat_history_id DESC LIMIT 1 OFFSET ?
"""
_COUNT_UP_TO = """
    SELECT count(*) FROM (
        SELECT 1 FROM haystack_chat_histories
        WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ? LIMIT ?
    )
"""
_UPDATE_HISTORY = """
    UPDATE haystack_chat_histories SET title = iif(?, title, ?), meta = iif(?, meta, ?),
        branch_of = iif(?, branch_of, ?)
    WHERE namespace = ? AND chat_history_id = ?
"""
_TOTALS = """
    SELECT count(*), coalesce(sum(message_count), 0), coalesce(sum(round_count), 0)
    FROM haystack_chat_histories WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ?
"""
_MESSAGES_PER_DAY = """
    SELECT (haystack_chat_messages.created_at - (haystack_chat_messages.created_at % ?4 + ?4) % ?4) AS day, count(*)
    FROM haystack_chat_histories
        CROSS JOIN haystack_chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
    WHERE namespace = ?1 AND chat_history_id >= ?2 AND chat_history_id < ?3
    GROUP BY day ORDER BY day
"""
_SIZE = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
_KEYS_BY_ID = """
    SELECT history_key, CAST(message_count AS INTEGER) FROM haystack_chat_histories
    WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ? LIMIT ?
"""
_OLD_KEYS = """
    SELECT history_key, CAST(message_count AS INTEGER)
    FROM haystack_chat_histories INDEXED BY haystack_chat_histories_by_time
    WHERE namespace = ? AND +chat_history_id >= ? AND +chat_history_id < ? AND updated_at < ? LIMIT ?
"""
_MERGE_TERMS = "INSERT INTO haystack_chat_terms (haystack_chat_terms) VALUES ('optimize')"

# Before the history that changed last, and after the one that changed first, even if a time is damaged.
_BEGINNING, _END = (b"\xff" * 16, ""), (-inf, "")
# After all ids, also those that are not text.
_AFTER_ALL_IDS = b"\xff" * 1024
_GREATEST_TIME = 2**62
_DAY = 24 * 60 * 60 * 1_000_000

# Up to this many histories with a prefix are sorted at first, or walked past in the index by time. Then more are.
_TRIED_AT_FIRST = 256
# Up to this many messages are deleted at once, or one history. With search it takes about a second.
_MESSAGES_PER_STEP = 10_000


class Directory(Engine[Database]):
    """The operations on whole histories."""

    def history(self, session: Database, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Look a history up by its id."""
        with session.connection() as connection:
            found = readable_rows(connection, _HISTORY, (scope.namespace, chat_history_id))
        return _history_rows(found)[0] if found else None

    def histories(
        self, session: Database, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """Read the histories in the order of the index by time, or sort those that have the prefix."""
        with session.snapshot() as connection:
            return _history_rows(_listed(connection, scope, prefix, before or _BEGINNING, limit))

    def histories_by_id(self, session: Database, scope: Scope, prefix: str, after: str, limit: int) -> list[HistoryRow]:
        """Read the histories in the order of their ids. Those whose ids are not UTF-8 are left out."""
        first, end = id_range(prefix)
        first = max(first, f"{after}\x00")  # the least text that is greater than `after`
        values = (scope.namespace, first, end, limit)
        with session.connection() as connection:
            try:
                rows = connection.execute(_HISTORIES_BY_ID.format(condition=""), values).fetchall()
            except sqlite3.OperationalError as error:
                if not failures.is_of_damaged_text(error):
                    raise
                connection.create_function("is_utf8", 1, is_utf8, deterministic=True)
                query = _HISTORIES_BY_ID.format(condition="AND is_utf8(CAST(chat_history_id AS BLOB))")
                rows = readable_rows(connection, query, values)
        return _history_rows(rows)

    def update_history(
        self,
        session: Database,
        scope: Scope,
        chat_history_id: str,
        title: str | Unchanged | None,
        meta: str | Unchanged | None,
    ) -> HistoryRow | None:
        """Change the row, and read it."""
        history = (scope.namespace, chat_history_id)
        branch_of = UNCHANGED if meta is UNCHANGED else branch_origin(chat_history_id, meta)
        changes = [
            each
            for value in (title, meta, branch_of)
            for each in (value is UNCHANGED, None if value is UNCHANGED else value)
        ]
        with session.transaction() as connection:
            connection.execute(_UPDATE_HISTORY, (*changes, *history))
            found = readable_rows(connection, _HISTORY, history)
        return _history_rows(found)[0] if found else None

    def statistics(self, session: Database, scope: Scope, prefix: str) -> StoreStatistics:
        """Count everything as of one moment."""
        first, end = id_range(prefix)
        histories = (scope.namespace, first, end or _AFTER_ALL_IDS)
        with session.snapshot() as connection:
            count, messages, rounds = connection.execute(seen(_TOTALS, scope), histories).fetchone()
            (size,) = connection.execute(_SIZE).fetchone()
            days: Counter[Any] = Counter()
            for day, messages_of_day in connection.execute(seen(_MESSAGES_PER_DAY, scope), (*histories, _DAY)):
                days[readable_time(day).date()] += messages_of_day
        return StoreStatistics(
            chat_histories=count, messages=messages, rounds=rounds, size=size, messages_per_day=dict(days)
        )

    def erase_some(self, session: Database, scope: Scope, prefix: str, updated_before: int | None, limit: int) -> int:
        """Delete histories, and let other writers go on if there may be more."""
        values = (scope.namespace, *id_range(prefix))
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            if updated_before is None:
                found = connection.execute(_KEYS_BY_ID, (*values, limit)).fetchall()
            else:
                found = connection.execute(_OLD_KEYS, (*values, updated_before, limit)).fetchall()
            keys = _first_step(found)
            for history_key in keys:
                histories.delete(history_key)
        if len(keys) < len(found) or len(found) == limit:
            session.pause_for_other_writers()
        return len(keys)

    def vacuum(self, session: Database, scope: Scope) -> None:  # noqa: ARG002  (the file holds all namespaces)
        """Write the file anew, and empty the log beside it."""
        with session.transaction() as connection:
            if TermIndex.of(connection).exists:
                connection.execute(_MERGE_TERMS)  # which leaves out the terms of what was deleted
            connection.execute("COMMIT")
            connection.execute("VACUUM")
            is_busy, _, _ = connection.execute("PRAGMA wal_checkpoint (TRUNCATE)").fetchone()
        if is_busy:
            raise StoreTimeoutError(
                "The log beside the file could not be emptied, since others have been reading all the time. Try again."
            )


def id_range(prefix: str) -> tuple[str, str | bytes]:
    """Return the first id that begins with a prefix, and the first value after all of them: at the end, a blob."""
    end = end_of_prefix(prefix)
    return prefix, b"" if end is None else end


def seen(statement: str, scope: Scope) -> str:
    """Return a statement that leaves branches out, unless the scope has them."""
    return (
        statement if scope.with_branches else statement.replace("namespace = ?", "branch_of IS NULL AND namespace = ?")
    )


def is_utf8(text: bytes | None) -> bool:
    """Whether a text can be decoded. There may be none."""
    try:
        return text is None or text.decode() is not None
    except UnicodeDecodeError:
        return False


def _history_rows(rows: Iterable[Sequence[Any]]) -> list[HistoryRow]:
    histories = list(starmap(HistoryRow, rows))
    for history in histories:
        if type(history.updated_at) is not int:
            history.updated_at = _damaged_time(history.updated_at)
    return histories


def _damaged_time(value: object) -> int:
    """Return a number that has the place of a damaged time in SQLite's order, so that a cursor leads past it."""
    return int(max(min(value, _GREATEST_TIME), -_GREATEST_TIME)) if isinstance(value, float) else _GREATEST_TIME


def _listed(
    connection: sqlite3.Connection, scope: Scope, prefix: str, place: tuple[int | bytes, str], limit: int
) -> list[Any]:
    """
    Return a page of the directory.

    If few histories have the prefix, they are looked up by it and sorted. If many do, some soon appear on the walk by
    time. Both ways are tried with growing limits, and the first that completes is taken.
    """
    ids = id_range(prefix)
    few = _TRIED_AT_FIRST
    while prefix:
        (count,) = connection.execute(_COUNT_UP_TO, (scope.namespace, *ids, few + 1)).fetchone()
        if count <= few:
            return readable_rows(connection, seen(_SORT_BY_TIME, scope), (scope.namespace, *place, *ids, limit))
        further_on = readable_rows(connection, _PLACE_FURTHER_ON, (scope.namespace, *place, limit + few))
        if not further_on:
            break
        found = readable_rows(
            connection, seen(_WALK_BY_TIME, scope), (scope.namespace, *place, *further_on[0], *ids, limit)
        )
        if len(found) == limit:
            return found
        few *= 4
    return readable_rows(connection, seen(_WALK_BY_TIME, scope), (scope.namespace, *place, *_END, *ids, limit))


def _first_step(found: Sequence[tuple[int, int]]) -> list[int]:
    """Return the keys of the first of these histories that together have few enough messages, but of one at least."""
    ends = accumulate(count for _, count in found)
    keys = [key for (key, _), end in zip(found, ends, strict=True) if end <= _MESSAGES_PER_STEP]
    return keys or [key for key, _ in found[:1]]
