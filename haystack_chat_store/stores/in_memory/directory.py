# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories."""

import heapq
from collections import Counter
from dataclasses import replace

from haystack.dataclasses import ChatRole

from haystack_chat_store.stores.conflicts import history_is_there, history_not_found
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory.histories import History, Memory, locked
from haystack_chat_store.stores.rows import UNCHANGED, HistoryChange, HistoryRow, Scope
from haystack_chat_store.stores.times import datetime_of, microseconds_now
from haystack_chat_store.stores.usage import UsageCounter
from haystack_chat_store.types import Fault, StoreStatistics


class Directory(Engine[Memory]):
    """The operations on whole histories."""

    @locked
    def history(self, session: Memory, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Return one history, or `None` if it does not exist."""
        history = session.of(scope).find(scope, chat_history_id)
        return None if history is None else history.row(chat_history_id)

    @locked
    def histories(
        self, session: Memory, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """Return the histories with the latest changes."""
        namespace = session.of(scope)
        keys = ((namespace.histories[each].updated_at, each) for each in namespace.with_prefix(scope, prefix))
        newest = heapq.nlargest(limit, keys if before is None else (key for key in keys if key < before))
        return [namespace.histories[each].row(each) for _, each in newest]

    @locked
    def histories_by_id(self, session: Memory, scope: Scope, prefix: str, after: str, limit: int) -> list[HistoryRow]:
        """Return the histories with the next ids."""
        namespace = session.of(scope)
        ids = heapq.nsmallest(limit, (each for each in namespace.with_prefix(scope, prefix) if each > after))
        return [namespace.histories[each].row(each) for each in ids]

    @locked
    def update_history(
        self,
        session: Memory,
        scope: Scope,
        chat_history_id: str,
        change: HistoryChange,
    ) -> HistoryRow | None:
        """Replace the history by one with the changes, and hand over its branches."""
        namespace = session.of(scope)
        history = namespace.find_to_write(scope, chat_history_id)
        if history is None:
            return None
        keeps_title = change.title is UNCHANGED and history.title is not None
        namespace.histories[chat_history_id] = replace(
            history,
            title=history.title if keeps_title else change.given_title,
            meta=change.new_meta(history.meta),
        )
        namespace.note_branch(chat_history_id)
        if change.user_id is not UNCHANGED:
            namespace.hand_over(chat_history_id, change.user_id)
        return namespace.histories[chat_history_id].row(chat_history_id)

    @locked
    def create_history(self, session: Memory, scope: Scope, history: HistoryRow) -> tuple[HistoryRow, bool]:
        """Add a history without messages, unless it is there."""
        namespace, now, new_id = session.of(scope), microseconds_now(), history.chat_history_id
        found = namespace.find_to_write(scope, new_id)
        if found is not None:
            return found.row(new_id), False
        namespace.histories[new_id] = History(
            now,
            namespace.deleted_revision + 1,
            now,
            title=history.title,
            meta=history.meta,
            exists_without_messages=True,
            user_id=history.user_id if scope.user_id is None else scope.user_id,
            expires_at=scope.expires_at(now),
        )
        namespace.note_branch(new_id)
        return namespace.histories[new_id].row(new_id), True

    @locked
    def rename_history(self, session: Memory, scope: Scope, old_id: str, new_id: str) -> HistoryRow:
        """Put the history under its new id, and remove the old one. Then its branches follow."""
        namespace = session.of(scope)
        history = namespace.find_to_write(scope, old_id)
        if history is None:
            raise history_not_found(old_id)
        if namespace.find_to_write(scope, new_id) is not None:
            raise history_is_there(new_id)
        namespace.rename(old_id, new_id, history.meta)
        return namespace.histories[new_id].row(new_id)

    @locked
    def renew(self, session: Memory, scope: Scope, chat_history_id: str) -> None:
        """Set the time in the history itself."""
        history = session.of(scope).find(scope, chat_history_id)
        if history is not None and history.expires_at is not None:
            history.expires_at = scope.expires_at(microseconds_now())

    @locked
    def namespaces(self, session: Memory, scope: Scope) -> list[str]:  # noqa: ARG002  (all namespaces)
        """Look at each namespace."""
        return session.namespaces()

    @locked
    def statistics(self, session: Memory, scope: Scope, prefix: str) -> StoreStatistics:
        """Count all messages."""
        namespace = session.of(scope)
        histories = {each: namespace.histories[each] for each in namespace.with_prefix(scope, prefix)}
        rows = [history.row(each) for each, history in histories.items()]
        days = Counter(
            datetime_of(message.created_at).date()
            for history in histories.values()
            for message in history.messages
            if message is not None
        )
        usage = UsageCounter()
        for history in histories.values():
            for message in history.messages:
                if message is not None and message.role == ChatRole.ASSISTANT.value:
                    usage.add_text(message.created_at, message.content)
        return StoreStatistics(
            chat_histories=len(rows),
            messages=sum(row.message_count for row in rows),
            rounds=sum(row.round_count for row in rows),
            size=None,
            messages_per_day=dict(sorted(days.items())),
            usage=usage.total(),
            usage_per_day=usage.per_day(),
        )

    @locked
    def erase_some(self, session: Memory, scope: Scope, prefix: str, updated_before: int | None, limit: int) -> int:
        """Remove up to `limit` histories, and return their number."""
        namespace = session.of(scope)
        erased = [
            each
            for each, history in namespace.histories.items()
            if history.exists
            and each.startswith(prefix)
            and scope.includes(history.user_id)
            and (updated_before is None or history.updated_at < updated_before or history.has_expired())
        ][:limit]
        for each in erased:
            namespace.put(each, None)
        return len(erased)

    def vacuum(self, session: Memory, scope: Scope) -> None:
        """Do nothing: memory keeps no deleted messages."""

    def check(self, session: Memory, scope: Scope) -> list[Fault]:  # noqa: ARG002  (nothing to look at)
        """Find no faults: no other program can write to this memory."""
        return []

    def repair(self, session: Memory, scope: Scope) -> list[Fault]:
        """Find no faults, either."""
        return self.check(session, scope)
