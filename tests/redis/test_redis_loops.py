# SPDX-License-Identifier: Apache-2.0
"""Event loops that end, and processes that fork, with connections open."""

import asyncio
import gc
import os
import threading
import time
import warnings
from contextlib import ExitStack

import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from redis_stores import clients_of, nodes_of, on_every_engine, on_one_server, said
from servers import wait_until

from haystack_chat_store.stores.redis import RedisChatMessageStore, writing
from haystack_chat_store.stores.redis.async_session import AsyncSession
from haystack_chat_store.stores.redis.connections import servers
from haystack_chat_store.stores.usage import UsageCounter
from haystack_chat_store.testing.processes import Program


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
        wait_until(lambda: open_connections() <= before, "connections to be closed")
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
            await asyncio.to_thread(wait_until, lambda: open_connections() <= before, "connections to be closed")

    before = open_connections()
    asyncio.run(use())
    wait_until(lambda: open_connections() <= before, "connections to be closed")


@on_every_engine
def test_a_loop_waits_with_its_end_for_a_thread_that_closes_its_connections(store, monkeypatch):
    begins, has_closed = threading.Event(), threading.Event()

    def abandon(connection):
        begins.set()
        time.sleep(0.2)
        AsyncSession._abandon(session, connection)
        has_closed.set()

    async def use():
        await store.count_messages_async("history")
        return await servers.get(store.engine.settings).session_async()

    loop = asyncio.new_event_loop()
    session = loop.run_until_complete(use())
    monkeypatch.setattr(session, "_abandon", abandon)
    closer = threading.Thread(target=store.close)
    closer.start()
    assert begins.wait(10)
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert has_closed.is_set()
    loop.close()
    closer.join()
    gc.collect()  # an error reply, such as that a script is not known yet, leaves a circle of references
    assert not session._open


@on_every_engine
def test_a_call_that_begins_while_a_thread_closes_the_store_leaves_nothing_open(store, server):
    def open_connections():
        return sum(len(clients_of(node)) for node in nodes_of(server))

    async def use():
        connections = servers.get(store.engine.settings)
        store.close()
        session = await connections.session_async()
        assert await store.engine.count(session, store.scope, "history") == 0
        await asyncio.to_thread(wait_until, lambda: open_connections() <= before, "connections to be closed")

    before = open_connections()
    asyncio.run(use())


def test_connections_that_keep_their_streams_elsewhere_do_no_harm():
    async def use():
        store = RedisChatMessageStore(Secret.from_token("redis://"))
        session = await servers.get(store.engine.settings).session_async()
        session._abandon(object())  # of another version of redis-py

    asyncio.run(use())


def fork_while_a_loop_waits(store, report):
    """Fork while asynchronous calls wait for the server. The child uses the store and ends as every program does."""
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


@on_one_server
def test_large_messages_are_worked_on_outside_of_the_event_loop(store, monkeypatch):
    """When one is changed, and when usage is counted."""
    seen = []

    def noting(function):
        def noted(*arguments):
            seen.append((function.__name__, threading.current_thread() is threading.main_thread()))
            return function(*arguments)

        return noted

    monkeypatch.setattr(writing, "searchable_text_of_content", noting(writing.searchable_text_of_content))
    monkeypatch.setattr(UsageCounter, "add_text", noting(UsageCounter.add_text))
    for size, is_on_loop in ((10, True), (200_000, False)):
        seen.clear()
        reply = ChatMessage.from_assistant("a" * size, meta={"chat_message_id": "reply", "usage": {"total_tokens": 5}})
        store.write_messages("history", [reply])
        asyncio.run(store.update_message_meta_async("history", "reply", merge={"rating": 1}))
        assert asyncio.run(store.statistics_async()).messages == 1
        assert set(seen) == {("searchable_text_of_content", is_on_loop), ("add_text", is_on_loop)}
        store.delete_chat_history("history")
