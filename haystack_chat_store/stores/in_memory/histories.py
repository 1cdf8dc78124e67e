# SPDX-License-Identifier: Apache-2.0
"""The data structures of chat histories in memory."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import zip_longest
from typing import Any, NamedTuple, cast

from haystack.dataclasses import ChatRole

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.search_text import searchable_text_of_content
from haystack_chat_store.stores.conflicts import check_access
from haystack_chat_store.stores.engine import OperationT
from haystack_chat_store.stores.in_memory.search_index import SearchIndex
from haystack_chat_store.stores.rows import (
    EncodedMessage,
    HistoryRow,
    MessageRow,
    Scope,
    WindowRows,
    branch_origin,
    meta_of_branch,
    renamed_branch_ids,
)
from haystack_chat_store.stores.times import microseconds_now


class Stored(NamedTuple):
    """A message of a history. Its position is its index in the history's list of messages."""

    created_at: int
    message_id: str
    role: str
    content: str
    text: str | None  # its beginning, for lists of histories


@dataclass
class History:
    """
    The messages of a history, and their positions by id. A deleted message leaves `None` at its position.

    Appending only extends the list of messages. The positions catch up before they are used. So appending is a single
    step: Ctrl-C cannot split it, and neither can a signal handler that writes to the same history. For any other
    change, a new `History` replaces the old one.
    """

    created_at: int
    revision: int
    updated_at: int = 0
    title: str | None = None
    meta: str | None = None
    messages: list[Stored | None] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    user_positions: list[int] = field(default_factory=list)
    caught_up_count: int = 0
    exists_without_messages: bool = False
    user_id: str | None = None
    expires_at: int | None = None

    @property
    def exists(self) -> bool:
        """
        Whether a write to the history was completed. It may have no messages any more.

        An interrupted first write leaves a `History` that does not exist for callers.
        """
        return bool(self.messages) or self.exists_without_messages

    def has_expired(self) -> bool:
        """Whether its lifetime is over."""
        return self.expires_at is not None and self.expires_at <= microseconds_now()

    def caught_up(self) -> "History":
        """
        Note the positions of new messages, and return this history.

        Each step is idempotent, because an interrupted call repeats it.
        """
        for position in range(self.caught_up_count, len(self.messages)):
            message = self.messages[position]
            if message is not None:
                self.positions[message.message_id] = position
                if message.role == ChatRole.USER.value and position > max(self.user_positions[-1:], default=-1):
                    self.user_positions.append(position)
            self.caught_up_count = position + 1
        return self

    def known(self, messages: Sequence[EncodedMessage]) -> dict[str, int]:
        """Return the ids of messages that the history already has, with their positions."""
        positions = self.caught_up().positions
        ids = [message.message_id for message in messages]
        return {message_id: positions[message_id] for message_id in ids if message_id in positions}

    def count(self) -> int:
        """Return the number of messages."""
        return len(self.caught_up().positions)

    def equal(self, messages: Sequence[EncodedMessage]) -> dict[str, int]:
        """Return the ids of messages that the history already has, equal, with their positions."""
        known = self.known(messages)
        stored = {message_id: self.messages[position] for message_id, position in known.items()}
        return {
            message.message_id: known[message.message_id]
            for message in messages
            if (found := stored.get(message.message_id)) is not None
            and (found.role, found.content) == (message.role, message.content)
        }

    def append(self, messages: Sequence[Stored], now: int, user_id: str | None, expires_at: int | None) -> None:
        """
        Append messages in a single step. If a greater revision is all that Ctrl-C leaves of it, it does no harm.

        :param user_id: The user that the history belongs to if it begins now.
        :param expires_at: When it expires, or `None` for never.
        """
        if not self.exists:
            self.user_id = user_id
        self.revision += 1
        self.expires_at = expires_at
        self.updated_at = max(self.updated_at, now)
        self.messages.extend(messages)

    def changed(self, now: int, changes: Mapping[int, Stored | None], new: Sequence[Stored] = ()) -> "History":
        """
        Return a copy of this history with changed and new messages.

        :param now: The time of the change, in microseconds since 1970, UTC.
        :param changes: The new message at each changed position, `None` for a deleted message.
        :param new: The messages to append. Defaults to none.
        """
        messages = [*self.messages, *new]
        for position, message in changes.items():
            messages[position] = message
        changed = replace(
            self,
            revision=self.revision + 1,
            updated_at=max(self.updated_at, now),
            messages=messages,
            positions={},
            user_positions=[],
            caught_up_count=0,
        )
        return changed.caught_up()  # now, because the next call may run on an event loop

    def read(self, window: Window) -> WindowRows:
        """Return the messages in the window."""
        self.caught_up()
        if window.count is None:
            start, size = 0, 0
        elif window.unit == "round":
            size = window.size(len(self.user_positions))
            start = self.user_positions[-size] if size <= len(self.user_positions) else 0
        else:
            size = window.size(len(self.positions))
            start = self._start_of_last(size)
        contents = [message.content for message in self.messages[start:] if message is not None]
        return WindowRows(contents, size, self.revision, len(self.user_positions))

    def _start_of_last(self, size: int) -> int:
        """
        Return the position of the first of the last `size` messages. If it is a tool message, go back to its call.
        """
        start = len(self.messages)
        while start > 0 and size > 0:
            start -= 1
            size -= self.messages[start] is not None
        while start > 0 and ((first := self.messages[start]) is None or first.role == ChatRole.TOOL.value):
            start -= 1
        return start

    def page(self, before: int | None, after: int | None, limit: int) -> list[MessageRow]:
        """Return a page of messages, in order."""
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
        """Return the history's row in the directory."""
        last = self._last_said()
        return HistoryRow(
            chat_history_id=chat_history_id,
            message_count=self.count(),
            round_count=len(self.user_positions),
            created_at=self.created_at,
            updated_at=self.updated_at,
            title=self.title,
            meta=self.meta,
            revision=self.revision,
            user_id=self.user_id,
            preview=self._first_question(),
            last_role=None if last is None else last.role,
            last_text=None if last is None else last.text,
            last_at=None if last is None else last.created_at,
        )

    def _first_question(self) -> str | None:
        questions = (self.messages[position] for position in self.caught_up().user_positions)
        return next((question.text for question in questions if question is not None and question.text), None)

    def _last_said(self) -> Stored | None:
        for message in reversed(self.messages):
            if message is not None and message.role != ChatRole.SYSTEM.value:
                return message
        return None


