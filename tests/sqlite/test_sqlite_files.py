# SPDX-License-Identifier: Apache-2.0
"""The database file: its path, and what can be wrong with it."""

import asyncio
import errno
import os
import re
import sqlite3
import stat
import sys
import tempfile
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage
from sqlite_stores import SECRET, SIDE_FILES, assert_says, connections_of_stores, opened, rows, said, say

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.errors import (
    MessageEncodingError,
    StoreConfigurationError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.testing.processes import Program, run_program

# ---------------------------------------------------------------------- the path


@pytest.mark.parametrize(
    "path", [":memory:", "", b"chat_history.db", "file:chat_history.db?mode=memory", "a\x00b", None]
)
def test_a_path_that_is_no_file_is_refused(path):
    with pytest.raises(ValueError, match="path"):
        SQLiteChatMessageStore(path)


@pytest.mark.parametrize(
    "setting",
    [{"durability": "off"}, {"timeout": -1}, {"timeout": float("nan")}, {"timeout": "30"}, {"timeout": True}],
    ids=str,
)
def test_a_setting_that_sqlite_does_not_have_is_refused(path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SQLiteChatMessageStore(path, **setting)


@pytest.mark.parametrize("name", ["chat history.db", "a?mode=ro#%20&'\"*.db", "Verläufe 💬.db"])
def test_a_path_is_taken_literally(new_store, tmp_path, name):
    store = new_store(tmp_path / name)
    say(store, "Hi!")
    assert name in os.listdir(tmp_path)
    assert store.to_dict()["init_parameters"]["path"] == str(tmp_path / name)


def test_the_constructor_opens_nothing(new_store, path):
    new_store()
    assert not os.path.exists(path)


def test_a_relative_path_is_relative_to_where_the_store_was_made(new_store, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    store = new_store("chat_history.db")
    monkeypatch.chdir(second)
    say(store, "Hi!")
    assert (first / "chat_history.db").exists()
    assert not list(second.iterdir())
    assert store.to_dict()["init_parameters"]["path"] == "chat_history.db"


def test_two_names_of_one_folder_lead_to_one_file(new_store, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder", target_is_directory=True)
    stores = [new_store(tmp_path / name / "chat_history.db") for name in ("folder", "link")]
    for number in range(6):
        say(stores[number % 2], str(number))
    assert said(stores[0]) == said(stores[1]) == list("012345")


# ---------------------------------------------------------------------- what can be wrong with the file


@contextmanager
def missing_folder(path):
    folder = Path(path).parent
    folder.rmdir()
    yield
    folder.mkdir()


@contextmanager
def folder_in_its_place(path):
    os.mkdir(path)
    yield
    os.rmdir(path)


@contextmanager
def other_file_in_its_place(path):
    content = b"Dear diary, this is not a database. " * 100
    Path(path).write_bytes(content)
    yield
    assert Path(path).read_bytes() == content
    os.remove(path)


@contextmanager
def other_tables_of_the_same_name(path):
    with opened(path) as connection:
        connection.execute("CREATE TABLE haystack_chat_messages (whatever)")
        yield
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("haystack_chat_messages",)]
        connection.execute("DROP TABLE haystack_chat_messages")


@contextmanager
def locked_before_its_first_use(path):
    with opened(path) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (missing_folder, StoreConfigurationError, "folder .* does not exist.*Create it"),
        (folder_in_its_place, StoreUnavailableError, "It must be a file|Is it a file"),
        (other_file_in_its_place, StoreConfigurationError, "not a database.*another path"),
        (other_tables_of_the_same_name, StoreConfigurationError, "database of another program.*left untouched"),
        (locked_before_its_first_use, StoreTimeoutError, "locked.*Try again"),
    ],
)
def test_a_file_that_cannot_be_opened_is_explained_and_used_when_it_can(
    new_store, tmp_path, write, failure, error, says
):
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / "folder" / "chat_history.db")
    store = new_store(path, timeout=0.2)
    with failure(path):
        with pytest.raises(error) as raised:
            write(store, SECRET)
        assert_says(raised.value, os.path.dirname(path), says)
        if error is StoreTimeoutError:
            assert store.count_messages("history") == 0  # there is nothing yet, and reading takes no lock
        else:
            with pytest.raises(error):
                store.count_messages("history")
    assert said(store) == []
    assert write(store, "Hi!") == 2


