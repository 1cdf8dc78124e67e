# SPDX-License-Identifier: Apache-2.0
"""Tests with threads, event loops and cancelled tasks in one process: rules 3, 4, 12 and 13 of the contract."""

import asyncio
import gc
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, only_where, texts

#: The time after which a test counts as hanging, in seconds. Every test takes far less.
HANG_LIMIT = 120.0

#: The time for which a test stalls the engine, in seconds.
STALL = 1.0

ResultT = TypeVar("ResultT")

#: The texts of messages that are written in one call. No text occurs twice in a test.
Batch = list[str]


def planned_batches(writers: int, batches: int) -> list[list[Batch]]:
    """
    Return the batches that each writer writes: one to fifty messages each, the same at every call.

    :param writers: The number of writers.
    :param batches: The number of batches of each writer.
    """
    sizes = random.Random(writers * batches)
    return [
        [[f"{writer}.{number}.{index}" for index in range(sizes.choice([1, 2, 3, 5, 50]))] for number in range(batches)]
        for writer in range(writers)
    ]


def to_messages(batch: Batch) -> list[ChatMessage]:
    """Return a batch as messages: questions and answers alternate."""
    return [
        ChatMessage.from_assistant(text) if index % 2 else ChatMessage.from_user(text)
        for index, text in enumerate(batch)
    ]


def assert_whole_and_in_order(
    found: Sequence[str | None], writers: Sequence[Sequence[Batch]], acknowledged: Iterable[str]
) -> None:
    """
    Check that a history consists of whole batches, without duplicates, and keeps the order of each writer.

    :param found: The texts in the history.
    :param writers: The batches that each writer wrote or may have written, in order.
    :param acknowledged: Texts that must be in the history.
    """
    places = {
        batch[0]: (writer, number) for writer, batches in enumerate(writers) for number, batch in enumerate(batches)
    }
    newest = dict.fromkeys(range(len(writers)), -1)
    position = 0
    while position < len(found):
        first = found[position] or ""
        assert first in places, f"{first!r}, at position {position}, comes without the beginning of its batch"
        writer, number = places[first]
        batch = writers[writer][number]
        assert list(found[position : position + len(batch)]) == batch, "a batch was split"
        assert number > newest[writer], f"{first!r} is there twice, or behind a later batch of its writer"
        newest[writer] = number
        position += len(batch)
    lost = set(acknowledged).difference(text for text in found if text is not None)
    assert not lost, "messages were lost"


def in_threads(*functions: Callable[[], ResultT]) -> list[ResultT]:
    """
    Call functions at the same time, each on its own thread, and return their results.

    :raises TimeoutError: If a function hangs. Its thread is abandoned, so that the test does not hang too.
    """
    start = threading.Barrier(len(functions))
    futures: list[Future[ResultT]] = [Future() for _ in functions]

    def call(function: Callable[[], ResultT], future: "Future[ResultT]") -> None:
        start.wait()
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in zip(functions, futures, strict=True)]
    usual_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # frequent switches between threads reveal code that is not thread-safe
    try:
        for thread in threads:
            thread.start()
        results = [future.result(HANG_LIMIT) for future in futures]
        for thread in threads:
            thread.join(HANG_LIMIT)
    finally:
        sys.setswitchinterval(usual_interval)
    return results


def assert_piles_up_nothing(use: Callable[[], Any]) -> None:
    """
    Check that a process has no more threads and file descriptors after 20 uses of a store than after 5.

    :param use: Uses the store once. It runs on a new thread each time, and the thread has ended before the count.
    """
    for _ in range(5):
        in_threads(use)
    time.sleep(0.3)  # closing may take a moment
    held = _held()
    for _ in range(15):
        in_threads(use)
    _assert_not_much_more_than(held)


def _assert_not_much_more_than(held: tuple[int, int]) -> None:
    """
    Check that the numbers of threads and file descriptors have grown by less than ten.

    A pool may still grow a little towards its limit. A leak would grow with each of many uses.
    """
    deadline = time.monotonic() + 10
    while True:
        more_threads, more_files = (now - before for now, before in zip(_held(), held, strict=True))
        if max(more_threads, more_files) < 10:
            return
        assert time.monotonic() < deadline, f"{more_threads} threads and {more_files} file descriptors piled up"
        time.sleep(0.05)


