# SPDX-License-Identifier: Apache-2.0
"""
The operations that keep a file in order: checking, repairing, and having what was deleted leave it.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.json_values import parse_json
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import Scope
from haystack_chat_store.stores.sqlite import schema
from haystack_chat_store.stores.sqlite.connections import Database, Settings
from haystack_chat_store.stores.sqlite.schema import FIRST_TIME, LAST_TIME
from haystack_chat_store.stores.sqlite.terms import has_same_terms, terms_of_content
from haystack_chat_store.stores.sqlite.texts import all_readable, is_readable, readable
from haystack_chat_store.stores.sqlite.writing import recount
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.types import Fault
from haystack_chat_store.validation import MAX_ID_LENGTH, MAX_TITLE_LENGTH, validated_id, validated_title

_CHECK_FILE = "PRAGMA integrity_check"

# A damaged column may hold anything, of any type.
_IS_TIME = f"(typeof({{0}}) = 'integer' AND {{0}} BETWEEN {FIRST_TIME} AND {LAST_TIME})"
_IS_CREATED, _IS_UPDATED = _IS_TIME.format("created_at"), _IS_TIME.format("updated_at")

# What finds faults, and what mends them. The latter looks once more: something else may have done so meanwhile.
_WITHOUT_HISTORY = """
    SELECT message_key >> 32, count(*) FROM chat_messages
    WHERE NOT EXISTS (SELECT 1 FROM chat_histories WHERE history_key = message_key >> 32)
    GROUP BY message_key >> 32
"""
# Its times are those of its messages, as for others that have none.
_INSERT_HISTORY = """
    INSERT OR IGNORE INTO chat_histories
        (history_key, namespace, chat_history_id, next_position, message_count, round_count, created_at, updated_at)
    VALUES (?, ?, ?, 0, 0, 0, '', '')
"""
_MESSAGES = """
    SELECT CAST(chat_history_id AS TEXT), message_key FROM chat_histories
        CROSS JOIN chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
    WHERE namespace = ? AND
"""
_SAYS_ROLE, _SAYS_ID = "json_extract(content, '$.role')", f"json_extract(content, '$.meta.{MESSAGE_ID_KEY}')"
_IS_UNLIKE_ITS_CONTENT = f"""
    iif(typeof(content) = 'text' AND json_valid(content),
        ({_SAYS_ROLE}, {_SAYS_ID}) <> (role, message_id) AND {_SAYS_ID} > ''
            AND {_SAYS_ROLE} IN ('user', 'assistant', 'tool', 'system'),
        FALSE)
"""
_UNLIKE_THEIR_CONTENT = f"{_MESSAGES} {_IS_UNLIKE_ITS_CONTENT}"
_MEND_ROW = f"""
    UPDATE OR IGNORE chat_messages SET role = {_SAYS_ROLE}, message_id = {_SAYS_ID}
    WHERE message_key = ? AND {_IS_UNLIKE_ITS_CONTENT}
"""  # noqa: S608  (made of constants of this module)
_WITHOUT_TIME = f"{_MESSAGES} NOT {_IS_TIME.format('chat_messages.created_at')}"
_MEND_TIME_OF_MESSAGE = f"""
    UPDATE chat_messages SET created_at = coalesce(
        (SELECT created_at FROM chat_messages
            WHERE message_key BETWEEN :key >> 32 << 32 AND :key AND {_IS_CREATED} ORDER BY message_key DESC LIMIT 1),
        (SELECT created_at FROM chat_messages
            WHERE message_key BETWEEN :key AND :key | 0xffffffff AND {_IS_CREATED} ORDER BY message_key LIMIT 1),
        (SELECT created_at FROM chat_histories WHERE history_key = :key >> 32 AND {_IS_CREATED}),
        :now
    )
    WHERE message_key = :key AND NOT {_IS_CREATED}
"""  # noqa: S608  (made of constants of this module)
_HISTORIES = f"""
    SELECT history_key, CAST(chat_history_id AS BLOB), typeof(chat_history_id) = 'text',
        CAST(title AS BLOB), typeof(title) IN ('text', 'null'), CAST(meta AS BLOB), {_IS_CREATED}, {_IS_UPDATED},
        message_count, round_count, next_position,
        (SELECT count(*) FROM chat_messages WHERE message_key BETWEEN first_key AND last_key),
        (SELECT count(*) FROM chat_messages WHERE role = 'user' AND message_key BETWEEN first_key AND last_key),
        (SELECT max(message_key) - first_key FROM chat_messages WHERE message_key BETWEEN first_key AND last_key)
    FROM (SELECT *, history_key << 32 AS first_key, (history_key + 1 << 32) - 1 AS last_key FROM chat_histories)
    WHERE namespace = ?
