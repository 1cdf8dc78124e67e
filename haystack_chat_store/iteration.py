# SPDX-License-Identifier: Apache-2.0
"""Walks through all stored rows of a store, in memory that does not grow with the store."""

from collections.abc import Iterator, Sequence

from haystack_chat_store.errors import (
    MessageDecodingError,
    StoreConfigurationError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.reading import FIRST_PAGE, next_limit
from haystack_chat_store.stores.rows import HistoryRow, MessageRow

_BATCH_SIZE = 1_000


def walk_histories(store: BaseChatMessageStore, prefix: str = "") -> Iterator[HistoryRow]:
    """
    Walk through the histories, in the order of their ids.

    A history that exists during the whole walk is seen exactly once, whatever is written meanwhile.

    :param prefix: Only histories whose ids begin with this text. Defaults to all.
    """
    before, after = None, ""
    while after != before and (
        rows := store.engine.run(store.engine.histories_by_id, store.scope, prefix, after, _BATCH_SIZE)
    ):
        yield from rows
        before, after = after, rows[-1].chat_history_id  # both are equal after an empty id, which is damage


def walk_pages(store: BaseChatMessageStore, chat_history_id: str) -> Iterator[Sequence[MessageRow]]:
    """
    Walk through the messages of a history, in the order of their positions. The larger messages are, the smaller pages.
    """
    after, limit = -1, FIRST_PAGE
    while rows := store.engine.run(store.engine.page, store.scope, chat_history_id, None, after, limit):
        yield rows
        if len(rows) < limit:
            return
        after, limit = rows[-1].position, next_limit(rows)


def walk_readable_pages(store: BaseChatMessageStore, chat_history_id: str) -> Iterator[Sequence[MessageRow]]:
    """
    Walk through the messages of a history, and distinguish a damaged history from an engine that does not answer.

    :raises MessageDecodingError: If the engine works, but cannot read this history.
    :raises StoreUnavailableError: If the engine does not answer.
    """
    try:
        yield from walk_pages(store, chat_history_id)
    except StoreTimeoutError:
        raise
    except (StoreUnavailableError, StoreConfigurationError) as error:
        store.engine.run(store.engine.history, store.scope, chat_history_id)  # raises if the engine does not answer
        raise MessageDecodingError(f"The chat history {chat_history_id!r} cannot be read.") from error
