# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and files that are appended to. A database file is never overwritten."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

# The first bytes of every SQLite database, and the endings of the files that SQLite keeps beside it.
_SQLITE_MAGIC = b"SQLite format 3\0"
_COMPANION_ENDINGS = ("-wal", "-shm", "-journal")


@contextmanager
def atomic_file(
    path: "str | os.PathLike[str]", before_replacing: Callable[[], None] = lambda: None
) -> Iterator[BinaryIO]:
    """
    Open a file for writing, and move it to its path only when it is complete and on the disk.

    Until then, and if anything is raised, the old file stays. Only the owner of the new file may read it.

    :param path: The path to write to. If it exists, it must be a file. If it is a link, its target is replaced.
    :param before_replacing: Called when the new file is complete. If it raises an error, the old file stays. Defaults
        to nothing.
    :raises ValueError: If the path is not a file, or is a database, which may be that of the store itself.
    :raises OSError: If the file cannot be written.
    """
    target = checked_target(path)
    folder = os.path.dirname(target)
    with _errors_name(path):
        descriptor, temporary = tempfile.mkstemp(prefix=".haystack-chat-store.", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            yield file
            _sync(file)
        before_replacing()
        with _errors_name(path):
            os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):  # an interrupt may come just after the replacement
            os.unlink(temporary)
        raise
    _sync_folder(folder)


@contextmanager
def appended_file(path: "str | os.PathLike[str]") -> Iterator[BinaryIO]:
    """
    Open a file to append to. At the end of the block, everything is on the disk.

    Only the owner of a new file may read it.

    :param path: The path of the file. It is created if it does not exist.
    :raises ValueError: If the path is not a file, or belongs to a database.
    :raises OSError: If the file cannot be written.
    """
    target = checked_target(path)
    with _errors_name(path):
        file = open(target, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))
    with file:
        yield file
        _sync(file)
    _sync_folder(os.path.dirname(target))


def checked_target(path: "str | os.PathLike[str]") -> str:
    """
    Return the path with all links resolved, if it can be written: it does not exist, or is an ordinary file.

    :raises ValueError: If the path is not a file, or belongs to a database.
    :raises OSError: If the file cannot be examined.
    """
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise ValueError(f"{os.fspath(path)} exists and is not a file. Choose another path.")
    with _errors_name(path):
        if _is_database(target):
            raise ValueError(f"{os.fspath(path)} is an SQLite database and is not overwritten. Choose another path.")
        for ending in _COMPANION_ENDINGS:
            if target.endswith(ending) and _is_database(target.removesuffix(ending)):
                raise ValueError(
                    f"{os.fspath(path)} is a part of an SQLite database and is not overwritten. Choose another path."
                )
    return target


def _is_database(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC
    except (FileNotFoundError, IsADirectoryError):
        return False


@contextmanager
def _errors_name(path: "str | os.PathLike[str]") -> Iterator[None]:
    """Make errors name the path that the caller gave, not the temporary file or the target of a link."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    if os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
