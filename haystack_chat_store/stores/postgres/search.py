# SPDX-License-Identifier: Apache-2.0
"""
Full-text search.

Search is on in a database if the index on `search_terms` exists. A process looks for it when it connects, and from then
on writes terms with each message. Rows without terms are found by a partial index, which exists once all older messages
have been indexed. A process that connected before search was turned on still writes such rows.
"""

from collections.abc import Sequence
from itertools import starmap
from typing import Any

from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres import upgrading
from haystack_chat_store.stores.postgres.schema import BEGINNING, history_parameters
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import prefix_parameters
from haystack_chat_store.stores.postgres.terms import tsquery, tsvectors
from haystack_chat_store.stores.rows import FoundRow, Scope

# Up to this many histories are searched by themselves. The index of terms holds those of all histories.
_FEW_HISTORIES = 1_000
# They are searched message by message if they have up to this many messages, or fewer than match in the whole index.
_FEW_MESSAGES = 5_000
# The compressed size of the messages that one step indexes, in bytes. A step indexes one message or more.
_INDEX_BATCH_BYTES = 8_000_000


class Search(Engine[Session]):
    """The operations on the index of words."""

    async def search(
        self,
        session: Session,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[FoundRow] | None:
        """Choose between the index of all terms and the messages of few histories, whichever looks at less."""
        statements = session.statements
        if not session.database.is_indexed:
            ((has_messages,),) = await session.fetch(session.database.tables.has_messages)
            return None if has_messages else []
        if await session.fetch(statements.an_unindexed):
            return None
        parameters = {**prefix_parameters(scope, prefix), "query": tsquery(phrases), "limit": limit}
        if chat_history_id is None:
            ((keys, messages),) = await session.fetch(statements.few_histories, {**parameters, "few": _FEW_HISTORIES})
        else:
            history = history_parameters(scope, chat_history_id)
            keys = [history["key"]]
            counted = await session.fetch(statements.message_count, history)
            messages = counted[0][0] if counted else 0
        if keys is None:
            statement = statements.search
        elif messages <= _FEW_MESSAGES or await session.fetch(
            statements.more_match, {**parameters, "messages": messages}
        ):
            statement = statements.search_few
        else:
            statement = statements.search_for_few
        return list(starmap(FoundRow, await session.fetch(statement, {**parameters, "keys": keys})))

    async def index_some(self, session: Session, scope: Scope, limit: int) -> bool:  # noqa: ARG002  (all namespaces)
        """Index the next messages of all namespaces."""
        return await index_next(session, limit)


async def index_next(session: Session, limit: int) -> bool:
    """
    Index up to `limit` messages, from where this process has got to. Return whether there are more.

    The process that comes to the end first creates the index that finds rows without terms.
    """
    database = session.database
    if not database.is_indexed:
        await upgrading.look(session)  # another process may have come first
    last = await session.in_transaction(_index_batch, limit, is_result=lambda _: False)
    database.indexed_up_to = last or BEGINNING
    if last is None and not database.is_indexed:
        await upgrading.finish_index(session)
    return last is not None


async def _index_batch(session: Session, limit: int) -> tuple[Any, int] | None:
    """Index the next messages, and return the place of the last one, or `None` if there are no more."""
    start = session.database.indexed_up_to
    found = await session.fetch(session.statements.unindexed, [*start, limit])
    if not found:
        return None
    end, size = found[0][:2], 0
    for key, position, length in found:
        size += length
        if size > _INDEX_BATCH_BYTES:
            break
        end = key, position
    rows = await session.fetch(session.statements.unindexed_contents, [*start, *end])
    keys, positions = [row[0] for row in rows], [row[1] for row in rows]
    terms = await session.to_thread(tsvectors, [row[2] for row in rows])
    await session.run(session.statements.set_terms, [keys, positions, "\n".join(terms)])
    return end
