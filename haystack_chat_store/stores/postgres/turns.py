# SPDX-License-Identifier: Apache-2.0
"""
Group commit: appends of one process to one history that wait for each other go as one statement, with one commit.

The first append to a history has the turn, and is made alone. Appends that come meanwhile wait, without a connection.
The next one that has the turn takes what is waiting by then into its statement. The last one of a group passes the turn
on as soon as it has its answer: by then the others, which have theirs, may have come again. So groups form while the
server writes to its disk, without a timer and without a thread of their own.

The turn decides only who waits for whom. What keeps writers apart is the lock of the history's row. An append that its
group did not make, for whatever reason, is made alone by its own caller, which first finds out whether it is stored.

Threads have turns among themselves, and so have the tasks of each event loop.
"""

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence

import psycopg

from haystack_chat_store.stores.rows import EncodedMessage

# A statement has up to this many appends, and this many characters.
_MAX_APPENDS = 64
MAX_CHARACTERS = 1_000_000


def size_of(messages: Sequence[EncodedMessage]) -> int:
    """Return the number of characters of messages."""
    return sum([len(message.content) for message in messages])


class Append(ABC):
    """
    An append that waits for its turn.

    :param messages: The messages, with different ids.
    :ivar size: The number of their characters.
    :ivar result: The number of messages appended, or `None` if the append was not made.
    :ivar sent: The ids of the messages, if a statement may have stored them whose answer is not known.
    :ivar has_turn: Whether its caller has the turn.
    :ivar is_taken: Whether it has been taken into a group.
    :ivar is_awaited: Whether its caller still waits for it.
    """

    def __init__(self, messages: Sequence[EncodedMessage]) -> None:
        """Begin without an outcome."""
        self.messages = messages
        self.size = size_of(messages)
        self.result: int | None = None
        self.sent: Sequence[str] = ()
        self.has_turn = self.is_taken = False
        self.is_awaited = True

    @abstractmethod
    def wake(self) -> None:
        """Wake the caller: it has the turn, or the append has been in a group."""

    @abstractmethod
    async def wait(self, seconds: float) -> bool:
        """Wait until `wake` is called. Return False if it is not in time."""


class AppendOfThread(Append):
    """The append of a thread."""

    def __init__(self, messages: Sequence[EncodedMessage]) -> None:
        """Begin without an outcome."""
        super().__init__(messages)
        self._is_awaited = threading.Lock()
        self._is_awaited.acquire()

    def wake(self) -> None:
        """Release the lock for which the thread waits."""
        self._is_awaited.release()

    async def wait(self, seconds: float) -> bool:
        """Block the thread."""
        return self._is_awaited.acquire(timeout=max(0, seconds))


class AppendOfTask(Append):
    """The append of a task, in a group of its own event loop."""

    def __init__(self, messages: Sequence[EncodedMessage]) -> None:
        """Begin without an outcome."""
        super().__init__(messages)
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        """Resolve the future for which the task waits."""
        self._future.set_result(None)

    async def wait(self, seconds: float) -> bool:
        """Suspend the task."""
        done, _ = await asyncio.wait([self._future], timeout=max(0, seconds))
        return bool(done)


class Turns:
    """The appends that wait for each other, of threads or of the tasks of one event loop."""

    def __init__(self) -> None:
        """Begin with no append."""
        self._lock = threading.Lock()
        #: By history, if an append to it has the turn: those that wait.
        self._waiting: dict[Hashable, deque[Append]] = {}

    def begin(self, history: Hashable) -> bool:
        """
        Take the turn, if no other append has it. It is not for synchronous calls of the main thread.

        An exception that a signal handler raises there could keep the turn for ever. So it could in an event loop of
        the main thread, which is normally not used after that.

        :param history: What appends have in common that can go together.
        """
        with self._lock:
            if history in self._waiting:
                return False
            self._waiting[history] = deque()
            return True

    def end(self, history: Hashable) -> None:
        """Give the turn to the first that waits, or set it free."""
        with self._lock:
            if not self._waiting[history]:
                del self._waiting[history]
                return
            append = self._waiting[history].popleft()
            append.has_turn = True
        append.wake()

    async def run(
        self,
        history: Hashable,
        append: Append,
        deadline: float,
        make_alone: Callable[[Append], Awaitable[int]],
        make_together: Callable[[Sequence[Append]], Awaitable[None]],
    ) -> int:
        """
        Make an append in its turn with all that wait by then, or have another one make it along with its own.

        :param history: What appends have in common that can go together.
        :param deadline: How long to wait, as a time of `time.monotonic`.
        :param make_alone: Makes one append.
        :param make_together: Makes several, and sets the result of each that it has made. It raises nothing but what
            ends this call, too.
        :returns: The number of messages appended.
        :raises psycopg.errors.ConnectionTimeout: If it waits longer.
        """
        if await self._has_turn(history, append, deadline):
            others: list[Append] = []
            try:
                others = self._take(history, append)
                if others:
                    await make_together([append, *others])
                else:
                    append.result = await make_alone(append)
            finally:
                self._end_group(history, others)
        return await make_alone(append) if append.result is None else append.result

    async def _has_turn(self, history: Hashable, append: Append, deadline: float) -> bool:
        """Wait until an append has the turn, or has been in a group: then it only passes on the turn, if it has it."""
        with self._lock:
            if history not in self._waiting:  # set free just now
                self._waiting[history] = deque()
                return True
            self._waiting[history].append(append)
        is_in_time = False
        try:
            is_in_time = await append.wait(deadline - time.monotonic())
        finally:
            if not is_in_time:
                self._withdraw(history, append)
        if not is_in_time:
            raise psycopg.errors.ConnectionTimeout
        if append.is_taken and append.has_turn:
            self.end(history)
        return not append.is_taken

    def _take(self, history: Hashable, append: Append) -> list[Append]:
        """Take those that wait and go with an append into one statement."""
        with self._lock:
            return _taken(self._waiting[history], append.size)

    def _withdraw(self, history: Hashable, append: Append) -> None:
        """Let an append go that waits no more. If it was taken, it is not known whether it is made."""
        with self._lock:
            append.is_awaited = False
            if append in self._waiting.get(history, ()):
                self._waiting[history].remove(append)
        if append.has_turn:
            self.end(history)

    def _end_group(self, history: Hashable, others: Sequence[Append]) -> None:
        """Answer the others of a group, and give the last of them the turn, to pass it on."""
        with self._lock:
            last = next((other for other in reversed(others) if other.is_awaited), None)
            if last is not None:
                last.has_turn = True
        for other in others:
            other.wake()
        if last is None:
            self.end(history)


def _taken(waiting: deque[Append], size: int) -> list[Append]:
    """Take appends from the waiting ones, as long as there are not too many with an append of this size."""
    taken: list[Append] = []
    while waiting and len(taken) < _MAX_APPENDS - 1 and size + waiting[0].size <= MAX_CHARACTERS:
        taken.append(waiting.popleft())
        taken[-1].is_taken = True
        size += taken[-1].size
    return taken
