# SPDX-License-Identifier: Apache-2.0
"""
A PostgreSQL database of schema version 1 becomes one of version 2: in place, once, by whoever may, and beside writers.
"""

import threading
from contextlib import ExitStack

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from postgres_stores import NEWEST_AND_OLDEST, execute, said, say, store_at
from servers import PASSWORD, wait_until

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.testing.messages import with_id
from haystack_chat_store.testing.processes import Program

VERSIONS = NEWEST_AND_OLDEST

VERSION_1 = [
    """
    CREATE TABLE {0}.chat_histories (
        history_key uuid PRIMARY KEY, namespace text NOT NULL, chat_history_id text NOT NULL,
        next_position bigint NOT NULL, message_count bigint NOT NULL, round_count bigint NOT NULL,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        title text, meta json
    ) {1}
    """,
    """
    CREATE TABLE {0}.chat_messages (
        history_key uuid NOT NULL, position bigint NOT NULL, created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        message_id text NOT NULL, role text NOT NULL, content json NOT NULL, PRIMARY KEY (history_key, position)
    ) {1}
    """,
    "CREATE UNIQUE INDEX chat_messages_by_id ON {0}.chat_messages (history_key, message_id)",
    "CREATE INDEX chat_messages_from_user ON {0}.chat_messages (history_key, position) WHERE role = 'user'",
    'CREATE INDEX chat_histories_by_id ON {0}.chat_histories (namespace, chat_history_id COLLATE "C")',
    "CREATE TABLE {0}.chat_version (version integer NOT NULL)",
    "INSERT INTO {0}.chat_version VALUES (1)",
]
PARTITION = "CREATE TABLE {0}.chat_{1}_{2} PARTITION OF {0}.chat_{1} FOR VALUES WITH (MODULUS 2, REMAINDER {2})"
# What version 1 says to append.
APPEND_1 = """
    WITH history AS (
        INSERT INTO {0}.chat_histories AS h
            (history_key, namespace, chat_history_id, next_position, message_count, round_count)
        VALUES (%(key)s, 'default', %(id)s, 1, 1, 1)
        ON CONFLICT (history_key) DO UPDATE SET next_position = h.next_position + 1,
            message_count = h.message_count + 1, round_count = h.round_count + 1, updated_at = excluded.updated_at
        RETURNING next_position - 1 AS start
    )
    INSERT INTO {0}.chat_messages (history_key, position, message_id, role, content)
    SELECT %(key)s, start, %(message_id)s, 'user', %(content)s::json FROM history
"""
CONTENT = '{{"role": "user", "meta": {{"chat_message_id": "{0}"}}, "name": null, "content": [{{"text": "{1}"}}]}}'


def append_in_version_1(url, store, history, message_id, text):
    key = PostgresChatMessageStore()._history_key(history)
    parameters = {"key": key, "id": history, "message_id": message_id, "content": CONTENT.format(message_id, text)}
    with psycopg.connect(url) as connection:
        connection.execute(APPEND_1.format(store.schema_name), parameters)


def make_version_1(server, store, partitions=False):
    """
    Three histories of three messages each.
    """
    execute(server.url, f"CREATE SCHEMA {store.schema_name}")
    for statement in VERSION_1:
        partitioned = "PARTITION BY HASH (history_key)" if partitions else ""
        execute(server.url, statement.format(store.schema_name, partitioned))
    for table in ("histories", "messages") if partitions else ():
        execute(server.url, *(PARTITION.format(store.schema_name, table, part) for part in range(2)))
    for history in ("old 1", "old 2", "old 3"):
        for number in range(3):
            append_in_version_1(server.url, store, history, f"{number}", f"message {number} of {history}")


def versions(server, store):
    return server.execute(f"SELECT version FROM {store.schema_name}.chat_version ORDER BY 1")


@pytest.mark.parametrize("partitions", [False, True], ids=["whole", "partitioned"])
def test_what_version_1_has_written_is_there_listed_and_found(server, make_store, partitions):
    store = make_store(search=True)
    make_version_1(server, store, partitions)
    assert said(store, "old 2") == [f"message {number} of old 2" for number in range(3)]
    assert versions(server, store) == [(1,), (2,)]
    listed = store.list_chat_histories().items
    assert [(info.chat_history_id, info.message_count) for info in listed] == [
        ("old 3", 3),
        ("old 2", 3),
        ("old 1", 3),
    ]
    assert [hit.message_id for hit in store.search_messages('"message 1 of old 3"')] == ["1"]
    assert store.write_messages("old 1", [with_id("2"), with_id("3")]) == 1
    assert store.list_chat_histories(limit=1).items[0].chat_history_id == "old 1"


