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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple

from haystack_chat_store.errors import (
    ChatMessageStoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    UnsupportedOperationError,
)
from haystack_chat_store.stores.shared import Shared, never_free
from haystack_chat_store.stores.sqlite import schema, terms
from haystack_chat_store.stores.sqlite.texts import is_readable

#: How much of what a call has acknowledged survives a power cut: everything, or everything but the last moments.
Durability = Literal["full", "normal"]

# More idle connections than threads that work at once would only hold file handles.
_MAX_IDLE_CONNECTIONS = 16
_MAX_READERS = 16
# How often a fork looks whether the calls under way are done, and a call whether the fork is.
_POLL_SECONDS = 0.002
# How long to stay away from the file between two long writes: those who wait for it look only every 100 ms.
_GIVE_WAY_SECONDS = 0.02
# A fork waits for the calls under way, which may themselves wait for a lock.
_MIN_FORK_WAIT_SECONDS = 60

# What to do, by what SQLite says.
_ADVICE = {
    "unable to open": "It must be a file that this process may read and write.",
    "not a database": "Choose another path for the chat histories.",
    "readonly": "Give this process write access to the file and its folder.",
    "is full": "Nothing of the failed call was stored. Make room on the disk.",
    "I/O error": "Look at its disk, quota and limits.",
    "malformed": "The file is damaged. Restore it from a backup, or recover what is readable with SQLite's own tools.",
    "no such table": "A table has been deleted. Restore the file from a backup.",
    "no such index": "It has been deleted. `haystack-chat-store doctor --repair` makes it again.",
    "already exists": "Other software has a table of this name in the file. Choose another path.",
}


class Settings(NamedTuple):
    """
    What stores have in common that share their connections.
    """

    path: str
    durability: Durability
    timeout: float
    search: bool


class _Connection(sqlite3.Connection):
    file_identity: tuple[int, int] | None = None


class _Turn:
    """
    Takes what is in a queue for a block, or raises `Empty` after a while.

    As with a lock, and unlike with `acquire(timeout=…)`, there is no moment at which a Ctrl-C could come between taking
    it and the block, or the block and putting it back: both methods are functions in C, and nothing of Python's is
    around them.
    """

    def __init__(self, queue: "SimpleQueue[Any]", timeout: float) -> None:
        self._take = partial(queue.get, True, min(timeout, threading.TIMEOUT_MAX))
        self._put_back = queue.put  # gets the type of an exception, or None: what is in the queue does not matter

    __enter__ = property(attrgetter("_take"))
    __exit__ = property(attrgetter("_put_back"))


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
        self._lent: weakref.WeakSet[_Connection] = weakref.WeakSet()  # weak: an interrupted call may lose one
        self._readers: ThreadPoolExecutor | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._workers_lock = threading.Lock()
        self._is_closed = False
        self._is_forking = False
        self._lock = threading.Lock()
        # Writers of this process queue here instead of polling the file's lock, which is slower and less fair. Whoever
        # takes out what is in it may write, and puts something back.
        self._free_turn: SimpleQueue[Any] = SimpleQueue()
        self._free_turn.put(None)

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """
        Lend a connection to the calling thread. Each statement sees the database as of one moment.
        """
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
        """
        Lend a connection whose statements all see the database as of one moment.
        """
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
        with self.sole_writer() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except ChatMessageStoreError:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextmanager
    def sole_writer(self) -> Iterator[sqlite3.Connection]:
        """
        Lend a connection while no other thread of this process writes.

        :raises StoreTimeoutError: If other threads keep the database busy for longer than the timeout.
        """
        is_waiting = True
        try:
            with _Turn(self._free_turn, self._settings.timeout), self.connection() as connection:
                is_waiting = False
                yield connection
        except Empty:
            if not is_waiting:
                raise
            raise self._timed_out("other threads of this process") from None

    def give_way(self) -> None:
        """
        Let others write, after one long write and before the next.
        """
        time.sleep(_GIVE_WAY_SECONDS)

    def submit_read(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """
        Call a function that reads, on one of several threads.
        """
        with self._workers_lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_MAX_READERS, "haystack-chat-store-reader")
            return self._readers.submit(function, *arguments)

    def submit_write(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """
        Call a function that writes, on a thread of its own: writes wait for each other anyway, and no read for them.
        """
        with self._workers_lock:
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "haystack-chat-store-writer")
            return self._writer.submit(function, *arguments)

    def close(self) -> None:
        """
        Close what is idle now, and what is in use as soon as it is given back.
        """
        with self._lock:
            self._is_closed = True
            while self._idle:
                self._idle.pop().close()
        with self._workers_lock:
            workers = [executor for executor in (self._readers, self._writer) if executor is not None]
            self._readers = self._writer = None
        for executor in workers:
            executor.shutdown(wait=False)

    def before_fork(self) -> None:
        """
        Close every connection, as soon as the calls under way are done.

        SQLite remembers in the process which locks it holds on a file. A child that inherits this takes no locks on its
        own connections, and loses what it writes (https://www.sqlite.org/howtocorrupt.html, section 2.6).
        """
        self._is_forking = True
        waits_until = time.monotonic() + max(_MIN_FORK_WAIT_SECONDS, 2 * self._settings.timeout)
        if self._lent:
            gc.collect()  # a connection that an interrupted call has lost may be part of a cycle
        while self._lent and time.monotonic() < waits_until:
            time.sleep(_POLL_SECONDS)
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def after_fork_in_parent(self) -> None:
        """
        Lend connections again.
        """
        self._is_forking = False

    def after_fork_in_child(self) -> None:
        """
        Neither use nor close what did not come back in time, nor anything else of that file.
        """
        for connection in self._lent:
            never_free(connection)
            _locked_by_parent.add(connection.file_identity or _file_identity(self._settings.path))

    def explained(self, error: sqlite3.Error) -> ChatMessageStoreError:
        """
        Turn an exception of `sqlite3` into one of ours that says what to do.
        """
        text = str(error)
        if "locked" in text:
            return self._timed_out("another process or connection")
        if "no such module" in text:
            return UnsupportedOperationError(
                f"Search needs FTS5, which the SQLite of this Python was built without ({text}). Use another build, or "
                "another file for a store without search."
            )
        advice = next((advice for sign, advice in _ADVICE.items() if sign in text), "")
        return StoreUnavailableError(f"SQLite failed on {self._settings.path}: {text}. {advice}".rstrip())

    def _timed_out(self, holder: str) -> StoreTimeoutError:
        return StoreTimeoutError(
            f"{self._settings.path} stayed locked by {holder} for more than {self._settings.timeout} seconds. "
            "Nothing was changed. "
            "Try again, or give the store a longer timeout."
        )

    def _borrow(self) -> _Connection:
        # A file that was deleted or replaced is not the one that idle connections still write to.
        identity = _file_identity(self._settings.path)
        while True:
            with self._lock:
                if not self._is_forking:
                    while self._idle and self._idle[-1].file_identity != identity:
                        self._idle.pop().close()
                    connection = self._idle.pop() if self._idle else _connected(self._settings)
                    self._lent.add(connection)
                    break
            time.sleep(_POLL_SECONDS)
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


