# SPDX-License-Identifier: Apache-2.0
"""
Connections to one file: opened when needed, lent to one thread at a time, shared by all stores with equal settings.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from haystack_chat_store.errors import ChatMessageStoreError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.shared import Shared, never_free
from haystack_chat_store.stores.sqlite import schema

#: How much of what a call has acknowledged survives a power cut: everything, or everything but the last moments.
Durability = Literal["full", "normal"]

# More idle connections than threads that work at once would only hold file handles.
_MAX_IDLE_CONNECTIONS = 16
_MAX_WORKERS = 16

# What to do, by what SQLite says.
_ADVICE = {
    "unable to open": "It must be a file that this process may read and write.",
    "not a database": "Choose another path for the chat histories.",
    "readonly": "Give this process write access to the file and its folder.",
    "is full": "Nothing of the failed call was stored. Make room on the disk.",
    "I/O error": "Look at its disk, quota and limits.",
}


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
        self._lent: set[_Connection] = set()
        self._workers: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._is_forking = False
        self._lock = threading.Condition()
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
            self._take_back(connection, is_sound=False)
            raise
        self._take_back(connection, is_sound=True)

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
            connection.close()
        if workers is not None:
            workers.shutdown(wait=False)

    def before_fork(self) -> None:
        """
        Close every connection, when the calls under way are done: each waits for a lock no longer than the timeout.

        SQLite remembers in the process which locks it holds on a file. A child that inherits this takes no locks on its
        own connections, and loses what it writes (https://www.sqlite.org/howtocorrupt.html, section 2.6).
        """
        with self._lock:
            self._is_forking = True
            self._lock.wait_for(lambda: not self._lent, 2 * self._settings.timeout)
            while self._idle:
                self._idle.pop().close()

    def after_fork_in_parent(self) -> None:
        """
        Lend connections again.
        """
        with self._lock:
            self._is_forking = False
            self._lock.notify_all()

    def after_fork_in_child(self) -> None:
        """
        Neither use nor close what did not come back in time.
        """
        for connection in self._lent:
            never_free(connection)

    def explained(self, error: sqlite3.Error) -> ChatMessageStoreError:
        """
        Turn an exception of `sqlite3` into one of ours that says what to do.
        """
        text = str(error)
        if "locked" in text:
            return self._timed_out("another process or connection")
        advice = next((advice for sign, advice in _ADVICE.items() if sign in text), "")
        return StoreUnavailableError(f"SQLite failed on {self._settings.path}: {text}. {advice}".rstrip())

    def _timed_out(self, holder: str) -> StoreTimeoutError:
        path, _, timeout = self._settings
        return StoreTimeoutError(
            f"{path} stayed locked by {holder} for more than {timeout} seconds. Nothing was stored. "
            "Try again, or give the store a longer timeout."
        )

    def _borrow(self) -> _Connection:
        # A file that was deleted or replaced is not the one that idle connections still write to.
        identity = _file_identity(self._settings.path)
        with self._lock:
            self._lock.wait_for(lambda: not self._is_forking)
            while self._idle and self._idle[-1].file_identity != identity:
                self._idle.pop().close()
            connection = self._idle.pop() if self._idle else _connected(self._settings)
            self._lent.add(connection)
        try:
            if connection.file_identity is None:
                _make_ready(connection, self._settings)
        except BaseException:
            self._take_back(connection, is_sound=False)
            raise
        return connection

    def _take_back(self, connection: _Connection, is_sound: bool) -> None:
        with self._lock:
            self._lent.discard(connection)
            if is_sound and not self._is_closed and not self._is_forking and len(self._idle) < _MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
            else:
                connection.close()  # which rolls back what was under way
            if self._is_forking:
                self._lock.notify_all()


#: The databases of this process.
databases = Shared(Database)


def _connected(settings: Settings) -> _Connection:
    folder = os.path.dirname(settings.path)
    if not os.path.isdir(folder):
        raise StoreUnavailableError(f"The folder {folder} does not exist. Create it, or choose another path.")
    return sqlite3.connect(
        settings.path,
        timeout=settings.timeout,
        isolation_level=None,  # transactions begin and end where this package says
        check_same_thread=False,  # one thread at a time has it
        factory=_Connection,
    )


def _make_ready(connection: _Connection, settings: Settings) -> None:
    """
    Prepare a new connection for its work, and once for each file the tables.
    """
    is_current = schema.is_current(connection, settings.path)  # first: a newer database stays untouched
    connection.execute(f"PRAGMA synchronous = {settings.durability}")
    _switch_to_wal(connection, time.monotonic() + settings.timeout)
    if not is_current:
        schema.migrate(connection, settings.path)
    connection.file_identity = _file_identity(settings.path)


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


def _file_identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
