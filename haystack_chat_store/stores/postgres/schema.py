# SPDX-License-Identifier: Apache-2.0
"""The tables, and how a database of an earlier version becomes one of this version."""

import hashlib
import uuid
from textwrap import dedent
from typing import Any

from psycopg import sql

from haystack_chat_store.stores.postgres.statements import FIRST_REVISION, FRAGMENTS, IS_VISIBLE, Statement
from haystack_chat_store.stores.rows import Scope

#: The place before all messages, by key and position.
BEGINNING = (uuid.UUID(int=0), -1)

# Each item takes a database from the version of its index to the next. A released one never changes: add another.
#
# Both large tables lead with history_key, a hash of namespace and id, so that they can be distributed by that. No time
# is infinite, because that is no number of microseconds. Nothing fills summary and question_id yet; their indexes are
# partial, so that they cost nothing meanwhile.
MIGRATIONS: list[list[str]] = [
    [
        """
        CREATE TABLE IF NOT EXISTS {histories} (
            history_key uuid PRIMARY KEY,
            namespace text NOT NULL,
            chat_history_id text NOT NULL,
            next_position bigint NOT NULL,
            message_count bigint NOT NULL,
            round_count bigint NOT NULL,
            revision bigint NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(created_at)),
            updated_at timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(updated_at)),
            title text,
            title_terms tsvector,
            meta json,
            user_id text,
            expires_at timestamptz CHECK (isfinite(expires_at)),
            branch_of text,
            preview text,  -- the beginning of the first question
            last_role text,  -- of the last message that is no system message, as is what follows
            last_text text,
            last_at timestamptz CHECK (isfinite(last_at)),
            summary json
        ) {partitioned}
        """,
        """
        CREATE TABLE IF NOT EXISTS {messages} (
            history_key uuid NOT NULL,
            position bigint NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(created_at)),
            message_id text NOT NULL,
            role text NOT NULL,
            content json NOT NULL,
            search_terms tsvector,
            revision bigint NOT NULL,  -- of the history, when this message was last written
            question_id text,
            PRIMARY KEY (history_key, position)
        ) {partitioned}
        """,
        # The greatest revision of a deleted history. One that begins anew goes on from there.
        """
        CREATE TABLE IF NOT EXISTS {namespaces} (
            namespace text PRIMARY KEY,
            deleted_revision bigint NOT NULL
        )
        """,
        "CREATE UNIQUE INDEX IF NOT EXISTS {messages_by_id} ON {messages} (history_key, message_id)",
        "CREATE INDEX IF NOT EXISTS {messages_from_user} ON {messages} (history_key, position) WHERE role = 'user'",
        """
        CREATE INDEX IF NOT EXISTS {messages_by_question} ON {messages} (history_key, question_id, position)
        WHERE question_id IS NOT NULL
        """,
        'CREATE INDEX IF NOT EXISTS {histories_by_id} ON {histories} (namespace, chat_history_id COLLATE "C")',
        # Its rightmost page takes what is new. Tried: that no update of a history is "heap-only" any more costs an
        # append nothing that can be measured, also after thousands of them without a vacuum.
        """
        CREATE INDEX IF NOT EXISTS {histories_by_time} ON {histories}
        (namespace, updated_at, chat_history_id COLLATE "C")
        """,
        # With the id of the history, a row could be too large for an index.
        """
        CREATE INDEX IF NOT EXISTS {histories_of_user} ON {histories} (namespace, user_id, updated_at)
        WHERE user_id IS NOT NULL
        """,
        """
        CREATE INDEX IF NOT EXISTS {histories_of_branch} ON {histories} (namespace, branch_of)
        WHERE branch_of IS NOT NULL
        """,
        """
        CREATE INDEX IF NOT EXISTS {histories_to_expire} ON {histories} (namespace, expires_at)
        WHERE expires_at IS NOT NULL
        """,
        # The server's statistics contain samples of a column. Those of texts would stay after the texts were deleted.
        "ALTER TABLE {messages} ALTER COLUMN search_terms SET STATISTICS 0",
        "ALTER TABLE {histories} ALTER COLUMN title SET STATISTICS 0",
        "ALTER TABLE {histories} ALTER COLUMN preview SET STATISTICS 0",
        "ALTER TABLE {histories} ALTER COLUMN last_text SET STATISTICS 0",
        "ALTER TABLE {histories} ALTER COLUMN title_terms SET STATISTICS 0",
    ],
]

HAS_SCHEMA = "SELECT 1 FROM pg_namespace WHERE nspname = %s"
_CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS {schema}"
_SET_VERSION = "INSERT INTO {version} SELECT {number} WHERE NOT EXISTS (SELECT FROM {version} WHERE version = {number})"
_PARTITIONED = "PARTITION BY HASH (history_key)"
_CREATE_PARTITION = """
    CREATE TABLE IF NOT EXISTS {part} PARTITION OF {whole} FOR VALUES WITH (MODULUS {count}, REMAINDER {index})
"""
_CREATE_VERSION = "CREATE TABLE IF NOT EXISTS {version} (version integer NOT NULL)"
_LOCK_TABLES = "LOCK TABLE {histories}, {messages} IN ACCESS EXCLUSIVE MODE"

# The first of these two indexes turns search on: a process that finds it writes the terms of messages. The second one
# finds rows without terms, and its existence says that everything older has its terms. New terms wait in a list until
# it is full: tried, a list of 1 MB costs an append and a search least, all in all.
_CREATE_SEARCH_INDEX = """
    CREATE INDEX IF NOT EXISTS {messages_by_terms} ON {messages} USING gin (search_terms)
    WITH (gin_pending_list_limit = 1024) WHERE search_terms IS NOT NULL
"""
# Titles have their terms in every database. Only one that is searched has this index.
_CREATE_TITLE_INDEX = """
    CREATE INDEX IF NOT EXISTS {histories_by_title} ON {histories} USING gin (title_terms)
    WITH (gin_pending_list_limit = 1024) WHERE title_terms IS NOT NULL
"""
_CREATE_UNINDEXED = """
    CREATE INDEX IF NOT EXISTS {messages_unindexed} ON {messages} (history_key, position) WHERE search_terms IS NULL
"""
_HAS_MESSAGES = "SELECT EXISTS (SELECT FROM {messages})"

