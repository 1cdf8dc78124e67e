# SPDX-License-Identifier: Apache-2.0
"""Group commit: writers that wait for each other share a transaction, and each hears what became of its own write."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from sqlite_stores import HANG_LIMIT, database_of, opened, rows, said, say, until
from stopwatch import Stopwatch

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    MessageNotFoundError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.rows import EncodedMessage
from haystack_chat_store.stores.sqlite import calls, turns
from haystack_chat_store.testing.concurrency import in_threads

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")


class Crowd:
    """Calls that wait for each other: the first has the turn, the others come one after the other."""

    def __init__(self, store):
        self.turns = database_of(store).turns
        self._executor = ThreadPoolExecutor(100)
        self.loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self.loop.run_forever)
        self._loop_thread.start()
        self.calls = []

    def waiting(self):
        return len(self.turns._threads) + len(self.turns._tasks)

    def in_thread(self, call, *arguments, **options):
        return self._comes(lambda: self._executor.submit(call, *arguments, **options))

    def in_task(self, call, *arguments, **options):
        return self._comes(lambda: asyncio.run_coroutine_threadsafe(call(*arguments, **options), self.loop))

    def _comes(self, start):
        before, is_first = self.waiting(), not self.turns._turn.locked()
        self.calls.append(start())
        until(lambda: self.turns._turn.locked() if is_first else self.waiting() == before + 1)
        return self.calls[-1]

    def close(self):
        wait(self.calls, HANG_LIMIT)
        self._executor.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._loop_thread.join()
        self.loop.close()


@contextmanager
def crowded(store):
    """Keep others from writing, so that calls queue up, until the end."""
    say(store, "first", "before")
    crowd = Crowd(store)
    with ExitStack() as stack:
        stack.callback(crowd.close)
        with database_of(store).transaction():
            yield crowd
    # The thread for asynchronous writes may just be giving the turn back, or may still have to come for what was late.
    until(lambda: not crowd.turns._turn.locked() and crowd.waiting() == 0)


@contextmanager
def statements(store):
    """What SQLite is told to begin, to keep and to undo."""
    say(store, "first", "before")
    (connection,) = database_of(store)._idle_writers
    told = []
    connection.set_trace_callback(told.append)
    yield told
    connection.set_trace_callback(None)
    kept = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")
    told[:] = [statement.split()[0] for statement in told if statement.startswith(kept)]


def outcome_of(call):
    try:
        return call.result(HANG_LIMIT)
    except BaseException as error:
        return type(error)


def message(text, message_id=None):
    return ChatMessage.from_user(text, meta={MESSAGE_ID_KEY: message_id} if message_id else {})


# ---------------------------------------------------------------------- who shares


def test_threads_and_tasks_that_wait_share_one_transaction(new_store):
    store = new_store()
    with statements(store) as told, crowded(store) as crowd:
        for number in range(10):
            crowd.in_thread(say, store, f"thread {number}")
            crowd.in_task(store.write_messages_async, "history", [message(f"task {number}")])
    assert [call.result() for call in crowd.calls] == [1] * 20
    assert Counter(told)["COMMIT"] == 2 + 1  # with those of `crowded` itself
    stored = said(store)
    assert sorted(stored) == sorted(f"{kind} {number}" for kind in ("thread", "task") for number in range(10))
    for kind in ("thread", "task"):
        assert [text for text in stored if text.startswith(kind)] == [f"{kind} {number}" for number in range(10)]
    assert check(store) == []


def test_a_writer_alone_shares_nothing(new_store):
    store = new_store()
    with statements(store) as told:
        say(store, "main thread")
        in_threads(lambda: say(store, "thread"))
        asyncio.run(store.write_messages_async("history", [message("task")]))
    assert told == ["BEGIN", "COMMIT"] * 3


def test_a_group_has_a_greatest_number_and_a_greatest_size(new_store, monkeypatch):
    store = new_store()
    for name, limit, commits in (("_MAX_WRITES", 4, 3), ("MAX_SIZE", 200, 4), ("_MAX_WRITES", 64, 1)):
        with monkeypatch.context() as patched, statements(store) as told:
            patched.setattr(turns, name, limit)
            with crowded(store) as crowd:
                for _ in range(12):
                    crowd.in_thread(say, store, "Hi!" if name == "_MAX_WRITES" else "x" * 60)
        assert Counter(told)["COMMIT"] - 2 == commits, name
    assert store.count_messages("history") == 36


def test_what_may_last_shares_no_transaction(new_store, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.sqlite.engine.MAX_SIZE", 1000)
    store = new_store()
    with statements(store) as told, crowded(store) as crowd:
        crowd.in_thread(say, store, "Hi!", "history")
        large = crowd._executor.submit(say, store, "x" * 2000, "large")
        deletion = crowd._executor.submit(store.delete_chat_history, "before")
        time.sleep(0.1)
        assert crowd.waiting() == 0
    assert (large.result(HANG_LIMIT), deletion.result(HANG_LIMIT)) == (1, None)
    assert Counter(told)["COMMIT"] == 2 + 3
    assert "SAVEPOINT" not in told


def test_an_engine_takes_messages_by_name(new_store):
    store = new_store()
    options = {
        "messages": [EncodedMessage("1", "user", "{}")],
        "policy": DuplicatePolicy.SKIP,
        "expected_revision": None,
    }
    assert store.engine.run(store.engine.append, store.scope, "history", **options) == 1
    assert asyncio.run(store.engine.run_async(store.engine.append, store.scope, "other", **options)) == 1


def test_titles_and_meta_are_written_along(new_store):
    store = new_store()
    store.write_messages("history", [message("Hi!", "m")])
    with statements(store) as told, crowded(store) as crowd:
        crowd.in_thread(store.create_chat_history, "new", title="New")
        crowd.in_thread(store.update_chat_history, "history", title="Title")
        crowd.in_task(store.update_message_meta_async, "history", "m", merge={"stars": 5})
        missing = crowd.in_thread(store.update_message_meta, "history", "none", merge={"stars": 5})
        lost = crowd.in_thread(store.update_chat_history, "none", title="Title")
    assert outcome_of(missing) is MessageNotFoundError
    assert outcome_of(lost).__name__ == "ChatHistoryNotFoundError"
    assert Counter(told)["COMMIT"] == 2 + 1
    assert store.get_chat_history("history").title == "Title"
    assert store.get_chat_history("new").title == "New"
    assert store.list_messages("history")[0].message.meta["stars"] == 5
    assert check(store) == []


def test_the_tasks_of_a_loop_are_woken_at_once(new_store):
    store = new_store()
    with crowded(store) as crowd:
        wakes, wake = [], crowd.loop.call_soon_threadsafe

        def count(callback, *arguments, **options):
            wakes.append(callback)
            return wake(callback, *arguments, **options)

        crowd.in_thread(say, store, "Hi!")
        for number in range(20):
            crowd.in_task(store.write_messages_async, f"history {number}", [message("Hi!")])
        crowd.loop.call_soon_threadsafe = count
    assert [call.result() for call in crowd.calls] == [1] * 21
    assert wakes.count(calls._resolve) == 1


def test_tasks_of_several_loops_and_threads_keep_their_order(new_store):
    store = new_store(durability="normal")

    async def write_in_tasks(loop):
        async def write(task):
            for number in range(20):
                assert await store.write_messages_async("history", [message(f"loop {loop}.{task} {number}")]) == 1

        await asyncio.gather(*map(write, range(5)))

    def write(number):
        if number < 2:
            asyncio.run(write_in_tasks(number))
        else:
            for index in range(20):
                assert say(store, f"thread {number} {index}") == 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    assert_in_order(said(store), writers=16, each=20)
    assert [each.position for each in store.iterate_messages("history")] == list(range(320))
    assert check(store) == []


def assert_in_order(texts, writers, each):
    numbers = defaultdict(list)
    for text in texts:
        writer, _, number = text.rpartition(" ")
        numbers[writer].append(int(number))
    assert len(numbers) == writers
    for found in numbers.values():
        assert found == list(range(each))


def test_writes_of_tasks_go_on_while_a_long_operation_has_their_thread_and_threads_write(new_store):
    store = new_store(timeout=HANG_LIMIT)
    say(store, "before")
    may_end = threading.Event()

    def long_call(session):
        may_end.wait(HANG_LIMIT)

    async def main():
        running = asyncio.ensure_future(store.engine.run_async(long_call))
        await asyncio.sleep(0.05)
        waits = asyncio.ensure_future(store.write_messages_async("history", [message("task")]))
        await asyncio.sleep(0.05)
        assert await asyncio.to_thread(in_threads, lambda: say(store, "thread")) == [1]
        assert await waits == 1
        may_end.set()
        await running

    asyncio.run(main())
    assert said(store) == ["before", "thread", "task"]


# ---------------------------------------------------------------------- what fails


def refuse(path, how):
    with opened(path) as connection:
        connection.execute(
            "CREATE TRIGGER refusal BEFORE INSERT ON haystack_chat_messages WHEN new.message_id = 'bad' "
            f"BEGIN SELECT RAISE({how}, 'refused'); END"
        )


def test_a_write_that_fails_half_way_fails_alone(new_store, path):
    store = new_store()
    say(store, "Hi!", "here")
    refuse(path, "ABORT")
    with crowded(store) as crowd:
        good = [crowd.in_thread(say, store, "1"), crowd.in_task(store.write_messages_async, "history", [message("2")])]
        bad = [
            crowd.in_thread(store.write_messages, "new", [message("half"), message("bad", "bad")]),
            crowd.in_task(store.write_messages_async, "history", [message("half"), message("bad", "bad")]),
            crowd.in_thread(store.write_messages, "here", [message("late")], expected_revision=99),
        ]
        good += [crowd.in_thread(say, store, "3"), crowd.in_task(store.write_messages_async, "history", [message("4")])]
    assert [call.result() for call in good] == [1] * 4
    assert [outcome_of(call) for call in bad] == [StoreUnavailableError] * 2 + [ChatHistoryChangedError]
    assert len({id(call.exception()) for call in bad}) == 3
    assert sorted(said(store)) == ["1", "2", "3", "4"]
    assert said(store, "here") == ["Hi!"]
    assert store.get_chat_history("new") is None
    assert check(store) == []


def test_the_write_that_has_the_turn_fails_alone(new_store, path):
    store = new_store()
    say(store, "Hi!")
    refuse(path, "ABORT")
    with crowded(store) as crowd:
        bad = crowd.in_thread(store.write_messages, "history", [message("half"), message("bad", "bad")])
        good = [crowd.in_thread(say, store, "1"), crowd.in_task(store.write_messages_async, "history", [message("2")])]
    assert outcome_of(bad) is StoreUnavailableError
    assert [call.result() for call in good] == [1, 1]
    assert sorted(said(store)) == ["1", "2", "Hi!"]


def test_if_sqlite_undoes_the_transaction_all_that_were_made_in_it_fail_and_those_that_wait_are_made(new_store, path):
    store = new_store()
    say(store, "Hi!")
    refuse(path, "ROLLBACK")
    with crowded(store) as crowd:
        lost = [crowd.in_thread(say, store, "lost"), crowd.in_thread(say, store, "lost too")]
        lost.append(crowd.in_thread(store.write_messages, "history", [message("bad", "bad")]))
        made = [crowd.in_thread(say, store, "1"), crowd.in_thread(say, store, "2")]
    assert [outcome_of(call) for call in lost] == [StoreUnavailableError] * 3
    assert len({id(call.exception()) for call in lost}) == 3
    assert [call.result() for call in made] == [1, 1]
    assert said(store) == ["Hi!", "1", "2"]
    assert check(store) == []


def test_a_commit_that_fails_fails_all_that_were_in_it(new_store, path):
    store = new_store()
    say(store, "Hi!")
    with opened(path) as connection:  # a foreign key is looked at when the transaction is committed
        connection.execute("CREATE TABLE other (key INTEGER PRIMARY KEY)")
        connection.execute("CREATE TABLE of (key INTEGER REFERENCES other DEFERRABLE INITIALLY DEFERRED)")
        connection.execute(
            "CREATE TRIGGER refusal AFTER INSERT ON haystack_chat_messages WHEN new.message_id = 'bad' "
            "BEGIN INSERT INTO of VALUES (1); END"
        )
    (writer,) = database_of(store)._idle_writers
    writer.execute("PRAGMA foreign_keys = ON")
    with crowded(store) as crowd:
        crowd.in_thread(say, store, "1")
        crowd.in_thread(store.write_messages, "history", [message("bad", "bad")])
        crowd.in_task(store.write_messages_async, "history", [message("2")])
        conflict = crowd.in_thread(store.write_messages, "history", [message("late")], expected_revision=99)
    assert outcome_of(conflict) is ChatHistoryChangedError
    assert [outcome_of(call) for call in crowd.calls[:3]] == [StoreUnavailableError] * 3
    assert all("FOREIGN KEY" in str(call.exception()) for call in crowd.calls[:3])
    assert said(store) == ["Hi!"]
    assert say(store, "after") == 1
    assert check(store) == []


def test_a_full_disk_is_told_to_each_write_that_it_concerns(new_store):
    store = new_store()
    say(store, "Hi!")
    (writer,) = database_of(store)._idle_writers
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages + 20}")
    with crowded(store) as crowd:
        for number in range(10):
            crowd.in_thread(say, store, f"{number}", f"history {number}")
            crowd.in_task(store.write_messages_async, f"large {number}", [message("x" * 30_000)])
    outcomes = [outcome_of(call) for call in crowd.calls]
    assert StoreUnavailableError in outcomes
    for name, found in zip(
        (f"{kind} {number}" for number in range(10) for kind in ("history", "large")), outcomes, strict=True
    ):
        assert found in (1, StoreUnavailableError)
        assert store.count_messages(name) == (1 if found == 1 else 0)
    assert check(store) == []


# ---------------------------------------------------------------------- who gives up


def test_a_write_whose_deadline_passes_while_it_waits_is_told_so_and_not_made(new_store):
    store = new_store(timeout=0.5)
    with Stopwatch() as seconds:
        with crowded(store) as crowd:
            for number in range(5):
                crowd.in_thread(say, store, f"thread {number}")
                crowd.in_task(store.write_messages_async, "history", [message(f"task {number}")])
            assert [outcome_of(call) for call in crowd.calls] == [StoreTimeoutError] * 10
        assert seconds() < 3
    assert say(store, "after") == 1
    in_threads(lambda: say(store, "at the end"))
    assert said(store) == ["after", "at the end"]


def test_each_write_waits_until_its_own_deadline(new_store, path):
    store = new_store(timeout=1)
    say(store, "before")
    with opened(path) as other:  # another process: who has the turn waits for it
        other.execute("BEGIN IMMEDIATE")
        crowd = Crowd(store)
        early = [crowd.in_thread(say, store, "early"), crowd.in_thread(say, store, "early")]
        time.sleep(0.6)
        late = [
            crowd.in_thread(say, store, "late"),
            crowd.in_task(store.write_messages_async, "history", [message("late")]),
        ]
        assert [outcome_of(call) for call in early] == [StoreTimeoutError] * 2
        other.execute("ROLLBACK")
        assert [outcome_of(call) for call in late] == [1, 1]
        crowd.close()
    assert said(store) == ["before", "late", "late"]


def test_a_task_that_is_cancelled_while_it_waits_writes_nothing(new_store):
    store = new_store()
    with crowded(store) as crowd:
        crowd.in_thread(say, store, "1")
        cancelled = crowd.in_task(store.write_messages_async, "history", [message("cancelled")])
        crowd.in_task(store.write_messages_async, "history", [message("2")])
        cancelled.cancel()
        until(lambda: [write.future.done() for write in crowd.turns._tasks] == [True, False])
    assert [outcome_of(crowd.calls[number]) for number in (0, 2)] == [1, 1]
    assert said(store) == ["1", "2"]


def test_a_task_that_is_cancelled_when_its_write_was_taken_disturbs_no_other(new_store, path):
    store = new_store()
    say(store, "before")
    with opened(path) as other:
        other.execute("BEGIN IMMEDIATE")
        crowd = Crowd(store)
        cancelled = crowd.in_task(store.write_messages_async, "history", [message("cancelled")])
        until(lambda: not crowd.turns._tasks)
        others = [crowd.in_task(store.write_messages_async, "history", [message(f"{number}")]) for number in range(3)]
        cancelled.cancel()
        time.sleep(0.05)
        other.execute("ROLLBACK")
        assert [outcome_of(call) for call in others] == [1] * 3
        crowd.close()
    assert said(store) == ["before", "cancelled", "0", "1", "2"]


def test_a_loop_that_ends_keeps_nobody_waiting(new_store, path):
    store = new_store()
    say(store, "before")

    async def leave():
        asyncio.ensure_future(store.write_messages_async("history", [message("left")]))  # noqa: RUF006
        waiting = asyncio.ensure_future(store.write_messages_async("history", [message("left, too")]))
        await asyncio.wait([waiting], timeout=0.1)

    with opened(path) as other:
        other.execute("BEGIN IMMEDIATE")
        asyncio.run(leave())
        other.execute("ROLLBACK")
    assert asyncio.run(store.write_messages_async("history", [message("after")])) == 1
    assert said(store)[0] == "before"
    assert said(store)[-1] == "after"
    assert "left, too" not in said(store)


# ---------------------------------------------------------------------- interruptions


def raising(error):
    def change(content):
        raise error

    return change


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interruption_while_others_share_the_transaction_undoes_it_and_says_so(new_store):
    """As an exception that comes from outside, in the middle of a write that another thread makes along."""
    store = new_store()
    store.write_messages("history", [message("Hi!", "m")])
    with crowded(store) as crowd:
        leads = crowd.in_thread(say, store, "lost")
        taken = [crowd.in_thread(say, store, "1"), crowd.in_thread(say, store, "2")]
        crowd.in_thread(
            store.engine.run, store.engine.update_message, store.scope, "history", "m", raising(KeyboardInterrupt())
        )
        waiting = crowd.in_thread(say, store, "3")
    assert outcome_of(leads) is KeyboardInterrupt
    assert [outcome_of(call) for call in taken] == [StoreUnavailableError] * 2
    assert all("Nothing was changed" in str(call.exception()) for call in taken)
    assert outcome_of(waiting) == 1
    assert said(store) == ["Hi!", "3"]


def test_an_interruption_of_the_write_that_has_the_turn_leaves_the_others_to_the_next(new_store):
    store = new_store()
    store.write_messages("history", [message("Hi!", "m")])
    with crowded(store) as crowd:
        interrupted = crowd.in_thread(
            store.engine.run, store.engine.update_message, store.scope, "history", "m", raising(KeyboardInterrupt())
        )
        others = [
            crowd.in_thread(say, store, "1"),
            crowd.in_task(store.write_messages_async, "history", [message("2")]),
        ]
    assert outcome_of(interrupted) is KeyboardInterrupt
    assert [outcome_of(call) for call in others] == [1, 1]
    assert said(store) == ["Hi!", "1", "2"]


def test_an_interruption_after_the_commit_does_not_deny_it(new_store, monkeypatch):
    store = new_store()
    database = database_of(store)
    take_back = database._take_back

    def interrupt(connection, is_sound):
        monkeypatch.undo()
        take_back(connection, is_sound)
        raise KeyboardInterrupt

    with crowded(store) as crowd:
        leads = crowd.in_thread(say, store, "0")
        others = [
            crowd.in_thread(say, store, "1"),
            crowd.in_task(store.write_messages_async, "history", [message("2")]),
        ]
        connection = database._lent
        assert len(connection) == 1
        begin = database._writer_in_transaction

        def begins(deadline):
            monkeypatch.setattr(database, "_take_back", interrupt)
            return begin(deadline)

        monkeypatch.setattr(database, "_writer_in_transaction", begins)
    assert outcome_of(leads) is KeyboardInterrupt
    assert [outcome_of(call) for call in others] == [1, 1]
    assert sorted(said(store)) == ["0", "1", "2"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no interval timers")
# Python 3.13 warns of a connection that an interrupted call has lost, when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_the_main_thread_disturbs_no_other_thread(new_store):
    store = new_store(timeout=HANG_LIMIT, durability="normal")
    say(store, "before", "other")
    ends = threading.Event()

    def write(number):
        index = 0
        while not ends.is_set():
            assert say(store, f"{number} {index}") == 1
            index += 1
        return index

    signals = []

    def interrupt(signum, frame):
        signals.append(signum)
        raise KeyboardInterrupt  # Python discards it in the callback of a weak reference

    def write_until_signal(number):
        while len(signals) == number:
            say(store, "main", "main")

    before = signal.signal(signal.SIGALRM, interrupt)
    with ThreadPoolExecutor(4) as threads:
        written = [threads.submit(write, number) for number in range(4)]
        try:
            for number in range(100):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.005)
                    write_until_signal(number)
                except KeyboardInterrupt:
                    pass
        finally:
            signal.signal(signal.SIGALRM, before)
            ends.set()
        counts = [each.result(HANG_LIMIT) for each in written]
    stored = Counter(text.split()[0] for text in said(store))
    assert stored == {str(number): count for number, count in enumerate(counts)}


# ---------------------------------------------------------------------- processes

WRITE = """
import asyncio, os, sys, threading
from haystack.dataclasses import ChatMessage
from haystack_chat_store import SQLiteChatMessageStore
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
notes = os.open(sys.argv[4], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
store = SQLiteChatMessageStore(path, durability="normal")

def write(number):
    for index in range(count):
        text = f"{name}.{number} {index}"
        assert store.write_messages("history", [ChatMessage.from_user(text)]) == 1
        os.write(notes, (text + "\\n").encode())

async def write_in_tasks():
    async def write(number):
        for index in range(count):
            text = f"{name}.{number} {index}"
            assert await store.write_messages_async("history", [ChatMessage.from_user(text)]) == 1
            os.write(notes, (text + "\\n").encode())

    await asyncio.gather(*map(write, range(8, 16)))

threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
asyncio.run(write_in_tasks())
for thread in threads:
    thread.join()
store.close()
"""


def start(path, name, count, notes):
    command = [sys.executable, "-c", WRITE, path, name, str(count), str(notes)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_killed_while_threads_and_tasks_write_what_was_acknowledged_is_there_once_and_in_order(
    new_store, path, tmp_path
):
    store = new_store()
    say(store, "before", "other")
    for number in range(2):
        process = start(path, f"p{number}", 100_000, tmp_path / "notes")
        until(lambda: (tmp_path / "notes").exists() and (tmp_path / "notes").read_text().count(f"p{number}.") > 300)  # noqa: B023
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    found = Counter(said(store))
    assert set(found.values()) == {1}
    lines = (tmp_path / "notes").read_text().splitlines()
    assert set(lines) <= set(found)
    assert len(found) - len(lines) <= 2 * 16  # of each writer, the last one may be there without its note
    numbers = defaultdict(list)
    for text in said(store):
        writer, _, number = text.rpartition(" ")
        numbers[writer].append(int(number))
    assert all(each == list(range(len(each))) for each in numbers.values())
    assert check(store) == []


def test_writers_of_two_processes_keep_their_order(new_store, path, tmp_path):
    store = new_store()
    processes = [start(path, f"p{number}", 15, tmp_path / f"notes {number}") for number in range(2)]
    for process in processes:
        assert process.communicate(timeout=2 * HANG_LIMIT)[1] == ""
        assert process.returncode == 0
    assert_in_order(said(store), writers=32, each=15)
    assert rows(path, "SELECT count(*), max(message_key) - min(message_key) FROM haystack_chat_messages") == [
        (480, 479)
    ]
    assert check(store) == []


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_while_others_wait_has_no_queue_and_writes(new_store):
    store = new_store(timeout=HANG_LIMIT)
    say(store, "before")
    ends = threading.Event()

    def write(number):
        index = 0
        while not ends.is_set():
            assert say(store, f"{number} {index}") == 1
            index += 1
        return index

    with ThreadPoolExecutor(8) as threads:
        written = [threads.submit(write, number) for number in range(8)]
        try:
            for number in range(5):
                time.sleep(0.02)
                reader, writer = os.pipe()
                child = os.fork()
                if child == 0:
                    try:
                        signal.alarm(int(HANG_LIMIT))
                        found = database_of(store).turns
                        result = [found._turn.locked(), len(found._threads), 0]
                        thread = threading.Thread(target=lambda: result.append(say(store, f"child {number}")))  # noqa: B023
                        thread.start()
                        thread.join()
                        os.write(writer, json.dumps(result).encode())
                    finally:
                        os._exit(0)
                os.close(writer)
                with os.fdopen(reader) as pipe:
                    assert json.loads(pipe.read()) == [False, 0, 0, 1]
                os.waitpid(child, 0)
        finally:
            ends.set()
        counts = [each.result(HANG_LIMIT) for each in written]
    texts = [text for text in said(store) if text != "before"]
    assert Counter(text.split()[0] for text in texts) == {"child": 5} | {str(n): c for n, c in enumerate(counts)}
    assert check(store) == []
