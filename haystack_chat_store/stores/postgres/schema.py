# SPDX-License-Identifier: Apache-2.0
"""
The tables, and how a database of an earlier version becomes one of this version.
"""

import hashlib
import uuid
from textwrap import dedent

from psycopg import sql

from haystack_chat_store.stores.postgres.statements import FRAGMENTS, Statements
from haystack_chat_store.stores.rows import Scope

#: The greatest position: that of a bigint.
MAX_POSITION = 2**63 - 1
#: The place before all messages, by key and position.
BEGINNING = (uuid.UUID(int=0), -1)

# Each step takes a database from the version of its index to the next. Never change one that was released: add one.
# Every table leads with history_key, a hash of namespace and id, so that the tables can be distributed by it.
MIGRATIONS: list[list[str]] = [
    [
        """
        CREATE TABLE {histories} (
            history_key uuid PRIMARY KEY,
            namespace text NOT NULL,
            chat_history_id text NOT NULL,
            next_position bigint NOT NULL,
            message_count bigint NOT NULL,
            round_count bigint NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            title text,
            meta json
        ) {partitioned}
        """,
        """
        CREATE TABLE {messages} (
            history_key uuid NOT NULL,
            position bigint NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            message_id text NOT NULL,
            role text NOT NULL,
            content json NOT NULL,
            PRIMARY KEY (history_key, position)
        ) {partitioned}
        """,
        "CREATE UNIQUE INDEX {messages_by_id} ON {messages} (history_key, message_id)",
        "CREATE INDEX {messages_from_user} ON {messages} (history_key, position) WHERE role = 'user'",
        'CREATE INDEX {histories_by_id} ON {histories} (namespace, chat_history_id COLLATE "C")',
    ],
    [
        # Its rightmost page takes what is new. Tried: that no update of a history is "heap-only" any more costs an
        # append nothing that can be measured, also after thousands of them without a vacuum.
        'CREATE INDEX {histories_by_time} ON {histories} (namespace, updated_at, chat_history_id COLLATE "C")',
        "ALTER TABLE {messages} ADD COLUMN search_terms tsvector",
        # The server's statistics hold samples of what is in a column: of texts, they would outlive these.
        "ALTER TABLE {messages} ALTER COLUMN search_terms SET STATISTICS 0",
        "ALTER TABLE {histories} ALTER COLUMN title SET STATISTICS 0",
    ],
]

HAS_SCHEMA = "SELECT 1 FROM pg_namespace WHERE nspname = %s"
_CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS {schema}"
_SET_VERSION = "INSERT INTO {version} VALUES ({number})"
_PARTITIONED = "PARTITION BY HASH (history_key)"
_CREATE_PARTITION = "CREATE TABLE {part} PARTITION OF {whole} FOR VALUES WITH (MODULUS {count}, REMAINDER {index})"
_CREATE_VERSION = "CREATE TABLE IF NOT EXISTS {version} (version integer NOT NULL)"
_LOCK_TABLES = "LOCK TABLE {histories}, {messages} IN ACCESS EXCLUSIVE MODE"

# Turns search on: who finds this index writes the terms of messages. The second one finds rows whose writer did not
# know of the first, and says that everything older has its terms. New terms wait in a list until it is full: tried, a
# list of 1 MB costs an append and a search least, all in all.
_CREATE_SEARCH_INDEX = """
    CREATE INDEX IF NOT EXISTS {messages_by_terms} ON {messages} USING gin (search_terms)
    WITH (gin_pending_list_limit = 1024) WHERE search_terms IS NOT NULL
"""
_CREATE_UNINDEXED = """
    CREATE INDEX IF NOT EXISTS {messages_unindexed} ON {messages} (history_key, position) WHERE search_terms IS NULL
"""
_HAS_MESSAGES = "SELECT EXISTS (SELECT FROM {messages})"


