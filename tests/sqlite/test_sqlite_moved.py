# SPDX-License-Identifier: Apache-2.0
"""A database that is moved, replaced or deleted while it is in use: no acknowledged message is lost by it."""

import asyncio
import errno
import os
import shutil
import sqlite3
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage
from sqlite_stores import SIDE_FILES, rows, said, say

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.errors import ChatMessageStoreError, StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.stores.sqlite import connections, files
from haystack_chat_store.testing.processes import Program

TEXTS = "SELECT json_extract(content, '$.content[0].text') FROM haystack_chat_messages ORDER BY message_key"


def texts_in(path):
    """What a program finds in a file that knows nothing of our stores. It may not exist, or was moved when new."""
    if not os.path.exists(path):
        return []
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    if not rows(path, "SELECT 1 FROM sqlite_master WHERE name = 'haystack_chat_messages'"):
        return []
    return [text for (text,) in rows(path, TEXTS)]


def move_database(path, moved):
    os.rename(path, moved)


def move_all_files(path, moved):
    for ending in ("", *SIDE_FILES):
        os.rename(path + ending, moved + ending)


def replace_database(path, moved):
    """As one who restores a backup, and keeps what was there."""
    with closing(SQLiteChatMessageStore(f"{path}.new")) as other:
        say(other, "from the backup")
    os.rename(path, moved)
    os.rename(f"{path}.new", path)


def delete_log(path, moved):
    os.remove(f"{path}-wal")


def move_log(path, moved):
    os.rename(f"{path}-wal", f"{moved}-wal")


def delete_side_files(path, moved):
    for ending in SIDE_FILES:
        os.remove(path + ending)


WAYS = [move_database, move_all_files, replace_database, delete_log, move_log, delete_side_files]


@pytest.fixture
def moved(tmp_path):
    return str(tmp_path / "moved.db")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("then", ["write", "read and write", "close"])
def test_no_message_is_lost(store, path, moved, way, then):
    for number in range(5):
        say(store, f"before {number}")
    way(path, moved)
    if then == "write":
        say(store, "after")
    elif then == "read and write":
        store.count_messages("history")
        say(store, "after")
    store.close()
    expected = [f"before {number}" for number in range(5)] + ["after"] * (then != "close")
    found = texts_in(moved) + texts_in(path)
    assert [text for text in found if text != "from the backup"] == expected
    assert found.count("from the backup") == (way is replace_database)
    assert said(store) == texts_in(path)


@pytest.mark.parametrize("way", WAYS)
def test_no_message_is_lost_of_a_database_behind_a_symbolic_link(new_store, tmp_path, path, moved, way):
    (tmp_path / "link.db").symlink_to(path)
    store = new_store(tmp_path / "link.db")  # which makes the file that the link names
    say(store, "before")
    assert os.path.samefile(tmp_path / "link.db", path)
    way(path, moved)
    say(store, "after")
    store.close()
    assert sorted({*texts_in(moved), *texts_in(path)} - {"from the backup"}) == ["after", "before"]


def put_link_in_place(path, moved):
    """As one who moves a file to a larger disk, and does not restart the program."""
    os.rename(path, moved)
    os.symlink(moved, path)


BECAME_LINK = r"has become a symbolic link.*Make the store anew"


@pytest.mark.parametrize("is_closed", [False, True], ids=["in use", "closed"])
def test_a_link_that_takes_the_place_of_the_database_is_not_followed(new_store, path, moved, is_closed):
    store = new_store(timeout=0.2)
    say(store, "before")
    if is_closed:
        store.close()
    put_link_in_place(path, moved)
    for call in (lambda: say(store, "after"), lambda: said(store), lambda: say(store, "after")):
        with pytest.raises(StoreUnavailableError, match=BECAME_LINK):
            call()
    assert not os.path.exists(f"{path}-wal")
    anew = new_store(path)
    say(anew, "by a store that was made anew")
    assert said(anew) == ["before", "by a store that was made anew"] == texts_in(moved)


@pytest.mark.skipif(os.name != "posix", reason="Windows moves no file that is open")
def test_a_call_that_always_finds_another_file_gives_up_at_the_timeout(new_store, path, monkeypatch):
    store = new_store(timeout=0.2)
    say(store, "before")
    store.close()
    real = os.lstat

    def new_inode_each_time(place, *arguments, **options):
        if place == path:
            os.rename(path, f"{path}.old")
            shutil.copy(f"{path}.old", path)
        return real(place, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "lstat", new_inode_each_time)
        for call in (lambda: say(store, "after"), lambda: said(store)):
            started = time.monotonic()
            with pytest.raises(StoreUnavailableError, match="moved or replaced again and again"):
                call()
            assert time.monotonic() - started < 10
    assert said(store) == ["before"]


