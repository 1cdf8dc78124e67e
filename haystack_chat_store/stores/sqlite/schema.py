# SPDX-License-Identifier: Apache-2.0
"""
The tables, and how a database of an earlier version becomes one of this version.
"""

import sqlite3
import unicodedata

from haystack_chat_store.errors import SchemaVersionError

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

#: To be raised whenever the terms of any message change.
TERMS_VERSION = 1
# What normal forms and classes of characters are depends on Python's version.
_TERMS = f"{TERMS_VERSION}/{unicodedata.unidata_version}"

#: The function of SQL that returns the terms of a stored message, with a blank between them. Every connection has it.
TERMS_FUNCTION = "chat_message_terms_of"

# The index of words, which a database has from when a store with search first opens it. It holds the terms of all
# messages up to a key, and no others: so there is always exactly one who indexes a message, its writer or, where it was
# written before, the indexing that goes through all keys. What is deleted from an index without content has to be told
# the very terms that are in it, so an index of other terms begins anew.
_INDEX = {
    "chat_message_terms": """
        CREATE VIRTUAL TABLE chat_message_terms USING fts5 (terms, content = '', tokenize = 'ascii')
    """,
    "chat_message_term_instances": """
        CREATE VIRTUAL TABLE chat_message_term_instances USING fts5vocab (chat_message_terms, instance)
    """,
    "chat_messages_indexed": """
        CREATE TABLE chat_messages_indexed (last_key INTEGER NOT NULL, terms_version TEXT NOT NULL)
    """,
    "chat_messages_index_new": """
        CREATE TRIGGER chat_messages_index_new AFTER INSERT ON chat_messages
        WHEN new.message_key <= (SELECT last_key FROM chat_messages_indexed) BEGIN
            INSERT INTO chat_message_terms (rowid, terms)
            VALUES (new.message_key, chat_message_terms_of(CAST(new.content AS BLOB)));
        END
    """,
    "chat_messages_index_changed": """
        CREATE TRIGGER chat_messages_index_changed AFTER UPDATE OF message_key, content ON chat_messages
        WHEN new.message_key <= (SELECT last_key FROM chat_messages_indexed) BEGIN
            INSERT INTO chat_message_terms (chat_message_terms, rowid, terms)
            VALUES ('delete', old.message_key, chat_message_terms_of(CAST(old.content AS BLOB)));
            INSERT INTO chat_message_terms (rowid, terms)
            VALUES (new.message_key, chat_message_terms_of(CAST(new.content AS BLOB)));
        END
    """,
    "chat_messages_index_deleted": """
        CREATE TRIGGER chat_messages_index_deleted AFTER DELETE ON chat_messages
        WHEN old.message_key <= (SELECT last_key FROM chat_messages_indexed) BEGIN
            INSERT INTO chat_message_terms (chat_message_terms, rowid, terms)
            VALUES ('delete', old.message_key, chat_message_terms_of(CAST(old.content AS BLOB)));
        END
    """,
}
_FORGET_TERMS = "INSERT INTO chat_message_terms (chat_message_terms) VALUES ('delete-all')"
_FORGET_INDEXED = "DELETE FROM chat_messages_indexed"
_BEGIN_INDEXING = """
    INSERT INTO chat_messages_indexed (last_key, terms_version)
    SELECT iif(EXISTS (SELECT 1 FROM chat_messages), 0, 0x7fffffffffffffff), ?
"""
_TERMS_OF_INDEX = "SELECT terms_version FROM chat_messages_indexed"

_CREATE_VERSION = "CREATE TABLE IF NOT EXISTS chat_store_schema (version INTEGER NOT NULL)"
_HAS_VERSION = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'chat_store_schema'"


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


def missing_of_index(connection: sqlite3.Connection) -> list[str]:
    """
    Return the names of what the index of words does not have.
    """
    present = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    return [name for name in _INDEX if name not in present]


def has_index(connection: sqlite3.Connection) -> bool:
    """
    Whether there is an index of words, even if a part of it is missing.
    """
    return len(missing_of_index(connection)) < len(_INDEX)


def make_index_ready(connection: sqlite3.Connection, is_wanted: bool) -> None:
    """
    Make the index of words if it is wanted, and begin it anew if it has other terms than this process makes.

    Messages that are there already are left to be indexed.
    """
    if _has_to_begin(connection, is_wanted):
        connection.execute("BEGIN IMMEDIATE")
        if _has_to_begin(connection, is_wanted):  # and no other process was faster
            begin_index_anew(connection)
        connection.execute("COMMIT")


def begin_index_anew(connection: sqlite3.Connection) -> None:
    """
    Empty the index of words, and make what is missing of it, within a transaction.
    """
    for name in missing_of_index(connection):
        connection.execute(_INDEX[name])
    connection.execute(_FORGET_TERMS)
    connection.execute(_FORGET_INDEXED)
    connection.execute(_BEGIN_INDEXING, (_TERMS,))


def _has_to_begin(connection: sqlite3.Connection, is_wanted: bool) -> bool:
    if missing_of_index(connection):
        return is_wanted
    return bool(connection.execute(_TERMS_OF_INDEX).fetchone() != (_TERMS,))


def _version(connection: sqlite3.Connection) -> int:
    if connection.execute(_HAS_VERSION).fetchone() is None:
        return 0
    found = connection.execute("SELECT max(version) FROM chat_store_schema").fetchone()
    return int(found[0] or 0)
