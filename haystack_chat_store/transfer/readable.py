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
from haystack_chat_store.json_form import encode_meta
from haystack_chat_store.stores.arguments import time_of
from haystack_chat_store.stores.operations import HistoryRow, MessageRow

# Controls, what changes the direction of writing or is invisible, surrogates.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNITS = ("bytes", "kB", "MB", "GB")


class Part(NamedTuple):
    """
    A part of a message, as it is shown.

    :param label: What it is, on one line, if that has to be said.
    :param text: What it says; `None` for an image or file.
    """

    kind: Literal["text", "reasoning", "call", "result", "attachment"]
    label: str
    text: str | None


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
    return f"{time_of(microseconds):%Y-%m-%d %H:%M:%S} UTC"


def shown_messages(rows: Sequence[MessageRow]) -> Iterator[tuple[str, str, list[Part]]]:
    """
    Yield who speaks, when, and the parts of what they say.
    """
    for row, message in zip(rows, decode_messages([row.content for row in rows]), strict=True):
        speaker = message.role.value.capitalize()
        if message.name:
            speaker = f"{speaker} ({harmless_line(message.name)})"
        yield speaker, shown_time(row.created_at), list(_parts(message._content))


def _parts(content: Sequence[Any]) -> Iterator[Part]:
    for part in content:
        if isinstance(part, TextContent):
            yield Part("text", "", harmless(part.text))
        elif isinstance(part, ReasoningContent):
            if part.reasoning_text:
                yield Part("reasoning", "Reasoning", harmless(part.reasoning_text))
        elif isinstance(part, ToolCall):
            yield Part("call", f"Tool call: {_call(part)}", harmless(_indented(part.arguments)))
        elif isinstance(part, ToolCallResult):
            what = "Error of" if part.error else "Result of"
            texts, others = [part.result], []
            if not isinstance(part.result, str):
                texts = [each.text for each in part.result if isinstance(each, TextContent)]
                others = [each for each in part.result if not isinstance(each, TextContent)]
            yield Part("result", f"{what} {_call(part.origin)}", harmless("\n".join(map(str, texts))))
            yield from _parts(others)
        elif isinstance(part, ImageContent):
            yield Part("attachment", f"Image: {_described(part.mime_type, part.base64_image)}", None)
        elif isinstance(part, FileContent):
            name = f"{harmless_line(part.filename)}, " if part.filename else ""
            yield Part("attachment", f"File: {name}{_described(part.mime_type, part.base64_data)}", None)


def _call(call: ToolCall) -> str:
    name = harmless_line(call.tool_name)
    return f"{name} ({harmless_line(call.id)})" if call.id else name


def _indented(arguments: Any) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False, indent=2)
    except ValueError:  # an integer of thousands of digits
        return encode_meta(arguments)


def _described(mime_type: Any, base64_text: Any) -> str:
    text = str(base64_text)
    size: float = len(text) * 3 // 4 - text[-2:].count("=")
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    shown_size = f"{size:.1f} {_UNITS[unit]}" if unit else f"{size} {_UNITS[unit]}"
    return f"{harmless_line(mime_type or 'of unknown type')}, {shown_size}"