def test_a_log_that_cannot_be_removed_keeps_no_other_process_from_writing(new_store, path, moved, monkeypatch):
    store, elsewhere = new_store(timeout=0.2), new_store(moved, timeout=0.2)
    say(store, "before")
    move_database(path, moved)

    def remove(place):
        raise PermissionError(errno.EPERM, "Operation not permitted", place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "remove", remove)
        with pytest.raises(StoreUnavailableError, match="Operation not permitted"):
            say(store, "refused")
        assert say(elsewhere, "elsewhere") == 1
        store.close()  # which says in the log that it is left
    assert said(elsewhere) == ["before", "elsewhere"]


@pytest.mark.parametrize("is_closed", [False, True], ids=["in use", "closed"])
@pytest.mark.parametrize("ending", SIDE_FILES)
def test_a_log_that_could_not_be_removed_is_removed_later(new_store, path, moved, monkeypatch, ending, is_closed):
    """This process has written meanwhile to the database where it lies now."""
    store, elsewhere = new_store(timeout=0.2), new_store(moved, timeout=0.2)
    say(store, "before")
    move_database(path, moved)
    remove = os.remove

    def refuse(place):
        if place.endswith(ending):
            raise PermissionError(errno.EPERM, "Operation not permitted", place)
        remove(place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "remove", refuse)
        with pytest.raises(StoreUnavailableError, match="Operation not permitted"):
            say(store, "refused")
        say(elsewhere, "elsewhere")
        with pytest.raises(StoreUnavailableError, match="Operation not permitted"):
            said(store)
    if is_closed:
        elsewhere.close()
    assert said(store) == []
    say(store, "anew")
    assert (said(store), said(elsewhere)) == (["anew"], ["before", "elsewhere"])
    store.close()
    elsewhere.close()
    assert (texts_in(path), texts_in(moved)) == (["anew"], ["before", "elsewhere"])


def write_when_told(store, report):
    """Write once now, and once more at each line of input, until an empty one."""
    import sys

    from haystack.dataclasses import ChatMessage

    from haystack_chat_store import ChatMessageStoreError

    number = 0
    while True:
        try:
            store.write_messages("history", [ChatMessage.from_user(f"theirs {number}")])
            report(f"theirs {number}")
        except ChatMessageStoreError as error:
            report([type(error).__name__, str(error)])
        number += 1
        if not sys.stdin.readline().strip():
            return


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_no_message_is_lost_with_another_process_beside_it(store, path, moved, way, first, end):
    acknowledged = []

    def ours(number):
        say(store, f"ours {number}")
        acknowledged.append(f"ours {number}")

    with Program(write_when_told, store) as program:
        program.begin()
        reports = program.reports()
        acknowledged.append(next(reports))

        def theirs():
            program.tell("go on")
            acknowledged.append(next(reports))

        ours(0)
        theirs()
        way(path, moved)
        for _ in range(2):
            if first == "ours":
                ours(len(acknowledged))
                theirs()
            else:
                theirs()
                ours(len(acknowledged))
        if end == "killed":
            program.kill()
        else:
            program.tell("")
            assert program.exit_code() == 0
    store.close()
    found = texts_in(moved) + texts_in(path)
    assert sorted(text for text in found if text != "from the backup") == sorted(acknowledged)


def test_a_store_with_other_settings_in_the_same_process_notices_too(new_store, path, moved):
    writing, other = new_store(timeout=5), new_store(timeout=6)
    say(writing, "before")
    move_database(path, moved)
    say(other, "after")
    say(writing, "after that")
    for each in (writing, other):
        each.close()
    assert (texts_in(moved), texts_in(path)) == (["before"], ["after", "after that"])


def test_a_process_that_only_reads_does_not_take_the_log_for_another_files(new_store, path, moved):
    reading = new_store(timeout=0.2)
    with Program(write_when_told, new_store()) as program:
        program.begin()
        assert next(program.reports()) == "theirs 0"
        assert said(reading) == ["theirs 0"]
        replace_database(path, moved)
        before = [Path(path + ending).read_bytes() for ending in ("", "-wal")]
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match=r"moved.*still holds messages.*Another process"):
                said(reading)
            with pytest.raises(StoreUnavailableError, match=r"moved or replaced.*still holds messages"):
                say(reading, "mine")
        assert [Path(path + ending).read_bytes() for ending in ("", "-wal")] == before
        program.tell("go on")
        assert next(program.reports()) == "theirs 1"
        assert said(reading) == ["from the backup", "theirs 1"]
        assert texts_in(moved) == ["theirs 0"]


@pytest.mark.parametrize("is_empty", [False, True], ids=["missing", "empty"])
def test_a_log_without_its_database_is_left_alone(new_store, store, tmp_path, path, is_empty):
    say(store, "before")
    crashed = str(tmp_path / "crashed.db")
    for ending in ("", *SIDE_FILES):
        shutil.copy(path + ending, crashed + ending)
    os.rename(crashed, f"{crashed}.moved")
    if is_empty:
        Path(crashed).touch()
    log = Path(f"{crashed}-wal").read_bytes()
    after_crash = new_store(crashed)
    for call in (
        lambda: say(after_crash, "after"),
        lambda: said(after_crash),
        lambda: asyncio.run(after_crash.write_messages_async("history", [ChatMessage.from_user("after")])),
    ):
        with pytest.raises(StoreConfigurationError, match=r"crashed\.db-wal holds messages.*move it back"):
            call()
    assert Path(f"{crashed}-wal").read_bytes() == log
    os.replace(f"{crashed}.moved", crashed)
    assert said(after_crash) == ["before"]
    say(after_crash, "after")
    assert said(after_crash) == ["before", "after"]


