# SPDX-License-Identifier: Apache-2.0
"""
Connections to one server: opened when needed, lent to one call at a time, shared by all stores with equal settings.

Asynchronous connections belong to the event loop that opened them. `psycopg_pool` is not used because its
`AsyncConnectionPool` needs background tasks, and a loop that ends while the pool grows waits for them for ever.
"""

import asyncio
import math
import os
import select
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import psycopg
from haystack.utils import Secret
from psycopg import abc
from psycopg.conninfo import conninfo_attempts, conninfo_attempts_async, conninfo_to_dict, timeout_from_conninfo
from psycopg.pq import Conninfo, TransactionStatus
from psycopg.types.string import TextLoader

from haystack_chat_store.errors import SchemaVersionError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.connection_registry import (
    ServerConnectionRegistry,
    ServerConnections,
    keep_alive_forever,
    resolved,
)
from haystack_chat_store.stores.postgres.base import BEGINNING
from haystack_chat_store.stores.postgres.schema import HAS_SCHEMA, MIGRATIONS, Tables
from haystack_chat_store.stores.postgres.statements import BEGIN
from haystack_chat_store.stores.sync_async import run_sync

ResultT = TypeVar("ResultT")
Parameters = Sequence[Any] | dict[str, Any]

# An idle connection that nobody needed for so many seconds is closed, unless the pool is to keep it.
_MAX_IDLE_SECONDS = 600
# How long the server is asked to cancel what a call has given up. Else it would go on waiting for a lock.
_CANCEL_SECONDS = 1.0
# Processes that create the tables at once wait for each other here. The number is "chat" in ASCII.
_UPGRADE_LOCK = "SELECT pg_advisory_xact_lock(1667785076)"
# An upgrade gives way, and tries again, before the server finds it and a writer in each other's way: after a second.
_GIVE_WAY = "SET LOCAL lock_timeout = 500"
_PAUSE = "SELECT pg_sleep(0.05)"
# Looked up in the catalog, for to_regclass may answer from a cache that another session's commit has outdated.
_STATE = """
    SELECT pg_backend_pid(), array_agg(relname::text)
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = %s AND relname = ANY (%s)
"""
# A plan that is prepared while a table is small is still used when it has grown, unless somebody analyses the table.
# Where there is no index to walk along, such a plan looks so costly that the server would compile it, for 0.1 seconds.
_WALK_ALONG_INDEXES = """
    SELECT set_config('enable_seqscan', 'off', false), set_config('enable_bitmapscan', 'off', false),
        set_config('enable_sort', 'off', false), set_config('jit', 'off', false)
"""


class Settings(NamedTuple):
    """
    What stores have in common that share their connections.
    """

    connection_string: Secret
    schema_name: str
    table_prefix: str
    min_pool_size: int
    max_pool_size: int
    timeout: float

    def location(self) -> str:
        """
        Return the connection string.
        """
        return resolved(self.connection_string, "connection string")


# Held during each step of connecting: a child that is forked while a thread of its parent is inside of OpenSSL, which
# checks passwords, inherits OpenSSL's locks as held for ever.
_connecting = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_connecting.acquire, after_in_parent=_connecting.release, after_in_child=_connecting.release
    )


