# SPDX-License-Identifier: Apache-2.0
"""
Calls of tasks in event loops, and the threads that make them.

A call costs two wake-ups: of a thread that waits for calls, and of the event loop, once for all calls that a thread has
made for it. `concurrent.futures` would do more: a second future for each call, with locks and callbacks for waits that
nothing here needs, and another thread for each call of a task.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from haystack import logging

from haystack_chat_store.stores.sync_async import no_thread

logger = logging.getLogger(__name__)


# However short its timeout, a call waits so long for a thread, which first has to wake up.
_LEAST_WAIT_SECONDS = 0.05


class Call:
    """
    A call that waits until a thread makes it.

    :param call: Makes the call.
    :param deadline: How long it waits, as a time of `time.monotonic`.
    :param size: The number of characters that it writes.
    """

    def __init__(self, call: Callable[..., Any], deadline: float, size: int = 0) -> None:
        self.call = call
        self.deadline = deadline
        self.size = size
        self.result: Any = None
        self.error: BaseException | None = None
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Take the call, to make it or to withdraw it. Only the first claim is granted."""
        return self._claim.acquire(blocking=False)

    def outcome(self) -> Any:
        """Return the result, or raise the error."""
        error, self.error = self.error, None  # or the error and its traceback would keep each other alive
        if error is not None:
            raise error
        return self.result


class CallOfTask(Call):
    """The call of a task in an event loop."""

    def __init__(self, call: Callable[..., Any], deadline: float, size: int = 0) -> None:
        super().__init__(call, deadline, size)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def make(self) -> "Sequence[CallOfTask]":
        """Make the call in this thread, unless it was withdrawn. Return what is to be answered."""
        if not self.claim():
            return ()
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error
        return (self,)

    async def wait(self, submit: Callable[[], bool | None], timed_out: Callable[[str], Exception]) -> Any:
        """
        Return the outcome. A call that is cancelled, or late, before a thread has taken it is not made.

        :param submit: Lets threads know of the call. Returns true if one takes it at once, so that it cannot be late.
        :param timed_out: Makes the error of a call that is late, from what it waited for.
        """
        timer = None
        try:
            try:
                is_taken = submit()
            except RuntimeError as error:
                raise no_thread(error) from error
            if not is_taken:
                seconds = max(self.deadline - time.monotonic(), _LEAST_WAIT_SECONDS)
                timer = self.loop.call_later(seconds, self._give_up, timed_out)
            return await self.future
        finally:
            if timer is not None:
                timer.cancel()
            self.claim()

    def _give_up(self, timed_out: Callable[[str], Exception]) -> None:
        if not self.future.done() and self.claim():
            self.future.set_exception(timed_out("other calls of this process"))


def answer(calls: Sequence[CallOfTask]) -> None:
    """Let tasks know what became of their calls: those of one event loop all at once."""
    of_loops: dict[asyncio.AbstractEventLoop, list[CallOfTask]] = {}
    for call in calls:
        of_loops.setdefault(call.loop, []).append(call)
    for loop, of_loop in of_loops.items():
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_resolve, of_loop)


def _resolve(calls: Sequence[CallOfTask]) -> None:
    for call in calls:
        if call.future.done():  # cancelled
            continue
        try:
            call.future.set_result(call.outcome())
        except BaseException as error:
            call.future.set_exception(error)


#: What a thread does. It returns the calls that it has made.
Work = Callable[[], Sequence[CallOfTask]]


class Threads:
    """
    Threads that work for event loops, in the order in which work came. One is started if work finds none free.

    They do not keep the interpreter from ending: see `finish`.
    """

    def __init__(self, limit: int, name: str) -> None:
        """
        Start none yet.

        :param limit: The largest number of threads.
        :param name: What their names begin with.
        """
        self._limit = limit
        self._name = name
        self._queue: SimpleQueue[Work | None] = SimpleQueue()  # `None` ends a thread, which passes it on to the next
        self._threads: list[threading.Thread] = []
        self._free = 0  # how many more threads there are than pieces of work: below 0 if some wait
        self._is_closed = False
        self._lock = threading.RLock()  # a finalizer may run in the middle, and write

    def submit(self, work: Work) -> bool:
        """
        Have a thread do some work. Return whether one does it at once.

        :raises RuntimeError: If no thread can be started. The work is not done.
        """
        with self._lock:
            if self._is_closed:
                self._start_thread(self._do, work)
                return True
            if self._free <= 0 and len(self._threads) < self._limit:
                self._start_another_thread()
            self._free -= 1
            self._queue.put(work)
            return self._free >= 0

    def close(self) -> None:
        """Let each thread end when all work that has come is done. Work that still comes has a thread of its own."""
        with self._lock:
            self._is_closed = True
            self._queue.put(None)

    def finish(self) -> None:
        """Wait until all work that has come is done, and let all threads end."""
        self.close()
        for thread in self._threads:
            thread.join()

    def _start_another_thread(self) -> None:
        try:
            self._start_thread(self._run)
        except RuntimeError:
            if not self._threads:
                raise
        else:
            self._free += 1

    def _start_thread(self, target: Callable[..., None], *arguments: Any) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            self._do(work)
            del work  # with its results
        self._queue.put(None)

    def _do(self, work: Work) -> None:
        try:
            answer(self._calls_made(work))
        except BaseException:  # of a call, its task is told: this is a fault here, and must not cost the thread
            logger.exception("A thread for asynchronous calls has failed.")

    def _calls_made(self, work: Work) -> Sequence[CallOfTask]:
        """Do some work. The thread is free before tasks are told, so one that makes call after call keeps to it."""
        try:
            return work()
        finally:
            with self._lock:
                self._free += 1
