# SPDX-License-Identifier: Apache-2.0
"""The operations that read messages."""

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory.histories import Memory, locked
from haystack_chat_store.stores.rows import NO_ROWS, MessageRow, Scope, WindowRows


class Reading(Engine[Memory]):
    """The operations that read messages."""

    @locked
    def read(self, session: Memory, scope: Scope, chat_history_id: str, window: Window) -> WindowRows:
        """Return the messages in the window."""
        history = session.of(scope).find(scope, chat_history_id)
        return NO_ROWS if history is None else history.read(window)

    @locked
    def count(self, session: Memory, scope: Scope, chat_history_id: str) -> int:
        """Return the number of messages in a history."""
        history = session.of(scope).find(scope, chat_history_id)
        return 0 if history is None else history.count()

    @locked
    def page(
        self, session: Memory, scope: Scope, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        """Return a page of messages."""
        history = session.of(scope).find(scope, chat_history_id)
        return [] if history is None else history.page(before, after, limit)

    @locked
    def position(self, session: Memory, scope: Scope, chat_history_id: str, message_id: str) -> int | None:
        """Look up the position of a message."""
        history = session.of(scope).find(scope, chat_history_id)
        return None if history is None else history.caught_up().positions.get(message_id)
