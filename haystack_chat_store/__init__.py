# SPDX-License-Identifier: Apache-2.0
"""
Durable chat history for Haystack: what was said in each conversation, kept in order and whole.
"""

from typing import TYPE_CHECKING, Any

from haystack.core.serialization import allow_deserialization_module

from haystack_chat_store.errors import (
    ChatMessageStoreError,
    MessageDecodingError,
    MessageEncodingError,
    SchemaVersionError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.rounds import Window
from haystack_chat_store.stores.base import BaseChatMessageStore, EncodedMessage
from haystack_chat_store.stores.in_memory import InMemoryChatMessageStore
from haystack_chat_store.stores.sqlite import SQLiteChatMessageStore
from haystack_chat_store.types import AsyncChatMessageStore, ChatMessageStore
from haystack_chat_store.urls import store_from_url

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres import PostgresChatMessageStore
    from haystack_chat_store.stores.redis import RedisChatMessageStore

# So that pipelines with our stores load from YAML with a plain Pipeline.loads. Haystack trusts the components' own
# namespace already, and they import this package.
allow_deserialization_module("haystack_chat_store")

__all__ = [
    "AsyncChatMessageStore",
    "BaseChatMessageStore",
    "ChatMessageStore",
    "ChatMessageStoreError",
    "EncodedMessage",
    "InMemoryChatMessageStore",
    "MessageDecodingError",
    "MessageEncodingError",
    "PostgresChatMessageStore",
    "RedisChatMessageStore",
    "SQLiteChatMessageStore",
    "SchemaVersionError",
    "StoreTimeoutError",
    "StoreUnavailableError",
    "Window",
    "store_from_url",
]


def __getattr__(name: str) -> Any:
    """
    Import the stores that need a driver only when they are used.
    """
    if name == "PostgresChatMessageStore":
        from haystack_chat_store.stores.postgres import PostgresChatMessageStore

        return PostgresChatMessageStore
    if name == "RedisChatMessageStore":
        from haystack_chat_store.stores.redis import RedisChatMessageStore

        return RedisChatMessageStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
