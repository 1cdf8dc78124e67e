# SPDX-License-Identifier: Apache-2.0
"""
Durable chat history for Haystack: what was said in each conversation, kept in order and whole.
"""

from typing import TYPE_CHECKING, Any

from haystack.core.serialization import allow_deserialization_module

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    ChatMessageStoreError,
    ConflictError,
    DamagedFileError,
    DuplicateMessageError,
    MessageDecodingError,
    MessageEncodingError,
    MessageNotFoundError,
    SchemaVersionError,
    StoreTimeoutError,
    StoreUnavailableError,
    UnsupportedOperationError,
)
from haystack_chat_store.rounds import Window
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.in_memory import InMemoryChatMessageStore
from haystack_chat_store.stores.operations import UNCHANGED, EncodedMessage, FoundRow, HistoryRow, MessageRow
from haystack_chat_store.stores.sqlite import SQLiteChatMessageStore
from haystack_chat_store.types import (
    AsyncChatMessageStore,
    ChatHistoryInfo,
    ChatHistoryPage,
    ChatMessageStore,
    Fault,
    SearchHit,
    StoredMessage,
    StoreStatistics,
)
from haystack_chat_store.urls import store_from_url

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres import PostgresChatMessageStore
    from haystack_chat_store.stores.redis import RedisChatMessageStore

# So that pipelines with our stores load from YAML with a plain Pipeline.loads. Haystack trusts the components' own
# namespace already, and they import this package.
allow_deserialization_module("haystack_chat_store")

__all__ = [
    "UNCHANGED",
    "AsyncChatMessageStore",
    "BaseChatMessageStore",
    "ChatHistoryChangedError",
    "ChatHistoryExistsError",
    "ChatHistoryInfo",
    "ChatHistoryNotFoundError",
    "ChatHistoryPage",
    "ChatMessageStore",
    "ChatMessageStoreError",
    "ConflictError",
    "DamagedFileError",
    "DuplicateMessageError",
    "EncodedMessage",
    "Fault",
    "FoundRow",
    "HistoryRow",
    "InMemoryChatMessageStore",
    "MessageDecodingError",
    "MessageEncodingError",
    "MessageNotFoundError",
    "MessageRow",
    "PostgresChatMessageStore",
    "RedisChatMessageStore",
    "SQLiteChatMessageStore",
    "SchemaVersionError",
    "SearchHit",
    "StoreStatistics",
    "StoreTimeoutError",
    "StoreUnavailableError",
    "StoredMessage",
    "UnsupportedOperationError",
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
