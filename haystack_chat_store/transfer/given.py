# SPDX-License-Identifier: Apache-2.0
"""A conversation that a program hands over as messages with their times."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from haystack.dataclasses import ChatMessage

from haystack_chat_store import validation
from haystack_chat_store.codec import encode_message
from haystack_chat_store.errors import DuplicateMessageError
from haystack_chat_store.ids import message_id_of
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.transfer.histories import Rows
from haystack_chat_store.transfer.importers.conversations import Digest, RowsInMemory


def given_history(
    chat_history_id: str,
    messages: Iterable[tuple[datetime, ChatMessage]],
    title: str | None,
    meta: dict[str, Any] | None,
    *,
    strict: bool,
) -> tuple[HistoryRow, Rows]:
    """
    Check a conversation, and return it as a history.

    :param strict: Whether values without a JSON form are refused.
    :raises ValueError: If something is wrong with it. The error says where.
    :raises DuplicateMessageError: If two messages have the same id.
    """
    validation.validated_id(chat_history_id, "chat_history_id")
    checked_title, checked_meta = validation.validated_title(title), validation.validated_meta(meta)
    rows: list[MessageRow] = []
    ids: set[str] = set()
    digest = Digest()
    for index, each in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(each, tuple) or len(each) != 2 or not isinstance(each[1], ChatMessage):
            raise ValueError(f"{where} must be a time and a ChatMessage.")
        created_at, message = validation.microseconds(each[0], f"the time of {where}"), each[1]
        own_id = message_id_of(message)
        derived = digest.key(f"{created_at} {encode_message(message, str(own_id or ''), where, strict=strict)}")
        message_id = validation.validated_id(own_id or f"import:{derived}", f"the id of {where}")
        if message_id in ids:
            raise DuplicateMessageError(f"{where} has the id of another message. Nothing was imported.")
        ids.add(message_id)
        content = encode_message(message, message_id, where, strict=strict)
        rows.append(
            MessageRow(
                position=0,
                created_at=created_at,
                message_id=message_id,
                role=message.role.value,
                content=content,
            )
        )
    now = microseconds_now()
    times = [row.created_at for row in rows]
    history = HistoryRow(
        chat_history_id=chat_history_id,
        created_at=min(times, default=now),
        updated_at=max(times, default=now),
        title=checked_title if isinstance(checked_title, str) else None,
        meta=checked_meta if isinstance(checked_meta, str) else None,
    )
    return history, RowsInMemory(rows)
