# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations, as pure functions over lists of messages. They know no database.

A **round** begins at each user message and lasts until the next one, whatever comes in between: tool calls, their
results, replies with or without text. This is what Haystack's own compaction calls a turn. Messages before the first
user message (a greeting, a system message) are the **preamble**.

What a model is shown of a history is a window of it (`last_rounds`), with the messages of each question together
(`in_question_order`), around it the messages of this turn (`with_current_messages`), without what a model would reject
(`valid_for_model`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.exchanges import answers_of, pairs_of, with_tool_parts

#: Where a stored message keeps its id, in its `meta`. The same key as in haystack-experimental.
MESSAGE_ID_KEY = "chat_message_id"

#: Where a message that an agent's run produced keeps the id of the user message that it was produced for.
QUESTION_ID_KEY = "chat_question_id"

#: What `last_k` counts.
LastKUnit = Literal["round", "message"]


@dataclass(frozen=True)
class Window:
    """
    The end of a history that a call wants to read.

    :param unit: What `count` and `step` count: rounds or single messages.
    :param count: How many of them, newest last; at least 1. `None` for the whole history.
    :param step: The window's start moves only when so many have come, so that it holds up to `step - 1` more of them.
    """

    unit: LastKUnit
    count: int | None
    step: int = 1

    def size(self, total: int) -> int:
        """
        Return how many of the newest rounds or messages the window holds. If that is more than there are, everything.

        :param total: How many there are in the history.
        """
        if self.count is None:
            return total + 1
        return self.count + max(total - self.count, 0) % self.step


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


def validate_window_step(window_step: Any) -> None:
    """
    Refuse what cannot be a `window_step`.

    :param window_step: A number of rounds or messages.
    :raises ValueError: If `window_step` is not an integer of 1 or more.
    """
    if not isinstance(window_step, int) or isinstance(window_step, bool):
        raise ValueError(f"window_step must be an integer, got {type(window_step).__name__}.")
    if window_step < 1:
        raise ValueError(f"window_step must be 1 or greater, got {window_step}.")


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


def round_starts(messages: Sequence[ChatMessage]) -> list[int]:
    """
    Return where the rounds begin.
    """
    return [index for index, message in enumerate(messages) if message.role is ChatRole.USER]


def last_rounds(messages: Sequence[ChatMessage], window: Window) -> list[ChatMessage]:
    """
    Return the rounds in the window, with the preamble if there are fewer of them than the window holds.

    :param messages: A whole history, oldest first.
    :param window: A window that counts rounds.
    """
    starts = round_starts(messages)
    size = window.size(len(starts))
    return list(messages[starts[-size] if size <= len(starts) else 0 :])


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
    while first > 0 and messages[first].role is ChatRole.TOOL:
        first -= 1
    pairs = pairs_of(messages[first], answers_of(messages, first)) if messages else []
    is_split = any(first < start <= first + 1 + answer for _, answer, _ in pairs)
    return list(messages[first if is_split else start :])


def in_question_order(history: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Put the messages that were produced for a question together behind it, one question after the other.

    Agents that run at the same time on one history store their messages interleaved. Each message that a run produced
    names its question in `meta["chat_question_id"]`: it joins the group of that question. A message without such a mark
    stays where it is: a user message begins a group, any other joins the group of the message before it. A marked
    message whose question does not stand before it is left out, unless it is a user message (which a hook added): that
    one begins the group. Groups come in the order of their first messages. A history without marks stays as it is.

    :param history: A window of a history, oldest first.
    """
    preamble: list[ChatMessage] = []
    groups = [preamble]
    group = preamble
    group_of: dict[str | int, list[ChatMessage]] = {}
    for message in history:
        question = _id_in(message, QUESTION_ID_KEY)
        if question in group_of:
            group = group_of[question]
        elif message.role is ChatRole.USER:
            group = []
            groups.append(group)
        elif question is not None:
            continue
        group.append(message)
        if message.role is ChatRole.USER:
            for key in (question, _id_in(message, MESSAGE_ID_KEY)):
                if key is not None:
                    group_of[key] = group
    return [message for group in groups for message in group]


def with_current_messages(history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Put the messages of this turn around a window of history: their system messages before it, all others after it.

    What the history has is not repeated after it: a message with the id of one in the history, and, since
    `current_messages` may be a transcript that is longer than the window, one that has an id and stands before such a
    message. A system message stands first even if the history has it too.

    :param history: The window, oldest first.
    :param current_messages: The messages of this turn.
    """
    system, shown, rest = _around(history, current_messages)
    return [*system, *shown, *rest]


def valid_for_model(history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage] = ()) -> list[ChatMessage]:
    """
    Put the messages of this turn around a window of history, and leave out what model providers reject.

    That is: tool calls without a result, and results that answer no call, paired within one exchange (of a message with
    text and several calls only the unanswered calls go); messages that say nothing, such as blank texts; and, of the
    history, assistant and tool messages before its first user message, for the user has to speak first. All other
    messages are returned as they are. Results in `current_messages` count as answers to calls in the history.

    :param history: A window of a conversation, oldest first. Neither the list nor its messages are changed.
    :param current_messages: The messages of this turn, to go around it as `with_current_messages` says.
    """
    system, shown, rest = _around(history, current_messages)
    messages = [*system, *_from_first_user(shown), *rest]
    valid: list[ChatMessage | None] = []
    index = 0
    while index < len(messages):
        answers = answers_of(messages, index)
        pairs = pairs_of(messages[index], answers) if answers else []
        valid.append(with_tool_parts(messages[index], {call for call, _, _ in pairs}))
        for position, answer in enumerate(answers):
            valid.append(with_tool_parts(answer, {result for _, where, result in pairs if where == position}))
        index += 1 + len(answers)
    return [message for message in valid if message is not None]


def _around(
    history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage]
) -> tuple[list[ChatMessage], list[ChatMessage], list[ChatMessage]]:
    """
    Return what `with_current_messages` puts together: what comes before the history, the history, what comes after it.
    """
    system = [message for message in current_messages if message.role is ChatRole.SYSTEM]
    others = [message for message in current_messages if message.role is not ChatRole.SYSTEM]
    brought = {_id_in(message, MESSAGE_ID_KEY) for message in system} - {None}
    shown = [message for message in history if not brought or _id_in(message, MESSAGE_ID_KEY) not in brought]
    ends = {_id_in(message, MESSAGE_ID_KEY): end for end, message in enumerate(others, 1)}
    ends.pop(None, None)
    known = max((ends.get(_id_in(message, MESSAGE_ID_KEY), 0) for message in shown), default=0) if ends else 0
    without_id = [message for message in others[:known] if _id_in(message, MESSAGE_ID_KEY) is None]
    return system, shown, without_id + others[known:]


def _from_first_user(history: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Leave out the assistant and tool messages that come before the first user message that says something.
    """
    for index, message in enumerate(history):
        if message.role is ChatRole.USER and with_tool_parts(message, ()):
            return [*(message for message in history[:index] if message.role is ChatRole.SYSTEM), *history[index:]]
    return [message for message in history if message.role is ChatRole.SYSTEM]


def _id_in(message: ChatMessage, key: str) -> str | int | None:
    """
    Return an id in the meta of a message that nobody has validated, `None` if it is none.
    """
    value = message.meta.get(key)
    return value if value and isinstance(value, (str, int)) else None
