# SPDX-License-Identifier: Apache-2.0
"""
Messages for tests: conversations made from a line of letters, a sample of each kind of message, and strategies.

The functions in the last section are hypothesis strategies for property tests.
"""

import base64
from collections.abc import Sequence
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
from hypothesis import strategies as st

from haystack_chat_store.ids import MESSAGE_ID_KEY

#: An integer of 4,301 digits. Every store refuses it, anywhere in a message.
TOO_LONG = 10**4300

# ------------------------------------------------------------------ conversations


def conversation(roles: str) -> list[ChatMessage]:
    """
    Make a conversation from a line of letters, one for each message. Blanks are ignored.

    `u` is a user message, `a` an assistant's, `s` a system message, `c` a tool call, `d` two tool calls, `e` an empty
    reply of the assistant, and `t` a tool's result. A `t` answers the next call of the `c` or `d` before it. Without
    such a call, it is an orphan: its call was never stored. `positions` returns the places of retrieved messages in the
    line.

    :param roles: The letters, such as `"a uctta ua"`.
    """
    made: list[ChatMessage] = []
    waiting: list[ToolCall] = []
    for position, role in enumerate(roles.replace(" ", "")):
        meta = {"position": position}
        if role in "cd":
            waiting = [ToolCall("search", {"q": position}, id=f"call_{position}_{n}") for n in range("_cd".index(role))]
            made.append(ChatMessage.from_assistant(tool_calls=waiting, meta=meta))
        elif role == "t":
            call = waiting[0] if waiting else ToolCall("search", {}, id=f"never_asked_{position}")
            waiting = waiting[1:]
            made.append(ChatMessage.from_tool(f"result {position}", origin=call, meta=meta))
        else:
            waiting = []
            content = [] if role == "e" else [TextContent(f"text {position}")]
            made.append(ChatMessage(_ROLES[role], content, None, meta))
    return made


_ROLES = {"u": ChatRole.USER, "a": ChatRole.ASSISTANT, "e": ChatRole.ASSISTANT, "s": ChatRole.SYSTEM}


def positions(messages: Sequence[ChatMessage]) -> list[int]:
    """Return the place of each message in its `conversation`."""
    return [message.meta["position"] for message in messages]


def expected_rounds(messages: Sequence[ChatMessage], last_k: int | None, window_step: int = 1) -> list[ChatMessage]:
    """
    Return the messages that a store must return if it counts rounds. This model works on a plain list.

    :param messages: The whole history, oldest first.
    :param last_k: The number of rounds, or `None` for all.
    :param window_step: The number of new rounds after which the window's start moves.
    """
    rounds: list[list[ChatMessage]] = []
    preamble: list[ChatMessage] = []
    for message in messages:
        if message.role == ChatRole.USER:
            rounds.append([])
        (rounds[-1] if rounds else preamble).append(message)
    if last_k is None or last_k > len(rounds):
        return list(messages)
    start = _expected_start(len(rounds), last_k, window_step)
    return [message for one_round in rounds[start:] for message in one_round]


def expected_messages(messages: Sequence[ChatMessage], last_k: int | None, window_step: int = 1) -> list[ChatMessage]:
    """
    Return the messages that a store must return if it counts messages. This model works on a plain list.

    :param messages: The whole history, oldest first: a `conversation`.
    :param last_k: The number of messages, or `None` for all.
    :param window_step: The number of new messages after which the window's start moves.
    """
    asked_at = {call.id: index for index, message in enumerate(messages) for call in message.tool_calls}
    start = 0 if last_k is None else _expected_start(len(messages), last_k, window_step)
    answered = [result.origin.id for message in messages[start:] for result in message.tool_call_results]
    return list(messages[min([start, *(asked_at[call] for call in answered if call in asked_at)]) :])


def _expected_start(total: int, last_k: int, window_step: int) -> int:
    if last_k == 0:
        return total
    start = 0
    while start + window_step + last_k <= total:
        start += window_step
    return start


def user(text: str = "Hello", **meta: Any) -> ChatMessage:
    """Make a user message."""
    return ChatMessage.from_user(text, meta=meta)


def with_id(message_id: Any, text: str = "Hello") -> ChatMessage:
    """Make a user message with an id, which may be invalid."""
    return user(text, **{MESSAGE_ID_KEY: message_id})


# ------------------------------------------------------------------ one of each kind

_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_PDF = base64.b64encode(b"%PDF-1.4\n%%EOF").decode()


