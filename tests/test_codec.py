# SPDX-License-Identifier: Apache-2.0
"""Messages to JSON text and back: lossless, readable by anyone, and refused by name where that is impossible."""

import base64
import copy
import enum
import json
import uuid
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time, timezone
from decimal import Decimal
from pathlib import PurePosixPath
from time import thread_time as time_of_thread
from types import MappingProxyType

import numpy as np
import pytest
from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
    chat_message,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from haystack_chat_store.codec import decode_messages, encode_message
from haystack_chat_store.errors import MessageDecodingError, MessageEncodingError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.json_values import has_long_number

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(24)).decode()
CALL = ToolCall("weather", {"city": "Rome"}, id="call_1")


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, 2)
    DAY = date(2026, 1, 2)


class Word(str, enum.Enum):
    YES = "yes"


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    __slots__ = ()


@dataclass(slots=True)
class Place:
    city: str
    tags: tuple = ()


class Weather(BaseModel):
    place: str
    day: date


Point = namedtuple("Point", "x y")


def encoded(message, message_id="id-1", where="message", **options):
    return encode_message(message, message_id, where, **options)


def round_trip(message):
    return decode_messages([encoded(message)])[0]


def with_id(message, message_id="id-1"):
    return replace(message, _meta={**message.meta, MESSAGE_ID_KEY: message_id})


def exactly(message):
    """Return what tells a message from any other, also 1 from True and from 1.0."""
    return type(message), repr([type(part) for part in message._content]), repr(message.to_dict())


# ---------------------------------------------------------------------- messages that JSON has a form for

# How long an example takes says something about the machine, nothing about the rules.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# All characters but low surrogates: these make one character of what they come after, in JSON as in UTF-16.
texts = st.text(st.characters(exclude_categories=()).filter(lambda c: not "\udc00" <= c <= "\udfff"), max_size=8)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
) | st.sampled_from(["\x00", "\ud800", "NaN", "null", 2**70, -(10**4000), -0.0, 1e308])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
objects = st.dictionaries(texts, values, max_size=3)
base64_texts = st.binary(max_size=9).map(lambda data: base64.b64encode(data).decode())
text_parts = st.builds(TextContent, texts)
image_parts = st.builds(
    ImageContent,
    base64_image=base64_texts,
    mime_type=st.none() | st.just("image/png"),
    detail=st.sampled_from([None, "low"]),
    meta=objects,
    validation=st.booleans(),
)
file_parts = st.builds(
    FileContent,
    base64_data=base64_texts,
    mime_type=st.none() | st.just("application/pdf"),
    filename=st.none() | texts,
    extra=objects,
    validation=st.booleans(),
)
reasoning_parts = st.builds(ReasoningContent, reasoning_text=texts, extra=objects)
tool_calls = st.builds(ToolCall, tool_name=texts, arguments=objects, id=st.none() | texts, extra=st.none() | objects)
tool_results = st.builds(
    ToolCallResult,
    result=texts | st.lists(text_parts | image_parts | file_parts, max_size=3),
    origin=tool_calls,
    error=st.booleans(),
)
messages = st.builds(
    ChatMessage,
    _role=st.sampled_from(ChatRole),
    _content=st.lists(
        st.one_of(text_parts, image_parts, file_parts, reasoning_parts, tool_calls, tool_results), max_size=4
    ),
    _name=st.none() | texts,
    _meta=objects,
)


@untimed
@given(messages)
def test_every_message_comes_back_exactly_as_it_was_plus_its_id(message):
    before = exactly(message)
    text = encoded(message)
    assert exactly(decode_messages([text])[0]) == exactly(with_id(message))
    assert exactly(message) == before
    text.encode()


@untimed
@given(messages)
def test_the_stored_form_is_that_of_to_dict(message):
    assert repr(json.loads(encoded(message))) == repr(json.loads(json.dumps(with_id(message).to_dict())))


