# SPDX-License-Identifier: Apache-2.0
"""
What a list of histories shows of their messages: the beginning of the first question, and of the last message.

An engine keeps both with the history. It changes them as it appends messages, and finds them anew when messages are
deleted or replaced.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

from haystack.dataclasses import ChatMessage, ChatRole, TextContent, ToolCallResult

from haystack_chat_store.json_values import parse_json, to_text
from haystack_chat_store.stores.rows import EncodedMessage, MessageRow

MessageT = TypeVar("MessageT", EncodedMessage, MessageRow)

#: The longest preview, in characters.
PREVIEW_LENGTH = 200
# The white space at the beginning that a preview leaves out: that of ASCII, which every engine knows.
_WHITE_SPACE = " \t\n\v\f\r"


def beginning_of(message: ChatMessage) -> str | None:
    """Return the beginning of a message's first text that is not blank, or `None`. Results of tools are texts, too."""
    for part in message._content:
        text = part.text if isinstance(part, TextContent) else getattr(part, "result", None)
        if isinstance(part, (TextContent, ToolCallResult)) and isinstance(text, str) and (found := _beginning(text)):
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


def first_question(messages: Iterable[EncodedMessage] | Iterable[MessageRow]) -> str | None:
    """Return the beginning of the first user message that has text, or `None`."""
    return next(_found(messages), None)


def last_said(messages: Sequence[MessageT]) -> MessageT | None:
    """Return the last message that is no system message, or `None`."""
    return next((message for message in reversed(messages) if message.role != ChatRole.SYSTEM.value), None)


def last_message(messages: Sequence[EncodedMessage] | Sequence[MessageRow], created_at: int = 0) -> str | None:
    """
    Return the last message that is no system message, as JSON text, or `None`.

    :param messages: The messages, oldest first.
    :param created_at: The time of messages that do not have one themselves.
    """
    last = last_said(cast("Sequence[Any]", messages))
    if last is None:
        return None
    text = last.text if isinstance(last, EncodedMessage) else beginning_of_content(last.content)
    return last_message_text(last.role, text, getattr(last, "created_at", created_at))


def last_message_text(role: str, text: str | None, created_at: int) -> str:
    """Return the JSON text under which a history keeps its last message."""
    return to_text({"role": role, "text": text, "created_at": created_at})


def _found(messages: Iterable[Any]) -> Iterator[str]:
    for message in messages:
        if message.role == ChatRole.USER.value:
            text = message.text if isinstance(message, EncodedMessage) else beginning_of_content(message.content)
            if text:
                yield text


def _beginning(text: str) -> str:
    text = text.lstrip(_WHITE_SPACE)[:PREVIEW_LENGTH]
    if text.isascii() and "\x00" not in text:
        return text
    # Not every engine can store a NUL, and none a lone surrogate.
    return text.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
