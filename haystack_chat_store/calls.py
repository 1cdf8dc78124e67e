# SPDX-License-Identifier: Apache-2.0
"""
How components and hooks call a store that follows the protocol but may have no asynchronous methods, or no `close`.
"""

import asyncio
from typing import Any

from haystack_chat_store.types import ChatMessageStore


async def call_async(store: ChatMessageStore, method: str, *arguments: Any) -> Any:
    """
    Await the asynchronous twin of a store's method or, where there is none, run the method in a thread.
    """
    twin = getattr(store, f"{method}_async", None)
    if twin is not None:
        return await twin(*arguments)
    return await asyncio.to_thread(getattr(store, method), *arguments)


def close(store: ChatMessageStore) -> None:
    """
    Close a store that can be closed.
    """
    if hasattr(store, "close"):
        store.close()


async def close_async(store: ChatMessageStore) -> None:
    """
    Close a store that can be closed, without blocking the event loop.
    """
    if hasattr(store, "close_async") or hasattr(store, "close"):
        await call_async(store, "close")
