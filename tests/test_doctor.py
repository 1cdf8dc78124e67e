# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what is damaged in a store, and removes nothing that it has not saved."""

import asyncio
import json
import os
import sqlite3
import stat
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone

import pytest
from engine_stores import store_on
from haystack.dataclasses import ChatMessage
from servers import RedisServer

from haystack_chat_store import (
    Engine,
    Fault,
    InMemoryChatMessageStore,
    SQLiteChatMessageStore,
    StoreUnavailableError,
    UnsupportedOperationError,
    store_from_url,
)
from haystack_chat_store.doctor import check, check_async, examined_messages
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
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
    """Overwrite columns of a stored message, as other software could."""
    changes = ", ".join(f"{column} = ?" for column in columns)
    with sqlite3.connect(path) as connection:
        (key,) = connection.execute(
            "SELECT history_key FROM haystack_chat_histories WHERE chat_history_id = ?", (chat_history_id,)
        ).fetchone()
        where = (key << 32) + position
        changed = connection.execute(
            f"UPDATE haystack_chat_messages SET {changes} WHERE message_key = ?", (*columns.values(), where)
        )
        assert changed.rowcount == 1
    connection.close()


def places(faults):
    return [(fault.chat_history_id, fault.position) for fault in faults]


def test_a_sound_store_has_no_faults(store):
    store.write_messages("every kind", list(sample_messages().values()))
    assert check(store) == []


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
        '{"role": "user", "meta": 5, "name": null, "content": [{"text": "Hi"}]}',
        b"\xff\xfe not UTF-8",
    ],
)
def test_each_damaged_message_is_found_by_history_and_position_and_hides_no_other(store, path, text):
    for name, position in (("ada", 1), ("ada", 2), ("eve", 0)):
        damage(path, name, position, content=text)

    faults = check(store)

    assert places(faults) == [("ada", 1), ("ada", 2), ("eve", 0)]
    assert {fault.description for fault in faults} == {NO_MESSAGE}
    assert not any(fault.is_repaired for fault in faults)
    assert [message.fault for message in examined_messages(store, "ada")] == [None, NO_MESSAGE, NO_MESSAGE, None]


def test_of_many_faults_of_a_kind_some_are_listed_and_the_others_counted(path, store):
    rows = [HistoryRow(chat_history_id=f"{number}", created_at=0, updated_at=0) for number in range(1_500)]
    store.engine.run(store.engine.import_histories, store.scope, [(row, []) for row in rows])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE haystack_chat_histories SET message_count = message_count + chat_history_id + 1")
        connection.execute("UPDATE haystack_chat_histories SET round_count = -1 - chat_history_id")
    connection.close()

    faults = check(store)
    assert len(faults) == 2 * 1_001
    counts = Fault(description="There are 503 more such faults: It counts … messages, and has ….", count=503)
    rounds = Fault(description="There are 503 more such faults: It counts … rounds, and has ….", count=503)
    assert faults[-2:] == [counts, rounds]
    assert check(store, repair=True) == [replace(fault, is_repaired=True) for fault in faults]
    assert check(store) == []


def test_of_many_damaged_messages_some_are_listed_and_all_removed(path, store, tmp_path):
    store.write_messages("many", [ChatMessage.from_user("Hi") for _ in range(1_200)])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE haystack_chat_messages SET content = 'none', created_at = 'none'")
    connection.close()

    for repair in (False, True):
        found = check(store, repair=repair, salvage=tmp_path / "salvage.jsonl" if repair else None)
        for description in (NO_MESSAGE, "Its time of creation is none."):
            counts = [fault.count for fault in found if fault.description.endswith(description)]
            assert (len(counts), sum(counts)) == (1_001, 1_212)
        assert {fault.is_repaired for fault in found} == {repair}
    assert store.count_messages("many") == 0
    assert check(store) == []


