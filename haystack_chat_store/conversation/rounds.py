# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations, as pure functions over lists of messages, without any database.

A **round** begins at each user message and lasts until the next one. It may contain tool calls, their results, and
replies with or without text. (Haystack's compaction calls a round a turn.) The messages before the first user message,
such as a greeting or a system message, are the **preamble**.

A model is shown a window of a history (`last_rounds`). In it, the messages of each question stand together
(`in_question_order`). How the window is shown is said in `shown`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult

from haystack_chat_store.conversation.tool_calls import answers_of, results_of_calls
from haystack_chat_store.ids import message_id_of, question_id_of

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
    return [index for index, message in enumerate(messages) if message._role is ChatRole.USER]


def round_count(messages: Sequence[ChatMessage]) -> int:
    """Return the number of messages at which rounds begin."""
    return [message._role for message in messages].count(ChatRole.USER)


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
    answers = answers_of(messages, first) if first < start else ()
    positions = [first + 1 + place for place, answer in enumerate(answers) for _ in answer.tool_call_results]
    results = [result for answer in answers for result in answer.tool_call_results]
    paired = results_of_calls(messages[first].tool_calls, results) if answers else []
    is_split = any(index is not None and positions[index] >= start for index in paired)
    return list(messages[first if is_split else start :])


def question_groups(history: Sequence[ChatMessage], *, with_strays: bool = True) -> list[list[ChatMessage]]:
    """
    Group the messages of each question together, behind their question.

    Agents that run at the same time on one history store their messages interleaved. Each message that a run produced
    names its question in `meta["chat_question_id"]`, and joins the group of that question. A message that names no
    question stays where it is: a user message begins a group, any other message joins the group of the message before
    it.

    A **stray** names a question that does not come before it: the question was removed, or the window begins after it.
    A user message (which a hook added) begins a group then. Any other stray joins the group of the message before it.
    But if it stands in the middle of what another run said, it is left out.

    :param history: A window of a history, oldest first.
    :param with_strays: Whether strays join the group of the message before them. Defaults to True.
    :returns: The preamble, which may be empty, and then the groups in the order of their first messages. Each group is
        a round, as the model sees it.
    """
    questions = [question_id_of(message) for message in history]
    last_of_run = {question: place for place, question in enumerate(questions)}
    group: list[ChatMessage] = []
    groups = [group]
    group_of: dict[str | int, list[ChatMessage]] = {}

    for place, (message, question) in enumerate(zip(history, questions, strict=True)):
        if question in group_of:
            group = group_of[question]
        elif message.role is ChatRole.USER:
            group = []
            groups.append(group)
        elif question is not None:
            run_goes_on = bool(group) and last_of_run.get(message_id_of(group[0]) or "", -1) > place
            if run_goes_on or not with_strays:
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

    A history in which no message names another question than the one before it stays as it is.

    :param history: A window of a history, oldest first.
    """
    if _is_in_question_order(history):
        return list(history)
    return [message for group in question_groups(history) for message in group]


def _is_in_question_order(history: Sequence[ChatMessage]) -> bool:
    """Whether each message that names a question stands behind it, as in most histories: no two runs interleaved."""
    last = None
    for message in history:
        question = question_id_of(message)
        if question is not None and (message._role is ChatRole.USER or question != last):
            return False
        if message._role is ChatRole.USER:
            last = message_id_of(message)
    return True


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
    questions = [at for at in range(index + 1) if is_question(messages[at]) and question_id_of(messages[at]) is None]
    named = [at for at in questions if question_id is not None and message_id_of(messages[at]) == question_id]
    return max(named or questions, default=None)


def is_question(message: ChatMessage) -> bool:
    """Whether this is a user message that says something."""
    return message.role is ChatRole.USER and bool(said_parts(message))


def said_parts(message: ChatMessage) -> list[Any]:
    """
    Return the parts of a message without those that its role cannot have, and without blank texts.

    Providers refuse blank texts, even beside other parts.
    """
    role = message._role
    return [part for part in message._content if not _cannot_be_said(role, part)]


def _cannot_be_said(role: ChatRole, part: Any) -> bool:
    if isinstance(part, TextContent):
        return not str(part.text or "").strip()
    if isinstance(part, (ToolCall, ReasoningContent)):
        return role is not ChatRole.ASSISTANT
    return isinstance(part, ToolCallResult)  # its exchange shows it


def is_alternative(reply: ChatMessage) -> bool:
    """Whether a model gave the reply besides a first one: its `meta["index"]` is greater than 0."""
    index = reply.meta.get("index")
    return reply.role is ChatRole.ASSISTANT and isinstance(index, int) and index > 0
