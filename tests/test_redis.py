# SPDX-License-Identifier: Apache-2.0
"""
Redis, Valkey and Redis Cluster keep the contract; and what is their own: keys, expiry, servers that fail, a cluster.
"""

import asyncio
import gc
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import combinations, count, islice, takewhile

import pytest
import redis
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from redis.crc import key_slot
from servers import HOST, PASSWORD, RedisCluster, RedisServer, redis_binaries, silent_port, unused_port

from haystack_chat_store import ChatMessageStoreError
from haystack_chat_store.errors import (
    MessageDecodingError,
    SchemaVersionError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.stores.redis.keys import bucket_of
from haystack_chat_store.testing import (
    ChatMessageStoreContract,
    ConcurrencyTest,
    ProcessesTest,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule07WindowsTest,
    Rule13LifecycleTest,
)
from haystack_chat_store.testing.concurrency import (
    HANG_LIMIT,
    assert_whole_and_in_order,
    in_threads,
    planned_batches,
    to_messages,
)
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import with_id
from haystack_chat_store.testing.processes import Program

# Without any, the fixture says what to install.
ENGINES = redis_binaries()
SERVERS = list(ENGINES) or ["any server"]
CLUSTER = "three masters"

on_every_engine = pytest.mark.parametrize("server", [*SERVERS, CLUSTER], indirect=True)
on_every_server = pytest.mark.parametrize("server", SERVERS, indirect=True)
on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True)
on_the_other_servers = pytest.mark.parametrize("server", SERVERS[1:], indirect=True)
on_a_cluster = pytest.mark.parametrize("server", [CLUSTER], indirect=True)

# Put together, so that it stands in no line of source that a traceback shows.
SECRET = " ".join(["my", "password", "is", "4711"])


@pytest.fixture(scope="module")
def server(request):
    with RedisCluster() if request.param == CLUSTER else RedisServer(ENGINES.get(request.param)) as server:
        yield server


@contextmanager
def stores_on(server, **defaults):
    """
    A function that makes stores on a server, with keys of their own.
    """
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


@pytest.fixture
def make_store(server):
    with stores_on(server) as make:
        yield make


@pytest.fixture
def store(make_store):
    return make_store(last_k=None)


@pytest.fixture
def client(server):
    """
    A client that knows nothing of our stores.
    """
    with server.client() as client:
        yield client


@pytest.fixture(params=["sync", "async"])
def write(request):
    def write(store, *said, history="history"):
        messages = [ChatMessage.from_user(text) for text in said]
        if request.param == "sync":
            return store.write_messages(history, messages)
        return asyncio.run(store.write_messages_async(history, messages))

    return write


def say(store, *said, history="history"):
    return store.write_messages(history, [ChatMessage.from_user(text) for text in said])


def said(store, history="history"):
    return texts(store.retrieve_messages(history, last_k=10**6))


def keys_of(store, client):
    options = {"target_nodes": "primaries"} if isinstance(client, redis.RedisCluster) else {}
    keys = client.keys(f"*{store.key_prefix}*", **options)
    return sorted(key.decode() for key in keys)


def key_of(store, client, kind):
    """
    The key of the only history, or its bucket, that ends so.
    """
    (key,) = (key for key in keys_of(store, client) if key.endswith(f":{kind}"))
    return key


def everything(store, client):
    """
    All that is stored, to see that something else did not change it.
    """
    return {key: client.dump(key) for key in keys_of(store, client)}


def wait_until(condition):
    give_up = time.monotonic() + HANG_LIMIT
    while not condition():
        assert time.monotonic() < give_up, "it never came about"
        time.sleep(0.02)


def clients_of(node):
    with node.client() as client:
        own = client.client_id()
        return [other for other in client.client_list() if int(other["id"]) != own and other["cmd"] != "replconf"]


def nodes_of(server):
    return server.nodes if isinstance(server, RedisCluster) else [server]


# ---------------------------------------------------------------------- the contract


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


