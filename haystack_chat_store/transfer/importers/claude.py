# SPDX-License-Identifier: Apache-2.0
"""
The data export of Claude: `conversations.json`, or the ZIP archive with it.

A message names the one before it (`parent_message_uuid`), because each edit and each new answer begins a branch.
Exports of early versions do not: their messages stand in one row. Anthropic does not describe the file. This module
goes by what importers of other programs know of it, such as
https://github.com/CherryHQ/cherry-studio (AnthropicImporter.ts) and by the exports that their tests contain.
"""

import base64
from collections.abc import Callable, Iterator
from typing import Any

from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    FileContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)

from haystack_chat_store.transfer.importers import parts
from haystack_chat_store.transfer.importers.conversations import (
    Conversation,
    ImportedMessage,
    Report,
    branch_of,
    time_of,
)
from haystack_chat_store.transfer.importers.json_files import Item, JsonLayout
from haystack_chat_store.transfer.importers.trees import branches_of

_ROLES = {"human": ChatRole.USER, "assistant": ChatRole.ASSISTANT}
# The key that the first message of a conversation names as its parent.
_ROOT = "00000000-0000-4000-8000-000000000000"
# Blocks that say nothing: what Claude may still use of its context.
_IGNORED = ("token_budget",)


def _conversations(items: Iterator[Item], _: str, report: Report) -> Iterator[Conversation]:
    for item in items:
        entry = item.value
        if not isinstance(entry, dict) or not isinstance(entry.get("chat_messages"), list):
            raise ValueError(f"conversation {item.place} has no chat_messages")
        yield from _branches(entry, item.place, report)


def _branches(entry: dict[str, Any], place: str, report: Report) -> Iterator[Conversation]:
    chat_history_id = parts.text_in(entry, "uuid")
    if not chat_history_id:
        report(f"Conversation {place} was left out: it has no uuid.")
        return
    messages: dict[str, dict[str, Any]] = {}
    for number, each in enumerate(entry["chat_messages"], start=1):
        key = parts.text_in(each, "uuid") if isinstance(each, dict) else ""
        if key and key not in messages:
            messages[key] = each
        else:
            what = "another message has its uuid" if key else "it has no uuid"
            report(f"Message {number} of {chat_history_id} was left out: {what}.")

    model = parts.unused_fields({"model": entry.get("model")}, ())  # programs that read Claude's pages know it
    meta = {**parts.unused_fields({"summary": entry.get("summary")}, ()), **model}
    for own_key, keys in _branches_in(entry, messages, chat_history_id, report):
        conversation = Conversation(
            chat_history_id,
            _messages_of([messages[key] for key in keys], model),
            created_at=time_of(entry.get("created_at")),
            updated_at=time_of(entry.get("updated_at")),
            title=parts.text_or_none(entry.get("name")),
            meta=meta,
        )
        yield conversation if own_key is None else branch_of(conversation, own_key)


def _branches_in(
    entry: dict[str, Any], messages: dict[str, dict[str, Any]], chat_history_id: str, report: Report
) -> Iterator[tuple[str | None, list[str]]]:
    """Yield `own_key` and `keys` of each branch."""
    if not any("parent_message_uuid" in each for each in messages.values()):
        for before, after in zip(list(messages.values()), list(messages.values())[1:], strict=False):
            if before.get("sender") == after.get("sender"):
                report(
                    f"Message {after['uuid']} of {chat_history_id} follows another one of the same sender. The export "
                    "does not say whether one was given in place of the other."
                )
        yield None, list(messages)
        return
    parents = {key: each.get("parent_message_uuid") for key, each in messages.items()}
    tree = branches_of(
        {key: None if parent in (_ROOT, "") else parent for key, parent in parents.items()},
        parts.text_in(entry, "current_leaf_message_uuid") or None,
    )
    for key in tree.broken:
        report(f"Message {key} of {chat_history_id} was left out: its path to the first message is broken.")
    for branch in tree.branches:
        yield branch.own_key, branch.keys


def _messages_of(entries: list[dict[str, Any]], model: dict[str, Any]) -> Callable[[Report], Iterator[ImportedMessage]]:
    return lambda report: _messages(entries, model, report)


