# SPDX-License-Identifier: Apache-2.0
"""
PostgreSQL keeps the contract, also behind PgBouncer; and what is its own: rights, plans, poolers, servers that fail.
"""

import asyncio
import gc
import os
import re
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from psycopg import sql
from servers import (
    HOST,
    PASSWORD,
    USER,
    PgBouncer,
    PostgresServer,
    postgres_binaries,
    silent_port,
    unused_port,
    wait_until,
)

from haystack_chat_store import ChatMessageStoreError
from haystack_chat_store.errors import SchemaVersionError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.postgres import PostgresChatMessageStore, schema
from haystack_chat_store.testing import (
    ChatMessageStoreContract,
    ConcurrencyTest,
    ProcessesTest,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule13LifecycleTest,
    Rule19ChangesTest,
)
from haystack_chat_store.testing.concurrency import assert_whole_and_in_order, in_threads, planned_batches, to_messages
from haystack_chat_store.testing.kit import Calls, texts
from haystack_chat_store.testing.messages import conversation, with_id
from haystack_chat_store.testing.processes import Program


def _version(engine):
    return [int(number) for number in re.findall(r"\d+", engine.rpartition(" ")[2])]


# Without any, the fixture says what to install.
ENGINES = dict(sorted(postgres_binaries().items(), key=lambda item: _version(item[0]), reverse=True))
NEWEST, *OLDER = list(ENGINES) or ["any server"]

on_the_newest = pytest.mark.parametrize("server", [NEWEST], indirect=True)
on_the_oldest = pytest.mark.parametrize("server", OLDER[-1:], indirect=True)

