# SPDX-License-Identifier: Apache-2.0
"""What a prompt is put together from: system messages, history, and what is new in this turn."""

from collections.abc import Sequence
from typing import NamedTuple

from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.ids import is_shown_only, message_id_of


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
    than the window, so a message that has an id and stands before such a message is left out, too. So is a message
    that was only shown, because it is not as it is stored. A system message that stands in both is taken from
    `current_messages`.

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
    return Parts(system, shown, [new for new in without_id + others[known:] if not is_shown_only(new)])
