# SPDX-License-Identifier: Apache-2.0
"""
What appends and reads that overlap have seen, and what of it cannot be.

Every message has an id of its own, so the order in the end tells what every call must have seen. Workers write down
when each call begins and ends, on a clock that all processes share. The same file is the program of a worker process.
"""

import asyncio
import json
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from haystack.dataclasses import ChatMessage

from haystack_chat_store import ChatMessageStoreError, store_from_url

HISTORY = "history"
Note = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """
    A call.

    :param ids: The ids that it appended, or returned.
    :param began: When it began.
    :param ended: When it ended, or `None` if its outcome is unknown: an append may then be there whole, or not at all.
    :param last_k: For a read of a window, its number of rounds.
    :param is_read: Whether it read.
    """

    ids: tuple[str, ...]
    began: float
    ended: float | None
    last_k: int | None = None
    is_read: bool = False


# ---------------------------------------------------------------------- workers


def planned(worker: str, count: int) -> Iterator[tuple[Note, list[ChatMessage]]]:
    """Plan a worker's calls: two of three append turns, and the others read everything or a window."""
    chance = random.Random(worker)
    for number in range(count):
        note: Note = {"call": f"{worker} {number}"}
        if chance.random() < 1 / 3:
            yield {**note, "is_read": True, "last_k": chance.choice((None, 1, 3))}, []
            continue
        messages = []
        for turn in range(chance.randint(1, 3)):
            for part in range(chance.randint(1, 3)):  # a question and its answers
                make = ChatMessage.from_assistant if part else ChatMessage.from_user
                messages.append(make("x", meta={"chat_message_id": f"{worker} {number} {turn} {part}"}))
        yield {**note, "ids": ids_of(messages)}, messages


def ids_of(messages: Iterable[ChatMessage]) -> list[str]:
    """Return the ids of messages."""
    return [message.meta["chat_message_id"] for message in messages]


def work(store: Any, worker: str, count: int, write_down: Callable[[Note], None]) -> None:
    """Call a store, and write down when each call begins, and when it has returned."""
    for plan, messages in planned(worker, count):
        write_down({**plan, "began": time.monotonic()})
        end: Note = {"call": plan["call"]}
        try:
            if messages:
                store.write_messages(HISTORY, messages)
            else:
                end["ids"] = ids_of(store.retrieve_messages(HISTORY, last_k=plan["last_k"]))
        except ChatMessageStoreError:
            continue  # its outcome is unknown
        write_down({**end, "ended": time.monotonic()})


async def work_async(store: Any, worker: str, count: int, write_down: Callable[[Note], None]) -> None:
    """Do the same with the asynchronous calls, of which some are cancelled in their midst."""
    chance = random.Random(worker)
    for plan, messages in planned(worker, count):
        write_down({**plan, "began": time.monotonic()})
        end: Note = {"call": plan["call"]}
        try:
            if messages:
                patience = chance.random() / 100 if chance.random() < 0.2 else None
                await asyncio.wait_for(store.write_messages_async(HISTORY, messages), patience)
            else:
                end["ids"] = ids_of(await store.retrieve_messages_async(HISTORY, last_k=plan["last_k"]))
        except (ChatMessageStoreError, asyncio.TimeoutError):
            continue  # its outcome is unknown
        write_down({**end, "ended": time.monotonic()})


def work_in_crowd(store: Any, name: str, threads: int, tasks: int, count: int) -> list[Note]:
    """Call a store from threads, and from tasks of one event loop, at once. Return what they have written down."""
    notes: list[Note] = []

    async def work_in_tasks() -> None:
        await asyncio.gather(*(work_async(store, f"{name}a{n}", count, notes.append) for n in range(tasks)))

    running = [threading.Thread(target=work, args=(store, f"{name}t{n}", count, notes.append)) for n in range(threads)]
    if tasks:
        running.append(threading.Thread(target=lambda: asyncio.run(work_in_tasks())))
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return notes


# ---------------------------------------------------------------------- what cannot be


def calls_of(notes: Iterable[Note]) -> list[Call]:
    """Put together the calls of workers. A read that has not returned has seen nothing."""
    by_call: dict[str, Note] = defaultdict(dict)
    for note in notes:
        by_call[note["call"]].update(note)
    return [
        Call(tuple(c["ids"]), c["began"], c.get("ended"), c.get("last_k"), c.get("is_read", False))
        for c in by_call.values()
        if not c.get("is_read") or "ended" in c
    ]


def anomalies(calls: Sequence[Call], final: Sequence[str]) -> list[str]:
    """
    Name what cannot be: an anomaly for each call that has one.

    "doubled": an id is there twice. "lost": an append that has returned is not there. "split": a batch is not there in
    one piece. "unknown message": nothing has appended it. "no slice": a read has not returned a beginning of the final
    order, or, for a window, its last rounds. "half a batch": a read ends in the midst of a batch. "out of time": what
    had returned before a call began does not come before it.

    :param calls: All calls on a history.
    :param final: The ids in the end, in order.
    """
    place = {message_id: number for number, message_id in enumerate(final)}
    found = ["doubled"] * (len(final) - len(place))
    appends = [call for call in calls if not call.is_read]
    found += ["unknown message"] * len(place.keys() - {message_id for call in appends for message_id in call.ids})
    ends = {-1}
    timely: list[tuple[Call, int, int]] = []  # each sound call with its first and last place
    for call in appends:
        places = [place[message_id] for message_id in call.ids if message_id in place]
        if not places:
            found += ["lost"] if call.ended is not None else []
        elif places != list(range(places[0], places[0] + len(call.ids))):
            found.append("split")
            ends.update(places)
        else:
            ends.add(places[-1])
            timely.append((call, places[0], places[-1]))
    for call in calls:
        if call.is_read:
            last = place.get(call.ids[-1], -1) if call.ids else -1
            if list(call.ids) != list(final[_beginning(final, last, call.last_k) : last + 1]):
                found.append("no slice")
            elif last not in ends:
                found.append("half a batch")
            else:
                timely.append((call, last, last))
    return found + ["out of time"] * _out_of_time(timely)


def _beginning(final: Sequence[str], last: int, last_k: int | None) -> int:
    """Return where the last rounds up to a place begin."""
    questions = [number for number in range(last + 1) if final[number].endswith(" 0")]
    return 0 if last_k is None or len(questions) < last_k else questions[-last_k]


def _out_of_time(calls: Iterable[tuple[Call, int, int]]) -> int:
    events = []
    for call, first, last in calls:
        # An append comes after all that was seen before it began. A read sees at least that.
        events.append((call.began, 1, first if call.is_read else first - 1))
        if call.ended is not None:
            events.append((call.ended, 0, last))
    seen, count = -1, 0
    for _, is_begin, number in sorted(events):
        if is_begin:
            count += number < seen
        else:
            seen = max(seen, number)
    return count


def main(url: str, settings: str, name: str, count: str) -> None:
    """Be a process with a worker, which begins at a line of input, and prints its notes at once."""
    with closing(store_from_url(url, **json.loads(settings))) as store:
        print("{}", flush=True)
        sys.stdin.readline()
        work(store, name, int(count), lambda note: print(json.dumps(note), flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
