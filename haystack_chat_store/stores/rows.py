# SPDX-License-Identifier: Apache-2.0
"""
What a store and its engine hand to each other: rows of histories and messages, and the scope that they belong to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from haystack.dataclasses import ChatRole


@dataclass(frozen=True)
class Scope:
    """
    What an operation may see and change.

    :param namespace: Only histories of this namespace.
    :param user_id: Only histories of this user, or `None` for all histories of the namespace.
    """

    namespace: str
    user_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedMessage:
    """
    A message that an engine is to store.

    :param message_id: Its id, unique in its history.
    :param role: `"user"`, `"assistant"`, `"tool"` or `"system"`.
    :param content: The whole message as JSON text, id included.
    :param has_caller_id: Whether the id came with the message. If not, no history can have it yet.
    """

    message_id: str
    role: str
    content: str
    has_caller_id: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageRow:
    """
    A stored message, as it is stored.

    :param position: Its place in its history. Positions rise, and none is used again while the history lives.
    :param created_at: When it was stored, in microseconds since 1970, UTC.
    :param message_id: Its id, unique in its history.
    :param role: `"user"`, `"assistant"`, `"tool"` or `"system"`.
    :param content: The whole message as JSON text, unless something has damaged it.
    """

    position: int
    created_at: int
    message_id: str
    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryRow:
    """
    What an engine keeps of a chat history beside its messages.

    :param chat_history_id: Its id, unique in its namespace.
    :param message_count: The number of its messages.
    :param round_count: The number of its user messages.
    :param created_at: When its first message was stored, in microseconds since 1970, UTC.
    :param updated_at: When its messages last changed, likewise. It never goes back. A new title or meta does not count.
    :param title: Its title, or `None`.
    :param meta: A JSON object as text, or `None` for an empty one.
    """

    chat_history_id: str
    message_count: int = 0
    round_count: int = 0
    created_at: int
    updated_at: int
    title: str | None = None
    meta: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRow:
    """
    A message that a search has found.

    :param chat_history_id: Its history.
    :param position: Its place in its history.
    :param message_id: Its id.
    :param content: The whole message as JSON text.
    :param score: How well it matches by the engine's own measure; more is better.
    """

    chat_history_id: str
    position: int
    message_id: str
    content: str
    score: float


class Unchanged(Enum):
    """
    Says that a value stays as it is, where `None` says that there is to be none.
    """

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return self.name


UNCHANGED: Final = Unchanged.UNCHANGED


def round_count(messages: Sequence[EncodedMessage] | Sequence[MessageRow]) -> int:
    """
    Return how many rounds begin in these messages: one at each user message.
    """
    return sum(message.role == ChatRole.USER.value for message in messages)


def end_of_prefix(prefix: str) -> str | None:
    """
    Return the least text that is greater, by code points, than all that begin with `prefix`; `None` if there is none.
    """
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # ids contain no surrogates
