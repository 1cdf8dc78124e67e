# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder take: stores that share nothing, one with a few histories, and the path of a file."""

import uuid
from contextlib import ExitStack

import pytest

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.testing.messages import conversation


@pytest.fixture
def memory():
    """Makes stores in memory that share nothing."""
    with ExitStack() as stack:

        def make():
            store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex, last_k=None, skip_system_messages=False)
            stack.callback(store.delete_all_messages)
            return store

        yield make


@pytest.fixture
def store(memory):
    return memory()


@pytest.fixture
def target(memory):
    return memory()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "histories.jsonl"


@pytest.fixture
def sqlite(tmp_path):
    return SQLiteChatMessageStore(tmp_path / "chat.db", last_k=None)


@pytest.fixture
def several(store):
    for name in ("a/1", "a/2", "b/1"):
        store.write_messages(name, conversation("ua"))
    return store