DOCUMENTATION = (Path(__file__).parent.parent / "docs" / "postgres.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(request):
    # What the machine's own crash would lose, these tests do not look at.
    with PostgresServer(ENGINES.get(getattr(request, "param", NEWEST)), fsync="off", autovacuum="off") as server:
        yield server


@pytest.fixture(scope="module")
def pooler(server):
    with PgBouncer(server) as pooler:
        yield pooler


@contextmanager
def stores_on(url, **defaults):
    """
    A function that makes stores on a server, with tables of their own, which stay until the server goes.
    """
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


@pytest.fixture
def make_store(server):
    with stores_on(server.url) as make:
        yield make


@pytest.fixture
def store(make_store):
    return make_store(last_k=None)


@pytest.fixture
def database(server):
    """
    The URL of an empty database.
    """
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture(params=["sync", "async"])
def calls(request):
    calls = Calls(is_async=request.param == "async")
    yield calls
    calls.end()


def execute(url, *statements):
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if statements and cursor.description else []


def say(store, *said, history="history"):
    return store.write_messages(history, [ChatMessage.from_user(text) for text in said])


def said(store, history="history"):
    return texts(store.retrieve_messages(history, last_k=10**6))


def store_at(url, **settings):
    return PostgresChatMessageStore(Secret.from_token(url), **settings)


# ---------------------------------------------------------------------- the contract


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


@on_the_newest
class TestNewest(OnPostgres, ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    pass


class Writing(
    OnPostgres,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule13LifecycleTest,
    Rule19ChangesTest,
):
    """
    What could depend on the tables.
    """


class PartOfTheContract(Writing, ConcurrencyTest):
    """
    What could depend on the server's version, or on a pooler.
    """


@on_the_oldest
class TestOldest(PartOfTheContract):
    pass


@on_the_newest
class TestBehindPgBouncer(PartOfTheContract):
    @pytest.fixture
    def make_store(self, pooler):
        with stores_on(pooler.url) as make:
            yield make


@on_the_newest
class TestPartitioned(Writing):
    @pytest.fixture
    def make_store(self, server):
        with stores_on(server.url) as make:
            execute(server.url, make().create_schema_sql(partitions=3))
            yield make


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "setting",
    [
        {"connection_string": "postgresql://localhost/db"},
        {"schema_name": ""},
        {"schema_name": "x" * 64},
        {"schema_name": "a\x00b"},
        {"schema_name": None},
        {"table_prefix": ""},
        {"table_prefix": "x" * 41},
        {"table_prefix": "a\x00b"},
        {"min_pool_size": -1},
        {"min_pool_size": 3, "max_pool_size": 2},
        {"min_pool_size": 0, "max_pool_size": 0},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": "30"},
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PostgresChatMessageStore(**setting)


def test_a_store_without_its_environment_variable_loads_and_says_so_when_used(monkeypatch, calls):
    monkeypatch.delenv("PG_CONN_STR", raising=False)
    store = PostgresChatMessageStore(table_prefix="other", timeout=5)
    assert PostgresChatMessageStore.from_dict(store.to_dict()) == store
    assert "CREATE TABLE" in store.create_schema_sql()
    with pytest.raises(StoreUnavailableError, match="PG_CONN_STR"):
        calls.count(store, "history")
    calls.close(store)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_connection_string_that_changes_leaves_no_connection_behind(server, monkeypatch, way):
    store = PostgresChatMessageStore(Secret.from_env_var("ROTATING"), schema_name=f"test_{uuid.uuid4().hex}")
    calls = Calls(is_async=way == "async")
    for number in range(5):
        monkeypatch.setenv("ROTATING", f"{server.url}?application_name=number-{number}")
        assert calls.write(store, "history", [with_id("a"), with_id(f"{number}")]) == (1 if number else 2)
        wait_until(lambda: len(connections_of(server, store)) == 1, "the former connection to be closed")
    monkeypatch.delenv("ROTATING")
    calls.close(store)
    wait_until(lambda: not connections_of(server, store), "the last connection to be closed")
    calls.end()


def test_a_connection_string_that_changes_leads_to_another_database(server, database, monkeypatch, calls):
    store = PostgresChatMessageStore(Secret.from_env_var("ROTATING"), schema_name=f"test_{uuid.uuid4().hex}")
    monkeypatch.setenv("ROTATING", server.url)
    assert calls.write(store, "history", [with_id("a")]) == 1
    monkeypatch.setenv("ROTATING", database)
    assert calls.count(store, "history") == 0
    monkeypatch.setenv("ROTATING", server.url)
    assert calls.count(store, "history") == 1
    calls.close(store)


def test_a_password_is_never_serialized():
    with pytest.raises(ValueError, match="serialize"):
        store_at("postgresql://user:password@localhost/db").to_dict()


@pytest.mark.parametrize(
    "connection_string",
    [
        "not a connection string my-secret",
        "postgresql://user:pass@my-secret@localhost/db",  # where the password has an unescaped @
        "postgresql://user:pass@my:secret@localhost:5432/db",
        "postgresql://user:my-secret/pass@localhost/db",
        "postgresql://user:password@localhost:my-secret/db",
    ],
)
def test_a_connection_string_that_is_none_is_refused_and_not_repeated(connection_string):
    with pytest.raises(StoreUnavailableError, match="connection string") as raised:
        store_at(connection_string).count_messages("history")
    assert "secret" not in "".join(traceback.format_exception(raised.value)).replace(connection_string, "")


HOSTILE = ["Ünïcode", "a b", 'quoted"name', "it's; DROP TABLE x; --", "100%s", "%(key)s", "{0}", "{histories}", "\\"]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_can_be_that_of_schema_and_tables(make_store, calls, server, name):
    store = make_store(schema_name=f"{name} {uuid.uuid4().hex[:8]}", table_prefix=name)
    assert calls.write(store, "history", conversation("uaua")) == 4
    assert calls.write(store, "history", [with_id("a"), with_id("a")]) == 1
    assert len(calls.retrieve(store, "history", last_k=1)) == 1
    assert calls.count(store, "history") == 5
    names = "SELECT tablename FROM pg_tables WHERE schemaname = %s ORDER BY 1"
    found = [table for (table,) in server.execute(names, [store.schema_name])]
    assert found == [f"{name}_histories", f"{name}_messages", f"{name}_version"]
    calls.delete_all(store)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_schema_for_an_administrator_takes_any_name(make_store, server, name):
    store = make_store(schema_name=f"{name} {uuid.uuid4().hex[:8]}", table_prefix=name)
    execute(server.url, store.create_schema_sql())
    assert say(store, "Hello") == 1


def test_the_longest_prefix_leaves_the_names_of_tables_whole(make_store):
    store, other = make_store(table_prefix="x" * 40), make_store(table_prefix="x" * 39 + "y")
    assert say(store, "Hello") == 1
    assert other.count_messages("history") == 0


# ---------------------------------------------------------------------- rights


@pytest.fixture
def restricted(database):
    """
    The URL of a role that owns nothing and may create nothing.
    """
    role = f"chatbot_{uuid.uuid4().hex[:8]}"
    execute(database, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'", "REVOKE CREATE ON SCHEMA public FROM public")
    yield database.replace(f"{USER}:", f"{role}:")
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.parametrize("settings", [{}, {"schema_name": "chatbot"}], ids=["no tables", "no schema"])
def test_a_role_that_may_not_create_the_tables_is_told_what_to_do(restricted, calls, settings):
    with pytest.raises(StoreUnavailableError, match=r"permission denied.*create_schema_sql\(\)"):
        calls.write(store_at(restricted, **settings), "history", conversation("ua"))


def test_a_role_without_rights_to_create_uses_what_an_administrator_has_made(restricted, database, calls):
    store = store_at(restricted, schema_name="chatbot")
    role = psycopg.conninfo.conninfo_to_dict(restricted)["user"]
    # What the documentation tells the administrator, for this role.
    rights = re.search(r"```sql\n(GRANT.*?)```", DOCUMENTATION, re.DOTALL)[1].replace("my_app", role)
    own_table = "CREATE TABLE chatbot.of_the_application (secret text)"
    execute(database, store.create_schema_sql(), own_table, rights.replace("public", "chatbot"))
    changed = "INSERT", "UPDATE", "DELETE"
    for table, permitted in (
        ("chat_histories", {"SELECT", *changed}),
        ("chat_messages", {"SELECT", *changed}),
        ("chat_version", {"SELECT"}),
        ("of_the_application", set()),
    ):
        may = "SELECT name FROM unnest(%s::text[]) AS name WHERE has_table_privilege(%s, %s, name)"
        with psycopg.connect(database) as connection:
            found = connection.execute(may, [["SELECT", *changed, "TRUNCATE"], role, f"chatbot.{table}"])
            assert {name for (name,) in found} == permitted
    assert calls.write(store, "history", [with_id("a"), with_id("b")]) == 2
    assert calls.write(store, "history", [with_id("b"), with_id("c")]) == 1
    assert len(calls.retrieve(store, "history")) == calls.count(store, "history") == 3
    calls.delete(store, "history")
    calls.delete_all(store)
    calls.close(store)


# ---------------------------------------------------------------------- schema versions


def test_a_database_from_a_newer_version_is_refused_and_untouched(make_store, server, calls):
    store = make_store()
    say(store, "Hello")
    store.close()
    server.execute(f"INSERT INTO {store.schema_name}.chat_version VALUES (1000)")

    def everything():
        tables = (f"{store.schema_name}.chat_{table}" for table in ("version", "histories", "messages"))
        return [server.execute(f"SELECT t::text FROM {table} AS t ORDER BY 1") for table in tables]

    before = everything()
    for call in (calls.count, calls.retrieve, calls.delete):
        with pytest.raises(SchemaVersionError, match="1000"):
            call(store, "history")
    with pytest.raises(SchemaVersionError, match="1000"):
        calls.write(store, "history", conversation("ua"))
    assert everything() == before


def upgrade_and_write(store, report, text):
    """
    Use the store as a later version of this package would, with one more migration.
    """
    from haystack.dataclasses import ChatMessage

    from haystack_chat_store.stores.postgres import schema

    schema.MIGRATIONS.append(["ALTER TABLE {messages} ADD COLUMN upgrades integer NOT NULL DEFAULT 1"])
    report(store.write_messages("history", [ChatMessage.from_user(text)]))


def test_many_processes_upgrade_an_older_database_once(store, server):
    say(store, "before")
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(upgrade_and_write, store, f"{number}")) for number in range(6)]
        Program.begin(*programs)
        assert [program.reports_to_the_end() for program in programs] == [[1]] * 6
    found = said(store)  # by the older version, which has looked at the version before
    assert found[0] == "before"
    assert sorted(found[1:]) == [f"{number}" for number in range(6)]
    versions = server.execute(f"SELECT version FROM {store.schema_name}.chat_version ORDER BY 1")
    assert versions == [(len(schema.MIGRATIONS),), (len(schema.MIGRATIONS) + 1,)]


def test_a_failed_upgrade_leaves_the_database_as_it_was(make_store, server, monkeypatch):
    store = make_store()
    say(store, "before")
    store.close()
    steps = [["ALTER TABLE {messages} ADD COLUMN new integer", "ALTER TABLE {messages} DROP COLUMN unknown"]]
    with monkeypatch.context() as later:
        later.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, *steps])
        later.setattr("haystack_chat_store.stores.postgres.connections.MIGRATIONS", schema.MIGRATIONS)
        with pytest.raises(StoreUnavailableError, match="unknown"):
            say(make_store(), "after")
    assert say(store, "after") == 1
    assert said(store) == ["before", "after"]


