# SPDX-License-Identifier: Apache-2.0
"""
Write from many processes, threads and tasks, kill processes, restart servers, and look for what went wrong.

`nox -s torture` runs it on every engine; `nox -s torture -- --writes 500 --engines sqlite` a little of it. Eight
processes, each with four threads and four tasks, write batches to the same histories. Every few seconds a process is
killed and another one begins, and the server is stopped or killed, and started again. In the end, each batch that a
call has acknowledged must be there once, whole, and after those that the same writer had acknowledged before.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from haystack.dataclasses import ChatMessage
from servers import PostgresServer, RedisCluster, RedisServer

from haystack_chat_store import ChatMessageStoreError, store_from_url, with_message_ids
from haystack_chat_store.doctor import check

PROCESSES, THREADS, TASKS = 8, 4, 4
HISTORIES = 32
ENGINES = ("sqlite", "postgres", "redis", "redis_cluster")
WRITES = 52_000  # of each engine: over 200,000 in all
SECONDS_BETWEEN_KILLS = 5
SECONDS_BETWEEN_RESTARTS = 8
# Every line of a writer's notes has this length, so that they can be counted without reading them.
NOTE_LENGTH = 64
# A call waits no longer than that. A server is away for about a second.
TIMEOUT = 20


class Batch(NamedTuple):
    """Messages that one call has written, and where."""

    history: str
    writer: str
    number: int
    size: int


# ------------------------------------------------------------------ a process that writes


class Notes:
    """What a process knows to be stored, written down so that it outlives the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def add(self, batch: Batch) -> None:
        """Write a batch down. A kill leaves the whole line, or nothing."""
        os.write(self._file, " ".join(map(str, batch)).ljust(NOTE_LENGTH - 1).encode() + b"\n")


class WrongResultError(Exception):
    """A call has returned what it cannot have done."""


def batches_of(writer: str, ends: threading.Event) -> Iterator[tuple[Batch, list[ChatMessage], bool]]:
    """Yield batches until the end, each with its messages and whether they have ids."""
    choose, number = random.Random(writer), 0
    while not ends.is_set():
        batch = Batch(f"history {choose.randrange(HISTORIES)}", writer, number, choose.choice((1, 2, 2, 3, 8)))
        number += 1
        has_ids = choose.random() < 0.5
        messages = [ChatMessage.from_user(f"{writer} {batch.number} {n} {batch.size}") for n in range(batch.size)]
        yield batch, with_message_ids(messages) if has_ids else messages, has_ids


def check_result(batch: Batch, written: int, is_repeated: bool) -> None:
    """Raise an error if a call returned another number than it can have written."""
    if written != batch.size and not (is_repeated and written == 0):
        raise WrongResultError(f"{batch}: a call returned {written}")


def write_in_thread(url: str, writer: str, notes: Notes, ends: threading.Event) -> None:
    """Write with the synchronous method. A batch with ids is repeated until it is acknowledged."""
    store = store_from_url(url, timeout=TIMEOUT)
    for batch, messages, has_ids in batches_of(writer, ends):
        is_repeated = False
        while not ends.is_set():
            try:
                check_result(batch, store.write_messages(batch.history, messages), is_repeated)
                notes.add(batch)
            except ChatMessageStoreError:
                time.sleep(0.1)
                if has_ids:
                    is_repeated = True
                    continue
            break


async def write_in_task(url: str, writer: str, notes: Notes, ends: threading.Event) -> None:
    """Do what `write_in_thread` does, with the asynchronous method."""
    store = store_from_url(url, timeout=TIMEOUT)
    for batch, messages, has_ids in batches_of(writer, ends):
        is_repeated = False
        while not ends.is_set():
            try:
                check_result(batch, await store.write_messages_async(batch.history, messages), is_repeated)
                notes.add(batch)
            except ChatMessageStoreError:
                await asyncio.sleep(0.1)
                if has_ids:
                    is_repeated = True
                    continue
            break
        await asyncio.sleep(0)


def write(url: str, name: str, folder: Path) -> None:
    """Be a process that writes, until its standard input ends."""
    notes, ends = Notes(folder / f"{name}.notes"), threading.Event()
    failed: list[BaseException] = []

    def run(function, *arguments) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # raised below, in the main thread
            failed.append(error)
            ends.set()

    async def write_in_tasks() -> None:
        await asyncio.gather(*(write_in_task(url, f"{name}.a{n}", notes, ends) for n in range(TASKS)))

    threads = [
        threading.Thread(target=run, args=(write_in_thread, url, f"{name}.t{n}", notes, ends)) for n in range(THREADS)
    ]
    threads.append(threading.Thread(target=run, args=(lambda: asyncio.run(write_in_tasks()),)))
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ends.set()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


# ------------------------------------------------------------------ what is found in the end


@dataclass
class Findings:
    """What went wrong, by its kind."""

    lost: list[Batch] = field(default_factory=list)
    doubled: list[Batch] = field(default_factory=list)
    split: list[Batch] = field(default_factory=list)
    reordered: list[Batch] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{len(found)} {kind}" for kind, found in vars(self).items())

    def __bool__(self) -> bool:
        return any(vars(self).values())


