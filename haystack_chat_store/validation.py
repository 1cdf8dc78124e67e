# SPDX-License-Identifier: Apache-2.0
"""Validates arguments: each function returns an argument in the form that stores use, or raises a `ValueError`."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, TextContent
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.ids import MAX_ID_LENGTH, message_id_of
from haystack_chat_store.json_values import encode_meta, encode_values, parse_json
from haystack_chat_store.stores.rows import UNCHANGED, HistoryChange, Unchanged
from haystack_chat_store.stores.times import EPOCH, MICROSECOND

#: The longest `namespace`, in characters.
MAX_NAMESPACE_LENGTH = 128
#: The longest title, in characters.
MAX_TITLE_LENGTH = 1_000
#: The longest query of a search, in characters.
MAX_QUERY_LENGTH = 1_000
#: The largest number of histories, messages or hits that one call returns.
MAX_LIMIT = 1_000

#: Greater than the position of any message. So a range may include or exclude it.
MAX_POSITION = 2**32
#: Greater than the revision of any history. A double takes it exactly.
MAX_REVISION = 2**53


def validated_id(value: Any, name: str, max_length: int = MAX_ID_LENGTH) -> str:
    """
    Return an id as a plain `str`.

    :raises ValueError: If it is not text, is empty or longer than `max_length`, or contains NUL or lone surrogates.
    """
    text = validated_text(value, name, max_length)
    if not text:
        raise ValueError(f"{name} must have 1 to {max_length} characters, got 0.")
    return text


def usable_id_of(message: ChatMessage | None) -> str | None:
    """Return a message's id, or `None` if there is no message, or it has no id that a store takes."""
    try:
        return None if message is None else validated_id(message_id_of(message), "id")
    except ValueError:
        return None


def validated_text(value: Any, name: str, max_length: int = MAX_ID_LENGTH) -> str:
    """
    Return text as a plain `str`. It may be empty.

    :raises ValueError: If it is not text, is longer than `max_length`, or contains NUL or lone surrogates.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}.")
    text = str.__str__(value)  # a subclass may override other methods
    if len(text) > max_length:
        raise ValueError(f"{name} must have at most {max_length} characters, got {len(text)}.")
    if "\x00" in text:
        raise ValueError(f"{name} must not contain NUL characters.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must not contain lone surrogates.") from None
    return text


def validated_number(value: Any, name: str, least: int, most: int | None = None) -> int:
    """
    Return an integer.

    :raises ValueError: If the value is not an integer, or not from `least` to `most`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {type(value).__name__}.")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {least} {'or greater' if most is None else f'to {most}'}, got {value}.")
    return int(value)


def validated_flag(value: Any, name: str) -> bool:
    """
    Return True or False.

    :raises ValueError: If the value is anything else, such as the text "false".
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return value


def validated_seconds(value: Any, name: str, minimum: float = 0.001, maximum: float = 10**10) -> float:
    """
    Return a number of seconds.

    :raises ValueError: If the value is not a number, or not from `minimum` to `maximum`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a number of seconds from {minimum:g} to {maximum:,}, got {value!r}.")
    return value


def validated_position(value: Any, name: str, least: int) -> int | None:
    """Return a position, or `None`. Positions beyond the end of every history become `MAX_POSITION`."""
    return None if value is None else min(validated_number(value, name, least), MAX_POSITION)


def validated_page(
    chat_history_id: Any, before: Any, after: Any, limit: Any
) -> tuple[str, int | None, int | None, int]:
    """
    Return the arguments of a page: the history's id, the position after or before the page, and the limit.

    :raises ValueError: If one of them is wrong, or both positions are given.
    """
    history = validated_id(chat_history_id, "chat_history_id")
    before = validated_position(before, "before", 0)
    after = validated_position(after, "after", -1)
    if before is not None and after is not None:
        raise ValueError("Only one of before and after can be given. Leave one of them out.")
    return history, before, after, validated_number(limit, "limit", 1, MAX_LIMIT)


def validated_revision(value: Any) -> int | None:
    """Return the revision that a call expects, or `None`. Revisions beyond those of all histories become the limit."""
    return None if value is None else min(validated_number(value, "expected_revision", 0), MAX_REVISION)


def validated_query(query: Any) -> str:
    """
    Return the query of a search. It may be any text of up to 1,000 characters.

    :raises ValueError: If it is not text, or is longer.
    """
    if not isinstance(query, str):
        raise ValueError(f"query must be text, got {type(query).__name__}.")
    if len(query) > MAX_QUERY_LENGTH:
        raise ValueError(f"query must have at most {MAX_QUERY_LENGTH} characters, got {len(query)}.")
    return query


def validated_choice(message_ids: Any, from_message_id: Any) -> tuple[list[str] | None, str | None]:
    """
    Return the messages to delete: a list of their ids, or the id of the first of them. The other value is `None`.

    :raises ValueError: If both are given, or one is wrong.
    """
    if from_message_id is not None:
        if message_ids is not None:
            raise ValueError("Only one of message_ids and from_message_id can be given. Leave one of them out.")
        return None, validated_id(from_message_id, "from_message_id")
    if isinstance(message_ids, (str, bytes)) or not isinstance(message_ids, Iterable):
        raise ValueError(f"message_ids must be a list of ids, got {type(message_ids).__name__}.")
    return [validated_id(each, f"message_ids[{index}]") for index, each in enumerate(message_ids)], None


def validated_policy(policy: Any) -> DuplicatePolicy:
    """
    Return a `DuplicatePolicy`. NONE becomes SKIP.

    :raises ValueError: If the value is not a `DuplicatePolicy`.
    """
    if not isinstance(policy, DuplicatePolicy):
        raise ValueError(f"policy must be a DuplicatePolicy, got {type(policy).__name__}.")
    return DuplicatePolicy.SKIP if policy is DuplicatePolicy.NONE else policy