# Files on which SQLite believes in this process that it holds the locks that its parent holds.
_locked_by_parent: set[tuple[int, int] | None] = set()

#: The databases of this process.
databases = Shared(Database)


def _connected(settings: Settings) -> _Connection:
    folder = os.path.dirname(settings.path)
    if not os.path.isdir(folder):
        raise StoreUnavailableError(f"The folder {folder} does not exist. Create it, or choose another path.")
    if _locked_by_parent and _file_identity(settings.path) in _locked_by_parent:
        raise StoreUnavailableError(
            f"This process was forked while another thread was using {settings.path}, so SQLite cannot use the file "
            "safely here. Start processes with multiprocessing's 'spawn' method instead."
        )
    connection = sqlite3.connect(
        settings.path,
        timeout=settings.timeout,
        isolation_level=None,  # transactions begin and end where this package says
        check_same_thread=False,  # one thread at a time has it
        factory=_Connection,
    )
    # With or without search: whoever writes to a database that has an index keeps it. Triggers call the function, which
    # some builds allow only if they are told to trust the schema.
    connection.execute("PRAGMA trusted_schema = ON")
    connection.create_function("chat_message_terms_of", 1, terms.terms_of_content, deterministic=True)
    connection.create_function("has_same_terms", 2, terms.has_same_terms, deterministic=True)
    connection.create_function("is_readable", 1, is_readable, deterministic=True)
    return connection


def _make_ready(connection: _Connection, settings: Settings) -> None:
    """
    Prepare a new connection for its work, and once for each file the tables.
    """
    is_current = schema.is_current(connection, settings.path)  # first: a newer database stays untouched
    connection.execute(f"PRAGMA synchronous = {settings.durability}")
    _switch_to_wal(connection, settings.path, time.monotonic() + settings.timeout)
    if not is_current:
        schema.migrate(connection, settings.path)
    if settings.search:
        schema.make_index(connection)
    connection.file_identity = _file_identity(settings.path)


def _switch_to_wal(connection: sqlite3.Connection, path: str, deadline: float) -> None:
    """
    Let readers and a writer work side by side. The switch stays in the file.
    """
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            if connection.execute("PRAGMA journal_mode = wal").fetchone()[0] != "wal":
                raise StoreUnavailableError(f"{path} does not allow SQLite's WAL mode. Is it on a network drive?")
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
