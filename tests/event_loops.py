# SPDX-License-Identifier: Apache-2.0
"""What an event loop does beside a call."""

import asyncio
import time


def largest_gap_beside(call):
    """
    Return for how long an event loop did nothing else while it awaited a call, at most, and how long the call took.
    """
    gaps = []

    async def tick():
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    async def main():
        ticker = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        gaps.clear()
        started = time.perf_counter()
        await call()
        took = time.perf_counter() - started
        await asyncio.sleep(0.01)
        ticker.cancel()
        return max(gaps), took

    return asyncio.run(main())


def assert_loop_goes_on_beside(call, attempts=5):
    """
    Check that an event loop is held up for less than half of a call.

    :param call: What holds the loop up each time, or never. On a busy machine, other things hold it up now and then.
    """
    gaps = []
    for _ in range(attempts):
        largest_gap, took = largest_gap_beside(call)
        if largest_gap < took / 2:
            return
        gaps.append((largest_gap, took))
    raise AssertionError(f"The event loop was held up: {gaps}")
