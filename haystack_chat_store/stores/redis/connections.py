# SPDX-License-Identifier: Apache-2.0
"""
Connections to a server or a cluster: opened when needed, lent to one call at a time, shared by the stores of a process.

These are redis-py's connections, without its clients: those for clusters cannot be used from several event loops, wait
as long as they like, and are two separate programs for synchronous and asynchronous calls.
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
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import redis.asyncio.connection
import redis.connection
from haystack.utils import Secret
from redis import exceptions
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from haystack_chat_store.errors import StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.connection_registry import (
    ServerConnectionRegistry,
    ServerConnections,
    keep_alive_forever,
    resolved,
)
from haystack_chat_store.stores.redis.failures import (
    Address,
    explained,
    of_logging_in,
    passes_by_itself,
    redirection,
)
from haystack_chat_store.stores.redis.scripts import Script
from haystack_chat_store.stores.sync_async import run_sync

# Types are checked for Python 3.10 and on any Python: one of these two is always unknown there, or always known.
if sys.version_info >= (3, 11, 3):
    from asyncio import timeout as time_limit  # type: ignore[attr-defined, unused-ignore]
else:  # which redis-py requires there, and uses for the same reason
    from async_timeout import timeout as time_limit  # type: ignore[import-not-found, unused-ignore]

# Looking up redis-py's version and telling the server takes longer than all the rest of connecting.
_HAS_DRIVER_INFO = "driver_info" in inspect.signature(redis.connection.AbstractConnection.__init__).parameters
_NO_INTRODUCTION = {"driver_info": None} if _HAS_DRIVER_INFO else {"lib_name": None, "lib_version": None}
# So many for all synchronous calls, and for each event loop. Further calls wait until one is free.
_MAX_CONNECTIONS = 32
# So many of these an asynchronous call takes for itself where it has much to ask.
_CALLS_AT_ONCE = 8
# Before what passes by itself is tried again, in seconds.
_PAUSE = 0.1
# A node of a cluster that does not react must not use up the time in which others could say who takes its place.
_NODE_TIMEOUT_SHARE = 0.25


class Settings(NamedTuple):
    """
    What stores have in common that share their connections.
    """

    url: Secret
    cluster: bool
    timeout: float

    def location(self) -> str:
        """
        Return the URL.
        """
        return resolved(self.url, "url")


@dataclass
class _Call:
    """
    What is to be run, and where.
    """

    script: Script | None
    tail: tuple[Any, ...]  # the number of keys, the keys, further arguments; without a script, a command
    address: Address
    asks: bool = False  # whether the node is one that is just taking over the keys
    begun_at: float = field(default_factory=time.monotonic)


class Session(ABC):
    """
    What an operation talks to: the connections of the synchronous calls, or of one event loop.

    Written for both kinds. In a synchronous session nothing ever waits for an event loop.
    """

    def __init__(self, server: "Server", driver: ModuleType) -> None:
        """
        Open nothing yet.

        :param server: What is common to all sessions.
        :param driver: redis-py's module of connections of this kind.
        """
        self._server = server
        options = driver.parse_url(server.location)
        self._connection_class = options.pop("connection_class", driver.Connection)
        self._max_connections = options.pop("max_connections", _MAX_CONNECTIONS)
        self._options = {
            **options,
            "encoding": "utf-8",
            "encoding_errors": "surrogateescape",  # what is no text is for the codec to refuse
            "decode_responses": True,
            "protocol": 2,
            **_NO_INTRODUCTION,
            "socket_timeout": None,
            "socket_connect_timeout": server.node_timeout,
        }
        self._idle: dict[Address, list[Any]] = {}
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_closed = False
        self._lock = threading.Lock()

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int] = ()) -> Any:
        """
        Run a script on the server that has the keys.

        What has to be tried again is done once all the same: scripts look at the ids of messages.

        :param script: The script.
        :param keys: All keys that it uses. They have the same hash tag.
        :param arguments: Its further arguments.
        :returns: What the script returns.
        :raises ChatMessageStoreError: If that fails, or takes longer than the timeout.
        """
        call = _Call(script, (len(keys), *keys, *arguments), self._server.start)
        return await self._answered(call, self._run_in_cluster if self._server.settings.cluster else self._run)

    async def masters(self) -> list[Address]:
        """
        Return where the servers are that hold keys.
        """
        call = _Call(None, (), self._server.start)
        if not self._server.settings.cluster:
            return [call.address]
        return sorted(set(self._server.slots or await self._answered(call, self._discover)))

    async def ask(self, address: Address, *command: str | int) -> Any:
        """
        Have one server run a command, and return its answer.

        :raises ChatMessageStoreError: If that fails, or takes longer than the timeout.
        """
        return await self._answered(_Call(None, command, address), self._run)

    async def ask_masters(self, *command: str | int) -> list[Any]:
        """
        Have every server that holds keys run a command, and return their answers.
        """
        return [await self.ask(address, *command) for address in await self.masters()]

    async def close(self, *, is_patient: bool = False) -> None:
        """
        Close what is idle now, and what is in use as soon as it is given back.

        :param is_patient: Whether to wait until the other side knows.
        """
        for connection in self._take_idle():
            await self._disconnect(connection, is_patient=is_patient)

    def leave_to_parent(self) -> None:
        """
        Neither use nor close, in a forked child, what the parent opened. Its event loops would take it away from it.
        """
        keep_alive_forever(self)
        for connection in self._open:
            keep_alive_forever(connection)

    # ------------------------------------------------------------------ where synchronous and asynchronous differ

    @abstractmethod
    async def run_each(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """
        Run a script several times, some at once if nothing blocks meanwhile, and return the results in order.

        :param calls: Keys and arguments of each.
        """

    @abstractmethod
    async def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """
        Do something that takes the processor for a while, or waits for something else, without blocking a loop.
        """

    @abstractmethod
    async def pause(self) -> None:
        """
        Let the time pass that something needs to become better, or ready, by itself.
        """

    @abstractmethod
    async def _limited(self, running: Coroutine[Any, Any, Any]) -> Any:
        """
        Run a call within the timeout, when one of the places for calls is free.
        """

    @abstractmethod
    async def _attempted(self, running: Coroutine[Any, Any, Any]) -> Any:
        """
        Run one attempt of a call within the time that a node of a cluster has.

        :raises redis.exceptions.TimeoutError: If that takes longer.
        """

    @abstractmethod
    async def _done(self, result: Any) -> Any:
        """
        Return what a method of a connection returns.
        """

    @abstractmethod
    async def _disconnect(self, connection: Any, *, is_patient: bool = False) -> None:
        """
        Close a connection.
        """

    # ------------------------------------------------------------------ one server

    async def _answered(self, call: _Call, run: "Callable[[_Call], Coroutine[Any, Any, Any]]") -> Any:
        try:
            return await self._limited(run(call))
        except (exceptions.RedisError, TimeoutError, asyncio.TimeoutError) as error:
            self._server.forget_slots()
            raise explained(error, call.address, self._server.settings.timeout) from error

    async def _run(self, call: _Call) -> Any:
        while True:
            try:
                return await self._run_once(call)
            except exceptions.RedisError as error:
                if not passes_by_itself(error) or self._is_late(call):
                    raise
                await self.pause()

    async def _run_once(self, call: _Call) -> Any:
        connection = self._pop_idle(call.address)
        if connection is not None:
            try:
                return await self._run_on(connection, call)
            except (exceptions.ConnectionError, exceptions.ReadOnlyError):
                # It was closed from the other side, or its server has become a replica, since it was last used. So it
                # is with the others, then; a new one leads to whoever has the address now.
                while (connection := self._pop_idle(call.address)) is not None:
                    await self._disconnect(connection)
        return await self._run_on(await self._connected(call.address), call)

    async def _run_on(self, connection: Any, call: _Call) -> Any:
        try:
            answer = await self._ask_for(connection, call)
        except exceptions.ResponseError:  # to a connection, an answer like any other
            await self._give_back(connection, call.address)
            raise
        except BaseException:  # a timeout or a cancelled task among them: nobody would read the answer
            await self._disconnect(connection)
            raise
        await self._give_back(connection, call.address)
        return answer

    async def _ask_for(self, connection: Any, call: _Call) -> Any:
        if call.script is None:
            return await self._ask(connection, *call.tail)
        try:
            return await self._ask(connection, "EVALSHA", call.script.digest, *call.tail, asks=call.asks)
        except exceptions.NoScriptError:
            return await self._ask(connection, "EVAL", call.script.text, *call.tail, asks=call.asks)

    def _is_late(self, call: _Call) -> bool:
        return time.monotonic() + _PAUSE > call.begun_at + self._server.settings.timeout

    async def _ask(self, connection: Any, *command: Any, asks: bool = False) -> Any:
        if asks:  # holds for the one command that follows
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
        slot = key_slot(call.tail[1].encode())
        redirections = 0
        unanswered: exceptions.RedisError | None = None
        while True:
            if not redirections:
                slots = self._server.slots or await self._discover(call, unanswered)
                call.address = slots[slot]
            try:
                return await self._attempted(self._run_once(call))
            except exceptions.RedisError as error:
                if isinstance(error, exceptions.TimeoutError):  # it hangs: another may have taken its place
                    self._server.silent.add(call.address)
                    unanswered = error
                if self._is_late(call):
                    raise (unanswered or error) from None
                found = redirection(error, call.address.host)
                if found is not None:
                    redirections += 1
                    call.address, call.asks = found
                elif passes_by_itself(error, in_cluster=True):
                    redirections, call.asks = 0, False
                else:
                    raise
                if not call.asks:
                    self._server.forget_slots()
                if redirections != 1:  # or nodes that disagree would send it to and fro
                    await self.pause()

    async def _discover(self, call: _Call, unanswered: exceptions.RedisError | None = None) -> list[Address]:
        """
        Ask the nodes, one after the other, which of them serves which slot.

        :param call: What is to be run.
        :param unanswered: What an earlier attempt to run it ended with, if it was sent, which is then what to report.
        """
        failure: exceptions.RedisError = exceptions.ClusterDownError("No node knows who serves the slots.")
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
    """
    The connections of the synchronous calls of all threads.
    """

    def __init__(self, server: "Server") -> None:
        """
        Open nothing yet.
        """
        super().__init__(server, redis.connection)
        self._options["socket_timeout"] = server.node_timeout
        self._places = threading.Semaphore(self._max_connections)

    def start(self) -> Address:
        """
        Return where the url leads.

        :raises TypeError: If the url has options that connections do not have.
        """
        connection = self._connection_class(**self._options)
        path = getattr(connection, "path", None)
        return Address(path) if path else Address(connection.host, connection.port)

    async def run_each(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """
        Run one after the other.
        """
        return [await self.run(script, *call) for call in calls]

    async def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """
        Do it here and now.
        """
        return work(*arguments)

    async def pause(self) -> None:
        """
        Sleep.
        """
        time.sleep(_PAUSE)

    async def _limited(self, running: Coroutine[Any, Any, Any]) -> Any:
        if not self._places.acquire(timeout=self._server.settings.timeout):
            running.close()
            raise self._all_in_use()
        try:
            return await running
        finally:
            self._places.release()

    async def _attempted(self, running: Coroutine[Any, Any, Any]) -> Any:
        return await running

    async def _done(self, result: Any) -> Any:
        return result

    async def _disconnect(self, connection: Any, *, is_patient: bool = False) -> None:  # noqa: ARG002  (closing never waits here)
        connection.disconnect()


class AsyncSession(Session):
    """
    The connections of one event loop.
    """

    def __init__(self, server: "Server") -> None:
        """
        Open nothing yet. They will belong to the loop that is running now.
        """
        super().__init__(server, redis.asyncio.connection)
        self._loop = asyncio.get_running_loop()
        self._places = asyncio.Semaphore(self._max_connections)
        self._guard = self._close_with_loop()

    async def close(self, *, is_patient: bool = False) -> None:
        """
        Do what `Session.close` does, on the session's own loop.
        """
        await super().close(is_patient=is_patient)
        await self._guard.aclose()

    async def run_each(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """
        Run a few at once.
        """
        at_once = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def run(keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
            async with at_once:
                return await self.run(script, keys, arguments)

        tasks = [asyncio.create_task(run(*call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """
        Do it on another thread.
        """
        return await asyncio.to_thread(work, *arguments)

    async def pause(self) -> None:
        """
        Let others run.
        """
        await asyncio.sleep(_PAUSE)

    async def begin(self) -> None:
        """
        From now on, have the connections closed before the loop is, while it can still do that.
        """
        await self._guard.__anext__()

    def end(self) -> None:
        """
        Close what is idle, from any thread.
        """
        self._is_closed = True
        if self._loop.is_running():
            with suppress(RuntimeError):  # it has been closed just now
                self._loop.call_soon_threadsafe(self._abandon_idle)
        else:
            for connection in list(self._open):
                self._abandon(connection)
            self._abandon_idle()

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        """
        Wait, as an asynchronous generator does, to be closed by the loop in `shutdown_asyncgens`.

        `asyncio.run` and its like call it when all tasks have ended, for exactly this: to clean up in a loop that runs.
        """
        try:
            yield
        finally:
            await super().close(is_patient=True)

    def _abandon_idle(self) -> None:
        for connection in self._take_idle():
            self._abandon(connection)
        with suppress(RuntimeError):  # the loop is closing it itself
            run_sync(self._guard.aclose())

    def _abandon(self, connection: Any) -> None:
        """
        Close a connection where no task can do it, or its loop has stopped. redis-py needs both.

        In a version of redis-py that keeps its streams elsewhere, it is left to be closed when it is freed.
        """
        writer = getattr(connection, "_writer", None)
        if writer is None:
            return
        connection._reader = connection._writer = None
        with suppress(RuntimeError):  # the loop is closed
            writer.transport.abort()
        if self._loop.is_closed():
            with suppress(AttributeError):  # other loops than asyncio's own have closed it themselves
                transport = writer.transport
                if hasattr(transport, "_ssl_protocol"):
                    transport = transport._ssl_protocol._transport
                transport._sock.close()
                transport._sock = None

    async def _limited(self, running: Coroutine[Any, Any, Any]) -> Any:
        has_place = False
        with closing(running):  # if its turn never comes
            try:
                async with time_limit(self._server.settings.timeout), self._places:
                    has_place = True
                    return await running
            except (TimeoutError, asyncio.TimeoutError):
                if has_place:
                    raise
                raise self._all_in_use() from None

    async def _attempted(self, running: Coroutine[Any, Any, Any]) -> Any:
        try:
            async with time_limit(self._server.node_timeout):
                return await running
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise exceptions.TimeoutError("Timeout reading from a node") from error

    async def _done(self, result: Any) -> Any:
        return await result

    async def _disconnect(self, connection: Any, *, is_patient: bool = False) -> None:
        if not _runs(self._loop):  # it was closed with this call under way, which nothing but its end can follow
            self._abandon(connection)
            return
        with suppress(exceptions.RedisError):  # it did not close in time
            await connection.disconnect(nowait=not is_patient)


class Server(ServerConnections):
    """
    A server or a cluster, and the sessions with it.
    """

    def __init__(self, settings: Settings) -> None:
        """
        Connect to nothing yet.

        :param settings: What the stores have in common.
        :raises StoreUnavailableError: If the url is none.
        """
        self.settings = settings
        self.location = settings.location()
        # How long a synchronous call waits for each answer, and any call for a node of a cluster.
        self.node_timeout = settings.timeout * (_NODE_TIMEOUT_SHARE if settings.cluster else 1)
        self.slots: list[Address] | None = None
        self.silent: set[Address] = set()  # nodes that did not answer when they were last asked
        self._others: list[Address] = []
        try:
            parts = urlsplit(self.location)
            if parts.fragment or "@" in parts.path + parts.query:  # what comes after it in a password is lost
                raise ValueError
            self._sync = SyncSession(self)
            self.start = self._sync.start()
        except (ValueError, TypeError):  # which may quote the password
            raise StoreUnavailableError(
                "The url cannot be used. It must be like redis://user:password@host:6379/0 (rediss:// for TLS), "
                "perhaps with options that redis-py's connections have. Percent-encode what is not a letter or a digit "
                "in the user name and the password."
            ) from None
        self._of_loops: dict[asyncio.AbstractEventLoop, AsyncSession] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet([self._sync])  # closed ones may still be in use
        self._lock = threading.Lock()

    def session(self) -> SyncSession:
        """
        Return the session of the synchronous calls.
        """
        return self._sync

    async def session_async(self) -> AsyncSession:
        """
        Return the session of the running event loop. Does not wait.
        """
        loop = asyncio.get_running_loop()
        session = self._of_loops.get(loop)
        if session is None:
            with self._lock:
                for ended in [loop for loop in self._of_loops if loop.is_closed()]:
                    self._of_loops.pop(ended).end()
                session = self._of_loops[loop] = AsyncSession(self)
                self._sessions.add(session)
            await session.begin()
        return session

    def nodes(self) -> list[Address]:
        """
        Return the addresses at which to ask about the cluster, those last that were silent.
        """
        return sorted([self.start, *self._others], key=self.silent.__contains__)

    def learn(self, rows: list[Any], asked: Address) -> list[Address]:
        """
        Remember who serves which slot.

        :param rows: The answer to CLUSTER SLOTS: first slot, last slot, master, replicas.
        :param asked: Who gave it. It may leave out its own host.
        """
        self.silent.discard(asked)
        slots = [asked] * REDIS_CLUSTER_HASH_SLOTS  # who says CLUSTERDOWN for those that nobody serves
        others = []
        for first, last, *nodes in rows:
            addresses = [Address(host or asked.host, port) for host, port, *_ in nodes]
            slots[first : last + 1] = [addresses[0]] * (last + 1 - first)
            others += addresses
        self._others = [address for address in dict.fromkeys(others) if address != self.start]
        self.slots = slots
        return slots

    def forget_slots(self) -> None:
        """
        Have the next call ask again who serves which slot.
        """
        self.slots = None

    def close(self) -> None:
        """
        Close what is idle now, and what is in use as soon as it is given back.
        """
        run_sync(self._sync.close())
        with self._lock:
            sessions = list(self._of_loops.values())
            self._of_loops.clear()
        for session in sessions:
            session.end()

    def after_fork_in_child(self) -> None:
        """
        Neither use nor close what the parent opened.
        """
        for session in self._sessions:
            session.leave_to_parent()


#: The servers that this process uses.
servers: ServerConnectionRegistry[Settings, Server] = ServerConnectionRegistry(Server)


def _runs(loop: asyncio.AbstractEventLoop) -> bool:
    """
    Whether an event loop is what runs this code.
    """
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
