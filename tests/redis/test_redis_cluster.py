# SPDX-License-Identifier: Apache-2.0
"""A Redis Cluster that changes while it is used."""

import asyncio
import os
import signal
import time
from contextlib import ExitStack

import pytest
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis_stores import key_of, keys_of, neighbours, on_a_cluster, said, say, stores_on, writers_at_work
from servers import HOST, PASSWORD, RedisCluster, RedisServer, wait_until

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import StoreConfigurationError
from haystack_chat_store.stores.redis.connections import servers
from haystack_chat_store.stores.redis.failures import Address
from haystack_chat_store.stores.redis.scripts.messages import COUNT
from haystack_chat_store.stores.redis.sync_session import SyncSession
from haystack_chat_store.stores.sync_async import run_sync
from haystack_chat_store.testing.concurrency import assert_whole_and_in_order, in_threads


@pytest.fixture(scope="module")
def cluster():
    with RedisCluster(replicas=1) as cluster:
        yield cluster


def home_of(store, cluster):
    """Which of the cluster's nodes has the only history."""
    with cluster.client() as client:
        port = client.get_node_from_key(key_of(store, client, "contents")).port
    return next(number for number, node in enumerate(cluster.nodes) if node.port == port)


def test_a_failover_is_waited_for_and_nothing_is_lost(cluster):
    with stores_on(cluster) as make_store:
        store = make_store()
        with writers_at_work(store) as (writers, acknowledged):
            cluster.failover(home_of(store, cluster))
        assert_whole_and_in_order(said(store), writers, acknowledged)


def test_a_master_that_dies_is_waited_for(cluster):
    """Redis replicates after it has answered. So the end may be lost of what was acknowledged, but no half batch."""
    with stores_on(cluster) as make_store:
        store = make_store()
        with writers_at_work(store) as (writers, acknowledged):
            home = home_of(store, cluster)
            cluster.nodes[home].kill()
            before = len(acknowledged)
            wait_until(lambda: len(acknowledged) > before + 20, "a new master")
        found = said(store)
        assert_whole_and_in_order(found, writers, acknowledged[before:])
        assert len(found) > before
        cluster.start_node(home)
        assert said(store) == found


def test_a_master_that_hangs_is_waited_for(cluster, write):
    """Its machine has lost its power, or the network to it: connections stay open, and nothing ever answers."""
    with stores_on(cluster, timeout=20) as make_store:
        store = make_store(last_k=None)
        write(store, "Hi!")
        hanging = cluster.nodes[home_of(store, cluster)]
        with hanging.client() as client:
            assert client.wait(1, 10_000) >= 1  # the replica has it, which Redis does not wait for when it answers
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

        async def count_many():
            return await asyncio.gather(*(store.count_messages_async("history") for _ in range(40)))

        assert asyncio.run(count_many()) == 40 * [1]

        def finish():
            time.sleep(0.5)  # meanwhile a write, which may need keys that are not there yet, has to wait
            for at in (at_target, at_source):
                at.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target.port])

        in_threads(finish, lambda: say(store, "while it moves"))
    assert say(store, "at its new place") == 1
    assert asyncio.run(store.count_messages_async("history")) == 3
    server.wait_until_ok()


class MovingSlot:
    """A slot that begins to move from its node to another one."""

    def __init__(self, server, client, key):
        self._slot, home = key_slot(key.encode()), client.get_node_from_key(key).port
        self._source = next(node for node in server.nodes if node.port == home)
        self._target = next(node for node in server.nodes if node.port != home)

    def __enter__(self):
        with ExitStack() as clients:
            self._at = [clients.enter_context(node.client()) for node in (self._source, self._target)]
            source_id, self._target_id = (at.execute_command("CLUSTER MYID").decode() for at in self._at)
            self._at[1].execute_command("CLUSTER SETSLOT", self._slot, "IMPORTING", source_id)
            self._at[0].execute_command("CLUSTER SETSLOT", self._slot, "MIGRATING", self._target_id)
            self._clients = clients.pop_all()
        return self

    def __exit__(self, *_):
        self._clients.close()

    def keys(self):
        return self._at[0].execute_command("CLUSTER GETKEYSINSLOT", self._slot, 100)

    def move(self, keys):
        to_target = HOST, self._target.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS"
        self._at[0].execute_command("MIGRATE", *to_target, *keys)

    def end(self):
        for at in reversed(self._at):
            at.execute_command("CLUSTER SETSLOT", self._slot, "NODE", self._target_id)


