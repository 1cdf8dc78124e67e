# SPDX-License-Identifier: Apache-2.0
"""What was deleted leaves SQLite's files, and what does not fit together in them is found and mended."""

import asyncio
import os
import sqlite3
import threading
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import datetime, timezone

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from sqlite_stores import connections_of_stores

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.doctor import check
from haystack_chat_store.errors import StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.iteration import walk_histories
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.validation import parsed_meta

# Each word of what is erased. None stands in an id, and none is a part of another.
SECRETS = ["Kuckucksuhr", "geheimnis", "Zwölfkampf", "東京秘密"]


@pytest.fixture
def new_store(path):
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(closing(SQLiteChatMessageStore(path, **settings)))


@pytest.fixture(params=[False, True], ids=["without search", "with search"])
def store(request, new_store):
    return new_store(search=request.param, durability="normal")


@contextmanager
def opened(path):
    """A connection that knows nothing of our stores."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        yield connection


def user(text, message_id=None):
    return ChatMessage.from_user(text, meta={} if message_id is None else {MESSAGE_ID_KEY: message_id})


def answer(text):
    return ChatMessage.from_assistant(text)


# ---------------------------------------------------------------------- erasing


def left_in_files(path):
    """The secrets, or their terms, that the bytes of the file and of those beside it still hold."""
    data = b""
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(path + suffix):
            with open(path + suffix, "rb") as file:
                data += file.read()
    forms = {
        form for secret in SECRETS for form in (secret, secret.casefold(), secret.encode("unicode_escape").decode())
    }
    forms |= {"kuckuck", "zwolf", "秘密"}
    return {form for form in forms if form.encode() in data}


def erase_by_prefix(store):
    store.delete_chat_histories(prefix="user_1/", vacuum=True)


def erase_by_prefix_async(store):
    asyncio.run(store.delete_chat_histories_async(prefix="user_1/", vacuum=True))


def delete_each(store):
    for info in store.list_chat_histories(prefix="user_1/", limit=1000).items:
        store.delete_messages(info.chat_history_id)
    store.engine.run(store.engine.vacuum, store.scope)


def delete_single_messages(store):
    for info in store.list_chat_histories(prefix="user_1/", limit=1000).items:
        store.update_chat_history(info.chat_history_id, title=None, meta=None)
        stored = store.list_messages(info.chat_history_id)
        store.delete_messages(info.chat_history_id, message_ids=[stored[0].message.meta[MESSAGE_ID_KEY]])
        store.delete_messages(info.chat_history_id, from_message_id=stored[1].message.meta[MESSAGE_ID_KEY])
    store.engine.run(store.engine.vacuum, store.scope)


def overwrite(store):
    for info in store.list_chat_histories(prefix="user_1/", limit=1000).items:
        store.update_chat_history(info.chat_history_id, title="harmless", meta={})
        ids = [each.message.meta[MESSAGE_ID_KEY] for each in store.list_messages(info.chat_history_id)]
        changed = [user("harmless", message_id) for message_id in ids]
        store.write_messages(info.chat_history_id, changed, policy=DuplicatePolicy.OVERWRITE)
    store.engine.run(store.engine.vacuum, store.scope)


@pytest.mark.parametrize(
    "erase", [erase_by_prefix, erase_by_prefix_async, delete_each, delete_single_messages, overwrite]
)
def test_no_byte_of_what_was_erased_is_left_in_the_files(store, path, erase):
    for number in range(120):
        store.write_messages("user_2/chat", [user(f"kept {number}"), answer(f"said {number}")])
        said = " ".join(SECRETS[: number % 4 + 1])
        store.write_messages(f"user_1/{number}", [user(f"{said} {number}"), answer(f"{said}?"), user(f"{said}!")])
        store.update_chat_history(f"user_1/{number}", title=f"About {said}", meta={"note": said})
        if number == 60 and store.search:
            assert len(store.search_messages("geheimnis", limit=1000)) > 100
    assert left_in_files(path) >= {"Kuckucksuhr", "Zwölfkampf"}
    erase(store)
    assert left_in_files(path) == set()
    assert store.count_messages("user_2/chat") == 240
    assert store.engine.run(store.engine.check, store.scope) == []
    if store.search:
        assert store.search_messages("Kuckucksuhr") == []
        assert len(store.search_messages("kept", limit=1000)) == 120


def test_what_was_deleted_is_in_no_table_and_no_index(new_store, path):
    store = new_store(search=True)
    store.write_messages("user_1/a", [user(" ".join(SECRETS)), user("kept")])
    store.delete_messages("user_1/a", message_ids=[store.list_messages("user_1/a")[0].message.meta[MESSAGE_ID_KEY]])
    with opened(path) as connection:
        assert connection.execute("SELECT terms FROM haystack_chat_terms").fetchall() == [(" kept ",)]
        assert connection.execute("SELECT count(*) FROM haystack_chat_messages").fetchone() == (1,)


def test_vacuuming_that_a_reader_keeps_from_its_end_says_so(new_store, path):
    store = new_store(timeout=0.2)
    store.write_messages("chat", [user("before")])
    with opened(path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM haystack_chat_messages").fetchone()
        store.delete_messages("chat")
        with pytest.raises(StoreTimeoutError, match="Try again"):
            store.engine.run(store.engine.vacuum, store.scope)
        reader.execute("COMMIT")
        store.engine.run(store.engine.vacuum, store.scope)
    assert os.path.getsize(f"{path}-wal") == 0


@pytest.mark.parametrize("calling", ["delete", "purge", "delete_async"])
def test_a_vacuum_that_gets_no_lock_says_that_the_deletions_are_done(new_store, path, calling):
    store = new_store(timeout=0.2)
    store.write_messages("user_1/a", [user("before")])
    (connection,) = connections_of_stores(path)
    with opened(path) as other:

        def lock_before_a_vacuum(statement):
            if statement == "VACUUM":
                other.execute("BEGIN IMMEDIATE")

        connection.set_trace_callback(lock_before_a_vacuum)
        with pytest.raises(StoreTimeoutError, match="locked") as caught:
            if calling == "delete":
                store.delete_chat_histories(prefix="user_1/", vacuum=True)
            elif calling == "purge":
                store.purge(older_than=datetime.now(timezone.utc), vacuum=True)
            else:
                asyncio.run(store.delete_chat_histories_async(prefix="user_1/", vacuum=True))
        other.execute("ROLLBACK")
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert str(caught.value).startswith("The histories were deleted")
    assert "othing was changed" not in str(caught.value)
    assert store.get_chat_history("user_1/a") is None


def test_a_lock_in_the_middle_of_deletions_does_not_say_that_nothing_was_changed(new_store, path, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.directory._ERASE_BATCH_SIZE", 1)
    store = new_store(timeout=0.2)
    for name in ("user_1/a", "user_1/b"):
        store.write_messages(name, [user("before")])
    (connection,) = connections_of_stores(path)
    with opened(path) as other:
        deletions = []

        def lock_after_the_first_deletion(statement):
            if statement == "COMMIT":
                deletions.append(statement)
            elif deletions and statement == "BEGIN IMMEDIATE":
                other.execute("BEGIN IMMEDIATE")

        connection.set_trace_callback(lock_after_the_first_deletion)
        with pytest.raises(StoreTimeoutError) as caught:
            store.delete_chat_histories(prefix="user_1/")
        other.execute("ROLLBACK")
    assert "othing was changed" not in str(caught.value)
    assert len(store.list_chat_histories().items) == 1


def test_the_file_becomes_smaller(store, path):
    store.write_messages("user_1/a", [user(f"fox {number} " * 20) for number in range(2000)])
    store.write_messages("user_2/a", [user("fox")])
    store.engine.run(store.engine.vacuum, store.scope)
    before = os.path.getsize(path)
    assert store.delete_chat_histories(prefix="user_1/", vacuum=True) == 1
    assert os.path.getsize(path) < before / 5
    assert store.statistics().size == os.path.getsize(path)


# ---------------------------------------------------------------------- faults


def faults_of(store, repair=False):
    return store.engine.run(store.engine.repair if repair else store.engine.check, store.scope)


def damage(path, *statements):
    """Do what no store does."""
    with opened(path) as connection:
        for statement in statements:
            connection.execute(statement)


FIRST = "message_key = (SELECT min(message_key) FROM haystack_chat_messages)"
DAMAGES = {
    "count": (
        "UPDATE haystack_chat_histories SET message_count = 7 WHERE chat_history_id = 'chat'",
        "counts 7 messages",
    ),
    "rounds": ("UPDATE haystack_chat_histories SET round_count = 0 WHERE chat_history_id = 'chat'", "counts 0 rounds"),
    "position": (
        "UPDATE haystack_chat_histories SET next_position = 1 WHERE chat_history_id = 'chat'",
        "next position is 1",
    ),
    "role": (f"UPDATE haystack_chat_messages SET role = 'assistant' WHERE {FIRST}", "rounds"),
}
COLUMN_DAMAGES = {
    "time of creation": (
        "UPDATE haystack_chat_histories SET created_at = 'x' WHERE chat_history_id = 'chat'",
        "creation",
    ),
    "time of change": (
        "UPDATE haystack_chat_histories SET updated_at = 1 << 62 WHERE chat_history_id = 'chat'",
        "change",
    ),
    "title": ("UPDATE haystack_chat_histories SET title = CAST(x'ff' AS TEXT) WHERE chat_history_id = 'chat'", "title"),
    "title of bytes": (
        "UPDATE haystack_chat_histories SET title = x'61' WHERE chat_history_id = 'chat'",
        "title is no text",
    ),
    "long title": (
        "UPDATE haystack_chat_histories SET title = printf('%1001c', 'x') WHERE chat_history_id = 'chat'",
        "too long",
    ),
    "title with NUL": (
        "UPDATE haystack_chat_histories SET title = 'a' || char(0) WHERE chat_history_id = 'chat'",
        "NUL",
    ),
    "meta of bytes": ("UPDATE haystack_chat_histories SET meta = x'ff' WHERE chat_history_id = 'chat'", "meta"),
    "meta": ("UPDATE haystack_chat_histories SET meta = '[1]' WHERE chat_history_id = 'chat'", "meta"),
    "torn meta": ("UPDATE haystack_chat_histories SET meta = '{\"a' WHERE chat_history_id = 'chat'", "meta"),
}
INDEX_DAMAGES = {
    "other text": f"UPDATE haystack_chat_messages SET content = replace(content, 'fox', 'cat') WHERE {FIRST}",
    "damaged text": f"UPDATE haystack_chat_messages SET content = 'no JSON' WHERE {FIRST}",
    "not indexed": f"DELETE FROM haystack_chat_terms WHERE {FIRST.replace('message_key', 'rowid', 1)}",
    "without its message": "INSERT INTO haystack_chat_terms (rowid, terms) VALUES (4711 << 32, 'fox')",
    "without a history": "INSERT INTO haystack_chat_terms (rowid, terms) SELECT max(message_key) + 1, 'fox' "
    "FROM haystack_chat_messages WHERE message_key >> 32 = 1",
    "no table": "DROP TABLE haystack_chat_terms",
    "not all terms": "DELETE FROM haystack_chat_terms_data WHERE id > 10",
    "corrupt": "UPDATE haystack_chat_terms_data SET block = x'00' WHERE id > 10",
}


@pytest.fixture
def two_histories(store):
    store.write_messages("chat", [user("fox 0"), answer("1"), user("fox 2"), answer("3")])
    store.write_messages("other chat", [user("fox 0"), answer("1")])
    return store


def assert_sound(store):
    assert faults_of(store) == []
    for info in store.list_chat_histories().items:
        stored = store.list_messages(info.chat_history_id)
        assert info.message_count == len(stored)
    store.write_messages("chat", [user("afterwards")])
    assert texts(store.retrieve_messages("chat", last_k=1)) == ["afterwards"]


def divided(faults):
    """Divide faults into those of what is stored and those of what lists show of it."""
    shown = [
        fault
        for fault in faults
        if "first question" in fault.description or "last message is wrong" in fault.description
    ]
    return [fault for fault in faults if fault not in shown], shown


def test_nothing_is_wrong_with_what_stores_write(two_histories):
    assert faults_of(two_histories) == faults_of(two_histories, repair=True) == []


@pytest.mark.parametrize("kind", DAMAGES)
def test_history_that_does_not_fit_its_messages_is_found_and_mended(two_histories, path, kind):
    statement, description = DAMAGES[kind]
    damage(path, statement)
    found, shown = divided(faults_of(two_histories))
    assert [(fault.chat_history_id, fault.position, fault.is_repaired) for fault in found] == [("chat", None, False)]
    assert description in found[0].description
    assert len(shown) == (kind == "role")  # the last message in lists has the role that it had
    assert {fault.is_repaired for fault in faults_of(two_histories, repair=True)} == {True}
    assert_sound(two_histories)


@pytest.mark.parametrize("kind", COLUMN_DAMAGES)
def test_a_damaged_column_of_a_history_is_found(two_histories, path, kind):
    statement, description = COLUMN_DAMAGES[kind]
    damage(path, statement)
    for repair in (False, True):
        found = faults_of(two_histories, repair)
        assert [(fault.chat_history_id, fault.position, fault.is_repaired) for fault in found] == [
            ("chat", None, False)
        ]
        assert description in found[0].description


@pytest.mark.parametrize("column", ["title", "meta"])
def test_a_damaged_title_or_meta_can_be_set_again(two_histories, path, column):
    damage(path, f"UPDATE haystack_chat_histories SET {column} = CAST(x'ff' AS TEXT) WHERE chat_history_id = 'chat'")
    assert len(faults_of(two_histories)) == 1
    two_histories.update_chat_history("chat", title="A title", meta={"a": 1})
    assert_sound(two_histories)


def test_a_row_that_says_something_else_than_its_text_is_found(two_histories, path):
    damage(path, "UPDATE haystack_chat_messages SET message_id = 'another' WHERE message_key = (1 << 32) + 2")
    found = check(two_histories)
    assert [(fault.chat_history_id, fault.position) for fault in found] == [("chat", 2)]
    assert "another id" in found[0].description


DAMAGED_TIMES = [
    "'yesterday'",
    "x'ff'",
    "CAST(x'ff' AS TEXT)",
    "1.5",
    "9e999",
    "-9e999",
    "(1 << 63) - 1",
    "1 << 63",
    "''",
]


@pytest.mark.parametrize("time", DAMAGED_TIMES)
def test_a_damaged_time_of_a_history_hides_no_other(two_histories, path, time):
    two_histories.write_messages("third chat", [user("fox")])
    damage(
        path,
        f"UPDATE haystack_chat_histories SET created_at = {time}, updated_at = {time} WHERE chat_history_id = 'chat'",
    )
    listed, cursor = [], None
    while len(listed) < 4:
        page = two_histories.list_chat_histories(limit=1, cursor=cursor)
        listed += [info.chat_history_id for info in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    assert sorted(listed) == ["chat", "other chat", "third chat"]
    assert two_histories.get_chat_history("chat").message_count == 4
    two_histories.update_chat_history("chat", title="A title")
    two_histories.write_messages("chat", [user("later")])
    damage(
        path,
        f"UPDATE haystack_chat_histories SET created_at = {time}, updated_at = {time} WHERE chat_history_id = 'chat'",
    )
    found = [(fault.chat_history_id, fault.description) for fault in faults_of(two_histories)]
    assert found == [("chat", "Its time of creation is none."), ("chat", "Its time of change is none.")]


@pytest.mark.parametrize("time", ["'yesterday'", "CAST(x'ff' AS TEXT)", "1.5", "1 << 63"])
@pytest.mark.parametrize("damaged", [[1], [0, 1], [0, 1, 2, 3]], ids=str)
def test_a_damaged_time_of_a_message_is_found_and_hides_no_other(two_histories, path, time, damaged):
    keys = ", ".join(str((1 << 32) + position) for position in damaged)
    damage(path, f"UPDATE haystack_chat_messages SET created_at = {time} WHERE message_key IN ({keys})")
    page = two_histories.engine.run(two_histories.engine.page, two_histories.scope, "chat", None, None, 9)
    assert [row.position for row in page] == [0, 1, 2, 3]
    assert [stored.position for stored in two_histories.list_messages("chat")] == [0, 1, 2, 3]
    assert sum(two_histories.statistics().messages_per_day.values()) == 6
    found = faults_of(two_histories)
    assert [(fault.chat_history_id, fault.position) for fault in found] == [("chat", position) for position in damaged]
    assert {fault.description for fault in found} == {"Its time of creation is none."}


def test_texts_that_are_none_hide_no_history(two_histories, new_store, path):
    for number in range(3):
        two_histories.write_messages(f"chat {number}", [user("cat")])
    damage(
        path,
        "UPDATE haystack_chat_histories SET title = CAST(x'ff' AS TEXT), chat_history_id = CAST(x'63ff' AS TEXT) "
        "WHERE chat_history_id = 'chat 1'",
        "UPDATE haystack_chat_histories SET title = x'ff', chat_history_id = x'fe' WHERE chat_history_id = 'chat 2'",
    )
    sound = {"chat", "other chat", "chat 0"}
    assert {info.chat_history_id for info in two_histories.list_chat_histories().items} == {*sound, "c\\xff"}
    assert {info.chat_history_id for info in two_histories.list_chat_histories(prefix="c").items} >= {"chat", "chat 0"}
    assert {row.chat_history_id for row in walk_histories(two_histories)} == sound
    found = faults_of(two_histories)
    assert {(fault.chat_history_id, fault.description) for fault in found} == {
        (name, f"Its {what} is no text.") for name in ("c\\xff", "\\xfe") for what in ("id", "title")
    }


@pytest.mark.parametrize(
    "damaged",
    ["''", "replace(hex(zeroblob(300)), '0', 'x')", "'a' || char(0) || 'b'", "x'6162'"],
    ids=["empty", "too long", "NUL", "bytes"],
)
def test_an_id_that_no_store_gives_is_found_and_counted(two_histories, path, damaged):
    before = two_histories.statistics()
    damage(path, f"UPDATE haystack_chat_histories SET chat_history_id = {damaged} WHERE chat_history_id = 'chat'")
    after = two_histories.statistics()
    assert replace(after, size=before.size) == before
    assert ["Its id" in fault.description for fault in faults_of(two_histories)] == [True]


@pytest.mark.parametrize("meta", ["x'ff'", "x'7bff'", "4711", "'[1]'", "x''"])
def test_damaged_meta_does_not_come_out_as_none(two_histories, path, meta):
    damage(path, f"UPDATE haystack_chat_histories SET meta = {meta} WHERE chat_history_id = 'chat'")
    rows = [
        two_histories.engine.run(two_histories.engine.history, two_histories.scope, "chat"),
        next(walk_histories(two_histories)),
    ]
    for row in rows:
        assert row.chat_history_id == "chat"
        assert parsed_meta(row.meta) is None
    assert [info.meta for info in two_histories.list_chat_histories().items] == [{}, {}]


@pytest.mark.parametrize(
    "name",
    [
        "haystack_chat_messages_by_id",
        "haystack_chat_messages_from_user",
        "haystack_chat_histories_by_time",
        "haystack_chat_transcripts",
    ],
)
def test_an_index_or_view_that_is_missing_is_found_and_made_again(two_histories, path, name):
    kind = "VIEW" if name == "haystack_chat_transcripts" else "INDEX"
    with opened(path) as connection:
        before = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchall()
        connection.execute(f"DROP {kind} {name}")
    assert [(fault.description, fault.is_repaired) for fault in faults_of(two_histories)] == [
        (f"{name} is missing.", False)
    ]
    assert [fault.is_repaired for fault in faults_of(two_histories, repair=True)] == [True]
    with opened(path) as connection:
        assert connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchall() == before
    assert_sound(two_histories)


def test_an_index_that_cannot_be_made_before_rows_are_mended_stays_a_fault_until_then(two_histories, path):
    with opened(path) as connection:
        connection.execute("DROP INDEX haystack_chat_messages_by_id")
    ids = "SELECT message_id FROM haystack_chat_messages WHERE message_key = (1 << 32) + 1"
    with opened(path) as connection:
        ((message_id,),) = connection.execute(ids).fetchall()
    for damaged_id, is_repaired in (("same", False), (message_id, True)):
        rows = "message_key IN ((1 << 32), (1 << 32) + 1)" if damaged_id == "same" else "message_key = (1 << 32) + 1"
        damage(path, f"UPDATE haystack_chat_messages SET message_id = '{damaged_id}' WHERE {rows}")
        (fault,) = [each for each in faults_of(two_histories, repair=True) if "missing" in each.description]
        assert fault.is_repaired == is_repaired
    assert_sound(two_histories)


@pytest.mark.parametrize("table", ["haystack_chat_histories", "haystack_chat_messages"])
def test_a_table_that_is_missing_is_an_error_that_says_what_to_do(two_histories, path, table):
    with opened(path) as connection:
        connection.execute(f"DROP TABLE {table}")
    for call in (lambda: faults_of(two_histories, True), lambda: two_histories.write_messages("chat", [user("x")])):
        with pytest.raises(StoreUnavailableError, match=r"no such table.*Restore the file from a backup"):
            call()


def test_a_walk_goes_on_after_many_ids_that_are_no_texts(two_histories, path):
    for number in range(5):
        two_histories.write_messages(f"damaged {number}", [user("cat")])
        damage(
            path,
            f"UPDATE haystack_chat_histories SET chat_history_id = CAST(x'63ff{number:02}' AS TEXT) "
            f"WHERE chat_history_id = 'damaged {number}'",
        )
    assert [
        row.chat_history_id
        for row in two_histories.engine.run(two_histories.engine.histories_by_id, two_histories.scope, "", "", 2)
    ] == [
        "chat",
        "other chat",
    ]
    assert (
        two_histories.engine.run(two_histories.engine.histories_by_id, two_histories.scope, "", "other chat", 2) == []
    )


def test_damaged_texts_hide_no_hit(new_store, path):
    store = new_store(search=True)
    store.write_messages("chat", [user(f"fox {number}") for number in range(4)])
    damage(
        path,
        "UPDATE haystack_chat_messages SET content = CAST(x'7bff' AS TEXT) WHERE message_key = (1 << 32) + 1",
        "UPDATE haystack_chat_messages SET content = x'7bff', message_id = x'ff' WHERE message_key = (1 << 32) + 2",
        "UPDATE haystack_chat_messages SET message_id = CAST(x'ff' AS TEXT) WHERE message_key = (1 << 32) + 3",
    )
    assert sorted(hit.position for hit in store.search_messages("fox")) == [0, 1, 2, 3]


def test_other_namespaces_are_left_alone(two_histories, new_store, path):
    other = new_store(namespace="other")
    other.write_messages("chat", [user("fox")])
    damage(path, "UPDATE haystack_chat_histories SET message_count = 7 WHERE namespace = 'other'")
    assert faults_of(two_histories, repair=True) == []
    assert len(faults_of(other)) == 1


def test_messages_without_a_history_get_one(two_histories, new_store, path):
    damage(path, "DELETE FROM haystack_chat_histories WHERE chat_history_id = 'chat'")
    (fault,) = [fault for fault in faults_of(two_histories) if "no history" in fault.description]
    assert "4 messages" in fault.description
    assert not fault.is_repaired
    assert fault in faults_of(two_histories)
    # A history of another file may have come to this namespace, and has the same name there.
    new_store(namespace="recovered").write_messages("1", [user("kept")])
    (fault,) = [fault for fault in faults_of(two_histories) if "no history" in fault.description]
    assert "'1 (2)'" in fault.description
    assert all(fault.is_repaired for fault in faults_of(two_histories, repair=True))
    assert two_histories.get_chat_history("chat") is None
    recovered = new_store(namespace="recovered")
    info = recovered.get_chat_history("1 (2)")
    assert texts(recovered.retrieve_messages("1")) == ["kept"]
    assert (info.message_count, info.round_count) == (4, 2)
    assert texts(recovered.retrieve_messages(info.chat_history_id)) == ["fox 0", "1", "fox 2", "3"]
    assert_sound(two_histories)


def test_an_index_that_sqlite_finds_incomplete_is_made_again(two_histories, path):
    with opened(path) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = sql || ' WHERE 0' WHERE name = 'haystack_chat_messages_by_id'"
        )
    with opened(path) as connection:
        connection.execute("REINDEX haystack_chat_messages_by_id")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ' WHERE 0', '') WHERE name = 'haystack_chat_messages_by_id'"
        )
    two_histories.close()
    found = faults_of(two_histories)
    assert found
    assert all("haystack_chat_messages_by_id" in fault.description for fault in found)
    assert all(fault.is_repaired for fault in faults_of(two_histories, repair=True))
    assert_sound(two_histories)


@pytest.mark.parametrize("kind", INDEX_DAMAGES)
def test_index_that_does_not_fit_the_messages_is_found_and_mended(new_store, path, kind):
    store = new_store(search=True)
    for name in ("chat", "other chat"):
        store.write_messages(name, [user("fox 0"), user("fox 1")])
    damage(path, INDEX_DAMAGES[kind])
    found, shown = divided(faults_of(store))
    assert [fault.is_repaired for fault in found] == [False]
    assert "search index" in found[0].description
    assert len(shown) == (kind == "other text")
    assert {fault.is_repaired for fault in faults_of(store, repair=True)} == {True}
    assert faults_of(store) == []
    hits = store.search_messages("fox")
    assert len(hits) == (3 if "text" in kind else 4)
    assert faults_of(store) == []
    store.write_messages("chat", [user("a later fox")])
    assert len(store.search_messages("later fox")) == 1


@pytest.mark.parametrize("content", ["no JSON", "CAST(x'ff' AS TEXT)", "x'ff00'", "4711", "''"])
def test_a_damaged_message_hides_no_other_and_can_be_removed(two_histories, path, content):
    value = content if content[0] in "Cx4'" else f"'{content}'"
    damage(
        path, f"UPDATE haystack_chat_messages SET content = {value}, role = 'user' WHERE message_key = (1 << 32) + 1"
    )
    rows = two_histories.engine.run(two_histories.engine.page, two_histories.scope, "chat", None, None, 100)
    assert [(row.position, row.role) for row in rows] == [(0, "user"), (1, "user"), (2, "user"), (3, "assistant")]
    assert all(isinstance(row.content, str) for row in rows)
    faults_of(two_histories, repair=True)
    two_histories.engine.run(two_histories.engine.remove, two_histories.scope, "chat", rows[1:2])
    assert [stored.position for stored in two_histories.list_messages("chat")] == [0, 2, 3]
    info = two_histories.get_chat_history("chat")
    assert (info.message_count, info.round_count) == (3, 2)
    assert_sound(two_histories)


@pytest.mark.parametrize("repair", [False, True], ids=["checking", "repairing"])
def test_who_writes_does_not_wait_while_faults_are_looked_for(new_store, path, repair):
    store, impatient = new_store(search=True), new_store(timeout=0.2)
    store.write_messages("chat", [user(f"fox {number}") for number in range(1000)])
    (connection,) = connections_of_stores(path)
    refused, written = [], 0

    def write_meanwhile():
        nonlocal written
        try:
            written += impatient.write_messages("other chat", [user("meanwhile")])
        except StoreTimeoutError as error:
            refused.append(error)

    connection.set_progress_handler(write_meanwhile, 1000)
    assert faults_of(store, repair) == []
    connection.set_progress_handler(None, 0)
    assert refused == []
    assert written > 5


def test_checking_keeps_no_writer_waiting(store):
    store.write_messages("chat", [user(f"fox {number}") for number in range(3000)])
    done = threading.Event()

    def check():
        while not done.is_set():
            assert faults_of(store) == []

    thread = threading.Thread(target=check)
    thread.start()
    for _ in range(20):
        store.write_messages("chat", [user("meanwhile")])
    done.set()
    thread.join()
    assert store.count_messages("chat") == 3020


@pytest.mark.parametrize(
    "change", ["branch_of = NULL WHERE branch_of IS NOT NULL", "branch_of = 'another' WHERE chat_history_id = 'chat'"]
)
def test_a_branch_that_is_not_what_its_meta_says_is_found_and_set_right(two_histories, path, change):
    listed = {info.chat_history_id for info in two_histories.list_chat_histories().items}
    two_histories.copy_messages("chat", "chat~1")
    two_histories.update_chat_history("chat~1", meta={"branch_of": "chat"})
    assert faults_of(two_histories) == []
    damage(path, f"UPDATE haystack_chat_histories SET {change}")
    (fault,) = faults_of(two_histories)
    assert "branch" in fault.description
    assert faults_of(two_histories, repair=True) == [replace(fault, is_repaired=True)]
    assert faults_of(two_histories) == []
    assert {info.chat_history_id for info in two_histories.list_chat_histories().items} == listed