class _Limited:
    """
    A connection whose every wait for the server ends at the deadline of the call it is lent to.
    """

    deadline = math.inf
    idle_since = 0.0
    is_ready = False
    prepares = False
    loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def _connect_gen(cls, *arguments: Any, **options: Any) -> "Generator[Any, Any, Any]":
        steps = super()._connect_gen(*arguments, **options)  # type: ignore[misc]  # a mixin: psycopg's class comes next
        ready = None
        try:
            while True:
                with _connecting:
                    wanted = steps.send(ready)
                ready = yield wanted
        except StopIteration as stop:
            return stop.value
        finally:
            steps.close()

    def limited(self, steps: "abc.PQGen[ResultT]") -> "Generator[Any, Any, ResultT]":
        """
        Take the steps of a conversation with the server, but give up when the deadline has passed.

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
        return super().wait(self.limited(gen), *arguments, **options)


class _AsyncConnection(_Limited, psycopg.AsyncConnection[tuple[Any, ...]]):
    async def wait(self, gen: "abc.PQGen[ResultT]", *arguments: Any, **options: Any) -> ResultT:
        return await super().wait(self.limited(gen), *arguments, **options)


class AsideError(Exception):
    """
    What brings an error of work done aside past those who take errors for the server's.
    """

    def __init__(self, error: Exception) -> None:
        """
        Bring an error.
        """
        super().__init__(error)
        self.error = error


class MayNotMakeError(psycopg.errors.InsufficientPrivilege):
    """
    What the server says to a role that may not make or change the tables.
    """


class Session:
    """
    What an operation talks to: a connection that it has for itself. Written for both kinds of connection.
    """

    def __init__(self, connection: Any, pool: "Pool") -> None:
        """
        Talk through a connection.

        :param connection: A synchronous connection, with which nothing here ever waits, or an asynchronous one.
        :param pool: What has lent it.
        """
        self.connection = connection
        self.pool = pool
        self._timeout = pool.timeout
        self._is_async = isinstance(connection, _AsyncConnection)

    async def run(self, statement: str, parameters: Parameters = ()) -> Any:
        """
        Execute a statement and return its cursor.
        """
        while True:
            try:
                cursor = self.connection.execute(statement, parameters, prepare=self.connection.prepares)
                return await cursor if self._is_async else cursor
            except psycopg.errors.SerializationFailure:
                # Only a statement on its own can fail so, where the database's default is a stricter isolation level.
                continue

    async def fetch(self, statement: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """
        Execute a statement and return its rows.
        """
        cursor = await self.run(statement, parameters)
        fetched = cursor.fetchall()
        rows: list[tuple[Any, ...]] = await fetched if self._is_async else fetched
        return rows

    async def in_transaction(
        self,
        work: "Callable[..., Awaitable[ResultT]]",
        *arguments: Any,
        begin: str = BEGIN,
        repeatable: bool = True,
    ) -> ResultT:
        """
        Do work in a transaction, and once more if it and another one were in each other's way.

        :param work: Gets this session and the arguments. If it raises, nothing has happened.
        :param begin: The statement that begins the transaction.
        :param repeatable: Whether the work can be done once more.
        """
        while True:
            try:
                await self.run(begin)
                result = await work(self, *arguments)
                await self.run("COMMIT")
                return result
            except (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable):
                if not repeatable:
                    raise
                await self.run("ROLLBACK")
                await self.run(_PAUSE)
            except (psycopg.Error, OSError):
                raise  # whoever has lent the connection closes it
            except Exception:  # a call that was refused, or its source: the connection is sound
                await self.run("ROLLBACK")
                raise

    async def aside(self, work: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """
        Do something that takes the processor for a while, or waits for something else, without blocking a loop.

        :raises AsideError: If the work raises.
        """
        try:
            return await asyncio.to_thread(work, *arguments) if self._is_async else work(*arguments)
        except Exception as error:
            raise AsideError(error) from error

    async def appended(self, statement: str, parameters: Parameters) -> bool:
        """
        Execute a statement that appends messages. Return whether it has, rather than found that one is there already.
        """
        try:
            return bool((await self.run(statement, parameters)).rowcount)
        except psycopg.errors.UniqueViolation:
            return False

    async def vacuum(self, statement: str) -> bool:
        """
        Execute a VACUUM. Return whether the server did it: a role that may not only gets a warning.
        """
        warnings: list[Any] = []
        self.connection.add_notice_handler(warnings.append)
        try:
            cursor = self.connection.execute(statement, prepare=False)
            if self._is_async:
                await cursor
        finally:
            self.connection.remove_notice_handler(warnings.append)
        return not warnings

    def renew_deadline(self, seconds: float | None = None) -> None:
        """
        Give what follows as much time as a call has.

        :param seconds: Another time instead.
        """
        self.connection.deadline = time.monotonic() + (self._timeout if seconds is None else seconds)

    async def cancel(self) -> None:
        """
        Ask the server to stop what it does for this connection. It may not have noticed that nobody waits any more.
        """
        if psycopg.capabilities.has_cancel_safe():  # what older libraries have instead could wait for ever
            with suppress(psycopg.Error):
                cancelling = self.connection.cancel_safe(timeout=_CANCEL_SECONDS)
                if self._is_async:
                    await cancelling


class _Idle:
    """
    Connections that wait for work, the one used last on top.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._connections: list[Any] = []

    def push(self, connection: Any) -> None:
        connection.idle_since = time.monotonic()
        self._connections.append(connection)

    def pop(self) -> Any | None:
        """
        Return a connection that still stands, or none.
        """
        while self._connections:
            connection = self._connections.pop()
            if not connection.closed and not _has_news(connection.pgconn.socket):
                return connection
            _close(connection)
        return None

    def close_old(self) -> None:
        while len(self._connections) > self._kept and self._is_old(self._connections[0]):
            _close(self._connections.pop(0))

    def close(self) -> None:
        while self._connections:
            _close(self._connections.pop())

    @staticmethod
    def _is_old(connection: Any) -> bool:
        return bool(time.monotonic() - connection.idle_since > _MAX_IDLE_SECONDS)


