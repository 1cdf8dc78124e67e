# SPDX-License-Identifier: Apache-2.0
"""
The index of words: for each message a hash with the tags of its terms, which the server's query engine indexes.

A script that writes a message notes from which position on its history is not indexed, and one that changes, moves or
deletes a message removes its words. The store then adds the words of the new ones. If it cannot, or was made without
`search=True`, they stay noted: a search reads them itself as long as they are few.

A tag is a short digest. So it means nothing to the query language, and what is found is compared with the query.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from haystack import logging

from haystack_chat_store.errors import ChatMessageStoreError, MessageDecodingError, UnsupportedOperationError
from haystack_chat_store.search_text import Phrase, searchable_text_of_content, spaced, terms
from haystack_chat_store.stores.redis.failures import SlotsDifferError
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys
from haystack_chat_store.stores.redis.operations import RedisOperations
from haystack_chat_store.stores.redis.reading import MAX_COUNT, rows_of
from haystack_chat_store.stores.redis.schema import TERMS_VERSION, number
from haystack_chat_store.stores.redis.scripts import searching as scripts
from haystack_chat_store.stores.redis.session import Session

logger = logging.getLogger(__name__)

# How many messages one script indexes.
_INDEXED_PER_STEP = 200
# How many messages that others have left an append indexes, besides its own.
_INDEXED_PER_APPEND = 1_000
# The server expands a prefix of a tag to a limited number of tags. So the beginnings of a term are tags, too, up to
# this length; what begins with a longer one is among what begins with these characters.
_LONGEST_BEGINNING = 3
_DIGITS_OF_TAG = 6


class Document(NamedTuple):
    """
    What the index has of a message.

    :param size: The size of its terms, in bytes.
    :param tags: The tags of its terms and of their beginnings, separated by commas. Empty if it has no terms.
    """

    size: int
    tags: str


class Unindexed(NamedTuple):
    """
    What is not indexed in a namespace.

    :param is_on: Whether search is on wherever there are histories.
    :param is_used: Whether search is on anywhere.
    :param has_histories: Whether there are histories.
    :param is_of_newer_version: Whether only a newer version of this package makes the terms.
    :param first_positions: Histories, each with the first position of the messages that are not indexed.
    """

    is_on: bool
    is_used: bool
    has_histories: bool
    is_of_newer_version: bool
    first_positions: dict[str, int]


@lru_cache(maxsize=65_536)
def tag(text: str) -> str:
    """Return the tag of a text, which scripts and queries take as it is."""
    return f"x{hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:_DIGITS_OF_TAG]}"


def _tag_of_beginning(beginning: str) -> str:
    return tag(f"\x00{beginning}")


def document_of(content: str) -> Document:
    """Return what the index has of a stored message."""
    found = terms(searchable_text_of_content(content))
    different = dict.fromkeys(found)
    beginnings = dict.fromkeys(term[:length] for term in different for length in range(1, _LONGEST_BEGINNING + 1))
    tags = dict.fromkeys([*map(tag, different), *map(_tag_of_beginning, beginnings)])
    return Document(len(spaced(found).encode()), ",".join(tags))


def query_of(phrases: Sequence[Phrase], chat_history_id: str | None, user_id: str | None) -> str:
    """Return the query that finds all messages that match, and perhaps others."""
    wanted = [
        _tag_of_beginning(term[:_LONGEST_BEGINNING]) if phrase.is_prefix else tag(term)
        for phrase in phrases
        for term in phrase.terms
    ]
    parts = [f"@terms:{{{each}}}" for each in dict.fromkeys(wanted)]
    if chat_history_id is not None:
        parts.append(f"@history:{{{tag(chat_history_id)}}}")
    if user_id is not None:
        parts.append(f"@user:{{{tag(user_id)}}}")
    return " ".join(parts)


def document_fields(chat_history_id: str, user_id: str | None) -> tuple[str, str]:
    """Return the tags of a history and of its user."""
    return tag(chat_history_id), "" if user_id is None else tag(user_id)


async def ask_index(session: Session, *command: str | int) -> Any:
    """
    Have the query engine run a command, and return its answer, or `None` if there is no such index.

    :raises UnsupportedOperationError: If the server has no query engine.
    """
    (address,) = await session.masters()
    try:
        return await session.ask(address, *command)
    except ChatMessageStoreError as error:
        reply = str(error.__cause__).lower()
        if "unknown command" in reply:
            raise UnsupportedOperationError(
                f"Redis at {address} has no query engine, which search needs. Use Redis 8 or Redis Stack, or load its "
                "module RediSearch; or make the store without search=True."
            ) from None
        if any(text in reply for text in ("no such index", "unknown index name", "index not found")):
            return None
        raise


async def create_index(session: Session, keys: Keys) -> None:
    """
    Create the index of a namespace, unless it exists.

    Where search has never been on, there are no words yet. Then the engine need not look through all keys for them.

    :raises UnsupportedOperationError: If the server has no query engine.
    """
    tags = [part for name in ("history", "user", "terms") for part in (name, "TAG", "CASESENSITIVE")]
    prefixes: list[str | int] = ["PREFIX", BUCKETS, *keys.document_prefixes()]
    fields = ["SCHEMA", *tags, "size", "NUMERIC", "SORTABLE"]
    scan = [] if (await read_unindexed(session, keys, 1)).is_used else ["SKIPINITIALSCAN"]
    try:
        await ask_index(session, "FT.CREATE", keys.index_name(), "ON", "HASH", *prefixes, *scan, *fields)
    except ChatMessageStoreError as error:
        if "already exists" not in str(error.__cause__).lower():
            raise


async def turn_on(session: Session, keys: Keys, *, everywhere: bool) -> None:
    """
    Turn search on in a namespace.

    :param everywhere: Whether also in buckets that have histories, which are then to be indexed.
    """
    await create_index(session, keys)
    await session.run_each(scripts.TURN_ON, [(keys.of_bucket(bucket), [int(everywhere)]) for bucket in range(BUCKETS)])


async def read_unindexed(
    session: Session, keys: Keys, count: int, buckets: Iterable[int] = range(BUCKETS)
) -> Unindexed:
    """
    Return what is not indexed.

    :param count: How many histories of each bucket to return.
    :param buckets: The buckets to look at. Defaults to all.
    """
    # Not on a cluster, one script can take the keys of all buckets.
    names = [keys.of_bucket(bucket).schema_version for bucket in buckets]
    versions, are_there, noted = zip(*await session.run(scripts.UNINDEXED, names, [count]), strict=True)
    return Unindexed(
        is_on=all(
            number(version) >= TERMS_VERSION or not is_there
            for version, is_there in zip(versions, are_there, strict=True)
        ),
        is_used=any(versions),
        has_histories=any(are_there),
        is_of_newer_version=any(number(version) > TERMS_VERSION for version in versions),
        first_positions={name: int(first) for some in noted for name, first in zip(some[::2], some[1::2], strict=True)},
    )


async def is_searched(session: Session, keys: Keys) -> bool:
    """Return whether search is on anywhere in a namespace. Where its keys have different slots, it cannot be."""
    try:
        return (await read_unindexed(session, keys, 1)).is_used
    except SlotsDifferError:
        return False


async def index_history(session: Session, keys: Keys, chat_history_id: str, limit: int) -> int:
    """Index messages of a history that are not indexed, of about `limit` positions, and return of how many."""
    keys, done = keys.of_all_users(), 0
    while done < limit:
        arguments: list[str | int] = [chat_history_id, min(_INDEXED_PER_STEP, limit - done), ""]
        try:
            answer = await session.run(scripts.NEXT_UNINDEXED, keys.to_read(chat_history_id), arguments)
        except MessageDecodingError:  # its messages cannot be read, and are indexed when it is repaired
            return done
        start, state, user_id, end, found = answer
        if not start:
            return done
        rows = rows_of(found)
        if len(rows) == arguments[1]:
            end = rows[-1].position + 1
        contents = [row.content for row in rows]
        documents = await session.to_thread_if_large(contents, _documents, contents)
        added = [
            part
            for row, document in zip(rows, documents, strict=True)
            if document.tags
            for part in (row.position, *document)
        ]
        of_all = [chat_history_id, start, state, end, *document_fields(chat_history_id, user_id)]
        answer = await session.run(scripts.INDEX, keys.to_write(chat_history_id), [*of_all, *added, ""])
        if answer < 0:  # a process of another version indexes them
            return done
        if answer > 0:
            done += max(1, end - int(start))
        if answer == scripts.ALL_INDEXED:
            return done
    return done


def _documents(contents: Sequence[str]) -> list[Document]:
    return [document_of(content) for content in contents]


async def index_next(session: Session, keys: Keys, limit: int) -> bool:
    """Index about `limit` of the messages that are noted, and return whether there may be more."""
    tried: set[str] = set()
    done, count = 0, limit // BUCKETS + 1
    while True:
        noted = (await read_unindexed(session, keys, count)).first_positions
        for chat_history_id in noted:
            if done >= limit:
                return True
            if chat_history_id not in tried:
                tried.add(chat_history_id)
                done += await index_history(session, keys, chat_history_id, limit - done)
        # What cannot be indexed (a damaged history, or what a process of another version indexes) may stand first.
        if done or len(noted) < count:
            return done > 0
        count *= 2


async def prepare_index(engine: RedisOperations, session: Session, keys: Keys) -> None:
    """Before a change, turn search on where there are no histories yet, if the store is one that searches."""
    if engine.is_searching and keys.namespace not in engine.searched_namespaces:
        await turn_on(session, keys, everywhere=False)
        engine.searched_namespaces.add(keys.namespace)


async def index_written(
    engine: RedisOperations, session: Session, keys: Keys, chat_history_id: str, appended: int | None = None
) -> None:
    """
    Index what was written to a history, if the store is one that searches.

    The messages are stored. If indexing fails, they stay noted.

    :param appended: How many messages were appended, if the write did nothing else. Then only a part of what a store
        without search has left before them is indexed, so that the caller does not wait for a whole history.
    """
    if engine.is_searching:
        limit = MAX_COUNT if appended is None else appended + _INDEXED_PER_APPEND
        try:
            await index_history(session, keys, chat_history_id, limit)
        except ChatMessageStoreError as error:
            logger.warning("Messages were stored in Redis, and could not be indexed: {error}", error=str(error))