@contextmanager
def locked(path):
    with opened(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def full(path):
    """No page can be added to the file, as on a full disk."""
    for connection in connections_of_stores(path):
        connection.execute("PRAGMA max_page_count = 1")
    yield


@contextmanager
def limited_in_size(path):
    """The system refuses to let the files grow, as with a quota."""
    resource = pytest.importorskip("resource", reason="this platform does not limit the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(os.path.getsize(path + ending) for ending in ("", *SIDE_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small(path):
    """SQLite takes smaller texts than usual."""
    if sys.version_info < (3, 11):
        pytest.skip("The limit cannot be set.")
    for connection in connections_of_stores(path):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    yield


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (small, MessageEncodingError, "too big.*gigabyte"),
        (locked, StoreTimeoutError, r"locked.* 0\.2 seconds.*Try again"),
        (full, StoreUnavailableError, "is full.*[Mm]ake room"),
        (limited_in_size, StoreUnavailableError, "disk"),
    ],
)
@pytest.mark.parametrize("earlier", [0, 1], ids=["new history", "longer history"])
def test_a_write_that_fails_is_explained_and_stores_nothing(store, path, write, failure, error, says, earlier):
    say(store, "Elsewhere.", "another history")
    for _ in range(earlier):
        write(store, "before")
    with failure(path):
        with pytest.raises(error) as raised:
            write(store, SECRET * 10_000)
        assert_says(raised.value, path, says)
        assert said(store) == ["before", "You said: before"] * earlier
    write(store, "afterwards")
    assert said(store) == ["before", "You said: before"] * earlier + ["afterwards", "You said: afterwards"]
    assert store.count_messages("history") == 2 + 2 * earlier
    assert len(connections_of_stores(path)) <= 2  # one that writes, and one that reads
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("fails_at", ["file", "folder"])
def test_a_first_write_that_cannot_be_flushed_is_explained(store, path, write, monkeypatch, fails_at):
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (fails_at == "folder"):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(StoreUnavailableError, match="No space left on device") as caught:
            write(store, "refused")
    assert_says(caught.value, path, "Look at its disk")
    assert os.listdir(os.path.dirname(path)) == (["chat_history.db"] if fails_at == "folder" else [])
    write(store, "written")
    assert said(store)[0] == "written"


def test_a_locked_database_can_be_read(store, path):
    say(store, "Hi!")
    with locked(path):
        assert said(store) == ["Hi!"]
        assert store.count_messages("history") == 1
        assert asyncio.run(store.retrieve_messages_async("history"))[0].text == "Hi!"


def test_a_write_waits_for_a_lock_that_ends_in_time(new_store, path):
    store = new_store()
    say(store, "before")

    async def main():
        with locked(path):
            waiting = asyncio.create_task(store.write_messages_async("history", [ChatMessage.from_user("waited")]))
            await asyncio.sleep(0.3)
            assert not waiting.done()
        return await waiting

    assert asyncio.run(main()) == 1
    assert said(store) == ["before", "waited"]


@contextmanager
def writing_thread(path):
    """Another thread of this process is in the middle of a write; it goes on when it is told to, or after a minute."""
    is_writing, go_on = threading.Event(), threading.Event()

    def batches():
        is_writing.set()
        go_on.wait(60)
        yield []

    with closing(SQLiteChatMessageStore(path, timeout=0.2)) as store:
        arguments = HistoryRow(chat_history_id="imported", created_at=1, updated_at=1), batches(), 0
        thread = threading.Thread(target=store.engine.run, args=(store.engine.import_history, store.scope, *arguments))
        thread.start()
        is_writing.wait(60)
        yield thread, go_on.set
        go_on.set()
        thread.join()


def test_a_write_waits_for_another_thread_no_longer_than_the_timeout(store, path):
    with writing_thread(path) as (thread, _):
        with pytest.raises(StoreTimeoutError, match=r"other threads.* 0\.2 seconds"):
            say(store, "Hi!")
        assert thread.is_alive()
    assert say(store, "Hi!") == 1


