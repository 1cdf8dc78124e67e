# SPDX-License-Identifier: Apache-2.0
"""A batch of messages on its way to the engine: each gets its id, and becomes text."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import validation
from haystack_chat_store.codec import encode_message
from haystack_chat_store.ids import MESSAGE_ID_KEY, new_message_id
from haystack_chat_store.json_values import parse_json
from haystack_chat_store.stores.conflicts import duplicate_in_batch
from haystack_chat_store.stores.previews import beginning_of
from haystack_chat_store.stores.rows import EncodedMessage, MessageRow
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP

# The cost of encoding one value, in characters of text that take as long to encode.
_CHARACTERS_PER_VALUE = 100


@dataclass(frozen=True)
class CheckedWrite:
    """
    The checked arguments of `write_messages` or `replace_messages`.

    :param named: The messages to store, each with its name in errors, such as `messages[2]`.
    """

    chat_history_id: str
    named: list[tuple[str, ChatMessage]]
    policy: DuplicatePolicy
    expected_revision: int | None
    strict: bool


def encoded_messages(write: CheckedWrite) -> list[EncodedMessage]:
    """
    Give each message its id, and encode it.

    Of several messages with the same id, the first counts or, with the policy OVERWRITE, the last. FAIL refuses them.
    """
    encoded: dict[str, EncodedMessage] = {}
    for name, message in write.named:
        own_id = message.meta.get(MESSAGE_ID_KEY)
        if own_id is None:
            message_id = new_message_id()
        else:
            message_id = validation.validated_id(own_id, f"{name}.meta[{MESSAGE_ID_KEY!r}]")
        content = encode_message(message, message_id, name, strict=write.strict)
        if message_id in encoded:
            if write.policy is DuplicatePolicy.FAIL:
                raise duplicate_in_batch(name, message_id)
            if write.policy is DuplicatePolicy.SKIP:
                continue
        encoded[message_id] = EncodedMessage(
            message_id=message_id,
            role=message.role.value,
            content=content,
            has_caller_id=own_id is not None,
            text=beginning_of(message),
        )
    return list(encoded.values())


def work_to_encode(write: CheckedWrite) -> int:
    """
    Estimate the cost of encoding, as a number of characters.

    Counting stops as soon as the number is too large for the event loop.
    """
    work, left = 0, [part for _, message in write.named for part in (message.meta, *message._content)]
    while left and work <= MAX_CHARACTERS_ON_LOOP:
        value = left.pop()
        inside: Collection[Any] = ()
        if isinstance(value, (str, bytes)):
            work += len(value)
        elif isinstance(value, Mapping):
            inside = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = value
        else:
            inside = getattr(value, "__dict__", {}).values()
        work += _CHARACTERS_PER_VALUE * (1 + len(inside))
        if work <= MAX_CHARACTERS_ON_LOOP:
            left += inside
    return work


def may_be_stored(write: CheckedWrite, encoded: Sequence[EncodedMessage]) -> bool:
    """Whether a write may be a repeated one, whose messages are stored already: the caller has given all ids."""
    is_skipping = write.policy is DuplicatePolicy.SKIP
    return bool(encoded) and is_skipping and all(message.has_caller_id for message in encoded)


def is_equal_without_meta(message: EncodedMessage, rows: Sequence[MessageRow]) -> bool:
    """
    Whether a stored message equals another one, apart from their meta.

    :param rows: The stored message at the position that the other one was found at. It may be deleted by now.
    """
    if not rows or rows[0].message_id != message.message_id:
        return False
    try:
        given, stored = ({**parse_json(content), "meta": None} for content in (message.content, rows[0].content))
    except (ValueError, TypeError, RecursionError):  # the stored one is damaged
        return False
    return bool(given == stored)
