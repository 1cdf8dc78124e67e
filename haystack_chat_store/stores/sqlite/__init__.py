# SPDX-License-Identifier: Apache-2.0
import os
from typing import Any
from urllib.parse import unquote

from typing_extensions import Self

from haystack_chat_store.conversation.rounds import LastKUnit
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.conflicts import only_one_user
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
        user_id: str | None = None,
        ttl: float | None = None,
        renew_ttl_on_read: bool = False,
        durability: Durability = "full",
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. The file is opened on first use, and created by the first write.

        :param path: The database file; its folder must exist. Defaults to `chat_history.db` in the current folder.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: The number of rounds that `retrieve_messages` returns if it is called without `last_k`. Defaults
            to 10. `None` for all.
        :param last_k_unit: The unit of `last_k`: `"round"`, the default, or `"message"`.
        :param namespace: The namespace of the store's histories, 1 to 128 characters. A store sees only its own
            namespace, so tenants, applications or test runs can share one file. Defaults to `"default"`.
        :param search: Whether messages can be searched. Each message is then indexed as it is written. Call
            `index_messages` once to index messages that the file had before. Defaults to False.
        :param strict: Whether a message is refused if its `meta` contains a value without a JSON form. Defaults to
            False: the value's `repr` is stored, and the log says so.
        :param user_id: The store sees and changes only histories of this user: see `for_user`. Defaults to `None`: all
            histories of the namespace.
        :param ttl: The number of seconds after which a history expires as a whole. The time starts anew when messages
            are stored in it. Defaults to `None`: a history never expires.
        :param renew_ttl_on_read: Whether reading messages of a history starts the time anew, too. Defaults to False.
        :param durability: With `"full"`, the default, a write that has returned survives a power cut. With `"normal"`,
            it survives a crash of the process, but a power cut may lose the last writes (the file stays sound). This is
            several times as fast on a disk that syncs slowly. These are SQLite's `synchronous` levels in WAL mode.
        :param timeout: The number of seconds to wait for a database that another process has locked. Defaults to 30.
        :raises ValueError: If a setting is wrong, or the path is empty or `":memory:"`.
        """
        self.path = _validated_path(path)
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
            user_id=user_id,
            ttl=ttl,
            renew_ttl_on_read=renew_ttl_on_read,
        )

    def backup(self, path: "str | os.PathLike[str]") -> None:
        """
        Write everything in this store's file, of all namespaces, to a new file, while others go on writing.

        The new file is a complete database of one moment: a store can be made with its path. It is on the disk when
        this returns. Only its owner may read it.

        :param path: The path of the new file. Nothing may be there.
        :raises ValueError: If the path is none, as in the constructor.
        :raises FileExistsError: If there is something at the path. It was left as it is.
        :raises OSError: If the file cannot be written.
        :raises StoreConfigurationError: If there is nothing to back up.
        :raises ChatHistoryAccessError: If this store belongs to one user.
        :raises ChatMessageStoreError: If the store's file cannot be read.
        """
        self._check_backup()
        self.engine.run(self.engine.backup, self.scope, os.path.abspath(_validated_path(path)))

    async def backup_async(self, path: "str | os.PathLike[str]") -> None:
        """Do what `backup` does, without blocking the event loop."""
        self._check_backup()
        await self.engine.run_async(self.engine.backup, self.scope, os.path.abspath(_validated_path(path)))

    def _check_backup(self) -> None:
        if self.user_id is not None:
            raise only_one_user("back up the file, which holds the histories of all users")

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """
        Create a store from `sqlite:///relative.db` or `sqlite:////absolute.db`.

        :param url: One of these forms. `?` and `#` in the file's name are `%3F` and `%23`.
        :param settings: Further arguments of the constructor.
        :raises ValueError: If the URL has none of these forms.
        """
        scheme, _, rest = url.partition("://")
        if scheme != "sqlite" or not rest.startswith("/") or len(rest) == 1 or {"?", "#"} & set(rest):
            raise ValueError("The URL of an SQLite file must be sqlite:///relative.db or sqlite:////absolute.db.")
        return cls(unquote(rest[1:]), **settings)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for an equal store."""
        return {"path": self.path, "durability": self.durability, "timeout": self.timeout, **super().settings()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, namespace={self.namespace!r})"


def _validated_path(path: object) -> str:
    """
    Return the path of a file as text.

    :raises ValueError: If it is none, is empty, or has a meaning of its own for SQLite.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path must be text or a Path, got {type(path).__name__}.")
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\x00" in text:
        raise ValueError(f"path must be the path of a file, got {text!r}.")
    if text == ":memory:" or text.startswith("file:"):
        raise ValueError(
            f"path must be the path of a file, got {text!r}. "
            "For histories that need not outlive the process, use InMemoryChatMessageStore."
        )
    return text
