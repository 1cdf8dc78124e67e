# SPDX-License-Identifier: Apache-2.0
import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any

from haystack.dataclasses import ChatRole

from haystack_chat_store.errors import MessageDecodingError, StoreUnavailableError
from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.stores.base import BaseChatMessageStore, contents_and_size
from haystack_chat_store.stores.operations import EncodedMessage
from haystack_chat_store.stores.sqlite.database import (
    Database,
    Durability,
    Settings,
    databases,
)

# A message's key is its history's key times 2**32 plus its position. So all messages of a history lie side by side in
# the table's own tree, in order, and the newest is one look-up away.
_POSITION_BITS = 32

_HISTORY = """
    SELECT history_key, next_position FROM chat_histories WHERE namespace = ? AND chat_history_id = ?
"""
_INSERT_HISTORY = """
    INSERT INTO chat_histories
        (namespace, chat_history_id, next_position, message_count, round_count, created_at, updated_at)
    VALUES (?, ?, 0, 0, 0, ?, ?)
"""
_UPDATE_HISTORY = """
    UPDATE chat_histories SET next_position = next_position + ?1, message_count = message_count + ?1,
        round_count = round_count + ?2, updated_at = ?3
    WHERE history_key = ?4
"""
_HAS_MESSAGE = "SELECT 1 FROM chat_messages WHERE message_key >> 32 = ? AND message_id = ?"
_INSERT_MESSAGE = """
    INSERT INTO chat_messages (message_key, message_id, role, created_at, content) VALUES (?, ?, ?, ?, ?)
"""
_COUNT = "SELECT message_count FROM chat_histories WHERE namespace = ? AND chat_history_id = ?"

# A read is one statement, so that history and messages are seen as of one moment. {size} is the window's size, {start}
# its first key.
_READ = """
    WITH history (first_key, last_key, size) AS (
        SELECT history_key << 32, (history_key + 1 << 32) - 1, {size}
        FROM chat_histories WHERE namespace = ?1 AND chat_history_id = ?2
    )
    SELECT content, size FROM history CROSS JOIN chat_messages ON message_key BETWEEN {start} AND last_key
    ORDER BY message_key
"""
_START_OF_ROUNDS = """coalesce(
        (SELECT message_key FROM chat_messages WHERE role = 'user' AND message_key BETWEEN first_key AND last_key
            ORDER BY message_key DESC LIMIT 1 OFFSET {before}),
        first_key)"""
_START_OF_MESSAGES = """coalesce(
        (SELECT message_key FROM chat_messages WHERE role <> 'tool' AND message_key BETWEEN first_key AND
            (SELECT message_key FROM chat_messages WHERE message_key BETWEEN first_key AND last_key
                ORDER BY message_key DESC LIMIT 1 OFFSET {before})
            ORDER BY message_key DESC LIMIT 1),
        first_key)"""
# An offset cannot name a column of the statement around it, so it looks the history up once more.
_BEFORE = "(SELECT {size} - 1 FROM chat_histories WHERE namespace = ?1 AND chat_history_id = ?2)"
_SIZE = "?3 + max({total} - ?3, 0) % ?4"
_READ_ALL = _READ.format(size="message_count", start="first_key")
_READ_ROUNDS, _READ_MESSAGES = (
    _READ.format(size=size, start=start.format(before=_BEFORE.format(size=size)))
    for start, size in (
        (_START_OF_ROUNDS, _SIZE.format(total="round_count")),
        (_START_OF_MESSAGES, _SIZE.format(total="message_count")),
    )
)
_DELETE_MESSAGES = "DELETE FROM chat_messages WHERE message_key BETWEEN ? AND ?"
_DELETE_HISTORY = "DELETE FROM chat_histories WHERE history_key = ?"
_HISTORY_KEYS = "SELECT history_key FROM chat_histories WHERE namespace = ?"

# More messages than a history can have, and an integer that SQLite takes.
_MAX_COUNT = 2**62


