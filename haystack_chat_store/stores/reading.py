# SPDX-License-Identifier: Apache-2.0
"""The public methods of stores that read messages: windows, pages, and search."""

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from haystack.dataclasses import ChatMessage

from haystack_chat_store import search_text, validation
from haystack_chat_store.codec import decode_messages
from haystack_chat_store.conversation import rounds
from haystack_chat_store.conversation.rounds import LastKUnit, Window
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.conflicts import only_one_user
from haystack_chat_store.stores.directory import seen_scope
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import FoundRow, HistoryRow, MessageRow, Scope, WindowRows
from haystack_chat_store.stores.sync_async import to_thread_if_large
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.types import HistoryWindow, SearchHit, StoredMessage

#: The number of messages on the first page of a walk through a history, whose message sizes are unknown.
FIRST_PAGE = 100
#: The largest page of a walk through a history, in messages and in characters.
PAGE_ROWS = 1_000
PAGE_CHARACTERS = 4_000_000
# The number of messages that one step indexes. Other writers wait no longer than for one step.
_INDEX_BATCH_SIZE = 2_000


class ReadingMethods:
    """The public methods of stores that read and search messages."""

    engine: Engine[Any]
    scope: Scope
    last_k: int | None
    last_k_unit: LastKUnit
    search: bool
    renew_ttl_on_read: bool

    @abstractmethod
    def _scope_of(self, user_id: str | None) -> Scope:
        """Return this store's scope, limited to a user."""

    def retrieve_messages(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """
        Return the last rounds of a history, oldest message first.

        A round begins at each user message and lasts until the next one, so a window never begins in the middle of an
        exchange. If the history has fewer than `last_k` rounds, the messages before its first user message are
        returned, too. (With `last_k_unit="message"`, `last_k` counts single messages, and more are returned if a tool
        result would otherwise come without its call.)

        :param chat_history_id: The history's id. A history that does not exist is empty.
        :param last_k: The number of rounds, 0 for none. Defaults to `None`: the store's own `last_k`.
        :param window_step: The start of the window moves only in steps of this many rounds: it is the first round, or
            a multiple of `window_step` after it. The window then holds up to `window_step - 1` rounds more than
            `last_k`. Defaults to 1. (With `last_k_unit="message"`, it counts messages.)
        :returns: New message objects, each with its id in `meta["chat_message_id"]`.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        if window.count == 0:
            return []
        rows = self.engine.run(self.engine.read, self.scope, chat_history_id, window)
        if rows.contents and self.renew_ttl_on_read:
            self.engine.run(self.engine.renew, self.scope, chat_history_id)
        return _decoded(rows, window)

    async def retrieve_messages_async(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """Do what `retrieve_messages` does, without blocking the event loop."""
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        if window.count == 0:
            return []
        rows = await self.engine.run_async(self.engine.read, self.scope, chat_history_id, window)
        if rows.contents and self.renew_ttl_on_read:
            await self.engine.run_async(self.engine.renew, self.scope, chat_history_id)
        return await to_thread_if_large(sum(map(len, rows.contents)), _decoded, rows, window)

    def retrieve_window(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> HistoryWindow:
        """
        Return what `retrieve_messages` returns, with the revision and the number of rounds of the whole history.

        :param chat_history_id: The history's id. A history that does not exist is empty, and has revision 0.
        :param last_k: The number of rounds, 0 for none. Defaults to `None`: the store's own `last_k`.
        :param window_step: The start of the window moves only in steps of this many rounds. Defaults to 1.
        :returns: New message objects, the revision and the number of rounds, all as of one moment.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        rows = self.engine.run(self.engine.read, self.scope, chat_history_id, _at_least_one(window))
        if rows.contents and self.renew_ttl_on_read:
            self.engine.run(self.engine.renew, self.scope, chat_history_id)
        return _history_window(rows, window)

    async def retrieve_window_async(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> HistoryWindow:
        """Do what `retrieve_window` does, without blocking the event loop."""
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        rows = await self.engine.run_async(self.engine.read, self.scope, chat_history_id, _at_least_one(window))
        if rows.contents and self.renew_ttl_on_read:
            await self.engine.run_async(self.engine.renew, self.scope, chat_history_id)
        return await to_thread_if_large(sum(map(len, rows.contents)), _history_window, rows, window)

    def count_messages(self, chat_history_id: str) -> int:
        """
        Return the number of messages in a history. It is read from a counter, so it costs the same for any length.

        :param chat_history_id: The history's id. A history that does not exist has 0 messages.
        :raises ValueError: If `chat_history_id` is not a valid id.
        :raises ChatMessageStoreError: If the engine fails.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        return self.engine.run(self.engine.count, self.scope, chat_history_id)

    async def count_messages_async(self, chat_history_id: str) -> int:
        """Do what `count_messages` does, without blocking the event loop."""
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        return await self.engine.run_async(self.engine.count, self.scope, chat_history_id)

    def list_messages(
        self, chat_history_id: str, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> list[StoredMessage]:
        """
        Return a page of a history, in order: the newest messages, or those just before or after a position.

        :param chat_history_id: The history's id. A history that does not exist is empty.
        :param before: A position. The page ends just before it. Defaults to `None`.
        :param after: A position. The page begins just after it, or with the first message if it is -1. Defaults to
            `None`. Cannot be given together with `before`.
        :param limit: The largest number of messages on the page, 1 to 1,000. Defaults to 100.
        :returns: New message objects, with their positions and times.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        page = validation.validated_page(chat_history_id, before, after, limit)
        rows = self.engine.run(self.engine.page, self.scope, *page)
        if rows and self.renew_ttl_on_read:
            self.engine.run(self.engine.renew, self.scope, page[0])
        return stored_messages(rows)

    async def list_messages_async(
        self, chat_history_id: str, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> list[StoredMessage]:
        """Do what `list_messages` does, without blocking the event loop."""
        page = validation.validated_page(chat_history_id, before, after, limit)
        rows = await self.engine.run_async(self.engine.page, self.scope, *page)
        if rows and self.renew_ttl_on_read:
            await self.engine.run_async(self.engine.renew, self.scope, page[0])
        return await to_thread_if_large(_characters(rows), stored_messages, rows)

    def iterate_messages(self, chat_history_id: str) -> Iterator[StoredMessage]:
        """
        Walk through a whole history from its beginning, page by page, in memory that does not grow with the history.

        Messages that are written during the walk are seen, too.

        :param chat_history_id: The history's id. A history that does not exist is empty.
        :raises ValueError: If `chat_history_id` is not a valid id.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        return self._iterated(chat_history_id)

    def _iterated(self, history: str) -> Iterator[StoredMessage]:
        after, limit = -1, FIRST_PAGE
        if self.renew_ttl_on_read:
            self.list_messages(history, limit=1)
        while rows := self.engine.run(self.engine.page, self.scope, history, None, after, limit):
            yield from stored_messages(rows)
            after, limit = rows[-1].position, next_limit(rows)

    def iterate_messages_async(self, chat_history_id: str) -> AsyncIterator[StoredMessage]:
        """
        Do what `iterate_messages` does, for `async for`, without blocking the event loop. The call is not awaited.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        return self._iterated_async(chat_history_id)

    async def _iterated_async(self, history: str) -> AsyncIterator[StoredMessage]:
        after, limit = -1, FIRST_PAGE
        if self.renew_ttl_on_read:
            await self.list_messages_async(history, limit=1)
        while rows := await self.engine.run_async(self.engine.page, self.scope, history, None, after, limit):
            for message in await to_thread_if_large(_characters(rows), stored_messages, rows):
                yield message
            after, limit = rows[-1].position, next_limit(rows)

    def search_messages(
        self,
        query: str,
        *,
        chat_history_id: str | None = None,
        prefix: str = "",
        user_id: str | None = None,
        branches: bool = False,
        match_prefix: bool = False,
        limit: int = 20,
    ) -> list[SearchHit]:
        """
        Find messages, and titles of histories, by their words. Texts and tool results are searched.

        A message or title is found if it has all words of the query, in any order, and all phrases in quotation marks.
        Case, accents and punctuation are ignored. Emoji and other symbols are found, as are `C++` and `#42`. In scripts
        without spaces, such as Chinese and Japanese, any part of a text is found. A query has no operators. The first
        16,000 words of a message are searched.

        A search changes nothing. A store made with `search=True` indexes messages as it writes them. To index messages
        that the database had before, call `index_messages` once.

        :param query: The words and phrases to find, up to 1,000 characters. A query without words finds nothing.
        :param chat_history_id: Only messages of this history. Defaults to `None`: all histories.
        :param prefix: Only messages of histories whose ids begin with this text, taken literally. Defaults to all.
        :param user_id: Only messages of histories of this user. Defaults to `None`: all histories.
        :param branches: Whether messages of branches are found, too. Those of `chat_history_id` always are. Defaults to
            False.
        :param match_prefix: Whether the query's last word may be the beginning of a word, for searching while a user
            types: `kyo` finds Kyoto. Defaults to False.
        :param limit: The largest number of hits, 1 to 1,000. Defaults to 20.
        :returns: The hits, the best first: titles, the shortest first, and then messages. The hit of a title has no
            `message_id`, `position` and `role`.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If this store belongs to another user.
        :raises UnsupportedOperationError: If the store was created without `search=True`, its engine has no search, or
            some messages are not indexed.
        :raises ChatMessageStoreError: If the engine fails.
        """
        scope = self._scope_of(user_id)
        seen = seen_scope(scope, branches)
        scope = seen if chat_history_id is None else scope
        search = self._checked_search(query, chat_history_id, prefix, match_prefix, limit)
        if search is None:
            return []
        found = self.engine.run(self.engine.search, scope, *search)
        if found is None:
            raise _not_indexed()
        titles = self.engine.run(self.engine.search_titles, scope, *search)
        return _hits(titles, found, search[0])[:limit]

    async def search_messages_async(
        self,
        query: str,
        *,
        chat_history_id: str | None = None,
        prefix: str = "",
        user_id: str | None = None,
        branches: bool = False,
        match_prefix: bool = False,
        limit: int = 20,
    ) -> list[SearchHit]:
        """Do what `search_messages` does, without blocking the event loop."""
        scope = self._scope_of(user_id)
        seen = seen_scope(scope, branches)
        scope = seen if chat_history_id is None else scope
        search = self._checked_search(query, chat_history_id, prefix, match_prefix, limit)
        if search is None:
            return []
        found = await self.engine.run_async(self.engine.search, scope, *search)
        if found is None:
            raise _not_indexed()
        titles = await self.engine.run_async(self.engine.search_titles, scope, *search)
        hits = await to_thread_if_large(_characters(found), _hits, titles, found, search[0])
        return hits[:limit]

    def index_messages(self, progress: Callable[[int, int | None], None] | None = None) -> None:
        """
        Index the messages that are not indexed yet, in batches, so that other writers can go on between two batches.

        :param progress: Called after each batch but the last, with the number of messages indexed so far, and `None`.
            Defaults to `None`: no calls.
        :raises ChatHistoryAccessError: If this store belongs to one user, because all users share the index.
        :raises UnsupportedOperationError: If the store was created without `search=True`, or its engine has no search.
        :raises ChatMessageStoreError: If the engine fails. Messages that were indexed stay indexed.
        """
        self._check_indexing()
        indexed = 0
        while self.engine.run(self.engine.index_some, self.scope, _INDEX_BATCH_SIZE):
            indexed += _INDEX_BATCH_SIZE
            if progress is not None:
                progress(indexed, None)

    async def index_messages_async(self, progress: Callable[[int, int | None], None] | None = None) -> None:
        """Do what `index_messages` does, without blocking the event loop."""
        self._check_indexing()
        indexed = 0
        while await self.engine.run_async(self.engine.index_some, self.scope, _INDEX_BATCH_SIZE):
            indexed += _INDEX_BATCH_SIZE
            if progress is not None:
                progress(indexed, None)

    def _checked_search(
        self, query: str, chat_history_id: str | None, prefix: str, match_prefix: bool, limit: int
    ) -> tuple[list[Phrase], str | None, str, int] | None:
        """Return the arguments of the engine's search, or `None` if the query cannot match any message."""
        match_prefix = validation.validated_flag(match_prefix, "match_prefix")
        phrases = search_text.parsed_query(validation.validated_query(query), match_prefix=match_prefix)
        if chat_history_id is not None:
            chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        prefix = validation.validated_text(prefix, "prefix")
        limit = validation.validated_number(limit, "limit", 1, validation.MAX_LIMIT)
        self._check_searchable()
        if not phrases or (chat_history_id is not None and not chat_history_id.startswith(prefix)):
            return None
        return phrases, chat_history_id, prefix, limit

    def _check_indexing(self) -> None:
        if self.scope.user_id is not None:
            raise only_one_user("index the messages of all users")
        self._check_searchable()

    def _checked_window(self, last_k: int | None, window_step: int) -> Window:
        validation.validate_last_k(last_k)
        validation.validate_window_step(window_step)
        return Window(self.last_k_unit, self.last_k if last_k is None else last_k, window_step)

    def _check_searchable(self) -> None:
        if not self.search:
            raise UnsupportedOperationError("This store cannot search messages. Create it with search=True.")


def _not_indexed() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "Some messages are not indexed yet, and searching changes nothing. Index them: call index_messages() of a "
        "store made with search=True, or run `haystack-chat-store index`."
    )


def _at_least_one(window: Window) -> Window:
    """Return the window, or one of a single round or message: an engine cannot read an empty window."""
    return Window(window.unit, 1) if window.count == 0 else window


def _history_window(rows: WindowRows, window: Window) -> HistoryWindow:
    messages = [] if window.count == 0 else _decoded(rows, window)
    return HistoryWindow(messages=messages, revision=rows.revision, round_count=rows.round_count)


def _decoded(rows: WindowRows, window: Window) -> list[ChatMessage]:
    messages = decode_messages(rows.contents)
    if window.unit == "message" and window.count is not None:
        return rounds.last_messages(messages, rows.size)
    return messages


def next_limit(rows: Sequence[MessageRow]) -> int:
    """Return the number of messages for the next page of a walk. The larger the messages of this page, the fewer."""
    return max(1, min(PAGE_ROWS, PAGE_CHARACTERS * len(rows) // max(_characters(rows), 1)))


def _characters(rows: Sequence[MessageRow] | Sequence[FoundRow]) -> int:
    return sum(len(row.content) for row in rows)


def stored_messages(rows: Sequence[MessageRow]) -> list[StoredMessage]:
    """
    Decode messages.

    :raises MessageDecodingError: If one of them cannot be decoded.
    """
    messages = decode_messages([row.content for row in rows])
    return [
        StoredMessage(position=row.position, created_at=readable_time(row.created_at), message=message)
        for row, message in zip(rows, messages, strict=True)
    ]


def _hits(titles: Sequence[HistoryRow], rows: Sequence[FoundRow], phrases: Sequence[Phrase]) -> list[SearchHit]:
    """Return the hits of titles, with greater scores than those of messages, which come after them."""
    best = max((row.score for row in rows), default=0.0)
    of_titles = [
        SearchHit(
            chat_history_id=row.chat_history_id,
            message_id=None,
            position=None,
            role=None,
            created_at=readable_time(row.created_at),
            snippet=search_text.snippet(row.title or "", phrases),
            score=best + left,
        )
        for left, row in zip(range(len(titles), 0, -1), titles, strict=True)
    ]
    return of_titles + [
        SearchHit(
            chat_history_id=row.chat_history_id,
            message_id=row.message_id,
            position=row.position,
            role=row.role,
            created_at=readable_time(row.created_at),
            snippet=search_text.snippet(search_text.searchable_text_of_content(row.content), phrases),
            score=row.score,
        )
        for row in rows
    ]
