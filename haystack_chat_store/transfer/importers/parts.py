# SPDX-License-Identifier: Apache-2.0
"""Converts parts of messages from the formats of model providers and libraries."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from haystack.dataclasses import FileContent, ImageContent, TextContent, ToolCall

from haystack_chat_store.conversation.provider_content import REFUSAL_KEY
from haystack_chat_store.json_values import encode_meta, parse_json

_DATA_URL = re.compile(r"data:([^;,]*)[^,]*;base64,(.*)", re.DOTALL)


def image_from_url(url: Any, detail: Any = None) -> ImageContent | None:
    """Return the image in a `data:` URL, or `None` for any other URL."""
    match = _DATA_URL.fullmatch(url) if isinstance(url, str) else None
    return None if match is None else image_from_base64(match[2], match[1] or None, detail)


def image_from_base64(data: Any, mime_type: Any, detail: Any = None) -> ImageContent | None:
    """Return an image made from base64 text."""
    if not isinstance(data, str) or not data:
        return None
    return ImageContent(data, text_or_none(mime_type), text_or_none(detail), validation=False)  # type: ignore[arg-type]  # any detail


def file_from_base64(data: Any, mime_type: Any, filename: Any = None) -> FileContent | None:
    """Return a file made from base64 text or a `data:` URL. The type in a URL takes precedence."""
    if not isinstance(data, str) or not data:
        return None
    match = _DATA_URL.fullmatch(data)
    if match is not None:
        mime_type, data = match[1], match[2]
    return FileContent(data, text_or_none(mime_type), text_or_none(filename), validation=False)


def text_or_none(value: Any) -> str | None:
    """Return the value if it is text, else `None`."""
    return value if isinstance(value, str) else None


def text_in(data: Mapping[str, Any], name: str) -> str:
    """Return the text under a name, or an empty text."""
    return text_or_none(data.get(name)) or ""


def shown_kind(value: Any) -> str:
    """Return an unknown type or role in the form that a report shows."""
    return repr(value[:100] if isinstance(value, str) else type(value).__name__)


def object_in(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object under a name, or an empty one."""
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def objects_in(data: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the objects in a list under a name."""
    found = data.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def texts_of(items: Iterable[dict[str, Any]]) -> str:
    """Return the texts of the objects, joined by line feeds."""
    return "\n".join(item["text"] for item in items if isinstance(item.get("text"), str))


def refusals_in(content: Any) -> list[str]:
    """Return the refusals among the parts of a message of the assistant, as OpenAI's APIs have them."""
    found = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return [text for part in found if part.get("type") == "refusal" and (text := text_in(part, "refusal"))]


def without_refusals(content: Any) -> Any:
    """Return the parts of a message of the assistant without its refusals, which the message's meta has."""
    return [part for part in content if not refusals_in([part])] if isinstance(content, list) else content


def refusal_meta(refusals: Iterable[str]) -> dict[str, str]:
    """Return refusals in the form in which Haystack keeps them in a message's meta. Each is kept once."""
    text = "\n".join(dict.fromkeys(filter(None, refusals)))
    return {REFUSAL_KEY: text} if text else {}


def arguments_of(value: Any) -> dict[str, Any]:
    """
    Return the arguments of a tool call, which may be JSON text.

    An empty text, null and a missing value mean no arguments. Any other value that is not an object, also a text that
    is not JSON, becomes one argument with an empty name.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value) if value else None
        except (ValueError, RecursionError):
            pass
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"": value}


def calls_from_functions(data: Mapping[str, Any]) -> list[ToolCall]:
    """Return the `tool_calls` of an object, from the format of OpenAI's chat completions."""
    calls = ((text_or_none(call.get("id")), object_in(call, "function")) for call in objects_in(data, "tool_calls"))
    return [
        ToolCall(text_in(function, "name"), arguments_of(function.get("arguments")), call_id)
        for call_id, function in calls
        if function
    ]


def answered_call(calls: Mapping[str, ToolCall], call_id: Any, name: Any) -> ToolCall:
    """Return the call that a result answers: an earlier call, or a new one made from its id and name."""
    known_id = text_or_none(call_id)
    known = calls.get(known_id) if known_id else None
    return known or ToolCall(text_or_none(name) or "", {}, known_id)


def unused_fields(data: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """Return the fields of an object that are neither used nor empty. They go into the message's meta."""
    return {key: value for key, value in data.items() if key not in used and value not in (None, "", [], {})}


def as_text(value: Any) -> str:
    """Return the result of a tool as text: a text as it is, any other value as JSON."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except ValueError:  # Python may be set to convert fewer digits than a stored integer has
        return encode_meta(value)


def one_text_or_parts(parts: list[Any]) -> Any:
    """Return the result of a tool: a single text or an empty result as text, anything else as a list of parts."""
    if not parts:
        return ""
    return parts[0].text if len(parts) == 1 and isinstance(parts[0], TextContent) else parts
