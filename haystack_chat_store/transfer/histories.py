# SPDX-License-Identifier: Apache-2.0
"""
Chat histories on their way: what every source yields and every target takes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from haystack_chat_store.codec import decode_messages
from haystack_chat_store.errors import MessageDecodingError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.reading import PAGE_CHARACTERS, PAGE_ROWS
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.types import Fault, Result
from haystack_chat_store.validation import microseconds, parsed_meta, validated_id, validated_meta, validated_title

#: The messages of a history, in batches. They can be read again, from the first one, as often as need be.
Rows: TypeAlias = Iterable[Sequence[MessageRow]]

#: Histories, one after the other, each with its messages. Those of one are read before the next one is asked for.
Histories: TypeAlias = Iterator[tuple[HistoryRow, Rows]]

#: What a source could not read, each once, in the order in which it was met.
Faults: TypeAlias = dict[Fault, None]

#: Is told how many messages are done, and how many there are in all, if that is known.
Progress: TypeAlias = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferResult(Result):
    """
    What an export, an import or a copy has done.

    :param chat_histories: How many histories it wrote, or added messages to.
    :param messages: How many messages it wrote.
    :param skipped: How many messages it had no need to write: they were there already, or (in OpenAI's format) a model
        cannot be trained on them.
    :param faults: What could not be read and was left out, each with its history and, in a store, its position.
    """

    chat_histories: int
    messages: int
    skipped: int = 0
    faults: tuple[Fault, ...] = ()


def unnamed(chat_history_id: Any, error: ValueError) -> Fault:
    """
    Return the fault of a history that is left out because of its id.
    """
    return Fault(description=f"{ascii(chat_history_id)[:600]} was left out: {error}")


def arrived_row(created_at: int, content: str) -> MessageRow:
    """
    Return a message that comes from elsewhere as a row. Its id and role are those that its content states.

    :param created_at: Microseconds since 1970.
    :param content: What should be the JSON text of a message.
    :raises ValueError: If it states no id that can be one.
    :raises MessageDecodingError: If it is not the JSON text of a message.
    """
    (message,) = decode_messages([content])
    message_id = validated_id(message.meta.get(MESSAGE_ID_KEY), "its id")
    return MessageRow(
        position=0, created_at=created_at, message_id=message_id, role=message.role.value, content=content
    )


def is_sound(row: MessageRow) -> bool:
    """
    Whether a stored message can be read back, and is what its row says.
    """
    try:
        row.content.encode()  # which a lone surrogate prevents
        return (
            is_time(row.created_at) and replace(arrived_row(row.created_at, row.content), position=row.position) == row
        )
    except (MessageDecodingError, ValueError, AttributeError, TypeError):  # it may hold anything
        return False


def is_title(value: Any) -> bool:
    """
    Whether what is stored is a title, or none.
    """
    try:
        validated_title(value)
    except ValueError:
        return False
    return True


def is_meta(value: Any) -> bool:
    """
    Whether what is stored is the meta of a history, or none.
    """
    meta = parsed_meta(value)
    if meta is None:
        return False
    try:
        validated_meta(meta)
        (value or "").encode()  # which a lone surrogate prevents
    except (ValueError, AttributeError):
        return False
    return True


def is_time(value: Any) -> bool:
    """
    Whether what is stored is a time in microseconds since 1970.
    """
    return bool(microseconds(readable_time(value), "time") == value)


def batched(rows: Iterable[MessageRow]) -> Iterator[list[MessageRow]]:
    """
    Put rows together in batches that are worth a step and fit into memory.
    """
    batch: list[MessageRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.content)
        if len(batch) >= PAGE_ROWS or characters >= PAGE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def watched(histories: Histories, progress: Progress, total: int | None) -> Histories:
    """
    Yield the same histories, and report as their messages are read.

    :param total: How many messages there are.
    """
    done = 0
    for history, rows in histories:
        watched_rows = _WatchedRows(rows, progress, done, total)
        yield history, watched_rows
        done = watched_rows.done


class _WatchedRows:
    def __init__(self, rows: Rows, progress: Progress, before: int, total: int | None) -> None:
        self._rows, self._progress, self._before, self._total = rows, progress, before, total
        self.done = before

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        self.done = self._before
        for batch in self._rows:
            yield batch
            self.done += len(batch)
            self._progress(self.done, self._total)
