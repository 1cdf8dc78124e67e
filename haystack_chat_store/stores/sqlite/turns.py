# SPDX-License-Identifier: Apache-2.0
"""
Group commit: writers of one process that wait for each other share a transaction, and so one flush of the disk.

A writer has the turn at once if no other one writes, and makes its write alone. Writers that come meanwhile wait.
The next one that has the turn takes what is waiting by then into its transaction, commits once, and answers all. So
groups form while the disk is flushed, without a timer and without a thread of their own.

The turn decides only who waits for whom. What keeps transactions apart is the lock for writing of `Database`, which
writes outside of groups take, too.
"""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from haystack_chat_store.errors import ChatMessageStoreError, StoreUnavailableError
from haystack_chat_store.stores.sqlite import failures
from haystack_chat_store.stores.sqlite.calls import Call, CallOfTask, answer
from haystack_chat_store.stores.sync_async import no_thread

if TYPE_CHECKING:
    from haystack_chat_store.stores.sqlite.connections import Database, Settings

# A transaction holds up to this many writes. It takes no more once they have this many characters.
_MAX_WRITES = 64
MAX_SIZE = 4_000_000


class WriteSession(Protocol):
    """The session of an operation whose transaction others may share. It opens one transaction."""

    settings: "Settings"

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Lend a connection for one write: undone if anything is raised."""
        ...


class _WriteOfThread(Call):
    """
    The write of a thread.

    :ivar is_awaited: A lock that is held until the write is made, or until the thread has the turn.
    :ivar has_turn: Whether the thread has the turn.
    """

    def __init__(self, call: Callable[[WriteSession], Any], deadline: float, size: int) -> None:
        super().__init__(call, deadline, size)
        self.is_awaited = threading.Lock()
        self.is_awaited.acquire()
        self.has_turn = False


CallT = TypeVar("CallT", bound=Call)


def _first(waiting: "deque[CallT]") -> CallT | None:
    """Take the first write that was not withdrawn."""
    while waiting:
        with suppress(IndexError):  # there was one left, and another thread took it
            write = waiting.popleft()
            if write.claim():
                return write
    return None


class Turns:
    """The writers of one `Database` that wait for each other."""

    def __init__(self, database: "Database") -> None:
        """Begin with no writer."""
        self._database = database
        self._turn = threading.Lock()  # which a thread may take, and another one release
        self._thread = threading.local()
        self._threads: deque[_WriteOfThread] = deque()
        self._tasks: deque[CallOfTask] = deque()
        self._is_writer_called = False

    def run(self, call: Callable[[WriteSession], Any], deadline: float, size: int) -> Any:
        """
        Make a write in this thread, or have the thread make it that has the turn.

        It is not for the main thread: an exception that a signal handler raises there would meet the writes of others.

        :param call: Makes the write.
        :param deadline: How long to wait for locks, as a time of `time.monotonic`.
        :param size: The number of its characters.
        """
        if getattr(self._thread, "is_writing", False):
            raise failures.in_the_middle_of_a_write(self._database.settings.path)
        self._thread.is_writing = True  # first: a write of a finalizer would wait for this one from here on
        try:
            if not self._turn.acquire(blocking=False):
                write = _WriteOfThread(call, deadline, size)
                self._threads.append(write)
                if self._turn.acquire(blocking=False):  # which became free before this write could be seen
                    self._pass_on()
                self._wait(write)
                if not write.has_turn:
                    return write.outcome()
            group = _Group(self._database, self._next)
            try:
                return group.make(call, deadline)
            finally:
                if group.taken:
                    answer(_answer_threads(group.taken))
                self._pass_on()
        finally:
            self._thread.is_writing = False

    async def run_async(self, call: Callable[[WriteSession], Any], deadline: float, size: int) -> Any:
        """
        Do what `run` does, without blocking the event loop: if no thread has the turn, that for asynchronous writes.

        A call that is cancelled before its write was taken is not carried out.
        """
        write = CallOfTask(call, deadline, size)
        self._tasks.append(write)
        return await write.wait(self._call_writer, self._database.settings.timed_out)

    def after_fork_in_child(self) -> None:
        """Forget the writes of the parent."""
        self._threads.clear()
        self._tasks.clear()

    def _wait(self, write: _WriteOfThread) -> None:
        """Wait until a write is made, or until its thread has the turn."""
        if not write.is_awaited.acquire(timeout=max(0, write.deadline - time.monotonic())):
            if write.claim():
                raise self._database.settings.timed_out("other threads of this process")
            write.is_awaited.acquire()  # it was taken just now, so it is soon known what became of it

    def _pass_on(self) -> None:
        """Give the turn to a thread that waits, or set it free."""
        while True:
            write = _first(self._threads)
            if write is not None:
                write.has_turn = True
                write.is_awaited.release()
                return
            self._turn.release()
            if self._tasks:
                self._call_writer()
            # A thread that came just before the turn was free did not get it.
            if not self._threads or not self._turn.acquire(blocking=False):
                return

    def _call_writer(self) -> None:
        """Have the thread for asynchronous writes come as soon as it can. It may be busy with a long operation."""
        if self._is_writer_called:
            return
        self._is_writer_called = True
        try:
            self._database.writer.submit(self._make_for_tasks)
        except BaseException as error:
            self._is_writer_called = False
            if not isinstance(error, RuntimeError):
                raise
            refused = []
            while (write := _first(self._tasks)) is not None:
                write.error = no_thread(error)
                refused.append(write)
            answer(refused)

    def _make_for_tasks(self) -> Sequence[CallOfTask]:
        """Make the writes of tasks, unless a thread has the turn, which makes them along with its own."""
        self._is_writer_called = False
        self._thread.is_writing = True
        try:
            return self._made_for_tasks()
        finally:
            self._thread.is_writing = False

    def _made_for_tasks(self) -> Sequence[CallOfTask]:
        if not self._turn.acquire(blocking=False):
            return ()
        try:
            write = _first(self._tasks)
            if write is None:
                return ()
            group = _Group(self._database, self._next)
            try:
                write.result = group.make(write.call, write.deadline)
            except BaseException as error:
                write.error = error
            return (write, *_answer_threads(group.taken))
        finally:
            self._pass_on()

    def _next(self, number: int) -> Call | None:
        """Take the next write that waits: of a thread and of a task in turn."""
        if not self._threads and not self._tasks:
            return None
        if number % 2:
            return _first(self._threads) or _first(self._tasks)
        return _first(self._tasks) or _first(self._threads)


class _Group:
    """
    The session of the write that has the turn. At the end of its transaction, those that wait are made in it, too.

    :ivar taken: The other writes that were taken.
    """

    __slots__ = ("_committed", "_database", "_next", "settings", "taken")

    def __init__(self, database: "Database", next_write: Callable[[int], Call | None]) -> None:
        self.settings = database.settings
        self.taken: list[Call] = []
        self._database = database
        self._next = next_write
        self._committed: list[bool] = []

    def make(self, call: Callable[[WriteSession], Any], deadline: float) -> Any:
        """Make the write that has the turn, and those that wait."""
        self._database.begin_call(deadline)
        try:
            return call(self)
        except sqlite3.Error as error:
            self._fail(error)
            raise self._explained(error) from failures.cause_of_explained(error)
        except BaseException as error:
            self._fail(error)
            raise

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Lend a connection for the write that has the turn. What it raises concerns it alone."""
        return self._database.transaction(self._end)

    def _end(self, connection: sqlite3.Connection) -> None:
        self._make_others(connection)
        if self.taken:
            # One step of the interpreter: if an exception comes from outside, it is still known whether it committed.
            # The cursor is not kept: it would go when the connection is lent no more, perhaps in the middle of a fork.
            self._committed.extend(map(bool, map(connection.execute, ("COMMIT",))))

    def _make_others(self, connection: sqlite3.Connection) -> None:
        size = 0
        while len(self.taken) < _MAX_WRITES - 1 and size < MAX_SIZE:
            write = self._next(len(self.taken))
            if write is None:
                return
            self.taken.append(write)
            size += write.size
            try:
                write.result = write.call(_Share(self.settings, connection))
            except Exception as error:
                if not connection.in_transaction:  # SQLite has undone all of it
                    raise
                write.error = self._explained(error) if isinstance(error, sqlite3.Error) else error

    def _fail(self, error: BaseException) -> None:
        """Let all that were taken fail, because the transaction did. If it was committed, they did not."""
        for write in () if self._committed else self.taken:
            if write.error is None:
                write.error = self._explained(error) if isinstance(error, sqlite3.Error) else _interrupted()

    def _explained(self, error: sqlite3.Error) -> ChatMessageStoreError:
        explanation = failures.explained(error, self.settings.path, self.settings.timeout)
        explanation.__cause__ = failures.cause_of_explained(error)
        return explanation


class _Share:
    """The session of a write in the transaction of another."""

    def __init__(self, settings: "Settings", connection: sqlite3.Connection) -> None:
        self.settings = settings
        self._connection = connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection. If anything is raised, only this write is undone."""
        connection = self._connection
        connection.execute("SAVEPOINT haystack_chat_write")
        try:
            yield connection
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK TO haystack_chat_write")
                connection.execute("RELEASE haystack_chat_write")
            raise
        connection.execute("RELEASE haystack_chat_write")


def _answer_threads(writes: Sequence[Call]) -> list[CallOfTask]:
    """Let threads know what became of their writes. Return those of tasks."""
    for write in writes:
        if isinstance(write, _WriteOfThread):
            write.is_awaited.release()
    return [write for write in writes if isinstance(write, CallOfTask)]


def _interrupted() -> StoreUnavailableError:
    return StoreUnavailableError(
        "This write shared a transaction with another one, in which the process was interrupted. Nothing was changed. "
        "Try again."
    )
