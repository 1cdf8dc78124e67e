# SPDX-License-Identifier: Apache-2.0
"""
Pairs tool calls with their results.

An **exchange** is an assistant message with tool calls and the tool messages that directly follow it. Model providers
accept a tool result nowhere else. Calls and results are paired within one exchange: by call id or, if the call has no
id, by tool name and arguments. Some providers give no ids, and ids may repeat from one exchange to the next.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

# In this key of a message's meta, Haystack's Gemini generator keeps the signatures that Gemini expects back with the
# message's parts.
_SIGNATURES_KEY = "thought_signatures"


def answers_of(messages: Sequence[ChatMessage], index: int) -> Sequence[ChatMessage]:
    """Return the tool messages of the exchange that begins at `index`. If none begins there, the result is empty."""
    if messages[index].role is not ChatRole.ASSISTANT or not messages[index].tool_calls:
        return ()
    end = index + 1
    while end < len(messages) and messages[end].role is ChatRole.TOOL:
        end += 1
    return messages[index + 1 : end]


def pairs_of(message: ChatMessage, answers: Sequence[ChatMessage]) -> list[tuple[int, int, int]]:
    """
    Pair the tool calls of a message with their results: each call with one result, each result with one call.

    :param message: An assistant message.
    :param answers: The tool messages of its exchange.
    :returns: For each pair: the call's index in the message's content, the index of the answer that holds the result,
        and the result's index in that answer's content.
    """
    by_id: dict[str, int] = {}
    without_id: list[tuple[int, ToolCall]] = []
    for place, part in enumerate(message._content):
        if isinstance(part, ToolCall):
            if part.id:
                # Providers want unique call ids, so a second call with the same id is left unpaired.
                by_id.setdefault(part.id, place)
            else:
                without_id.append((place, part))
    pairs: list[tuple[int, int, int]] = []
    for position, answer in enumerate(answers):
        for place, part in enumerate(answer._content):
            if isinstance(part, ToolCallResult):
                call = by_id.pop(part.origin.id, None) if part.origin.id else _pop_equal(without_id, part.origin)
                if call is not None:
                    pairs.append((call, position, place))
    return pairs


def _pop_equal(without_id: list[tuple[int, ToolCall]], origin: ToolCall) -> int | None:
    """
    Remove the first call with the same tool name and arguments from the list, and return its index in the content.
    """
    for index, (place, call) in enumerate(without_id):
        if (origin.tool_name, origin.arguments) == (call.tool_name, call.arguments):
            del without_id[index]
            return place
    return None


def without_rejected_parts(message: ChatMessage, paired: Collection[int]) -> ChatMessage:
    """
    Return the message without blank texts and without unpaired tool calls and results.

    If a call is removed, Gemini's signatures are removed, too, because they refer to parts by index. If no call is
    left, the reasoning is removed: OpenAI refuses reasoning without the call that it led to, and a call without the
    reasoning that led to it.

    :param message: The message. It is not changed.
    :param paired: The indexes of the paired calls and results in the message's content.
    :returns: A new message, or the message itself if nothing is removed.
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
    Whether the message has content for a model: a result in a tool message, more than reasoning in any other message.
    """
    if message.role is ChatRole.TOOL:
        return bool(message.tool_call_results)
    # Providers refuse reasoning without the text or call that it led to.
    return not all(isinstance(part, ReasoningContent) for part in message._content)


def _is_blank(part: Any) -> bool:
    # Providers refuse blank texts, even beside other parts.
    return isinstance(part, TextContent) and not str(part.text or "").strip()
