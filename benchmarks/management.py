# SPDX-License-Identifier: Apache-2.0
"""
Measure the directory, search, forks, export and import on a large database, and compare them with the plain driver.

The default is 100,000 histories with 5,000,000 messages in all. A missed target is not an error.
"""

import argparse
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import psycopg
from conversations import conversation
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from run import environment_of

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.codec import encode_message
from haystack_chat_store.ids import new_message_id
from haystack_chat_store.search_text import parsed_query
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.transfer import export_histories, import_histories

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import servers

_YEAR = 365 * 24 * 3600 * 1_000_000
_BEGINNING = 1_700_000_000_000_000
_FORKED = 20_000
_MOVED_USERS = 200
_HISTORIES_OF_A_USER = 20


class Plan(NamedTuple):
    """The sizes of the data, and the numbers of repetitions."""

    histories: int
    messages_each: int
    repetitions: int
    queries: int


class Place(NamedTuple):
    """
    A store, another store on an empty database, and the same operations with the plain driver.

    :param key_read: Reads the row of a history by its primary key.
    :param full_text: Searches with the engine: the best 20 rows for phrases, with their contents.
    :param fork: Copies the rows of the long history with one INSERT … SELECT into a plain table.
    """

    name: str
    store: BaseChatMessageStore
    searching: BaseChatMessageStore
    empty: BaseChatMessageStore
    key_read: Callable[[], Any]
    full_text: Callable[[Sequence[Any]], Any]
    fork: Callable[[], Any]


class Texts:
    """An invented language: 20,000 words, few of them frequent, and some sentences in Chinese."""

    _SYLLABLES = "ka lo mi ren tu sha ber no vi dal gos fen pri ut an el".split()
    _HAN = "我今天在北京学习中文人工智能可以回答问题历史消息保存数据库搜索引擎"

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words = {"".join(self.random.choices(self._SYLLABLES, k=self.random.randint(2, 4))) for _ in range(30_000)}
        self.words = sorted(words)[:20_000]
        self.random.shuffle(self.words)
        self._weights = list(accumulate(1 / (rank + 10) for rank in range(len(self.words))))

    def sentence(self, words: int) -> str:
        if self.random.random() < 0.02:
            return "".join(self.random.choices(self._HAN, k=words))
        return " ".join(self.random.choices(self.words, cum_weights=self._weights, k=words))

    def queries(self, count: int) -> list[str]:
        kinds: list[Callable[[], str]] = [
            lambda: self.random.choice(self.words[50:]),
            lambda: " ".join(self.random.choices(self.words[50:], k=2)),
            lambda: " ".join(self.sentence(2).split()[:2]),
            lambda: f'"{self.random.choice(self.words[:200])} {self.random.choice(self.words[:200])}"',
            lambda: "".join(self.random.choices(self._HAN, k=3)),
        ]
        return [kinds[number % len(kinds)]() for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", default="sqlite,postgres", help="of sqlite, postgres; default: both")
    parser.add_argument("--histories", type=int, default=100_000)
    parser.add_argument("--messages", type=int, default=5_000_000, help="in all histories together")
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--queries", type=int, default=200)
    arguments = parser.parse_args()
    plan = Plan(
        arguments.histories, arguments.messages // arguments.histories, arguments.repetitions, arguments.queries
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print("# Managing conversations", environment_of(), sep="\n\n")
    print(f"\n{plan.histories:,} histories, {plan.histories * plan.messages_each:,} messages.")
    for key in arguments.engines.split(","):
        with ExitStack() as running:
            folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="chat-store-benchmark-")))
            place = {"sqlite": _sqlite, "postgres": _postgres}[key](folder, plan, running)
            print(f"\n## {place.name}\n\n| what | measured | target |\n|---|---|---|", flush=True)
            measure(place, plan, folder)


def measure(place: Place, plan: Plan, folder: Path) -> None:
    texts = Texts(seed=1)
    started = time.perf_counter()
    count = fill(place.store, plan, texts)
    show("filled by imports, of one history each", f"{count / (time.perf_counter() - started):,.0f} messages/s", "")
    directory(place, plan)
    fork(place)
    move(place, folder)
    memory(place, folder)
    started = time.perf_counter()
    place.searching.search_messages("nothing")
    total = plan.histories * plan.messages_each
    show("search turned on: indexed", f"{total / (time.perf_counter() - started):,.0f} messages/s", "")
    search(place, plan, texts)
    append(place, plan)


