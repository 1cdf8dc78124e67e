# SPDX-License-Identifier: Apache-2.0
"""How operations on a file run: in the calling thread, or for asynchronous calls in a thread of the file's own."""

import asyncio
import os
import sqlite3
from collections.abc import Callable
from typing import Concatenate

from haystack_chat_store.errors import StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.stores.engine import ArgumentsT, Operation, ResultT, is_marked, plain_result, reads_only
from haystack_chat_store.stores.sqlite import failures
from haystack_chat_store.stores.sqlite.checking import Checking
from haystack_chat_store.stores.sqlite.connections import Database, Settings, databases
from haystack_chat_store.stores.sqlite.directory import Directory
from haystack_chat_store.stores.sqlite.reading import Reading
from haystack_chat_store.stores.sqlite.search import Search
from haystack_chat_store.stores.sqlite.writing import Writing


class SQLiteEngine(Writing, Reading, Directory, Search, Checking):
    """Keeps chat histories in an SQLite file."""

    def __init__(self, settings: Settings) -> None:
        """Open nothing yet."""
        self.settings = settings

    def run(
        self,
        operation: Callable[Concatenate[Database, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation in this thread."""
        return _run_on(databases.get(self.settings), operation, *arguments, **options)

    async def run_async(
        self,
        operation: Callable[Concatenate[Database, ArgumentsT], Operation[ResultT]],
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> ResultT:
        """Run an operation in a thread: sqlite3 can wait for a lock or a disk only by blocking."""
        database = databases.get(self.settings)
        submit = database.submit_read if is_marked(operation, reads_only) else database.submit_write
        try:
            future = submit(_run_on, database, operation, *arguments, **options)
        except RuntimeError as error:
            if "shutdown" in str(error):
                raise StoreUnavailableError("The interpreter is shutting down. Use the synchronous methods.") from error
            raise StoreUnavailableError(
                f"No thread could be started: {error}. Raise the limit of threads, or use the synchronous methods."
            ) from error
        return await asyncio.wrap_future(future)

    def check_exists(self) -> None:
        """
        Check that the file exists.

        :raises StoreConfigurationError: If there is no such file.
        """
        if not os.path.exists(self.settings.path):
            raise StoreConfigurationError(f"There is no file {self.settings.path}.")

    def close(self) -> None:
        """
        Close the file, for every engine with the same settings. Calls that are under way in other threads are finished.
        """
        databases.close(self.settings)


def _run_on(
    database: Database,
    operation: Callable[Concatenate[Database, ArgumentsT], Operation[ResultT]],
    *arguments: ArgumentsT.args,
    **options: ArgumentsT.kwargs,
) -> ResultT:
    try:
        return plain_result(operation(database, *arguments, **options))
    except sqlite3.Error as error:
        # The message about a damaged text quotes it, so it must not appear in a traceback.
        cause = None if failures.is_of_damaged_text(error) else error
        raise failures.explained(error, database.settings.path, database.settings.timeout) from cause
