# SPDX-License-Identifier: Apache-2.0
"""
The tables, the statements on them, and how a database of an earlier version becomes one of this version.
"""

from textwrap import dedent
from typing import NamedTuple

from psycopg import sql

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
]

# What others commit while this transaction waits for a lock, it sees, whatever the database's default is.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
HAS_SCHEMA = "SELECT 1 FROM pg_namespace WHERE nspname = %s"
_CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS {schema}"
_SET_VERSION = "INSERT INTO {version} VALUES ({number})"
_PARTITIONED = "PARTITION BY HASH (history_key)"
_CREATE_PARTITION = "CREATE TABLE {part} PARTITION OF {whole} FOR VALUES WITH (MODULUS {count}, REMAINDER {index})"
_CREATE_VERSION = "CREATE TABLE IF NOT EXISTS {version} (version integer NOT NULL)"

# The row of the history is the lock that hands out positions: writers of one history queue for it, and it moves on only
# when its messages are committed.
_APPEND = """
    WITH history AS ({move_on} RETURNING next_position - %(count)s AS start)
    INSERT INTO {{messages}} (history_key, position, message_id, role, content)
    SELECT %(key)s, start + place - 1, message_id, role, content::json
    FROM history, ROWS FROM (
        json_array_elements_text(%(message_ids)s::json),
        unnest(string_to_array(%(roles)s, ' '), string_to_array(%(contents)s, E'\n'))
    ) WITH ORDINALITY AS new (message_id, role, content, place)
"""
_APPEND_ALL = _APPEND.format(
    move_on="""
        INSERT INTO {histories} AS h
            (history_key, namespace, chat_history_id, next_position, message_count, round_count)
        VALUES (%(key)s, %(namespace)s, %(id)s, %(count)s, %(count)s, %(rounds)s)
        ON CONFLICT (history_key) DO UPDATE SET
            next_position = h.next_position + excluded.next_position,
            message_count = h.message_count + excluded.message_count,
            round_count = h.round_count + excluded.round_count,
            updated_at = excluded.updated_at
    """
)
# For the rest of a batch: only to the very history that was found to have the others.
_APPEND_REST = _APPEND.format(
    move_on="""
        UPDATE {histories} SET
            next_position = next_position + %(count)s,
            message_count = message_count + %(count)s,
            round_count = round_count + %(rounds)s,
            updated_at = now()
        WHERE history_key = %(key)s AND created_at = %(created_at)s
    """
)
_KNOWN_IDS = """
    SELECT message_id, h.created_at FROM {messages} JOIN {histories} AS h USING (history_key)
    WHERE history_key = %s AND message_id = ANY (%s)
"""
_COUNT = "SELECT message_count FROM {histories} WHERE history_key = %s"

# The upper bounds exclude nothing. They tell the planner that the range is narrow, whatever it knows of the table, so
# that it walks along the primary key (a range between two unknown bounds is taken for 0.5 % of the table).
_READ = """
    SELECT content, {size} FROM {{messages}}
    WHERE history_key = %(key)s AND position BETWEEN {start} AND %(end)s ORDER BY position
"""
_START_OF_ROUNDS = """coalesce(
        (SELECT position FROM {{messages}}
            WHERE history_key = %(key)s AND role = 'user' AND position BETWEEN 0 AND %(end)s
            ORDER BY position DESC OFFSET {size} - 1 LIMIT 1),
        0)"""
_START_OF_MESSAGES = """coalesce(
        (SELECT position FROM {{messages}} WHERE history_key = %(key)s AND role <> 'tool' AND position <=
            (SELECT position FROM {{messages}} WHERE history_key = %(key)s AND position BETWEEN 0 AND %(end)s
                ORDER BY position DESC OFFSET {size} - 1 LIMIT 1)
            ORDER BY position DESC LIMIT 1),
        0)"""
# The window's size: only with a step does it depend on how long the history is.
_SIZE = "%(count)s::bigint"
_SIZE_BY_STEP = """(SELECT %(count)s::bigint + mod(greatest({total} - %(count)s::bigint, 0), %(step)s::bigint)
            FROM {{histories}} WHERE history_key = %(key)s)"""

