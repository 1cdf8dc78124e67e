# SPDX-License-Identifier: Apache-2.0
"""A set of ids that needs little memory, however many there are."""

import sqlite3

from typing_extensions import Self

_MAX_IN_MEMORY = 10_000


class SeenIds:
    """A set of ids that moves to a private temporary file when it grows large. SQLite removes the file on `close`."""

    def __init__(self) -> None:
        """Make an empty set."""
        self._in_memory: set[str] = set()
        self._on_disk: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_disk is not None:
            self._on_disk.close()

    def add(self, new: str) -> bool:
        """Add an id. Return False if the set has it already."""
        if new in self._in_memory:
            return False
        if self._on_disk is not None and self._on_disk.execute("SELECT 1 FROM ids WHERE id = ?", (new,)).fetchone():
            return False
        self._in_memory.add(new)
        if len(self._in_memory) >= _MAX_IN_MEMORY:
            self._move_to_disk()
        return True

    def _move_to_disk(self) -> None:
        if self._on_disk is None:
            # Engines may use any thread, but never two at the same time.
            self._on_disk = sqlite3.connect("", check_same_thread=False, isolation_level=None)
            self._on_disk.execute("PRAGMA journal_mode = OFF")
            self._on_disk.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._on_disk.execute("BEGIN")
        self._on_disk.executemany("INSERT INTO ids VALUES (?)", ((each,) for each in sorted(self._in_memory)))
        self._on_disk.execute("COMMIT")
        self._in_memory.clear()