def validated_title(title: Any) -> str | Unchanged | None:
    """
    Return a title, `None` to remove the title, or UNCHANGED.

    :raises ValueError: If the value is not text of up to 1,000 characters, or contains NUL or lone surrogates.
    """
    if title is None or title is UNCHANGED:
        return None if title is None else UNCHANGED
    return validated_text(title, "title", MAX_TITLE_LENGTH)


def parsed_meta(meta: str | None) -> dict[str, Any] | None:
    """
    Return the meta of a history, or `None` if the text is damaged: it is not the text of a JSON object.

    :param meta: JSON text, or `None` for an empty meta.
    """
    try:
        parsed = {} if meta is None else parse_json(meta)
    except (ValueError, TypeError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def validated_meta(meta: Any) -> str | Unchanged | None:
    """
    Return the meta of a history as JSON text, `None` for an empty meta, or UNCHANGED.

    :raises ValueError: If the value is not a dictionary. If it contains a value without a JSON form, the error is a
        `MessageEncodingError`.
    """
    if meta is None or meta is UNCHANGED:
        return None if meta is None else UNCHANGED
    if not isinstance(meta, dict):
        raise ValueError(f"meta must be a dictionary or None, got {type(meta).__name__}.")
    return encode_meta(meta) if meta else None


def validated_change(title: Any, meta: Any, merge_meta: Any, user_id: Any, default_title: Any = None) -> HistoryChange:
    """
    Return what is to change about a history.

    :raises ValueError: If a value is wrong, or both `meta` and `merge_meta`, or `title` and `default_title`, are given.
    """
    if merge_meta is not None and meta is not UNCHANGED:
        raise ValueError("Only one of meta and merge_meta can be given. Leave one of them out.")
    if default_title is not None and title is not UNCHANGED:
        raise ValueError("Only one of title and default_title can be given. Leave one of them out.")
    if default_title is not None:
        default_title = validated_text(default_title, "default_title", MAX_TITLE_LENGTH)
    if user_id is not None and user_id is not UNCHANGED:
        user_id = validated_id(user_id, "user_id")
    return HistoryChange(
        title=validated_title(title),
        default_title=default_title,
        meta=validated_meta(meta),
        merged=None if merge_meta is None else validated_merge(merge_meta, "merge_meta"),
        user_id=user_id,
    )


def validated_merge(merge: Any, name: str) -> str:
    """
    Return keys of a meta to set, as JSON text.

    :raises ValueError: If the value is not a dictionary. If it contains a value without a JSON form, the error is a
        `MessageEncodingError`.
    """
    if not isinstance(merge, dict):
        raise ValueError(f"{name} must be a dictionary, got {type(merge).__name__}.")
    return encode_values(merge, name)


def microseconds(time: Any, name: str) -> int:
    """
    Return a time in microseconds since 1970, UTC.

    :raises ValueError: If it is not an aware datetime, or lies outside the years 1 to 9999 in UTC: no `datetime` could
        be read back. Without a time zone, a datetime does not name a moment.
    """
    if not isinstance(time, datetime) or time.utcoffset() is None:
        raise ValueError(f"{name} must be a datetime with a time zone, such as datetime.now(timezone.utc).")
    try:
        return (time.astimezone(timezone.utc) - EPOCH) // MICROSECOND
    except OverflowError:
        raise ValueError(f"{name} must lie in the years 1 to 9999 in UTC.") from None


def validate_last_k(last_k: Any) -> None:
    """
    Check a `last_k`.

    :param last_k: A number of rounds or messages, or `None`.
    :raises ValueError: If `last_k` is neither `None` nor an integer of 0 or more.
    """
    if last_k is None:
        return
    if not isinstance(last_k, int) or isinstance(last_k, bool):
        raise ValueError(f"last_k must be an integer or None, got {type(last_k).__name__}.")
    if last_k < 0:
        raise ValueError(f"last_k must be 0 or greater, got {last_k}.")


def validate_window_step(window_step: Any) -> None:
    """
    Check a `window_step`.

    :param window_step: A number of rounds or messages.
    :raises ValueError: If `window_step` is not an integer of 1 or more.
    """
    if not isinstance(window_step, int) or isinstance(window_step, bool):
        raise ValueError(f"window_step must be an integer, got {type(window_step).__name__}.")
    if window_step < 1:
        raise ValueError(f"window_step must be 1 or greater, got {window_step}.")


def validated_messages(messages: Any, name: str = "messages") -> list[ChatMessage]:
    """
    Return an iterable of messages as a list.

    :param messages: A list or other iterable of `ChatMessage`s.
    :param name: The name of the argument in errors. Defaults to "messages".
    :raises ValueError: If the value is not an iterable, or an item is not a `ChatMessage`. The error names the item.
    """
    if isinstance(messages, (str, bytes, bytearray, dict)) or not isinstance(messages, Iterable):
        raise ValueError(f"{name} must be a list of ChatMessages, got {type(messages).__name__}.")
    listed = list(messages)
    for index, message in enumerate(listed):
        if not isinstance(message, ChatMessage):
            raise ValueError(f"{name}[{index}] must be a ChatMessage, got {type(message).__name__}.")
        if not isinstance(message.role, ChatRole) or not isinstance(message.meta, dict):
            raise ValueError(f"{name}[{index}] must have a ChatRole as role and a dict as meta.")
        if not isinstance(message._content, Sequence):
            raise ValueError(f"{name}[{index}] must have a list of parts as content.")
        for part in message._content:
            if type(part) is TextContent and not isinstance(part.text, str):
                raise ValueError(f"{name}[{index}] has a text that is a {type(part.text).__name__}, not a str.")
    return listed
