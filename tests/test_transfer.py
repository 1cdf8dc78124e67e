# SPDX-License-Identifier: Apache-2.0
"""
Exporting, importing and copying: what a file holds, what is refused, and what is there when it goes wrong half-way.

That every engine moves everything is part of the contract: rule 23.
"""

import asyncio
import hashlib
import json
import os
import sqlite3
import stat
import threading
import tracemalloc
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise

import pytest
from haystack.dataclasses import ChatMessage, FileContent
from haystack.document_stores.types import DuplicatePolicy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import PostgresServer, RedisCluster, RedisServer

from haystack_chat_store import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    DamagedFileError,
    Fault,
    InMemoryChatMessageStore,
    SQLiteChatMessageStore,
    UnsupportedOperationError,
    store_from_url,
)
from haystack_chat_store.stores.operations import HistoryRow, MessageRow, Operations
from haystack_chat_store.testing.contract_isolation import HOSTILE_IDS
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import conversation, json_objects, sample_messages, user, with_id
from haystack_chat_store.testing.messages import messages as any_messages
from haystack_chat_store.transfer import (
    EXPORT_FORMATS,
    copy_histories,
    copy_histories_async,
    export_histories,
    export_histories_async,
    export_to,
    import_histories,
    import_histories_async,
)

MOMENT = 1_767_225_600_000_001  # 2026-01-01, and a microsecond


@pytest.fixture
def memory():
    """
    Makes stores in memory that share nothing.
    """
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


def everything(store):
    """
    All that a store holds, in the order of the ids.
    """
    rows = store._run(store._histories_by_id, "", "", 10_000)
    return [(row, [m[1:] for m in store._run(store._page, row.chat_history_id, None, -1, 100_000)]) for row in rows]


def put(store, chat_history_id, *texts, title=None, meta=None):
    """
    Store messages whose ids, times and contents are known.
    """
    rows = [
        MessageRow(index, MOMENT + index, f"m{index}", "user", content(f"m{index}", text))
        for index, text in enumerate(texts)
    ]
    store._run(store._import, HistoryRow(chat_history_id, 0, 0, MOMENT, MOMENT, title, meta), [rows], 0)


def content(message_id, text):
    return f'{{"role":"user","meta":{{"chat_message_id":"{message_id}"}},"name":null,"content":[{{"text":"{text}"}}]}}'


def in_progress(work):
    """
    A callback that does something, once, as soon as histories are on their way.
    """
    waiting = [work]

    def step(_done, total):
        if total is not None and waiting:
            waiting.pop()()

    return step


# ---------------------------------------------------------------------- the format


def test_a_file_is_what_the_documentation_says(store, file):
    put(store, "one", "Grüezi", title="Ein “Titel”", meta='{"a":[1,2]}')
    put(store, "two")
    time = "2026-01-01T00:00:00.000001+00:00"
    times = f'"created_at":"{time}","updated_at":"{time}"'

    assert export_histories(store, file) == (2, 1, 0, ())

    lines = ['{"format":"haystack-chat-store","version":1}']
    lines.append(f'{{"chat_history":{{"id":"one","title":"Ein “Titel”","meta":{{"a":[1,2]}},{times}}}}}')
    lines.append(f'{{"created_at":"{time}","message":{content("m0", "Grüezi")}}}')
    lines.append(f'{{"end_of_chat_history":{{"messages":1,"sha256":"{digest(lines)}"}}}}')
    lines.append(f'{{"chat_history":{{"id":"two","title":null,"meta":null,{times}}}}}')
    lines.append(f'{{"end_of_chat_history":{{"messages":0,"sha256":"{digest(lines)}"}}}}')
    lines.append(f'{{"end_of_file":{{"chat_histories":2,"messages":1,"sha256":"{digest(lines)}"}}}}')
    assert file.read_bytes() == joined(lines)


def joined(lines):
    return "".join(f"{line}\n" for line in lines).encode()


