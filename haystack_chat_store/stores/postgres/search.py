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
from haystack_chat_store.stores.postgres.reading import MESSAGE_COUNT
from haystack_chat_store.stores.postgres.schema import BEGINNING, history_parameters
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import Statement, prefix_parameters
from haystack_chat_store.stores.postgres.terms import tsquery, tsvectors
from haystack_chat_store.stores.rows import FoundRow, Scope

# Histories are looked up in the order of the scores, until there are enough hits. A score depends on the message alone,
# and so does the order of equal ones: neither tells what others have.
_FIND = """
    SELECT chat_history_id, position, message_id, role, {{message_time}}, content, score FROM (
        SELECT chat_history_id, history_key, position, score FROM (
            SELECT history_key, position, ts_rank(search_terms, %(query)s::tsquery) AS score FROM {searched}
            WHERE search_terms @@ %(query)s::tsquery AND search_terms IS NOT NULL {restrict}
            ORDER BY score DESC, position DESC, history_key
        ) AS found
        JOIN {{histories}} USING (history_key)
        WHERE {{with_prefix}} ORDER BY score DESC, position DESC, history_key LIMIT %(limit)s
    ) AS best
    JOIN {{messages}} USING (history_key, position) ORDER BY score DESC, position DESC, history_key
"""
# The planner does not know how common a word is. OFFSET 0 keeps it from the index of terms, which has the messages of
# all histories.
_OF_FEW_HISTORIES = "(SELECT * FROM {messages} WHERE history_key = ANY (%(keys)s) OFFSET 0) AS of_few"
# The keys of the histories to search, and the number of their messages. No keys if the histories are too many.
_FIND_FEW_HISTORIES = Statement("""
    SELECT CASE WHEN count(*) <= %(few)s THEN coalesce(array_agg(history_key), '{{}}') END,
        coalesce(sum(message_count), 0)::bigint
    FROM (
        SELECT history_key, message_count FROM {histories} WHERE {with_prefix} ORDER BY {by_id} LIMIT %(few)s + 1
    ) AS few
""")
# Whether more messages match than the few histories have.
_MORE_MATCH = Statement("""
    SELECT FROM {messages} WHERE search_terms @@ %(query)s::tsquery AND search_terms IS NOT NULL
    OFFSET %(messages)s LIMIT 1
""")
_SEARCH = Statement(_FIND.format(searched="{messages}", restrict=""))
_SEARCH_FOR_FEW = Statement(_FIND.format(searched="{messages}", restrict="AND history_key = ANY (%(keys)s)"))
_SEARCH_FEW = Statement(_FIND.format(searched=_OF_FEW_HISTORIES, restrict=""))
# Ordered, because a planner that expects many rows would otherwise read the table itself for the first one.
_AN_UNINDEXED = Statement("SELECT FROM {messages} WHERE search_terms IS NULL ORDER BY history_key, position LIMIT 1")
_UNINDEXED = Statement("""
    SELECT history_key, position, pg_column_size(content) FROM {messages}
    WHERE (history_key, position) > (%s, %s) AND search_terms IS NULL ORDER BY history_key, position LIMIT %s
""")
_UNINDEXED_CONTENTS = Statement("""
    SELECT history_key, position, content FROM {messages}
    WHERE (history_key, position) > (%s, %s) AND (history_key, position) <= (%s, %s) AND search_terms IS NULL
    ORDER BY history_key, position FOR UPDATE
""")
_SET_TERMS = Statement("""
    UPDATE {messages} AS m SET search_terms = sent.terms::tsvector
    FROM unnest(%s::uuid[], %s::bigint[], string_to_array(%s, E'\n')) AS sent (history_key, position, terms)
    WHERE m.history_key = sent.history_key AND m.position = sent.position
""")

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
        if not session.database.is_indexed:
            ((has_messages,),) = await session.fetch(session.database.tables.has_messages)
            return None if has_messages else []
        if await session.fetch(_AN_UNINDEXED):
            return None
        parameters = {**prefix_parameters(scope, prefix), "query": tsquery(phrases), "limit": limit}
        if chat_history_id is None:
            ((keys, messages),) = await session.fetch(_FIND_FEW_HISTORIES, {**parameters, "few": _FEW_HISTORIES})
        else:
            history = history_parameters(scope, chat_history_id)
            keys = [history["key"]]
            counted = await session.fetch(MESSAGE_COUNT, history)
            messages = counted[0][0] if counted else 0
        if keys is None:
            statement = _SEARCH
        elif messages <= _FEW_MESSAGES or await session.fetch(_MORE_MATCH, {**parameters, "messages": messages}):
            statement = _SEARCH_FEW
        else:
            statement = _SEARCH_FOR_FEW
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
    found = await session.fetch(_UNINDEXED, [*start, limit])
    if not found:
        return None
    end, size = found[0][:2], 0
    for key, position, length in found:
        size += length
        if size > _INDEX_BATCH_BYTES:
            break
        end = key, position
    rows = await session.fetch(_UNINDEXED_CONTENTS, [*start, *end])
    keys, positions = [row[0] for row in rows], [row[1] for row in rows]
    terms = await session.to_thread(tsvectors, [row[2] for row in rows])
    await session.run(_SET_TERMS, [keys, positions, "\n".join(terms)])
    return end
