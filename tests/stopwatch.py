# SPDX-License-Identifier: Apache-2.0
"""How long something takes on a machine that may be busy with other things."""

import threading
import time

_TICK = 0.01


class Stopwatch:
    """
    Counts seconds, without those in which the machine was too busy to run a thread that has slept long enough.

        with Stopwatch() as seconds:
            ...
            assert seconds() < 2

    It serves for what waits for something else. What computes would be taken for a busy machine.
    """

    def __enter__(self):
        self._began, self._lost = time.monotonic(), 0.0
        self._ends = threading.Event()
        self._ticks = threading.Thread(target=self._tick, daemon=True)
        self._ticks.start()
        return self

    def __exit__(self, *_):
        self._ends.set()
        self._ticks.join()

    def __call__(self):
        return time.monotonic() - self._began - self._lost

    def _tick(self):
        last = time.monotonic()
        while not self._ends.wait(_TICK):
            now = time.monotonic()
            late = now - last - _TICK
            if late > _TICK:
                self._lost += late
            last = now
