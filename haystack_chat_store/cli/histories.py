# SPDX-License-Identifier: Apache-2.0
"""What commands look up in a store, and do with its histories."""

from collections.abc import Iterator
from contextlib import suppress

from haystack_chat_store.cli import terminal
from haystack_chat_store.display import harmless_line
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.conflicts import history_not_found
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage
from haystack_chat_store.validation import MAX_LIMIT

#: Notes and questions name up to this many things.
MAX_NAMED = 10


def pages_of(
    store: BaseChatMessageStore, prefix: str, limit: int | None = None, *, branches: bool = False
) -> Iterator[ChatHistoryPage]:
    """
    Yield the pages of the directory.

    :param limit: The greatest number of histories in all. `None` for no limit.
    """
    cursor, left = None, limit
    while True:
        size = MAX_LIMIT if left is None else min(left, MAX_LIMIT)
        page = store.list_chat_histories(prefix=prefix, branches=branches, limit=size, cursor=cursor)
        yield page
        cursor = page.cursor
        if left is not None:
            left -= len(page.items)
        if cursor is None or left == 0:
            return


def histories_of(store: BaseChatMessageStore, prefix: str = "", *, branches: bool = False) -> Iterator[ChatHistoryInfo]:
    """Yield the histories of the directory."""
    for page in pages_of(store, prefix, branches=branches):
        yield from page.items


def existing(store: BaseChatMessageStore, chat_history_id: str) -> ChatHistoryInfo:
    """
    Return the directory's entry of a history.

    :raises ChatHistoryNotFoundError: If there is no history with this id.
    """
    info = store.get_chat_history(chat_history_id)
    if info is None:
        raise history_not_found(chat_history_id)
    return info


def note_other_namespaces(store: BaseChatMessageStore) -> None:
    """Say where there are chat histories, if there are none in the store's namespace, unless it is one user's store."""
    if store.scope.user_id is not None:
        return
    with suppress(UnsupportedOperationError):
        names = store.list_namespaces()
        if names and store.namespace not in names:
            shown = ", ".join(map(harmless_line, names[:MAX_NAMED]))
            more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
            terminal.warning(
                f"The namespace {harmless_line(store.namespace)} is empty. There are chat histories in: {shown}{more}. "
                "Choose one: --namespace NAME"
            )