def write_and_list(store, report, number):
    from haystack.dataclasses import ChatMessage

    store.write_messages("old 1", [ChatMessage.from_user(f"new {number}")])
    report(len(store.list_chat_histories().items))
    report(len(store.search_messages("message old")))


def test_many_processes_upgrade_once(server, make_store):
    store = make_store(search=True)
    make_version_1(server, store)
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(write_and_list, store, number)) for number in range(6)]
        Program.begin(*programs)
        assert [program.reports_to_the_end() for program in programs] == [[3, 9]] * 6
    assert versions(server, store) == [(1,), (2,)]
    assert sorted(said(store, "old 1")[3:]) == [f"new {number}" for number in range(6)]


def test_processes_of_version_1_go_on_beside_it_and_are_found(server, make_store):
    store = make_store(search=True)
    make_version_1(server, store)
    assert len(store.search_messages("message")) == 9
    append_in_version_1(server.url, store, "old 1", "late", "a late message")
    assert [hit.message_id for hit in store.search_messages("late message")] == ["late"]
    store.write_messages("old 1", [with_id("late"), with_id("later")])
    assert store.count_messages("old 1") == 5


def test_an_upgrade_keeps_no_writer_waiting_while_it_waits_itself(server, make_store):
    store = make_store()
    make_version_1(server, store)
    with psycopg.connect(server.url) as reader:
        reader.execute(f"SELECT FROM {store.schema_name}.chat_messages")
        upgrade = threading.Thread(target=store.count_messages, args=["old 1"])
        upgrade.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
        for number in range(3):
            wait_until(lambda: server.execute(waiting) == [(1,)], "the upgrade to wait")
            append_in_version_1(server.url, store, "old 1", f"beside {number}", "beside it")
        assert upgrade.is_alive()
    upgrade.join()
    assert store.count_messages("old 1") == 6
    assert versions(server, store) == [(1,), (2,)]


def test_a_role_that_may_not_upgrade_is_told_what_to_run(server, make_store):
    database = server.create_database()
    role = f"chatbot_{make_store().schema_name}"
    store = make_store()
    execute(database, f"CREATE SCHEMA {store.schema_name}")
    execute(database, *(statement.format(store.schema_name, "") for statement in VERSION_1))
    execute(
        database,
        f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'",
        f"GRANT USAGE ON SCHEMA {store.schema_name} TO {role}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {store.schema_name} TO {role}",
    )
    restricted = store_at(database.replace("chat:", f"{role}:"), schema_name=store.schema_name)
    with pytest.raises(StoreUnavailableError, match=r"create_schema_sql\(from_version=1\)"):
        say(restricted, "Hello")
    execute(database, restricted.create_schema_sql(from_version=1))
    assert say(restricted, "Hello") == 1

    searching = store_at(
        database.replace("chat:", f"{role}:"), schema_name=store.schema_name, search=True, table_prefix="chat"
    )
    restricted.close()
    with pytest.raises(StoreUnavailableError, match=r"create_schema_sql\(from_version=2\)"):
        searching.search_messages("Hello")
    execute(database, searching.create_schema_sql(from_version=2))
    searching.write_messages("history", [ChatMessage.from_user("Good evening")])
    assert len(searching.search_messages("evening")) == len(searching.search_messages("Hello")) == 1
    searching.close()
    server.drop_database(database)
    execute(server.url, f"DROP ROLE {role}")


@pytest.mark.parametrize("from_version", [-1, 3, True, "1", None])
def test_a_version_that_there_is_not_is_refused(from_version):
    with pytest.raises(ValueError, match="from_version must be a number from 0 to 2"):
        PostgresChatMessageStore().create_schema_sql(from_version=from_version)


def test_tables_that_are_there_are_not_partitioned():
    with pytest.raises(ValueError, match="not both"):
        PostgresChatMessageStore().create_schema_sql(4, from_version=1)
