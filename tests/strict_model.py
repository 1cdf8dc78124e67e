# SPDX-License-Identifier: Apache-2.0
"""
What a strict model provider demands of a conversation, and a chat generator that demands it.

Written as a walk from message to message that keeps count of the open calls, with nothing from `haystack_chat_store`,
so that a mistake in its rules cannot hide in the check of them.
"""

import json
from collections import Counter
from collections.abc import Iterator

from haystack import component
from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall


def problems(messages: list[ChatMessage]) -> list[str]:
    """Return why a strict provider would refuse the conversation; nothing if it would not."""
    found: list[str] = []
    if [message.role for message in messages if message.role != ChatRole.SYSTEM][:1] not in ([], [ChatRole.USER]):
        found.append("somebody else speaks before the user")
    open_calls: Counter[str] = Counter()
    ids = [call.id for message in messages for call in message.tool_calls if call.id is not None]
    found += [f"the call id {call_id!r} comes twice" for call_id, times in Counter(ids).items() if times > 1]
    for index, message in enumerate(messages):
        found += [f"messages[{index}] {problem}" for problem in _own_problems(message)]
        for result in message.tool_call_results:
            if open_calls[call_key(result.origin)] == 0:
                found.append(f"messages[{index}] has a result without its call directly before")
            open_calls[call_key(result.origin)] -= 1
        if message.role != ChatRole.TOOL:
            if +open_calls:
                found.append(f"messages[{index}] comes before all calls are answered")
            open_calls = Counter(map(call_key, message.tool_calls))
    if +open_calls:
        found.append("the conversation ends before all calls are answered")
    return found


def problems_when_asked(messages: list[ChatMessage]) -> list[str]:
    """Return why a strict provider would refuse to answer the conversation, which has to be the model's turn, too."""
    found = problems(messages)
    if not any(message.role == ChatRole.USER for message in messages):
        found.append("no user has said anything")
    if messages and messages[-1].role == ChatRole.ASSISTANT:
        found.append("the conversation ends with the model's own words")
    return found


def _own_problems(message: ChatMessage) -> Iterator[str]:
    if any(isinstance(part, TextContent) and not part.text.strip() for part in message._content):
        yield "has a blank text"
    if all(isinstance(part, ReasoningContent) for part in message._content):
        yield "says nothing"
    if message.tool_calls and message.role != ChatRole.ASSISTANT:
        yield "is no assistant message but calls a tool"
    if bool(message.tool_call_results) != (message.role == ChatRole.TOOL):
        yield "is a tool message without a result, or has a result and is none"


def call_key(call: ToolCall) -> str:
    """Return what a call and its result have in common: the id or, without one, the tool and its arguments."""
    return json.dumps([call.id] if call.id is not None else [call.tool_name, call.arguments], sort_keys=True)


@component
class StrictChatGenerator:
    """Answers with all that the user has said so far, and raises if a strict provider would refuse to answer."""

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage]) -> dict[str, list[ChatMessage]]:
        found = problems_when_asked(messages)
        if found:
            raise ValueError(f"The model refuses the conversation: {'; '.join(found)}.")
        said = [message.text for message in messages if message.role == ChatRole.USER and message.text]
        return {"replies": [ChatMessage.from_assistant(f"You said: {', '.join(said)}.")]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(self, messages: list[ChatMessage]) -> dict[str, list[ChatMessage]]:
        return self.run(messages)
