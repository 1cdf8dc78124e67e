# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories."""

import heapq
from collections import Counter
from dataclasses import replace

from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory.histories import Memory
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Scope, Unchanged
from haystack_chat_store.stores.times import datetime_of
from haystack_chat_store.types import Fault, StoreStatistics


class Directory(Engine[Memory]):
    """The operations on whole histories."""

    def history(self, session: Memory, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Return one history, or `None` if it does not exist."""
        with session.lock:
            history = session.of(scope).find(chat_history_id)
            return None if history is None else history.row(chat_history_id)

    def histories(
        self, session: Memory, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """Return the histories with the latest changes."""
        with session.lock:
            namespace = session.of(scope)
            keys = ((namespace.histories[each].updated_at, each) for each in namespace.with_prefix(prefix, scope))
            newest = heapq.nlargest(limit, keys if before is None else (key for key in keys if key < before))
            return [namespace.histories[each].row(each) for _, each in newest]

    def histories_by_id(self, session: Memory, scope: Scope, prefix: str, after: str, limit: int) -> list[HistoryRow]:
        """Return the histories with the next ids."""
        with session.lock:
            namespace = session.of(scope)
            ids = heapq.nsmallest(limit, (each for each in namespace.with_prefix(prefix, scope) if each > after))
            return [namespace.histories[each].row(each) for each in ids]

    def update_history(
        self,
        session: Memory,
        scope: Scope,
        chat_history_id: str,
        title: str | Unchanged | None,
        meta: str | Unchanged | None,
    ) -> HistoryRow | None:
        """Replace the history by one with the new title and meta."""
        with session.lock:
            namespace = session.of(scope)
            history = namespace.find(chat_history_id)
            if history is None:
                return None
            title = history.title if title is UNCHANGED else title
            meta = history.meta if meta is UNCHANGED else meta
            namespace.histories[chat_history_id] = replace(history, title=title, meta=meta)
            namespace.note_branch(chat_history_id)
            return namespace.histories[chat_history_id].row(chat_history_id)

    def statistics(self, session: Memory, scope: Scope, prefix: str) -> StoreStatistics:
        """Count all messages."""
        with session.lock:
            namespace = session.of(scope)
            histories = {each: namespace.histories[each] for each in namespace.with_prefix(prefix, scope)}
            rows = [history.row(each) for each, history in histories.items()]
            days = Counter(
                datetime_of(message.created_at).date()
                for history in histories.values()
                for message in history.messages
                if message is not None
            )
            return StoreStatistics(
                chat_histories=len(rows),
                messages=sum(row.message_count for row in rows),
                rounds=sum(row.round_count for row in rows),
                size=None,
                messages_per_day=dict(sorted(days.items())),
            )

    def erase_some(self, session: Memory, scope: Scope, prefix: str, updated_before: int | None, limit: int) -> int:
        """Remove up to `limit` histories, and return their number."""
        with session.lock:
            namespace = session.of(scope)
            erased = [
                each
                for each in namespace.with_prefix(prefix, scope)
                if updated_before is None or namespace.histories[each].updated_at < updated_before
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
