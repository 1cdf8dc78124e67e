# SPDX-License-Identifier: Apache-2.0
"""
Connections to one file: opened when needed, lent to one thread at a time, shared by all stores with equal settings.
"""

import atexit
import ctypes
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from haystack_chat_store.errors import ChatMessageStoreError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.sqlite import schema

#: How much of what a call has acknowledged survives a power cut: everything, or everything but the last moments.
Durability = Literal["full", "normal"]

# More idle connections than threads that work at once would only hold file handles.
_MAX_IDLE_CONNECTIONS = 16
_MAX_WORKERS = 16


class Settings(NamedTuple):
    """
    What stores have in common that share their connections.
    """

    path: str
    durability: Durability
    timeout: float


class _Connection(sqlite3.Connection):
    file_identity: tuple[int, int] | None = None


class Database:
    """
    The connections to one file, and the threads that use them for asynchronous calls.
    """

    def __init__(self, settings: Settings) -> None:
        """
        Open nothing yet.
        """
        self._settings = settings
        self._idle: list[_Connection] = []
        self._workers: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        # Writers of this process queue here instead of polling the file's lock, which is slower and less fair.
        self._write_lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """
        Lend a connection to the calling thread. Each statement sees the database as of one moment.
        """
        connection = self._borrow()
        try:
            yield connection
        except BaseException:
            _close(connection)  # which rolls back what was under way
            raise
        self._give_back(connection)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """
        Lend a connection for one write transaction: committed at the end, rolled back if anything is raised.

        :raises StoreTimeoutError: If other threads keep the database busy for longer than the timeout.
        """
        if not self._write_lock.acquire(timeout=self._settings.timeout):
            raise self._timed_out("other threads of this process")
        try:
            with self.connection() as connection:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        finally:
            self._write_lock.release()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """
        Call a function on one of the database's threads.
        """
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(_MAX_WORKERS, "haystack-chat-store-sqlite")
            return self._workers.submit(function, *arguments)

    def close(self) -> None:
        """
        Close what is idle now, and what is in use as soon as it is given back.
        """
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            workers, self._workers = self._workers, None
        for connection in idle:
            _close(connection)
        if workers is not None:
            workers.shutdown(wait=False)

    def explained(self, error: sqlite3.Error) -> ChatMessageStoreError:
        """
        Turn an exception of `sqlite3` into one of ours that says what to do.
        """
        path, text = self._settings.path, str(error)
        if "locked" in text:
            return self._timed_out("another process")
        if "unable to open" in text:
            return StoreUnavailableError(
                f"{path} cannot be opened. It must be a file that this process may read and write."
            )
        if "not a database" in text:
            return StoreUnavailableError(f"{path} is not an SQLite database. Choose another path.")
        if "readonly" in text:
            return StoreUnavailableError(f"{path} is read-only. Give this process write access to it and its folder.")
        if "is full" in text:
            return StoreUnavailableError(f"There is no room to write to {path}. Nothing of the failed call was stored.")
        return StoreUnavailableError(f"SQLite failed on {path}: {text}.")

    def _timed_out(self, holder: str) -> StoreTimeoutError:
        path, _, timeout = self._settings
        return StoreTimeoutError(
            f"{path} was kept locked by {holder} for more than {timeout} seconds. Nothing was stored. "
            "Try again, or give the store a longer timeout."
        )

    def _borrow(self) -> _Connection:
        # A file that was deleted or replaced is not the one that idle connections still write to.
        identity = _file_identity(self._settings.path)
        while True:
            with self._lock:
                if not self._idle:
                    break
                connection = self._idle.pop()
            if connection.file_identity == identity:
                return connection
            _close(connection)
        return _opened(self._settings)

    def _give_back(self, connection: _Connection) -> None:
        with self._lock:
            if not self._is_closed and len(self._idle) < _MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        _close(connection)


_databases: dict[Settings, Database] = {}
_connections: set[_Connection] = set()
_registry_lock = threading.Lock()


def shared_database(settings: Settings) -> Database:
    """
    Return the database that all stores with these settings share.
    """
    database = _databases.get(settings)
    if database is None:
        with _registry_lock:
            database = _databases.setdefault(settings, Database(settings))
    return database


def close_database(settings: Settings) -> None:
    """
    Close the database that stores with these settings share. The next use makes a new one.
    """
    with _registry_lock:
        database = _databases.pop(settings, None)
    if database is not None:
        database.close()


def _opened(settings: Settings) -> _Connection:
    folder = os.path.dirname(settings.path)
    if not os.path.isdir(folder):
        raise StoreUnavailableError(f"The folder {folder} does not exist. Create it, or choose another path.")
    connection = sqlite3.connect(
        settings.path,
        timeout=settings.timeout,
        isolation_level=None,  # transactions begin and end where this package says
        check_same_thread=False,  # one thread at a time has it
        factory=_Connection,
    )
    _connections.add(connection)
    try:
        is_current = schema.is_current(connection)  # before anything is written: a newer database stays untouched
        connection.execute(f"PRAGMA synchronous = {settings.durability}")
        _switch_to_wal(connection, time.monotonic() + settings.timeout)
        if not is_current:
            schema.migrate(connection)
    except BaseException:
        _close(connection)
        raise
    connection.file_identity = _file_identity(settings.path)
    return connection


def _switch_to_wal(connection: sqlite3.Connection, deadline: float) -> None:
    """
    Let readers and a writer work side by side. The switch stays in the file.
    """
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode = wal")
            return
        except sqlite3.OperationalError as error:
            # SQLite does not wait here as it does elsewhere when several processes make the switch at once.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _close(connection: _Connection) -> None:
    _connections.discard(connection)
    connection.close()


def _file_identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _leave_all_to_the_parent() -> None:
    """
    Forget, in a forked child, what belongs to the parent.

    A child that merely closed an inherited connection could delete the parent's write-ahead log, so these objects are
    never freed (https://www.sqlite.org/howtocorrupt.html, section 2.6).
    """
    _registry_lock.release()
    for connection in _connections:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    _connections.clear()
    _databases.clear()


@atexit.register
def _close_all() -> None:
    for settings in list(_databases):
        close_database(settings)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_registry_lock.acquire,
        after_in_parent=_registry_lock.release,
        after_in_child=_leave_all_to_the_parent,
    )