@on_one_server
class TestServer(OnRedis, ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    pass


@on_the_other_servers
class TestOtherServers(
    OnRedis,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule07WindowsTest,
    Rule13LifecycleTest,
):
    """
    What could depend on the server's make and version.
    """


@on_a_cluster
class TestCluster(OnRedis, ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    @pytest.fixture
    def make_unreachable_store(self, monkeypatch):
        def make(**settings):
            monkeypatch.setenv("NO_SERVER", f"redis://:{PASSWORD}@{HOST}:{unused_port()}")
            return RedisChatMessageStore(Secret.from_env_var("NO_SERVER"), cluster=True, **settings)

        return make


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "setting",
    [
        {"url": "redis://localhost"},
        {"key_prefix": ""},
        {"key_prefix": "a{b"},
        {"key_prefix": "a}b"},
        {"key_prefix": "a\nb"},
        {"key_prefix": None},
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": True},
        {"ttl": "60"},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": None},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        RedisChatMessageStore(**setting)


def test_a_store_loads_where_the_environment_variable_is_missing(monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)
    store = RedisChatMessageStore(cluster=True, key_prefix="my app", ttl=60, timeout=5.5)
    data = store.to_dict()
    assert data["init_parameters"]["url"] == {"type": "env_var", "env_vars": ["REDIS_URL"], "strict": True}
    loaded = RedisChatMessageStore.from_dict(json.loads(json.dumps(data)))
    assert loaded == store
    assert loaded.to_dict() == data
    loaded.close()
    with pytest.raises(StoreUnavailableError, match="REDIS_URL"):
        say(loaded, "Hi!")


def test_a_url_that_is_no_environment_variable_is_never_written_out():
    store = RedisChatMessageStore(Secret.from_token(f"redis://:{PASSWORD}@{HOST}"))
    with pytest.raises(ValueError, match="token"):
        store.to_dict()
    assert PASSWORD not in repr(store)
    assert store == RedisChatMessageStore(Secret.from_token(f"redis://:{PASSWORD}@{HOST}"))


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{PASSWORD}@{HOST}",
        f"redis://:{PASSWORD}@{HOST}?colour=blue",
        # Cut off there, what comes before would be taken for a host and its port.
        f"redis://:{PASSWORD}#?/@{HOST}",
        f"redis://:4711#{PASSWORD}@{HOST}",
        f"redis://user:4711/{PASSWORD}@{HOST}",
        f"redis://user:4711?{PASSWORD}@{HOST}",
    ],
)
def test_a_url_that_cannot_work_is_not_repeated(url, write):
    with pytest.raises(StoreUnavailableError, match="url") as raised:
        write(RedisChatMessageStore(Secret.from_token(url)), "Hi!")
    shown = "".join(traceback.format_exception(raised.value))
    assert PASSWORD not in shown
    assert "4711" not in shown


def test_without_the_driver_the_error_says_what_to_install():
    program = """
import sys
sys.modules["redis"] = None
import haystack_chat_store
from haystack_chat_store.stores.redis import RedisChatMessageStore
try:
    RedisChatMessageStore()
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert 'pip install "haystack-chat-store[redis]"' in output


def test_the_driver_is_not_imported_with_the_package():
    program = "import sys, haystack_chat_store; print('redis' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"


@on_one_server
def test_a_url_may_name_a_database_and_a_socket(server, monkeypatch):
    with RedisServer(server.binary, unixsocket="redis.sock") as local:
        path = local.folder / "redis.sock"
        monkeypatch.setenv("CHAT_STORE_URL", f"unix://:{PASSWORD}@{path}?db=3")
        with closing(RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"))) as store:
            assert say(store, "Hi!") == 1
            with local.client() as client:
                assert set(client.info("keyspace")) == {"db3"}
            local.stop()
            with pytest.raises(StoreUnavailableError, match=re.escape(str(path))):
                say(store, "Hi!")


@on_one_server
def test_a_url_that_changes_is_followed_and_leaves_no_connection_behind(server, monkeypatch):
    def move():
        for database in range(5):
            monkeypatch.setenv("CHAT_STORE_URL", f"redis://:{PASSWORD}@{HOST}:{private.port}/{database}")
            yield
            wait_until(lambda: len(clients_of(private)) <= 1)

    def use():
        for _ in move():
            assert say(store, "Hi!") == 1

    async def use_async():
        for _ in move():
            assert await store.write_messages_async("history", [ChatMessage.from_user("Hi!")]) == 1
            await asyncio.sleep(0.1)  # in which the loop closes what was open

    with RedisServer(server.binary) as private, private.client() as client:
        store = RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"))
        use()
        monkeypatch.delenv("CHAT_STORE_URL")
        store.close()
        wait_until(lambda: not clients_of(private))
        asyncio.run(use_async())
        assert set(client.info("keyspace")) == {"db0", "db1", "db2", "db3", "db4"}
        store.close()


@on_one_server
def test_max_connections_of_the_url_is_kept(server, monkeypatch):
    monkeypatch.setenv("CHAT_STORE_URL", f"{server.url}?max_connections=2")
    before = len(clients_of(server))

    async def count_often(store):
        await asyncio.gather(*(store.count_messages_async("history") for _ in range(50)))
        return len(clients_of(server))

    with closing(RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"))) as store:
        assert asyncio.run(count_often(store)) == before + 2
        in_threads(*(lambda: store.count_messages("history") for _ in range(20)))
        assert len(clients_of(server)) <= before + 2


@on_one_server
def test_a_call_that_finds_no_connection_free_is_given_up(server, monkeypatch):
    monkeypatch.setenv("CHAT_STORE_URL", f"{server.url}?max_connections=1")

    def count():
        with pytest.raises(StoreTimeoutError) as raised:
            store.count_messages("history")
        return str(raised.value)

    async def count_often():
        calls = [store.count_messages_async("history") for _ in range(5)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with (
        closing(RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"), timeout=0.5)) as store,
        server.client() as client,
    ):
        client.client_pause(60_000, all=False)
        try:
            assert "All 1 connections" in "".join(in_threads(count, count, count))
            results = asyncio.run(count_often())
            assert {type(result) for result in results} == {StoreTimeoutError}
            assert "All 1 connections" in "".join(map(str, results))
        finally:
            client.client_unpause()
        assert store.count_messages("history") == 0


# ---------------------------------------------------------------------- keys


@on_every_engine
def test_what_is_kept_can_be_read_by_anyone(store, client):
    store.write_messages("user 456", [with_id("a", "Hi!"), ChatMessage.from_assistant("Hello!")])
    tag = re.match(r"\{.*\}", keys_of(store, client)[0])[0]
    assert tag in [f"{{{store.key_prefix}:default:{bucket}}}" for bucket in range(64)]
    history = f"{tag}:user%20456"
    assert keys_of(store, client) == sorted(
        [f"{tag}:schema_version", f"{tag}:histories", f"{tag}:names"]
        + [f"{history}:{kind}" for kind in ("history", "contents", "roles", "message_ids", "times")]
    )
    contents = [json.loads(content) for content in client.lrange(f"{history}:contents", 0, -1)]
    assert [message["content"] for message in contents] == [[{"text": "Hi!"}], [{"text": "Hello!"}]]
    assert client.get(f"{history}:roles") == b"ua"
    assert client.hget(f"{history}:message_ids", "a") == b"0"
    counters = client.hgetall(f"{history}:history")
    created_at, updated_at = int(counters.pop(b"created_at")), int(counters.pop(b"updated_at"))
    assert abs(created_at / 10**6 - time.time()) < 60
    assert counters == {
        b"next_position": b"2",
        b"message_count": b"2",
        b"round_count": b"1",
        b"chat_history_id": b"user 456",
        b"version": b"2",
    }
    assert client.get(f"{history}:times") == (2 * b"%018d") % (created_at, created_at)
    assert client.zrange(f"{tag}:histories", 0, -1, withscores=True) == [(b"user 456", updated_at)]
    assert client.zrange(f"{tag}:names", 0, -1, withscores=True) == [(b"user 456", 0)]


HOSTILE = [
    "}",
    "{}",
    "{other}",
    "a}:b{",
    ":",
    "a:contents",
    "a",
    "A",
    "a ",
    "%7D",
    "*",
    "a\nb",
    "\u00e4",
    "a\u0308",
    "💬" * 512,
]


@on_every_engine
def test_no_id_can_forge_a_hash_tag_or_another_key(make_store, client):
    stores = [make_store(namespace=namespace[:128]) for namespace in ("default", *HOSTILE)]
    for store in stores:
        for history in HOSTILE:
            assert say(store, f"{store.namespace} {history}", history=history) == 1
    keys = keys_of(stores[0], client)
    assert len([key for key in keys if key.endswith(":contents")]) == len(stores) * len(HOSTILE)
    for key in keys:
        assert re.fullmatch(rf"\{{{stores[0].key_prefix}:[\w.~%-]+:\d+\}}(:[\w.~%-]+){{1,2}}", key, re.ASCII)
        assert key_slot(key.encode()) == key_slot(key[1 : key.index("}")].encode())
    for store in stores:
        assert [said(store, history) for history in HOSTILE] == [[f"{store.namespace} {each}"] for each in HOSTILE]


@on_a_cluster
def test_the_histories_of_a_namespace_spread_over_the_masters(store, server):
    for number in range(200):
        say(store, "Hi!", history=f"user_{number}")
    sizes = []
    for node in server.nodes:
        with node.client() as client:
            sizes.append(len([key for key in client.keys(f"*{store.key_prefix}*") if key.endswith(b":contents")]))
    assert sum(sizes) == 200
    assert min(sizes) > 20


@on_every_engine
def test_deleting_everything_leaves_all_other_keys_alone(make_store, client):
    store, other, longer = make_store(), make_store(namespace="other"), make_store(namespace="default:1")
    for each in (store, other, longer):
        for number in range(150):
            say(each, "Hi!", history=f"user_{number}")
    tag = f"{{{store.key_prefix}:default:7}}"
    foreign = [f"{store.key_prefix}:default:7", f"{tag}:user_1:notes", f"{tag}:mine", f"{{{store.key_prefix}:default}}"]
    for key in foreign:
        client.set(key, "keep me")
    store.delete_all_messages()
    assert [other.count_messages("user_1"), longer.count_messages("user_149")] == [1, 1]
    other.delete_all_messages()
    longer.delete_all_messages()
    assert keys_of(store, client) == sorted(foreign)


@on_one_server
def test_deleting_everything_comes_to_an_end_however_fast_others_write(store, monkeypatch):
    delete_several = RedisChatMessageStore._delete_several
    steps = []

    async def delete_and_write_again(self, session, bucket, histories):
        await delete_several(self, session, bucket, histories)
        steps.append(bucket)
        assert len(steps) < 1000, "it does not come to an end"
        for history in histories:
            say(self, "Hi again!", history=history)

    for history in MANY:
        say(store, "Hi!", history=history)
    monkeypatch.setattr(RedisChatMessageStore, "_delete_several", delete_and_write_again)
    store.delete_all_messages()
    assert [said(store, history) for history in MANY] == [["Hi again!"]] * len(MANY)


def neighbours(history):
    """
    The ids of histories in the same bucket.
    """
    return (other for number in count() if bucket_of(other := f"another_{number}") == bucket_of(history))


@on_one_server
def test_deleting_everything_leaves_nothing_of_a_history_that_is_written_to_meanwhile(store, monkeypatch):
    delete_several = RedisChatMessageStore._delete_several

    async def write_and_delete(self, session, bucket, histories):
        say(self, "meanwhile")
        await delete_several(self, session, bucket, histories)

    for history in islice(neighbours("history"), 150):
        say(store, "Hi!", history=history)
    say(store, "Hi!")
    monkeypatch.setattr(RedisChatMessageStore, "_delete_several", write_and_delete)
    store.delete_all_messages()
    assert said(store) == []


@on_every_engine
def test_each_call_is_one_script_and_one_round_trip(store, client, server):
    def calls():
        counted = {}
        for node in nodes_of(server):
            with node.client() as client:
                for name, stats in client.info("commandstats").items():
                    counted[name] = counted.get(name, 0) + stats["calls"]
        return sum(counted.get(f"cmdstat_{name}", 0) for name in ("evalsha", "eval", "cluster|slots"))

    def use():
        say(store, "Hi!", "Are you there?")
        store.retrieve_messages("history")
        store.retrieve_messages("history", last_k=1)
        store.count_messages("history")
        store.delete_messages("history")

    use()
    before = calls()
    use()
    assert calls() - before == 5


# What a message takes in memory, in bytes, beyond the JSON that it is.
@on_every_server
@pytest.mark.parametrize(("histories", "rounds"), [(1, 5000), (500, 10)])
def test_a_message_takes_little_more_memory_than_its_text(store, client, histories, rounds):
    client.flushall()
    client.config_set("appendfsync", "no")  # or it takes long
    content = 250 * "x"

    def used():
        return client.info("memory")["used_memory"] - client.info("memory").get("used_memory_scripts", 0)

    say(store, "so that the script is known", history="another")
    before = used()
    for history in range(histories):
        for _ in range(rounds):
            turn = [ChatMessage.from_user(content), ChatMessage.from_assistant(content)]
            store.write_messages(f"user_{history}", turn)
    size = len(client.lindex(next(k for k in keys_of(store, client) if k.endswith("user_0:contents")), 0))
    client.config_set("appendfsync", "always")
    assert (used() - before) / (2 * rounds * histories) <= 1.3 * size + 150


# ---------------------------------------------------------------------- expiry


def expiry(store, client):
    """
    When the only history expires, in milliseconds. Its keys and those of its bucket have to agree.
    """
    keys = keys_of(store, client)
    assert len(keys) == 9
    left = client.eval("for i, key in ipairs(KEYS) do KEYS[i] = redis.call('PTTL', key) end return KEYS", 9, *keys)
    assert max(left) - min(left) <= 2  # Redis 6 lets the time pass while a script runs
    expires_at = int(client.hget(key_of(store, client, "history"), "expires_at"))
    assert abs(time.time() * 1000 + left[0] - expires_at) < 1000
    return expires_at


@on_every_engine
def test_a_history_expires_as_a_whole(make_store, client):
    store = make_store(ttl=60)
    store.write_messages("history", [ChatMessage.from_assistant("Hello!")])
    say(store, "Hi!")
    assert abs(expiry(store, client) / 1000 - time.time() - 60) < 20


@on_every_engine
def test_a_write_renews_the_expiry(make_store, client):
    store = make_store(ttl=60)
    store.write_messages("history", [with_id("a")])
    for write in (lambda: say(store, "Hi!"), lambda: store.write_messages("history", [with_id("a")])):
        before = expiry(store, client)
        time.sleep(0.01)
        write()
        assert before < expiry(store, client) < before + 30_000


@on_every_engine
def test_an_expired_history_is_gone_and_its_next_life_begins_empty(make_store, client):
    store = make_store(ttl=0.2)
    assert store.write_messages("history", [with_id("a", "Hi!")]) == 1
    time.sleep(0.3)
    assert said(store) == []
    assert store.count_messages("history") == 0
    assert keys_of(store, client) == []
    assert store.write_messages("history", [with_id("a", "Hi again!")]) == 1
    assert said(store) == ["Hi again!"]


MANY = [f"user_{number}" for number in range(300)]  # some in every bucket


@on_every_engine
def test_expired_histories_leave_the_directory(make_store, client):
    short, long = make_store(ttl=0.2), make_store(ttl=60)
    for history in MANY:
        say(long, "Hi!", history=history)
        say(short, "Hi!", history=f"another {history}")
    time.sleep(0.3)
    for history in MANY:
        say(long, "Hi!", history=history)
    for kind in ("histories", "names", "expiries"):
        assert sum(client.zcard(key) for key in keys_of(long, client) if key.endswith(f"}}:{kind}")) == len(MANY)


@on_every_engine
def test_none_means_never(make_store, client):
    mortal, immortal = make_store(ttl=1), make_store(ttl=None)
    for history in MANY:
        say(immortal, "one", history=history)
    say(mortal, "one", history="lost")
    say(mortal, "one", history="saved")
    say(immortal, "two", history="saved")
    time.sleep(1.1)
    say(immortal, "two", history="lost")  # anew
    for history in MANY:  # writes that look for what has expired
        say(mortal, "one", history=f"another {history}")
    time.sleep(1.1)
    assert [said(immortal, history) for history in ("lost", "saved", MANY[7])] == [["two"], ["one", "two"], ["one"]]
    immortal.delete_all_messages()
    assert [immortal.count_messages(history) for history in ("lost", "saved", MANY[7])] == [0, 0, 0]


@on_every_engine
def test_a_bucket_is_gone_when_all_its_histories_have_expired_or_been_deleted(make_store, client):
    mortal, immortal = make_store(ttl=0.2), make_store(ttl=None)
    first, second = islice(neighbours("history"), 2)

    def fill():
        say(immortal, "Hi!")
        say(mortal, "Hi!", history=first)
        say(mortal, "Hi!", history=second)

    fill()
    immortal.delete_messages("history")
    time.sleep(0.3)
    assert keys_of(immortal, client) == []
    fill()
    time.sleep(0.3)
    immortal.delete_messages("history")
    assert keys_of(immortal, client) == []
    fill()
    time.sleep(0.3)
    say(immortal, "Are you there?")
    (kept,) = (key for key in keys_of(immortal, client) if key.endswith("}:histories"))
    assert client.zrange(kept, 0, -1) == [b"history"]
    immortal.delete_messages("history")
    assert keys_of(immortal, client) == []


@on_every_engine
def test_deleting_everything_finds_histories_that_expire(make_store, client):
    mortal, immortal = make_store(ttl=60), make_store()
    for number in range(100):
        say(mortal, "Hi!", history=f"user_{number}")
        say(immortal, "Hi!", history=f"another_{number}")
    mortal.delete_all_messages()
    assert keys_of(mortal, client) == []


# ---------------------------------------------------------------------- what others did to the keys


@on_every_engine
def test_a_key_that_holds_something_else_is_left_alone(store, client, write):
    say(store, "Hi!")
    for key in keys_of(store, client):
        if key.endswith("}:names"):
            continue  # only the first write to a history needs it
        kept = client.dump(key)
        client.delete(key)
        if key.endswith(("roles", "times", "schema_version")):
            client.rpush(key, "something else")
        else:
            client.set(key, "something else")
        before = everything(store, client)
        with pytest.raises(StoreUnavailableError, match="key_prefix"):
            write(store, SECRET)
        assert everything(store, client) == before
        client.delete(key)
        client.restore(key, 0, kept)
    assert write(store, "Are you there?") == 1
    assert said(store) == ["Hi!", "Are you there?"]


@on_every_engine
def test_a_new_history_is_not_written_where_the_names_are_something_else(store, client, write):
    say(store, "Hi!", history=next(neighbours("history")))
    key = key_of(store, client, "names")
    for version in (1, 2):
        client.set(key_of(store, client, "schema_version"), version)
        client.set(key, "something else")
        before = everything(store, client)
        with pytest.raises(StoreUnavailableError, match="key_prefix"):
            write(store, SECRET)
        assert everything(store, client) == before


KINDS = ["contents", "roles", "message_ids", "history", "times"]


@on_every_engine
@pytest.mark.parametrize("lost", [lost for size in (1, 2, 3, 4) for lost in combinations(KINDS, size)], ids="+".join)
def test_a_history_that_has_lost_keys_is_not_taken_for_a_whole_one(store, client, lost):
    say(store, "Hi!", "Are you there?")
    for kind in lost:
        client.delete(key_of(store, client, kind))
    before = everything(store, client)
    for call in (
        lambda: say(store, "Hello?"),
        lambda: said(store),
        lambda: store.retrieve_messages("history"),
        lambda: store.count_messages("history"),
    ):
        with pytest.raises(StoreUnavailableError, match="noeviction"):
            call()
    assert everything(store, client) == before
    store.delete_messages("history")
    assert say(store, "Hi again!") == 1
    assert said(store) == ["Hi again!"]


@on_every_engine
def test_a_content_that_is_no_message_is_our_error(store, client):
    say(store, "Hi!")
    client.lset(key_of(store, client, "contents"), 0, b"\xff not a message")
    with pytest.raises(MessageDecodingError):
        said(store)


@on_every_engine
def test_histories_of_a_newer_schema_version_are_refused_untouched(store, client):
    say(store, "Hi!")
    client.set(key_of(store, client, "schema_version"), 3)
    before = everything(store, client)
    for call in (
        lambda: say(store, "Are you there?"),
        lambda: said(store),
        lambda: store.retrieve_messages("history", last_k=1),
        lambda: store.count_messages("history"),
        lambda: store.delete_messages("history"),
        store.delete_all_messages,
        store.list_chat_histories,
        lambda: store.update_chat_history("history", title="Hello"),
        lambda: store.list_messages("history"),
        lambda: store.delete_messages("history", message_ids=["a"]),
        lambda: store.copy_messages("history", "another"),
        lambda: store.delete_chat_histories(prefix="h"),
    ):
        with pytest.raises(SchemaVersionError, match="Upgrade"):
            call()
    assert everything(store, client) == before


# ---------------------------------------------------------------------- servers that refuse


def assert_says(error, where, says):
    shown = "".join(traceback.format_exception(error))
    assert where in str(error)
    assert re.search(says, str(error)), str(error)
    assert PASSWORD not in shown
    assert SECRET not in shown


@pytest.mark.parametrize("cluster", [False, True])
def test_an_absent_server_is_named(write, cluster):
    where = f"{HOST}:{unused_port()}"
    store = RedisChatMessageStore(Secret.from_token(f"redis://:{PASSWORD}@{where}"), cluster=cluster)
    with pytest.raises(StoreUnavailableError) as raised:
        write(store, SECRET)
    assert_says(raised.value, where, "cannot be reached")


@pytest.mark.parametrize("cluster", [False, True])
def test_a_server_that_never_answers_is_given_up(write, cluster):
    with silent_port() as port:
        url = Secret.from_token(f"redis://:{PASSWORD}@{HOST}:{port}")
        store = RedisChatMessageStore(url, cluster=cluster, timeout=0.5)
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError) as raised:
            write(store, SECRET)
        assert time.monotonic() - began < 10
    assert_says(raised.value, f"{HOST}:{port}", "cannot be reached" if cluster else "did not answer within 0.5 seconds")
    assert cluster or isinstance(raised.value, StoreTimeoutError)
    store.close()


@on_every_engine
def test_a_stalled_server_is_given_up_and_used_again(make_store, server, write):
    store = make_store(timeout=0.5)
    say(store, "Hi!")
    with ExitStack() as stack:
        for node in nodes_of(server):
            client = stack.enter_context(node.client())
            client.client_pause(60_000, all=False)
            stack.callback(client.client_unpause)
        with pytest.raises(StoreTimeoutError) as raised:
            write(store, SECRET)
    assert_says(raised.value, HOST, "within 0.5 seconds")
    assert write(store, "Are you there?") == 1
    assert said(store) in (["Hi!", "Are you there?"], ["Hi!", SECRET, "Are you there?"])


@on_every_engine
@pytest.mark.parametrize("password", ["", ":wrong@", "nobody:wrong@"])
def test_a_refused_password_is_not_repeated(server, write, password):
    port = nodes_of(server)[0].port
    url = Secret.from_token(f"redis://{password}{HOST}:{port}")
    store = RedisChatMessageStore(url, cluster=isinstance(server, RedisCluster))
    with pytest.raises(StoreUnavailableError) as raised:
        write(store, SECRET)
    assert_says(raised.value, f"{HOST}:{port}", "user name or password")
    assert "wrong" not in "".join(map(str, raised.value.args))
    store.close()


class WithoutAuth(RedisServer):
    """
    A server that does not know how to log in, and quotes what it was sent.
    """

    def __init__(self, binary):
        super().__init__(binary, requirepass="")

    def _command(self):
        return [*super()._command(), "--rename-command", "AUTH", "ANOTHER"]

    def client(self):
        return redis.Redis(host=HOST, port=self.port, retry=None)


@pytest.mark.parametrize("engine", SERVERS)
@pytest.mark.parametrize("user", ["", "bob"])
@pytest.mark.parametrize("password", [PASSWORD, 100 * PASSWORD, "u"], ids=["password", "long", "short"])
def test_a_password_that_the_server_quotes_is_not_repeated(engine, write, user, password):
    with WithoutAuth(ENGINES.get(engine)) as server:
        url = Secret.from_token(f"redis://{user}:{password}@{HOST}:{server.port}")
        with pytest.raises(StoreUnavailableError, match=f"{HOST}:{server.port} failed") as raised:
            write(RedisChatMessageStore(url), SECRET)
    assert_says(raised.value, HOST, "cannot be shown" if password == "u" else "unknown command")  # which has a "u"


def test_a_path_is_not_taken_for_an_answer(write):
    path = "/nowhere/TASKS-OOM-DAMAGED.sock"
    with pytest.raises(StoreUnavailableError) as raised:
        write(RedisChatMessageStore(Secret.from_token(f"unix://{path}")), SECRET)
    assert_says(raised.value, path, "cannot be reached")


FILL = """
local contents, message_ids = {}, {}
for index = 1, 1000 do contents[index], message_ids[2 * index - 1], message_ids[2 * index] = '{}', 0, 0 end
for first = 0, ARGV[1] - 1000, 1000 do
    for index = 1, 1000 do message_ids[2 * index - 1] = first + index end
    redis.call('RPUSH', KEYS[1], unpack(contents))
    redis.call('HSET', KEYS[3], unpack(message_ids))
end
redis.call('SETRANGE', KEYS[2], 0, string.rep('a', ARGV[1]))
redis.call('SETRANGE', KEYS[5], 0, string.rep('0', 18 * ARGV[1]))
redis.call('HSET', KEYS[4], 'next_position', ARGV[1], 'message_count', ARGV[1], 'version', 2, 'created_at', 0)
"""


@on_every_server
def test_a_history_that_is_full_stores_all_or_nothing(make_store, client, write):
    store = make_store(ttl=60)
    say(store, "Hi!")
    keys = [key_of(store, client, kind) for kind in KINDS]
    client.delete(*keys)
    client.eval(FILL, 5, *keys, 58_000)
    client.config_set("proto-max-bulk-len", 1_048_576)  # the times of 58,254 messages
    try:
        with pytest.raises(StoreUnavailableError, match="proto-max-bulk-len"):
            write(store, *255 * [SECRET])
        assert store.count_messages("history") == 58_000  # all of its keys have as many, or it would be refused
        assert write(store, *254 * ["Hi!"]) == 254
    finally:
        client.config_set("proto-max-bulk-len", 512 * 1024 * 1024)
    assert store.count_messages("history") == 58_254


@on_every_engine
def test_a_server_that_is_out_of_memory_stores_all_or_nothing(store, client, server, write):
    say(store, "Hi!")
    before = everything(store, client)
    for node in nodes_of(server):
        with node.client() as each:
            each.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreUnavailableError) as raised:
            write(store, SECRET)
        assert said(store) == ["Hi!"]
        assert everything(store, client) == before
        store.delete_messages("history")  # which makes room
    finally:
        for node in nodes_of(server):
            with node.client() as each:
                each.config_set("maxmemory", 0)
    assert_says(raised.value, HOST, "maxmemory")
    assert write(store, "Hi again!") == 1


@on_every_server
def test_a_user_that_may_too_little_is_told(make_store, client, server, monkeypatch):
    client.acl_setuser("guest", enabled=True, passwords=["+guest-pw"], keys=["*"], categories=["+@all", "-@scripting"])
    monkeypatch.setenv("CHAT_STORE_URL", f"redis://guest:guest-pw@{HOST}:{server.port}")
    with pytest.raises(StoreUnavailableError) as raised:
        say(make_store(), SECRET)
    assert_says(raised.value, f"{HOST}:{server.port}", "permit")


@on_every_server
def test_a_user_with_only_the_documented_rights_can_do_everything(make_store, client, server, monkeypatch):
    with open(os.path.join(os.path.dirname(__file__), "..", "docs", "redis.md")) as page:
        (rights,) = re.findall(r"ACL SETUSER chatbot (.*?)\n", page.read())
    store = make_store(ttl=60)
    rights = rights.replace("{chat:", f"{{{store.key_prefix}:").replace(">password", ">guest-pw")
    client.execute_command("ACL SETUSER", "chatbot", "reset", *rights.split())
    monkeypatch.setenv("CHAT_STORE_URL", f"redis://chatbot:guest-pw@{HOST}:{server.port}")
    say(store, "Hi!")
    say(make_store(ttl=None), "Are you there?")
    assert said(store) == ["Hi!", "Are you there?"]
    assert texts(store.retrieve_messages("history", last_k=1)) == ["Are you there?"]
    assert texts(make_store(last_k_unit="message").retrieve_messages("history", last_k=1)) == ["Are you there?"]
    assert store.count_messages("history") == 2
    store.delete_messages("history")
    say(store, "Hi again!")
    store.delete_all_messages()
    assert store.count_messages("history") == 0


@on_one_server
def test_a_replica_is_not_written_to_and_its_master_takes_over_again(make_store, client, server, write):
    store = make_store()
    say(store, "Hi!")
    with RedisServer(server.binary, requirepass=PASSWORD) as other:
        client.config_set("masterauth", PASSWORD)
        client.replicaof(HOST, other.port)
        try:
            with pytest.raises(StoreUnavailableError) as raised:
                write(store, SECRET)
        finally:
            client.replicaof("NO", "ONE")
    assert_says(raised.value, f"{HOST}:{server.port}", "replica")
    assert write(store, "Hi again!") == 1


@on_every_server
def test_a_store_that_takes_a_server_for_a_cluster_is_told(make_store, write):
    with pytest.raises(StoreUnavailableError, match="no cluster"):
        write(make_store(cluster=True), "Hi!")


@on_a_cluster
def test_a_store_that_takes_a_cluster_for_a_server_is_told(make_store):
    store = make_store(cluster=False)
    with pytest.raises(StoreUnavailableError, match="cluster=True"):
        for number in range(64):
            say(store, "Hi!", history=f"user_{number}")


# ---------------------------------------------------------------------- connections that break, servers that restart


@on_every_engine
def test_scripts_that_the_server_has_forgotten_are_sent_again(store, server, write):
    write(store, "Hi!")
    for node in nodes_of(server):
        with node.client() as client:
            client.script_flush()
    assert write(store, "Are you there?") == 1
    assert said(store) == ["Hi!", "Are you there?"]


@on_every_engine
def test_connections_that_the_server_has_closed_are_replaced(store, server):
    def kill_all():
        for node in nodes_of(server):
            with node.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)

    async def write_often():
        for number in range(5):
            written = await asyncio.gather(
                *(store.write_messages_async("history", [ChatMessage.from_user(f"{number} {n}")]) for n in range(20))
            )
            assert written == [1] * 20
            kill_all()

    asyncio.run(write_often())
    for number in range(5):
        in_threads(*(lambda number=number, n=n: say(store, f"sync {number} {n}") for n in range(20)))
        kill_all()
    assert len(set(said(store))) == store.count_messages("history") == 200


class LosesAnswers:
    """
    A proxy that ends a connection instead of passing on the next answer to a script, as often as it is told.
    """

    def __init__(self, server):
        self.to_lose = 0
        self.meanwhile = lambda: None  # what happens before the client can try again
        self._server = server
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
        with client, socket.create_connection((HOST, self._server.port)) as server:
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


@on_every_server
def test_a_write_whose_answer_was_lost_is_done_once_and_counted(make_store, server, monkeypatch, write):
    with closing(LosesAnswers(server)) as proxy:
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        store = make_store(last_k=None)

        async def use():
            assert await store.write_messages_async("history", [ChatMessage.from_user("Hi!")]) == 1
            proxy.to_lose = 1
            return await store.write_messages_async("history", [with_id("a", "one"), ChatMessage.from_user("two")])

        assert asyncio.run(use()) == 1  # of a message with an id of its own nobody can tell who wrote it
        say(store, "three")
        proxy.to_lose = 1
        assert say(store, "four", "five") == 2
        assert proxy.to_lose == 0
        assert said(store) == ["Hi!", "one", "two", "three", "four", "five"]
        proxy.to_lose = 2
        with pytest.raises(StoreUnavailableError, match="closed the connection"):
            say(store, "six")
        assert said(store)[-1] == "six"
        store.close()


@contextmanager
def writers_at_work(store, *tolerated):
    """
    Meanwhile, four threads and four tasks write to one history; at the end, see what has become of it.

    :param tolerated: Errors that a write may end with.
    """
    writers = planned_batches(8, 5000)
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

    with ThreadPoolExecutor() as threads:
        at_work = [threads.submit(write, batches) for batches in writers[:4]]
        at_work.append(threads.submit(lambda: asyncio.run(write_all(writers[4:]))))
        try:
            time.sleep(0.3)
            yield writers, acknowledged
            time.sleep(0.3)
        finally:
            ends.set()
        for each in at_work:
            each.result()


@pytest.mark.parametrize("engine", SERVERS)
@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_a_server_that_restarts_while_others_write_loses_nothing_acknowledged(engine, ending):
    with RedisServer(ENGINES.get(engine)) as server, stores_on(server) as make_store:
        store = make_store()
        with writers_at_work(store, ChatMessageStoreError) as (writers, acknowledged):
            for _ in range(3):
                before = len(acknowledged)
                getattr(server, ending)()
                time.sleep(0.1)
                server.start()
                wait_until(lambda before=before: len(acknowledged) > before + 20)
        assert_whole_and_in_order(said(store), writers, acknowledged)
        assert say(store, "afterwards") == 1


# ---------------------------------------------------------------------- a cluster that changes


@pytest.fixture(scope="module")
def cluster():
    with RedisCluster(replicas=1) as cluster:
        yield cluster


def home_of(store, cluster):
    """
    Which of the cluster's nodes has the only history.
    """
    with cluster.client() as client:
        port = client.get_node_from_key(key_of(store, client, "contents")).port
    return next(number for number, node in enumerate(cluster.nodes) if node.port == port)


def test_a_failover_is_waited_for_and_nothing_is_lost(cluster):
    with stores_on(cluster) as make_store:
        store = make_store()
        with writers_at_work(store) as (writers, acknowledged):
            cluster.failover(home_of(store, cluster))
            before = len(acknowledged)
        assert len(acknowledged) > before
        assert_whole_and_in_order(said(store), writers, acknowledged)


def test_a_master_that_dies_is_waited_for(cluster):
    """
    Redis replicates after it has answered. So the end may be lost of what was acknowledged, but no half batch.
    """
    with stores_on(cluster) as make_store:
        store = make_store()
        with writers_at_work(store) as (writers, acknowledged):
            home = home_of(store, cluster)
            cluster.nodes[home].kill()
            before = len(acknowledged)
            wait_until(lambda: len(acknowledged) > before + 20)
        found = said(store)
        assert_whole_and_in_order(found, writers, acknowledged[before:])
        assert len(found) > before
        cluster.start_node(home)
        assert said(store) == found


def test_a_master_that_hangs_is_waited_for(cluster, write):
    """
    Its machine has lost its power, or the network to it: connections stay open, and nothing ever answers.
    """
    with stores_on(cluster, timeout=20) as make_store:
        store = make_store(last_k=None)
        write(store, "Hi!")
        hanging = cluster.nodes[home_of(store, cluster)]
        os.kill(hanging._process.pid, signal.SIGSTOP)
        try:
            assert write(store, "Are you there?") == 1
            assert said(store) == ["Hi!", "Are you there?"]
        finally:
            os.kill(hanging._process.pid, signal.SIGCONT)
            cluster.wait_until_ok()
        assert write(store, "Hello!") == 1
        assert said(store) == ["Hi!", "Are you there?", "Hello!"]


@on_a_cluster
def test_a_slot_that_moves_to_another_node_is_followed(store, server, client):
    say(store, "Hi!")
    key = key_of(store, client, "contents")
    slot = key_slot(key.encode())
    home = client.get_node_from_key(key).port
    source = next(node for node in server.nodes if node.port == home)
    target = next(node for node in server.nodes if node.port != home)
    with source.client() as at_source, target.client() as at_target:
        ids = {node.port: at.execute_command("CLUSTER MYID") for node, at in ((source, at_source), (target, at_target))}
        ids = {port: node_id.decode() for port, node_id in ids.items()}
        at_target.script_flush()
        at_target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source.port])
        at_source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target.port])
        keys = at_source.execute_command("CLUSTER GETKEYSINSLOT", slot, 100)
        at_source.execute_command("MIGRATE", HOST, target.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *keys)
        assert said(store) == ["Hi!"]
        assert asyncio.run(store.count_messages_async("history")) == 1

        def finish():
            time.sleep(0.5)  # meanwhile a write, which may need keys that are not there yet, has to wait
            for at in (at_target, at_source):
                at.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target.port])

        in_threads(finish, lambda: say(store, "while it moves"))
    assert say(store, "at its new place") == 1
    assert asyncio.run(store.count_messages_async("history")) == 3
    server.wait_until_ok()


# ---------------------------------------------------------------------- event loops and forks


@on_every_engine
def test_a_loop_that_was_closed_without_cleaning_up_leaves_nothing_open(store, server):
    def open_connections():
        gc.collect()
        return sum(len(clients_of(node)) for node in nodes_of(server))

    before = open_connections()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(store.write_messages_async("history", [ChatMessage.from_user("Hi!")]))
            loop.close()
        store.close()
        wait_until(lambda: open_connections() <= before)
    assert store.count_messages("history") == 5


@on_every_engine
@pytest.mark.parametrize("way", ["close", "close_async", "left to asyncio.run"])
def test_the_connections_of_a_loop_are_closed(store, server, way):
    def open_connections():
        return sum(len(clients_of(node)) for node in nodes_of(server))

    async def use():
        for _ in range(3):
            await asyncio.gather(*(store.count_messages_async(f"history {number}") for number in range(10)))
            assert open_connections() > before
            if way == "close":
                store.close()
            elif way == "close_async":
                await store.close_async()
            else:
                return
            await asyncio.to_thread(wait_until, lambda: open_connections() <= before)

    before = open_connections()
    asyncio.run(use())
    wait_until(lambda: open_connections() <= before)


def test_connections_that_keep_their_streams_elsewhere_do_no_harm():
    async def use():
        session = await RedisChatMessageStore(Secret.from_token("redis://"))._server().session_async()
        session._abandon(object())  # of another version of redis-py

    asyncio.run(use())


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
        await asyncio.gather(*(store.count_messages_async("history") for _ in range(5)))
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
        await asyncio.gather(*waiting)
        status = await asyncio.to_thread(os.waitpid, child, 0)
        report(status[1])
        await store.write_messages_async("history", [ChatMessage.from_user("the parent")])

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
@on_every_engine
def test_a_fork_does_not_disturb_calls_under_way_in_a_loop(store, server):
    with ExitStack() as stack:
        clients = [stack.enter_context(node.client()) for node in nodes_of(server)]
        program = stack.enter_context(Program(fork_while_a_loop_waits, store))
        program.begin()
        reports = program.reports()
        assert next(reports) == "is connected"
        for client in clients:
            client.client_pause(60_000, all=False)
        program.tell("write")
        time.sleep(0.3)
        program.tell("fork")
        assert next(reports) == "forked"
        time.sleep(0.3)
        for client in clients:
            client.client_unpause()
        assert next(reports) == 0
        assert list(reports) == []
        assert program.exit_code() == 0
    assert sorted(said(store)) == sorted([*map(str, range(5)), "the parent", "the child", "the child awaits"])
