# SPDX-License-Identifier: Apache-2.0
"""
Chat histories as they leave a store, and as they arrive in one.
"""

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
from haystack_chat_store.transfer.histories import (
    Faults,
    Histories,
    Rows,
    TransferResult,
    is_meta,
    is_sound,
    is_time,
    is_title,
    unnamed,
)
from haystack_chat_store.transfer.seen_ids import SeenIds
from haystack_chat_store.types import Fault
from haystack_chat_store.validation import validated_id, validated_text

# So often a history may change while it is read, or imported to, before that is given up.
_ATTEMPTS = 10
# So often histories are counted, in the hope that nobody writes meanwhile.
_COUNTS = 3
_ADVICE = "To find out: haystack-chat-store doctor"
# What a history has beside its id, how it is checked, and what is said if it is damaged.
_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "title": (is_title, "Its title cannot be read, and was left out."),
    "meta": (is_meta, "Its meta cannot be read, and was left out."),
    "created_at": (is_time, "Its time of creation cannot be read, and was replaced."),
    "updated_at": (is_time, "Its time of change cannot be read, and was replaced."),
}


class StoredHistories:
    """
    Histories of a store, each once, whatever is written meanwhile.
    """

    def __init__(
        self, store: BaseChatMessageStore, chat_history_ids: Iterable[str] | None, prefix: str, faults: Faults
    ) -> None:
        """
        Check which histories are meant.

        :param faults: Gets what cannot be read, and is left out.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryNotFoundError: If there is no history with one of these ids.
        """
        self._store, self._faults = store, faults
        self._prefix = validated_text(prefix, "prefix")
        self._ids: list[str] | None = None
        if chat_history_ids is not None:
            if isinstance(chat_history_ids, str):
                raise ValueError("chat_history_ids must be a list of ids, got one text.")
            if prefix:
                raise ValueError("Give chat_history_ids or a prefix, not both.")
            ids = [validated_id(each, f"chat_history_ids[{index}]") for index, each in enumerate(chat_history_ids)]
            self._ids = list(dict.fromkeys(ids))
            for each in self._ids:
                if self._looked_up(each) is None:
                    raise history_not_found(each)

    def message_count(self) -> int:
        """
        Return how many messages they have now, by their counters.
        """
        return sum(row.message_count for row in self._rows())

    def __iter__(self) -> Histories:
        for row in self._rows():
            history = self._readable(row)
            if history is not None:
                yield history, _StoredRows(self._store, row, self._faults)
        if self._ids is None and not self._prefix:
            self._report_unnamed()

    def _rows(self) -> Iterator[HistoryRow]:
        if self._ids is not None:
            return filter(None, map(self._looked_up, self._ids))
        return walk_histories(self._store, self._prefix)

    def _looked_up(self, chat_history_id: str) -> HistoryRow | None:
        return self._store.engine.run(self._store.engine.history, self._store.scope, chat_history_id)

    def _readable(self, row: HistoryRow) -> HistoryRow | None:
        """
        Return the history as every store would take it, without what is damaged of it; `None` if its id is.
        """
        try:
            validated_id(row.chat_history_id, "its id")
        except ValueError as error:
            self._faults[unnamed(row.chat_history_id, error)] = None
            return None
        times = [time for time in (row.created_at, row.updated_at) if is_time(time)] or [0]
        instead: dict[str, Any] = {"title": None, "meta": None, "created_at": times[0], "updated_at": times[-1]}
        damaged = [name for name, (is_right, _) in _PARTS.items() if not is_right(getattr(row, name))]
        for name in damaged:
            self._faults[Fault(chat_history_id=row.chat_history_id, description=_PARTS[name][1])] = None
        return replace(row, **{name: instead[name] for name in damaged})

    def _report_unnamed(self) -> None:
        """
        Report how many histories the store has that no walk comes to.
        """
        try:
            left = self._number_of_unnamed()
        except UnsupportedOperationError:
            return
        except ChatMessageStoreError:
            fault = f"Histories cannot be counted, so it is not known whether any was left out. {_ADVICE}"
        else:
            if not left:
                return
            which = f"{left} {'history has an id' if left == 1 else 'histories have ids'}"
            fault = f"{which} that cannot be read, and {'was' if left == 1 else 'were'} left out. {_ADVICE}"
        self._faults[Fault(description=fault)] = None

    def _number_of_unnamed(self) -> int:
        """
        Return how many histories are counted that no walk comes to.

        Where others write all the time, that cannot be told from histories that have come or gone just now: then none.
        """
        for _ in range(_COUNTS):
            before = self._counted()
            left = before[0] - sum(1 for _ in walk_histories(self._store))
            if left <= 0:
                return 0
            if self._counted() == before:
                return left
        return 0

    def _counted(self) -> tuple[int, Any]:
        """
        Return how many histories there are, and which changed last: a new one takes its place.
        """
        count = self._store.engine.run(self._store.engine.statistics, self._store.scope, "").chat_histories
        return count, self._store.engine.run(self._store.engine.histories, self._store.scope, "", None, 1)