class _OfLoop:
    """
    What belongs to one event loop.
    """

    def __init__(self, settings: Settings) -> None:
        self.idle = _Idle(settings.min_pool_size)
        self.limit = asyncio.Semaphore(settings.max_pool_size)


class Pool(ServerConnections):
    """
    The connections to one server.
    """

    def __init__(self, settings: Settings) -> None:
        """
        Open nothing yet.

        :param settings: What the stores have in common.
        :raises StoreUnavailableError: If the connection string is none.
        """
        self._settings = settings
        self.timeout = settings.timeout
        self.tables = Tables(settings.schema_name, settings.table_prefix)
        #: The version of the tables, as far as it is known.
        self.version = 0
        #: Whether messages are searched in this database, so that who writes one writes its terms.
        self.has_search = False
        #: Whether all that was there when search was turned on has its terms, and up to where this process knows so.
        self.is_indexed = False
        self.indexed_up_to: tuple[Any, int] = BEGINNING
        self.location = settings.location()
        self._connection_info = _parsed(self.location)
        self._lock = threading.Lock()
        self._limit = threading.Semaphore(settings.max_pool_size)
        self._idle = _Idle(settings.min_pool_size)
        self._loops: dict[asyncio.AbstractEventLoop, _OfLoop] = {}
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_current = False
        self._is_closed = False

    @contextmanager
    def session(self, *, search: bool = False) -> Iterator[Session]:
        """
        Lend a connection to a synchronous call.

        :param search: Whether messages are to be searched in this database from now on.
        :raises StoreTimeoutError: If all are in use for longer than the timeout.
        """
        deadline = time.monotonic() + self._settings.timeout
        if not self._limit.acquire(timeout=self._settings.timeout):
            raise self._all_in_use()
        try:
            with self._lock:
                connection = self._idle.pop()
            if connection is None:
                options = self._connect_options(conninfo_attempts(self._connection_info), deadline)
                connection = _Connection.connect(self.location, **options)
            with self._lent(connection, self._idle, deadline):
                session = Session(connection, self)
                try:
                    if not connection.is_ready:
                        run_sync(self._make_ready(session))
                    if search and not self.has_search:
                        run_sync(self._make_searchable(session))
                    yield session
                except psycopg.errors.ConnectionTimeout:
                    run_sync(session.cancel())
                    raise
        finally:
            self._limit.release()

    @asynccontextmanager
    async def session_async(self, *, search: bool = False) -> AsyncIterator[Session]:
        """
        Lend a connection of the running event loop to an asynchronous call.

        :param search: Whether messages are to be searched in this database from now on.
        :raises StoreTimeoutError: If all are in use for longer than the timeout.
        """
        deadline = time.monotonic() + self._settings.timeout
        ours = self._of_running_loop()
        if ours.limit.locked():
            try:
                await asyncio.wait_for(ours.limit.acquire(), self._settings.timeout)
            except asyncio.TimeoutError:
                raise self._all_in_use() from None
        else:
            await ours.limit.acquire()
        try:
            with self._lock:
                connection = ours.idle.pop()
            if connection is None:
                options = self._connect_options(await conninfo_attempts_async(self._connection_info), deadline)
                connection = await _AsyncConnection.connect(self.location, **options)
                connection.loop = asyncio.get_running_loop()
            with self._lent(connection, ours.idle, deadline):
                session = Session(connection, self)
                try:
                    if not connection.is_ready:
                        await self._make_ready(session)
                    if search and not self.has_search:
                        await self._make_searchable(session)
                    yield session
                except psycopg.errors.ConnectionTimeout:
                    await session.cancel()
                    raise
        finally:
            ours.limit.release()

    def close(self) -> None:
        """
        Close what is idle now, and what is in use as soon as it is given back.
        """
        with self._lock:
            self._is_closed = True
            for idle in self._all_idle():
                idle.close()
            self._loops.clear()

    def address_and_password(self) -> tuple[str, Any]:
        """
        Return where libpq connects to, and with which password, as far as can be known without asking it.
        """
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

        A connection keeps its event loop alive, and that the calls under way: freed, they would take their connections
        from the selector that parent and child share.
        """
        for connection in self._open:
            keep_alive_forever(connection)

    def _connect_options(self, attempts: Sequence[Any], deadline: float) -> dict[str, Any]:
        # psycopg gives each address of the server so many whole seconds, at least two.
        share = max(2, round((deadline - time.monotonic()) / len(attempts)))
        timeout = min(share, timeout_from_conninfo(self._connection_info))
        # Whatever the database's encoding, we speak UTF-8.
        return {"autocommit": True, "connect_timeout": timeout, "client_encoding": "utf8"}

    async def _make_ready(self, session: Session) -> None:
        """
        Prepare a new connection for its work, and once for each process the database.
        """
        connection = session.connection
        connection.adapters.register_loader("json", TextLoader)  # the codec parses a window at once
        backend_pid, has_tables = await self.look(session)
        # A pooler such as pgbouncer gives clients a process id of its own, and each statement another server
        # connection: none of them would know what another has prepared.
        if backend_pid == connection.info.backend_pid:
            connection.prepares = True
            await session.run(_WALK_ALONG_INDEXES)
        if not self._is_current:
            if not has_tables or await self._version(session) < len(MIGRATIONS):
                await self._make(session, self._bring_up_to_date)
            self._is_current = True
        connection.is_ready = True

    async def look(self, session: Session) -> tuple[int, bool]:
        """
        Look what the database has. Return the server's process id, and whether it has the tables.
        """
        names = [self.tables.version_table, self.tables.search_index, self.tables.unindexed]
        ((backend_pid, found),) = await session.fetch(_STATE, [self._settings.schema_name, names])
        has_tables, has_search_index, has_unindexed = (name in (found or ()) for name in names)
        self.has_search = self.has_search or has_search_index
        self.is_indexed = self.is_indexed or has_unindexed
        return backend_pid, has_tables

    @staticmethod
    async def _make(session: Session, work: "Callable[[Session], Awaitable[None]]") -> None:
        """
        Make or change tables, in a transaction.
        """
        try:
            await session.in_transaction(work)
        except psycopg.errors.InsufficientPrivilege as error:
            raise MayNotMakeError(error.diag.message_primary or "") from error

    async def _bring_up_to_date(self, session: Session) -> None:
        await session.run(_UPGRADE_LOCK)
        _, has_tables = await self.look(session)
        version = await self._version(session) if has_tables else 0
        if version == len(MIGRATIONS):
            return
        if version == 0 and not await session.fetch(HAS_SCHEMA, [self._settings.schema_name]):
            await session.run(self.tables.create_schema())
        if version > 0:
            await session.run(_GIVE_WAY)
            await session.run(self.tables.lock)
        for statement in self.tables.upgrade(version):
            session.renew_deadline()
            await session.run(statement)

    async def _make_searchable(self, session: Session) -> None:
        await self.look(session)
        if not self.has_search:
            await self._make(session, self._turn_search_on)
            await self.look(session)

    async def _turn_search_on(self, session: Session) -> None:
        await session.run(_UPGRADE_LOCK)
        await session.run(_GIVE_WAY)
        await session.run(self.tables.create_search_index)
        if await session.fetch(self.tables.has_messages) == [(False,)]:
            await session.run(self.tables.create_unindexed)

    async def finish_index(self, session: Session) -> None:
        """
        Record that all messages have their terms, but for those that somebody writes who does not know of search.
        """
        await self._make(session, self._create_unindexed)
        self.is_indexed = True

    async def _create_unindexed(self, session: Session) -> None:
        await session.run(_UPGRADE_LOCK)
        await session.run(_GIVE_WAY)
        await session.run(self.tables.create_unindexed)

    async def _version(self, session: Session) -> int:
        ((version,),) = await session.fetch(self.tables.statements.version)
        self.version = version = int(version or 0)
        if version > len(MIGRATIONS):
            raise SchemaVersionError(
                f"The database has schema version {version}, but this version of haystack-chat-store knows only "
                f"versions up to {len(MIGRATIONS)}. It was left untouched. Upgrade haystack-chat-store to use it."
            )
        return version

    def _of_running_loop(self) -> _OfLoop:
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._loops:
                for ended in [loop for loop in self._loops if loop.is_closed()]:
                    self._loops.pop(ended).idle.close()
                self._loops[loop] = _OfLoop(self._settings)
            return self._loops[loop]

    def _all_idle(self) -> list[_Idle]:
        return [self._idle, *(of_loop.idle for of_loop in self._loops.values())]

    @contextmanager
    def _lent(self, connection: Any, idle: _Idle, deadline: float) -> Iterator[None]:
        """
        Take a connection back after its use, or close it if it is not as it was: the server then undoes what was begun.
        """
        self._open.add(connection)
        connection.deadline = deadline
        try:
            yield
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
            "seconds. Nothing was stored. Give the store a larger max_pool_size, or a longer timeout."
        )


#: The pools of this process.
pools: ServerConnectionRegistry[Settings, Pool] = ServerConnectionRegistry(Pool)


def _parsed(connection_string: str) -> dict[str, Any]:
    try:
        parts = conninfo_to_dict(connection_string)
    except psycopg.ProgrammingError:
        # Without its cause, which quotes the connection string.
        raise StoreUnavailableError(
            "The connection string cannot be used. It must be like postgresql://user:password@host:port/database."
        ) from None
    if "@" in str(parts.get("host", "")) or not str(parts.get("port", 0)).replace(",", "").isdigit():
        # Part of a password, most likely: not to be repeated in errors.
        raise StoreUnavailableError(
            "The connection string cannot be used. Percent-encode what is neither letter nor digit in its password, "
            "such as %40 for @."
        )
    return parts


def _close(connection: Any) -> None:
    """
    Close a connection of either kind. The asynchronous one does not wait for anything either, whatever its loop.
    """
    closing = connection.close()
    if closing is not None:
        run_sync(closing)


def _has_news(socket: int) -> bool:
    """
    Whether an idle connection has something to read: the server has closed it, or is about to.
    """
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(socket, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([socket], [], [], 0)[0])
