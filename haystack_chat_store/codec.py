# SPDX-License-Identifier: Apache-2.0
"""
ChatMessage to JSON text and back, fast and lossless.

The stored form is that of `ChatMessage.to_dict()`, so anyone can read it, with or without this package. What JSON has
no form for is stored in the form that `json_form` documents, or refused.
"""

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
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

from haystack_chat_store.errors import MessageDecodingError, MessageEncodingError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.json_form import MAX_DEPTH, encode_unusual, encoded, parse_json, quoted

_SCALARS = frozenset({str, int, float, bool, type(None)})
_TEXT = frozenset({str})
_ROLES = {role.value: role for role in ChatRole}
_PART_KEYS: dict[type, str] = {
    ToolCall: "tool_call",
    ToolCallResult: "tool_call_result",
    ImageContent: "image",
    ReasoningContent: "reasoning",
    FileContent: "file",
}
_PART_KINDS = {key: kind for kind, key in _PART_KEYS.items()}
_FIELDS = {kind: frozenset(field.name for field in fields(kind)) for kind in (ChatMessage, *_PART_KEYS)}

# What lies deeper is left to json_form, which counts from the message down and decides.
_CHECKED_DEPTH = MAX_DEPTH - 10

# Bulk reads of at least so many messages are worth pausing the garbage collector for.
_MANY = 1000


# Held by the one bulk read at a time that pauses the garbage collector, and over a fork.
_pausing = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pausing.acquire, after_in_parent=_pausing.release, after_in_child=_pausing.release)


@contextmanager
def _garbage_collector_paused() -> Iterator[None]:
    """
    Keep the garbage collector from looking through messages while they are made: half of a bulk read would be that.

    While one thread does, others decode as they are, so that there is always a time when the collector may run.
    """
    if not gc.isenabled() or not _pausing.acquire(blocking=False):
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()
        _pausing.release()


def encode_message(message: ChatMessage, message_id: str, where: str = "message") -> str:
    """
    Turn a message into the JSON text that is stored. The message is not changed.

    :param message: The message.
    :param message_id: The id that the message is stored under; it is put into the stored `meta`.
    :param where: What an error calls the message, such as `messages[2]`.
    :raises MessageEncodingError: If the message holds something that cannot be stored.
    """
    try:
        text = _plain_text(message, message_id)
    except (
        ValueError,
        TypeError,
        AttributeError,
    ):  # a NaN, a very long integer, a lone surrogate, or what Haystack has no part for
        text = None
    if text is None:
        data = _message_to_dict(message, where)
        text = encode_unusual({**data, "meta": {**data["meta"], MESSAGE_ID_KEY: message_id}}, where)
    return text


def _plain_text(message: ChatMessage, message_id: str) -> str | None:
    """
    Encode a message that holds nothing unusual, as nearly all do, or return `None`.

    The frame is written by hand because that is twice as fast as to have `json` encode it.

    :raises ValueError, TypeError: If something unusual was found on the way.
    """
    meta, name = message._meta, message._name
    if type(message) is not ChatMessage or not (name is None or type(name) is str) or not _is_json(meta):
        return None
    parts = []
    for part in message._content:
        if type(part) is TextContent and type(part.text) is str:
            parts.append(f'{{"text":{quoted(part.text)}}}')
        elif _is_json_part(part):
            parts.append(encoded(_part_to_dict(part, "")))
        else:
            return None
    meta_text = (
        encoded({**meta, MESSAGE_ID_KEY: message_id}) if meta else f'{{"{MESSAGE_ID_KEY}":{quoted(message_id)}}}'
    )
    name_text = "null" if name is None else quoted(name)
    text = f'{{"role":"{message._role.value}","meta":{meta_text},"name":{name_text},"content":[{",".join(parts)}]}}'
    if not text.isascii():
        text.encode()  # a lone surrogate has no UTF-8
    return text


def decode_messages(texts: Sequence[str]) -> list[ChatMessage]:
    """
    Turn stored texts back into messages. All of them are parsed at once, which takes half the time.

    :param texts: What `encode_message` returned, oldest first.
    :raises MessageDecodingError: If one of them cannot be read back. It names the text's index, not its content.
    """
    with _garbage_collector_paused() if len(texts) >= _MANY else nullcontext():
        try:
            rows = parse_json(f"[{','.join(texts)}]")
            if len(rows) == len(texts):
                return [_message_from_dict(row) for row in rows]
        except Exception:  # noqa: S110  (damaged, or written by another version of Haystack: one by one, then)
            pass
        return [_decoded_alone(text, index) for index, text in enumerate(texts)]


