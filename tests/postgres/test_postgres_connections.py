# SPDX-License-Identifier: Apache-2.0
"""Connections: pools, event loops that end, processes that fork."""

import asyncio
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from postgres_stores import connections_of, said, say
from servers import wait_until

from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.processes import Program


def test_stores_with_equal_settings_share_their_connections(make_store, server):
    stores = [make_store() for _ in range(5)]
    for store in stores:
        say(store, "Hello")
    assert len(connections_of(server, stores[0])) == 1
    stores[0].close()
    wait_until(lambda: not connections_of(server, stores[0]), "the connection to be closed")
    assert stores[1].count_messages("history") == 5


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_store_opens_no_more_connections_than_it_may(make_store, server, way):
    store = make_store(max_pool_size=3)

    async def write_at_once():
        await asyncio.gather(
            *(store.write_messages_async(f"{number}", [ChatMessage.from_user("Hi!")]) for number in range(30))
        )
        return len(connections_of(server, store))

    say(store, "Hello")
    if way == "async":
        assert asyncio.run(write_at_once()) <= 3 + 1
    else:
        in_threads(*(lambda number=number: say(store, "Hi!", history=f"{number}") for number in range(30)))
        assert len(connections_of(server, store)) <= 3


def test_connections_that_were_idle_for_long_are_closed_by_the_next_call(make_store, server, monkeypatch):
    store = make_store()
    say(store, "Hello")

    async def count_at_once():
        return await asyncio.gather(*(store.count_messages_async("history") for _ in range(3)))

    with closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(6) as executor:
        with psycopg.connect(server.url) as connection:
            connection.execute(f"LOCK TABLE {store.schema_name}.haystack_chat_histories")
            in_loop = executor.submit(loop.run_until_complete, count_at_once())
            in_threads = [executor.submit(store.count_messages, "history") for _ in range(5)]
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: server.execute(waiting) == [(3 + 5,)], "all to wait")
        assert [*in_loop.result(), *(call.result() for call in in_threads)] == [1] * 8
        assert len(connections_of(server, store)) == 8
        monkeypatch.setattr("haystack_chat_store.stores.postgres.connections._MAX_IDLE_SECONDS", 0)
        assert store.count_messages("history") == 1
        wait_until(lambda: len(connections_of(server, store)) == 1 + 1, "one to be left on each side")
        store.close()


def test_the_connections_of_loops_that_ended_are_closed(make_store, server):
    store = make_store()
    for _ in range(4):
        asyncio.run(store.write_messages_async("history", [ChatMessage.from_user("Hi!")]))
    assert len(connections_of(server, store)) <= 2
    store.close()
    gc.collect()
    wait_until(lambda: not connections_of(server, store), "connections to be closed")


def fork_while_a_loop_waits(store, report):
    """
    Fork while asynchronous calls wait for the server, or for their turn.

    The child uses the store and ends as every program does.
    """
    import asyncio
    import gc
    import os
    import sys

    from haystack.dataclasses import ChatMessage

    async def main():
        await store.count_messages_async("history")
        report("is connected")
        await asyncio.to_thread(sys.stdin.readline)
        waiting = [
            asyncio.create_task(store.write_messages_async(f"{number % 5}", [ChatMessage.from_user(f"{number}")]))
            for number in range(10)
        ]
        await asyncio.to_thread(sys.stdin.readline)
        child = os.fork()
        if child == 0:
            return
        report("forked")
        await asyncio.to_thread(sys.stdin.readline)
        await asyncio.gather(*waiting)
        status = await asyncio.to_thread(os.waitpid, child, 0)
        report(status[1])

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
def test_a_fork_does_not_disturb_calls_under_way_in_a_loop(store, server):
    say(store, "before")
    with Program(fork_while_a_loop_waits, store) as program:
        program.begin()
        reports = program.reports()
        assert next(reports) == "is connected"
        with psycopg.connect(server.url) as connection:
            connection.execute(f"LOCK TABLE {store.schema_name}.haystack_chat_histories")
            program.tell("write")
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: server.execute(waiting)[0][0] == 5, "five calls to wait, and five for their turns")
            program.tell("fork")
            assert next(reports) == "forked"
        program.tell("go on")
        assert list(reports) == [0]
        assert program.exit_code() == 0
    assert [said(store, f"{number}") for number in range(5)] == [[f"{number}", f"{number + 5}"] for number in range(5)]
    assert said(store) == ["before", "the child", "the child awaits"]


def fork_while_threads_connect(store, report, times):
    """
    In a process that has never connected: begin to connect in threads, and fork children that connect, too. Again and
    again, each time in a process of its own. Report how each ended.

    No thread ends meanwhile: OpenSSL would free what it keeps for it, under a lock that no other code can take.
    """
    import os
    import signal
    import threading
    import time

    def fork(function):
        child = os.fork()
        if child == 0:
            try:
                os._exit(function())
            finally:
                os._exit(1)
        return child

    def connect():
        signal.alarm(60)  # of those that hang
        return store.count_messages("history")

    def connect_and_wait():
        store.count_messages("history")
        threading.Event().wait()

    def connect_and_fork():
        for _ in range(4):
            threading.Thread(target=connect_and_wait).start()
        children = []
        for number in range(6):
            time.sleep(number / 1000)
            children.append(fork(connect))
        return max(os.waitpid(child, 0)[1] for child in children)

    for _ in range(times):
        report(os.waitpid(fork(connect_and_fork), 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork on this platform")
def test_a_child_forked_while_threads_connect_can_connect_too(store, is_full):
    """What the threads hold of OpenSSL's locks at that moment would stay held in the child for ever."""
    store.count_messages("history")  # makes the tables
    forks = 40 if is_full else 10
    with Program(fork_while_threads_connect, store, forks) as program:
        program.begin()
        assert program.reports_to_the_end() == [0] * forks


FORK_WHILE_COPYING = """
import os, sys, threading, time
from haystack_chat_store.stores.sqlite import SQLiteChatMessageStore  # first: what is imported last forks first
from haystack_chat_store import HistoryRow, store_from_url

url, schema_name, path = sys.argv[1:]
store, target, forking = store_from_url(url, schema_name=schema_name), SQLiteChatMessageStore(path), threading.Event()

def batches():
    forking.set()
    time.sleep(0.5)  # so that the fork waits for this call by now
    yield store.engine.run(store.engine.page, store.scope, "history", None, None, 10)

row = HistoryRow(chat_history_id="history", created_at=1, updated_at=1)
arguments = (target.engine.import_history, target.scope, row, batches(), 0)
threading.Thread(target=target.engine.run, args=arguments).start()
forking.wait()
child = os.fork()
if child == 0:
    os._exit(target.count_messages("history") != 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork on this platform")
def test_a_fork_waits_for_no_call_that_waits_for_the_fork(store, url, tmp_path):
    """A thread writes to SQLite what it reads from PostgreSQL, and has to connect for that, while the process forks."""
    say(store, "Hi!")
    began = time.monotonic()
    arguments = [url, store.schema_name, tmp_path / "chat.db"]
    run = subprocess.run([sys.executable, "-c", FORK_WHILE_COPYING, *arguments], check=False, timeout=60)
    assert run.returncode == 0
    assert time.monotonic() - began < 30  # without that order, the timeout of a call