def test_tables_that_were_dropped_are_made_again(store, server):
    say(store, "before")
    server.execute(f"DROP SCHEMA {store.schema_name} CASCADE")
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        say(store, "lost")
    assert say(store, "after") == 1
    assert said(store) == ["after"]


# ---------------------------------------------------------------------- isolation levels


def test_a_stricter_default_isolation_level_does_no_harm(server):
    url = f"{server.url}?options=-c%20default_transaction_isolation%3Dserializable"
    writers = planned_batches(8, 12)
    with stores_on(url, last_k=None) as make:
        store = make()

        def write(batches):
            for batch in batches:
                assert store.write_messages("history", to_messages(batch)) == len(batch)
                store.write_messages("another", to_messages(batch))
                store.count_messages("history")
                store.retrieve_messages("history", last_k=2)
                store.delete_messages("another")

        in_threads(*(lambda batches=batches: write(batches) for batches in writers))
        everything = [text for batches in writers for batch in batches for text in batch]
        assert_whole_and_in_order(said(store), writers, everything)


# ---------------------------------------------------------------------- writers of the same messages


@pytest.mark.parametrize("partitions", [None, 3])
def test_writers_of_the_same_messages_store_each_once(make_store, server, calls, partitions):
    """
    All have looked before the first has written.
    """
    store = make_store(last_k=None)
    execute(server.url, store.create_schema_sql(partitions))

    def write():
        return [calls.write(store, "history", [with_id(f"{n}"), with_id(f"{n + 1}")]) for n in range(30)]

    written = in_threads(*[write] * 6)
    assert sum(map(sum, written)) == store.count_messages("history") == len(said(store)) == 31


