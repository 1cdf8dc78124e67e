# SPDX-License-Identifier: Apache-2.0
"""
Finds what in a store does not fit together, and mends it.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from haystack.dataclasses import ChatMessage

from haystack_chat_store.codec import decode_messages
from haystack_chat_store.errors import MessageDecodingError
from haystack_chat_store.rounds import MESSAGE_ID_KEY
from haystack_chat_store.stores import arguments
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.operations import MessageRow
from haystack_chat_store.types import Fault
from haystack_chat_store.walks import walked_histories, walked_pages


def check(
    store: BaseChatMessageStore[Any],
    *,
    repair: bool = False,
    salvage: "str | os.PathLike[str] | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Iterator[Fault]:
    """
    Check a store's namespace, and yield whatever is wrong with it.

    First the engine checks what it keeps of histories: counts, positions, rows that belong to nothing, the search
    index. Then every message is read back. One that is damaged hides no other.

    ```python
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_chat_store.doctor import check

    for fault in check(InMemoryChatMessageStore()):
        print(fault)
    ```

    :param store: The store to check.
    :param repair: Whether to mend what is wrong. Defaults to False.
    :param salvage: A file that damaged messages are appended to before they are removed, as JSON lines with what was
        stored of them. Without it, they are only reported: no text is destroyed that is not saved.
    :param progress: Called now and then with the number of messages checked so far, and `None`.
    :raises UnsupportedOperationError: If the store cannot be checked, or not repaired.
    :raises ChatMessageStoreError: If the engine fails.
    :raises OSError: If `salvage` cannot be written. The messages that were to be saved there are still in the store.
    """
    yield from store._run(store._faults, repair)
    checked = 0
    for history in walked_histories(store):
        for rows in walked_pages(store, history.chat_history_id):
            damaged = [(row, fault) for row in rows if (fault := examine(row).fault) is not None]
            is_repaired = bool(repair and salvage is not None and damaged)
            if is_repaired and salvage is not None:
                _save(salvage, store.namespace, history.chat_history_id, damaged)
                store._run(store._remove, history.chat_history_id, [row.position for row, _ in damaged])
            for row, fault in damaged:
                yield Fault(history.chat_history_id, row.position, fault, is_repaired)
            checked += len(rows)
            if progress is not None:
                progress(checked, None)


async def check_async(
    store: BaseChatMessageStore[Any],
    *,
    repair: bool = False,
    salvage: "str | os.PathLike[str] | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Fault]:
    """
    Do what `check` does, without blocking the event loop, and return all faults together.
    """
    return await asyncio.to_thread(
        lambda: list(check(store, repair=repair, salvage=salvage, progress=progress)),
    )


class ExaminedMessage(NamedTuple):
    """
    A stored message, or what is wrong with it.

    :param message: The message, or `None` if its stored text cannot be read back.
    :param fault: What is wrong with what is stored, or `None`. Never says what the message says.
    """

    position: int
    created_at: datetime
    role: str
    message: ChatMessage | None
    fault: str | None


def examine(row: MessageRow) -> ExaminedMessage:
    """
    Read a message back, and say what is wrong with it rather than raise.
    """
    message, fault = None, None
    try:
        (message,) = decode_messages([row.content])
    except MessageDecodingError:
        fault = "Its stored text is not that of a message."
    if message is not None and message.meta.get(MESSAGE_ID_KEY) != row.message_id:
        fault = "Its stored text has another id than its row."
    elif message is not None and message.role.value != row.role:
        fault = "Its stored text has another role than its row."
    return ExaminedMessage(row.position, arguments.time_of(row.created_at), row.role, message, fault)


def examined_messages(
    store: BaseChatMessageStore[Any],
    chat_history_id: str,
    *,
    before: int | None = None,
    after: int | None = None,
    limit: int = 100,
) -> list[ExaminedMessage]:
    """
    Return a page of a history as `list_messages` does, with damaged messages among it rather than an error.
    """
    history = arguments.validated_id(chat_history_id, "chat_history_id")
    return [examine(row) for row in store._run(store._page, history, before, after, limit)]


def _save(
    salvage: "str | os.PathLike[str]",
    namespace: str,
    chat_history_id: str,
    damaged: Sequence[tuple[MessageRow, str]],
) -> None:
    """
    Append damaged messages to a file, and return when they are on the disk.
    """
    with open(salvage, "a", encoding="ascii") as file:
        for row, fault in damaged:
            saved = {"namespace": namespace, "chat_history_id": chat_history_id, **row._asdict(), "fault": fault}
            file.write(f"{json.dumps(saved)}\n")
        file.flush()
        os.fsync(file.fileno())
