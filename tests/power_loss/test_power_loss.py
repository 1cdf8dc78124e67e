# SPDX-License-Identifier: Apache-2.0
"""
A power cut: nothing that a call has acknowledged is lost, and no batch is cut in two.

A program writes to a store, and says after each call that it has returned. Its system calls are recorded. The power is
then cut after each of them. What was flushed is on the disk, and of all else any part. Each disk that may be found then
is opened by a store. It must hold what the calls that had returned have made, or what one call more has made.

A test that cannot fail shows nothing: a store that flushes nothing, and a drive that lies, must lose messages.
"""

import inspect
import random
import shutil
import sqlite3
from collections import Counter
from contextlib import closing

import crowd
import pytest
from disks import MODES, Disk, written
from recording import recorded

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.errors import ChatMessageStoreError

pytestmark = pytest.mark.full
CALLS = 240


def change(store, number):
    """Append, replace, edit or delete: one call."""
    from haystack.dataclasses import ChatMessage
    from haystack.document_stores.types import DuplicatePolicy

    def message(name, text="x"):
        return ChatMessage.from_user(f"{name} {text * 600}", meta={"chat_message_id": name})

    if number % 20 == 13:
        store.replace_messages("a", f"{number - 1} second", [message(f"{number} instead")])
    elif number % 20 == 17:
        store.write_messages("a", [message(f"{number - 1} first", "edited")], policy=DuplicatePolicy.OVERWRITE)
    elif number % 40 == 39:
        store.delete_messages("b")
    else:
        history = "b" if number % 4 == 2 else "a"
        store.write_messages(history, [message(f"{number} first"), message(f"{number} second")])


def write(folder, durability, calls):
    """Change a store, and say after each call that it has returned."""
    import os

    from haystack_chat_store import SQLiteChatMessageStore
    from haystack_chat_store.stores.sqlite import schema

    make_ready = schema.make_ready

    def without_flushes(connection, *arguments):
        make_ready(connection, *arguments)
        connection.execute("PRAGMA synchronous = off")

    if durability == "off":
        schema.make_ready, durability = without_flushes, "full"
    store = SQLiteChatMessageStore(f"{folder}/chat.db", durability=durability)
    acknowledgements = os.open(f"{folder}/calls.ack", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in range(int(calls)):
        change(store, number)
        os.write(acknowledgements, b"returned\n")
    store.close()


PROGRAM = f"import sys\n{inspect.getsource(change)}\n{inspect.getsource(write)}\nwrite(*sys.argv[1:])"


def contents(store):
    """What a store holds, as something to compare."""
    return {
        history: [(m.meta["chat_message_id"], m.text[-6:]) for m in store.retrieve_messages(history)]
        for history in ("a", "b")
    }


@pytest.fixture(scope="module")
def contents_so_far():
    """What a store holds after no call, after one call, after two …"""
    store = InMemoryChatMessageStore(last_k=None)
    found = [contents(store)]
    for number in range(CALLS):
        change(store, number)
        found.append(contents(store))
    return found


def found_by_a_store(folder):
    """What a store finds on a disk, or why it finds nothing."""
    path = folder / "chat.db"
    if not path.exists():
        return {"a": [], "b": []}
    try:
        with closing(sqlite3.connect(path)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return "damaged"
        with closing(SQLiteChatMessageStore(path, last_k=None)) as store:
            found = contents(store)
            if {history: store.count_messages(history) for history in found} != {h: len(m) for h, m in found.items()}:
                return "damaged"
        return found
    except (sqlite3.Error, ChatMessageStoreError):
        return "damaged"


def verdicts(calls, contents_so_far, folder, seed, skips_flushes=False, every=1):
    """Cut the power after each call to the system, or after some, and count how the disks were that are found then."""
    chance, disk, returned = random.Random(seed), Disk(skips_flushes), 0
    counts, seen = Counter(), set()
    for number, call in enumerate(calls):
        if call.place.endswith(".ack"):
            returned += call.kind == "write"
            mode = "nothing"
        else:
            disk.do(call)
            mode = chance.choice(MODES)
        if number % every:
            continue
        after = list(disk.after_the_cut(mode, chance))
        key = hash((returned, *sorted(after)))
        if key in seen:
            continue
        seen.add(key)
        found = found_by_a_store(written(iter(after), folder))
        shutil.rmtree(folder)
        possible = contents_so_far[: returned + 2]
        if found in possible[-2:]:
            counts["sound"] += 1
        elif found in possible:
            counts["lost"] += 1
        else:
            counts["damaged"] += 1
    assert returned == CALLS
    return counts


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """What the program has done to its files, for each durability."""
    made = {}

    def record(durability):
        if durability not in made:
            folder = tmp_path_factory.mktemp(durability)
            made[durability] = recorded(PROGRAM, folder, str(folder), durability, str(CALLS))
        return made[durability]

    return record


@pytest.mark.parametrize(
    ("durability", "drive", "every", "expected"),
    [
        ("full", "honest", 1, {"sound"}),
        ("normal", "honest", 4, {"sound", "lost"}),
        ("off", "honest", 4, {"sound", "lost", "damaged"}),
        ("full", "lying", 4, {"sound", "lost", "damaged"}),
    ],
)
def test_power_is_cut_at_any_call(recording, contents_so_far, memory, durability, drive, every, expected, report):
    counts = verdicts(recording(durability), contents_so_far, memory / "found", 0, drive == "lying", every)
    report(f"{durability}, {drive} drive: {sum(counts.values())} disks, {dict(counts)}")
    assert set(counts) == expected
    assert every > 1 or sum(counts.values()) >= 3000


WRITERS, TURNS = 8, 12


@pytest.mark.parametrize(
    ("durability", "drive", "expected"),
    [
        ("full", "honest", {"sound"}),
        ("normal", "honest", {"sound", "lost"}),
        ("full", "lying", {"sound", "lost", "damaged"}),
    ],
)
def test_power_is_cut_while_threads_share_transactions(tmp_path, memory, durability, drive, expected, report):
    folder = tmp_path / "recorded"
    folder.mkdir()
    url = f"sqlite:///{folder}/chat.db"
    arguments = crowd.arguments(url, folder / "calls.ack", WRITERS, TURNS, durability=durability)
    calls = recorded(inspect.getsource(crowd), folder, *arguments)
    chance, disk = random.Random(0), Disk(drive == "lying")
    returned, counts, flushes = Counter(), Counter(), 0
    for call in calls:
        if call.place.endswith(".ack"):
            if call.kind == "write":
                returned[int(call.data)] += 1
            mode = "nothing"
        else:
            disk.do(call)
            flushes += call.kind == "sync"
            mode = chance.choice(MODES)
        found = written(iter(list(disk.after_the_cut(mode, chance))), memory / "found")
        counts[crowd.verdict_on_file(found / "chat.db", returned, WRITERS)] += 1
        shutil.rmtree(memory / "found")
    report(
        f"{WRITERS} threads, {durability}, {drive} drive: {sum(counts.values())} disks, {dict(counts)}, {flushes} syncs"
    )
    assert returned == dict.fromkeys(range(WRITERS), TURNS)
    assert set(counts) == expected
    if durability == "full":
        assert flushes < WRITERS * TURNS  # they did share
