# SPDX-License-Identifier: Apache-2.0
"""
How a public method is written once for both ways of calling it.

It is a generator that yields the steps that may take long, `Step`s, and is sent their results; what lies between them
is plain code. One loop takes these steps synchronously, another awaits them.
"""

import asyncio
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from haystack_chat_store.stores.operations import Operations, SessionT

ResultT = TypeVar("ResultT")

#: As much is encoded or decoded on the event loop itself, in a few milliseconds. More goes to a thread. (A single text
#: of many megabytes holds the loop up all the same, for json lets no other thread run while it works on it.)
CHARACTERS_PER_LOOP_STEP = 100_000


class Step(NamedTuple):
    """
    Something to be done that may take long.

    :param work: A function, or an operation of the engine.
    :param weigh: Returns, for the same arguments, how many characters of text a function works on. `None` for an
        operation.
    """

    work: Callable[..., Any]
    arguments: Sequence[Any]
    weigh: Callable[..., int] | None = None


Steps: TypeAlias = Generator[Step, Any, ResultT]


class SteppedOperations(Operations[SessionT]):
    """
    Operations, and how methods that consist of steps run.
    """

    def _take(self, steps: "Steps[ResultT]") -> ResultT:
        """
        Take all steps, and return what the generator returns.
        """
        try:
            step = next(steps)
            while True:
                is_operation = step.weigh is None
                result = self._run(step.work, *step.arguments) if is_operation else step.work(*step.arguments)
                step = steps.send(result)
        except StopIteration as stop:
            value: ResultT = stop.value
            return value

    async def _take_async(self, steps: "Steps[ResultT]") -> ResultT:
        """
        Do what `_take` does, without blocking the event loop.
        """
        try:
            step = next(steps)
            while True:
                if step.weigh is None:
                    result = await self._run_async(step.work, *step.arguments)
                elif step.weigh(*step.arguments) > CHARACTERS_PER_LOOP_STEP:
                    result = await asyncio.to_thread(step.work, *step.arguments)
                else:
                    result = step.work(*step.arguments)
                step = steps.send(result)
        except StopIteration as stop:
            value: ResultT = stop.value
            return value
