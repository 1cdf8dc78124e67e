# SPDX-License-Identifier: Apache-2.0
"""Tests with several processes, killed processes and forks: rules 3, 4, 12, 13 and 16, for durable stores."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage
from typing_extensions import Self

from haystack_chat_store.testing.concurrency import (
    HANG_LIMIT,
    Batch,
    WholeHistoriesTest,
    assert_whole_and_in_order,
    in_threads,
    planned_batches,
)
from haystack_chat_store.testing.fork_server import start_python
from haystack_chat_store.testing.kit import Calls, ClosableStore, only_where, texts

Report = Callable[[Any], None]

# A process runs this before its function. It waits for a line of input, so that many processes can begin at once.
_PRELUDE = """
from __future__ import annotations
import importlib, json, os, sys
def report(value): os.write(1, (json.dumps(value) + "\\n").encode())
store_data, *arguments = json.loads(sys.argv[1])
module, _, name = store_data["type"].rpartition(".")
store = getattr(importlib.import_module(module), name).from_dict(store_data)
report("ready")
if not sys.stdin.readline():
    sys.exit("The test that started this process is gone.")
"""


class Program:
    """
    A function that runs in a separate process, on a store that is rebuilt there with `from_dict`.

    The process gets only the source of the function, so the function must import what it needs, and pytest is not
    loaded. Where processes can be forked, a fork server starts it, which has imported Haystack and this package. The
    call is `function(store, report, *arguments)`. `report(value)` sends a value back at once.

    ```python
    from haystack_chat_store import SQLiteChatMessageStore
    from haystack_chat_store.testing.processes import Program, write_batches

    store = SQLiteChatMessageStore("chat.db")
    with Program(write_batches, store, "user_456", [[["Hi!"]]]) as program:
        program.begin()
        print(program.reports_to_the_end())
    ```
    """

    def __init__(self, function: Callable[..., None], store: ClosableStore, *arguments: Any) -> None:
        """
        Start the process. It waits for `begin`.

        :param function: A function at the top level of its module.
        :param store: The store to rebuild.
        :param arguments: More arguments, as JSON data.
        """
        call = f"{function.__name__}(store, report, *arguments)"
        source = "\n".join([_PRELUDE, textwrap.dedent(inspect.getsource(function)), call])
        self._process = start_python(
            ["-c", source, json.dumps([store.to_dict(), *arguments])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # so that `kill` also ends its forked children
        )
        self._hang_guard = threading.Timer(HANG_LIMIT, self.kill)
        self._hang_guard.daemon = True
        self._hang_guard.start()

    def __enter__(self) -> Self:
        """Return this program."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process if it still runs."""
        self.kill()
        self._hang_guard.cancel()
        with self._process:
            pass

    def begin(self, *others: "Program") -> None:
        """
        Wait until the process is ready, and let the function begin.

        :param others: Programs to begin at the same time. All begin when all are ready.
        """
        for program in (self, *others):
            assert next(program.reports()) == "ready"
        for program in (self, *others):
            program.tell("begin")

    def tell(self, line: str) -> None:
        """Send a line, which the function reads from `sys.stdin`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def reports(self) -> Iterator[Any]:
        """Yield each value that the function reports, until the process has ended."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()).endswith("\n"):
            yield json.loads(line)

    def reports_to_the_end(self) -> list[Any]:
        """Wait until the process has ended, check that it succeeded, and return the values it reported."""
        reported = list(self.reports())
        assert self.exit_code() == 0, "the process failed, or hung and was killed"
        return reported

    def exit_code(self) -> int:
        """Wait until the process has ended, and return its exit code: 0 if it succeeded."""
        return self._process.wait(HANG_LIMIT)

    def kill(self) -> None:
        """Kill the process and its forked children at once."""
        if self._process.returncode is not None:
            return  # another process may have its id by now
        if hasattr(os, "killpg"):
            with suppress(PermissionError):  # macOS raises it for a process that has ended
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()


def run_program(function: Callable[..., None], store: ClosableStore, *arguments: Any) -> list[Any]:
    """Run a function in a separate process, and return the values it reported. See `Program`."""
    with Program(function, store, *arguments) as program:
        program.begin()
        return program.reports_to_the_end()


# ---------------------------------------------------------------------- programs


def write_batches(store: ClosableStore, report: Report, history: str, writers: list[list[Batch]]) -> None:
    """Write with one thread for each writer. Report the last text of each batch as soon as it is acknowledged."""
    from concurrent.futures import ThreadPoolExecutor

    from haystack.dataclasses import ChatMessage

    def write(batches: list[Batch]) -> None:
        for batch in batches:
            assert store.write_messages(history, [ChatMessage.from_user(text) for text in batch]) == len(batch)
            report(batch[-1])

    with ThreadPoolExecutor(len(writers)) as threads:
        list(threads.map(write, writers))


def read_history(store: ClosableStore, report: Report, history: str) -> None:
    """Report the texts of a history, read with the synchronous and the asynchronous call."""
    import asyncio

    report([message.text for message in store.retrieve_messages(history)])
    report([message.text for message in asyncio.run(store.retrieve_messages_async(history))])