@pytest.mark.parametrize(
    ("change", "description"),
    [
        ("preview = 'another'", "Its preview is not the beginning of its first question."),
        ("preview = NULL", "Its preview is not the beginning of its first question."),
        ("last_role = 'tool'", "What it keeps of its last message is wrong."),
        ("last_text = NULL", "What it keeps of its last message is wrong."),
        ("last_at = last_at + 1", "What it keeps of its last message is wrong."),
        ("title_terms = ' another '", "The search index says something else than its title."),
        ("title_terms = NULL", "The search index says something else than its title."),
        ("branch_of = 'bob'", "It is listed as a branch of another history than its meta names, or as none."),
        ("branch_of = NULL", "It is listed as a branch of another history than its meta names, or as none."),
    ],
)
def test_what_lists_and_searches_show_of_a_history_is_compared_and_made_anew(store, path, change, description):
    store.update_chat_history("ada", title="A trip to Kyoto")
    store.write_messages("ada~1", conversation("ua"))
    store.update_chat_history("ada~1", title="A trip to Nara", meta={"branch_of": "ada"})
    assert check(store) == []
    damaged = "ada~1" if change == "branch_of = NULL" else "ada"
    before = store.get_chat_history(damaged)
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE haystack_chat_histories SET {change} WHERE chat_history_id = ?", [damaged])
    connection.close()

    fault = Fault(chat_history_id=damaged, description=description)
    assert check(store) == [fault]
    assert check(store, repair=True) == [replace(fault, is_repaired=True)]

    assert check(store) == []
    assert store.get_chat_history(damaged) == before
    assert {info.chat_history_id for info in store.list_chat_histories().items} == {"ada", "bob", "eve"}


def test_a_damaged_message_does_not_make_the_previews_wrong(store, path):
    damage(path, "ada", 0, content="no JSON")
    damage(path, "ada", 3, content="no JSON")
    assert places(check(store, repair=True)) == [("ada", 0), ("ada", 3)]
    assert {fault.description for fault in check(store)} == {NO_MESSAGE}
    assert store.get_chat_history("ada").preview == "text 0"


@pytest.fixture
def odd_store():
    """
    Return a function that makes a store whose engine hands out rows changed as other software could have left them.
    """

    def odd_store(**changed):
        class OddEngine(InMemoryEngine):
            def page(self, *arguments):
                rows = super().page(*arguments)
                return [replace(row, **changed) if row.position == 1 else row for row in rows]

            def remove(self, session, scope, chat_history_id, rows):
                stored = super().page(session, scope, chat_history_id, None, None, 9)
                positions = [row.position for row in rows]
                return super().remove(
                    session, scope, chat_history_id, [row for row in stored if row.position in positions]
                )

        store = store_on(OddEngine())
        store.write_messages("chat", conversation("uau"))
        return store

    return odd_store


@pytest.mark.parametrize(
    ("changed", "description"),
    [
        ({"message_id": "another"}, "Its stored text has another id than its row."),
        ({"message_id": b"\xff"}, "Its stored text has another id than its row."),
        ({"role": "tool"}, "Its stored text has another role than its row."),
        ({"role": None}, "Its stored text has another role than its row."),
        *(
            ({"created_at": time}, "Its time of creation is none.")
            for time in (None, "noon", 2**63, -(2**63), 0.5, 1e999)
        ),
    ],
)
def test_a_message_that_can_be_read_is_never_removed_whatever_its_row_says(odd_store, tmp_path, changed, description):
    store = odd_store(**changed)

    for repair, salvage in ((False, None), (True, None), (True, tmp_path / "salvage.jsonl")):
        assert check(store, repair=repair, salvage=salvage) == [
            Fault(chat_history_id="chat", position=1, description=description)
        ]

    assert store.count_messages("chat") == 3
    assert not (tmp_path / "salvage.jsonl").exists()
    first, second, third = examined_messages(store, "chat")
    assert (first.fault, second.fault, third.fault) == (None, description, None)
    assert second.message.text == "text 1"
    if "created_at" in changed:
        assert second.created_at == datetime(1970, 1, 1, tzinfo=timezone.utc)


def test_all_that_is_wrong_with_a_message_is_said(odd_store):
    store = odd_store(message_id="another", created_at=None)
    found = [fault.description for fault in check(store)]
    assert found == ["Its stored text has another id than its row.", "Its time of creation is none."]
    assert examined_messages(store, "chat")[1].fault == " ".join(found)


def test_what_stood_where_text_should_is_saved_too(odd_store, tmp_path):
    store = odd_store(content="no JSON", message_id=b"\xff", created_at=None)
    assert all(fault.is_repaired for fault in check(store, repair=True, salvage=tmp_path / "salvage.jsonl"))
    saved = json.loads((tmp_path / "salvage.jsonl").read_text())
    assert (saved["message_id"], saved["created_at"]) == (r"b'\xff'", None)
    assert store.count_messages("chat") == 2


