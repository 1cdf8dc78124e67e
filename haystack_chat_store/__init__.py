# SPDX-License-Identifier: Apache-2.0
"""Durable chat histories for Haystack: the messages of each conversation, complete and in order."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from haystack.core.serialization import allow_deserialization_module

from haystack_chat_store.conversation.rounds import Window
from haystack_chat_store.conversation.turns import with_message_ids
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
    StoreConfigurationError,
    StoreTimeoutError,
    StoreUnavailableError,
    TranscriptError,
    UnsupportedOperationError,
)
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory import InMemoryChatMessageStore
from haystack_chat_store.stores.rows import (
    UNCHANGED,
    EncodedMessage,
    FoundRow,
    HistoryRow,
    MessageRow,
    Scope,
    WindowRows,
)
from haystack_chat_store.transcript_matcher import match_transcript, match_transcript_async
from haystack_chat_store.types import (
    AsyncChatMessageStore,
    ChatHistoryInfo,
    ChatHistoryPage,
    ChatMessageStore,
    Fault,
    HistoryWindow,
    MatchedTranscript,
    SearchHit,
    StoredMessage,
    StoreStatistics,
)
from haystack_chat_store.urls import store_from_url

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres import PostgresChatMessageStore
    from haystack_chat_store.stores.redis import RedisChatMessageStore
    from haystack_chat_store.stores.sqlite import SQLiteChatMessageStore

# Pipeline.loads then loads pipelines with these stores. Haystack already trusts the namespace of the components, and
# these import this package.
allow_deserialization_module("haystack_chat_store.stores")

__version__ = version("haystack-chat-store")

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
    "Engine",
    "Fault",
    "FoundRow",
    "HistoryRow",
    "HistoryWindow",
    "InMemoryChatMessageStore",
    "MatchedTranscript",
    "MessageDecodingError",
    "MessageEncodingError",
    "MessageNotFoundError",
    "MessageRow",
    "PostgresChatMessageStore",
    "RedisChatMessageStore",
    "SQLiteChatMessageStore",
    "SchemaVersionError",
    "Scope",
    "SearchHit",
    "StoreConfigurationError",
    "StoreStatistics",
    "StoreTimeoutError",
    "StoreUnavailableError",
    "StoredMessage",
    "TranscriptError",
    "UnsupportedOperationError",
    "Window",
    "WindowRows",
    "match_transcript",
    "match_transcript_async",
    "store_from_url",
    "with_message_ids",
]


# Stores that are imported on first use, because their drivers take time to import or may not be installed.
_STORES = {
    "PostgresChatMessageStore": "haystack_chat_store.stores.postgres",
    "RedisChatMessageStore": "haystack_chat_store.stores.redis",
    "SQLiteChatMessageStore": "haystack_chat_store.stores.sqlite",
}


def __getattr__(name: str) -> Any:
    """Import a store on first use."""
    if name in _STORES:
        return getattr(import_module(_STORES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
