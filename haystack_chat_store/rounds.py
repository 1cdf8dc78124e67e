# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations, as pure functions over lists of messages. They know no database.

A **round** begins at each user message and lasts until the next one, whatever comes in between: tool calls, their
results, replies with or without text. This is what Haystack's own compaction calls a turn. Messages before the first
user message (a greeting, a system message) are the **preamble**.

What a model is shown of a history is a window of it (`last_rounds`), with the messages of each question together
(`in_question_order`), around it the messages of this turn (`parted`), without what a model would reject
(`valid_for_model`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.exchanges import answers_of, pairs_of, says_something, without_rejected_parts
from haystack_chat_store.ids import message_id_of, question_id_of

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


def window_start(roles: Sequence[str], window: Window) -> tuple[int, int]:
    """
    Return where a window of a history begins, and the window's size.

    With the unit `"round"`, the window begins at the `size`-th last user message, or holds everything if there are
    fewer. With the unit `"message"`, it holds the last `size` messages; if the first of these is a tool message, they
    are preceded by what comes before it, up to and including the nearest message that is not one.

    This is the rule that every engine follows, in its own language.

    :param roles: The roles of all messages of the history, oldest first.
    :param window: What is wanted.
    :returns: An index into `roles`, and how many rounds or messages the window holds (see `Window.size`).
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


def question_groups(history: Sequence[ChatMessage]) -> list[list[ChatMessage]]:
    """
    Put the messages that were produced for a question together behind it.

    Agents that run at the same time on one history store their messages interleaved. Each message that a run produced
    names its question in `meta["chat_question_id"]`: it joins the group of that question. A message without such a mark
    stays where it is: a user message begins a group, any other joins the group of the message before it. A marked
    message whose question does not stand before it is left out, unless it is a user message (which a hook added): that
    one begins the group.

    :param history: A window of a history, oldest first.
    :returns: The preamble, which may be empty, and the groups in the order of their first messages. Each is a round, as
        the model sees it.
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
    Return the messages of each question together, one question after the other, as `question_groups` puts them.

    A history without marks stays as it is.

    :param history: A window of a history, oldest first.
    """
    return [message for group in question_groups(history) for message in group]


def question_of(messages: Sequence[ChatMessage], index: int) -> int | None:
    """
    Return where the question stands that a message belongs to, by its mark or, without one, by its place.

    :param messages: The messages of a history, oldest first.
    :param index: The message's index.
    :returns: An index that is not greater. Of a marked message whose question is not among the messages, it is the
        nearest question before it; `None` if there is none either. Who says nothing asks nothing.
    """
    mark = question_id_of(messages[index])
    questions = [at for at in range(index + 1) if _asks(messages[at]) and question_id_of(messages[at]) is None]
    own = [at for at in questions if mark is not None and message_id_of(messages[at]) == mark]
    return max(own or questions, default=None)


class Parts(NamedTuple):
    """
    What a model is shown: `system` first, then `history`, then `current`.

    :param system: The system messages of this turn.
    :param history: The window of the history.
    :param current: All other messages of this turn that are not in the history.
    """

    system: list[ChatMessage]
    history: list[ChatMessage]
    current: list[ChatMessage]


def parted(history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage]) -> Parts:
    """
    Tell what is shown from where: the messages of this turn go around the history, and what it has is not repeated.

    Not repeated is a message with the id of one in the history, nor, since `current_messages` may be a transcript that
    is longer than the window, one that has an id and stands before such a message. A system message is taken from
    `current_messages` even if the history has it too. All messages are the objects passed in.

    :param history: The window, oldest first.
    :param current_messages: The messages of this turn.
    """
    system = [message for message in current_messages if message.role is ChatRole.SYSTEM]
    others = [message for message in current_messages if message.role is not ChatRole.SYSTEM]
    brought = {message_id_of(message) for message in system} - {None}
    shown = [message for message in history if not brought or message_id_of(message) not in brought]
    ends = {message_id_of(message): end for end, message in enumerate(others, 1)}
    ends.pop(None, None)
    known = max((ends.get(message_id_of(message), 0) for message in shown), default=0) if ends else 0
    without_id = [message for message in others[:known] if message_id_of(message) is None]
    return Parts(system, shown, without_id + others[known:])


def valid_for_model(history: Sequence[ChatMessage], current_messages: Sequence[ChatMessage] = ()) -> list[ChatMessage]:
    """
    Put the messages of this turn around a window of history, and leave out what model providers reject.

    That is: tool calls without a result, and results that answer no call, paired within one exchange (of a message with
    text and several calls only the unanswered calls go, with what the provider wants only together with them); messages
    that say nothing, such as blank texts; and, of the history, assistant and tool messages before its first user
    message, for the user has to speak first. All other messages are returned as they are. Results in `current_messages`
    count as answers to calls in the history.

    :param history: A window of a conversation, oldest first. Neither the list nor its messages are changed.
    :param current_messages: The messages of this turn, to go around it as `parted` says.
    """
    system, shown, current = parted(history, current_messages)
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
    """
    Leave out the assistant and tool messages that come before the first user message that says something.
    """
    for index, message in enumerate(history):
        if _asks(message):
            return [*(message for message in history[:index] if message.role is ChatRole.SYSTEM), *history[index:]]
    return [message for message in history if message.role is ChatRole.SYSTEM]


def _asks(message: ChatMessage) -> bool:
    return message.role is ChatRole.USER and says_something(without_rejected_parts(message, ()))
