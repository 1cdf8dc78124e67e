# SPDX-License-Identifier: Apache-2.0
"""
Sessions of LangChain (`SQLChatMessageHistory` of langchain-community): messages as `message_to_dict` returns them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

from haystack_chat_store.conversation.provider_content import REFUSAL_KEY
from haystack_chat_store.transfer.importers import parts
from haystack_chat_store.transfer.importers.conversations import Report
from haystack_chat_store.transfer.importers.database import ForeignMessage, ForeignRow, Layout

_ROLES = {
    "human": ChatRole.USER,
    "user": ChatRole.USER,
    "ai": ChatRole.ASSISTANT,
    "assistant": ChatRole.ASSISTANT,
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
    "tool": ChatRole.TOOL,
    "function": ChatRole.TOOL,
}
# These fields are converted, or carry nothing more. All other fields go into the message's meta.
_USED = ("content", "type", "role", "name", "tool_calls", "tool_call_chunks", "tool_call_id", "status", "example")


def _messages(rows: Iterable[ForeignRow], report: Report) -> Iterator[ForeignMessage]:
    calls: dict[str, ToolCall] = {}
    for row in rows:
        kind, data = parts.text_in(row.data, "type"), row.data.get("data")
        if not isinstance(data, dict):
            report(f"Row {row.key} was left out: it is not a message of LangChain.")
            continue
        kind = kind.removesuffix("MessageChunk").lower()
        role_name = parts.text_in(data, "role") if kind == "chat" else kind
        role = _ROLES.get(role_name)
        if role is None:
            report(f"Row {row.key} was left out: there is no role for {parts.shown_kind(role_name)}.")
            continue
        own_calls = _calls(data) if role is ChatRole.ASSISTANT else []
        said = data.get("content") if role is not ChatRole.ASSISTANT else parts.without_refusals(data.get("content"))
        content = [
            *_parts(row.key, said, {call.id for call in own_calls if call.id}, report),
            *own_calls,
        ]
        meta = _meta(data, is_reply=role is ChatRole.ASSISTANT)
        calls.update((call.id, call) for call in own_calls if call.id)
        name = parts.text_in(data, "name") or None
        if role is ChatRole.TOOL:
            origin = parts.answered_call(calls, data.get("tool_call_id"), name)
            result = parts.one_text_or_parts(content)
            content, name = [ToolCallResult(result, origin, error=data.get("status") == "error")], None
        if content or not data.get("content") or meta.get(REFUSAL_KEY):
            yield ForeignMessage(row, ChatMessage(role, content, name, meta))


def _meta(data: dict[str, Any], *, is_reply: bool) -> dict[str, Any]:
    """Return what else a message carries. A refusal is kept where Haystack keeps it."""
    kwargs = dict(parts.object_in(data, "additional_kwargs"))
    if not is_reply or not (refusals := _refusals(kwargs, data)):
        return parts.unused_fields(data, _USED)
    kwargs.pop("refusal", None)
    return parts.unused_fields({**data, "additional_kwargs": kwargs}, _USED) | parts.refusal_meta(refusals)


def _refusals(kwargs: dict[str, Any], data: dict[str, Any]) -> list[str]:
    return [text for text in (parts.text_in(kwargs, "refusal"), *parts.refusals_in(data.get("content"))) if text]


def _calls(data: dict[str, Any]) -> list[ToolCall]:
    calls = [
        ToolCall(parts.text_in(call, "name"), parts.arguments_of(call.get("args")), parts.text_or_none(call.get("id")))
        for call in parts.objects_in(data, "tool_calls")
        if "name" in call
    ]
    return calls or parts.calls_from_functions(
        parts.object_in(data, "additional_kwargs")
    )  # early versions have them here


def _parts(key: int, content: Any, call_ids: set[str], report: Report) -> list[Any]:
    if isinstance(content, str):
        return [TextContent(content)] if content else []
    made = []
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            made.append(TextContent(part))
        elif isinstance(part, dict) and (found := _part(part)) is not None:
            made.append(found)
        elif not isinstance(part, dict) or parts.text_in(part, "id") not in call_ids:
            kind = parts.shown_kind(part.get("type") if isinstance(part, dict) else part)
            report(f"Row {key} has a part of the type {kind} without content of its own. It was left out.")
    return made


def _part(part: dict[str, Any]) -> Any:
    kind = part.get("type")
    source = parts.object_in(part, "source")
    data = part.get("base64") or part.get("data") or source.get("data")
    mime_type = part.get("mime_type") or source.get("media_type")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return TextContent(part["text"])
    if kind in ("thinking", "reasoning"):
        text = parts.text_in(part, kind) or parts.texts_of(parts.objects_in(part, "summary"))
        return ReasoningContent(text, {name: value for name, value in part.items() if name != kind})
    if kind == "image_url":
        image = parts.object_in(part, kind) or {"url": part.get(kind)}
        return parts.image_from_url(image.get("url"), image.get("detail"))
    if kind == "image":
        return parts.image_from_base64(data, mime_type)
    if kind in ("file", "audio", "video", "document"):
        file = parts.object_in(part, "file")
        return parts.file_from_base64(
            data or file.get("file_data"), mime_type, part.get("filename") or file.get("filename")
        )
    return None


LAYOUT = Layout("langchain", "message_store", "session_id", "message", None, _messages)
