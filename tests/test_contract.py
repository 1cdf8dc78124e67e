# SPDX-License-Identifier: Apache-2.0
"""Every store of this package keeps the contract."""

import json
import time
import uuid

import pytest
from breadth import ENGINE, WHOLE
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing import ChatMessageStoreContract, ManagementContract
from haystack_chat_store.testing.messages import conversation, positions, user, with_id


class OurContract(ChatMessageStoreContract, ManagementContract):
    """Where the contract leaves a choice, all our stores make the same one."""

    @pytest.mark.parametrize("iterable", [tuple, iter, lambda messages: (message for message in messages)])
    def test_any_iterable_is_written_whole(self, store, calls, iterable):
        assert calls.write(store, "chat", iterable(conversation("uaua"))) == 4
        assert positions(calls.retrieve(store, "chat")) == [0, 1, 2, 3]

    def test_all_that_several_calls_wrote_before_the_first_search_is_found(self, new_store):
        store = new_store(search=True)
        for number in range(3):
            store.write_messages("a", [user(f"needle {number}"), user("pin")])
            store.write_messages("b", [user("needle")])
        found = sorted((hit.chat_history_id, hit.position) for hit in store.search_messages("needle"))
        assert found == [("a", 0), ("a", 2), ("a", 4), ("b", 0), ("b", 1), ("b", 2)]

    @pytest.mark.parametrize(
        "change",
        [
            lambda store: store.write_messages("history", [with_id("c")]),
            lambda store: store.write_messages("history", [with_id("a", "Oh!")], policy=DuplicatePolicy.OVERWRITE),
            lambda store: store.delete_messages("history", message_ids=["a"]),
            lambda store: store.delete_messages("history", from_message_id="b"),
            lambda store: [store.delete_messages("history", from_message_id="a"), store.copy_messages("b", "history")],
        ],
        ids=["write", "overwrite", "delete", "rewind", "copy"],
    )
    def test_a_clock_that_was_set_back_moves_no_history_back(self, new_store, change):
        store = new_store()
        in_an_hour = time.time_ns() // 1_000 + 3_600_000_000
        rows = [
            MessageRow(
                position=0,
                created_at=in_an_hour,
                message_id=name,
                role="user",
                content=json.dumps(with_id(name).to_dict()),
            )
            for name in "ab"
        ]
        store.engine.run(
            store.engine.import_history,
            store.scope,
            HistoryRow(
                chat_history_id="history",
                message_count=0,
                round_count=0,
                created_at=5,
                updated_at=in_an_hour,
                title=None,
                meta=None,
            ),
            [rows],
            0,
        )
        store.write_messages("b", [with_id("b")])
        change(store)
        assert store.get_chat_history("history").updated_at.timestamp() == in_an_hour / 10**6
        assert [each.chat_history_id for each in store.list_chat_histories().items] == ["history", "b"]


class TestInMemory(OurContract):
    breadth = WHOLE
    durable = False

    @pytest.fixture
    def make_store(self):
        made = []

        def make(**settings):
            made.append(InMemoryChatMessageStore(**{"namespace": namespace, **settings}))
            return made[-1]

        namespace = uuid.uuid4().hex
        for left in InMemoryChatMessageStore().list_namespaces():  # by other tests: they last as long as the process
            InMemoryChatMessageStore(namespace=left).delete_all_messages()
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

    @pytest.fixture
    def database_state(self, tmp_path):
        # SQLite may create the index of a log, and an empty log.
        names = ("chat.db", "chat.db-wal", "chat.db-journal")
        files = [tmp_path / name for name in names]
        return lambda: [file.read_bytes() for file in files if file.exists() and file.stat().st_size]
