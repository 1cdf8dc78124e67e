# SPDX-License-Identifier: Apache-2.0
"""
Chat histories in the memory of a process.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple

from haystack.dataclasses import ChatRole

from haystack_chat_store.rounds import Window
from haystack_chat_store.search_text import searchable_text_of_content
from haystack_chat_store.stores.in_memory.search_index import SearchIndex
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope


class Stored(NamedTuple):
    """
    A message in its history. Its position is its index there.
    """

    created_at: int
    message_id: str
    role: str
    content: str


@dataclass
class History:
    """
    The messages of a history and an index of them. Where one was deleted, there is `None`.

    To append, only the messages are written; the index catches up before it is used. So that is a single step, which
    neither Ctrl-C can cut in two nor a signal handler that writes to the same history. For any other change, a new
    `History` takes the place of the old one.
    """

    created_at: int
    updated_at: int = 0
    title: str | None = None
    meta: str | None = None
    messages: list[Stored | None] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    user_positions: list[int] = field(default_factory=list)
    indexed: int = 0
    is_kept: bool = False  # even without messages

    @property
    def is_there(self) -> bool:
        """
        Whether it has been written to, however many messages are left. A write that was interrupted may not have.
        """
        return bool(self.messages) or self.is_kept

    def catch_up(self) -> None:
        """
        Index the messages that are new. Each step may be done twice without harm.
        """
        for position in range(self.indexed, len(self.messages)):
            message = self.messages[position]
            if message is not None:
                self.positions[message.message_id] = position
                if message.role == ChatRole.USER.value and position > max(self.user_positions[-1:], default=-1):
                    self.user_positions.append(position)
            self.indexed = position + 1

    def caught_up(self) -> "History":
        """
        Return this history, with everything indexed.
        """
        self.catch_up()
        return self

    def known(self, messages: Sequence[EncodedMessage]) -> dict[str, int]:
        """
        Return the ids among these that the history has, and where.
        """
        self.catch_up()
        return {m.message_id: self.positions[m.message_id] for m in messages if m.message_id in self.positions}

    def count(self) -> int:
        """
        Return the number of messages.
        """
        self.catch_up()
        return len(self.positions)

    def append(self, messages: Sequence[Stored], now: int) -> None:
        """
        Append messages, as a single step.
        """
        self.updated_at = max(self.updated_at, now)
        self.messages.extend(messages)

    def changed(self, now: int, changes: Mapping[int, Stored | None], new: Sequence[Stored] = ()) -> "History":
        """
        Return a history that is like this one but for what is at some positions, and what is new.
        """
        messages = [*self.messages, *new]
        for position, message in changes.items():
            messages[position] = message
        changed = replace(
            self, updated_at=max(self.updated_at, now), messages=messages, positions={}, user_positions=[], indexed=0
        )
        return changed.caught_up()  # here and now, or the next call would have to, which may be one of an event loop

    def read(self, window: Window) -> tuple[list[str], int]:
        """
        Return the contents in the window, and its size.
        """
        self.catch_up()
        if window.count is None:
            start, size = 0, 0
        elif window.unit == "round":
            size = window.size(len(self.user_positions))
            start = self.user_positions[-size] if size <= len(self.user_positions) else 0
        else:
            size = window.size(len(self.positions))
            start = self._start_of_last(size)
        return [message.content for message in self.messages[start:] if message is not None], size

    def _start_of_last(self, size: int) -> int:
        """
        Return where the last messages begin, and where that is a tool message, what comes before it.
        """
        start = len(self.messages)
        while start > 0 and size > 0:
            start -= 1
            size -= self.messages[start] is not None
        while start > 0 and ((first := self.messages[start]) is None or first.role == ChatRole.TOOL.value):
            start -= 1
        return start

    def page(self, before: int | None, after: int | None, limit: int) -> list[MessageRow]:
        """
        Return a page of messages, in order.
        """
        if after is not None:
            return list(self._rows(range(after + 1, len(self.messages)), limit))
        end = len(self.messages) if before is None else min(before, len(self.messages))
        return list(self._rows(range(end - 1, -1, -1), limit))[::-1]

    def _rows(self, positions: Collection[int], limit: int) -> Iterator[MessageRow]:
        for position in positions:
            if limit == 0:
                return
            message = self.messages[position]
            if message is not None:
                limit -= 1
                yield MessageRow(
                    position=position,
                    created_at=message.created_at,
                    message_id=message.message_id,
                    role=message.role,
                    content=message.content,
                )

    def row(self, chat_history_id: str) -> HistoryRow:
        """
        Return what a directory shows.
        """
        return HistoryRow(
            chat_history_id=chat_history_id,
            message_count=self.count(),
            round_count=len(self.user_positions),
            created_at=self.created_at,
            updated_at=self.updated_at,
            title=self.title,
            meta=self.meta,
        )


@dataclass
class Namespace:
    """
    The histories of a namespace, and the index of their words, which searches fill.
    """

    histories: dict[str, History] = field(default_factory=dict)
    index: SearchIndex = field(default_factory=SearchIndex)

    def find(self, chat_history_id: str) -> History | None:
        """
        Return a history, if it is there.
        """
        history = self.histories.get(chat_history_id)
        return history if history is not None and history.is_there else None

    def put(self, chat_history_id: str, history: History | None) -> None:
        """
        Put a history in the place of what there was, or nothing.
        """
        before = self.histories.get(chat_history_id)
        if before is not None:
            after = [] if history is None else history.messages
            for position, (old, new) in enumerate(zip_longest(before.messages, after)):
                if old is not None and old is not new:
                    self.index.forget((chat_history_id, position), searchable_text_of_content(old.content))
        if history is None:
            self.index.unindexed.pop(chat_history_id, None)
            self.histories.pop(chat_history_id, None)
        else:
            self.index.unindexed[chat_history_id] = 0
            self.histories[chat_history_id] = history

    def with_prefix(self, prefix: str) -> list[str]:
        """
        Return the ids of the histories that begin with a text.
        """
        return [each for each, history in self.histories.items() if history.is_there and each.startswith(prefix)]


class Memory:
    """
    The histories of a process, by namespace.

    Each operation holds `lock` while it looks at them. The lock is reentrant, because a signal handler or a finalizer
    that writes may interrupt an operation of the same thread.
    """

    def __init__(self) -> None:
        """
        Start without any.
        """
        self.lock = threading.RLock()
        self._namespaces: dict[str, Namespace] = {}

    def of(self, scope: Scope) -> Namespace:
        """
        Return the histories of a scope.
        """
        return self._namespaces.setdefault(scope.namespace, Namespace())
