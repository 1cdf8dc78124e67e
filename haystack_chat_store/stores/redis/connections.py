# SPDX-License-Identifier: Apache-2.0
"""
Connections to a server or a cluster: opened when needed, lent to one call at a time, shared by the stores of a process.

These are redis-py's connections in a pool of our own, which also follows the redirections of a cluster. What redis-py's
clients (as of 8.1) cannot do, and tests/redis asks for:

- While a slot moves to another node, `redis.asyncio.RedisCluster` sends ASKING on one connection and the command on
  another. Of 40 calls at once, 35 fail (test_redis_cluster.py: the slot that moves).
- A call has one timeout for all its attempts: for a connection to become free, for a server that is starting, for a
  cluster to replace a master that hangs (test_redis_cluster.py, test_redis_settings.py).
- Connections are closed when their event loop has ended without cleaning up. In a forked child they are left to the
  parent (test_redis_loops.py). Both need the connections themselves, which the clients do not hand out.

So the asynchronous cluster needs a pool here, and the other three cases (synchronous, one server) share its code. They
are faster, too: a script that returns a number takes 59 µs of processor time through `redis.Redis` and 120 µs through
`redis.asyncio.Redis`, and 36 µs and 67 µs through the sessions here.
"""

import asyncio
import threading
import weakref
from operator import methodcaller

from haystack_chat_store.stores.connection_registry import ServerConnectionRegistry, ServerConnections
from haystack_chat_store.stores.redis.async_session import AsyncSession
from haystack_chat_store.stores.redis.nodes import Nodes, Settings
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.redis.sync_session import SyncSession
from haystack_chat_store.stores.sync_async import run_sync


class Server(ServerConnections):
    """A server or a cluster, and the sessions with it."""

    def __init__(self, settings: Settings) -> None:
        """
        Connect to nothing yet.

        :param settings: The settings of the connections.
        :raises StoreConfigurationError: If the URL cannot be used.
        """
        self._nodes = Nodes(settings)
        self.fingerprint = self._nodes.fingerprint
        self._sync = SyncSession(self._nodes)
        self._async: dict[asyncio.AbstractEventLoop, AsyncSession] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet([self._sync])  # closed ones may still be in use
        self._is_closed = False
        self._lock = threading.Lock()

    def session(self) -> SyncSession:
        """Return the session of the synchronous calls."""
        return self._sync

    async def session_async(self) -> AsyncSession:
        """Return the session of the running event loop. Does not wait."""
        loop = asyncio.get_running_loop()
        session = self._async.get(loop)
        if session is None:
            with self._lock:
                for ended in filter(methodcaller("is_closed"), list(self._async)):
                    self._async.pop(ended).end()
                session = self._async[loop] = AsyncSession(self._nodes)
                self._sessions.add(session)
            await session.begin()
            if self._is_closed:  # in another thread, since this call began
                session.end()
        return session

    def close(self) -> None:
        """Close idle connections now, and those in use as soon as they are given back."""
        run_sync(self._sync.close())
        with self._lock:
            self._is_closed = True
            sessions = list(self._async.values())
            self._async.clear()
        for session in sessions:
            session.end()

    def after_fork_in_child(self) -> None:
        """Neither use nor close the parent's connections."""
        for session in self._sessions:
            session.leave_to_parent()


#: The servers that this process uses.
servers: ServerConnectionRegistry[Settings, Server] = ServerConnectionRegistry(Server)
