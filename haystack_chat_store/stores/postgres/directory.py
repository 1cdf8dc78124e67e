# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories: the directory of them, titles, meta, users and ids."""

from collections.abc import Sequence
from itertools import starmap
from typing import Any

from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.histories import HISTORY, NO_HISTORY, history_row, lock_history, meta_of
from haystack_chat_store.stores.postgres.renaming import rename_locked
from haystack_chat_store.stores.postgres.schema import history_key, history_parameters
from haystack_chat_store.stores.postgres.session import Session, in_transaction
from haystack_chat_store.stores.postgres.statements import (
    AFTER_ALL_IDS,
    AFTER_ALL_TIMES,
    BEGIN_READING,
    Statement,
    prefix_parameters,
)
from haystack_chat_store.stores.postgres.statistics import count_all
from haystack_chat_store.stores.postgres.terms import title_tsvector, tsquery
from haystack_chat_store.stores.rows import UNCHANGED, HistoryChange, HistoryRow, Scope, branch_origin
from haystack_chat_store.types import StoreStatistics

# Its plan is kept. The best plan for a prefix depends on how many histories have it.
_ALL_HISTORIES = Statement("""
    SELECT {history_row} FROM {histories}
    WHERE namespace = %(namespace)s AND {further} AND {visible} AND {is_seen} {newest_first} LIMIT %(limit)s
""")
_HISTORIES_OF_USER = Statement("""
    SELECT {history_row} FROM {histories}
    WHERE namespace = %(namespace)s AND user_id = %(user)s AND {further} AND {is_alive}
        AND starts_with(chat_history_id, %(prefix)s) AND {is_seen}
    {newest_first} LIMIT %(limit)s
""")
_HISTORIES = Statement("""
    SELECT {history_row} FROM {histories} WHERE {with_prefix} AND {further} {newest_first} LIMIT %(limit)s
""")
# The histories with the prefix among the next `near` ones of the namespace.
_HISTORIES_NEAR = Statement("""
    SELECT {history_row} FROM (
        SELECT * FROM {histories} WHERE namespace = %(namespace)s AND {further} {newest_first} LIMIT %(near)s
    ) AS near
    WHERE {with_prefix} {newest_first} LIMIT %(limit)s
""")
# MATERIALIZED, because the planner would otherwise walk along the index by time, past newer histories of others.
_HISTORIES_OF_FEW = Statement("""
    WITH few AS MATERIALIZED (SELECT * FROM {histories} WHERE {with_prefix} ORDER BY {by_id})
    SELECT {history_row} FROM few WHERE {further} {newest_first} LIMIT %(limit)s
""")
# Whether more than `few` histories have the prefix, and whether more than `near` come after the cursor.
_HAVE_MORE = Statement("""
    SELECT
        (SELECT true FROM {histories} WHERE {with_prefix} ORDER BY {by_id} OFFSET %(few)s LIMIT 1),
        (SELECT true FROM {histories} WHERE namespace = %(namespace)s AND {further}
            {newest_first} OFFSET %(near)s LIMIT 1)
""")
_HISTORIES_BY_ID = Statement("""
    SELECT {history_row} FROM {histories} WHERE {with_prefix} AND {by_id} > %(after)s
    ORDER BY {by_id} LIMIT %(limit)s
""")
_TITLES = Statement("""
    SELECT {history_row} FROM {histories}
    WHERE {with_prefix} AND title_terms @@ %(query)s::tsquery AND title_terms IS NOT NULL
    ORDER BY char_length(title), updated_at DESC LIMIT %(limit)s
""")
_NAMESPACES = Statement("""
    WITH RECURSIVE names (name) AS (
        (SELECT namespace FROM {histories} ORDER BY namespace LIMIT 1)
        UNION ALL
        SELECT (SELECT namespace FROM {histories} WHERE namespace > name ORDER BY namespace LIMIT 1)
        FROM names WHERE name IS NOT NULL
    )
    SELECT name FROM names WHERE name IS NOT NULL
""")
# By default, each of the two times is that of its own look at the clock.
_BEGIN_HISTORY = Statement("""
    UPDATE {histories} SET updated_at = created_at,
        title = %(title)s, title_terms = %(title_terms)s::tsvector, meta = %(meta)s::json,
        branch_of = %(branch_of)s, revision = %(revision)s
    WHERE history_key = %(key)s
""")
_UPDATE_HISTORY = Statement("""
    UPDATE {histories} SET
        title = CASE WHEN %(has_title)s THEN %(title)s ELSE coalesce(title, %(title)s) END,
        title_terms = CASE
            WHEN %(has_title)s OR title IS NULL THEN %(title_terms)s::tsvector ELSE title_terms
        END,
        meta = CASE WHEN %(has_meta)s THEN %(meta)s::json ELSE meta END,
        branch_of = CASE WHEN %(has_meta)s THEN %(branch_of)s ELSE branch_of END,
        user_id = CASE WHEN %(has_user)s THEN %(user)s ELSE user_id END
    WHERE history_key = %(key)s RETURNING {history_row}
""")
_HAND_OVER_BRANCHES = Statement("""
    UPDATE {histories} SET user_id = %(new_owner)s
    WHERE namespace = %(namespace)s AND branch_of = ANY (%(ids)s) AND user_id IS NOT DISTINCT FROM %(owner)s
    RETURNING chat_history_id
""")
_RENEW = Statement("""
    UPDATE {histories} SET expires_at = {expires_at}
    WHERE history_key = %(key)s AND {visible} AND expires_at IS NOT NULL
""")


# Up to this many histories are sorted, or passed on the walk by time. If they do not suffice, four times as many are.
_FIRST_TRY = 256