def test_what_others_have_written_since_a_page_was_read_stays(tmp_path):
    class SlowEngine(InMemoryEngine):
        def remove(self, *arguments):
            others = store_on(self, namespace=store.namespace)
            others.delete_messages("chat")
            others.write_messages("chat", conversation("uaua"))
            return super().remove(*arguments)

    store = store_on(SlowEngine())
    rows = [MessageRow(0, 0, "a", "user", "no JSON"), MessageRow(1, 0, "b", "user", "no JSON either")]
    history = HistoryRow(chat_history_id="chat", created_at=0, updated_at=0)
    store.engine.run(store.engine.import_history, store.scope, history, [rows], 0)

    faults = check(store, repair=True, salvage=tmp_path / "salvage.jsonl")

    assert [(fault.position, fault.is_repaired) for fault in faults] == [(0, False), (1, False)]
    assert store.count_messages("chat") == 4
    assert len((tmp_path / "salvage.jsonl").read_text().splitlines()) == 2


def test_what_the_engine_has_reported_is_not_reported_again(odd_store):
    store = odd_store(created_at=None)
    fault = Fault(chat_history_id="chat", position=1, description="Its time of creation is none.", is_repaired=False)
    store.engine.check = lambda *_: [fault]
    assert check(store) == [fault]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"before": -1}, "before must be 0 or greater"),
        ({"after": "1"}, "after must be an integer"),
        ({"before": 1, "after": 1}, "Only one of before and after"),
        ({"limit": 0}, "limit must be 1 to 1000"),
    ],
)
def test_a_page_of_examined_messages_is_asked_for_as_any_other(store, page, message):
    with pytest.raises(ValueError, match=message):
        examined_messages(store, "ada", **page)
    assert examined_messages(store, "ada", after=2**70) == []
    assert len(examined_messages(store, "ada", before=2**70)) == 4


def test_faults_say_nothing_of_what_messages_say(store, path):
    damage(path, "ada", 1, content='{"secret": "s3cret"')
    (fault,) = check(store)
    assert "s3cret" not in str(fault)


