# SPDX-License-Identifier: Apache-2.0
"""The measurements. Each returns `{row: {column: median}}`, in microseconds or in bytes per message."""

import asyncio
import json
import os
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any, NamedTuple

from conversations import conversation, encoded_conversation, kinds_of_message, reply_with_usage
from engines import ASYNC, SYNC, Engine
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from measuring import LOOP, Trial, medians

from haystack_chat_store.codec import decode_messages, encode_message
from haystack_chat_store.ids import new_message_id

Medians = dict[str, dict[str, float]]

BATCH = 10_000  # messages per bulk write
ROUNDS = 10  # per read
WINDOW = 2 * ROUNDS  # messages per read
MAX_TOKENS = 4000  # the retriever's limit: some 20 rounds
ENOUGH = 100  # this many messages have more than MAX_TOKENS
BULK_WRITE, BULK_READ = f"write {BATCH:,} messages in one call", f"read {BATCH:,} messages in one call"
WRITERS = 8  # writers at the same time
TURNS = 25  # turns of each writer per repetition
SHARED, OWN = "one history", "each its own"
ENCODED, ONE_HISTORY, MANY_HISTORIES = "encoded JSON", "one history", "many short histories"
MIX = "mix: the four above alike"
USAGE = "not in the mix: assistant, with the usage an LLM reports"
ENCODE, ENCODE_HAYSTACK = "encode_message", "json.dumps(to_dict())"
DECODE, DECODE_HAYSTACK = "decode_messages, 20 at once", "from_dict(json.loads())"


class Plan(NamedTuple):
    sizes: list[int]
    repetitions: int
    bulk_repetitions: int
    appends_before: int
    writers_repetitions: int
    long_history: int
    short_histories: int


class Case(NamedTuple):
    """
    A state in which stores are measured.

    :param size: The number of messages of each history.
    :param appends_before: The number of turns that this process has appended after these, one by one, by each form of
        call.
    :param histories: The number of such histories. Appends alternate between them.
    """

    size: int
    appends_before: int = 0
    histories: int = 1

    @property
    def label(self) -> str:
        if self.appends_before:
            return f"after {self.appends_before:,} appends"
        return f"{self.size:,}" if self.histories == 1 else f"{self.size:,} in each of {self.histories:,}"

    @property
    def history_ids(self) -> list[str]:
        return [f"{self.label}, history {number}" for number in range(self.histories)]


