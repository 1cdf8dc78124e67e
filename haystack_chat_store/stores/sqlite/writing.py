# SPDX-License-Identifier: Apache-2.0
"""
The operations that change what was said.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from haystack.dataclasses import ChatRole
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_count,
    history_exists,
    history_has_messages,
    history_not_found,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, round_count
from haystack_chat_store.stores.sqlite.connections import Database
from haystack_chat_store.stores.sqlite.schema import key_range
from haystack_chat_store.stores.times import microseconds_now

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
_DELETE_MESSAGES = "DELETE FROM chat_messages WHERE message_key BETWEEN ? AND ?"
_RECOUNT = """
    UPDATE chat_histories SET
        message_count = (SELECT count(*) FROM chat_messages
            WHERE message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1),
        round_count = (SELECT count(*) FROM chat_messages
            WHERE role = 'user' AND message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1),
        next_position = max(next_position, coalesce((SELECT (max(message_key) & 0xffffffff) + 1 FROM chat_messages
            WHERE message_key BETWEEN history_key << 32 AND (history_key + 1 << 32) - 1), 0))
    WHERE history_key = :key
"""
_DELETE_MESSAGE = "DELETE FROM chat_messages WHERE message_key = ?"
_DELETE_HISTORY = "DELETE FROM chat_histories WHERE history_key = ?"
_TOUCH_HISTORY = "UPDATE chat_histories SET updated_at = max(updated_at, ?) WHERE history_key = ?"
_HISTORY_KEYS = "SELECT history_key FROM chat_histories WHERE namespace = ?"


class _History(NamedTuple):
    history_key: int
    next_position: int
    message_count: int

    @property
    def first_key(self) -> int:
        return key_range(self.history_key)[0]

    @property
    def next_key(self) -> int:
        return self.first_key + self.next_position


class Writing(Engine[Database]):
    """
    The operations that change what was said.
    """

    def append(
        self,
        session: Database,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        """
        Look for the ids that came with messages, and insert what is new at the next positions.
        """
        with session.transaction() as connection:
            now = microseconds_now()
            history = _find(connection, scope, chat_history_id)
            check_count(expected_count, 0 if history is None else history.message_count)
            known = {} if history is None else _known(connection, history, messages)
            plan = planned(messages, known, policy)
            if history is None and plan.new:
                history = _make(connection, scope, _new(chat_history_id, now))
            if history is not None and (plan.new or plan.replaced):
                for (key, _), message in plan.replaced.items():
                    connection.execute(_REPLACE_MESSAGE, (message.role, message.content, key))
                rounds = round_count(list(plan.replaced.values()))
                rounds -= sum(role == ChatRole.USER.value for _, role in plan.replaced)
                _append(connection, history, plan.new, now, rounds)
        return len(plan.new) + len(plan.replaced)

    def delete(self, session: Database, scope: Scope, chat_history_id: str) -> None:
        """
        Delete the history and its messages.
        """
        with session.transaction() as connection:
            history = _find(connection, scope, chat_history_id)
            if history is not None:
                delete_history(connection, history.history_key)

    def delete_all(self, session: Database, scope: Scope) -> None:
        """
        Delete the histories of the namespace in one transaction.
        """
        with session.transaction() as connection:
            for (history_key,) in connection.execute(_HISTORY_KEYS, (scope.namespace,)).fetchall():
                delete_history(connection, history_key)

    def delete_messages(
        self,
        session: Database,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
    ) -> None:
        """
        Delete messages by ranges of keys.
        """
        with session.transaction() as connection:
            history = _find(connection, scope, chat_history_id)
            if from_message_id is not None:
                first_key = None if history is None else _key_of(connection, history, from_message_id)
                if history is None or first_key is None:
                    raise message_not_found(from_message_id)
                _delete_ranges(connection, history, [(first_key, history.next_key)])
            elif history is not None:
                keys = (_key_of(connection, history, message_id) for message_id in message_ids or ())
                _delete_ranges(connection, history, [(key, key) for key in keys if key is not None])

    def copy(
        self, session: Database, scope: Scope, source_id: str, target_id: str, until_message_id: str | None
    ) -> int:
        """
        Copy rows within the table.
        """
        with session.transaction() as connection:
            now = microseconds_now()
            source, target = _find(connection, scope, source_id), _find(connection, scope, target_id)
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
            target = target or _make(connection, scope, _new(target_id, now))
            (rounds,) = connection.execute(_ROUNDS, (first_key, last_key)).fetchone()
            copied = connection.execute(_COPY_MESSAGES, (target.next_key, first_key, last_key)).rowcount
            connection.execute(_UPDATE_HISTORY, (copied, copied, rounds, now, target.history_key))
        return copied

    def import_history(
        self,
        session: Database,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_count: int,
    ) -> int:
        """
        Insert all batches in one transaction.
        """
        with session.transaction() as connection:
            return _imported(connection, scope, history, batches, expected_count)

    def import_histories(
        self, session: Database, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        """
        Insert all histories in one transaction.
        """
        with session.transaction() as connection:
            for history, _ in histories:
                found = _find(connection, scope, history.chat_history_id)
                if found is not None:
                    raise history_exists(history.chat_history_id)
            return sum(_imported(connection, scope, history, [rows], 0) for history, rows in histories)

    def remove(self, session: Database, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
        """
        Delete messages by their keys, and recount the history.
        """
        with session.transaction() as connection:
            history = _find(connection, scope, chat_history_id)
            if history is not None:
                connection.executemany(_DELETE_MESSAGE, [(history.first_key + position,) for position in positions])
                recount(connection, history.history_key)
                connection.execute(_TOUCH_HISTORY, (microseconds_now(), history.history_key))


def _find(connection: sqlite3.Connection, scope: Scope, chat_history_id: str) -> _History | None:
    found = connection.execute(_HISTORY, (scope.namespace, chat_history_id)).fetchone()
    return None if found is None else _History(*found)


def _make(connection: sqlite3.Connection, scope: Scope, history: HistoryRow) -> _History:
    """
    Make a history without messages.
    """
    values = (
        scope.namespace,
        history.chat_history_id,
        history.created_at,
        history.updated_at,
        history.title,
        history.meta,
    )
    return _History(int(connection.execute(_INSERT_HISTORY, values).lastrowid or 0), 0, 0)


def _imported(
    connection: sqlite3.Connection,
    scope: Scope,
    history: HistoryRow,
    batches: Iterable[Sequence[MessageRow]],
    expected_count: int,
) -> int:
    imported = rounds = 0
    target = _find(connection, scope, history.chat_history_id)
    check_count(expected_count, 0 if target is None else target.message_count)
    if target is None:
        target = _make(connection, scope, history)
    for rows in batches:
        first_key = target.next_key + imported
        connection.executemany(
            _INSERT_MESSAGE,
            [(key, row.message_id, row.role, row.created_at, row.content) for key, row in enumerate(rows, first_key)],
        )
        imported += len(rows)
        rounds += round_count(rows)
    connection.execute(_UPDATE_HISTORY, (imported, imported, rounds, history.updated_at, target.history_key))
    return imported


def delete_history(connection: sqlite3.Connection, history_key: int) -> None:
    """
    Delete a history and its messages, within a transaction.
    """
    connection.execute(_DELETE_MESSAGES, key_range(history_key))
    connection.execute(_DELETE_HISTORY, (history_key,))


def recount(connection: sqlite3.Connection, history_key: int) -> None:
    """
    Set the counters of a history by its messages, within a transaction.
    """
    connection.execute(_RECOUNT, {"key": history_key})


def _new(chat_history_id: str, now: int) -> HistoryRow:
    return HistoryRow(chat_history_id=chat_history_id, created_at=now, updated_at=now)


def _known(
    connection: sqlite3.Connection, history: _History, messages: Sequence[EncodedMessage]
) -> dict[str, tuple[int, str]]:
    """
    Return the ids among these that the history has, each with its message's key and role.
    """
    known = {}
    for message in messages:
        if message.has_caller_id:
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
    changes = (len(new), len(new), round_count(new) + more_rounds, now)
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
