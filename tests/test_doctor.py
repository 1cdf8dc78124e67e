# SPDX-License-Identifier: Apache-2.0
"""
The doctor finds what is damaged in a store, and removes nothing that it has not saved.
"""

import asyncio
import json
import sqlite3

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore, UnsupportedOperationError
from haystack_chat_store.doctor import check, check_async, examined_messages
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.testing.messages import conversation, sample_messages

NO_MESSAGE = "Its stored text is not that of a message."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.db"


@pytest.fixture
def store(path):
    store = SQLiteChatMessageStore(path, last_k=None, skip_system_messages=False)
    for name in ("ada", "bob", "eve"):
        store.write_messages(name, conversation("uaua"))
    return store


def damage(path, chat_history_id, position, **columns):
    """
    Overwrite columns of a stored message, as other software could.
    """
    changes = ", ".join(f"{column} = ?" for column in columns)
    with sqlite3.connect(path) as connection:
        (key,) = connection.execute(
            "SELECT history_key FROM chat_histories WHERE chat_history_id = ?", (chat_history_id,)
        ).fetchone()
        where = (key << 32) + position
        changed = connection.execute(
            f"UPDATE chat_messages SET {changes} WHERE message_key = ?", (*columns.values(), where)
        )
        assert changed.rowcount == 1
    connection.close()


def places(faults):
    return [(fault.chat_history_id, fault.position) for fault in faults]


def test_a_sound_store_has_no_faults(store):
    store.write_messages("every kind", list(sample_messages().values()))
    assert list(check(store)) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "{}",
        "[]",
        '{"role": "user"}',
        '{"role": "user", "meta": {}, "name": null, "content": [{"unknown": 1}]}',
        '"a", "b"',
        b"\xff\xfe not UTF-8",
    ],
)
def test_each_damaged_message_is_found_by_history_and_position_and_hides_no_other(store, path, text):
    for name, position in (("ada", 1), ("ada", 2), ("eve", 0)):
        damage(path, name, position, content=text)

    faults = list(check(store))

    assert places(faults) == [("ada", 1), ("ada", 2), ("eve", 0)]
    assert {fault.description for fault in faults} == {NO_MESSAGE}
    assert not any(fault.is_repaired for fault in faults)
    assert [message.fault for message in examined_messages(store, "ada")] == [None, NO_MESSAGE, NO_MESSAGE, None]


def test_a_text_under_another_id_or_role_than_its_own_is_a_fault(store, path):
    damage(path, "ada", 0, message_id="another")
    damage(path, "bob", 1, role="tool")

    faults = list(check(store))

    assert ("ada", 0, "Its stored text has another id than its row.", False) in faults
    assert ("bob", 1, "Its stored text has another role than its row.", False) in faults


def test_faults_say_nothing_of_what_messages_say(store, path):
    damage(path, "ada", 1, content='{"secret": "s3cret"')
    (fault,) = check(store)
    assert "s3cret" not in str(fault)


def test_repairing_saves_damaged_messages_before_it_removes_them(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON \x9b")
    damage(path, "eve", 3, content="neither")
    salvage = tmp_path / "salvage.jsonl"
    salvage.write_text('{"an earlier": "run"}\n')

    faults = list(check(store, repair=True, salvage=salvage))

    assert places(faults) == [("ada", 1), ("eve", 3)]
    assert all(fault.is_repaired for fault in faults)
    earlier, first, second = map(json.loads, salvage.read_text().splitlines())
    assert earlier == {"an earlier": "run"}
    assert (first["namespace"], first["chat_history_id"], first["position"]) == ("default", "ada", 1)
    assert (first["role"], first["content"], first["fault"]) == ("assistant", "no JSON \x9b", NO_MESSAGE)
    assert {"message_id", "created_at"} < first.keys()
    assert (second["chat_history_id"], second["content"]) == ("eve", "neither")
    assert list(check(store)) == []
    assert [message.position for message in examined_messages(store, "ada")] == [0, 2, 3]
    assert store.count_messages("ada") == 3
    assert [message.meta["position"] for message in store.retrieve_messages("eve")] == [0, 1, 2]


def test_without_a_file_to_save_them_in_damaged_messages_stay(store, path):
    damage(path, "ada", 1, content="no JSON")
    (fault,) = check(store, repair=True)
    assert not fault.is_repaired
    assert len(examined_messages(store, "ada")) == 4


def test_what_cannot_be_saved_is_not_removed(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON")
    with pytest.raises(OSError, match="No such file"):
        list(check(store, repair=True, salvage=tmp_path / "no folder" / "salvage.jsonl"))
    assert len(examined_messages(store, "ada")) == 4


def test_without_repair_nothing_is_changed_or_saved(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON")
    list(check(store, salvage=tmp_path / "salvage.jsonl"))
    assert not (tmp_path / "salvage.jsonl").exists()
    assert len(examined_messages(store, "ada")) == 4


def test_what_the_engine_finds_comes_first(store, path):
    damage(path, "ada", 1, content="no JSON")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE chat_histories SET message_count = 99 WHERE chat_history_id = 'eve'")
    connection.close()

    assert places(check(store)) == [("eve", None), ("ada", 1)]
    assert [fault.is_repaired for fault in check(store, repair=True)] == [True, False]
    assert store.count_messages("eve") == 4


def test_only_the_stores_own_namespace_is_checked(store, path):
    other = SQLiteChatMessageStore(path, namespace="other")
    other.write_messages("chat", conversation("ua"))
    damage(path, "ada", 1, content="no JSON")
    assert list(check(other)) == []


def test_more_histories_and_messages_than_are_read_at_once_are_all_checked(path):
    store = SQLiteChatMessageStore(path, durability="normal")
    for number in range(510):
        store.write_messages(f"{number:03}", [ChatMessage.from_user("Hi")])
    store.write_messages("long", conversation("ua" * 250))
    for name, position in (("000", 0), ("505", 0), ("long", 0), ("long", 499)):
        damage(path, name, position, content="no JSON")

    steps = []
    faults = list(check(store, progress=lambda done, total: steps.append((done, total))))

    assert places(faults) == [("000", 0), ("505", 0), ("long", 0), ("long", 499)]
    assert steps[-1] == (1010, None)
    assert steps == sorted(steps, key=lambda step: step[0])


def test_the_asynchronous_call_finds_the_same(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON")
    assert asyncio.run(check_async(store)) == list(check(store))
    assert all(fault.is_repaired for fault in asyncio.run(check_async(store, repair=True, salvage=tmp_path / "s")))


def test_a_store_in_memory_can_be_checked():
    store = InMemoryChatMessageStore(namespace="doctor")
    store.write_messages("chat", conversation("ua"))
    assert list(check(store)) == []


def test_a_store_that_cannot_be_checked_says_so():
    class OwnStore(BaseChatMessageStore):
        to_dict = _write = _read = _count = _delete = _delete_all = _run_async = None

        def _run(self, operation, *arguments):
            return operation(None, *arguments)

    with pytest.raises(UnsupportedOperationError, match="OwnStore does not support checking"):
        list(check(OwnStore()))
