# SPDX-License-Identifier: Apache-2.0
"""Plans a write to a history that already has some of the messages, and creates the errors of refused calls."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import (
    ChatHistoryAccessError,
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    DuplicateMessageError,
    MessageNotFoundError,
)
from haystack_chat_store.stores.rows import EncodedMessage, Scope


@dataclass(frozen=True)
class Plan:
    """
    The changes that a write makes to a history.

    :param new: The messages to append.
    :param replaced: The messages that replace stored messages, each under the stored message's key.
    """

    new: list[EncodedMessage]
    replaced: dict[Any, EncodedMessage]


def compares_contents(policy: DuplicatePolicy, expected_revision: int | None, revision: int) -> bool:
    """
    Whether `planned` needs to know which messages of a batch are stored already, equal.

    :param policy: SKIP, OVERWRITE or FAIL.
    :param expected_revision: The revision that the call expects, or `None` for any revision.
    :param revision: The revision of the history, 0 if it does not exist.
    """
    if policy is DuplicatePolicy.SKIP:
        return expected_revision not in (None, revision)
    return policy is DuplicatePolicy.OVERWRITE


def planned(
    messages: Sequence[EncodedMessage],
    known: Mapping[str, Any],
    equal: Collection[str],
    policy: DuplicatePolicy,
    expected_revision: int | None,
    revision: int,
) -> Plan:
    """
    Plan the write of a batch.

    :param messages: The batch. All ids are different.
    :param known: The ids of the batch that the history already has. Each maps to the stored message's key, which the
        engine chooses.
    :param equal: Those of the known ids whose stored messages equal the batch's, with the same role and content. They
        are needed only if `compares_contents` says so.
    :param policy: Decides about messages whose ids are known: SKIP, OVERWRITE or FAIL.
    :param expected_revision: The revision that the call expects, or `None` for any revision.
    :param revision: The revision of the history, 0 if it does not exist.
    :raises ChatHistoryChangedError: If the history has another revision, unless the whole batch is stored already.
    :raises DuplicateMessageError: If an id is known, and the policy is FAIL.
    """
    if equal and all(message.message_id in equal for message in messages):
        return Plan([], {})
    check_revision(expected_revision, revision)
    if known and policy is DuplicatePolicy.FAIL:
        raise duplicate(next(iter(known)))
    new = [message for message in messages if message.message_id not in known]
    if policy is not DuplicatePolicy.OVERWRITE:
        return Plan(new, {})
    different = [message for message in messages if message.message_id in known and message.message_id not in equal]
    return Plan(new, {known[message.message_id]: message for message in different})


def is_replaced_already(positions: Sequence[int | None], start: int, following: int) -> bool:
    """
    Whether a call of `replace_messages` finds what it would write: an earlier attempt has done its work.

    :param positions: Of each message of the batch, the position at which the history has it, or `None` if the history
        does not have it, or has another message with its id.
    :param start: The position of the message to take back or, if the history does not have it, of the last message of
        the batch.
    :param following: The number of messages that the history has at `start` and after it.
    """
    found = [position for position in positions if position is not None]
    if not found or len(found) < len(positions) or found != sorted(found):
        return False
    return sum(position >= start for position in found) == following


def check_revision(expected_revision: int | None, revision: int) -> None:
    """
    Check that a history has the revision that a call expects.

    :param expected_revision: The expected revision, or `None` for any revision.
    :param revision: The revision of the history, 0 if it does not exist.
    :raises ChatHistoryChangedError: If the two differ.
    """
    if expected_revision not in (None, revision):
        raise ChatHistoryChangedError(
            f"The history has revision {revision}{'' if revision else ' (it does not exist)'}, not {expected_revision} "
            "as expected. Nothing was changed. Read the history again, then repeat the call with its new revision."
        )


def check_access(scope: Scope, user_id: str | None) -> None:
    """
    Check that a write of a scope may change a history that exists.

    :param user_id: The user of the history, or `None`.
    :raises ChatHistoryAccessError: If the scope is that of another user.
    """
    if not scope.includes(user_id):
        raise no_access()


def check_same_user(user_id: str | None, target_user_id: str | None) -> None:
    """
    Check that the messages of a user's history may be added to a history that exists.

    :param user_id: The user of the messages, or `None`.
    :param target_user_id: The user of the history that exists, or `None`.
    :raises ChatHistoryAccessError: If they are a user's, and the history is not.
    """
    if user_id not in (None, target_user_id):
        raise other_user()


def other_user() -> ChatHistoryAccessError:
    """Return the error of a copy or an import that would give the messages of a user to another one, or to none."""
    return ChatHistoryAccessError("The messages and the chat history belong to different users. Nothing was changed.")


def no_access() -> ChatHistoryAccessError:
    """Return the error of a write to a history of another user. It says nothing about the history."""
    return ChatHistoryAccessError("This user has no access to the chat history. Nothing was changed.")


def only_one_user(what: str) -> ChatHistoryAccessError:
    """Return the error of a call that concerns other users than that of the store."""
    return ChatHistoryAccessError(f"A store of one user cannot {what}. Use the store without a user.")


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


def history_is_there(chat_history_id: str) -> ChatHistoryExistsError:
    """Return the error of a call that makes a history, or gives one another id, if there is a history with this id."""
    return ChatHistoryExistsError(f"There is a chat history {chat_history_id!r} already. Nothing was changed.")


def history_has_messages(chat_history_id: str) -> ChatHistoryExistsError:
    """Return the error of a copy to a history that has messages."""
    return ChatHistoryExistsError(
        f"The chat history {chat_history_id!r} already has messages. Nothing was copied. Copy to another history."
    )
