# SPDX-License-Identifier: Apache-2.0
"""The operations that change messages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_revision,
    check_same_user,
    compares_contents,
    history_exists,
    history_has_messages,
    history_not_found,
    is_replaced_already,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory.histories import History, Memory, Namespace, Stored, locked
from haystack_chat_store.stores.in_memory.search_index import SearchIndex
from haystack_chat_store.stores.previews import beginning_of_content
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, compare_rows
from haystack_chat_store.stores.times import microseconds_now


class Writing(Engine[Memory]):
    """The operations that change messages."""

    @locked
    def append(
        self,
        session: Memory,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_revision: int | None,
    ) -> int:
        """
        Append messages in a single step, which Ctrl-C cannot split. If messages are replaced, replace the history.
        """
        namespace, now = session.of(scope), microseconds_now()
        history = namespace.find_to_write(scope, chat_history_id)
        revision = 0 if history is None else history.revision
        known = {} if history is None else history.known(messages)
        compares = history is not None and compares_contents(policy, expected_revision, revision)
        equal = history.equal(messages) if history is not None and compares else {}
        plan = planned(messages, known, equal, policy, expected_revision, revision)
        new = [_stored(message, now) for message in plan.new]
        if history is not None and plan.replaced:
            times = {place: message.created_at for place in plan.replaced if (message := history.messages[place])}
            changes = {place: _stored(message, times[place]) for place, message in plan.replaced.items()}
            changed = history.changed(now, changes, new)
            namespace.put(chat_history_id, replace(changed, expires_at=scope.expires_at(now)))
        elif new:
            _append(namespace, scope, chat_history_id, new, now)
        return len(plan.new) + len(plan.replaced)

    @locked
    def delete(self, session: Memory, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        """Remove the history and its branches."""
        namespace = session.of(scope)
        history = namespace.find_to_write(scope, chat_history_id)
        if history is not None:
            check_revision(expected_revision, history.revision)
        namespace.delete(scope, chat_history_id)

    @locked
    def delete_all(self, session: Memory, scope: Scope) -> bool:
        """Remove the namespace's histories and its index."""
        namespace = session.of(scope)
        if scope.user_id is not None:
            theirs = [each for each, history in namespace.histories.items() if scope.includes(history.user_id)]
            for chat_history_id in theirs:  # with those that have expired
                namespace.put(chat_history_id, None)
            return False
        revisions = [history.revision for history in namespace.histories.values()]
        namespace.deleted_revision = max([namespace.deleted_revision, *revisions])
        namespace.histories, namespace.index, namespace.branches = {}, SearchIndex(), {}
        return False

    @locked
    def delete_messages(
        self,
        session: Memory,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
        expected_revision: int | None,
    ) -> None:
        """Leave a gap at the position of each message."""
        namespace = session.of(scope)
        history = namespace.find_to_write(scope, chat_history_id)
        positions = {} if history is None else history.caught_up().positions
        revision = 0 if history is None else history.revision
        if from_message_id is not None:
            check_revision(expected_revision, revision)
            if from_message_id not in positions:
                raise message_not_found(from_message_id)
            gone = [position for position in positions.values() if position >= positions[from_message_id]]
        else:
            gone = [positions[message_id] for message_id in message_ids or () if message_id in positions]
            if gone:
                check_revision(expected_revision, revision)
        _remove(namespace, scope, chat_history_id, gone)

    @locked
    def replace(
        self,
        session: Memory,
        scope: Scope,
        chat_history_id: str,
        from_message_id: str,
        messages: Sequence[EncodedMessage],
        expected_revision: int | None,
    ) -> int:
        """Leave gaps and append in one step: a new `History` takes the place of the old one."""
        namespace, now = session.of(scope), microseconds_now()
        history = namespace.find_to_write(scope, chat_history_id)
        positions = {} if history is None else history.caught_up().positions
        if history is not None and _has_replaced(history, from_message_id, messages):
            return 0
        check_revision(expected_revision, 0 if history is None else history.revision)
        if history is None or from_message_id not in positions:
            raise message_not_found(from_message_id)
        start = positions[from_message_id]
        gone = [position for position in positions.values() if position >= start]
        new = [_stored(each, now) for each in messages if positions.get(each.message_id, start) >= start]
        changed = history.changed(now, dict.fromkeys(gone), new)
        namespace.put(chat_history_id, replace(changed, expires_at=scope.expires_at(now)))
        return len(new)

    @locked
    def update_message(
        self, session: Memory, scope: Scope, chat_history_id: str, message_id: str, change: Callable[[str], str]
    ) -> MessageRow:
        """Replace the history by one with the changed message."""
        namespace = session.of(scope)
        history = namespace.find_to_write(scope, chat_history_id)
        position = None if history is None else history.caught_up().positions.get(message_id)
        message = None if history is None or position is None else history.messages[position]
        if history is None or position is None or message is None:
            raise message_not_found(message_id)
        changes: dict[int, Stored | None] = {position: message._replace(content=change(message.content))}
        namespace.put(chat_history_id, history.changed(history.updated_at, changes))
        return namespace.histories[chat_history_id].page(None, position - 1, 1)[0]

    @locked
    def copy(
        self,
        session: Memory,
        scope: Scope,
        source_id: str,
        target_id: str,
        until_message_id: str | None,
        meta: str | None,
    ) -> int:
        """Append the source's messages to the target, without gaps."""
        namespace = session.of(scope)
        source = namespace.find(scope, source_id)
        if source is None:
            raise history_not_found(source_id)
        end = len(source.messages)
        if until_message_id is not None:
            if until_message_id not in source.caught_up().positions:
                raise message_not_found(until_message_id)
            end = source.positions[until_message_id] + 1
        target = namespace.find_to_write(scope, target_id)
        if target is not None and target.count():
            raise history_has_messages(target_id)
        copied = [message for message in source.messages[:end] if message is not None]
        if copied:
            if target is not None:
                check_same_user(source.user_id, target.user_id)
            _append(namespace, scope, target_id, copied, microseconds_now(), source.user_id, meta)
        return len(copied)

    def import_history(
        self,
        session: Memory,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_revision: int,
    ) -> int:
        """Read all batches without the lock, because that may take long, and then append them in one step."""
        imported = [_imported(row) for rows in batches for row in rows]
        with session.lock:
            return _import(session.of(scope), scope, history, imported, expected_revision)

    @locked
    def import_histories(
        self, session: Memory, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        """Import all histories, if none of them exists."""
        namespace = session.of(scope)
        imported: dict[str, tuple[HistoryRow, list[Stored]]] = {}
        for history, rows in histories:
            existing = namespace.find_to_write(scope, history.chat_history_id)
            if existing is not None or history.chat_history_id in imported:
                raise history_exists(history.chat_history_id)
            imported[history.chat_history_id] = history, list(map(_imported, rows))
        return sum(_import(namespace, scope, history, messages, 0) for history, messages in imported.values())

    @locked
    def remove(self, session: Memory, scope: Scope, chat_history_id: str, rows: Sequence[MessageRow]) -> list[int]:
        """Leave a gap at the position of each message."""
        namespace = session.of(scope)
        history = namespace.find_to_write(scope, chat_history_id)
        gone, others = compare_rows(rows, [] if history is None else history.page(None, None, len(history.messages)))
        _remove(namespace, scope, chat_history_id, gone)
        return others


def _append(
    namespace: Namespace,
    scope: Scope,
    chat_history_id: str,
    new: Sequence[Stored],
    now: int,
    user_id: str | None = None,
    meta: str | None = None,
) -> None:
    history = namespace.histories.setdefault(chat_history_id, History(now, namespace.deleted_revision))
    namespace.index.unindexed.setdefault(chat_history_id, len(history.messages))
    if meta is not None:
        history.meta = meta
        namespace.note_branch(chat_history_id)
    history.append(new, now, user_id if scope.user_id is None else scope.user_id, scope.expires_at(now))


def _has_replaced(history: History, from_message_id: str, messages: Sequence[EncodedMessage]) -> bool:
    """Whether an earlier attempt has replaced the messages."""
    positions, equal = history.positions, history.equal(messages)
    found = [equal.get(message.message_id) for message in messages]
    start = positions.get(from_message_id, found[-1] if found else None)
    if start is None:
        return False
    return is_replaced_already(found, start, sum(position >= start for position in positions.values()))


def _remove(namespace: Namespace, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
    history = namespace.find_to_write(scope, chat_history_id)
    if history is not None and positions:
        namespace.put(chat_history_id, history.changed(microseconds_now(), dict.fromkeys(positions)))


def _import(
    namespace: Namespace, scope: Scope, history: HistoryRow, imported: Sequence[Stored], expected_revision: int
) -> int:
    target = namespace.find_to_write(scope, history.chat_history_id)
    check_revision(expected_revision, 0 if target is None else target.revision)
    user_id = history.user_id if scope.user_id is None else scope.user_id
    if target is not None:
        check_same_user(user_id, target.user_id)
    else:
        target = History(
            history.created_at,
            namespace.deleted_revision,
            updated_at=history.updated_at,
            title=history.title,
            meta=history.meta,
            exists_without_messages=True,
            user_id=user_id,
        )
    updated_at = max(target.updated_at, history.updated_at)
    changed = target.changed(updated_at, {}, imported)
    expires_at = scope.expires_at(microseconds_now())
    namespace.put(history.chat_history_id, replace(changed, expires_at=expires_at))
    namespace.note_branch(history.chat_history_id)
    return len(imported)


def _stored(message: EncodedMessage, created_at: int) -> Stored:
    return Stored(created_at, message.message_id, message.role, message.content, message.text)


def _imported(row: MessageRow) -> Stored:
    return Stored(row.created_at, row.message_id, row.role, row.content, beginning_of_content(row.content))
