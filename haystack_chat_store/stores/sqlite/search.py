# SPDX-License-Identifier: Apache-2.0
"""The operations on the index of words."""

from collections.abc import Sequence
from itertools import starmap

from haystack_chat_store.search_text import Phrase, spaced_patterns
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import FoundRow, Scope
from haystack_chat_store.stores.sqlite.connections import Database, readable_rows
from haystack_chat_store.stores.sqlite.directory import id_range, seen
from haystack_chat_store.stores.sqlite.schema import key_range
from haystack_chat_store.stores.sqlite.term_index import TermIndex
from haystack_chat_store.stores.sqlite.visibility import IS_VISIBLE
from haystack_chat_store.stores.times import microseconds_now

# Of a user, an index finds the few. The parameters of all are ?2 the namespace, ?3 the user, ?4 the present time, and
# ?5 and ?6 the range of ids.
_IS_SEARCHED = f"namespace = ?2 AND {{plus}}chat_history_id >= ?5 AND {{plus}}chat_history_id < ?6 AND {IS_VISIBLE}"
_SELECT_FEW = f"SELECT history_key FROM haystack_chat_histories WHERE {_IS_SEARCHED.format(plus='')}"
_SELECT_FEW_OF_USER = f"""
    SELECT history_key FROM haystack_chat_histories INDEXED BY haystack_chat_histories_by_user
    WHERE user_id = ?3 AND {_IS_SEARCHED.format(plus="+")}
"""
_HISTORIES, _HISTORIES_OF_USER = (
    f"SELECT count(*), min(history_key), max(history_key) FROM ({few} LIMIT ?1)"
    for few in (_SELECT_FEW, _SELECT_FEW_OF_USER)
)
# {found} finds the keys of the best messages. The join leaves out those that another program has deleted.
_SEARCH = """
    SELECT chat_history_id, message_key & 0xffffffff, CAST(message_id AS TEXT), CAST(role AS TEXT),
        haystack_chat_messages.created_at, CAST(content AS TEXT), score
    FROM ({found}) CROSS JOIN haystack_chat_messages ON message_key = found_key
        CROSS JOIN haystack_chat_histories ON history_key = found_key >> 32
    ORDER BY score DESC, found_key
"""
# How much of a message is what the query asks for: see `search_text.relevance`. FTS5's own ranks depend on how many
# messages of the file have a term, whose ever they are. {shares} is a sum of what follows, one for each pattern.
_SCORE = "coalesce(({shares}) * 1.0 / length(CAST(terms AS BLOB)), 0.0)"
_SHARE = "length(CAST(terms AS BLOB)) - length(CAST(replace(terms, ?{number}, '') AS BLOB))"
# The keys of few histories are a range of the index.
_SEARCH_FEW, _SEARCH_FEW_OF_USER = (
    _SEARCH.format(
        found=f"""
        SELECT rowid AS found_key, {{score}} AS score FROM haystack_chat_terms
        WHERE haystack_chat_terms MATCH ?1 AND rowid BETWEEN ?8 AND ?9 AND rowid >> 32 IN ({few})
            AND EXISTS (SELECT 1 FROM haystack_chat_messages WHERE message_key = haystack_chat_terms.rowid)
        ORDER BY score DESC, found_key LIMIT ?7
    """
    )
    for few in (_SELECT_FEW, _SELECT_FEW_OF_USER)
)
# With many, each message that is found is looked up before it gets a score.
_SEARCH_MANY = _SEARCH.format(
    found=f"""
        SELECT haystack_chat_terms.rowid AS found_key, {{score}} AS score
        FROM haystack_chat_terms
            CROSS JOIN haystack_chat_messages ON message_key = haystack_chat_terms.rowid
            CROSS JOIN haystack_chat_histories ON history_key = haystack_chat_terms.rowid >> 32
        WHERE haystack_chat_terms MATCH ?1 AND {_IS_SEARCHED.format(plus="+")}
        ORDER BY score DESC, found_key LIMIT ?7
    """
)

# Up to this many histories, only their messages are looked at.
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
        """Ask FTS5 which messages match, and compare how much of each matches."""
        # The first text after an id is the id and a NUL.
        ids = id_range(prefix) if chat_history_id is None else (chat_history_id, f"{chat_history_id}\x00")
        histories = (scope.namespace, scope.user_id, microseconds_now(), *ids)
        of_user = scope.user_id is not None
        with session.snapshot() as connection:
            index = TermIndex.of(connection)
            index.check_not_newer()
            if not index.is_complete:
                return None if index.has_messages else []
            counted = seen(_HISTORIES_OF_USER if of_user else _HISTORIES, scope)
            count, first, last = connection.execute(counted, (_FEW_HISTORIES + 1, *histories)).fetchone()
            if count == 0:
                return []
            if count > _FEW_HISTORIES:
                statement = _SEARCH_MANY
            else:
                statement = _SEARCH_FEW_OF_USER if of_user else _SEARCH_FEW
            patterns = spaced_patterns(phrases)
            keys = (key_range(first)[0], key_range(last)[1])
            values = (_match_expression(phrases), *histories, limit, *keys, *patterns)
            rows = readable_rows(connection, seen(_scored(statement, len(patterns)), scope), values)
        return list(starmap(FoundRow, rows))

    def index_some(self, session: Database, scope: Scope, limit: int) -> bool:  # noqa: ARG002  (all namespaces)
        """Index the next messages by their keys, of all namespaces."""
        with session.transaction() as connection:
            index = TermIndex.of(connection)
            index.add_next(limit)
        if not index.is_complete:
            session.pause_for_other_writers()
        return not index.is_complete


def _scored(statement: str, patterns: int) -> str:
    """Return a search with its score. The parameters from ?10 on are the patterns."""
    shares = " + ".join(_SHARE.format(number=number) for number in range(10, 10 + patterns))
    return statement.format(score=_SCORE.format(shares=shares))


def _match_expression(phrases: Sequence[Phrase]) -> str:
    """Return the query for FTS5. Terms contain nothing that means anything to it."""
    return " AND ".join(f'"{" ".join(phrase.terms)}"{"*" if phrase.is_prefix else ""}' for phrase in phrases)
