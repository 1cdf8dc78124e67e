# SPDX-License-Identifier: Apache-2.0
"""
Walks through everything that a store has, as it is stored, in memory that does not grow with it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.contents import FIRST_PAGE, next_limit
from haystack_chat_store.stores.operations import HistoryRow, MessageRow

# So many histories are looked up at once.
_HISTORIES_AT_ONCE = 1_000


def walked_histories(store: BaseChatMessageStore[Any], prefix: str = "") -> Iterator[HistoryRow]:
    """
    Walk through the histories by their ids. Each that is there throughout is seen once, whatever is written meanwhile.

    :param prefix: What their ids begin with.
    """
    after = ""
    while rows := store._run(store._histories_by_id, prefix, after, _HISTORIES_AT_ONCE):
        yield from rows
        after = rows[-1].chat_history_id


def walked_pages(store: BaseChatMessageStore[Any], chat_history_id: str) -> Iterator[Sequence[MessageRow]]:
    """
    Walk through the messages of a history by their positions, in pages, which are smaller where messages are large.
    """
    after, limit = -1, FIRST_PAGE
    while rows := store._run(store._page, chat_history_id, None, after, limit):
        yield rows
        if len(rows) < limit:
            return
        after, limit = rows[-1].position, next_limit(rows)
