# SPDX-License-Identifier: Apache-2.0
"""
A session: the connections on which operations run scripts and commands.

What synchronous and asynchronous sessions share is written as coroutines. In a synchronous session they never wait.
"""

import asyncio
import inspect
import math
import re
import socket
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import redis.connection
from haystack import logging
from redis import exceptions

from haystack_chat_store.errors import StoreTimeoutError
from haystack_chat_store.stores import idle_connections
from haystack_chat_store.stores.connection_registry import keep_alive_forever
from haystack_chat_store.stores.redis.failures import Address, explained, has_run_nothing, may_pass
from haystack_chat_store.stores.redis.nodes import Nodes
from haystack_chat_store.stores.redis.scripts import Script
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP

logger = logging.getLogger(__name__)

# redis-py tells a server its own version by default, which takes longer than the rest of connecting.
_HAS_DRIVER_INFO = "driver_info" in inspect.signature(redis.connection.AbstractConnection.__init__).parameters
_WITHOUT_VERSION = {"driver_info": None} if _HAS_DRIVER_INFO else {"lib_name": None, "lib_version": None}
# By the names that this system has for them.
_KEEPALIVES = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        getattr(socket, name): value
        for name, value in (
            ("TCP_KEEPIDLE", idle_connections.KEEPALIVE_IDLE_SECONDS),
            ("TCP_KEEPINTVL", idle_connections.KEEPALIVE_INTERVAL_SECONDS),
            ("TCP_KEEPCNT", idle_connections.KEEPALIVE_COUNT),
        )
        if hasattr(socket, name)
    },
}
# The most connections of all synchronous calls, and of each event loop. Further calls wait.
_MAX_CONNECTIONS = 32
# A socket with less would not wait at all.
_LEAST_SECONDS = 0.001
# The time between two attempts of a call, in seconds.
RETRY_PAUSE = 0.1


@dataclass
class Call:
    """
    A script to run, or a command, and the node to run it on.

    :param script: The script, or `None` for a command.
    :param arguments: For a script, the number of keys, the keys and further arguments; or the whole command.
    :param deadline: When the call must end, as `time.monotonic` counts.
    :param is_asking: Whether the node is one that is taking over the keys.
    :param idle_since: Since when the connection that the call uses was idle.
    :param attempts: How often it was sent and may have been executed.
    """

    script: Script | None
    arguments: tuple[Any, ...]
    address: Address
    deadline: float
    is_asking: bool = False
    idle_since: float = -math.inf
    attempts: int = 0

    @property
    def names_keys(self) -> bool:
        """Whether it is a script that makes the names of some of its keys."""
        return self.script is not None and self.script.names_keys


class _Idle(NamedTuple):
    """A connection, and since when it is idle."""

    connection: Any
    since: float