def take_turns(store: ClosableStore, report: Report, history: str, name: str) -> None:
    """At each line of input, write a message and report the texts of the history."""
    import sys

    from haystack.dataclasses import ChatMessage

    for line in sys.stdin:
        store.write_messages(history, [ChatMessage.from_user(f"{name} {line.strip()}")])
        report([message.text for message in store.retrieve_messages(history)])


def write_two_huge_batches(store: ClosableStore, report: Report, size: int) -> None:
    """Write two batches. Report when each write begins and when it is done."""
    from haystack.dataclasses import ChatMessage

    for history in ("first", "second"):
        messages = [ChatMessage.from_user(f"{history} {index}") for index in range(size)]
        report("begins")
        store.write_messages(history, messages)
        report("done")


def fork_and_write(store: ClosableStore, report: Report, exits_normally: bool) -> None:
    """Write before and after a forked child writes and ends, then wait to be killed."""
    import asyncio
    import os
    import sys

    from haystack.dataclasses import ChatMessage

    def write(text: str) -> None:
        assert store.write_messages("history", [ChatMessage.from_user(f"{text} waits")]) == 1
        message = ChatMessage.from_user(f"{text} awaits")
        assert asyncio.run(store.write_messages_async("history", [message])) == 1
        assert store.retrieve_messages("history")[-1].text == message.text
        assert asyncio.run(store.retrieve_messages_async("history"))[-1].text == message.text

    write("the parent")
    child = os.fork()
    if child == 0:
        write("its child")
        if not exits_normally:
            os._exit(0)
    else:
        report(os.waitpid(child, 0)[1])
        write("the parent again")
        report("done")
        sys.stdin.read()


def fork_and_close(store: ClosableStore, report: Report) -> None:
    """Write in a forked child, close the store in the parent, and write in the child once more."""
    import os

    from haystack.dataclasses import ChatMessage

    def write(text: str) -> None:
        assert store.write_messages("history", [ChatMessage.from_user(text)]) == 1

    write("the parent")
    child_has_written, parent_has_closed = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        write("its child")
        os.write(child_has_written[1], b".")
        os.read(parent_has_closed[0], 1)
        write("its child again")
        os._exit(0)
    os.read(child_has_written[0], 1)
    store.close()
    os.write(parent_has_closed[1], b".")
    report(os.waitpid(child, 0)[1])


def fork_while_threads_write(
    store: ClosableStore, report: Report, history: str, threads: list[list[Batch]], children: list[list[Batch]]
) -> None:
    """
    Write with threads and, at the same time, with one forked child after another. Report the status of each child.
    """
    import os
    import traceback
    from concurrent.futures import ThreadPoolExecutor

    from haystack.dataclasses import ChatMessage

    def write(batches: list[Batch]) -> None:
        for batch in batches:
            assert store.write_messages(history, [ChatMessage.from_user(text) for text in batch]) == len(batch)

    with ThreadPoolExecutor(len(threads)) as pool:
        written = pool.map(write, threads)
        for batches in children:
            child = os.fork()
            if child == 0:
                try:
                    write(batches)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            report(os.waitpid(child, 0)[1])
        list(written)


# ---------------------------------------------------------------------- tests

_needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork on this platform")


