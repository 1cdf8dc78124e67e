# SPDX-License-Identifier: Apache-2.0
"""
ChatMessage to JSON text and back, fast and lossless.

The stored form is that of `ChatMessage.to_dict()`, so any program can read it. `json_values` documents the form of
values that JSON does not have.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from haystack import logging
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
from haystack_chat_store.json_values import (
    encode_plain,
    has_long_number,
    is_plain,
    json_value,
    parse_json,
    refuse,
    repr_of,
)

_ROLES = {role.value: role for role in ChatRole}
_PART_KEYS: dict[type, str] = {
    ToolCall: "tool_call",
    ToolCallResult: "tool_call_result",
    ImageContent: "image",
    ReasoningContent: "reasoning",
    FileContent: "file",
}
_PARTS = frozenset({TextContent, *_PART_KEYS})
_PART_KINDS = {key: kind for kind, key in _PART_KEYS.items()}
_FIELDS = {kind: frozenset(field.name for field in fields(kind)) for kind in _PART_KEYS}
# The paths, after the name of the message, at which a value without a JSON form is stored as its repr.
_IN_META_OR_EXTRA = re.compile(
    r"\.meta\b|\.content\[\d+\]\['\w+'\](?:\['origin'\]|\['result'\]\[\d+\]\['\w+'\])?\['(?:meta|extra)'\]"
)

logger = logging.getLogger(__name__)


def encode_message(message: ChatMessage, message_id: str, where: str = "message", *, strict: bool = False) -> str:
    """
    Turn a message into the JSON text that is stored. The message is not changed.

    :param message: The message.
    :param message_id: The id that the message is stored under; it is put into the stored `meta`.
    :param where: What an error calls the message, such as `messages[2]`.
    :param strict: Whether values in `meta` and `extra` that have no JSON form are refused. Defaults to False: their
        `repr` is stored, and the log says so.
    :raises MessageEncodingError: If the message holds something that cannot be stored.
    """
    text = _plain_text(message, message_id)
    if text is not None:
        return text
    data = _message_to_dict(message, where)
    data["meta"] = {**data["meta"], MESSAGE_ID_KEY: message_id}

    def stored_as_repr(path: str, value: Any) -> str:
        if strict or not _IN_META_OR_EXTRA.match(path, len(where)):
            refuse(path, value)
        logger.warning("{path} is a {kind}, which has no JSON form. Its repr is stored.", path=path, kind=type(value))
        return repr_of(value)

    form = {key: json_value(value, (f"{where}.{key}",), stored_as_repr) for key, value in data.items()}
    return encode_plain(form)


def _plain_text(message: ChatMessage, message_id: str) -> str | None:
    """
    Encode a message that holds nothing but plain data, as nearly all do, or return `None`.
    """
    meta, name = message._meta, message._name
    if type(message) is not ChatMessage or not (name is None or type(name) is str) or not is_plain(meta):
        return None
    content = []
    for part in message._content:
        data = _plain_part(part)
        if data is None:
            return None
        content.append(data)
    meta = {**meta, MESSAGE_ID_KEY: message_id}
    text = encode_plain({"role": message._role.value, "meta": meta, "name": name, "content": content})
    return None if has_long_number(text) else text


def decode_messages(texts: Sequence[str]) -> list[ChatMessage]:
    """
    Turn stored texts back into messages. All of them are parsed at once, which is faster.

    :param texts: What `encode_message` returned, oldest first.
    :raises MessageDecodingError: If one of them cannot be read back. It names the text's index, not its content.
    """
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

    A message with parts that this version does not know goes through `to_dict()`, so that a newer Haystack works.
    """
    kind = type(message)
    if kind is ChatMessage and _PARTS.issuperset(map(type, message._content)):
        content = [_part_to_dict(part, f"{where}.content[{index}]") for index, part in enumerate(message._content)]
        return {"role": message._role.value, "meta": message._meta, "name": message._name, "content": content}
    try:
        data = message.to_dict()
        is_same = kind.from_dict(data) == message
    except Exception as error:  # Haystack's own errors quote the message
        raise MessageEncodingError(f"{where} cannot be made JSON by its to_dict() ({type(error).__name__}).") from None
    if not is_same or kind is not ChatMessage:
        raise MessageEncodingError(f"{where} is a {kind.__name__} that does not come back equal from its to_dict().")
    return data


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


def _plain_part(part: Any) -> dict[str, Any] | None:
    """
    Return a part of a message as it is stored, or `None` if it holds anything but plain data.

    The most frequent parts are looked at only where they can hold something else.
    """
    kind = type(part)
    if kind is TextContent:
        return vars(part) if type(part.text) is str else None
    if kind not in _PART_KEYS:
        return None
    data = _part_to_dict(part, "")
    if kind is ToolCall:
        is_ours = is_plain(part.arguments) and (part.extra is None or is_plain(part.extra))
    elif kind is ToolCallResult and type(part.result) is str:
        is_ours = is_plain(part.origin.arguments) and (part.origin.extra is None or is_plain(part.origin.extra))
    else:
        is_ours = is_plain(data)
    return data if is_ours else None
