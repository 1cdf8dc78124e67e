# SPDX-License-Identifier: Apache-2.0
"""Stores on private servers of Redis, Valkey and Redis Cluster, and what tests ask these servers themselves."""

import asyncio
import select
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path

import pytest
import redis
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from servers import HOST, PASSWORD, RedisCluster, redis_binaries, unused_port, wait_until

from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.stores.redis.keys import bucket_of
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.testing.concurrency import planned_batches, to_messages
from haystack_chat_store.testing.kit import texts

# Without any, the fixture says what to install.
ENGINES = redis_binaries()
SERVERS = list(ENGINES) or ["any server"]
CLUSTER = "three masters"
# A server that has the query engine.
SEARCHING = "with RediSearch"

# The fast suite shows on one server what is the same on all; the contract shows on each what could differ.
EVERY_SERVER = [*SERVERS[:1], *(pytest.param(server, marks=pytest.mark.full) for server in SERVERS[1:])]

on_every_engine = pytest.mark.parametrize("server", [*EVERY_SERVER, CLUSTER], indirect=True)
on_every_server = pytest.mark.parametrize("server", EVERY_SERVER, indirect=True)
on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True)
on_the_other_servers = pytest.mark.parametrize("server", SERVERS[1:], indirect=True)
on_a_searching_server = pytest.mark.parametrize("server", [SEARCHING], indirect=True)
on_a_cluster = pytest.mark.parametrize("server", [CLUSTER], indirect=True)


def cases_on_every_engine(names, cases):
    """Of cases that differ in one value of one node, the fast suite shows the first on a cluster."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    left = {(server, case) for server in SERVERS[1:] for case in cases} | {(CLUSTER, case) for case in cases[1:]}
    return pytest.mark.parametrize(
        ("server", *names),
        [
            pytest.param(server, *case, marks=[pytest.mark.full] if (server, case) in left else [])
            for server in [*SERVERS, CLUSTER]
            for case in cases
        ],
        indirect=["server"],
    )


DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "redis.md").read_text(encoding="utf-8")

# Put together, so that it stands in no line of source that a traceback shows.
SECRET = " ".join(["my", "password", "is", "4711"])


@contextmanager
def stores_on(server, **defaults):
    """A function that makes stores on a server, with keys of their own."""
    made = []

    def make(**settings):
        settings = {"key_prefix": key_prefix, "cluster": isinstance(server, RedisCluster), **defaults, **settings}
        made.append(RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"), **settings))
        return made[-1]

    key_prefix = f"test:{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CHAT_STORE_URL", server.url.replace("redis+cluster", "redis"))
        yield make
        for store in made:
            store.close()


def say(store, *said, history="history"):
    return store.write_messages(history, [ChatMessage.from_user(text) for text in said])


def said(store, history="history"):
    return texts(store.retrieve_messages(history, last_k=10**6))


def keys_of(store, client):
    """The keys of a store's histories and of their buckets, without the one that a bucket keeps for ever."""
    return [key for key in all_keys_of(store, client) if not key.endswith("}:deleted_revision")]


def all_keys_of(store, client):
    options = {"target_nodes": "primaries"} if isinstance(client, redis.RedisCluster) else {}
    keys = client.keys(f"*{store.key_prefix}*", **options)
    return sorted(key.decode() for key in keys)


def key_of(store, client, kind):
    """The key of the only history, or its bucket, that ends so."""
    (key,) = (key for key in keys_of(store, client) if key.endswith(f":{kind}"))
    return key


def everything(store, client):
    """All that is stored, to see that something else did not change it."""
    return {key: client.dump(key) for key in keys_of(store, client)}


def clients_of(node):
    with node.client() as client:
        own = client.client_id()
        return [other for other in client.client_list() if int(other["id"]) != own and other["cmd"] != "replconf"]


def nodes_of(server):
    return server.nodes if isinstance(server, RedisCluster) else [server]


