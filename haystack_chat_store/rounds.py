# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations, as pure functions over lists of messages. They know no database.

A **round** begins at each user message and lasts until the next one, whatever comes in between: tool calls, their
results, replies with or without text. This is what Haystack's own compaction calls a turn. Messages before the first
user message (a greeting, a system message) are the **preamble**.

An **exchange** is an assistant message with tool calls and the tool messages that directly follow it. Model providers
accept a tool result nowhere else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

#: Where a stored message keeps its id, in its `meta`. The same key as in haystack-experimental.
MESSAGE_ID_KEY = "chat_message_id"

#: What `last_k` counts.
LastKUnit = Literal["round", "message"]


@dataclass(frozen=True)
class Window:
    """
    The end of a history that a call wants to read.

    :param unit: What `count` counts: rounds or single messages.
    :param count: How many of them, newest last; at least 1. `None` for the whole history.
    """

    unit: LastKUnit
    count: int | None


def validate_last_k(last_k: Any) -> None:
    """
    Refuse what cannot be a `last_k`.

    :param last_k: A number of rounds or messages, or `None`.
    :raises ValueError: If `last_k` is neither `None` nor an integer of 0 or more.
    """
    if last_k is None:
        return
    if not isinstance(last_k, int) or isinstance(last_k, bool):
        raise ValueError(f"last_k must be an integer or None, got {type(last_k).__name__}.")
    if last_k < 0:
        raise ValueError(f"last_k must be 0 or greater, got {last_k}.")


def validated_messages(messages: Any, name: str = "messages") -> list[ChatMessage]:
    """
    Return an iterable of messages as a list, whole.

    :param messages: A list or other iterable.
    :param name: What errors call it.
    :raises ValueError: If it is nothing of the kind, or one of its items is no `ChatMessage`. It names the item.
    """
    if isinstance(messages, (str, bytes, bytearray, dict)) or not isinstance(messages, Iterable):
        raise ValueError(f"{name} must be a list of ChatMessages, got {type(messages).__name__}.")
    listed = list(messages)
    for index, message in enumerate(listed):
        if not isinstance(message, ChatMessage):
            raise ValueError(f"{name}[{index}] must be a ChatMessage, got {type(message).__name__}.")
        if not isinstance(message.role, ChatRole) or not isinstance(message.meta, dict):
            raise ValueError(f"{name}[{index}] must have a ChatRole as role and a dict as meta.")
        if not isinstance(message._content, Sequence):
            raise ValueError(f"{name}[{index}] must have a list of parts as content.")
    return listed


def last_messages(messages: Sequence[ChatMessage], count: int) -> list[ChatMessage]:
    """
    Return the last `count` messages, and as many before them as it takes for no tool result to come without its call.

    :param messages: A history, oldest first, or any end of it that begins at or before the exchange in which the last
        `count` messages begin.
    :param count: The number of messages, 0 or more.
    """
    if count == 0:
        return []
    start = max(len(messages) - count, 0)
    first = start
    while first > 0 and messages[first].role == ChatRole.TOOL:
        first -= 1
    pairs = _pairs(messages[first], _answers(messages, first)) if messages else []
    is_split = any(first < start <= first + 1 + answer for _, answer, _ in pairs)
    return list(messages[first if is_split else start :])


def with_current_messages(history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Put the messages of this turn around a window of history: their system messages before it, all others after it.

    A message that `current_messages` bring along with its id is not repeated from the history.

    :param history: The window, oldest first.
    :param current_messages: The messages of this turn.
    """
    # A list, for these ids have not been validated and may be anything, even unhashable.
    current_ids = [message.meta[MESSAGE_ID_KEY] for message in current_messages if message.meta.get(MESSAGE_ID_KEY)]
    return [
        *(message for message in current_messages if message.role == ChatRole.SYSTEM),
        *(message for message in history if message.meta.get(MESSAGE_ID_KEY) not in current_ids),
        *(message for message in current_messages if message.role != ChatRole.SYSTEM),
    ]


def valid_for_model(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Return the messages without unanswered tool calls and without tool results that answer no call.

    Model providers reject a conversation that holds either. Calls and results are paired within one exchange, by call
    id or, where there is none, by tool name and arguments: ids may be missing, and may repeat from one exchange to the
    next. Of a message with text and several calls only the unanswered calls go; a message with nothing else to say is
    left out whole. All other messages are returned as they are.

    :param messages: A window of a conversation, oldest first. Neither the list nor its messages are changed.
    """
    valid: list[ChatMessage | None] = []
    index = 0
    while index < len(messages):
        answers = _answers(messages, index)
        pairs = _pairs(messages[index], answers)
        valid.append(_with_tool_parts(messages[index], {call for call, _, _ in pairs}))
        for position, answer in enumerate(answers):
            valid.append(_with_tool_parts(answer, {result for _, where, result in pairs if where == position}))
        index += 1 + len(answers)
    return [message for message in valid if message is not None]


def _answers(messages: Sequence[ChatMessage], index: int) -> Sequence[ChatMessage]:
    """
    Return the tool messages that belong to the exchange which begins at `index`, if one begins there.
    """
    if not (messages[index].role == ChatRole.ASSISTANT and messages[index].tool_calls):
        return ()
    end = index + 1
    while end < len(messages) and messages[end].role == ChatRole.TOOL:
        end += 1
    return messages[index + 1 : end]


def _pairs(message: ChatMessage, answers: Sequence[ChatMessage]) -> list[tuple[int, int, int]]:
    """
    Pair the tool calls of a message with their results: each call with one result, each result with one call.

    :returns: For each pair the call's place in the message's content, which of the answers holds the result, and the
        result's place in that answer's content.
    """
    waiting: dict[int, ToolCall] = {}
    for place, part in enumerate(message._content):
        # A second call with the same id could not be told from the first: providers want ids unique in a message.
        if isinstance(part, ToolCall) and not (part.id and part.id in [call.id for call in waiting.values()]):
            waiting[place] = part
    pairs: list[tuple[int, int, int]] = []
    for position, answer in enumerate(answers):
        for place, part in enumerate(answer._content):
            if isinstance(part, ToolCallResult):
                call = next((call for call, asked in waiting.items() if _is_answer(part.origin, asked)), None)
                if call is not None:
                    del waiting[call]
                    pairs.append((call, position, place))
    return pairs


def _is_answer(origin: ToolCall, call: ToolCall) -> bool:
    if not origin.id and not call.id:
        return (origin.tool_name, origin.arguments) == (call.tool_name, call.arguments)
    return origin.id == call.id


def _with_tool_parts(message: ChatMessage, places: set[int]) -> ChatMessage | None:
    """
    Return the message with only those of its tool calls and results that stand at `places` in its content.

    :returns: The message itself if nothing has to go, `None` if what remains says nothing to a model.
    """
    content = [
        part
        for place, part in enumerate(message._content)
        if place in places or not isinstance(part, (ToolCall, ToolCallResult))
    ]
    if message.role == ChatRole.TOOL and not places:
        return None
    if len(content) == len(message._content):
        return message
    if all(map(_says_nothing, content)):
        return None
    return replace(message, _content=content)


def _says_nothing(part: Any) -> bool:
    # Providers refuse blank texts, and want reasoning followed by the text or call it led to.
    return isinstance(part, ReasoningContent) or (isinstance(part, TextContent) and not str(part.text or "").strip())