def digest(lines):
    return hashlib.sha256(joined(lines)).hexdigest()


def test_a_file_that_another_program_wrote_is_imported(store, file):
    times = '"created_at":"2026-01-01T01:00:00+01:00","updated_at":"2026-01-01T00:00:00.500000+00:00"'
    lines = ['{"format":"haystack-chat-store","version":1}']
    lines.append(f'{{"chat_history":{{"id":"a","title":"T","meta":{{"x":1}},{times}}}}}')
    lines.append(f'{{"created_at":"2026-01-01T00:00:00+00:00","message":{content("m0", "Hi")}}}')
    lines.append(json.dumps({"end_of_chat_history": {"messages": 1, "sha256": digest(lines)}}))
    lines.append(json.dumps({"end_of_file": {"chat_histories": 1, "messages": 1, "sha256": digest(lines)}}))
    file.write_bytes(joined(lines))

    assert import_histories(store, file) == (1, 1, 0, ())
    ((row, messages),) = everything(store)
    assert row == ("a", 1, 1, MOMENT - 1, MOMENT + 499_999, "T", '{"x":1}')
    assert messages == [(MOMENT - 1, "m0", "user", content("m0", "Hi"))]


def test_the_stored_text_is_moved_as_it_is(store, target, file):
    spaced = content("m0", "Hi").replace(":", " :\n ")  # as somebody's own tool may have formatted it
    row = MessageRow(0, MOMENT, "m0", "user", spaced)
    store._run(store._import, HistoryRow("a", 0, 0, MOMENT, MOMENT, None, None), [[row]], 0)

    export_histories(store, file)
    import_histories(target, file)

    ((_, messages),) = everything(target)
    assert messages[0][3] == spaced.replace("\n", " ")


# ---------------------------------------------------------------------- nothing is lost


def test_all_kinds_of_messages_and_ids_come_back_equal(store, target, sqlite, file):
    for chat_history_id in HOSTILE_IDS:
        store.write_messages(chat_history_id, list(sample_messages().values()))
    store.update_chat_history(HOSTILE_IDS[0], title="a\u2028b 👋", meta={"big": 2**70, "": [None, "\ud800"]})
    store.write_messages("titled", [user()])
    store.update_chat_history("titled", title="no messages any more")
    store.delete_messages("titled", message_ids=[store.retrieve_messages("titled")[0].meta["chat_message_id"]])

    exported = export_histories(store, file)
    assert import_histories(sqlite, file) == exported
    assert copy_histories(sqlite, target) == exported
    assert everything(target) == everything(sqlite) == everything(store)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(any_messages(), max_size=5), json_objects(), st.text(max_size=20))
def test_any_conversation_comes_back_equal(memory, file, messages, meta, title):
    store, target = memory(), memory()
    store.write_messages("a", [*messages, user()])
    store.update_chat_history("a", title=title.replace("\0", "").encode("utf-8", "replace").decode(), meta=meta)

    export_histories(store, file)
    import_histories(target, file)

    assert everything(target) == everything(store)


def test_twenty_megabytes_come_back_equal(store, target, file):
    part = FileContent("A" * 20_000_000, "application/pdf", validation=False)
    store.write_messages("a", [ChatMessage.from_user(content_parts=[part]), user("\x00\ud800", big=10**5000)])

    export_histories(store, file)
    import_histories(target, file)

    assert everything(target) == everything(store)


def test_exporting_again_writes_the_same_file(store, sqlite, tmp_path):
    store.write_messages("b", conversation("uctta"))
    store.write_messages("a", conversation("ua"))
    copy_histories(store, sqlite)
    files = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]

    for file, each in zip(files, (store, store, sqlite), strict=True):
        export_histories(each, file)

    assert len({file.read_bytes() for file in files}) == 1


