# SPDX-License-Identifier: Apache-2.0
"""
The tables, and how a database of an earlier version becomes one of this version.
"""

import re
import sqlite3
from datetime import datetime, timezone
from itertools import chain
from typing import NamedTuple

from haystack_chat_store.errors import SchemaVersionError
from haystack_chat_store.stores.sqlite import terms
from haystack_chat_store.validation import microseconds

# A message's key is its history's key times 2**32 plus its position. So all messages of a history lie side by side in
# the table's own tree, in order, and the newest is one look-up away.
_POSITION_BITS = 32
#: The greatest position that a message can have.
MAX_POSITION = 2**_POSITION_BITS - 1

#: The first and the last time that a column can say.
FIRST_TIME = microseconds(datetime.min.replace(tzinfo=timezone.utc), "time")
LAST_TIME = microseconds(datetime.max.replace(tzinfo=timezone.utc), "time")

# Each step takes a database from the version of its index to the next. Never change one that was released: add one.
MIGRATIONS: list[list[str]] = [
    [
        """
        CREATE TABLE chat_histories (
            history_key INTEGER PRIMARY KEY,
            namespace TEXT NOT NULL,
            chat_history_id TEXT NOT NULL,
            next_position INTEGER NOT NULL,
            message_count INTEGER NOT NULL,
            round_count INTEGER NOT NULL,
            created_at INTEGER NOT NULL,  -- microseconds since 1970, UTC
            updated_at INTEGER NOT NULL,
            title TEXT,
            meta TEXT,
            UNIQUE (namespace, chat_history_id)
        )
        """,
        """
        CREATE TABLE chat_messages (
            message_key INTEGER PRIMARY KEY,  -- history_key << 32 | position
            message_id TEXT NOT NULL,
            role TEXT NOT NULL,
            created_at INTEGER NOT NULL,  -- microseconds since 1970, UTC
            content TEXT NOT NULL  -- ChatMessage.to_dict() as JSON
        )
        """,
        "CREATE UNIQUE INDEX chat_messages_by_id ON chat_messages (message_key >> 32, message_id)",
        "CREATE INDEX chat_messages_from_user ON chat_messages (message_key) WHERE role = 'user'",
        # For people: the same, readable, with the histories' names.
        """
        CREATE VIEW chat_transcripts AS
        SELECT namespace, chat_history_id, message_key & 0xffffffff AS position, message_id, role,
            datetime(chat_messages.created_at / 1000000, 'unixepoch') AS created_at, content
        FROM chat_histories JOIN chat_messages
            ON message_key BETWEEN history_key << 32 AND (history_key << 32) + 0xffffffff
        """,
    ],
    [
        # A page of the directory is read from this index alone, but for the meta of those that have any.
        """
        CREATE INDEX chat_histories_by_time ON chat_histories
            (namespace, updated_at, chat_history_id, message_count, round_count, created_at, title, typeof(meta))
        """,
    ],
]

