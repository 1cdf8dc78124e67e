# SPDX-License-Identifier: Apache-2.0
"""How operations on PostgreSQL run: each on a connection of its own from a pool, until it ends or its time is up."""

import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from functools import partial
from typing import Any, Concatenate, cast

import psycopg
from haystack import logging
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import ChatMessageStoreError, StoreTimeoutError
from haystack_chat_store.stores.engine import (
    ArgumentsT,
    Operation,
    ResultT,
    is_marked,
    reads_only,
    result_without_database,
)
from haystack_chat_store.stores.postgres.appending import append_together
from haystack_chat_store.stores.postgres.checking import Checking
from haystack_chat_store.stores.postgres.connections import Pool, Settings, pools
from haystack_chat_store.stores.postgres.directory import Directory
from haystack_chat_store.stores.postgres.erasing import Erasing
from haystack_chat_store.stores.postgres.failures import is_lost_connection, store_error
from haystack_chat_store.stores.postgres.reading import Reading
from haystack_chat_store.stores.postgres.search import Search
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.turns import (
    MAX_CHARACTERS,
    Append,
    AppendOfTask,
    AppendOfThread,
    Turns,
    size_of,
)
from haystack_chat_store.stores.postgres.upgrading import NoTablesError
from haystack_chat_store.stores.postgres.writing import Writing
from haystack_chat_store.stores.sync_async import run_sync

logger = logging.getLogger(__name__)