@untimed
@given(st.lists(messages, max_size=3))
def test_messages_decoded_together_are_those_decoded_one_by_one(several):
    contents = [encoded(message) for message in several]
    assert [*map(exactly, decode_messages(contents))] == [exactly(decode_messages([text])[0]) for text in contents]


@pytest.mark.parametrize("brought", ["id-1", "another", None, 5])
def test_the_id_a_message_is_stored_under_replaces_what_its_meta_says(brought):
    message = ChatMessage.from_user("Hi!", meta={MESSAGE_ID_KEY: brought, "x": 1})
    assert round_trip(message).meta == {MESSAGE_ID_KEY: "id-1", "x": 1}
    assert message.meta[MESSAGE_ID_KEY] == brought


def test_text_stays_readable_in_the_store():
    assert '"text":"Grüß Gott, 世界 😀"' in encoded(ChatMessage.from_user("Grüß Gott, 世界 😀"))


@given(st.integers(0, 9_000), st.integers(4_295, 4_306), st.integers(0, 9_000), st.sampled_from(["x", "٣", "-", '"']))
def test_more_than_4300_digits_in_a_row_are_found_wherever_they_stand(before, digits, after, other):
    assert has_long_number(before * other + digits * "7" + after * other) is (digits > 4300)
    assert not has_long_number((before * "7" + other)[-4_301:] + digits // 2 * "7" + other + after % 4_300 * "7")


def test_looking_for_many_digits_takes_time_in_proportion_to_the_text():
    text = 500 * (4_300 * "7" + ",")
    began = time_of_thread()
    assert not has_long_number(text)
    assert time_of_thread() - began < 1  # of 5 s that looking at each place takes


@pytest.mark.parametrize("digits", [4299, 4300])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_have_up_to_4300_digits(digits, sign):
    number = sign * 10 ** (digits - 1)
    meta = round_trip(ChatMessage.from_user("Hi!", meta={"x": [number, {"y": number}]})).meta
    assert (meta["x"][0] == number, meta["x"][1]["y"] == number) == (True, True)


def test_many_digits_in_a_text_are_no_integer():
    message = ChatMessage.from_user("1" * 5000, meta={"x": "1" * 5000})
    assert round_trip(message) == with_id(message)


def test_one_long_integer_does_not_change_how_its_neighbours_are_read():
    numbers = [1, 10**4299, 2**70]
    decoded = decode_messages([encoded(ChatMessage.from_user("Hi!", meta={"x": number})) for number in numbers])
    assert all(message.meta["x"] == number for message, number in zip(decoded, numbers, strict=True))


def test_twenty_megabytes_come_back_equal():
    image = ImageContent("QUFB" * 5_000_000, "image/png", validation=False)
    assert round_trip(ChatMessage.from_user(content_parts=[image])).image == image


def test_what_haystack_settled_when_a_message_was_made_is_not_settled_again():
    image = ImageContent(PNG)
    assert image.mime_type == "image/png"
    forgotten, unguessed = replace(image, validation=False), ImageContent(PNG, validation=False)
    vars(forgotten)["mime_type"] = None  # as a later version of Haystack might find it
    vars(forgotten)["validation"] = True
    parts = [image, forgotten, unguessed, ImageContent("not base64!", validation=False)]
    vars(parts[-1])["validation"] = True
    assert round_trip(ChatMessage.from_user(content_parts=parts))._content == parts


def test_decoded_parts_are_ordinary_dataclasses():
    decoded = round_trip(ChatMessage.from_assistant("Hi!", tool_calls=[CALL], reasoning="Hm."))
    assert replace(decoded, _name="bot").name == "bot"
    assert replace(decoded.tool_call, id="2") == ToolCall("weather", {"city": "Rome"}, id="2")
    with pytest.warns(Warning, match="Mutating attribute"):
        decoded.tool_call.id = "2"


# ---------------------------------------------------------------------- values that JSON has no form for

CONVERSIONS = {
    "tuple": ((1, (2,)), [1, [2]]),
    "named tuple": (Point(1, 2), [1, 2]),
    "set": ({200, 30, 1}, [1, 30, 200]),
    "frozenset": (frozenset("ba"), ["a", "b"]),
    "deque": (deque([1, 2]), [1, 2]),
    "datetime": (datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc), "2026-01-02T03:04:05.000006Z"),
    "date": (date(2026, 1, 2), "2026-01-02"),
    "time": (time(3, 4), "03:04:00"),
    "enum": (Colour.RED, "red"),
    "enum of a tuple": (Colour.PAIR, [1, 2]),
    "enum of a date": (Colour.DAY, "2026-01-02"),
    "text enum": (Word.YES, "yes"),
    "integer enum": (Level.HIGH, 3),
    "text subclass": (Text("abc"), "abc"),
    "dataclass": (Place("Rome", ("a",)), {"city": "Rome", "tags": ["a"]}),
    "pydantic model": (Weather(place="Rome", day=date(2026, 1, 2)), {"place": "Rome", "day": "2026-01-02"}),
    "ordered dict": (OrderedDict(b={1}, a=2), {"b": [1], "a": 2}),
    "other mapping": (MappingProxyType({"a": (1,)}), {"a": [1]}),
    "UUID": (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "Decimal": (Decimal("1.10"), "1.10"),
    "path": (PurePosixPath("a/b"), "a/b"),
    "bytes": (b"\x00\xff", "AP8="),
    "bytearray": (bytearray(b"\x00\xff"), "AP8="),
    "memoryview": (memoryview(b"\x00\xff"), "AP8="),
    "NaN": (float("nan"), "NaN"),
    "infinity": (float("inf"), "Infinity"),
    "negative infinity": (float("-inf"), "-Infinity"),
    "numpy integer": (np.int64(3), 3),
    "numpy float": (np.float32(0.5), 0.5),
    "numpy double": (np.float64(0.5), 0.5),
    "numpy NaN": (np.float64("nan"), "NaN"),
    "numpy boolean": (np.bool_(True), True),
    "numpy text": (np.str_("abc"), "abc"),
    "numpy date": (np.datetime64("2026-01-02"), "2026-01-02"),
    "numpy array": (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "numpy array of floats": (np.array([0.5, np.nan]), [0.5, "NaN"]),
    "paired surrogates": ("\ud83d\ude00", "😀"),
    "integer key": ({1: "a"}, {"1": "a"}),
    "float key": ({1.5: "a"}, {"1.5": "a"}),
    "boolean key": ({True: "a"}, {"true": "a"}),
    "null key": ({None: "a"}, {"null": "a"}),
    "NaN key": ({float("nan"): "a"}, {"NaN": "a"}),
    "date key": ({date(2026, 1, 2): "a"}, {"2026-01-02": "a"}),
    "enum key": ({Colour.RED: "a"}, {"red": "a"}),
    "text enum key": ({Word.YES: "a"}, {"yes": "a"}),
    "tuple key": ({(1, 2): "a"}, {"[1,2]": "a"}),
    "numpy key": ({np.int64(1): "a"}, {"1": "a"}),
}

# Where in a message a value can stand: how to put it there, how to get it back, what an error calls the place.
PLACES = {
    "meta": (
        lambda value: ChatMessage.from_user("Hi!", meta={"x": value}),
        lambda message: message.meta["x"],
        "meta['x']",
    ),
    "meta that is another dict": (
        lambda value: ChatMessage(ChatRole.USER, [], None, OrderedDict({MESSAGE_ID_KEY: "id-1", "x": value})),
        lambda message: message.meta["x"],
        "meta['x']",
    ),
    "tool call arguments": (
        lambda value: ChatMessage.from_assistant(tool_calls=[ToolCall("a", {"x": value})]),
        lambda message: message.tool_call.arguments["x"],
        "content[0]['tool_call']['arguments']['x']",
    ),
    "tool call extra": (
        lambda value: ChatMessage.from_assistant(tool_calls=[ToolCall("a", {}, extra={"x": value})]),
        lambda message: message.tool_call.extra["x"],
        "content[0]['tool_call']['extra']['x']",
    ),
    "origin of a result": (
        lambda value: ChatMessage.from_tool("done", ToolCall("a", {"x": value})),
        lambda message: message.tool_call_result.origin.arguments["x"],
        "content[0]['tool_call_result']['origin']['arguments']['x']",
    ),
    "part of a result": (
        lambda value: ChatMessage.from_tool([FileContent("", extra={"x": value}, validation=False)], CALL),
        lambda message: message.tool_call_result.result[0].extra["x"],
        "content[0]['tool_call_result']['result'][0]['file']['extra']['x']",
    ),
    "reasoning": (
        lambda value: ChatMessage.from_assistant(reasoning=ReasoningContent("Hm.", {"x": value})),
        lambda message: message.reasoning.extra["x"],
        "content[0]['reasoning']['extra']['x']",
    ),
    "image": (
        lambda value: ChatMessage.from_user(content_parts=[ImageContent("", meta={"x": value}, validation=False)]),
        lambda message: message.image.meta["x"],
        "content[0]['image']['meta']['x']",
    ),
    "file": (
        lambda value: ChatMessage.from_user(content_parts=[FileContent("", extra={"x": value}, validation=False)]),
        lambda message: message.file.extra["x"],
        "content[0]['file']['extra']['x']",
    ),
}
in_every_place = pytest.mark.parametrize(("put", "get", "path"), PLACES.values(), ids=PLACES.keys())


@in_every_place
@pytest.mark.parametrize(("value", "stored"), CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_the_one_obvious_form_is_stored(put, get, path, value, stored):
    for wrapped, expected in ((value, stored), ([{"y": value}], [{"y": stored}])):
        found = get(round_trip(put(wrapped)))
        assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    "message",
    [
        ChatMessage.from_user(Text("abc")),
        ChatMessage.from_user("abc", name=Text("abc")),
        ChatMessage.from_assistant(tool_calls=[ToolCall(Word.YES, {}, id=Text("1"))]),
        ChatMessage.from_tool(Text("done"), CALL, error=np.bool_(True)),
        ChatMessage(ChatRole.USER, (TextContent("abc"),)),
        ChatMessage.from_tool((TextContent("abc"),), CALL),
    ],
    ids=["text", "name", "tool name and id", "result", "tuple of parts", "tuple as result"],
)
def test_lookalikes_of_plain_values_become_plain(message):
    decoded = round_trip(message)
    assert exactly(decoded) == exactly(ChatMessage.from_dict(json.loads(json.dumps(decoded.to_dict()))))
    assert decoded.texts == message.texts


@pytest.mark.parametrize("call_id", [uuid.UUID(int=1), Colour.RED])
def test_fields_of_a_tool_call_have_a_form_too(call_id):
    decoded = round_trip(ChatMessage.from_assistant(tool_calls=[ToolCall("weather", {}, id=call_id)]))
    assert decoded.tool_call.id in ("00000000-0000-0000-0000-000000000001", "red")


def test_a_set_that_cannot_be_sorted_is_stored_in_any_order():
    stored = round_trip(ChatMessage.from_user("Hi!", meta={"x": {1, "a"}})).meta["x"]
    assert stored in ([1, "a"], ["a", 1])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("digits", [4301, 5000])
@pytest.mark.parametrize("sign", [1, -1])
@in_every_place
def test_longer_integers_are_refused(digits, sign, put, get, path):
    number = sign * 10 ** (digits - 1)
    for wrapped, where in (
        (number, path),
        ([1, {"y": number}], f"{path}[1]['y']"),
        ({"y": (1, number)}, f"{path}['y'][1]"),
    ):
        with pytest.raises(MessageEncodingError) as refusal:
            encoded(put(wrapped), where="messages[2]")
        assert str(refusal.value).startswith(f"messages[2].{where} is an integer of more than 4,300 digits")


@in_every_place
@pytest.mark.parametrize(
    "value",
    [object(), len, Place, (number for number in ())],
    ids=["object", "function", "class", "generator"],
)
def test_a_strict_codec_refuses_what_has_no_form_with_its_path(put, get, path, value):
    for wrapped, where in ((value, path), ([1, {"y": value}], f"{path}[1]['y']")):
        with pytest.raises(MessageEncodingError) as refusal:
            encoded(put(wrapped), where="messages[2]", strict=True)
        assert str(refusal.value).startswith(f"messages[2].{where} is a {type(value).__name__}, ")


def test_the_path_names_the_message_and_every_key_on_the_way():
    message = ChatMessage.from_user("Hi!", meta={"usage": {"x": object()}})
    with pytest.raises(MessageEncodingError) as refusal:
        encoded(message, where="messages[2]", strict=True)
    assert str(refusal.value).startswith("messages[2].meta['usage']['x'] is a object")


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ([TextContent("Hi!"), "text"], "messages[2].content[1] is a str"),
        ([ToolCallResult([TextContent("Hi!"), 5], CALL, False)], "messages[2].content[0].result[1] is a int"),
        ([ToolCallResult("done", {"tool_name": "a"}, False)], "messages[2].content[0].origin is a dict"),
    ],
    ids=["content", "result", "origin"],
)
def test_what_is_no_part_of_a_message_is_refused(content, path):
    with pytest.raises(MessageEncodingError) as refusal:
        encoded(ChatMessage(ChatRole.TOOL, content), where="messages[2]")
    assert str(refusal.value).startswith(path)


