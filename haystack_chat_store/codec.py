# SPDX-License-Identifier: Apache-2.0
"""
Encodes ChatMessages as JSON text and decodes them, fast and lossless.

The stored form is that of `ChatMessage.to_dict()`, so any program can read it. `json_values` defines the form of values
that JSON does not know.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType
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
    to_text,
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
_new, _set = object.__new__, object.__setattr__
_PART_KINDS = {key: kind for kind, key in _PART_KEYS.items()}
_FIELDS = {kind: frozenset(field.name for field in fields(kind)) for kind in _PART_KEYS}
# The types of the fields of a stored part. With another one, each use of the message would fail, and so each later turn
# of its conversation.
_TEXT, _TEXT_OR_NONE, _DICT, _DICT_OR_NONE = (str,), (str, NoneType), (dict,), (dict, NoneType)
_TYPE_NAMES = {str: "a text", NoneType: "None", dict: "a dict", list: "a list of parts"}
_FIELD_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "tool_call": {"tool_name": _TEXT, "arguments": _DICT, "id": _TEXT_OR_NONE, "extra": _DICT_OR_NONE},
    "tool_call_result": {"result": (str, list), "origin": _DICT},
    "image": {"base64_image": _TEXT, "mime_type": _TEXT_OR_NONE, "meta": _DICT},
    "reasoning": {"reasoning_text": _TEXT, "extra": _DICT},
    "file": {"base64_data": _TEXT, "mime_type": _TEXT_OR_NONE, "filename": _TEXT_OR_NONE, "extra": _DICT},
}
# The paths, without the message's name, at which a value without a JSON form is stored as its repr.
_IN_META_OR_EXTRA = re.compile(
    r"\.meta\b|\.content\[\d+\]\['\w+'\](?:\['origin'\]|\['result'\]\[\d+\]\['\w+'\])?\['(?:meta|extra)'\]"
)

# Together, this many texts are parsed faster than one by one. More would not fit into a processor's cache.
_BATCH_SIZE = 100

logger = logging.getLogger(__name__)


def encode_message(message: ChatMessage, message_id: str, where: str = "message", *, strict: bool = False) -> str:
    """
    Encode a message as the JSON text that is stored.

    :param message: The message. It is not changed.
    :param message_id: The message's id, which is added to the stored `meta`.
    :param where: The name of the message in errors, such as `messages[2]`. Defaults to "message".
    :param strict: Whether values without a JSON form in `meta` and `extra` are refused. Defaults to False: their `repr`
        is stored, and the log says so.
    :raises MessageEncodingError: If the message contains a value that cannot be stored. The error names its path.
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
    for index, part in enumerate(form["content"]):
        wrong = _wrong_field(part)
        if wrong is not None:
            raise MessageEncodingError(f"{where}.content[{index}]{wrong}.")
    return encode_plain(form)


def _plain_text(message: ChatMessage, message_id: str) -> str | None:
    """Encode a message that contains only plain data, as nearly all do. Return `None` for any other message."""
    meta, name = message._meta, message._name
    if type(message) is not ChatMessage or not (name is None or type(name) is str) or (meta and not is_plain(meta)):
        return None
    content = []
    for part in message._content:
        data = {"text": part.text} if type(part) is TextContent and type(part.text) is str else _plain_part(part)
        if data is None:
            return None
        content.append(data)
    meta = {**meta, MESSAGE_ID_KEY: message_id}
    try:
        text = to_text({"role": message._role.value, "meta": meta, "name": name, "content": content})
    except ValueError:  # a lone surrogate
        return None
    return None if has_long_number(text) else text


def with_merged_meta(text: str, merged: str) -> str:
    """
    Return the stored text of a message with some keys of its meta set.

    :param text: A result of `encode_message`.
    :param merged: The keys to set, as the text of a JSON object. A null removes its key.
    :raises MessageDecodingError: If the message cannot be decoded.
    """
    decode_messages([text])
    data, changes = parse_json(text), parse_json(merged)
    meta = {**(data["meta"] or {}), **changes}
    data["meta"] = {key: value for key, value in meta.items() if value is not None or key not in changes}
    return encode_plain(data)


def decode_messages(texts: Sequence[str]) -> list[ChatMessage]:
    """
    Decode stored texts. They are parsed together, which is faster than one by one.

    :param texts: Results of `encode_message`, oldest first.
    :raises MessageDecodingError: If a text cannot be decoded. The error names the text's index, not its content.
    """
    messages: list[ChatMessage] = []
    for start in range(0, len(texts), _BATCH_SIZE):
        batch = texts[start : start + _BATCH_SIZE]
        try:
            rows = parse_json(f"[{','.join(batch)}]")
            if len(rows) != len(batch):
                raise ValueError("A text is not one JSON value.")
            messages += list(map(_message_from_dict, rows))
        except Exception:  # whatever is wrong, decoding one by one reports it
            messages += [_decoded_alone(text, index) for index, text in enumerate(batch, start)]
    return messages


def _decoded_alone(text: str, index: int) -> ChatMessage:
    try:
        data = parse_json(text)
        parts = data.get("content")
        if isinstance(parts, list) and any(map(_wrong_field, parts)):
            raise TypeError
        message = ChatMessage.from_dict(data)
        if not isinstance(message._meta, dict):
            raise TypeError
        return message
    except Exception as error:
        raise MessageDecodingError(
            f"Message {index} of those read cannot be decoded as a ChatMessage ({type(error).__name__}). Its stored "
            "text is damaged, or another program wrote it."
        ) from None  # the parser's errors quote the text


