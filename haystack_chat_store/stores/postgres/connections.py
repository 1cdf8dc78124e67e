# SPDX-License-Identifier: Apache-2.0
"""
Connections to one server: opened when needed, lent to one call at a time, shared by all stores with equal settings.

Asynchronous connections belong to the event loop that opened them. `psycopg_pool` is not used. Its
`AsyncConnectionPool` needs background tasks, for which a loop that ends while the pool grows waits for ever. Its
`ConnectionPool` connects in background threads: a call to an absent server, or with a wrong password, fails only after
its whole timeout, and without the cause (tried with psycopg_pool 3.3.3: 5.00 of 5 seconds).
"""

import asyncio
import math
import select
import threading
import time
import weakref
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from operator import methodcaller
from typing import Any, NamedTuple, TypeVar

import psycopg
from haystack import logging
from haystack.utils import Secret
from psycopg import abc
from psycopg.conninfo import conninfo_attempts, conninfo_attempts_async, timeout_from_conninfo
from psycopg.pq import Conninfo, TransactionStatus
from psycopg.types.string import TextLoader

from haystack_chat_store.errors import StoreTimeoutError
from haystack_chat_store.stores import idle_connections
from haystack_chat_store.stores.connection_registry import (
    ServerConnectionRegistry,
    ServerConnections,
    fingerprint_of,
    hold_during_forks,
    keep_alive_forever,
    read_hidden,
    resolved,
)
from haystack_chat_store.stores.fair_semaphore import FairSemaphore
from haystack_chat_store.stores.postgres import upgrading
from haystack_chat_store.stores.postgres.connection_string import DEFAULT_SCHEMA, parsed
from haystack_chat_store.stores.postgres.session import Database, Session
from haystack_chat_store.stores.postgres.turns import Turns
from haystack_chat_store.stores.sync_async import run_sync

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

# Connections that were idle for longer are closed, down to `min_pool_size`.
_MAX_IDLE_SECONDS = 600


class Settings(NamedTuple):
    """The connection settings. Stores with equal settings share their connections."""

    connection_string: Secret
    schema_name: str | None
    table_prefix: str
    min_pool_size: int
    max_pool_size: int
    timeout: float

    def location(self) -> str:
        """Return the connection string."""
        return resolved(self.connection_string, "connection string")

    def fingerprint(self) -> bytes:
        """Return what changes when the connection string does."""
        return fingerprint_of(self.location())


# Held during each step of connecting. If a process forks while one of its threads is inside OpenSSL, which checks
# passwords, OpenSSL's locks stay held in the child for ever.
_connecting = threading.RLock()
hold_during_forks(_connecting)

_KEEPALIVES = {
    "keepalives_idle": idle_connections.KEEPALIVE_IDLE_SECONDS,
    "keepalives_interval": idle_connections.KEEPALIVE_INTERVAL_SECONDS,
    "keepalives_count": idle_connections.KEEPALIVE_COUNT,
}

# A plan that is kept from when a table was small would read the whole table when it has grown. Compiling a plan takes
# longer than each of these statements.
_KEEP_TO_INDEXES = "SELECT set_config('enable_seqscan', 'off', false), set_config('jit', 'off', false)"


class _Attempts:
    """The addresses of a server that are tried one after the other. They share the time that a call has left."""

    def __init__(self, number: int, deadline: float) -> None:
        self._left = number
        self._deadline = deadline

    def next_deadline(self) -> float:
        """Return until when the next address may take."""
        now = time.monotonic()
        share = (self._deadline - now) / max(1, self._left)
        self._left -= 1
        return now + share


# Of the call that connects. psycopg hands nothing else through to the generator that connects.
_attempts: ContextVar[_Attempts] = ContextVar("_attempts")