def test_a_write_goes_on_as_soon_as_another_thread_is_done(new_store, path):
    with writing_thread(path) as (_, let_it_go_on):
        threading.Timer(0.1, let_it_go_on).start()
        assert say(new_store(timeout=30), "Hi!") == 1


def try_without_rights(store, report, text):
    """Report what happens when a user who is not root writes."""
    import os

    from haystack.dataclasses import ChatMessage

    from haystack_chat_store import ChatMessageStoreError

    if os.geteuid() == 0:  # root may do anything
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        store.write_messages("history", [ChatMessage.from_user(text)])
    except ChatMessageStoreError as error:
        report([type(error).__name__, str(error)])
    else:
        report("written")


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="this platform has no users that the test could become")
@pytest.mark.parametrize(
    ("file_mode", "folder_mode", "says"),
    [
        (0o444, 0o777, "write access"),
        (0o444, 0o555, "write access"),
        (0o000, 0o777, "read and write"),
        (0o666, 0o555, "write access"),
    ],
)
def test_a_file_without_the_rights_to_write_it_is_explained(new_store, file_mode, folder_mode, says):
    with tempfile.TemporaryDirectory() as folder:  # which any user may enter, unlike pytest's
        path = os.path.join(folder, "chat_history.db")
        os.chmod(folder, 0o777)
        store = new_store(path)
        say(store, "before")
        store.close()
        os.chmod(path, file_mode)
        os.chmod(folder, folder_mode)
        ((error, message),) = run_program(try_without_rights, store, SECRET)
        os.chmod(folder, 0o777)
        os.chmod(path, 0o666)
        assert error == "StoreUnavailableError"
        assert path in message
        assert re.search(says, message), message
        assert SECRET not in message
        assert said(store) == ["before"]
        store.close()
        assert run_program(try_without_rights, store, "afterwards") == ["written"]
        assert said(store) == ["before", "afterwards"]


def test_a_damaged_file_is_explained(store, path):
    for number in range(50):
        say(store, f"{SECRET} {number}" * 100)
    store.close()
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(os.path.getsize(path) - 4096))
    with pytest.raises(StoreUnavailableError) as raised:
        said(store)
    assert_says(raised.value, path, "malformed")


@pytest.mark.parametrize("side_files", [SIDE_FILES, ()], ids=["with its side files", "alone"])
def test_after_the_file_was_deleted_the_next_write_goes_to_a_new_one(store, path, write, side_files):
    write(store, "gone")
    for suffix in ("", *side_files):
        os.remove(path + suffix)
    write(store, "here")
    assert said(store) == ["here", "You said: here"]
    assert rows(path, "SELECT count(*) FROM haystack_chat_messages") == [(2,)]


def test_after_the_file_was_replaced_the_next_call_uses_the_new_one(new_store, store, tmp_path, path):
    other = new_store(tmp_path / "backup.db")
    say(other, "from the backup")
    other.close()
    say(store, "gone")
    for suffix in SIDE_FILES:
        os.remove(path + suffix)
    os.replace(tmp_path / "backup.db", path)
    assert said(store) == ["from the backup"]
    say(store, "here")
    store.close()
    assert said(new_store()) == ["from the backup", "here"]


def test_a_new_file_that_another_process_already_writes_to_stays_whole(new_store, store, path):
    say(store, "gone")
    for suffix in ("", *SIDE_FILES):
        os.remove(path + suffix)
    # Only a process of its own makes the new file without this process's SQLite knowing.
    with Program(say_and_wait, store) as program:
        program.begin()
        assert next(program.reports()) == "said"
        say(store, "here")
        assert said(store) == ["from another process", "here"]
        program.tell("go on")
        assert next(program.reports()) == "said"
        store.close()
        assert said(store) == ["from another process", "here", "from another process"]


def say_and_wait(store, report):
    """Write, and once more at each line of input."""
    import sys

    from haystack.dataclasses import ChatMessage

    while True:
        store.write_messages("history", [ChatMessage.from_user("from another process")])
        report("said")
        sys.stdin.readline()
