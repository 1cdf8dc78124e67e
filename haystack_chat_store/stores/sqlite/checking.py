# SPDX-License-Identifier: Apache-2.0
"""The operation that checks a file. A repair counts and indexes again; what else is wrong is only found."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from itertools import chain, count
from typing import Any

from haystack import logging

from haystack_chat_store.json_values import parse_json
from haystack_chat_store.search_text import title_terms
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.faults import FaultList
from haystack_chat_store.stores.previews import kept_row, preview_faults
from haystack_chat_store.stores.rows import HistoryRow, MessageRow, Scope, branch_origin
from haystack_chat_store.stores.sqlite import schema
from haystack_chat_store.stores.sqlite.connections import Database, damaged_texts_escaped
from haystack_chat_store.stores.sqlite.directory import is_utf8
from haystack_chat_store.stores.sqlite.histories import QUESTIONS, Histories
from haystack_chat_store.stores.sqlite.term_index import TermIndex, terms_of
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.types import Fault
from haystack_chat_store.validation import microseconds, validated_id, validated_title

logger = logging.getLogger(__name__)

_CHECK_FILE = "PRAGMA integrity_check"

# A damaged column may hold anything, of any type.
_FIRST_TIME = microseconds(datetime.min.replace(tzinfo=timezone.utc), "time")
_LAST_TIME = microseconds(datetime.max.replace(tzinfo=timezone.utc), "time")
_IS_TIME = f"typeof({{0}}) = 'integer' AND {{0}} BETWEEN {_FIRST_TIME} AND {_LAST_TIME}"
_WITHOUT_HISTORY = """
    SELECT message_key >> 32, count(*) FROM haystack_chat_messages
    WHERE NOT EXISTS (SELECT 1 FROM haystack_chat_histories WHERE history_key = message_key >> 32)
    GROUP BY message_key >> 32
"""
_ADOPT_MESSAGES = """
    INSERT OR IGNORE INTO haystack_chat_histories
        (history_key, namespace, chat_history_id, revision, next_position, message_count, round_count,
        created_at, updated_at)
    SELECT ?1, ?2, ?3, max(revision), 0, 0, 0, ?4, ?5 FROM haystack_chat_messages
    WHERE message_key BETWEEN ?1 << 32 AND (?1 + 1 << 32) - 1
"""
_MESSAGES_WITHOUT_TIME = f"""
    SELECT CAST(chat_history_id AS TEXT), message_key & 0xffffffff FROM haystack_chat_histories
        CROSS JOIN haystack_chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
    WHERE namespace = ? AND NOT ({_IS_TIME.format("haystack_chat_messages.created_at")})
"""
_HISTORIES = f"""
    SELECT history_key, CAST(chat_history_id AS BLOB), typeof(chat_history_id) = 'text',
        CAST(title AS BLOB), typeof(title) IN ('text', 'null'), CAST(meta AS BLOB),
        {_IS_TIME.format("created_at")}, {_IS_TIME.format("updated_at")}, message_count, round_count, next_position,
        (SELECT count(*) FROM haystack_chat_messages WHERE message_key BETWEEN first_key AND last_key),
        (SELECT count(*) FROM haystack_chat_messages
            WHERE role = 'user' AND message_key BETWEEN first_key AND last_key),
        (SELECT max(message_key) - first_key FROM haystack_chat_messages
            WHERE message_key BETWEEN first_key AND last_key),
        typeof(revision) = 'integer'
    FROM (SELECT *, history_key << 32 AS first_key, (history_key + 1 << 32) - 1 AS last_key
        FROM haystack_chat_histories)
    WHERE namespace = ?
"""
_DESCRIBED = """
    SELECT history_key, CAST(chat_history_id AS TEXT), CAST(title AS BLOB),
        iif(typeof(title) = 'blob', NULL, CAST(title AS TEXT)), CAST(meta AS TEXT),
        iif(typeof(title) = 'blob', NULL, title_terms), branch_of, preview, last_role, last_text, last_at
    FROM haystack_chat_histories WHERE namespace = ?
