# SPDX-License-Identifier: Apache-2.0
"""Runs operations on the histories in memory: one at a time, and long ones never on an event loop."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Concatenate

from haystack_chat_store.stores.connection_registry import hold_during_forks
from haystack_chat_store.stores.engine import ArgumentsT, Operation, ResultT, is_brief, is_marked, plain_result
from haystack_chat_store.stores.in_memory.directory import Directory
from haystack_chat_store.stores.in_memory.histories import Memory
from haystack_chat_store.stores.in_memory.reading import Reading
from haystack_chat_store.stores.in_memory.search import Search
from haystack_chat_store.stores.in_memory.writing import Writing
from haystack_chat_store.stores.sync_async import no_thread

_lock = threading.RLock()
_memory = Memory(_lock)
hold_during_forks(_lock)  # a forked child must not get histories in the middle of an operation


class _LockOfCall:
    """
    The lock, for a call in a thread of its own. If the call is cancelled before it has the lock, it never gets it.

    Otherwise it might change histories after what the same task writes later.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.is_withdrawn = False
        self._depth = 0

    def __enter__(self) -> None:
        _lock.acquire()
        if self.is_withdrawn and not self._depth:
            _lock.release()
            raise asyncio.CancelledError
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        _lock.release()


class InMemoryEngine(Writing, Reading, Directory, Search):
    """Keeps chat histories in the memory of the process."""

    is_durable = False
    keeps_users = keeps_previews = keeps_expiry = True

    def execute(
        self,
        operation: Callable[Concatenate[Memory, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation in this thread."""
        return plain_result(operation(_memory, *arguments, **options))

    async def execute_async(
        self,
        operation: Callable[Concatenate[Memory, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run a brief operation on the event loop itself if no other call holds the lock, and any other in a thread."""
        if is_marked(operation, is_brief):
            try:
                if _lock.acquire(blocking=False):
                    return plain_result(operation(_memory, *arguments, **options))
            finally:
                # Only the thread that holds an RLock can release it. So an interrupted call may try to in any case.
                with suppress(RuntimeError):
                    _lock.release()
        lock = _LockOfCall()

        def call() -> ResultT:
            return plain_result(operation(_memory.with_lock(lock), *arguments, **options))

        try:
            begun = asyncio.get_running_loop().run_in_executor(None, copy_context().run, call)
        except RuntimeError as error:
            lock.is_withdrawn = True  # a thread that is there already may still come to it
            raise no_thread(error) from error
        try:
            return await begun
        except asyncio.CancelledError:
            lock.is_withdrawn = True
            raise
