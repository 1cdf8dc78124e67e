# SPDX-License-Identifier: Apache-2.0
"""Functions with which synchronous and asynchronous calls share their code."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from haystack_chat_store.errors import StoreUnavailableError

ArgumentsT = ParamSpec("ArgumentsT")
ResultT = TypeVar("ResultT")

#: The largest number of characters that are encoded or decoded on the event loop itself, which takes a few
#: milliseconds. Larger texts go to a thread.
MAX_CHARACTERS_ON_LOOP = 100_000


def run_sync(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """
    Run a coroutine that never suspends, because its session works synchronously. No event loop is involved.

    :param coroutine: An operation whose session does its input and output synchronously.
    :returns: The result of the coroutine.
    :raises RuntimeError: If the coroutine suspends.
    """
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    coroutine.close()
    raise RuntimeError("An operation of a synchronous call must not wait for an event loop, but it did.")


async def to_thread_if_large(
    characters: int,
    function: Callable[ArgumentsT, ResultT],
    *arguments: ArgumentsT.args,
    **options: ArgumentsT.kwargs,
) -> ResultT:
    """
    Call a function on the event loop or, if it works on a large text, in a thread.

    :param characters: The number of characters of text that the function works on.
    :param function: A function that does no input or output.
    :param arguments: The function's positional arguments.
    :param options: The function's keyword arguments.
    :returns: The function's result.
    """
    if characters > MAX_CHARACTERS_ON_LOOP:
        return await asyncio.to_thread(function, *arguments, **options)
    return function(*arguments, **options)


def no_thread(error: RuntimeError) -> StoreUnavailableError:
    """Return the error of an asynchronous call for which no thread could be started."""
    if "shutdown" in str(error):
        return StoreUnavailableError("The interpreter is shutting down. Use the synchronous methods.")
    return StoreUnavailableError(
        f"No thread could be started: {error}. Raise the limit of threads, or use the synchronous methods."
    )
