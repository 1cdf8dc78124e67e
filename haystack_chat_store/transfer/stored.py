# SPDX-License-Identifier: Apache-2.0
"""Reads chat histories from a store, and imports them into a store."""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatMessageStoreError,
    MessageDecodingError,
    UnsupportedOperationError,
)
from haystack_chat_store.iteration import walk_histories, walk_pages, walk_readable_pages
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.conflicts import history_not_found
from haystack_chat_store.stores.reading import FIRST_PAGE, PAGE_CHARACTERS, PAGE_ROWS
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.transfer.histories import (
    Faults,
    Histories,
    Rows,
    TransferResult,
    invalid_id_fault,
    is_meta,
    is_sound,
    is_time,
    is_title,
)
from haystack_chat_store.transfer.seen_ids import SeenIds
from haystack_chat_store.types import Fault
from haystack_chat_store.validation import validated_id, validated_text

# Reading a history, and importing into one, are repeated when it changes meanwhile.
_MAX_ATTEMPTS = 10
# Counting the histories is repeated when one of them changes meanwhile.
_MAX_COUNTS = 3
# An error names up to this many conflicting histories.
_MAX_NAMED = 10
_ADVICE = "To find out: haystack-chat-store doctor"
# The fields of a history: how each is checked, and the fault that is reported if it is damaged.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "title": (is_title, "Its title cannot be read, and was left out."),
    "meta": (is_meta, "Its meta cannot be read, and was left out."),
    "created_at": (is_time, "Its time of creation cannot be read, and was replaced."),
    "updated_at": (is_time, "Its time of change cannot be read, and was replaced."),
}


class StoredHistories:
    """Histories of a store. Each is yielded once, even while other writers change the store."""

    def __init__(
        self, store: BaseChatMessageStore, chat_history_ids: Iterable[str] | None, prefix: str, faults: Faults
    ) -> None:
        """
        Check the arguments.

        :param faults: Receives the faults of data that is left out.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryNotFoundError: If one of the ids has no history.
        """
        self._store, self._faults = store, faults
        self._prefix = validated_text(prefix, "prefix")
        self._ids: list[str] | None = None
        if chat_history_ids is not None:
            if isinstance(chat_history_ids, str):
                raise ValueError("chat_history_ids must be a list of ids, got str.")
            if prefix:
                raise ValueError("Give chat_history_ids or a prefix, not both.")
            ids = [validated_id(each, f"chat_history_ids[{index}]") for index, each in enumerate(chat_history_ids)]
            self._ids = list(dict.fromkeys(ids))
            for each in self._ids:
                if self._history(each) is None:
                    raise history_not_found(each)

    def message_count(self) -> int:
        """Return the number of messages now, by the counters of the histories."""
        return sum(row.message_count for row in self._rows())

    def __iter__(self) -> Histories:
        for row in self._rows():
            if self._has_valid_id(row):
                with _Snapshot(self._store, row, self._faults) as snapshot:
                    if snapshot.take():
                        yield self._without_damage(snapshot.history), snapshot
        if self._ids is None and not self._prefix:
            self._report_unreadable_ids()

    def _rows(self) -> Iterator[HistoryRow]:
        if self._ids is not None:
            return filter(None, map(self._history, self._ids))
        return walk_histories(self._store, self._prefix)

    def _history(self, chat_history_id: str) -> HistoryRow | None:
        return self._store.engine.run(self._store.engine.history, self._store.scope, chat_history_id)

    def _has_valid_id(self, row: HistoryRow) -> bool:
        """Whether the id of a history is not damaged."""
        try:
            validated_id(row.chat_history_id, "its id")
        except ValueError as error:
            self._faults.add(invalid_id_fault(row.chat_history_id, error))
            return False
        return True

    def _without_damage(self, row: HistoryRow) -> HistoryRow:
        """Return a history with its damaged fields replaced."""
        times = [time for time in (row.created_at, row.updated_at) if is_time(time)] or [0]
        defaults: dict[str, Any] = {"title": None, "meta": None, "created_at": times[0], "updated_at": times[-1]}
        damaged = [name for name, (is_right, _) in _FIELDS.items() if not is_right(getattr(row, name))]
        for name in damaged:
            self._faults.add(Fault(chat_history_id=row.chat_history_id, description=_FIELDS[name][1]))
        return replace(row, **{name: defaults[name] for name in damaged})

    def _report_unreadable_ids(self) -> None:
        """Report the number of histories with ids that cannot be read."""
        try:
            left = self._number_of_unreadable_ids()
        except UnsupportedOperationError:
            return
        except ChatMessageStoreError:
            fault = f"Histories cannot be counted, so it is not known whether any was left out. {_ADVICE}"
        else:
            if not left:
                return
            which = f"{left} {'history has an id' if left == 1 else 'histories have ids'}"
            fault = f"{which} that cannot be read, and {'was' if left == 1 else 'were'} left out. {_ADVICE}"
        self._faults.add(Fault(description=fault))

    def _number_of_unreadable_ids(self) -> int:
        """
        Return the number of histories that the store counts and a walk does not find.

        While histories are created and deleted, the two numbers differ without a fault. If that goes on, return 0.
        """
        for _ in range(_MAX_COUNTS):
            before = self._count()
            left = before[0] - sum(1 for _ in walk_histories(self._store))
            if left <= 0:
                return 0
            if self._count() == before:
                return left
        return 0

    def _count(self) -> tuple[int, list[HistoryRow], list[HistoryRow]]:
        """
        Return the number of histories, and those that changed last, which show whether the store changed.

        One of them is the last whose time of change is past: times in the future do not change.
        """
        engine, scope = self._store.engine, self._store.scope
        count = engine.run(engine.statistics, scope, "").chat_histories
        last = engine.run(engine.histories, scope, "", None, 1)
        last_in_past = engine.run(engine.histories, scope, "", (microseconds_now(), ""), 1)
        return count, last, last_in_past


