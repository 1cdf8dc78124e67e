# SPDX-License-Identifier: Apache-2.0
"""
A program whose threads write turns at once, and what a store must hold of them after a power cut.

Each thread says after each call that it has returned. A thread waits for each of its calls. So a store must have of
each thread the turns that were acknowledged, or one more, whole and in order.
"""

import json
import os
import sqlite3
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from haystack.dataclasses import ChatMessage

from haystack_chat_store import BaseChatMessageStore, SQLiteChatMessageStore, store_from_url
from haystack_chat_store.doctor import check
from haystack_chat_store.errors import ChatMessageStoreError

HISTORY = "history"


def arguments(url: str, acknowledgements: Path | str, writers: int, turns: int, **settings: Any) -> list[str]:
    """
    Return the arguments of the program.

    :param url: The store's URL.
    :param acknowledgements: The file to which a thread appends its number after each call.
    :param writers: The number of threads.
    :param turns: The number of turns of each thread.
    :param settings: The store's settings. With `durability="off"`, which only this program knows, SQLite never flushes.
    """
    return [url, str(acknowledgements), str(writers), str(turns), json.dumps(settings)]


def write_in_a_crowd(url: str, acknowledgements: str, writers: str, turns: str, settings: str) -> None:
    """Write with many threads at once, and say after each call that it has returned, and whose it was."""
    chosen = json.loads(settings)
    if chosen.get("durability") == "off":
        flush_nothing()
        chosen["durability"] = "full"
    store = store_from_url(url, **chosen)
    file = os.open(acknowledgements, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def write(writer: int) -> None:
        for number in range(int(turns)):
            text = "x" * (600 * (1 + number % 5))
            turn = [ChatMessage.from_user(f"{writer} {number} {part} {text}") for part in ("first", "second")]
            store.write_messages(HISTORY, turn)
            os.write(file, str(writer).encode())

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(int(writers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()


def flush_nothing() -> None:
    """Have SQLite leave all flushes out."""
    from haystack_chat_store.stores.sqlite import schema

    make_ready = schema.make_ready

    def without_flushes(connection: Any, *rest: Any) -> None:
        make_ready(connection, *rest)
        connection.execute("PRAGMA synchronous = off")

    schema.make_ready = without_flushes


def verdict(store: BaseChatMessageStore, returned: Mapping[int, int], writers: int) -> str:
    """
    Say whether a store is "sound", has "lost" turns that were acknowledged, or is "damaged".

    :param store: The store that is found after the cut.
    :param returned: How many calls of each thread had returned.
    :param writers: The number of threads.
    """
    texts = [(message.text or "").split() for message in store.retrieve_messages(HISTORY)]
    if store.count_messages(HISTORY) != len(texts) or check(store):
        return "damaged"
    found: dict[int, list[int]] = {writer: [] for writer in range(writers)}
    for n in range(0, len(texts), 2):
        first, second = texts[n], texts[n + 1] if n + 1 < len(texts) else []
        if len(first) != 4 or first[2] != "first" or second != [*first[:2], "second", first[3]]:
            return "damaged"
        found[int(first[0])].append(int(first[1]))
    if any(numbers != list(range(len(numbers))) for numbers in found.values()):
        return "damaged"
    more = [len(found[writer]) - returned.get(writer, 0) for writer in range(writers)]
    return "lost" if min(more) < 0 else "sound" if max(more) <= 1 else "damaged"


def verdict_on_file(path: Path, returned: Mapping[int, int], writers: int) -> str:
    """Say the same of an SQLite file, which must also be sound for SQLite."""
    if not path.exists():
        return "lost" if any(returned.values()) else "sound"
    try:
        with closing(sqlite3.connect(path)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return "damaged"
        with closing(SQLiteChatMessageStore(path, last_k=None)) as store:
            return verdict(store, returned, writers)
    except (sqlite3.Error, ChatMessageStoreError):
        return "damaged"


if __name__ == "__main__":
    write_in_a_crowd(*sys.argv[1:])
