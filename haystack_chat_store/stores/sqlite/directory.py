# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories: listing, titles, statistics, erasing."""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, starmap
from math import inf
from typing import Any

from haystack_chat_store.errors import StoreTimeoutError
from haystack_chat_store.search_text import Phrase, title_patterns, title_terms
from haystack_chat_store.stores.conflicts import history_is_there, history_not_found
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import UNCHANGED, HistoryChange, HistoryRow, Scope, branch_origin, end_of_prefix
from haystack_chat_store.stores.sqlite import failures
from haystack_chat_store.stores.sqlite.connections import Database, damaged_texts_escaped, readable_rows
from haystack_chat_store.stores.sqlite.histories import Histories
from haystack_chat_store.stores.sqlite.term_index import TermIndex
from haystack_chat_store.stores.sqlite.turns import WriteSession
from haystack_chat_store.stores.sqlite.visibility import IS_VISIBLE, IS_VISIBLE_HISTORY, visible_history
from haystack_chat_store.stores.times import microseconds_now, readable_time
from haystack_chat_store.stores.usage import UsageCounter
from haystack_chat_store.types import StoreStatistics

_SELECT_HISTORY = """
    SELECT chat_history_id, created_at, updated_at, message_count, round_count, title, meta, revision, user_id, preview,
        last_role, last_text, last_at
    FROM haystack_chat_histories
"""
_HISTORY = _SELECT_HISTORY + f"WHERE {IS_VISIBLE_HISTORY}"
_WRITTEN_HISTORY = _SELECT_HISTORY + "WHERE namespace = ?1 AND chat_history_id = ?2"
_HISTORIES_BY_ID = f"""
    {_SELECT_HISTORY}
    WHERE namespace = ?1 AND chat_history_id >= ?2 AND chat_history_id < ?6 AND {IS_VISIBLE} {{condition}}
    ORDER BY chat_history_id LIMIT ?5
"""
_TITLES = f"""
    {_SELECT_HISTORY} INDEXED BY haystack_chat_histories_by_title
    WHERE namespace = ?1 AND chat_history_id >= ?2 AND chat_history_id < ?5 AND {IS_VISIBLE}
        AND title_terms IS NOT NULL {{contained}}
    ORDER BY length(title), updated_at DESC LIMIT ?6
"""
_NAMESPACES = """
    WITH RECURSIVE names (name) AS (
        SELECT min(namespace) FROM haystack_chat_histories
        UNION ALL
        SELECT (SELECT min(namespace) FROM haystack_chat_histories WHERE namespace > name)
        FROM names WHERE name IS NOT NULL
    )
    SELECT name FROM names WHERE name IS NOT NULL
"""
# A page of the directory is found in one of two ways. A column with a + before it is not looked for in an index. The
# histories of a user are walked along by time in an index of their own.
_WALK = f"""
    {_SELECT_HISTORY} INDEXED BY haystack_chat_histories_by_{{index}}
    WHERE namespace = ?1 AND {{user}} (updated_at, chat_history_id) < (?5, ?6)
        AND (updated_at, chat_history_id) >= (?7, ?8)
        AND +chat_history_id >= ?9 AND +chat_history_id < ?10 AND {IS_VISIBLE}
    ORDER BY updated_at DESC, chat_history_id DESC LIMIT ?11
"""
_WALK_BY_TIME = _WALK.format(index="time", user="")
_WALK_OF_USER = _WALK.format(index="user", user="user_id = ?3 AND")
_SORT_BY_TIME = f"""
    {_SELECT_HISTORY}
    WHERE namespace = ?1 AND (+updated_at, +chat_history_id) < (?5, ?6) AND chat_history_id >= ?7
        AND chat_history_id < ?8 AND {IS_VISIBLE}
    ORDER BY +updated_at DESC, +chat_history_id DESC LIMIT ?9
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
    UPDATE haystack_chat_histories SET title = iif(?1, coalesce(title, ?2), ?2),
        title_terms = iif(?1 AND title IS NOT NULL, title_terms, ?3), meta = ?4, branch_of = ?5
    WHERE history_key = ?6
"""
_META = "SELECT CAST(meta AS TEXT) FROM haystack_chat_histories WHERE history_key = ?"
_IN_STATISTICS = f"namespace = ?1 AND chat_history_id >= ?2 AND chat_history_id < ?5 AND {IS_VISIBLE}"
_TOTALS = f"""
    SELECT count(*), coalesce(sum(message_count), 0), coalesce(sum(round_count), 0)
    FROM haystack_chat_histories WHERE {_IN_STATISTICS}
"""
_MESSAGES_PER_DAY = f"""
    SELECT (haystack_chat_messages.created_at - (haystack_chat_messages.created_at % ?6 + ?6) % ?6) AS day, count(*)
    FROM haystack_chat_histories
        CROSS JOIN haystack_chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
    WHERE {_IN_STATISTICS}
    GROUP BY day ORDER BY day
"""
_USAGE = f"""
    SELECT haystack_chat_messages.created_at, CAST(content AS TEXT)
    FROM haystack_chat_histories
        CROSS JOIN haystack_chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
    WHERE {_IN_STATISTICS} AND role = 'assistant' AND instr(content, '"usage":')
"""
_SIZE = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
# Of a user, another index finds them. ?5 is the user, ?6 a time.
_KEYS = """
    SELECT history_key, CAST(message_count AS INTEGER) FROM haystack_chat_histories {index}
    WHERE namespace = ?1 AND {plus}chat_history_id >= ?2 AND {plus}chat_history_id < ?3 AND {condition} LIMIT ?4
"""
_BY_TIME, _BY_USER, _BY_EXPIRY = (
    f"INDEXED BY haystack_chat_histories_by_{each}" for each in ("time", "user", "expiry")
)
_KEYS_BY_ID = _KEYS.format(index="", plus="", condition="?5 IS NULL")
_KEYS_OF_USER = _KEYS.format(index=_BY_USER, plus="+", condition="user_id = ?5")
_OLD_KEYS = _KEYS.format(index=_BY_TIME, plus="+", condition="updated_at < ?6")
_OLD_KEYS_OF_USER = _KEYS.format(index=_BY_USER, plus="+", condition="user_id = ?5 AND updated_at < ?6")
_EXPIRED_KEYS = _KEYS.format(index=_BY_EXPIRY, plus="+", condition="(?5 IS NULL OR user_id = ?5) AND expires_at <= ?6")
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
            found = readable_rows(connection, _HISTORY, visible_history(scope, chat_history_id))
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
        values = (scope.namespace, first, scope.user_id, microseconds_now(), limit, end)
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
        session: WriteSession,
        scope: Scope,
        chat_history_id: str,
        change: HistoryChange,
    ) -> HistoryRow | None:
        """Change the row, hand over the branches, and read the row."""
        title = (change.title is UNCHANGED, change.given_title, title_terms(change.given_title))
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            found = histories.find(chat_history_id)
            if found is None:
                return None
            ((stored,),) = readable_rows(connection, _META, (found.history_key,))
            meta = change.new_meta(stored)
            branch_of = branch_origin(chat_history_id, meta)
            values = (*title, meta, branch_of, found.history_key)
            connection.execute(_UPDATE_HISTORY, values)
            if change.user_id is not UNCHANGED:
                histories.hand_over(found.history_key, chat_history_id, found.user_id, change.user_id)
            return _history(connection, scope, chat_history_id)

    def create_history(self, session: WriteSession, scope: Scope, history: HistoryRow) -> tuple[HistoryRow, bool]:
        """Insert the row, unless it is there."""
        now = microseconds_now()
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            is_new = histories.find(history.chat_history_id) is None
            if is_new:
                histories.create(replace(history, created_at=now, updated_at=now))
            return _history(connection, scope, history.chat_history_id), is_new

    def rename_history(self, session: Database, scope: Scope, old_id: str, new_id: str) -> HistoryRow:
        """Change the ids in the rows: the messages have only their keys."""
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            history = histories.find(old_id)
            if history is None:
                raise history_not_found(old_id)
            if histories.find(new_id) is not None:
                raise history_is_there(new_id)
            histories.rename(history.history_key, history.user_id, old_id, new_id)
            return _history(connection, scope, new_id)

    def renew(self, session: WriteSession, scope: Scope, chat_history_id: str) -> None:
        """Change the row."""
        with session.transaction() as connection:
            Histories(connection, scope, session.settings.search).renew(chat_history_id)

    def search_titles(
        self,
        session: Database,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[HistoryRow]:
        """Compare the terms of all titles, which lie side by side in an index."""
        # The first text after an id is the id and a NUL.
        ids = id_range(prefix) if chat_history_id is None else (chat_history_id, f"{chat_history_id}\x00")
        patterns = title_patterns(phrases)
        contained = " ".join(f"AND instr(title_terms, ?{number})" for number in range(7, 7 + len(patterns)))
        query = seen(_TITLES, scope).format(contained=contained)
        first, end = ids
        values = (scope.namespace, first, scope.user_id, microseconds_now(), end or _AFTER_ALL_IDS, limit, *patterns)
        with session.connection() as connection:
            return _history_rows(readable_rows(connection, query, values))

    def namespaces(self, session: Database, scope: Scope) -> list[str]:  # noqa: ARG002  (all namespaces)
        """Go from one namespace to the next in the index by id."""
        with session.connection() as connection:
            return [name for (name,) in readable_rows(connection, _NAMESPACES, ())]

    def statistics(self, session: Database, scope: Scope, prefix: str) -> StoreStatistics:
        """Count everything as of one moment."""
        first, end = id_range(prefix)
        histories = (scope.namespace, first, scope.user_id, microseconds_now(), end or _AFTER_ALL_IDS)
        usage = UsageCounter()
        with session.snapshot() as connection:
            count, messages, rounds = connection.execute(seen(_TOTALS, scope), histories).fetchone()
            (size,) = connection.execute(_SIZE).fetchone()
            days: Counter[Any] = Counter()
            for day, messages_of_day in connection.execute(seen(_MESSAGES_PER_DAY, scope), (*histories, _DAY)):
                days[readable_time(day).date()] += messages_of_day
            with damaged_texts_escaped(connection):
                for created_at, content in connection.execute(seen(_USAGE, scope), histories):
                    usage.add_text(created_at, content)
        return StoreStatistics(
            chat_histories=count,
            messages=messages,
            rounds=rounds,
            # The size is that of the whole database, so a store of one user does not tell it.
            size=size if scope.user_id is None else None,
            messages_per_day=dict(days),
            usage=usage.total(),
            usage_per_day=usage.per_day(),
        )

    def erase_some(self, session: Database, scope: Scope, prefix: str, updated_before: int | None, limit: int) -> int:
        """Delete histories, and let other writers go on if there may be more."""
        values = (scope.namespace, *id_range(prefix), limit, scope.user_id)
        of_user = scope.user_id is not None
        with session.transaction() as connection:
            histories = Histories(connection, scope, session.settings.search)
            if updated_before is None:
                found = connection.execute(_KEYS_OF_USER if of_user else _KEYS_BY_ID, values).fetchall()
            else:
                old = _OLD_KEYS_OF_USER if of_user else _OLD_KEYS
                found = connection.execute(old, (*values, updated_before)).fetchall()
                found = found or connection.execute(_EXPIRED_KEYS, (*values, microseconds_now())).fetchall()
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
    visible = (scope.namespace, None, scope.user_id, microseconds_now())
    if scope.user_id is not None:
        return readable_rows(connection, seen(_WALK_OF_USER, scope), (*visible, *place, *_END, *ids, limit))
    while prefix:
        (count,) = connection.execute(_COUNT_UP_TO, (scope.namespace, *ids, few + 1)).fetchone()
        if count <= few:
            return readable_rows(connection, seen(_SORT_BY_TIME, scope), (*visible, *place, *ids, limit))
        further_on = readable_rows(connection, _PLACE_FURTHER_ON, (scope.namespace, *place, limit + few))
        if not further_on:
            break
        found = readable_rows(connection, seen(_WALK_BY_TIME, scope), (*visible, *place, *further_on[0], *ids, limit))
        if len(found) == limit:
            return found
        few *= 4
    return readable_rows(connection, seen(_WALK_BY_TIME, scope), (*visible, *place, *_END, *ids, limit))


def _history(connection: sqlite3.Connection, scope: Scope, chat_history_id: str) -> HistoryRow:
    """Return a history that this transaction has written. It may have been handed over, or have expired, just now."""
    return _history_rows(readable_rows(connection, _WRITTEN_HISTORY, (scope.namespace, chat_history_id)))[0]


def _first_step(found: Sequence[tuple[int, int]]) -> list[int]:
    """Return the keys of the first of these histories that together have few enough messages, but of one at least."""
    ends = accumulate(count for _, count in found)
    keys = [key for (key, _), end in zip(found, ends, strict=True) if end <= _MESSAGES_PER_STEP]
    return keys or [key for key, _ in found[:1]]
