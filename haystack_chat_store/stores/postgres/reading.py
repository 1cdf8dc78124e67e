# SPDX-License-Identifier: Apache-2.0
"""The operations that read messages."""

from itertools import starmap
from typing import Any

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.schema import MAX_POSITION, history_key
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.rows import NO_ROWS, MessageRow, Scope, WindowRows


class Reading(Engine[Session]):
    """The operations that read messages."""

    async def read(self, session: Session, scope: Scope, chat_history_id: str, window: Window) -> WindowRows:
        """Find the window's start and read from there, in one statement, unless there are no messages."""
        statements, by_round = session.statements, window.unit == "round"
        parameters: dict[str, Any] = {"key": history_key(scope, chat_history_id), "end": MAX_POSITION}
        statement = statements.read_all
        if window.count is not None:
            parameters["count"] = min(window.count, MAX_POSITION)
            statement = statements.read_rounds if by_round else statements.read_messages
            if window.step > 1:
                parameters["step"] = min(window.step, MAX_POSITION)
                statement = statements.read_rounds_by_step if by_round else statements.read_messages_by_step
        known = None
        while not (rows := await session.fetch(statement, parameters, prepare=True)):
            found = await session.fetch(session.statements.revision, [parameters["key"]], prepare=True)
            if not found:
                return NO_ROWS
            if found[0] == known:  # it had this revision all the time, while it was without messages
                return WindowRows([], 0, *known)
            known = found[0]
        return WindowRows([row[0] for row in rows], *rows[0][1:])

    async def count(self, session: Session, scope: Scope, chat_history_id: str) -> int:
        """Return the counter of the history's row."""
        rows = await session.fetch(
            session.statements.message_count, [history_key(scope, chat_history_id)], prepare=True
        )
        return int(rows[0][0]) if rows else 0

    async def page(
        self, session: Session, scope: Scope, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        """Return a page of messages."""
        key, statements = history_key(scope, chat_history_id), session.statements
        if after is not None:
            place = [key, min(after, MAX_POSITION), limit]
            rows = await session.fetch(statements.page_after, place, prepare=True)
        else:
            place = [key, MAX_POSITION if before is None else min(before, MAX_POSITION), limit]
            rows = (await session.fetch(statements.page_before, place, prepare=True))[::-1]
        return list(starmap(MessageRow, rows))

    async def position(self, session: Session, scope: Scope, chat_history_id: str, message_id: str) -> int | None:
        """Look up the position of a message."""
        place = [history_key(scope, chat_history_id), message_id]
        rows = await session.fetch(session.statements.position_of, place, prepare=True)
        return int(rows[0][0]) if rows else None
