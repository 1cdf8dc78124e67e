# SPDX-License-Identifier: Apache-2.0
"""
What is compared. To add an engine, write how its store and its floor are opened and emptied, and add it to `ENGINES`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from floors import SQLiteFloor
from haystack_experimental.chat_message_stores.in_memory import InMemoryChatMessageStore as ExperimentalStore

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.stores.sqlite.database import Durability


class Engine(NamedTuple):
    """
    One store, the floor beside it, and the longest history that it is tried with.

    :param open_store: Opens the store in a folder of its own, and leaves nothing behind when it is left.
    :param open_floor: The same for its floor, which takes encoded texts in place of messages.
    """

    name: str
    open_store: Callable[[Path], AbstractContextManager[Any]]
    open_floor: Callable[[Path], AbstractContextManager[Any]] | None = None
    floor_name: str = ""
    max_size: int | None = None


@contextmanager
def _in_memory(folder: Path) -> Iterator[InMemoryChatMessageStore]:
    store = InMemoryChatMessageStore(namespace=folder.name)
    yield store
    store.delete_all_messages()


@contextmanager
def _experimental(_folder: Path) -> Iterator[ExperimentalStore]:
    store = ExperimentalStore()
    yield store
    store.delete_all_messages()


def _sqlite(durability: Durability) -> Engine:
    return Engine(
        name=f"SQLiteChatMessageStore, {durability}",
        open_store=lambda folder: closing(SQLiteChatMessageStore(folder / "store.db", durability=durability)),
        open_floor=lambda folder: closing(SQLiteFloor(folder / "floor.db", durability)),
        floor_name=f"floor: raw sqlite3, {durability}",
    )


SQLITE_FULL = _sqlite("full")
SQLITE_NORMAL = _sqlite("normal")
IN_MEMORY = Engine("InMemoryChatMessageStore", _in_memory)
# Each of its writes goes through the whole history: longer ones take too long to be worth waiting for.
EXPERIMENTAL = Engine("haystack-experimental, in memory", _experimental, max_size=10_000)
ENGINES = [SQLITE_FULL, SQLITE_NORMAL, IN_MEMORY, EXPERIMENTAL]
