# SPDX-License-Identifier: Apache-2.0
"""
Measure how many turns many writers of one process store in one history of PostgreSQL in a second, beside a floor.

Floor: raw psycopg, a connection for each writer, autocommit, one prepared `INSERT` of two rows encoded beforehand. It
only inserts: the process hands out the positions, and no row is locked. So the server lets writers share a flush. The
floor and the store run one after the other, in turn; medians are printed.
"""

import argparse
import itertools
import platform
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from conversations import conversation, encoded_conversation
from group_commit import Measured, in_tasks, in_threads
from haystack.utils import Secret
from measuring import LOOP

from haystack_chat_store import with_message_ids
from haystack_chat_store.stores.postgres import PostgresChatMessageStore

# The tests have the code that starts private servers.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
import servers

HISTORY = "history"
TURN = conversation(2)
TEXTS = encoded_conversation(2)


class Floor:
    """Raw psycopg, with a connection for each thread or task."""

    _CREATE = """
        CREATE TABLE IF NOT EXISTS floor (history TEXT, position INTEGER, content TEXT, PRIMARY KEY (history, position))
    """
    _INSERT = "INSERT INTO floor VALUES (%s, %s, %s), (%s, %s, %s)"

    def __init__(self, url: str) -> None:
        self._url = url
        self._positions = itertools.count(step=len(TEXTS))
        self._idle: list[psycopg.Connection[Any]] = []
        self._idle_async: list[psycopg.AsyncConnection[Any]] = []
        with psycopg.connect(url) as connection:
            connection.execute(self._CREATE)

    def write(self, _: str) -> None:
        connection = self._idle.pop() if self._idle else psycopg.connect(self._url, autocommit=True)
        connection.execute(self._INSERT, self._rows(), prepare=True)
        self._idle.append(connection)

    async def write_async(self, _: str) -> None:
        if self._idle_async:
            connection = self._idle_async.pop()
        else:
            connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
        await connection.execute(self._INSERT, self._rows(), prepare=True)
        self._idle_async.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        for connection in self._idle_async:
            LOOP.run_until_complete(connection.close())

    def _rows(self) -> list[Any]:
        start = next(self._positions)
        return [value for place, text in enumerate(TEXTS, start) for value in (HISTORY, place, text)]


def compare(url: str, counts: Sequence[int], turns: int, repetitions: int) -> None:
    with closing(Floor(url)) as floor, closing(PostgresChatMessageStore(Secret.from_token(url))) as store:

        def write(_: str) -> int:
            return store.write_messages(HISTORY, TURN)

        def write_with_ids(_: str) -> int:
            return store.write_messages(HISTORY, with_message_ids(TURN))

        async def write_async(_: str) -> int:
            return await store.write_messages_async(HISTORY, TURN)

        in_tasks_of_one_loop = partial(in_tasks, run=LOOP.run_until_complete)
        kinds: list[tuple[str, Any, Any, Any]] = [
            ("threads", in_threads, floor.write, write),
            ("threads, messages with ids", in_threads, floor.write, write_with_ids),
            ("tasks", in_tasks_of_one_loop, floor.write_async, write_async),
        ]
        for (kind, run, *sides), count in itertools.product(kinds, counts):
            found: tuple[list[Measured], list[Measured]] = ([], [])
            for repetition in range(repetitions + 1):
                for index in (0, 1) if repetition % 2 else (1, 0):
                    result = run(sides[index], count, max(4, turns // count))
                    if repetition:
                        found[index].append(result)
            middle = [Measured(*map(median, zip(*each, strict=True))) for each in found]
            ratio = median(mine.rate / its.rate for its, mine in zip(*found, strict=True))
            print(
                f"| {count} {kind} | "
                + " | ".join(f"{each.rate:,.0f} | {each.middle:.2f} / {each.slow:.2f}" for each in middle)
                + f" | {ratio:.2f} x |",
                flush=True,
            )
        LOOP.run_until_complete(store.close_async())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2000, help="turns of all writers together in a repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--writers", default="1,8,32")
    arguments = parser.parse_args()
    with servers.PostgresServer() as server:
        print(f"Python {platform.python_version()}, psycopg {psycopg.__version__}\n")
        print("| writers | floor: turns/s | p50 / p99 ms | store: turns/s | p50 / p99 ms | store / floor |")
        print("|---|---|---|---|---|---|")
        counts = [int(each) for each in arguments.writers.split(",")]
        compare(server.url, counts, arguments.turns, arguments.repetitions)


if __name__ == "__main__":
    main()
