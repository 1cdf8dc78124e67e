# SPDX-License-Identifier: Apache-2.0
"""
ChatMessage to JSON text and back, fast and lossless.

The stored form is that of `ChatMessage.to_dict()`, so anyone can read it, with or without this package. What JSON has
no form for is stored in its one obvious form, or refused:

| in the message | in the store |
|---|---|
| tuple, set, frozenset, deque | list (a set sorted, where its items can be) |
| datetime, date, time | ISO 8601 text |
| Enum | its value |
| dataclass instance, pydantic model, other mapping | dict |
| UUID, Decimal, Path | text |
| bytes, bytearray, memoryview | base64 text |
| NaN, Infinity, -Infinity | the text `"NaN"`, `"Infinity"`, `"-Infinity"` |
| numpy scalar, numpy array | number, list |
| a high and a low surrogate side by side | the character they encode |
| a dict key that is not text | text, as `json` writes it; refused if two keys become the same |
| anything else, a cycle, more than 200 levels | refused with a `MessageEncodingError` that names the path |
"""

import base64
import dataclasses
import datetime
import gc
import json
import math
import re
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from enum import Enum
from json.encoder import c_make_encoder, encode_basestring
from pathlib import PurePath
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
from pydantic import BaseModel

from haystack_chat_store.errors import MessageDecodingError, MessageEncodingError
from haystack_chat_store.rounds import MESSAGE_ID_KEY

#: How deep lists and dicts may be nested in a message. Far from Python's recursion limit, which reading back must not
#: meet either, however deep in a program it happens.
MAX_DEPTH = 200

# The longest integer that Python turns into text and back without objecting, in bits (sys.int_info, 4300 digits).
_MAX_PLAIN_BITS = 14_000

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
_FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(field.name for field in dataclasses.fields(cls)) for cls in (*_PART_KEYS, TextContent, ChatMessage)
}
_FIELD_SETS = {cls: frozenset(names) for cls, names in _FIELDS.items()}
_PART_KINDS = {key: cls for cls, key in _PART_KEYS.items()}
_MESSAGE_KEYS = frozenset({"role", "meta", "name", "content"})
_new = object.__new__

# check_circular is off because the depth limit finds cycles too, and it costs a third of the time.
_encoder = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"))
_ascii_encoder = json.JSONEncoder(ensure_ascii=True, check_circular=False, allow_nan=False, separators=(",", ":"))

if c_make_encoder is None:  # an interpreter without json's accelerator
    _to_json = _encoder.encode
else:
    # JSONEncoder.encode builds a new C encoder at every call; this one is kept. Worth a fifth of the time.
    _c_encoder = c_make_encoder(None, _encoder.default, encode_basestring, None, ":", ",", False, False, False)

    def _to_json(data: Any) -> str:
        return "".join(_c_encoder(data, 0))


def encode_message(message: ChatMessage, message_id: str, where: str = "message") -> str:
    """
    Turn a message into the JSON text that is stored. The message is not changed.

    :param message: The message.
    :param message_id: The id that the message is stored under; it is put into the stored `meta`.
    :param where: What an error calls the message, such as `messages[2]`.
    :raises MessageEncodingError: If the message holds something that cannot be stored.
    """
    data = _message_to_dict(message, where)
    meta = data["meta"]
    if meta.get(MESSAGE_ID_KEY) != message_id:
        data["meta"] = meta = {**meta, MESSAGE_ID_KEY: message_id}
    try:
        if not (_is_json(meta) and all(map(_is_json_part, message._content))):
            return _encode_unusual(data, where)
        text = _to_json(data)
    except ValueError:  # NaN, or an integer too long for str()
        return _encode_unusual(data, where)
    return text if text.isascii() else _without_surrogates(text, data)


def decode_messages(texts: Sequence[str]) -> list[ChatMessage]:
    """
    Turn stored texts back into messages. All of them are parsed at once, which takes half the time.

    :param texts: What `encode_message` returned, oldest first.
    :raises MessageDecodingError: If one of them cannot be read back. It names the text's index, not its content.
    """
    with _garbage_collector_paused(len(texts)):
        try:
            return _messages_from_json(texts)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return [_decode_alone(text, index) for index, text in enumerate(texts)]


