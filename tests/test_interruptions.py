# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, signal handlers and finalizers: what comes in the middle of a call does no harm to the calls after it."""

import dis
import gc
import itertools
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import CodeType

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore, stores
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import expected_rounds

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has neither interval timers nor fork"),
    # Python discards what a signal handler raises within a finalizer or the callback of a weak reference.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HANG_LIMIT = 50.0
MAX_ATTEMPTS = 20_000


@pytest.fixture(autouse=True)
def hang_guard():
    """Let a test fail that waits for itself. The timer of SIGALRM is left to the tests."""

    def hang(signum, frame):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # or it would interrupt pytest
        raise AssertionError(f"This hung for {HANG_LIMIT} seconds.")

    before = signal.signal(signal.SIGUSR1, hang)
    guard = threading.Timer(HANG_LIMIT, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    guard.start()
    yield
    guard.cancel()
    guard.join()
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def enough_hits(request):
    """How many interruptions must have met a write where it changes the history, which is a small part of a call."""
    return 20 if request.config.getoption("--full") else 5


@pytest.fixture
def seconds(request):
    """How long to interrupt calls."""
    return 3 if request.config.getoption("--full") else 1


@pytest.fixture
def on_alarm():
    """Set what SIGALRM does."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def call_with_alarm(call, seconds):
    """
    Call a function, and have SIGALRM come after so many seconds: usually in the middle, at the latest just after it.
    """
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        while signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # for whatever else was raised


def duration(call):
    """Return how long a call takes when nothing interrupts it: the best of three."""
    measured = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        measured.append(time.perf_counter() - started)
    return min(measured)


def is_within_write(frame):
    while frame is not None:
        if frame.f_code.co_name == "append":
            return True
        frame = frame.f_back
    return False


def batch_of(size, number):
    """Questions and answers, each with an id."""
    return [
        made(f"{number}.{index}", meta={MESSAGE_ID_KEY: f"{number}.{index}"})
        for index, made in zip(range(size), itertools.cycle([ChatMessage.from_user, ChatMessage.from_assistant]))
    ]


@pytest.fixture
def in_memory(request):
    store = InMemoryChatMessageStore(last_k=None, namespace=request.node.name)
    yield store
    store.delete_all_messages()


# ---------------------------------------------------------------------- in memory


def written_with_alarms(in_memory, seed):
    """Write batches, each with an alarm in the middle of the write, and yield them."""
    moments = random.Random(seed)
    one_call = duration(lambda: in_memory.write_messages("measured", batch_of(40, "measured")))
    for number in range(MAX_ATTEMPTS):
        batch = batch_of(40, number)
        call_with_alarm(lambda: in_memory.write_messages("history", batch), moments.uniform(0.1, 1.2) * one_call)  # noqa: B023
        yield batch
    raise AssertionError(f"Too few of {MAX_ATTEMPTS} alarms came in the middle of a write.")


def test_an_interrupted_write_that_is_made_again_leaves_each_message_once(in_memory, on_alarm, enough_hits):
    hits = 0

    def interrupt(signum, frame):
        nonlocal hits
        hits += is_within_write(frame)
        raise KeyboardInterrupt

    on_alarm(interrupt)
    batches = []
    for batch in written_with_alarms(in_memory, seed=1):
        in_memory.write_messages("history", batch)
        batches.append(batch)
        if hits >= enough_hits:
            break
    expected = list(itertools.chain(*batches))
    assert texts(in_memory.retrieve_messages("history")) == texts(expected)
    assert in_memory.count_messages("history") == len(expected)
    for last_k in (1, 2, 21, len(expected) // 2, len(expected)):
        assert texts(in_memory.retrieve_messages("history", last_k)) == texts(expected_rounds(expected, last_k))


def test_a_signal_handler_writes_in_the_middle_of_a_write(in_memory, on_alarm, enough_hits):
    hits, sent = 0, []

    def write(signum, frame):
        nonlocal hits
        hits += is_within_write(frame)
        sent.append(f"signal {len(sent)}")
        in_memory.write_messages("history", [ChatMessage.from_user(sent[-1])])

    on_alarm(write)
    batches = []
    for batch in written_with_alarms(in_memory, seed=2):
        batches.append(batch)
        if hits >= enough_hits:
            break
    stored = texts(in_memory.retrieve_messages("history"))
    assert [text for text in stored if text.startswith("signal")] == sent
    assert [text for text in stored if not text.startswith("signal")] == texts(itertools.chain(*batches))


def test_a_finalizer_writes_in_the_middle_of_a_write(in_memory):
    hits, last_words = 0, []

    class Session:
        def __init__(self, name):
            self.itself, self.name = self, name  # only the garbage collector frees this

        def __del__(self):
            nonlocal hits
            hits += is_within_write(sys._getframe())
            in_memory.write_messages("last words", [ChatMessage.from_user(self.name)])
            last_words.append(self.name)

    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()  # so that the collector looks only at what this test makes, and is quick
    try:
        for number in range(300):  # the collector comes a little later in each of these writes
            message = ChatMessage.from_user(f"{number}")
            gc.collect()
            assert len(last_words) == number
            Session(f"session {number}")
            gc.set_threshold(gc.get_count()[0] + number // 5, *thresholds[1:])
            in_memory.write_messages(f"history {number}", [message])
            gc.set_threshold(*thresholds)
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()
        gc.unfreeze()
    assert hits > 0
    assert len(last_words) == 300
    assert texts(in_memory.retrieve_messages("last words")) == last_words
    assert [in_memory.count_messages(f"history {number}") for number in range(300)] == [1] * 300


# ---------------------------------------------------------------------- SQLite


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_interrupted_calls_leave_no_half_batch_and_hold_up_neither_writes_nor_forks(tmp_path, on_alarm, seconds):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    on_alarm(interrupt)
    moments = random.Random(3)
    store = SQLiteChatMessageStore(tmp_path / "chat_history.db", last_k=None, durability="normal")

    def write_and_read(number):
        store.write_messages("history", batch_of(4, number))
        store.retrieve_messages("history", 2)

    one_call = duration(lambda: write_and_read("measured"))
    until = time.monotonic() + seconds
    number = 0
    with closing(sqlite3.connect(store.path)) as other:
        other.execute(
            "SELECT count(*) FROM haystack_chat_messages"
        ).fetchone()  # the last to close a file tidies it up, slowly
        while number < 300 or (number < MAX_ATTEMPTS and time.monotonic() < until):
            call_with_alarm(lambda: write_and_read(number), moments.uniform(0.02, 1.2) * one_call)  # noqa: B023
            number += 1

    # From another thread, for a lock that this thread has kept might let it in again.
    in_threads(lambda: store.write_messages("history", batch_of(4, "last")))
    stored = texts(store.retrieve_messages("history"))
    batches = [stored[start : start + 4] for start in range(0, len(stored), 4)]
    assert batches == [texts(batch_of(4, batch[0].partition(".")[0])) for batch in batches]
    assert batches[-1][0] == "last.0"

    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert time.monotonic() - started < HANG_LIMIT / 2, "the fork waited for a connection that nobody uses"
    store.close()


# ---------------------------------------------------------------------- all stores


def codes_in(code):
    """Yield a code object, and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def unsafe_lines(code):
    """
    Yield the lines where an exception of a signal handler leaves a `with` without its exit.

    Since 3.12, Python looks for signals where a loop goes on, and if a condition comes last in the loop, its `with`
    does not cover this place.
    """
    bytecode = dis.Bytecode(code)
    instructions = list(bytecode)
    index_at = {instruction.offset: index for index, instruction in enumerate(instructions)}
    for handler in {entry.target for entry in bytecode.exception_entries}:
        covered = {
            offset
            for entry in bytecode.exception_entries
            if entry.target == handler
            for offset in range(entry.start, entry.end, 2)
        }
        if instructions[index_at[handler] + 1].opname == "WITH_EXCEPT_START":
            for before, instruction in zip([instructions[0], *instructions], instructions, strict=False):
                goes_on = instruction.opname == "JUMP_BACKWARD" and before.opname.startswith("POP_JUMP")
                if goes_on and instruction.offset not in covered and instruction.argval in covered:
                    yield instruction.positions.lineno


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python covers all of a loop before 3.12")
def test_a_lock_surrounds_no_loop_that_python_leaves_without_releasing_it():
    found = {
        f"{path.name}:{line} ({code.co_qualname})"
        for path in Path(stores.__file__).parent.rglob("*.py")
        for code in codes_in(compile(path.read_text(encoding="utf-8"), str(path), "exec"))
        for line in unsafe_lines(code)
    }
    assert not found
