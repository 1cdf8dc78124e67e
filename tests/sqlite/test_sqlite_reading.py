# SPDX-License-Identifier: Apache-2.0
"""What can only be read can be read, and reading leaves no traces where others write."""

import asyncio
import inspect
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage
from sqlite_stores import opened, rows, said, say

from haystack_chat_store import SQLiteChatMessageStore, doctor, transfer
from haystack_chat_store.errors import (
    SchemaVersionError,
    StoreConfigurationError,
    StoreUnavailableError,
    UnsupportedOperationError,
)
from haystack_chat_store.stores.engine import Engine, is_marked, reads_only, result_without_database
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.processes import Program, run_program

pytestmark = pytest.mark.skipif(not hasattr(os, "setuid"), reason="this platform has no users that tests could become")


def read_in_every_way(store, report, writes):
    """Report what reading finds, as a user who is not root."""
    import io
    import os

    from haystack.dataclasses import ChatMessage

    from haystack_chat_store import ChatMessageStoreError, doctor, transfer

    if os.geteuid() == 0:  # root may do anything
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        for _ in range(2):
            report([message.text for message in store.retrieve_messages("history")])
        report(store.count_messages("history"))
        report(len(store.list_chat_histories().items))
        report(len(list(store.iterate_messages("history"))))
        report(store.statistics().messages)
        report(transfer.export_to(store, io.BytesIO()).messages)
        report(len(doctor.check(store)))
        report(len(store.search_messages("first")))
        store.close()
    except ChatMessageStoreError as error:
        report([type(error).__name__, str(error)])
    try:
        if writes:
            store.write_messages("history", [ChatMessage.from_user("refused")])
    except ChatMessageStoreError as error:
        report([type(error).__name__, str(error)])


@pytest.fixture
def folder():
    """A folder that any user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield folder
        os.chmod(folder, 0o777)


def made(folder, log):
    """A database with two messages; with a log, one of them is in the log alone, as after a crash."""
    path, working = os.path.join(folder, "chat_history.db"), os.path.join(folder, "working.db")
    with closing(SQLiteChatMessageStore(working, search=True)) as store:
        say(store, "first")
        with opened(working) as connection:
            connection.execute("PRAGMA wal_checkpoint (TRUNCATE)")
        if log != "closed":
            say(store, "second")
            for ending in {"with log": ("", "-wal"), "with log and index": ("", "-wal", "-shm")}[log]:
                shutil.copy(working + ending, path + ending)
        else:
            say(store, "second")
    if log == "closed":
        os.rename(working, path)
    else:
        os.remove(working)
    return path


LOGS = ["closed", "with log", "with log and index"]


def contents_of(folder):
    return {name: Path(folder, name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o444, 0o555), (0o444, 0o777), (0o666, 0o555)])
def test_files_that_can_only_be_read_are_read_and_left_as_they_are(folder, log, file_mode, folder_mode):
    path = made(folder, log)
    for name in os.listdir(folder):
        os.chmod(os.path.join(folder, name), file_mode)
    os.chmod(folder, folder_mode)
    before = contents_of(folder)
    can_be_written = file_mode == 0o666 and log == "with log and index"
    reports = run_program(read_in_every_way, SQLiteChatMessageStore(path, search=True), not can_be_written)
    assert reports[:9] == [["first", "second"], ["first", "second"], 2, 1, 2, 2, 2, 0, 1]
    if not can_be_written:
        ((error, message),) = reports[9:]
        assert error == "StoreUnavailableError"
        assert "write access" in message
    after = contents_of(folder)
    after.pop("chat_history.db-shm", None)
    before.pop("chat_history.db-shm", None)
    assert after == before


@pytest.mark.parametrize("log", LOGS)
def test_a_mount_that_can_only_be_read_is_read(folder, log):
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can mount")
    path, mount = made(folder, log), os.path.join(folder, "mount")
    os.mkdir(mount)
    script = f"mount --bind {folder} {mount} && mount -o remount,ro,bind {mount} && exec python3 -c pass"
    if subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no one mount")
    code = f"""
