# SPDX-License-Identifier: Apache-2.0
"""The ids that messages carry in their `meta`."""

import os
import time
from collections.abc import Iterable
from dataclasses import replace

from haystack.dataclasses import ChatMessage

from haystack_chat_store import validation

#: The key of a message's id in its `meta`. haystack-experimental uses the same key.
MESSAGE_ID_KEY = "chat_message_id"

#: The key in the `meta` of a message that an agent's run produced: the id of the user message that the run answers.
QUESTION_ID_KEY = "chat_question_id"

#: The key in the `meta` of a message that is shown otherwise than it is stored. Such a message is never stored.
SHOWN_KEY = "chat_shown"


def new_message_id() -> str:
    """
    Return an id that is unique everywhere: 48 bits of time in milliseconds and 80 random bits, in 32 hex digits.

    Ids that begin with the time lie side by side in an index, so the index is smaller and appending to it is faster
    (the idea of UUID version 7, RFC 9562). The time is never read back: positions alone decide the order.
    """
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


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
        for index, message in enumerate(validation.validated_messages(messages))
    ]


def _valid_id(message: ChatMessage, index: int) -> str:
    own_id = message.meta.get(MESSAGE_ID_KEY)
    if own_id is None:
        return new_message_id()
    return validation.validated_id(own_id, f"messages[{index}].meta[{MESSAGE_ID_KEY!r}]")


def message_id_of(message: ChatMessage) -> str | int | None:
    """Return a message's id, or `None` if its meta has no usable id."""
    return _id_in(message, MESSAGE_ID_KEY)


def question_id_of(message: ChatMessage) -> str | int | None:
    """Return the id of the question that a message was produced for, or `None` if the message names no question."""
    return _id_in(message, QUESTION_ID_KEY)


def _id_in(message: ChatMessage, key: str) -> str | int | None:
    # The value is not validated yet: the message may come from a caller or from another package's store.
    value = message.meta.get(key)
    return value if value and isinstance(value, (str, int)) else None


def is_shown_only(message: ChatMessage) -> bool:
    """Whether the message is not as it is stored, but as a retriever or loader has shown it."""
    return bool(message.meta.get(SHOWN_KEY))
