# SPDX-License-Identifier: Apache-2.0
"""What commands look up in a store, and do with its histories."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from haystack_chat_store.cli import terminal
from haystack_chat_store.display import harmless_line
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.ids import BRANCH_OF_KEY, branch_prefix, origin_of
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.conflicts import history_not_found
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage
from haystack_chat_store.validation import MAX_LIMIT

#: Notes and questions name up to this many things.
MAX_NAMED = 10


def pages_of(
    store: BaseChatMessageStore,
    prefix: str,
    limit: int | None = None,
    *,
    branches: bool = False,
    meta: dict[str, Any] | None = None,
) -> Iterator[ChatHistoryPage]:
    """
    Yield the pages of the directory.

    :param limit: The greatest number of histories in all. `None` for no limit.
    :param meta: Yield only histories with these values in their meta. Defaults to all.
    """
    cursor, left = None, limit
    while True:
        size = MAX_LIMIT if left is None else min(left, MAX_LIMIT)
        page = store.list_chat_histories(prefix=prefix, branches=branches, meta=meta, limit=size, cursor=cursor)
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


def with_branches(store: BaseChatMessageStore, history: ChatHistoryInfo) -> list[ChatHistoryInfo]:
    """Return a history and what is deleted with it: its branches, and theirs, but none of another user."""
    found = {history.chat_history_id: history}
    waiting = [history.chat_history_id]
    while waiting:
        origin = waiting.pop()
        for page in pages_of(store, branch_prefix(origin), branches=True, meta={BRANCH_OF_KEY: origin}):
            own = (each for each in page.items if each.user_id == history.user_id)
            branches = [each for each in own if origin_of(each.chat_history_id, origin)]
            new = {each.chat_history_id: each for each in branches if each.chat_history_id not in found}
            found |= new
            waiting += new
    return list(found.values())


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