class _Limited:
    """
    A connection whose waits for the server all end at the deadline of the call that uses it.

    `statement_timeout` cannot replace it: a server that does not answer any more keeps no time limit.
    """

    deadline = math.inf
    idle_since = -math.inf
    is_ready = False
    prepares = False
    server_run: tuple[str | None, ...] | None = None
    loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def _connect_gen(cls, *arguments: Any, **options: Any) -> "Generator[Any, Any, Any]":
        steps = super()._connect_gen(*arguments, **options)  # type: ignore[misc]  # a mixin: psycopg's class comes next
        deadline = _attempts.get().next_deadline()
        ready = None
        try:
            while True:
                if time.monotonic() > deadline:
                    raise psycopg.errors.ConnectionTimeout
                with _connecting:
                    wanted = steps.send(ready)
                ready = yield wanted
        except StopIteration as stop:
            return stop.value
        finally:
            steps.close()

    def limited(self, steps: "abc.PQGen[ResultT]") -> "Generator[Any, Any, ResultT]":
        """
        Take the steps of a conversation with the server until the deadline.

        psycopg resumes a generator at least ten times a second while it waits.
        """
        if time.monotonic() > self.deadline:
            raise psycopg.errors.ConnectionTimeout
        try:
            wanted = next(steps)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > self.deadline:
                    raise psycopg.errors.ConnectionTimeout
                wanted = steps.send(ready)
        except StopIteration as stop:
            result: ResultT = stop.value
            return result


class _Connection(_Limited, psycopg.Connection[tuple[Any, ...]]):
    def wait(self, gen: "abc.PQGen[ResultT]", *arguments: Any, **options: Any) -> ResultT:
        try:
            return super().wait(self.limited(gen), *arguments, **options)
        except OSError as error:
            raise psycopg.OperationalError(str(error)) from error


class _AsyncConnection(_Limited, psycopg.AsyncConnection[tuple[Any, ...]]):
    async def wait(self, gen: "abc.PQGen[ResultT]", *arguments: Any, **options: Any) -> ResultT:
        try:
            return await super().wait(self.limited(gen), *arguments, **options)
        except OSError as error:
            raise psycopg.OperationalError(str(error)) from error


class _Idle:
    """Idle connections, the one used last on top."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._connections: list[Any] = []

    def push(self, connection: Any) -> None:
        connection.idle_since = time.monotonic()
        self._connections.append(connection)

    def pop(self) -> Any | None:
        """Return a connection that is still open, or `None`."""
        while self._connections:
            connection = self._connections.pop()
            if not connection.closed and not _is_readable(connection.pgconn.socket):
                return connection
            logger.info("The server has closed an idle connection. Connecting again.")
            _close(connection)
        return None

    def close_idle_since(self, moment: float) -> None:
        """Close the connections that nothing has used after a moment."""
        while self._connections and self._connections[0].idle_since <= moment:
            _close(self._connections.pop(0))

    def close_old(self) -> None:
        while len(self._connections) > self._kept and self._is_old(self._connections[0]):
            _close(self._connections.pop(0))

    def close(self) -> None:
        while self._connections:
            _close(self._connections.pop())

    @staticmethod
    def _is_old(connection: Any) -> bool:
        return bool(time.monotonic() - connection.idle_since > _MAX_IDLE_SECONDS)


class _LoopConnections:
    """The connections of one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.idle = _Idle(settings.min_pool_size)
        self.limit = asyncio.Semaphore(settings.max_pool_size)
        self.turns = Turns()


