# SPDX-License-Identifier: Apache-2.0
"""Connections: of threads, of event loops that end, of processes that fork."""

import asyncio
import os
import sys
import threading
from contextlib import suppress

import pytest
from haystack.dataclasses import ChatMessage
from sqlite_stores import connections_of_stores, said, say

from haystack_chat_store import SQLiteChatMessageStore, StoreUnavailableError


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("normal", 1)])
def test_every_connection_has_the_durability_asked_for(new_store, path, durability, synchronous):
    store = new_store(durability=durability)

    async def write_at_once():
        messages = [ChatMessage.from_user("Hi!")]
        await asyncio.gather(*(store.write_messages_async("history", messages) for _ in range(20)))

    say(store, "Hi!")
    asyncio.run(write_at_once())
    connections = connections_of_stores(path)
    assert connections
    for connection in connections:
        assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_durability_is_full_unless_asked_otherwise(path):
    assert SQLiteChatMessageStore(path).to_dict()["init_parameters"]["durability"] == "full"


def test_stores_with_equal_settings_share_connections(new_store, path):
    stores = [new_store(namespace=f"tenant {number}", last_k=number) for number in range(5)]
    say(stores[0], "Hi!")
    assert len(connections_of_stores(path)) == 1
    for store in stores:
        say(store, "Hi!")
        asyncio.run(store.retrieve_messages_async("history"))
    assert len(connections_of_stores(path)) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc, where open files are looked up, is Linux's")
def test_closing_one_of_several_stores_closes_the_file(new_store, path):
    def open_files():
        targets = []
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the descriptor that listed them
                targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return [target for target in targets if target.startswith(path)]

    stores = [new_store() for _ in range(5)]
    for store in stores:
        say(store, "Hi!")
        asyncio.run(store.retrieve_messages_async("history"))
    assert len(open_files()) == 3  # the database, its log and the log's index, once each
    stores[0].close()
    assert open_files() == []
    assert os.listdir(os.path.dirname(path)) == ["chat_history.db"]
    assert said(stores[1]) == ["Hi!"] * 5


def test_the_error_of_an_asynchronous_call_says_why_it_has_no_thread(new_store, monkeypatch):
    store = new_store()
    say(store, "Hi!")

    def start(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        for call in (
            lambda: store.count_messages_async("history"),
            lambda: store.write_messages_async("history", [ChatMessage.from_user("refused")]),
        ):
            with pytest.raises(StoreUnavailableError, match="can't start new thread") as caught:
                asyncio.run(call())
            assert "shutting down" not in str(caught.value)
    assert asyncio.run(store.write_messages_async("history", [ChatMessage.from_user("written")])) == 1
    assert said(store) == ["Hi!", "written"]


def test_stores_with_other_settings_have_connections_of_their_own(new_store, path):
    full, normal = new_store(), new_store(durability="normal")
    say(full, "Hi!")
    say(normal, "Hi!")
    assert len(connections_of_stores(path)) == 2
    normal.close()
    assert len(connections_of_stores(path)) == 1
    assert said(full) == said(normal) == ["Hi!", "Hi!"]
