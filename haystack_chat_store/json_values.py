# SPDX-License-Identifier: Apache-2.0
"""
Encodes values as JSON text with `pydantic_core`, and defines the JSON form of values that JSON does not know.

| in a message | in the store |
|---|---|
| tuple, set, frozenset, deque | list (of a set: sorted, if its items can be sorted) |
| datetime, date, time, timedelta | ISO 8601 text, as pydantic writes it |
| Enum | its value |
| pydantic model, dataclass instance, other mapping | dict, as pydantic's JSON mode makes it |
| UUID, Decimal, Fraction, Path, URL, IP address | text |
| bytes, bytearray, memoryview | base64 text with `+` and `/` |
| NaN, Infinity, -Infinity | the text `"NaN"`, `"Infinity"`, `"-Infinity"` |
| numpy scalar, numpy array | number (a datetime64: ISO 8601 text), list |
| a high and a low surrogate side by side | the character they encode |
| a dict key that is not text | its JSON text; refused if two keys become the same text |
| an integer of more than 4,300 digits, a cycle, more than 200 levels | refused with a `MessageEncodingError` |
| anything else, such as a function or an iterator | in a message's `meta` and `extra` its `repr`, elsewhere refused |
"""

import base64
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import PurePath
from typing import Any, TypeAlias

from pydantic_core import from_json, to_json, to_jsonable_python

from haystack_chat_store.errors import MessageEncodingError

#: The deepest nesting of lists and dicts. Well below the recursion limit, so that decoding succeeds even deep in a call
#: stack.
MAX_DEPTH = 200
#: The longest integer, in digits. Python refuses longer ones by default, because they take minutes to parse
#: (CVE-2020-10735).
MAX_DIGITS = 4_300

_SMALLEST_REFUSED_INTEGER = 10**MAX_DIGITS
_DIGITS = "0123456789"
_MAX_REPR_LENGTH = 1_000
_SCALARS = frozenset({str, int, float, bool, type(None)})
_TEXT = frozenset({str})
_NO_FORM = object()
# pydantic_core knows some of these only in its newer versions, and others not at all.
_WRITTEN_AS_TEXT = (Fraction, PurePath, IPv4Address, IPv6Address, IPv4Network, IPv6Network)

# The path to a value: the name of the data or, below it, the path of the container and a key or index.
_Path: TypeAlias = "tuple[str] | tuple[_Path, str | int]"
#: Returns the replacement for a value without a JSON form, given the value's path and the value, or raises.
Replace: TypeAlias = Callable[[str, Any], Any]


def refuse(path: str, value: Any) -> Any:
    """
    Refuse a value without a JSON form.

    :raises MessageEncodingError: Always. The error names the path.
    """
    raise MessageEncodingError(
        f"{path} is a {type(value).__name__}, which has no JSON form. Turn it into text, numbers, lists or dicts."
    )


def parse_json(text: str) -> Any:
    """
    Parse JSON text.

    :raises ValueError: If the text is not JSON, or has an integer of more than 4,300 digits.
    """
    try:
        return from_json(text)
    except (ValueError, TypeError):  # pydantic_core refuses lone surrogates and deep nesting, json accepts them
        return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    # Decimal parses as many digits as `MAX_DIGITS` whatever limit the process has (sys.set_int_max_str_digits).
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"An integer has more than {MAX_DIGITS:,} digits.")
    return int(Decimal(digits))


def to_text(data: Any) -> str:
    """
    Return plain data as compact JSON text.

    :param data: Data for which `is_plain` is true.
    :raises ValueError: If a text has a lone surrogate.
    """
    return to_json(data, inf_nan_mode="strings").decode()


def encode_plain(data: Any) -> str:
    """
    Return plain data as compact JSON text. Lone surrogates become escape sequences.

    :param data: A result of `json_value`.
    """
    try:
        return to_text(data)
    except ValueError:
        return json.dumps(data, separators=(",", ":"), allow_nan=False)


def encode_values(data: Any, name: str, replace: Replace = refuse) -> str:
    """
    Return data as compact JSON text, with each value in the JSON form of the table above.

    :param data: Any value.
    :param name: The name of the data in errors.
    :param replace: Replaces a value without a JSON form. Defaults to refusing it.
    :raises MessageEncodingError: If a value is refused. The error names the value's path.
    """
    return encode_plain(json_value(data, (name,), replace))


def encode_meta(meta: dict[Any, Any]) -> str:
    """
    Return the meta of a chat history as JSON text.

    :raises MessageEncodingError: If a value has no JSON form. The error names the value's path.
    """
    return encode_values(meta, "meta")


def equal_json(one: Any, other: Any) -> bool:
    """Whether two parsed JSON values are equal. Numbers are compared by value, and none equals True or False."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal_json, one, other))
    return bool(one == other)


def is_plain(data: Any, depth: int = MAX_DEPTH - 10) -> bool:
    """
    Whether a dict or list contains only dicts with text keys, lists, text, numbers, True, False and None.

    Keys and scalars are checked in C code, without a Python step for each.
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
        if type(value) not in _SCALARS and not is_plain(value, depth - 1):
            return False
    return True