class PostgresEngine(Writing, Reading, Directory, Erasing, Search, Checking):
    """Keeps chat histories in the tables of a PostgreSQL database."""

    system_name = "postgresql"
    keeps_users = keeps_previews = keeps_expiry = True

    def __init__(self, settings: Settings, *, search: bool) -> None:
        """
        Keep the settings. Nothing connects yet.

        :param settings: The connection settings. Engines with equal settings share connections.
        :param search: Whether to turn search on in the database, if it is off.
        """
        self.settings = settings
        self.search_wanted = search

    def execute(
        self,
        operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation on a synchronous connection, or in the statement of another thread that appends."""
        pool, deadline = pools.get(self.settings), self._deadline()
        history = self._shared_history(operation, arguments)
        if history is None or threading.get_ident() == threading.main_thread().ident:
            return self._attempt(pool, deadline, (), operation, *arguments, **options)
        if pool.turns.begin(history):
            try:
                return self._attempt(pool, deadline, (), operation, *arguments, **options)
            finally:
                pool.turns.end(history)

        async def attempt(*arguments: Any) -> Any:
            return self._attempt(pool, deadline, *arguments)

        append = AppendOfThread(cast(Any, arguments[2]))
        appending = self._append_in_turn(pool, pool.turns, history, append, deadline, attempt, operation, arguments)
        return cast(ResultT, run_sync(appending))

    async def execute_async(
        self,
        operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation on a connection of the running event loop, or in the statement of another of its tasks."""
        pool, deadline = pools.get(self.settings), self._deadline()
        history = self._shared_history(operation, arguments)
        if history is None:
            return await self._attempt_async(pool, deadline, (), operation, *arguments, **options)
        turns = pool.turns_of_running_loop()
        if turns.begin(history):
            try:
                return await self._attempt_async(pool, deadline, (), operation, *arguments, **options)
            finally:
                turns.end(history)
        append, attempt = AppendOfTask(cast(Any, arguments[2])), partial(self._attempt_async, pool, deadline)
        appending = self._append_in_turn(pool, turns, history, append, deadline, attempt, operation, arguments)
        return cast(ResultT, await appending)

    def close(self) -> None:
        """Close the connections, for every engine with the same settings. The next use opens them again."""
        pools.close(self.settings)

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.timeout

    def _shared_history(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> Hashable:
        """Return what an append has in common with those that it may go with, or `None` if it goes alone."""
        if operation.__name__ != "append" or arguments[3:] != (DuplicatePolicy.SKIP, None):
            return None
        scope, chat_history_id, messages, *_ = arguments
        return (self.search_wanted, scope, chat_history_id) if size_of(messages) <= MAX_CHARACTERS else None

    def _attempt(
        self,
        pool: Pool,
        deadline: float,
        sent_earlier: Sequence[str],
        operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """
        Run an operation on a synchronous connection, with which it never waits for an event loop.

        :param sent_earlier: The ids of messages that an earlier attempt may have appended.
        """
        reads = is_marked(operation, reads_only)
        session: Session | None = None
        try:
            try:
                with pool.session(deadline, search=self.search_wanted, reads=reads) as session:
                    session.appended_earlier = sent_earlier
                    return run_sync(_coroutine(operation(session, *arguments, **options)))
            except psycopg.OperationalError as error:
                if session is None or not is_lost_connection(error):
                    raise
                lost, cause = session, error
            with pool.session(deadline, search=self.search_wanted, reads=reads) as session:
                return run_sync(_repeat(lost, cause, session, operation, *arguments, **options))
        except NoTablesError:
            return cast(ResultT, result_without_database(operation))
        except psycopg.Error as error:
            raise self._explained(error, pool) from error

    async def _attempt_async(
        self,
        pool: Pool,
        deadline: float,
        sent_earlier: Sequence[str],
        operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Do what `_attempt` does, on a connection of the running event loop."""
        reads = is_marked(operation, reads_only)
        session: Session | None = None
        try:
            try:
                async with pool.session_async(deadline, search=self.search_wanted, reads=reads) as session:
                    session.appended_earlier = sent_earlier
                    return await _coroutine(operation(session, *arguments, **options))
            except psycopg.OperationalError as error:
                if session is None or not is_lost_connection(error):
                    raise
                lost, cause = session, error
            async with pool.session_async(deadline, search=self.search_wanted, reads=reads) as session:
                return await _repeat(lost, cause, session, operation, *arguments, **options)
        except NoTablesError:
            return cast(ResultT, result_without_database(operation))
        except psycopg.Error as error:
            raise self._explained(error, pool) from error

    async def _append_in_turn(
        self,
        pool: Pool,
        turns: Turns,
        history: Hashable,
        append: Append,
        deadline: float,
        attempt: Callable[..., Awaitable[Any]],
        operation: Callable[..., Any],
        arguments: Sequence[Any],
    ) -> int:
        """
        Append after another one, in one statement with others that wait for the same history.

        :param attempt: `_attempt` or `_attempt_async`, with the pool and the deadline.
        """
        scope, chat_history_id, *_ = arguments

        async def make_alone(append: Append) -> int:
            return int(await attempt(append.sent, operation, *arguments))

        async def make_together(appends: Sequence[Append]) -> None:
            try:
                await attempt((), append_together, scope, chat_history_id, appends)
            except StoreTimeoutError:
                raise
            except Exception as error:  # perhaps because of one of them: each is made alone, and hears of its own
                logger.info("Appending one by one after {error}.", error=type(error).__name__)

        try:
            return await turns.run(history, append, deadline, make_alone, make_together)
        except psycopg.errors.ConnectionTimeout as error:
            raise self._explained(error, pool) from error

    def _explained(self, error: psycopg.Error, pool: Pool) -> ChatMessageStoreError:
        if isinstance(error, (psycopg.errors.UndefinedTable, psycopg.errors.ReadOnlySqlTransaction)):
            # The tables were dropped, or this server is no longer the primary: the next call connects anew.
            pools.close(self.settings)
        address, password = pool.address_and_password()
        return store_error(error, address, password, self.settings.timeout)


def _coroutine(result: Operation[ResultT]) -> Coroutine[Any, Any, ResultT]:
    """Return what an operation returned, as a coroutine: all operations of this engine are coroutine functions."""
    return cast(Coroutine[Any, Any, ResultT], result)


async def _repeat(
    lost: Session,
    cause: psycopg.Error,
    session: Session,
    operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
    *arguments: ArgumentsT.args,
    **options: ArgumentsT.kwargs,
) -> ResultT:
    """
    Finish an operation whose connection was lost.

    If the lost session's commit is known to have succeeded, return its result. If not, run an append again, which looks
    for its messages, and other operations if the commit is known to have failed and they can be repeated. Otherwise
    raise `cause`.

    :param lost: The session whose connection was lost.
    :param cause: The error of the lost connection.
    """
    is_committed = await session.was_committed(lost)
    if lost.commit is not None and is_committed:
        return cast(ResultT, lost.commit.result)
    # A server that took over from another one may say that a transaction failed which it got as a copy.
    appended = (lost.commit.appended if lost.commit else ()) or lost.appending or lost.appended_earlier
    if is_committed is None and not appended:
        raise cause
    if not lost.is_repeatable:
        raise cause
    # The second attempt counts what earlier ones may have appended or repaired as its own work.
    session.appended_earlier, session.found_earlier = appended, lost.faults
    return await _coroutine(operation(session, *arguments, **options))
