# SPDX-License-Identifier: Apache-2.0
"""
What is left of a turn that a run began: whether it was finished and, if not, where to go on.
"""

from collections.abc import Sequence

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.rounds import MESSAGE_ID_KEY, QUESTION_ID_KEY

# Why a model may end without a whole reply. Haystack ends the run then, too.
_CUT_SHORT = ("length", "content_filter")


def up_to_turn(messages: Sequence[ChatMessage], question_id: str | None) -> list[ChatMessage]:
    """
    Return the messages up to the end of a question's turn.

    :param messages: The messages of a history, in the order of questions.
    :param question_id: The question's id; `None` if nobody has asked.
    """
    is_in_turn = False
    for index, message in enumerate(messages):
        belongs = question_id in (message.meta.get(MESSAGE_ID_KEY), message.meta.get(QUESTION_ID_KEY))
        if is_in_turn and message.role is ChatRole.USER and not belongs:
            return list(messages[:index])
        is_in_turn = is_in_turn or belongs
    return list(messages)


def exit_reason(messages: Sequence[ChatMessage], exit_conditions: Sequence[str]) -> str | None:
    """
    Return why the last turn ended, in the words of an agent's `exit_reason`, or `None` if it was interrupted.

    :param messages: The messages up to the turn's end.
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
    return "text" if last.text or last.images or last.files else None


def without_open_step(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Return the messages without a step at their end that has no results yet. The model will take it again.
    """
    end = len(messages)
    while end > 0 and messages[end - 1].tool_calls:
        end -= 1
    return list(messages[:end])
