# SPDX-License-Identifier: Apache-2.0
"""
What the parts of the store have in common: its keys, and reading a history in pieces.
"""

import json
import re
import secrets
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.redis.keys import BucketKeys, HistoryKeys, Keys, bucket_of
from haystack_chat_store.stores.redis.scripts import MOMENTS, TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import messages as of_messages
from haystack_chat_store.stores.rows import MessageRow

if TYPE_CHECKING:
    from haystack_chat_store.stores.redis.connections import Session

#: More messages than a history can have, and a number that Lua still takes exactly.
MAX_COUNT = 2**53
#: So many messages, ids or histories a script has to do with at once, where that is not for the caller to say.
STEP = 1000
#: As much text is looked into on the event loop itself.
_CHARACTERS_ON_LOOP = 100_000

_INTEGER = re.compile(f"-?[0-9]{{1,{TIME_LENGTH}}}")

#: The letters that stand for roles.
ROLES = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
#: The letter that stands in `roles` for a message that was deleted.
GAP = "x"


class Part(NamedTuple):
    """
    Some messages of a history, and what they belong to.

    :param exists: Whether there is such a history.
    :param state: Tells the history, as it was last edited, from every other. Appending does not change it.
    :param next_position: The history's.
    """

    exists: bool
    state: str
    next_position: int
    rows: list[MessageRow]


class RedisOperations(BaseChatMessageStore["Session"]):
    """
    What operations of all parts of the store need.
    """

    ttl: float | None
    _keys: Keys

    def _keys_of(self, chat_history_id: str) -> tuple[BucketKeys, HistoryKeys]:
        return self._keys.of_bucket(bucket_of(chat_history_id)), self._keys.of_history(chat_history_id)

    def _lifetime(self) -> int:
        """
        Return after how many milliseconds without a write a history expires; 0 for never.
        """
        return round((self.ttl or 0) * 1000)

    async def _part(
        self, session: "Session", chat_history_id: str, limit: int, *, after: int | None = None, before: int = MAX_COUNT
    ) -> Part:
        """
        Return a page of messages: those before a position, or after one.
        """
        bucket, history = self._keys_of(chat_history_id)
        keys = [bucket.schema_version, *history]
        page = ["" if after is None else after, min(before, MAX_COUNT), limit]
        state, next_position, pieces = await session.run(of_messages.PAGE, keys, page)
        is_long = sum(len(content) for piece in pieces for content in piece[2]) > _CHARACTERS_ON_LOOP
        rows = await session.aside(_rows, pieces) if is_long else _rows(pieces)
        nameless = {row.position for row in rows if not row.message_id}
        if nameless:
            names = {position: name for name, position in (await self._index(session, keys[0], history)).items()}
            rows = [row if row.message_id else row._replace(message_id=names.get(row.position, "")) for row in rows]
        return Part(bool(state), state, next_position, rows)

    async def _positions(
        self, session: "Session", chat_history_id: str, message_ids: Sequence[str]
    ) -> list[int | None]:
        """
        Return the position of each message, or `None` for those that the history does not have.
        """
        bucket, history = self._keys_of(chat_history_id)
        found = await session.run(of_messages.POSITIONS, [bucket.schema_version, *history], message_ids)
        return [None if position is None else number(position) for position in found]

    async def _remove_ids(
        self,
        session: "Session",
        chat_history_id: str,
        message_ids: Sequence[str],
        required: str = "",
        next_position: int | None = None,
    ) -> Any:
        """
        Delete messages by their ids, and return how many there were, or why nothing was deleted.

        :param required: The id of a message that the history must have, and which is deleted with all that follows it.
        :param next_position: The history's, if nothing may have been appended that changes it.
        """
        bucket, history = self._keys_of(chat_history_id)
        expected = "" if next_position is None else next_position
        arguments = [chat_history_id, required, expected, new_name(), "\x00".join(message_ids)]
        return await session.run(of_messages.REMOVE, [*bucket, *history], arguments)

    async def _index(self, session: "Session", schema_version: str, history: HistoryKeys) -> dict[str, int]:
        """
        Return the position of each message id of a history.
        """
        found: dict[str, int] = {}
        cursor = "0"
        while True:
            cursor, items = await session.run(of_messages.SCAN_IDS, [schema_version, history.message_ids], [cursor])
            found.update(zip(items[::2], map(number, items[1::2]), strict=True))
            if cursor == "0":
                return found


def _rows(pieces: Sequence[Any]) -> list[MessageRow]:
    rows = []
    for first, letters, contents, times in pieces:
        for index, (letter, content) in enumerate(zip(letters, contents, strict=True)):
            if letter != GAP:
                time = moment(times[index * TIME_LENGTH : (index + 1) * TIME_LENGTH]) or 0
                message_id, _ = described(content) or ("", "")
                rows.append(MessageRow(first + index, time, message_id, ROLES.get(letter, letter), content))
    return rows


def described(content: str) -> tuple[str, str] | None:
    """
    Return the id and the role that a message says it has, or `None` if it cannot be read.
    """
    try:
        message = json.loads(content)
        message_id, role = message["meta"][MESSAGE_ID_KEY], message["role"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    is_id = isinstance(message_id, str) and message_id and "\x00" not in message_id
    return (message_id, role) if is_id and role in ROLES.values() else None


def number(text: str | None) -> int:
    """
    Return a number that is stored as text; 0 if it is none.
    """
    try:
        return int(text or 0)
    except ValueError:
        return 0


def moment(text: str | None) -> int | None:
    """
    Return a time that is stored as text, in microseconds since 1970; `None` if it is none.
    """
    if not text or not _INTEGER.fullmatch(text):
        return None
    return time if (time := int(text)) in MOMENTS else None


def new_name() -> str:
    """
    Return a name that nothing else has.
    """
    return secrets.token_hex(8)


def letters_of(roles: Collection[str]) -> str:
    """
    Return the letters that stand for roles.
    """
    return "".join(role[0] for role in roles)