WRONG_FIELDS = {
    "text": (TextContent(5), "content[0].text is a int"),
    "text of parts": (TextContent([{"type": "text", "text": "Hi!"}]), "content[0].text is a list"),
    "text of bytes": (TextContent(b"Hi!"), "content[0].text is a bytes"),
    "tool name": (replace(CALL, tool_name=None), "content[0]['tool_call']['tool_name'] is a NoneType"),
    "arguments": (replace(CALL, arguments="{}"), "content[0]['tool_call']['arguments'] is a str"),
    "call id": (replace(CALL, id=["a"]), "content[0]['tool_call']['id'] is a list"),
    "extra": (replace(CALL, extra=[1]), "content[0]['tool_call']['extra'] is a list"),
    "result": (ToolCallResult(5, CALL, False), "content[0]['tool_call_result']['result'] is a int"),
    "result's origin": (
        ToolCallResult("done", replace(CALL, id=5), False),
        "content[0]['tool_call_result']: ['tool_call']['id'] is a int",
    ),
    "text in a result": (ToolCallResult([TextContent(5)], CALL, False), "content[0].result[0].text is a int"),
    "image": (ImageContent(5, "image/png", validation=False), "content[0]['image']['base64_image'] is a int"),
    "mime type": (ImageContent(PNG, 5, validation=False), "content[0]['image']['mime_type'] is a int"),
    "file name": (FileContent(PNG, "image/png", 5), "content[0]['file']['filename'] is a int"),
    "reasoning": (ReasoningContent(None), "content[0]['reasoning']['reasoning_text'] is a NoneType"),
}


