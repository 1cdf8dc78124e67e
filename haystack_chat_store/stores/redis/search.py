# SPDX-License-Identifier: Apache-2.0
"""The operations on the index of words."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from haystack_chat_store.errors import MessageDecodingError, StoreTimeoutError, UnsupportedOperationError
from haystack_chat_store.search_text import Phrase, matches, relevance, searchable_text_of_content, terms
from haystack_chat_store.stores.redis.documents import (
    Unindexed,
    ask_index,
    index_next,
    query_of,
    read_unindexed,
    turn_on,
)
from haystack_chat_store.stores.redis.histories import id_range, is_branch, read_histories
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys, bucket_of
from haystack_chat_store.stores.redis.operations import RedisOperations
from haystack_chat_store.stores.redis.reading import read_part
from haystack_chat_store.stores.redis.schema import BATCH_SIZE, ROLES, id_and_role, number
from haystack_chat_store.stores.redis.scripts import searching as scripts
from haystack_chat_store.stores.redis.session import RETRY_PAUSE, Session
from haystack_chat_store.stores.rows import FoundRow, HistoryRow, Scope

# A search reads up to this many messages that are not indexed, in up to this many histories of each bucket.
_MOST_UNINDEXED = 1_000
_MOST_UNINDEXED_HISTORIES = 50
# Of the messages that the index finds, the shortest are read, these many at a time, until so many match.
_RANKED = 1_000
# The query engine returns no results beyond this many.
_MOST_RESULTS = 1_000_000
# How many messages one script reads.
_READ_PER_STEP = 200

_Places = Mapping[str, Iterable[int]]


class Search(RedisOperations):
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
        """
        Read the messages that the index finds and those that are not indexed, and rank those that match.

        Of more than a thousand, the shortest thousand are ranked.
        """
        keys = self.keys(scope)
        has_index = await _wait_for_index(session, keys)
        unindexed = await read_unindexed(session, keys, _MOST_UNINDEXED_HISTORIES + 1)
        if unindexed.is_of_newer_version:
            raise UnsupportedOperationError(
                "A newer version of haystack-chat-store made the search index. Upgrade haystack-chat-store to search."
            )
        if not has_index or not unindexed.is_on:
            return None if unindexed.has_histories else []

        def is_wanted(name: str) -> bool:
            return name.startswith(prefix) and chat_history_id in (None, name)

        query = query_of(phrases, chat_history_id, scope.user_id)
        found = await _matching_unindexed(session, scope, keys, phrases, unindexed, is_wanted)
        indexed = await _matching_indexed(session, scope, keys, phrases, query, max(limit, _RANKED), is_wanted)
        # A history that was handed over or renamed meanwhile has lost its words, and is noted.
        now = await read_unindexed(session, keys, _MOST_UNINDEXED_HISTORIES + 1)
        noted: dict[tuple[str, int], FoundRow] | None = {}
        if now.first_positions != unindexed.first_positions:
            noted = await _matching_unindexed(session, scope, keys, phrases, now, is_wanted)
        if found is None or indexed is None or noted is None:
            return None
        found = {**found, **indexed, **noted}
        return sorted(found.values(), key=lambda row: (-row.score, row.chat_history_id, row.position))[:limit]

    async def search_titles(
        self,
        session: Session,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[HistoryRow]:
        """Look at each title."""
        keys = self.keys(scope)
        parts: dict[int, str | None] = dict.fromkeys(range(BUCKETS), "")
        if chat_history_id is not None:
            parts, prefix = {bucket_of(chat_history_id): ""}, chat_history_id
        names: list[str] = []
        while parts:
            calls: list[tuple[Sequence[str], Sequence[str | int]]] = [
                (keys.of_bucket(bucket), [*id_range(prefix, after or ""), BATCH_SIZE, keys.user])
                for bucket, after in parts.items()
            ]
            answers = await session.run_each(scripts.TITLES, calls)
            titles = [
                (name, title)
                for _, found in answers
                for name, title in zip(found[::2], found[1::2], strict=True)
                if chat_history_id in (None, name)
            ]
            names += await session.to_thread(_matching_titles, phrases, titles)
            parts = {bucket: last for bucket, (last, _) in zip(parts, answers, strict=True) if last}
        histories = (each.row for each in (await read_histories(session, keys, names)).values())
        rows = [
            row
            for row in histories
            if matches(phrases, terms(row.title or "")) and (scope.with_branches or not is_branch(row))
        ]
        return sorted(rows, key=lambda row: (len(row.title or ""), -row.updated_at, row.chat_history_id))[:limit]

    async def index_some(self, session: Session, scope: Scope, limit: int) -> bool:
        """Turn search on in the namespace, and index the next messages. At the end, wait for the query engine."""
        keys = self.keys(scope)
        await turn_on(session, keys, everywhere=True)
        if await index_next(session, keys, limit):
            return True
        await _wait_for_index(session, keys)
        return False


async def _wait_for_index(session: Session, keys: Keys) -> bool:
    """
    Wait while the query engine looks through what was there before the index, or the server's start.

    :returns: Whether there is an index.
    """
    for _ in range(max(1, int(session.timeout / RETRY_PAUSE))):
        answer = await ask_index(session, "FT.INFO", keys.index_name())
        if answer is None:
            return False
        if not number(str(dict(zip(answer[::2], map(str, answer[1::2]), strict=True)).get("indexing"))):
            return True
        await session.pause()
    raise StoreTimeoutError("The query engine of Redis is still indexing messages. Search again when it has done so.")


async def _matching_indexed(
    session: Session,
    scope: Scope,
    keys: Keys,
    phrases: Sequence[Phrase],
    query: str,
    limit: int,
    is_wanted: Callable[[str], bool],
) -> dict[tuple[str, int], FoundRow] | None:
    """Read the messages that the index finds, the shortest first, until so many match. `None` if there is no index."""
    found: dict[tuple[str, int], FoundRow] = {}
    for offset in range(0, _MOST_RESULTS, _RANKED):
        page: list[str | int] = ["LIMIT", offset, _RANKED, "TIMEOUT", 0, "DIALECT", 2]
        answer = await ask_index(
            session, "FT.SEARCH", keys.index_name(), query, "NOCONTENT", "SORTBY", "size", "ASC", *page
        )
        if answer is None:  # another client has dropped it just now
            return None
        places = defaultdict(list)
        for name, position in filter(None, map(keys.place_of, answer[1:])):
            if is_wanted(name):
                places[name].append(position)
        found |= await _matching(session, scope, keys, phrases, places)
        if len(answer) <= _RANKED or len(found) >= limit:
            break
    return found


async def _matching_unindexed(
    session: Session,
    scope: Scope,
    keys: Keys,
    phrases: Sequence[Phrase],
    unindexed: Unindexed,
    is_wanted: Callable[[str], bool],
) -> dict[tuple[str, int], FoundRow] | None:
    """Read the wanted messages that are not indexed, and return those that match, or `None` if they are many."""
    of_buckets = Counter(map(bucket_of, unindexed.first_positions))
    if max(of_buckets.values(), default=0) > _MOST_UNINDEXED_HISTORIES:  # others are not known, and may be wanted
        return None
    first_positions = {name: first for name, first in unindexed.first_positions.items() if is_wanted(name)}
    places = await _read_unindexed_places(session, keys, first_positions)
    return None if places is None else await _matching(session, scope, keys, phrases, places)


def _matching_titles(phrases: Sequence[Phrase], titles: Sequence[tuple[str, str]]) -> list[str]:
    return [name for name, title in titles if matches(phrases, terms(title))]


async def _read_unindexed_places(
    session: Session, keys: Keys, first_positions: Mapping[str, int]
) -> dict[str, list[int]] | None:
    """Return the places of messages that are not indexed, or `None` if they are many."""
    if len(first_positions) > _MOST_UNINDEXED_HISTORIES:
        return None
    places: dict[str, list[int]] = {}
    room = _MOST_UNINDEXED
    for chat_history_id, first in first_positions.items():
        try:
            part = await read_part(session, keys, chat_history_id, room + 1, after=first - 1)
        except MessageDecodingError:  # its messages cannot be read
            continue
        room -= len(part.rows)
        if room < 0:
            return None
        places[chat_history_id] = [row.position for row in part.rows]
    return places


async def _matching(
    session: Session, scope: Scope, keys: Keys, phrases: Sequence[Phrase], places: _Places
) -> dict[tuple[str, int], FoundRow]:
    """Read messages of histories that the scope sees, and return those that match, by history and position."""
    histories = await read_histories(session, keys, list(places))
    by_bucket: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, history in histories.items():
        if scope.with_branches or not is_branch(history.row):
            by_bucket[bucket_of(name)] += [(name, position) for position in places[name]]
    found: dict[tuple[str, int], FoundRow] = {}
    for bucket, wanted in by_bucket.items():
        for first in range(0, len(wanted), _READ_PER_STEP):
            some = wanted[first : first + _READ_PER_STEP]
            positions: defaultdict[str, list[int]] = defaultdict(list)
            for name, position in some:
                positions[name].append(position)
            names = [
                key
                for each in map(keys.of_history, positions)
                for key in (each.counters, each.contents, each.roles, each.times)
            ]
            arguments = [part for each in positions.values() for part in (len(each), *each)]
            parts = await session.run(
                scripts.READ_PLACES, [keys.of_bucket(bucket).schema_version, *names], [*arguments, keys.user]
            )
            found |= await session.to_thread(_matching_rows, phrases, positions, parts)
    return found


def _matching_rows(
    phrases: Sequence[Phrase], positions: Mapping[str, Sequence[int]], parts: Sequence[str]
) -> dict[tuple[str, int], FoundRow]:
    found = {}
    places = [(name, position) for name, each in positions.items() for position in each]
    for place, letter, time, content in zip(places, parts[::3], parts[1::3], parts[2::3], strict=True):
        words = terms(searchable_text_of_content(content))
        if letter in ROLES and matches(phrases, words):
            message_id, _ = id_and_role(content) or ("", "")
            found[place] = FoundRow(
                chat_history_id=place[0],
                position=place[1],
                message_id=message_id,
                role=ROLES[letter],
                created_at=number(time),
                content=content,
                score=relevance(phrases, words),
            )
    return found
