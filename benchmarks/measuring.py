# SPDX-License-Identifier: Apache-2.0
"""Timing on a machine with other work: compared calls alternate, and medians are reported."""

import asyncio
import inspect
import time
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import Any, NamedTuple

#: All asynchronous calls run in this loop, so that they share connections.
LOOP = asyncio.new_event_loop()


class Trial(NamedTuple):
    """
    A call to time.

    :param key: The key of its median.
    :param call: The function. A coroutine function is timed inside the loop, without the time to start the loop.
    :param arguments: Makes the arguments of one call. It is not timed.
    """

    key: Hashable
    call: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]


def medians(groups: Sequence[Sequence[Trial]], repetitions: int) -> dict[Hashable, float]:
    """
    Time every trial `repetitions` times, and return the medians in microseconds.

    Each repetition runs all trials once. The trials of a group, such as a floor and its store, run directly one after
    another. The first group, and the first trial in each group, rotate.
    """
    times: dict[Hashable, list[int]] = {trial.key: [] for group in groups for trial in group}
    for repetition in range(repetitions):
        for group in _rotated(groups, repetition):
            for trial in _rotated(group, repetition):
                times[trial.key].append(_timed(trial.call, trial.arguments()))
    return {key: median(taken) / 1000 for key, taken in times.items()}


def _timed(call: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    if inspect.iscoroutinefunction(call):
        return LOOP.run_until_complete(_timed_async(call, arguments))
    started = time.perf_counter_ns()
    result = call(*arguments)
    ended = time.perf_counter_ns()
    del result  # freeing it is not part of the time
    return ended - started


async def _timed_async(call: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    started = time.perf_counter_ns()
    result = await call(*arguments)
    ended = time.perf_counter_ns()
    del result
    return ended - started


def _rotated(items: Sequence[Any], by: int) -> list[Any]:
    by %= len(items)
    return [*items[by:], *items[:by]]
