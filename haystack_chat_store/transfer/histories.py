# SPDX-License-Identifier: Apache-2.0
"""The form in which histories are moved: every source yields it, and every target takes it."""

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

#: The messages of a history, in batches. They can be iterated several times, each time from the first message.
Rows: TypeAlias = Iterable[Sequence[MessageRow]]

#: Histories, each with its messages. The messages of a history must be read before the next history is requested.
Histories: TypeAlias = Iterator[tuple[HistoryRow, Rows]]

#: The most faults that a result lists.
MAX_FAULTS = 10_000


class Faults:
    """The faults of a source, in order, each once. It keeps only the first ones, and notes that there are more."""

    def __init__(self) -> None:
        """Begin without faults."""
        self._kept: dict[Fault, None] = {}
        self._has_more = False

    def add(self, fault: Fault) -> None:
        """Add a fault."""
        if fault == _MORE_FAULTS:
            self._has_more = True
        elif len(self._kept) < MAX_FAULTS:
            self._kept[fault] = None
        elif fault not in self._kept:
            self._has_more = True

    def extend(self, faults: Iterable[Fault]) -> None:
        """Add faults, such as those of another result."""
        for fault in faults:
            self.add(fault)

    def __iter__(self) -> Iterator[Fault]:
        """Go through the faults that were kept. If there are more, the last one says so."""
        yield from self._kept
        if self._has_more:
            yield _MORE_FAULTS


_MORE_FAULTS = Fault(description=f"There are more faults than these {MAX_FAULTS:,}.")

#: Called with the number of messages done, and the total number, or `None` if it is not known.
Progress: TypeAlias = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferResult(Result):
    """
    The result of an export, an import or a copy.

    :param chat_histories: The number of histories that were written, or that messages were added to.
    :param messages: The number of messages written.
    :param skipped: The number of messages skipped, because the store had them already or (in OpenAI's format) because a
        model cannot be trained on them.
    :param faults: The data that could not be read and was left out, each with its history and, in a store, its
        position. If there are more than 10,000, the last one says so.
    """

    chat_histories: int
    messages: int
    skipped: int = 0
    faults: tuple[Fault, ...] = ()


def invalid_id_fault(chat_history_id: Any, error: ValueError) -> Fault:
    """Return the fault for a history that is left out because its id is not valid."""
    return Fault(description=f"{ascii(chat_history_id)[:600]} was left out: {error}")


def row_from_json(created_at: int, content: str) -> MessageRow:
    """
    Return the row of a message that comes from outside the store, with the id and role from its content.

    :param created_at: Microseconds since 1970.
    :param content: The JSON text of the message.
    :raises ValueError: If the message has no valid id.
    :raises MessageDecodingError: If the content is not the JSON text of a message.
    """
    (message,) = decode_messages([content])
    message_id = validated_id(message.meta.get(MESSAGE_ID_KEY), "its id")
    return MessageRow(
        position=0, created_at=created_at, message_id=message_id, role=message.role.value, content=content
    )


def is_sound(row: MessageRow) -> bool:
    """Whether a stored message can be read, and agrees with the columns of its row."""
    try:
        row.content.encode()  # fails on a lone surrogate
        return (
            is_time(row.created_at)
            and replace(row_from_json(row.created_at, row.content), position=row.position) == row
        )
    except (MessageDecodingError, ValueError, AttributeError, TypeError):  # a damaged row may hold values of any type
        return False


def is_title(value: Any) -> bool:
    """Whether a stored value is a valid title or `None`."""
    try:
        validated_title(value)
    except ValueError:
        return False
    return True


def is_meta(value: Any) -> bool:
    """Whether a stored value is the valid meta of a history or `None`."""
    meta = parsed_meta(value)
    if meta is None:
        return False
    try:
        validated_meta(meta)
        (value or "").encode()  # fails on a lone surrogate
    except (ValueError, AttributeError):
        return False
    return True


def is_time(value: Any) -> bool:
    """Whether a stored value is a time in microseconds since 1970."""
    return bool(microseconds(readable_time(value), "time") == value)


def batched(rows: Iterable[MessageRow]) -> Iterator[list[MessageRow]]:
    """Group rows into batches of limited number and size."""
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


def with_progress(histories: Histories, progress: Progress, total: int | None) -> Histories:
    """
    Yield the same histories, and report progress while their messages are read.

    :param total: The total number of messages, or `None` if it is not known.
    """
    done = 0
    for history, rows in histories:
        reporting_rows = _RowsWithProgress(rows, progress, done, total)
        yield history, reporting_rows
        done = reporting_rows.done


class _RowsWithProgress:
    def __init__(self, rows: Rows, progress: Progress, before: int, total: int | None) -> None:
        self._rows, self._progress, self._before, self._total = rows, progress, before, total
        self.done = before

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        self.done = self._before
        for batch in self._rows:
            yield batch
            self.done += len(batch)
            self._progress(self.done, self._total)
