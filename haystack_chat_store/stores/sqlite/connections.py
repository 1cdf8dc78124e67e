# SPDX-License-Identifier: Apache-2.0
"""
Connections to one file: opened when needed, lent to one thread at a time, shared by all stores with equal settings.
"""

import gc
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from haystack_chat_store.errors import ChatMessageStoreError, StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.stores.connection_registry import ConnectionRegistry, keep_alive_forever
from haystack_chat_store.stores.sqlite import failures, schema

#: How much of what a call has acknowledged survives a power cut: everything, or everything but the last moments.
Durability = Literal["full", "normal"]

# More idle connections than threads that work at once would only hold file handles.
_MAX_IDLE_CONNECTIONS = 16
_MAX_READERS = 16
# How often a fork checks whether the calls under way are done, and a call whether the fork is.
_POLL_SECONDS = 0.002
# Pause between batches, because SQLite's busy handler polls every 100 ms.
_PAUSE_SECONDS = 0.02
# A fork waits for the calls under way, which may themselves wait for a lock.
_MIN_FORK_WAIT_SECONDS = 60


class Settings(NamedTuple):
    """
    The settings of an engine. Engines with equal settings share their connections.

    :param path: The absolute path of the file.
    :param durability: What survives a power cut.
    :param timeout: How long to wait for a locked database, in seconds.
    :param search: Whether messages are to be indexed.
    """

    path: str
    durability: Durability
    timeout: float
    search: bool


class _Connection(sqlite3.Connection):
    file_identity: tuple[int, int] | None = None
    thread_id: int | None = None
    is_inherited = False


class Database:
    """The connections to one file, and the threads that use them for asynchronous calls."""

    def __init__(self, settings: Settings) -> None:
        """Open nothing yet."""
        self.settings = settings
        self._idle: list[_Connection] = []
        self._lent: weakref.WeakSet[_Connection] = weakref.WeakSet()  # weak: an interrupted call may lose one
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_forking = False
        # Writers of this process wait here, which is faster and fairer than polling the file's lock. Only the thread
        # that holds an RLock can release it: so an interrupted call may try to, whether it got the lock or not.
        self._write_lock = threading.RLock()
        self._readers: ThreadPoolExecutor | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._executors_lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection to the calling thread. Each statement sees the database as of one moment."""
        connection = self._borrow()
        try:
            yield connection
        except BaseException as error:
            is_refusal = isinstance(error, ChatMessageStoreError) and not connection.in_transaction
            self._take_back(connection, is_sound=is_refusal)
            raise
        self._take_back(connection, is_sound=True)

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection whose statements all see the database as of one moment."""
        with self.connection() as connection:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """
        Lend a connection for one write transaction: committed at the end, rolled back if anything is raised.

        :raises StoreTimeoutError: If other threads keep the database busy for longer than the timeout.
        """
        try:
            if not self._write_lock.acquire(timeout=self.settings.timeout):
                raise failures.timed_out(self.settings.path, self.settings.timeout, "other threads of this process")
            with self.connection() as connection:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                except ChatMessageStoreError:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        finally:
            try:
                self._write_lock.release()
            except RuntimeError:  # this thread does not hold it
                pass

    def pause_for_other_writers(self) -> None:
        """Let others write, after one long write and before the next."""
        time.sleep(_PAUSE_SECONDS)

    def submit_read(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> "Future[Any]":
        """Call a function that reads, on one of several threads."""
        with self._executors_lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_MAX_READERS, "haystack-chat-store-reader")
            return self._readers.submit(function, *arguments, **options)

    def submit_write(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> "Future[Any]":
        """
        Call a function that writes, on a thread of its own: writes wait for each other anyway, and no read for them.
        """
        with self._executors_lock:
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "haystack-chat-store-writer")
            try:
                return self._writer.submit(function, *arguments, **options)
            except RuntimeError:  # its thread cannot be started: drop its queue, which has this call already
                self._writer = None
                raise

    def close(self) -> None:
        """Close idle connections now, and each other one when its call ends."""
        with self._lock:
            self._is_closed = True
            self._close_idle()
        with self._executors_lock:
            executors = [executor for executor in (self._readers, self._writer) if executor is not None]
            self._readers = self._writer = None
        for executor in executors:
            executor.shutdown(wait=False)

    def before_fork(self) -> None:
        """
        Close every connection, as soon as the calls under way are done.

        SQLite remembers in the process which locks it holds on a file. A child that inherits this takes no locks on its
        own connections, and loses what it writes (https://www.sqlite.org/howtocorrupt.html, section 2.6).
        """
        self._is_forking = True
        waits_until = time.monotonic() + max(_MIN_FORK_WAIT_SECONDS, 2 * self.settings.timeout)
        if self._lent:
            gc.collect()  # a connection that an interrupted call has lost may be part of a cycle
        while self._is_lent_to_other_threads() and time.monotonic() < waits_until:
            time.sleep(_POLL_SECONDS)
        with self._lock:
            self._close_idle()

    def after_fork_in_parent(self) -> None:
        """Lend connections again."""
        self._is_forking = False

    def after_fork_in_child(self) -> None:
        """Neither use nor close the connections that were still lent, and open no others to their file."""
        for connection in self._lent:
            keep_alive_forever(connection)
            connection.is_inherited = True
            connection.set_authorizer(_deny)  # if this thread forked in the middle of a call, the call fails here
            _locked_by_parent.add(connection.file_identity or _file_identity(self.settings.path))

    def _is_lent_to_other_threads(self) -> bool:
        # A call of the forking thread itself cannot end before the fork.
        return any(connection.thread_id != threading.get_ident() for connection in list(self._lent))

    def _borrow(self) -> _Connection:
        # If the file was deleted or replaced, idle connections still write to the old one.
        identity = _file_identity(self.settings.path)
        while True:
            with self._lock:
                if not self._is_forking:
                    while self._idle and self._idle[-1].file_identity != identity:
                        self._idle.pop().close()
                    connection = self._idle.pop() if self._idle else _connected(self.settings)
                    connection.thread_id = threading.get_ident()
                    self._lent.add(connection)
                    break
            time.sleep(_POLL_SECONDS)
        try:
            if connection.file_identity is None:
                _make_ready(connection, self.settings)
        except BaseException:
            self._take_back(connection, is_sound=False)
            raise
        return connection

    def _take_back(self, connection: _Connection, is_sound: bool) -> None:
        if connection.is_inherited:
            return  # closing it would write to the file of the parent, which still uses it
        with self._lock:
            self._lent.discard(connection)
            if is_sound and not self._is_closed and not self._is_forking and len(self._idle) < _MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
            else:
                connection.close()  # which rolls back what was under way

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