def findings(acknowledged: Iterable[Batch], stored: dict[str, list[str]]) -> Findings:
    """
    Compare what was acknowledged with what is stored.

    :param stored: The texts of each history, in order.
    """
    found, promised = Findings(), set(acknowledged)
    seen: set[Batch] = set()
    for history, texts in stored.items():
        last: dict[str, int] = defaultdict(lambda: -1)
        index = 0
        while index < len(texts):
            writer, number, _, size = texts[index].split()
            batch = Batch(history, writer, int(number), int(size))
            expected = [f"{writer} {number} {n} {size}" for n in range(batch.size)]
            whole = texts[index : index + batch.size] == expected
            if not whole:
                found.split.append(batch)
            elif batch in seen:
                found.doubled.append(batch)
            elif batch in promised:  # another batch may come later than its writer, who heard of an error, went on
                if batch.number < last[writer]:
                    found.reordered.append(batch)
                last[writer] = batch.number
            seen.add(batch)
            index += batch.size if whole else 1
    found.lost = sorted(promised - seen)
    return found


def acknowledged_in(folder: Path) -> list[Batch]:
    """Return what the processes have written down."""
    lines = [line.rsplit(maxsplit=3) for path in folder.glob("*.notes") for line in path.read_text().splitlines()]
    return [Batch(history, writer, int(number), int(size)) for history, writer, number, size in lines]


# ------------------------------------------------------------------ the run


class Writers:
    """The processes that write."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self._running: list[subprocess.Popen] = []
        self.started = self.killed = 0

    def fill(self) -> None:
        """Start processes until all are there."""
        while len(self._running) < PROCESSES:
            command = [sys.executable, __file__, "--write", self._url, f"p{self.started}", str(self._folder)]
            self._running.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            self.started += 1

    def kill_one(self) -> None:
        """Kill one of the processes."""
        process = self._running.pop(random.randrange(len(self._running)))
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise WrongResultError(f"A writer ended with status {process.returncode} before it was killed.")
        self.killed += 1

    def end(self) -> None:
        """Have all processes end what they are at."""
        for process in self._running:
            process.stdin.close()
        codes = [process.wait() for process in self._running]
        self._running.clear()
        if any(codes):
            raise WrongResultError(f"Writers ended with the statuses {codes}.")

    def abandon(self) -> None:
        """Kill what still runs."""
        for process in self._running:
            process.kill()
            process.communicate()

    def written(self) -> int:
        """Return how many writes have been acknowledged until now."""
        return sum(path.stat().st_size for path in self._folder.glob("*.notes")) // NOTE_LENGTH


@contextmanager
def engine(name: str, folder: Path):
    """Provide an engine: its URL, and the servers to restart one after the other."""
    if name == "sqlite":
        yield f"sqlite:///{folder}/chat.db", []
    elif name == "postgres":
        with PostgresServer(max_connections=300) as server:
            yield server.create_database(), [server]
    elif name == "redis":
        with RedisServer() as server:
            yield server.url, [server]
    else:
        with RedisCluster() as cluster:
            yield cluster.url, cluster.nodes


def torture(name: str, writes: int) -> bool:
    """Torture an engine until so many writes were acknowledged. Return whether nothing went wrong."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-")))
        url, servers = stack.enter_context(engine(name, folder))
        writers = Writers(url, folder)
        stack.callback(writers.abandon)
        began = next_kill = next_restart = time.monotonic()
        restarts = 0
        next_kill += SECONDS_BETWEEN_KILLS
        next_restart += SECONDS_BETWEEN_RESTARTS
        # A third of the processes must have been killed, and each server stopped and killed.
        while writers.written() < writes or 3 * writers.killed < writers.started or restarts < 2 * len(servers):
            writers.fill()
            time.sleep(0.1)
            if time.monotonic() > next_kill:
                writers.kill_one()
                next_kill = time.monotonic() + SECONDS_BETWEEN_KILLS
            if time.monotonic() > next_restart:
                if servers:
                    server = servers[restarts // 2 % len(servers)]
                    (server.kill if restarts % 2 else server.stop)()
                    server.start()
                restarts += 1
                next_restart = time.monotonic() + SECONDS_BETWEEN_RESTARTS
        writers.end()
        seconds = time.monotonic() - began
        acknowledged = acknowledged_in(folder)
        store = store_from_url(url, timeout=120)
        stack.callback(store.close)
        histories = [info.chat_history_id for info in store.list_chat_histories(limit=2 * HISTORIES).items]
        stored = {
            history: [stored.message.text or "" for stored in store.iterate_messages(history)] for history in histories
        }
        miscounted = [history for history in histories if store.count_messages(history) != len(stored[history])]
        faults = [fault.description for fault in check(store)]
        found = findings(acknowledged, stored)
        messages = sum(batch.size for batch in acknowledged)
        print(
            f"{name}: {len(acknowledged):,} acknowledged writes of {messages:,} messages in {seconds:.0f} s;"
            f" {writers.killed} of {writers.started} processes killed, {restarts if servers else 0} restarts; {found};"
            f" {len(miscounted)} miscounted, {len(faults)} faults",
            flush=True,
        )
        return not (found or miscounted or faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writes", type=int, default=WRITES, help=f"acknowledged writes of each engine: {WRITES:,}")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"some of {', '.join(ENGINES)}; default: all")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        url, name, folder = arguments.write
        write(url, name, Path(folder))
        return
    if not set(arguments.engines.split(",")) <= set(ENGINES):
        parser.error(f"--engines must be some of {', '.join(ENGINES)}.")
    results = [torture(name, arguments.writes) for name in arguments.engines.split(",")]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