class OnRedis:
    @pytest.fixture
    def make_store(self, server):
        with stores_on(server) as make:
            yield make

    @pytest.fixture
    def make_unreachable_store(self, monkeypatch):
        def make(**settings):
            monkeypatch.setenv("NO_SERVER", f"redis://:{PASSWORD}@{HOST}:{unused_port()}")
            return RedisChatMessageStore(Secret.from_env_var("NO_SERVER"), **settings)

        return make

    @pytest.fixture
    def database_state(self, server, make_store):
        store = make_store()

        def state():
            with server.client() as client:
                return everything(store, client)

        return state

    @pytest.fixture(autouse=True)
    def _remember_server(self, server):
        self.server = server

    @contextmanager
    def stalled(self, store):
        with ExitStack() as stack:
            for node in nodes_of(self.server):
                client = stack.enter_context(node.client())
                client.client_pause(60_000, all=False)
                stack.callback(client.client_unpause)
            yield

    def assert_sound(self, store):
        with self.server.client() as client:
            for counters in (key for key in keys_of(store, client) if key.endswith(":history")):
                counted = {name.decode(): int(n) for name, n in client.hgetall(counters).items() if n.isdigit()}
                of_history = counters.removesuffix(":history")
                roles = client.get(f"{of_history}:roles").decode()
                assert counted["next_position"] == len(roles) == client.llen(f"{of_history}:contents")
                assert counted["message_count"] == len(roles) - roles.count("x")
                assert counted["message_count"] == client.hlen(f"{of_history}:message_ids")
                assert counted["round_count"] == roles.count("u")
                assert len(client.get(f"{of_history}:times")) == 18 * len(roles)
            names = [client.zcard(key) for key in keys_of(store, client) if key.endswith("}:names")]
            assert names == [client.zcard(key) for key in keys_of(store, client) if key.endswith("}:histories")]


def neighbours(history):
    """The ids of histories in the same bucket."""
    return (other for number in count() if bucket_of(other := f"another_{number}") == bucket_of(history))


KINDS = ["contents", "roles", "message_ids", "history", "times"]


class LosesAnswers:
    """A proxy that ends a connection instead of passing on the next answer to a script, as often as it is told."""

    def __init__(self, server):
        self.to_lose = 0
        self.meanwhile = lambda: None  # what happens before the client can try again
        self.server = server  # where new connections lead; those that are open stay where they are
        self._listener = socket.create_server((HOST, unused_port()))
        self.url = f"redis://:{PASSWORD}@{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client):
        request = b""
        with client, socket.create_connection((HOST, self.server.port)) as server:
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    if not (data := ready.recv(1 << 20)):
                        return
                    if ready is client:  # one part of a request, perhaps, of several
                        request += data
                        server.sendall(data)
                        continue
                    if b"EVAL" in request and not data.startswith(b"-NOSCRIPT") and self.to_lose:
                        self.to_lose -= 1
                        self.meanwhile()
                        return
                    request = b""
                    client.sendall(data)


@contextmanager
def writers_at_work(store, *tolerated):
    """
    Meanwhile, four threads and four tasks write to one history, also before and after the block.

    :param tolerated: Errors that a write may end with.
    """
    writers = planned_batches(8, 20_000)  # more than they write, also of writes that fail at once
    acknowledged, ends = [], threading.Event()

    def write(batches):
        for batch in takewhile(lambda _: not ends.wait(0.005), batches):
            with suppress(*tolerated):
                assert store.write_messages("history", to_messages(batch)) == len(batch)
                acknowledged.extend(batch)

    async def write_async(batches):
        for batch in takewhile(lambda _: not ends.is_set(), batches):
            await asyncio.sleep(0.005)
            with suppress(*tolerated):
                assert await store.write_messages_async("history", to_messages(batch)) == len(batch)
                acknowledged.extend(batch)

    async def write_all(writers):
        await asyncio.gather(*map(write_async, writers))

    def wait_for_more():
        before = len(acknowledged)
        wait_until(
            lambda: len(acknowledged) > before + 20 or any(each.done() for each in at_work), "messages to be written"
        )

    with ThreadPoolExecutor() as threads:
        at_work = [threads.submit(write, batches) for batches in writers[:4]]
        at_work.append(threads.submit(lambda: asyncio.run(write_all(writers[4:]))))
        try:
            wait_for_more()
            yield writers, acknowledged
            wait_for_more()
        except TimeoutError:
            ended = [repr(each.exception()) for each in at_work if each.done()]
            raise AssertionError(f"Nothing is written any more. These writers have ended: {ended}") from None
        finally:
            ends.set()
        for each in at_work:
            each.result()


class Scripts:
    """The scripts of a call: how many there were, and whether what was to be done before one of them was done."""

    count = 0
    is_done = False


@contextmanager
def before_script(number, history, action):
    """
    Meanwhile, do something before the given one of the scripts, counted from 0.

    :param history: The history whose keys the scripts use that count, or nothing for all scripts.
    """
    run_reporting, scripts = Session.run_reporting, Scripts()

    async def run(session, script, keys, arguments=()):
        if not scripts.is_done and (not history or any(f":{history}:" in key for key in keys)):
            scripts.count += 1
            if scripts.count > number:
                scripts.is_done = True
                action()
        return await run_reporting(session, script, keys, arguments)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Session, "run_reporting", run)
        yield scripts
