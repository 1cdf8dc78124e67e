# SPDX-License-Identifier: Apache-2.0
"""How operations on PostgreSQL run: each on a connection of its own from a pool, until it ends or its time is up."""

import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, cast

import psycopg

from haystack_chat_store.errors import ChatMessageStoreError
from haystack_chat_store.stores.engine import (
    ArgumentsT,
    Operation,
    ResultT,
    is_marked,
    reads_only,
    result_without_database,
)
from haystack_chat_store.stores.postgres.checking import Checking
from haystack_chat_store.stores.postgres.connections import Pool, Settings, pools
from haystack_chat_store.stores.postgres.directory import Directory
from haystack_chat_store.stores.postgres.failures import is_lost_connection, store_error
from haystack_chat_store.stores.postgres.reading import Reading
from haystack_chat_store.stores.postgres.search import Search
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.upgrading import NoTablesError
from haystack_chat_store.stores.postgres.writing import Writing
from haystack_chat_store.stores.sync_async import run_sync


class PostgresEngine(Writing, Reading, Directory, Search, Checking):
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
        """Run an operation on a synchronous connection, and return its result."""
        deadline = time.monotonic() + self.settings.timeout
        reads = is_marked(operation, reads_only)
        pool = pools.get(self.settings)
        session: Session | None = None
        try:
            try:
                with pool.session(deadline, search=self.search_wanted, reads=reads) as session:
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

    async def execute_async(
        self,
        operation: Callable[Concatenate[Session, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation on a connection of the running event loop, and return its result."""
        deadline = time.monotonic() + self.settings.timeout
        reads = is_marked(operation, reads_only)
        pool = pools.get(self.settings)
        session: Session | None = None
        try:
            try:
                async with pool.session_async(deadline, search=self.search_wanted, reads=reads) as session:
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

    def close(self) -> None:
        """Close the connections, for every engine with the same settings. The next use opens them again."""
        pools.close(self.settings)

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

    If the lost session's commit is known to have succeeded, return its result. Otherwise run the operation again if it
    can be repeated, and raise `cause` if not.

    :param lost: The session whose connection was lost.
    :param cause: The error of the lost connection.
    """
    if lost.commit is not None and await session.was_committed(lost.commit):
        return cast(ResultT, lost.commit.result)
    if not lost.is_repeatable:
        raise cause
    # The second attempt counts what the lost one may have appended or repaired as its own work.
    session.appended_earlier, session.found_earlier = lost.appending, lost.faults
    return await _coroutine(operation(session, *arguments, **options))