class SQLiteChatMessageStore(BaseChatMessageStore[Database]):
    """
    Keeps chat histories in one SQLite file: durable, with nothing to install and no server to run.

    Any number of threads, event loops and processes of one machine can use a file together; each write is a
    transaction. The file must not lie on a network file system, where SQLite's locks do not work.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import SQLiteChatMessageStore

    store = SQLiteChatMessageStore("chat_history.db")
    store.write_messages("user_456", [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    print(store.retrieve_messages("user_456"))  # in the next process too
    ```
    """

    def __init__(
        self,
        path: "str | os.PathLike[str]" = "chat_history.db",
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        *,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
        search: bool = False,
        durability: Durability = "full",
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. The file is opened, and made if need be, on first use.

        :param path: The database file; its folder must exist. Defaults to `chat_history.db` in the current folder.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Separates tenants, applications or test runs in one file. Defaults to `"default"`.
        :param search: Whether messages can be searched. What is written is then indexed with it. Defaults to False.
        :param durability: `"full"`, the default: a write that has returned survives a power cut. `"normal"`: it
            survives a crash of the process, but the last writes before a power cut may be gone (the file stays sound);
            several times as fast where syncing the disk is slow. These are SQLite's `synchronous` levels in WAL mode.
        :param timeout: How long to wait for a database that another process has locked, in seconds. Defaults to 30.
        :raises ValueError: If a setting is not one of these, or the path is empty or `":memory:"`.
        """
        super().__init__(skip_system_messages, last_k, last_k_unit=last_k_unit, namespace=namespace, search=search)
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"path must be text or a Path, got {type(path).__name__}.")
        self.path = os.fspath(path)
        if not isinstance(self.path, str) or not self.path or "\x00" in self.path:
            raise ValueError(f"path must be the path of a file, got {self.path!r}.")
        if self.path == ":memory:" or self.path.startswith("file:"):
            raise ValueError(
                f"path must be the path of a file, got {self.path!r}. "
                "For histories that need not outlive the process, use InMemoryChatMessageStore."
            )
        if durability not in ("full", "normal"):
            raise ValueError(f'durability must be "full" or "normal", got {durability!r}.')
        if not isinstance(timeout, (int, float)) or not 0 <= timeout <= 1_000_000:
            raise ValueError(f"timeout must be a number of seconds from 0 to 1,000,000, got {timeout!r}.")
        self.durability = durability
        self.timeout = timeout
        # Relative to where the process was when the store was made, wherever it goes later.
        self._settings = Settings(os.path.abspath(self.path), durability, timeout)

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings.
        """
        return self._settings_to_dict(path=self.path, durability=self.durability, timeout=self.timeout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, namespace={self.namespace!r})"

    def close(self) -> None:
        """
        Close the file, for every store with the same settings. The next use opens it again.

        Calls that are under way in other threads are finished first, by these threads.
        """
        databases.close(self._settings)

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        return _run_on(databases.get(self._settings), operation, *arguments)

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        # sqlite3 can wait for a lock or a disk only by blocking, so it does that on one of the database's threads.
        database = databases.get(self._settings)
        submit = database.submit_read if operation in (self._read, self._count) else database.submit_write
        try:
            future = submit(_run_on, database, operation, *arguments)
        except RuntimeError as error:  # no thread can be started any more
            raise StoreUnavailableError("The interpreter is shutting down. Use the synchronous methods.") from error
        return await asyncio.wrap_future(future)

    def _write(self, session: Database, chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        now = time.time_ns() // 1000
        with session.transaction() as connection:
            found = connection.execute(_HISTORY, (self.namespace, chat_history_id)).fetchone()
            if found is None:
                new = messages
                values = (self.namespace, chat_history_id, now, now)
                history_key, position = int(connection.execute(_INSERT_HISTORY, values).lastrowid or 0), 0
            else:
                history_key, position = found
                new = [
                    message
                    for message in messages
                    if not message.brought_its_id
                    or connection.execute(_HAS_MESSAGE, (history_key, message.message_id)).fetchone() is None
                ]
            if new:
                first_key = (history_key << _POSITION_BITS) + position
                connection.executemany(
                    _INSERT_MESSAGE,
                    [
                        (key, message.message_id, message.role, now, message.content)
                        for key, message in enumerate(new, first_key)
                    ],
                )
                round_count = sum(message.role == ChatRole.USER.value for message in new)
                connection.execute(_UPDATE_HISTORY, (len(new), round_count, now, history_key))
        return len(new)

    def _read(self, session: Database, chat_history_id: str, window: Window) -> tuple[list[str], int]:
        history = (self.namespace, chat_history_id)
        with session.connection() as connection:
            if window.count is None:
                rows = connection.execute(_READ_ALL, history)
            else:
                query = _READ_ROUNDS if window.unit == "round" else _READ_MESSAGES
                counts = (min(window.count, _MAX_COUNT), min(window.step, _MAX_COUNT))
                rows = connection.execute(query, (*history, *counts))
            return contents_and_size(rows)

    def _count(self, session: Database, chat_history_id: str) -> int:
        with session.connection() as connection:
            found = connection.execute(_COUNT, (self.namespace, chat_history_id)).fetchone()
            return 0 if found is None else found[0]

    def _delete(self, session: Database, chat_history_id: str) -> None:
        with session.transaction() as connection:
            found = connection.execute(_HISTORY, (self.namespace, chat_history_id)).fetchone()
            if found is not None:
                _delete_history(connection, found[0])

    def _delete_all(self, session: Database) -> None:
        with session.transaction() as connection:
            for (history_key,) in connection.execute(_HISTORY_KEYS, (self.namespace,)).fetchall():
                _delete_history(connection, history_key)


def _run_on(database: Database, operation: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return operation(database, *arguments)
    except sqlite3.Error as error:
        if "Could not decode" in str(error):  # this one quotes the text
            raise MessageDecodingError("A stored message cannot be read: its text was damaged.") from None
        raise database.explained(error) from error


def _delete_history(connection: sqlite3.Connection, history_key: int) -> None:
    connection.execute(_DELETE_MESSAGES, _key_range(history_key))
    connection.execute(_DELETE_HISTORY, (history_key,))


def _key_range(history_key: int) -> tuple[int, int]:
    return history_key << _POSITION_BITS, ((history_key + 1) << _POSITION_BITS) - 1
