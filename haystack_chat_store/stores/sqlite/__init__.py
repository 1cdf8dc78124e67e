# SPDX-License-Identifier: Apache-2.0
import asyncio
import os
import sqlite3
from collections.abc import Callable
from typing import Any

from haystack_chat_store.errors import MessageDecodingError, StoreUnavailableError
from haystack_chat_store.rounds import LastKUnit
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.sqlite.database import Database, Durability, Settings, databases
from haystack_chat_store.stores.sqlite.directory import DirectoryOperations
from haystack_chat_store.stores.sqlite.messages import MessageOperations
from haystack_chat_store.stores.sqlite.search import SearchOperations
from haystack_chat_store.stores.sqlite.terms import interruption
from haystack_chat_store.stores.sqlite.upkeep import UpkeepOperations
from haystack_chat_store.validation import validated_seconds

# Operations that only read, or that others need not wait for. They run side by side.
_READING = frozenset(
    ("_read", "_count", "_history", "_histories", "_histories_by_id", "_page", "_search", "_statistics", "_faults")
)


class SQLiteChatMessageStore(
    MessageOperations, DirectoryOperations, SearchOperations, UpkeepOperations, BaseChatMessageStore[Database]
):
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
        self.durability = durability
        self.timeout = validated_seconds(timeout, "timeout", 0, 1_000_000)
        # Relative to where the process was when the store was made, wherever it goes later.
        self._settings = Settings(os.path.abspath(self.path), durability, timeout, search)

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
        submit = database.submit_read if operation.__name__ in _READING else database.submit_write
        try:
            future = submit(_run_on, database, operation, *arguments)
        except RuntimeError as error:  # no thread can be started any more
            raise StoreUnavailableError("The interpreter is shutting down. Use the synchronous methods.") from error
        return await asyncio.wrap_future(future)


def _run_on(database: Database, operation: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return operation(database, *arguments)
    except sqlite3.Error as error:
        interrupt = interruption.__dict__.pop("last", None)
        if interrupt is not None:
            raise interrupt from None
        if "Could not decode" in str(error):  # this one quotes the text
            raise MessageDecodingError("A stored message cannot be read: its text was damaged.") from None
        raise database.explained(error) from error
