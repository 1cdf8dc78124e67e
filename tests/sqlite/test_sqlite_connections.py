# SPDX-License-Identifier: Apache-2.0
"""Connections: of threads, of event loops that end, of processes that fork."""

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage
from sqlite_stores import connections_of_stores, opened, rows, said, say
from stopwatch import Stopwatch

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.errors import StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.sqlite import connections, schema


def test_threads_that_look_for_moved_files_are_not_disturbed_by_those_that_come_and_go(store):
    say(store, "Hi!")
    database = connections.databases.get(store.engine.settings)
    ends_at = time.monotonic() + 1

    def come_and_go():
        while time.monotonic() < ends_at:
            for _ in range(100):
                with database.connection():
                    pass

    def look():
        while time.monotonic() < ends_at:
            for _ in range(100):
                database._lent_to_others()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ExitStack() as others:
            for _ in range(40):  # calls that last
                others.enter_context(database.connection())
            in_threads(lambda number: (look if number < 2 else come_and_go)(), 6)
    finally:
        sys.setswitchinterval(interval)


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


def test_views_and_triggers_of_a_file_that_comes_from_somewhere_are_not_trusted(new_store, path):
    """They can run nothing but plain SQL, neither when the store reads nor when it writes."""
    store = new_store()
    say(store, "Hi!")
    store.close()
    for number, call in enumerate([store.count_messages, store.delete_messages], start=1):
        call("history")
        found = connections_of_stores(path)
        assert [each.execute("PRAGMA trusted_schema").fetchone() for each in found] == [(0,)] * number


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


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_tables_in_an_empty_file_survive_a_power_cut_whatever_the_durability(new_store, path, monkeypatch, durability):
    """SQLite's `synchronous` is 2 for full, and 1 for normal."""
    Path(path).touch()
    levels = []
    migrate = schema.migrate

    def watched(connection, path):
        levels.append(connection.execute("PRAGMA synchronous").fetchone()[0])
        migrate(connection, path)
        levels.append(connection.execute("PRAGMA synchronous").fetchone()[0])

    monkeypatch.setattr(schema, "migrate", watched)
    store = new_store(durability=durability)
    say(store, "Hi!")
    database = connections.databases.get(store.engine.settings)
    with database.transaction() as connection:
        levels.append(connection.execute("PRAGMA synchronous").fetchone()[0])
    assert levels == [2, 2, 2 if durability == "full" else 1]


def test_a_file_that_was_made_is_synced_before_anything_is_acknowledged(tmp_path):
    """As the system saw it: the file is flushed before it has its name, and then the folder, though it is "normal"."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    code = f"""
