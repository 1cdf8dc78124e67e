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

Attributes that are not public in redis-py and asyncio serve to close connections of event loops that have ended. This
is why redis-py has an upper bound in pyproject.toml.
"""

import asyncio
import inspect
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio.connection
import redis.connection
from haystack import logging
from haystack.utils import Secret
from redis import exceptions
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from haystack_chat_store.errors import StoreConfigurationError, StoreTimeoutError
from haystack_chat_store.stores.connection_registry import (
    ServerConnectionRegistry,
    ServerConnections,
    keep_alive_forever,
    resolved,
)
from haystack_chat_store.stores.redis.failures import (
    Address,
    explained,
    may_pass,
    of_logging_in,
    redirection,
)
from haystack_chat_store.stores.redis.scripts import Script
from haystack_chat_store.stores.sync_async import run_sync

# Types are checked for Python 3.10 and on any Python: one of these two is always unknown there, or always known.
if sys.version_info >= (3, 11, 3):
    from asyncio import timeout as time_limit  # type: ignore[attr-defined, unused-ignore]
else:  # redis-py requires and uses it there
    from async_timeout import timeout as time_limit  # type: ignore[import-not-found, unused-ignore]

logger = logging.getLogger(__name__)

# redis-py tells a server its own version by default, which takes longer than the rest of connecting.
_HAS_DRIVER_INFO = "driver_info" in inspect.signature(redis.connection.AbstractConnection.__init__).parameters
_WITHOUT_VERSION = {"driver_info": None} if _HAS_DRIVER_INFO else {"lib_name": None, "lib_version": None}
# The most connections of all synchronous calls, and of each event loop. Further calls wait.
_MAX_CONNECTIONS = 32
# The most scripts that one asynchronous call runs at the same time.
_MAX_PARALLEL_SCRIPTS = 8
# The time between two attempts of a call, in seconds.
_RETRY_PAUSE = 0.1
# The share of the timeout in which a node of a cluster must answer. The rest is for asking which node replaces it.
_NODE_TIMEOUT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of connections. Engines with equal ones share their connections."""

    url: Secret
    cluster: bool
    timeout: float

    def location(self) -> str:
        """Return the URL."""
        return resolved(self.url, "url")


@dataclass
class _Call:
    """
    A script to run, or a command, and the node to run it on.

    :param script: The script, or `None` for a command.
    :param arguments: For a script, the number of keys, the keys and further arguments; or the whole command.
    :param is_asking: Whether the node is one that is taking over the keys.
    """

    script: Script | None
    arguments: tuple[Any, ...]
    address: Address
    is_asking: bool = False
    begun_at: float = field(default_factory=time.monotonic)