@pytest.mark.parametrize(("part", "problem"), WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys())
def test_a_field_of_another_type_is_refused_before_it_breaks_its_conversation(part, problem):
    with pytest.raises(MessageEncodingError) as refusal:
        encoded(ChatMessage(ChatRole.USER, [part]), where="messages[2]")
    assert str(refusal.value).startswith(f"messages[2].{problem}")


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(MessageEncodingError, match="name is a int"):
        encoded(ChatMessage(ChatRole.USER, [TextContent("Hi!")], 5))


@pytest.mark.parametrize(
    "value",
    [{1: "a", "1": "b"}, {None: "a", "null": "b"}, {Colour.RED: "a", "red": "b"}, {"\ud83d\ude00": "a", "😀": "b"}],
    ids=["integer", "null", "enum", "surrogates"],
)
def test_keys_that_become_the_same_are_refused(value):
    with pytest.raises(MessageEncodingError, match=r"messages\[2\]\.meta\['x'\] has two keys that both become"):
        encoded(ChatMessage.from_user("Hi!", meta={"x": value}), where="messages[2]")


@pytest.mark.parametrize("date_or_text", [date(2026, 1, 2), "text"], ids=["with something unusual", "plain"])
@pytest.mark.parametrize("wrap", [lambda inner: {"k": inner}, lambda inner: [inner]], ids=["dicts", "lists"])
@in_every_place
class TestNesting:
    def nested(self, wrap, levels):
        value = "deep"
        for _ in range(levels):
            value = wrap(value)
        return value

    def test_two_hundred_levels_are_about_the_limit_wherever_they_are(self, put, get, path, wrap, date_or_text):
        value = self.nested(wrap, 190)
        message = put(value)
        message = replace(message, _meta={**message.meta, "y": date_or_text})
        assert get(round_trip(message)) == value

    def test_a_thousand_levels_are_refused(self, put, get, path, wrap, date_or_text):
        message = put(self.nested(wrap, 1000))
        message = replace(message, _meta={**message.meta, "y": date_or_text})
        with pytest.raises(MessageEncodingError, match=r"nested more than 200 levels deep"):
            encoded(message)


