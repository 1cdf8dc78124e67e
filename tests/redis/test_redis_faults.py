# SPDX-License-Identifier: Apache-2.0
"""Servers that refuse, connections that break, servers that restart."""

import asyncio
import re
import time
import traceback
from contextlib import ExitStack, closing

import pytest
import redis
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from haystack.utils import Secret
from redis_stores import (
    DOCUMENTATION,
    ENGINES,
    EVERY_SERVER,
    KINDS,
    SECRET,
    LosesAnswers,
    everything,
    key_of,
    nodes_of,
    on_a_cluster,
    on_a_searching_server,
    on_every_engine,
    on_every_server,
    on_one_server,
    said,
    say,
    stores_on,
    writers_at_work,
)
from servers import HOST, PASSWORD, RedisCluster, RedisServer, silent_port, unused_port, wait_until

from haystack_chat_store import ChatMessageStoreError
from haystack_chat_store.errors import StoreConfigurationError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.testing.concurrency import assert_whole_and_in_order, in_threads
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import with_id

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
    with pytest.raises(StoreConfigurationError) as raised:
        write(store, SECRET)
    assert_says(raised.value, f"{HOST}:{port}", "user name or password")
    assert "wrong" not in "".join(map(str, raised.value.args))
    store.close()


class WithoutAuth(RedisServer):
    """A server that does not know how to log in, and quotes what it was sent."""

    def __init__(self, binary):
        super().__init__(binary, requirepass="")

    def _command(self):
        return [*super()._command(), "--rename-command", "AUTH", "ANOTHER"]

    def client(self):
        return redis.Redis(host=HOST, port=self.port, retry=None)


@pytest.mark.servers
@pytest.mark.parametrize("engine", EVERY_SERVER)
@pytest.mark.parametrize("user", ["", "bob"])
@pytest.mark.parametrize("password", [PASSWORD, 100 * PASSWORD], ids=["password", "long"])
def test_a_password_that_the_server_quotes_is_not_repeated(engine, write, user, password):
    with WithoutAuth(ENGINES.get(engine)) as server:
        url = Secret.from_token(f"redis://{user}:{password}@{HOST}:{server.port}")
        with pytest.raises(StoreUnavailableError, match=f"{HOST}:{server.port} failed") as raised:
            write(RedisChatMessageStore(url), SECRET)
    assert_says(raised.value, HOST, "unknown command")


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
redis.call('HSET', KEYS[4], 'next_position', ARGV[1], 'message_count', ARGV[1], 'created_at', 0, 'revision', 1)
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
    with pytest.raises(StoreConfigurationError) as raised:
        say(make_store(), SECRET)
    assert_says(raised.value, f"{HOST}:{server.port}", "permit")


@on_every_server
def test_a_user_with_only_the_documented_rights_can_do_everything(make_store, client, server, monkeypatch):
    (rights,) = re.findall(r"ACL SETUSER chatbot (.*?)\n", DOCUMENTATION)
    store = make_store(ttl=60)
    rights = rights.replace("{haystack_chat:", f"{{{store.key_prefix}:").replace(">password", ">guest-pw")
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


@on_a_searching_server
def test_a_user_with_the_documented_rights_can_search(make_store, client, server, monkeypatch):
    (rights,) = re.findall(r"ACL SETUSER chatbot (.*?)\n", DOCUMENTATION)
    (more,) = re.findall(r"more rights for it: `(~terms.*?)`", DOCUMENTATION)
    store = make_store(search=True, ttl=60)
    rights = f"{rights} {more}".replace("{haystack_chat:", f"{{{store.key_prefix}:").replace(">password", ">guest-pw")
    client.execute_command("ACL SETUSER", "chatbot", "reset", *rights.split())
    monkeypatch.setenv("CHAT_STORE_URL", f"redis://chatbot:guest-pw@{HOST}:{server.port}")
    say(store, "Hi!", "Are you there?")
    store.index_messages()
    assert [hit.snippet for hit in store.search_messages("there")] == ["Are you there?"]
    store.rename_chat_history("history", "other")
    assert [hit.chat_history_id for hit in store.search_messages("there")] == ["other"]
    store.delete_all_messages()
    assert store.search_messages("there") == []


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


