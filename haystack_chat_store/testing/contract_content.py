# SPDX-License-Identifier: Apache-2.0
"""Rule 11: every part of a message comes back equal, is stored in a documented form, or is refused."""

import base64
import dataclasses
import datetime as dt
import enum
import ipaddress
import itertools
import json
import math
import re
import types
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
from haystack.dataclasses import ChatMessage, ImageContent, ReasoningContent, TextContent, ToolCall
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, HttpUrl

from haystack_chat_store.errors import MessageEncodingError
from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    exactly,
    number_of_examples,
    without_ids,
)
from haystack_chat_store.testing.messages import messages, sample_messages, user

_SURROGATES = range(0xD800, 0xE000)

#: Text that causes problems in some engines, drivers or encodings.
HARD_TEXTS = {
    "NUL": "a\x00b\x00",
    "NUL escaped": "a\\u0000b",
    "lone surrogates": "\ud800 \udfff \ude00\ud83d",
    "every surrogate": " ".join(map(chr, _SURROGATES)),
    "line ends": "\r\n\n\r\u2028\u2029\x85\x0b",
    "quotes": "'\"`\\''\"\"; -- /* $1 ? :a %s {} \\",
    "normal forms": "caf\u00e9 cafe\u0301 \ufb01 \u212b",
    "not a character": "\ufffe\uffff\ufffd\U0010ffff",
    "blanks": " \t a \u00a0\u3000 ",
    "JSON": '{"role": "user", "content": [{"text": null}]}',
}


def _nested(levels: int) -> Any:
    value: Any = "deep"
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


#: JSON values that some engines and drivers change.
HARD_VALUES = {
    "beyond 64 bits": [2**63, -(2**63) - 1, 2**64, 2**70, -(2**70)],
    "4,300 digits": [10**4300 - 1, 1 - 10**4300],
    "zeros": [0, 0.0, -0.0],
    "one in three types": [1, 1.0, True],
    "floats": [1e308, -1e308, 5e-324, 2.2250738585072014e-308, 0.1 + 0.2, 1e22, 1e23, 123456789012345680.0],
    "nothing": [None, "", [], {}, False, 0, [None], {"": None}],
    "keys": dict.fromkeys(["", " ", "a.b", "$ref", "a\x00", "\ud800", "é", "e\u0301", "'", "__proto__", "text"], 1),
    "text like other types": ["null", "true", "1", "1.0", "NaN", "2024-01-01", "[]"],
    "deep": _nested(190),
}


class _Colour(enum.Enum):
    RED = "red"


class _Level(enum.IntEnum):
    HIGH = 3


class _Mood(str, enum.Enum):
    GOOD = "good"


class _Text(str):
    pass


class _Point(BaseModel):
    x: int
    when: dt.date


class _Citation(BaseModel):
    url: HttpUrl


class _Aliased(BaseModel):
    kept: int = Field(alias="Shown")


@dataclasses.dataclass
class _Usage:
    tokens: int
    by: tuple[str, ...]


_UTC = dt.timezone.utc

