# SPDX-License-Identifier: Apache-2.0
import sqlite3
import uuid
from contextlib import contextmanager

import pytest

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.testing.concurrency import ConcurrencyContract


class TestInMemory(ConcurrencyContract):
    durable = False

    @pytest.fixture
    def make_store(self):
        namespace = uuid.uuid4().hex

        def make(**settings):
            return InMemoryChatMessageStore(**{"namespace": namespace, **settings})

        return make


class TestSQLite(ConcurrencyContract):
    @pytest.fixture
    def make_store(self, tmp_path):
        def make(**settings):
            return SQLiteChatMessageStore(tmp_path / "chat_history.db", **settings)

        return make

    @contextmanager
    def stalled(self, store):
        connection = sqlite3.connect(store.path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
        connection.close()
