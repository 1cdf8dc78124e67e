# SPDX-License-Identifier: Apache-2.0
"""What all operations need: the settings of the engine, and the keys of a scope."""

from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.redis.keys import Keys
from haystack_chat_store.stores.redis.session import Session
from haystack_chat_store.stores.rows import Scope


class RedisOperations(Engine[Session]):
    """The settings that operations look at."""

    def __init__(self, *, key_prefix: str, cluster: bool, search: bool) -> None:
        """
        Keep the settings.

        :param key_prefix: What the names of all keys begin with, after a brace.
        :param cluster: Whether a script can only use the keys of one bucket.
        :param search: Whether to turn search on in the namespaces that are written to, and index what is written.
        """
        self.key_prefix = key_prefix
        self.cluster = cluster
        self.is_searching = search
        #: The namespaces in which this engine has turned search on.
        self.searched_namespaces: set[str] = set()

    def keys(self, scope: Scope) -> Keys:
        """Return the keys of a scope."""
        return Keys(self.key_prefix, scope.namespace, scope.user_id or "")


def lifetime(scope: Scope) -> int:
    """Return the number of milliseconds after which a history expires, or 0 for never."""
    return 0 if scope.lifetime is None else max(1, round(scope.lifetime / 1000))


async def server_info(session: Session, section: str) -> list[dict[str, str]]:
    """Return a section of what INFO says of every server."""
    texts = await session.ask_masters("INFO", section)
    return [dict(line.split(":", 1) for line in text.splitlines() if ":" in line) for text in texts]