@pytest.mark.parametrize("way", ["directly", "behind PgBouncer"])
def test_a_batch_is_stored_whole_or_not_at_all_beside_a_delete(server, pooler, way):
    """
    Of its two messages, the history has the first at times when the writer looks, and none when it writes.
    """
    with stores_on(server.url if way == "directly" else pooler.url) as make:
        writer, deleter = make(last_k=None), make(last_k=None, max_pool_size=2)
        has_written = threading.Event()

        def write():
            try:
                for number in range(400):
                    first, second = f"first {number}", f"second {number}"
                    writer.write_messages("history", [with_id(first)])
                    writer.write_messages("history", [with_id(first), with_id(second)])
                    found = [message.meta["chat_message_id"] for message in writer.retrieve_messages("history")]
                    assert (first in found) >= (second in found)
            finally:
                has_written.set()

        def delete():
            while not has_written.is_set():
                deleter.delete_messages("history")

        in_threads(write, delete)
        writer.write_messages("history", [with_id("last")])
        assert writer.count_messages("history") == len(writer.retrieve_messages("history"))


def test_messages_without_their_history_are_an_error_and_not_waited_for(store, server):
    """
    Only by hand can they get so.
    """
    store.write_messages("history", [with_id("a")])
    server.execute(f"DELETE FROM {store.schema_name}.chat_histories")
    with pytest.raises(StoreUnavailableError, match="UniqueViolation"):
        store.write_messages("history", [with_id("a"), with_id("b")])


# ---------------------------------------------------------------------- deleting everything


def fill(server, store, histories, messages):
    """
    Put histories into the store's tables, each with so many messages, faster than the store could.
    """
    key, schema_name = "md5('filler' || h)::uuid", store.schema_name
    store.count_messages("history")
    server.execute(
        f"INSERT INTO {schema_name}.chat_histories "
        f"SELECT {key}, 'default', 'filler ' || h, {messages}, {messages}, {messages} "
        f"FROM generate_series(1, {histories}) h"
    )
    server.execute(
        f"INSERT INTO {schema_name}.chat_messages SELECT {key}, p, now(), p, 'user', '{{}}' "
        f"FROM generate_series(1, {histories}) h, generate_series(0, {messages - 1}) p"
    )


