# SPDX-License-Identifier: Apache-2.0
"""
The least that an engine can cost: its driver, a plain table, rows that were encoded beforehand and are not decoded.
"""

import sqlite3
from pathlib import Path

_CREATE = """
    CREATE TABLE messages (history TEXT, position INTEGER, content TEXT, PRIMARY KEY (history, position))
"""
_INSERT = "INSERT INTO messages VALUES (?, ?, ?)"
_LAST = "SELECT content FROM messages WHERE history = ? ORDER BY position DESC LIMIT ?"
_DELETE = "DELETE FROM messages WHERE history = ?"


class SQLiteFloor:
    """
    Raw `sqlite3` in WAL mode: one transaction a write, statements prepared once (the module caches them).

    It is called as a store is, but takes texts in place of messages. It knows where each history ends without asking.
    """

    def __init__(self, path: Path, synchronous: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute(f"PRAGMA synchronous = {synchronous}")
        self._connection.execute(_CREATE)
        self._next_positions: dict[str, int] = {}

    def write_messages(self, chat_history_id: str, texts: list[str]) -> int:
        position = self._next_positions.get(chat_history_id, 0)
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        self._connection.executemany(
            _INSERT, [(chat_history_id, row, text) for row, text in enumerate(texts, position)]
        )
        execute("COMMIT")
        self._next_positions[chat_history_id] = position + len(texts)
        return len(texts)

    def retrieve_messages(self, chat_history_id: str, last_k: int) -> list[tuple[str]]:
        # Every round here is one question and one answer.
        return self._connection.execute(_LAST, (chat_history_id, 2 * last_k)).fetchall()

    def delete_messages(self, chat_history_id: str) -> None:
        self._connection.execute(_DELETE, (chat_history_id,))
        self._next_positions.pop(chat_history_id, None)

    def close(self) -> None:
        self._connection.close()
