# SPDX-License-Identifier: Apache-2.0
"""
The data that a store and its engine exchange: rows of histories and messages, and their scope.

Rows are not frozen, because a frozen dataclass takes six times as long to create. The order of their fields stays, so
that an engine can create them from rows of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from haystack.dataclasses import ChatRole

from haystack_chat_store.ids import BRANCH_OF_KEY, origin_of
from haystack_chat_store.json_values import parse_json


@dataclass(frozen=True)
class Scope:
    """
    The part of a database that an operation may see and change.

    :param namespace: Only histories of this namespace.
    :param user_id: Only histories of this user, or `None` for all histories of the namespace. Stores have no users yet:
        they pass `None`, and engines do not look at it.
    :param with_branches: Whether lists, search and statistics see branches, too. Defaults to True.
    """

    namespace: str
    user_id: str | None = None
    with_branches: bool = True


@dataclass(slots=True)
class EncodedMessage:
    """
    A message for an engine to store.

    :param message_id: The message's id, unique in its history.
    :param role: `"user"`, `"assistant"`, `"tool"` or `"system"`.
    :param content: The whole message as JSON text, id included.
    :param has_caller_id: Whether the caller gave the id. A new id is unique, so no history has it yet. Defaults to
        True.
    """

    message_id: str
    role: str
    content: str
    has_caller_id: bool = True


@dataclass(slots=True)
class MessageRow:
    """
    A message as it is stored.

    :param position: Its position in its history. Positions rise, and are not used again as long as the history lives.
    :param created_at: The time when it was stored, in microseconds since 1970, UTC.
    :param message_id: The message's id, unique in its history.
    :param role: `"user"`, `"assistant"`, `"tool"` or `"system"`.
    :param content: The whole message as JSON text, or any text if it is damaged.
    """

    position: int
    created_at: int
    message_id: str
    role: str
    content: str


class WindowRows(NamedTuple):
    """
    The messages in a window, and what their history is at the same moment.

    :param contents: The messages as JSON texts, oldest first.
    :param size: The window's size, in its unit.
    :param revision: The history's revision, 0 if it does not exist.
    :param round_count: The number of its user messages.
    """

    contents: list[str]
    size: int
    revision: int
    round_count: int


#: Any window of a history that does not exist.
NO_ROWS: Final = WindowRows([], 0, 0, 0)


@dataclass(slots=True)
class HistoryRow:
    """
    A chat history as it is stored, without its messages.

    :param chat_history_id: Its id, unique in its namespace.
    :param created_at: The time when its first message was stored, in microseconds since 1970, UTC.
    :param updated_at: The time when its messages last changed, in the same unit. It never goes back. A new title or
        meta does not count.
    :param message_count: The number of its messages.
    :param round_count: The number of its user messages.
    :param title: Its title, or `None`.
    :param meta: Its meta, as the text of a JSON object, or `None` for an empty meta.
    :param revision: Its revision, which grows with every change of its messages. An import does not look at it.
    """

    chat_history_id: str
    created_at: int
    updated_at: int
    message_count: int = 0
    round_count: int = 0
    title: str | None = None
    meta: str | None = None
    revision: int = 0


@dataclass(slots=True)
class FoundRow:
    """
    A message that a search has found.

    :param chat_history_id: The id of the message's history.
    :param position: The message's position in its history.
    :param message_id: The message's id.
    :param role: The message's role.
    :param created_at: The time when the message was stored, in microseconds since 1970, UTC.
    :param content: The whole message as JSON text.
    :param score: The quality of the match, in the engine's own measure. A higher score is better.
    """

    chat_history_id: str
    position: int
    message_id: str
    role: str
    created_at: int
    content: str
    score: float


def branch_origin(chat_history_id: str, meta: str | None) -> str | None:
    """
    Return the id of the history that another one is a branch of, or `None` if it is no branch.

    :param meta: Its meta, as the text of a JSON object. It may be damaged.
    """
    if meta is None or BRANCH_OF_KEY not in meta:
        return None
    try:
        parsed = parse_json(meta)
    except (ValueError, TypeError, RecursionError):
        return None
    return origin_of(chat_history_id, parsed.get(BRANCH_OF_KEY)) if isinstance(parsed, dict) else None


class Unchanged(Enum):
    """The type of `UNCHANGED`, which keeps a value as it is, while `None` removes it."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return self.name


UNCHANGED: Final = Unchanged.UNCHANGED


def round_count(messages: Sequence[EncodedMessage] | Sequence[MessageRow]) -> int:
    """Return the number of rounds that begin in these messages: one at each user message."""
    return sum(message.role == ChatRole.USER.value for message in messages)


def end_of_prefix(prefix: str) -> str | None:
    """
    Return the least text that is greater, by code points, than all texts that begin with `prefix`.

    :param prefix: A text without surrogates.
    :returns: The text, or `None` if no text is greater than all of them.
    """
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # ids contain no surrogates
