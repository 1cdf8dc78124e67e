# SPDX-License-Identifier: Apache-2.0
import sqlite3
import uuid
from contextlib import closing, contextmanager

import pytest
from breadth import ENGINE, WHOLE

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.testing.concurrency import ConcurrencyTest
from haystack_chat_store.testing.processes import ProcessesTest


class TestInMemory(ConcurrencyTest):
    breadth = WHOLE
    durable = False

    @pytest.fixture
    def make_store(self):
        namespace = uuid.uuid4().hex

        def make(**settings):
            return InMemoryChatMessageStore(**{"namespace": namespace, **settings})

        return make


class TestSQLite(ConcurrencyTest, ProcessesTest):
    breadth = ENGINE

    @pytest.fixture
    def make_store(self, tmp_path):
        def make(**settings):
            return SQLiteChatMessageStore(tmp_path / "chat_history.db", **settings)

        return make

    @contextmanager
    def stalled(self, store):
        with closing(sqlite3.connect(store.path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield

    def assert_sound(self, store):
        with closing(sqlite3.connect(store.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            counters = (
                "SELECT next_position, message_count, round_count FROM haystack_chat_histories ORDER BY history_key"
            )
            counted = """
                SELECT max(message_key & 0xffffffff) + 1, count(*), sum(role = 'user') FROM haystack_chat_messages
                GROUP BY message_key >> 32 ORDER BY message_key >> 32
            """
            assert connection.execute(counters).fetchall() == connection.execute(counted).fetchall()
