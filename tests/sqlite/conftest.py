# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder take: the path of a database file, and stores on it."""

import asyncio

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import SQLiteChatMessageStore


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "chat_history.db")


@pytest.fixture
def new_store(path):
    made = []

    def new(path=path, **settings):
        made.append(SQLiteChatMessageStore(path, **{"last_k": None, **settings}))
        return made[-1]

    yield new
    for store in made:
        store.close()


@pytest.fixture
def store(new_store):
    return new_store(timeout=0.2)


@pytest.fixture(params=["sync", "async"])
def write(request):
    def write(store, text, history="history"):
        messages = [ChatMessage.from_user(text), ChatMessage.from_assistant(f"You said: {text}")]
        if request.param == "sync":
            return store.write_messages(history, messages)
        return asyncio.run(store.write_messages_async(history, messages))

    return write
