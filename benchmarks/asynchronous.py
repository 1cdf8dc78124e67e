# SPDX-License-Identifier: Apache-2.0
"""
Measure what asynchronous calls cost, one after the other in one event loop.

On SQLite, beside them: the same calls made synchronously, and the synchronous calls made on a bare thread that wakes
the event loop, which is the least that a call can cost that does not block it. On a server: the asynchronous driver.
Blocks of calls alternate; medians of single calls are printed.
"""

import argparse
import asyncio
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

from conversations import conversation, encoded_conversation
from engines import KEYS, SERVERS, Engine, chosen
from measuring import LOOP
from report import markdown
from run import environment

STORED = 1000
WINDOW = 10  # rounds
SYNC, THREAD, ASYNC, FLOOR = "synchronous", "on a bare thread", "asynchronous", "floor"


class BareThread:
    """A thread that makes calls and wakes the event loop, without deadlines, errors and cancelled calls."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._calls.put((loop, future, function, arguments))
        return future

    def _run(self) -> None:
        while True:
            loop, future, function, arguments = self._calls.get()
            loop.call_soon_threadsafe(future.set_result, function(*arguments))


def operations(engine: Engine, store: Any, floor: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return what is compared: by operation, what makes one call each way."""
    turn, encoded_turn = conversation(2), encoded_conversation(2)
    for target, messages in ((store, conversation(STORED)), (floor, encoded_conversation(STORED))):
        target.write_messages("read", messages)
    calls = {
        "append a turn": ("write_messages", ("append", turn), ("append", encoded_turn)),
        f"read the last {WINDOW} rounds": ("retrieve_messages", ("read", WINDOW), ("read", WINDOW)),
        "count": ("count_messages", ("read",), ()),
    }
    thread, found = BareThread(), {}
    for name, (method, arguments, of_floor) in calls.items():
        found[name] = ways = {ASYNC: partial(getattr(store, f"{method}_async"), *arguments)}
        if not engine.server:
            synchronous = partial(getattr(store, method), *arguments)
            ways |= {SYNC: synchronous, THREAD: partial(thread.call, synchronous)}
        elif of_floor:
            ways[FLOOR] = partial(getattr(floor, f"{method}_async"), *of_floor)
    return found


async def timed_block(way: str, call: Callable[[], Any], calls: int) -> list[float]:
    """Return how long each call took, in microseconds. The first one, which follows other work, does not count."""
    taken = []
    for _ in range(calls + 1):
        started = time.perf_counter_ns()
        if way == SYNC:
            call()
        else:
            await call()
        taken.append((time.perf_counter_ns() - started) / 1000)
    return taken[1:]


def measure(engine: Engine, folder: Path, blocks: int, calls: int) -> list[list[str]]:
    rows = []
    with engine.open_store(folder) as store, engine.open_floor(folder) as floor:
        for operation, ways in operations(engine, store, floor).items():
            taken: dict[str, list[float]] = defaultdict(list)
            for _ in range(blocks):
                for way, call in ways.items():
                    taken[way] += LOOP.run_until_complete(timed_block(way, call, calls))
            medians = {way: median(each) for way, each in taken.items()}
            compared = (SYNC, THREAD, FLOOR)
            times = [f"{medians[way]:,.0f}" if way in medians else "-" for way in (*compared, ASYNC)]
            ratios = [f"{medians[ASYNC] / medians[way]:.2f}" if way in medians else "-" for way in compared]
            rows.append([engine.name, operation, *times, *ratios])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", default="sqlite-full,sqlite-normal,redis", help=f"some of {', '.join(KEYS)}")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--calls", type=int, default=30, help="calls in a block")
    arguments = parser.parse_args()
    columns = ["store", "operation", f"{SYNC}, µs", f"{THREAD}, µs", f"{FLOOR}, µs", f"{ASYNC}, µs"]
    columns += [f"x {way}" for way in (SYNC, THREAD, FLOOR)]
    rows = []
    with ExitStack() as running, tempfile.TemporaryDirectory(prefix="chat-store-benchmark-") as name:
        engines = chosen(arguments.engines.split(","), dict.fromkeys(SERVERS), running)
        for engine in engines:
            folder = Path(name, engine.key)
            folder.mkdir()
            rows += measure(engine, folder, arguments.blocks, arguments.calls)
    print(environment(engines), markdown(columns, rows), sep="\n\n")


if __name__ == "__main__":
    main()