def _messages_from_json(texts: Sequence[str]) -> list[ChatMessage]:
    rows = json.loads(f"[{','.join(texts)}]")
    if len(rows) != len(texts):
        raise ValueError("A stored text is not one JSON value.")
    return [_message_from_dict(row) for row in rows]


def _decode_alone(text: str, index: int) -> ChatMessage:
    try:
        return _message_from_dict(json.loads(text, parse_int=_parse_int))
    except Exception as error:  # whatever a damaged text makes of the parser or of Haystack's constructors
        raise MessageDecodingError(
            f"Stored message {index} of those read cannot be turned back into a ChatMessage "
            f"({type(error).__name__}). Its text was damaged, or written by something else."
        ) from None  # the parser's own errors quote the text


def _parse_int(digits: str) -> int:
    return int(digits) if len(digits) < 4300 else int(Decimal(digits))  # Decimal knows no limit of digits


def _message_to_dict(message: ChatMessage, where: str) -> dict[str, Any]:
    """
    Do what `ChatMessage.to_dict()` does, without the deep copies that take most of its time.
    """
    if type(message) is not ChatMessage and len(dataclasses.fields(message)) != len(_FIELDS[ChatMessage]):
        raise MessageEncodingError(f"{where} is a {type(message).__name__} with fields that ChatMessage does not have.")
    content = []
    for index, part in enumerate(message._content):
        if type(part) is TextContent:
            content.append({"text": part.text})
        else:
            content.append(_part_to_dict(part, f"{where}.content[{index}]"))
    return {"role": message._role._value_, "meta": message._meta, "name": message._name, "content": content}


def _part_to_dict(part: Any, where: str) -> dict[str, Any]:
    kind = type(part)
    if kind is TextContent:
        return {"text": part.text}
    key = _PART_KEYS.get(kind)
    if key is None:
        raise MessageEncodingError(f"{where} is a {kind.__name__}, which is not a part of a ChatMessage.")
    fields = _fields(part)
    if kind is ToolCallResult:
        if type(part.origin) is not ToolCall:
            raise MessageEncodingError(f"{where}.origin is a {type(part.origin).__name__}, not a ToolCall.")
        fields = {**fields, "origin": _fields(part.origin)}
        if isinstance(part.result, (list, tuple)):
            fields["result"] = [_part_to_dict(item, f"{where}.result[{i}]") for i, item in enumerate(part.result)]
    return {key: fields}


def _fields(part: Any) -> dict[str, Any]:
    """
    Return the values of a dataclass's fields. Not to be changed: they may be the very dict the object lives in.
    """
    names, values = _FIELDS[type(part)], vars(part)
    return values if len(values) == len(names) else {name: getattr(part, name) for name in names}


def _message_from_dict(data: dict[str, Any]) -> ChatMessage:
    """
    Do what `ChatMessage.from_dict()` does, past constructors that would validate and guess again what was settled when
    the message was first made. What has other fields than this version of Haystack goes through them.
    """
    if data.keys() != _MESSAGE_KEYS or type(data["content"]) is not list:
        return ChatMessage.from_dict(data)
    message = _new(ChatMessage)
    vars(message).update(
        _role=_ROLES[data["role"]],
        _content=[_part_from_dict(part) for part in data["content"]],
        _name=data["name"],
        _meta=data["meta"],
    )
    return message


def _part_from_dict(data: dict[str, Any]) -> Any:
    ((key, fields),) = data.items()
    if key == "text":
        part = _new(TextContent)
        vars(part)["text"] = fields
        return part
    kind = _PART_KINDS[key]
    if kind is ToolCallResult:
        fields["origin"] = _dataclass_from_dict(ToolCall, fields["origin"])
        if type(fields["result"]) is list:
            fields["result"] = [_part_from_dict(part) for part in fields["result"]]
    return _dataclass_from_dict(kind, fields)


def _dataclass_from_dict(kind: type, fields: dict[str, Any]) -> Any:
    if fields.keys() != _FIELD_SETS[kind]:
        return kind(**fields)
    made = _new(kind)
    vars(made).update(fields)
    return made


