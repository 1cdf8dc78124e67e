# SPDX-License-Identifier: Apache-2.0
"""
Chats of LlamaIndex: each message is a list of blocks.

They are in the SQLite file of `SQLiteChatStore` (llama-index-storage-chat-store-sqlite), or in the JSON file that
`SimpleChatStore.persist` writes.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)

from haystack_chat_store.json_values import parse_json
from haystack_chat_store.transfer.importers import parts
from haystack_chat_store.transfer.importers.conversations import Conversation, Digest, ImportedMessage, Report
from haystack_chat_store.transfer.importers.database import ForeignMessage, ForeignRow, Layout
from haystack_chat_store.transfer.importers.json_files import Item, JsonLayout

_ROLES = {
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "chatbot": ChatRole.ASSISTANT,
    "model": ChatRole.ASSISTANT,
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
    "tool": ChatRole.TOOL,
    "function": ChatRole.TOOL,
}


def _messages(rows: Iterable[ForeignRow], report: Report) -> Iterator[ForeignMessage]:
    calls: dict[str, ToolCall] = {}
    for row in rows:
        role = _ROLES.get(parts.text_in(row.data, "role"))
        if role is None:
            report(f"Row {row.key} was left out: there is no role for {parts.shown_kind(row.data.get('role'))}.")
            continue
        extra = parts.object_in(row.data, "additional_kwargs")
        blocks = parts.objects_in(row.data, "blocks") or _blocks_of_early_versions(row.data)
        content = []
        for block in blocks:
            read = _PARTS.get(parts.text_in(block, "block_type"))
            found = None if read is None else read(block)
            if found is None:
                kind = parts.shown_kind(block.get("block_type"))
                report(f"Row {row.key} has a block of the type {kind} without content of its own. It was left out.")
            else:
                content.append(found)
        used = ["tool_calls"]
        if role is ChatRole.TOOL:
            used += ["tool_call_id", "name"]
            origin = parts.answered_call(calls, extra.get("tool_call_id"), extra.get("name"))
            content = [ToolCallResult(parts.one_text_or_parts(content), origin, error=False)]
        elif not any(isinstance(part, ToolCall) for part in content):  # early versions have the calls here
            content += parts.calls_from_functions(extra)
        calls.update((part.id, part) for part in content if isinstance(part, ToolCall) and part.id)
        if content or not blocks:
            yield ForeignMessage(row, ChatMessage(role, content, None, parts.unused_fields(extra, used)))


def _blocks_of_early_versions(data: dict[str, Any]) -> list[dict[str, Any]]:
    text = data.get("content")
    return [{"block_type": "text", "text": text}] if isinstance(text, str) and text else []


def _text(block: dict[str, Any]) -> TextContent | None:
    return TextContent(block["text"]) if isinstance(block.get("text"), str) else None


def _thinking(block: dict[str, Any]) -> ReasoningContent:
    return ReasoningContent(parts.text_in(block, "content"), parts.object_in(block, "additional_information"))


def _tool_call(block: dict[str, Any]) -> ToolCall:
    kwargs = parts.arguments_of(block.get("tool_kwargs"))
    return ToolCall(parts.text_in(block, "tool_name"), kwargs, parts.text_or_none(block.get("tool_call_id")))


def _image(block: dict[str, Any]) -> ImageContent | None:
    image = parts.image_from_base64(block.get("image"), block.get("image_mimetype"), block.get("detail"))
    return image or parts.image_from_url(block.get("url"), block.get("detail"))


def _document(block: dict[str, Any]) -> FileContent | None:
    return parts.file_from_base64(block.get("data"), block.get("document_mimetype"), block.get("title"))


def _audio(block: dict[str, Any]) -> FileContent | None:
    return parts.file_from_base64(block.get("audio"), f"audio/{parts.text_in(block, 'format') or 'mpeg'}")


def _video(block: dict[str, Any]) -> FileContent | None:
    return parts.file_from_base64(block.get("video"), block.get("video_mimetype"))


_PARTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text": _text,
    "thinking": _thinking,
    "tool_call": _tool_call,
    "image": _image,
    "document": _document,
    "audio": _audio,
    "video": _video,
}


def _conversations(items: Iterator[Item], _: str, report: Report) -> Iterator[Conversation]:  # noqa: ARG001
    for item in items:
        value = (
            parse_json(item.value) if isinstance(item.value, str) else item.value
        )  # written as text by early versions
        store = value.get("store") if isinstance(value, dict) else None
        if item.number > 1 or not isinstance(store, dict) or not all(isinstance(each, list) for each in store.values()):
            raise ValueError("it is not what SimpleChatStore.persist writes")
        for key, chat in store.items():
            yield Conversation(key, _messages_in_json(chat))


def _messages_in_json(items: list[Any]) -> Callable[[Report], Iterator[ImportedMessage]]:
    """Return a function that converts one chat of the file. Keys are digests, because the file has no ids."""

    def messages(report: Report) -> Iterator[ImportedMessage]:
        digest = Digest()
        keys, rows = {}, []
        for number, each in enumerate(items, start=1):
            keys[number] = digest.key(json.dumps(each, sort_keys=True))
            if isinstance(each, dict):
                rows.append(ForeignRow(number, created_at=0, data=each))  # the format has no times
            else:
                report(f"Message {number} is not a JSON object, and was left out.")
        for row, message in _messages(rows, report):
            yield ImportedMessage(keys[row.key], message)

    return messages


LAYOUT = Layout("llama-index", "data_chatstore", "key", "value", None, _messages)
JSON_LAYOUT = JsonLayout("llama-index", _conversations)
