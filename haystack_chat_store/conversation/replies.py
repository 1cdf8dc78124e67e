# SPDX-License-Identifier: Apache-2.0
"""Replies that follow each other: which of them a model is shown, and which as one."""

from collections.abc import Sequence
from typing import TypeAlias

from haystack.dataclasses import ChatMessage, ReasoningContent, TextContent, ToolCall, ToolCallResult

from haystack_chat_store.conversation import provider_content
from haystack_chat_store.conversation.copies import changed
from haystack_chat_store.conversation.media import with_joined_texts
from haystack_chat_store.conversation.rounds import is_alternative, said_parts

#: A result, and the message that it stands in.
Found: TypeAlias = tuple[ToolCallResult, ChatMessage]


def without_alternatives(replies: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    """Leave out the replies that a model gave besides the first: their `meta["index"]` is greater than 0."""
    if len(replies) == 1:
        return replies
    return [reply for place, reply in enumerate(replies) if place == 0 or not is_alternative(reply)]


def steps_of(replies: Sequence[ChatMessage], found: Sequence[Found | None], portable: bool) -> list[list[ChatMessage]]:
    """
    Group replies that follow each other into steps: a step is shown as one reply, with its results directly after it.

    A reply belongs to the step before it if a result of that step comes only after the reply: it is a part of the same
    reply of the model, which was stored apart. So are texts before a reply that calls tools, because Gemini takes calls
    only directly after a question or a result. Not so a reply that has provider content of its own, or an answer after
    calls without any result: the turn was interrupted, and went on.

    :param found: The result of each call of the replies.
    """
    steps: list[list[ChatMessage]] = []
    calls = 0  # of the last step
    answered = 0  # of these, how many have a result
    last_call = max((index for index, reply in enumerate(replies) if reply.tool_calls), default=-1)
    for index, reply in enumerate(replies):
        number = len(reply.tool_calls)
        is_part = bool(answered) if calls else index <= last_call
        if steps and calls and index <= last_call and not portable and provider_content.is_in(steps[-1][0]):
            is_part = True  # a model that reasons would have done so again
        has_own = provider_content.is_in(reply) or (not calls and bool(steps) and provider_content.is_in(steps[-1][0]))
        if steps and is_part and (portable or not has_own):
            steps[-1].append(reply)
        else:
            steps.append([reply])
            calls = answered = 0
        calls += number
        answered += sum(result is not None for result in found[:number])
        found = found[number:]
    return steps


def joined(messages: Sequence[ChatMessage]) -> ChatMessage:
    """
    Return one message for several of a role, with the meta of the first, and with their name if they have the same.

    Its texts become one, because some providers take only one. Calls come last.
    """
    content = [part for message in messages for part in said_parts(message)]
    texts = [part for part in content if isinstance(part, TextContent)]
    calls = [part for part in content if isinstance(part, ToolCall)]
    others = [part for part in content if not isinstance(part, (TextContent, ToolCall))]
    reasoning = [part for part in others if isinstance(part, ReasoningContent)]
    content = [*reasoning, *texts, *(part for part in others if part not in reasoning), *calls]
    names = {message._name for message in messages}
    name = messages[0]._name if len(names) == 1 else None
    return changed(messages[0], _content=with_joined_texts(content), _name=name)