class _Snapshot:
    """
    A stored history and its readable messages, as of one moment. They are read once, and can be gone through again.

    One page is always consistent. A longer history is read again if it changed meanwhile, and any history if it got
    another user: what one user writes is never exported as another's.
    """

    def __init__(self, store: BaseChatMessageStore, history: HistoryRow, faults: Faults) -> None:
        self.history = history
        self._store, self._id, self._faults = store, history.chat_history_id, faults
        self._file = SpooledTemporaryFile(PAGE_CHARACTERS)  # moves to the disk when it grows large
        self._pages = 0

    def __enter__(self) -> "_Snapshot":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self) -> bool:
        """Read the messages. Return False if the history was deleted meanwhile."""
        for _ in range(_MAX_ATTEMPTS):
            is_long, before = self._read_pages() >= FIRST_PAGE, self.history
            now = self._store.engine.run(self._store.engine.history, self._store.scope, self._id)
            if now is None:
                return False
            has_same_user = before.user_id == now.user_id
            is_same = before.created_at == now.created_at and (not is_long or _state(before) == _state(now))
            if has_same_user and is_same:
                return True
            self.history = now
        if has_same_user:
            self._report("It changed all the time, so its messages may not be those of one moment.")
        else:
            self._pages = 0
            self._report("It got another user all the time, so its messages were left out.")
        return True

    def _read_pages(self) -> int:
        """Keep all messages, and return their number."""
        self._file.seek(0)
        self._pages = rows = 0
        try:
            for page in walk_readable_pages(self._store, self._id):
                pickle.dump(page, self._file)
                self._pages, rows = self._pages + 1, rows + len(page)
        except MessageDecodingError:
            self._pages = rows = 0
            self._report("Its messages cannot be read, and were left out.")
        return rows

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        self._file.seek(0)
        with SeenIds() as ids:
            for _ in range(self._pages):
                yield self._sound_rows(pickle.load(self._file), ids)  # noqa: S301  (this process wrote it)

    def _sound_rows(self, page: Sequence[MessageRow], ids: SeenIds) -> Sequence[MessageRow]:
        sound = []
        for row in page:
            if not is_sound(row):
                self._report("The message cannot be read, and was left out.", row.position)
            elif not ids.add(row.message_id):
                self._report("The message has the id of another one, and was left out.", row.position)
            else:
                sound.append(row)
        return sound

    def _report(self, description: str, position: int | None = None) -> None:
        self._faults.add(Fault(chat_history_id=self._id, position=position, description=description))


def _state(history: HistoryRow) -> tuple[int, int, int]:
    return history.revision, history.updated_at, history.message_count


def import_into(store: BaseChatMessageStore, histories: Histories, faults: Faults) -> TransferResult:
    """
    Import histories into a store, each whole or not at all. Messages that the store has already are skipped.

    :param faults: The faults of the source. They are complete when all histories have been read.
    :raises ChatHistoryExistsError: At the end, if the store has other messages under the ids of some histories.
    """
    chat_histories = messages = skipped = conflicts = 0
    named: list[str] = []
    for history, done in _import_all(store, histories):
        if done is None:
            conflicts += 1
            if len(named) < _MAX_NAMED:
                named.append(history.chat_history_id)
        else:
            chat_histories += done.is_changed
            messages += done.messages
            skipped += done.skipped
    if conflicts:
        which = "1 history has" if conflicts == 1 else f"{conflicts:,} histories have"
        more = f" and {conflicts - len(named):,} more" if conflicts > len(named) else ""
        raise ChatHistoryExistsError(
            f"{which} other messages in the store already. Nothing was added to {', '.join(map(repr, named))}{more}. "
            f"All other histories were imported. Added messages: {messages}, in chat histories: {chat_histories}. "
            f"Skipped messages: {skipped}."
        )
    return TransferResult(chat_histories=chat_histories, messages=messages, skipped=skipped, faults=tuple(faults))


