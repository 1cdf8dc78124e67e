# SPDX-License-Identifier: Apache-2.0
"""
What users call to look into chat histories: pages of messages, and search.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from haystack_chat_store import search_text
from haystack_chat_store.codec import decode_messages
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores import arguments
from haystack_chat_store.stores.operations import FoundRow, MessageRow, SessionT
from haystack_chat_store.stores.steps import Step, SteppedOperations, Steps
from haystack_chat_store.types import SearchHit, StoredMessage

#: So many messages of a history are read first, before it is known how large they are.
FIRST_PAGE = 100
#: Pages of a walk through a history end at so many messages, or so many characters.
PAGE_ROWS = 1_000
PAGE_CHARACTERS = 4_000_000
# So many are indexed at once where a store is opened with search for the first time, to keep no writer waiting.
_INDEXED_AT_ONCE = 2_000


class Contents(SteppedOperations[SessionT]):
    """
    The public methods that look into histories.
    """

    #: Whether messages can be searched.
    search: bool

    def list_messages(
        self, chat_history_id: str, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> list[StoredMessage]:
        """
        Return a page of a history, in order: the newest messages, or those just before or after a position.

        :param chat_history_id: Which conversation. One that does not exist is empty.
        :param before: A position: the page ends just before it.
        :param after: A position: the page begins just after it, or with the first message if it is -1. Not both.
        :param limit: How many messages a page has at most: 1 to 1,000. Defaults to 100.
        :returns: Messages that are the caller's own, with their positions and times.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        return self._take(self._paging(chat_history_id, before, after, limit))

    async def list_messages_async(
        self, chat_history_id: str, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> list[StoredMessage]:
        """
        Do what `list_messages` does, without blocking the event loop.
        """
        return await self._take_async(self._paging(chat_history_id, before, after, limit))

    def iterate_messages(self, chat_history_id: str) -> Iterator[StoredMessage]:
        """
        Walk through a whole history from its beginning, reading a page at a time, in memory that does not grow with it.

        Messages that are written meanwhile are seen as well.

        :param chat_history_id: Which conversation. One that does not exist is empty.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        history = arguments.validated_id(chat_history_id, "chat_history_id")
        return self._iterated(history)

    def _iterated(self, history: str) -> Iterator[StoredMessage]:
        place = _Place()
        while page := self._take(self._next_page(history, place)):
            yield from page

    def iterate_messages_async(self, chat_history_id: str) -> AsyncIterator[StoredMessage]:
        """
        Do what `iterate_messages` does, for `async for`, without blocking the event loop.
        """
        history = arguments.validated_id(chat_history_id, "chat_history_id")
        return self._iterated_async(history)

    async def _iterated_async(self, history: str) -> AsyncIterator[StoredMessage]:
        place = _Place()
        while page := await self._take_async(self._next_page(history, place)):
            for stored in page:
                yield stored

    def search_messages(
        self, query: str, *, chat_history_id: str | None = None, prefix: str = "", limit: int = 20
    ) -> list[SearchHit]:
        """
        Find messages by their words, in what was said and in results of tools.

        All words have to be there, in any order; what stands in quotes has to be there as a phrase. Case, accents and
        punctuation do not count. In scripts without blanks between words, such as Chinese and Japanese, any part of a
        text is found. Nothing in a query is an operator. Of one message, the first 16,000 words are searched.

        The first search on a database that has not been searched before indexes what is there, in batches.

        :param query: What to look for: up to 1,000 characters. Without any word, nothing is found.
        :param chat_history_id: Only in this conversation. Defaults to `None`: in all.
        :param prefix: Only in histories whose ids begin with this text, taken literally. Defaults to all.
        :param limit: How many hits at most: 1 to 1,000. Defaults to 20.
        :returns: Hits, the best first.
        :raises ValueError: If an argument is wrong.
        :raises UnsupportedOperationError: If the store was made without `search=True`, or its engine has no search.
        :raises ChatMessageStoreError: If the engine fails.
        """
        return self._take(self._searching(query, chat_history_id, prefix, limit))

    async def search_messages_async(
        self, query: str, *, chat_history_id: str | None = None, prefix: str = "", limit: int = 20
    ) -> list[SearchHit]:
        """
        Do what `search_messages` does, without blocking the event loop.
        """
        return await self._take_async(self._searching(query, chat_history_id, prefix, limit))

    # ------------------------------------------------------------------ each of them once, in steps

    def _paging(
        self, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> "Steps[list[StoredMessage]]":
        history = arguments.validated_id(chat_history_id, "chat_history_id")
        before = arguments.validated_position(before, "before", 0)
        after = arguments.validated_position(after, "after", -1)
        if before is not None and after is not None:
            raise ValueError("A page is either before or after a position. Give one of the two.")
        limit = arguments.validated_number(limit, "limit", 1, arguments.MAX_LIMIT)
        rows: list[MessageRow] = yield Step(self._page, (history, before, after, limit))
        stored: list[StoredMessage] = yield Step(_stored, (rows,), _length)
        return stored

    def _next_page(self, history: str, place: "_Place") -> "Steps[list[StoredMessage]]":
        rows: list[MessageRow] = yield Step(self._page, (history, None, place.after, place.limit))
        if rows:
            place.after, place.limit = rows[-1].position, next_limit(rows)
        stored: list[StoredMessage] = yield Step(_stored, (rows,), _length)
        return stored

    def _searching(self, query: str, chat_history_id: str | None, prefix: str, limit: int) -> "Steps[list[SearchHit]]":
        phrases = search_text.parsed_query(arguments.validated_query(query))
        if chat_history_id is not None:
            chat_history_id = arguments.validated_id(chat_history_id, "chat_history_id")
        prefix = arguments.validated_text(prefix, "prefix")
        limit = arguments.validated_number(limit, "limit", 1, arguments.MAX_LIMIT)
        if not self.search:
            raise UnsupportedOperationError("This store cannot search messages: it was not made with search=True.")
        if not phrases or (chat_history_id is not None and not chat_history_id.startswith(prefix)):
            return []
        found: list[FoundRow] | None
        while (found := (yield Step(self._search, (phrases, chat_history_id, prefix, limit)))) is None:
            while (yield Step(self._index_some, (_INDEXED_AT_ONCE,))):
                pass
        hits: list[SearchHit] = yield Step(_hits, (found, phrases), _length)
        return hits


@dataclass
class _Place:
    """
    How far a walk through a history has come, and how many messages it reads next.
    """

    after: int = -1
    limit: int = FIRST_PAGE


def next_limit(rows: Sequence[MessageRow]) -> int:
    """
    Return how many messages the next page of a walk may have: the fewer, the larger those of this page are.
    """
    characters = sum(len(row.content) for row in rows)
    return max(1, min(PAGE_ROWS, PAGE_CHARACTERS * len(rows) // max(characters, 1)))


def _length(rows: Sequence[MessageRow | FoundRow], *_: object) -> int:
    return sum(len(row.content) for row in rows)


def _stored(rows: Sequence[MessageRow]) -> list[StoredMessage]:
    messages = decode_messages([row.content for row in rows])
    return [
        StoredMessage(row.position, arguments.readable_time(row.created_at), message)
        for row, message in zip(rows, messages, strict=True)
    ]


def _hits(rows: Sequence[FoundRow], phrases: Sequence[Phrase]) -> list[SearchHit]:
    return [
        SearchHit(row.chat_history_id, row.message_id, row.position, _snippet(row, phrases), row.score) for row in rows
    ]


def _snippet(row: FoundRow, phrases: Sequence[Phrase]) -> Any:
    return search_text.snippet(search_text.searchable_text_of_content(row.content), phrases)