def _message_to_dict(message: ChatMessage, where: str) -> dict[str, Any]:
    """
    Return the result of `ChatMessage.to_dict()`, without the deep copies that take most of its time.

    A message with unknown kinds of parts is encoded by its own `to_dict()`, so that a newer Haystack works.

    :raises MessageEncodingError: If a part or a field of the message would be lost.
    """
    if len(fields(message)) != len(fields(ChatMessage)):
        raise MessageEncodingError(f"{where} is a {type(message).__name__} with fields that ChatMessage does not have.")
    if not isinstance(message._name, _TEXT_OR_NONE):
        raise MessageEncodingError(f"{where}.name is a {type(message._name).__name__}, not a text.")
    unknown = [index for index, part in enumerate(message._content) if type(part) not in _PARTS]
    if not unknown:
        content = [_part_to_dict(part, f"{where}.content[{index}]") for index, part in enumerate(message._content)]
        return {"role": message._role.value, "meta": message._meta, "name": message._name, "content": content}
    try:
        data = message.to_dict()
        is_equal = ChatMessage.from_dict(data)._content == message._content
    except Exception:  # Haystack's errors quote the message
        is_equal = False
    if not is_equal:
        kind = type(message._content[unknown[0]]).__name__
        raise MessageEncodingError(f"{where}.content[{unknown[0]}] is a {kind}, which is not a part of a ChatMessage.")
    return data


def _part_to_dict(part: Any, where: str) -> dict[str, Any]:
    kind = type(part)
    if kind is TextContent:
        if not isinstance(part.text, str):
            raise MessageEncodingError(f"{where}.text is a {type(part.text).__name__}, not a text.")
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
    """Return the values of a dataclass's fields. Callers must not change it: it may be the object's own `__dict__`."""
    names, values = _FIELDS[type(part)], vars(part)
    return values if len(values) == len(names) else {name: values[name] for name in values if name in names}


def _wrong_field(part: dict[str, Any]) -> str | None:
    """Return what is wrong with a field of a stored part, or `None` if all have their types."""
    for key, value in part.items():
        if key == "text" and not isinstance(value, str):
            return f"['text'] is a {type(value).__name__}, not a text"
        for name, types in _FIELD_TYPES.get(key, {}).items():
            if name in value and not isinstance(value[name], types):
                expected = " or ".join(_TYPE_NAMES[each] for each in types)
                return f"['{key}']['{name}'] is a {type(value[name]).__name__}, not {expected}"
        if key == "tool_call_result":
            results = value["result"] if isinstance(value["result"], list) else []
            wrong = next(filter(None, map(_wrong_field, [{"tool_call": value["origin"]}, *results])), None)
            return wrong and f"['{key}']: {wrong}"
    return None


def _message_from_dict(data: dict[str, Any]) -> ChatMessage:
    """
    Return the result of `ChatMessage.from_dict()`, without calling the constructors.

    The constructors would repeat validation that was done when the message was created.
    """
    content, meta = data["content"], data["meta"] or {}
    if len(data) != 4 or type(content) is not list or type(meta) is not dict:
        raise ValueError("Not what this version of Haystack writes.")
    # Set one by one, attributes need no dictionary of their own: less memory, and fewer objects for Python's collector.
    for index, part in enumerate(content):
        if "text" in part and len(part) == 1 and type(part["text"]) is str:
            content[index] = text = _new(TextContent)
            _set(text, "text", part["text"])
        elif _wrong_field(part):
            raise ValueError("Not what a store writes.")
        else:
            content[index] = _part_from_dict(part)
    message = _new(ChatMessage)
    _set(message, "_role", _ROLES[data["role"]])
    _set(message, "_content", content)
    _set(message, "_name", data["name"])
    _set(message, "_meta", meta)
    return message


def _part_from_dict(data: dict[str, Any]) -> Any:
    ((key, value),) = data.items()
    kind: type = TextContent
    state = data
    if key != "text":
        kind, state = _PART_KINDS[key], value
        if state.keys() != _FIELDS[kind]:
            raise ValueError("Not what this version of Haystack writes.")
        if kind is ToolCallResult:
            state["origin"] = _part_from_dict({"tool_call": state["origin"]})
            if type(state["result"]) is list:
                state["result"] = [_part_from_dict(item) for item in state["result"]]
    part: Any = _new(kind)
    _set(part, "__dict__", state)
    return part


def _plain_part(part: Any) -> dict[str, Any] | None:
    """
    Return the stored form of a part of a message, or `None` if the part contains anything but plain data.

    Of calls and texts that tools returned, only fields that can contain other data are looked at closer.
    """
    try:
        data = _part_to_dict(part, "")
    except MessageEncodingError:  # raised again with the name of the message
        return None
    if _wrong_field(data):
        return None
    call = part.origin if type(part) is ToolCallResult and type(part.result) is str else part
    if type(call) is ToolCall:
        return data if is_plain(call.arguments) and (call.extra is None or is_plain(call.extra)) else None
    return data if is_plain(data) else None
