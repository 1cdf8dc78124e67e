# SPDX-License-Identifier: Apache-2.0
"""The operations that read messages."""

import sqlite3
from itertools import starmap

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import NO_ROWS, MessageRow, Scope, WindowRows
from haystack_chat_store.stores.sqlite.connections import Database, readable_rows
from haystack_chat_store.stores.sqlite.schema import LAST_POSITION
from haystack_chat_store.stores.sqlite.visibility import IS_VISIBLE_HISTORY, visible_history

# Beside these, the parameters of each statement are those of `visible_history`.
_COUNT = f"SELECT message_count FROM haystack_chat_histories WHERE {IS_VISIBLE_HISTORY}"

# A read is one statement, so that history and messages are seen as of one moment. A history without messages is a row
# without content. {size} is the window's size, {start} its first key.
_READ = f"""
    WITH history (first_key, last_key, size, revision, round_count) AS (
        SELECT history_key << 32, (history_key + 1 << 32) - 1, {{size}}, revision, round_count
        FROM haystack_chat_histories WHERE {IS_VISIBLE_HISTORY}
    )
    SELECT content, size, history.revision, round_count
    FROM history LEFT JOIN haystack_chat_messages ON message_key BETWEEN {{start}} AND last_key
    ORDER BY message_key
"""
_START_OF_ROUNDS = """coalesce(
        (SELECT message_key FROM haystack_chat_messages
            WHERE role = 'user' AND message_key BETWEEN first_key AND last_key
            ORDER BY message_key DESC LIMIT 1 OFFSET {before}),
        first_key)"""
_START_OF_MESSAGES = """coalesce(
        (SELECT message_key FROM haystack_chat_messages WHERE role <> 'tool' AND message_key BETWEEN first_key AND
            (SELECT message_key FROM haystack_chat_messages WHERE message_key BETWEEN first_key AND last_key
                ORDER BY message_key DESC LIMIT 1 OFFSET {before})
            ORDER BY message_key DESC LIMIT 1),
        first_key)"""
# An offset cannot name a column of the statement around it, so it looks the history up once more.
_BEFORE = "(SELECT {size} - 1 FROM haystack_chat_histories WHERE namespace = ?1 AND chat_history_id = ?2)"
_SIZE = "?5 + max({total} - ?5, 0) % ?6"
_READ_ALL = _READ.format(size="message_count", start="first_key")
_READ_ROUNDS, _READ_MESSAGES = (
    _READ.format(size=size, start=start.format(before=_BEFORE.format(size=size)))
    for start, size in (
        (_START_OF_ROUNDS, _SIZE.format(total="round_count")),
        (_START_OF_MESSAGES, _SIZE.format(total="message_count")),
    )
)
# The casts let a damaged message be looked at, and removed.
_PAGE = f"""
    SELECT message_key & 0xffffffff, haystack_chat_messages.created_at,
        CAST(message_id AS TEXT), CAST(role AS TEXT), CAST(content AS TEXT)
    FROM haystack_chat_histories
        CROSS JOIN haystack_chat_messages ON message_key BETWEEN (history_key << 32) + ?5 AND (history_key << 32) + ?6
    WHERE {IS_VISIBLE_HISTORY} ORDER BY message_key {{order}} LIMIT ?7
"""
_PAGE_BEFORE, _PAGE_AFTER = _PAGE.format(order="DESC"), _PAGE.format(order="ASC")
# The plus lets SQLite use the index by id: without it, the column's type would have to be applied to the expression.
_POSITION = f"""
    SELECT message_key & 0xffffffff
    FROM haystack_chat_histories
        CROSS JOIN haystack_chat_messages ON message_key >> 32 = +history_key AND message_id = ?5
    WHERE {IS_VISIBLE_HISTORY}
"""

# More messages than a history can have, and an integer that SQLite takes.
_MAX_COUNT = 2**62


class Reading(Engine[Database]):
    """The operations that read messages."""

    def read(self, session: Database, scope: Scope, chat_history_id: str, window: Window) -> WindowRows:
        """Find the window and read it by one statement."""
        history = visible_history(scope, chat_history_id)
        with session.connection() as connection:
            if window.count is None:
                rows = connection.execute(_READ_ALL, history).fetchall()
            else:
                query = _READ_ROUNDS if window.unit == "round" else _READ_MESSAGES
                counts = (min(window.count, _MAX_COUNT), min(window.step, _MAX_COUNT))
                rows = connection.execute(query, (*history, *counts)).fetchall()
        if not rows:
            return NO_ROWS
        contents = [row[0] for row in rows if row[0] is not None]
        return WindowRows(contents, *rows[0][1:])

    def count(self, session: Database, scope: Scope, chat_history_id: str) -> int:
        """Read the counter."""
        with session.connection() as connection:
            found = connection.execute(_COUNT, visible_history(scope, chat_history_id)).fetchone()
            return 0 if found is None else found[0]

    def page(
        self, session: Database, scope: Scope, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        """Read a range of keys."""
        with session.connection() as connection:
            if after is not None:
                return page_after(connection, scope, chat_history_id, after, limit)
            last = LAST_POSITION if before is None else before - 1
            values = (*visible_history(scope, chat_history_id), 0, last, limit)
            return list(starmap(MessageRow, readable_rows(connection, _PAGE_BEFORE, values)[::-1]))

    def position(self, session: Database, scope: Scope, chat_history_id: str, message_id: str) -> int | None:
        """Look up the key of a message."""
        with session.connection() as connection:
            found = connection.execute(_POSITION, (*visible_history(scope, chat_history_id), message_id)).fetchone()
            return None if found is None else int(found[0])


def page_after(
    connection: sqlite3.Connection, scope: Scope, chat_history_id: str, after: int, limit: int
) -> list[MessageRow]:
    """Return the first messages after a position."""
    values = (*visible_history(scope, chat_history_id), after + 1, LAST_POSITION, limit)
    return list(starmap(MessageRow, readable_rows(connection, _PAGE_AFTER, values)))