class Session(ABC):
    """The connections of the synchronous calls of all threads, or of one event loop."""

    def __init__(self, nodes: Nodes, driver: ModuleType) -> None:
        """
        Open nothing yet.

        :param nodes: The server, or the nodes of the cluster.
        :param driver: redis-py's module of synchronous or of asynchronous connections.
        """
        self._nodes = nodes
        options = driver.parse_url(nodes.target.url)
        self._connection_class = options.pop("connection_class", driver.Connection)
        self._max_connections = options.pop("max_connections", _MAX_CONNECTIONS)
        self._is_tls = issubclass(self._connection_class, driver.SSLConnection)
        is_tcp = not issubclass(self._connection_class, driver.UnixDomainSocketConnection)
        self._options = {
            **(_KEEPALIVES if is_tcp else {}),
            **options,
            "encoding": "utf-8",
            "encoding_errors": "surrogateescape",  # the codec refuses what is not text
            "decode_responses": True,
            "protocol": 2,
            **_WITHOUT_VERSION,
            "socket_timeout": nodes.timeout,
            "socket_connect_timeout": nodes.timeout,
        }
        self._idle: dict[Address, list[_Idle]] = {}
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_closed = False
        self._has_connected = False  # ever
        self._lock = threading.Lock()

    @property
    def timeout(self) -> float:
        """How long a call may take, in seconds."""
        return self._nodes.settings.timeout

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int] = ()) -> Any:
        """
        Run a script on the server that has the keys, again if its answer was lost. Scripts do their work only once.

        :param script: The script.
        :param keys: All keys that it uses. They have the same hash tag.
        :param arguments: Its further arguments.
        :returns: What the script returns.
        :raises ChatMessageStoreError: If that fails, or takes longer than the timeout.
        """
        answer, _ = await self.run_reporting(script, keys, arguments)
        return answer

    async def run_reporting(
        self, script: Script, keys: Sequence[str], arguments: Sequence[str | int] = ()
    ) -> tuple[Any, bool]:
        """Do what `run` does, and also return whether the script may have run before this answer, too."""
        call = self._call(script, (len(keys), *keys, *arguments), self._nodes.start)
        answer = await self._translated(call, self._run_script)
        return answer, call.attempts > 1

    async def masters(self) -> list[Address]:
        """Return the addresses of the servers that hold keys."""
        return [self._nodes.start]

    async def ask(self, address: Address, *command: str | int) -> Any:
        """
        Have one server run a command, and return its answer.

        :raises ChatMessageStoreError: If that fails, or takes longer than the timeout.
        """
        return await self._translated(self._call(None, command, address), self._run)

    async def ask_masters(self, *command: str | int) -> list[Any]:
        """Have every server that holds keys run a command, and return their answers."""
        return [await self.ask(address, *command) for address in await self.masters()]

    async def close(self) -> None:
        """Close idle connections now, and those in use as soon as they are given back."""
        for connection in self._close_and_take_idle():
            await self._disconnect(connection)

    def leave_to_parent(self) -> None:
        """In a forked child, keep the parent's connections from being used, or freed, which would close them."""
        keep_alive_forever(self)
        for connection in self._open:
            keep_alive_forever(connection)

    async def to_thread_if_large(self, texts: Iterable[str], work: Callable[..., Any], *arguments: Any) -> Any:
        """
        Call a function that works on texts: in a thread, if they are large and an event loop would have to wait.

        :param texts: The texts, for their size.
        """
        is_large = sum(map(len, texts)) > MAX_CHARACTERS_ON_LOOP
        return await self.to_thread(work, *arguments) if is_large else work(*arguments)

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
    async def _answers(self, connection: Any, seconds: float) -> bool:
        """Whether the server answers on an idle connection within some seconds."""

    @abstractmethod
    async def _read(self, connection: Any, deadline: float) -> Any:
        """Return the answer to what was sent, or raise it if it is an error."""

    @abstractmethod
    async def _done(self, result: Any) -> Any:
        """Return the result of a method of a connection."""

    @abstractmethod
    async def _disconnect(self, connection: Any) -> None:
        """Close a connection, without waiting for the other side."""

    # ------------------------------------------------------------------ one server

    async def _translated(self, call: Call, run: "Callable[[Call], Coroutine[Any, Any, Any]]") -> Any:
        try:
            return await self._limited(run(call))
        except StoreTimeoutError:  # which is a TimeoutError
            raise
        except (exceptions.RedisError, TimeoutError, asyncio.TimeoutError) as error:
            self._nodes.slots = None
            if isinstance(error, (exceptions.TimeoutError, TimeoutError, asyncio.TimeoutError)):
                await self._close_idle_since(call.idle_since, call.address)
            never_answered = not self._has_connected
            raise explained(
                error,
                call.address,
                self._nodes.settings.timeout,
                is_tls=self._is_tls and never_answered,
                in_cluster=self._nodes.settings.cluster,
            ) from error

    async def _run_script(self, call: Call) -> Any:
        return await self._run(call)

    async def _run(self, call: Call) -> Any:
        while True:
            try:
                return await self._run_once(call)
            except exceptions.RedisError as error:
                if not may_pass(error) or self._is_late(call):
                    raise
                await self.pause()

    async def _run_once(self, call: Call) -> Any:
        connection = await self._idle_and_alive(call)
        if connection is not None:
            try:
                return await self._run_on(connection, call)
            except (exceptions.ConnectionError, exceptions.ReadOnlyError):
                # The server has closed the connection, or has become a replica, since it was last used. The other idle
                # connections are as old. A new one leads to the server that has the address now.
                await self._close_idle_since(math.inf, call.address)
                logger.debug("Connecting to Redis at {address} again.", address=str(call.address))
        call.idle_since = time.monotonic()
        return await self._run_on(await self._connected_to_master(call), call)

    async def _idle_and_alive(self, call: Call) -> Any | None:
        """Return an idle connection that leads to the server, or `None`. Close those that do not."""
        while (idle := self._pop_idle(call.address)) is not None:
            call.idle_since = idle.since
            if time.monotonic() - idle.since < idle_connections.PROBED_AFTER_SECONDS:
                return idle.connection
            try:
                if await self._answers(idle.connection, idle_connections.probe_seconds(self._nodes.timeout)):
                    return idle.connection
            except BaseException:  # such as a cancelled task
                await self._disconnect(idle.connection)
                raise
            await self._disconnect(idle.connection)
            logger.info("An idle connection to Redis does not answer. Connecting again.")
            await self._close_idle_since(idle.since, call.address)
        return None

    async def _close_idle_since(self, moment: float, address: Address) -> None:
        """Close the connections to a server that nothing has used after a moment: they are as dead as another one."""
        with self._lock:
            idle = self._idle.get(address, [])
            self._idle[address] = list(filter(lambda each: each.since > moment, idle))
        for each in idle:
            if each.since <= moment:
                await self._disconnect(each.connection)

    async def _run_on(self, connection: Any, call: Call) -> Any:
        call.attempts += 1
        try:
            answer = await self._ask_for(connection, call)
        except exceptions.ResponseError as error:  # the connection is as good as after any other answer
            call.attempts -= has_run_nothing(error)
            await self._give_back(connection, call.address)
            raise
        except BaseException as error:  # such as a timeout or a cancelled task: its answer may still come
            call.attempts -= isinstance(error, exceptions.BusyLoadingError)
            await self._disconnect(connection)
            raise
        await self._give_back(connection, call.address)
        return answer

    async def _ask_for(self, connection: Any, call: Call) -> Any:
        if call.is_asking:  # holds for the next command on this connection
            await self._ask(connection, call.deadline, "ASKING")
        if call.script is None:
            return await self._ask(connection, call.deadline, *call.arguments)
        try:
            return await self._ask(connection, call.deadline, "EVALSHA", call.script.digest, *call.arguments)
        except exceptions.NoScriptError:
            if call.is_asking:
                await self._ask(connection, call.deadline, "ASKING")
            return await self._ask(connection, call.deadline, "EVAL", call.script.text, *call.arguments)

    async def _ask(self, connection: Any, deadline: float, *command: Any) -> Any:
        await self._done(connection.send_command(*command))
        return await self._read(connection, deadline)

    async def _connected_to_master(self, call: Call) -> Any:
        connection = await self._connected(call.address, call.deadline)
        if self._nodes.target.service is not None:  # a Sentinel names a master that it does not yet know to be none
            try:
                if not await self._is_master(connection, call):
                    raise exceptions.ReadOnlyError("READONLY It has become a replica.")
            except BaseException:
                await self._disconnect(connection)
                raise
        return connection

    async def _is_master(self, connection: Any, call: Call) -> bool:
        properties = await self._ask(connection, call.deadline, "HELLO")
        return ("role", "master") in zip(properties[::2], properties[1::2], strict=True)

    async def _connected(self, address: Address, deadline: float, *, is_sentinel: bool = False) -> Any:
        connection = self._connection_class(
            **{
                **self._options,
                **self._options_until(deadline),
                **({} if address.port is None else address._asdict()),
                **(self._nodes.target.sentinel_options if is_sentinel else {}),  # no variable has its password
            }
        )
        self._open.add(connection)
        try:
            await self._done(connection.connect())
        except BaseException as error:
            await self._disconnect(connection)
            if type(error) is exceptions.ResponseError:
                # The server may quote the password.
                raise exceptions.ResponseError(re.split("[\"'`]", str(error))[0]) from None
            if self._nodes.are_asked and isinstance(error, exceptions.TimeoutError):
                raise exceptions.ConnectionError(str(error)) from error  # nothing was sent: others may be asked
            raise
        self._has_connected = True
        return connection

    def _options_until(self, deadline: float) -> dict[str, Any]:
        """Return the options of a connection with which connecting ends at a deadline."""
        seconds = min(self._nodes.timeout, max(_LEAST_SECONDS, deadline - time.monotonic()))
        return {"socket_timeout": seconds, "socket_connect_timeout": seconds}

    def _is_late(self, call: Call) -> bool:
        return time.monotonic() + RETRY_PAUSE > call.deadline

    def _call(self, script: Script | None, arguments: tuple[Any, ...], address: Address) -> Call:
        return Call(script, arguments, address, time.monotonic() + self._nodes.settings.timeout)

    def _all_in_use(self) -> StoreTimeoutError:
        return StoreTimeoutError(
            f"All {self._max_connections} connections to Redis at {self._nodes.start} were in use for more than "
            f"{self._nodes.settings.timeout} seconds."
        )

    def _pop_idle(self, address: Address) -> "_Idle | None":
        with self._lock:
            idle = self._idle.get(address)
            return idle.pop() if idle else None

    def _close_and_take_idle(self) -> list[Any]:
        """Take no connections back from now on, and return the idle ones."""
        with self._lock:
            self._is_closed = True
            idle = [each.connection for connections in self._idle.values() for each in connections]
            self._idle.clear()
        return idle

    async def _give_back(self, connection: Any, address: Address) -> None:
        # What a call has opened in its last moments waits too shortly for other calls.
        is_hasty = (connection.socket_timeout or math.inf) < self._nodes.timeout / 2
        with self._lock:
            if not self._is_closed and not is_hasty:
                self._idle.setdefault(address, []).append(_Idle(connection, time.monotonic()))
                return
        await self._disconnect(connection)
