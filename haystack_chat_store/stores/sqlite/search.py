# SPDX-License-Identifier: Apache-2.0
"""The operations on the index of words."""

from collections.abc import Sequence
from itertools import starmap

from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import FoundRow, Scope
from haystack_chat_store.stores.sqlite.connections import Database, readable_rows
from haystack_chat_store.stores.sqlite.directory import id_range, seen
from haystack_chat_store.stores.sqlite.schema import key_range
from haystack_chat_store.stores.sqlite.term_index import TermIndex

_HISTORIES = """
    SELECT count(*), min(history_key), max(history_key) FROM (
        SELECT history_key FROM haystack_chat_histories
        WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ? LIMIT ?
    )
"""
# {found} finds the keys of the best messages. The join leaves out those that another program has deleted.
_SEARCH = """
    SELECT chat_history_id, message_key & 0xffffffff, CAST(message_id AS TEXT), CAST(role AS TEXT),
        haystack_chat_messages.created_at, CAST(content AS TEXT), -score
    FROM ({found}) CROSS JOIN haystack_chat_messages ON message_key = found_key
        CROSS JOIN haystack_chat_histories ON history_key = found_key >> 32
    ORDER BY score
"""
# To rank a message costs more than to find it. With few histories only their messages are ranked.
_SEARCH_FEW = _SEARCH.format(
    found="""
        SELECT rowid AS found_key, bm25(haystack_chat_terms) AS score FROM haystack_chat_terms
        WHERE haystack_chat_terms MATCH ?1 AND rowid BETWEEN ?6 AND ?7 AND rowid >> 32 IN (
            SELECT history_key FROM haystack_chat_histories
            WHERE namespace = ?2 AND chat_history_id >= ?3 AND chat_history_id < ?4
        ) AND EXISTS (SELECT 1 FROM haystack_chat_messages WHERE message_key = haystack_chat_terms.rowid)
        ORDER BY score LIMIT ?5
    """
)
# With many, FTS5 ranks all, and only the best are looked at until there are enough.
_SEARCH_MANY = _SEARCH.format(
    found="""
        SELECT haystack_chat_terms.rowid AS found_key, rank AS score
        FROM haystack_chat_terms
            CROSS JOIN haystack_chat_messages ON message_key = haystack_chat_terms.rowid
            CROSS JOIN haystack_chat_histories ON history_key = haystack_chat_terms.rowid >> 32
        WHERE haystack_chat_terms MATCH ?1
            AND namespace = ?2 AND +chat_history_id >= ?3 AND +chat_history_id < ?4
        ORDER BY rank LIMIT ?5
    """
)

# Up to this many histories, only their messages are ranked.
_FEW_HISTORIES = 200


class Search(Engine[Database]):
    """The operations on the index of words."""

    def search(
        self,
        session: Database,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[FoundRow] | None:
        """Ask FTS5, which ranks by bm25."""
        # The first text after an id is the id and a NUL.
        ids = id_range(prefix) if chat_history_id is None else (chat_history_id, f"{chat_history_id}\x00")
        histories = (scope.namespace, *ids)
        with session.snapshot() as connection:
            index = TermIndex.of(connection)
            index.check_not_newer()
            if not index.is_complete:
                return None if index.has_messages else []
            count, first, last = connection.execute(
                seen(_HISTORIES, scope), (*histories, _FEW_HISTORIES + 1)
            ).fetchone()
            if count == 0:
                return []
            values = (_match_expression(phrases), *histories, limit)
            if count > _FEW_HISTORIES:
                rows = readable_rows(connection, seen(_SEARCH_MANY, scope), values)
            else:
                keys = (key_range(first)[0], key_range(last)[1])
                rows = readable_rows(connection, seen(_SEARCH_FEW, scope), (*values, *keys))
        return list(starmap(FoundRow, rows))

    def index_some(self, session: Database, scope: Scope, limit: int) -> bool:  # noqa: ARG002  (all namespaces)
        """Index the next messages by their keys, of all namespaces."""
        with session.transaction() as connection:
            index = TermIndex.of(connection)
            index.add_next(limit)
        if not index.is_complete:
            session.pause_for_other_writers()
        return not index.is_complete


def _match_expression(phrases: Sequence[Phrase]) -> str:
    """Return the query for FTS5. Terms contain nothing that means anything to it."""
    return " AND ".join(f'"{" ".join(phrase.terms)}"{"*" if phrase.is_prefix else ""}' for phrase in phrases)