def test_a_move_through_every_engine_ends_as_it_began(store, target, sqlite):
    store.write_messages("all", list(sample_messages().values()))
    store.write_messages("long", [user(str(number)) for number in range(2_500)])
    store.update_chat_history("long", title="T", meta={"a": 1})

    with PostgresServer(fsync="off") as postgres, RedisServer() as redis, RedisCluster() as cluster:
        servers = [closing(store_from_url(server.url, last_k=None)) for server in (postgres, redis, cluster)]
        with ExitStack() as stack:
            road = [store, sqlite, *map(stack.enter_context, servers), target]
            for here, there in pairwise(road):
                assert copy_histories(here, there) == (2, 2_500 + len(sample_messages()), 0, ())

    assert everything(target) == everything(store)


def test_namespaces_of_one_database_copy_to_each_other(tmp_path):
    here, there = (SQLiteChatMessageStore(tmp_path / "chat.db", namespace=name) for name in ("here", "there"))
    here.write_messages("a", [user(str(number)) for number in range(1_500)])

    assert copy_histories(here, there).messages == 1_500
    assert everything(there) == everything(here)
    assert copy_histories(here, here) == (0, 0, 1_500, ())


# ---------------------------------------------------------------------- which histories


@pytest.fixture
def several(store):
    for name in ("a/1", "a/2", "b/1"):
        store.write_messages(name, conversation("ua"))
    return store


def test_histories_are_chosen_by_id_or_prefix(several, memory):
    for chosen, expected in (
        ({}, ["a/1", "a/2", "b/1"]),
        ({"prefix": "a/"}, ["a/1", "a/2"]),
        ({"chat_history_ids": ["b/1", "a/1", "b/1"]}, ["a/1", "b/1"]),
        ({"chat_history_ids": iter(["b/1"])}, ["b/1"]),
        ({"chat_history_ids": []}, []),
        ({"prefix": "A"}, []),
    ):
        target = memory()
        assert copy_histories(several, target, **chosen) == (len(expected), 2 * len(expected), 0, ())
        assert [row.chat_history_id for row, _ in everything(target)] == expected


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_a_wrong_choice_is_refused_and_leaves_no_file(several, file, name):
    for chosen, error in (
        ({"chat_history_ids": ["a/1", "nobody"]}, ChatHistoryNotFoundError),
        ({"chat_history_ids": ["a/1"], "prefix": "a"}, ValueError),
        ({"chat_history_ids": "a/1"}, ValueError),
        ({"chat_history_ids": [1]}, ValueError),
        ({"prefix": "\0"}, ValueError),
    ):
        with pytest.raises(error):
            export_histories(several, file, format=name, **chosen)
    assert list(file.parent.iterdir()) == []


def test_unknown_formats_are_refused(store, file):
    for name in ("csv", None, ""):
        with pytest.raises(ValueError, match="format must be one of 'jsonl'"):
            export_histories(store, file, format=name)
        with pytest.raises(ValueError, match="format must be one of 'jsonl'"):
            import_histories(store, file, format=name)
    with pytest.raises(ValueError, match="got 'markdown'"):
        import_histories(store, file, format="markdown")


def test_what_is_no_store_of_ours_is_refused(store, file):
    for call in (export_histories, import_histories):
        file.write_bytes(b"")
        export_histories(store, file)
        with pytest.raises(ValueError, match="BaseChatMessageStore, got object"):
            call(object(), file)
    with pytest.raises(ValueError, match="BaseChatMessageStore"):
        copy_histories(store, None)


def test_a_store_that_cannot_import_says_so(several, file):
    class Bare(InMemoryChatMessageStore):
        _import = Operations._import
        _histories_by_id = Operations._histories_by_id

    bare = Bare(namespace=uuid.uuid4().hex)
    export_histories(several, file)
    with pytest.raises(UnsupportedOperationError, match="Bare does not support importing"):
        import_histories(bare, file)
    with pytest.raises(UnsupportedOperationError, match="Bare does not support the directory"):
        export_histories(bare, file.with_name("other"))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# ---------------------------------------------------------------------- files are whole or not there


