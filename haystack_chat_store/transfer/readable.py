# SPDX-License-Identifier: Apache-2.0
"""
What somebody reads of a history: which parts a message has, in words and in text that can do no harm.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from haystack.dataclasses import (
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)

from haystack_chat_store.codec import decode_messages
from haystack_chat_store.json_values import encode_meta
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.times import readable_time

# Controls, what changes the direction of writing or is invisible, surrogates. Scripts and emoji need U+200C and U+200D,
# which join letters or do not, and emoji U+FE0E and U+FE0F, which choose their style.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_LABELS = {
    "text": "",
    "reasoning": "Reasoning",
    "call": "Tool call: ",
    "result": "Result of ",
    "error": "Error of ",
    "image": "Image: ",
    "file": "File: ",
}
# Arguments of calls are shown on one line if it is not longer.
_MAX_LINE = 80


class Part(NamedTuple):
    """
    A part of a message, as it is shown. All of it is harmless, and all but `text` on one line.

    :param name: The name of the tool that is called or has answered; what an image or file is.
    :param text: What it says, or is called with; of an image or file, nothing.
    :param call_id: The id of the call, if it has one.
    """

    kind: Literal["text", "reasoning", "call", "result", "error", "image", "file"]
    name: str = ""
    text: str = ""
    call_id: str = ""

    @property
    def label(self) -> str:
        """
        What it is, in words; nothing for a text.
        """
        return f"{_LABELS[self.kind]}{self.name}" + (f" ({self.call_id})" if self.call_id else "")


def harmless(text: object) -> str:
    """
    Return text with what a reader cannot see, or a program might obey, as escape sequences, such as `\\x1b`.

    Line feeds and tabs stay; other ends of lines become line feeds.
    """
    plain = str(text).replace("\r\n", "\n").replace("\r", "\n")
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), plain)


def harmless_line(text: object) -> str:
    """
    Do what `harmless` does, on one line.
    """
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")


def title_of(history: HistoryRow) -> str:
    """
    Return what a history is called: its title or, without one, its id.
    """
    return harmless_line(history.title or history.chat_history_id)


def shown_time(microseconds: int) -> str:
    """
    Return a time as people write it.
    """
    return f"{readable_time(microseconds):%Y-%m-%d %H:%M:%S} UTC"


def shown_size(size: float) -> str:
    """
    Return a number of bytes as people write it.
    """
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:,.1f} {_UNITS[unit]}" if unit else f"{size} {_UNITS[unit]}"


def shown_messages(rows: Sequence[MessageRow]) -> Iterator[tuple[str, str, list[Part]]]:
    """
    Yield who speaks, when, and the parts of what they say.
    """
    for row, message in zip(rows, decode_messages([row.content for row in rows]), strict=True):
        speaker = message.role.value.capitalize()
        if message.name:
            speaker = f"{speaker} ({harmless_line(message.name)})"
        yield speaker, shown_time(row.created_at), list(shown_parts(message._content))


def shown_parts(content: Sequence[Any]) -> Iterator[Part]:
    """
    Yield the parts of a message; after a tool's result, the images and files in it.
    """
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
            yield from shown_parts([each for each in parts if not isinstance(each, TextContent)])
        elif isinstance(part, ImageContent):
            yield Part("image", _described(part.mime_type, part.base64_image))
        elif isinstance(part, FileContent):
            name = f"{harmless_line(part.filename)}, " if part.filename else ""
            yield Part("file", f"{name}{_described(part.mime_type, part.base64_data)}")


def _id_of(call: ToolCall) -> str:
    return harmless_line(call.id or "")


def _arguments(arguments: Any) -> str:
    """
    Return the arguments of a tool call, on one line if it is short and nothing in it has several.
    """
    try:
        line = json.dumps(arguments, ensure_ascii=False)
        is_short = len(line) <= _MAX_LINE and "\\n" not in line
        return line if is_short else json.dumps(arguments, ensure_ascii=False, indent=2)
    except ValueError:  # an integer of thousands of digits
        return encode_meta(arguments)


def _described(mime_type: Any, base64_text: Any) -> str:
    text = str(base64_text)
    size = len(text) * 3 // 4 - text[-2:].count("=")
    return f"{harmless_line(mime_type or 'of unknown type')}, {shown_size(size)}"