class _Imported(NamedTuple):
    messages: int
    skipped: int
    is_changed: bool


def _import_all(store: BaseChatMessageStore, histories: Histories) -> Iterator[tuple[HistoryRow, _Imported | None]]:
    """
    Import short histories several at a time, and long ones alone, because a commit takes as long as many messages.
    """
    waiting: list[tuple[HistoryRow, list[MessageRow]]] = []
    space = _Space()
    for history, rows in histories:
        short = space.rows_that_fit(rows)
        if short is not None:
            waiting.append((history, short))
        if short is None or space.is_full():
            yield from _import_together(store, waiting)
            waiting, space = [], _Space()
        if short is None:
            yield history, _import_one(store, history, rows)
    yield from _import_together(store, waiting)


class _Space:
    """The space that is left in a batch of short histories."""

    def __init__(self) -> None:
        self._rows, self._characters = PAGE_ROWS, PAGE_CHARACTERS

    def rows_that_fit(self, rows: Rows) -> list[MessageRow] | None:
        """Return the messages of a history, or `None` if they are too many for any batch."""
        taken: list[MessageRow] = []
        characters = 0
        for batch in rows:
            taken += batch
            characters += sum(len(row.content) for row in batch)
            if len(taken) > PAGE_ROWS or characters > PAGE_CHARACTERS:
                return None
        self._rows -= len(taken) + 1
        self._characters -= characters
        return taken

    def is_full(self) -> bool:
        return self._rows <= 0 or self._characters <= 0


def _import_together(
    store: BaseChatMessageStore, histories: list[tuple[HistoryRow, list[MessageRow]]]
) -> Iterator[tuple[HistoryRow, _Imported | None]]:
    try:
        if len(histories) > 1:
            store.engine.run(store.engine.import_histories, store.scope, histories)
            yield from [(history, _Imported(len(rows), 0, True)) for history, rows in histories]
            return
    except ChatHistoryChangedError:
        pass  # the store has one of them: import them one by one
    for history, rows in histories:
        yield history, _import_one(store, history, [rows])


def _import_one(store: BaseChatMessageStore, history: HistoryRow, rows: Rows) -> _Imported | None:
    """Import one history, or the messages by which it continues the stored one. Return `None` if the two differ."""
    changed: ChatHistoryChangedError | None = None
    for _ in range(_MAX_ATTEMPTS):
        stored = store.engine.run(store.engine.history, store.scope, history.chat_history_id)
        pages = walk_pages(store, history.chat_history_id)
        overlap = _Overlap(0, True) if stored is None else _overlap(pages, rows)
        if overlap is None:
            return None
        if stored is not None and not overlap.has_more:
            return _Imported(0, overlap.messages, False)
        try:
            rest = _RowsFrom(rows, overlap.messages)
            revision = 0 if stored is None else stored.revision
            number = store.engine.run(store.engine.import_history, store.scope, history, rest, revision)
            return _Imported(number, overlap.messages, True)
        except ChatHistoryChangedError as error:  # another writer may have added the same messages: compare again
            changed = error
    raise ChatHistoryChangedError(
        f"The chat history {history.chat_history_id!r} was written to all the time, so nothing was added to it. "
        "The histories before it were imported. Try again when it does not change."
    ) from changed


class _Overlap(NamedTuple):
    """
    How much of an arriving history the store has.

    :param messages: The number of messages that both have.
    :param has_more: Whether the arriving history continues the stored one.
    """

    messages: int
    has_more: bool


def _overlap(stored: Iterable[Sequence[MessageRow]], arriving: Rows) -> _Overlap | None:
    """
    Compare two histories by the ids of their messages, without holding either in memory.

    :returns: `None` if they differ before one of them ends.
    """
    messages = 0
    for old, new in zip_longest(chain.from_iterable(stored), chain.from_iterable(arriving)):
        if old is None or new is None:
            return _Overlap(messages, new is not None)
        if old.message_id != new.message_id:
            return None
        messages += 1
    return _Overlap(messages, False)


class _RowsFrom:
    """The messages of a history without the first ones."""

    def __init__(self, rows: Rows, start: int) -> None:
        self._rows, self._start = rows, start

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        before = self._start
        for batch in self._rows:
            if len(batch) > before:
                yield batch[before:]
            before = max(before - len(batch), 0)
