# SPDX-License-Identifier: Apache-2.0
"""
Every store of this package keeps the contract.
"""

import uuid

import pytest
from breadth import ENGINE, WHOLE

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.testing import ChatMessageStoreContract, ManagementContract
from haystack_chat_store.testing.messages import conversation, positions


class OurContract(ChatMessageStoreContract, ManagementContract):
    """
    Where the contract leaves a choice, all our stores make the same one.
    """

    @pytest.mark.parametrize("iterable", [tuple, iter, lambda messages: (message for message in messages)])
    def test_any_iterable_is_written_whole(self, store, calls, iterable):
        assert calls.write(store, "chat", iterable(conversation("uaua"))) == 4
        assert positions(calls.retrieve(store, "chat")) == [0, 1, 2, 3]


class TestInMemory(OurContract):
    breadth = WHOLE
    durable = False

    @pytest.fixture
    def make_store(self):
        made = []

        def make(**settings):
            made.append(InMemoryChatMessageStore(**{"namespace": namespace, **settings}))
            return made[-1]

        namespace = uuid.uuid4().hex  # the histories of one process last from test to test
        yield make
        for store in made:
            store.delete_all_messages()


class TestSQLite(OurContract):
    breadth = ENGINE

    @pytest.fixture
    def make_store(self, tmp_path):
        return lambda **settings: SQLiteChatMessageStore(tmp_path / "chat.db", **settings)

    @pytest.fixture
    def make_unreachable_store(self, tmp_path):
        return lambda **settings: SQLiteChatMessageStore(tmp_path, **settings)  # a folder, which is no database