def fill(store: BaseChatMessageStore, plan: Plan, texts: Texts) -> int:
    # Contents repeat, because making new ones would take longer than storing them.
    said = [
        (role, encode_message(message, "ID"))
        for _ in range(10_000)
        for role, message in (
            ("user", ChatMessage.from_user(texts.sentence(18))),
            ("assistant", ChatMessage.from_assistant(texts.sentence(85))),
        )
    ]
    count = 0
    for number in range(plan.histories):
        first = 2 * texts.random.randrange(len(said) // 2 - plan.messages_each)
        at = _BEGINNING + texts.random.randrange(_YEAR)
        rows = [
            MessageRow(
                position=position,
                created_at=at,
                message_id=message_id,
                role=role,
                content=content.replace('"ID"', f'"{message_id}"'),
            )
            for position, (role, content) in enumerate(said[first : first + plan.messages_each])
            for message_id in (new_message_id(),)
        ]
        history = HistoryRow(chat_history_id=_name(number), created_at=at, updated_at=at)
        count += store.engine.run(store.engine.import_history, store.scope, history, [rows], 0)
    return count


def directory(place: Place, plan: Plan) -> None:
    cursor = None
    pages: dict[str, dict[str, Any]] = {"the first page": {}}
    for number in range(plan.histories // 1000):
        page = place.store.list_chat_histories(limit=1000, cursor=cursor)
        if page.cursor is None:
            break
        cursor = page.cursor
        if number == plan.histories // 2000:
            pages["a page in the middle"] = {"cursor": cursor}
    pages["the last page but a few"] = {"cursor": cursor}
    pages["prefix of a user (20 histories)"] = {"prefix": "user_00777/"}
    pages["prefix of a tenth"] = {"prefix": "user_01"}
    pages["prefix of everything"] = {"prefix": "user_"}
    pages["prefix of nothing"] = {"prefix": "nobody"}
    floor = timed(place.key_read, plan.repetitions)
    show("floor: a row by its primary key", f"{floor:,.0f} µs", "")
    for name, options in pages.items():
        taken = timed(lambda options=options: place.store.list_chat_histories(**options), plan.repetitions)
        floor = timed(place.key_read, plan.repetitions)
        show(f"directory, {name}", f"{taken:,.0f} µs, {taken / floor:.1f} x", "20 x")


def fork(place: Place) -> None:
    place.store.write_messages("long", conversation(_FORKED))
    taken, floor = [], []
    for number in range(5):
        taken.append(timed(lambda number=number: place.store.copy_messages("long", f"fork {number}"), 1))
        floor.append(timed(place.fork, 1))
    show("fork of 20,000 messages", f"{median(taken) / 1000:,.0f} ms, {median(taken) / median(floor):.2f} x", "3 x")


def move(place: Place, folder: Path) -> None:
    file = folder / "export.jsonl"
    for what, call in (
        ("export", lambda: export_histories(place.store, file, prefix="user_00")),
        ("import", lambda: import_histories(place.empty, file)),
    ):
        started = time.perf_counter()
        moved = call()
        rate = moved.messages / (time.perf_counter() - started)
        show(what, f"{rate:,.0f} messages/s; {moved.messages:,} messages", "20,000/s")


def memory(place: Place, folder: Path) -> None:
    """Show the peak memory of Python while histories move: once a few, once ten times as many."""
    peaks: dict[str, list[str]] = {"export": [], "import": []}
    for prefix in ("user_000", "user_00"):
        file = folder / f"{prefix}.jsonl"
        place.empty.delete_all_messages()
        for what, call in (
            ("export", lambda file=file, prefix=prefix: export_histories(place.store, file, prefix=prefix)),
            ("import", lambda file=file: import_histories(place.empty, file)),
        ):
            tracemalloc.start()
            moved = call()
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            peaks[what].append(f"{peak:,.1f} MiB at most for {moved.messages:,} messages")
    for what, found in peaks.items():
        show(f"memory for an {what}", "; ".join(found), "the same")


def search(place: Place, plan: Plan, texts: Texts) -> None:
    ours, raw, hits = [], [], 0
    for query in texts.queries(plan.queries):
        phrases = parsed_query(query)
        for _ in range(2):  # in the second run, both read from a warm cache
            floor = timed(lambda phrases=phrases: place.full_text(phrases), 1)
            taken = timed(lambda query=query: place.searching.search_messages(query), 1)
        hits += len(place.searching.search_messages(query))
        ours.append(taken)
        raw.append(floor)
    for name, cut in (("median", 50), ("p95", 95)):
        mine, bare = (quantiles(times, n=100)[cut - 1] / 1000 for times in (ours, raw))
        show(f"search, {name}", f"{mine:,.1f} ms, {mine / bare:.2f} x", "1.5 x" if cut == 95 else "")
    show("hits a search", f"{hits / plan.queries:.1f}", "")


def append(place: Place, plan: Plan) -> None:
    for store in (place.searching, place.empty):
        store.write_messages("appended", conversation(1000))
    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(plan.repetitions):
        for name, store in (("with", place.searching), ("without", place.empty)):
            turn = conversation(2)
            times[name].append(timed(lambda store=store, turn=turn: store.write_messages("appended", turn), 1))
    taken, without = median(times["with"]), median(times["without"])
    show("appending a turn, with search", f"{taken:,.0f} µs, {taken / without:.2f} x without", "2 x")


def timed(call: Callable[[], Any], repetitions: int) -> float:
    """Return the median time of a call, in microseconds."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return median(times) / 1000


def show(what: str, measured: str, target: str) -> None:
    print(f"| {what} | {measured} | {target} |", flush=True)


def _keys(plan: Plan) -> Iterator[str]:
    chooser = random.Random(2)
    while True:
        yield _name(chooser.randrange(plan.histories))


def _name(number: int) -> str:
    return f"user_{number // _HISTORIES_OF_A_USER:05}/chat_{number % _HISTORIES_OF_A_USER:02}"


def _sqlite(folder: Path, plan: Plan, running: ExitStack) -> Place:
    path = folder / "large.db"
    # Filling does not need durable writes.
    stores = [
        SQLiteChatMessageStore(path, durability="normal"),
        SQLiteChatMessageStore(path, search=True),
        SQLiteChatMessageStore(folder / "empty.db"),
    ]
    for store in stores:
        running.enter_context(closing(store))
    stores[0].count_messages("none: it makes the tables")
    bare = running.enter_context(closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)))
    bare.execute("PRAGMA synchronous = normal")
    other = running.enter_context(closing(sqlite3.connect(folder / "floor.db", isolation_level=None)))
    other.execute("PRAGMA journal_mode = wal")
    other.execute("PRAGMA synchronous = normal")
    other.execute("CREATE TABLE m (history TEXT, position INTEGER, content TEXT, PRIMARY KEY (history, position))")
    rows = [("long", position, encode_message(m, new_message_id())) for position, m in enumerate(conversation(_FORKED))]
    other.executemany("INSERT INTO m VALUES (?, ?, ?)", rows)
    chooser = random.Random(2)

    def key_read() -> Any:
        key = chooser.randrange(1, plan.histories + 1)
        return bare.execute("SELECT * FROM haystack_chat_histories WHERE history_key = ?", (key,)).fetchone()

    def full_text(phrases: Sequence[Any]) -> Any:
        wanted = " ".join(f'"{" ".join(each.terms)}"' + ("*" if each.is_prefix else "") for each in phrases)
        return bare.execute(
            "SELECT score, content FROM (SELECT rowid AS found, rank AS score FROM haystack_chat_terms "
            "WHERE haystack_chat_terms MATCH ? ORDER BY rank LIMIT 20) "
            "CROSS JOIN haystack_chat_messages ON message_key = found",
            (wanted,),
        ).fetchall()

    def fork() -> None:
        other.execute("INSERT INTO m SELECT ?, position, content FROM m WHERE history = 'long'", (new_message_id(),))

    return Place("SQLite", *stores, key_read, full_text, fork)


def _postgres(_folder: Path, plan: Plan, running: ExitStack) -> Place:
    binary = next(iter(servers.postgres_binaries().values()))
    url = running.enter_context(servers.PostgresServer(binary)).url
    secret = Secret.from_token(url)
    stores = [
        PostgresChatMessageStore(secret, schema_name="large", timeout=600),
        PostgresChatMessageStore(secret, schema_name="large", timeout=600, search=True),
        PostgresChatMessageStore(secret, schema_name="small", timeout=600),
    ]
    for store in stores:
        running.enter_context(closing(store))
    stores[0].count_messages("none: it makes the tables")
    bare = running.enter_context(closing(psycopg.connect(url, autocommit=True)))
    keys = _keys(plan)

    def key_read() -> Any:
        key = history_key(stores[0].scope, next(keys))
        return bare.execute(
            "SELECT * FROM large.haystack_chat_histories WHERE history_key = %s", [key], prepare=True
        ).fetchone()

    def full_text(phrases: Sequence[Any]) -> Any:
        wanted = " & ".join(
            "(" + " <-> ".join(f"'{term}'" + (":*" if each.is_prefix else "") for term in each.terms) + ")"
            for each in phrases
        )
        return bare.execute(
            "SELECT ts_rank(search_terms, %s::tsquery) AS rank, content FROM large.haystack_chat_messages "
            "WHERE search_terms @@ %s::tsquery ORDER BY rank DESC LIMIT 20",
            [wanted, wanted],
            prepare=True,
        ).fetchall()

    def fork() -> None:
        # Copies within the same table, because pages of a large table are less full than those of a small one.
        source = history_key(stores[0].scope, "long")
        bare.execute(
            "INSERT INTO large.haystack_chat_messages "
            "SELECT %s, position, created_at, message_id, role, content, search_terms, revision "
            "FROM large.haystack_chat_messages WHERE history_key = %s",
            [uuid.uuid4(), source],
        )

    return Place("PostgreSQL", *stores, key_read, full_text, fork)


if __name__ == "__main__":
    os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
    main()
