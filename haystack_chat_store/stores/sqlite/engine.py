# SPDX-License-Identifier: Apache-2.0
"""How operations on a file run: in the calling thread, or for asynchronous calls in a thread of the file's own."""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Concatenate, cast

from haystack_chat_store.errors import StoreConfigurationError
from haystack_chat_store.stores.engine import (
    ArgumentsT,
    Operation,
    ResultT,
    is_marked,
    plain_result,
    reads_only,
    result_without_database,
)
from haystack_chat_store.stores.rows import Scope
from haystack_chat_store.stores.sqlite import failures
from haystack_chat_store.stores.sqlite.calls import CallOfTask
from haystack_chat_store.stores.sqlite.checking import Checking
from haystack_chat_store.stores.sqlite.connections import Database, NoDatabaseError, Settings, databases
from haystack_chat_store.stores.sqlite.directory import Directory
from haystack_chat_store.stores.sqlite.files import back_up
from haystack_chat_store.stores.sqlite.reading import Reading
from haystack_chat_store.stores.sqlite.search import Search
from haystack_chat_store.stores.sqlite.turns import MAX_SIZE, WriteSession
from haystack_chat_store.stores.sqlite.writing import Writing

# Operations that may share a transaction with others, beside `append`: each takes only a moment.
_WRITES_THAT_SHARE = frozenset({"create_history", "update_history", "update_message", "renew"})


class SQLiteEngine(Writing, Reading, Directory, Search, Checking):
    """Keeps chat histories in an SQLite file."""

    system_name = "sqlite"
    keeps_users = keeps_previews = keeps_expiry = True

    def __init__(self, settings: Settings) -> None:
        """Open nothing yet."""
        self.settings = settings

    def execute(
        self,
        operation: Callable[Concatenate[Database, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation in this thread, or in that of another writer whose transaction it shares."""
        database, deadline = databases.get(self.settings), self._deadline()
        size = _size_to_share(operation, arguments, options)
        if size is None or threading.get_ident() == threading.main_thread().ident:
            return _run_on(database, deadline, operation, *arguments, **options)
        return cast(ResultT, database.turns.run(partial(_call, operation, arguments, options), deadline, size))

    async def execute_async(
        self,
        operation: Callable[Concatenate[Database, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation in a thread: sqlite3 can wait for a lock or a disk only by blocking."""
        database, deadline = databases.get(self.settings), self._deadline()
        size = _size_to_share(operation, arguments, options)
        if size is not None:
            write = partial(_call, operation, arguments, options)
            return cast(ResultT, await database.turns.run_async(write, deadline, size))
        call = CallOfTask(partial(_run_on, database, deadline, operation, *arguments, **options), deadline)
        threads = database.readers if is_marked(operation, reads_only) else database.writer
        return cast(ResultT, await call.wait(partial(threads.submit, call.make), self.settings.timed_out))

    def check_exists(self) -> None:
        """
        Check that there is a chat store at the path. Creates nothing.

        :raises StoreConfigurationError: If there is no such file, or nothing in it.
        """
        if not os.path.exists(self.settings.path):
            raise StoreConfigurationError(f"There is no file {self.settings.path}.")
        if not _run_on(databases.get(self.settings), self._deadline(), _exists):
            raise StoreConfigurationError(f"{self.settings.path} is empty: it has no chat histories.")

    def backup(self, session: Database, scope: Scope, path: str) -> None:  # noqa: ARG002  (the file holds all namespaces)
        """Copy the file as of one moment with SQLite's backup API. Others can write meanwhile."""
        with session.connection() as connection:
            back_up(connection, path)

    def close(self) -> None:
        """
        Close the file, for every engine with the same settings. Calls that are under way in other threads are finished.
        """
        databases.close(self.settings)

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.timeout


def _size_to_share(operation: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> int | None:
    """Return the number of characters of a write that may share a transaction, or `None` if it may not: it may last."""
    name = operation.__name__
    if name == "append":
        messages = options["messages"] if "messages" in options else arguments[2]
        size = sum([len(message.content) for message in messages])
        return size if size <= MAX_SIZE else None
    return 0 if name in _WRITES_THAT_SHARE else None


def _call(
    operation: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any], session: WriteSession
) -> Any:
    return operation(session, *arguments, **options)


def _exists(session: Database) -> bool:
    try:
        with session.connection():
            return True
    except NoDatabaseError:
        return False


def _run_on(
    database: Database,
    deadline: float,
    operation: Callable[Concatenate[Database, ArgumentsT], Operation[ResultT]],
    *arguments: ArgumentsT.args,
    **options: ArgumentsT.kwargs,
) -> ResultT:
    try:
        database.begin_call(deadline)
        return plain_result(operation(database, *arguments, **options))
    except NoDatabaseError:
        if operation.__name__ == SQLiteEngine.backup.__name__:
            raise StoreConfigurationError(f"There is nothing to back up at {database.settings.path}.") from None
        return cast(ResultT, result_without_database(operation))
    except sqlite3.Error as error:
        cause = failures.cause_of_explained(error)
        raise failures.explained(error, database.settings.path, database.settings.timeout) from cause
