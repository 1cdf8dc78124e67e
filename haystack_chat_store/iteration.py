# SPDX-License-Identifier: Apache-2.0
"""
Walks through everything that a store has, as it is stored, in memory that does not grow with it.
"""

from collections.abc import Iterator, Sequence

from haystack_chat_store.errors import MessageDecodingError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.reading import FIRST_PAGE, next_limit
from haystack_chat_store.stores.rows import HistoryRow, MessageRow

# So many histories are looked up at once.
_HISTORIES_AT_ONCE = 1_000


def walk_histories(store: BaseChatMessageStore, prefix: str = "") -> Iterator[HistoryRow]:
    """
    Walk through the histories by their ids. Each that is there throughout is seen once, whatever is written meanwhile.

    :param prefix: What their ids begin with.
    """
    before, after = None, ""
    while after != before and (
        rows := store.engine.run(store.engine.histories_by_id, store.scope, prefix, after, _HISTORIES_AT_ONCE)
    ):
        yield from rows
        before, after = after, rows[-1].chat_history_id  # the same if an id is empty, which only damage makes it


def walk_pages(store: BaseChatMessageStore, chat_history_id: str) -> Iterator[Sequence[MessageRow]]:
    """
    Walk through the messages of a history by their positions, in pages, which are smaller where messages are large.
    """
    after, limit = -1, FIRST_PAGE
    while rows := store.engine.run(store.engine.page, store.scope, chat_history_id, None, after, limit):
        yield rows
        if len(rows) < limit:
            return
        after, limit = rows[-1].position, next_limit(rows)


def walk_readable_pages(store: BaseChatMessageStore, chat_history_id: str) -> Iterator[Sequence[MessageRow]]:
    """
    Do what `walk_pages` does, and tell a history that is damaged from an engine that does not answer.

    :raises MessageDecodingError: If it is this history that the engine cannot read.
    """
    try:
        yield from walk_pages(store, chat_history_id)
    except StoreTimeoutError:
        raise
    except StoreUnavailableError as error:
        store.engine.run(store.engine.history, store.scope, chat_history_id)  # raises if it is not only this history
        raise MessageDecodingError(f"The chat history {chat_history_id!r} cannot be read.") from error