def _held() -> tuple[int, int]:
    gc.collect()
    has_file_descriptors = os.path.isdir("/dev/fd")  # Linux and macOS
    return threading.active_count(), len(os.listdir("/dev/fd")) if has_file_descriptors else 0


class WholeHistoriesTest(ContractTest):
    """The base of tests that read whole histories."""

    @pytest.fixture
    def whole_store(self, new_store: StoreFactory) -> ClosableStore:
        """Return a store that retrieves whole histories by default."""
        return new_store(last_k=None)


@dataclass(frozen=True)
class _Stall:
    """
    A stalled engine.

    :param calls_begin: The test sets it when its calls begin. The engine stays stalled for one more second.
    :param ends: Set just before the stall ends.
    """

    calls_begin: threading.Event = field(default_factory=threading.Event)
    ends: threading.Event = field(default_factory=threading.Event)


class ConcurrencyTest(WholeHistoriesTest):
    """
    Checks a store's promises about threads, event loops and cancelled tasks.

    ```python
    import sqlite3
    from contextlib import contextmanager
    import pytest
    from haystack_chat_store import SQLiteChatMessageStore
    from haystack_chat_store.testing import ConcurrencyTest

    class TestMyStore(ConcurrencyTest):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda **settings: SQLiteChatMessageStore(tmp_path / "chat.db", **settings)

        @contextmanager
        def stalled(self, store):
            connection = sqlite3.connect(store.path, isolation_level=None)
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.close()
    ```
    """

    #: Override it with a context manager that takes a store and makes all writes wait until its end, for example with a
    #: lock on a separate connection. One thread enters and leaves it, and other threads use the store. The database may
    #: be empty. Do not override it for an engine that cannot stall, such as one in memory.
    stalled: Any = None

    @pytest.fixture
    def noise(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """Collect errors that Python can only log, and check at the end of the test that there were none."""
        heard: list[str] = []

        class Listener(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                heard.append(record.getMessage())

        monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(repr(unraisable.exc_value)))
        monkeypatch.setattr(threading, "excepthook", lambda uncaught: heard.append(repr(uncaught.exc_value)))
        listener, asyncio_log = Listener(logging.WARNING), logging.getLogger("asyncio")
        asyncio_log.addHandler(listener)
        yield heard
        gc.collect()
        asyncio_log.removeHandler(listener)
        assert heard == []

    @contextmanager
    def _stalled_for_a_while(self, store: ClosableStore) -> Iterator[_Stall]:
        """Stall the engine from another thread, until a second after the test's calls have begun."""
        has_begun, stalled = threading.Event(), _Stall()

        def stall() -> None:
            with self.stalled(store):
                has_begun.set()
                stalled.calls_begin.wait(HANG_LIMIT)
                time.sleep(STALL)
                stalled.ends.set()

        holder = threading.Thread(target=stall, daemon=True)
        holder.start()
        assert has_begun.wait(HANG_LIMIT), "the engine could not be stalled"
        yield stalled
        stalled.calls_begin.set()
        holder.join(HANG_LIMIT)

    # ------------------------------------------------------------------ threads

    @pytest.mark.parametrize("stores", ["one store object", "a store object each"])
    @pytest.mark.parametrize("histories", [1, 3])
    def test_threads_lose_double_split_and_reorder_nothing(
        self, new_store: StoreFactory, calls: Calls, stores: str, histories: int
    ) -> None:
        """Rule 4. Each thread writes its batches to the histories in turn."""
        writers = planned_batches(8, 12)
        one_store = new_store(last_k=None)
        own_stores = [one_store if stores == "one store object" else new_store(last_k=None) for _ in writers]

        def write(store: ClosableStore, batches: list[Batch]) -> None:
            for number, batch in enumerate(batches):
                assert calls.write(store, f"history {number % histories}", to_messages(batch)) == len(batch)

        in_threads(*(lambda pair=pair: write(*pair) for pair in zip(own_stores, writers, strict=True)))

        for history in range(histories):
            expected = [batches[history::histories] for batches in writers]
            found = texts(calls.retrieve(one_store, f"history {history}"))
            assert_whole_and_in_order(found, expected, _all_texts(expected))
            assert calls.count(one_store, f"history {history}") == len(found)

    def test_readers_see_whole_batches_while_others_write(self, whole_store: ClosableStore, calls: Calls) -> None:
        """Rule 3. For a reader, a history only grows at its end."""
        writers = planned_batches(4, 20)
        has_written = threading.Event()

        def read() -> None:
            seen: list[str | None] = []
            is_last = False
            while not is_last:
                is_last = has_written.is_set()
                found = texts(calls.retrieve(whole_store, "history"))
                assert found[: len(seen)] == seen
                assert_whole_and_in_order(found, writers, acknowledged=())
                seen = found
            assert_whole_and_in_order(seen, writers, _all_texts(writers))

        in_threads(lambda: _write_all(calls, whole_store, writers, has_written), read, read)

    def test_closing_disturbs_no_call_of_another_thread(self, whole_store: ClosableStore, calls: Calls) -> None:
        """Rules 12 and 13. A running call finishes, and the next call opens the store again. Nothing stays open."""
        writers = planned_batches(4, 30)
        held = _held()
        has_written = threading.Event()

        def close_often() -> None:
            while not has_written.wait(0.005):
                calls.close(whole_store)

        in_threads(lambda: _write_all(calls, whole_store, writers, has_written), close_often)
        calls.close(whole_store)
        _assert_not_much_more_than(held)
        assert_whole_and_in_order(texts(calls.retrieve(whole_store, "history")), writers, _all_texts(writers))

    # ------------------------------------------------------------------ event loops

    def test_tasks_lose_double_split_and_reorder_nothing(self, whole_store: ClosableStore) -> None:
        """Rule 4. Fifty tasks of one event loop write to one history."""
        writers = planned_batches(50, 3)

        async def write(batches: list[Batch]) -> None:
            for batch in batches:
                assert await whole_store.write_messages_async("history", to_messages(batch)) == len(batch)

        async def write_all() -> list[ChatMessage]:
            await asyncio.gather(*(write(batches) for batches in writers))
            return await whole_store.retrieve_messages_async("history")

        (found,) = in_threads(lambda: asyncio.run(write_all()))
        assert_whole_and_in_order(texts(found), writers, _all_texts(writers))

    def test_two_event_loops_use_one_store_at_once(self, whole_store: ClosableStore) -> None:
        """Rule 12. Both loops run on two threads until both have written everything."""
        writers = planned_batches(2, 20)
        both_loops_run = threading.Barrier(2)

        async def write(batches: list[Batch]) -> None:
            both_loops_run.wait(HANG_LIMIT)
            for batch in batches:
                await asyncio.gather(
                    whole_store.write_messages_async("history", to_messages(batch)),
                    whole_store.retrieve_messages_async("history"),
                    whole_store.count_messages_async("history"),
                )
            await asyncio.to_thread(both_loops_run.wait, HANG_LIMIT)

        in_threads(*(lambda batches=batches: asyncio.run(write(batches)) for batches in writers))
        assert_whole_and_in_order(texts(whole_store.retrieve_messages("history")), writers, _all_texts(writers))

    @pytest.mark.parametrize("closes", [False, True], ids=["left open", "closed"])
    def test_event_loops_one_after_the_other_pile_up_nothing(self, store: ClosableStore, closes: bool) -> None:
        """Rule 12. Twenty `asyncio.run` calls, with and without closing the store at the end of each."""

        async def use() -> None:
            written = await asyncio.gather(
                *(store.write_messages_async(f"history {n}", [ChatMessage.from_user("Hi!")]) for n in range(20))
            )
            assert written == [1] * 20
            if closes:
                await store.close_async()

        assert_piles_up_nothing(lambda: asyncio.run(use()))
        assert store.count_messages("history 0") == 20

    def test_a_synchronous_call_inside_a_running_loop_does_not_deadlock(self, whole_store: ClosableStore) -> None:
        """Rule 12. The call works alone, and while asynchronous calls on the same store are running."""
        writers = planned_batches(30, 1)

        async def main() -> None:
            whole_store.write_messages("history", to_messages(writers[0][0]))
            under_way = [
                asyncio.create_task(whole_store.write_messages_async("history", to_messages(batch)))
                for (batch,) in writers[2:]
            ]
            await asyncio.sleep(0)
            whole_store.write_messages("history", to_messages(writers[1][0]))
            assert whole_store.count_messages("history") >= len(writers[0][0]) + len(writers[1][0])
            assert whole_store.retrieve_messages("history", last_k=1)
            await asyncio.gather(*under_way)

        in_threads(lambda: asyncio.run(main()))
        assert_whole_and_in_order(texts(whole_store.retrieve_messages("history")), writers, _all_texts(writers))

    @only_where("stalled")
    def test_a_synchronous_call_inside_a_running_loop_waits_for_a_stalled_engine(self, store: ClosableStore) -> None:
        """Rule 12. The call blocks the loop while asynchronous calls wait too. Afterwards, all of them continue."""

        async def main(stall: _Stall) -> None:
            stall.calls_begin.set()
            under_way = [
                asyncio.create_task(store.write_messages_async("history", [ChatMessage.from_user("Hi!")]))
                for _ in range(20)
            ]
            await asyncio.sleep(0)
            assert store.write_messages("history", [ChatMessage.from_user("Hi!")]) == 1
            assert stall.ends.is_set(), "nothing waited, so the engine was not stalled"
            assert await asyncio.gather(*under_way) == [1] * 20

        store.count_messages("history")
        with self._stalled_for_a_while(store) as stall:
            in_threads(lambda: asyncio.run(main(stall)))
        assert store.count_messages("history") == 21

    @only_where("stalled")
    @pytest.mark.parametrize("opens", [True, False], ids=["first use", "open"])
    def test_a_stalled_engine_does_not_block_the_event_loop(self, store: ClosableStore, opens: bool) -> None:
        """Rule 12. While a write waits for the engine, other tasks continue. The write may be the store's first use."""
        gaps: list[float] = []
        gaps_of_a_thread: list[float] = [0.0]
        has_ended = threading.Event()

        async def tick() -> None:
            last = time.monotonic()
            while True:
                await asyncio.sleep(0.01)
                now = time.monotonic()
                gaps.append(now - last)
                last = now

        def tick_beside() -> None:
            last = time.monotonic()
            while not has_ended.wait(0.01):
                now = time.monotonic()
                gaps_of_a_thread.append(now - last)
                last = now

        def run(stall: _Stall) -> None:
            try:
                asyncio.run(main(stall))
            finally:
                has_ended.set()

        async def main(stall: _Stall) -> None:
            stall.calls_begin.set()
            ticker = asyncio.create_task(tick())
            others = [
                asyncio.create_task(call)
                for call in (
                    store.delete_messages_async("another history"),
                    store.retrieve_messages_async("history"),
                    store.count_messages_async("history"),
                )
            ]
            assert await store.write_messages_async("history", [ChatMessage.from_user("Hi!")]) == 1
            assert stall.ends.is_set(), "the write did not wait, so the engine was not stalled"
            await asyncio.gather(*others)
            ticker.cancel()

        if not opens:
            store.count_messages("history")
        with self._stalled_for_a_while(store) as stall:
            in_threads(lambda: run(stall), tick_beside)
        # A blocked loop shows a gap of a whole second. On a busy machine, a thread beside it waits for its turn, too.
        assert max(gaps) < 0.8 * STALL + max(gaps_of_a_thread)
        assert texts(store.retrieve_messages("history")) == ["Hi!"]

    # ------------------------------------------------------------------ cancelled and failed tasks

    def test_a_cancelled_write_is_whole_or_absent_and_leaks_nothing(
        self, whole_store: ClosableStore, noise: list[str]
    ) -> None:
        """
        Rules 3 and 12. Tasks are cancelled at random moments: before they begin, while they run, and after they end.
        """
        moments = random.Random(0)
        writers = planned_batches(400, 1)
        rounds = iter([writers[first : first + 20] for first in range(0, 400, 20)])
        acknowledged: list[str] = []

        async def main(writers: list[list[Batch]]) -> None:
            tasks = [
                asyncio.create_task(whole_store.write_messages_async("history", to_messages(batch)))
                for (batch,) in writers
            ]
            for task in moments.sample(tasks, len(tasks) // 2):
                await asyncio.sleep(moments.choice([0, 0.001, 0.003]))
                task.cancel()
            for (batch,), result in zip(writers, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
                assert isinstance(result, asyncio.CancelledError) or result == len(batch)
                if not isinstance(result, asyncio.CancelledError):
                    acknowledged.extend(batch)

        def write_and_cancel() -> None:
            asyncio.run(main(next(rounds)))

        assert_piles_up_nothing(write_and_cancel)
        found = texts(whole_store.retrieve_messages("history"))
        assert_whole_and_in_order(found, writers, acknowledged)
        assert whole_store.count_messages("history") == len(found)

    @only_where("stalled")
    def test_a_write_cancelled_while_the_engine_stalls_is_whole_or_absent(
        self, whole_store: ClosableStore, calls: Calls, noise: list[str]
    ) -> None:
        """Rules 3 and 12. Before the stall ends, some tasks are cancelled and others still run when their loop ends."""
        writers = planned_batches(40, 1)

        async def main(stall: _Stall) -> None:
            stall.calls_begin.set()
            tasks = [
                asyncio.create_task(whole_store.write_messages_async("history", to_messages(batch)))
                for (batch,) in writers
            ]
            await asyncio.sleep(STALL / 4)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.sleep(STALL / 4)

        whole_store.count_messages("history")
        with self._stalled_for_a_while(whole_store) as stall:
            in_threads(lambda: asyncio.run(main(stall)))
        assert calls.write(whole_store, "history", [ChatMessage.from_user("afterwards")]) == 1
        found = texts(calls.retrieve(whole_store, "history"))
        assert_whole_and_in_order(found, [*writers, [["afterwards"]]], acknowledged=["afterwards"])

    def test_a_failed_write_leaves_the_writes_beside_it_alone(
        self, whole_store: ClosableStore, noise: list[str]
    ) -> None:
        """Rules 2 and 3. One of many tasks is refused because of an object that is not a message."""
        writers = planned_batches(20, 1)

        async def main() -> list[Any]:
            batches: list[list[Any]] = [to_messages(batch) for (batch,) in writers]
            batches[10].append("not a message")
            return await asyncio.gather(
                *(whole_store.write_messages_async("history", batch) for batch in batches), return_exceptions=True
            )

        (results,) = in_threads(lambda: asyncio.run(main()))
        refused = results.pop(10)
        assert isinstance(refused, ValueError)
        del writers[10]
        assert results == [len(batch) for (batch,) in writers]
        assert_whole_and_in_order(texts(whole_store.retrieve_messages("history")), writers, _all_texts(writers))

    def test_a_failed_write_in_a_group_of_tasks_leaves_whole_batches(
        self, whole_store: ClosableStore, noise: list[str]
    ) -> None:
        """Rules 3 and 12. When one task fails, all other tasks are cancelled, as in `asyncio.TaskGroup`."""
        writers = planned_batches(20, 1)

        async def main() -> list[str]:
            batches: list[list[Any]] = [to_messages(batch) for (batch,) in writers]
            batches[10].append("not a message")
            tasks = [asyncio.create_task(whole_store.write_messages_async("history", batch)) for batch in batches]
            _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(tasks[10].exception(), ValueError)
            written = [not task.cancelled() and task.exception() is None for task in tasks]
            return [text for (batch,), is_written in zip(writers, written, strict=True) if is_written for text in batch]

        (acknowledged,) = in_threads(lambda: asyncio.run(main()))
        found = texts(whole_store.retrieve_messages("history"))
        assert_whole_and_in_order(found, [*writers[:10], *writers[11:]], acknowledged)


def _write_all(calls: Calls, store: ClosableStore, writers: list[list[Batch]], has_written: threading.Event) -> None:
    """Write to one history with a thread for each writer. Set the event at the end, even after an error."""

    def write(batches: list[Batch]) -> None:
        for batch in batches:
            assert calls.write(store, "history", to_messages(batch)) == len(batch)

    try:
        in_threads(*(lambda batches=batches: write(batches) for batches in writers))
    finally:
        has_written.set()


def _all_texts(writers: Iterable[Iterable[Batch]]) -> list[str]:
    return [text for batches in writers for batch in batches for text in batch]
