# SPDX-License-Identifier: Apache-2.0
"""What several writers do at once; deleting everything; other isolation levels; SQL for people."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from postgres_stores import DOCUMENTATION, execute, said, say, statements_of, store_at, stores_on
from servers import wait_until

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.testing.concurrency import assert_whole_and_in_order, in_threads, planned_batches, to_messages
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import conversation, with_id

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


def test_a_transaction_that_the_server_ends_because_of_a_deadlock_is_done_again(make_store, server, calls):
    """Another program locks the same two histories the other way round."""
    store = make_store()
    say(store, "Hi", history="a")
    store.create_chat_history("b")
    lock = f"SELECT FROM {store.schema_name}.haystack_chat_histories WHERE chat_history_id = %s FOR UPDATE"
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with psycopg.connect(server.url) as other, ThreadPoolExecutor(1) as executor:
        other.execute("SET deadlock_timeout = '1min'")  # so the transaction of the store is the one that ends
        other.execute(lock, ["b"])
        copied = executor.submit(calls.call, store, "copy_messages", "a", "b")
        wait_until(lambda: server.execute(waiting) == [(1,)], "the copy to wait")
        other.execute(lock, ["a"])
        other.commit()
        assert copied.result() == 1
    assert said(store, "b") == ["Hi"]


# ---------------------------------------------------------------------- writers of the same messages


@pytest.mark.parametrize("partitions", [None, 3])
def test_writers_of_the_same_messages_store_each_once(make_store, server, calls, partitions):
    """All have looked before the first has written."""
    store = make_store(last_k=None)
    execute(server.url, store.create_schema_sql(partitions))

    def write():
        return [calls.write(store, "history", [with_id(f"{n}"), with_id(f"{n + 1}")]) for n in range(30)]

    written = in_threads(*[write] * 6)
    assert sum(map(sum, written)) == store.count_messages("history") == len(said(store)) == 31


@pytest.mark.parametrize("way", ["directly", "behind PgBouncer"])
def test_a_batch_is_stored_whole_or_not_at_all_beside_a_delete(server, pooler, way, is_full):
    """Of its two messages, the history has the first at times when the writer looks, and none when it writes."""
    with stores_on(server.url if way == "directly" else pooler.url) as make:
        writer, deleter = make(last_k=None), make(last_k=None, max_pool_size=2)
        has_written = threading.Event()

        def write():
            try:
                for number in range(400 if is_full else 100):
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
    """Only by hand can they get so."""
    store.write_messages("history", [with_id("a")])
    server.execute(f"DELETE FROM {store.schema_name}.haystack_chat_histories")
    with pytest.raises(StoreUnavailableError, match="unique violation"):
        store.write_messages("history", [with_id("a"), with_id("b")])


# ---------------------------------------------------------------------- first revisions


@pytest.fixture
def held(server, make_store):
    """A store whose statements wait before they insert a history, and a function that lets them go on."""
    store = make_store()
    store.delete_messages("history")  # makes the tables
    waits = f"{store.schema_name}.waits"
    execute(
        server.url,
        f"CREATE FUNCTION {waits}() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_advisory_xact_lock_shared(hashtext(TG_TABLE_SCHEMA)); RETURN NEW; END'",
        f"CREATE TRIGGER waits BEFORE INSERT ON {store.schema_name}.haystack_chat_histories FOR EACH ROW "
        f"WHEN (current_setting('application_name') = 'held') EXECUTE FUNCTION {waits}()",
    )
    held = PostgresChatMessageStore(
        Secret.from_token(f"{server.url}?application_name=held"), schema_name=store.schema_name, last_k=None
    )
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(hashtext(%s))", [store.schema_name])
        yield held, lambda: connection.execute("SELECT pg_advisory_unlock_all()")
    held.close()


def wait_until_a_statement_waits(server):
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'held' AND wait_event_type = 'Lock'"
    wait_until(lambda: server.execute(waiting) == [(1,)], "the statement to wait")


def deletions(server, store):
    return server.execute(f"SELECT deleted_revision FROM {store.schema_name}.haystack_chat_namespaces")


@pytest.mark.parametrize("is_first_deletion", [True, False], ids=["the first deletion", "a later one"])
def test_a_history_that_was_deleted_during_its_first_append_has_greater_revisions(
    store, held, server, calls, is_first_deletion
):
    """The statement has read the revisions of deleted histories before."""
    slow, release = held
    say(store, "once", history="another")
    if not is_first_deletion:
        store.delete_messages("another")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(calls.write, slow, "history", [with_id("slow")])
        wait_until_a_statement_waits(server)
        for number in range(3):
            say(store, f"{number}")
        before = store.get_chat_history("history").revision
        store.delete_messages("history")
        release()
        assert writing.result(timeout=30) == 1
    assert deletions(server, store) == [(before,)]
    assert store.get_chat_history("history").revision > before
    assert store.count_messages("history") == 1


def test_a_history_that_was_made_and_deleted_while_its_first_append_waited_for_it_has_greater_revisions(
    store, server, calls
):
    """The append waits for the transaction that makes the history, because both would have the same key."""
    say(store, "once", history="another")
    statements, key = statements_of(store), history_key(store.scope, "history")
    url = f"{server.url}?application_name=held"
    held = PostgresChatMessageStore(Secret.from_token(url), schema_name=store.schema_name)
    with psycopg.connect(server.url) as other, ThreadPoolExecutor(1) as pool:
        new = {"key": key, "namespace": store.scope.namespace, "id": "history", "user": None, "lifetime": None}
        other.execute(statements["make_history"], new)
        writing = pool.submit(calls.write, held, "history", [with_id("slow")])
        wait_until_a_statement_waits(server)
        grow = f"UPDATE {store.schema_name}.haystack_chat_histories SET revision = 7 WHERE history_key = %s"
        other.execute(grow, [key])
        other.execute(statements["delete_histories"], {"keys": [key], "user": None})
        other.commit()
        assert writing.result(timeout=30) == 1
    held.close()
    assert store.get_chat_history("history").revision > 7


# ---------------------------------------------------------------------- deleting everything


def fill(server, store, histories, messages):
    """Put histories with some messages each into the store's tables, faster than the store could."""
    key, schema_name = "md5('filler' || h)::uuid", store.schema_name
    store.delete_messages("history")  # makes the tables
    server.execute(
        f"INSERT INTO {schema_name}.haystack_chat_histories "
        f"SELECT {key}, 'default', 'filler ' || h, {messages}, {messages}, {messages}, 1 "
        f"FROM generate_series(1, {histories}) h"
    )
    server.execute(
        f"INSERT INTO {schema_name}.haystack_chat_messages SELECT {key}, p, now(), p, 'user', '{{}}', NULL, 1 "
        f"FROM generate_series(1, {histories}) h, generate_series(0, {messages - 1}) p"
    )


