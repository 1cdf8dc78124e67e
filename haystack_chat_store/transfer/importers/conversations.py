# SPDX-License-Identifier: Apache-2.0
"""What an importer makes of one conversation of another program, and how a store takes it."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timezone
from typing import Any, NamedTuple, TypeAlias

from haystack.dataclasses import ChatMessage

from haystack_chat_store.codec import encode_message
from haystack_chat_store.ids import BRANCH_OF_KEY, branch_id
from haystack_chat_store.json_values import encode_plain
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.times import datetime_of
from haystack_chat_store.transfer.histories import Faults, Rows, batched, invalid_id_fault, row_from_json
from haystack_chat_store.transfer.seen_ids import SeenIds
from haystack_chat_store.transfer.times import parsed_time
from haystack_chat_store.types import Fault
from haystack_chat_store.validation import MAX_TITLE_LENGTH, microseconds, validated_id, validated_meta, validated_title

#: Called with a description of each part of the source that cannot become a message, and its place.
Report: TypeAlias = Callable[[str], None]


class ImportedMessage(NamedTuple):
    """
    A message from another program.

    :param key: Identifies the message in its conversation. It is the same at every import.
    :param message: The message.
    :param created_at: Its time in microseconds since 1970, or `None` if the program does not keep it.
    """

    key: str
    message: ChatMessage
    created_at: int | None = None


class Conversation(NamedTuple):
    """
    A conversation from another program.

    :param chat_history_id: The id of the history that it becomes.
    :param messages: Its messages. They are converted while they are read.
    :param created_at: The time when it began, in microseconds since 1970, or `None`.
    :param updated_at: The time when it last changed, or `None`.
    :param title: Its title, or `None`.
    :param meta: The meta of the history.
    """

    chat_history_id: str
    messages: Callable[[Report], Iterable[ImportedMessage]]
    created_at: int | None = None
    updated_at: int | None = None
    title: str | None = None
    meta: Mapping[str, Any] | None = None


def branch_of(conversation: Conversation, name: str) -> Conversation:
    """Return a branch of a conversation as one of its own, which names the other in its meta."""
    return conversation._replace(
        chat_history_id=branch_id(conversation.chat_history_id, name),
        meta={**(conversation.meta or {}), BRANCH_OF_KEY: conversation.chat_history_id},
    )


class RowsInMemory:
    """The messages of a history that is held in memory."""

    def __init__(self, rows: Sequence[MessageRow]) -> None:
        """Keep the messages."""
        self._rows = rows

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        return batched(self._rows)


def history_of(library: str, conversation: Conversation, faults: Faults) -> tuple[HistoryRow, Rows] | None:
    """
    Return a conversation as a history, or `None` if its id cannot be the id of one.

    :param library: The name of the program. Message ids begin with it.
    :param faults: Receives what is left out.
    """
    try:
        chat_history_id = validated_id(conversation.chat_history_id, "the id of a conversation")
    except ValueError as error:
        faults.add(invalid_id_fault(conversation.chat_history_id, error))
        return None

    def report(description: str) -> None:
        faults.add(Fault(chat_history_id=chat_history_id, description=description))

    now = time.time_ns() // 1000
    begun = conversation.created_at if conversation.created_at is not None else conversation.updated_at
    rows = list(message_rows(library, conversation.messages(report), begun if begun is not None else now, report))
    times = [row.created_at for row in rows]
    created_at = begun if begun is not None else min(times, default=now)
    updated_at = conversation.updated_at if conversation.updated_at is not None else max(times, default=created_at)
    return (
        HistoryRow(
            chat_history_id=chat_history_id,
            created_at=created_at,
            updated_at=max(created_at, updated_at),
            title=_title(conversation.title, report),
            meta=_meta(conversation.meta, report),
        ),
        RowsInMemory(rows),
    )


def message_rows(
    library: str, messages: Iterable[ImportedMessage], begun: int, report: Report, noun: str = "message"
) -> Iterator[MessageRow]:
    """
    Yield messages as rows. A message without a time has that of the message before it.

    :param library: The name of the program. Message ids begin with it.
    :param begun: The time of the first message if it has none.
    :param report: Called with what is left out.
    :param noun: The word for a message in reports. Defaults to "message".
    """
    moment = begun
    with SeenIds() as ids:
        for key, message, created_at in messages:
            moment = created_at if created_at is not None else moment
            message_id = f"{library}:{key}"
            try:
                row = row_from_json(moment, encode_message(message, message_id, f"{noun} {key}"))
            except ValueError as error:  # also a MessageEncodingError
                report(f"{error} The message was left out.")
                continue
            if ids.add(message_id):
                yield row
            else:
                report(f"A second {noun} {key} was left out.")


class Digest:
    """
    Makes keys of messages that have no ids: digests of each message and all before it.

    Two conversations that differ have different keys from there on, so neither continues the other.
    """

    def __init__(self) -> None:
        """Begin a conversation."""
        self._so_far = hashlib.sha256()

    def key(self, said: str) -> str:
        """Return the key of the next message, by the text that stands for it."""
        data = said.encode("utf-8", "surrogatepass")
        self._so_far.update(b"%d:" % len(data) + data)
        return self._so_far.hexdigest()[:32]


def time_of(value: Any) -> int | None:
    """Return a time in microseconds, from seconds since 1970 or from ISO 8601 text, in UTC by default."""
    try:
        if isinstance(value, str):
            parsed = parsed_time(value)
            return microseconds(parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc), "time")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found = round(value * 1_000_000)
            datetime_of(found)  # fails on what is no time
            return found
    except (ValueError, OverflowError):
        pass
    return None


def _title(title: Any, report: Report) -> str | None:
    if not isinstance(title, str) or not title:
        return None
    try:
        found = validated_title(title[:MAX_TITLE_LENGTH])
    except ValueError as error:
        report(f"Its title was left out: {error}")
        return None
    if len(title) > MAX_TITLE_LENGTH:
        report(f"Its title was cut off after {MAX_TITLE_LENGTH:,} characters.")
    return found if isinstance(found, str) else None


def _meta(meta: Mapping[str, Any] | None, report: Report) -> str | None:
    try:
        found = validated_meta(dict(meta)) if meta else None
        encode_plain(found)  # fails on a lone surrogate
    except ValueError as error:
        report(f"Its meta was left out: {error}")
        return None
    return found if isinstance(found, str) else None