"""
_LAST_MESSAGE = """
    SELECT 0, created_at, '', CAST(role AS TEXT), CAST(content AS TEXT) FROM haystack_chat_messages
    WHERE message_key BETWEEN ? AND ? AND role <> 'system' ORDER BY message_key DESC LIMIT 1
"""
_TITLE_AND_META = "SELECT CAST(title AS TEXT), CAST(meta AS TEXT) FROM haystack_chat_histories WHERE history_key = ?"
_DESCRIBE_ANEW = "UPDATE haystack_chat_histories SET title_terms = ?, branch_of = ? WHERE history_key = ?"
_MESSAGES_AND_TERMS = """
    SELECT CAST(chat_history_id AS TEXT), CAST(content AS TEXT), terms
    FROM haystack_chat_histories
        CROSS JOIN haystack_chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
        LEFT JOIN haystack_chat_terms ON haystack_chat_terms.rowid = message_key
    WHERE namespace = ? AND message_key <= ?
"""
_HAS_ORPHANED_TERMS = """
    SELECT EXISTS (
        SELECT 1 FROM haystack_chat_terms
        WHERE NOT EXISTS (SELECT 1 FROM haystack_chat_messages WHERE message_key = haystack_chat_terms.rowid)
    )
"""
# Reads all of the inverted index, without a lock.
_MAKE_VOCABULARY = "CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab (main, haystack_chat_terms, row)"
_DROP_VOCABULARY = "DROP TABLE temp.vocabulary"
_INSTANCES = "SELECT coalesce(sum(cnt), 0) FROM temp.vocabulary"
_TERMS = "SELECT terms FROM haystack_chat_terms"

_INDEX_BATCH_SIZE = 1_000
_IS_RECOVERED = "SELECT 1 FROM haystack_chat_histories WHERE namespace = ? AND chat_history_id = ?"

#: A repair puts messages whose history is missing into histories of this namespace.
RECOVERED = "recovered"


class Checking(Engine[Database]):
    """The operations that check a file."""

    def check(self, session: Database, scope: Scope) -> list[Fault]:
        """Look for faults while others write."""
        return self._check(session, scope, repair=False)

    def repair(self, session: Database, scope: Scope) -> list[Fault]:
        """Look for faults, and repair each in a transaction of its own: no writer waits for long."""
        with session.transaction():  # which upgrades the file of an earlier version
            pass
        faults = self._check(session, scope, repair=True)
        with session.connection() as connection:
            index = TermIndex.of(connection)
        while index.exists and not index.is_of_newer_version and self.index_some(session, scope, _INDEX_BATCH_SIZE):
            pass
        return faults

    @staticmethod
    def _check(session: Database, scope: Scope, *, repair: bool) -> list[Fault]:
        faults = FaultList()
        faults.extend(_faults_of_schema(session, repair))
        faults.extend(_faults_of_file(session, repair))
        faults.extend(_orphaned_messages(session, repair))
        faults.extend(_faults_of_messages(session, scope))
        faults.extend(_faults_of_histories(session, scope, repair))
        faults.extend(_faults_of_descriptions(session, scope, repair))
        faults.extend(_faults_of_index(session, scope, repair))
        repaired = sum(fault.count for fault in faults if fault.is_repaired)
        if repaired:
            logger.info("Repaired {count} faults in {path}.", count=repaired, path=session.settings.path)
        return list(faults)


def _faults_of_schema(session: Database, repair: bool) -> list[Fault]:
    """Find indexes and views that are missing, and make them again."""
    with session.connection() as connection:
        missing = schema.missing(connection)
    return [
        Fault(description=f"{name} is missing.", is_repaired=repair and _made_again(session, name)) for name in missing
    ]


def _made_again(session: Database, name: str) -> bool:
    try:
        with session.transaction() as connection:
            if statement := schema.missing(connection).get(name):  # unless another process has made it
                connection.execute(statement)
    except sqlite3.IntegrityError:  # two messages have the same id
        return False
    return True


def _faults_of_file(session: Database, repair: bool) -> list[Fault]:
    """Have SQLite check the file, and make its indexes again."""
    left = found = _file_check(session)
    if found and repair:
        with suppress(sqlite3.IntegrityError), session.transaction() as connection:  # two messages have the same id
            connection.execute("REINDEX")
        left = _file_check(session)
    return [
        Fault(description=f"SQLite says of the file: {line}.", is_repaired=repair and line not in left)
        for line in found
    ]


def _file_check(session: Database) -> list[str]:
    with session.snapshot() as connection:
        lines = connection.execute(_CHECK_FILE).fetchall()
    return [line for (line,) in lines if line != "ok"]


def _orphaned_messages(session: Database, repair: bool) -> Iterator[Fault]:
    """
    Find messages without a history, of unknown namespace, and make a history of the namespace "recovered" for them.
    """
    with session.connection() as connection:
        found = connection.execute(_WITHOUT_HISTORY).fetchall()
    for history_key, message_count in found:
        name = _free_name(session, str(history_key))
        description = (
            f"{message_count} messages have no history. Repaired, they are {name!r} of the namespace {RECOVERED!r}."
        )
        if repair:
            now = microseconds_now()
            with session.transaction() as connection:
                connection.execute(_ADOPT_MESSAGES, (history_key, RECOVERED, name, now, now))
                Histories(connection, Scope(RECOVERED), session.settings.search).recount(history_key)
        yield Fault(description=description, is_repaired=repair)


def _free_name(session: Database, name: str) -> str:
    """Return an id that no recovered history has: a name, with a number if need be."""
    with session.connection() as connection:
        names = chain([name], (f"{name} ({number})" for number in count(2)))
        return next(each for each in names if not connection.execute(_IS_RECOVERED, (RECOVERED, each)).fetchone())


def _faults_of_messages(session: Database, scope: Scope) -> Iterator[Fault]:
    """Find messages without a time. The caller reads all messages, and finds what else is wrong with them."""
    with session.snapshot() as connection, damaged_texts_escaped(connection):
        for name, position in connection.execute(_MESSAGES_WITHOUT_TIME, (scope.namespace,)):
            yield Fault(chat_history_id=name, position=position, description="Its time of creation is none.")


def _faults_of_histories(session: Database, scope: Scope, repair: bool) -> Iterator[Fault]:
    """Find histories whose rows are damaged or count wrongly, and count again."""
    miscounted = []
    with session.snapshot() as connection:
        for history_key, raw_name, *columns in connection.execute(_HISTORIES, (scope.namespace,)):
            name = raw_name.decode(errors="backslashreplace")
            wrong_counts = _wrong_counts(columns)
            miscounted += [history_key] if wrong_counts and repair else []
            for each in _damages(raw_name, name, columns):
                yield Fault(chat_history_id=name, description=each)
            for each in wrong_counts:
                yield Fault(chat_history_id=name, description=each, is_repaired=repair)
    for history_key in miscounted:
        with session.transaction() as connection:
            Histories(connection, scope, session.settings.search).recount(history_key)


def _faults_of_descriptions(session: Database, scope: Scope, repair: bool) -> Iterator[Fault]:
    """Compare what is kept of previews, terms of titles and origins with messages, titles and metas; keep it anew."""
    undescribed: dict[int, str] = {}
    with session.snapshot() as connection, damaged_texts_escaped(connection):
        for history_key, raw_title, kept_terms, branch_of, row in _described(connection, scope):
            found = []
            is_title = is_utf8(raw_title) and _is_valid(validated_title, row.title)
            if is_title and kept_terms != title_terms(row.title):
                found.append("The search index says something else than its title.")
            if branch_of != branch_origin(row.chat_history_id, row.meta):
                found.append("It is listed as a branch of another history than its meta names, or as none.")
            keys = schema.key_range(history_key)
            questions = (content for (content,) in connection.execute(QUESTIONS, keys))
            last = connection.execute(_LAST_MESSAGE, keys).fetchone()
            wrong = preview_faults(row, questions, None if last is None else MessageRow(*last))
            found += [f"{each.capitalize()}." for each in wrong]
            for each in found:
                yield Fault(chat_history_id=row.chat_history_id, description=each, is_repaired=repair)
            undescribed |= {history_key: row.chat_history_id} if found and repair else {}
    for history_key, name in undescribed.items():
        with session.transaction() as connection, damaged_texts_escaped(connection):
            for title, meta in connection.execute(_TITLE_AND_META, (history_key,)).fetchall():
                values = title_terms(title), branch_origin(name, meta), history_key
                connection.execute(_DESCRIBE_ANEW, values)
                Histories(connection, scope, session.settings.search).find_previews(history_key)


def _described(
    connection: sqlite3.Connection, scope: Scope
) -> Iterator[tuple[int, bytes | None, str | None, str | None, HistoryRow]]:
    """Yield of each history its key, title, the terms kept of it, the origin kept of it, and what else is kept."""
    for history_key, name, raw_title, title, meta, terms, branch_of, *previews in connection.execute(
        _DESCRIBED, (scope.namespace,)
    ):
        yield history_key, raw_title, terms, branch_of, kept_row(name, *previews, title=title, meta=meta)


def _damages(raw_name: bytes, name: str, columns: Sequence[Any]) -> list[str]:
    """Return what is wrong with the columns of a history. Users can set another title and meta."""
    is_text_id, title, is_text_title, meta, is_created, is_updated = columns[:6]
    checks = {
        "Its id is no text.": is_text_id and is_utf8(raw_name),
        "Its id is empty, too long or has NUL.": _is_valid(validated_id, name, "id"),
        "Its title is no text.": is_text_title and is_utf8(title),
        "Its title is too long or has NUL.": not is_utf8(title) or _is_valid(validated_title, title and title.decode()),
        "Its meta is no JSON object.": _is_json_object(meta),
        "Its time of creation is none.": is_created,
        "Its time of change is none.": is_updated,
    }
    return [description for description, is_right in checks.items() if not is_right]


def _wrong_counts(columns: Sequence[Any]) -> list[str]:
    count, rounds, next_position, messages, user_messages, last, has_revision = columns[6:]
    checks = {
        f"It counts {count} messages, and has {messages}.": count == messages,
        f"It counts {rounds} rounds, and has {user_messages}.": rounds == user_messages,
        f"Its next position is {next_position}, its last message at {last}.": last is None or next_position > last,
        "Its revision is no number.": has_revision,
    }
    return [description for description, is_right in checks.items() if not is_right]


def _faults_of_index(session: Database, scope: Scope, repair: bool) -> list[Fault]:
    """Compare the index of words with the messages, and begin it anew if they differ."""
    try:
        with session.snapshot() as connection, damaged_texts_escaped(connection):
            faults = list(FaultList(_differences(connection, scope, session.settings.search)))
    except sqlite3.DatabaseError as error:
        if "malformed" not in str(error) and "no such table" not in str(error):
            raise
        faults = [Fault(description=f"The search index is damaged: {error}.")]
    if faults and repair:
        with session.transaction() as connection:
            TermIndex.of(connection).begin()
    return [replace(fault, is_repaired=repair) for fault in faults]


def _differences(connection: sqlite3.Connection, scope: Scope, is_searched: bool) -> Iterator[Fault]:
    index = TermIndex.of(connection)
    if index.is_of_newer_version and is_searched:
        yield Fault(description="A newer version of this package made the search index.")
    if not index.is_of_this_version:
        return
    differing = None  # the messages of a history follow each other
    for name, content, terms in connection.execute(_MESSAGES_AND_TERMS, (scope.namespace, index.indexed_up_to)):
        if name != differing and terms != terms_of(content):
            differing = name
            yield Fault(chat_history_id=name, description="The search index says something else than its messages.")
    if connection.execute(_HAS_ORPHANED_TERMS).fetchone()[0]:
        yield Fault(description="The search index has messages that are gone.")
    connection.execute(_MAKE_VOCABULARY)
    indexed = connection.execute(_INSTANCES).fetchone()[0]
    connection.execute(_DROP_VOCABULARY)
    if indexed != sum(len(terms.split()) for (terms,) in connection.execute(_TERMS)):
        yield Fault(description="The search index does not have all terms.")


def _is_valid(validated: Callable[..., object], *arguments: object) -> bool:
    try:
        validated(*arguments)
    except ValueError:
        return False
    return True


def _is_json_object(value: bytes | None) -> bool:
    try:
        return value is None or isinstance(parse_json(value.decode()), dict)
    except (ValueError, RecursionError):
        return False