def fails(_done, _total):
    raise RuntimeError("stop")


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_an_export_that_fails_leaves_what_was_there(several, file, name):
    file.write_text("before")
    with pytest.raises(RuntimeError, match="stop"):
        export_histories(several, file, format=name, progress=fails)
    assert file.read_text() == "before"
    assert list(file.parent.iterdir()) == [file]


def test_an_export_takes_the_place_of_what_was_there_behind_a_link_too(several, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    link.symlink_to(real)
    export_histories(several, link)
    assert link.is_symlink()
    assert real.read_bytes().startswith(b'{"format"')


def test_an_export_can_be_read_by_its_owner_alone(several, file):
    export_histories(several, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_is_no_file_is_never_replaced(several, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a file"):
            export_histories(several, path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_database_is_never_replaced(several, sqlite):
    several.write_messages("a", [user()])
    copy_histories(several, sqlite)
    for store in (several, sqlite):
        with pytest.raises(ValueError, match="is an SQLite database"):
            export_histories(store, sqlite.path)
    assert everything(sqlite) == everything(several)


def test_a_folder_that_is_missing_is_an_error_of_the_system(several, tmp_path):
    with pytest.raises(FileNotFoundError):
        export_histories(several, tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError):
        import_histories(several, tmp_path / "missing")


# ---------------------------------------------------------------------- one damaged row hides no other


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "no JSON",
        "null",
        "[]",
        '{"role":"user"}',
        content("another id", "Hi"),
        content("m1", "Hi").replace("user", "assistant"),
        content("m1", "Hi").replace("user", "nobody"),
        content("m1", "Hi") + "}",
        content("m1", "Hi") + "," + content("m1", "Hi"),
        "[" * 100_000,
    ],
)
def test_a_damaged_message_is_left_out_and_reported(sqlite, target, file, damaged):
    put(sqlite, "a", "zero", "one", "two")
    put(sqlite, "b", "zero")
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as connection:
        changed = connection.execute(
            "UPDATE chat_messages SET content = ? WHERE message_id = 'm1'", (damaged,)
        ).rowcount
    assert changed == 1

    fault = Fault("a", 1, "The message cannot be read, and was left out.", False)
    for name in EXPORT_FORMATS:
        exported = export_histories(sqlite, file.with_name(name), format=name)
        assert exported.faults[:1] == (fault,)
    assert copy_histories(sqlite, target) == export_histories(sqlite, file) == (2, 3, 0, (fault,))
    assert [[m[1] for m in messages] for _, messages in everything(target)] == [["m0", "m2"], ["m0"]]
    assert import_histories(target, file).skipped == 3


def test_a_damaged_text_of_the_engine_is_left_out_and_reported(sqlite, target):
    put(sqlite, "a", "zero", "one", "two")
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as connection:
        connection.execute("UPDATE chat_messages SET content = CAST(x'7bff7d' AS TEXT) WHERE message_id = 'm1'")
    assert [fault.position for fault in copy_histories(sqlite, target).faults] == [1]


def test_damaged_meta_is_left_out_and_reported(sqlite, target):
    put(sqlite, "a", "zero", title="T", meta='{"cut')
    assert copy_histories(sqlite, target) == (
        1,
        1,
        0,
        (Fault("a", None, "Its meta cannot be read, and was left out.", False),),
    )
    assert target.get_chat_history("a")[-2:] == ("T", {})


# ---------------------------------------------------------------------- damaged files


def assert_refused(store, file, data, says=None):
    file.write_bytes(data)
    with pytest.raises(DamagedFileError, match=says):
        import_histories(store, file)
    assert everything(store) == []


@pytest.fixture
def exported(store, file):
    put(store, "a", "zero", "one", title="T", meta='{"a":1}')
    put(store, "b", "zero")
    export_histories(store, file)
    return file.read_bytes()


def test_a_file_that_was_cut_off_anywhere_is_refused(exported, target, file):
    for end in range(len(exported)):
        assert_refused(target, file, exported[:end])


def test_a_file_with_any_byte_changed_is_refused(exported, target, file):
    for place in range(len(exported)):
        for bit in (1, 32):
            changed = bytearray(exported)
            changed[place] ^= bit
            assert_refused(target, file, bytes(changed))


def test_a_file_with_lines_missing_doubled_or_in_another_order_is_refused(exported, target, file):
    lines = exported.splitlines(keepends=True)
    for index in range(len(lines)):
        assert_refused(target, file, b"".join(lines[:index] + lines[index + 1 :]))
        assert_refused(target, file, b"".join([*lines[:index], lines[index], *lines[index:]]))
    assert_refused(target, file, b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "is not an export of haystack-chat-store"),
        (lambda data: b"\xff\xfe" + data, "is not an export of haystack-chat-store"),
        (lambda data: b'{"role":"user"}\n', "is not an export of haystack-chat-store"),
        (lambda data: data.replace(b'"version":1', b'"version":2'), "has version 2 of the format.*Upgrade"),
        (lambda data: data[:-1], "line 9.*cut off"),
        (lambda data: data + b"\n", "more after its end"),
        (lambda data: data.replace(b"one", b"eno"), "line 5, counts or checksum do not agree"),
        (lambda data: data.replace(b"\n", b"\r\n"), "is damaged|was damaged"),
        (lambda data: data.replace(b"zero", b"z\xffro"), "line 3, it is not UTF-8"),
        (lambda data: data.replace(b'"id":"b"', b'"id":""'), "line 6, there should be a chat history"),
    ],
)
def test_the_error_says_what_is_wrong_and_where(exported, target, file, change, says):
    assert_refused(target, file, change(exported), says)


