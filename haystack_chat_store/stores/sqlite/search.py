# SPDX-License-Identifier: Apache-2.0
"""
The operations on the index of words.
"""

from collections.abc import Sequence
from typing import Any

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import FoundRow, Scope
from haystack_chat_store.stores.sqlite import schema, terms
from haystack_chat_store.stores.sqlite.connections import Database
from haystack_chat_store.stores.sqlite.directory import id_range
from haystack_chat_store.stores.sqlite.schema import key_range
from haystack_chat_store.stores.sqlite.texts import all_readable

_SET_INDEXED_UP_TO = "UPDATE chat_messages_indexed SET last_key = ?"
_LAST_OF_BATCH = """
    SELECT message_key FROM chat_messages WHERE message_key > ? ORDER BY message_key LIMIT 1 OFFSET ?
"""
_INDEX_BATCH = """
    INSERT INTO chat_message_terms (rowid, terms)
    SELECT message_key, chat_message_terms_of(CAST(content AS BLOB)) FROM chat_messages
    WHERE message_key > ? AND message_key <= ? ORDER BY message_key
"""
_INDEX_LEFT_OUT = """
    INSERT INTO chat_message_terms (rowid, terms)
    SELECT message_key, chat_message_terms_of(CAST(content AS BLOB)) FROM chat_messages
    WHERE message_key IN (SELECT message_key FROM chat_messages_unindexed ORDER BY message_key LIMIT ?)
"""
_NOT_LEFT_OUT = """
    DELETE FROM chat_messages_unindexed
    WHERE message_key IN (SELECT message_key FROM chat_messages_unindexed ORDER BY message_key LIMIT ?)
"""

# A history counts only if it belongs to what is searched. {found} finds the best of the keys.
_HISTORIES = """
    SELECT count(*), min(history_key), max(history_key) FROM (
        SELECT history_key FROM chat_histories
        WHERE namespace = ? AND chat_history_id >= ? AND chat_history_id < ? LIMIT ?
    )
"""
_SEARCH = """
    SELECT CAST(chat_history_id AS TEXT), message_key & 0xffffffff, CAST(message_id AS TEXT), CAST(content AS TEXT),
        -score
    FROM ({found}) CROSS JOIN chat_messages ON message_key = found_key
        CROSS JOIN chat_histories ON history_key = found_key >> 32
    ORDER BY score
"""
# To rank a message costs more than to find it. With few histories only their messages are ranked.
_SEARCH_FEW = _SEARCH.format(
    found="""
        SELECT rowid AS found_key, bm25(chat_message_terms) AS score FROM chat_message_terms
        WHERE chat_message_terms MATCH ?1 AND rowid BETWEEN ?6 AND ?7 AND rowid >> 32 IN (
            SELECT history_key FROM chat_histories
            WHERE namespace = ?2 AND chat_history_id >= ?3 AND chat_history_id < ?4
        )
        ORDER BY score LIMIT ?5
    """
)
# With many, FTS5 ranks all, and only the best are looked at until there are enough.
_SEARCH_MANY = _SEARCH.format(
    found="""
        SELECT chat_message_terms.rowid AS found_key, rank AS score
        FROM chat_message_terms CROSS JOIN chat_histories ON history_key = chat_message_terms.rowid >> 32
        WHERE chat_message_terms MATCH ?1
            AND namespace = ?2 AND +chat_history_id >= ?3 AND +chat_history_id < ?4
        ORDER BY rank LIMIT ?5
    """
)

_OF_NEWER = (
    "The search index of this file was begun by a newer version of haystack-chat-store, or of Python, which has to "
    "complete it: search with that one first. If it is not used any more, check(store, repair=True) of "
    "haystack_chat_store.doctor lets this version make the index anew."
)

# So many histories are few.
_FEW = 200


class Search(Engine[Database]):
    """
    The operations on the index of words.
    """

    def search(
        self,
        session: Database,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[FoundRow] | None:
        """
        Ask FTS5, which ranks by bm25.
        """
        # The first text after an id is the id and a NUL.
        ids = id_range(prefix) if chat_history_id is None else (chat_history_id, f"{chat_history_id}\x00")
        histories = (scope.namespace, *ids)
        with session.snapshot() as connection, all_readable(connection):
            if not schema.state_of_index(connection).is_searchable:
                return None
            count, first, last = connection.execute(_HISTORIES, (*histories, _FEW + 1)).fetchone()
            if count == 0:
                return []
            values = (_match_expression(phrases), *histories, limit)
            if count > _FEW:
                rows = connection.execute(_SEARCH_MANY, values).fetchall()
            else:
                keys = (key_range(first)[0], key_range(last)[1])
                rows = connection.execute(_SEARCH_FEW, (*values, *keys)).fetchall()
        return [_found_row(row) for row in rows]

    def index_some(self, session: Database, scope: Scope, limit: int) -> bool:
        """
        Index the next messages by their keys, and then those that were left out.
        """
        with session.transaction() as connection:
            index = schema.state_of_index(connection)
            if index.is_searchable:
                return False
            if index.is_of_newer:
                raise UnsupportedOperationError(_OF_NEWER)
            if index.terms_version != terms.OWN_TERMS:
                schema.begin_index_with_own_terms(connection)
                index = schema.state_of_index(connection)
            found = connection.execute(_LAST_OF_BATCH, (index.last_key, limit - 1)).fetchone()
            last = schema.ALL_KEYS if found is None else found[0]
            connection.execute(_INDEX_BATCH, (index.last_key, last))
            connection.execute(_SET_INDEXED_UP_TO, (last,))
            connection.execute(_INDEX_LEFT_OUT, (limit,))
            connection.execute(_NOT_LEFT_OUT, (limit,))
            is_done = schema.state_of_index(connection).is_searchable
        if not is_done:
            session.give_way()
        return not is_done


def _found_row(row: Sequence[Any]) -> FoundRow:
    chat_history_id, position, message_id, content, score = row
    return FoundRow(
        chat_history_id=chat_history_id, position=position, message_id=message_id, content=content, score=score
    )


def _match_expression(phrases: Sequence[Phrase]) -> str:
    """
    Return what FTS5 is asked for. Terms contain nothing that means anything to it.
    """
    return " AND ".join(f'"{" ".join(phrase.terms)}"{"*" if phrase.is_prefix else ""}' for phrase in phrases)
