# SPDX-License-Identifier: Apache-2.0
"""
How histories are kept: the version of the layout, and how roles, times and numbers are written down.

`docs/redis.md` shows what each key holds.
"""

import json
import secrets
from collections.abc import Iterable
from typing import Final

from haystack_chat_store.ids import MESSAGE_ID_KEY

#: The version of this layout, which every bucket records.
SCHEMA_VERSION: Final = 1
#: The version of the terms that are indexed. Raise it whenever the terms of any message, or their tags, change.
TERMS_VERSION: Final = 1
#: How many characters the time of a message takes in `times`: enough for each valid one.
TIME_LENGTH: Final = 18
#: Stands for an infinite score in the directory, which another program has set.
GREATEST_TIME: Final = 2**62
#: The roles, by the letters that stand for them in `roles`.
ROLES: Final = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
#: The letter that stands in `roles` for a message that was deleted.
GAP: Final = "x"
#: How many messages, ids or histories one script works on, unless the caller says how many.
BATCH_SIZE: Final = 1000


def letters_of(roles: Iterable[str]) -> str:
    """Return the letters that stand for roles."""
    return "".join(role[0] for role in roles)


def id_and_role(content: str) -> tuple[str, str] | None:
    """Return the id and the role that a message's JSON states, or `None` if it cannot be read."""
    try:
        message = json.loads(content)
        message_id, role = message["meta"][MESSAGE_ID_KEY], message["role"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    is_id = isinstance(message_id, str) and message_id and "\x00" not in message_id
    return (message_id, role) if is_id and role in ROLES.values() else None


def number(text: str | None) -> int:
    """Return a number that is stored as text, or 0 if the text is not a number."""
    try:
        return int(text or 0)
    except ValueError:
        return 0


def time_of_score(score: float) -> int:
    """Return the time that a score of the directory stands for, in microseconds since 1970. It may be infinite."""
    return int(max(min(score, GREATEST_TIME), -GREATEST_TIME))


def new_name() -> str:
    """Return a random name, for a call or for keys."""
    return secrets.token_hex(8)
