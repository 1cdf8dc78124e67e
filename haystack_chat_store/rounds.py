# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations, as pure functions over lists of messages, without any database.

A **round** begins at each user message and lasts until the next one. It may contain tool calls, their results, and
replies with or without text. (Haystack's compaction calls a round a turn.) The messages before the first user message,
such as a greeting or a system message, are the **preamble**.

A model is shown a window of a history (`last_rounds`). In it, the messages of each question stand together
(`in_question_order`). The messages of this turn go around it (`split_system_history_current`). Messages that a model
would reject are left out (`valid_for_model`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.ids import message_id_of, question_id_of
from haystack_chat_store.tool_calls import answers_of, pairs_of, says_something, without_rejected_parts

#: What `last_k` counts.
LastKUnit = Literal["round", "message"]


@dataclass(frozen=True)
class Window:
    """
    The part at the end of a history that a call reads.

    :param unit: The unit of `count` and `step`: `"round"` or `"message"`.
    :param count: The number of rounds or messages, at least 1. `None` for the whole history.
    :param step: The start of the window moves only in steps of this many rounds or messages, so the window holds up to
        `step - 1` more than `count`. Defaults to 1.
    """

    unit: LastKUnit
    count: int | None
    step: int = 1

    def size(self, total: int) -> int:
        """
        Return how many of the newest rounds or messages the window holds.

        :param total: The number of rounds or messages in the history.
        :returns: A number. If it is greater than `total`, the window holds the whole history.
        """
        if self.count is None:
            return total + 1
        return self.count + max(total - self.count, 0) % self.step


def window_start(roles: Sequence[str], window: Window) -> tuple[int, int]:
    """
    Return where a window of a history begins, and the window's size.

    With the unit `"round"`, the window begins at the `size`-th last user message. If the history has fewer user
    messages, the window holds the whole history. With the unit `"message"`, the window holds the last `size` messages.
    If the first of these is a tool message, the window begins at the nearest message before it that is not a tool
    message.

    Every engine follows this rule, in its own language.

    :param roles: The roles of all messages of the history, oldest first.
    :param window: The window to read.
    :returns: An index into `roles`, and the number of rounds or messages in the window (see `Window.size`).
    """
    if window.count is None:
        return 0, len(roles)
    if window.unit == "round":
        starts = [index for index, role in enumerate(roles) if role == ChatRole.USER.value]
        size = window.size(len(starts))
        return (starts[-size] if size <= len(starts) else 0), size
    size = window.size(len(roles))
    start = max(len(roles) - size, 0)
    while start > 0 and roles[start] == ChatRole.TOOL.value:
        start -= 1
    return start, size


def round_starts(messages: Sequence[ChatMessage]) -> list[int]:
    """Return the indexes of the messages at which rounds begin."""
    return [index for index, message in enumerate(messages) if message.role is ChatRole.USER]


def last_rounds(messages: Sequence[ChatMessage], window: Window) -> list[ChatMessage]:
    """
    Return the rounds in the window. If the history has fewer rounds than the window holds, include the preamble.

    :param messages: A whole history, oldest first.
    :param window: A window that counts rounds.
    """
    starts = round_starts(messages)
    size = window.size(len(starts))
    return list(messages[starts[-size] if size <= len(starts) else 0 :])


def last_messages(messages: Sequence[ChatMessage], count: int) -> list[ChatMessage]:
    """
    Return the last `count` messages, and more if a tool result would otherwise come without its call.

    :param messages: A history, oldest first. Its end is enough, if it begins no later than the exchange in which the
        last `count` messages begin.
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


def question_groups(history: Sequence[ChatMessage]) -> list[list[ChatMessage]]:
    """
    Group the messages of each question together, behind their question.

    Agents that run at the same time on one history store their messages interleaved. Each message that a run produced
    names its question in `meta["chat_question_id"]`, and joins the group of that question. If its question does not
    come before it, the message is left out; but if it is a user message (which a hook added), it begins the group.
    A message that names no question stays where it is: a user message begins a group, any other message joins the group
    of the message before it.

    :param history: A window of a history, oldest first.
    :returns: The preamble, which may be empty, and then the groups in the order of their first messages. Each group is
        a round, as the model sees it.
    """
    group: list[ChatMessage] = []
    groups = [group]
    group_of: dict[str | int, list[ChatMessage]] = {}
    for message in history:
        question = question_id_of(message)
        if question in group_of:
            group = group_of[question]
        elif message.role is ChatRole.USER:
            group = []
            groups.append(group)
        elif question is not None:
            continue
        group.append(message)
        if message.role is ChatRole.USER:
            for key in (question, message_id_of(message)):
                if key is not None:
                    group_of[key] = group
    return groups


def in_question_order(history: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Return the messages of each question together, one question after the other, as `question_groups` groups them.

    A history in which no message names its question stays as it is.

    :param history: A window of a history, oldest first.
    """
    return [message for group in question_groups(history) for message in group]


def question_of(messages: Sequence[ChatMessage], index: int) -> int | None:
    """
    Return the index of the question that a message belongs to.

    A message belongs to the question that it names. If it names none, or one that is not among the messages, it belongs
    to the nearest question before it. Blank user messages are not questions.

    :param messages: The messages of a history, oldest first.
    :param index: The message's index.
    :returns: The question's index, at most `index`, or `None` if no question is found.
    """
    question_id = question_id_of(messages[index])
    questions = [at for at in range(index + 1) if _is_question(messages[at]) and question_id_of(messages[at]) is None]
    named = [at for at in questions if question_id is not None and message_id_of(messages[at]) == question_id]
    return max(named or questions, default=None)


class Parts(NamedTuple):
    """
    The messages that a model is shown: first `system`, then `history`, then `current`.

    :param system: The system messages of this turn.
    :param history: The window of the history, without the messages in `system`.
    :param current: The other messages of this turn that are not in the history.
    """

    system: list[ChatMessage]
    history: list[ChatMessage]
    current: list[ChatMessage]


def split_system_history_current(history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage]) -> Parts:
    """
    Split what a model is shown into system messages, history and current messages, without repetitions.

    A message of this turn is left out if the history has its id. `current_messages` may be a transcript that is longer
    than the window, so a message that has an id and stands before such a message is left out, too. A system message
    that stands in both is taken from `current_messages`.

    :param history: The window, oldest first.
    :param current_messages: The messages of this turn.
    :returns: The objects that were passed in, not copies.
    """
    system = [message for message in current_messages if message.role is ChatRole.SYSTEM]
    others = [message for message in current_messages if message.role is not ChatRole.SYSTEM]
    system_ids = {message_id_of(message) for message in system} - {None}
    shown = [message for message in history if not system_ids or message_id_of(message) not in system_ids]
    ends = {message_id_of(message): end for end, message in enumerate(others, 1)}
    ends.pop(None, None)
    known = max((ends.get(message_id_of(message), 0) for message in shown), default=0) if ends else 0
    without_id = [message for message in others[:known] if message_id_of(message) is None]
    return Parts(system, shown, without_id + others[known:])


def valid_for_model(history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage] = ()) -> list[ChatMessage]:
    """
    Put the messages of this turn around a window of history, and leave out what model providers reject.

    Left out are:

    - tool calls without a result, and results without a call, paired within one exchange. Only the unanswered calls of
      a message are left out, with what the provider accepts only together with them; its text stays;
    - messages that say nothing, such as blank texts;
    - assistant and tool messages before the first user message of the history, because the user must speak first.

    All other messages are returned as they are. Results in `current_messages` answer calls in the history.

    :param history: A window of a history, oldest first. Neither the list nor its messages are changed.
    :param current_messages: The messages of this turn. See `split_system_history_current` for where they go.
    """
    system, shown, current = split_system_history_current(history, current_messages)
    messages = [*system, *_from_first_user(shown), *current]
    valid: list[ChatMessage] = []
    index = 0
    while index < len(messages):
        answers = answers_of(messages, index)
        paired_calls: set[int] = set()
        paired_results: list[set[int]] = [set() for _ in answers]
        for call, position, result in pairs_of(messages[index], answers):
            paired_calls.add(call)
            paired_results[position].add(result)
        valid += map(without_rejected_parts, [messages[index], *answers], [paired_calls, *paired_results])
        index += 1 + len(answers)
    return [message for message in valid if says_something(message)]


def _from_first_user(history: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Leave out the assistant and tool messages before the first question."""
    for index, message in enumerate(history):
        if _is_question(message):
            return [*(message for message in history[:index] if message.role is ChatRole.SYSTEM), *history[index:]]
    return [message for message in history if message.role is ChatRole.SYSTEM]


def _is_question(message: ChatMessage) -> bool:
    """Whether this is a user message that is not blank."""
    return message.role is ChatRole.USER and says_something(without_rejected_parts(message, ()))