from haystack.dataclasses import ChatMessage
from haystack_chat_store import SQLiteChatMessageStore
store = SQLiteChatMessageStore({str(tmp_path / "chat.db")!r}, durability="normal")
store.write_messages("history", [ChatMessage.from_user("Hi!")])
print("acknowledged", flush=True)
"""
    record = tmp_path / "record"
    command = [strace, "-f", "-y", "-e", "trace=fsync,fdatasync,link,linkat,write", "-o", record, sys.executable, "-c"]
    subprocess.run([*command, code], check=True, capture_output=True)
    calls = re.findall(
        r"(fsync|fdatasync|link|linkat)\((?:\d+<)?([^>,]*)", record.read_text().partition("acknowledged")[0]
    )
    name = next(place for call, place in calls if call.startswith("link")).strip('"')
    flushes = [call if call.startswith("link") else place for call, place in calls]
    named = next(number for number, place in enumerate(flushes) if place.startswith("link"))
    assert name in flushes[:named]
    assert str(tmp_path) in flushes[named:]


def test_one_call_waits_for_threads_and_for_the_file_no_longer_than_the_timeout(new_store, path):
    store = new_store(timeout=1)
    say(store, "before")
    database = connections.databases.get(store.engine.settings)
    is_held = threading.Event()

    def hold_for_a_while():
        with database._write_lock:
            is_held.set()
            time.sleep(0.7)

    with opened(path) as other:
        other.execute("BEGIN IMMEDIATE")
        thread = threading.Thread(target=hold_for_a_while)
        thread.start()
        is_held.wait()
        start = time.monotonic()
        with Stopwatch() as seconds, pytest.raises(StoreTimeoutError):
            say(store, "late")
        assert 0.9 < time.monotonic() - start
        assert seconds() < 1.5
        thread.join()
    say(store, "after")
    with database.transaction() as connection:
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (1000,)


def test_each_of_many_waiting_calls_hears_at_the_timeout(new_store, path):
    store = new_store(timeout=1)
    say(store, "before")

    async def timed(number):
        start, counted_from = time.monotonic(), seconds()
        with pytest.raises(StoreTimeoutError, match="stayed locked by"):
            await store.write_messages_async(f"history {number}", [ChatMessage.from_user("late")])
        return time.monotonic() - start, seconds() - counted_from

    def timed_in_a_thread(number):
        counted_from = seconds()
        with pytest.raises(StoreTimeoutError):
            say(store, "late", f"history {number}")
        return seconds() - counted_from

    async def all_of_them():
        return await asyncio.gather(*map(timed, range(100)))

    with opened(path) as other, Stopwatch() as seconds:
        other.execute("BEGIN IMMEDIATE")
        waited, counted = zip(*asyncio.run(all_of_them()), strict=True)
        assert 0.9 < min(waited)
        assert max(counted) < 2
        assert max(in_threads(timed_in_a_thread, 20)) < 2
    assert store.statistics().messages == 1


def in_threads(call, count):
    with ThreadPoolExecutor(count) as executor:
        return list(executor.map(call, range(count)))


def test_a_call_that_waits_for_a_long_one_of_this_process_hears_at_the_timeout(new_store):
    store = new_store(timeout=0.5)
    say(store, "before")
    may_end = threading.Event()

    def long_call(session):
        may_end.wait(30)

    async def main():
        running = asyncio.ensure_future(store.engine.run_async(long_call))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        with Stopwatch() as seconds, pytest.raises(StoreTimeoutError, match="other calls of this process"):
            await store.write_messages_async("history", [ChatMessage.from_user("late")])
        assert 0.4 < time.monotonic() - start
        assert seconds() < 1
        cancelled = asyncio.ensure_future(store.delete_messages_async("history"))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        may_end.set()
        await running

    asyncio.run(main())
    assert said(store) == ["before"]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_deleting_everything_goes_in_steps_between_which_others_write(new_store, path, monkeypatch, way):
    monkeypatch.setattr("haystack_chat_store.stores.sqlite.directory._MESSAGES_PER_STEP", 10)
    store, other = new_store(), new_store(namespace="other")
    say(other, "theirs")
    for number in range(20):
        store.write_messages(f"history {number}", [ChatMessage.from_user("Hi!")] * 5)
    left = []
    wait = connections.Database.pause_for_other_writers

    def watched(database):
        left.append(rows(path, "SELECT count(*) FROM haystack_chat_messages")[0][0])
        say(other, "meanwhile")
        wait(database)

    monkeypatch.setattr(connections.Database, "pause_for_other_writers", watched)
    asyncio.run(store.delete_all_messages_async()) if way == "async" else store.delete_all_messages()
    assert left == [100 - 10 * (number + 1) + number + 1 for number in range(len(left))]
    assert len(left) >= 9
    assert store.statistics().messages == 0
    assert said(other) == ["theirs"] + ["meanwhile"] * len(left)


def test_while_one_of_two_forks_is_still_under_way_no_connection_is_lent(store):
    say(store, "before")
    database = connections.databases.get(store.engine.settings)
    is_written = threading.Event()
    database.before_fork()
    database.before_fork()
    database.after_fork_in_parent()
    writing = threading.Thread(target=lambda: (say(store, "after"), is_written.set()))
    writing.start()
    assert not is_written.wait(0.2)
    assert not database._lent
    database.after_fork_in_parent()
    writing.join(50)
    assert said(store) == ["before", "after"]


# ---------------------------------------------------------------------- a write in the middle of a write


class WritesAsItGoes:
    """An object whose finalizer writes."""

    def __init__(self, write, errors):
        self._write, self._errors = write, errors

    def __del__(self):
        try:
            self._write()
        except StoreUnavailableError as error:
            self._errors.append(error)


@pytest.mark.parametrize("way", ["in the main thread", "in a thread", "in a task"])
@pytest.mark.parametrize("inner", ["append", "delete"])
def test_a_finalizer_that_writes_in_the_middle_of_a_write_hears_so_at_once(store, way, inner):
    say(store, "before")
    errors = []

    def renew(session, holder):
        with session.transaction() as connection:
            holder.clear()
            return connection.in_transaction

    inner = {"append": lambda: say(store, "inner"), "delete": lambda: store.delete_messages("history")}[inner]
    holder = [WritesAsItGoes(inner, errors)]
    if way == "in the main thread":
        assert store.engine.run(renew, holder)
    elif way == "in a thread":
        assert in_threads(lambda _: store.engine.run(renew, holder), 1) == [True]
    else:
        assert asyncio.run(store.engine.run_async(renew, holder))
    (error,) = errors
    assert not isinstance(error, StoreTimeoutError)
    assert "in the middle of another write" in str(error)
    say(store, "after")
    assert said(store) == ["before", "after"]


class WritesInACycle(WritesAsItGoes):
    """The same, which only the collector of garbage frees."""

    def __init__(self, write, errors):
        super().__init__(write, errors)
        self.itself = self


@pytest.mark.parametrize("way", ["in the main thread", "in a thread"])
@pytest.mark.parametrize("inner", ["append", "delete", "read"])
def test_a_finalizer_that_uses_the_store_at_any_moment_of_a_write_hangs_nothing(new_store, way, inner):
    store = new_store(timeout=60, last_k=None)
    inner = {
        "append": lambda: store.write_messages("another", [ChatMessage.from_user("inner")]),
        "delete": lambda: store.delete_messages("another"),
        "read": lambda: store.count_messages("history"),
    }[inner]
    numbers, errors = [f"{number}" for number in range(60)], []

    def write():
        thresholds = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for number in numbers:
                WritesInACycle(inner, errors)
                store.write_messages("history", [ChatMessage.from_user(number)])
        finally:
            gc.set_threshold(*thresholds)
            gc.collect()

    if way == "in the main thread":
        write()
    else:
        in_threads(lambda _: write(), 1)
    assert not any(isinstance(error, StoreTimeoutError) for error in errors)
    assert [message.text for message in store.retrieve_messages("history")] == numbers
