# SPDX-License-Identifier: Apache-2.0
"""
The rules of turns: which messages belong to one, whether it is answered, and where it goes on if it was interrupted.

A turn is a round while it happens: a question, and what answers it. It is known by the id of its question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.conversation.provider_content import is_paused, refusal_of
from haystack_chat_store.conversation.rounds import is_alternative, is_question, question_groups
from haystack_chat_store.ids import (
    MESSAGE_ID_KEY,
    QUESTION_ID_KEY,
    is_reply_id,
    message_id_of,
    new_message_id,
    question_id_of,
)
from haystack_chat_store.validation import validated_id, validated_messages

# The finish reasons of incomplete replies. Haystack ends the run after them, too.
_INCOMPLETE_REPLY = ("length", "content_filter")


def with_message_ids(messages: Iterable[ChatMessage]) -> list[ChatMessage]:
    """
    Return copies of messages that carry ids, so that writing them can be repeated without storing them twice.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore, with_message_ids

    store = InMemoryChatMessageStore()
    turn = with_message_ids([ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    print(store.write_messages("user_456", turn))  # 2
    print(store.write_messages("user_456", turn))  # 0
    ```

    :param messages: A list or other iterable of `ChatMessage`s. They are not changed.
    :returns: The copies, each with an id in `meta["chat_message_id"]`. A message that has an id keeps it.
    :raises ValueError: If an item is not a `ChatMessage`, or its id is not valid.
    """
    return [
        replace(message, _meta={**message.meta, MESSAGE_ID_KEY: _valid_id(message, index)})
        for index, message in enumerate(validated_messages(messages))
    ]


def _valid_id(message: ChatMessage, index: int) -> str:
    own_id = message.meta.get(MESSAGE_ID_KEY)
    if own_id is None:
        return new_message_id()
    return validated_id(own_id, f"messages[{index}].meta[{MESSAGE_ID_KEY!r}]")


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

    :param messages: The end of a history.
    :param turn: A turn of the same history, its question first.
    :returns: The messages. The list is empty if the question is not among `messages`.
    """
    # Messages are compared as a whole, because a store of another package may not keep ids.
    starts = [index for index, message in enumerate(messages) if message == turn[0]]
    return list(messages[: starts[-1]]) if starts else []


def last_question(messages: Sequence[ChatMessage]) -> ChatMessage | None:
    """Return the last question. A user message that a hook added is none."""
    return next((each for each in reversed(messages) if is_question(each) and question_id_of(each) is None), None)


def validate_question(messages: Sequence[ChatMessage], name: str) -> None:
    """
    Check that the messages of a turn say something, if a user message is among them.

    A reply to a user message that says nothing would pass for a reply to the question before it.

    :param messages: The messages of a turn. There may be no user message: then the turn before goes on.
    :param name: The name of the argument.
    :raises ValueError: If there are user messages, and none of them says anything.
    """
    asked = [
        index for index, each in enumerate(messages) if each.role is ChatRole.USER and question_id_of(each) is None
    ]
    if asked and last_question(messages) is None:
        raise ValueError(
            f"{name}[{asked[-1]}] says nothing: a question needs a text that is not blank, an image or a file. Nothing "
            "was written."
        )


def up_to_turn(messages: Sequence[ChatMessage], question_id: str | int) -> tuple[list[ChatMessage], list[ChatMessage]]:
    """
    Return the messages before a turn, and the messages of the turn. What other turns have said since is left out.

    So are answers to questions that are not among the messages: they would pass for answers to another question.

    :param messages: The end of a history, oldest first.
    :param question_id: The id of the turn's question.
    :returns: Both in question order. If the turn is not found, all messages as they are, and an empty list.
    """
    if all(message_id_of(message) != question_id for message in messages):
        return list(messages), []
    groups = question_groups(messages, with_strays=False)
    place = next((at for at, group in enumerate(groups) if group and message_id_of(group[0]) == question_id), None)
    if place is None:
        return list(messages), []
    return [message for group in groups[:place] for message in group], groups[place]


def answers_to_others(messages: Sequence[ChatMessage], from_message_id: str) -> list[ChatMessage]:
    """
    Return the messages after a message that belong to questions before it, other than its own.

    Turns at the same moment are stored mixed. If the end of a history is replaced, these messages stay with their
    questions.

    :param messages: The end of a history, oldest first.
    :param from_message_id: The id of the message.
    :returns: The messages. A question that one of them names may be gone.
    """
    ids = [message_id_of(message) for message in messages]
    if from_message_id not in ids:
        return []
    first, *after = messages[ids.index(from_message_id) :]
    own_id = question_id_of(first)
    if own_id is None and first.role is not ChatRole.USER:
        return []
    own = {None, own_id, *ids[ids.index(from_message_id) :]}
    return [message for message in after if question_id_of(message) not in own]


def answer_of(turn: Sequence[ChatMessage]) -> ChatMessage | None:
    """
    Return the answer of a turn: its last reply, if the turn ends with it. `None` if it is not answered yet.

    A reply of an agent that calls tools is a step, and not an answer. A reply that `ChatMessageWriter` stored is an
    answer even if it calls tools, because the application runs them. Of alternative replies, the first is the answer.

    :param turn: The messages of the turn, its question first.
    """
    replies = list(turn[1:])
    while replies and is_alternative(replies[-1]) and len(replies) > 1 and replies[-2].role is ChatRole.ASSISTANT:
        replies.pop()
    if not replies or replies[-1].role is not ChatRole.ASSISTANT:
        return None
    reply, question_id = replies[-1], message_id_of(turn[0])
    is_by_writer = question_id is not None and is_reply_id(message_id_of(reply), question_id)
    is_written_with_calls = bool(reply.tool_calls) and is_by_writer
    return reply if is_written_with_calls or exit_reason(replies, ()) is not None else None


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
