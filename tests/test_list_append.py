# SPDX-License-Identifier: Apache-2.0
"""Rules 3 and 4, as overlapping callers see them: threads, tasks and processes append and read at once."""

import functools
import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, closing

import list_append
import pytest
from list_append import HISTORY, Call, anomalies, calls_of, ids_of, work_in_crowd

from haystack_chat_store import InMemoryChatMessageStore, store_from_url
from haystack_chat_store.testing.fork_server import start_python

FINAL = ["a 0 0", "a 0 1", "b 0 0", "b 0 1", "a 1 0"]
A, B, C = FINAL[:2], FINAL[2:4], FINAL[4:]


def call(ids, began, ended, last_k=None, is_read=False):
    return Call(tuple(ids), began, ended, last_k, is_read)


read = functools.partial(call, is_read=True)
APPENDS = [call(A, 0, 1), call(B, 2, 4), call(C, 3, 5)]


@pytest.mark.parametrize(
    ("calls", "final", "expected"),
    [
        (APPENDS, FINAL, []),
        ([*APPENDS, call(["x 0 0"], 6, None)], FINAL, []),
        ([*APPENDS, call(["x 0 0", "x 0 1"], 6, None)], [*FINAL, "x 0 0", "x 0 1"], []),
        ([*APPENDS, call(["x 0 0", "x 0 1"], 6, None)], [*FINAL, "x 0 0"], ["split"]),
        (APPENDS, FINAL[:4], ["lost"]),
        (APPENDS, [*FINAL, "a 1 0"], ["doubled"]),
        (APPENDS, [*FINAL, "y 0 0"], ["unknown message"]),
        (APPENDS, ["a 0 0", "b 0 0", "b 0 1", "a 0 1", "a 1 0"], ["split"]),
        (APPENDS, ["a 0 1", "a 0 0", *FINAL[2:]], ["split"]),
        (APPENDS, [*B, *A, *C], ["out of time"]),
        ([*APPENDS, read(FINAL, 6, 7), read([], 0, 1), read(A, 1.5, 3)], FINAL, []),
        ([*APPENDS, read(A, 6, 7)], FINAL, ["out of time"]),
        ([*APPENDS, read(FINAL[:3], 3, 4)], FINAL, ["half a batch"]),
        ([*APPENDS, read(B, 3, 4)], FINAL, ["no slice"]),
        ([*APPENDS, read([*B, *A], 3, 4)], FINAL, ["no slice"]),
        ([*APPENDS, read(B, 3, 4, last_k=1), read([*A, *B], 3, 4, last_k=2), read(A, 1, 2, last_k=3)], FINAL, []),
        ([*APPENDS, read(FINAL, 6, 7, last_k=1)], FINAL, ["no slice"]),
        ([*APPENDS, read(C, 6, 7), read(FINAL[3:], 6, 7, last_k=2)], FINAL, ["no slice", "no slice"]),
        ([*APPENDS, read(FINAL, 3, 3.5), read(A, 4, 5)], FINAL, ["out of time"]),
    ],
)
def test_what_cannot_be_is_named(calls, final, expected):
    assert anomalies(calls, final) == expected


@pytest.fixture(params=["sqlite", "postgres", "redis", "redis_cluster"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/chat.db"
    name = "redis_server" if request.param == "redis" else request.param
    return request.getfixturevalue(name).url


@pytest.mark.servers
def test_overlapping_callers_see_one_order(url, is_full):
    settings = {"namespace": uuid.uuid4().hex, "last_k": None}
    calls, processes = (60, 4) if is_full else (8, 2)
    with ExitStack() as stack:
        store = stack.enter_context(closing(store_from_url(url, **settings)))
        others = [process_with_worker(url, settings, f"p{n}", 4 * calls) for n in range(processes)]
        for process in others:
            stack.enter_context(process)
            assert process.stdout.readline() == "{}\n"  # it is ready
        for process in others:
            process.stdin.write("begin\n")
            process.stdin.flush()
        notes = work_in_crowd(store, "", threads=processes, tasks=processes, count=calls)
        others[0].kill()  # what it was at is there whole, or not at all
        for process in others:
            notes += map(
                json.loads, filter(lambda line: line.endswith("\n"), process.communicate()[0].splitlines(True))
            )
        assert [process.returncode for process in others[1:]] == [0] * (processes - 1)
        assert_one_order(store, notes)


def test_overlapping_callers_see_one_order_in_memory(is_full):
    store = InMemoryChatMessageStore(last_k=None, namespace=uuid.uuid4().hex)
    count = 4 if is_full else 2
    assert_one_order(store, work_in_crowd(store, "", threads=count, tasks=count, count=60 if is_full else 15))


def process_with_worker(url, settings, name, calls):
    """Start a process with a worker, which waits for a line."""
    arguments = [list_append.__file__, url, json.dumps(settings), name, str(calls)]
    return start_python(
        arguments,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def assert_one_order(store, notes):
    final = ids_of(store.retrieve_messages(HISTORY))
    calls = calls_of(notes)
    assert final
    assert sum(each.is_read for each in calls) > 5
    assert anomalies(calls, final) == []
    assert store.count_messages(HISTORY) == len(final)


# ---------------------------------------------------------------------- stores that break the rules are found


class Broken:
    """A store that passes calls on, and breaks a rule on the way."""

    def __init__(self):
        self.store = InMemoryChatMessageStore(last_k=None, namespace=uuid.uuid4().hex)
        self.calls = 0

    def write_messages(self, history, messages):
        return self.store.write_messages(history, messages)

    def retrieve_messages(self, history, last_k=None):
        return self.store.retrieve_messages(history, last_k=last_k)


class SplitsBatches(Broken):
    def write_messages(self, history, messages):
        for message in messages:
            self.store.write_messages(history, [message])
            time.sleep(0.0005)


class LosesBatches(Broken):
    def write_messages(self, history, messages):
        self.calls += 1
        return self.calls % 7 and self.store.write_messages(history, messages)


class AnswersTooEarly(Broken):
    """A batch is there only when the next one comes."""

    kept = ()

    def write_messages(self, history, messages):
        kept, self.kept = self.kept, messages
        return self.store.write_messages(history, kept)


class ReadsOldAnswers(Broken):
    old = ()

    def retrieve_messages(self, history, last_k=None):
        self.calls += 1
        if last_k is None and (self.calls % 3 == 0 or not self.old):
            self.old = self.store.retrieve_messages(history)
        return self.old if last_k is None else self.store.retrieve_messages(history, last_k=last_k)


class ReadsOneMessageTooFew(Broken):
    def retrieve_messages(self, history, last_k=None):
        return self.store.retrieve_messages(history, last_k=last_k)[1:]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (SplitsBatches, "split"),
        (LosesBatches, "lost"),
        (AnswersTooEarly, "out of time"),
        (ReadsOldAnswers, "out of time"),
        (ReadsOneMessageTooFew, "no slice"),
    ],
)
def test_broken_store_is_found(broken, expected):
    store = broken()
    notes = work_in_crowd(store, "", threads=3, tasks=0, count=25)
    assert expected in anomalies(calls_of(notes), ids_of(store.store.retrieve_messages(HISTORY)))
