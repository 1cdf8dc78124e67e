# SPDX-License-Identifier: Apache-2.0
"""Balancers that forget idle connections, servers without TLS, and deadlines."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest
from gateways import Gateway
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from lost_answers import FROM_SLOT_TO_SLOT, attempts, begin, both_ways, left, made
from redis_stores import nodes_of, on_a_cluster, on_every_engine, on_every_server, on_one_server, say
from servers import HOST, PASSWORD, RedisCluster, silent_port, wait_until
from stopwatch import Stopwatch

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import StoreConfigurationError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.idle_connections import PROBE_SECONDS
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.stores.redis.connections import servers
from haystack_chat_store.testing.kit import Calls, texts
from haystack_chat_store.testing.messages import with_id


@pytest.fixture(params=["sync", "async"])
def calls(request):
    calls = Calls(is_async=request.param == "async")
    yield calls
    calls.end()


@contextmanager
def announced(cluster, gateways):
    """Have the nodes of a cluster name gateways as their addresses."""

    def announce(ports):
        for node, port in zip(cluster.nodes, ports, strict=True):
            with node.client() as client:
                client.config_set("cluster-announce-port", port)

    def are_named(ports):
        for node in cluster.nodes:
            with node.client() as client:
                if {int(address.rpartition(":")[2]) for address in client.execute_command("CLUSTER NODES")} != ports:
                    return False
        return True

    try:
        announce([gateway.own_port for gateway in gateways])
        wait_until(lambda: are_named({gateway.own_port for gateway in gateways}), "the nodes to know the gateways")
        yield
    finally:
        announce([0 for _ in gateways])
        wait_until(lambda: are_named({node.port for node in cluster.nodes}), "the nodes to know each other")


@pytest.fixture
def gateways(server):
    with ExitStack() as stack:
        gateways = [stack.enter_context(Gateway(node.port)) for node in nodes_of(server)]
        if isinstance(server, RedisCluster):
            stack.enter_context(announced(server, gateways))
        yield gateways


@pytest.fixture
def make_store(server, gateways, make_store, monkeypatch):
    monkeypatch.setenv("CHAT_STORE_URL", f"redis://:{PASSWORD}@{HOST}:{gateways[0].own_port}")
    return make_store


@pytest.fixture
def a_quiet_hour(monkeypatch):
    """Idle connections count as idle for long."""
    monkeypatch.setattr("haystack_chat_store.stores.idle_connections.PROBED_AFTER_SECONDS", 0)


class AtOnce:
    """Makes calls while the servers pause, so that each has a connection of its own."""

    def __init__(self, server, store):
        self._server, self._store = server, store

    def count_messages(self, number):
        with self._paused(), ThreadPoolExecutor(number) as executor:
            list(executor.map(self._store.count_messages, ["history"] * number))

    async def count_messages_async(self, number):
        with self._paused():
            await asyncio.gather(*(self._store.count_messages_async("history") for _ in range(number)))

    @contextmanager
    def _paused(self):
        for node in nodes_of(self._server):
            with node.client() as client:
                client.client_pause(300, all=True)
        yield


@on_every_engine
@pytest.mark.parametrize("timeout", [4, 30])
@pytest.mark.parametrize("first", ["read", "write"])
def test_connections_that_a_gateway_has_forgotten_cost_one_call_a_moment(
    server, gateways, make_store, calls, a_quiet_hour, timeout, first
):
    store = make_store(timeout=timeout)
    calls.write(store, "history", [with_id("a", "before")])
    calls.call(AtOnce(server, store), "count_messages", 6)
    for gateway in gateways:
        gateway.forget()
    with Stopwatch() as seconds:
        if first == "write":
            assert calls.write(store, "history", [with_id("b", "after")]) == 1
        assert texts(calls.retrieve(store, "history"))[0] == "before"
        assert seconds() < PROBE_SECONDS + 1
    with Stopwatch() as seconds:
        for number in range(6):
            assert calls.write(store, "history", [with_id(f"{number}")]) == 1
        calls.call(AtOnce(server, store), "count_messages", 6)
        assert seconds() < PROBE_SECONDS
    calls.close(store)


@on_every_engine
def test_after_one_timeout_no_other_call_gets_a_connection_that_was_idle_as_long(server, gateways, make_store, calls):
    store = make_store(timeout=1)
    calls.write(store, "history", [with_id("a", "before")])
    calls.call(AtOnce(server, store), "count_messages", 4)
    for gateway in gateways:
        gateway.forget()
    with ExitStack() as stack:
        if not isinstance(server, RedisCluster):  # which asks another node in time
            stack.enter_context(pytest.raises(StoreTimeoutError))
        assert calls.count(store, "history") == 1
    with Stopwatch() as seconds:
        assert [calls.count(store, "history") for _ in range(4)] == [1] * 4
        assert seconds() < 0.5
    calls.close(store)


@on_one_server
def test_a_connection_that_is_in_use_all_the_time_is_not_probed(gateways, make_store, calls):
    store = make_store()
    calls.write(store, "history", [with_id("a")])
    sent = []
    gateways[0].is_answered = lambda request: sent.append(request) or True
    for _ in range(5):
        calls.count(store, "history")
    assert len(sent) == 5
    assert not any(b"PING" in request for request in sent)
    calls.close(store)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system names the option otherwise")
@on_one_server
@pytest.mark.parametrize(("options", "expected"), [("", [1, 60, 10, 3]), ("?socket_keepalive=no", [0])])
def test_connections_are_kept_alive_unless_the_url_says_otherwise(make_store, monkeypatch, server, options, expected):
    monkeypatch.setenv("CHAT_STORE_URL", server.url + options)
    store = make_store()

    def found(end):
        found = [end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT) if found[0] else ()
        return found + [end.getsockopt(socket.IPPROTO_TCP, name) for name in names]

    async def use():
        await store.count_messages_async("history")
        ((idle,),) = (await servers.get(store.engine.settings).session_async())._idle.values()
        return found(idle.connection._writer.get_extra_info("socket"))

    say(store, "Hi!")
    ((idle,),) = servers.get(store.engine.settings).session()._idle.values()
    assert found(idle.connection._sock) == expected
    assert asyncio.run(use()) == expected


# ---------------------------------------------------------------------- answers that get lost


@on_every_server
@both_ways(left_out=["index"])
def test_a_change_reports_what_it_did_whichever_answer_was_lost(gateways, make_store, calls, change, is_full):
    lose_each_answer(gateways, make_store, calls, change, is_full=is_full)


@on_a_cluster
@both_ways(left_out=["index"], sync=FROM_SLOT_TO_SLOT, async_=[])
def test_a_change_on_a_cluster_reports_what_it_did(gateways, make_store, calls, change, is_full):
    lose_each_answer(gateways, make_store, calls, change, is_full=is_full)


def lose_each_answer(gateways, make_store, calls, change, *, is_full):
    store = make_store(last_k=None)
    before = begin(calls, store)
    expected = made(calls, store, change), left(calls, store, before)
    for lost in attempts(is_full=is_full):
        store = make_store(last_k=None, namespace=f"{lost}")
        before = begin(calls, store)
        answers = [lost]

        def is_answered(request, answers=answers):
            if b"EVAL" not in request:
                return True
            answers[0] -= 1
            return answers[0] != -1

        for gateway in gateways:
            gateway.is_answered = is_answered
        result = made(calls, store, change)
        for gateway in gateways:
            gateway.is_answered = lambda _: True
        assert (result, left(calls, store, before)) == expected, lost
        if answers[0] >= 0:
            break
    assert 1 <= lost < 900 and answers[0] >= 0
    calls.close(store)


@on_every_engine
@pytest.mark.parametrize("damage", ["damaged", "listed"])
def test_a_repair_reports_what_it_did_whichever_answer_was_lost(gateways, make_store, client, damage, is_full):
    store = make_store(last_k=None)
    keys = store.engine.keys(store.scope)
    directory, counters = keys.of_bucket_of("history").directory, keys.of_history("history").counters

    def damaged():
        if damage == "damaged":
            say(store, "Hi!")
            client.hdel(counters, "preview", "message_count")
        else:
            client.zadd(directory, {"history": 1})

    damaged()
    expected = check(store, repair=True)
    assert all(fault.is_repaired for fault in expected)
    for number in attempts(is_full=is_full):
        lost = 63 + number  # first, each of the 64 buckets is asked for its histories
        damaged()
        answers = [lost]

        def is_answered(request, answers=answers):
            answers[0] -= b"EVAL" in request
            return answers[0] != -1 or b"EVAL" not in request

        for gateway in gateways:
            gateway.is_answered = is_answered
        found = check(store, repair=True)
        for gateway in gateways:
            gateway.is_answered = lambda _: True
        assert found == expected, lost
        assert check(store) == []
        if answers[0] >= 0:
            break
    assert 66 < lost < 900


# ---------------------------------------------------------------------- TLS


@on_one_server
@pytest.mark.parametrize("cluster", [False, True])
def test_tls_to_a_port_without_tls_says_so(server, calls, cluster):
    url = Secret.from_token(f"rediss://:{PASSWORD}@{HOST}:{server.port}")
    store = RedisChatMessageStore(url, timeout=1, cluster=cluster)
    with pytest.raises((StoreUnavailableError, StoreConfigurationError), match="redis:// instead of rediss://"):
        calls.count(store, "history")
    calls.close(store)


# ---------------------------------------------------------------------- deadlines


@on_every_engine
@pytest.mark.parametrize("is_connected", [False, True], ids=["connecting", "connected"])
def test_each_of_a_hundred_calls_hears_after_the_timeout(server, make_store, monkeypatch, is_connected):
    ends = []

    def count():
        with pytest.raises(StoreUnavailableError):
            store.count_messages("history")
        ends.append(seconds())

    async def count_async():
        with pytest.raises(StoreUnavailableError):
            await store.write_messages_async("history", [ChatMessage.from_user("Hi!")])
        ends.append(seconds())

    async def count_all():
        await asyncio.gather(*(count_async() for _ in range(50)))

    with ExitStack() as stack:
        if is_connected:
            store = make_store(timeout=1)
            say(store, "before")
            for node in nodes_of(server):
                client = stack.enter_context(node.client())
                client.client_pause(60_000, all=False)
                stack.callback(client.client_unpause)
        else:
            port = stack.enter_context(silent_port())
            url = Secret.from_token(f"redis://:{PASSWORD}@{HOST}:{port}")
            store = stack.enter_context(
                closing(RedisChatMessageStore(url, timeout=1, cluster=isinstance(server, RedisCluster)))
            )
        executor = stack.enter_context(ThreadPoolExecutor(51))
        seconds = stack.enter_context(Stopwatch())
        waiting = [executor.submit(count) for _ in range(50)]
        waiting.append(executor.submit(asyncio.run, count_all()))
        for call in waiting:
            call.result()
    assert len(ends) == 100
    assert max(ends) < 2
