# SPDX-License-Identifier: Apache-2.0
"""
Finds what in a store does not fit together, and mends it.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from haystack.dataclasses import ChatMessage

from haystack_chat_store import validation
from haystack_chat_store.codec import decode_messages
from haystack_chat_store.errors import MessageDecodingError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.iteration import walk_histories, walk_readable_pages
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.rows import MessageRow
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.transfer.files import appended_file, checked_target
from haystack_chat_store.types import Fault


def check(
    store: BaseChatMessageStore,
    *,
    repair: bool = False,
    salvage: "str | os.PathLike[str] | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Fault]:
    """
    Check a store's namespace, and return all that is wrong with it.

    First the engine checks, and mends, what it keeps of histories: counts, positions, rows that belong to nothing, the
    search index. Then every message is read back. One that is damaged hides no other.

    ```python
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_chat_store.doctor import check

    for fault in check(InMemoryChatMessageStore()):
        print(fault)
    ```

    :param store: The store to check.
    :param repair: Whether to mend what is wrong. Defaults to False.
    :param salvage: A file that messages which cannot be read back are appended to before they are removed, as JSON
        lines with what was stored of them. Without it, they are only reported: no text is destroyed that is not saved.
        If it is new, only its owner may read it.
    :param progress: Called now and then with the number of messages checked so far, and `None`.
    :raises ValueError: If `salvage` is a database, perhaps that of the store itself, or no file. Nothing was changed.
    :raises UnsupportedOperationError: If the store cannot be checked, or not repaired.
    :raises ChatMessageStoreError: If the engine fails.
    :raises OSError: If `salvage` cannot be written. The messages that were to be saved there are still in the store.
    """
    if salvage is not None:
        checked_target(salvage)
    found = dict.fromkeys(store.engine.run(store.engine.check, store.scope, repair))
    checked = 0
    for history in walk_histories(store):
        try:
            for rows in walk_readable_pages(store, history.chat_history_id):
                # The engine may have found some of these faults.
                found |= dict.fromkeys(_faults_of(store, history.chat_history_id, rows, salvage if repair else None))
                checked += len(rows)
                if progress is not None:
                    progress(checked, None)
        except MessageDecodingError:
            found[Fault(chat_history_id=history.chat_history_id, description="Its messages cannot be read.")] = None
    return list(found)


async def check_async(
    store: BaseChatMessageStore,
    *,
    repair: bool = False,
    salvage: "str | os.PathLike[str] | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Fault]:
    """
    Do what `check` does, without blocking the event loop.
    """
    return await asyncio.to_thread(check, store, repair=repair, salvage=salvage, progress=progress)


def _faults_of(
    store: BaseChatMessageStore,
    chat_history_id: str,
    rows: Sequence[MessageRow],
    salvage: "str | os.PathLike[str] | None",
) -> Iterator[Fault]:
    """
    Yield what is wrong with messages.

    :param salvage: Where those that cannot be read back are saved before they are removed; `None` to leave them.
    """
    examined = list(map(examine, rows))
    removed = set() if salvage is None else {message.position for message in examined if message.message is None}
    if removed and salvage is not None:
        saved = [(row, message) for row, message in zip(rows, examined, strict=True) if row.position in removed]
        _save(salvage, store.namespace, chat_history_id, saved)
        store.engine.run(store.engine.remove, store.scope, chat_history_id, sorted(removed))
    for message in examined:
        for description in message.faults:
            yield Fault(
                chat_history_id=chat_history_id,
                position=message.position,
                description=description,
                is_repaired=message.position in removed,
            )


@dataclass(frozen=True, kw_only=True)
class ExaminedMessage:
    """
    A stored message, or what is wrong with it.

    :param created_at: When it was stored; the beginning of 1970 if what is stored is no time.
    :param message: The message, or `None` if its stored text cannot be read back.
    :param faults: What is wrong with what is stored. They never say what the message says.
    """

    position: int
    created_at: datetime
    role: str
    message: ChatMessage | None
    faults: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        """
        All that is wrong with what is stored, or `None`.
        """
        return " ".join(self.faults) or None


def examine(row: MessageRow) -> ExaminedMessage:
    """
    Read a message back, and say what is wrong with it rather than raise.
    """
    created_at = readable_time(row.created_at)
    try:
        (message,) = decode_messages([row.content])
        other_id, other_role = message.meta.get(MESSAGE_ID_KEY) != row.message_id, message.role.value != row.role
    except (MessageDecodingError, AttributeError):  # its meta may be anything
        message, other_id, other_role = None, False, False
    faults = {
        "Its stored text is not that of a message.": message is None,
        "Its stored text has another id than its row.": other_id,
        "Its stored text has another role than its row.": other_role,
        "Its time of creation is none.": validation.microseconds(created_at, "created_at") != row.created_at,
    }
    found = tuple(description for description, is_so in faults.items() if is_so)
    return ExaminedMessage(position=row.position, created_at=created_at, role=row.role, message=message, faults=found)


def examined_messages(
    store: BaseChatMessageStore,
    chat_history_id: str,
    *,
    before: int | None = None,
    after: int | None = None,
    limit: int = 100,
) -> list[ExaminedMessage]:
    """
    Return a page of a history as `list_messages` does, with damaged messages among it rather than an error.
    """
    page = validation.validated_page(chat_history_id, before, after, limit)
    return [examine(row) for row in store.engine.run(store.engine.page, store.scope, *page)]


def _save(
    salvage: "str | os.PathLike[str]",
    namespace: str,
    chat_history_id: str,
    damaged: Sequence[tuple[MessageRow, ExaminedMessage]],
) -> None:
    """
    Append damaged messages to a file, and return when they are on the disk.
    """
    with appended_file(salvage) as file:
        for row, message in damaged:
            saved = {
                "namespace": namespace,
                "chat_history_id": chat_history_id,
                **asdict(row),
                "fault": message.fault,
            }
            file.write(f"{json.dumps(saved, default=repr)}\n".encode("ascii"))  # bytes may stand where text should
