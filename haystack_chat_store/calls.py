# SPDX-License-Identifier: Apache-2.0
"""
How components and hooks call a store that follows the protocol but may have no asynchronous methods, or no `close`.
"""

import asyncio
from typing import Any, TypeVar

from haystack import DeserializationError, default_from_dict

from haystack_chat_store.types import ChatMessageStore

ComponentT = TypeVar("ComponentT")


def component_from_dict(kind: type[ComponentT], data: dict[str, Any]) -> ComponentT:
    """
    Make a component, and the store it was serialized with.

    :param kind: The component's class.
    :param data: The serialized component. It is not changed.
    :raises DeserializationError: If there is no store in it, or the store's class is not trusted or not there.
    """
    store = data.get("init_parameters", {}).get("chat_message_store")
    if not isinstance(store, dict) or "type" not in store:
        raise DeserializationError("init_parameters must have a 'chat_message_store' with the 'type' of the store.")
    try:
        return default_from_dict(kind, data)
    except ImportError as error:
        raise DeserializationError(f"The store's class {store['type']} cannot be imported: {error}") from error


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
