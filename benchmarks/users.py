# SPDX-License-Identifier: Apache-2.0
"""
Measure the first page of a user's conversations, and appends through the store of a user.

The histories are made by SQL: by default 10 for each of 1,000 and of 100,000 users. A missed target is not an error.
"""

import argparse
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.stores.postgres import PostgresChatMessageStore

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import servers

_HISTORIES_OF_A_USER = 10
_PREVIEW = "What is the weather like where you are, and what shall I pack? " * 3
_FILL_SQLITE = """
    WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?1)
    INSERT INTO haystack_chat_histories (namespace, chat_history_id, user_id, revision, next_position, message_count,
        round_count, created_at, updated_at, title, meta, preview, last_role, last_text, last_at)
    SELECT 'default', 'chat ' || n, 'user ' || (n % ?2), 1, 2, 2, 1, 1700000000000000 + n, 1700000000000000 + n, NULL,
        '{"model":"small"}', ?3, 'assistant', ?3, 1700000000000000
    FROM numbers
"""
_FILL_POSTGRES = """
    INSERT INTO haystack_chat_histories (history_key, namespace, chat_history_id, user_id, revision, next_position,
        message_count, round_count, created_at, updated_at, meta, preview, last_role, last_text, last_at)
    SELECT gen_random_uuid(), 'default', 'chat ' || n, 'user ' || (n %% %(users)s::bigint), 1, 2, 2, 1, now(),
        'epoch'::timestamptz + n * interval '1 millisecond', '{"model":"small"}', %(preview)s, 'assistant', %(preview)s,
        now()
    FROM generate_series(1, %(histories)s::bigint) AS numbers (n)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", default="1000,100000", help="numbers of users; default: 1000,100000")
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--engines", default="sqlite,postgres")
    arguments = parser.parse_args()
    print(
        "| engine | users | raw read | page of 10 | factor | append, no user | append, a user's | for_user | factor |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for users in map(int, arguments.users.split(",")):
        for engine in arguments.engines.split(","):
            with ExitStack() as running:
                store, raw = {"sqlite": _sqlite, "postgres": _postgres}[engine](users, running)
                read, page, free, alone, of_user = _measured(store, raw, users, arguments.repetitions)
                print(
                    f"| {engine} | {users:,} | {read:.1f} µs | {page:.1f} µs | {page / read:.1f} x "
                    f"| {free:.1f} µs | {alone:.1f} µs | {of_user:.1f} µs | {of_user / alone:.3f} x |",
                    flush=True,
                )


def _measured(store: Any, raw: Callable[[int], object], users: int, repetitions: int) -> list[float]:
    """
    Return medians in microseconds: a raw read; a first page; appends to a history without a user, and to a user's
    through the store of all and through that of the user.
    """
    chance = random.Random(1)
    message = [ChatMessage.from_user("What is the weather like?")]
    ada = store.for_user("ada")
    ada.write_messages("ada", message)
    store.write_messages("without a user", message)
    calls: list[Callable[[], object]] = [
        lambda: raw(chance.randrange(1, users * _HISTORIES_OF_A_USER)),
        lambda: store.for_user(f"user {chance.randrange(users)}").list_chat_histories(limit=20),
        lambda: store.write_messages("without a user", message),
        lambda: store.write_messages("ada", message),
        lambda: ada.write_messages("ada", message),
    ]
    assert len(calls[1]().items) == _HISTORIES_OF_A_USER
    times: list[list[float]] = [[] for _ in calls]
    for number in range(repetitions + 50):
        for call, found in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if number >= 50:
                found.append((time.perf_counter() - started) * 1e6)
    return list(map(median, times))


def _sqlite(users: int, running: ExitStack) -> tuple[Any, Callable[[int], object]]:
    path = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="chat-store-benchmark-"))) / "chat.db"
    store = SQLiteChatMessageStore(path, durability="normal")
    store.write_messages("first", [ChatMessage.from_user("Hi!")])
    connection = running.enter_context(closing(sqlite3.connect(path)))
    connection.execute(_FILL_SQLITE, (users * _HISTORIES_OF_A_USER, users, _PREVIEW[:200]))
    connection.commit()
    connection.execute("ANALYZE")
    connection.commit()
    running.callback(store.close)
    query = "SELECT title, meta, preview FROM haystack_chat_histories WHERE history_key = ?"
    return store, lambda number: connection.execute(query, (number,)).fetchone()


def _postgres(users: int, running: ExitStack) -> tuple[Any, Callable[[int], object]]:
    server = running.enter_context(
        servers.PostgresServer(next(iter(servers.postgres_binaries().values())), fsync="off")
    )
    os.environ["BENCHMARK_URL"] = server.url
    store = PostgresChatMessageStore(Secret.from_env_var("BENCHMARK_URL"))
    store.write_messages("first", [ChatMessage.from_user("Hi!")])
    running.callback(store.close)
    connection = running.enter_context(psycopg.connect(server.url, autocommit=True))
    numbers = {"users": users, "histories": users * _HISTORIES_OF_A_USER, "preview": _PREVIEW[:200]}
    connection.execute(_FILL_POSTGRES, numbers)
    connection.execute("VACUUM ANALYZE haystack_chat_histories")
    keys = connection.execute("SELECT history_key FROM haystack_chat_histories LIMIT 1000").fetchall()
    query = "SELECT title, meta, preview FROM haystack_chat_histories WHERE history_key = %s"
    return store, lambda number: connection.execute(query, keys[number % len(keys)], prepare=True).fetchone()


if __name__ == "__main__":
    main()