@on_one_server
def test_a_store_leaves_a_master_that_has_become_a_replica(make_store, client, server, monkeypatch, write):
    with closing(LosesAnswers(server)) as name, RedisServer(server.binary, requirepass=PASSWORD) as successor:
        monkeypatch.setenv("CHAT_STORE_URL", name.url)
        store = make_store()
        write(store, "Hi!")
        client.config_set("masterauth", PASSWORD)
        client.replicaof(HOST, successor.port)
        name.server = successor
        try:
            assert write(store, "Are you there?") == 1
            assert write(store, "Hello?") == 1
        finally:
            client.replicaof("NO", "ONE")
        assert said(store)[-2:] == ["Are you there?", "Hello?"]
        store.close()


@on_every_server
@pytest.mark.parametrize("at_once", [1, 8])
def test_a_store_leaves_a_demoted_master_for_the_one_that_has_its_address_now(
    make_store, client, server, monkeypatch, at_once
):
    with RedisServer(server.binary, requirepass=PASSWORD) as promoted, closing(LosesAnswers(server)) as proxy:
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        store = make_store(last_k=None)
        client.config_set("masterauth", PASSWORD)

        async def write_all(what):
            writes = (
                store.write_messages_async("history", [ChatMessage.from_user(f"{what} {number}")])
                for number in range(at_once)
            )
            return await asyncio.gather(*writes)

        async def use():
            await write_all("before")
            in_threads(*(lambda: say(store, "before"),) * at_once)
            proxy.server = promoted
            client.replicaof(HOST, promoted.port)
            assert [say(store, "sync") for _ in range(at_once)] == [1] * at_once
            assert await write_all("async") == [1] * at_once

        try:
            asyncio.run(use())
            assert len(said(store)) == 2 * at_once
        finally:
            client.replicaof("NO", "ONE")
            store.close()


@on_every_server
def test_a_store_that_takes_a_server_for_a_cluster_is_told(make_store, write):
    with pytest.raises(StoreConfigurationError, match="not a cluster"):
        write(make_store(cluster=True), "Hi!")


@on_a_cluster
def test_a_store_that_takes_a_cluster_for_a_server_is_told(make_store):
    store = make_store(cluster=False)
    with pytest.raises(StoreConfigurationError, match="cluster=True"):
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


@on_every_server
def test_a_write_whose_answer_was_lost_is_done_once_and_counted(make_store, server, monkeypatch, write):
    with closing(LosesAnswers(server)) as proxy:
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        store = make_store(last_k=None)

        async def use():
            assert await store.write_messages_async("history", [ChatMessage.from_user("Hi!")]) == 1
            proxy.to_lose = 1
            return await store.write_messages_async("history", [with_id("a", "one"), ChatMessage.from_user("two")])

        assert asyncio.run(use()) == 2
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


@on_every_server
@pytest.mark.parametrize("policy", [DuplicatePolicy.SKIP, DuplicatePolicy.FAIL], ids=["skip", "fail"])
def test_a_write_whose_answer_was_lost_is_known_after_many_other_writes(make_store, server, monkeypatch, policy):
    with closing(LosesAnswers(server)) as proxy:
        other = make_store(last_k=None)
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        store = make_store(last_k=None)
        say(store, "Hi!")
        proxy.meanwhile = lambda: [say(other, f"other {number}") for number in range(150)]
        proxy.to_lose = 1
        assert store.write_messages("history", [with_id("a", "one")], policy=policy) == 1
        assert proxy.to_lose == 0
        assert said(store).count("one") == 1
        store.close()


@pytest.mark.servers
@pytest.mark.parametrize("engine", EVERY_SERVER)
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
                wait_until(lambda before=before: len(acknowledged) > before + 20, "the server to be back")
        assert_whole_and_in_order(said(store), writers, acknowledged)
        assert say(store, "afterwards") == 1