# The index of words, which a database has from when a store with search first opens it. It has the terms of one version
# (see `terms`), and those of all messages up to a key but for some that are listed: those written by a process that
# could not say which terms they have in that version. So there is always exactly one who indexes a message: its writer,
# or the indexing that goes through all keys and then that list. What is deleted from an index without content has to be
# told the very terms that are in it. Whoever deletes a message and does not know them has the index begin anew.
_IS_INDEXED = "{row}.message_key <= last_key"
_HAS_SAME_TERMS = "has_same_terms(terms_version, CAST({row}.content AS BLOB))"
_IS_LEFT_OUT = "EXISTS (SELECT 1 FROM chat_messages_unindexed WHERE message_key = {row}.message_key)"
_ADD_TO_INDEX = f"""
    INSERT INTO chat_message_terms (rowid, terms)
    SELECT new.message_key, chat_message_terms_of(CAST(new.content AS BLOB)) FROM chat_messages_indexed
    WHERE {_IS_INDEXED} AND {_HAS_SAME_TERMS};
    INSERT INTO chat_messages_unindexed (message_key)
    SELECT new.message_key FROM chat_messages_indexed WHERE {_IS_INDEXED} AND NOT {_HAS_SAME_TERMS};
""".format(row="new")  # noqa: S608  (made of constants of this module)
_TAKE_FROM_INDEX = f"""
    INSERT INTO chat_message_terms (chat_message_terms, rowid, terms)
    SELECT 'delete', old.message_key, chat_message_terms_of(CAST(old.content AS BLOB)) FROM chat_messages_indexed
    WHERE {_IS_INDEXED} AND NOT {_IS_LEFT_OUT} AND {_HAS_SAME_TERMS};
    UPDATE chat_messages_indexed SET last_key = 0, terms_version = '{terms.NO_TERMS}'
    WHERE {_IS_INDEXED} AND NOT {_IS_LEFT_OUT} AND NOT {_HAS_SAME_TERMS};
    DELETE FROM chat_messages_unindexed WHERE message_key = old.message_key;
""".format(row="old")  # noqa: S608  (made of constants of this module)
_INDEX_TABLES = {
    "chat_message_terms": """
        CREATE VIRTUAL TABLE chat_message_terms USING fts5 (terms, content = '', tokenize = 'ascii')
    """,
    "chat_message_term_instances": """
        CREATE VIRTUAL TABLE chat_message_term_instances USING fts5vocab (chat_message_terms, instance)
    """,
    "chat_messages_indexed": """
        CREATE TABLE chat_messages_indexed (last_key INTEGER NOT NULL, terms_version TEXT NOT NULL)
    """,
    "chat_messages_unindexed": "CREATE TABLE chat_messages_unindexed (message_key INTEGER PRIMARY KEY)",
}
_INDEX_TRIGGERS = {
    "chat_messages_index_new": f"AFTER INSERT ON chat_messages BEGIN {_ADD_TO_INDEX} END",
    "chat_messages_index_changed": f"""
        AFTER UPDATE OF message_key, content ON chat_messages BEGIN {_TAKE_FROM_INDEX} {_ADD_TO_INDEX} END
    """,
    "chat_messages_index_deleted": f"AFTER DELETE ON chat_messages BEGIN {_TAKE_FROM_INDEX} END",
    # Terms of another version are none in an index.
    "chat_messages_index_begins": """
        AFTER UPDATE OF terms_version ON chat_messages_indexed BEGIN
            INSERT INTO chat_message_terms (chat_message_terms) VALUES ('delete-all');
            DELETE FROM chat_messages_unindexed;
        END
    """,
}
_FORGET_INDEXED = "DELETE FROM chat_messages_indexed"
_NOTHING_INDEXED = "INSERT INTO chat_messages_indexed (last_key, terms_version) VALUES (0, ?)"
_BEGIN_ANEW = "UPDATE chat_messages_indexed SET last_key = 0, terms_version = ?"
_STATE_OF_INDEX = """
    SELECT last_key, terms_version, EXISTS (SELECT 1 FROM chat_messages_unindexed) FROM chat_messages_indexed
"""
_BEGIN_WITH = """
    UPDATE chat_messages_indexed SET terms_version = ?,
        last_key = iif(EXISTS (SELECT 1 FROM chat_messages), 0, 0x7fffffffffffffff)
"""

#: An index of all messages goes up to here.
ALL_KEYS = 2**63 - 1

_makes_again = re.compile(r"\s*CREATE (?:UNIQUE INDEX|INDEX|VIEW) (\w+)")
_CREATE_VERSION = "CREATE TABLE IF NOT EXISTS chat_store_schema (version INTEGER NOT NULL)"
_HAS_VERSION = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'chat_store_schema'"


class IndexState(NamedTuple):
    """
    How far the index of words has come, and whose it is.

    :param last_key: Up to this key messages are indexed,
    :param has_left_out: but for some that are listed.
    """

    last_key: int
    terms_version: str
    has_left_out: bool

    @property
    def is_searchable(self) -> bool:
        """
        Whether this process can find all that is there, but for what is left out for a newer version to index.
        """
        waits_for_us = self.has_left_out and self.terms_version == terms.OWN_TERMS
        return self.last_key == ALL_KEYS and not waits_for_us and terms.can_search(self.terms_version)

    @property
    def is_of_newer(self) -> bool:
        """
        Whether it is for a newer version to complete.
        """
        return self.terms_version != terms.OWN_TERMS and not terms.are_older(self.terms_version)


