# SPDX-License-Identifier: Apache-2.0
"""
The files of a database: which ones lie at its path now, and which ones a connection has open.

SQLite keeps a log (`-wal`) and an index of the log (`-shm`) beside a database, and finds them by their names. If the
database is moved or replaced while it is in use, the log stays behind. Committed messages may be in it alone, and
SQLite would delete it for a new database of the same name, or take it for a part of another one.
"""

import errno
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from haystack import logging

from haystack_chat_store.errors import ChatMessageStoreError, StoreConfigurationError, StoreUnavailableError

logger = logging.getLogger(__name__)

LOG, LOG_INDEX, JOURNAL = "-wal", "-shm", "-journal"

# The beginning of the names of files that are not complete yet.
_TEMPORARY = ".haystack-chat-store."
_FILE_EXISTS = "There is a file already. Give another path, or remove the file first"
# The number of seconds that a process may take to remove an empty log.
_REMOVAL_SECONDS = 0.5
_POLL_SECONDS = 0.005

#: Device and inode of a file, or `None` if there is no file.
Identity = tuple[int, int] | None


class Files(NamedTuple):
    """The database and its log, as they lie at a path or as a connection has them open."""

    database: Identity
    log: Identity


class Content(NamedTuple):
    """The identity, the size and the last change of a file. They tell whether it has been changed."""

    identity: Identity
    size: int
    changed_at: int


_NOTHING = Content(None, 0, 0)


class Connection(sqlite3.Connection):
    """
    A connection of this package.

    :ivar is_writable: Whether it may change the database.
    :ivar files: What it has open. `None` until that is known, and for a connection to `unchanging` files or to none.
    :ivar is_log_written: Whether everything in its log was written to its database, because that lay no longer at the
        path.
    :ivar unchanging: The contents of a database and its log that nothing in their place can change. The connection is
        of use only as long as they are these.
    :ivar thread_id: The thread that uses it.
    :ivar is_inherited: Whether a parent process opened it.
    """

    is_writable = False
    files: Files | None = None
    index: Identity = None
    is_log_written = False
    unchanging: tuple[Content, Content] | None = None
    copies: "tempfile.TemporaryDirectory[str] | None" = None
    thread_id: int | None = None
    is_inherited = False

    def is_to_files_at(self, path: str) -> bool:
        """Whether the files that it has open still lie at the path. Every call asks."""
        if self.files is None:
            return self.unchanging is not None and self.unchanging == contents_at(path)
        try:
            database, log = os.lstat(path), os.lstat(path + LOG)
        except OSError:
            return self.files == files_at(path)
        return self.files == ((database.st_dev, database.st_ino), (log.st_dev, log.st_ino))

    def has_log_at(self, path: str) -> bool:
        """Whether a log lies at the path that belongs to its database, while its database does not lie there."""
        if self.files is None or self.files.log is None:
            return False
        now = files_at(path)
        return now.log == self.files.log and now.database != self.files.database and content(path + LOG).size > 0

    def close(self) -> None:
        """Close it, and remove the copies that it reads."""
        super().close()
        if self.copies is not None:
            self.copies.cleanup()


def path_of_database(path: str) -> str:
    """
    Return the absolute path of a database, from where the process is now.

    If it is a symbolic link, it leads to the file that it names now: SQLite keeps the log beside that file.
    """
    path = os.path.abspath(path)
    return os.path.realpath(path) if os.path.islink(path) else path


def identity(path: str) -> Identity:
    """
    Return which file lies at a path.

    A symbolic link is no database: SQLite would keep the log beside the file that it names. See `path_of_database`.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def content(path: str) -> Content:
    """Return what lies at a path, and when it was changed."""
    try:
        status = os.lstat(path)
    except OSError:
        return _NOTHING
    return Content((status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns)


def files_at(path: str) -> Files:
    """Return which database and which log lie at a path."""
    return Files(identity(path), identity(path + LOG))


def contents_at(path: str) -> tuple[Content, Content]:
    """Return what tells whether the database at a path, or its log, has been changed."""
    return content(path), content(path + LOG)


def has_content(path: str) -> bool:
    """
    Whether there is a file with anything in it.

    :raises StoreConfigurationError: If its folder does not exist.
    :raises StoreUnavailableError: If it is something else than a file, or has become a symbolic link.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise StoreConfigurationError(
                f"The folder {folder} does not exist. Create it, or choose another path."
            ) from None
        return False
    except OSError as error:
        raise StoreUnavailableError(f"{path} cannot be opened: {error.strerror}.") from error
    if stat.S_ISLNK(status.st_mode):
        raise StoreUnavailableError(
            f"{path} has become a symbolic link since this store was made, so it is not used. Nothing was changed. "
            "Make the store anew (restart the process): it then uses the file that the link names."
        )
    if not stat.S_ISREG(status.st_mode):
        raise StoreUnavailableError(f"{path} cannot be opened. It must be a file that this process may read and write.")
    return status.st_size > 0


