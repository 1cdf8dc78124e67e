# SPDX-License-Identifier: Apache-2.0
"""The operations on the index of words, which the first search creates."""

import heapq
from collections.abc import Sequence

from haystack_chat_store.search_text import Phrase, matches, relevance, searchable_text_of_content, terms
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory.histories import Memory, locked
from haystack_chat_store.stores.rows import FoundRow, HistoryRow, Scope

# Other calls can go on between two batches.
_INDEX_BATCH_SIZE = 1_000


class Search(Engine[Memory]):
    """The operations on the index of words."""

    def search(
        self,
        session: Memory,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[FoundRow]:
        """Index what is not indexed yet. Then check each message that has all terms."""
        while self.index_some(session, scope, _INDEX_BATCH_SIZE):
            pass
        return self._search_index(session, scope, phrases, chat_history_id, prefix, limit)

    @locked
    def _search_index(
        self,
        session: Memory,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[FoundRow]:
        namespace = session.of(scope)
        found = []
        for history, position in namespace.index.candidates(phrases):
            if not history.startswith(prefix) or chat_history_id not in (None, history):
                continue
            if (visible := namespace.find(scope, history)) is None:
                continue
            if not scope.with_branches and namespace.is_branch(history):
                continue
            message = visible.messages[position]
            words = terms(searchable_text_of_content(message.content)) if message is not None else []
            if message is not None and matches(phrases, words):
                found.append(
                    FoundRow(
                        chat_history_id=history,
                        position=position,
                        message_id=message.message_id,
                        role=message.role,
                        created_at=message.created_at,
                        content=message.content,
                        score=relevance(phrases, words),
                    )
                )
        return heapq.nlargest(limit, found, key=lambda row: row.score)

    @locked
    def search_titles(
        self,
        session: Memory,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[HistoryRow]:
        """Look at each title."""
        namespace = session.of(scope)
        found = [
            namespace.histories[each].row(each)
            for each in namespace.with_prefix(scope, prefix)
            if chat_history_id in (None, each)
            and (title := namespace.histories[each].title) is not None
            and matches(phrases, terms(title))
        ]
        return heapq.nsmallest(limit, found, key=lambda row: (len(row.title or ""), -row.updated_at))

    @locked
    def index_some(self, session: Memory, scope: Scope, limit: int) -> bool:
        """Index messages of histories that have new messages."""
        namespace = session.of(scope)
        unindexed = namespace.index.unindexed
        for chat_history_id, start in list(unindexed.items()):
            messages = namespace.histories[chat_history_id].messages
            for position in range(start, min(start + limit, len(messages))):
                message = messages[position]
                if message is not None:
                    place = (chat_history_id, position)
                    namespace.index.add(place, searchable_text_of_content(message.content))
            limit -= len(messages) - start
            if limit < 0:
                unindexed[chat_history_id] = len(messages) + limit
                break
            del unindexed[chat_history_id]
        return bool(unindexed)
