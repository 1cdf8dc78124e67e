# SPDX-License-Identifier: Apache-2.0
"""
What is left of a turn that a run began: whether it was finished and, if not, where to go on.
"""

from collections.abc import Sequence
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY
from haystack_chat_store.rounds import question_groups, valid_for_model

# Why a model may end without a whole reply. Haystack ends the run then, too.
_CUT_SHORT = ("length", "content_filter")


def turn_of(messages: Sequence[ChatMessage], question_id: str | None) -> list[ChatMessage]:
    """
    Return the messages of a turn, its question first. Who says nothing, such as a blank text, asks nothing.

    :param messages: The end of a history.
    :param question_id: The id of the turn's question; `None` for the last turn.
    """
    preamble, *rounds = question_groups(messages)
    turns = [turn for turn in rounds if valid_for_model(turn[:1])]
    if question_id is None:
        return turns[-1] if turns else preamble
    return next((turn for turn in turns if question_id in (_own_id(turn[0]), _mark(turn[0]))), [])


def is_whole(turn: Sequence[ChatMessage]) -> bool:
    """
    Whether a turn begins with its question, and not with what a hook said for the user later.
    """
    return bool(turn) and turn[0].role is ChatRole.USER and _mark(turn[0]) is None


def before_turn(messages: Sequence[ChatMessage], turn: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Return what comes before a turn.

    :param messages: The end of a history. It may begin in the middle of the turn, or after it.
    :param turn: A turn of the same history.
    """
    # Not by their ids: somebody's store may keep none.
    starts = [index for index, message in enumerate(messages) if message == turn[0]]
    return list(messages[: starts[-1]]) if starts else []


def exit_reason(messages: Sequence[ChatMessage], exit_conditions: Sequence[str]) -> str | None:
    """
    Return why a turn ended, in the words of an agent's `exit_reason`, or `None` if it was interrupted.

    :param messages: The messages of the turn.
    :param exit_conditions: The agent's own: its turn ends with these tools, unless one of them failed.
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
    if last.meta.get("finish_reason") in _CUT_SHORT:
        return str(last.meta["finish_reason"])
    return "text" if last.text else None


def without_open_step(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Return the messages without a step at their end that has no results yet. The model will take it again.
    """
    end = len(messages)
    while end > 0 and messages[end - 1].tool_calls:
        end -= 1
    return list(messages[:end])


def _own_id(message: ChatMessage) -> Any:
    return message.meta.get(MESSAGE_ID_KEY)


def _mark(message: ChatMessage) -> Any:
    return message.meta.get(QUESTION_ID_KEY)