class Directory(Engine[Session]):
    """The operations on whole histories."""

    async def history(self, session: Session, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Return one history, or `None` if it does not exist."""
        rows = await session.fetch(HISTORY, history_parameters(scope, chat_history_id), prepare=True)
        return HistoryRow(*rows[0]) if rows else None

    async def histories(
        self, session: Session, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """
        Sort the histories with the prefix if they are few, and walk by time if they are many.

        Both are tried with growing limits until one completes. The page is always the result of one statement.
        """
        updated_at, chat_history_id = before or (AFTER_ALL_TIMES, AFTER_ALL_IDS)
        parameters = prefix_parameters(scope, prefix) | {
            "updated_at": updated_at,
            "id": chat_history_id,
            "limit": limit,
        }
        if scope.user_id is not None:
            rows = await session.fetch(_HISTORIES_OF_USER, parameters, prepare=True)
            return list(starmap(HistoryRow, rows))
        if not prefix:
            return list(starmap(HistoryRow, await session.fetch(_ALL_HISTORIES, parameters, prepare=True)))
        few, statement = _FIRST_TRY, _HISTORIES
        while True:
            parameters |= {"few": few, "near": limit + few}
            ((have_prefix, follow),) = await session.fetch(_HAVE_MORE, parameters)
            if not have_prefix:
                statement = _HISTORIES_OF_FEW
            if not have_prefix or not follow:
                break
            rows = await session.fetch(_HISTORIES_NEAR, parameters)
            if len(rows) == limit:
                return list(starmap(HistoryRow, rows))
            few *= 4
        return list(starmap(HistoryRow, await session.fetch(statement, parameters)))

    async def histories_by_id(
        self, session: Session, scope: Scope, prefix: str, after: str, limit: int
    ) -> list[HistoryRow]:
        """Walk along the index by id."""
        parameters = {**prefix_parameters(scope, prefix), "after": after, "limit": limit}
        return list(starmap(HistoryRow, await session.fetch(_HISTORIES_BY_ID, parameters)))

    @in_transaction
    async def update_history(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        change: HistoryChange,
    ) -> HistoryRow | None:
        """Change the row in a transaction that has it locked, and hand over its branches."""
        locked = await lock_history(session, scope, chat_history_id)
        if locked is None:
            return None
        key = history_key(scope, chat_history_id)
        has_meta = change.meta is not UNCHANGED or change.merged is not None
        stored = None if change.merged is None else await meta_of(session, key)
        meta = change.new_meta(stored) if has_meta else None
        parameters = {
            "key": key,
            "has_title": change.title is not UNCHANGED,
            "title": change.given_title,
            "title_terms": title_tsvector(change.given_title),
            "has_meta": has_meta,
            "meta": meta,
            "branch_of": branch_origin(chat_history_id, meta),
            "has_user": change.user_id is not UNCHANGED,
            "user": None if change.user_id is UNCHANGED else change.user_id,
        }
        row = HistoryRow(*(await session.fetch(_UPDATE_HISTORY, parameters))[0])
        origins: dict[str, Any] = {"namespace": scope.namespace, "owner": locked.user_id, "new_owner": row.user_id}
        origins["ids"] = [chat_history_id] if row.user_id != locked.user_id else []
        while origins["ids"]:
            found = await session.fetch(_HAND_OVER_BRANCHES, origins)
            origins["ids"] = [branch for (branch,) in found]
        return row

    @in_transaction
    async def create_history(self, session: Session, scope: Scope, history: HistoryRow) -> tuple[HistoryRow, bool]:
        """Insert the row in a transaction, unless it is there."""
        new_id = history.chat_history_id
        locked = await lock_history(session, scope, new_id, make=True, user_id=history.user_id) or NO_HISTORY
        key, is_new = history_key(scope, new_id), locked.revision == 0
        if is_new:
            parameters = {
                "key": key,
                "title": history.title,
                "title_terms": title_tsvector(history.title),
                "meta": history.meta,
                "branch_of": branch_origin(new_id, history.meta),
                "revision": locked.next_revision,
            }
            await session.run(_BEGIN_HISTORY, parameters)
        return await history_row(session, key), is_new

    async def rename_history(self, session: Session, scope: Scope, old_id: str, new_id: str) -> HistoryRow:
        """Copy the rows under other keys, and delete the old ones, in one transaction."""
        return await session.in_transaction(rename_locked, scope, old_id, new_id)

    async def renew(self, session: Session, scope: Scope, chat_history_id: str) -> None:
        """Change the row."""
        parameters = {**history_parameters(scope, chat_history_id), "lifetime": scope.lifetime}
        await session.run(_RENEW, parameters)

    async def search_titles(
        self,
        session: Session,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[HistoryRow]:
        """Look titles up by their terms."""
        parameters = {**prefix_parameters(scope, prefix), "query": tsquery(phrases), "limit": limit}
        if chat_history_id is not None:
            parameters |= {"prefix": chat_history_id, "end": f"{chat_history_id}\x01"}  # only this id is between them
        return list(starmap(HistoryRow, await session.fetch(_TITLES, parameters)))

    async def namespaces(self, session: Session, scope: Scope) -> list[str]:  # noqa: ARG002  (all namespaces)
        """Go from one namespace to the next in the index by id."""
        return sorted(name for (name,) in await session.fetch(_NAMESPACES))

    async def statistics(self, session: Session, scope: Scope, prefix: str) -> StoreStatistics:
        """Count every message, as of one moment."""
        return await session.in_transaction(count_all, prefix_parameters(scope, prefix), begin=BEGIN_READING)
