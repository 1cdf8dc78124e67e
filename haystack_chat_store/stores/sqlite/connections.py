# SPDX-License-Identifier: Apache-2.0
"""
Connections to one file: opened when needed, lent to one thread at a time, shared by all stores with equal settings.
"""

import atexit
import gc
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, Literal, NamedTuple

from haystack import logging

from haystack_chat_store.errors import ChatMessageStoreError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.connection_registry import ConnectionRegistry, keep_alive_forever
from haystack_chat_store.stores.sqlite import failures, schema
from haystack_chat_store.stores.sqlite.calls import Threads
from haystack_chat_store.stores.sqlite.files import (
    JOURNAL,
    LOG_INDEX,
    Connection,
    Identity,
    can_be_written,
    check_unchanged,
    connected,
    connected_read_only,
    connected_without_traces,
    content,
    files_at,
    has_content,
    identity,
    keeps_moving,
    leaves_traces_of_reading,
    log_of_moved,
    make_database,
    refuse_log_without_database,
    remove_empty_log,
    write_log_to_database,
)
from haystack_chat_store.stores.sqlite.turns import Turns

logger = logging.getLogger(__name__)

#: How much of what a call has acknowledged survives a power cut: everything, or everything but the last moments.
Durability = Literal["full", "normal"]

# More idle connections than threads that work at once would only hold file handles.
_MAX_IDLE_CONNECTIONS = 16
_MAX_READERS = 16
# How often a fork checks whether the calls under way are done, and a call whether the fork is.
_POLL_SECONDS = 0.002
# So often a call looks for files that are moved meanwhile, however short its timeout.
_MIN_ATTEMPTS = 20
# Pause between batches, because SQLite's busy handler polls every 100 ms.
_PAUSE_SECONDS = 0.02
# A fork waits for the calls under way, which may themselves wait for a lock.
_MIN_FORK_WAIT_SECONDS = 60
# A wait for other threads that was shorter is not counted.
_MIN_WAIT_SECONDS = 0.01


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

    def timed_out(self, holder: str) -> StoreTimeoutError:
        """Return the error of a call that waited in vain for others, such as "other threads of this process"."""
        return failures.timed_out(self.path, self.timeout, holder)


class NoDatabaseError(Exception):
    """There is nothing to read: no file, or nothing in it."""