@pytest.mark.parametrize("partitions", [None, 3])
@pytest.mark.parametrize(("histories", "messages"), [(2500, 1), (3, 60_000)], ids=["many", "long"])
def test_everything_is_deleted_in_several_transactions(make_store, server, calls, partitions, histories, messages):
    store, other = make_store(), make_store(namespace="other")
    execute(server.url, store.create_schema_sql(partitions))
    say(other, "stays")
    fill(server, store, histories, messages)
    statement = f"SELECT count(DISTINCT xmax::text) FROM {store.schema_name}.chat_messages"
    with psycopg.connect(server.url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute(statement)  # sees from now on what is there now, with the marks of who has deleted it
        calls.delete_all(store)
        assert connection.execute(statement).fetchone() == (3 + 1,)
    assert said(other) == ["stays"]
    for table in ("histories", "messages"):
        assert server.execute(f"SELECT count(*) FROM {store.schema_name}.chat_{table}") == [(1,)]


def test_everything_is_deleted_however_long_it_takes(make_store, server):
    """
    Each step has the timeout to itself.
    """
    store = make_store(timeout=4)
    fill(server, store, 3000, 1)
    slowly = f"{store.schema_name}.slowly"
    execute(
        server.url,
        f"CREATE FUNCTION {slowly}() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_sleep(0.001); RETURN NULL; END'",
        f"CREATE TRIGGER slowly AFTER DELETE ON {store.schema_name}.chat_messages "
        f"FOR EACH ROW EXECUTE FUNCTION {slowly}()",
    )
    store.delete_all_messages()
    assert server.execute(f"SELECT count(*) FROM {store.schema_name}.chat_messages") == [(0,)]


def test_deleting_everything_at_once_from_several_threads_disturbs_no_writer(make_store, server):
    stores = [make_store(max_pool_size=size) for size in range(4, 7)]
    has_written = threading.Event()

    def write():
        try:
            for number in range(150):
                assert say(stores[0], "Hello", "Hello?", history=f"{number % 20}") == 2
        finally:
            has_written.set()

    def delete(store):
        while not has_written.is_set():
            store.delete_all_messages()

    in_threads(write, *(lambda store=store: delete(store) for store in stores[1:]))
    for history in range(20):
        assert stores[0].count_messages(f"{history}") == len(said(stores[0], f"{history}"))
    stores[0].delete_all_messages()
    for table in ("histories", "messages"):
        assert server.execute(f"SELECT count(*) FROM {stores[0].schema_name}.chat_{table}") == [(0,)]


# ---------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def long_history(server):
    """
    A store, one history of which has 100,000 messages.
    """
    with stores_on(server.url) as make:
        store = make(last_k=None, search=True)
        for _ in range(20):
            store.write_messages("history", conversation("ua" * 2500))
        yield store


ON_MESSAGES = ["append_all", "append_rest", "known_ids", "read_all", "read_rounds", "read_messages"]
ON_MESSAGES += ["page_before", "page_after", "search", "an_unindexed", "unindexed", "unindexed_contents"]
# These sort what they have found along an index.
SORTS = {"histories_of_few", "search", "search_history", "search_long_history", "unindexed_contents"}
READ_MUCH = {"per_day", "orphans", "miscounted", "keys", "indexed", "mismatched"}
READ_MUCH |= {"unreadable_times", "unreadable_message_times"}
ON_BOTH_TABLES = [
    name
    for name in schema.Statements._fields
    if name not in {"version", "vacuum_messages", "vacuum_histories", "size_on_disk", *READ_MUCH}
]


@pytest.mark.parametrize("analysed", [False, True], ids=["never analysed", "analysed"])
@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("directly", name) for name in ON_BOTH_TABLES),
        # Here each statement is planned for itself; and a table of few histories is better read whole.
        *(("behind PgBouncer", name) for name in ON_MESSAGES),
    ],
)
def test_every_statement_walks_along_an_index(server, pooler, long_history, way, name, analysed):
    """
    As PostgreSQL plans it on the store's own connections for any parameters, which is how it soon runs when prepared.
    """
    numbers = {}
    statement = re.sub(
        r"%(?:\((\w+)\))?[sb]",
        lambda found: f"${numbers.setdefault(found[1] or len(numbers), len(numbers) + 1)}",
        getattr(long_history._statements, name),
    )
    prepared = [
        "BEGIN",
        *(f"ANALYZE {long_history.schema_name}.chat_{table}" for table in ("histories", "messages") if analysed),
        "SET LOCAL plan_cache_mode = force_generic_plan",
        f"PREPARE any_parameters AS {statement}",
    ]
    given = f"({', '.join(['NULL'] * len(numbers))})" if numbers else ""
    explained = f"EXPLAIN (COSTS OFF) EXECUTE any_parameters {given}"

    async def plan_of(session):
        for step in prepared:
            session.connection.execute(step)
        lines = session.connection.execute(explained).fetchall()
        session.connection.execute("DEALLOCATE any_parameters")
        return "\n".join(line for (line,) in lines)

    store = store_at(server.url if way == "directly" else pooler.url, schema_name=long_history.schema_name)
    plan = store._run(plan_of)
    store.close()
    assert ("Seq Scan" if way == "directly" else "Seq Scan on chat_messages") not in plan, plan
    assert "Sort" not in plan or name in SORTS, plan


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan", "force_custom_plan"])
def test_no_call_reads_a_whole_table_while_a_history_grows(server, mode):
    """
    On a database that was never analysed, from the first message on.
    """
    with stores_on(f"{server.url}?options=-c%20plan_cache_mode%3D{mode}") as make:
        store, by_message = make(), make(last_k_unit="message")

        def scans():
            store.close()
            wait_until(lambda: not connections_of(server, store), "the statistics to be complete")
            statement = "SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE schemaname = %s"
            return server.execute(f"{statement} AND relname <> 'chat_version'", [store.schema_name])

        store.count_messages("history")
        before = scans()  # some, to make the indexes
        for number in range(300):
            store.write_messages("history", [with_id(f"{number}"), *conversation("ua")])
            store.retrieve_messages("history")
            by_message.retrieve_messages("history")
            store.count_messages("history")
        store.delete_messages("history")
        assert scans() == before


def test_a_call_looks_into_one_partition(server, make_store):
    store = make_store()
    execute(server.url, store.create_schema_sql(partitions=5))
    for number in range(20):  # so often that plans for any parameters are in use
        store.write_messages("history", [with_id(f"{number}"), *conversation("ua")])
        store.retrieve_messages("history")
        store.count_messages("history")
    store.close()
    wait_until(lambda: not connections_of(server, store), "the statistics to be complete")

    statement = "SELECT relname FROM pg_stat_user_tables WHERE schemaname = %s AND idx_scan > 0"
    used = [name for (name,) in server.execute(statement, [store.schema_name])]
    assert sorted(name.rstrip("01234") for name in used) == ["chat_histories_", "chat_messages_"]


@pytest.mark.parametrize("partitions", [0, -1, 1001, True, "4"])
def test_a_number_of_partitions_that_cannot_be_is_refused(partitions):
    with pytest.raises(ValueError, match="partitions must be a number from 1 to 1000"):
        PostgresChatMessageStore().create_schema_sql(partitions)


def connections_of(server, store):
    statement = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND pid <> pg_backend_pid()"
    return [pid for (pid,) in server.execute(statement, [f"%{store.schema_name}%"])]


@pytest.mark.parametrize("way", ["directly", "behind PgBouncer"])
def test_statements_are_prepared_unless_a_pooler_stands_between(way):
    with PostgresServer(ENGINES.get(NEWEST), fsync="off", log_statement="all") as server, ExitStack() as stack:
        url = server.url if way == "directly" else stack.enter_context(PgBouncer(server)).url
        with stores_on(url) as make:
            store = make()
            for _ in range(3):
                say(store, "Hello")
                said(store)
        runs = re.findall(r"execute (\S+):\s+(?:WITH history|SELECT content)", server.log.read_text(errors="replace"))
    assert len(runs) == 6
    assert ("<unnamed>" in runs) == (way != "directly")
    assert len(set(runs)) == (2 if way == "directly" else 1)


