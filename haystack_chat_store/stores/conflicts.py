# SPDX-License-Identifier: Apache-2.0
"""
What becomes of a write to a history that has some of its messages already, and how refusals are worded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    DuplicateMessageError,
    MessageNotFoundError,
)
from haystack_chat_store.stores.rows import EncodedMessage


@dataclass(frozen=True)
class Plan:
    """
    What a write does to a history.

    :param new: The messages to append.
    :param replaced: The messages that take the place of stored ones, each under the stored one's key.
    """

    new: list[EncodedMessage]
    replaced: dict[Any, EncodedMessage]


def planned(messages: Sequence[EncodedMessage], known: Mapping[str, Any], policy: DuplicatePolicy) -> Plan:
    """
    Return what to write of a batch.

    :param messages: The batch, no id twice.
    :param known: Those of its ids that the history has, each with a key of the engine's choice for the stored message.
    :param policy: What becomes of messages whose ids are known.
    :raises DuplicateMessageError: If there are any, and the policy is FAIL.
    """
    if known and policy is DuplicatePolicy.FAIL:
        raise duplicate(next(iter(known)))
    new = [message for message in messages if message.message_id not in known]
    if policy is not DuplicatePolicy.OVERWRITE:
        return Plan(new, {})
    return Plan(new, {known[message.message_id]: message for message in messages if message.message_id in known})


def check_count(expected_count: int | None, count: int) -> None:
    """
    Check that a history has as many messages as a call expects.

    :param expected_count: The expected number, or `None` for any.
    :param count: How many messages the history has.
    :raises ChatHistoryChangedError: If the numbers differ.
    """
    if expected_count not in (None, count):
        raise ChatHistoryChangedError(
            f"The history has {count} messages now, and not {expected_count} as expected. Nothing was written. Read "
            "what is new, then write again with the new count."
        )


def duplicate(message_id: str) -> DuplicateMessageError:
    """
    Return the error of a write under the policy FAIL whose id is there already.
    """
    return DuplicateMessageError(f"The history already has a message with the id {message_id!r}. Nothing was written.")


def message_not_found(message_id: str) -> MessageNotFoundError:
    """
    Return the error of a call that names a message which the history does not have.
    """
    return MessageNotFoundError(f"The history has no message with the id {message_id!r}. Nothing was changed.")


def history_not_found(chat_history_id: str) -> ChatHistoryNotFoundError:
    """
    Return the error of a call that needs a history which does not exist.
    """
    return ChatHistoryNotFoundError(f"There is no chat history {chat_history_id!r}.")


def history_exists(chat_history_id: str) -> ChatHistoryChangedError:
    """
    Return the error of an import of a new history that exists by now.
    """
    return ChatHistoryChangedError(f"The chat history {chat_history_id!r} exists by now. Nothing was imported.")


def history_has_messages(chat_history_id: str) -> ChatHistoryExistsError:
    """
    Return the error of a copy to a history that is not empty.
    """
    return ChatHistoryExistsError(f"The chat history {chat_history_id!r} has messages already. Nothing was copied.")
