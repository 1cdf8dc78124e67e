# SPDX-License-Identifier: Apache-2.0
"""
Full-text search.

Whether a database is searched shows in it: there is an index of the column `search_terms`. Whoever connects looks for
it, and from then on writes terms with each message. Other rows have none: those that are older, which are walked
through once, and those of a process that has connected before, which an index of their own finds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.postgres.base import BEGINNING, PostgresOperations
from haystack_chat_store.stores.postgres.terms import tsquery, tsvectors
from haystack_chat_store.stores.rows import FoundRow

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres.connections import Session

# No more histories than these can be searched message by message, rather than along the index of terms, which has
# everybody's. They are if they have so few messages, or fewer than match in the whole index.
_FEW_HISTORIES = 1_000
_FEW_MESSAGES = 5_000
# So many bytes of messages are indexed at once, as the server has them compressed, or one message.
_BYTES_AT_ONCE = 8_000_000


class Search(PostgresOperations):
    """
    The operations that search, and make what is there searchable.
    """

    async def _search(
        self, session: "Session", phrases: Sequence[Phrase], chat_history_id: str | None, prefix: str, limit: int
    ) -> list[FoundRow] | None:
        if not session.pool.is_indexed or await session.fetch(self._statements.an_unindexed):
            return None
        parameters = {**self._with_prefix(prefix), "query": tsquery(phrases), "limit": limit}
        if chat_history_id is None:
            sizes = {**parameters, "few": _FEW_HISTORIES}
            ((keys, messages),) = await session.fetch(self._statements.few_histories, sizes)
        else:
            keys, messages = [self._history_key(chat_history_id)], await self._count(session, chat_history_id)
        if keys is None:
            statement = self._statements.search
        elif messages <= _FEW_MESSAGES or await session.fetch(
            self._statements.more_match, {**parameters, "messages": messages}
        ):
            statement = self._statements.search_few
        else:
            statement = self._statements.search_for_few
        return [FoundRow(*row) for row in await session.fetch(statement, {**parameters, "keys": keys})]

    async def _index_some(self, session: "Session", limit: int) -> bool:
        """
        Go on where this process has got to. Whoever comes to the end first says so in the database.
        """
        pool = session.pool
        if not pool.is_indexed:
            await pool.look(session)  # another process may have come first
        last = await session.in_transaction(self._index_next, limit)
        pool.indexed_up_to = last or BEGINNING
        if last is None and not pool.is_indexed:
            await pool.finish_index(session)
        return last is not None

    async def _index_next(self, session: "Session", limit: int) -> tuple[Any, int] | None:
        """
        Index the next messages, and return the place of the last one, or `None` if there are no more.
        """
        start = session.pool.indexed_up_to
        found = await session.fetch(self._statements.unindexed, [*start, limit])
        if not found:
            return None
        end, size = found[0][:2], 0
        for key, position, length in found:
            size += length
            if size > _BYTES_AT_ONCE:
                break
            end = key, position
        rows = await session.fetch(self._statements.unindexed_contents, [*start, *end])
        keys, positions = [row[0] for row in rows], [row[1] for row in rows]
        terms = await session.aside(tsvectors, [row[2] for row in rows])
        await session.run(self._statements.set_terms, [keys, positions, "\n".join(terms)])
        return end