def _messages(entries: list[dict[str, Any]], model: dict[str, Any], report: Report) -> Iterator[ImportedMessage]:
    calls: dict[str, ToolCall] = {}
    for entry in entries:
        key, role = entry["uuid"], _ROLES.get(parts.text_in(entry, "sender"))
        if role is None:
            report(f"Message {key} was left out: there is no role for {parts.shown_kind(entry.get('sender'))}.")
            continue
        meta = model if role is ChatRole.ASSISTANT else {}
        for number, (said_by, content) in enumerate(_said(entry, role, calls, report)):
            if content:
                message = ChatMessage(said_by, content, None, dict(meta) if said_by is role else {})
                name = key if number == 0 else f"{key}:{number}"
                yield ImportedMessage(name, message, time_of(entry.get("created_at")))


def _said(
    entry: dict[str, Any], role: ChatRole, calls: dict[str, ToolCall], report: Report
) -> Iterator[tuple[ChatRole, list[Any]]]:
    """
    Yield what a message of Claude becomes: several messages if it contains results of tools.

    Each has the same place among them at every import.
    """
    said: list[Any] = _files(entry, report)
    last: ToolCall | None = None
    has_text = False
    for block in parts.objects_in(entry, "content"):
        kind = block.get("type")
        if kind == "text":
            text = parts.text_in(block, "text")
            said += [TextContent(text)] if text else []
            has_text = has_text or bool(text)
        elif kind == "thinking":
            extra = parts.unused_fields(block, ("type", "thinking", "start_timestamp", "stop_timestamp", "flags"))
            said.append(ReasoningContent(parts.text_in(block, "thinking"), extra))
        elif kind == "tool_use":
            last = ToolCall(
                parts.text_in(block, "name"),
                parts.arguments_of(block.get("input")),
                parts.text_or_none(block.get("id")),
            )
            calls.update({last.id: last} if last.id else {})
            said.append(last)
        elif kind == "tool_result":
            yield role, said
            origin = calls.get(parts.text_in(block, "tool_use_id")) or last
            if origin is None or (block.get("tool_use_id") and origin.id != block["tool_use_id"]):
                origin = ToolCall(parts.text_in(block, "name"), {}, parts.text_or_none(block.get("tool_use_id")))
            yield ChatRole.TOOL, [_result(entry["uuid"], block, origin, report)]
            said = []
        elif kind not in _IGNORED:
            report(f"Message {entry['uuid']} has a block of the type {parts.shown_kind(kind)}. It was left out.")
    if not has_text and (text := parts.text_in(entry, "text")) and not parts.objects_in(entry, "content"):
        said.append(TextContent(text))  # exports of early versions have only this
    yield role, said


def _result(key: str, block: dict[str, Any], origin: ToolCall, report: Report) -> ToolCallResult:
    content = block.get("content")
    if isinstance(content, list):
        texts = [each for each in parts.objects_in(block, "content") if isinstance(each.get("text"), str)]
        if len(texts) < len(content):
            report(f"Message {key} has a tool's result with parts that are not text. They were left out.")
        content = parts.texts_of(texts)
    return ToolCallResult(
        "" if content is None else parts.as_text(content), origin, error=block.get("is_error") is True
    )


def _files(entry: dict[str, Any], report: Report) -> list[Any]:
    """Return the files whose text is in the export. Report those of which it has only the name."""
    found: list[Any] = []
    for each in parts.objects_in(entry, "attachments"):
        if text := parts.text_in(each, "extracted_content"):
            data = base64.b64encode(text.encode("utf-8", "replace")).decode()
            found.append(FileContent(data, "text/plain", parts.text_or_none(each.get("file_name")), validation=False))
        else:
            _report_file(entry, each, report)
    for each in parts.objects_in(entry, "files"):
        _report_file(entry, each, report)
    return found


def _report_file(entry: dict[str, Any], file: dict[str, Any], report: Report) -> None:
    name = parts.shown_kind(file.get("file_name"))
    report(f"Message {entry['uuid']} has the file {name}, which was left out: only its name is in the export.")


LAYOUT = JsonLayout("claude", _conversations, takes_archive=True)
