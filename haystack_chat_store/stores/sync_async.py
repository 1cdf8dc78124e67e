# SPDX-License-Identifier: Apache-2.0
"""
What lets synchronous and asynchronous calls share their code.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

ArgumentsT = ParamSpec("ArgumentsT")
ResultT = TypeVar("ResultT")

#: The event loop itself encodes or decodes up to this many characters, which takes a few milliseconds. More goes to a
#: thread.
MAX_CHARACTERS_ON_LOOP = 100_000


def run_sync(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """
    Run a coroutine that never waits, because all that it awaits is done synchronously. No event loop is involved.

    :param coroutine: An operation whose session does its input and output synchronously.
    :returns: What the coroutine returns.
    :raises RuntimeError: If the coroutine waits after all.
    """
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    coroutine.close()
    raise RuntimeError("An operation of a synchronous call waited for an event loop.")


async def to_thread_if_large(
    characters: int,
    function: Callable[ArgumentsT, ResultT],
    *arguments: ArgumentsT.args,
    **options: ArgumentsT.kwargs,
) -> ResultT:
    """
    Call a function on the event loop, or in a thread if it has much text to work on.

    :param characters: How many characters of text the function works on.
    :param function: A function that does no input or output.
    """
    if characters > MAX_CHARACTERS_ON_LOOP:
        return await asyncio.to_thread(function, *arguments, **options)
    return function(*arguments, **options)
