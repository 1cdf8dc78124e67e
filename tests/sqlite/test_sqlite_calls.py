# SPDX-License-Identifier: Apache-2.0
"""The threads that make calls for event loops: how many there are, what they hold, and when they end."""

import asyncio
import subprocess
import sys
import threading
import time
import weakref

import pytest
from haystack.dataclasses import ChatMessage
from sqlite_stores import HANG_LIMIT, database_of, opened, said, say, until
from stopwatch import Stopwatch

from haystack_chat_store.errors import StoreTimeoutError


def test_a_task_that_makes_one_call_after_the_other_keeps_to_one_thread(new_store):
    store = new_store()
    say(store, "Hi!")

    async def main():
        for _ in range(300):
            assert await store.count_messages_async("history") == 1

    asyncio.run(main())
    assert len(database_of(store).readers._threads) == 1


def test_reads_that_come_together_run_together_and_those_beyond_the_threads_hear_at_the_timeout(new_store):
    store = new_store(timeout=0.5)
    say(store, "Hi!")
    under_way, may_end = [], threading.Event()

    def count(session):
        under_way.append(threading.get_ident())
        may_end.wait(HANG_LIMIT)

    async def main():
        running = [asyncio.ensure_future(store.engine.run_async(count)) for _ in range(16)]
        while len(under_way) < 16:
            await asyncio.sleep(0.001)
        with Stopwatch() as seconds, pytest.raises(StoreTimeoutError, match="other calls of this process"):
            await store.count_messages_async("history")
        assert seconds() < 1
        may_end.set()
        await asyncio.gather(*running)
        # Those that were late, or waited, have left no thread that is taken for free, or for busy.
        assert await asyncio.gather(*(store.count_messages_async("history") for _ in range(100))) == [1] * 100

    asyncio.run(main())
    assert len(set(under_way)) == 16
    readers = database_of(store).readers
    until(lambda: readers._free == len(readers._threads) == 16)


def test_a_thread_that_waits_for_calls_keeps_no_result_alive(new_store):
    store = new_store()
    say(store, "Hi!")

    class Result:
        pass

    def count(session):
        return Result()

    async def main():
        found = weakref.ref(await store.engine.run_async(count))
        while found() is not None:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), HANG_LIMIT))


def test_work_that_fails_costs_no_thread(new_store):
    store = new_store()
    say(store, "Hi!")
    readers = database_of(store).readers

    def fail():
        raise MemoryError

    assert asyncio.run(store.count_messages_async("history")) == 1
    for _ in range(3):
        readers.submit(fail)
    until(lambda: readers._free == len(readers._threads))
    assert asyncio.run(store.count_messages_async("history")) == 1
    assert all(thread.is_alive() for thread in readers._threads)


def test_closing_lets_threads_end_and_calls_that_come_with_it_are_made(new_store):
    store = new_store()
    say(store, "Hi!")
    may_end = threading.Event()

    def long_call(session):
        may_end.wait(HANG_LIMIT)
        return "made"

    async def main():
        database = database_of(store)
        first = [asyncio.ensure_future(store.engine.run_async(long_call)) for _ in range(3)]
        await asyncio.gather(*(store.count_messages_async("history") for _ in range(20)))
        store.close()
        late = asyncio.get_running_loop().create_future()

        def come_late():
            late.get_loop().call_soon_threadsafe(late.set_result, "made, too")
            return ()

        database.writer.submit(come_late)
        may_end.set()
        assert await asyncio.gather(*first, late) == ["made"] * 3 + ["made, too"]
        return [*database.readers._threads, *database.writer._threads]

    threads = asyncio.run(asyncio.wait_for(main(), HANG_LIMIT))
    until(lambda: not any(thread.is_alive() for thread in threads))


def test_work_after_closing_waits_for_no_other_work(new_store):
    readers, may_end, is_made = database_of(new_store()).readers, threading.Event(), threading.Event()
    readers.submit(lambda: may_end.wait(HANG_LIMIT) and ())
    readers.close()
    readers.submit(lambda: is_made.set() or ())
    assert is_made.wait(HANG_LIMIT)
    may_end.set()
    readers.finish()


def test_a_thread_that_is_there_does_what_no_other_thread_can_be_started_for(new_store, monkeypatch):
    readers, may_end, is_made = database_of(new_store()).readers, threading.Event(), threading.Event()
    readers.submit(lambda: may_end.wait(HANG_LIMIT) and ())
    monkeypatch.setattr(threading.Thread, "start", refuse_to_start)
    assert not readers.submit(lambda: is_made.set() or ())
    may_end.set()
    assert is_made.wait(HANG_LIMIT)


def refuse_to_start(thread):
    raise RuntimeError("can't start new thread")


def test_a_write_with_no_time_to_wait_is_made_if_nothing_is_in_its_way(new_store):
    async def write():
        return [await store.write_messages_async("history", [ChatMessage.from_user("Hi!")]) for _ in range(20)]

    store = new_store(timeout=0)
    say(store, "before")
    assert asyncio.run(write()) == [1] * 20


LEAVE = """
import asyncio, sys
from haystack.dataclasses import ChatMessage
from haystack_chat_store import SQLiteChatMessageStore

async def main():
    store = SQLiteChatMessageStore(sys.argv[1])
    writing = asyncio.ensure_future(store.write_messages_async("history", [ChatMessage.from_user("left")]))
    deleting = asyncio.ensure_future(store.delete_messages_async("other"))
    await asyncio.wait([writing, deleting], timeout=0.3)
    print("leaves", flush=True)

asyncio.run(main())
"""


def test_calls_that_have_begun_are_finished_before_the_interpreter_ends(new_store, path):
    store = new_store()
    say(store, "before")
    with opened(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with subprocess.Popen([sys.executable, "-c", LEAVE, path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "leaves\n"
            time.sleep(0.2)
            assert process.poll() is None
            other.execute("ROLLBACK")
            assert process.wait(HANG_LIMIT) == 0
    assert said(store) == ["before", "left"]


def test_a_loop_in_a_thread_that_outlives_the_main_thread_reads_and_writes(new_store, path):
    """Python 3.12 starts no thread then, and the error says so."""
    say(new_store(), "before")
    program = f"""
import asyncio, threading
from haystack.dataclasses import ChatMessage
from haystack_chat_store import SQLiteChatMessageStore

async def main():
    store = SQLiteChatMessageStore({path!r})
    while threading.main_thread().is_alive():
        await asyncio.sleep(0.01)
    await store.write_messages_async("history", [ChatMessage.from_user("after")])
    assert await store.count_messages_async("history") == 2

threading.Thread(target=asyncio.run, args=(main(),)).start()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    is_refused = "The interpreter is shutting down" in result.stderr
    assert is_refused or (result.returncode, result.stderr) == (0, "")
    assert not is_refused or sys.version_info >= (3, 12)
    assert said(new_store()) == ["before", *([] if is_refused else ["after"])]
