# SPDX-License-Identifier: Apache-2.0
"""What a write transaction does with the rows of histories and messages, and with the index of words."""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from haystack.dataclasses import ChatRole

from haystack_chat_store.stores.conflicts import Plan, check_revision, is_replaced_already
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, branch_origin, round_count
from haystack_chat_store.stores.sqlite.schema import key_range
from haystack_chat_store.stores.sqlite.term_index import TermIndex
from haystack_chat_store.stores.times import microseconds_now

_FIND = """
    SELECT history_key, next_position, message_count, revision,
        EXISTS (SELECT 1 FROM haystack_chat_search WHERE search_key = 1)
    FROM haystack_chat_histories WHERE namespace = ? AND chat_history_id = ?
"""
_INSERT_HISTORY = """
    INSERT INTO haystack_chat_histories
        (namespace, chat_history_id, revision, next_position, message_count, round_count, created_at, updated_at,
        title, meta, branch_of)
    VALUES (?, ?, ?, 0, 0, 0, ?, ?, ?, ?, ?)
"""
_DELETED_REVISION = "SELECT deleted_revision FROM haystack_chat_namespaces WHERE namespace = ?"
_KEEP_REVISION = """
    INSERT INTO haystack_chat_namespaces (namespace, deleted_revision)
    SELECT namespace, revision FROM haystack_chat_histories WHERE history_key = ?
    ON CONFLICT (namespace) DO UPDATE SET deleted_revision = max(deleted_revision, excluded.deleted_revision)
"""
_UPDATE_HISTORY = """
    UPDATE haystack_chat_histories SET next_position = next_position + ?, message_count = message_count + ?,
        round_count = round_count + ?, updated_at = max(updated_at, ?), revision = revision + 1
    WHERE history_key = ?
"""
_RECOUNT = """
    UPDATE haystack_chat_histories SET
        message_count = (SELECT count(*) FROM haystack_chat_messages WHERE message_key BETWEEN :first AND :last),
        round_count = (SELECT count(*) FROM haystack_chat_messages
            WHERE role = 'user' AND message_key BETWEEN :first AND :last),
        next_position = max(next_position, coalesce((SELECT max(message_key) + 1 - :first FROM haystack_chat_messages
            WHERE message_key BETWEEN :first AND :last), 0)),
        revision = iif(typeof(revision) = 'integer', revision, coalesce(
            (SELECT max(revision) FROM haystack_chat_messages WHERE message_key BETWEEN :first AND :last), 0) + 1)
    WHERE history_key = :key
"""
_BRANCHES = "SELECT history_key, chat_history_id FROM haystack_chat_histories WHERE namespace = ? AND branch_of = ?"
_DELETE_HISTORY = "DELETE FROM haystack_chat_histories WHERE history_key = ?"
_MESSAGE = "SELECT message_key, role FROM haystack_chat_messages WHERE message_key >> 32 = ? AND message_id = ?"
_IS_EQUAL = "SELECT role = ? AND content = ? FROM haystack_chat_messages WHERE message_key = ?"
_COUNT_FROM = "SELECT count(*) FROM haystack_chat_messages WHERE message_key BETWEEN ? AND ?"
_INSERT_MESSAGE = """
    INSERT INTO haystack_chat_messages (message_key, message_id, role, created_at, revision, content)
    VALUES (?, ?, ?, ?, ?, ?)
"""
_REPLACE_MESSAGE = "UPDATE haystack_chat_messages SET role = ?, revision = ?, content = ? WHERE message_key = ?"
_COPY_MESSAGES = """
    INSERT INTO haystack_chat_messages (message_key, message_id, role, created_at, revision, content)
    SELECT ? + row_number() OVER (ORDER BY message_key) - 1, message_id, role, created_at, ?, content
    FROM haystack_chat_messages WHERE message_key BETWEEN ? AND ?
"""
_ROUNDS = "SELECT count(*) FROM haystack_chat_messages WHERE role = 'user' AND message_key BETWEEN ? AND ?"
_DELETE_MESSAGES = "DELETE FROM haystack_chat_messages WHERE message_key BETWEEN ? AND ?"


