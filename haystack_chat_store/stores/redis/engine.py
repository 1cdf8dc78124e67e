# SPDX-License-Identifier: Apache-2.0
"""How operations run: on the connections that the engines of a process share."""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Concatenate, cast

from haystack.utils import Secret

from haystack_chat_store.errors import ChatMessageStoreError
from haystack_chat_store.stores.engine import ArgumentsT, Operation, ResultT
from haystack_chat_store.stores.redis.checking import Checking
from haystack_chat_store.stores.redis.connections import servers
from haystack_chat_store.stores.redis.directory import Directory
from haystack_chat_store.stores.redis.erasing import Erasing
from haystack_chat_store.stores.redis.nodes import Settings
from haystack_chat_store.stores.redis.reading import Reading
from haystack_chat_store.stores.redis.renaming import Renaming
from haystack_chat_store.stores.redis.search import Search
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.writing import Writing
from haystack_chat_store.stores.sync_async import run_sync


class RedisEngine(Writing, Reading, Directory, Erasing, Search, Checking, Renaming):
    """Keeps chat histories in Redis, Valkey or a Redis Cluster."""

    system_name = "redis"
    keeps_users = keeps_previews = keeps_expiry = True

    def __init__(self, url: Secret, *, cluster: bool, key_prefix: str, timeout: float, search: bool) -> None:
        """Keep the settings. Connects to nothing."""
        super().__init__(key_prefix=key_prefix, cluster=cluster, search=search)
        self.settings = Settings(url=url, cluster=cluster, timeout=timeout)

    def execute(
        self,
        operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation in this thread. All operations are coroutines, none of which waits here."""
        session = servers.get(self.settings).session()
        running = cast("Coroutine[object, object, ResultT]", operation(session, *arguments, **options))
        return run_sync(running)

    async def execute_async(
        self,
        operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation on the event loop."""
        session = await servers.get(self.settings).session_async()
        return await cast("Coroutine[object, object, ResultT]", operation(session, *arguments, **options))

    def close(self) -> None:
        """Close the connections, for every engine with the same settings. The next use opens them again."""
        servers.close(self.settings)

    async def close_async(self) -> None:
        """Close the connections of this event loop, and then all others."""
        with suppress(ChatMessageStoreError):
            session = await servers.get(self.settings).session_async()
            await session.close()
        self.close()
