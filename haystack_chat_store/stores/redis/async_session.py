# SPDX-License-Identifier: Apache-2.0
"""
The session of an event loop, whose connections are closed with it.

Attributes that are not public in redis-py and asyncio serve to close connections of event loops that have ended. This
is why redis-py has an upper bound in pyproject.toml.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import closing, suppress
from typing import Any

import redis.asyncio.connection
from redis import exceptions

from haystack_chat_store.stores import idle_connections
from haystack_chat_store.stores.redis.cluster import ClusterSession
from haystack_chat_store.stores.redis.nodes import Nodes
from haystack_chat_store.stores.redis.scripts import Script
from haystack_chat_store.stores.redis.session import RETRY_PAUSE
from haystack_chat_store.stores.sync_async import run_sync

# Types are checked for Python 3.10 and on any Python: one of these two is always unknown there, or always known.
if sys.version_info >= (3, 11, 3):
    from asyncio import timeout as time_limit  # type: ignore[attr-defined, unused-ignore]  # not in 3.10
else:  # redis-py requires and uses it there
    from async_timeout import timeout as time_limit  # type: ignore[import-not-found, unused-ignore]  # only there

# The most scripts that one asynchronous call runs at the same time.
_MAX_PARALLEL_SCRIPTS = 8


class AsyncSession(ClusterSession):
    """The connections of one event loop."""

    def __init__(self, nodes: Nodes) -> None:
        """Open nothing yet. Connections will belong to the running loop."""
        super().__init__(nodes, redis.asyncio.connection)
        if not nodes.are_asked:
            self._options["socket_timeout"] = None  # `_limited` suffices, and costs less
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(self._max_connections)
        self._guard = self._close_with_loop()
        self._ending = threading.Lock()

    async def close(self) -> None:
        """Do what `Session.close` does, on the session's own loop."""
        await super().close()
        await self._guard.aclose()

    async def run_each(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """Run several at once."""
        limit = asyncio.Semaphore(_MAX_PARALLEL_SCRIPTS)

        async def run(keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
            async with limit:
                return await self.run(script, keys, arguments)

        tasks = [asyncio.create_task(run(*call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def to_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call it in another thread."""
        return await asyncio.to_thread(work, *arguments)

    async def pause(self) -> None:
        """Let other tasks run."""
        await asyncio.sleep(RETRY_PAUSE)

    async def begin(self) -> None:
        """Arrange for the connections to be closed before the loop is."""
        await self._guard.__anext__()

    def end(self) -> None:
        """Close idle connections, from any thread."""
        self._is_closed = True
        if not self._loop.is_running():  # it has stopped, or `asyncio.run` is between two steps
            with self._ending:
                for connection in list(self._open) if self._loop.is_closed() else self._close_and_take_idle():
                    self._abandon(connection)
        with suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._abandon_idle)

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        """
        Wait, as an asynchronous generator, for the loop to close it.

        `asyncio.run` does this in `shutdown_asyncgens`, when all tasks have ended and the loop still runs.
        """
        try:
            yield
        finally:
            with self._ending:  # the loop has to run once more for what another thread abandons
                pass
            connections = self._close_and_take_idle()
            if connections:
                await asyncio.gather(*map(self._close_in_time, connections))

    async def _close_in_time(self, connection: Any) -> None:
        """Close a connection, and wait for the other side: not for long, since with TLS a dead one is waited for."""
        writer = getattr(connection, "_writer", None)
        try:
            async with time_limit(idle_connections.probe_seconds(self.timeout)):
                await connection.disconnect()
        except (exceptions.RedisError, TimeoutError, asyncio.TimeoutError):
            if writer is not None:
                writer.transport.abort()
                await asyncio.sleep(0)  # the loop has to run once more for it

    def _abandon_idle(self) -> None:
        for connection in self._close_and_take_idle():
            self._abandon(connection)
        with suppress(RuntimeError):  # the loop is closing it
            run_sync(self._guard.aclose())

    def _abandon(self, connection: Any) -> None:
        """
        Close a connection where no task can do it, or whose loop has stopped. redis-py needs a task and a loop.

        If a version of redis-py keeps its streams elsewhere, the connection is closed when it is freed.
        """
        writer = getattr(connection, "_writer", None)
        if writer is None:
            return
        connection._reader = connection._writer = None
        with suppress(RuntimeError):  # the loop is closed
            writer.transport.abort()
        if self._loop.is_closed():
            with suppress(AttributeError):  # loops other than asyncio's own have closed it
                transport = writer.transport
                if hasattr(transport, "_ssl_protocol"):
                    transport = transport._ssl_protocol._transport
                transport._sock.close()
                transport._sock = None

    async def _limited(self, running: Coroutine[Any, Any, Any]) -> Any:
        has_begun = False
        with closing(running):  # if it never begins
            try:
                async with time_limit(self._nodes.settings.timeout), self._free:
                    has_begun = True
                    return await running
            except (TimeoutError, asyncio.TimeoutError):
                if has_begun:
                    raise
                raise self._all_in_use() from None

    async def _answers(self, connection: Any, seconds: float) -> bool:
        try:
            async with time_limit(seconds):
                await connection.send_command("PING", check_health=False)
                await connection.read_response()
        except exceptions.ResponseError:
            return True
        except (exceptions.RedisError, TimeoutError, asyncio.TimeoutError):
            return False
        return True

    async def _read(self, connection: Any, deadline: float) -> Any:  # noqa: ARG002  (`_limited` ends it)
        return await connection.read_response()

    def _options_until(self, deadline: float) -> dict[str, Any]:
        return super()._options_until(deadline) if self._nodes.are_asked else {}  # `_limited` ends it

    async def _done(self, result: Any) -> Any:
        return await result

    async def _disconnect(self, connection: Any) -> None:
        if not _is_running(self._loop):  # it was closed during this call, whose coroutine is being freed
            self._abandon(connection)
            return
        with suppress(exceptions.RedisError):  # it did not close in time
            await connection.disconnect(nowait=True)


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this code runs in an event loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