class _StoredRows:
    """
    The messages of a stored history that can be read, as of one moment.

    A page is of one moment by itself. Of a longer history, all pages are read before any is passed on, and read again
    if it was changed meanwhile.
    """

    def __init__(self, store: BaseChatMessageStore, history: HistoryRow, faults: Faults) -> None:
        self._store, self._id, self._faults = store, history.chat_history_id, faults
        self._updated_at: int | None = history.updated_at

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        for attempt in range(1, _ATTEMPTS + 1):
            with SpooledTemporaryFile(PAGE_CHARACTERS) as kept:  # on the disk if it is much
                count = rows = 0
                try:
                    for page in walk_readable_pages(self._store, self._id):
                        pickle.dump(page, kept)
                        count, rows = count + 1, rows + len(page)
                except MessageDecodingError:
                    self._report("Its messages cannot be read, and were left out.")
                    return
                is_changed = rows >= FIRST_PAGE and self._is_changed()
                if is_changed and attempt == _ATTEMPTS:
                    self._report(
                        "It was changed all the time, and parts of it may have been read before others were changed."
                    )
                if not is_changed or attempt == _ATTEMPTS:
                    kept.seek(0)
                    with SeenIds() as ids:
                        for _ in range(count):
                            yield self._sound(pickle.load(kept), ids)  # noqa: S301  (we wrote it)
                    return

    def _is_changed(self) -> bool:
        before = self._updated_at
        history = self._store.engine.run(self._store.engine.history, self._store.scope, self._id)
        self._updated_at = None if history is None else history.updated_at
        return self._updated_at != before

    def _sound(self, page: Sequence[MessageRow], ids: SeenIds) -> Sequence[MessageRow]:
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
        self._faults[Fault(chat_history_id=self._id, position=position, description=description)] = None


def imported(store: BaseChatMessageStore, histories: Histories, faults: Faults) -> TransferResult:
    """
    Bring histories into a store, each whole or not at all. What is there already is not brought again.

    :param faults: What the source cannot read. It fills while the histories are read.
    :raises ChatHistoryExistsError: At the end, if the store has other messages under the ids of some of them.
    """
    chat_histories = messages = skipped = 0
    conflicting: list[str] = []
    for history, arrived in _all_arrived(store, histories):
        if arrived is None:
            conflicting.append(history.chat_history_id)
        else:
            chat_histories += arrived.is_changed
            messages += arrived.messages
            skipped += arrived.skipped
    if conflicting:
        which = "1 history has" if len(conflicting) == 1 else f"{len(conflicting)} histories have"
        raise ChatHistoryExistsError(
            f"{which} other messages there already, to which nothing was added: {', '.join(map(repr, conflicting))}. "
            f"All others have arrived. Added: {messages} messages, of chat histories: {chat_histories}. Messages that "
            f"were there already: {skipped}."
        )
    return TransferResult(chat_histories=chat_histories, messages=messages, skipped=skipped, faults=tuple(faults))


