# SPDX-License-Identifier: Apache-2.0
"""Checks a store for faults, and repairs them."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime

from haystack.dataclasses import ChatMessage

from haystack_chat_store import validation
from haystack_chat_store.codec import decode_messages
from haystack_chat_store.errors import MessageDecodingError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.iteration import walk_histories, walk_readable_pages
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.conflicts import only_one_user
from haystack_chat_store.stores.faults import FaultList
from haystack_chat_store.stores.rows import MessageRow
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.transfer.files import appended_file, checked_target
from haystack_chat_store.types import Fault

# What can be wrong with a message.
_OF_MESSAGES = (
    "Its stored text is not that of a message.",
    "Its stored text has another id than its row.",
    "Its stored text has another role than its row.",
    "Its time of creation is none.",
)


def check(
    store: BaseChatMessageStore,
    *,
    repair: bool = False,
    salvage: "str | os.PathLike[str] | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Fault]:
    """
    Check all histories in a store's namespace, and return the faults.

    First the engine checks, and repairs, its own data: counts, positions, rows without a history, what lists show, and
    the search index.
    Then every message is read back. A damaged message does not hide the faults of other messages.

    ```python
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_chat_store.doctor import check

    for fault in check(InMemoryChatMessageStore()):
        print(fault)
    ```

    :param store: The store to check.
    :param repair: Whether to repair the faults. Defaults to False.
    :param salvage: The path of a file for messages that cannot be read back. Their stored data is appended to it as
        JSON lines before they are removed from the store. Only the owner may read a new file. Defaults to `None`: such
        messages are reported and not removed.
    :param progress: Called now and then with the number of messages checked so far, and `None`.
    :returns: The faults, each with its history and position, and whether it was repaired: up to 1,000 of each kind. If
        there are more, a last one of the kind says how many, in its `count`.
    :raises ValueError: If `salvage` is given without `repair=True`, is not a file, or belongs to a database. Nothing
        was changed.
    :raises ChatHistoryAccessError: If this is the store of one user: a check looks at what all users have.
    :raises UnsupportedOperationError: If the store cannot be checked or repaired.
    :raises ChatMessageStoreError: If the engine fails.
    :raises OSError: If `salvage` cannot be written. The messages to be saved there are still in the store.
    """
    if store.user_id is not None:
        raise only_one_user("check the histories of all users")
    if salvage is not None:
        if not repair:
            raise ValueError("salvage needs repair=True, because only a repair removes messages.")
        checked_target(salvage)
    operation = store.engine.repair if repair else store.engine.check
    of_engine = store.engine.run(operation, store.scope)
    # What the engine has not listed of messages is found again here.
    found = FaultList(fault for fault in of_engine if fault.count == 1 or not fault.description.endswith(_OF_MESSAGES))
    checked = 0
    # The engine may have found faults of messages that are removed afterwards.
    places = {_place(fault) for fault in of_engine if fault.position is not None}
    removed: set[tuple[str | None, int | None]] = set()
    for history in walk_histories(store):
        try:
            for rows in walk_readable_pages(store, history.chat_history_id):
                faults = list(_faults_of(store, history.chat_history_id, rows, salvage))
                found.extend(faults)
                removed |= {_place(fault) for fault in faults if fault.is_repaired} & places
                checked += len(rows)
                if progress is not None:
                    progress(checked, None)
        except MessageDecodingError:
            found.add(Fault(chat_history_id=history.chat_history_id, description="Its messages cannot be read."))
    faults_now = (replace(fault, is_repaired=True) if _place(fault) in removed else fault for fault in found)
    return list(dict.fromkeys(faults_now))


async def check_async(
    store: BaseChatMessageStore,
    *,
    repair: bool = False,
    salvage: "str | os.PathLike[str] | None" = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Fault]:
    """
    Do what `check` does, without blocking the event loop.

    A thread does the work and calls `progress`. If the call is cancelled, the thread goes on to the end of the check.
    """
    return await asyncio.to_thread(check, store, repair=repair, salvage=salvage, progress=progress)


def _place(fault: Fault) -> tuple[str | None, int | None]:
    return fault.chat_history_id, fault.position


def _faults_of(
    store: BaseChatMessageStore,
    chat_history_id: str,
    rows: Sequence[MessageRow],
    salvage: "str | os.PathLike[str] | None",
) -> Iterator[Fault]:
    """
    Yield the faults of messages.

    :param salvage: Where messages that cannot be read back are saved before they are removed. `None` keeps them.
    """
    examined = list(map(examine, rows))
    removed: set[int] = set()
    damaged = [each for each in zip(rows, examined, strict=True) if each[1].message is None]
    if damaged and salvage is not None:
        _save(salvage, store.namespace, chat_history_id, damaged)
        saved = [row for row, _ in damaged]
        # Others may have written since the messages were read: what is not saved stays.
        others = store.engine.run(store.engine.remove, store.scope, chat_history_id, saved)
        removed = {row.position for row in saved}.difference(others)
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
    A stored message and its faults.

    :param position: Its position in the history.
    :param created_at: The time it was stored, or the beginning of 1970 if the stored time is not valid.
    :param role: The stored role.
    :param message: The message, or `None` if its stored text cannot be read back.
    :param faults: Descriptions of the faults. They never quote the message.
    """

    position: int
    created_at: datetime
    role: str
    message: ChatMessage | None
    faults: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        """All faults as one text, or `None`."""
        return " ".join(self.faults) or None


def examine(row: MessageRow) -> ExaminedMessage:
    """Read a message back, and return its faults instead of raising an error."""
    created_at = readable_time(row.created_at)
    try:
        (message,) = decode_messages([row.content])
        other_id, other_role = message.meta.get(MESSAGE_ID_KEY) != row.message_id, message.role.value != row.role
    except (MessageDecodingError, AttributeError):  # a damaged message may have a meta of any type
        message, other_id, other_role = None, False, False
    is_other_time = validation.microseconds(created_at, "created_at") != row.created_at
    are_so = message is None, other_id, other_role, is_other_time
    found = tuple(description for description, is_so in zip(_OF_MESSAGES, are_so, strict=True) if is_so)
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
    Return a page of a history like `list_messages`, but with damaged messages instead of an error.

    :param chat_history_id: The id of the history.
    :param before: Return messages before this position. Defaults to the end of the history.
    :param after: Return messages after this position. Cannot be combined with `before`.
    :param limit: The greatest number of messages. Defaults to 100.
    :raises ValueError: If an argument is wrong.
    :raises ChatMessageStoreError: If the engine fails.
    """
    page = validation.validated_page(chat_history_id, before, after, limit)
    return [examine(row) for row in store.engine.run(store.engine.page, store.scope, *page)]


def _save(
    salvage: "str | os.PathLike[str]",
    namespace: str,
    chat_history_id: str,
    damaged: Sequence[tuple[MessageRow, ExaminedMessage]],
) -> None:
    """Append damaged messages to a file. They are on the disk when this returns."""
    with appended_file(salvage) as file:
        for row, message in damaged:
            saved = {
                "namespace": namespace,
                "chat_history_id": chat_history_id,
                **asdict(row),
                "fault": message.fault,
            }
            file.write(f"{json.dumps(saved, default=repr)}\n".encode("ascii"))  # a damaged row may hold bytes