# ---------------------------------------------------------------------- SQL for people


def test_chats_can_be_queried_in_sql_as_documented(database):
    store = store_at(database)
    shown = {
        "NUL \x00 and \ud800, \udc00\ud800\x00\x00": r"NUL \u0000 and \ud800, \udc00\ud800\u0000\u0000",
        r"\u0000 \\u0000 \ud800": r"\u0000 \\u0000 \ud800",
        "\\\x00 \\\\\ud800 \n": "\\\\u0000 \\\\\\ud800 \n",
        'Ünïcode 😀 "quoted"': 'Ünïcode 😀 "quoted"',
    }
    hidden = ChatMessage.from_user("in its meta", meta={"nul": "\x00", "lone": ["\ud800"]})
    store.write_messages("user_456", [*conversation("ua"), hidden, *map(ChatMessage.from_assistant, shown)])
    transcript = re.search(r"```sql\n(SELECT.*?)```", DOCUMENTATION, re.DOTALL)[1]
    rows = execute(database, transcript)
    assert [row[-1] for row in rows] == [*texts(store.retrieve_messages("user_456"))[: -len(shown)], *shown.values()]
    store.close()


# ---------------------------------------------------------------------- servers that fail


def assert_tells_where_and_no_secret(error, port):
    assert isinstance(error, StoreUnavailableError)
    assert HOST in str(error)
    assert str(port) in str(error)
    everything = "".join(traceback.format_exception(error))
    assert PASSWORD not in everything
    assert PASSWORD[::-1] not in everything


def test_an_absent_server_is_reported(calls):
    port = unused_port()
    store = store_at(f"postgresql://{USER}:{PASSWORD}@{HOST}:{port}/postgres")
    with pytest.raises(StoreUnavailableError, match="refused") as raised:
        calls.write(store, "history", conversation("ua"))
    assert_tells_where_and_no_secret(raised.value, port)


def test_a_wrong_password_is_reported(server, calls):
    with pytest.raises(StoreUnavailableError, match="password authentication failed") as raised:
        calls.count(store_at(server.url.replace(PASSWORD, PASSWORD[::-1])), "history")
    assert_tells_where_and_no_secret(raised.value, server.port)


def test_a_server_that_never_answers_is_given_up(calls):
    with silent_port() as port:
        store = store_at(f"postgresql://{USER}:{PASSWORD}@{HOST}:{port}/postgres", timeout=2)
        began = time.monotonic()
        with pytest.raises(StoreTimeoutError, match="2 seconds") as raised:
            calls.count(store, "history")
        assert time.monotonic() - began < 20
        assert_tells_where_and_no_secret(raised.value, port)


@pytest.mark.parametrize(("timeout", "option", "limit"), [(4, "", 4), (30, "&connect_timeout=2", 2 * 2)])
def test_several_hosts_that_never_answer_share_the_timeout(calls, timeout, option, limit):
    with ExitStack() as stack:
        ports = [str(stack.enter_context(silent_port())) for _ in range(2)]
        hosts = ",".join(f"{HOST}:{port}" for port in ports)
        store = store_at(f"postgresql://{USER}:{PASSWORD}@{hosts}/postgres?sslmode=disable{option}", timeout=timeout)
        began = time.monotonic()
        with pytest.raises(StoreTimeoutError, match="in time") as raised:
            calls.count(store, "history")
        assert time.monotonic() - began < limit + 3
        assert_tells_where_and_no_secret(raised.value, ",".join(ports))


def test_a_host_that_never_answers_leaves_time_for_the_next(server, calls):
    with silent_port() as port:
        url = server.url.replace(f"{HOST}:", f"{HOST}:{port},{HOST}:")
        store = store_at(url, timeout=10, schema_name=f"test_{uuid.uuid4().hex}")
        assert calls.write(store, "history", [with_id("a")]) == 1
        calls.close(store)