def test_a_database_that_is_made_while_a_reader_looks_for_it_is_not_taken_for_a_log_alone(new_store, path, monkeypatch):
    reading, writing = new_store(), new_store()
    look = files.content

    def look_just_after_the_first_write(looked_at):
        monkeypatch.setattr(files, "content", look)
        assert looked_at == f"{path}-wal"
        say(writing, "first")
        return look(looked_at)

    monkeypatch.setattr(files, "content", look_just_after_the_first_write)
    assert said(reading) == []  # there was no database when the call began
    assert said(reading) == ["first"]


def test_no_database_appears_beside_the_log_of_one_that_came_and_went_while_it_was_made(
    new_store, path, moved, monkeypatch
):
    slow, quick = new_store(), new_store(timeout=20)
    migrate = connections.schema.migrate

    def migrate_while_another_one_comes_and_goes(connection, place):
        monkeypatch.setattr(connections.schema, "migrate", migrate)
        migrate(connection, place)
        say(quick, "quick")
        move_database(path, moved)

    monkeypatch.setattr(connections.schema, "migrate", migrate_while_another_one_comes_and_goes)
    with pytest.raises(StoreConfigurationError, match="holds messages"):
        say(slow, "slow")
    assert not os.path.exists(path)
    say(slow, "slow")
    slow.close()
    quick.close()
    assert (texts_in(moved), texts_in(path)) == (["quick"], ["slow"])


def test_a_reader_that_does_not_end_keeps_the_log_in_its_place(new_store, path, moved):
    store = new_store(timeout=0.3)
    say(store, "before")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM haystack_chat_messages").fetchone()
        say(store, "before that ends")
        move_database(path, moved)
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match=r"still holds messages.*still reading"):
                say(store, "after")
        assert not os.path.exists(path)
        reader.execute("COMMIT")
        say(store, "after")
    store.close()
    assert (texts_in(moved), texts_in(path)) == (["before", "before that ends"], ["after"])


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_a_database_that_is_moved_again_and_again_loses_nothing(new_store, tmp_path, path, durability):
    """Threads and processes write all the time, whatever moment it is."""
    store = new_store(durability=durability)
    acknowledged, is_over = [], threading.Event()
    say(store, "first")

    def write(name):
        number = 0
        while not is_over.is_set():
            with suppress(ChatMessageStoreError):  # of the moment when the file is made and moved at once
                say(store, f"{name} {number}", f"history {name}")
                acknowledged.append(f"{name} {number}")
            number += 1

    reports, places = [], []
    with Program(write_until_told, store) as program:
        program.begin()
        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        threads.append(threading.Thread(target=lambda: reports.extend(program.reports())))
        for thread in threads:
            thread.start()
        try:
            for number in range(12):
                # Half of the files are moved when much was written, the others at the moment when they are made.
                wait_until(lambda enough=len(acknowledged) + 5 * (number % 2): len(acknowledged) >= enough)
                wait_until(lambda: os.path.exists(path))
                places.append(str(tmp_path / f"moved {number}.db"))
                os.rename(path, places[-1])
            wait_until(lambda enough=len(reports) + 5: len(reports) >= enough)
        finally:
            is_over.set()
            program.tell("end")
            for thread in threads:
                thread.join()
        assert program.exit_code() == 0
    store.close()
    found = [text for place in [*places, path] for text in texts_in(place)]
    assert len(found) == len(set(found))
    assert {"first", *acknowledged, *reports} <= set(found)


def wait_until(is_true):
    waits_until = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < waits_until
        time.sleep(0.001)


def write_until_told(store, report):
    """Write until there is a line of input."""
    import select
    import sys
    import time
    from contextlib import suppress

    from haystack.dataclasses import ChatMessage

    from haystack_chat_store import ChatMessageStoreError

    number = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        with suppress(ChatMessageStoreError):
            store.write_messages("theirs", [ChatMessage.from_user(f"theirs {number}")])
            report(f"theirs {number}")
        number += 1
        time.sleep(0.002)  # SQLite gives no process its turn: one that never pauses starves the others


def test_no_file_is_asked_for_more_than_twice_in_a_call(store, monkeypatch):
    """To notice costs two questions to the system."""
    say(store, "Hi!")
    asked = []
    stat = os.lstat

    def counted(path, *arguments, **options):
        asked.append(path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "lstat", counted)
    say(store, "Hi!")
    store.count_messages("history")
    assert len(asked) == 4


def test_connections_to_files_that_are_gone_are_closed(store, path, moved):
    say(store, "before")
    database = connections.databases.get(store.engine.settings)
    move_database(path, moved)
    say(store, "after")
    assert len(database._idle_writers) + len(database._idle_readers) == 1