class _Arrived(NamedTuple):
    messages: int
    skipped: int
    is_changed: bool


def _all_arrived(store: BaseChatMessageStore, histories: Histories) -> Iterator[tuple[HistoryRow, _Arrived | None]]:
    """
    Bring histories into the store: short ones several at once, for each commit takes as long as many messages.
    """
    waiting: list[tuple[HistoryRow, list[MessageRow]]] = []
    room = _Room()
    for history, rows in histories:
        short = room.rows_that_fit(rows)
        if short is not None:
            waiting.append((history, short))
        if short is None or room.is_full():
            yield from _together_arrived(store, waiting)
            waiting, room = [], _Room()
        if short is None:
            yield history, _arrived(store, history, rows)
    yield from _together_arrived(store, waiting)


class _Room:
    """
    How much still fits into a batch.
    """

    def __init__(self) -> None:
        self._rows, self._characters = PAGE_ROWS, PAGE_CHARACTERS

    def rows_that_fit(self, rows: Rows) -> list[MessageRow] | None:
        """
        Take the messages of a history, or return `None` if they are more than a batch has.
        """
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


def _together_arrived(
    store: BaseChatMessageStore, histories: list[tuple[HistoryRow, list[MessageRow]]]
) -> Iterator[tuple[HistoryRow, _Arrived | None]]:
    try:
        if len(histories) > 1:
            store.engine.run(store.engine.import_histories, store.scope, histories)
            yield from [(history, _Arrived(len(rows), 0, True)) for history, rows in histories]
            return
    except ChatHistoryChangedError:
        pass  # one of them is there: one by one, then
    for history, rows in histories:
        yield history, _arrived(store, history, [rows])


def _arrived(store: BaseChatMessageStore, history: HistoryRow, rows: Rows) -> _Arrived | None:
    """
    Bring one history into the store, or what it has more than the stored one. `None` if the two differ before that.
    """
    changed: ChatHistoryChangedError | None = None
    for _ in range(_ATTEMPTS):
        is_there = store.engine.run(store.engine.history, store.scope, history.chat_history_id) is not None
        common = _common(walk_pages(store, history.chat_history_id), rows) if is_there else _Common(0, True)
        if common is None:
            return None
        if is_there and not common.has_more:
            return _Arrived(0, common.messages, False)
        try:
            rest = _Rest(rows, common.messages)
            number = store.engine.run(store.engine.import_history, store.scope, history, rest, common.messages)
            return _Arrived(number, common.messages, True)
        except ChatHistoryChangedError as error:  # somebody else wrote to it, perhaps the same messages: look again
            changed = error
    raise ChatHistoryChangedError(
        f"The chat history {history.chat_history_id!r} was written to all the time, and nothing was added to it. "
        "The histories before it have arrived. Try again when nobody writes to it."
    ) from changed


class _Common(NamedTuple):
    """
    How far a stored and an arriving history are the same.

    :param messages: How many messages of the arriving one are there.
    :param has_more: Whether it has more than that.
    """

    messages: int
    has_more: bool


def _common(stored: Iterable[Sequence[MessageRow]], arriving: Rows) -> _Common | None:
    """
    Compare two histories by the ids of their messages. Neither is held in memory.

    :returns: `None` if they differ before one of them ends.
    """
    common = 0
    for there, new in zip_longest(chain.from_iterable(stored), chain.from_iterable(arriving)):
        if there is None or new is None:
            return _Common(common, new is not None)
        if there.message_id != new.message_id:
            return None
        common += 1
    return _Common(common, False)


class _Rest:
    """
    The messages of a history from one on.
    """

    def __init__(self, rows: Rows, start: int) -> None:
        self._rows, self._start = rows, start

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        before = self._start
        for batch in self._rows:
            if len(batch) > before:
                yield batch[before:]
            before = max(before - len(batch), 0)