def has_long_number(text: str) -> bool:
    """Whether JSON text contains more than 4,300 digits in a row, in an integer or inside a text."""
    # A run of that many digits covers at least one of these places. Only the text around them is looked at.
    for place in range(MAX_DIGITS, len(text), MAX_DIGITS + 1):
        if text[place] in _DIGITS:
            before, after = text[place - MAX_DIGITS : place], text[place : place + MAX_DIGITS + 1]
            digits_before = len(before) - len(before.rstrip(_DIGITS))
            digits_after = len(after) - len(after.lstrip(_DIGITS))
            if digits_before + digits_after > MAX_DIGITS:
                return True
    return False


def json_value(value: Any, path: _Path, replace: Replace, depth: int = MAX_DEPTH) -> Any:
    """
    Return a copy of a value in its JSON form, as plain data.

    :param value: Any value. It is not changed.
    :param path: The path to the value.
    :param replace: Replaces a value without a JSON form.
    :param depth: The number of further levels that are allowed. Defaults to 200.
    :raises MessageEncodingError: If a value is refused. The error names the value's path.
    """
    if depth == 0:
        raise MessageEncodingError(f"{shown(path)}… is nested more than {MAX_DEPTH} levels deep, or contains itself.")
    if value is None or isinstance(value, (bool, str, int, float)):
        return _scalar_form(value.value if isinstance(value, Enum) else value, path)
    if isinstance(value, Mapping):
        return _object_form(value, path, replace, depth)
    if isinstance(value, AbstractSet):
        value = _sorted_if_possible(value)
    if isinstance(value, (list, tuple, deque, ValuesView)):
        return [json_value(item, (path, index), replace, depth - 1) for index, item in enumerate(value)]
    try:
        form = _form(value, lambda inner: replace(shown(path), inner))
    except MessageEncodingError:
        raise
    except Exception:  # a model's own serializer may raise anything
        form = _NO_FORM
    if form is _NO_FORM:  # replaced only now, or a refusal would show the serializer's error, which may quote the value
        form = replace(shown(path), value)
    return json_value(form, path, replace, depth - 1)


def shown(path: _Path) -> str:
    """Return a path as an error shows it, such as `messages[2].meta['usage']['x']`."""
    steps = []
    while len(path) == 2:
        path, step = path
        steps.append(f"[{step!r}]"[:100])
    return "".join([path[0], *reversed(steps)])[:200]


def repr_of(value: Any) -> str:
    """Return the `repr` of a value, cut to 1,000 characters. A `repr` that fails is replaced by the default one."""
    try:
        return repr(value)[:_MAX_REPR_LENGTH]
    except Exception:  # an object's own method may raise anything
        return object.__repr__(value)


def _scalar_form(value: Any, path: _Path) -> Any:
    if isinstance(value, str):
        value = str.__str__(value)  # a subclass may override other methods
        # A pair of surrogates becomes the character that it encodes, as JSON parsers read it.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int):
        if not -_SMALLEST_REFUSED_INTEGER < value < _SMALLEST_REFUSED_INTEGER:
            raise MessageEncodingError(f"{shown(path)} is an integer of more than {MAX_DIGITS:,} digits.")
        return int(value)
    return value


def _object_form(value: Mapping[Any, Any], path: _Path, replace: Replace, depth: int) -> dict[str, Any]:
    form: dict[str, Any] = {}
    for key, item in value.items():
        key_form = json_value(key, (path, "a key"), replace, depth - 1)
        name = key_form if isinstance(key_form, str) else encode_plain(key_form)
        if name in form:
            raise MessageEncodingError(f"{shown(path)} has two keys that both become {name[:200]!r} in JSON.")
        form[name] = json_value(item, (path, name), replace, depth - 1)
    return form


def _sorted_if_possible(values: AbstractSet[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:  # items of several kinds have no order
        return list(values)


def _form(value: Any, replace_inner: Callable[[Any], Any]) -> Any:
    """
    Return data that is closer to JSON, for a value that is neither a scalar nor a container.

    :param replace_inner: Replaces values without a JSON form inside the value.
    :raises Exception: If the value itself has no JSON form.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(bytes(value)).decode("ascii")
    if isinstance(value, _WRITTEN_AS_TEXT):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind != "m":
        # numpy returns a duration ("m") as a number without its unit, so it has no JSON form here. A datetime ("M") is
        # turned into text first, because numpy returns "NaT" as None.
        return (value.astype(str) if value.dtype.kind == "M" else value).tolist()
    if isinstance(value, (Iterator, type)):  # pydantic would run an iterator, and encode a class like an instance
        raise TypeError
    return to_jsonable_python(
        value, by_alias=False, bytes_mode="base64", inf_nan_mode="constants", fallback=replace_inner
    )
