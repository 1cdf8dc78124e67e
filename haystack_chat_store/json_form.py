# SPDX-License-Identifier: Apache-2.0
"""
JSON text, and what becomes of values that JSON has no form for.

| in a message | in the store |
|---|---|
| tuple, set, frozenset, deque | list (a set sorted, where its items can be) |
| datetime, date, time | ISO 8601 text |
| Enum | its value |
| dataclass instance, pydantic model, other mapping | dict |
| UUID, Decimal, Path | text |
| bytes, bytearray, memoryview | base64 text |
| NaN, Infinity, -Infinity | the text `"NaN"`, `"Infinity"`, `"-Infinity"` |
| numpy scalar, numpy array | number (a datetime64: ISO 8601 text), list |
| a high and a low surrogate side by side | the character they encode |
| a dict key that is not text | text, as `json` writes it; refused if two keys become the same |
| anything else, a cycle, more than 200 levels | refused with a `MessageEncodingError` that names the path |
"""

import base64
import json
import math
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from json import encoder as json_encoder
from pathlib import PurePath
from typing import Any, TypeAlias

from pydantic import BaseModel

from haystack_chat_store.errors import MessageEncodingError

#: How deep lists and dicts may be nested in a message. Far from Python's recursion limit, which reading back must not
#: meet either, however deep in a program it happens.
MAX_DEPTH = 200

# Integers of up to so many digits are turned into text and back by Python without objection, however its limit is set
# (sys.set_int_max_str_digits). Decimal has no such limit.
_MAX_DIGITS = 640
_MAX_BITS = int(_MAX_DIGITS * math.log2(10)) - 1

# Where a value stands: the message's field, or another path and a step from there.
_Path: TypeAlias = "tuple[str] | tuple[_Path, str | int]"

# check_circular is off because the depth limit finds cycles too, and it would cost a third of the time.
_encoder = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"))
_ascii_encoder = json.JSONEncoder(ensure_ascii=True, check_circular=False, allow_nan=False, separators=(",", ":"))


def _kept_encoder() -> Callable[[Any], str]:
    """
    Return `_encoder.encode` with the C encoder kept that it would make anew at each call: a fifth of the time.
    """
    make: Any = getattr(json_encoder, "c_make_encoder", None)
    if make is None:  # an interpreter whose json has no accelerator
        return _encoder.encode
    try:
        encode = make(None, _encoder.default, quoted, None, ":", ",", False, False, False)
    except TypeError:  # not part of json's interface: another version may want other arguments
        return _encoder.encode
    return lambda data: "".join(encode(data, 0))


#: Returns text as a JSON string.
quoted: Callable[[str], str] = json_encoder.encode_basestring

#: Returns data as compact JSON text. Raises ValueError for a NaN, an infinity and an integer of over 4,300 digits, and
#: TypeError for what JSON has no form for.
encoded = _kept_encoder()


