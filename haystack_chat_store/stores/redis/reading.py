# SPDX-License-Identifier: Apache-2.0
"""The operations that read messages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.stores.redis.keys import Keys
from haystack_chat_store.stores.redis.operations import RedisOperations
from haystack_chat_store.stores.redis.schema import ROLES, id_and_role, number
from haystack_chat_store.stores.redis.scripts import messages as scripts
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import MessageRow, Scope, WindowRows

#: More messages than a history can have. Lua, whose numbers are doubles, still takes it exactly.
MAX_COUNT = 2**53

_WINDOW_SCRIPTS = {"round": scripts.READ_ROUNDS, "message": scripts.READ_MESSAGES}


@dataclass(frozen=True, kw_only=True)
class Part:
    """
    Some messages of a history, and the state that it was in.

    :param exists: Whether the history exists.
    :param user_id: The user that it belongs to, or `None`.
    :param state: Differs after each edit, and with another user. Appending does not change it.
    :param next_position: The position that the next message gets.
    :param rows: The messages.
    """

    exists: bool
    user_id: str | None
    state: str
    next_position: int
    rows: list[MessageRow]


class Reading(RedisOperations):
    """The operations that read messages."""

    async def read(self, session: Session, scope: Scope, chat_history_id: str, window: Window) -> WindowRows:
        """Find the window in the string of roles."""
        script = scripts.READ_ALL if window.count is None else _WINDOW_SCRIPTS[window.unit]
        keys = self.keys(scope)
        counts = [min(window.count or 0, MAX_COUNT), min(window.step, MAX_COUNT)]
        size, revision, round_count, texts = await session.run(
            script, keys.to_read(chat_history_id), [*counts, keys.user]
        )
        contents = await session.to_thread_if_large(texts, _contents, texts)
        return WindowRows(contents, size, revision, round_count)

    async def count(self, session: Session, scope: Scope, chat_history_id: str) -> int:
        """Return the counter of a history."""
        keys = self.keys(scope)
        count: int = await session.run(scripts.COUNT, keys.to_read(chat_history_id), [keys.user])
        return count

    async def page(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        before: int | None,
        after: int | None,
        limit: int,
    ) -> list[MessageRow]:
        """Return a page of messages."""
        end = MAX_COUNT if before is None else before
        return (await read_part(session, self.keys(scope), chat_history_id, limit, after=after, before=end)).rows

    async def position(self, session: Session, scope: Scope, chat_history_id: str, message_id: str) -> int | None:
        """Look up the position of a message."""
        return await read_position(session, self.keys(scope), chat_history_id, message_id)


async def read_part(
    session: Session,
    keys: Keys,
    chat_history_id: str,
    limit: int,
    *,
    after: int | None = None,
    before: int = MAX_COUNT,
) -> Part:
    """Return up to `limit` messages as of one moment: the last ones before a position, or the first ones after one."""
    page = ["" if after is None else after, min(before, MAX_COUNT), limit, keys.user]
    state, user_id, next_position, found = await session.run(scripts.PAGE, keys.to_read(chat_history_id), page)
    rows: list[MessageRow] = await session.to_thread_if_large(found[3::4], rows_of, found)
    if not all(row.message_id for row in rows):  # damaged messages, whose ids only the index knows
        ids = {
            position: message_id for message_id, position in (await read_ids(session, keys, chat_history_id)).items()
        }
        rows = [row if row.message_id else replace(row, message_id=ids.get(row.position, "")) for row in rows]
    return Part(exists=bool(state), user_id=user_id, state=state, next_position=next_position, rows=rows)


async def read_position(session: Session, keys: Keys, chat_history_id: str, message_id: str) -> int | None:
    """Return the position of a message, or `None` if the history does not have it."""
    position = await session.run(scripts.POSITION, keys.to_read(chat_history_id), [message_id, keys.user])
    return None if position is None else number(position)


async def read_ids(session: Session, keys: Keys, chat_history_id: str) -> dict[str, int]:
    """Return the index of a history: the position of each message id."""
    found: dict[str, int] = {}
    names, cursor = keys.of_history(chat_history_id), "0"
    of_index = [keys.of_bucket_of(chat_history_id).schema_version, names.counters, names.message_ids]
    while True:
        cursor, items = await session.run(scripts.SCAN_IDS, of_index, [cursor, keys.user])
        found.update(zip(items[::2], map(number, items[1::2]), strict=True))
        if cursor == "0":
            return found


def _contents(texts: Sequence[str]) -> list[str]:
    return [content for text in texts for content in text.split(scripts.SEPARATOR)]


def rows_of(found: Sequence[Any]) -> list[MessageRow]:
    """Return the messages of an answer of the script PAGE."""
    rows = []
    for position, letter, time, content in zip(found[::4], found[1::4], found[2::4], found[3::4], strict=True):
        message_id, _ = id_and_role(content) or ("", "")
        role = ROLES.get(letter, letter)
        rows.append(
            MessageRow(position=position, created_at=number(time), message_id=message_id, role=role, content=content)
        )
    return rows
