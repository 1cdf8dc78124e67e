# SPDX-License-Identifier: Apache-2.0
"""Text for people to read: the parts of messages, times and sizes, with all control characters escaped."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from haystack.dataclasses import (
    ChatMessage,
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)

from haystack_chat_store.codec import decode_messages
from haystack_chat_store.conversation.provider_content import refusal_of
from haystack_chat_store.json_values import encode_meta
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.times import readable_time

# Control characters, characters that are invisible or change the direction of writing, and surrogates. U+200C, U+200D,
# U+FE0E and U+FE0F are not among them: scripts and emoji need them.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_LABELS = {
    "text": "",
    "reasoning": "Reasoning",
    "refusal": "Refusal",
    "call": "Tool call: ",
    "result": "Result of ",
    "error": "Error of ",
    "image": "Image: ",
    "file": "File: ",
}
# Longer arguments of a tool call are shown on several lines.
_MAX_LINE_LENGTH = 80


class Part(NamedTuple):
    """
    A part of a message, as it is shown. All fields are escaped. Only `text` may have several lines.

    :param kind: The kind of the part.
    :param name: The name of the tool, or the description of the image or file.
    :param text: The text, the arguments of a call, or its result. Empty for an image or file.
    :param call_id: The id of the call, or an empty text.
    """

    kind: Literal["text", "reasoning", "refusal", "call", "result", "error", "image", "file"]
    name: str = ""
    text: str = ""
    call_id: str = ""

    @property
    def label(self) -> str:
        """A heading for the part. Empty for text."""
        return f"{_LABELS[self.kind]}{self.name}" + (f" ({self.call_id})" if self.call_id else "")


def harmless(text: object) -> str:
    """
    Escape invisible characters and those that control a terminal, such as `\\x1b`.

    Line feeds and tabs stay. Other line endings become line feeds.
    """
    plain = str(text).replace("\r\n", "\n").replace("\r", "\n")
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), plain)


def harmless_line(text: object) -> str:
    """Escape a text like `harmless`, with line feeds and tabs escaped too."""
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")


def title_of(history: HistoryRow) -> str:
    """Return the title of a history or, without one, its id."""
    return harmless_line(history.title or history.chat_history_id)


def shown_time(microseconds: int) -> str:
    """Return a time in the form `2026-01-31 08:30:00 UTC`."""
    return f"{readable_time(microseconds):%Y-%m-%d %H:%M:%S} UTC"


def shown_size(size: float) -> str:
    """Return a number of bytes in the largest unit that fits, such as `1.5 MB`."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:,.1f} {_UNITS[unit]}" if unit else f"{size} {_UNITS[unit]}"


def shown_messages(rows: Sequence[MessageRow]) -> Iterator[tuple[str, str, list[Part]]]:
    """Yield the speaker, the time and the parts of each message."""
    for row, message in zip(rows, decode_messages([row.content for row in rows]), strict=True):
        speaker = message.role.value.capitalize()
        if message.name:
            speaker = f"{speaker} ({harmless_line(message.name)})"
        yield speaker, shown_time(row.created_at), list(shown_parts(message))


def shown_parts(message: ChatMessage) -> Iterator[Part]:
    """Yield the parts of a message. The images and files in a tool's result follow the result."""
    yield from _shown_content(message._content)
    if refusal := refusal_of(message):
        yield Part("refusal", text=harmless(refusal))


def _shown_content(content: Sequence[Any]) -> Iterator[Part]:
    for part in content:
        if isinstance(part, TextContent):
            yield Part("text", text=harmless(part.text))
        elif isinstance(part, ReasoningContent):
            if part.reasoning_text:
                yield Part("reasoning", text=harmless(part.reasoning_text))
        elif isinstance(part, ToolCall):
            yield Part("call", harmless_line(part.tool_name), harmless(_arguments(part.arguments)), _id_of(part))
        elif isinstance(part, ToolCallResult):
            parts = part.result if isinstance(part.result, (list, tuple)) else [TextContent(str(part.result))]
            text = "\n".join(str(each.text) for each in parts if isinstance(each, TextContent))
            kind: Literal["result", "error"] = "error" if part.error else "result"
            yield Part(kind, harmless_line(part.origin.tool_name), harmless(text), _id_of(part.origin))
            yield from _shown_content([each for each in parts if not isinstance(each, TextContent)])
        elif isinstance(part, ImageContent):
            yield Part("image", _described(part.mime_type, part.base64_image))
        elif isinstance(part, FileContent):
            name = f"{harmless_line(part.filename)}, " if part.filename else ""
            yield Part("file", f"{name}{_described(part.mime_type, part.base64_data)}")


def _id_of(call: ToolCall) -> str:
    return harmless_line(call.id or "")


def _arguments(arguments: Any) -> str:
    """Return the arguments of a tool call as JSON, on one line if it is short and has no line feeds."""
    try:
        line = json.dumps(arguments, ensure_ascii=False)
        is_short = len(line) <= _MAX_LINE_LENGTH and "\\n" not in line
        return line if is_short else json.dumps(arguments, ensure_ascii=False, indent=2)
    except ValueError:  # Python may be set to convert fewer digits than a stored integer has
        return encode_meta(arguments)


def _described(mime_type: Any, base64_text: Any) -> str:
    text = str(base64_text)
    size = len(text) * 3 // 4 - text[-2:].count("=")
    return f"{harmless_line(mime_type or 'of unknown type')}, {shown_size(size)}"
