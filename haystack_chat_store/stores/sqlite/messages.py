# SPDX-License-Identifier: Apache-2.0
"""
The operations on messages: writing, reading, changing, deleting.
"""

import sqlite3
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

from haystack.dataclasses import ChatRole
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.rounds import Window
from haystack_chat_store.stores.base import contents_and_size
from haystack_chat_store.stores.conflicts import (
    check_count,
    history_has_messages,
    history_not_found,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow
from haystack_chat_store.stores.sqlite.database import Database
from haystack_chat_store.stores.sqlite.texts import all_readable
from haystack_chat_store.validation import microseconds

# A message's key is its history's key times 2**32 plus its position. So all messages of a history lie side by side in
# the table's own tree, in order, and the newest is one look-up away.
_POSITION_BITS = 32

_HISTORY = """
    SELECT history_key, next_position, message_count FROM chat_histories
    WHERE namespace = ? AND chat_history_id = ?
"""
_INSERT_HISTORY = """
    INSERT INTO chat_histories
        (namespace, chat_history_id, next_position, message_count, round_count, created_at, updated_at, title, meta)
    VALUES (?, ?, 0, 0, 0, ?, ?, ?, ?)
"""
_UPDATE_HISTORY = """
    UPDATE chat_histories SET next_position = next_position + ?, message_count = message_count + ?,
        round_count = round_count + ?, updated_at = max(updated_at, ?)
    WHERE history_key = ?
"""
_MESSAGE = "SELECT message_key, role FROM chat_messages WHERE message_key >> 32 = ? AND message_id = ?"
_INSERT_MESSAGE = """
    INSERT INTO chat_messages (message_key, message_id, role, created_at, content) VALUES (?, ?, ?, ?, ?)
"""
_REPLACE_MESSAGE = "UPDATE chat_messages SET role = ?, content = ? WHERE message_key = ?"
_COPY_MESSAGES = """
    INSERT INTO chat_messages (message_key, message_id, role, created_at, content)
    SELECT ? + row_number() OVER (ORDER BY message_key) - 1, message_id, role, created_at, content
    FROM chat_messages WHERE message_key BETWEEN ? AND ?
"""
_HAS_MESSAGES = "SELECT EXISTS (SELECT 1 FROM chat_messages WHERE message_key BETWEEN ? AND ?)"
_ROUNDS = "SELECT count(*) FROM chat_messages WHERE role = 'user' AND message_key BETWEEN ? AND ?"
_COUNT = "SELECT message_count FROM chat_histories WHERE namespace = ? AND chat_history_id = ?"

# A read is one statement, so that history and messages are seen as of one moment. {size} is the window's size, {start}
# its first key.
_READ = """
    WITH history (first_key, last_key, size) AS (
        SELECT history_key << 32, (history_key + 1 << 32) - 1, {size}
        FROM chat_histories WHERE namespace = ?1 AND chat_history_id = ?2
    )
    SELECT content, size FROM history CROSS JOIN chat_messages ON message_key BETWEEN {start} AND last_key
    ORDER BY message_key
"""
_START_OF_ROUNDS = """coalesce(
        (SELECT message_key FROM chat_messages WHERE role = 'user' AND message_key BETWEEN first_key AND last_key
            ORDER BY message_key DESC LIMIT 1 OFFSET {before}),
        first_key)"""
_START_OF_MESSAGES = """coalesce(
        (SELECT message_key FROM chat_messages WHERE role <> 'tool' AND message_key BETWEEN first_key AND
            (SELECT message_key FROM chat_messages WHERE message_key BETWEEN first_key AND last_key
                ORDER BY message_key DESC LIMIT 1 OFFSET {before})
            ORDER BY message_key DESC LIMIT 1),
        first_key)"""
# An offset cannot name a column of the statement around it, so it looks the history up once more.
_BEFORE = "(SELECT {size} - 1 FROM chat_histories WHERE namespace = ?1 AND chat_history_id = ?2)"
_SIZE = "?3 + max({total} - ?3, 0) % ?4"
_READ_ALL = _READ.format(size="message_count", start="first_key")
_READ_ROUNDS, _READ_MESSAGES = (
    _READ.format(size=size, start=start.format(before=_BEFORE.format(size=size)))
    for start, size in (
        (_START_OF_ROUNDS, _SIZE.format(total="round_count")),
        (_START_OF_MESSAGES, _SIZE.format(total="message_count")),
    )
)
_PAGE = """
    SELECT message_key & 0xffffffff, chat_messages.created_at,
        CAST(message_id AS TEXT), CAST(role AS TEXT), CAST(content AS TEXT)
    FROM chat_histories
        CROSS JOIN chat_messages ON message_key BETWEEN (history_key << 32) + ?3 AND (history_key << 32) + ?4
    WHERE namespace = ?1 AND chat_history_id = ?2 ORDER BY message_key {order} LIMIT ?5
"""
_PAGE_BEFORE, _PAGE_AFTER = _PAGE.format(order="DESC"), _PAGE.format(order="ASC")
_DELETE_MESSAGES = "DELETE FROM chat_messages WHERE message_key BETWEEN ? AND ?"
_DELETE_HISTORY = "DELETE FROM chat_histories WHERE history_key = ?"
_HISTORY_KEYS = "SELECT history_key FROM chat_histories WHERE namespace = ?"

#: The first and the last time that a column can say.
FIRST_TIME = microseconds(datetime.min.replace(tzinfo=timezone.utc), "time")
LAST_TIME = microseconds(datetime.max.replace(tzinfo=timezone.utc), "time")

# More messages than a history can have, and an integer that SQLite takes.
_MAX_COUNT = 2**62
_MAX_POSITION = 2**_POSITION_BITS - 1


class _History(NamedTuple):
    history_key: int
    next_position: int
    message_count: int

    @property
    def first_key(self) -> int:
        return self.history_key << _POSITION_BITS

    @property
    def next_key(self) -> int:
        return self.first_key + self.next_position


class MessageOperations(Engine[Database]):
    """
    The operations on messages.
    """

    namespace: str

    def _write(self, session: Database, chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        with session.transaction() as connection:
            now = microseconds_now()
            history = self._find(connection, chat_history_id)
            if history is None:
                new = messages
                history = self._make(connection, _new(chat_history_id, now))
            else:
                known = _known(connection, history, messages)
                new = [message for message in messages if message.message_id not in known]
            if new:
                _append(connection, history, new, now)
        return len(new)

    def _read(self, session: Database, chat_history_id: str, window: Window) -> tuple[list[str], int]:
        history = (self.namespace, chat_history_id)
        with session.connection() as connection:
            if window.count is None:
                rows = connection.execute(_READ_ALL, history)
            else:
                query = _READ_ROUNDS if window.unit == "round" else _READ_MESSAGES
                counts = (min(window.count, _MAX_COUNT), min(window.step, _MAX_COUNT))
                rows = connection.execute(query, (*history, *counts))
            return contents_and_size(rows)

    def _count(self, session: Database, chat_history_id: str) -> int:
        with session.connection() as connection:
            found = connection.execute(_COUNT, (self.namespace, chat_history_id)).fetchone()
            return 0 if found is None else found[0]

    def _delete(self, session: Database, chat_history_id: str) -> None:
        with session.transaction() as connection:
            history = self._find(connection, chat_history_id)
            if history is not None:
                delete_history(connection, history.history_key)

    def _delete_all(self, session: Database) -> None:
        with session.transaction() as connection:
            for (history_key,) in connection.execute(_HISTORY_KEYS, (self.namespace,)).fetchall():
                delete_history(connection, history_key)

    def _write_checked(
        self,
        session: Database,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        with session.transaction() as connection:
            now = microseconds_now()
            history = self._find(connection, chat_history_id)
            _check_count(history, expected_count)
            known = {} if history is None else _known(connection, history, messages)
            new, replaced = planned(messages, known, policy)
            if history is None and new:
                history = self._make(connection, _new(chat_history_id, now))
            if history is not None and (new or replaced):
                for (key, _), message in replaced.items():
                    connection.execute(_REPLACE_MESSAGE, (message.role, message.content, key))
                rounds = _rounds(replaced.values()) - sum(role == ChatRole.USER.value for _, role in replaced)
                _append(connection, history, new, now, rounds)
        return len(new) + len(replaced)

    def _delete_some(
        self, session: Database, chat_history_id: str, message_ids: Sequence[str] | None, from_message_id: str | None
    ) -> None:
        with session.transaction() as connection:
            history = self._find(connection, chat_history_id)
            if from_message_id is not None:
                first_key = None if history is None else _key_of(connection, history, from_message_id)
                if history is None or first_key is None:
                    raise message_not_found(from_message_id)
                _delete_ranges(connection, history, [(first_key, history.next_key)])
            elif history is not None:
                keys = (_key_of(connection, history, message_id) for message_id in message_ids or ())
                _delete_ranges(connection, history, [(key, key) for key in keys if key is not None])

    def _copy(self, session: Database, source_id: str, target_id: str, until_message_id: str | None) -> int:
        with session.transaction() as connection:
            now = microseconds_now()
            source, target = self._find(connection, source_id), self._find(connection, target_id)
            if source is None:
                raise history_not_found(source_id)
            first_key, last_key = key_range(source.history_key)
            if until_message_id is not None:
                until_key = _key_of(connection, source, until_message_id)
                if until_key is None:
                    raise message_not_found(until_message_id)
                last_key = until_key
            if target is not None and target.message_count:
                raise history_has_messages(target_id)
            if not connection.execute(_HAS_MESSAGES, (first_key, last_key)).fetchone()[0]:
                return 0
            target = target or self._make(connection, _new(target_id, now))
            (rounds,) = connection.execute(_ROUNDS, (first_key, last_key)).fetchone()
            copied = connection.execute(_COPY_MESSAGES, (target.next_key, first_key, last_key)).rowcount
            connection.execute(_UPDATE_HISTORY, (copied, copied, rounds, now, target.history_key))
        return copied

    def _import(
        self, session: Database, history: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_count: int
    ) -> int:
        with session.transaction() as connection:
            return self._imported(connection, history, batches, expected_count)

    def _import_several(self, session: Database, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]) -> int:
        with session.transaction() as connection:
            for history, _ in histories:
                found = self._find(connection, history.chat_history_id)
                if found is not None:
                    raise check_count(0, found.message_count)
            return sum(self._imported(connection, history, [rows], 0) for history, rows in histories)

    def _imported(
        self,
        connection: sqlite3.Connection,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_count: int,
    ) -> int:
        imported = rounds = 0
        target = self._find(connection, history.chat_history_id)
        _check_count(target, expected_count)
        if target is None:
            target = self._make(connection, history)
        for rows in batches:
            first_key = target.next_key + imported
            connection.executemany(
                _INSERT_MESSAGE,
                [
                    (key, row.message_id, row.role, row.created_at, row.content)
                    for key, row in enumerate(rows, first_key)
                ],
            )
            imported += len(rows)
            rounds += _rounds(rows)
        connection.execute(_UPDATE_HISTORY, (imported, imported, rounds, history.updated_at, target.history_key))
        return imported

    def _page(
        self, session: Database, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        history = (self.namespace, chat_history_id)
        with session.connection() as connection, all_readable(connection):
            if after is not None:
                rows = connection.execute(_PAGE_AFTER, (*history, after + 1, _MAX_POSITION, limit)).fetchall()
            else:
                last = _MAX_POSITION if before is None else before - 1
                rows = connection.execute(_PAGE_BEFORE, (*history, 0, last, limit)).fetchall()[::-1]
        return [MessageRow(*row) for row in rows]

    def _find(self, connection: sqlite3.Connection, chat_history_id: str) -> _History | None:
        found = connection.execute(_HISTORY, (self.namespace, chat_history_id)).fetchone()
        return None if found is None else _History(*found)

    def _make(self, connection: sqlite3.Connection, history: HistoryRow) -> _History:
        """
        Make a history without messages.
        """
        values = (self.namespace, history.chat_history_id, *history[3:])
        return _History(int(connection.execute(_INSERT_HISTORY, values).lastrowid or 0), 0, 0)


def microseconds_now() -> int:
    """
    Return the time as the tables keep it.
    """
    return time.time_ns() // 1000


def key_range(history_key: int) -> tuple[int, int]:
    """
    Return the first and the last key that messages of a history can have.
    """
    return history_key << _POSITION_BITS, ((history_key + 1) << _POSITION_BITS) - 1


def delete_history(connection: sqlite3.Connection, history_key: int) -> None:
    """
    Delete a history and its messages, within a transaction.
    """
    connection.execute(_DELETE_MESSAGES, key_range(history_key))
    connection.execute(_DELETE_HISTORY, (history_key,))


def _new(chat_history_id: str, now: int) -> HistoryRow:
    return HistoryRow(chat_history_id, 0, 0, now, now, None, None)


def _rounds(messages: Iterable[EncodedMessage | MessageRow]) -> int:
    return sum(message.role == ChatRole.USER.value for message in messages)


def _check_count(history: _History | None, expected_count: int | None) -> None:
    count = 0 if history is None else history.message_count
    if expected_count not in (None, count):
        raise check_count(expected_count, count)


def _known(
    connection: sqlite3.Connection, history: _History, messages: Sequence[EncodedMessage]
) -> dict[str, tuple[int, str]]:
    """
    Return the ids among these that the history has, each with its message's key and role.
    """
    known = {}
    for message in messages:
        if message.brought_its_id:
            found = connection.execute(_MESSAGE, (history.history_key, message.message_id)).fetchone()
            if found is not None:
                known[message.message_id] = found
    return known


def _key_of(connection: sqlite3.Connection, history: _History, message_id: str) -> int | None:
    found = connection.execute(_MESSAGE, (history.history_key, message_id)).fetchone()
    return None if found is None else found[0]


def _append(
    connection: sqlite3.Connection, history: _History, new: Sequence[EncodedMessage], now: int, more_rounds: int = 0
) -> None:
    """
    Append messages, and count them.

    :param more_rounds: How many rounds there are more besides.
    """
    connection.executemany(
        _INSERT_MESSAGE,
        [
            (key, message.message_id, message.role, now, message.content)
            for key, message in enumerate(new, history.next_key)
        ],
    )
    changes = (len(new), len(new), _rounds(new) + more_rounds, now)
    connection.execute(_UPDATE_HISTORY, (*changes, history.history_key))


def _delete_ranges(connection: sqlite3.Connection, history: _History, ranges: Iterable[tuple[int, int]]) -> None:
    """
    Delete messages by their keys, and count them.
    """
    deleted = rounds = 0
    for first_and_last in ranges:
        rounds += connection.execute(_ROUNDS, first_and_last).fetchone()[0]
        deleted += connection.execute(_DELETE_MESSAGES, first_and_last).rowcount
    if deleted:
        connection.execute(_UPDATE_HISTORY, (0, -deleted, -rounds, microseconds_now(), history.history_key))
