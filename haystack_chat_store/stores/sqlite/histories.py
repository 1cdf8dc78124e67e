# SPDX-License-Identifier: Apache-2.0
"""Writes the rows of histories and messages, and the index of words, in a write transaction."""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from haystack.dataclasses import ChatRole

from haystack_chat_store.search_text import title_terms
from haystack_chat_store.stores.conflicts import (
    Plan,
    check_access,
    check_revision,
    check_same_user,
    history_exists,
    is_replaced_already,
)
from haystack_chat_store.stores.previews import beginning_of_content, first_question, last_said
from haystack_chat_store.stores.rows import (
    EncodedMessage,
    HistoryRow,
    MessageRow,
    Scope,
    branch_origin,
    meta_of_branch,
    renamed_branch_ids,
    round_count,
)
from haystack_chat_store.stores.sqlite.connections import damaged_texts_escaped, readable_rows
from haystack_chat_store.stores.sqlite.schema import key_range
from haystack_chat_store.stores.sqlite.term_index import TermIndex
from haystack_chat_store.stores.sqlite.visibility import IS_VISIBLE_HISTORY, visible_history
from haystack_chat_store.stores.times import microseconds_now

_FIND_HISTORY = """
    SELECT history_key, next_position, message_count, revision, user_id, expires_at,
        EXISTS (SELECT 1 FROM haystack_chat_search WHERE search_key = 1)
    FROM haystack_chat_histories WHERE namespace = ? AND chat_history_id = ?
"""
_INSERT_HISTORY = """
    INSERT INTO haystack_chat_histories
        (namespace, chat_history_id, revision, next_position, message_count, round_count, created_at, updated_at,
        title, title_terms, meta, branch_of, user_id, expires_at)
    VALUES (?, ?, ?, 0, 0, 0, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_DELETED_REVISION = "SELECT deleted_revision FROM haystack_chat_namespaces WHERE namespace = ?"
_KEEP_REVISION = """
    INSERT INTO haystack_chat_namespaces (namespace, deleted_revision)
    SELECT namespace, revision FROM haystack_chat_histories WHERE history_key = ?
    ON CONFLICT (namespace) DO UPDATE SET deleted_revision = max(deleted_revision, excluded.deleted_revision)
"""
_COUNT_CHANGED = """
    UPDATE haystack_chat_histories SET next_position = next_position + ?, message_count = message_count + ?,
        round_count = round_count + ?, updated_at = max(updated_at, ?), revision = revision + 1
    WHERE history_key = ?
"""
_COUNT_APPENDED = """
    UPDATE haystack_chat_histories SET next_position = next_position + ?1, message_count = message_count + ?1,
        round_count = round_count + ?2, updated_at = max(updated_at, ?3), revision = revision + 1,
        preview = coalesce(preview, ?4), last_role = coalesce(?5, last_role),
        last_text = iif(?5 IS NULL, last_text, ?6), last_at = coalesce(?7, last_at)
    WHERE history_key = ?8
"""
_SET_EXPIRY = "UPDATE haystack_chat_histories SET expires_at = ? WHERE history_key = ?"
_SET_PREVIEWS = """
    UPDATE haystack_chat_histories SET preview = ?, last_role = ?, last_text = ?, last_at = ? WHERE history_key = ?
"""
#: The contents of the user messages between two keys, in order.
QUESTIONS = """
    SELECT CAST(content AS TEXT) FROM haystack_chat_messages
    WHERE role = 'user' AND message_key BETWEEN ? AND ? ORDER BY message_key
"""
_LAST_MESSAGE = """
    SELECT CAST(role AS TEXT), created_at, CAST(content AS TEXT) FROM haystack_chat_messages
    WHERE message_key BETWEEN ? AND ? AND role <> 'system' ORDER BY message_key DESC LIMIT 1
"""
_MESSAGE_ROW = """
    SELECT message_key & 0xffffffff, created_at, CAST(message_id AS TEXT), CAST(role AS TEXT), CAST(content AS TEXT)
    FROM haystack_chat_messages WHERE message_key = ?
"""
_SET_CONTENT = "UPDATE haystack_chat_messages SET content = ?, revision = ? WHERE message_key = ?"
_NEXT_REVISION = "UPDATE haystack_chat_histories SET revision = revision + 1 WHERE history_key = ?"
_META = "SELECT CAST(meta AS TEXT) FROM haystack_chat_histories WHERE history_key = ?"
_RENAME = """
    UPDATE haystack_chat_histories SET chat_history_id = ?, branch_of = ?, revision = ? WHERE history_key = ?