def parse_json(text: str) -> Any:
    """
    Parse JSON text with integers of any length.

    :raises ValueError: If the text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=_parse_int)


def _parse_int(digits: str) -> int:
    return int(digits) if len(digits) < _MAX_DIGITS else int(Decimal(digits))


def encode_unusual(data: dict[str, Any], where: str) -> str:
    """
    Return data as JSON text, with values that JSON has no form for in the form of the table above.

    :param data: The fields of a message.
    :param where: What an error calls the message, such as `messages[2]`.
    :raises MessageEncodingError: If a value has no form. It names the value's path.
    """
    long_integers: dict[str, str] = {}
    form = {key: _json_form(value, (f"{where}.{key}",), MAX_DEPTH, long_integers) for key, value in data.items()}
    return _as_text(form, long_integers)


def encode_meta(meta: dict[Any, Any]) -> str:
    """
    Return the meta of a chat history as JSON text, with the same forms for what is unusual.

    :raises MessageEncodingError: If a value has no form. It names the value's path.
    """
    long_integers: dict[str, str] = {}
    return _as_text(_json_form(meta, ("meta",), MAX_DEPTH, long_integers), long_integers)


def _as_text(form: Any, long_integers: dict[str, str]) -> str:
    text = encoded(form)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate can only be written as an escape sequence
        text = _ascii_encoder.encode(form)
    return _with_long_integers(text, long_integers)


def _with_long_integers(text: str, long_integers: dict[str, str]) -> str:
    for placeholder, digits in long_integers.items():
        text = text.replace(f'"{placeholder}"', digits)
    return text


def _shown(path: _Path) -> str:
    """
    Return a path as an error shows it, such as `messages[2].meta['usage']['x']`. Put together only then.
    """
    steps = []
    while len(path) == 2:
        path, step = path
        steps.append(f"[{step!r}]"[:100])
    return "".join([path[0], *reversed(steps)])[:200]


def _json_form(value: Any, path: _Path, depth: int, long_integers: dict[str, str]) -> Any:
    """
    Return a copy of a value in its JSON form.

    :param long_integers: Filled with the digits of integers that are too long for `json`, by the unique text that
        stands for each in the copy.
    """
    if depth == 0:
        raise MessageEncodingError(f"{_shown(path)}… is nested more than {MAX_DEPTH} levels deep, or contains itself.")
    for is_meant, converted in _CONVERSIONS:
        if is_meant(value):
            try:
                value = converted(value)
            except Exception as error:  # a model's own serializer may raise anything, and quote the value
                raise MessageEncodingError(
                    f"{_shown(path)} is a {type(value).__name__} that cannot be made JSON ({type(error).__name__})."
                ) from None
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        value = str.__str__(value)  # plain, whatever a subclass makes of its methods
        # A pair of surrogates becomes the character it encodes, as it would when it is read back.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(value, (int, float)):
        return _number_form(value, long_integers)
    if isinstance(value, Mapping):
        return _object_form(value, path, depth, long_integers)
    if isinstance(value, (list, tuple, deque)):
        return [_json_form(item, (path, i), depth - 1, long_integers) for i, item in enumerate(value)]
    raise MessageEncodingError(
        f"{_shown(path)} is a {type(value).__name__}, which JSON has no form for. "
        "Turn it into text, numbers, lists or dicts."
    )


def _object_form(value: Mapping[Any, Any], path: _Path, depth: int, long_integers: dict[str, str]) -> dict[str, Any]:
    form: dict[str, Any] = {}
    for key, item in value.items():
        name = _key_form(key, path, depth)
        if name in form:
            raise MessageEncodingError(f"{_shown(path)} has two keys that both become {name[:200]!r} in JSON.")
        form[name] = _json_form(item, (path, name), depth - 1, long_integers)
    return form


def _key_form(key: Any, path: _Path, depth: int) -> str:
    long_integers: dict[str, str] = {}
    form = _json_form(key, (path, "a key"), depth - 1, long_integers)
    if isinstance(form, str):
        return long_integers.get(form, form)
    return _with_long_integers(encoded(form), long_integers)


def _number_form(value: float, long_integers: dict[str, str]) -> float | str:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value.bit_length() <= _MAX_BITS:
        return value
    placeholder = uuid.uuid4().hex
    long_integers[placeholder] = format(Decimal(value), "f")
    return placeholder


def _sorted_if_possible(values: set[Any] | frozenset[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:  # items of several kinds have no order
        return list(values)


def _from_numpy(value: Any) -> Any:
    kind = value.dtype.kind
    if kind == "m":
        return value  # numpy gives a duration as a bare number in some unit
    return (value.astype(str) if kind == "M" else value).tolist()  # and no time ("NaT") as None


def _is_a(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


# Tried in this order, each on what the one before has made: an Enum's value may be a date.
_CONVERSIONS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any]], ...] = (
    (_is_a(Enum), lambda value: value.value),
    (_is_a(BaseModel), lambda value: value.model_dump()),
    (
        lambda value: is_dataclass(value) and not isinstance(value, type),
        lambda value: {field.name: getattr(value, field.name) for field in fields(value)},
    ),
    (lambda value: type(value).__module__ == "numpy" and hasattr(value, "dtype"), _from_numpy),
    (_is_a(set, frozenset), _sorted_if_possible),
    (_is_a(date, datetime, time), lambda value: value.isoformat()),
    (_is_a(uuid.UUID, Decimal, PurePath), str),
    (_is_a(bytes, bytearray, memoryview), lambda value: base64.b64encode(bytes(value)).decode("ascii")),
)
