# SPDX-License-Identifier: Apache-2.0
"""Servers that refuse, fail and come back."""

import asyncio
import os
import threading
import time
import traceback
import uuid
from contextlib import ExitStack
from dataclasses import replace

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from imported import NEW, rows
from postgres_stores import ENGINES, NEWEST, connections_of, execute, said, say, store_at, stores_on
from servers import HOST, PASSWORD, USER, PostgresServer, silent_port, unused_port, wait_until

from haystack_chat_store import ChatMessageStoreError
from haystack_chat_store.errors import StoreConfigurationError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.testing.concurrency import assert_whole_and_in_order, in_threads, planned_batches, to_messages
from haystack_chat_store.testing.kit import Calls, texts
from haystack_chat_store.testing.messages import conversation, with_id


def assert_tells_where_and_no_secret(error, port):
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
    with pytest.raises(StoreConfigurationError, match=r"refused the user name or the password.*: ") as raised:
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


@pytest.mark.parametrize(("timeout", "option", "limit"), [(4, "", 4), (120, "&connect_timeout=2", 2 * 2)])
def test_several_hosts_that_never_answer_share_the_timeout(calls, timeout, option, limit):
    with ExitStack() as stack:
        ports = [str(stack.enter_context(silent_port())) for _ in range(2)]
        hosts = ",".join(f"{HOST}:{port}" for port in ports)
        store = store_at(f"postgresql://{USER}:{PASSWORD}@{hosts}/postgres?sslmode=disable{option}", timeout=timeout)
        began = time.monotonic()
        with pytest.raises(StoreTimeoutError, match="in time") as raised:
            calls.count(store, "history")
        assert time.monotonic() - began < limit + 20
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
    with pytest.raises(StoreConfigurationError) as raised:
        store_at(url).count_messages("history")
    execute(server.url, f"DROP ROLE {role}")
    assert str(raised.value) == (
        f"PostgreSQL at {HOST}, port {server.port}, refused the user name or the password of the connection string: "
        "its message is not repeated here, because it contains the password"
    )


def test_what_psycopg_itself_refuses_is_reported(store, monkeypatch):
    """As it refuses the event loop that is Windows' default."""

    async def refuse(*_, **__):
        raise psycopg.InterfaceError("Psycopg cannot use the 'ProactorEventLoop'")

    monkeypatch.setattr("haystack_chat_store.stores.postgres.connections.conninfo_attempts_async", refuse)
    with pytest.raises(StoreUnavailableError, match="cannot use the 'ProactorEventLoop'"):
        asyncio.run(store.count_messages_async("history"))


def test_a_call_that_waits_too_long_is_given_up_and_leaves_nothing_waiting(server, make_store, calls):
    patient, store = make_store(), make_store(timeout=0.5)
    say(patient, "before")
    with psycopg.connect(server.url) as connection:
        connection.execute(f"LOCK TABLE {store.schema_name}.haystack_chat_histories")
        with pytest.raises(StoreTimeoutError, match=r"0\.5 seconds") as raised:
            calls.write(store, "history", conversation("ua"))
        assert_tells_where_and_no_secret(raised.value, server.port)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: server.execute(waiting) == [(0,)], "the server to give up too")
    assert said(patient) == ["before"]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_call_that_fails_in_the_middle_of_a_transaction_leaves_none_to_the_next(make_store, way):
    store = make_store(min_pool_size=1, max_pool_size=1)
    broken = [replace(row, content="no JSON") for row in rows(0, 1)]

    async def fail_and_write():
        with pytest.raises(ChatMessageStoreError):
            await store.engine.run_async(store.engine.import_history, store.scope, NEW, [rows(0, 1), broken], 0)
        return await store.write_messages_async("history", [ChatMessage.from_user("after")])

    if way == "sync":
        with pytest.raises(ChatMessageStoreError):
            store.engine.run(store.engine.import_history, store.scope, NEW, [rows(0, 1), broken], 0)
        assert say(store, "after") == 1
    else:
        assert asyncio.run(fail_and_write()) == 1
    assert said(make_store(timeout=10)) == ["after"]  # another connection sees it: it has been committed
    assert store.get_chat_history("imported") is None


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_call_waits_for_a_free_connection_no_longer_than_the_timeout(server, make_store, way):
    store = make_store(min_pool_size=0, max_pool_size=1, timeout=2)

    def batches():
        """Yield while the connection is in use, for an import that need not hurry."""
        in_use.set()
        assert failed.wait(60)
        yield rows(0, 1)

    async def import_and_count():
        importing = asyncio.create_task(
            store.engine.run_async(store.engine.import_history, store.scope, NEW, batches(), 0)
        )
        await asyncio.to_thread(in_use.wait)
        with pytest.raises(StoreTimeoutError, match="max_pool_size"):
            await store.count_messages_async("history")
        failed.set()
        assert await importing == 1

    def count():
        assert in_use.wait(60)
        with pytest.raises(StoreTimeoutError, match="max_pool_size"):
            store.count_messages("history")
        failed.set()

    make_store().count_messages("history")  # makes the tables
    in_use, failed = threading.Event(), threading.Event()
    if way == "sync":
        in_threads(lambda: store.engine.run(store.engine.import_history, store.scope, NEW, batches(), 0), count)
    else:
        asyncio.run(import_and_count())
    assert make_store().count_messages("history") == 1


def test_connections_that_were_ended_are_replaced(server, make_store, calls):
    store = make_store(last_k=None)
    for number in range(3):
        assert calls.write(store, "history", [ChatMessage.from_user(str(number))]) == 1
        for pid in connections_of(server, store):
            server.execute("SELECT pg_terminate_backend(%s)", [pid])
        wait_until(lambda: not connections_of(server, store), "connections to end")
    assert texts(calls.retrieve(store, "history")) == ["0", "1", "2"]


@pytest.mark.servers
@pytest.mark.parametrize(
    ("way", "ending"),
    [
        ("sync", "stop"),
        ("async", "kill"),
        pytest.param("sync", "kill", marks=pytest.mark.full),
        pytest.param("async", "stop", marks=pytest.mark.full),
    ],
)
def test_nothing_acknowledged_is_lost_when_the_server_restarts(ending, way):
    """Calls fail with a clear error or succeed; the same store works again by itself."""
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