"""  # noqa: S608  (made of constants of this module)
_RENAME = "UPDATE OR IGNORE chat_histories SET chat_history_id = ? WHERE history_key = ?"
_TITLE = "SELECT CAST(title AS BLOB) FROM chat_histories WHERE history_key = ?"
_SET_TITLE = "UPDATE chat_histories SET title = ? WHERE history_key = ?"
_META = "SELECT CAST(meta AS BLOB) FROM chat_histories WHERE history_key = ?"
_FORGET_META = "UPDATE chat_histories SET meta = NULL WHERE history_key = ?"
_MEND_TIME_OF_HISTORY = """
    UPDATE chat_histories SET {column} = coalesce(
        (SELECT {nearest}(created_at) FROM chat_messages
            WHERE message_key BETWEEN :key << 32 AND (:key + 1 << 32) - 1 AND {is_created}),
        iif({is_other}, {other}, NULL),
        :now
    )
    WHERE history_key = :key AND NOT {is_column}
"""
_MEND_CREATED_AT = _MEND_TIME_OF_HISTORY.format(
    column="created_at",
    nearest="min",
    other="updated_at",
    is_created=_IS_CREATED,
    is_column=_IS_CREATED,
    is_other=_IS_UPDATED,
)
_MEND_UPDATED_AT = _MEND_TIME_OF_HISTORY.format(
    column="updated_at",
    nearest="max",
    other="created_at",
    is_created=_IS_CREATED,
    is_column=_IS_UPDATED,
    is_other=_IS_CREATED,
)
_NAMES = "SELECT history_key, CAST(chat_history_id AS TEXT) FROM chat_histories WHERE namespace = ?"
_OTHER_HISTORIES = "SELECT history_key FROM chat_histories WHERE namespace <> ?"
_INDEXED_MESSAGES = """
    SELECT message_key, CAST(content AS BLOB) FROM chat_histories
        CROSS JOIN chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
    WHERE namespace = ? AND message_key <= (SELECT last_key FROM chat_messages_indexed)
        AND message_key NOT IN (SELECT message_key FROM chat_messages_unindexed)