def with_right_checksums(lines):
    """
    A file of these lines, the ends of the history and of the file added.
    """
    messages = len(lines) - 2
    lines = [*lines, json.dumps({"end_of_chat_history": {"messages": messages, "sha256": digest(lines)}})]
    lines.append(json.dumps({"end_of_file": {"chat_histories": 1, "messages": messages, "sha256": digest(lines)}}))
    return joined(lines)


@pytest.mark.parametrize(
    ("history", "messages"),
    [
        ({"id": "a" * 513}, []),
        ({"id": ""}, []),
        ({"id": None}, []),
        ({"id": "a\0"}, []),
        ({"title": "t" * 1001}, []),
        ({"title": 5}, []),
        ({"meta": []}, []),
        ({"created_at": "yesterday"}, []),
        ({"created_at": "2026-01-01T00:00:00"}, []),
        ({"updated_at": None}, []),
        ({"updated_at": []}, []),
        ({"updated_at": "0001-01-01T00:00:00+01:00"}, []),
        ({}, [content("m0", "a"), content("m0", "b")]),
        ({}, [content("", "a")]),
        ({}, [content("m" * 513, "a")]),
        ({}, [content("m\\u0000", "a")]),
        ({}, [content("m0", "a").replace('"chat_message_id":"m0"', "")]),
        ({}, [content("m0", "a").replace('"m0"', "5")]),
        ({}, [content("m0", "a").replace("user", "nobody")]),
        ({}, ["{}"]),
        ({}, ['{"a":[{}', "{}]}"]),
        ({}, [content("m0", "a") + "," + content("m1", "a")]),
    ],
)
def test_a_file_that_holds_what_no_store_may_have_is_refused(target, file, history, messages):
    time = "2026-01-01T00:00:00+00:00"
    fields = {"id": "a", "title": None, "meta": None, "created_at": time, "updated_at": time, **history}
    header = ['{"format":"haystack-chat-store","version":1}', json.dumps({"chat_history": fields})]
    lines = [f'{{"created_at":"{time}","message":{message}}}' for message in messages]
    assert_refused(target, file, with_right_checksums(header + lines), "was damaged or changed. In line [234], there")


