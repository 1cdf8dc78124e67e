# SPDX-License-Identifier: Apache-2.0
"""The ids that messages carry in their `meta`."""

import hashlib
import os
import time

from haystack.dataclasses import ChatMessage

#: The key of a message's id in its `meta`. haystack-experimental uses the same key.
MESSAGE_ID_KEY = "chat_message_id"

#: The key in the `meta` of a reply and of all else that a turn produced: the id of the user message that it answers.
QUESTION_ID_KEY = "chat_question_id"

#: The longest id of a message or a history, in characters. Every engine can use it as a key.
MAX_ID_LENGTH = 512

# The ids of branches begin with up to this many characters of the history's id. The rest is left for what follows.
_READABLE_IN_BRANCH = 400

# The longest id of a question that stands in the ids of its replies. The rest is left for what comes after it.
_LONGEST_READABLE_ID = MAX_ID_LENGTH - 64

#: The key in the `meta` of a message that is shown otherwise than it is stored. Such a message is never stored.
SHOWN_KEY = "chat_shown"


#: The key in the `meta` of a question that came in a transcript: its place in the conversation, with a digest.
TRANSCRIPT_KEY = "chat_transcript"

#: The keys in the `meta` of messages that this package sets itself.
OWN_META_KEYS = frozenset({MESSAGE_ID_KEY, QUESTION_ID_KEY, SHOWN_KEY, TRANSCRIPT_KEY})

#: The key in the meta of a branch: the id of the history that it was copied from.
BRANCH_OF_KEY = "branch_of"


def new_message_id() -> str:
    """
    Return an id that is unique everywhere: 48 bits of time in milliseconds and 80 random bits, in 32 hex digits.

    Ids that begin with the time lie side by side in an index, so the index is smaller and appending to it is faster
    (the idea of UUID version 7, RFC 9562). The time is never read back: positions alone decide the order.
    """
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def reply_id(question_id: str | int, number: int, replaced_id: str | None = None) -> str:
    """
    Return the id of a reply to a question.

    It is the same at each call, so that a turn that is sent again is stored once. It begins with the question's id, so
    that both lie side by side in an index.

    :param question_id: The question's id.
    :param number: The number of the reply among those to this question, 0 for the first.
    :param replaced_id: The id of the message that is taken back for the reply and all before it in its batch. So no
        reply has the id of one that it takes the place of. Defaults to `None`: nothing is taken back.
    """
    return f"{_reply_prefix(question_id)}{number}{'' if replaced_id is None else ':' + _digest(replaced_id)}"


def is_reply_id(message_id: str | int | None, question_id: str | int) -> bool:
    """Whether `reply_id` made an id for a reply to this question."""
    return isinstance(message_id, str) and message_id.startswith(_reply_prefix(question_id))


def is_reply_id_instead_of(message_id: str | int | None, replaced_id: str) -> bool:
    """Whether `reply_id` made an id for a reply for which this message was taken back."""
    return isinstance(message_id, str) and message_id.endswith(":" + _digest(replaced_id))


def step_id(question_id: str, number: int) -> str:
    """
    Return the id of a message that an agent's run stores for a question.

    It is the same in each run. So of two runs that answer one question at the same moment, only one stores each step.

    :param question_id: The question's id.
    :param number: The number of the message in the turn, 0 for the first after the question.
    """
    return f"{_readable(question_id)}:step:{number}"


def first_step_id(replaced_id: str) -> str:
    """
    Return the id of the first reply of an agent's run that replaces a message.

    It is the same at each call, so that a run that is repeated finds out that the message was replaced already.

    :param replaced_id: The id of the message that is taken back.
    """
    return f"instead:{_digest(replaced_id)}"


def _reply_prefix(question_id: str | int) -> str:
    return f"{_readable(question_id)}:reply:"


def _readable(question_id: str | int) -> str:
    readable = str(question_id)
    return readable if len(readable) <= _LONGEST_READABLE_ID else _digest(readable)


def _digest(message_id: str) -> str:
    return hashlib.sha256(message_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def branch_id(chat_history_id: str, name: int | str) -> str:
    """
    Return the id of a branch of a history.

    :param chat_history_id: The history's id.
    :param name: The name of the branch. What keeps what a history had at a revision is named by the revision.
    """
    readable = f"{branch_prefix(chat_history_id)}{name}"
    return readable if len(chat_history_id) <= _READABLE_IN_BRANCH else f"{readable}~{_digest(chat_history_id)}"


def origin_of(chat_history_id: str, branch_of: object) -> str | None:
    """
    Return the id of the history that another one is a branch of, or `None` if it is no branch.

    Both its meta and its id say so. So a meta of another application makes no history a branch.

    :param branch_of: The value of `BRANCH_OF_KEY` in its meta.
    """
    if not isinstance(branch_of, str) or not branch_of or not chat_history_id.startswith(branch_prefix(branch_of)):
        return None
    # The prefix has only the beginning of a long id. Without the digest, a history could be a branch of itself.
    is_readable = len(branch_of) <= _READABLE_IN_BRANCH or chat_history_id.endswith(f"~{_digest(branch_of)}")
    return branch_of if is_readable else None


def branch_prefix(chat_history_id: str) -> str:
    """Return what the ids of all branches of a history begin with."""
    return f"{chat_history_id[:_READABLE_IN_BRANCH]}~"


def message_id_of(message: ChatMessage) -> str | int | None:
    """Return a message's id, or `None` if its meta has no usable id."""
    return _id_in(message, MESSAGE_ID_KEY)


def question_id_of(message: ChatMessage) -> str | int | None:
    """Return the id of the question that a message was produced for, or `None` if the message names no question."""
    return _id_in(message, QUESTION_ID_KEY)


def _id_in(message: ChatMessage, key: str) -> str | int | None:
    # The value is not validated yet: the message may come from a caller or from another package's store.
    value = message._meta.get(key)
    return value if value and isinstance(value, (str, int)) else None


def is_shown_only(message: ChatMessage) -> bool:
    """Whether the message is not as it is stored, but as a retriever or loader has shown it."""
    return bool(message.meta.get(SHOWN_KEY))