@pytest.mark.parametrize(
    ("environment", "connection_string", "where"),
    [
        ({"PGHOST": HOST, "PGPORT": "1"}, "", f"{HOST}, port 1"),
        ({"PGPORT": "1"}, f"host={HOST}", f"{HOST}, port 1"),
        ({"PGHOST": "elsewhere", "PGPORT": "1"}, f"hostaddr={HOST} port=2", f"{HOST}, port 2"),
        ({"PGHOSTADDR": HOST, "PGPORT": "1"}, "", f"{HOST}, port 1"),
        ({}, "host=/nowhere", "/nowhere, port 5432"),
        ({"PGHOST": "elsewhere"}, "service=chats", "the service chats"),
    ],
)
def test_an_error_names_the_server_that_libpq_connects_to(monkeypatch, tmp_path, environment, connection_string, where):
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    (tmp_path / "services").write_text(f"[chats]\nhost={HOST}\nport=1\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnavailableError, match=f"^PostgreSQL at {where}, failed: "):
        store_at(f"{connection_string} dbname=chats user={USER}").count_messages("history")


@pytest.mark.parametrize("password", ["a", "failed", PASSWORD])
def test_a_password_cannot_be_guessed_from_what_an_error_leaves_out(server, password):
    role = f'"{PASSWORD} {uuid.uuid4().hex}"'
    execute(server.url, f"CREATE ROLE {role} LOGIN PASSWORD 'another'")
    url = psycopg.conninfo.make_conninfo(server.url, user=role.strip('"'), password=password)
    with pytest.raises(StoreUnavailableError) as raised:
        store_at(url).count_messages("history")
    execute(server.url, f"DROP ROLE {role}")
    assert str(raised.value) == f"PostgreSQL at {HOST}, port {server.port}, failed: OperationalError"


def test_what_psycopg_itself_refuses_is_reported(store, monkeypatch):
    """
    As it refuses the event loop that is Windows' default.
    """

    async def refuse(*_, **__):
        raise psycopg.InterfaceError("Psycopg cannot use the 'ProactorEventLoop'")

    monkeypatch.setattr("haystack_chat_store.stores.postgres.connections.conninfo_attempts_async", refuse)
    with pytest.raises(StoreUnavailableError, match="cannot use the 'ProactorEventLoop'"):
        asyncio.run(store.count_messages_async("history"))


def test_a_call_that_waits_too_long_is_given_up_and_leaves_nothing_waiting(server, make_store, calls):
    store = make_store(timeout=0.5)
    say(store, "before")
    with psycopg.connect(server.url) as connection:
        connection.execute(f"LOCK TABLE {store.schema_name}.chat_histories")
        with pytest.raises(StoreTimeoutError, match=r"0\.5 seconds") as raised:
            calls.write(store, "history", conversation("ua"))
        assert_tells_where_and_no_secret(raised.value, server.port)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: server.execute(waiting) == [(0,)], "the server to give up too")
    assert said(store) == ["before"]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_call_waits_for_a_free_connection_no_longer_than_the_timeout(server, make_store, way):
    store = make_store(min_pool_size=0, max_pool_size=1, timeout=1)
    say(store, "before")

    async def count_three_times():
        calls = (store.count_messages_async("history") for _ in range(3))
        return await asyncio.gather(*calls, return_exceptions=True)

    def count():
        with pytest.raises(StoreTimeoutError) as raised:
            store.count_messages("history")
        return raised.value

    with psycopg.connect(server.url) as connection:
        connection.execute(f"LOCK TABLE {store.schema_name}.chat_histories")
        errors = in_threads(count, count, count) if way == "sync" else asyncio.run(count_three_times())
    assert all(isinstance(error, StoreTimeoutError) for error in errors)
    assert any("max_pool_size" in str(error) for error in errors)
    assert store.count_messages("history") == 1


def test_connections_that_were_ended_are_replaced(server, make_store, calls):
    store = make_store(last_k=None)
    for number in range(3):
        assert calls.write(store, "history", [ChatMessage.from_user(str(number))]) == 1
        for pid in connections_of(server, store):
            server.execute("SELECT pg_terminate_backend(%s)", [pid])
        wait_until(lambda: not connections_of(server, store), "connections to end")
    assert texts(calls.retrieve(store, "history")) == ["0", "1", "2"]


@pytest.mark.parametrize("ending", ["stop", "kill"])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_nothing_acknowledged_is_lost_when_the_server_restarts(ending, way):
    """
    Calls fail with a clear error or succeed; the same store works again by itself.
    """
    writers = planned_batches(6, 4000)
    acknowledged, failures, restarted = [], [], threading.Event()

    def write(batches):
        calls, written_since = Calls(is_async=way == "async"), 0
        for batch in batches:
            try:
                assert calls.write(store, "history", to_messages(batch)) == len(batch)
                acknowledged.extend(batch)
                written_since += restarted.is_set()
            except ChatMessageStoreError as error:
                failures.append(error)
                time.sleep(0.05)
            if written_since == 3:
                calls.end()
                return
        pytest.fail("the store did not work again")

    def restart():
        for _ in range(2):
            seen = len(acknowledged)
            wait_until(lambda seen=seen: len(acknowledged) > seen + 100, "the writers")
            getattr(server, ending)()
            server.start()
        restarted.set()

    with PostgresServer(ENGINES.get(NEWEST)) as server, stores_on(server.url, last_k=None) as make:
        store = make()
        say(store, "warm-up", history="another")
        in_threads(restart, *(lambda batches=batches: write(batches) for batches in writers))
        assert failures
        assert all(str(server.port) in str(error) and PASSWORD not in str(error) for error in failures)
        assert_whole_and_in_order(said(store), writers, acknowledged)
        assert store.count_messages("history") == len(said(store))


# ---------------------------------------------------------------------- connections


def test_stores_with_equal_settings_share_their_connections(make_store, server):
    stores = [make_store() for _ in range(5)]
    for store in stores:
        say(store, "Hello")
    assert len(connections_of(server, stores[0])) == 1
    stores[0].close()
    wait_until(lambda: not connections_of(server, stores[0]), "the connection to be closed")
    assert stores[1].count_messages("history") == 5


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_store_opens_no_more_connections_than_it_may(make_store, server, way):
    store = make_store(max_pool_size=3)

    async def write_at_once():
        await asyncio.gather(
            *(store.write_messages_async(f"{number}", [ChatMessage.from_user("Hi!")]) for number in range(30))
        )
        return len(connections_of(server, store))

    say(store, "Hello")
    if way == "async":
        assert asyncio.run(write_at_once()) <= 3 + 1
    else:
        in_threads(*(lambda number=number: say(store, "Hi!", history=f"{number}") for number in range(30)))
        assert len(connections_of(server, store)) <= 3


