# SPDX-License-Identifier: Apache-2.0
"""Balancers that forget idle connections, and answers that get lost on the way."""

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psycopg
import pytest
from gateways import Gateway
from haystack.dataclasses import ChatMessage
from lost_answers import attempts, begin, both_ways, left, made
from postgres_stores import BEHIND_PGBOUNCER, DIRECTLY_OR_POOLED, say, stores_on
from servers import wait_until
from stopwatch import Stopwatch

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.idle_connections import PROBE_SECONDS
from haystack_chat_store.stores.postgres import session as sessions
from haystack_chat_store.stores.postgres.connections import pools
from haystack_chat_store.stores.postgres.session import Commit
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import user, with_id


@pytest.fixture
def gateway(server):
    with Gateway(server.port) as gateway:
        yield gateway


@pytest.fixture
def make_store(server, gateway):
    with stores_on(gateway.url(server.url), last_k=None) as make:
        yield make


@pytest.fixture
def a_quiet_hour(monkeypatch):
    """Idle connections count as idle for long."""
    monkeypatch.setattr("haystack_chat_store.stores.idle_connections.PROBED_AFTER_SECONDS", 0)


class AtOnce:
    """Makes calls that wait for each other, so that each has a connection of its own."""

    def __init__(self, server, store):
        self._server, self._store = server, store

    def count_messages(self, number):
        with self._all_waiting(number), ThreadPoolExecutor(number) as executor:
            list(executor.map(self._store.count_messages, ["history"] * number))

    async def count_messages_async(self, number):
        with self._all_waiting(number):
            await asyncio.gather(*(self._store.count_messages_async("history") for _ in range(number)))

    @contextmanager
    def _all_waiting(self, number):
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"

        def let_go():
            wait_until(lambda: self._server.execute(waiting) == [(number,)], "all to wait")
            connection.rollback()

        with psycopg.connect(self._server.url) as connection, ThreadPoolExecutor(1) as executor:
            connection.execute(f"LOCK TABLE {self._store.schema_name}.haystack_chat_histories")
            letting_go = executor.submit(let_go)
            yield
            letting_go.result()


def at_once(server, store, number, calls):
    calls.call(AtOnce(server, store), "count_messages", number)


@pytest.mark.parametrize("timeout", [2, 30])
@pytest.mark.parametrize("first", ["read", "write"])
def test_connections_that_a_gateway_has_forgotten_cost_one_call_a_moment(
    server, gateway, make_store, calls, a_quiet_hour, timeout, first
):
    store = make_store(timeout=timeout)
    calls.write(store, "history", [with_id("a", "before")])
    at_once(server, store, 6, calls)
    gateway.forget()
    with Stopwatch() as seconds:
        if first == "write":
            assert calls.write(store, "history", [with_id("b", "after")]) == 1
        assert texts(calls.retrieve(store, "history"))[0] == "before"
        assert seconds() < min(timeout, PROBE_SECONDS + 1)
    with Stopwatch() as seconds:
        for number in range(6):
            assert calls.write(store, "history", [with_id(f"{number}")]) == 1
        at_once(server, store, 6, calls)
        assert seconds() < PROBE_SECONDS
    calls.close(store)


def test_calls_at_the_same_time_wait_only_for_one_probe(server, gateway, make_store, a_quiet_hour):
    store = make_store()
    say(store, "before")

    async def count():
        return await asyncio.gather(*(store.count_messages_async("history") for _ in range(6)))

    async def use():
        await count()
        gateway.forget()
        with Stopwatch() as seconds:
            assert await count() == [1] * 6
            assert seconds() < 2 * PROBE_SECONDS

    asyncio.run(use())


def test_after_one_timeout_no_other_call_gets_a_connection_that_was_idle_as_long(server, gateway, make_store, calls):
    store = make_store(timeout=1)
    calls.write(store, "history", [with_id("a", "before")])
    at_once(server, store, 4, calls)
    gateway.forget()
    with pytest.raises(StoreTimeoutError):
        calls.count(store, "history")
    assert [calls.count(store, "history") for _ in range(4)] == [1] * 4
    calls.close(store)


def test_a_connection_that_is_in_use_all_the_time_is_not_probed(server, gateway, make_store, calls):
    store = make_store()
    calls.write(store, "history", [with_id("a")])
    probes = []
    gateway.is_answered = lambda request: probes.append(b"SELECT 1" in request) or True
    for _ in range(5):
        calls.count(store, "history")
    assert not any(probes)
    calls.close(store)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system names the option otherwise")