class Contestant(NamedTuple):
    """A store that takes messages, or a floor that takes encoded ones."""

    name: Callable[[str], str]
    store: Any
    messages: Callable[[int], list[Any]]
    forms: tuple[str, ...]

    def method(self, name: str, form: str) -> Callable[..., Any]:
        return getattr(self.store, name + form)

    def call(self, name: str, form: str, *arguments: Any) -> None:
        result = self.method(name, form)(*arguments)
        if form == ASYNC:
            LOOP.run_until_complete(result)

    def trial(self, name: str, form: str, column: str, arguments: Iterator[tuple[Any, ...]]) -> Trial:
        return Trial((self.name(form), column), self.method(name, form), partial(next, arguments))

    def fill(self, case: Case) -> None:
        batch = self.messages(min(case.size, BATCH))
        for history_id in case.history_ids:
            self.store.delete_messages(history_id)
            for written in range(0, case.size, BATCH):
                self.store.write_messages(history_id, batch[: case.size - written])
        for form in self.forms:
            for _ in range(case.appends_before):
                for history_id in case.history_ids:
                    self.call("write_messages", form, history_id, self.messages(2))

    def turns(self, case: Case) -> Iterator[tuple[str, list[Any]]]:
        """Yield arguments for writing turns. Histories that have grown by a fifth, or by 10 turns, are filled again."""
        # Filling more often would put the data of most calls into the processor's cache.
        turns_before_refilling = max(10, (case.size + 2 * case.appends_before) // 10)
        while True:
            for _ in range(turns_before_refilling):
                for history_id in case.history_ids:
                    yield history_id, self.messages(2)
            self.fill(case)


def cases(plan: Plan) -> list[Case]:
    """Return one history of each size, one with many appends by this process, and many histories that grow together."""
    return [*map(Case, plan.sizes), Case(1000, plan.appends_before), Case(10, histories=plan.repetitions)]


def by_size(engine: Engine, plan: Plan, folder: Path) -> dict[str, Medians]:
    """
    Measure reading the last rounds, reading within a token limit, counting, and appending, by the size of the history.
    """
    groups: dict[str, list[list[Trial]]] = {"read": [], "retrieve": [], "count": [], "append": []}
    with ExitStack() as opened:
        for case in cases(plan):
            if engine.max_size is not None and (case.size > engine.max_size or case.appends_before):
                continue
            contestants = _opened(engine, folder / case.label, opened)
            turns = [contestant.turns(case) for contestant in contestants]
            for contestant in contestants:
                contestant.fill(case)
            for form in engine.forms:
                if case.histories == 1:
                    (history_id,) = case.history_ids
                    window, whole = repeat((history_id, ROUNDS)), repeat((history_id,))
                    reads = [each.trial("retrieve_messages", form, case.label, window) for each in contestants]
                    groups["read"].append(reads)
                    retriever = ChatMessageRetriever(contestants[0].store, last_k=None, max_tokens=MAX_TOKENS)
                    row = contestants[0]._replace(store=retriever)
                    groups["retrieve"].append([row.trial("run", form, case.label, whole)])
                    groups["count"].append([contestants[0].trial("count_messages", form, case.label, whole)])
                pairs = zip(contestants, turns, strict=True)
                groups["append"].append([each.trial("write_messages", form, case.label, own) for each, own in pairs])
        _settle()
        return {name: _table(medians(trials, plan.repetitions)) for name, trials in groups.items()}


def bulk(engine: Engine, plan: Plan, folder: Path) -> Medians:
    """Measure writing many messages in one call to a new history, and reading them."""
    with ExitStack() as opened:
        contestants = _opened(engine, folder / "bulk", opened)
        for contestant in contestants:
            contestant.store.write_messages("to read", contestant.messages(BATCH))
        _settle()
        writes = [each.trial("write_messages", SYNC, BULK_WRITE, _batches(each)) for each in contestants]
        reads = [each.trial("retrieve_messages", SYNC, BULK_READ, repeat(("to read", BATCH))) for each in contestants]
        return _table(medians([writes, reads], plan.bulk_repetitions))


def writers(engine: Engine, plan: Plan, folder: Path) -> Medians:
    """
    Measure appending turns with several writers at the same time, per turn.

    The writers share one store object. Each writer has its own floor. When they share a history, the floor assigns the
    positions in the engine.
    """
    with ExitStack() as opened, ThreadPoolExecutor(WRITERS) as threads:
        store, floor = _opened(engine, folder / "writers", opened)
        floors = [opened.enter_context(closing(floor.store.another())) for _ in range(WRITERS)]

        def in_threads(writes: Sequence[Callable[..., Any]], batches: Sequence[Any]) -> None:
            list(threads.map(_write_turns, writes, batches))

        async def in_tasks(writes: Sequence[Callable[..., Any]], batches: Sequence[Any]) -> None:
            await asyncio.gather(*map(_write_turns_async, writes, batches))

        groups = []
        for form, kind, run in ((SYNC, "threads", in_threads), (ASYNC, "tasks", in_tasks)):
            for which, method in ((SHARED, "write_shared"), (OWN, "write_messages")):
                ids = [SHARED if which == SHARED else f"{kind}, writer {number}" for number in range(WRITERS)]
                column = f"{WRITERS} {kind}, {which}"
                by_store = [store.method("write_messages", form)] * WRITERS
                by_floors = [getattr(each, method + form) for each in floors]
                sides = ((engine.name, by_store, store.messages), (engine.floor_name, by_floors, floor.messages))
                groups.append(
                    [
                        Trial((name, column), run, partial(_turns_of_writers, writes, ids, messages))
                        for name, writes, messages in sides
                    ]
                )
        _settle()
        table = _table(medians(groups, plan.writers_repetitions))
    return {name: {column: taken / (WRITERS * TURNS) for column, taken in row.items()} for name, row in table.items()}


def _turns_of_writers(
    writes: list[Callable[..., Any]], history_ids: list[str], messages: Callable[[int], list[Any]]
) -> tuple[Any, ...]:
    return writes, [[(history_id, messages(2)) for _ in range(TURNS)] for history_id in history_ids]


def _write_turns(write: Callable[..., Any], turns: list[tuple[str, list[Any]]]) -> None:
    for turn in turns:
        write(*turn)


async def _write_turns_async(write: Callable[..., Any], turns: list[tuple[str, list[Any]]]) -> None:
    for turn in turns:
        await write(*turn)


def stored_bytes(engine: Engine, plan: Plan, folder: Path) -> Medians:
    """Measure the size of the stored data, for one long history and for short histories that grow together."""
    texts = encoded_conversation(2)
    found = {ENCODED: sum(len(text.encode()) for text in texts) / len(texts)}
    for column, case in (
        (ONE_HISTORY, Case(0, plan.long_history // 2)),
        (MANY_HISTORIES, Case(0, ROUNDS, histories=plan.short_histories)),
    ):
        with ExitStack() as opened:
            (contestant, *_) = _opened(engine, folder / column, opened)
            if engine.stored_bytes is None:
                tracemalloc.start()
                opened.callback(tracemalloc.stop)
            contestant._replace(forms=(SYNC,)).fill(case)
            held = engine.stored_bytes(contestant.store) if engine.stored_bytes else tracemalloc.get_traced_memory()[0]
            found[column] = held / (case.histories * (case.size + 2 * case.appends_before))
    return {engine.name: found}


def codec(plan: Plan) -> Medians:
    """Measure encoding and decoding with this package and with Haystack, per message."""
    kinds = kinds_of_message()
    windows = {name: [kinds_of_message()[name] for _ in range(WINDOW)] for name in kinds}
    windows[MIX] = [message for _ in range(WINDOW // len(kinds)) for message in kinds_of_message().values()]
    windows[USAGE] = [reply_with_usage() for _ in range(WINDOW)]
    groups = [group for name, messages in windows.items() for group in _codec_groups(name, messages)]
    table = _table(medians(groups, plan.repetitions))
    return {name: {column: taken / WINDOW for column, taken in row.items()} for name, row in table.items()}


def _codec_groups(row: str, messages: list[ChatMessage]) -> list[list[Trial]]:
    with_ids = [(message, new_message_id()) for message in messages]
    texts = [encode_message(message, message_id) for message, message_id in with_ids]
    ways = [
        {
            ENCODE_HAYSTACK: lambda: [json.dumps(message.to_dict()) for message in messages],
            ENCODE: lambda: [encode_message(message, message_id) for message, message_id in with_ids],
        },
        {
            DECODE_HAYSTACK: lambda: [ChatMessage.from_dict(json.loads(text)) for text in texts],
            DECODE: lambda: decode_messages(texts),
        },
    ]
    return [[Trial((row, column), call, tuple) for column, call in group.items()] for group in ways]


def _opened(engine: Engine, folder: Path, opened: ExitStack) -> list[Contestant]:
    folder.mkdir(parents=True)
    store = opened.enter_context(engine.open_store(folder))
    contestants = [Contestant(engine.row, store, conversation, engine.forms)]
    if engine.open_floor is not None:
        floor = opened.enter_context(engine.open_floor(folder))
        contestants.append(Contestant(engine.floor_row, floor, encoded_conversation, engine.forms))
    return contestants


def _batches(contestant: Contestant) -> Iterator[tuple[str, list[Any]]]:
    return ((f"history {number}", contestant.messages(BATCH)) for number in count())


def _settle() -> None:
    """Wait until the disk has finished its writes."""
    if hasattr(os, "sync"):
        os.sync()


def _table(found: dict[Hashable, float]) -> Medians:
    table: Medians = defaultdict(dict)
    for (row, column), taken in found.items():
        table[row][column] = taken
    return dict(table)
