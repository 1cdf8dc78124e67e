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

# Where Haystack's Gemini generator keeps, in a message's meta, what Gemini wants back with the parts of the message.
_SIGNATURES_KEY = "thought_signatures"


def answers_of(messages: Sequence[ChatMessage], index: int) -> Sequence[ChatMessage]:
    """
    Return the tool messages that belong to the exchange which begins at `index`, if one begins there.
    """
    if messages[index].role is not ChatRole.ASSISTANT or not messages[index].tool_calls:
        return ()
    end = index + 1
    while end < len(messages) and messages[end].role is ChatRole.TOOL:
        end += 1
    return messages[index + 1 : end]


def pairs_of(message: ChatMessage, answers: Sequence[ChatMessage]) -> list[tuple[int, int, int]]:
    """
    Pair the tool calls of a message with their results: each call with one result, each result with one call.

    :returns: For each pair the call's place in the message's content, which of the answers holds the result, and the
        result's place in that answer's content.
    """
    by_id: dict[str, int] = {}
    without_id: list[tuple[int, ToolCall]] = []
    for place, part in enumerate(message._content):
        if isinstance(part, ToolCall):
            if part.id:
                # A second call with the same id could not be told from the first: providers want them unique.
                by_id.setdefault(part.id, place)
            else:
                without_id.append((place, part))
    pairs: list[tuple[int, int, int]] = []
    for position, answer in enumerate(answers):
        for place, part in enumerate(answer._content):
            if isinstance(part, ToolCallResult):
                call = by_id.pop(part.origin.id, None) if part.origin.id else _taken(without_id, part.origin)
                if call is not None:
                    pairs.append((call, position, place))
    return pairs


def _taken(without_id: list[tuple[int, ToolCall]], origin: ToolCall) -> int | None:
    """
    Take the first call that is the same out of the list, and return its place.
    """
    for index, (place, call) in enumerate(without_id):
        if (origin.tool_name, origin.arguments) == (call.tool_name, call.arguments):
            del without_id[index]
            return place
    return None


def without_rejected_parts(message: ChatMessage, paired: Collection[int]) -> ChatMessage:
    """
    Return the message without blank texts, and with only those of its tool calls and results that are in a pair.

    What the provider needs only together with a call goes with it: Gemini's signatures, which name parts by their
    place, and, when no call is left, the reasoning. (OpenAI refuses reasoning without the call that it led to, and a
    call without the reasoning that led to it.)

    :param paired: The places of these calls and results in the message's content.
    :returns: The message itself if nothing has to go.
    """
    content = [
        part
        for place, part in enumerate(message._content)
        if place in paired or not (isinstance(part, (ToolCall, ToolCallResult)) or _is_blank(part))
    ]
    if len(content) == len(message._content):
        return message
    calls_left = sum(isinstance(part, ToolCall) for part in content)
    if calls_left == len(message.tool_calls):
        return replace(message, _content=content)
    if not calls_left:
        content = [part for part in content if not isinstance(part, ReasoningContent)]
    meta = {key: value for key, value in message.meta.items() if key != _SIGNATURES_KEY}
    return replace(message, _content=content, _meta=meta)


def says_something(message: ChatMessage) -> bool:
    """
    Whether there is anything in the message for a model: of a tool a result, of all others more than reasoning.
    """
    if message.role is ChatRole.TOOL:
        return bool(message.tool_call_results)
    # Providers want reasoning followed by the text or call it led to.
    return not all(isinstance(part, ReasoningContent) for part in message._content)


def _is_blank(part: Any) -> bool:
    # Providers refuse blank texts, also beside other parts.
    return isinstance(part, TextContent) and not str(part.text or "").strip()
