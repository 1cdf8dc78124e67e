# SPDX-License-Identifier: Apache-2.0
"""
Files that are there whole or not at all, and files that are added to. Neither is ever a database.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

# How every SQLite database begins, and what the names of the files end with that SQLite lays beside it.
_SQLITE_MAGIC = b"SQLite format 3\0"
_BESIDE_DATABASE = ("-wal", "-shm", "-journal")


@contextmanager
def whole_file(path: "str | os.PathLike[str]") -> Iterator[BinaryIO]:
    """
    Open a file for writing that takes its place only when it is complete and on the disk.

    Until then, and if anything is raised, what was there stays. The file can be read by its owner alone.

    :param path: Where the file goes. What is there must be a file. A link stays, and its target is written.
    :raises ValueError: If something else is there, or a database, perhaps that of the store itself.
    :raises OSError: If the file cannot be written.
    """
    target = checked_target(path)
    folder = os.path.dirname(target)
    with _named(path):
        descriptor, temporary = tempfile.mkstemp(prefix=".haystack-chat-store.", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            yield file
            _sync(file)
        with _named(path):
            os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):  # interrupted just after it had taken its place
            os.unlink(temporary)
        raise
    _sync_folder(folder)


@contextmanager
def appended_file(path: "str | os.PathLike[str]") -> Iterator[BinaryIO]:
    """
    Open a file to append to. At the end, it is on the disk. If it is new, it can be read by its owner alone.

    :raises ValueError: As in `whole_file`.
    :raises OSError: If the file cannot be written.
    """
    target = checked_target(path)
    with _named(path):
        file = open(target, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))
    with file:
        yield file
        _sync(file)
    _sync_folder(os.path.dirname(target))


def checked_target(path: "str | os.PathLike[str]") -> str:
    """
    Return where a path leads to, if it is nothing, or a file that may be written.

    :raises ValueError: If something else is there, or a part of a database.
    :raises OSError: If that cannot be told.
    """
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise ValueError(f"{os.fspath(path)} is there already and is not a file.")
    with _named(path):
        if _is_database(target):
            raise ValueError(f"{os.fspath(path)} is an SQLite database, which nothing else may be written to.")
        for ending in _BESIDE_DATABASE:
            if target.endswith(ending) and _is_database(target.removesuffix(ending)):
                raise ValueError(
                    f"{os.fspath(path)} is a part of an SQLite database, which nothing else may be written to."
                )
    return target


def _is_database(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC
    except (FileNotFoundError, IsADirectoryError):
        return False


@contextmanager
def _named(path: "str | os.PathLike[str]") -> Iterator[None]:
    """
    Have errors name the file as the caller has, not another that is only a means to write it.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    if os.name != "posix":  # elsewhere, a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