class ProcessesTest(WholeHistoriesTest):
    """
    Checks the promises of a durable store when several processes use it, are killed, or fork.

    The processes rebuild the store with the `from_dict` of its class, so they must be able to import the class.
    """

    def assert_sound(self, store: ClosableStore) -> None:
        """
        Check the state of the engine's files. Override it for engines that can check it.

        :param store: A store on the database.
        """

    @only_where("durable")
    def test_what_one_process_wrote_the_next_one_reads(self, whole_store: ClosableStore, calls: Calls) -> None:
        """Rule 3."""
        run_program(write_batches, whole_store, "history", [[["Hello,"], ["it's me.", "Really."]]])
        assert calls.write(whole_store, "history", [ChatMessage.from_user("And me.")]) == 1
        everything = ["Hello,", "it's me.", "Really.", "And me."]
        assert run_program(read_history, whole_store, "history") == [everything, everything]

    @only_where("durable")
    def test_processes_that_take_turns_see_what_the_others_wrote(self, whole_store: ClosableStore) -> None:
        """Rule 4. A store does not cache data that another process may change."""
        expected = []
        with (
            Program(take_turns, whole_store, "history", "Ada") as ada,
            Program(take_turns, whole_store, "history", "Bob") as bob,
        ):
            ada.begin(bob)
            for turn in range(5):
                for name, program in (("Ada", ada), ("Bob", bob)):
                    program.tell(str(turn))
                    expected.append(f"{name} {turn}")
                    assert next(program.reports()) == expected
                    assert texts(whole_store.retrieve_messages("history")) == expected

    @only_where("durable")
    def test_many_processes_that_start_on_an_empty_database_make_its_tables_once(
        self, whole_store: ClosableStore
    ) -> None:
        """Rules 13 and 16."""
        writers = planned_batches(8, 1)
        with ExitStack() as stack:
            programs = [
                stack.enter_context(Program(write_batches, whole_store, "history", [batches])) for batches in writers
            ]
            Program.begin(*programs)
            for program, (batch,) in zip(programs, writers, strict=True):
                assert program.reports_to_the_end() == [batch[-1]]
        found = texts(whole_store.retrieve_messages("history"))
        assert_whole_and_in_order(found, writers, [batch[-1] for (batch,) in writers])
        self.assert_sound(whole_store)

    @only_where("durable")
    def test_killed_processes_lose_double_split_and_reorder_nothing(self, whole_store: ClosableStore) -> None:
        """Rules 3 and 4. Eight threads in each of eight processes write to one history; three processes are killed."""
        writers = planned_batches(64, 10)
        moments = random.Random(0)
        kill_after = {process: moments.randint(1, 40) for process in moments.sample(range(8), 3)}
        with ExitStack() as stack:
            programs = [
                stack.enter_context(Program(write_batches, whole_store, "history", writers[first : first + 8]))
                for first in range(0, 64, 8)
            ]

            def acknowledged_by(process: int) -> list[str]:
                acknowledged = []
                for text in programs[process].reports():
                    acknowledged.append(text)
                    if len(acknowledged) == kill_after.get(process):
                        programs[process].kill()
                return acknowledged

            Program.begin(*programs)
            acknowledged = in_threads(*(lambda process=process: acknowledged_by(process) for process in range(8)))
            failed = {process for process, program in enumerate(programs) if program.exit_code() != 0}
        assert failed == set(kill_after)
        assert all(len(acknowledged[process]) == 80 for process in range(8) if process not in kill_after)
        found = texts(whole_store.retrieve_messages("history"))
        assert_whole_and_in_order(found, writers, [text for by_process in acknowledged for text in by_process])
        assert whole_store.count_messages("history") == len(found)
        self.assert_sound(whole_store)

    @only_where("durable")
    @pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
    def test_a_process_killed_while_it_writes_a_huge_batch_leaves_all_or_nothing(
        self, whole_store: ClosableStore, moment: float
    ) -> None:
        """Rule 3. The process is killed after a fraction of the time that the first of two equal writes took."""
        size = 10_000
        with Program(write_two_huge_batches, whole_store, size) as program:
            program.begin()
            reports = program.reports()
            assert next(reports) == "begins"
            began = time.monotonic()
            assert next(reports) == "done"
            took = time.monotonic() - began
            assert next(reports) == "begins"
            time.sleep(moment * took)
            program.kill()
            is_done = list(reports) == ["done"]
        assert whole_store.count_messages("first") == size
        looks = [whole_store.count_messages("second")]
        while len(looks) == 1 or looks[-1] != looks[-2]:  # a server may still be storing the batch
            time.sleep(0.4)
            looks.append(whole_store.count_messages("second"))
        found = texts(whole_store.retrieve_messages("second"))
        assert found in ([], [f"second {index}" for index in range(size)])
        assert found or not is_done
        assert whole_store.count_messages("second") == len(found)
        assert whole_store.write_messages("second", [ChatMessage.from_user("afterwards")]) == 1
        self.assert_sound(whole_store)

    @_needs_fork
    @only_where("durable")
    @pytest.mark.parametrize("exits_normally", [True, False], ids=["normal exit", "os._exit"])
    def test_a_forked_child_uses_the_store_and_its_parent_goes_on(
        self, whole_store: ClosableStore, exits_normally: bool
    ) -> None:
        """Rule 12. Both use synchronous and asynchronous calls. The parent is killed, so that no exit handler runs."""
        writers = ("the parent", "its child", "the parent again")
        expected = [f"{writer} {way}" for writer in writers for way in ("waits", "awaits")]
        with Program(fork_and_write, whole_store, exits_normally) as program:
            program.begin()
            reports = program.reports()
            assert next(reports) == 0, "the child failed"
            assert next(reports) == "done"
            assert texts(whole_store.retrieve_messages("history")) == expected
            whole_store.close()
            program.kill()
        assert texts(whole_store.retrieve_messages("history")) == expected
        self.assert_sound(whole_store)

    @_needs_fork
    @only_where("durable")
    def test_a_forked_child_goes_on_when_its_parent_has_closed_the_store(self, whole_store: ClosableStore) -> None:
        """Rules 3 and 12. The child's acknowledged writes stay."""
        assert run_program(fork_and_close, whole_store) == [0]
        assert texts(whole_store.retrieve_messages("history")) == ["the parent", "its child", "its child again"]
        self.assert_sound(whole_store)

    @_needs_fork
    @only_where("durable")
    def test_children_forked_while_threads_write_use_the_store(self, whole_store: ClosableStore) -> None:
        """Rule 12. A lock that a thread of the parent holds at the fork does not stay locked in the child."""
        writers = planned_batches(14, 100)
        threads, children = writers[:4], [batches[:3] for batches in writers[4:]]
        assert run_program(fork_while_threads_write, whole_store, "history", threads, children) == [0] * 10
        writers = [*threads, *children]
        found = texts(whole_store.retrieve_messages("history"))
        assert_whole_and_in_order(found, writers, [batch[-1] for batches in writers for batch in batches])
        self.assert_sound(whole_store)
