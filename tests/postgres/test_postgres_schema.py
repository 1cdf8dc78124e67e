# SPDX-License-Identifier: Apache-2.0
"""Schema versions."""

import threading
from contextlib import ExitStack

import psycopg
import pytest
from postgres_stores import execute, said, say, store_at
from servers import PASSWORD, wait_until

from haystack_chat_store.errors import SchemaVersionError, StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.stores.postgres import schema
from haystack_chat_store.testing.messages import conversation
from haystack_chat_store.testing.processes import Program


def test_a_database_from_a_newer_version_is_refused_and_untouched(make_store, server, calls):
    store = make_store()
    say(store, "Hello")
    store.close()
    server.execute(f"INSERT INTO {store.schema_name}.haystack_chat_version VALUES (1000)")

    def everything():
        tables = (f"{store.schema_name}.haystack_chat_{table}" for table in ("version", "histories", "messages"))
        return [server.execute(f"SELECT t::text FROM {table} AS t ORDER BY 1") for table in tables]

    before = everything()
    for call in (calls.count, calls.retrieve, calls.delete):
        with pytest.raises(SchemaVersionError, match="1000"):
            call(store, "history")
    with pytest.raises(SchemaVersionError, match="1000"):
        calls.write(store, "history", conversation("ua"))
    assert everything() == before


def upgrade_and_write(store, report, text):
    """Use the store as a later version of this package would, with one more migration."""
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
    versions = server.execute(f"SELECT version FROM {store.schema_name}.haystack_chat_version ORDER BY 1")
    assert versions == [(len(schema.MIGRATIONS),), (len(schema.MIGRATIONS) + 1,)]


def test_an_upgrade_keeps_no_writer_waiting_while_it_waits_itself(store, server, make_store, monkeypatch):
    """A pool of its own upgrades, as a process of a later version would."""
    say(store, "before")
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, ["ALTER TABLE {messages} ADD COLUMN new integer"]])
    monkeypatch.setattr("haystack_chat_store.stores.postgres.upgrading.MIGRATIONS", schema.MIGRATIONS)
    later = make_store(max_pool_size=3)
    with psycopg.connect(server.url) as reader:
        reader.execute(f"SELECT FROM {store.schema_name}.haystack_chat_messages")
        upgrade = threading.Thread(target=say, args=[later, "after"])
        upgrade.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
        for number in range(3):
            wait_until(lambda: server.execute(waiting) == [(1,)], "the upgrade to wait")
            say(store, f"beside {number}")
        assert upgrade.is_alive()
    upgrade.join()
    assert later.count_messages("history") == 5
    assert server.execute(f"SELECT max(version) FROM {store.schema_name}.haystack_chat_version") == [(2,)]


def test_a_role_that_may_not_upgrade_is_told_what_to_run(store, server, monkeypatch):
    execute(
        server.url,
        store.create_schema_sql(),
        f"CREATE ROLE {store.schema_name} LOGIN PASSWORD '{PASSWORD}'",
        f"GRANT USAGE ON SCHEMA {store.schema_name} TO {store.schema_name}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {store.schema_name} TO {store.schema_name}",
    )
    upgrade = ["ALTER TABLE {messages} ADD COLUMN IF NOT EXISTS new integer"]
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, upgrade])
    monkeypatch.setattr("haystack_chat_store.stores.postgres.upgrading.MIGRATIONS", schema.MIGRATIONS)
    restricted = store_at(server.url.replace("chat:", f"{store.schema_name}:"), schema_name=store.schema_name)
    with pytest.raises(StoreConfigurationError, match=r"create_schema_sql\(\)"):
        say(restricted, "Hello")
    execute(server.url, restricted.create_schema_sql())
    assert say(restricted, "Hello") == 1
    restricted.close()


@pytest.mark.parametrize("partitions", [None, 3])
def test_the_sql_for_an_administrator_leaves_what_exists_as_it_is(make_store, server, partitions):
    store, searching = make_store(), make_store(search=True)
    execute(server.url, store.create_schema_sql(partitions))
    say(store, "Hello")
    execute(server.url, searching.create_schema_sql(partitions))
    searching.index_messages()
    assert server.execute(f"SELECT version FROM {store.schema_name}.haystack_chat_version") == [(1,)]
    assert [hit.position for hit in searching.search_messages("hello")] == [0]


def test_no_time_in_the_tables_is_infinite(store, server):
    say(store, "Hello")
    for table, column in (("histories", "updated_at"), ("histories", "created_at"), ("messages", "created_at")):
        with pytest.raises(psycopg.errors.CheckViolation):
            server.execute(f"UPDATE {store.schema_name}.haystack_chat_{table} SET {column} = 'infinity'")


def test_a_failed_upgrade_leaves_the_database_as_it_was(make_store, server, monkeypatch):
    store = make_store()
    say(store, "before")
    store.close()
    steps = [["ALTER TABLE {messages} ADD COLUMN new integer", "ALTER TABLE {messages} DROP COLUMN unknown"]]
    with monkeypatch.context() as later:
        later.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, *steps])
        later.setattr("haystack_chat_store.stores.postgres.upgrading.MIGRATIONS", schema.MIGRATIONS)
        with pytest.raises(StoreUnavailableError, match="unknown"):
            say(make_store(), "after")
    assert say(store, "after") == 1
    assert said(store) == ["before", "after"]


def test_a_table_of_another_program_is_refused_and_left(store, server, calls):
    server.execute(f"CREATE SCHEMA {store.schema_name}")
    server.execute(f"CREATE TABLE {store.schema_name}.haystack_chat_version (number integer)")
    with pytest.raises(StoreConfigurationError, match="table_prefix"):
        calls.count(store, "history")
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = %s"
    assert server.execute(tables, [store.schema_name]) == [("haystack_chat_version",)]


def test_tables_that_were_dropped_are_made_again(store, server):
    say(store, "before")
    server.execute(f"DROP SCHEMA {store.schema_name} CASCADE")
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        say(store, "lost")
    assert say(store, "after") == 1
    assert said(store) == ["after"]