@in_every_place
def test_how_deep_one_part_may_be_does_not_depend_on_what_stands_elsewhere(put, get, path):
    def is_stored(message, **more):
        try:
            encoded(replace(message, _meta={**message.meta, **more}))
        except MessageEncodingError:
            return False
        return True

    value, stored_alone, stored_beside_a_date = "deep", [], []
    for _ in range(202):
        stored_alone.append(is_stored(put(value), y="text"))
        stored_beside_a_date.append(is_stored(put(value), y=date(2026, 1, 2)))
        value = [value]
    assert sum(stored_alone) == sum(stored_beside_a_date)


@in_every_place
def test_what_contains_itself_is_refused(put, get, path):
    for cycle in ([], {}):
        if isinstance(cycle, list):
            cycle.extend([cycle, cycle])
        else:
            cycle["again"] = cycle
        with pytest.raises(MessageEncodingError, match="contains itself"):
            encoded(put(cycle))


def test_what_numpy_has_for_no_time_does_not_become_null():
    moments = np.array(["2026-01-02", "NaT"], dtype="datetime64[D]")
    message = ChatMessage.from_user("Hi!", meta={"x": moments, "y": np.datetime64("NaT", "s")})

    assert json.loads(encoded(message))["meta"]["x"] == ["2026-01-02", "NaT"]
    assert json.loads(encoded(message))["meta"]["y"] == "NaT"