class Database:
    """
    The connections to one file, and the threads that use them for asynchronous calls.

    Calls that read open connections that cannot change the file. The first call that writes makes it.

    :ivar readers: The threads for asynchronous calls that read.
    :ivar writer: The thread for those that write: writes wait for each other anyway, and no read for them.
    :ivar turns: The writers that share a transaction if they wait for each other.
    """

    def __init__(self, settings: Settings) -> None:
        """Open nothing yet."""
        self.settings = settings
        self._idle_readers: list[Connection] = []
        self._idle_writers: list[Connection] = []
        self._lent: weakref.WeakSet[Connection] = weakref.WeakSet()  # weak: an interrupted call may lose one
        self._lock = threading.RLock()  # a finalizer may run in the middle, and use the store
        self._is_closed = False
        self._forks = 0  # that are under way: threads may fork at once
        # Writers of this process wait here, which is faster and fairer than polling the file's lock. Only the thread
        # that holds an RLock can release it: so an interrupted call may try to, whether it got the lock or not.
        self._write_lock = threading.RLock()
        self._writing_thread: int | None = None  # that has the lock of writers
        self._leaving_lock = threading.RLock()
        self._deadlines = threading.local()
        self.readers = Threads(_MAX_READERS, "haystack-chat-store-reader")
        self.writer = Threads(1, "haystack-chat-store-writer")
        self.turns = Turns(self)

    def begin_call(self, deadline: float) -> None:
        """
        Begin a call in this thread.

        :param deadline: How long the call may wait for locks, as a time of `time.monotonic`. If it writes more than
            once, each further write may wait for the timeout.
        """
        self._deadlines.of_call = deadline

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for reading to the calling thread. Each statement sees the database as of one moment."""
        connection = self._reader()
        try:
            yield connection
            if connection.unchanging is not None:
                check_unchanged(connection, self.settings.path)
        except BaseException as error:
            self._take_back_after(error, connection)
            raise
        self._take_back(connection, is_sound=True)

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for reading whose statements all see the database as of one moment."""
        with self.connection() as connection:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def transaction(
        self, before_commit: Callable[[sqlite3.Connection], None] | None = None
    ) -> Iterator[sqlite3.Connection]:
        """
        Lend a connection for one write transaction: rolled back if anything is raised.

        It is committed at the end, unless the caller has committed it. Then no other thread writes until the end.

        :param before_commit: What to do at the end if nothing was raised.
        :raises StoreTimeoutError: If other threads keep the database busy for longer than the timeout.
        :raises StoreUnavailableError: If this thread is in the middle of another write.
        """
        deadline, thread_id, is_writing = self._deadline(), threading.get_ident(), False
        try:
            if not self._write_lock.acquire(timeout=max(0, deadline - time.monotonic())):
                raise self.settings.timed_out("other threads of this process")
            if self._writing_thread == thread_id:
                raise failures.in_the_middle_of_a_write(self.settings.path)
            is_writing, self._writing_thread = True, thread_id
            connection = self._writer_in_transaction(deadline)
            try:
                try:
                    yield connection
                except ChatMessageStoreError:
                    connection.execute("ROLLBACK")
                    raise
                if before_commit is not None:
                    before_commit(connection)
                if connection.in_transaction:
                    connection.execute("COMMIT")
            except BaseException as error:
                self._take_back_after(error, connection)
                raise
            self._take_back(connection, is_sound=True)
        finally:
            if is_writing:
                self._writing_thread = None
            try:
                self._write_lock.release()
            except RuntimeError:  # this thread does not hold it
                pass

    def pause_for_other_writers(self) -> None:
        """Let others write, after one long write and before the next."""
        time.sleep(_PAUSE_SECONDS)

    def close(self) -> None:
        """Close idle connections now, and each other one when its call ends."""
        with self._lock:
            self._is_closed = True
        self._close_idle()
        self.readers.close()
        self.writer.close()

    def before_fork(self) -> None:
        """
        Close every connection, as soon as the calls under way are done.

        SQLite remembers in the process which locks it holds on a file. A child that inherits this takes no locks on its
        own connections, and loses what it writes (https://www.sqlite.org/howtocorrupt.html, section 2.6).
        """
        with self._lock:
            self._forks += 1
        waits_until = time.monotonic() + max(_MIN_FORK_WAIT_SECONDS, 2 * self.settings.timeout)
        if self._lent:
            gc.collect()  # a connection that an interrupted call has lost may be part of a cycle
        while self._lent_to_others() and time.monotonic() < waits_until:
            time.sleep(_POLL_SECONDS)
        self._close_idle()

    def after_fork_in_parent(self) -> None:
        """Lend connections again, unless another thread is forking."""
        with self._lock:
            self._forks -= 1

    def after_fork_in_child(self) -> None:
        """Neither use nor close the connections that were still lent, and open no others to their file."""
        self.turns.after_fork_in_child()
        for connection in self._lent:
            keep_alive_forever(connection)
            connection.is_inherited = True
            connection.set_authorizer(_deny)  # if this thread forked in the middle of a call, the call fails here
            _locked_by_parent.add(connection.files.database if connection.files else identity(self.settings.path))

    def leave_moved_files(self, deadline: float) -> None:
        """
        Close the idle connections to files that lie no longer at the path: they were moved, replaced or deleted.

        Before that, everything that is in their log is written to their database, wherever that lies now, and the log
        at the path is removed. Nothing that a call has acknowledged is lost with it.

        :param deadline: How long to wait for others that use these files, as a time of `time.monotonic`.
        :raises StoreUnavailableError: If there is a log at the path that belongs to such a database, and it cannot be
            written there now. Nothing was changed.
        """
        path = self.settings.path
        while self._forks:
            time.sleep(_POLL_SECONDS)
        while any(connection.has_log_at(path) for connection in self._lent_to_others()):
            if time.monotonic() > deadline:
                raise log_of_moved(path, "Another thread is still using it. Try again.")
            time.sleep(_POLL_SECONDS)
        with self._leaving_lock:
            for connection in [*self._idle_writers, *self._idle_readers]:
                self._leave_if_moved(connection, deadline)

    def _leave_if_moved(self, connection: Connection, deadline: float) -> None:
        path, idle = self.settings.path, self._idle(connection)
        if connection.is_to_files_at(path):
            return
        with self._lock:
            if connection not in idle:  # it was lent meanwhile, to a call that finds out itself
                return
            idle.remove(connection)
        try:
            if connection.is_writable:
                write_log_to_database(connection, path, deadline)
            elif connection.has_log_at(path):
                raise log_of_moved(path, "Another process has to write it there.")
        except BaseException:
            with self._lock:
                idle.append(connection)
            raise
        connection.close()

    def _idle(self, connection: Connection) -> list[Connection]:
        return self._idle_writers if connection.is_writable else self._idle_readers

    def _deadline(self) -> float:
        """Return until when to wait for a lock: the first time in a call, until the call's deadline."""
        deadline: float | None = getattr(self._deadlines, "of_call", None)
        self._deadlines.of_call = None
        return time.monotonic() + self.settings.timeout if deadline is None else deadline

    def _lent_to_others(self) -> list[Connection]:
        # A call of the forking thread itself cannot end before the fork.
        with self._lock:
            lent = list(self._lent)
        return [connection for connection in lent if connection.thread_id != threading.get_ident()]

    def _reader(self) -> Connection:
        """Lend an idle connection whose files lie at the path, or a new one that can only read."""
        # One that writes comes first: it has the pages that it wrote in memory.
        connection = self._lent_idle(self._idle_writers, self._idle_readers)
        if connection is not None:
            if connection.is_to_files_at(self.settings.path):
                return connection
            self._take_back(connection, is_sound=True)
        for deadline in self._attempts(time.monotonic() + self.settings.timeout):
            self._leave_moved_files(deadline)
            connection = self._new_reader()
            if connection is not None:
                return connection
        raise keeps_moving(self.settings.path)

    def _writer_in_transaction(self, deadline: float) -> Connection:
        """Lend a connection for writing whose files lie at the path, in a transaction: no other process writes now."""
        for _ in self._attempts(deadline):
            connection = self._lent_idle(self._idle_writers)
            if connection is None:
                self._leave_moved_files(deadline)
                connection = self._new_writer()
            if connection is None:
                continue
            try:
                _begin(connection, self.settings, deadline)
                if connection.is_to_files_at(self.settings.path):
                    return connection
                connection.execute("ROLLBACK")
            except BaseException:
                self._take_back(connection, is_sound=False)
                raise
            self._take_back(connection, is_sound=True)
            self._leave_moved_files(deadline)
        raise keeps_moving(self.settings.path)

    def _attempts(self, deadline: float) -> Iterator[float]:
        """Try to find the files in their place: a few times at once, and then, with pauses, until the deadline."""
        yield from repeat(deadline, _MIN_ATTEMPTS)
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            yield deadline

    def _leave_moved_files(self, deadline: float) -> None:
        """Have all stores of this process on this file do so."""
        for database in databases.all():
            if database.settings.path == self.settings.path:
                database.leave_moved_files(deadline)

    def _new_reader(self) -> Connection | None:
        """
        Lend a new connection for reading, or `None` if the file was moved or replaced meanwhile.

        :raises NoDatabaseError: If there is no file, or nothing in it.
        """
        path, timeout = self.settings.path, self.settings.timeout
        if not has_content(path):
            refuse_log_without_database(path)
            raise NoDatabaseError
        before = identity(path)
        connect = connected_without_traces if leaves_traces_of_reading(path) else connected_read_only
        connection = self._lent_new(lambda: connect(path, timeout))
        try:
            try:
                is_empty = schema.is_empty(connection, path)
            except sqlite3.OperationalError as error:
                if "readonly" in str(error) and content(path + JOURNAL).size:
                    raise _interrupted_write(path) from error
                if not _is_of_missing_rights(error) or os.access(os.path.dirname(path), os.W_OK):
                    raise
                self._take_back(connection, is_sound=False)
                connection = self._lent_new(lambda: connected_without_traces(path, timeout))
                is_empty = schema.is_empty(connection, path)
            if is_empty:
                raise NoDatabaseError
            schema.check_current(connection, path)
            connection.execute("PRAGMA trusted_schema = OFF")
            if connection.unchanging is None:
                connection.files = files_at(path)
        except BaseException:
            self._take_back(connection, is_sound=False)
            raise
        if identity(path) != before:
            self._take_back(connection, is_sound=False)
            return None
        return connection

    def _new_writer(self) -> Connection | None:
        """
        Lend a new connection for writing, or `None` if the file was moved or replaced meanwhile.

        If there is no file, it makes one.
        """
        path = self.settings.path
        if not has_content(path) and identity(path) is None:
            remove_empty_log(path)
            make_database(
                path,
                self.settings.timeout,
                self._lent_to_other_file,
                lambda connection: schema.migrate(connection, path),
            )
        before = identity(path)
        if before is None:
            return None
        try:
            return self._writer_to(before)
        except (sqlite3.Error, ChatMessageStoreError):
            if identity(path) == before:
                raise
            return None

    def _writer_to(self, database: Identity) -> Connection | None:
        path = self.settings.path
        if has_content(path):
            if os.access(path, os.R_OK) and not can_be_written(path):
                raise StoreUnavailableError(
                    f"{path} can only be read. Give this process write access to the file and its folder."
                )
            self._check_is_ours(path)
        else:
            refuse_log_without_database(path)
        connection = self._lent_new(lambda: connected(path, self.settings.timeout))
        try:
            schema.is_current(connection, path)  # which opens the log
            if identity(path) == database:  # else the log may be another database's: nothing was written to it
                schema.make_ready(connection, path, self.settings.durability, self.settings.timeout)
                files, index = files_at(path), identity(path + LOG_INDEX)
                if files.database == database and files.log is not None:
                    connection.files, connection.index = files, index
        finally:
            if connection.files is None:
                self._take_back(connection, is_sound=False)
        return None if connection.files is None else connection

    def _check_is_ours(self, path: str) -> None:
        """Refuse another program's file before it is opened for writing, which already may change it."""
        connection = self._lent_new(lambda: connected_read_only(path, self.settings.timeout))
        try:
            schema.is_empty(connection, path)
        except sqlite3.OperationalError as error:
            # To open it for writing then either says the same, or undoes an interrupted write, as any program would.
            if not _is_of_missing_rights(error):
                raise
        finally:
            self._take_back(connection, is_sound=False)

    def _lent_new(self, connect: Callable[[], Connection]) -> Connection:
        path = self.settings.path
        if _locked_by_parent and identity(path) in _locked_by_parent:
            raise StoreUnavailableError(
                f"This process was forked while another thread was using {path}, so SQLite cannot use the file safely "
                "here. Start processes with multiprocessing's 'spawn' method instead."
            )
        while True:
            with self._lock:
                if not self._forks:
                    return self._lent_to_this_thread(connect())
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _lent_to_other_file(self, connect: Callable[[], Connection]) -> Iterator[Connection]:
        """Lend a new connection to another file. A fork waits for it, too: SQLite's files share locks in memory."""
        connection = self._lent_new(connect)
        try:
            yield connection
        finally:
            self._take_back(connection, is_sound=False)

    def _lent_idle(self, *kinds: list[Connection]) -> Connection | None:
        """Lend an idle connection of the first kind that has any, as soon as this process does not fork."""
        while True:
            with self._lock:
                if not self._forks:
                    idle = next(filter(None, kinds), None)
                    return self._lent_to_this_thread(idle.pop()) if idle else None
            time.sleep(_POLL_SECONDS)

    def _lent_to_this_thread(self, connection: Connection) -> Connection:
        connection.thread_id = threading.get_ident()
        self._lent.add(connection)
        return connection

    def _take_back_after(self, error: BaseException, connection: Connection) -> None:
        is_refusal = isinstance(error, ChatMessageStoreError) and not connection.in_transaction
        self._take_back(connection, is_sound=is_refusal)

    def _take_back(self, connection: Connection, is_sound: bool) -> None:
        if connection.is_inherited:
            return  # closing it would write to the file of the parent, which still uses it
        idle = self._idle(connection)
        with self._lock:
            if is_sound and not self._is_closed and not self._forks and len(idle) < _MAX_IDLE_CONNECTIONS:
                self._lent.discard(connection)
                idle.append(connection)
                return
        self._save_log_of_moved(connection)
        with self._lock:  # a fork waits for it: the child of a half-closed connection could take no locks
            self._lent.discard(connection)
            connection.close()  # which rolls back what was under way

    def _close_idle(self) -> None:
        # The connections that write come last: the last one that is closed puts the log into the file and removes it.
        with self._leaving_lock:
            for idle in (self._idle_readers, self._idle_writers):
                while True:
                    with self._lock:
                        if not idle:
                            break
                        connection = idle.pop()
                    self._save_log_of_moved(connection)
                    connection.close()

    def _save_log_of_moved(self, connection: Connection) -> None:
        """Before a connection is closed whose file was moved, write everything that is in its log to its file."""
        path = self.settings.path
        if connection.is_writable and connection.files is not None and not connection.is_to_files_at(path):
            try:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                write_log_to_database(connection, path, time.monotonic() + self.settings.timeout)
            except (sqlite3.Error, ChatMessageStoreError) as error:
                logger.warning(
                    "{path} was moved, replaced or deleted while it was in use. Its log may be left: {error}",
                    path=path,
                    error=error,
                )


