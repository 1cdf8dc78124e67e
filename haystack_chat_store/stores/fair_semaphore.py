# SPDX-License-Identifier: Apache-2.0
"""A semaphore of threads that serves them in the order in which they came."""

import threading
from collections import deque


class FairSemaphore:
    """
    Limits how many threads do something at once.

    `threading.Semaphore` lets a thread that gives its place back take it again before those that wait wake up, so under
    load some wait until their timeout. Here a place goes to the thread that has waited longest.
    """

    def __init__(self, places: int) -> None:
        """
        Begin with all places free.

        :param places: The number of threads that may have a place at once, at least 1.
        """
        self._lock = threading.Lock()
        self._free = places  # none as long as a thread waits
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float) -> bool:
        """
        Take a place, and return whether there was one.

        :param timeout: The largest number of seconds to wait, 0 or more.
        """
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            if turn.acquire(timeout=timeout):
                return True
        except BaseException:
            if not self._withdraw(turn):
                self.release()
            raise
        return not self._withdraw(turn)

    def release(self) -> None:
        """Give a place back."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

    def _withdraw(self, turn: threading.Lock) -> bool:
        """Wait no longer. Return False if a place was given meanwhile."""
        with self._lock:
            try:
                self._waiting.remove(turn)
            except ValueError:
                return False
            return True
