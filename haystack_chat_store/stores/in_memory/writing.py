# SPDX-License-Identifier: Apache-2.0
"""The operations that change messages."""

from collections.abc import Iterable, Sequence

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_count,
    history_exists,
    history_has_messages,
    history_not_found,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory.histories import History, Memory, Namespace, Stored
from haystack_chat_store.stores.in_memory.search_index import SearchIndex
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope
from haystack_chat_store.stores.times import microseconds_now


class Writing(Engine[Memory]):
    """The operations that change messages."""

    def append(
        self,
        session: Memory,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        """
        Append messages in a single step, which Ctrl-C cannot split. If messages are replaced, replace the history.
        """
        with session.lock:
            namespace, now = session.of(scope), microseconds_now()
            history = namespace.find(chat_history_id)
            check_count(expected_count, 0 if history is None else history.count())
            plan = planned(messages, {} if history is None else history.known(messages), policy)
            new = [_stored(message, now) for message in plan.new]
            if history is not None and plan.replaced:
                times = {place: message.created_at for place in plan.replaced if (message := history.messages[place])}
                changes = {place: _stored(message, times[place]) for place, message in plan.replaced.items()}
                namespace.put(chat_history_id, history.changed(now, changes, new))
            elif new:
                _append(namespace, chat_history_id, new, now)
            return len(plan.new) + len(plan.replaced)

    def delete(self, session: Memory, scope: Scope, chat_history_id: str) -> None:
        """Remove the history."""
        with session.lock:
            session.of(scope).put(chat_history_id, None)

    def delete_all(self, session: Memory, scope: Scope) -> bool:
        """Remove the namespace's histories and its index."""
        with session.lock:
            namespace = session.of(scope)
            namespace.histories, namespace.index = {}, SearchIndex()
        return False

    def delete_messages(
        self,
        session: Memory,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
    ) -> None:
        """Leave a gap at the position of each message."""
        with session.lock:
            namespace = session.of(scope)
            history = namespace.find(chat_history_id)
            positions = {} if history is None else history.caught_up().positions
            if from_message_id is not None:
                if from_message_id not in positions:
                    raise message_not_found(from_message_id)
                gone = [position for position in positions.values() if position >= positions[from_message_id]]
            else:
                gone = [positions[message_id] for message_id in message_ids or () if message_id in positions]
            _remove(namespace, chat_history_id, gone)

    def copy(self, session: Memory, scope: Scope, source_id: str, target_id: str, until_message_id: str | None) -> int:
        """Append the source's messages to the target, without gaps."""
        with session.lock:
            namespace = session.of(scope)
            source, target = namespace.find(source_id), namespace.find(target_id)
            if source is None:
                raise history_not_found(source_id)
            end = len(source.messages)
            if until_message_id is not None:
                if until_message_id not in source.caught_up().positions:
                    raise message_not_found(until_message_id)
                end = source.positions[until_message_id] + 1
            if target is not None and target.count():
                raise history_has_messages(target_id)
            copied = [message for message in source.messages[:end] if message is not None]
            if copied:
                _append(namespace, target_id, copied, microseconds_now())
            return len(copied)

    def import_history(
        self,
        session: Memory,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_count: int,
    ) -> int:
        """Read all batches without the lock, because that may take long, and then append them in one step."""
        imported = [_imported(row) for rows in batches for row in rows]
        with session.lock:
            return _import(session.of(scope), history, imported, expected_count)

    def import_histories(
        self, session: Memory, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        """Import all histories, if none of them exists."""
        with session.lock:
            namespace = session.of(scope)
            for history, _ in histories:
                existing = namespace.find(history.chat_history_id)
                if existing is not None:
                    raise history_exists(history.chat_history_id)
            return sum(_import(namespace, history, list(map(_imported, rows)), 0) for history, rows in histories)

    def remove(self, session: Memory, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
        """Leave a gap at the position of each message."""
        with session.lock:
            _remove(session.of(scope), chat_history_id, positions)


def _append(namespace: Namespace, chat_history_id: str, new: Sequence[Stored], now: int) -> None:
    history = namespace.histories.setdefault(chat_history_id, History(now))
    namespace.index.unindexed.setdefault(chat_history_id, len(history.messages))
    history.append(new, now)


def _remove(namespace: Namespace, chat_history_id: str, positions: Sequence[int]) -> None:
    history = namespace.find(chat_history_id)
    if history is not None and positions:
        namespace.put(chat_history_id, history.changed(microseconds_now(), dict.fromkeys(positions)))


def _import(namespace: Namespace, history: HistoryRow, imported: Sequence[Stored], expected_count: int) -> int:
    target = namespace.find(history.chat_history_id)
    check_count(expected_count, 0 if target is None else target.count())
    if target is None:
        target = History(history.created_at, title=history.title, meta=history.meta, exists_without_messages=True)
    updated_at = max(target.updated_at, history.updated_at)
    namespace.put(history.chat_history_id, target.changed(updated_at, {}, imported))
    return len(imported)


def _stored(message: EncodedMessage, created_at: int) -> Stored:
    return Stored(created_at, message.message_id, message.role, message.content)


def _imported(row: MessageRow) -> Stored:
    return Stored(row.created_at, row.message_id, row.role, row.content)
