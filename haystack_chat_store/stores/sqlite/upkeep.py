# SPDX-License-Identifier: Apache-2.0
"""
The operations that keep a file in order: checking, repairing, and having what was deleted leave it.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence

from haystack_chat_store.errors import StoreTimeoutError
from haystack_chat_store.json_form import parse_json
from haystack_chat_store.stores.operations import Operations
from haystack_chat_store.stores.sqlite import schema
from haystack_chat_store.stores.sqlite.database import Database, readable, terms_of_content
from haystack_chat_store.stores.sqlite.messages import microseconds_now
from haystack_chat_store.types import Fault

_MERGE_INDEX = "INSERT INTO chat_message_terms (chat_message_terms) VALUES ('optimize')"

_CHECK_FILE = "PRAGMA integrity_check"
_HISTORIES = """
    SELECT history_key, chat_history_id, message_count, round_count, next_position,
        CAST(title AS BLOB), CAST(meta AS BLOB),
        (SELECT count(*) FROM chat_messages WHERE message_key BETWEEN first_key AND last_key),
        (SELECT count(*) FROM chat_messages WHERE role = 'user' AND message_key BETWEEN first_key AND last_key),
        (SELECT max(message_key) - first_key FROM chat_messages WHERE message_key BETWEEN first_key AND last_key)
    FROM (SELECT *, history_key << 32 AS first_key, (history_key + 1 << 32) - 1 AS last_key FROM chat_histories)
    WHERE namespace = ?
"""
_RECOUNT = """
    UPDATE chat_histories SET
        message_count = (SELECT count(*) FROM chat_messages
            WHERE message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1),
        round_count = (SELECT count(*) FROM chat_messages
            WHERE role = 'user' AND message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1),
        next_position = max(next_position, coalesce((SELECT (max(message_key) & 0xffffffff) + 1 FROM chat_messages
            WHERE message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1), 0))
    WHERE history_key = ?
"""
_SET_TITLE_AND_META = "UPDATE chat_histories SET title = ?, meta = ? WHERE history_key = ?"
_WITHOUT_HISTORY = """
    SELECT message_key >> 32, count(*), CAST(min(created_at) AS INTEGER), CAST(max(created_at) AS INTEGER)
    FROM chat_messages
    WHERE NOT EXISTS (SELECT 1 FROM chat_histories WHERE history_key = message_key >> 32)
    GROUP BY message_key >> 32
"""
_INSERT_HISTORY = """
    INSERT INTO chat_histories
        (history_key, namespace, chat_history_id, next_position, message_count, round_count, created_at, updated_at)
    VALUES (?, ?, ?, 0, 0, 0, ?, ?)
"""
_NAMES = "SELECT history_key, chat_history_id FROM chat_histories WHERE namespace = ?"
_OTHER_HISTORIES = "SELECT history_key FROM chat_histories WHERE namespace <> ?"
_INDEXED_MESSAGES = """
    SELECT message_key, CAST(content AS BLOB) FROM chat_histories
        CROSS JOIN chat_messages ON message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1
    WHERE namespace = ? AND message_key <= (SELECT last_key FROM chat_messages_indexed)