def test_repairing_saves_damaged_messages_before_it_removes_them(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON \x9b")
    damage(path, "eve", 3, content="neither")
    salvage = tmp_path / "salvage.jsonl"
    salvage.write_text('{"an earlier": "run"}\n')

    faults = check(store, repair=True, salvage=salvage)

    assert places(faults) == [("ada", 1), ("eve", 3)]
    assert all(fault.is_repaired for fault in faults)
    earlier, first, second = map(json.loads, salvage.read_text().splitlines())
    assert earlier == {"an earlier": "run"}
    assert (first["namespace"], first["chat_history_id"], first["position"]) == ("default", "ada", 1)
    assert (first["role"], first["content"], first["fault"]) == ("assistant", "no JSON \x9b", NO_MESSAGE)
    assert {"message_id", "created_at"} < first.keys()
    assert (second["chat_history_id"], second["content"]) == ("eve", "neither")
    assert check(store) == []
    assert [message.position for message in examined_messages(store, "ada")] == [0, 2, 3]
    assert store.count_messages("ada") == 3
    assert [message.meta["position"] for message in store.retrieve_messages("eve")] == [0, 1, 2]


def test_all_faults_of_a_message_that_is_removed_are_repaired(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON", created_at="noon")  # the engine finds the wrong time, too
    damage(path, "ada", 2, created_at="noon")
    assert places(check(store)) == [("ada", 1), ("ada", 2), ("ada", 1)]
    faults = check(store, repair=True, salvage=tmp_path / "salvage.jsonl")
    assert {(fault.position, fault.is_repaired) for fault in faults} == {(1, True), (2, False)}
    assert {fault.description for fault in faults} == {NO_MESSAGE, "Its time of creation is none."}
    assert len(faults) == 3
    assert places(check(store)) == [("ada", 2)]


def test_without_a_file_to_save_them_in_damaged_messages_stay(store, path):
    damage(path, "ada", 1, content="no JSON")
    (fault,) = check(store, repair=True)
    assert not fault.is_repaired
    assert len(examined_messages(store, "ada")) == 4


def test_what_cannot_be_saved_is_not_removed(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON")
    with pytest.raises(OSError, match="No such file"):
        check(store, repair=True, salvage=tmp_path / "no folder" / "salvage.jsonl")
    assert len(examined_messages(store, "ada")) == 4


@pytest.mark.parametrize(
    "file", ["chat.db", "link", "chat.db-wal", "chat.db-shm", "other.db", "other.db-wal", "folder"]
)
def test_what_is_a_database_or_no_file_is_never_appended_to(store, path, tmp_path, file):
    SQLiteChatMessageStore(tmp_path / "other.db").write_messages("chat", conversation("u"))
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").mkdir()
    damage(path, "ada", 1, content="no JSON")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE haystack_chat_histories SET message_count = 99 WHERE chat_history_id = 'eve'")
    connection.close()
    faults = check(store)

    with pytest.raises(ValueError, match=r"is (a part of )?an SQLite database|is not a file"):
        next(check(store, repair=True, salvage=tmp_path / file))

    assert check(store) == faults
    assert len(examined_messages(store, "ada")) == 4


def test_saved_messages_can_be_read_by_their_owner_alone(store, path, tmp_path):
    salvage = tmp_path / "salvage.jsonl"
    damage(path, "ada", 1, content="no JSON")
    check(store, repair=True, salvage=salvage)
    assert stat.S_IMODE(salvage.stat().st_mode) == 0o600


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux tells which file a descriptor is of")
def test_damaged_messages_are_saved_on_the_disk_before_they_are_removed(store, path, tmp_path, monkeypatch):
    salvage, fsync, on_disk = tmp_path / "salvage.jsonl", os.fsync, []
    damage(path, "ada", 1, content="no JSON")

    def recorded_fsync(descriptor):
        fsync(descriptor)
        left = len(examined_messages(store, "ada"))
        on_disk.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size, left))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    check(store, repair=True, salvage=salvage)

    (name, size, left), (folder, _, left_then) = on_disk
    assert (name, size) == (str(salvage), salvage.stat().st_size)
    assert folder == str(tmp_path)  # or the new file could be lost with its name
    assert (left, left_then) == (4, 4)
    assert len(examined_messages(store, "ada")) == 3


@pytest.mark.servers
def test_a_history_that_the_engine_cannot_read_hides_no_other():
    with RedisServer() as server, closing(store_from_url(server.url)) as store, server.client() as client:
        for name in ("ada", "bob", "eve"):
            store.write_messages(name, conversation("ua"))
        client.set(*client.keys("*ada:roles"), "u")
        client.delete(*client.keys("*bob:roles"), *client.keys("*bob:times"))
        (contents,) = client.keys("*eve:contents")
        client.lset(contents, 1, "junk")

        faults = check(store)
        assert [place for place in places(faults) if place[0] == "eve"][-1] == ("eve", 1)
        for name in ("ada", "bob"):
            assert (
                Fault(
                    chat_history_id=name, position=None, description="Its messages cannot be read.", is_repaired=False
                )
                in faults
            )

        check(store, repair=True)
        assert places(check(store)) == [("eve", 1)]


def test_an_engine_that_does_not_answer_is_an_error_and_no_fault():
    class Gone(InMemoryEngine):
        def page(self, *_):
            raise StoreUnavailableError("gone")

        history = page

    store = store_on(Gone())
    store.write_messages("chat", conversation("ua"))
    with pytest.raises(StoreUnavailableError, match="gone"):
        check(store)


def test_salvage_without_repair_is_refused_and_nothing_is_changed_or_saved(store, path, tmp_path):
    damage(path, "ada", 1, content="no JSON")
    with pytest.raises(ValueError, match="salvage needs repair=True"):
        check(store, salvage=tmp_path / "salvage.jsonl")
    check(store)
    assert not (tmp_path / "salvage.jsonl").exists()
    assert len(examined_messages(store, "ada")) == 4


def test_what_the_engine_finds_comes_first(store, path):
    damage(path, "ada", 1, content="no JSON")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE haystack_chat_histories SET message_count = 99 WHERE chat_history_id = 'eve'")
    connection.close()

    assert places(check(store)) == [("eve", None), ("ada", 1)]
    assert [fault.is_repaired for fault in check(store, repair=True)] == [True, False]
    assert store.count_messages("eve") == 4


def test_only_the_stores_own_namespace_is_checked(store, path):
    other = SQLiteChatMessageStore(path, namespace="other")
    other.write_messages("chat", conversation("ua"))
    damage(path, "ada", 1, content="no JSON")
    assert check(other) == []


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
    assert asyncio.run(check_async(store)) == check(store)
    assert all(fault.is_repaired for fault in asyncio.run(check_async(store, repair=True, salvage=tmp_path / "s")))


def test_a_store_in_memory_can_be_checked():
    store = InMemoryChatMessageStore(namespace="doctor")
    store.write_messages("chat", conversation("ua"))
    assert check(store) == []


def test_a_store_that_cannot_be_checked_says_so():
    class OwnEngine(Engine):
        append = read = count = delete = delete_all = execute_async = None

        def execute(self, operation, *arguments):
            return operation(None, *arguments)

    with pytest.raises(UnsupportedOperationError, match="OwnEngine does not support checking"):
        check(store_on(OwnEngine()))