def refuse_log_without_database(path: str) -> None:
    """
    Refuse to take the place of a database of which only the log is left: SQLite would delete it.

    A database that is made meanwhile appears before its log. So this looks for it again after it has found a log.

    :raises StoreConfigurationError: If there is a log with content, and still no database.
    """
    if content(path + LOG).size and not has_content(path):
        raise StoreConfigurationError(
            f"There is no database {path}, but {path}{LOG} holds messages of the one that was there. Nothing was "
            f"changed. If the database was moved, move it back beside this file, or move this file along with it (to "
            f"the same name with {LOG} at its end). If it is not needed any more, delete this file."
        )


def connected_read_only(path: str, timeout: float) -> Connection:
    """Connect to a database without the right to change it."""
    return _connected(f"{Path(path).as_uri()}?mode=ro", timeout, uri=True)


def connected(path: str, timeout: float) -> Connection:
    """Connect to a database that is there. Nothing takes its place if it was moved just now."""
    connection = _connected(f"{Path(path).as_uri()}?mode=rw", timeout, uri=True)
    connection.is_writable = True
    return connection


def make_database(
    path: str,
    timeout: float,
    lent: Callable[[Callable[[], Connection]], AbstractContextManager[Connection]],
    prepare: Callable[[Connection], None],
) -> None:
    """
    Make a new database. It appears at the path when it is complete and on the disk, so none that is half made is moved.

    If another process is faster, its database stays.

    :param lent: Lends a new connection, which is closed at the end.
    :param prepare: Makes the tables. A power cut in the middle leaves no trace at the path: nothing need be flushed.
    """
    temporary = os.path.join(os.path.dirname(path), f"{_TEMPORARY}{uuid4().hex}")
    # While this one is made, another one may come to the path, be written to, and be moved. Its log stays there.
    with (
        _os_errors_explained(path),
        suppress(FileExistsError),
        _appearing(temporary, path, lambda: remove_empty_log(path)),
    ):
        with lent(lambda: _connected(temporary, timeout, uri=False)) as connection:
            connection.execute("PRAGMA synchronous = off")
            connection.execute("PRAGMA journal_mode = memory")
            prepare(connection)
            connection.execute("PRAGMA journal_mode = wal")


def remove_empty_log(path: str) -> None:
    """
    Remove the log that was left of a database that is not there, if it is empty, and its index.

    A process that finds its database moved removes both itself, and has a moment to do so. No database is made beside
    them: its messages would go to the log that this process takes for its own.

    :raises StoreConfigurationError: If the log has content.
    """
    waits_until = time.monotonic() + _REMOVAL_SECONDS
    while identity(path) is None and (identity(path + LOG) or identity(path + LOG_INDEX)):
        if time.monotonic() > waits_until:
            refuse_log_without_database(path)
            if identity(path) is None:
                for ending in (LOG_INDEX, LOG):
                    with _os_errors_explained(path), suppress(FileNotFoundError):
                        os.remove(path + ending)
        time.sleep(_POLL_SECONDS)