@dataclass
class Namespace:
    """The histories of a namespace, and the index of their words, which the first search fills."""

    histories: dict[str, History] = field(default_factory=dict)
    index: SearchIndex = field(default_factory=SearchIndex)
    deleted_revision: int = 0  # the greatest that a deleted history had
    #: The ids of histories that are, or once were, branches of a history.
    branches: dict[str, set[str]] = field(default_factory=dict)

    def find(self, scope: Scope, chat_history_id: str) -> History | None:
        """Return a history to read, or `None` if it does not exist, has expired, or is another user's."""
        history = self.histories.get(chat_history_id)
        return history if history is not None and _is_visible(scope, history) else None

    def find_to_write(self, scope: Scope, chat_history_id: str) -> History | None:
        """
        Return a history to write to, or `None` if it does not exist. If it has expired, it is removed.

        :raises ChatHistoryAccessError: If it is another user's.
        """
        history = self.histories.get(chat_history_id)
        if history is None or not history.exists:
            return None
        if history.expires_at is not None and history.has_expired():
            self.put(chat_history_id, None)
            return None
        check_access(scope, history.user_id)
        return history

    def put(self, chat_history_id: str, history: History | None) -> None:
        """Replace a history or, with `None`, remove it. Keep the index of words up to date."""
        before = self.histories.get(chat_history_id)
        if before is not None:
            after = [] if history is None else history.messages
            for position, (old, new) in enumerate(zip_longest(before.messages, after)):
                if old is not None and old is not new:
                    self.index.forget((chat_history_id, position), searchable_text_of_content(old.content))
        if history is None:
            self.deleted_revision = max(self.deleted_revision, 0 if before is None else before.revision)
            self.index.unindexed.pop(chat_history_id, None)
            self.histories.pop(chat_history_id, None)
        else:
            self.index.unindexed[chat_history_id] = 0
            self.histories[chat_history_id] = history

    def with_prefix(self, scope: Scope, prefix: str) -> list[str]:
        """Return the ids of the scope's histories that begin with a text."""
        found = self.histories.items()
        ids = [each for each, history in found if each.startswith(prefix) and _is_visible(scope, history)]
        return ids if scope.with_branches else [each for each in ids if not self.is_branch(each)]

    def is_branch(self, chat_history_id: str) -> bool:
        """Whether a history is a branch of another one."""
        return branch_origin(chat_history_id, self.histories[chat_history_id].meta) is not None

    def note_branch(self, chat_history_id: str) -> None:
        """Note whose branch a history is, after its meta was set."""
        origin = branch_origin(chat_history_id, self.histories[chat_history_id].meta)
        if origin is not None:
            self.branches.setdefault(origin, set()).add(chat_history_id)

    def delete(self, scope: Scope, chat_history_id: str) -> None:
        """Remove a history and its branches, but none of another user."""
        history = self.histories.get(chat_history_id)
        if history is not None:
            self.put(chat_history_id, None)
        for each, branch in self._branches_of(chat_history_id):
            is_own = scope.includes(branch.user_id) if history is None else branch.user_id == history.user_id
            if is_own and each in self.histories:
                self.delete(scope, each)

    def hand_over(self, chat_history_id: str, after: str | None) -> None:
        """Give a history, with its branches and theirs, to another user, or to none."""
        history = self.histories[chat_history_id]
        if history.user_id != after:
            self.histories[chat_history_id] = replace(history, user_id=after)
            for each, branch in self._branches_of(chat_history_id):
                if branch.user_id == history.user_id:
                    self.hand_over(each, after)

    def rename(self, old_id: str, new_id: str, meta: str | None) -> None:
        """
        Give a history, with its branches and theirs, another id.

        :param meta: The meta that it has under its new id.
        """
        history = self.histories[old_id]
        revision = max(self.deleted_revision, history.revision) + 1
        # The new one comes first: Ctrl-C between them leaves both, and loses nothing.
        self.put(new_id, replace(history, revision=revision, meta=meta))
        self.note_branch(new_id)
        self.put(old_id, None)  # which keeps its revision
        for each, branch in self._branches_of(old_id):
            if branch.user_id == history.user_id and each in self.histories:
                names = renamed_branch_ids(each, old_id, new_id)
                free = next(filter(self._is_free, names))
                self.rename(each, free, meta_of_branch(branch.meta, new_id))

    def _is_free(self, chat_history_id: str) -> bool:
        """Whether no history has this id."""
        history = self.histories.get(chat_history_id)
        if history is not None and history.has_expired():
            self.put(chat_history_id, None)
        return chat_history_id not in self.histories or not self.histories[chat_history_id].exists

    def _branches_of(self, chat_history_id: str) -> list[tuple[str, History]]:
        """Return the histories that name this one as their origin, of whatever user, and forget those that do not."""
        noted = {each: self.histories.get(each) for each in sorted(self.branches.get(chat_history_id, ()))}
        found = [
            (each, branch)
            for each, branch in noted.items()
            if branch is not None and branch_origin(each, branch.meta) == chat_history_id
        ]
        if noted:
            self.branches[chat_history_id] = {each for each, _ in found}
        return found


