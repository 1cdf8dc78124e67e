# SPDX-License-Identifier: Apache-2.0
"""
What a list of histories shows of their messages: the beginning of the first question, and of the last message.

An engine keeps both with the history. It changes them as it appends messages, and finds them anew when messages are
deleted or replaced.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from haystack.dataclasses import ChatMessage, ChatRole, TextContent, ToolCallResult

from haystack_chat_store.codec import decode_messages
from haystack_chat_store.errors import MessageDecodingError
from haystack_chat_store.json_values import parse_json
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.validation import microseconds

MessageT = TypeVar("MessageT", EncodedMessage, MessageRow)

#: The longest preview, in characters.
PREVIEW_LENGTH = 200
_USER, _SYSTEM = ChatRole.USER.value, ChatRole.SYSTEM.value
# The white space at the beginning that a preview leaves out: that of ASCII, which every engine knows.
_WHITE_SPACE = " \t\n\v\f\r"


def beginning_of(message: ChatMessage) -> str | None:
    """Return the beginning of a message's first text that is not blank, or `None`. Results of tools are texts, too."""
    for part in message._content:
        if isinstance(part, TextContent):
            text: Any = part.text
        elif isinstance(part, ToolCallResult):
            text = part.result
        else:
            continue
        if isinstance(text, str) and (found := _beginning(text)):
            return found
    return None


def beginning_of_content(content: str) -> str | None:
    """Do what `beginning_of` does for the JSON text of a stored message. A damaged message has no text."""
    try:
        parts = parse_json(content)["content"]
        for part in parts:
            text = part["text"] if "text" in part else part.get("tool_call_result", {}).get("result")
            if isinstance(text, str) and (found := _beginning(text)):
                return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return None


def first_beginning(contents: Iterable[str]) -> str | None:
    """Return the beginning of the first content that has text, or `None`."""
    return next(filter(None, map(beginning_of_content, contents)), None)


def first_question(messages: Sequence[MessageT]) -> str | None:
    """Return the beginning of the first user message that has text, or `None`."""
    for message in messages:
        if message.role == _USER:
            text = message.text if isinstance(message, EncodedMessage) else beginning_of_content(message.content)
            if text:
                return text
    return None


def last_said(messages: Sequence[MessageT]) -> MessageT | None:
    """Return the last message that is no system message, or `None`."""
    for message in reversed(messages):
        if message.role != _SYSTEM:
            return message
    return None


def kept_row(
    chat_history_id: str,
    preview: str | None,
    last_role: str | None,
    last_text: str | None,
    last_at: int | None,
    *,
    title: str | None = None,
    meta: str | None = None,
) -> HistoryRow:
    """Return the row of a history with what it keeps of its messages, for `preview_faults`. The rest is unknown."""
    return HistoryRow(
        chat_history_id=chat_history_id,
        created_at=0,
        updated_at=0,
        title=title,
        meta=meta,
        preview=preview,
        last_role=last_role,
        last_text=last_text,
        last_at=last_at,
    )


def preview_faults(row: HistoryRow, questions: Iterable[str], last: MessageRow | None) -> list[str]:
    """
    Return what is wrong with the previews that a history keeps, in words for a sentence.

    What a damaged message said, or when, is not known, so nothing is compared with it.

    :param row: The history.
    :param questions: The contents of its user messages, in order, at least up to the first that has text.
    :param last: Its last message that is no system message, or `None`.
    """
    faults = []
    try:
        if row.preview != next(filter(None, map(_beginning_of_readable, questions)), None):
            faults.append("its preview is not the beginning of its first question")
    except MessageDecodingError:
        pass
    stored = row.last_role, row.last_text, row.last_at
    if last is None:
        is_right = stored == (None, None, None)
    else:
        try:
            text = _beginning_of_readable(last.content)
        except MessageDecodingError:
            text = row.last_text
        is_time = microseconds(readable_time(last.created_at), "created_at") == last.created_at
        is_right = stored == (last.role, text, last.created_at if is_time else row.last_at)
    return faults if is_right else [*faults, "what it keeps of its last message is wrong"]


def _beginning_of_readable(content: str) -> str | None:
    (message,) = decode_messages([content])
    return beginning_of(message)


def _beginning(text: str) -> str:
    text = (text.lstrip(_WHITE_SPACE) if text[:1] in _WHITE_SPACE else text)[:PREVIEW_LENGTH]
    if text.isascii() and "\x00" not in text:
        return text
    # Not every engine can store a NUL, and none a lone surrogate.
    return text.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
