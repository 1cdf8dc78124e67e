# SPDX-License-Identifier: Apache-2.0
"""
How tool calls and their results find each other.

An **exchange** is an assistant message with tool calls and the tool messages that directly follow it. Model providers
accept a tool result nowhere else. Calls and results are paired within one exchange, by call id or, where there is none,
by tool name and arguments: ids may be missing, and may repeat from one exchange to the next.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult


def answers_of(messages: Sequence[ChatMessage], index: int) -> Sequence[ChatMessage]:
    """
    Return the tool messages that belong to the exchange which begins at `index`, if one begins there.
    """
    end = index + 1
    while end < len(messages) and messages[end].role is ChatRole.TOOL:
        end += 1
    if end == index + 1 or messages[index].role is not ChatRole.ASSISTANT or not messages[index].tool_calls:
        return ()
    return messages[index + 1 : end]


def pairs_of(message: ChatMessage, answers: Sequence[ChatMessage]) -> list[tuple[int, int, int]]:
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


def with_tool_parts(message: ChatMessage, places: Collection[int]) -> ChatMessage | None:
    """
    Return the message with only those of its tool calls and results that stand at `places`, and without blank texts.

    :param places: Places in the message's content.
    :returns: The message itself if nothing has to go, `None` if what remains says nothing to a model.
    """
    if message.role == ChatRole.TOOL and not places:
        return None
    content = [
        part
        for place, part in enumerate(message._content)
        if place in places or not (isinstance(part, (ToolCall, ToolCallResult)) or _is_blank(part))
    ]
    # Providers want reasoning followed by the text or call it led to.
    if all(isinstance(part, ReasoningContent) for part in content):
        return None
    return message if len(content) == len(message._content) else replace(message, _content=content)


def _is_blank(part: Any) -> bool:
    # Providers refuse blank texts, also beside other parts.
    return isinstance(part, TextContent) and not str(part.text or "").strip()
