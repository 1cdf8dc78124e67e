# SPDX-License-Identifier: Apache-2.0
"""The operations that read messages."""

from itertools import starmap

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.schema import history_parameters
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import Statement
from haystack_chat_store.stores.rows import NO_ROWS, MessageRow, Scope, WindowRows
from haystack_chat_store.validation import MAX_POSITION

# Both bounds are subqueries, even where they exclude nothing. The planner takes a range between two bounds that it does
# not know for 0.5 % of the rows. So it walks along the primary key, instead of sorting, or reading the whole table,
# however much of the table the history is.
_READ = """
    SELECT content, {size},
        (SELECT revision FROM {{histories}} WHERE history_key = %(key)s),
        (SELECT round_count FROM {{histories}} WHERE history_key = %(key)s)
    FROM {{messages}}
    WHERE history_key = %(key)s AND position BETWEEN {start} AND (SELECT %(end)s::bigint) AND {{is_visible}}
    ORDER BY position
"""
_START_OF_ROUNDS = """coalesce(
        (SELECT position FROM {{messages}}
            WHERE history_key = %(key)s AND role = 'user' AND position BETWEEN 0 AND %(end)s
            ORDER BY position DESC OFFSET {size} - 1 LIMIT 1),
        0)"""
_START_OF_MESSAGES = """coalesce(
        (SELECT position FROM {{messages}} WHERE history_key = %(key)s AND role <> 'tool' AND position <=
            (SELECT position FROM {{messages}} WHERE history_key = %(key)s AND position BETWEEN 0 AND %(end)s
                ORDER BY position DESC OFFSET {size} - 1 LIMIT 1)
            ORDER BY position DESC LIMIT 1),
        0)"""
# The window's size. With a step, it depends on the length of the history.
_SIZE = "%(count)s::bigint"
_SIZE_BY_STEP = """(SELECT %(count)s::bigint + mod(greatest({total} - %(count)s::bigint, 0), %(step)s::bigint)
            FROM {{histories}} WHERE history_key = %(key)s)"""

_READ_ALL = Statement(_READ.format(start="(SELECT 0::bigint)", size="0"))
_READ_ROUNDS, _READ_ROUNDS_BY_STEP, _READ_MESSAGES, _READ_MESSAGES_BY_STEP = (
    Statement(_READ.format(start=start.format(size=size), size=size))
    for start, total in ((_START_OF_ROUNDS, "round_count"), (_START_OF_MESSAGES, "message_count"))
    for size in (_SIZE, _SIZE_BY_STEP.format(total=total))
)
_REVISION = Statement("SELECT revision, round_count FROM {histories} WHERE history_key = %(key)s AND {visible}")
MESSAGE_COUNT = Statement("SELECT message_count FROM {histories} WHERE history_key = %(key)s AND {visible}")
_PAGE_BEFORE = Statement("""
    SELECT {message_row} FROM {messages}
    WHERE history_key = %(key)s AND position < %(place)s AND {is_visible} ORDER BY position DESC LIMIT %(limit)s
""")
_PAGE_AFTER = Statement("""
    SELECT {message_row} FROM {messages}
    WHERE history_key = %(key)s AND position > %(place)s AND {is_visible} ORDER BY position LIMIT %(limit)s
""")
_POSITION_TO_READ = Statement("""
    SELECT position FROM {messages} WHERE history_key = %(key)s AND message_id = %(message_id)s AND {is_visible}
""")


class Reading(Engine[Session]):
    """The operations that read messages."""

    async def read(self, session: Session, scope: Scope, chat_history_id: str, window: Window) -> WindowRows:
        """Find the window's start and read from there, in one statement, unless there are no messages."""
        by_round = window.unit == "round"
        parameters = {**history_parameters(scope, chat_history_id), "end": MAX_POSITION}
        statement = _READ_ALL
        if window.count is not None:
            parameters["count"] = min(window.count, MAX_POSITION)
            statement = _READ_ROUNDS if by_round else _READ_MESSAGES
            if window.step > 1:
                parameters["step"] = min(window.step, MAX_POSITION)
                statement = _READ_ROUNDS_BY_STEP if by_round else _READ_MESSAGES_BY_STEP
        known = None
        while not (rows := await session.fetch(statement, parameters, prepare=True)):
            found = await session.fetch(_REVISION, history_parameters(scope, chat_history_id), prepare=True)
            if not found:
                return NO_ROWS
            if found[0] == known:  # it had this revision all the time, while it was without messages
                return WindowRows([], 0, *known)
            known = found[0]
        return WindowRows([row[0] for row in rows], *rows[0][1:])

    async def count(self, session: Session, scope: Scope, chat_history_id: str) -> int:
        """Return the counter of the history's row."""
        parameters = history_parameters(scope, chat_history_id)
        rows = await session.fetch(MESSAGE_COUNT, parameters, prepare=True)
        return int(rows[0][0]) if rows else 0

    async def page(
        self, session: Session, scope: Scope, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        """Return a page of messages."""
        parameters = {**history_parameters(scope, chat_history_id), "limit": limit}
        if after is not None:
            parameters["place"] = after
            rows = await session.fetch(_PAGE_AFTER, parameters, prepare=True)
        else:
            parameters["place"] = MAX_POSITION if before is None else before
            rows = (await session.fetch(_PAGE_BEFORE, parameters, prepare=True))[::-1]
        return list(starmap(MessageRow, rows))

    async def position(self, session: Session, scope: Scope, chat_history_id: str, message_id: str) -> int | None:
        """Look up the position of a message."""
        parameters = {**history_parameters(scope, chat_history_id), "message_id": message_id}
        rows = await session.fetch(_POSITION_TO_READ, parameters, prepare=True)
        return int(rows[0][0]) if rows else None