# Files that the parent process was using at the fork. In this process, SQLite's record of their locks is wrong.
_locked_by_parent: set[Identity] = set()

#: The databases of this process.
databases = ConnectionRegistry(Database)


@atexit.register
def _finish_calls() -> None:
    """When the interpreter ends, finish the asynchronous calls that have begun, before connections are closed."""
    for database in databases.all():
        database.readers.finish()
        database.writer.finish()


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


def _begin(connection: Connection, settings: Settings, deadline: float) -> None:
    """Begin a write transaction. If there is less time left than the timeout, SQLite waits no longer than that."""
    left = deadline - time.monotonic()
    if left > settings.timeout - _MIN_WAIT_SECONDS:
        connection.execute("BEGIN IMMEDIATE")
        return
    connection.execute(f"PRAGMA busy_timeout = {max(1, round(1000 * left))}")
    try:
        connection.execute("BEGIN IMMEDIATE")
    finally:
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * settings.timeout)}")


def _is_of_missing_rights(error: sqlite3.OperationalError) -> bool:
    return "unable to open" in str(error) or "readonly" in str(error)


def _interrupted_write(path: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"Beside {path} lies the journal of a write that was interrupted ({path}{JOURNAL}). Until it is undone, the "
        "file cannot be read. Any call that writes undoes it first; where nothing can be written, copy both files to "
        "another folder."
    )


def _deny(*_: object) -> int:
    return sqlite3.SQLITE_DENY