def _decoded_alone(text: str, index: int) -> ChatMessage:
    try:
        message = ChatMessage.from_dict(parse_json(text))
        if not isinstance(message._meta, dict):
            raise TypeError
        return message
    except Exception as error:
        raise MessageDecodingError(
            f"Message {index} of those read cannot be turned back into a ChatMessage ({type(error).__name__}). "
            "Its stored text was damaged, or written by something else."
        ) from None  # the parser's own errors quote the text


def _message_to_dict(message: ChatMessage, where: str) -> dict[str, Any]:
    """
    Do what `ChatMessage.to_dict()` does, without the deep copies that take most of its time.
    """
    if type(message) is not ChatMessage and len(fields(message)) != len(_FIELDS[ChatMessage]):
        raise MessageEncodingError(f"{where} is a {type(message).__name__} with fields that ChatMessage does not have.")
    content = [_part_to_dict(part, f"{where}.content[{index}]") for index, part in enumerate(message._content)]
    return {"role": message._role.value, "meta": message._meta, "name": message._name, "content": content}


def _part_to_dict(part: Any, where: str) -> dict[str, Any]:
    kind = type(part)
    if kind is TextContent:
        return {"text": part.text}
    key = _PART_KEYS.get(kind)
    if key is None:
        raise MessageEncodingError(f"{where} is a {kind.__name__}, which is not a part of a ChatMessage.")
    data = _fields(part)
    if kind is ToolCallResult:
        if type(part.origin) is not ToolCall:
            raise MessageEncodingError(f"{where}.origin is a {type(part.origin).__name__}, not a ToolCall.")
        data = {**data, "origin": _fields(part.origin)}
        if isinstance(part.result, (list, tuple)):
            data["result"] = [_part_to_dict(item, f"{where}.result[{i}]") for i, item in enumerate(part.result)]
    return {key: data}


def _fields(part: Any) -> dict[str, Any]:
    """
    Return the values of a dataclass's fields. Not to be changed: it may be the very dict that the object lives in.
    """
    names, values = _FIELDS[type(part)], vars(part)
    return values if len(values) == len(names) else {name: values[name] for name in values if name in names}


def _message_from_dict(data: dict[str, Any]) -> ChatMessage:
    """
    Do what `ChatMessage.from_dict()` does, past the constructors of the messages and their parts.

    These would validate and guess again what was settled when the message was first made.
    """
    content = [_part_from_dict(part) for part in data["content"]]
    state = {"_role": _ROLES[data["role"]], "_content": content, "_name": data["name"], "_meta": data["meta"] or {}}
    if len(data) != len(state) or type(data["content"]) is not list or type(state["_meta"]) is not dict:
        raise ValueError("Not what this version of Haystack writes.")
    message: ChatMessage = _made(ChatMessage, state)
    return message


def _part_from_dict(data: dict[str, Any]) -> Any:
    if "text" in data and len(data) == 1:
        return _made(TextContent, data)
    ((key, value),) = data.items()
    kind = _PART_KINDS[key]
    if kind is ToolCallResult:
        value["origin"] = _dataclass_from_dict(ToolCall, value["origin"])
        if type(value["result"]) is list:
            value["result"] = [_part_from_dict(item) for item in value["result"]]
    return _dataclass_from_dict(kind, value)


def _dataclass_from_dict(kind: type, data: dict[str, Any]) -> Any:
    if data.keys() != _FIELDS[kind]:
        raise ValueError("Not what this version of Haystack writes.")
    return _made(kind, data)


def _made(kind: type, state: dict[str, Any]) -> Any:
    """
    Return an object of a dataclass that has `state` as its fields, without copying them.
    """
    made: Any = object.__new__(kind)
    object.__setattr__(made, "__dict__", state)
    return made


def _is_json(data: Any, depth: int = _CHECKED_DEPTH) -> bool:
    """
    Whether a dict or list consists of nothing but what JSON has a form for. Keys and scalars cost no Python code each.
    """
    if type(data) is dict:
        if not _TEXT.issuperset(map(type, data)):
            return False
        data = data.values()
    elif type(data) is not list:
        return False
    if _SCALARS.issuperset(map(type, data)):
        return True
    if depth == 1:
        return False
    for value in data:
        kind = type(value)
        if kind not in _SCALARS and not ((kind is dict or kind is list) and _is_json(value, depth - 1)):
            return False
    return True


def _is_json_part(part: Any) -> bool:
    """
    The same for a part of a message. The commonest parts are looked at only where they can hold something unusual.
    """
    kind = type(part)
    if kind is ToolCallResult and type(part.result) is str:
        kind, part = ToolCall, part.origin
    if kind is ToolCall:
        return _is_json([part.arguments, part.extra])
    return _is_json(_part_to_dict(part, ""))
