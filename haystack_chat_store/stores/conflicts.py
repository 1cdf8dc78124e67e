# SPDX-License-Identifier: Apache-2.0
"""Plans a write to a history that already has some of the messages, and creates the errors of refused calls."""

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
    The changes that a write makes to a history.

    :param new: The messages to append.
    :param replaced: The messages that replace stored messages, each under the stored message's key.
    """

    new: list[EncodedMessage]
    replaced: dict[Any, EncodedMessage]


def planned(messages: Sequence[EncodedMessage], known: Mapping[str, Any], policy: DuplicatePolicy) -> Plan:
    """
    Plan the write of a batch.

    :param messages: The batch. All ids are different.
    :param known: The ids of the batch that the history already has. Each maps to the stored message's key, which the
        engine chooses.
    :param policy: Decides about messages whose ids are known: SKIP, OVERWRITE or FAIL.
    :raises DuplicateMessageError: If an id is known, and the policy is FAIL.
    """
    if known and policy is DuplicatePolicy.FAIL:
        raise duplicate(next(iter(known)))
    new = [message for message in messages if message.message_id not in known]
    if policy is not DuplicatePolicy.OVERWRITE:
        return Plan(new, {})
    return Plan(new, {known[message.message_id]: message for message in messages if message.message_id in known})


def check_count(expected_count: int | None, count: int) -> None:
    """
    Check that a history has the number of messages that a call expects.

    :param expected_count: The expected number, or `None` for any number.
    :param count: The number of messages that the history has.
    :raises ChatHistoryChangedError: If the numbers differ.
    """
    if expected_count not in (None, count):
        raise ChatHistoryChangedError(
            f"The history has {count} messages, not {expected_count} as expected. Nothing was written. Read the new "
            "messages, then write again with the new expected_count."
        )


def duplicate(message_id: str) -> DuplicateMessageError:
    """Return the error of a write with the policy FAIL and an id that the history already has."""
    return DuplicateMessageError(f"The history already has a message with the id {message_id!r}. Nothing was written.")


def duplicate_in_batch(name: str, message_id: str) -> DuplicateMessageError:
    """Return the error of a write with the policy FAIL whose batch has an id twice."""
    return DuplicateMessageError(f"{name} has the id {message_id!r} of a message before it. Nothing was written.")


def message_not_found(message_id: str) -> MessageNotFoundError:
    """Return the error of a call with the id of a message that the history does not have."""
    return MessageNotFoundError(f"The history has no message with the id {message_id!r}. Nothing was changed.")


def history_not_found(chat_history_id: str) -> ChatHistoryNotFoundError:
    """Return the error of a call that requires an existing history."""
    return ChatHistoryNotFoundError(f"There is no chat history {chat_history_id!r}.")


def history_exists(chat_history_id: str) -> ChatHistoryChangedError:
    """Return the error of an import that expected a new history."""
    return ChatHistoryChangedError(f"The chat history {chat_history_id!r} exists by now. Nothing was imported.")


def history_has_messages(chat_history_id: str) -> ChatHistoryExistsError:
    """Return the error of a copy to a history that has messages."""
    return ChatHistoryExistsError(
        f"The chat history {chat_history_id!r} already has messages. Nothing was copied. Copy to another history."
    )