@on_a_cluster
def test_a_slot_that_is_about_to_move_is_waited_for(make_store, server, client):
    """All keys that scripts declare are still at the old node. Further ones may be at the new one."""
    store = make_store(user_id="ada", ttl=60, last_k=None)
    say(store, "Hi!")
    key = key_of(store, client, "contents")
    with MovingSlot(server, client, key) as slot:

        def finish():
            time.sleep(0.5)
            slot.move(slot.keys())
            slot.end()

        in_threads(finish, lambda: say(store, "while it moves"), store.list_chat_histories)
    assert said(store) == ["Hi!", "while it moves"]
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["history"]
    server.wait_until_ok()


@on_a_cluster
def test_a_slot_that_has_moved_but_for_the_directory_of_a_user_is_waited_for(make_store, server, client, monkeypatch):
    """All keys that scripts declare are at the new node. Further ones are still at the old one."""
    store = make_store(user_id="ada", ttl=60, last_k=None)
    say(store, "Hi!")
    say(store, "Hello!", history=next(neighbours("history")))
    key = next(each for each in keys_of(store, client) if each.endswith(":history:contents"))
    with MovingSlot(server, client, key) as slot:
        keys = slot.keys()
        slot.move(each for each in keys if "users::" not in each)

        known = []

        async def finish(session):
            known.append(session._nodes.slots is not None)
            monkeypatch.undo()
            slot.move(each for each in keys if "users::" in each)
            slot.end()

        monkeypatch.setattr(SyncSession, "pause", finish)
        say(store, "while it moves")
    assert known == [True]  # and not discovered anew at each attempt
    assert said(store) == ["Hi!", "while it moves"]
    assert len(store.list_chat_histories().items) == 2
    server.wait_until_ok()


@on_a_cluster
def test_a_redirected_script_has_not_run_before(store, server, client):
    say(store, "Hi!")
    keys = store.engine.keys(store.scope).to_read("history")
    nodes, session = client.get_primaries(), servers.get(store.engine.settings).session()
    wrong = next(node for node in nodes if node.port != client.get_node_from_key(keys[0]).port)
    session._nodes.slots = [Address(HOST, wrong.port)] * REDIS_CLUSTER_HASH_SLOTS  # as before the slot has moved
    assert run_sync(session.run_reporting(COUNT, keys, [""])) == (1, False)
    assert session._nodes.slots is None


class OneNode(RedisCluster):
    masters = 1


def test_a_master_that_joins_is_asked_for_namespaces_at_once():
    options = {"cluster_enabled": "yes", "cluster_node_timeout": 2000}
    with OneNode() as cluster, RedisServer(**options) as new, stores_on(cluster) as make_store:
        store = make_store(namespace="moves")
        say(store, "Hi!")
        assert store.list_namespaces() == ["moves"]
        with cluster.nodes[0].client() as at_source, new.client() as at_target:
            new_id = at_target.execute_command("CLUSTER MYID").decode()
            at_target.execute_command("CLUSTER MEET", HOST, cluster.nodes[0].port)
            wait_until(lambda: at_target.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the node to join")
            keys = at_source.keys("*")
            (slot,) = {key_slot(key) for key in keys}
            source_id = at_source.execute_command("CLUSTER MYID").decode()
            at_target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
            at_source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", new_id)
            at_source.execute_command("MIGRATE", HOST, new.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *keys)
            for at in (at_target, at_source):
                at.execute_command("CLUSTER SETSLOT", slot, "NODE", new_id)
        assert store.list_namespaces() == ["moves"]
        assert said(store) == ["Hi!"]


def test_a_cluster_behind_one_address_needs_no_setting():
    """As with a proxy that knows the nodes, or an endpoint of one node. Only the server knows its slots then."""
    with OneNode() as cluster, stores_on(cluster, cluster=False) as make_store:
        store = make_store()
        for number in range(5):
            old, new = f"chat {number}", f"renamed {number}"
            store.create_chat_history(old, user_id="ada", title="Title")
            say(store, "question", history=old)
            store.copy_messages(old, f"{old}~1", meta={"branch_of": old})
            store.rename_chat_history(old, new)
            assert store.update_chat_history(new, user_id="bob").title == "Title"
            found = store.list_chat_histories(prefix=new, branches=True, user_id="bob").items
            assert sorted(info.chat_history_id for info in found) == [new, f"{new}~1"]
            assert said(store, f"{new}~1") == ["question"]
        assert check(store) == []
        assert store.delete_user("bob") == 10


@on_a_cluster
def test_a_store_that_reaches_one_of_several_nodes_is_told_to_use_the_cluster(server):
    with stores_on(server, cluster=False) as make_store:
        store, refused = make_store(), 0
        for number in range(20):
            try:
                say(store, "question", history=f"chat {number}")
            except StoreConfigurationError as error:
                assert "cluster=True, or make it by store_from_url" in str(error)
                refused += 1
    assert refused > 0
