# SPDX-License-Identifier: Apache-2.0
"""
Schema versions.
"""

from contextlib import ExitStack

import pytest
from postgres_stores import said, say

from haystack_chat_store.errors import SchemaVersionError, StoreUnavailableError
from haystack_chat_store.stores.postgres import schema
from haystack_chat_store.testing.messages import conversation
from haystack_chat_store.testing.processes import Program


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