def history_key(scope: Scope, chat_history_id: str) -> uuid.UUID:
    """
    Return the key of a history.
    """
    # Neither of the two contains a NUL, so no two pairs become the same text.
    name = f"{scope.namespace}\x00{chat_history_id}".encode()
    return uuid.UUID(bytes=hashlib.blake2b(name, digest_size=16).digest())


class Tables:
    """
    The names of the tables, and what is said to them.
    """

    def __init__(self, schema_name: str, table_prefix: str) -> None:
        """
        Compose the names.

        :param schema_name: The PostgreSQL schema that holds the tables.
        :param table_prefix: What the tables' names begin with.
        """
        #: The name of the PostgreSQL schema, of the table that holds the schema version, and of two indexes in it.
        self.schema_name = schema_name
        self.version_table = f"{table_prefix}_version"
        self.search_index = f"{table_prefix}_messages_by_terms"
        self.unindexed = f"{table_prefix}_messages_unindexed"
        schema_name, table_prefix = schema_name.replace("%", "%%"), table_prefix.replace("%", "%%")  # for psycopg
        self._schema_name, self._table_prefix = schema_name, table_prefix
        tables = ("histories", "messages", "version")
        indexes = (
            "messages_by_id",
            "messages_from_user",
            "messages_by_terms",
            "messages_unindexed",
            "histories_by_id",
            "histories_by_time",
        )
        self._names: dict[str, sql.Composable] = {
            "schema": sql.Identifier(schema_name),
            **{name: sql.Identifier(schema_name, f"{table_prefix}_{name}") for name in tables},
            **{name: sql.Identifier(f"{table_prefix}_{name}") for name in indexes},
            **{name: sql.SQL(fragment) for name, fragment in FRAGMENTS.items()},
            "number": sql.Literal(len(MIGRATIONS)),
            "partitioned": sql.SQL(""),
        }
        self._names |= {
            f"{name}_name": sql.Literal(self._names[name].as_string(None)) for name in ("histories", "messages")
        }
        self.statements = Statements(*map(self._named, Statements()))
        self.lock = self._named(_LOCK_TABLES)
        self.create_search_index = self._named(_CREATE_SEARCH_INDEX)
        self.create_unindexed = self._named(_CREATE_UNINDEXED)
        self.has_messages = self._named(_HAS_MESSAGES)

    def upgrade(self, version: int, **names: sql.Composable) -> list[str]:
        """
        Return the statements that bring a database to this version.

        :param version: Its present version; 0 if it has no tables yet.
        :param names: What stands in the statements instead of what usually does.
        """
        if version == len(MIGRATIONS):
            return []
        statements = [statement for step in MIGRATIONS[version:] for statement in step]
        first = [_CREATE_VERSION] if version == 0 else []
        return [self._named(statement, **names) for statement in [*first, *statements, _SET_VERSION]]

    def script(self, version: int, partitions: int, *, search: bool) -> str:
        """
        Return all that makes the tables or brings them to this version, as one text to run by hand.

        :param version: The database's present version; 0 if it has no tables yet.
        :param partitions: Into how many parts new tables are divided; 0 for not at all.
        :param search: Whether to turn search on.
        """
        partitioned = sql.SQL(_PARTITIONED if partitions else "")
        statements = [self.create_schema()] if version == 0 else []
        statements += self.upgrade(version, partitioned=partitioned)
        # They take over what happens to their table from the second version on.
        first_version = len(statements) - len(self.upgrade(1))
        statements[first_version:first_version] = self._create_partitions(partitions)
        if search:
            statements += [self.create_search_index, self.create_unindexed]
        return "".join(f"{dedent(statement).strip()};\n" for statement in statements).replace("%%", "%")

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

    def create_schema(self) -> str:
        """
        Return the statement that makes the PostgreSQL schema, if it is missing.
        """
        return self._named(_CREATE_SCHEMA)

    def _named(self, statement: str, **names: sql.Composable) -> str:
        return sql.SQL(statement).format(**{**self._names, **names}).as_string(None)