class Memory:
    """
    The histories of a process, by namespace.

    Each operation holds `lock` while it reads or changes them: see `locked`. The lock is reentrant, because a signal
    handler or a finalizer may interrupt an operation of the same thread and write.
    """

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        """
        Start without histories.

        :param lock: The lock that each operation holds.
        """
        self.lock = lock
        self._namespaces: dict[str, Namespace] = {}

    def with_lock(self, lock: AbstractContextManager[Any]) -> "Memory":
        """Return the same histories, with another way to the lock."""
        memory = copy(self)
        memory.lock = lock
        return memory

    def of(self, scope: Scope) -> Namespace:
        """Return the namespace of a scope."""
        return self._namespaces.setdefault(scope.namespace, Namespace())

    def namespaces(self) -> list[str]:
        """Return the names of the namespaces that have histories."""
        return sorted(name for name, namespace in self._namespaces.items() if namespace.with_prefix(Scope(name), ""))


def locked(operation: OperationT) -> OperationT:
    """
    Have an operation hold the lock from its first line to its last.

    The lock surrounds a call, and no loop: since Python 3.12, the exception of a signal handler at the end of a loop
    in a `with` leaves it without its exit, and the lock would stay taken.
    """

    @wraps(operation)
    def run(engine: Any, session: Memory, *arguments: Any, **options: Any) -> Any:
        with session.lock:
            return operation(engine, session, *arguments, **options)

    return cast(OperationT, run)


def _is_visible(scope: Scope, history: History) -> bool:
    return history.exists and scope.includes(history.user_id) and not history.has_expired()
