# SPDX-License-Identifier: Apache-2.0
"""
The data that a store and its engine exchange: rows of histories and messages, and their scope.

Rows are not frozen, because a frozen dataclass takes six times as long to create. The order of their fields stays, so
that an engine can create them from rows of a query.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from haystack.dataclasses import ChatRole

from haystack_chat_store.ids import BRANCH_OF_KEY, MAX_ID_LENGTH, branch_id, branch_prefix, new_message_id, origin_of
from haystack_chat_store.json_values import encode_plain, parse_json


@dataclass(frozen=True)
class Scope:
    """
    The part of a database that an operation may see and change.

    :param namespace: Only histories of this namespace.
    :param user_id: Only histories of this user, or `None` for all histories of the namespace. A history that is made is
        this user's.
    :param lifetime: The number of microseconds after which a history expires in which this scope stores messages, or
        `None` for never.
    :param with_branches: Whether lists, search and statistics see branches, too. Defaults to True.
    """

    namespace: str
    user_id: str | None = None
    lifetime: int | None = None
    with_branches: bool = True

    def includes(self, user_id: str | None) -> bool:
        """Whether a history of a user, or of none, belongs to the scope."""
        return self.user_id is None or self.user_id == user_id

    def expires_at(self, now: int) -> int | None:
        """Return when a history that is written to now expires, in microseconds since 1970, or `None` for never."""
        return None if self.lifetime is None else now + self.lifetime


@dataclass(slots=True)
class EncodedMessage:
    """
    A message for an engine to store.

    :param message_id: The message's id, unique in its history.
    :param role: `"user"`, `"assistant"`, `"tool"` or `"system"`.
    :param content: The whole message as JSON text, id included.
    :param has_caller_id: Whether the caller gave the id. A new id is unique, so no history has it yet. Defaults to
        True.
    :param text: The beginning of the message's text, for lists of histories, or `None`.
    """

    message_id: str
    role: str
    content: str
    has_caller_id: bool = True
    text: str | None = None


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


def compare_rows(rows: Sequence[MessageRow], stored: Iterable[MessageRow]) -> tuple[list[int], list[int]]:
    """
    Compare rows with what is stored now at their positions.

    :returns: The positions of those that are the same, and of those that are others. What is not stored is neither.
    """
    known = {row.position: row for row in rows}
    found = [row for row in stored if row.position in known]
    same = [row.position for row in found if row == known[row.position]]
    return same, [row.position for row in found if row != known[row.position]]


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
    :param user_id: The user that it belongs to, or `None`.
    :param preview: The beginning of its first question that has text, or `None`: see `previews`.
    :param last_role: The role of its last message that is no system message, or `None` if it has none.
    :param last_text: The beginning of this message, or `None`.
    :param last_at: The time of this message, in microseconds since 1970, UTC, or `None`.
    """

    chat_history_id: str
    created_at: int
    updated_at: int
    message_count: int = 0
    round_count: int = 0
    title: str | None = None
    meta: str | None = None
    revision: int = 0
    user_id: str | None = None
    preview: str | None = None
    last_role: str | None = None
    last_text: str | None = None
    last_at: int | None = None


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
    :param score: The quality of the match, in the engine's own measure. A higher score is better. It depends on nothing
        but the message and the query.
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


def renamed_branch_ids(branch: str, old_id: str, new_id: str) -> list[str]:
    """
    Return ids that a branch may get when its history is renamed.

    The first of them goes on saying which branch it is. If it is taken, the last one is free, and cannot be guessed.

    :param branch: The branch's id.
    :param old_id: The id that its history had.
    :param new_id: The id that its history gets.
    """
    name = branch[len(branch_prefix(old_id)) :].partition("~")[0]
    names = branch_id(new_id, name), branch_id(new_id, new_message_id())
    return [each for each in names if len(each) <= MAX_ID_LENGTH]


def meta_of_branch(meta: str | None, origin: str) -> str:
    """Return the meta of a branch, as the text of a JSON object, with another history as its origin."""
    return merged_json(meta, encode_plain({BRANCH_OF_KEY: origin})) or ""


class Unchanged(Enum):
    """The type of `UNCHANGED`, which keeps a value as it is, while `None` removes it."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return self.name


UNCHANGED: Final = Unchanged.UNCHANGED


@dataclass(frozen=True, kw_only=True)
class HistoryChange:
    """
    What is to change about a history itself. UNCHANGED keeps a value as it is, and `None` removes it.

    :param title: The new title.
    :param default_title: The title of a history that has none. It counts only if `title` is UNCHANGED.
    :param meta: The new meta, as the text of a JSON object.
    :param merged: Keys of the meta to set, as the text of a JSON object, or `None`. A null removes its key.
    :param user_id: The new user. The scope of such a change has no user.
    """

    title: str | Unchanged | None = UNCHANGED
    default_title: str | None = None
    meta: str | Unchanged | None = UNCHANGED
    merged: str | None = None
    user_id: str | Unchanged | None = UNCHANGED

    @property
    def given_title(self) -> str | None:
        """The title that a history without one gets."""
        return self.default_title if isinstance(self.title, Unchanged) else self.title

    def new_meta(self, stored: str | None) -> str | None:
        """
        Return the meta that the history has after the change, as the text of a JSON object, or `None` for none.

        :param stored: The meta that it has before. It is taken for empty if it is damaged.
        """
        if self.meta is not UNCHANGED:
            return self.meta
        return stored if self.merged is None else merged_json(stored, self.merged)


def merged_json(stored: str | None, merged: str) -> str | None:
    """
    Return the text of a JSON object with some keys set, or `None` if no key is left.

    :param stored: The text of the object, or `None`. It is taken for empty if it is damaged.
    :param merged: The keys to set, as the text of a JSON object. A null removes its key.
    """
    try:
        data = {} if stored is None else parse_json(stored)
    except (ValueError, TypeError, RecursionError):
        data = {}
    changes = parse_json(merged)
    data = {**(data if isinstance(data, dict) else {}), **changes}
    data = {key: value for key, value in data.items() if value is not None or key not in changes}
    return encode_plain(data) if data else None


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
