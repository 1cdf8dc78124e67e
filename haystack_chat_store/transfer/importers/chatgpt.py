# SPDX-License-Identifier: Apache-2.0
"""
The data export of ChatGPT: `conversations.json`, or the ZIP archive with it.

A conversation is a tree of messages (`mapping`), because each edit and each new answer begins a branch; `current_node`
is the end of the branch that ChatGPT shows. OpenAI does not describe the file. What is known of it is collected in
https://github.com/mohamed-chs/convoviz (docs/dev/chatgpt-spec.md), by which this module goes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

from haystack_chat_store.transfer.importers import parts
from haystack_chat_store.transfer.importers.conversations import (
    Conversation,
    ImportedMessage,
    Report,
    branch_of,
    time_of,
)
from haystack_chat_store.transfer.importers.json_files import Item, JsonLayout
from haystack_chat_store.transfer.importers.trees import Branch, branches_of

_ROLES = {
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "system": ChatRole.SYSTEM,
    "developer": ChatRole.SYSTEM,
    "tool": ChatRole.TOOL,
}
# Of these fields of a message's metadata, the first has a place of its own, and the others say nothing to a reader.
_USED = ("model_slug", "request_id", "message_source", "turn_exchange_id")


def _conversations(items: Iterator[Item], _: str, report: Report) -> Iterator[Conversation]:
    for item in items:
        found = item.value.get("conversations") if isinstance(item.value, dict) else None
        for entry in found if isinstance(found, list) else [item.value]:
            if not isinstance(entry, dict) or not isinstance(entry.get("mapping"), dict):
                raise ValueError(f"conversation {item.place} has no mapping of messages")
            yield from _branches(entry, item.place, report)


def _branches(entry: dict[str, Any], place: str, report: Report) -> Iterator[Conversation]:
    chat_history_id = parts.text_in(entry, "conversation_id") or parts.text_in(entry, "id")
    if not chat_history_id:
        report(f"Conversation {place} was left out: it has no id.")
        return
    nodes = {key: node for key, node in entry["mapping"].items() if isinstance(node, dict)}
    current = parts.text_in(entry, "current_node") or None
    tree = branches_of({key: node.get("parent") for key, node in nodes.items()}, current)
    lost = [f"Node {key} of {chat_history_id} was left out: its path to the first message is broken." for key in
            [*tree.broken, *(key for key in entry["mapping"] if key not in nodes)]]  # fmt: skip
    for each in lost:
        report(each)
    if current not in nodes or (tree.branches and tree.branches[0].own_key is not None):
        report(f"{chat_history_id} does not say which of its branches is the current one.")
    meta = parts.unused_fields(
        {name: entry.get(name) for name in ("gizmo_id", "default_model_slug", "is_archived", "is_starred")}, ()
    )
    for branch in tree.branches:
        messages = _messages_of(nodes, branch)
        has_own = branch.own_key is None or any(
            True for key in branch.keys[branch.keys.index(branch.own_key) :] if _says_something(nodes[key])
        )
        if has_own:
            conversation = Conversation(
                chat_history_id,
                messages,
                created_at=time_of(entry.get("create_time")),
                updated_at=time_of(entry.get("update_time")),
                title=parts.text_or_none(entry.get("title")),
                meta=meta,
            )
            yield conversation if branch.own_key is None else branch_of(conversation, branch.own_key)


def _says_something(node: Mapping[str, Any]) -> bool:
    return bool(list(_messages({"": dict(node)}, Branch([""], None), lambda _: None)))


def _messages_of(nodes: dict[str, dict[str, Any]], branch: Branch) -> Callable[[Report], Iterator[ImportedMessage]]:
    return lambda report: _messages(nodes, branch, report)


def _messages(nodes: dict[str, dict[str, Any]], branch: Branch, report: Report) -> Iterator[ImportedMessage]:
    calls: dict[str, ToolCall] = {}
    for key in branch.keys:
        said = parts.object_in(nodes[key], "message")
        if not said:
            continue  # the root of the tree
        author, content = parts.object_in(said, "author"), parts.object_in(said, "content")
        metadata = parts.object_in(said, "metadata")
        role = _ROLES.get(parts.text_in(author, "role"))
        if role is None:
            report(f"Node {key} was left out: there is no role for {parts.shown_kind(author.get('role'))}.")
            continue
        for attachment in parts.objects_in(metadata, "attachments"):
            name = parts.shown_kind(attachment.get("name"))
            report(f"Node {key} has the attachment {name}, which was left out: only its name is in the conversation.")
        read = _read(key, content, report)
        recipient = parts.text_in(said, "recipient") or "all"
        if role is ChatRole.ASSISTANT and recipient != "all":
            call = ToolCall(recipient, parts.arguments_of(_joined(read)), key)
            calls[recipient] = call
            read = [part for part in read if isinstance(part, ReasoningContent)] + [call]
        elif role is ChatRole.TOOL and read:
            name = parts.text_in(author, "name")
            failed = content.get("content_type") == "system_error"
            read = [ToolCallResult(_joined(read), calls.get(name) or ToolCall(name, {}, None), error=failed)]
        if read:
            meta = parts.unused_fields({"model": metadata.get("model_slug")}, ())
            if rest := parts.unused_fields(metadata, _USED):
                meta["chatgpt"] = rest
            yield ImportedMessage(key, ChatMessage(role, read, None, meta), time_of(said.get("create_time")))


def _joined(read: list[Any]) -> str:
    return "\n".join(part.text for part in read if isinstance(part, TextContent))


def _read(key: str, content: dict[str, Any], report: Report) -> list[Any]:
    kind = content.get("content_type")
    if kind in ("text", "multimodal_text"):
        return _texts(key, content.get("parts"), report)
    if kind == "thoughts":
        thoughts = [
            "\n".join(filter(None, (parts.text_in(each, "summary"), parts.text_in(each, "content"))))
            for each in parts.objects_in(content, "thoughts")
        ]
        return [ReasoningContent("\n\n".join(thoughts), {"content_type": kind})] if any(thoughts) else []
    if kind == "reasoning_recap":
        return [ReasoningContent(text, {"content_type": kind})] if (text := parts.text_in(content, "content")) else []
    if kind in ("code", "execution_output", "tether_quote", "sonic_webpage", "system_error"):
        origin = [parts.text_in(content, name) for name in ("title", "url")]
        text = "\n".join(filter(None, [*origin, parts.text_in(content, "text")]))
        return [TextContent(text)] if text else []
    if kind == "tether_browsing_display":
        return [TextContent(text)] if (text := parts.text_in(content, "result")) else []
    report(f"Node {key} was left out: there is no message for content of the type {parts.shown_kind(kind)}.")
    return []


def _texts(key: str, said: Any, report: Report) -> list[Any]:
    read: list[Any] = []
    for part in said if isinstance(said, list) else []:
        if isinstance(part, str):
            read += [TextContent(part)] if part else []
        elif isinstance(part, dict) and part.get("content_type") == "audio_transcription":
            read += [TextContent(text)] if (text := parts.text_in(part, "text")) else []
        else:
            kind = parts.shown_kind(part.get("content_type") if isinstance(part, dict) else part)
            report(f"Node {key} has a part of the type {kind} without content of its own. It was left out.")
    return read


LAYOUT = JsonLayout("chatgpt", _conversations, takes_archive=True)
