# SPDX-License-Identifier: Apache-2.0
"""
How an operation that is written once, as a coroutine, runs for a synchronous call.
"""

from collections.abc import Coroutine
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


def run_to_end(operation: Coroutine[Any, Any, ResultT]) -> ResultT:
    """
    Run a coroutine that never waits: everything it awaits is done synchronously. No event loop is involved.

    :param operation: An operation whose session does its input and output synchronously.
    :returns: What the operation returns.
    :raises RuntimeError: If the operation waits for something after all.
    """
    try:
        operation.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    operation.close()
    raise RuntimeError("An operation of a synchronous call waited for an event loop.")