def test_errors_never_quote_the_file(exported, target, file):
    for place in range(len(exported)):
        file.write_bytes(exported[:place].replace(b"zero", b"secret") + b"secret" + exported[place:])
        with pytest.raises(DamagedFileError) as caught:
            import_histories(target, file)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_file_that_changes_while_it_is_imported_adds_no_part_of_a_history(store, target, file):
    put(store, "a", "zero")
    put(store, "b", *["x" * 1000] * 3_000)
    export_histories(store, file)
    place = file.read_bytes().index(b"xxx", 2_500_000)

    def change():
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"y")

    with pytest.raises(DamagedFileError, match=r"counts or checksum.*changed while it was imported"):
        import_histories(target, file, progress=in_progress(change))
    assert [row.chat_history_id for row, _ in everything(target)] == ["a"]


# ---------------------------------------------------------------------- again, and into what is there


def test_importing_again_adds_nothing(several, target, file):
    export_histories(several, file)
    import_histories(target, file)
    before = everything(target)

    assert import_histories(target, file) == (0, 0, 6, ())
    assert everything(target) == before


def test_a_history_that_was_continued_in_the_file_gets_what_is_new(store, target, file):
    store.write_messages("a", [user(str(number)) for number in range(1_500)])
    copy_histories(store, target)
    store.write_messages("a", [user(str(number)) for number in range(1_200)])
    export_histories(store, file)

    assert import_histories(target, file) == (1, 1_200, 1_500, ())
    assert everything(target) == everything(store)


def test_a_history_that_was_continued_in_the_store_stays(store, target, file):
    store.write_messages("a", conversation("ua"))
    export_histories(store, file)
    copy_histories(store, target)
    target.write_messages("a", conversation("ua"))

    assert import_histories(target, file) == (0, 0, 2, ())
    assert target.count_messages("a") == 4


def test_title_and_meta_of_a_history_that_is_there_stay(store, target):
    put(store, "a", "zero", "one", title="theirs", meta='{"a":1}')
    put(target, "a", "zero", title="mine")

    assert copy_histories(store, target).messages == 1
    assert target.get_chat_history("a")[-2:] == ("mine", {})


def test_a_history_without_messages_is_filled(store, target):
    put(store, "a", "zero", title="theirs")
    put(target, "a", title="mine")

    assert copy_histories(store, target) == (1, 1, 0, ())
    assert target.get_chat_history("a").title == "mine"


def test_histories_that_differ_are_named_and_left_alone_while_all_others_come(several, target, file):
    target.write_messages("a/1", [user("mine")])
    target.write_messages("b/1", [*several.retrieve_messages("b/1")[:1], user("mine")])
    before = [target.retrieve_messages(name) for name in ("a/1", "b/1")]
    export_histories(several, file)

    with pytest.raises(ChatHistoryExistsError, match=r"2 have other messages .*: 'a/1', 'b/1'.*2 messages of 1 hist"):
        import_histories(target, file)

    assert [target.retrieve_messages(name) for name in ("a/1", "b/1")] == before
    assert target.retrieve_messages("a/2") == several.retrieve_messages("a/2")


def test_a_long_history_that_differs_hides_none_that_comes_after_it(store, target, file):
    put(store, "a", *["x"] * 2_500)
    put(store, "b", "zero")
    target.write_messages("a", [user("mine")])
    export_histories(store, file)

    with pytest.raises(ChatHistoryExistsError, match="'a'"):
        import_histories(target, file)
    assert (target.count_messages("a"), target.count_messages("b")) == (1, 1)


def test_system_messages_come_along_whatever_the_store_skips(store, sqlite):
    store.write_messages("a", conversation("sua"))
    assert copy_histories(store, sqlite).messages == 3


def test_two_imports_at_once_bring_everything_once(store, sqlite, file):
    for number in range(20):
        store.write_messages(f"chat {number}", conversation("uaua"))
    export_histories(store, file)

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: import_histories(sqlite, file), range(4)))

    assert everything(sqlite) == everything(store)
    assert (sum(each.messages for each in done), sum(each.skipped for each in done)) == (80, 240)


