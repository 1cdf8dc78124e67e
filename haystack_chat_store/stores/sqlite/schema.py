# SPDX-License-Identifier: Apache-2.0
"""The tables, and how a database of an earlier version becomes one of this version."""

import re
import sqlite3
import time
from itertools import chain

from haystack import logging

from haystack_chat_store.errors import SchemaVersionError, StoreConfigurationError

logger = logging.getLogger(__name__)

# Each step takes a database from the version of its index to the next. Never change a step that was released: add one.
# A message's key is its history's key times 2**32 plus its position. So all messages of a history lie side by side in
# the table's own tree, in order, and the newest is one look-up away. Nothing fills summary and question_id yet.
MIGRATIONS: list[list[str]] = [
    [
        """
        CREATE TABLE haystack_chat_histories (
            history_key INTEGER PRIMARY KEY AUTOINCREMENT,  -- messages that were left behind join no later history
            namespace TEXT NOT NULL,
            chat_history_id TEXT NOT NULL,
            user_id TEXT,
            revision INTEGER NOT NULL,
            next_position INTEGER NOT NULL,
            message_count INTEGER NOT NULL,
            round_count INTEGER NOT NULL,
            created_at INTEGER NOT NULL,  -- microseconds since 1970, UTC
            updated_at INTEGER NOT NULL,
            expires_at INTEGER,
            branch_of TEXT,  -- the id of the history that this one branched off: see `rows.branch_origin`
            title TEXT,
            title_terms TEXT,  -- what a search compares: see `search_text.title_terms`
            meta TEXT,  -- a JSON object
            preview TEXT,
            last_role TEXT,  -- of the last message that is no system message, as is what follows
            last_text TEXT,
            last_at INTEGER,
            summary TEXT,
            UNIQUE (namespace, chat_history_id)
        )
        """,
        """
        CREATE TABLE haystack_chat_messages (
            message_key INTEGER PRIMARY KEY,  -- history_key << 32 | position
            message_id TEXT NOT NULL,
            role TEXT NOT NULL,
            created_at INTEGER NOT NULL,  -- microseconds since 1970, UTC
            revision INTEGER NOT NULL,  -- of the history, when this message was last written
            question_id TEXT,
            content TEXT NOT NULL  -- ChatMessage.to_dict() as JSON
        )
        """,
        """
        CREATE TABLE haystack_chat_namespaces (
            namespace TEXT PRIMARY KEY,
            deleted_revision INTEGER NOT NULL  -- the greatest that a deleted history had
        ) WITHOUT ROWID
        """,
        # Has one row as soon as the file has an index of words: see `term_index`.
        """
        CREATE TABLE haystack_chat_search (
            search_key INTEGER PRIMARY KEY CHECK (search_key = 1),
            terms_version INTEGER NOT NULL,
            indexed_up_to INTEGER NOT NULL  -- a message_key
        )
        """,
        """
        CREATE INDEX haystack_chat_histories_by_time
        ON haystack_chat_histories (namespace, updated_at, chat_history_id)
        """,
        """
        CREATE INDEX haystack_chat_histories_by_user
        ON haystack_chat_histories (namespace, user_id, updated_at, chat_history_id) WHERE user_id IS NOT NULL
        """,
        """
        CREATE INDEX haystack_chat_histories_by_origin
        ON haystack_chat_histories (namespace, branch_of) WHERE branch_of IS NOT NULL
        """,
        """
        CREATE INDEX haystack_chat_histories_by_expiry
        ON haystack_chat_histories (expires_at) WHERE expires_at IS NOT NULL
        """,
        """
        CREATE INDEX haystack_chat_histories_by_title
        ON haystack_chat_histories (namespace, chat_history_id, title_terms) WHERE title_terms IS NOT NULL
        """,
        """
        CREATE UNIQUE INDEX haystack_chat_messages_by_id ON haystack_chat_messages (message_key >> 32, message_id)
        """,
        "CREATE INDEX haystack_chat_messages_from_user ON haystack_chat_messages (message_key) WHERE role = 'user'",
        """
        CREATE INDEX haystack_chat_messages_by_question
        ON haystack_chat_messages (message_key >> 32, question_id) WHERE question_id IS NOT NULL
        """,
        # For people: the messages, with readable names and times.
        """
        CREATE VIEW haystack_chat_transcripts AS
        SELECT namespace, chat_history_id, message_key & 0xffffffff AS position, message_id, role,
            datetime(haystack_chat_messages.created_at / 1000000, 'unixepoch') AS created_at, content
        FROM haystack_chat_histories JOIN haystack_chat_messages
            ON message_key BETWEEN history_key << 32 AND (history_key << 32) + 0xffffffff
        """,
    ],
]

