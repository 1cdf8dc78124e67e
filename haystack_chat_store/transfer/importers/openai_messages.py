# SPDX-License-Identifier: Apache-2.0
"""
Messages in the format of OpenAI's chat completions, as JSON or JSON lines: what the export `openai` writes, too.

The file is a list of messages, an object `{"messages": [...]}`, or several of these, in a list or one a line. It names
no conversations. So a conversation is named by the file and its number in it, and a message by a digest of itself and
those before it: the same file brings nothing twice, and a conversation that went on brings what is new.
"""

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

from haystack_chat_store.transfer.importers import parts
from haystack_chat_store.transfer.importers.conversations import Conversation, Digest, ImportedMessage, Report
from haystack_chat_store.transfer.importers.json_files import Item, JsonLayout

_ROLES = {
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
    "tool": ChatRole.TOOL,
    "function": ChatRole.TOOL,
}
_USED = ("role", "content", "name", "tool_calls", "function_call", "tool_call_id", "refusal", "reasoning_content")


def _conversations(items: Iterator[Item], stem: str, report: Report) -> Iterator[Conversation]:  # noqa: ARG001
    first = next(items, None)
    if first is None:
        return
    items = chain([first], items)
    if isinstance(first.value, dict) and "role" in first.value:  # the file is one conversation, a list of messages
        yield _conversation(stem, [item.value for item in items], {})
        return
    for item in items:
        value = {"messages": item.value} if isinstance(item.value, list) else item.value
        if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
            raise ValueError(f"conversation {item.place} has no messages")
        meta = {name: other for name, other in value.items() if name != "messages"}
        yield _conversation(f"{stem}/{item.number}", value["messages"], meta)


def _conversation(chat_history_id: str, said: list[Any], meta: dict[str, Any]) -> Conversation:
    if not all(isinstance(each, dict) and "role" in each for each in said):
        raise ValueError(f"a message of conversation {chat_history_id} has no role")
    return Conversation(chat_history_id, _messages_of(said), meta=meta)


def _messages_of(said: list[Any]) -> Callable[[Report], Iterator[ImportedMessage]]:
    return lambda report: _messages(said, report)


def _messages(said: list[dict[str, Any]], report: Report) -> Iterator[ImportedMessage]:
    calls: dict[str, ToolCall] = {}
    digest = Digest()
    for number, each in enumerate(said, start=1):
        key = digest.key(json.dumps(each, sort_keys=True))
        role = _ROLES.get(parts.text_in(each, "role"))
        if role is None:
            report(f"Message {number} was left out: there is no role for {parts.shown_kind(each['role'])}.")
            continue
        read = _content(number, each, report)
        name = parts.text_in(each, "name") or None
        meta = parts.unused_fields(each, _USED)
        if role is ChatRole.TOOL:
            origin = parts.answered_call(calls, each.get("tool_call_id"), name)
            read, name = [ToolCallResult(parts.one_text_or_parts(read), origin, error=False)], None
        elif role is ChatRole.ASSISTANT:
            own_calls = [*parts.calls_from_functions(each), *_call_of_early_versions(each)]
            calls.update((call.id, call) for call in own_calls if call.id)
            read += own_calls
            refusals = [parts.text_in(each, "refusal"), *parts.refusals_in(each.get("content"))]
            meta |= parts.refusal_meta(refusals)
        if read or meta or not each.get("content"):
            yield ImportedMessage(key, ChatMessage(role, read, name, meta))


def _content(number: int, said: dict[str, Any], report: Report) -> list[Any]:
    thought = parts.text_in(said, "reasoning_content")
    read: list[Any] = [ReasoningContent(thought)] if thought else []
    content = said.get("content")
    if isinstance(content, str):
        return [*read, TextContent(content)] if content else read
    for part in parts.without_refusals(content) if isinstance(content, list) else []:
        found = _part(part) if isinstance(part, dict) else None
        if found is None:
            kind = parts.shown_kind(part.get("type") if isinstance(part, dict) else part)
            report(f"Message {number} has a part of the type {kind} without content of its own. It was left out.")
        else:
            read.append(found)
    return read


def _part(part: dict[str, Any]) -> Any:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return TextContent(part["text"])
    if kind == "image_url":
        image = parts.object_in(part, kind)
        return parts.image_from_url(image.get("url"), image.get("detail"))
    if kind == "file":
        file = parts.object_in(part, kind)
        return parts.file_from_base64(file.get("file_data"), None, file.get("filename"))
    if kind == "input_audio":
        audio = parts.object_in(part, kind)
        return parts.file_from_base64(audio.get("data"), f"audio/{parts.text_in(audio, 'format') or 'mpeg'}")
    return None


def _call_of_early_versions(said: dict[str, Any]) -> list[ToolCall]:
    function = parts.object_in(said, "function_call")
    return (
        [ToolCall(parts.text_in(function, "name"), parts.arguments_of(function.get("arguments")))] if function else []
    )


LAYOUT = JsonLayout("openai", _conversations)