def test_an_import_gives_up_on_a_history_that_changes_all_the_time(store, file):
    class Busy(InMemoryChatMessageStore):
        def _import(self, *arguments):
            raise ChatHistoryChangedError("changed")

    put(store, "a", "zero")
    export_histories(store, file)
    with pytest.raises(ChatHistoryChangedError, match="'a' was written to all the time"):
        import_histories(Busy(namespace=uuid.uuid4().hex), file)


class WrittenToMeanwhile(InMemoryChatMessageStore):
    """
    Somebody else writes to it just before an import does.
    """

    meanwhile = None

    def _import(self, *arguments):
        if self.meanwhile is not None:
            work, self.meanwhile = self.meanwhile, None
            work()
        return super()._import(*arguments)


def test_what_is_written_to_a_history_just_before_it_is_imported_is_not_mixed_with_it(store, file):
    put(store, "a", "zero", "one", "two")
    export_histories(store, file)
    target = WrittenToMeanwhile(namespace=uuid.uuid4().hex)
    target.meanwhile = lambda: target.write_messages("a", [with_id("m0"), with_id("mine")])

    with pytest.raises(ChatHistoryExistsError, match="'a'"):
        import_histories(target, file)
    assert [message.meta["chat_message_id"] for message in target.retrieve_messages("a")] == ["m0", "mine"]

    target.delete_all_messages()
    target.meanwhile = lambda: target.write_messages("a", [with_id("m0")])
    assert import_histories(target, file) == (1, 2, 1, ())
    target.delete_all_messages()

    def write_each_time(number=0):
        target.write_messages("a", [with_id(("m0", "m1", "m2")[number])] if number < 3 else [user()])
        target.meanwhile = lambda: write_each_time(number + 1)

    target.meanwhile = write_each_time
    assert import_histories(target, file) == (0, 0, 3, ())

    target.delete_all_messages()
    target.meanwhile = lambda: import_histories(target, file)
    assert import_histories(target, file) == (0, 0, 3, ())


# ---------------------------------------------------------------------- progress, interruptions, memory


def test_progress_tells_what_is_done_of_how_much(store, target, file):
    store.write_messages("a", [user(str(number)) for number in range(2_500)])
    store.write_messages("b", [user()])
    for work in (
        lambda step: export_histories(store, file, progress=step),
        lambda step: import_histories(target, file, progress=step),
        lambda step: import_histories(target, file, progress=step),
        lambda step: copy_histories(store, target, progress=step),
    ):
        seen = []
        work(lambda done, total, seen=seen: seen.append((done, total)))
        known = [(done, total) for done, total in seen if total is not None]
        assert known[-1] == (2_501, 2_501)
        assert known == sorted(known)
        assert len(known) > 3


def test_an_import_that_is_interrupted_leaves_whole_histories(store, sqlite, file):
    store.write_messages("a", conversation("ua"))
    store.write_messages("b", [user(str(number)) for number in range(2_500)])
    export_histories(store, file)

    def step(done, total):
        if total is not None and done > 1_500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_histories(sqlite, file, progress=step)
    assert [(row.chat_history_id, row.message_count) for row, _ in everything(sqlite)] == [("a", 2)]
    assert import_histories(sqlite, file) == (1, 2_500, 2, ())
    assert everything(sqlite) == everything(store)


def test_the_asynchronous_calls_do_the_same(several, target, sqlite, file):
    async def move():
        exported = await export_histories_async(several, file, prefix="a")
        return exported, await import_histories_async(target, file), await copy_histories_async(target, sqlite)

    assert asyncio.run(move()) == ((2, 4, 0, ()),) * 3
    assert everything(sqlite) == everything(target)


def test_the_asynchronous_calls_work_on_another_thread(several, file):
    threads = set()
    asyncio.run(export_histories_async(several, file, progress=lambda *_: threads.add(threading.get_ident())))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("what", ["export", "import", "copy"])
