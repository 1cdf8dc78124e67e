# SPDX-License-Identifier: Apache-2.0
"""
The index of words: an FTS5 table that keeps the terms of each message under the message's key.

A store writes the terms of a message in the transaction that writes the message. The table `haystack_chat_search` says
of which version the terms are, and up to which message all are indexed. Other programs may change or delete rows of the
messages' table: the index then keeps terms that `check` finds. A search finds only messages that are there.
"""

import sqlite3
from collections.abc import Iterable

from haystack import logging

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.search_text import searchable_text_of_content, spaced, terms
from haystack_chat_store.stores.sqlite.connections import readable_rows

logger = logging.getLogger(__name__)

#: Raise it whenever the terms of any message change.
TERMS_VERSION = 1
#: The mark of an index that has all messages, those to come included.
ALL_KEYS = 2**63 - 1

_CREATE = "CREATE VIRTUAL TABLE haystack_chat_terms USING fts5 (terms, tokenize = 'ascii')"
_STATE = "SELECT terms_version, indexed_up_to FROM haystack_chat_search WHERE search_key = 1"
_SET_STATE = "INSERT OR REPLACE INTO haystack_chat_search (search_key, terms_version, indexed_up_to) VALUES (1, ?, ?)"
_HAS_MESSAGES = "SELECT EXISTS (SELECT 1 FROM haystack_chat_messages)"
_ADD = "INSERT OR REPLACE INTO haystack_chat_terms (rowid, terms) VALUES (?, ?)"
_REMOVE = "DELETE FROM haystack_chat_terms WHERE rowid BETWEEN ? AND ?"
_MESSAGES = """
    SELECT message_key, CAST(content AS TEXT) FROM haystack_chat_messages
    WHERE message_key BETWEEN ? AND ? ORDER BY message_key LIMIT ?
"""

# The number of messages of a range that are in memory at once.
_MESSAGES_PER_BATCH = 1_000

_OF_NEWER = (
    "A newer version of haystack-chat-store made the search index of this file. Upgrade haystack-chat-store to search "
    "it, or let check(store, repair=True) of haystack_chat_store.doctor make it anew."
)


def terms_of(content: str) -> str:
    """Return the terms of a stored message as the index keeps them: in their order, with blanks around each."""
    return spaced(terms(searchable_text_of_content(content)))


class TermIndex:
    """The index of words of a file, within one transaction. If the file has none, its methods do nothing."""

    def __init__(self, connection: sqlite3.Connection, state: tuple[int, int] | None) -> None:
        """
        Do not read anything yet.

        :param state: The version of the terms, and the key up to which all messages are indexed; `None` if there is no
            index.
        """
        self._connection = connection
        self.exists = state is not None
        self.terms_version, self.indexed_up_to = state or (TERMS_VERSION, 0)

    @classmethod
    def of(cls, connection: sqlite3.Connection, *, is_wanted: bool = False) -> "TermIndex":
        """
        Return the index of the file.

        :param is_wanted: Whether to begin it if there is none, which takes a write transaction. Defaults to False.
        """
        index = cls(connection, connection.execute(_STATE).fetchone())
        if is_wanted and not index.exists:
            index.begin()
        return index

    @property
    def is_of_this_version(self) -> bool:
        """Whether the terms are those that this process makes."""
        return self.exists and self.terms_version == TERMS_VERSION

    @property
    def is_of_newer_version(self) -> bool:
        """Whether only a newer version of this package makes these terms."""
        return self.terms_version > TERMS_VERSION

    @property
    def is_complete(self) -> bool:
        """Whether all messages are indexed, with the terms of this version."""
        return self.is_of_this_version and self.indexed_up_to == ALL_KEYS

    @property
    def has_messages(self) -> bool:
        """Whether there are messages, indexed or not."""
        return bool(self._connection.execute(_HAS_MESSAGES).fetchone()[0])

    def check_not_newer(self) -> None:
        """
        Check that this version can use the index.

        :raises UnsupportedOperationError: If the index is of a newer version.
        """
        if self.is_of_newer_version:
            raise UnsupportedOperationError(_OF_NEWER)

    def begin(self) -> None:
        """Begin an index without terms. Messages that are there already are left to `add_next`."""
        self._connection.execute("DROP TABLE IF EXISTS haystack_chat_terms")
        self._connection.execute(_CREATE)
        self._set(TERMS_VERSION, 0 if self.has_messages else ALL_KEYS)

    def add(self, messages: Iterable[tuple[int, str]]) -> None:
        """
        Index messages that were just written.

        Beyond the mark, they are left to `add_next`. A process that makes other terms lowers the mark instead.

        :param messages: Keys and contents.
        """
        if not self.exists:
            return
        if self.is_of_this_version:
            self._add((key, content) for key, content in messages if key <= self.indexed_up_to)
        else:
            self._set(self.terms_version, min([self.indexed_up_to, *(key - 1 for key, _ in messages)]))

    def add_range(self, first_key: int, last_key: int) -> None:
        """Do what `add` does for all messages with keys in a range."""
        while self.exists and (
            rows := readable_rows(self._connection, _MESSAGES, (first_key, last_key, _MESSAGES_PER_BATCH))
        ):
            self.add(rows)
            first_key = rows[-1][0] + 1

    def add_next(self, limit: int) -> None:
        """
        Index the next messages beyond the mark. An index of an earlier version begins anew.

        :raises UnsupportedOperationError: If the index is of a newer version.
        """
        self.check_not_newer()
        if not self.is_of_this_version:
            self.begin()
        if self.indexed_up_to < ALL_KEYS:
            rows = readable_rows(self._connection, _MESSAGES, (self.indexed_up_to + 1, ALL_KEYS, limit))
            self._add(rows)
            self._set(TERMS_VERSION, rows[-1][0] if len(rows) == limit else ALL_KEYS)
            if self.is_complete:
                logger.info("Built the search index of the chat histories.")

    def remove(self, first_key: int, last_key: int) -> None:
        """Remove the terms of messages with keys in a range."""
        if self.exists:
            self._connection.execute(_REMOVE, (first_key, last_key))

    def _add(self, messages: Iterable[tuple[int, str]]) -> None:
        self._connection.executemany(_ADD, [(key, terms_of(content)) for key, content in messages])

    def _set(self, terms_version: int, indexed_up_to: int) -> None:
        self._connection.execute(_SET_STATE, (terms_version, indexed_up_to))
        self.exists, self.terms_version, self.indexed_up_to = True, terms_version, indexed_up_to