"""
_SET_META = "UPDATE haystack_chat_histories SET meta = ?, branch_of = ? WHERE history_key = ?"
_RENEW = f"UPDATE haystack_chat_histories SET expires_at = ?5 WHERE {IS_VISIBLE_HISTORY} AND expires_at IS NOT NULL"
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
# ?4 is the user of a history that is there, which ?3 says, or else the user of the scope.
_BRANCHES = """
    SELECT history_key, chat_history_id, user_id FROM haystack_chat_histories
    WHERE namespace = ?1 AND branch_of = ?2 AND (user_id IS ?4 OR (NOT ?3 AND ?4 IS NULL))
"""
_HAND_OVER = "UPDATE haystack_chat_histories SET user_id = ? WHERE history_key = ?"
_DELETE_HISTORY = "DELETE FROM haystack_chat_histories WHERE history_key = ?"
_FIND_MESSAGE = "SELECT message_key, role FROM haystack_chat_messages WHERE message_key >> 32 = ? AND message_id = ?"
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
    user_id: str | None
    expires_at: int | None
    has_index: int = 0  # of words, in the file

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
        self._scope = scope
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
        """
        Return a history to write to, or `None` if it does not exist. If it has expired, it is deleted.

        :raises ChatHistoryAccessError: If it is another user's.
        """
        found = self._found(chat_history_id)
        if found is None:
            return None
        if found.expires_at is not None and _has_expired(found):
            self.delete(found.history_key)
            return None
        check_access(self._scope, found.user_id)
        return found

    def check_is_new(self, chat_history_id: str) -> None:
        """
        Check that a history does not exist.

        :raises ChatHistoryChangedError: If it does.
        """
        if self.find(chat_history_id) is not None:
            raise history_exists(chat_history_id)

    def find_to_read(self, chat_history_id: str) -> StoredHistory | None:
        """Return a history, or `None` if it does not exist, has expired, or is another user's."""
        found = self._found(chat_history_id)
        is_visible = found is not None and self._scope.includes(found.user_id) and not _has_expired(found)
        return found if is_visible else None

    def _found(self, chat_history_id: str) -> StoredHistory | None:
        columns = self.connection.execute(_FIND_HISTORY, (self._namespace, chat_history_id)).fetchone()
        if columns is None:
            return None
        found = StoredHistory._make(columns)
        if not found.has_index and not self._is_searched:
            self._index = TermIndex(self.connection, None)  # which spares reading it
        return found

    def make(self, row: HistoryRow) -> StoredHistory:
        """Make a history without messages. It is the user's of the scope, or else the row's."""
        user_id = row.user_id if self._scope.user_id is None else self._scope.user_id
        expires_at = self._scope.expires_at(microseconds_now())
        revision = self.deleted_revision()  # the change that follows makes it greater
        titles = (row.title, title_terms(row.title))
        values = (row.chat_history_id, revision, row.created_at, row.updated_at, *titles, row.meta)
        owned = (branch_origin(row.chat_history_id, row.meta), user_id, expires_at)
        made = self.connection.execute(_INSERT_HISTORY, (self._namespace, *values, *owned))
        return StoredHistory(int(made.lastrowid or 0), 0, 0, revision, user_id, expires_at)

    def create(self, row: HistoryRow) -> None:
        """Make a history that begins without messages, which is a change of its own."""
        self.connection.execute(_NEXT_REVISION, (self.make(row).history_key,))

    def deleted_revision(self) -> int:
        """Return the greatest revision that a deleted history of the namespace had."""
        deleted = self.connection.execute(_DELETED_REVISION, (self._namespace,)).fetchone()
        return 0 if deleted is None else int(deleted[0])

    def rename(self, history_key: int, user_id: str | None, old_id: str, new_id: str) -> None:
        """Give a history of a user, with its branches, another id. Under both ids, revisions go on rising."""
        self.connection.execute(_KEEP_REVISION, (history_key,))
        branch_of = branch_origin(new_id, self._meta(history_key))
        self.connection.execute(_RENAME, (new_id, branch_of, self.deleted_revision() + 1, history_key))
        origin = (self._namespace, old_id, True, user_id)
        for key_of_branch, branch, _ in self.connection.execute(_BRANCHES, origin).fetchall():
            free = next(filter(self._is_free, renamed_branch_ids(branch, old_id, new_id)))
            self.rename(key_of_branch, user_id, branch, free)
            self.set_meta(key_of_branch, free, meta_of_branch(self._meta(key_of_branch), new_id))

    def set_meta(self, history_key: int, chat_history_id: str, meta: str) -> None:
        """Set the meta of a history, and whether it is a branch."""
        self.connection.execute(_SET_META, (meta, branch_origin(chat_history_id, meta), history_key))

    def _meta(self, history_key: int) -> str | None:
        ((meta,),) = readable_rows(self.connection, _META, (history_key,))
        return str(meta) if meta is not None else None

    def _is_free(self, chat_history_id: str) -> bool:
        """Whether no history has this id. If one has expired, it is deleted."""
        found = self._found(chat_history_id)
        if found is not None and _has_expired(found):
            self.delete(found.history_key)
            return True
        return found is None

    def renew(self, chat_history_id: str) -> None:
        """Let the lifetime of a history begin anew."""
        history = visible_history(self._scope, chat_history_id)
        self.connection.execute(_RENEW, (*history, self._scope.expires_at(microseconds_now())))

    def update_message(self, history: StoredHistory, key: int, change: Callable[[str], str]) -> MessageRow:
        """Change the content of a message, but not what was said."""
        row = MessageRow(*readable_rows(self.connection, _MESSAGE_ROW, (key,))[0])
        row.content = change(row.content)
        self.connection.execute(_SET_CONTENT, (row.content, history.revision + 1, key))
        self.connection.execute(_NEXT_REVISION, (history.history_key,))
        return row

    def find_message(self, history: StoredHistory, message_id: str) -> tuple[int, str] | None:
        """Return the key and the role of a message, or `None` if the history does not have its id."""
        found: tuple[int, str] | None = self.connection.execute(
            _FIND_MESSAGE, (history.history_key, message_id)
        ).fetchone()
        return found

    def find_keys(self, history: StoredHistory, message_ids: Iterable[str]) -> list[int]:
        """Return the keys of those messages that the history has."""
        found = [self.find_message(history, message_id) for message_id in message_ids]
        return [each[0] for each in found if each is not None]

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
        rounds = round_count(plan.new)
        for (key, role), message in plan.replaced.items():
            self.connection.execute(_REPLACE_MESSAGE, (message.role, history.revision + 1, message.content, key))
            self.index.remove(key, key)
            self.index.add([(key, message.content)])
            rounds += (message.role == ChatRole.USER.value) - (role == ChatRole.USER.value)
        self._append(history, plan.new, now)
        self._count_appended(history, plan.new, rounds, now)
        if plan.replaced:
            self.find_previews(history.history_key)

    def replace(self, history: StoredHistory, first_key: int, messages: Sequence[EncodedMessage], now: int) -> int:
        """
        Delete the messages from a key on, append others, and count both.

        :returns: How many were appended. Messages that stay, because they come before the key, are not.
        """
        kept = {message_id for message_id, (key, _) in self.known(history, messages).items() if key < first_key}
        new = [message for message in messages if message.message_id not in kept]
        deleted, rounds = self._delete_and_count(first_key, history.next_key)
        self._append(history, new, now)
        counts = (len(new), len(new) - deleted, round_count(new) - rounds)
        self.connection.execute(_COUNT_CHANGED, (*counts, now, history.history_key))
        self._renew(history)
        self.find_previews(history.history_key)
        return len(new)

    def import_batches(self, row: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_revision: int) -> int:
        """Append all batches to a history, which is made if it does not exist, and count them."""
        history = self.find(row.chat_history_id)
        check_revision(expected_revision, 0 if history is None else history.revision)
        if history is not None:
            check_same_user(row.user_id if self._scope.user_id is None else self._scope.user_id, history.user_id)
        else:
            history = self.make(row)
        imported = rounds = 0
        preview = last = None
        for batch in batches:
            preview, last = preview or first_question(batch), last_said(batch) or last
            first_key, revision = history.next_key + imported, history.revision + 1
            self._insert(
                [
                    (key, m.message_id, m.role, m.created_at, revision, m.content)
                    for key, m in enumerate(batch, first_key)
                ]
            )
            imported += len(batch)
            rounds += round_count(batch)
        said = (None, None, None) if last is None else (last.role, beginning_of_content(last.content), last.created_at)
        self.connection.execute(
            _COUNT_APPENDED, (imported, rounds, row.updated_at, preview, *said, history.history_key)
        )
        self._renew(history)
        return imported

    def copy(self, first_key: int, last_key: int, target: StoredHistory, now: int) -> int:
        """Append copies of the messages with keys in a range, without gaps, and count them."""
        (rounds,) = self.connection.execute(_ROUNDS, (first_key, last_key)).fetchone()
        values = (target.next_key, target.revision + 1, first_key, last_key)
        copied = self.connection.execute(_COPY_MESSAGES, values).rowcount
        self.index.add_range(target.next_key, target.next_key + copied - 1)
        self.connection.execute(_COUNT_CHANGED, (copied, copied, rounds, now, target.history_key))
        self._renew(target)
        self.find_previews(target.history_key)
        return copied

    def delete_messages(self, history: StoredHistory, ranges: Iterable[tuple[int, int]]) -> None:
        """Delete the messages with keys in these ranges, and count them."""
        deleted = rounds = 0
        for first_and_last in ranges:
            counts = self._delete_and_count(*first_and_last)
            deleted, rounds = deleted + counts[0], rounds + counts[1]
        if deleted:
            self.connection.execute(_COUNT_CHANGED, (0, -deleted, -rounds, microseconds_now(), history.history_key))
            self.find_previews(history.history_key)

    def delete(self, history_key: int) -> None:
        """Delete a history and its messages."""
        self._delete(*key_range(history_key))
        self.connection.execute(_KEEP_REVISION, (history_key,))
        self.connection.execute(_DELETE_HISTORY, (history_key,))

    def delete_branches(self, chat_history_id: str, *, is_there: bool, user_id: str | None) -> None:
        """
        Delete the branches of a history, and theirs, but none of another user.

        :param is_there: Whether the history is there, or was until now. If not, those of the scope go that name it.
        :param user_id: The user of the history.
        """
        origin = (self._namespace, chat_history_id, is_there, user_id if is_there else self._scope.user_id)
        for history_key, branch, user_of_branch in self.connection.execute(_BRANCHES, origin).fetchall():
            self.delete(history_key)
            self.delete_branches(branch, is_there=True, user_id=user_of_branch)

    def hand_over(self, history_key: int, chat_history_id: str, before: str | None, after: str | None) -> None:
        """Give a history of a user, with its branches and theirs, to another user, or to none."""
        if before != after:
            self.connection.execute(_HAND_OVER, (after, history_key))
            origin = (self._namespace, chat_history_id, True, before)
            for key_of_branch, branch, _ in self.connection.execute(_BRANCHES, origin).fetchall():
                self.hand_over(key_of_branch, branch, before, after)

    def recount(self, history_key: int) -> None:
        """Set the counters of a history by its messages."""
        first_key, last_key = key_range(history_key)
        self.connection.execute(_RECOUNT, {"key": history_key, "first": first_key, "last": last_key})
        self.find_previews(history_key)

    def find_previews(self, history_key: int) -> None:
        """Find the first question and the last message of a history anew."""
        keys = key_range(history_key)
        with damaged_texts_escaped(self.connection):
            questions = (beginning_of_content(content) for (content,) in self.connection.execute(QUESTIONS, keys))
            preview = next(filter(None, questions), None)
        found = readable_rows(self.connection, _LAST_MESSAGE, keys)
        last = [(role, beginning_of_content(content), at) for role, at, content in found] or [(None, None, None)]
        self.connection.execute(_SET_PREVIEWS, (preview, *last[0], history_key))

    def _count_appended(self, history: StoredHistory, new: Sequence[EncodedMessage], rounds: int, now: int) -> None:
        last = last_said(new)
        said = (None, None, None) if last is None else (last.role, last.text, now)
        values = (len(new), rounds, now, first_question(new), *said, history.history_key)
        self.connection.execute(_COUNT_APPENDED, values)
        self._renew(history)

    def _renew(self, history: StoredHistory) -> None:
        """Let the lifetime of a history begin anew, after a write to it. Most histories never expire."""
        if self._scope.lifetime is not None or history.expires_at is not None:
            expires_at = self._scope.expires_at(microseconds_now())
            self.connection.execute(_SET_EXPIRY, (expires_at, history.history_key))

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


def _has_expired(history: StoredHistory) -> bool:
    return history.expires_at is not None and history.expires_at <= microseconds_now()