"""
_INDEXED_KEYS = "SELECT id FROM chat_message_terms_docsize"
_INDEXED_TERMS = "SELECT doc, offset, term FROM chat_message_term_instances"

_HISTORY_KEY = "SELECT history_key FROM chat_histories WHERE namespace = ? AND chat_history_id = ?"
_DELETE_MESSAGE = "DELETE FROM chat_messages WHERE message_key = (? << 32) + ?"
_IS_CHANGED = "UPDATE chat_histories SET updated_at = ? WHERE history_key = ?"

#: Where histories go whose own namespace cannot be known any more.
RECOVERED = "recovered"


class UpkeepOperations(Operations[Database]):
    """
    The operations that keep a file in order.
    """

    namespace: str

    def _vacuum(self, session: Database) -> None:
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

    def _faults(self, session: Database, repair: bool) -> list[Fault]:
        with session.transaction() if repair else session.snapshot() as connection:
            connection.text_factory = readable
            try:
                return [
                    *_faults_of_file(connection, repair),
                    *_faults_of_orphans(connection, repair),
                    *self._faults_of_histories(connection, repair),
                    *self._faults_of_index(connection, repair),
                ]
            finally:
                connection.text_factory = str

    def _remove(self, session: Database, chat_history_id: str, positions: Sequence[int]) -> None:
        with session.transaction() as connection:
            for (history_key,) in connection.execute(_HISTORY_KEY, (self.namespace, chat_history_id)).fetchall():
                connection.executemany(_DELETE_MESSAGE, [(history_key, position) for position in positions])
                connection.execute(_RECOUNT, (history_key,))
                connection.execute(_IS_CHANGED, (microseconds_now(), history_key))

    def _faults_of_histories(self, connection: sqlite3.Connection, repair: bool) -> Iterator[Fault]:
        for row in connection.execute(_HISTORIES, (self.namespace,)).fetchall():
            history_key, name, message_count, round_count, next_position, title, meta, messages, rounds, last = row
            if message_count != messages:
                yield Fault(name, None, f"It counts {message_count} messages, and has {messages}.", repair)
            if round_count != rounds:
                yield Fault(name, None, f"It counts {round_count} rounds, and has {rounds}.", repair)
            if last is not None and next_position <= last:
                yield Fault(name, None, f"Its next position is {next_position}, its last message at {last}.", repair)
            if repair:
                connection.execute(_RECOUNT, (history_key,))
            if not _is_text(title):
                yield Fault(name, None, "Its title is no text.", repair)
            if not _is_json_object(meta):
                yield Fault(name, None, "Its meta is no JSON object.", repair)
            if repair and not (_is_text(title) and _is_json_object(meta)):
                kept = (title if _is_text(title) else None, meta if _is_json_object(meta) else None)
                texts = [None if value is None else readable(value) for value in kept]
                connection.execute(_SET_TITLE_AND_META, (*texts, history_key))

    def _faults_of_index(self, connection: sqlite3.Connection, repair: bool) -> Iterator[Fault]:
        """
        Compare what the index says with what the messages say, in memory that does not grow with their number.
        """
        if not schema.has_index(connection):
            return
        faults = []
        if schema.missing_of_index(connection):
            faults.append(Fault(None, None, "A part of the search index is missing.", repair))
        else:
            try:
                faults += self._compared(connection, repair)
            except sqlite3.DatabaseError as error:
                if "malformed" not in str(error):
                    raise
                faults.append(Fault(None, None, "The search index is damaged.", repair))
        if faults and repair:
            schema.begin_index_anew(connection)  # the next search fills it
        yield from faults

    def _compared(self, connection: sqlite3.Connection, repair: bool) -> Iterator[Fault]:
        names = dict(connection.execute(_NAMES, (self.namespace,)))
        others = {key for (key,) in connection.execute(_OTHER_HISTORIES, (self.namespace,))}
        # Of each history, the sum of what its messages say minus that of what the index says of them.
        sums: Counter[int] = Counter()
        for key, content in connection.execute(_INDEXED_MESSAGES, (self.namespace,)):
            terms = terms_of_content(content).split()
            sums[key >> 32] += hash(key) + sum(hash((key, *each)) for each in enumerate(terms))
        for (key,) in connection.execute(_INDEXED_KEYS):
            sums[key >> 32] -= hash(key)
        for instance in connection.execute(_INDEXED_TERMS):
            sums[instance[0] >> 32] -= hash(instance)
        for history_key, difference in sums.items():
            if difference and history_key not in others:
                name = names.get(history_key)
                yield Fault(name, None, "The search index says something else than its messages.", repair)


def _faults_of_file(connection: sqlite3.Connection, repair: bool) -> Iterator[Fault]:
    found = _file_check(connection)
    left = found
    if found and repair:
        try:
            connection.execute("REINDEX")
            left = _file_check(connection)
        except sqlite3.IntegrityError:
            pass  # two messages have the same id
    yield from [Fault(None, None, f"SQLite says of the file: {line}.", line not in left) for line in found]


def _file_check(connection: sqlite3.Connection) -> list[str]:
    return [line for (line,) in connection.execute(_CHECK_FILE) if line != "ok"]


def _faults_of_orphans(connection: sqlite3.Connection, repair: bool) -> Iterator[Fault]:
    """
    Give messages without a history a new one, in a namespace of its own: nobody can say whose they are.
    """
    for history_key, count, created_at, updated_at in connection.execute(_WITHOUT_HISTORY).fetchall():
        description = f"{count} messages have no history."
        if repair:
            name = f"{history_key}, {microseconds_now()}"
            connection.execute(_INSERT_HISTORY, (history_key, RECOVERED, name, created_at, updated_at))
            connection.execute(_RECOUNT, (history_key,))
            description += f" They are now the history {name!r} of the namespace {RECOVERED!r}."
        yield Fault(None, None, description, repair)


def _is_text(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _is_json_object(value: bytes | None) -> bool:
    try:
        return value is None or isinstance(parse_json(value.decode()), dict)
    except (ValueError, RecursionError):
        return False