_TABLES = ("histories", "messages", "namespaces", "version")
_INDEXES = (
    "messages_by_id",
    "messages_from_user",
    "messages_by_question",
    "messages_by_terms",
    "messages_unindexed",
    "histories_by_id",
    "histories_by_time",
    "histories_of_user",
    "histories_of_branch",
    "histories_to_expire",
    "histories_by_title",
)


def history_parameters(scope: Scope, chat_history_id: str) -> dict[str, Any]:
    """Return the parameters of a statement about one history of a scope: its key, and those of `visible`."""
    return {"key": history_key(scope, chat_history_id), "user": scope.user_id}


def history_key(scope: Scope, chat_history_id: str) -> uuid.UUID:
    """Return the key of a history."""
    # Neither of the two contains a NUL, so no two pairs become the same text.
    name = f"{scope.namespace}\x00{chat_history_id}".encode()
    return uuid.UUID(bytes=hashlib.blake2b(name, digest_size=16).digest())


class Tables:
    """The names of the tables. They are filled in where statements have them in braces."""

    def __init__(self, schema_name: str, table_prefix: str) -> None:
        """
        Compose the names.

        :param schema_name: The PostgreSQL schema that holds the tables.
        :param table_prefix: The beginning of the tables' names.
        """
        #: What logs call the tables.
        self.name = f"{schema_name}.{table_prefix}_…"
        #: The names of the table that holds the schema version, and of two indexes.
        self.version_table = f"{table_prefix}_version"
        self.search_index = f"{table_prefix}_messages_by_terms"
        self.unindexed = f"{table_prefix}_messages_unindexed"
        schema_name, table_prefix = schema_name.replace("%", "%%"), table_prefix.replace("%", "%%")  # for psycopg
        self._schema_name, self._table_prefix = schema_name, table_prefix
        self._names: dict[str, sql.Composable] = {
            "schema": sql.Identifier(schema_name),
            **{name: sql.Identifier(schema_name, f"{table_prefix}_{name}") for name in _TABLES},
            **{name: sql.Identifier(f"{table_prefix}_{name}") for name in _INDEXES},
            **{name: sql.SQL(fragment) for name, fragment in FRAGMENTS.items()},
            "number": sql.Literal(len(MIGRATIONS)),
            "partitioned": sql.SQL(""),
        }
        self._names |= {
            f"{name}_name": sql.Literal(self._names[name].as_string(None)) for name in ("histories", "messages")
        }
        self._names["first_revision"] = sql.SQL(self._named(FIRST_REVISION))
        self._names["is_visible"] = sql.SQL(self._named(IS_VISIBLE))
        self._filled_in: dict[Statement, str] = {}
        self.lock = self._named(_LOCK_TABLES)
        self.create_search_index = self._named(_CREATE_SEARCH_INDEX)
        self.create_title_index = self._named(_CREATE_TITLE_INDEX)
        self.create_unindexed = self._named(_CREATE_UNINDEXED)
        self.has_messages = self._named(_HAS_MESSAGES)

    def fill_in(self, statement: Statement) -> str:
        """Return a statement with the names of the tables in it."""
        filled_in = self._filled_in.get(statement)
        if filled_in is None:
            filled_in = self._filled_in[statement] = self._named(statement)
        return filled_in

    def create_schema(self) -> str:
        """Return the statement that makes the PostgreSQL schema, if it is missing."""
        return self._named(_CREATE_SCHEMA)

    def upgrade(self, version: int) -> list[str]:
        """
        Return the statements that bring a database to this version.

        :param version: Its present version; 0 if it has no tables yet.
        """
        return self._statements([statement for step in MIGRATIONS[version:] for statement in step])

    def script(self, partitions: int, *, search: bool) -> str:
        """
        Return all that makes the tables, as one text to run by hand. What exists already stays as it is.

        :param partitions: Into how many partitions the tables are divided; 0 for not at all.
        :param search: Whether to turn search on.
        """
        tables, rest = MIGRATIONS[0][:2], [*MIGRATIONS[0][2:], *(each for step in MIGRATIONS[1:] for each in step)]
        partitioned = sql.SQL(_PARTITIONED if partitions else "")
        statements = [self.create_schema(), *(self._named(each, partitioned=partitioned) for each in tables)]
        statements += self._create_partitions(partitions)  # before the indexes, which they then take over
        statements += self._statements(rest)
        if search:
            statements += [self.create_search_index, self.create_title_index, self.create_unindexed]
        return "".join(f"{dedent(statement).strip()};\n" for statement in statements).replace("%%", "%")

    def _statements(self, statements: list[str]) -> list[str]:
        return [self._named(statement) for statement in [_CREATE_VERSION, *statements, _SET_VERSION]]

    def _create_partitions(self, count: int) -> list[str]:
        return [
            self._named(
                _CREATE_PARTITION,
                part=sql.Identifier(self._schema_name, f"{self._table_prefix}_{table}_{index}"),
                whole=self._names[table],
                count=sql.Literal(count),
                index=sql.Literal(index),
            )
            for table in ("histories", "messages")
            for index in range(count)
        ]

    def _named(self, statement: str, **names: sql.Composable) -> str:
        return sql.SQL(statement).format(**{**self._names, **names}).as_string(None)
