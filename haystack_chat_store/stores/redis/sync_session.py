# SPDX-License-Identifier: Apache-2.0
"""The session of the synchronous calls."""

import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import redis.connection
from redis import exceptions

from haystack_chat_store.stores.fair_semaphore import FairSemaphore
from haystack_chat_store.stores.redis.cluster import ClusterSession
from haystack_chat_store.stores.redis.nodes import Nodes
from haystack_chat_store.stores.redis.scripts import Script
from haystack_chat_store.stores.redis.session import RETRY_PAUSE


class SyncSession(ClusterSession):
    """The connections of the synchronous calls of all threads."""

    def __init__(self, nodes: Nodes) -> None:
        """Open nothing yet."""
        super().__init__(nodes, redis.connection)
        self._free = FairSemaphore(self._max_connections)

    async def run_each(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """Run one after the other."""
        return [await self.run(script, *call) for call in calls]

    async def to_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call it in this thread."""
        return work(*arguments)

    async def pause(self) -> None:
        """Sleep."""
        time.sleep(RETRY_PAUSE)

    async def _limited(self, running: Coroutine[Any, Any, Any]) -> Any:
        if not self._free.acquire(timeout=self._nodes.settings.timeout):
            running.close()
            raise self._all_in_use()
        try:
            return await running
        finally:
            self._free.release()

    async def _answers(self, connection: Any, seconds: float) -> bool:
        try:
            connection.send_command("PING", check_health=False)
            if not connection.can_read(seconds):
                return False
            connection.read_response()
        except exceptions.ResponseError:
            return True
        except exceptions.RedisError:
            return False
        return True

    async def _read(self, connection: Any, deadline: float) -> Any:
        if not connection.can_read(min(self._nodes.timeout, max(0.0, deadline - time.monotonic()))):
            raise exceptions.TimeoutError("Timeout reading from socket")
        return connection.read_response()

    async def _done(self, result: Any) -> Any:
        return result

    async def _disconnect(self, connection: Any) -> None:
        connection.disconnect()