_POSITION_BITS = 32
#: The greatest position that a message can have.
LAST_POSITION = 2**_POSITION_BITS - 1
# Marks a file that this package made, for programs such as `file`: the letters HCST.
_APPLICATION_ID = 0x48435354

_INDEX_OR_VIEW = re.compile(r"\s*CREATE (?:UNIQUE INDEX|INDEX|VIEW) (\w+)")
_CREATE_VERSION = "CREATE TABLE IF NOT EXISTS haystack_chat_schema (version INTEGER NOT NULL)"
_COUNT_NAMES = "SELECT count(*), max(type = 'table' AND name = 'haystack_chat_schema') FROM sqlite_master"


def key_range(history_key: int) -> tuple[int, int]:
    """Return the first and the last key that messages of a history can have."""
    return history_key << _POSITION_BITS, (history_key << _POSITION_BITS) + LAST_POSITION


def is_empty(connection: sqlite3.Connection, path: str) -> bool:
    """
    Whether there is nothing in the database yet. Only reads.

    :raises StoreConfigurationError: If it is another program's.
    """
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    count, is_ours = connection.execute(_COUNT_NAMES).fetchone()  # one statement: others may be making the tables
    if is_ours:
        return False
    if count or application_id not in (0, _APPLICATION_ID):
        raise StoreConfigurationError(
            f"{path} is a database of another program: it has no chat histories. It was left untouched. Choose another "
            "path."
        )
    return True


def is_current(connection: sqlite3.Connection, path: str) -> bool:
    """
    Whether the database has this version's tables. Only reads.

    :raises SchemaVersionError: If a newer version wrote it.
    :raises StoreConfigurationError: If it is another program's.
    """
    if is_empty(connection, path):
        return False
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise SchemaVersionError(
            f"{path} has schema version {version}, but this version of haystack-chat-store knows only versions "
            f"up to {len(MIGRATIONS)}. It was left untouched. Upgrade haystack-chat-store to use it."
        )
    return version == len(MIGRATIONS)


def check_current(connection: sqlite3.Connection, path: str) -> None:
    """
    Check that the database can be read as it is.

    :raises SchemaVersionError: If an earlier or a newer version wrote it.
    """
    if not is_current(connection, path):
        raise SchemaVersionError(
            f"{path} has the tables of an earlier version of haystack-chat-store, and reading it changes nothing. "
            "Upgrade it: write to it, or run `haystack-chat-store doctor --repair`."
        )


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """
    Bring the database to this version, in one transaction. If several processes start together, one of them does it.
    """
    connection.execute("BEGIN IMMEDIATE")
    if is_current(connection, path):
        connection.execute("COMMIT")
        return
    if not _names(connection):
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(_CREATE_VERSION)
    before = _version(connection)
    for statement in chain(*MIGRATIONS[before:]):
        connection.execute(statement)
    connection.execute("DELETE FROM haystack_chat_schema")
    connection.execute("INSERT INTO haystack_chat_schema VALUES (?)", (len(MIGRATIONS),))
    connection.execute("COMMIT")
    if before == 0:
        logger.info("Made the tables of chat histories in {path}.", path=path)
    else:
        logger.info(
            "Upgraded {path} from schema version {before} to {after}.", path=path, before=before, after=len(MIGRATIONS)
        )


def make_ready(connection: sqlite3.Connection, path: str, durability: str, timeout: float) -> None:
    """
    Prepare a new connection for writing, and make the tables of a new file.

    Only what comes after that has the durability that was chosen: a power cut never takes a file with its tables.
    """
    has_tables = is_current(connection, path)  # first: a newer database stays untouched
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA synchronous = full")
    _switch_to_wal(connection, path, time.monotonic() + timeout)
    if not has_tables:
        migrate(connection, path)
    connection.execute(f"PRAGMA synchronous = {durability}")


def missing(connection: sqlite3.Connection) -> dict[str, str]:
    """Return the indexes and views that the database does not have, each with the statement that makes it."""
    made = {found[1]: statement for statement in chain(*MIGRATIONS) if (found := _INDEX_OR_VIEW.match(statement))}
    present = _names(connection)
    return {name: statement for name, statement in made.items() if name not in present}


def _names(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def _version(connection: sqlite3.Connection) -> int:
    found = connection.execute("SELECT max(version) FROM haystack_chat_schema").fetchone()
    return int(found[0] or 0)


def _switch_to_wal(connection: sqlite3.Connection, path: str, deadline: float) -> None:
    """Let readers and a writer work side by side. The switch stays in the file."""
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            if connection.execute("PRAGMA journal_mode = wal").fetchone()[0] != "wal":
                raise StoreConfigurationError(f"{path} does not allow SQLite's WAL mode. Is it on a network drive?")
            return
        except sqlite3.OperationalError as error:
            # Here SQLite does not wait for other processes that make the switch at the same time.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
