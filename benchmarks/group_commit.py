# SPDX-License-Identifier: Apache-2.0
"""
Measure how many turns many writers of one SQLite file store in a second, beside a floor.

Floor: raw `sqlite3`, one connection and a lock, one commit for each turn, rows encoded beforehand. The floor and the
store run one after the other, in turn; medians are printed. The main thread only waits.
"""

import argparse
import asyncio
import platform
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from conversations import conversation, encoded_conversation

from haystack_chat_store import SQLiteChatMessageStore

TURN = conversation(2)
TEXTS = encoded_conversation(2)


class Floor:
    """Raw `sqlite3` with a table whose rows lie as the store's do."""

    def __init__(self, path: Path, durability: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for statement in (
            "PRAGMA journal_mode = wal",
            f"PRAGMA synchronous = {durability}",
            "CREATE TABLE messages (history TEXT, position INTEGER, content TEXT, PRIMARY KEY (history, position))",
        ):
            self._connection.execute(statement)
        self._lock = threading.Lock()
        self._ends: dict[str, int] = {}

    def write(self, chat_history_id: str) -> None:
        with self._lock:
            end = self._ends.get(chat_history_id, 0)
            self._connection.execute("BEGIN IMMEDIATE")
            rows = [(chat_history_id, position, text) for position, text in enumerate(TEXTS, end)]
            self._connection.executemany("INSERT INTO messages VALUES (?, ?, ?)", rows)
            self._connection.execute("COMMIT")
            self._ends[chat_history_id] = end + len(TEXTS)

    def close(self) -> None:
        self._connection.close()


class Measured(NamedTuple):
    """Turns in a second, and what one turn took, in milliseconds."""

    rate: float
    middle: float
    slow: float


def in_threads(write: Callable[[str], Any], writers: int, turns: int) -> Measured:
    """Write with so many threads, each to its own history."""

    def write_turns(number: int) -> list[float]:
        return [timed(lambda: write(f"history {number}")) for _ in range(turns)]

    with ThreadPoolExecutor(writers) as threads:
        list(threads.map(lambda _: time.sleep(0.01), range(writers)))  # which starts them
        started = time.perf_counter()
        taken = list(threads.map(write_turns, range(writers)))
        return measured(taken, time.perf_counter() - started)


def in_tasks(
    write: Callable[[str], Any], writers: int, turns: int, run: Callable[[Any], Any] = asyncio.run
) -> Measured:
    """Write with so many tasks of one event loop, each to its own history."""

    async def write_turns(number: int) -> list[float]:
        taken = []
        for _ in range(turns):
            started = time.perf_counter()
            await write(f"history {number}")
            taken.append(time.perf_counter() - started)
        return taken

    async def write_all() -> list[list[float]]:
        return await asyncio.gather(*map(write_turns, range(writers)))

    started = time.perf_counter()
    taken = run(write_all())
    return measured(taken, time.perf_counter() - started)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measured(taken: list[list[float]], elapsed: float) -> Measured:
    all_taken = [each for of_writer in taken for each in of_writer]
    slow = quantiles(all_taken, n=100)[98]
    return Measured(len(all_taken) / elapsed, 1000 * median(all_taken), 1000 * slow)


def compare(folder: Path, durability: Any, turns: int, repetitions: int) -> None:
    with (
        closing(Floor(folder / f"floor-{durability}.db", durability)) as floor,
        closing(SQLiteChatMessageStore(folder / f"store-{durability}.db", durability=durability)) as store,
    ):

        def write(chat_history_id: str) -> int:
            return store.write_messages(chat_history_id, TURN)

        async def write_async(chat_history_id: str) -> int:
            return await store.write_messages_async(chat_history_id, TURN)

        trials = [("main thread", 1, lambda call, _, n: in_main(call, n), write)]
        trials += [("thread", count, in_threads, write) for count in (1, 8, 32, 64)]
        trials += [("task", count, in_tasks, write_async) for count in (1, 8, 64)]
        for kind, writers, run, store_write in trials:
            each = max(4, turns // writers)
            floors, stores = [], []
            floor_run = in_threads if run is in_tasks else run
            for repetition in range(repetitions + 1):
                sides = [(floors, floor_run, floor.write), (stores, run, store_write)]
                for found, side, call in sides if repetition % 2 else reversed(sides):
                    result = side(call, writers, each)
                    if repetition:
                        found.append(result)
            middle = [Measured(*map(median, zip(*found, strict=True))) for found in (floors, stores)]
            ratio = median(mine.rate / its.rate for its, mine in zip(floors, stores, strict=True))
            print(
                f"| {durability} | {writers} {kind}{'s' if writers > 1 else ''} | "
                + " | ".join(f"{m.rate:,.0f} | {m.middle:.2f} / {m.slow:.2f}" for m in middle)
                + f" | {ratio:.2f} x |",
                flush=True,
            )


def in_main(write: Callable[[str], Any], turns: int) -> Measured:
    """Write in this thread."""
    started = time.perf_counter()
    taken = [timed(lambda: write("history 0")) for _ in range(turns)]
    return measured([taken], time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2000, help="turns of all writers together in a repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--durability", default="full,normal")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}\n")
    print("| durability | writers | floor: turns/s | p50 / p99 ms | store: turns/s | p50 / p99 ms | store / floor |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="chat-store-benchmark-") as name:
        for durability in arguments.durability.split(","):
            compare(Path(name), durability, arguments.turns, arguments.repetitions)


if __name__ == "__main__":
    main()
