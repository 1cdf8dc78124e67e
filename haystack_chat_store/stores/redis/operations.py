# SPDX-License-Identifier: Apache-2.0
"""What all operations need: the settings of the engine, and the keys of a scope."""

from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.redis.keys import Keys
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import Scope


class RedisOperations(Engine[Session]):
    """The settings that operations look at."""

    def __init__(self, *, key_prefix: str) -> None:
        """
        Keep the settings.

        :param key_prefix: What the names of all keys begin with, after a brace.
        """
        self.key_prefix = key_prefix

    def keys(self, scope: Scope) -> Keys:
        """Return the keys of a scope."""
        return Keys(self.key_prefix, scope.namespace, scope.user_id or "")


def lifetime(scope: Scope) -> int:
    """Return the number of milliseconds after which a history expires, or 0 for never."""
    return 0 if scope.lifetime is None else max(1, round(scope.lifetime / 1000))