def write_log_to_database(connection: Connection, path: str, deadline: float) -> None:
    """
    Write everything in the log of a database that lies no longer at the path to it, and remove the log.

    :raises StoreUnavailableError: If others use the log for too long, or it cannot be removed. Nothing was lost.
    """
    was_written = connection.is_log_written
    try:
        while connection.execute("PRAGMA wal_checkpoint (TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                raise log_of_moved(path, "Another process is still reading it. Try again.")
        # From now on, each process that has this database open finds out before it writes. If there is anything in the
        # log all the same, it is of a database that was put at the path meanwhile, or moved back there: it stays.
        connection.is_log_written = True
        connection.execute("BEGIN IMMEDIATE")  # no process writes to the log while it is removed
    except sqlite3.OperationalError as error:
        # The log was written to the database by an earlier call, which could not remove it. Then this process wrote to
        # the database where it lies now, with a log there. All connections of a process to a file share the index of
        # their log in memory, so this one looks in its own log for what is in the other one. (But if the database was
        # moved back, others may be writing to the log.)
        if not was_written or "I/O error" not in str(error) or content(path + LOG).size:
            raise
    try:
        log = content(path + LOG)
        is_own = connection.files is not None and log.identity == connection.files.log
        if log.identity is None or (is_own and log.size == 0):
            # The log goes last: while it is there, no new database is made at the path, which could find the index.
            with _os_errors_explained(path):
                if connection.index is not None and identity(path + LOG_INDEX) == connection.index:
                    os.remove(path + LOG_INDEX)
                if is_own and log.identity is not None:
                    os.remove(path + LOG)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    logger.warning(
        "{path} was moved, replaced or deleted while it was in use. All messages up to then are in the file that was "
        "there.",
        path=path,
    )


def keeps_moving(path: str) -> StoreUnavailableError:
    """Return the error of a call that found another file at the path, or none, whenever it looked."""
    return StoreUnavailableError(
        f"{path} was moved or replaced again and again while it was opened, or its log is not where it must be: at "
        f"{path}{LOG}. Nothing was changed. Look at what else uses this path."
    )


def log_of_moved(path: str, then: str) -> StoreUnavailableError:
    """Return the error that tells of a log that cannot be written to its database now."""
    return StoreUnavailableError(
        f"{path} was moved or replaced while it was in use, and {path}{LOG} still holds messages of the file that was "
        f"there before. Nothing was changed. {then}"
    )


def can_be_written(path: str) -> bool:
    """Whether this process may write to a database, and to the files beside it or make them."""
    has_files = identity(path + LOG) is not None and identity(path + LOG_INDEX) is not None
    return os.access(path, os.W_OK) and (has_files or os.access(os.path.dirname(path), os.W_OK))


def leaves_traces_of_reading(path: str) -> bool:
    """
    Whether SQLite would create a log when this process reads the database, which it may not write.

    The log would belong to this process' user, and those who may write to the database could not write to the log.
    """
    return not os.access(path, os.W_OK) and identity(path + LOG_INDEX) is None


def connected_without_traces(path: str, timeout: float) -> Connection:
    """
    Connect to a database beside which nothing can be created, or should be.

    Without a log, SQLite reads the file as it is. With a log it would leave the log out, and with it the messages that
    were stored last. So it reads copies of both.

    :raises StoreUnavailableError: If there is a log, and no room for copies.
    """
    before = contents_at(path)
    if before[1].size == 0:
        connection = _connected(f"{Path(path).as_uri()}?mode=ro&immutable=1", timeout, uri=True)
    else:
        connection = _connected_to_copies(path, timeout)
    connection.unchanging = before
    return connection


def check_unchanged(connection: Connection, path: str) -> None:
    """
    Check that a database that was read without locks was not changed meanwhile.

    :raises StoreUnavailableError: If it was.
    """
    if connection.unchanging is not None and connection.copies is None and not connection.is_to_files_at(path):
        raise StoreUnavailableError(f"{path} was changed while it was read. Try again.")


def back_up(source: sqlite3.Connection, path: str) -> None:
    """
    Copy a database as of one moment to a new file. Other connections can write to the database meanwhile.

    The file appears when it is complete and on the disk. It needs no log: it can be read where nothing can be written.

    :raises FileExistsError: If there is something at the path.
    :raises OSError: If the file cannot be written.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, _FILE_EXISTS, path)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=os.path.dirname(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    os.close(descriptor)
    try:
        with _appearing(temporary, path), closing(_connected(temporary, 0, uri=False)) as target:
            target.execute("PRAGMA synchronous = off")
            source.backup(target)
            target.execute("PRAGMA journal_mode = delete")
    except sqlite3.Error as error:
        raise StoreUnavailableError(f"The backup to {path} failed: {error}.") from error


@contextmanager
def _appearing(temporary: str, path: str, check: Callable[[], None] | None = None) -> Iterator[None]:
    """
    Have a file that is made under another name appear at a path when it is complete and on the disk.

    :param check: Called just before. If it raises an error, the file does not appear. Defaults to no check.
    :raises FileExistsError: If there is something at the path then.
    """
    try:
        yield
        _sync(temporary)
        if check is not None:
            check()
        _move_where_nothing_is(temporary, path)
    finally:
        for ending in ("", LOG, LOG_INDEX, JOURNAL):
            with suppress(FileNotFoundError):
                os.unlink(temporary + ending)
    if os.name == "posix":  # Windows cannot open a folder
        _sync(os.path.dirname(path))


@contextmanager
def _os_errors_explained(path: str) -> Iterator[None]:
    """Turn what the system says of the files of a database into this package's exception."""
    try:
        yield
    except ChatMessageStoreError:  # some are an OSError, too
        raise
    except OSError as error:
        raise StoreUnavailableError(
            f"The files of {path} could not be written or removed: {error.strerror or error}. Look at its disk, its "
            "folder and their rights. Then try again."
        ) from error


def _move_where_nothing_is(source: str, target: str) -> None:
    try:
        os.link(source, target)  # which, unlike os.rename, replaces nothing
    except OSError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, _FILE_EXISTS, target) from None
        os.rename(source, target)  # the file system has no links


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connected_to_copies(path: str, timeout: float) -> Connection:
    try:
        copies = tempfile.TemporaryDirectory(prefix="haystack-chat-store-")
        copy = os.path.join(copies.name, "copy.db")
        for ending in ("", LOG):
            shutil.copyfile(path + ending, copy + ending)
    except OSError as error:
        raise StoreUnavailableError(
            f"{path} lies where nothing can be written, beside a log ({path}{LOG}), and they could not be copied to be "
            f"read: {error.strerror}. Copy both files to a folder that this process may write to, and read them there."
        ) from error
    connection = connected_read_only(copy, timeout)
    connection.copies = copies
    return connection


def _connected(place: str, timeout: float, *, uri: bool) -> Connection:
    return sqlite3.connect(
        place,
        uri=uri,
        timeout=timeout,
        isolation_level=None,  # transactions begin and end where this package says
        check_same_thread=False,  # one thread at a time has it
        factory=Connection,
    )