def test_a_duration_of_numpy_has_no_form():
    message = ChatMessage.from_user("Hi!", meta={"x": np.timedelta64(5, "D")})
    with pytest.raises(MessageEncodingError, match=r"meta\['x'\]"):
        encoded(message, strict=True)
    assert json.loads(encoded(message))["meta"]["x"] == repr(np.timedelta64(5, "D"))


@dataclass
class TaggedMessage(ChatMessage):
    tag: str = field(default="x")


class PlainMessage(ChatMessage):
    pass


@dataclass
class TaggedText(TextContent):
    tag: str = "x"


def test_a_message_with_a_field_that_would_be_lost_is_refused():
    with pytest.raises(MessageEncodingError, match=r"^messages\[2\] is a TaggedMessage with fields that"):
        encoded(TaggedMessage(ChatRole.USER, [TextContent("Hi!")]), where="messages[2]")
    with pytest.raises(MessageEncodingError, match=r"^messages\[2\]\.content\[0\] is a TaggedText"):
        encoded(ChatMessage(ChatRole.USER, [TaggedText("Hi!")]), where="messages[2]")


@dataclass
class AudioPart:
    seconds: float
    meta: dict

    def to_dict(self):
        return {"seconds": self.seconds, "meta": self.meta}

    @classmethod
    def from_dict(cls, data):
        return cls(**data)