class Pool(ServerConnections):
    """The connections to one server."""

    def __init__(self, settings: Settings) -> None:
        """
        Open nothing yet.

        :param settings: The connection settings of the stores.
        :raises StoreConfigurationError: If the connection string cannot be used.
        """
        self.fingerprint = settings.fingerprint()
        found = read_hidden(lambda: parsed(settings.location()))
        self._connection_string, self._connection_info, schema_name = found
        del found
        self.database = Database(settings.schema_name or schema_name or DEFAULT_SCHEMA, settings.table_prefix)
        #: Of the threads that append.
        self.turns = Turns()
        self._settings = settings
        self._lock = threading.Lock()
        self._limit = FairSemaphore(settings.max_pool_size)
        self._idle = _Idle(settings.min_pool_size)
        self._loops: dict[asyncio.AbstractEventLoop, _LoopConnections] = {}
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_closed = False

    @contextmanager
    def session(self, deadline: float, *, search: bool = False, reads: bool = False) -> Iterator[Session]:
        """
        Lend a connection to a synchronous call.

        :param deadline: When the call must end, as `time.monotonic` counts.
        :param search: Whether to turn search on in the database, if it is off.
        :param reads: Whether the call only reads: then nothing is made, upgraded or turned on.
        :raises NoTablesError: If the call only reads, and there are no tables.
        :raises StoreTimeoutError: If all are in use until then.
        """
        if not self._limit.acquire(timeout=max(0, deadline - time.monotonic())):
            raise self._all_in_use()
        try:
            connection = run_sync(self._idle_and_alive(self._idle, deadline))
            if connection is None:
                options = self._connect_options(conninfo_attempts(self._connection_info), deadline)
                connection = _Connection.connect(self._connection_string, **options)
                connection.idle_since = time.monotonic()
            with self._lent(connection, self._idle, deadline) as session:
                try:
                    run_sync(self._prepare(session, search=search, reads=reads))
                    yield session
                except psycopg.errors.ConnectionTimeout:
                    run_sync(session.cancel())
                    raise
        finally:
            self._limit.release()

    @asynccontextmanager
    async def session_async(
        self, deadline: float, *, search: bool = False, reads: bool = False
    ) -> AsyncIterator[Session]:
        """
        Lend a connection of the running event loop to an asynchronous call.

        :param deadline: When the call must end, as `time.monotonic` counts.
        :param search: Whether to turn search on in the database, if it is off.
        :param reads: Whether the call only reads: then nothing is made, upgraded or turned on.
        :raises NoTablesError: If the call only reads, and there are no tables.
        :raises StoreTimeoutError: If all are in use until then.
        """
        own = self._of_running_loop()
        if own.limit.locked():
            try:
                await asyncio.wait_for(own.limit.acquire(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise self._all_in_use() from None
        else:
            await own.limit.acquire()
        try:
            connection = await self._idle_and_alive(own.idle, deadline)
            if connection is None:
                options = self._connect_options(await conninfo_attempts_async(self._connection_info), deadline)
                connection = await _AsyncConnection.connect(self._connection_string, **options)
                connection.idle_since = time.monotonic()
                connection.loop = asyncio.get_running_loop()
            with self._lent(connection, own.idle, deadline) as session:
                try:
                    await self._prepare(session, search=search, reads=reads)
                    yield session
                except psycopg.errors.ConnectionTimeout:
                    await session.cancel()
                    raise
        finally:
            own.limit.release()

    def turns_of_running_loop(self) -> Turns:
        """Return the turns of the tasks of the running event loop that append."""
        return self._of_running_loop().turns

    def close(self) -> None:
        """Close what is idle now, and what is in use as soon as it is given back."""
        with self._lock:
            self._is_closed = True
            for idle in self._all_idle():
                idle.close()
            self._loops.clear()

    def address_and_password(self) -> tuple[str, Any]:
        """Return where libpq connects to, and with which password, as far as it is known without asking libpq."""
        given = self._connection_info
        defaults = {option.keyword.decode(): option.val.decode() for option in Conninfo.get_defaults() if option.val}
        known = {**defaults, **given}  # defaults are from the environment, such as PGHOST
        host = given.get("host") or given.get("hostaddr")
        if not host and "service" in given:
            return f"the service {given['service']}", known.get("password")
        host = host or known.get("host") or known.get("hostaddr") or "the local socket"
        return f"{host}, port {known['port']}", known.get("password")

    def after_fork_in_child(self) -> None:
        """
        Neither use nor close, in a forked child, what the parent opened.

        A connection keeps its event loop alive, and the loop keeps the calls that are running. If they were freed, they
        would remove their connections from the selector that parent and child share.
        """
        for connection in self._open:
            keep_alive_forever(connection)

    async def _idle_and_alive(self, idle: _Idle, deadline: float) -> Any | None:
        """Return an idle connection that leads to the server, or `None`. Close those that do not."""
        while True:
            with self._lock:
                connection = idle.pop()
            if connection is None or await self._is_alive(connection, deadline):
                return connection
            logger.info("An idle connection does not answer. Connecting again.")
            self._close_idle_since(connection.idle_since)

    async def _is_alive(self, connection: Any, deadline: float) -> bool:
        now = time.monotonic()
        if now - connection.idle_since < idle_connections.PROBED_AFTER_SECONDS:
            return True
        connection.deadline = min(deadline, now + idle_connections.probe_seconds(self._settings.timeout))
        try:
            await Session(connection, self.database, self._settings.timeout).run("SELECT 1")
        except psycopg.Error:
            _close(connection)
            return False
        except BaseException:  # such as a cancelled task
            _close(connection)
            raise
        return True

    def _close_idle_since(self, moment: float) -> None:
        with self._lock:
            for idle in self._all_idle():
                idle.close_idle_since(moment)

    def _connect_options(self, attempts: Sequence[Any], deadline: float) -> dict[str, Any]:
        _attempts.set(_Attempts(len(attempts), deadline))
        # The timeout of each address of the server, which psycopg takes in whole seconds, at least two. `_Attempts` is
        # more precise.
        share = max(2, round((deadline - time.monotonic()) / len(attempts)))
        keepalives = {} if "service" in self._connection_info else _KEEPALIVES  # a service may have its own
        return {
            **{name: value for name, value in keepalives.items() if name not in self._connection_info},
            "autocommit": True,
            "connect_timeout": min(share, timeout_from_conninfo(self._connection_info)),
            "client_encoding": "utf8",  # whatever the database's encoding is
            # Statements are planned for their parameters and for the size that their tables have now. Only those of
            # every turn are prepared, explicitly: psycopg itself never counts as far.
            "prepare_threshold": 2**31,
        }

    async def _prepare(self, session: Session, *, search: bool, reads: bool) -> None:
        """Prepare a new connection and, once in a process, the database."""
        if not session.connection.is_ready:
            session.connection.adapters.register_loader("json", TextLoader)  # the codec parses a window at once
            await upgrading.check_encoding(session)
            await upgrading.prepare(session, reads=reads)
            await self._look_at_server(session)
            session.connection.is_ready = True
        if search and not reads and not self.database.has_search:
            await upgrading.turn_search_on(session)

    @staticmethod
    async def _look_at_server(session: Session) -> None:
        """
        Note since when the server runs, and let it keep the plans of the statements of every turn.

        That takes a third of their time.

        A pooler reports a process id of its own. Behind it the next statement may run on another server connection,
        which does not know what this one has prepared.
        """
        session.connection.server_run = await session.server_run()
        ((backend_pid,),) = await session.fetch("SELECT pg_backend_pid()")
        if backend_pid == session.connection.info.backend_pid:
            await session.run(_KEEP_TO_INDEXES)
            session.connection.prepares = True

    def _of_running_loop(self) -> _LoopConnections:
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._loops:
                for ended in filter(methodcaller("is_closed"), list(self._loops)):
                    self._loops.pop(ended).idle.close()
                self._loops[loop] = _LoopConnections(self._settings)
            return self._loops[loop]

    def _all_idle(self) -> list[_Idle]:
        return [self._idle, *(own.idle for own in self._loops.values())]

    @contextmanager
    def _lent(self, connection: Any, idle: _Idle, deadline: float) -> Iterator[Session]:
        """Take a connection back after its use, or close it inside a transaction, which the server then undoes."""
        self._open.add(connection)
        connection.deadline = deadline
        try:
            yield Session(connection, self.database, self._settings.timeout)
        except psycopg.OperationalError as error:
            if connection.closed or isinstance(error, psycopg.errors.ConnectionTimeout):
                self._close_idle_since(connection.idle_since)
            raise
        finally:
            with self._lock:
                if self._is_closed or connection.info.transaction_status != TransactionStatus.IDLE:
                    _close(connection)
                else:
                    idle.push(connection)
                for every in self._all_idle():
                    every.close_old()

    def _all_in_use(self) -> StoreTimeoutError:
        return StoreTimeoutError(
            f"All {self._settings.max_pool_size} connections were in use for more than {self._settings.timeout} "
            "seconds. Give the store a larger max_pool_size, or a longer timeout."
        )


#: The pools of this process.
pools: ServerConnectionRegistry[Settings, Pool] = ServerConnectionRegistry(Pool)


def _close(connection: Any) -> None:
    """Close a connection of either kind. Closing an asynchronous one never waits, so it needs no event loop."""
    closing = connection.close()
    if closing is not None:
        run_sync(closing)


def _is_readable(socket: int) -> bool:
    """Return whether an idle connection has something to read: the server has closed it, or is about to."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(socket, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([socket], [], [], 0)[0])
