# SPDX-License-Identifier: Apache-2.0
"""
Which ids have been met, in memory that does not grow with their number.
"""

import sqlite3

from typing_extensions import Self

# So many are held in memory.
_MOST_IN_MEMORY = 10_000


class SeenIds:
    """
    A set of ids that lies on the disk once they are many, in a file that nobody else sees and that leaves nothing.
    """

    def __init__(self) -> None:
        """
        Begin without any.
        """
        self._few: set[str] = set()
        self._many: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._many is not None:
            self._many.close()

    def add(self, new: str) -> bool:
        """
        Add an id, and return whether it was not there.
        """
        if new in self._few:
            return False
        if self._many is not None and self._many.execute("SELECT 1 FROM ids WHERE id = ?", (new,)).fetchone():
            return False
        self._few.add(new)
        if len(self._few) >= _MOST_IN_MEMORY:
            self._move_to_disk()
        return True

    def _move_to_disk(self) -> None:
        if self._many is None:
            # Engines read on any thread, but one after the other.
            self._many = sqlite3.connect("", check_same_thread=False, isolation_level=None)
            self._many.execute("PRAGMA journal_mode = OFF")
            self._many.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._many.execute("BEGIN")
        self._many.executemany("INSERT INTO ids VALUES (?)", ((each,) for each in sorted(self._few)))
        self._many.execute("COMMIT")
        self._few.clear()
