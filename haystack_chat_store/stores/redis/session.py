# SPDX-License-Identifier: Apache-2.0
"""
A session: the connections on which operations run scripts and commands.

What synchronous and asynchronous sessions share is written as coroutines. In a synchronous session they never wait.
"""

import asyncio
import inspect
import re
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import redis.connection
from haystack import logging
from redis import exceptions

from haystack_chat_store.errors import StoreTimeoutError
from haystack_chat_store.stores.connection_registry import keep_alive_forever
from haystack_chat_store.stores.redis.failures import Address, explained, may_pass
from haystack_chat_store.stores.redis.nodes import Nodes
from haystack_chat_store.stores.redis.scripts import Script

logger = logging.getLogger(__name__)

# redis-py tells a server its own version by default, which takes longer than the rest of connecting.
_HAS_DRIVER_INFO = "driver_info" in inspect.signature(redis.connection.AbstractConnection.__init__).parameters
_WITHOUT_VERSION = {"driver_info": None} if _HAS_DRIVER_INFO else {"lib_name": None, "lib_version": None}
# The most connections of all synchronous calls, and of each event loop. Further calls wait.
_MAX_CONNECTIONS = 32
# The time between two attempts of a call, in seconds.
RETRY_PAUSE = 0.1


@dataclass
class Call:
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
    """The connections of the synchronous calls of all threads, or of one event loop."""

    def __init__(self, nodes: Nodes, driver: ModuleType) -> None:
        """
        Open nothing yet.

        :param nodes: The server, or the nodes of the cluster.
        :param driver: redis-py's module of synchronous or of asynchronous connections.
        """
        self._nodes = nodes
        options = driver.parse_url(nodes.location)
        self._connection_class = options.pop("connection_class", driver.Connection)
        self._max_connections = options.pop("max_connections", _MAX_CONNECTIONS)
        self._options = {
            **options,
            "encoding": "utf-8",
            "encoding_errors": "surrogateescape",  # the codec refuses what is not text
            "decode_responses": True,
            "protocol": 2,
            **_WITHOUT_VERSION,
            "socket_timeout": nodes.timeout,
            "socket_connect_timeout": nodes.timeout,
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
        call = Call(script, (len(keys), *keys, *arguments), self._nodes.start)
        return await self._translated(call, self._run_script)

    async def masters(self) -> list[Address]:
        """Return the addresses of the servers that hold keys."""
        return [self._nodes.start]

    async def ask(self, address: Address, *command: str | int) -> Any:
        """
        Have one server run a command, and return its answer.

        :raises ChatMessageStoreError: If that fails, or takes longer than the timeout.
        """
        return await self._translated(Call(None, command, address), self._run)

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

    async def _translated(self, call: Call, run: "Callable[[Call], Coroutine[Any, Any, Any]]") -> Any:
        try:
            return await self._limited(run(call))
        except StoreTimeoutError:  # which is a TimeoutError
            raise
        except (exceptions.RedisError, TimeoutError, asyncio.TimeoutError) as error:
            self._nodes.slots = None
            raise explained(error, call.address, self._nodes.settings.timeout) from error

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

    async def _run_on(self, connection: Any, call: Call) -> Any:
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

    async def _ask_for(self, connection: Any, call: Call) -> Any:
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
                # The server may quote the password.
                raise exceptions.ResponseError(re.split("[\"'`]", str(error))[0]) from None
            if self._nodes.settings.cluster and isinstance(error, exceptions.TimeoutError):
                raise exceptions.ConnectionError(str(error)) from error  # nothing was sent: others may be asked
            raise
        return connection

    def _is_late(self, call: Call) -> bool:
        return time.monotonic() + RETRY_PAUSE > call.begun_at + self._nodes.settings.timeout

    def _all_in_use(self) -> StoreTimeoutError:
        return StoreTimeoutError(
            f"All {self._max_connections} connections to Redis at {self._nodes.start} were in use for more than "
            f"{self._nodes.settings.timeout} seconds."
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
