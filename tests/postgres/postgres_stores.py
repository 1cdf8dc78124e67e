# SPDX-License-Identifier: Apache-2.0
"""Stores on private servers of PostgreSQL, and what tests ask these servers themselves."""

import re
import uuid
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from psycopg import sql
from servers import HOST, PASSWORD, USER, postgres_binaries, unused_port, wait_until

from haystack_chat_store.stores import postgres
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.stores.postgres.schema import Tables
from haystack_chat_store.stores.postgres.statements import Statement
from haystack_chat_store.testing.kit import texts


def _version(engine):
    return [int(number) for number in re.findall(r"\d+", engine.rpartition(" ")[2])]


# Without any, the fixture says what to install.
ENGINES = dict(sorted(postgres_binaries().items(), key=lambda item: _version(item[0]), reverse=True))
NEWEST, *OLDER = list(ENGINES) or ["any server"]
BEHIND_PGBOUNCER = "behind PgBouncer"

# The fast suite shows in one place what is the same in all; the contract shows in each what could differ.
NEWEST_AND_OLDEST = [NEWEST, *(pytest.param(engine, marks=pytest.mark.full) for engine in OLDER[-1:])]
DIRECTLY_OR_POOLED = ["directly", pytest.param(BEHIND_PGBOUNCER, marks=pytest.mark.full)]

on_the_newest = pytest.mark.parametrize("server", [NEWEST], indirect=True)
on_the_oldest = pytest.mark.parametrize("server", OLDER[-1:], indirect=True)

DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "postgres.md").read_text(encoding="utf-8")


@contextmanager
def stores_on(url, **defaults):
    """A function that makes stores on a server, with tables of their own, which stay until the server goes."""
    made = []

    def make(**settings):
        settings = {"schema_name": schema_name, **defaults, **settings}
        made.append(PostgresChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"), **settings))
        return made[-1]

    schema_name = f"test_{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CHAT_STORE_URL", url)
        yield make
        for store in made:
            store.close()


def execute(url, *statements):
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if statements and cursor.description else []


def say(store, *said, history="history"):
    return store.write_messages(history, [ChatMessage.from_user(text) for text in said])


def said(store, history="history"):
    return texts(store.retrieve_messages(history, last_k=10**6))


def _statements():
    found = {}
    for module in iter_modules(postgres.__path__, f"{postgres.__name__}."):
        for name, value in vars(import_module(module.name)).items():
            if isinstance(value, Statement):
                assert found.setdefault(name.strip("_").lower(), value) is value
    return found


#: Every statement of an operation, by its name.
STATEMENTS = _statements()


def statements_of(store):
    tables = Tables(store.schema_name or "public", store.table_prefix)
    return {name: tables.fill_in(statement) for name, statement in STATEMENTS.items()}


def store_at(url, **settings):
    return PostgresChatMessageStore(Secret.from_token(url), **settings)


@contextmanager
def counted(server, store, table, what="pg_stat_user_tables.idx_tup_fetch"):
    """
    Count the rows of a table that are looked up along indexes meanwhile. Returns what tells their number afterwards.

    :param what: What else to count: a view of the server's statistics, and a column of it.
    """
    view, column = what.split(".")

    def looked_up():
        store.close()
        wait_until(lambda: not connections_of(server, store), "the statistics to be complete")
        statement = f"SELECT sum({column}) FROM {view} WHERE schemaname = %s AND relname LIKE %s"
        return server.execute(statement, [store.schema_name, f"{table}%"])[0][0]

    before = looked_up()
    after = []
    yield lambda: after[0] - before
    after.append(looked_up())


class OnPostgres:
    @pytest.fixture
    def make_unreachable_store(self, monkeypatch):
        def make(**settings):
            monkeypatch.setenv("NO_SERVER", f"postgresql://{USER}:{PASSWORD}@{HOST}:{unused_port()}/postgres")
            return PostgresChatMessageStore(Secret.from_env_var("NO_SERVER"), **settings)

        return make

    @pytest.fixture(autouse=True)
    def _remember_server(self, server):
        self.server = server

    @pytest.fixture
    def make_store(self, server):
        with stores_on(server.url) as make:
            yield make

    @pytest.fixture
    def database_state(self, server, make_store):
        """Its relations, the rows of its tables, and the next transaction that changes anything."""
        schema_name = make_store().schema_name
        relations = """
            SELECT relname, relkind FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
            WHERE nspname = %s
        """
        all_rows = sql.SQL("SELECT ctid, xmin, * FROM {}")

        def state():
            with psycopg.connect(server.url, autocommit=True) as connection:
                found = sorted(connection.execute(relations, [schema_name]).fetchall())
                tables = [sql.Identifier(schema_name, name) for name, kind in found if kind == "r"]
                rows = [connection.execute(all_rows.format(table)).fetchall() for table in tables]
                return found, rows, connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())").fetchone()

        return state

    @contextmanager
    def stalled(self, store):
        with psycopg.connect(self.server.url) as connection:
            connection.execute("SELECT pg_advisory_xact_lock(1667785076)")  # taken to make the tables
            histories = sql.Identifier(store.schema_name, f"{store.table_prefix}_histories")
            if connection.execute("SELECT to_regclass(%s)", [histories.as_string(None)]).fetchone() != (None,):
                connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(histories))
            yield

    def assert_sound(self, store):
        prefix = store.table_prefix
        tables = [sql.Identifier(store.schema_name, f"{prefix}_{name}") for name in ("histories", "messages")]
        counters = sql.SQL("SELECT history_key, next_position, message_count, round_count FROM {} ORDER BY 1")
        counted = sql.SQL(
            "SELECT history_key, max(position) + 1, count(*), sum((role = 'user')::int) FROM {} GROUP BY 1 ORDER BY 1"
        )
        histories, messages = (
            execute(self.server.url, statement.format(table))
            for statement, table in zip((counters, counted), tables, strict=True)
        )
        assert histories == messages


def connections_of(server, store):
    statement = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND pid <> pg_backend_pid()"
    return [pid for (pid,) in server.execute(statement, [f"%{store.schema_name}%"])]
