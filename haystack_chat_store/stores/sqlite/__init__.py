# SPDX-License-Identifier: Apache-2.0
import os
from typing import Any
from urllib.parse import unquote

from typing_extensions import Self

from haystack_chat_store.conversation.rounds import LastKUnit
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.sqlite import files
from haystack_chat_store.stores.sqlite.connections import Durability, Settings
from haystack_chat_store.stores.sqlite.engine import SQLiteEngine
from haystack_chat_store.validation import validated_seconds


class SQLiteChatMessageStore(BaseChatMessageStore):
    """
    Keeps chat histories in one SQLite file: durable, with nothing to install and no server to run.

    Any number of threads, event loops and processes of one machine can use a file together; each write is a
    transaction. The file must not lie on a network file system, where SQLite's locks do not work. Calls that read
    change nothing, and the first write makes the file. If the file is moved or replaced while it is in use, the next
    call writes what is in its log to it, and then uses what is at the path.

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
        strict: bool = False,
        durability: Durability = "full",
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. The file is opened on first use, and made by the first write.

        :param path: The database file; its folder must exist. Defaults to `chat_history.db` in the current folder.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Separates tenants, applications or test runs in one file. Defaults to `"default"`.
        :param search: Whether messages can be searched. What is written is then indexed with it; what the file had
            before is indexed by `index_messages`. Defaults to False.
        :param strict: Whether a message is refused if its `meta` holds a value without a JSON form. Defaults to False:
            the value's `repr` is stored.
        :param durability: `"full"`, the default: a write that has returned survives a power cut. `"normal"`: it
            survives a crash of the process, but the last writes before a power cut may be gone (the file stays sound);
            several times as fast where syncing the disk is slow. These are SQLite's `synchronous` levels in WAL mode.
        :param timeout: How long to wait for a database that another process has locked, in seconds. Defaults to 30.
        :raises ValueError: If a setting is not one of these, or the path is empty or `":memory:"`.
        """
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
        super().__init__(
            # Relative to where the process was when the store was made, wherever it goes later.
            SQLiteEngine(Settings(files.path_of_database(self.path), durability, self.timeout, search)),
            skip_system_messages=skip_system_messages,
            last_k=last_k,
            last_k_unit=last_k_unit,
            namespace=namespace,
            search=search,
            strict=strict,
        )

    def backup(self, path: "str | os.PathLike[str]") -> None:
        """
        Write everything in this store's file, of all namespaces, to a new file, while others go on writing.

        The new file is a complete database of one moment: a store can be made with its path. It is on the disk when
        this returns. Only its owner may read it.

        :param path: The path of the new file. Nothing may be there.
        :raises FileExistsError: If there is something at the path. It was left as it is.
        :raises OSError: If the file cannot be written.
        :raises StoreConfigurationError: If there is nothing to back up.
        :raises ChatMessageStoreError: If the store's file cannot be read.
        """
        self.engine.run(self.engine.backup, self.scope, os.path.abspath(os.fspath(path)))

    async def backup_async(self, path: "str | os.PathLike[str]") -> None:
        """Do what `backup` does, without blocking the event loop."""
        await self.engine.run_async(self.engine.backup, self.scope, os.path.abspath(os.fspath(path)))

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """
        Make a store from `sqlite:///relative.db` or `sqlite:////absolute.db`.

        :param url: One of these forms. `?` and `#` in the file's name are `%3F` and `%23`.
        :param settings: Further settings of the constructor.
        :raises ValueError: If the URL has none of these forms.
        """
        scheme, _, rest = url.partition("://")
        if scheme != "sqlite" or not rest.startswith("/") or len(rest) == 1 or {"?", "#"} & set(rest):
            raise ValueError("The URL of an SQLite file must be sqlite:///relative.db or sqlite:////absolute.db.")
        return cls(unquote(rest[1:]), **settings)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make an equal store."""
        return {"path": self.path, "durability": self.durability, "timeout": self.timeout, **super().settings()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, namespace={self.namespace!r})"