"""
_INDEXED_KEYS = "SELECT id FROM chat_message_terms_docsize"
_INDEXED_TERMS = "SELECT doc, offset, term FROM chat_message_term_instances"

#: Messages whose history is missing are put into histories of this namespace by a repair.
RECOVERED = "recovered"

# Mends something, within a transaction, and returns whether it could. Gets the key of the history or message.
_Mend: TypeAlias = Callable[[sqlite3.Connection, int], bool]


class _Found(NamedTuple):
    fault: Fault
    mend: _Mend
    key: int


class Checking(Engine[Database]):
    """
    The operations that keep a file in order.
    """

    settings: Settings

    def check(self, session: Database, scope: Scope, repair: bool) -> list[Fault]:
        """
        Look for faults while others write, then mend each in a transaction of its own: nobody waits for long.
        """
        return [
            *_faults_of_schema(session, repair),
            *_faults_of_file(session, repair),
            *self._faults_of_rows(session, scope, repair),
            *self._faults_of_index(session, scope, repair),
        ]

    def _faults_of_rows(self, session: Database, scope: Scope, repair: bool) -> Iterator[Fault]:
        with session.snapshot() as connection, all_readable(connection):
            found = [*_messages_without_history(connection)]
            if repair:  # else the caller, who reads all messages, says so too
                found += self._damaged_messages(
                    connection, scope, _UNLIKE_THEIR_CONTENT, "Its row had another id or role than its text.", _mend_row
                )
            found += self._damaged_messages(
                connection, scope, _WITHOUT_TIME, "Its time of creation is none.", _mend_time_of_message
            )
            found += self._damaged_histories(connection, scope)
        for fault, mend, key in found:
            if repair:
                with session.transaction() as connection:
                    is_repaired = mend(connection, key)
                yield replace(fault, is_repaired=is_repaired)
            else:
                yield fault

    def _damaged_messages(
        self, connection: sqlite3.Connection, scope: Scope, query: str, description: str, mend: _Mend
    ) -> Iterator[_Found]:
        for name, key in connection.execute(query, (scope.namespace,)):
            yield _Found(_fault(name, key & 0xFFFFFFFF, description, False), mend, key)

    def _damaged_histories(self, connection: sqlite3.Connection, scope: Scope) -> Iterator[_Found]:
        for (
            key,
            raw_name,
            has_text_id,
            title,
            has_text_title,
            meta,
            is_created,
            is_updated,
            *counted,
        ) in connection.execute(_HISTORIES, (scope.namespace,)):
            count, round_count, next_position, messages, rounds, last = counted
            name = readable(raw_name)
            checks: list[tuple[bool, str, _Mend]] = [
                (has_text_id and is_readable(raw_name), "Its id is no text.", partial(_rename, name)),
                (_is_valid(validated_id, name, "id"), "Its id is empty, too long or has NUL.", partial(_rename, name)),
                (has_text_title and is_readable(title), "Its title is no text.", _mend_title),
                (_is_valid(validated_title, _title(title)), "Its title is too long or has NUL.", _mend_title),
                (_is_json_object(meta), "Its meta is no JSON object.", _mend_meta),
                (is_created, "Its time of creation is none.", _mend_created_at),
                (is_updated, "Its time of change is none.", _mend_updated_at),
                (count == messages, f"It counts {count} messages, and has {messages}.", _recount),
                (round_count == rounds, f"It counts {round_count} rounds, and has {rounds}.", _recount),
                (
                    last is None or next_position > last,
                    f"Its next position is {next_position}, its last message at {last}.",
                    _recount,
                ),
            ]
            for is_right, description, mend in checks:
                if not is_right:
                    yield _Found(_fault(name, None, description, False), mend, key)

    def _faults_of_index(self, session: Database, scope: Scope, repair: bool) -> list[Fault]:
        with session.snapshot() as connection, all_readable(connection):
            faults = self._damages_of_index(connection, scope)
        if faults and repair:
            with session.transaction() as connection:
                schema.begin_index_anew(connection)  # the next search fills it
        return [replace(fault, is_repaired=repair) for fault in faults]

    def _damages_of_index(self, connection: sqlite3.Connection, scope: Scope) -> list[Fault]:
        if not schema.has_index(connection):
            return []
        if schema.missing_of_index(connection):
            return [_fault(None, None, "A part of the search index is missing.", False)]
        index = schema.state_of_index(connection)
        if self.settings.search and index.is_of_newer and (index.has_left_out or not index.is_searchable):
            waits = "The search index waits for a newer version of this package or of Python to complete it."
            return [_fault(None, None, waits, False)]
        try:
            return list(self._compared(connection, scope, index.terms_version))
        except sqlite3.DatabaseError as error:
            if "malformed" not in str(error):
                raise
            return [_fault(None, None, "The search index is damaged.", False)]

    def _compared(self, connection: sqlite3.Connection, scope: Scope, terms_version: str) -> Iterator[Fault]:
        """
        Compare what the index says with what the messages say, in memory that does not grow with their number.

        A history is left out if a message of it may have other terms in the version that the index has.
        """
        names = dict(connection.execute(_NAMES, (scope.namespace,)))
        left_out = {key for (key,) in connection.execute(_OTHER_HISTORIES, (scope.namespace,))}
        # Of each history, the sum of what its messages say minus that of what the index says of them.
        sums: Counter[int] = Counter()
        for key, content in connection.execute(_INDEXED_MESSAGES, (scope.namespace,)):
            if not has_same_terms(terms_version, content):
                left_out.add(key >> 32)
            terms = terms_of_content(content).split()
            sums[key >> 32] += hash(key) + sum(hash((key, *each)) for each in enumerate(terms))
        for (key,) in connection.execute(_INDEXED_KEYS):
            sums[key >> 32] -= hash(key)
        for instance in connection.execute(_INDEXED_TERMS):
            sums[instance[0] >> 32] -= hash(instance)
        for history_key, difference in sums.items():
            if difference and history_key not in left_out:
                name = names.get(history_key)
                yield _fault(name, None, "The search index says something else than its messages.", False)


def _faults_of_schema(session: Database, repair: bool) -> list[Fault]:
    with session.connection() as connection:
        missing = schema.missing(connection)
    return [_fault(None, None, f"{name} is missing.", repair and _made_again(session, name)) for name in missing]


def _made_again(session: Database, name: str) -> bool:
    """
    Make an index or a view again, if it is still missing, and return whether that was possible.
    """
    try:
        with session.transaction() as connection:
            if statement := schema.missing(connection).get(name):
                connection.execute(statement)
    except sqlite3.IntegrityError:  # two messages have the same id
        return False
    return True


def _faults_of_file(session: Database, repair: bool) -> list[Fault]:
    with session.snapshot() as connection:
        left = found = _file_check(connection)
    if found and repair:
        with suppress(sqlite3.IntegrityError), session.transaction() as connection:  # two messages have the same id
            connection.execute("REINDEX")
        with session.snapshot() as connection:
            left = _file_check(connection)
    return [_fault(None, None, f"SQLite says of the file: {line}.", repair and line not in left) for line in found]


def _file_check(connection: sqlite3.Connection) -> list[str]:
    return [line for (line,) in connection.execute(_CHECK_FILE) if line != "ok"]


def _messages_without_history(connection: sqlite3.Connection) -> Iterator[_Found]:
    """
    Find messages that are to get a new history, in a namespace of its own: nobody can say whose they are.
    """
    for key, count in connection.execute(_WITHOUT_HISTORY):
        name = f"{key}, {microseconds_now()}"
        description = f"{count} messages have no history. Repaired, they are {name!r} of the namespace {RECOVERED!r}."
        yield _Found(_fault(None, None, description, False), partial(_recover, name), key)


def _recover(name: str, connection: sqlite3.Connection, history_key: int) -> bool:
    if not connection.execute(_INSERT_HISTORY, (history_key, RECOVERED, name)).rowcount:
        return False
    return all(mend(connection, history_key) for mend in (_mend_created_at, _mend_updated_at, _recount))


def _rename(name: str, connection: sqlite3.Connection, history_key: int) -> bool:
    """
    Give a history an id that is a text. There may be another history with the first choice.
    """
    name = name.replace("\x00", "\\x00")[: MAX_ID_LENGTH - len(f", {history_key}")] or "unnamed"
    choices = (name, f"{name}, {history_key}")
    return any(connection.execute(_RENAME, (choice, history_key)).rowcount for choice in choices)


def _mend_row(connection: sqlite3.Connection, message_key: int) -> bool:
    is_mended = connection.execute(_MEND_ROW, (message_key,)).rowcount == 1
    return is_mended and _recount(connection, message_key >> 32)


def _mend_title(connection: sqlite3.Connection, history_key: int) -> bool:
    for (raw,) in connection.execute(_TITLE, (history_key,)).fetchall():
        title = _title(raw)
        if title is not None:
            title = title.replace("\x00", "")[:MAX_TITLE_LENGTH]
        connection.execute(_SET_TITLE, (title, history_key))
    return True


def _mend_meta(connection: sqlite3.Connection, history_key: int) -> bool:
    for (meta,) in connection.execute(_META, (history_key,)).fetchall():
        if not _is_json_object(meta):
            connection.execute(_FORGET_META, (history_key,))
    return True


def _recount(connection: sqlite3.Connection, history_key: int) -> bool:
    recount(connection, history_key)
    return True


def _mends(statement: str) -> _Mend:
    def mend(connection: sqlite3.Connection, key: int) -> bool:
        connection.execute(statement, {"key": key, "now": microseconds_now()})
        return True

    return mend


_mend_time_of_message = _mends(_MEND_TIME_OF_MESSAGE)
_mend_created_at, _mend_updated_at = map(_mends, (_MEND_CREATED_AT, _MEND_UPDATED_AT))


def _title(raw: bytes | None) -> str | None:
    """
    Return a title, or `None` if there is none that can be read.
    """
    return raw.decode() if raw is not None and is_readable(raw) else None


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


def _fault(chat_history_id: str | None, position: int | None, description: str, is_repaired: bool) -> Fault:
    return Fault(chat_history_id=chat_history_id, position=position, description=description, is_repaired=is_repaired)