def test_a_kind_of_part_that_a_newer_haystack_adds_is_stored(monkeypatch):
    monkeypatch.setitem(chat_message._CONTENT_PART_CLASSES_TO_SERIALIZATION_KEYS, AudioPart, "audio")
    message = ChatMessage(ChatRole.USER, [TextContent("Listen!"), AudioPart(1.5, {"b": [None, "\ud800"]})])
    assert round_trip(message) == with_id(message)


def test_a_message_of_a_subclass_without_fields_of_its_own_is_stored():
    assert round_trip(PlainMessage(ChatRole.USER, [TextContent("Hi!")])) == with_id(ChatMessage.from_user("Hi!"))


def test_attributes_that_are_no_fields_are_not_stored():
    call = ToolCall("weather", {})
    call.cached = object()
    decoded = round_trip(ChatMessage.from_assistant(tool_calls=[call]))
    assert vars(decoded.tool_call) == {"tool_name": "weather", "arguments": {}, "id": None, "extra": None}


# ---------------------------------------------------------------------- texts that others wrote, and damaged ones


def stored(role, *content):
    return {"role": role, "meta": {}, "name": None, "content": [*content]}


ORIGIN = {"tool_name": "weather", "arguments": {}, "id": "call_1"}
OTHER_FORMS = {
    "content as text": {"role": "user", "content": "Hi!"},
    "content as text with name and meta": {"role": "user", "content": "Hi!", "name": None, "meta": {}},
    "no name and meta": {"role": "user", "content": [{"text": "Hi!"}]},
    "meta null": {"role": "user", "content": [{"text": "Hi!"}], "name": None, "meta": None},
    "underscores": {"_role": "user", "_content": [{"text": "Hi!"}], "_name": None, "_meta": {"x": 1}},
    "underscores and a call": {"_role": "assistant", "_content": [{"tool_call": ORIGIN}]},
    "call without extra": stored("assistant", {"tool_call": ORIGIN}),
    "result of a call without extra": stored(
        "tool", {"tool_call_result": {"result": "done", "error": False, "origin": ORIGIN}}
    ),
    "image without mime type": stored("user", {"image": {"base64_image": PNG}}),
    "flat part": stored("assistant", ORIGIN),
}


@pytest.mark.parametrize("form", OTHER_FORMS.values(), ids=OTHER_FORMS.keys())
def test_every_form_that_haystack_reads_is_read(form):
    assert exactly(decode_messages([json.dumps(form)])[0]) == exactly(ChatMessage.from_dict(copy.deepcopy(form)))


GOOD = encoded(ChatMessage.from_user("Hi!"))
SECRET = "my secret"
DAMAGED = {
    "empty": "",
    "half": encoded(ChatMessage.from_user(SECRET))[:-9],
    "one too many": f"{GOOD},{GOOD}",
    "number": "5",
    "null": "null",
    "list": "[]",
    "no keys": "{}",
    "unknown role": json.dumps(stored(SECRET)),
    "list as role": json.dumps(stored([])),
    "unknown part": json.dumps(stored("user", {SECRET: {}})),
    "part that is null": json.dumps(stored("user", {"image": None})),
    "part without fields": json.dumps(stored("assistant", {"tool_call": {}})),
    "part with another field": json.dumps(stored("user", {"image": {SECRET: 1}})),
    "number as text": json.dumps(stored("user", {"text": 5})),
    "number as call id": json.dumps(stored("assistant", {"tool_call": {**ORIGIN, "extra": None, "id": 5}})),
    "list as image": json.dumps(stored("user", {"image": {"base64_image": [SECRET]}})),
    "result without origin": json.dumps(stored("tool", {"tool_call_result": {}})),
    "content is a number": json.dumps({**stored("user"), "content": 5}),
    "deeper than Python": '{"role": "user", "meta": ' + "[" * 200_000,
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_text_among_many_is_named_by_its_index_and_not_quoted(damaged):
    with pytest.raises(MessageDecodingError) as refusal:
        decode_messages([GOOD] * 7 + [damaged] + [GOOD] * 3)
    assert "essage 7 " in str(refusal.value)
    assert SECRET not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__


def test_of_nothing_nothing_is_made():
    assert decode_messages([]) == []
