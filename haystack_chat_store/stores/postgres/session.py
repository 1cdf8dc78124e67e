# SPDX-License-Identifier: Apache-2.0
"""What an operation works with: a connection that it has for itself, and what the process knows of the database."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar, cast

import psycopg
from haystack import logging
from psycopg.pq import TransactionStatus

from haystack_chat_store.stores.postgres.schema import BEGINNING, Tables
from haystack_chat_store.stores.postgres.statements import (
    BEGIN_AND_NUMBER,
    SERVER_RUN,
    STATUS_OF_TRANSACTION,
    Statement,
)
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP
from haystack_chat_store.types import Fault

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
OperationT = TypeVar("OperationT", bound=Callable[..., Any])
Parameters = Sequence[Any] | dict[str, Any]

# The number of seconds for asking the server to cancel the statement of a call that has timed out. Without that, the
# statement would go on waiting for a lock.
_CANCEL_SECONDS = 1.0
_PAUSE_BEFORE_RETRY = "SELECT pg_sleep(0.05)"
# The errors of a transaction that can be done again: see `Session.in_transaction`.
_REPEATED = (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable, psycopg.errors.SerializationFailure)


class Database:
    """The facts that a process knows about the database of its connections."""

    def __init__(self, schema_name: str, table_prefix: str) -> None:
        """
        Know nothing yet.

        :param schema_name: The PostgreSQL schema that holds the tables.
        :param table_prefix: The beginning of the tables' names.
        """
        self.schema_name = schema_name
        self.tables = Tables(schema_name, table_prefix)
        #: Whether the tables exist and have this version.
        self.is_current = False
        #: Whether search is on, so that each message is written with its terms.
        self.has_search = False
        #: Whether all messages from before that have their terms.
        self.is_indexed = False
        #: The place of the last message that this process has indexed, while not all are.
        self.indexed_up_to: tuple[Any, int] = BEGINNING


class Commit(NamedTuple):
    """
    A transaction that is being committed.

    :param number: Its number.
    :param result: What its operation returns if it is committed.
    :param appended: The ids of the messages that it appends, if that is all it does.
    """

    number: int
    result: Any
    appended: Sequence[str]


class Session:
    """A connection that an operation has for itself, with the same methods for synchronous and asynchronous calls."""

    def __init__(self, connection: Any, database: Database, timeout: float) -> None:
        """
        Wrap a connection.

        :param connection: A synchronous connection, with which nothing here ever waits, or an asynchronous one.
        :param database: The facts that the process knows about the database.
        :param timeout: The timeout of a call, in seconds.
        """
        self.connection = connection
        self.database = database
        self._timeout = timeout
        self._is_async = isinstance(connection, psycopg.AsyncConnection)
        #: What is being committed: after an error, it is not known whether it was.
        self.commit: Commit | None = None
        #: The ids of messages that a statement outside of a transaction is appending. They are all stored, or none.
        self.appending: Sequence[str] = ()
        #: The ids of the messages that the transaction appends, if that is all it does.
        self.appended_in_transaction: Sequence[str] = ()
        #: What an earlier attempt of this call may have appended when it lost its connection.
        self.appended_earlier: Sequence[str] = ()
        #: What a repair has found, and what an earlier attempt of this call had found when its connection was lost.
        self.faults: list[Fault] = []
        self.found_earlier: Sequence[Fault] = ()
        #: Whether the operation can be done again.
        self.is_repeatable = True

    async def run(self, statement: str, parameters: Parameters = (), *, prepare: bool = False) -> Any:
        """
        Execute a statement and return its cursor.

        :param statement: A `Statement`, in which the names of the tables are filled in, or SQL that is sent as it is.
        :param prepare: Whether the server may keep the statement's plan: for the few statements of every turn.
        """
        if isinstance(statement, Statement):
            statement = self.database.tables.fill_in(statement)
        prepare = prepare and self.connection.prepares
        while True:
            try:
                cursor = self.connection.execute(statement, parameters, prepare=prepare)
                return await cursor if self._is_async else cursor
            except psycopg.errors.SerializationFailure:
                # A statement alone is sent again: the database's default isolation level may be stricter than that of
                # our transactions. A transaction fails: a standby may have to apply what the primary has removed.
                if self.connection.info.transaction_status is not TransactionStatus.IDLE:
                    raise

    async def fetch(
        self, statement: str, parameters: Parameters = (), *, prepare: bool = False
    ) -> list[tuple[Any, ...]]:
        """
        Execute a statement and return its rows.

        :param statement: See `run`.
        :param prepare: See `run`.
        """
        cursor = await self.run(statement, parameters, prepare=prepare)
        fetched = cursor.fetchall()
        rows: list[tuple[Any, ...]] = await fetched if self._is_async else fetched
        return rows

    async def in_transaction(
        self,
        work: "Callable[..., Awaitable[ResultT]]",
        *arguments: Any,
        begin: str = BEGIN_AND_NUMBER,
        repeatable: bool = True,
        is_result: Callable[[Any], bool] = lambda _: True,
    ) -> ResultT:
        """
        Do work in a transaction, and again after a deadlock, a lock timeout or a conflict on a standby.

        :param work: Gets this session and the arguments. If it raises, the transaction is undone.
        :param begin: The statement that begins the transaction.
        :param repeatable: Whether the work can be done again.
        :param is_result: Whether what the work returns is what the whole operation returns. If its answer is lost, an
            operation is done again unless it is.
        """
        self.is_repeatable = repeatable
        while True:
            try:
                self.appended_in_transaction = ()
                number = await self._begin(begin)
                result = await work(self, *arguments)
                if number is not None and is_result(result):
                    self.commit = Commit(number, result, self.appended_in_transaction)
                await self.run("COMMIT")
                self.commit = None
                return result
            except _REPEATED as error:
                if not repeatable:
                    raise
                logger.info("Repeating a transaction after {error}.", error=type(error).__name__)
                await self.run("ROLLBACK")
                await self.run(_PAUSE_BEFORE_RETRY)
            except psycopg.Error:
                raise  # the pool closes the connection
            except Exception:  # the call was refused, or its source has failed: the connection is sound
                self.renew_deadline()  # a source may have taken longer, and its error is the one to raise
                await self.run("ROLLBACK")
                raise

    async def _begin(self, begin: str) -> int | None:
        """Begin a transaction. Return its number, if the statement asks for it."""
        cursor = await self.run(begin)
        if not cursor.nextset():
            return None
        fetched = cursor.fetchone()
        (number,) = await fetched if self._is_async else fetched
        return int(number)

    async def server_run(self) -> "tuple[str | None, ...] | None":
        """Return what tells this run of the server from others, or `None` if this user may not ask."""
        try:
            (run,) = await self.fetch(SERVER_RUN)
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedFunction):
            return None
        return tuple(run)

    async def was_committed(self, lost: "Session") -> bool | None:
        """
        Return whether the transaction that a lost session was committing is committed.

        If the server is still at work on it, wait for its end.

        :returns: `None` if this is not known: the server has crashed, or is another one, and what is committed may be a
            later transaction. A server that crashes forgets numbers that it has not written to its log, and gives them
            out again.
        """
        if lost.commit is None:
            return False
        while True:
            try:
                ((status,),) = await self.fetch(STATUS_OF_TRANSACTION, [lost.commit.number])
            except psycopg.errors.InvalidParameterValue:  # the server crashed, and has lost the number with the rest
                return False
            if status == "committed":
                server_run = await self.server_run()
                return True if server_run is not None and server_run == lost.connection.server_run else None
            if status != "in progress":
                return False
            await self.run(_PAUSE_BEFORE_RETRY)

    async def to_thread(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Call a function that takes a while or waits: in a thread, if an event loop would have to wait for it."""
        return await asyncio.to_thread(function, *arguments) if self._is_async else function(*arguments)

    async def to_thread_if_large(
        self, texts: Iterable[str], function: Callable[..., ResultT], *arguments: Any
    ) -> ResultT:
        """
        Call a function that works on texts: in a thread, if they are large and an event loop would have to wait.

        :param texts: The texts, for their size.
        """
        is_large = sum(map(len, texts)) > MAX_CHARACTERS_ON_LOOP
        return await self.to_thread(function, *arguments) if is_large else function(*arguments)

    async def try_append(self, statement: str, parameters: Parameters, message_ids: Sequence[str]) -> bool:
        """
        Execute a statement that appends messages, outside of a transaction.

        :param message_ids: The ids of the messages.
        :returns: False if nothing was appended: the history does not exist, or has one of the messages.
        """
        self.appending = message_ids
        try:
            appended = bool((await self.run(statement, parameters, prepare=True)).rowcount)
        except psycopg.errors.UniqueViolation:
            appended = False
        self.appending = ()
        return appended

    async def vacuum(self, statement: str) -> bool:
        """Execute a VACUUM. Return whether the server did it: a role without the right only gets a warning."""
        warnings: list[Any] = []
        self.connection.add_notice_handler(warnings.append)
        try:
            await self.run(statement)
        finally:
            self.connection.remove_notice_handler(warnings.append)
        return not warnings

    async def run_however_long_it_takes(self, statement: str) -> None:
        """
        Execute a statement that takes as long as a table is large. Afterwards, the call has its whole timeout again.

        It must not wait for locks, or limit that by `lock_timeout`.
        """
        deadline, self.connection.deadline = self.connection.deadline, math.inf
        try:
            await self.run(statement)
        except BaseException:
            self.connection.deadline = deadline
            raise
        self.renew_deadline()

    def renew_deadline(self, seconds: float | None = None) -> None:
        """
        Set the deadline as if the call began now.

        :param seconds: The number of seconds until the deadline. Defaults to the timeout of a call.
        """
        self.connection.deadline = time.monotonic() + (self._timeout if seconds is None else seconds)

    async def cancel(self) -> None:
        """Ask the server to cancel the statement that it may still be executing for this connection."""
        if psycopg.capabilities.has_cancel_safe():  # what older libraries have instead could wait for ever
            with suppress(psycopg.Error):
                cancelling = self.connection.cancel_safe(timeout=_CANCEL_SECONDS)
                if self._is_async:
                    await cancelling


def in_transaction(operation: OperationT) -> OperationT:
    """Have an operation run in a transaction of its session: see `Session.in_transaction`."""

    @wraps(operation)
    async def run(engine: Any, session: Session, *arguments: Any, **options: Any) -> Any:
        return await session.in_transaction(partial(operation, engine, **options), *arguments)

    return cast(OperationT, run)