_READ_ALL = _READ.format(start="0", size="0")
_READ_ROUNDS, _READ_ROUNDS_BY_STEP, _READ_MESSAGES, _READ_MESSAGES_BY_STEP = (
    _READ.format(start=start.format(size=size), size=size)
    for start, total in ((_START_OF_ROUNDS, "round_count"), (_START_OF_MESSAGES, "message_count"))
    for size in (_SIZE, _SIZE_BY_STEP.format(total=total))
)
_NEXT_HISTORIES = """
    SELECT chat_history_id, history_key, message_count FROM {histories}
    WHERE namespace = %s AND chat_history_id COLLATE "C" > %s ORDER BY chat_history_id COLLATE "C" LIMIT %s
"""
# The row of the history first: who has deleted it holds its lock, and no writer slips in before its messages go.
_DELETE_HISTORIES = "DELETE FROM {histories} WHERE history_key = ANY (%s) RETURNING history_key"
_DELETE_MESSAGES = "DELETE FROM {messages} WHERE history_key = ANY (%s)"


class Statements(NamedTuple):
    """
    The statements of a store, with the names of its tables in them.
    """

    version: str
    append_all: str
    append_rest: str
    known_ids: str
    message_count: str
    read_all: str
    read_rounds: str
    read_rounds_by_step: str
    read_messages: str
    read_messages_by_step: str
    next_histories: str
    delete_histories: str
    delete_messages: str


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
        #: The schema and the name of the table that holds the schema version.
        self.version_table = (schema_name, f"{table_prefix}_version")
        schema_name, table_prefix = schema_name.replace("%", "%%"), table_prefix.replace("%", "%%")  # for psycopg
        self._schema_name, self._table_prefix = schema_name, table_prefix
        tables = ("histories", "messages", "version")
        indexes = ("messages_by_id", "messages_from_user", "histories_by_id")
        self._names: dict[str, sql.Composable] = {
            "schema": sql.Identifier(schema_name),
            **{name: sql.Identifier(schema_name, f"{table_prefix}_{name}") for name in tables},
            **{name: sql.Identifier(f"{table_prefix}_{name}") for name in indexes},
            "number": sql.Literal(len(MIGRATIONS)),
            "partitioned": sql.SQL(""),
        }
        self.statements = Statements(
            version=self._named("SELECT max(version) FROM {version}"),
            append_all=self._named(_APPEND_ALL),
            append_rest=self._named(_APPEND_REST),
            known_ids=self._named(_KNOWN_IDS),
            message_count=self._named(_COUNT),
            read_all=self._named(_READ_ALL),
            read_rounds=self._named(_READ_ROUNDS),
            read_rounds_by_step=self._named(_READ_ROUNDS_BY_STEP),
            read_messages=self._named(_READ_MESSAGES),
            read_messages_by_step=self._named(_READ_MESSAGES_BY_STEP),
            next_histories=self._named(_NEXT_HISTORIES),
            delete_histories=self._named(_DELETE_HISTORIES),
            delete_messages=self._named(_DELETE_MESSAGES),
        )

    def upgrade(self, version: int, **names: sql.Composable) -> list[str]:
        """
        Return the statements that bring a database to this version.

        :param version: Its present version; 0 if it has no tables yet.
        :param names: What stands in the statements instead of what usually does.
        """
        statements = [statement for step in MIGRATIONS[version:] for statement in step]
        first = [_CREATE_VERSION] if version == 0 else []
        return [self._named(statement, **names) for statement in [*first, *statements, _SET_VERSION]]

    def script(self, partitions: int = 0) -> str:
        """
        Return all that makes the tables, as one text to run by hand.

        :param partitions: Into how many parts the tables are divided; 0 for not at all.
        """
        partitioned = sql.SQL(_PARTITIONED if partitions else "")
        statements = [self.create_schema(), *self.upgrade(0, partitioned=partitioned)]
        for table in ("histories", "messages"):
            for index in range(partitions):
                part = sql.Identifier(self._schema_name, f"{self._table_prefix}_{table}_{index}")
                place = {"count": sql.Literal(partitions), "index": sql.Literal(index)}
                statements.append(self._named(_CREATE_PARTITION, part=part, whole=self._names[table], **place))
        return "".join(f"{dedent(statement).strip()};\n" for statement in statements).replace("%%", "%")

    def create_schema(self) -> str:
        """
        Return the statement that makes the PostgreSQL schema, if it is missing.
        """
        return self._named(_CREATE_SCHEMA)

    def _named(self, statement: str, **names: sql.Composable) -> str:
        return sql.SQL(statement).format(**{**self._names, **names}).as_string(None)
