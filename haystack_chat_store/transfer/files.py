# SPDX-License-Identifier: Apache-2.0
"""
Files that are there whole or not at all.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

# How every SQLite database begins.
_SQLITE_MAGIC = b"SQLite format 3\0"


@contextmanager
def whole_file(path: "str | os.PathLike[str]") -> Iterator[BinaryIO]:
    """
    Open a file for writing that takes its place only when it is complete and on the disk.

    Until then, and if anything is raised, what was there stays. The file can be read by its owner alone.

    :param path: Where the file goes. What is there must be a file. A link stays, and its target is written.
    :raises ValueError: If something else is there, or a database, perhaps that of the store itself.
    :raises OSError: If the file cannot be written.
    """
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise ValueError(f"{os.fspath(path)} is there already and is not a file.")
    if _is_database(target):
        raise ValueError(f"{os.fspath(path)} is an SQLite database, which an export must not replace.")
    folder = os.path.dirname(target)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(target)[:100]}.", dir=folder)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):  # interrupted just after it had taken its place
            os.unlink(temporary)
        raise
    if os.name == "posix":  # elsewhere, a folder cannot be opened
        _sync_folder(folder)


def _is_database(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC
    except FileNotFoundError:
        return False


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