# Files that the parent process was using at the fork. In this process, SQLite's record of their locks is wrong.
_locked_by_parent: set[tuple[int, int] | None] = set()

#: The databases of this process.
databases = ConnectionRegistry(Database)


def readable_rows(connection: sqlite3.Connection, statement: str, values: Sequence[Any] = ()) -> list[Any]:
    """
    Return the rows of a query. In a text that is not UTF-8, the wrong bytes appear as escapes: it hides no other row.
    """
    try:
        return connection.execute(statement, values).fetchall()
    except sqlite3.OperationalError as error:
        if not failures.is_of_damaged_text(error):
            raise
    with damaged_texts_escaped(connection):
        return connection.execute(statement, values).fetchall()


@contextmanager
def damaged_texts_escaped(connection: sqlite3.Connection) -> Iterator[None]:
    """Have a connection escape bytes that are not UTF-8 in the texts that it reads."""
    connection.text_factory = lambda text: text.decode(errors="backslashreplace")
    try:
        yield
    finally:
        connection.text_factory = str


def _connected(settings: Settings) -> _Connection:
    folder = os.path.dirname(settings.path)
    if not os.path.isdir(folder):
        raise StoreConfigurationError(f"The folder {folder} does not exist. Create it, or choose another path.")
    if _locked_by_parent and _file_identity(settings.path) in _locked_by_parent:
        raise StoreUnavailableError(
            f"This process was forked while another thread was using {settings.path}, so SQLite cannot use the file "
            "safely here. Start processes with multiprocessing's 'spawn' method instead."
        )
    return sqlite3.connect(
        settings.path,
        timeout=settings.timeout,
        isolation_level=None,  # transactions begin and end where this package says
        check_same_thread=False,  # one thread at a time has it
        factory=_Connection,
    )


def _make_ready(connection: _Connection, settings: Settings) -> None:
    """Prepare a new connection for its work, and make the tables of a new file."""
    is_current = schema.is_current(connection, settings.path)  # first: a newer database stays untouched
    connection.execute(f"PRAGMA synchronous = {settings.durability}")
    _switch_to_wal(connection, settings.path, time.monotonic() + settings.timeout)
    if not is_current:
        schema.migrate(connection, settings.path)
    connection.file_identity = _file_identity(settings.path)


def _switch_to_wal(connection: sqlite3.Connection, path: str, deadline: float) -> None:
    """Let readers and a writer work side by side. The switch stays in the file."""
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            if connection.execute("PRAGMA journal_mode = wal").fetchone()[0] != "wal":
                raise StoreConfigurationError(f"{path} does not allow SQLite's WAL mode. Is it on a network drive?")
            return
        except sqlite3.OperationalError as error:
            # Here SQLite does not wait for other processes that make the switch at the same time.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _deny(*_: object) -> int:
    return sqlite3.SQLITE_DENY


def _file_identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