@pytest.mark.parametrize(
    ("options", "expected"), [("", [1, 60, 10, 3]), ("?keepalives_idle=7", [1, 7, 10, 3]), ("?keepalives=0", [0])]
)
def test_connections_are_kept_alive_unless_the_connection_string_says_otherwise(server, options, expected):
    with stores_on(server.url + options) as make:
        store = make()
        say(store, "Hello")
        connection = pools.get(store.engine.settings)._idle.pop()
        with closing(socket.fromfd(connection.pgconn.socket, socket.AF_INET, socket.SOCK_STREAM)) as end:
            found = [end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT) if found[0] else ()
            found += [end.getsockopt(socket.IPPROTO_TCP, name) for name in names]
        connection.close()
    assert found == expected


# ---------------------------------------------------------------------- answers that get lost


class Losing:
    """Loses the next answers that come through a gateway, or those after the next ones."""

    def __init__(self, gateway, times=1, after=0):
        self.times = times
        self._after = after
        gateway.is_answered = self._is_answered

    def _is_answered(self, _):
        if self._after:
            self._after -= 1
            return True
        self.times -= 1
        return self.times < 0


def test_a_read_whose_answer_was_lost_is_tried_once_more(gateway, make_store, calls):
    store = make_store()
    calls.write(store, "history", [with_id("a", "before")])
    for read in (
        lambda: calls.count(store, "history") == 1,
        lambda: len(calls.retrieve(store, "history")) == 1,
        lambda: len(calls.call(store, "list_messages", "history")) == 1,
        lambda: len(calls.call(store, "list_chat_histories").items) == 1,
        lambda: calls.call(store, "get_chat_history", "history").message_count == 1,
        lambda: calls.call(store, "statistics").messages == 1,
    ):
        losing = Losing(gateway)
        assert read()
        assert losing.times < 0
        Losing(gateway, times=2)
        with pytest.raises(StoreUnavailableError, match="closed the connection"):
            read()
        assert read()
    calls.close(store)


def test_a_transaction_that_the_server_has_lost_in_a_crash_was_not_committed(make_store, calls):
    store = make_store()

    async def asked(session):
        session.commit = Commit(2**50, None, ())
        return await session.was_committed(session), await session.fetch("SELECT 1")

    calls.write(store, "history", [user()])
    assert calls.call(store.engine, "run", asked) == (False, [(1,)])


def test_a_server_that_does_not_say_since_when_it_runs_is_used_all_the_same(gateway, make_store, calls, monkeypatch):
    """Whether a commit is made is not known then, if its answer is lost. An append looks for its messages."""
    monkeypatch.setattr(sessions, "SERVER_RUN", "SELECT no_such_function()")
    store, refused = make_store(last_k=None), 0
    calls.write(store, "another", [user()])
    for lost in range(100):
        losing = Losing(gateway, after=lost)
        assert calls.write(store, "history", [user("first"), user("second")]) == 2, lost
        try:
            calls.call(store, "delete_messages", "history")
        except StoreUnavailableError:
            refused += 1
        gateway.is_answered = lambda _: True
        calls.call(store, "delete_messages", "history")
        assert calls.count(store, "history") == 0
        if losing.times > 0:
            break
    assert refused > 0
    calls.close(store)


#: What a server says of a transaction that it got as a copy from another server, under another number.
FAILED_ELSEWHERE = "SELECT 'aborted' WHERE %s::bigint > 0"


@pytest.mark.parametrize("status", [None, FAILED_ELSEWHERE], ids=["of this server", "of another server"])
def test_a_write_that_makes_an_expired_history_anew_is_stored_whichever_answer_was_lost(
    gateway, make_store, calls, monkeypatch, status
):
    if status is not None:
        monkeypatch.setattr(sessions, "STATUS_OF_TRANSACTION", status)
    for lost in range(100):
        store = make_store(namespace=f"{lost}", last_k=None)
        calls.write(make_store(namespace=f"{lost}", ttl=0.01), "history", [user("old")])
        time.sleep(0.02)
        losing = Losing(gateway, after=lost)
        assert calls.write(store, "history", [user("new")]) == 1, lost
        gateway.is_answered = lambda _: True
        assert [message.text for message in calls.retrieve(store, "history")] == ["new"], lost
        if losing.times > 0:
            break
    assert 3 < lost < 99
    calls.close(store)