def _is_json(data: Any, depth: int = MAX_DEPTH) -> bool:
    """
    Whether a dict or list consists of nothing but what JSON has a form for. Keys and scalars cost no Python code each.
    """
    if type(data) is dict:
        if not _TEXT.issuperset(map(type, data)):
            return False
        data = data.values()
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
    if kind is TextContent:
        return type(part.text) is str
    if kind is ToolCallResult and type(part.result) is str:
        kind, part = ToolCall, part.origin
    if kind is ToolCall:
        return type(part.arguments) is dict and _is_json(part.arguments) and (part.extra is None or _is_json([part.extra]))
    return _is_json(_part_to_dict(part, ""))


def _without_surrogates(text: str, data: Any) -> str:
    """
    Return the JSON text, with everything but ASCII escaped if it could not be written as UTF-8 otherwise.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return _ascii_encoder.encode(data)
    return text


def _encode_unusual(data: dict[str, Any], where: str) -> str:
    """
    Encode a message that holds something JSON has no form for.
    """
    long_integers: dict[str, str] = {}
    plain = {key: _json_form(value, f"{where}.{key}", MAX_DEPTH, long_integers) for key, value in data.items()}
    text = _without_surrogates(_encoder.encode(plain), plain)
    for placeholder, digits in long_integers.items():
        text = text.replace(f'"{placeholder}"', digits)
    return text


def _json_form(value: Any, path: str, depth: int, long_integers: dict[str, str]) -> Any:  # noqa: PLR0911
    """
    Return a copy of value that consists of nothing but what JSON has a form for: see the table at the top.

    :param long_integers: Filled with the digits of integers that are too long for `json`, by the unique text that
        stands for each in the copy.
    """
    if depth == 0:
        raise MessageEncodingError(f"{path[:200]}… is nested more than {MAX_DEPTH} levels deep, or contains itself.")
    if isinstance(value, Enum):
        return _json_form(value.value, path, depth - 1, long_integers)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        if value.bit_length() <= _MAX_PLAIN_BITS:
            return value
        placeholder = uuid.uuid4().hex
        long_integers[placeholder] = format(Decimal(value), "f")
        return placeholder
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (uuid.UUID, Decimal, PurePath)):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _json_form(value.tolist(), path, depth - 1, long_integers)
    if isinstance(value, BaseModel):
        value = value.model_dump()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return _json_object(value, path, depth, long_integers)
    if isinstance(value, (set, frozenset)):
        value = _sorted_if_possible(value)
    if isinstance(value, (list, tuple, deque)):
        return [_json_form(item, f"{path}[{i}]", depth - 1, long_integers) for i, item in enumerate(value)]
    raise MessageEncodingError(
        f"{path} is a {type(value).__name__}, which cannot be stored as JSON. Turn it into text, numbers, lists or "
        "dicts first."
    )


def _json_object(value: Mapping[Any, Any], path: str, depth: int, long_integers: dict[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, item in value.items():
        text = _json_form(key, f"{path}[{key!r}]", depth - 1, {})
        if not isinstance(text, str):
            text = _encoder.encode(text)
        if text in made:
            raise MessageEncodingError(f"{path} has two keys that both become {text!r} in JSON.")
        made[text] = _json_form(item, f"{path}[{key!r}]", depth - 1, long_integers)
    return made


def _sorted_if_possible(values: "set[Any] | frozenset[Any]") -> list[Any]:
    try:
        return sorted(values)
    except TypeError:  # items of several kinds have no order
        return list(values)


_paused = 0
_pausing = threading.Lock()


@contextmanager
def _garbage_collector_paused(rows: int) -> Iterator[None]:
    """
    Keep the garbage collector from looking through messages that are being made: it would take half of a bulk read.

    :param rows: How many messages are being made. A few are not worth it.
    """
    global _paused
    if rows < 1000 or not (gc.isenabled() or _paused):
        yield
        return
    with _pausing:
        _paused += 1
        gc.disable()
    try:
        yield
    finally:
        with _pausing:
            _paused -= 1
            if _paused == 0:
                gc.enable()
