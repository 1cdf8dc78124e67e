# SPDX-License-Identifier: Apache-2.0
"""
The ids that messages carry in their `meta`.
"""

import os
import time

from haystack.dataclasses import ChatMessage

#: Where a stored message keeps its id, in its `meta`. The same key as in haystack-experimental.
MESSAGE_ID_KEY = "chat_message_id"

#: Where a message that an agent's run produced keeps the id of the user message that it was produced for.
QUESTION_ID_KEY = "chat_question_id"


def new_message_id() -> str:
    """
    Return an id that is unique everywhere: 48 bits of time in milliseconds and 80 random bits, in 32 hex digits.

    Ids that begin with the time lie side by side in an index, which makes it smaller and appending to it faster
    (the idea of UUID version 7, RFC 9562). Nothing reads the time back: positions alone decide the order.
    """
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def message_id_of(message: ChatMessage) -> str | int | None:
    """
    Return a message's own id, or `None` if its meta has no usable one.
    """
    return _id_in(message, MESSAGE_ID_KEY)


def question_id_of(message: ChatMessage) -> str | int | None:
    """
    Return the id of the question that a message was produced for, or `None` if it has no such mark.
    """
    return _id_in(message, QUESTION_ID_KEY)


def _id_in(message: ChatMessage, key: str) -> str | int | None:
    # These are not validated: the message may be the caller's, or come from another package's store.
    value = message.meta.get(key)
    return value if value and isinstance(value, (str, int)) else None