def test_connections_that_were_idle_for_long_are_closed_by_the_next_call(make_store, server, monkeypatch):
    store = make_store()
    say(store, "Hello")

    async def count_at_once():
        return await asyncio.gather(*(store.count_messages_async("history") for _ in range(3)))

    with closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(6) as executor:
        with psycopg.connect(server.url) as connection:
            connection.execute(f"LOCK TABLE {store.schema_name}.chat_histories")
            in_loop = executor.submit(loop.run_until_complete, count_at_once())
            in_threads = [executor.submit(store.count_messages, "history") for _ in range(5)]
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: server.execute(waiting) == [(3 + 5,)], "all to wait")
        assert [*in_loop.result(), *(call.result() for call in in_threads)] == [1] * 8
        assert len(connections_of(server, store)) == 8
        monkeypatch.setattr("haystack_chat_store.stores.postgres.connections._MAX_IDLE_SECONDS", 0)
        assert store.count_messages("history") == 1
        wait_until(lambda: len(connections_of(server, store)) == 1 + 1, "one to be left on each side")
        store.close()


def test_the_connections_of_loops_that_ended_are_closed(make_store, server):
    store = make_store()
    for _ in range(4):
        asyncio.run(store.write_messages_async("history", [ChatMessage.from_user("Hi!")]))
    assert len(connections_of(server, store)) <= 2
    store.close()
    gc.collect()
    wait_until(lambda: not connections_of(server, store), "connections to be closed")


def fork_while_a_loop_waits(store, report):
    """
    Fork while asynchronous calls wait for the server. The child uses the store and ends as every program does.
    """
    import asyncio
    import gc
    import os
    import sys

    from haystack.dataclasses import ChatMessage

    async def main():
        await store.count_messages_async("history")
        report("is connected")
        await asyncio.to_thread(sys.stdin.readline)
        waiting = [
            asyncio.create_task(store.write_messages_async("history", [ChatMessage.from_user(f"{number}")]))
            for number in range(5)
        ]
        await asyncio.to_thread(sys.stdin.readline)
        child = os.fork()
        if child == 0:
            return
        report("forked")
        await asyncio.to_thread(sys.stdin.readline)
        await asyncio.gather(*waiting)
        status = await asyncio.to_thread(os.waitpid, child, 0)
        report(status[1])

    main_coroutine = main()
    loop = asyncio.new_event_loop()
    parent = os.getpid()
    loop.run_until_complete(main_coroutine)
    if os.getpid() != parent:
        del loop, main_coroutine
        gc.collect()
        store.write_messages("history", [ChatMessage.from_user("the child")])
        asyncio.run(store.write_messages_async("history", [ChatMessage.from_user("the child awaits")]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork on this platform")
def test_a_fork_does_not_disturb_calls_under_way_in_a_loop(store, server):
    say(store, "before")
    with Program(fork_while_a_loop_waits, store) as program:
        program.begin()
        reports = program.reports()
        assert next(reports) == "is connected"
        with psycopg.connect(server.url) as connection:
            connection.execute(f"LOCK TABLE {store.schema_name}.chat_histories")
            program.tell("write")
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: server.execute(waiting)[0][0] == 5, "five calls to wait")
            program.tell("fork")
            assert next(reports) == "forked"
        program.tell("go on")
        assert list(reports) == [0]
        assert program.exit_code() == 0
    assert sorted(said(store)) == sorted(["before", *map(str, range(5)), "the child", "the child awaits"])


def fork_while_threads_connect(store, report, times):
    """
    In a process that has never connected: begin to connect in threads, and fork children that connect, too. Again and
    again, each time in a process of its own. Report how each ended.
    """
    import os
    import signal
    import threading
    import time

    def fork(function):
        child = os.fork()
        if child == 0:
            try:
                os._exit(function())
            finally:
                os._exit(1)
        return child

    def connect():
        signal.alarm(60)  # of those that hang
        return store.count_messages("history")

    def connect_and_fork():
        for _ in range(4):
            threading.Thread(target=store.count_messages, args=("history",)).start()
        children = []
        for number in range(6):
            time.sleep(number / 1000)
            children.append(fork(connect))
        return max(os.waitpid(child, 0)[1] for child in children)

    for _ in range(times):
        report(os.waitpid(fork(connect_and_fork), 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork on this platform")
def test_a_child_forked_while_threads_connect_can_connect_too(store):
    """
    What the threads hold of OpenSSL's locks at that moment would stay held in the child for ever.
    """
    store.count_messages("history")  # makes the tables
    with Program(fork_while_threads_connect, store, 40) as program:
        program.begin()
        assert program.reports_to_the_end() == [0] * 40
