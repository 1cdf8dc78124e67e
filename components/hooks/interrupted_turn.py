# SPDX-License-Identifier: Apache-2.0
"""Finds a turn that a run began, and tells whether it was completed and, if not, where to go on."""

from collections.abc import Sequence
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.conversation.provider_content import is_paused, refusal_of
from haystack_chat_store.conversation.rounds import is_question, question_groups
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY

# The finish reasons of incomplete replies. Haystack ends the run after them, too.
_INCOMPLETE_REPLY = ("length", "content_filter")


def turn_of(messages: Sequence[ChatMessage], question_id: str | None) -> list[ChatMessage]:
    """
    Return the messages of a turn, its question first. Blank user messages are not questions.

    :param messages: The end of a history.
    :param question_id: The id of the turn's question, or `None` for the last turn.
    :returns: The messages. The list is empty if the turn is not found.
    """
    preamble, *rounds = question_groups(messages, with_strays=False)
    turns = [turn for turn in rounds if is_question(turn[0])]
    if question_id is None:
        return turns[-1] if turns else preamble
    return next((turn for turn in turns if question_id in (_message_id(turn[0]), _question_id(turn[0]))), [])


def is_whole(turn: Sequence[ChatMessage]) -> bool:
    """Whether a turn begins with its question, not with a user message that a hook added later."""
    return bool(turn) and turn[0].role is ChatRole.USER and _question_id(turn[0]) is None


def before_turn(messages: Sequence[ChatMessage], turn: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Return the messages before a turn.

    :param messages: The end of a history. It may begin in the middle of the turn, or after it.
    :param turn: A turn of the same history.
    """
    # Messages are compared as a whole, because a store of another package may not keep ids.
    starts = [index for index, message in enumerate(messages) if message == turn[0]]
    return list(messages[: starts[-1]]) if starts else []


def exit_reason(messages: Sequence[ChatMessage], exit_conditions: Sequence[str]) -> str | None:
    """
    Return the `exit_reason` of a completed turn, or `None` if the turn was interrupted.

    :param messages: The messages of the turn.
    :param exit_conditions: The agent's `exit_conditions`. A turn ends with one of these tools, unless a tool failed.
    """
    results = []
    for message in reversed(messages):
        if message.role is not ChatRole.TOOL:
            break
        results += message.tool_call_results
    if results:
        exits = [result for result in reversed(results) if result.origin.tool_name in exit_conditions]
        return exits[0].origin.tool_name if exits and not any(result.error for result in exits) else None

    last = messages[-1] if messages else None
    if last is None or last.role is not ChatRole.ASSISTANT or last.tool_calls:
        return None
    if last.meta.get("finish_reason") in _INCOMPLETE_REPLY:
        return str(last.meta["finish_reason"])
    return "text" if (last.text or refusal_of(last)) and not is_paused(last) else None


def _message_id(message: ChatMessage) -> Any:
    return message.meta.get(MESSAGE_ID_KEY)


def _question_id(message: ChatMessage) -> Any:
    return message.meta.get(QUESTION_ID_KEY)