@pytest.mark.parametrize("partitions", [None, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize(("histories", "messages"), [(2500, 1), (3, 60_000)], ids=["many", "long"])
def test_everything_is_deleted_in_several_transactions(make_store, server, calls, partitions, histories, messages):
    store, other = make_store(), make_store(namespace="other")
    execute(server.url, store.create_schema_sql(partitions))
    say(other, "stays")
    fill(server, store, histories, messages)
    statement = f"SELECT count(DISTINCT xmax::text) FROM {store.schema_name}.haystack_chat_messages"
    with psycopg.connect(server.url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute(statement)  # sees from now on what is there now, and which transaction has deleted it
        calls.delete_all(store)
        assert connection.execute(statement).fetchone() == (3 + 1,)
    assert said(other) == ["stays"]
    for table in ("histories", "messages"):
        assert server.execute(f"SELECT count(*) FROM {store.schema_name}.haystack_chat_{table}") == [(1,)]


def test_everything_is_deleted_however_long_it_takes(make_store, server):
    """Each step has the timeout to itself."""
    store = make_store(timeout=4)
    fill(server, store, 3000, 1)
    slowly = f"{store.schema_name}.slowly"
    execute(
        server.url,
        f"CREATE FUNCTION {slowly}() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_sleep(0.001); RETURN NULL; END'",
        f"CREATE TRIGGER slowly AFTER DELETE ON {store.schema_name}.haystack_chat_messages "
        f"FOR EACH ROW EXECUTE FUNCTION {slowly}()",
    )
    store.delete_all_messages()
    assert server.execute(f"SELECT count(*) FROM {store.schema_name}.haystack_chat_messages") == [(0,)]


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
        assert server.execute(f"SELECT count(*) FROM {stores[0].schema_name}.haystack_chat_{table}") == [(0,)]


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
