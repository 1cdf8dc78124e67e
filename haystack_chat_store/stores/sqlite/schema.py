# SPDX-License-Identifier: Apache-2.0
"""
The tables, and how a database of an earlier version becomes one of this version.
"""

import sqlite3

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
]

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


def _version(connection: sqlite3.Connection) -> int:
    if connection.execute(_HAS_VERSION).fetchone() is None:
        return 0
    found = connection.execute("SELECT max(version) FROM chat_store_schema").fetchone()
    return int(found[0] or 0)