#: Values without a JSON form, and the form in which they are stored: the table in `haystack_chat_store.json_values`.
STORED_FORMS: dict[str, tuple[Any, Any]] = {
    "tuple": ((1, (2,), ()), [1, [2], []]),
    "set": ({3, 1, 2}, [1, 2, 3]),
    "frozenset": (frozenset("ba"), ["a", "b"]),
    "set without an order": ({1, None} - {None}, [1]),
    "deque": (deque([1, 2]), [1, 2]),
    "datetime": (dt.datetime(2024, 2, 29, 12, 30, 1, 5, _UTC), "2024-02-29T12:30:01.000005Z"),
    "date": (dt.date(2024, 2, 29), "2024-02-29"),
    "time": (dt.time(12, 30), "12:30:00"),
    "Enum": (_Colour.RED, "red"),
    "IntEnum": (_Level.HIGH, 3),
    "text Enum": (_Mood.GOOD, "good"),
    "subclass of text": (_Text("text"), "text"),
    "dataclass": (_Usage(1, ("a", "b")), {"tokens": 1, "by": ["a", "b"]}),
    "pydantic model": (_Point(x=1, when=dt.date(2024, 2, 29)), {"x": 1, "when": "2024-02-29"}),
    "other mapping": (types.MappingProxyType({"a": (1,)}), {"a": [1]}),
    "OrderedDict": (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "UUID": (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    "Decimal": (Decimal("1.10"), "1.10"),
    "Path": (PurePosixPath("a/b"), "a/b"),
    "timedelta": (dt.timedelta(days=1, seconds=2), "P1DT2S"),
    "Fraction": (Fraction(1, 3), "1/3"),
    "IP address": (ipaddress.ip_address("127.0.0.1"), "127.0.0.1"),
    "URL in a model": (
        {"citations": [_Citation(url=HttpUrl("https://example.org/x"))]},
        {"citations": [{"url": "https://example.org/x"}]},
    ),
    "model with aliases": (_Aliased(Shown=1), {"kept": 1}),
    "views of a dict": ([{"a": 1}.keys(), {"a": 1}.values(), {"a": 1}.items()], [["a"], [1], [["a", 1]]]),
    "bytes": (b"\x00\xff", "AP8="),
    "bytearray": (bytearray(b"\x00\xff"), "AP8="),
    "memoryview": (memoryview(b"\x00\xff"), "AP8="),
    "NaN": (math.nan, "NaN"),
    "Infinity": (math.inf, "Infinity"),
    "-Infinity": (-math.inf, "-Infinity"),
    "numpy integer": (np.int64(7), 7),
    "numpy float": (np.float32(0.5), 0.5),
    "numpy bool": (np.bool_(True), True),
    "numpy NaN": (np.float64("nan"), "NaN"),
    "numpy array": (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "surrogates side by side": ("\ud83d\ude00", "\U0001f600"),
    "number as key": ({1: "a", 2.5: "b"}, {"1": "a", "2.5": "b"}),
    "None and bool as keys": ({None: "a", True: "b", False: "c"}, {"null": "a", "true": "b", "false": "c"}),
    "other keys": ({_Colour.RED: 1, dt.date(2024, 2, 29): 2}, {"red": 1, "2024-02-29": 2}),
}


def _cycle() -> Any:
    inner: list[Any] = []
    inner.append({"self": inner})
    return inner


#: Values that are refused anywhere in a message.
REFUSED: dict[str, Callable[[], Any]] = {
    "dict that contains itself": _cycle,
    "1,000 levels": lambda: _nested(1000),
    "100,000 levels": lambda: _nested(100_000),
    "keys that become the same": lambda: {1: "a", "1": "b"},
    "4,301 digits": lambda: 10**4300,
}

#: Values without a stored form. In meta and extra of a message their `repr` is stored. Elsewhere they are refused.
WITHOUT_FORM: dict[str, Callable[[], Any]] = {
    "function": lambda: print,
    "lambda": lambda: lambda: None,
    "object": object,
    "class": lambda: dict,
    "generator": lambda: (number for number in range(3)),
    "endless iterator": itertools.count,
    "key without a form": lambda: {object(): 1},
}

# The places in a message that can hold any value, and the path that an error must name.
_FREE_PLACES: dict[str, tuple[Callable[[Any], ChatMessage], str]] = {
    "meta": (lambda value: user(usage={"x": value}), r"messages\[2\]\.meta\['usage'\]\['x'\]"),
    "list in meta": (lambda value: user(usage=[0, value]), r"messages\[2\]\.meta\['usage'\]\[1\]"),
    "extra of a call": (
        lambda value: ChatMessage.from_assistant("Hm.", tool_calls=[ToolCall("search", {}, extra={"x": value})]),
        r"messages\[2\]\.content\[1\].*extra.*\['x'\]",
    ),
    "extra of reasoning": (
        lambda value: ChatMessage.from_assistant(reasoning=ReasoningContent("Hm.", {"x": value})),
        r"messages\[2\]\.content\[0\].*extra.*\['x'\]",
    ),
    "meta of an image in a result": (
        lambda value: ChatMessage.from_tool(
            [TextContent("a map:"), ImageContent("", "image/png", meta={"x": value})], origin=ToolCall("draw", {})
        ),
        r"messages\[2\]\.content\[0\].*result.*\[1\].*meta.*\['x'\]",
    ),
}
# The places that hold the output of the model and the tools.
_SAID_PLACES: dict[str, tuple[Callable[[Any], ChatMessage], str]] = {
    "arguments": (
        lambda value: ChatMessage.from_assistant(tool_calls=[ToolCall("search", {"x": value})]),
        r"messages\[2\]\.content\[0\].*arguments.*\['x'\]",
    ),
    "origin of a result": (
        lambda value: ChatMessage.from_tool("done", origin=ToolCall("search", {"x": value})),
        r"messages\[2\]\.content\[0\].*origin.*arguments.*\['x'\]",
    ),
}
_PLACES = {**_FREE_PLACES, **_SAID_PLACES}


def _cases(values: dict[str, Any], *names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(names if len(names) > 1 else names[0], list(values.values()), ids=list(values))


def _assert_refused(store: ClosableStore, calls: Calls, message: ChatMessage, path: str) -> None:
    """Check that a batch with a message is refused whole, and that the error names the path of the value."""
    with pytest.raises(MessageEncodingError, match=path):
        calls.write(store, "chat", [user(), user(), message, user()])
    assert calls.count(store, "chat") == 0


class Rule11LosslessTest(ContractTest):
    """Rule 11: every written value comes back equal or in a documented form, or is refused. Nothing is dropped."""

    @_cases(sample_messages(), "message")
    def test_message_of_every_kind_comes_back_equal(
        self, new_store: StoreFactory, calls: Calls, message: ChatMessage
    ) -> None:
        _assert_comes_back_equal(new_store(skip_system_messages=False), calls, [message])

    def test_messages_of_all_kinds_come_back_equal_together(self, new_store: StoreFactory, calls: Calls) -> None:
        _assert_comes_back_equal(new_store(skip_system_messages=False), calls, list(sample_messages().values()))

    @_cases(HARD_TEXTS, "text")
    def test_hard_text_comes_back_equal_wherever_it_stands(self, store: ClosableStore, calls: Calls, text: str) -> None:
        call = ToolCall(text, {text: text}, id=text, extra={text: [text]})
        written = [
            ChatMessage.from_user(text, name=text, meta={text: text}),
            ChatMessage.from_assistant(text, reasoning=ReasoningContent(text, {text: text}), tool_calls=[call]),
            ChatMessage.from_tool(text, origin=call),
            ChatMessage.from_tool([TextContent(text)], origin=call, error=True),
        ]
        _assert_comes_back_equal(store, calls, written)

    def test_every_character_comes_back_equal(self, store: ClosableStore, calls: Calls) -> None:
        text = "".join(chr(code) for code in range(0x110000) if code not in _SURROGATES)
        _assert_comes_back_equal(store, calls, [ChatMessage.from_user(text, meta={text: text})])

    @_cases(HARD_VALUES, "value")
    def test_hard_value_comes_back_equal_and_of_the_same_type(
        self, store: ClosableStore, calls: Calls, value: Any
    ) -> None:
        call = ToolCall("search", {"value": value}, extra={"value": value})
        written = [user(value=value), ChatMessage.from_assistant(tool_calls=[call], meta={"value": value})]
        _assert_comes_back_equal(store, calls, written)

    @_cases(HARD_VALUES, "value")
    def test_hard_value_comes_back_equal_beside_one_without_a_form(
        self, store: ClosableStore, calls: Calls, value: Any
    ) -> None:
        calls.write(store, "chat", [user(value=value, odd=(1, 2))])
        (message,) = calls.retrieve(store, "chat")
        assert exactly(message.meta["value"]) == exactly(value)
        assert message.meta["odd"] == [1, 2]

    def test_hard_values_do_not_hide_each_other(self, store: ClosableStore, calls: Calls) -> None:
        _assert_comes_back_equal(store, calls, [user(value=value) for value in HARD_VALUES.values()])

    def test_image_of_20_megabytes_comes_back_equal(self, store: ClosableStore, calls: Calls) -> None:
        base64_image = base64.b64encode(bytes(range(256)) * 60_000).decode()
        assert len(base64_image) > 20_000_000
        image = ImageContent(base64_image, "image/png", validation=False)
        calls.write(store, "chat", [ChatMessage.from_user(content_parts=[image])])
        assert calls.retrieve(store, "chat")[0].image == image

    def test_any_message_comes_back_equal(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(last_k=None)

        # On a busy machine, hypothesis needs long to make such messages.
        @settings(max_examples=number_of_examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(messages(), max_size=3))
        def holds(written: list[ChatMessage]) -> None:
            _assert_comes_back_equal(store, calls, written)

        holds()

    @_cases(STORED_FORMS, "value", "stored")
    def test_what_json_has_no_form_for_is_stored_in_its_documented_form(
        self, store: ClosableStore, calls: Calls, value: Any, stored: Any
    ) -> None:
        call = ToolCall("search", {"value": value}, extra={"value": [value]})
        calls.write(store, "chat", [ChatMessage.from_assistant(tool_calls=[call], meta={"value": {"in": value}})])
        (message,) = calls.retrieve(store, "chat")
        (found,) = message.tool_calls
        assert exactly(message.meta["value"]) == exactly({"in": stored})
        assert exactly(found.arguments) == exactly({"value": stored})
        assert exactly(found.extra) == exactly({"value": [stored]})

    def test_set_without_an_order_becomes_a_list_in_any_order(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user(value={1, "a", None})])
        (message,) = calls.retrieve(store, "chat")
        assert sorted(message.meta["value"], key=repr) == ["a", 1, None]

    @_cases(_PLACES, "make_message", "path")
    @_cases(REFUSED, "make_value")
    def test_what_cannot_be_stored_is_refused_and_named_wherever_it_stands(
        self,
        store: ClosableStore,
        calls: Calls,
        make_value: Callable[[], Any],
        make_message: Callable[[Any], ChatMessage],
        path: str,
    ) -> None:
        _assert_refused(store, calls, make_message(make_value()), path)

    @_cases(_SAID_PLACES, "make_message", "path")
    @_cases(WITHOUT_FORM, "make_value")
    def test_what_was_said_is_stored_equal_or_refused(
        self,
        store: ClosableStore,
        calls: Calls,
        make_value: Callable[[], Any],
        make_message: Callable[[Any], ChatMessage],
        path: str,
    ) -> None:
        _assert_refused(store, calls, make_message(make_value()), path)

    @_cases(_FREE_PLACES, "make_message", "path")
    @_cases(WITHOUT_FORM, "make_value")
    def test_no_value_in_meta_costs_a_message(
        self,
        store: ClosableStore,
        calls: Calls,
        caplog: pytest.LogCaptureFixture,
        make_value: Callable[[], Any],
        make_message: Callable[[Any], ChatMessage],
        path: str,
    ) -> None:
        value = make_value()
        said = repr(next(iter(value))) if isinstance(value, dict) else repr(value)
        assert calls.write(store, "chat", [user(), user(), make_message(value), user()]) == 4
        assert json.dumps(said)[1:-1] in json.dumps(calls.retrieve(store, "chat", last_k=None)[2].to_dict())
        assert re.search(path, caplog.text)
        if isinstance(value, Iterator):
            assert next(value) == 0  # the iterator was not consumed

    @_cases(_FREE_PLACES, "make_message", "path")
    @_cases(WITHOUT_FORM, "make_value")
    def test_strict_store_refuses_what_has_no_form(
        self,
        new_store: StoreFactory,
        calls: Calls,
        make_value: Callable[[], Any],
        make_message: Callable[[Any], ChatMessage],
        path: str,
    ) -> None:
        store = new_store(strict=True)
        _assert_refused(store, calls, make_message(make_value()), path)

    def test_content_that_is_no_part_of_a_message_is_refused(self, store: ClosableStore, calls: Calls) -> None:
        odd = dataclasses.replace(user(), _content=[TextContent("Hello"), "Hello"])  # type: ignore[list-item]  # on purpose
        with pytest.raises(MessageEncodingError, match=r"messages\[1\]\.content\[1\]"):
            calls.write(store, "chat", [user(), odd])
        assert calls.count(store, "chat") == 0


def _assert_comes_back_equal(store: ClosableStore, calls: Calls, written: list[ChatMessage]) -> None:
    chat_history_id = uuid.uuid4().hex
    assert calls.write(store, chat_history_id, written) == len(written)
    found = without_ids(calls.retrieve(store, chat_history_id, last_k=1000))
    assert found == written
    assert exactly(found) == exactly(written)