def sample_messages() -> dict[str, ChatMessage]:
    """Return samples by name: each kind of message in Haystack, and unusual messages of models and tools."""
    call = ToolCall("weather", {"city": "Zürich", "days": [1, 2.5, None, True, {"unit": "°C"}]}, id="call_1")
    bare_call = ToolCall("now", {})
    image = ImageContent(_PNG, "image/png", detail="low", meta={"width": 1})
    file = FileContent(_PDF, "application/pdf", filename="Bericht №1.pdf", extra={"pages": [1, 2]})
    reasoning = ReasoningContent("First, …", extra={"signature": "c2ln", "parts": [{"type": "summary"}]})
    extra_call = ToolCall("weather", {"city": ""}, id="", extra={"thought_signature": "c2ln", "index": 0})
    nested_meta = {"usage": {"tokens": {"in": 1, "out": [2, 3]}}, "": {"": [[], {}, [[]]]}, "none": None, "no": False}
    return {
        "user text": ChatMessage.from_user("Grüezi 👋"),
        "empty text": ChatMessage.from_user(""),
        "system": ChatMessage.from_system("Be kind."),
        "assistant text": ChatMessage.from_assistant("Hello."),
        "no content": ChatMessage(ChatRole.ASSISTANT, []),
        "no text": ChatMessage.from_assistant(),
        "several texts": ChatMessage.from_user(content_parts=["one", "", "two"]),
        "image": ChatMessage.from_user(content_parts=["What is this?", image]),
        "not an image": ChatMessage.from_user(content_parts=[ImageContent("no base64!", validation=False)]),
        "file": ChatMessage.from_user(content_parts=[file, "Summarize."]),
        "bare file": ChatMessage.from_user(content_parts=[FileContent("", validation=False)]),
        "reasoning": ChatMessage.from_assistant("So …", reasoning=reasoning),
        "reasoning only": ChatMessage.from_assistant(reasoning="Hm."),
        "reasoning and calls": ChatMessage.from_assistant(reasoning=reasoning, tool_calls=[call, extra_call]),
        "text and calls": ChatMessage.from_assistant("Let me look.", tool_calls=[call, bare_call]),
        "call without id": ChatMessage.from_assistant(tool_calls=[bare_call]),
        "call with extra": ChatMessage.from_assistant(tool_calls=[extra_call]),
        "result": ChatMessage.from_tool("22 °C", origin=call),
        "empty result": ChatMessage.from_tool("", origin=bare_call),
        "failed result": ChatMessage.from_tool("Error: no such city", origin=extra_call, error=True),
        "result in parts": ChatMessage.from_tool([TextContent("a map:"), image, file], origin=call),
        "result without parts": ChatMessage.from_tool([], origin=call),
        "several results": ChatMessage(
            ChatRole.TOOL, [ToolCallResult("1", call, False), ToolCallResult("2", bare_call, True)]
        ),
        "name": ChatMessage.from_user("Hi", name="Ada"),
        "empty name": ChatMessage.from_assistant("Hi", name=""),
        "meta": ChatMessage.from_assistant("Hi", meta=nested_meta),
    }


# ------------------------------------------------------------------ strategies


def texts() -> st.SearchStrategy[str]:
    """Text with any characters, NUL and lone surrogates included."""
    # A store returns a high and a low surrogate side by side as the one character that they encode.
    return st.text(st.characters(), max_size=30).map(
        lambda text: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    )


def json_values() -> st.SearchStrategy[Any]:
    """JSON values: nested, with integers of any size and finite floats."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts()
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3), max_leaves=8
    )


def json_objects() -> st.SearchStrategy[dict[str, Any]]:
    """Dicts of JSON values, as in `meta`, `extra` and `arguments`."""
    return st.dictionaries(texts(), json_values(), max_size=3)


def tool_calls() -> st.SearchStrategy[ToolCall]:
    """Tool calls with and without id and extra."""
    return st.builds(
        ToolCall, tool_name=texts(), arguments=json_objects(), id=st.none() | texts(), extra=st.none() | json_objects()
    )


def images() -> st.SearchStrategy[ImageContent]:
    """Images with and without validation."""
    return st.builds(
        ImageContent,
        base64_image=st.binary(max_size=30).map(_base64),
        mime_type=st.sampled_from(["image/png", "image/jpeg"]),
        detail=st.sampled_from([None, "auto", "high", "low"]),
        meta=json_objects(),
        validation=st.booleans(),
    )


def files() -> st.SearchStrategy[FileContent]:
    """Files with and without validation."""
    return st.builds(
        FileContent,
        base64_data=st.binary(max_size=30).map(_base64),
        mime_type=texts().filter(bool),
        filename=st.none() | texts(),
        extra=json_objects(),
        validation=st.booleans(),
    )


def tool_results() -> st.SearchStrategy[ToolCallResult]:
    """Results of tool calls, as text or as parts."""
    parts = st.lists(st.builds(TextContent, texts()) | images() | files(), max_size=3)
    return st.builds(ToolCallResult, result=texts() | parts, origin=tool_calls(), error=st.booleans())


def messages() -> st.SearchStrategy[ChatMessage]:
    """Messages of every role except system, without ids, with all kinds of parts that the role may have."""
    text = st.builds(TextContent, texts())
    reasoning = st.builds(ReasoningContent, texts(), json_objects())
    parts: dict[ChatRole, st.SearchStrategy[Any]] = {
        ChatRole.USER: text | images() | files(),
        ChatRole.ASSISTANT: text | reasoning | tool_calls(),
        ChatRole.TOOL: tool_results(),
    }
    return st.sampled_from(list(parts)).flatmap(
        lambda role: st.builds(
            ChatMessage,
            _role=st.just(role),
            _content=st.lists(parts[role], max_size=4),
            _name=st.none() | texts(),
            _meta=json_objects().filter(lambda meta: MESSAGE_ID_KEY not in meta),  # hypothesis tries names in the code
        )
    )


def conversations() -> st.SearchStrategy[str]:
    """Lines of letters for `conversation`: any sequence of roles, with tool results in any place."""
    return st.text("uuaacdtttse", max_size=25)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