def key_range(history_key: int) -> tuple[int, int]:
    """
    Return the first and the last key that messages of a history can have.
    """
    return history_key << _POSITION_BITS, ((history_key + 1) << _POSITION_BITS) - 1


def is_current(connection: sqlite3.Connection, path: str) -> bool:
    """
    Whether the database has this version's tables. Only reads.

    :raises SchemaVersionError: If it was written by a newer version.
    """
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise SchemaVersionError(
            f"{path} has schema version {version}, but this version of haystack-chat-store knows only versions "
            f"up to {len(MIGRATIONS)}. It was left untouched. Upgrade haystack-chat-store to use it."
        )
    return version == len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """
    Bring the database to this version, in one transaction. If many processes start together, the first one does it.
    """
    connection.execute("BEGIN IMMEDIATE")
    if not is_current(connection, path):
        connection.execute(_CREATE_VERSION)
        for statements in MIGRATIONS[_version(connection) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("DELETE FROM chat_store_schema")
        connection.execute("INSERT INTO chat_store_schema VALUES (?)", (len(MIGRATIONS),))
    connection.execute("COMMIT")


def missing(connection: sqlite3.Connection) -> dict[str, str]:
    """
    Return the indexes and views that the database does not have, each with the statement that makes it.
    """
    made = {found[1]: statement for statement in chain(*MIGRATIONS) if (found := _makes_again.match(statement))}
    present = _names(connection)
    return {name: statement for name, statement in made.items() if name not in present}


def missing_of_index(connection: sqlite3.Connection) -> list[str]:
    """
    Return the names of what the index of words does not have.
    """
    present = _names(connection)
    return [name for name in (*_INDEX_TABLES, *_INDEX_TRIGGERS) if name not in present]


def has_index(connection: sqlite3.Connection) -> bool:
    """
    Whether there is an index of words, even if a part of it is missing.
    """
    return not _names(connection).isdisjoint((*_INDEX_TABLES, *_INDEX_TRIGGERS))


def make_index(connection: sqlite3.Connection) -> None:
    """
    Make the index of words if a part of it is missing. Messages that are there already are left to be indexed.
    """
    if missing_of_index(connection):
        connection.execute("BEGIN IMMEDIATE")
        if missing_of_index(connection):  # and no other process was faster
            begin_index_with_own_terms(connection)
        connection.execute("COMMIT")


def state_of_index(connection: sqlite3.Connection) -> IndexState:
    """
    Return how the index of words is.
    """
    return IndexState(*(connection.execute(_STATE_OF_INDEX).fetchone() or (0, terms.NO_TERMS, False)))


def begin_index_anew(connection: sqlite3.Connection) -> None:
    """
    Empty the index of words, and make what is missing of it, within a transaction. It has no version's terms then.
    """
    missing = missing_of_index(connection)
    for name in missing:
        if name in _INDEX_TABLES:
            connection.execute(_INDEX_TABLES[name])
    for name, definition in _INDEX_TRIGGERS.items():
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")  # perhaps that of an earlier version
        connection.execute(f"CREATE TRIGGER {name} {definition}")
    connection.execute(_FORGET_INDEXED)
    connection.execute(_NOTHING_INDEXED, (terms.NO_TERMS,))
    connection.execute(_BEGIN_ANEW, (terms.NO_TERMS,))  # has the trigger empty it


def begin_index_with_own_terms(connection: sqlite3.Connection) -> None:
    """
    Empty the index of words, and have it filled by this process and those of its version, within a transaction.
    """
    begin_index_anew(connection)
    connection.execute(_BEGIN_WITH, (terms.OWN_TERMS,))


def _names(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def _version(connection: sqlite3.Connection) -> int:
    if connection.execute(_HAS_VERSION).fetchone() is None:
        return 0
    found = connection.execute("SELECT max(version) FROM chat_store_schema").fetchone()
    return int(found[0] or 0)
