# SPDX-License-Identifier: Apache-2.0
"""
The measurements. Each returns medians in microseconds, as `{row: {column: median}}`.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from conversations import conversation, encoded_conversation, kinds_of_message, reply_with_usage
from engines import Engine
from haystack.dataclasses import ChatMessage
from measuring import Trial, medians

from haystack_chat_store.codec import decode_messages, encode_message
from haystack_chat_store.stores.base import new_message_id

Medians = dict[str, dict[str, float]]

BATCH = 10_000  # messages per bulk write
ROUNDS = 10  # read at once
WINDOW = 2 * ROUNDS  # the messages in these
BULK = f"{BATCH:,} messages in one call"
MIX = "mix: the four above alike"
USAGE = "not in the mix: assistant, with the usage an LLM reports"
ENCODE, ENCODE_HAYSTACK = "encode_message", "json.dumps(to_dict())"
DECODE, DECODE_HAYSTACK = "decode_messages, 20 at once", "from_dict(json.loads())"


class Plan(NamedTuple):
    sizes: list[int]
    repetitions: int
    bulk_repetitions: int
    appends_before: int


class Case(NamedTuple):
    """
    A state that stores are measured in.

    :param size: How many messages a history has.
    :param appends_before: How many turns this process appended to it on top of these, one by one.
    :param histories: How many such histories there are; they are appended to by turns.
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
    """
    A store that takes messages, or a floor that takes encoded ones.
    """

    name: str
    store: Any
    messages: Callable[[int], list[Any]]

    def fill(self, case: Case) -> None:
        batch = self.messages(min(case.size, BATCH))
        for history_id in case.history_ids:
            self.store.delete_messages(history_id)
            for written in range(0, case.size, BATCH):
                self.store.write_messages(history_id, batch[: case.size - written])
            for _ in range(case.appends_before):
                self.store.write_messages(history_id, self.messages(2))

    def turns(self, case: Case) -> Iterator[tuple[str, list[Any]]]:
        """
        Arguments for writing turn after turn. Histories that have grown by a fifth, or by 10 turns, are filled anew.
        """
        # Not more often, for calls directly after a filling find everything in the processor's cache.
        turns_before_refilling = max(10, (case.size + 2 * case.appends_before) // 10)
        while True:
            for _ in range(turns_before_refilling):
                for history_id in case.history_ids:
                    yield history_id, self.messages(2)
            self.fill(case)


def cases(plan: Plan) -> list[Case]:
    """
    One history of each size, one that this process has long been appending to, and many that grow side by side.
    """
    return [*map(Case, plan.sizes), Case(1000, plan.appends_before), Case(10, histories=plan.repetitions)]


def read_and_append(engine: Engine, plan: Plan, folder: Path) -> tuple[Medians, Medians]:
    """
    Read the last rounds of histories of every size, then append turns to them.
    """
    reads, appends = [], []
    with ExitStack() as opened:
        for case in cases(plan):
            if engine.max_size is not None and (case.size > engine.max_size or case.appends_before):
                continue
            contestants = _opened(engine, folder / case.label, opened)
            for contestant in contestants:
                contestant.fill(case)
            if case.histories == 1:
                reads.append([_read(contestant, case) for contestant in contestants])
            appends.append([_write(contestant, case.label, contestant.turns(case)) for contestant in contestants])
        _settle()
        return _table(medians(reads, plan.repetitions)), _table(medians(appends, plan.repetitions))


def bulk_write(engine: Engine, plan: Plan, folder: Path) -> Medians:
    """
    Write many messages in one call, into a new history each time.
    """
    with ExitStack() as opened:
        contestants = _opened(engine, folder / "bulk", opened)
        _settle()
        trials = [_write(contestant, BULK, _batches(contestant)) for contestant in contestants]
        return _table(medians([trials], plan.bulk_repetitions))


def codec(plan: Plan) -> Medians:
    """
    Encode and decode 20 messages, ours and Haystack's way. Per message.
    """
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
    contestants = [Contestant(engine.name, opened.enter_context(engine.open_store(folder)), conversation)]
    if engine.open_floor is not None:
        floor = opened.enter_context(engine.open_floor(folder))
        contestants.append(Contestant(engine.floor_name, floor, encoded_conversation))
    return contestants


def _read(contestant: Contestant, case: Case) -> Trial:
    (history_id,) = case.history_ids
    return Trial((contestant.name, case.label), contestant.store.retrieve_messages, lambda: (history_id, ROUNDS))


def _write(contestant: Contestant, column: str, arguments: Iterator[tuple[str, list[Any]]]) -> Trial:
    return Trial((contestant.name, column), contestant.store.write_messages, lambda: next(arguments))


def _batches(contestant: Contestant) -> Iterator[tuple[str, list[Any]]]:
    return ((f"history {number}", contestant.messages(BATCH)) for number in count())


def _settle() -> None:
    """
    Let the disk finish what filling left it to do.
    """
    if hasattr(os, "sync"):
        os.sync()


def _table(found: dict[Hashable, float]) -> Medians:
    table: Medians = defaultdict(dict)
    for (row, column), taken in found.items():
        table[row][column] = taken
    return dict(table)