class Session(ABC):
    """
    The connections of the synchronous calls of all threads, or of one event loop.

    What is common to both is written as coroutines. In a synchronous session they never wait for an event loop.
    """

    def __init__(self, server: "Server", driver: ModuleType) -> None:
        """
        Open nothing yet.

        :param server: The server or cluster.
        :param driver: redis-py's module of synchronous or of asynchronous connections.
        """
        self._server = server
        options = driver.parse_url(server.location)
        self._connection_class = options.pop("connection_class", driver.Connection)
        self._max_connections = options.pop("max_connections", _MAX_CONNECTIONS)
        self._options = {
            **options,
            "encoding": "utf-8",
            "encoding_errors": "surrogateescape",  # the codec refuses what is not text
            "decode_responses": True,
            "protocol": 2,
            **_WITHOUT_VERSION,
            "socket_timeout": server.node_timeout,
            "socket_connect_timeout": server.node_timeout,
        }
        self._idle: dict[Address, list[Any]] = {}
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_closed = False
        self._lock = threading.Lock()

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int] = ()) -> Any:
        """
        Run a script on the server that has the keys, again if its answer was lost. Scripts do their work only once.

        :param script: The script.
        :param keys: All keys that it uses. They have the same hash tag.
        :param arguments: Its further arguments.
        :returns: What the script returns.
        :raises ChatMessageStoreError: If that fails, or takes longer than the timeout.
        """
        call = _Call(script, (len(keys), *keys, *arguments), self._server.start)
        return await self._translated(call, self._run_in_cluster if self._server.settings.cluster else self._run)

    async def masters(self) -> list[Address]:
        """Return the addresses of the servers that hold keys."""
        call = _Call(None, (), self._server.start)
        if not self._server.settings.cluster:
            return [call.address]
        return sorted(set(self._server.slots or await self._translated(call, self._discover)))

    async def ask(self, address: Address, *command: str | int) -> Any:
        """
        Have one server run a command, and return its answer.

        :raises ChatMessageStoreError: If that fails, or takes longer than the timeout.
        """
        return await self._translated(_Call(None, command, address), self._run)

    async def ask_masters(self, *command: str | int) -> list[Any]:
        """Have every server that holds keys run a command, and return their answers."""
        return [await self.ask(address, *command) for address in await self.masters()]

    async def close(self, *, is_patient: bool = False) -> None:
        """
        Close idle connections now, and those in use as soon as they are given back.

        :param is_patient: Whether to wait for the other side.
        """
        for connection in self._take_idle():
            await self._disconnect(connection, is_patient=is_patient)

    def leave_to_parent(self) -> None:
        """In a forked child, keep the parent's connections from being used, or freed, which would close them."""
        keep_alive_forever(self)
        for connection in self._open:
            keep_alive_forever(connection)

    # ------------------------------------------------------------------ where synchronous and asynchronous differ

    @abstractmethod
    async def run_each(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """
        Run a script several times, asynchronously some at once, and return the results in order.

        :param calls: Keys and arguments of each.
        """

    @abstractmethod
    async def to_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that takes long, without blocking an event loop."""

    @abstractmethod
    async def pause(self) -> None:
        """Wait a moment before the next attempt."""

    @abstractmethod
    async def _limited(self, running: Coroutine[Any, Any, Any]) -> Any:
        """Run a call within the timeout, when one of the connections is free."""

    @abstractmethod
    async def _done(self, result: Any) -> Any:
        """Return the result of a method of a connection."""

    @abstractmethod
    async def _disconnect(self, connection: Any, *, is_patient: bool = False) -> None:
        """Close a connection."""

    # ------------------------------------------------------------------ one server

    async def _translated(self, call: _Call, run: "Callable[[_Call], Coroutine[Any, Any, Any]]") -> Any:
        try:
            return await self._limited(run(call))
        except StoreTimeoutError:  # which is a TimeoutError
            raise
        except (exceptions.RedisError, TimeoutError, asyncio.TimeoutError) as error:
            self._server.slots = None
            raise explained(error, call.address, self._server.settings.timeout) from error

    async def _run(self, call: _Call) -> Any:
        while True:
            try:
                return await self._run_once(call)
            except exceptions.RedisError as error:
                if not may_pass(error) or self._is_late(call):
                    raise
                await self.pause()

    async def _run_once(self, call: _Call) -> Any:
        connection = self._pop_idle(call.address)
        if connection is not None:
            try:
                return await self._run_on(connection, call)
            except (exceptions.ConnectionError, exceptions.ReadOnlyError):
                # The server has closed the connection, or has become a replica, since it was last used. The other idle
                # connections are as old. A new one leads to the server that has the address now.
                while (connection := self._pop_idle(call.address)) is not None:
                    await self._disconnect(connection)
                logger.debug("Connecting to Redis at {address} again.", address=str(call.address))
        return await self._run_on(await self._connected(call.address), call)

    async def _run_on(self, connection: Any, call: _Call) -> Any:
        try:
            answer = await self._ask_for(connection, call)
        except exceptions.ResponseError:  # the connection is as good as after any other answer
            await self._give_back(connection, call.address)
            raise
        except BaseException:  # such as a timeout or a cancelled task: its answer may still come
            await self._disconnect(connection)
            raise
        await self._give_back(connection, call.address)
        return answer

    async def _ask_for(self, connection: Any, call: _Call) -> Any:
        if call.script is None:
            return await self._ask(connection, *call.arguments)
        try:
            return await self._ask(connection, "EVALSHA", call.script.digest, *call.arguments, asking=call.is_asking)
        except exceptions.NoScriptError:
            return await self._ask(connection, "EVAL", call.script.text, *call.arguments, asking=call.is_asking)

    async def _ask(self, connection: Any, *command: Any, asking: bool = False) -> Any:
        if asking:  # holds for the next command on this connection
            await self._ask(connection, "ASKING")
        await self._done(connection.send_command(*command))
        return await self._done(connection.read_response())

    async def _connected(self, address: Address, **options: Any) -> Any:
        where = {} if address.port is None else address._asdict()
        connection = self._connection_class(**{**self._options, **where, **options})
        self._open.add(connection)
        try:
            await self._done(connection.connect())
        except BaseException as error:
            await self._disconnect(connection)
            if type(error) is exceptions.ResponseError:
                raise of_logging_in(error, self._options.get("password")) from None
            if self._server.settings.cluster and isinstance(error, exceptions.TimeoutError):
                raise exceptions.ConnectionError(str(error)) from error  # nothing was sent: others may be asked
            raise
        return connection

    def _is_late(self, call: _Call) -> bool:
        return time.monotonic() + _RETRY_PAUSE > call.begun_at + self._server.settings.timeout

    def _all_in_use(self) -> StoreTimeoutError:
        return StoreTimeoutError(
            f"All {self._max_connections} connections to Redis at {self._server.start} were in use for more than "
            f"{self._server.settings.timeout} seconds. Nothing was stored."
        )

    def _pop_idle(self, address: Address) -> Any | None:
        with self._lock:
            idle = self._idle.get(address)
            return idle.pop() if idle else None

    def _take_idle(self) -> list[Any]:
        with self._lock:
            self._is_closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        return idle

    async def _give_back(self, connection: Any, address: Address) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.setdefault(address, []).append(connection)
                return
        await self._disconnect(connection)

    # ------------------------------------------------------------------ the nodes of a cluster

    async def _run_in_cluster(self, call: _Call) -> Any:
        slot = key_slot(call.arguments[1].encode())
        redirections = 0
        unanswered: exceptions.RedisError | None = None
        while True:
            if not redirections:
                slots = self._server.slots or await self._discover(call, unanswered)
                call.address = slots[slot]
            try:
                return await self._run_once(call)
            except exceptions.RedisError as error:
                if isinstance(error, exceptions.TimeoutError):  # it hangs: the cluster may have replaced it
                    self._server.silent.add(call.address)
                    unanswered = error
                if self._is_late(call):
                    raise (unanswered or error) from None
                redirected = redirection(error, call.address.host)
                if redirected is not None:
                    redirections += 1
                    call.address, call.is_asking = redirected
                elif may_pass(error, in_cluster=True):
                    redirections, call.is_asking = 0, False
                    logger.debug("Trying a call at the Redis Cluster again.")
                else:
                    raise
                if not call.is_asking:
                    self._server.slots = None
                if redirections != 1:  # nodes that disagree redirect a call to each other without end
                    await self.pause()

    async def _discover(self, call: _Call, unanswered: exceptions.RedisError | None = None) -> list[Address]:
        """
        Ask the nodes, one after the other, which node serves which slot.

        :param call: The call to run afterwards.
        :param unanswered: The error of an earlier attempt of the call that may have been executed. It is reported then.
        """
        failure: exceptions.RedisError = exceptions.ClusterDownError("No node knows which nodes serve the slots.")
        for address in self._server.nodes():
            try:
                connection = await self._connected(address, socket_timeout=self._server.node_timeout)
                try:
                    rows = await self._ask(connection, "CLUSTER", "SLOTS")
                finally:
                    await self._disconnect(connection)
                if rows:
                    return self._server.learn(rows, address)
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                failure = error
                self._server.silent.add(address)
                if self._is_late(call):
                    break
        raise unanswered or failure


class SyncSession(Session):
    """The connections of the synchronous calls of all threads."""

    def __init__(self, server: "Server") -> None:
        """Open nothing yet."""
        super().__init__(server, redis.connection)
        self._free = threading.Semaphore(self._max_connections)

    def start(self) -> Address:
        """
        Return the address that the URL names.

        :raises TypeError: If the URL has options that connections do not have.
        """
        connection = self._connection_class(**self._options)
        path = getattr(connection, "path", None)
        return Address(path) if path else Address(connection.host, connection.port)

    async def run_each(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """Run one after the other."""
        return [await self.run(script, *call) for call in calls]

    async def to_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call it in this thread."""
        return work(*arguments)

    async def pause(self) -> None:
        """Sleep."""
        time.sleep(_RETRY_PAUSE)

    async def _limited(self, running: Coroutine[Any, Any, Any]) -> Any:
        if not self._free.acquire(timeout=self._server.settings.timeout):
            running.close()
            raise self._all_in_use()
        try:
            return await running
        finally:
            self._free.release()

    async def _done(self, result: Any) -> Any:
        return result

    async def _disconnect(self, connection: Any, *, is_patient: bool = False) -> None:  # noqa: ARG002  (asyncio only)
        connection.disconnect()


class AsyncSession(Session):
    """The connections of one event loop."""

    def __init__(self, server: "Server") -> None:
        """Open nothing yet. Connections will belong to the running loop."""
        super().__init__(server, redis.asyncio.connection)
        if not server.settings.cluster:
            self._options["socket_timeout"] = None  # `_limited` suffices, and costs less
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(self._max_connections)
        self._guard = self._close_with_loop()
        self._ending = threading.Lock()

    async def close(self, *, is_patient: bool = False) -> None:
        """Do what `Session.close` does, on the session's own loop."""
        await super().close(is_patient=is_patient)
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
        await asyncio.sleep(_RETRY_PAUSE)

    async def begin(self) -> None:
        """Arrange for the connections to be closed before the loop is."""
        await self._guard.__anext__()

    def end(self) -> None:
        """Close idle connections, from any thread."""
        self._is_closed = True
        if not self._loop.is_running():  # it has stopped, or `asyncio.run` is between two steps
            with self._ending:
                for connection in list(self._open) if self._loop.is_closed() else self._take_idle():
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
            await super().close(is_patient=True)

    def _abandon_idle(self) -> None:
        for connection in self._take_idle():
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
                async with time_limit(self._server.settings.timeout), self._free:
                    has_begun = True
                    return await running
            except (TimeoutError, asyncio.TimeoutError):
                if has_begun:
                    raise
                raise self._all_in_use() from None

    async def _done(self, result: Any) -> Any:
        return await result

    async def _disconnect(self, connection: Any, *, is_patient: bool = False) -> None:
        if not _is_running(self._loop):  # it was closed during this call, whose coroutine is being freed
            self._abandon(connection)
            return
        with suppress(exceptions.RedisError):  # it did not close in time
            await connection.disconnect(nowait=not is_patient)


class Server(ServerConnections):
    """A server or a cluster, and the sessions with it."""

    def __init__(self, settings: Settings) -> None:
        """
        Connect to nothing yet.

        :param settings: The settings of the connections.
        :raises StoreConfigurationError: If the URL cannot be used.
        """
        self.settings = settings
        self.location = settings.location()
        #: How long a synchronous call waits for each answer, and any call for a node of a cluster, in seconds.
        self.node_timeout = settings.timeout * (_NODE_TIMEOUT_SHARE if settings.cluster else 1)
        #: The node that serves each slot, or `None` if that has to be asked.
        self.slots: list[Address] | None = None
        #: The nodes that did not answer when they were last asked.
        self.silent: set[Address] = set()
        self._others: list[Address] = []
        try:
            parts = urlsplit(self.location)
            if parts.fragment or "@" in parts.path + parts.query:  # the end of a password that is not percent-encoded
                raise ValueError
            self._sync = SyncSession(self)
            self.start = self._sync.start()
        except (ValueError, TypeError):  # which may quote the password
            raise StoreConfigurationError(
                "The url cannot be used. It must be like redis://user:password@host:6379/0 (rediss:// for TLS), "
                "perhaps with options that redis-py's connections have. Percent-encode what is not a letter or a digit "
                "in the user name and the password."
            ) from None
        self._async: dict[asyncio.AbstractEventLoop, AsyncSession] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet([self._sync])  # closed ones may still be in use
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
                for ended in [loop for loop in self._async if loop.is_closed()]:
                    self._async.pop(ended).end()
                session = self._async[loop] = AsyncSession(self)
                self._sessions.add(session)
            await session.begin()
        return session

    def nodes(self) -> list[Address]:
        """Return the addresses of nodes to ask about the cluster: those that were silent come last."""
        return sorted([self.start, *self._others], key=self.silent.__contains__)

    def learn(self, rows: list[Any], asked: Address) -> list[Address]:
        """
        Remember which node serves which slot.

        :param rows: The answer to CLUSTER SLOTS: first slot, last slot, master, replicas.
        :param asked: The node that gave it. It may leave out its own host.
        """
        self.silent.discard(asked)
        slots = [asked] * REDIS_CLUSTER_HASH_SLOTS  # it answers CLUSTERDOWN for slots that no node serves
        others = []
        for first, last, *nodes in rows:
            addresses = [Address(host or asked.host, port) for host, port, *_ in nodes]
            slots[first : last + 1] = [addresses[0]] * (last + 1 - first)
            others += addresses
        self._others = [address for address in dict.fromkeys(others) if address != self.start]
        self.slots = slots
        return slots

    def close(self) -> None:
        """Close idle connections now, and those in use as soon as they are given back."""
        run_sync(self._sync.close())
        with self._lock:
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


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this code runs in an event loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
