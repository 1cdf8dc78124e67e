# SPDX-License-Identifier: Apache-2.0
"""
Durable chat history for Haystack: what was said in each conversation, kept in order and whole.
"""

from haystack.core.serialization import allow_deserialization_module

from haystack_chat_store.errors import ChatMessageStoreError
from haystack_chat_store.stores.in_memory import InMemoryChatMessageStore
from haystack_chat_store.stores.sqlite import SQLiteChatMessageStore
from haystack_chat_store.types import AsyncChatMessageStore, ChatMessageStore

# So that pipelines with our stores load from YAML with a plain Pipeline.loads. Haystack trusts the components' own
# namespace already, and they import this package.
allow_deserialization_module("haystack_chat_store")

__all__ = [
    "AsyncChatMessageStore",
    "ChatMessageStore",
    "ChatMessageStoreError",
    "InMemoryChatMessageStore",
    "SQLiteChatMessageStore",
]
