# SPDX-License-Identifier: Apache-2.0
"""
What all operations on PostgreSQL need.
"""

import hashlib
import uuid
from typing import TYPE_CHECKING, Any

from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.rows import end_of_prefix

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres.connections import Session
    from haystack_chat_store.stores.postgres.statements import Statements

#: No position is greater.
MAX_POSITION = 2**63 - 1
#: Where a walk through all messages begins.
BEGINNING = (uuid.UUID(int=0), -1)
#: Greater than all ids, which have 512 characters at most.
AFTER_ALL_IDS = "\U0010ffff" * 513


def history_key(namespace: str, chat_history_id: str) -> uuid.UUID:
    """
    Return the key of a history.
    """
    # Neither of the two holds a NUL, so no two pairs become the same text.
    name = f"{namespace}\x00{chat_history_id}".encode()
    return uuid.UUID(bytes=hashlib.blake2b(name, digest_size=16).digest())


class PostgresOperations(BaseChatMessageStore["Session"]):
    """
    The base of the classes that hold the operations.
    """

    _statements: "Statements"

    def _history_key(self, chat_history_id: str) -> uuid.UUID:
        return history_key(self.namespace, chat_history_id)

    async def _count(self, session: "Session", chat_history_id: str) -> int:
        rows = await session.fetch(self._statements.message_count, [self._history_key(chat_history_id)])
        return int(rows[0][0]) if rows else 0

    def _with_prefix(self, prefix: str) -> dict[str, Any]:
        """
        Return the parameters of a statement for the histories of this namespace whose ids begin with a prefix.
        """
        return {"namespace": self.namespace, "prefix": prefix, "end": end_of_prefix(prefix) or AFTER_ALL_IDS}