class StoredHistory(NamedTuple):
    """A history as a write finds it."""

    history_key: int
    next_position: int
    message_count: int
    revision: int

    @property
    def first_key(self) -> int:
        """The key that a message at position 0 has."""
        return key_range(self.history_key)[0]

    @property
    def next_key(self) -> int:
        """The key of the next message."""
        return self.first_key + self.next_position


class Histories:
    """The histories of a scope, within a write transaction."""

    def __init__(self, connection: sqlite3.Connection, scope: Scope, is_searched: bool) -> None:
        """
        Do not read anything yet.

        :param is_searched: Whether the store can search: then an index of words is begun if there is none.
        """
        self.connection = connection
        self._namespace = scope.namespace
        self._is_searched = is_searched
        self._index: TermIndex | None = None

    @property
    def index(self) -> TermIndex:
        """The index of words."""
        if self._index is None:
            self._index = TermIndex.of(self.connection, is_wanted=self._is_searched)
        return self._index

    def find(self, chat_history_id: str) -> StoredHistory | None:
        """Return a history, or `None` if it does not exist."""
        found = self.connection.execute(_FIND, (self._namespace, chat_history_id)).fetchone()
        if found is None:
            return None
        if not found[4] and not self._is_searched:
            self._index = TermIndex(self.connection, None)  # which spares reading it
        return StoredHistory(*found[:4])

    def make(self, row: HistoryRow) -> StoredHistory:
        """Make a history without messages."""
        deleted = self.connection.execute(_DELETED_REVISION, (self._namespace,)).fetchone()
        revision = 0 if deleted is None else deleted[0]  # the change that follows makes it greater
        values = (self._namespace, row.chat_history_id, revision, row.created_at, row.updated_at, row.title, row.meta)
        made = self.connection.execute(_INSERT_HISTORY, (*values, branch_origin(row.chat_history_id, row.meta)))
        return StoredHistory(int(made.lastrowid or 0), 0, 0, revision)

    def find_message(self, history: StoredHistory, message_id: str) -> tuple[int, str] | None:
        """Return the key and the role of a message, or `None` if the history does not have its id."""
        found: tuple[int, str] | None = self.connection.execute(_MESSAGE, (history.history_key, message_id)).fetchone()
        return found

    def known(self, history: StoredHistory, messages: Iterable[EncodedMessage]) -> Mapping[str, tuple[int, str]]:
        """Return the ids among these that the history has, each with its message's key and role."""
        found = {}
        for message in messages:
            if message.has_caller_id and (key_and_role := self.find_message(history, message.message_id)):
                found[message.message_id] = key_and_role
        return found

    def equal(self, messages: Iterable[EncodedMessage], known: Mapping[str, tuple[int, str]]) -> set[str]:
        """Return the ids among the known ones whose stored messages are equal."""
        values = [(m.role, m.content, known[m.message_id][0], m.message_id) for m in messages if m.message_id in known]
        return {message_id for *each, message_id in values if self.connection.execute(_IS_EQUAL, each).fetchone()[0]}

    def has_replaced(self, history: StoredHistory, from_message_id: str, messages: Sequence[EncodedMessage]) -> bool:
        """Whether an earlier attempt has replaced messages by these."""
        known = self.known(history, messages)
        if not messages or len(known) < len(messages) or len(self.equal(messages, known)) < len(messages):
            return False
        keys = [known[message.message_id][0] for message in messages]
        found = self.find_message(history, from_message_id)
        start = keys[-1] if found is None else found[0]
        (following,) = self.connection.execute(_COUNT_FROM, (start, history.next_key)).fetchone()
        return is_replaced_already(keys, start, following)

    def carry_out(self, plan: Plan, history: StoredHistory, now: int) -> None:
        """Append and replace messages, and count them."""
        count, rounds = len(plan.new), round_count(plan.new)
        for (key, role), message in plan.replaced.items():
            self.connection.execute(_REPLACE_MESSAGE, (message.role, history.revision + 1, message.content, key))
            self.index.remove(key, key)
            self.index.add([(key, message.content)])
            rounds += (message.role == ChatRole.USER.value) - (role == ChatRole.USER.value)
        self._append(history, plan.new, now)
        self.connection.execute(_UPDATE_HISTORY, (count, count, rounds, now, history.history_key))

    def replace(self, history: StoredHistory, first_key: int, new: Sequence[EncodedMessage], now: int) -> None:
        """Delete the messages from a key on, append others, and count both."""
        deleted, rounds = self._delete_and_count(first_key, history.next_key)
        self._append(history, new, now)
        counts = (len(new), len(new) - deleted, round_count(new) - rounds)
        self.connection.execute(_UPDATE_HISTORY, (*counts, now, history.history_key))

    def import_batches(self, row: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_revision: int) -> int:
        """Append all batches to a history, which is made if it does not exist, and count them."""
        history = self.find(row.chat_history_id)
        check_revision(expected_revision, 0 if history is None else history.revision)
        if history is None:
            history = self.make(row)
        imported = rounds = 0
        for batch in batches:
            first_key, revision = history.next_key + imported, history.revision + 1
            self._insert(
                [
                    (key, m.message_id, m.role, m.created_at, revision, m.content)
                    for key, m in enumerate(batch, first_key)
                ]
            )
            imported += len(batch)
            rounds += round_count(batch)
        self.connection.execute(_UPDATE_HISTORY, (imported, imported, rounds, row.updated_at, history.history_key))
        return imported

    def copy(self, first_key: int, last_key: int, target: StoredHistory, now: int) -> int:
        """Append copies of the messages with keys in a range, without gaps, and count them."""
        (rounds,) = self.connection.execute(_ROUNDS, (first_key, last_key)).fetchone()
        values = (target.next_key, target.revision + 1, first_key, last_key)
        copied = self.connection.execute(_COPY_MESSAGES, values).rowcount
        self.index.add_range(target.next_key, target.next_key + copied - 1)
        self.connection.execute(_UPDATE_HISTORY, (copied, copied, rounds, now, target.history_key))
        return copied

    def delete_messages(self, history: StoredHistory, ranges: Iterable[tuple[int, int]]) -> None:
        """Delete the messages with keys in these ranges, and count them."""
        deleted = rounds = 0
        for first_and_last in ranges:
            counts = self._delete_and_count(*first_and_last)
            deleted, rounds = deleted + counts[0], rounds + counts[1]
        if deleted:
            self.connection.execute(_UPDATE_HISTORY, (0, -deleted, -rounds, microseconds_now(), history.history_key))

    def delete(self, history_key: int) -> None:
        """Delete a history and its messages."""
        self._delete(*key_range(history_key))
        self.connection.execute(_KEEP_REVISION, (history_key,))
        self.connection.execute(_DELETE_HISTORY, (history_key,))

    def delete_branches(self, chat_history_id: str) -> None:
        """Delete the branches of a history, and theirs."""
        for history_key, branch in self.connection.execute(_BRANCHES, (self._namespace, chat_history_id)).fetchall():
            self.delete(history_key)
            self.delete_branches(branch)

    def recount(self, history_key: int) -> None:
        """Set the counters of a history by its messages."""
        first_key, last_key = key_range(history_key)
        self.connection.execute(_RECOUNT, {"key": history_key, "first": first_key, "last": last_key})

    def _append(self, history: StoredHistory, messages: Sequence[EncodedMessage], now: int) -> None:
        revision = history.revision + 1
        self._insert(
            [(key, m.message_id, m.role, now, revision, m.content) for key, m in enumerate(messages, history.next_key)]
        )

    def _insert(self, rows: Sequence[tuple[int, str, str, int, int, str]]) -> None:
        index = self.index  # before there are messages: an index that begins now has them all
        self.connection.executemany(_INSERT_MESSAGE, rows)
        if index.exists:
            index.add([(key, content) for key, *_, content in rows])

    def _delete_and_count(self, first_key: int, last_key: int) -> tuple[int, int]:
        """Delete the messages with keys in a range, and return how many there were, and how many rounds."""
        (rounds,) = self.connection.execute(_ROUNDS, (first_key, last_key)).fetchone()
        return self._delete(first_key, last_key), rounds

    def _delete(self, first_key: int, last_key: int) -> int:
        self.index.remove(first_key, last_key)
        return self.connection.execute(_DELETE_MESSAGES, (first_key, last_key)).rowcount