@pytest.mark.parametrize("way", DIRECTLY_OR_POOLED)
@both_ways()
def test_a_change_reports_what_it_did_whichever_answer_was_lost(server, pooler, calls, change, way, is_full):
    way = pooler if way == BEHIND_PGBOUNCER else server
    with Gateway(way.port) as gateway, stores_on(gateway.url(way.url), last_k=None) as make_store:
        store = make_store(search=True)
        before = begin(calls, store)
        expected = made(calls, store, change), left(calls, store, before)
        for lost in attempts(is_full=is_full):
            store = make_store(search=True, namespace=f"{lost}")
            before = begin(calls, store)
            losing = Losing(gateway, after=lost)
            result = made(calls, store, change)
            gateway.is_answered = lambda _: True
            assert (result, left(calls, store, before)) == expected, lost
            if losing.times > 0:
                break
        assert 1 <= lost < 900 and losing.times > 0
        calls.close(store)


def test_a_repair_reports_what_it_did_whichever_answer_was_lost(server, gateway, make_store):
    store = make_store(search=True)

    def damaged():
        for history in ("history", "another"):
            store.delete_messages(history)
            say(store, "Hi!", history=history)
        server.execute(f"UPDATE {store.schema_name}.haystack_chat_histories SET message_count = 7, round_count = 7")
        server.execute(f"UPDATE {store.schema_name}.haystack_chat_messages SET search_terms = 'another'")

    damaged()
    expected = check(store, repair=True)
    assert len(expected) == 6
    for lost in range(100):
        damaged()
        losing = Losing(gateway, after=lost)
        found = check(store, repair=True)
        gateway.is_answered = lambda _: True
        assert sorted(found, key=str) == sorted(expected, key=str), lost
        assert check(store) == []
        if losing.times > 0:
            break
    assert 20 < lost < 99


@pytest.mark.parametrize("change", ["write", "write without ids", "delete from a message on", "copy"])
def test_a_change_waits_for_its_first_attempt(server, gateway, make_store, calls, change):
    """The connection breaks while the server waits for a lock, and it goes on as if nothing had happened."""
    store = make_store()
    before = begin(calls, store)
    expected = made(calls, store, change), left(calls, store, before)
    store = make_store(namespace="another")
    before = begin(calls, store)
    with psycopg.connect(server.url) as other, ThreadPoolExecutor(1) as executor:
        other.execute(f"SELECT FROM {store.schema_name}.haystack_chat_histories FOR UPDATE")
        made_later = executor.submit(made, calls, store, change)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        with psycopg.connect(server.url, autocommit=True) as watching:
            wait_until(lambda: watching.execute(waiting).fetchone()[0] == 1, "the call waits")
            gateway.cut()
            wait_until(lambda: watching.execute(waiting).fetchone()[0] == 2, "its second attempt waits, too")
        other.commit()
        result = made_later.result()
    assert (result, left(calls, store, before)) == expected
    calls.close(store)


# ---------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("is_connected", [False, True], ids=["connecting", "connected"])
def test_each_of_a_hundred_calls_hears_after_the_timeout(server, gateway, make_store, is_connected):
    store = make_store(timeout=1)
    if is_connected:
        say(store, "before")
    ends = []

    def count():
        with pytest.raises(StoreTimeoutError):
            store.count_messages("history")
        ends.append(seconds())

    async def count_async():
        with pytest.raises(StoreTimeoutError):
            await store.write_messages_async("history", [ChatMessage.from_user("Hi!")])
        ends.append(seconds())

    async def count_all():
        await asyncio.gather(*(count_async() for _ in range(50)))

    with psycopg.connect(server.url) as connection, ThreadPoolExecutor(51) as executor, Stopwatch() as seconds:
        if is_connected:
            connection.execute(f"LOCK TABLE {store.schema_name}.haystack_chat_histories")
        else:
            connection.execute("SELECT pg_advisory_xact_lock(1667785076)")  # taken to make the tables
            gateway.is_answered = lambda _: time.sleep(3)
        calls = [executor.submit(count) for _ in range(50)]
        calls.append(executor.submit(asyncio.run, count_all()))
        for call in calls:
            call.result()
    assert len(ends) == 100
    assert max(ends) < 2
