# SPDX-License-Identifier: Apache-2.0
"""Runs operations on the histories in memory: one at a time, and long ones never on an event loop."""

import asyncio
import os
from collections.abc import Callable
from typing import Concatenate

from haystack_chat_store.stores.engine import ArgumentsT, Operation, ResultT, is_brief, is_marked, plain_result
from haystack_chat_store.stores.in_memory.directory import Directory
from haystack_chat_store.stores.in_memory.histories import Memory
from haystack_chat_store.stores.in_memory.reading import Reading
from haystack_chat_store.stores.in_memory.search import Search
from haystack_chat_store.stores.in_memory.writing import Writing

_memory = Memory()
if hasattr(os, "register_at_fork"):  # a forked child must not get histories in the middle of an operation
    os.register_at_fork(
        before=_memory.lock.acquire, after_in_parent=_memory.lock.release, after_in_child=_memory.lock.release
    )
# The calls that hold the lock for a long time, or wait for it. An event loop must not wait for them.
_long_calls: set[object] = set()


class InMemoryEngine(Writing, Reading, Directory, Search):
    """Keeps chat histories in the memory of the process."""

    is_durable = False

    def run(
        self,
        operation: Callable[Concatenate[Memory, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation in this thread."""
        if is_marked(operation, is_brief):
            return plain_result(operation(_memory, *arguments, **options))
        call = object()
        try:
            _long_calls.add(call)
            return plain_result(operation(_memory, *arguments, **options))
        finally:
            _long_calls.discard(call)

    async def run_async(
        self,
        operation: Callable[Concatenate[Memory, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run a brief operation on the event loop itself, and any other operation in a thread."""
        if is_marked(operation, is_brief) and not _long_calls:
            return plain_result(operation(_memory, *arguments, **options))
        return await asyncio.to_thread(lambda: self.run(operation, *arguments, **options))