def test_cancelling_stops_at_the_next_batch_and_leaves_no_part(store, sqlite, file, what):
    store.write_messages("a", [user(str(number)) for number in range(5_000)])
    export_histories(store, file)
    other = file.with_name("other")
    under_way, steps = threading.Event(), []
    may_go_on = threading.Event()

    def step(done, total):
        if total is not None:
            steps.append(done)
            under_way.set()
            may_go_on.wait(60)

    async def cancel():
        work = {
            "export": lambda: export_histories_async(store, other, progress=step),
            "import": lambda: import_histories_async(sqlite, file, progress=step),
            "copy": lambda: copy_histories_async(store, sqlite, progress=step),
        }
        task = asyncio.create_task(work[what]())
        while not under_way.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert len(steps) == 1
    assert not other.exists()
    assert everything(sqlite) == []


def peak_memory(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peaks_of_moving(count, path):
    here, there = (SQLiteChatMessageStore(path, namespace=name) for name in ("here", "there"))
    for number in range(count):
        here.write_messages(f"chat {number}", [user("x" * 14_000) for _ in range(300)])
    file = path.with_suffix(".jsonl")
    return [
        peak_memory(lambda: export_histories(here, path.with_suffix(".md"), format="markdown")),
        peak_memory(lambda: export_histories(here, path.with_suffix(".html"), format="html")),
        peak_memory(lambda: export_histories(here, file)),
        peak_memory(lambda: import_histories(there, file)),
        peak_memory(lambda: import_histories(there, file)),
    ]


def test_memory_does_not_grow_with_what_is_moved(tmp_path):
    few, many = (peaks_of_moving(count, tmp_path / f"{count}.db") for count in (1, 4))
    for small, large in zip(few, many, strict=True):
        assert large < 1.5 * small


def test_large_messages_are_read_a_few_at_a_time(sqlite, file):
    sqlite.write_messages("a", [user("x" * 200_000) for _ in range(300)])
    with file.open("wb") as stream:
        assert peak_memory(lambda: export_to(sqlite, stream)) < 120_000_000
    assert file.stat().st_size > 60_000_000


class ChangesWhileItIsRead(InMemoryChatMessageStore):
    """
    Somebody else changes a history after its first page was read, so many times.
    """

    def __init__(self, change, times=1):
        super().__init__(namespace=uuid.uuid4().hex, last_k=None)
        self.change, self.times = change, times

    def _page(self, session, chat_history_id, before, after, limit):
        page = super()._page(session, chat_history_id, before, after, limit)
        if after == -1 and self.times:
            self.times -= 1
            self.change(self)
        return page


def edit_both_ends(store):
    ends = [store.list_messages("a", after=position, limit=1)[0].message for position in (0, 1_998)]
    edited = [user("edited", chat_message_id=message.meta["chat_message_id"]) for message in ends]
    store.write_messages("a", edited, policy=DuplicatePolicy.OVERWRITE)


def erase_the_rest(store):
    store.delete_messages(
        "a", from_message_id=store.list_messages("a", after=50, limit=1)[0].message.meta["chat_message_id"]
    )


@pytest.mark.parametrize("change", [edit_both_ends, erase_the_rest])
def test_a_history_that_changes_while_it_is_read_is_exported_as_of_one_moment(target, file, change):
    store = ChangesWhileItIsRead(change)
    store.write_messages("a", [user(str(number)) for number in range(2_000)])

    assert export_histories(store, file).faults == ()
    import_histories(target, file)

    assert texts(target.retrieve_messages("a", last_k=9_999)) == texts(store.retrieve_messages("a"))


def test_a_history_that_changes_all_the_time_is_exported_and_reported(file):
    store = ChangesWhileItIsRead(edit_both_ends, times=1_000)
    store.write_messages("a", [user(str(number)) for number in range(2_000)])

    exported = export_histories(store, file)

    assert exported.messages == 2_000
    assert [fault.chat_history_id for fault in exported.faults] == ["a"]