from haystack_chat_store import SQLiteChatMessageStore, doctor, transfer
store = SQLiteChatMessageStore({os.path.join(mount, "chat_history.db")!r}, search=True)
print([m.text for m in store.retrieve_messages("history")], len(store.search_messages("first")), doctor.check(store))
"""
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script.replace("python3 -c pass", '"$0" -c "$1"'), sys.executable, code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "['first', 'second'] 1 []\n"
    assert os.path.basename(path) in os.listdir(folder)


def test_a_live_log_is_read_where_nothing_can_be_written(folder):
    """Another user writes; this one sees each message as soon as it is stored."""
    path = os.path.join(folder, "chat_history.db")
    with closing(SQLiteChatMessageStore(path)) as store:
        say(store, "first")
        for name in os.listdir(folder):
            os.chmod(os.path.join(folder, name), 0o644)
        os.chmod(folder, 0o755)
        with Program(read_when_told, SQLiteChatMessageStore(path)) as program:
            program.begin()
            reports = program.reports()
            assert next(reports) == ["first"]
            for number in range(3):
                say(store, str(number))
                program.tell("go on")
                assert next(reports) == ["first", *map(str, range(number + 1))]


def read_when_told(store, report):
    """Read now, and once more at each line of input, as a user who is not root."""
    import os
    import sys

    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    while True:
        report([message.text for message in store.retrieve_messages("history")])
        if not sys.stdin.readline():
            return


def test_a_file_that_is_read_without_locks_and_changed_is_read_anew(new_store, tmp_path, monkeypatch):
    path = made(str(tmp_path), "closed")
    store = new_store(path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK and access(place, mode))
    assert said(store) == ["first", "second"]
    assert os.listdir(tmp_path) == ["chat_history.db"]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE haystack_chat_messages SET content = replace(content, 'second', 'changed')")
    assert said(store) == ["first", "changed"]


@pytest.mark.parametrize("is_empty", [False, True], ids=["missing", "empty"])
def test_a_file_without_anything_reads_as_empty_until_it_is_made(new_store, path, is_empty):
    if is_empty:
        Path(path).touch()
    reading, writing = new_store(search=True), new_store(timeout=7)
    assert said(reading) == []
    assert reading.search_messages("Hi") == []
    assert reading.statistics().size == 0
    assert doctor.check(reading) == []
    assert os.path.exists(path) == is_empty
    say(writing, "Hi!")
    assert said(reading) == ["Hi!"]


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
@pytest.mark.parametrize("mark", ["table", "application id"])
def test_another_programs_file_is_refused_by_every_call_and_left_as_it_is(new_store, path, journal_mode, mark):
    with opened(path) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        connection.execute("CREATE TABLE bookmarks (url)" if mark == "table" else "PRAGMA application_id = 7")
    before = Path(path).read_bytes()
    store = new_store(search=True)
    for call in (
        lambda: said(store),
        lambda: say(store, "Hi!"),
        lambda: doctor.check(store),
        lambda: doctor.check(store, repair=True),
        lambda: store.search_messages("Hi"),
        store.index_messages,
        store.delete_all_messages,
        lambda: store.backup(f"{path}.backup"),
        lambda: transfer.export_histories(store, f"{path}.jsonl"),
    ):
        with pytest.raises(StoreConfigurationError, match=r"database of another program.*left untouched"):
            call()
    store.close()
    assert Path(path).read_bytes() == before
    assert not os.path.exists(f"{path}.backup")


def test_another_programs_log_is_not_written_to_its_database(new_store, tmp_path, path):
    source = str(tmp_path / "source.db")
    with opened(source) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("CREATE TABLE bookmarks (url)")
        for ending in ("", "-wal"):  # as after a crash
            shutil.copy(source + ending, path + ending)
    before = [Path(path + ending).read_bytes() for ending in ("", "-wal")]
    store = new_store()
    for call in (lambda: said(store), lambda: say(store, "Hi!")):
        with pytest.raises(StoreConfigurationError, match="another program"):
            call()
    store.close()
    assert [Path(path + ending).read_bytes() for ending in ("", "-wal")] == before


def test_reading_keeps_another_journal_mode_and_writing_does_not(new_store, path):
    with closing(new_store()) as store:
        say(store, "Hi!")
    with opened(path) as connection:
        connection.execute("PRAGMA journal_mode = delete")
    before = Path(path).read_bytes()
    store = new_store()
    assert said(store) == ["Hi!"]
    store.close()
    assert Path(path).read_bytes() == before
    say(store, "Hi again!")
    assert said(store) == ["Hi!", "Hi again!"]
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]


def test_a_journal_of_an_interrupted_write_is_named(new_store, tmp_path, path):
    with closing(new_store()) as store:
        say(store, "before")
    with opened(path) as connection:
        connection.execute("PRAGMA journal_mode = delete")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE large AS SELECT randomblob(100000) AS x FROM haystack_chat_messages")
        crashed = str(tmp_path / "crashed.db")
        for ending in ("", "-journal"):
            shutil.copy(path + ending, crashed + ending)
    store = new_store(crashed)
    with pytest.raises(StoreUnavailableError, match=r"crashed\.db-journal.*writes undoes it"):
        said(store)
    say(store, "after")
    assert said(store) == ["before", "after"]


def test_a_search_neither_makes_nor_completes_the_index(new_store, path):
    say(new_store(), "Hi!")
    store = new_store(search=True)
    for _ in range(2):
        with pytest.raises(UnsupportedOperationError, match=r"index_messages\(\)"):
            store.search_messages("Hi")
        assert rows(path, "SELECT count(*) FROM haystack_chat_search") == [(0,)]


def test_a_repair_upgrades_what_a_check_refuses(new_store, path):
    with closing(new_store()) as store:
        say(store, "Hi!")
    with opened(path) as connection:
        connection.execute("UPDATE haystack_chat_schema SET version = 0")
    with pytest.raises(SchemaVersionError, match="earlier version"):
        doctor.check(new_store())
    assert rows(path, "SELECT version FROM haystack_chat_schema") == [(0,)]


def write_all_the_time(store, report):
    """Write until killed."""
    from haystack.dataclasses import ChatMessage

    number = 0
    while True:
        store.write_messages("theirs", [ChatMessage.from_user(f"{number}"), ChatMessage.from_user(f"{number}")])
        report(number)
        number += 1


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_backup_is_a_moment_of_a_database_that_others_write_to(new_store, tmp_path, path, way):
    store = new_store(search=True, durability="normal")
    store.write_messages("history", [ChatMessage.from_user(f"fox {number}") for number in range(5_000)])
    with Program(write_all_the_time, store) as program:
        program.begin()
        reports = program.reports()
        written = next(reports)
        for number in range(3):
            copy = tmp_path / f"copy {number}.db"
            before = Path(path).stat().st_ino
            asyncio.run(store.backup_async(copy)) if way == "async" else store.backup(copy)
            assert Path(path).stat().st_ino == before
            copied = new_store(copy, search=True)
            theirs = texts(copied.retrieve_messages("theirs"))
            assert theirs[::2] == theirs[1::2] == list(map(str, range(len(theirs) // 2)))
            assert len(theirs) // 2 > written
            assert copied.count_messages("history") == 5_000
            assert len(copied.search_messages("fox", limit=10)) == 10
            assert doctor.check(copied) == []
            written = next(reports)
        program.kill()
    assert rows(tmp_path / "copy 0.db", "PRAGMA journal_mode") == [("delete",)]
    assert os.stat(tmp_path / "copy 0.db").st_mode & 0o777 == 0o600
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".haystack")]


def test_a_backup_replaces_nothing(store, path, tmp_path):
    say(store, "Hi!")
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (path, tmp_path / "there", tmp_path / "link", tmp_path):
        with pytest.raises(FileExistsError):
            store.backup(place)
    with pytest.raises(FileNotFoundError, match="no folder"):
        store.backup(tmp_path / "no folder" / "copy.db")
    assert (tmp_path / "there").read_text() == "mine"
    assert said(store) == ["Hi!"]


@pytest.mark.parametrize("place", ["", b"copy.db", "a\x00b", "file:copy.db", ":memory:", None, 5])
def test_a_path_that_is_no_file_is_refused_for_a_backup(store, path, place):
    say(store, "Hi!")
    for call in (lambda: store.backup(place), lambda: asyncio.run(store.backup_async(place))):
        with pytest.raises(ValueError, match="path must be"):
            call()


def test_nothing_is_no_backup(store, path):
    with pytest.raises(StoreConfigurationError, match="nothing to back up"):
        store.backup(f"{path}.backup")
    assert os.listdir(os.path.dirname(path)) == []


def test_each_operation_that_only_reads_has_a_result_before_the_database_is_made():
    # A backup is refused instead, as another test says.
    operations = filter(inspect.isfunction, vars(Engine).values())
    reading = {each.__name__ for each in operations if is_marked(each, reads_only)} - {"backup"}
    assert len(reading) > 10
    for name in reading:
        result_without_database(getattr(Engine, name))
