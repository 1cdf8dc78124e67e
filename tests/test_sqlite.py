# SPDX-License-Identifier: Apache-2.0
"""
What is SQLite's own: the file and what can be wrong with it, the schema, the plans of the queries.
"""

import asyncio
import gc
import os
import re
import sqlite3
import sys
import tempfile
import traceback
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import ChatMessageStoreError, SQLiteChatMessageStore
from haystack_chat_store.errors import (
    MessageDecodingError,
    SchemaVersionError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.sqlite import schema
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.processes import Program, run_program

# Put together, so that it stands in no line of source that a traceback shows.
SECRET = " ".join(["my", "password", "is", "4711"])
SIDE_FILES = ("-wal", "-shm")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "chat_history.db")


@pytest.fixture
def new_store(path):
    made = []

    def new(path=path, **settings):
        made.append(SQLiteChatMessageStore(path, **{"last_k": None, **settings}))
        return made[-1]

    yield new
    for store in made:
        store.close()


@pytest.fixture
def store(new_store):
    return new_store(timeout=0.2)


@pytest.fixture(params=["sync", "async"])
def write(request):
    def write(store, text, history="history"):
        messages = [ChatMessage.from_user(text), ChatMessage.from_assistant(f"You said: {text}")]
        if request.param == "sync":
            return store.write_messages(history, messages)
        return asyncio.run(store.write_messages_async(history, messages))

    return write


def say(store, text, history="history"):
    return store.write_messages(history, [ChatMessage.from_user(text)])


def said(store, history="history"):
    return texts(store.retrieve_messages(history))


@contextmanager
def opened(path):
    """
    A connection that knows nothing of our stores.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def rows(path, query, *values):
    with opened(path) as connection:
        return connection.execute(query, values).fetchall()


def connections_of_stores(path):
    """
    Every connection to the file that is open in this process.
    """
    found = []
    for connection in (thing for thing in gc.get_objects() if isinstance(thing, sqlite3.Connection)):
        with suppress(sqlite3.ProgrammingError):  # closed
            if os.path.samefile(connection.execute("PRAGMA database_list").fetchone()[2], path):
                found.append(connection)
    return found


def assert_says(error, path, says):
    shown = "".join(traceback.format_exception(error))
    assert path in str(error)
    assert re.search(says, str(error)), str(error)
    assert SECRET not in shown


# ---------------------------------------------------------------------- the path


@pytest.mark.parametrize(
    "path", [":memory:", "", b"chat_history.db", "file:chat_history.db?mode=memory", "a\x00b", None]
)
def test_a_path_that_is_no_file_is_refused(path):
    with pytest.raises(ValueError, match="path"):
        SQLiteChatMessageStore(path)


@pytest.mark.parametrize(
    "setting", [{"durability": "off"}, {"timeout": -1}, {"timeout": float("nan")}, {"timeout": "30"}], ids=str
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
        connection.execute("CREATE TABLE chat_messages (whatever)")
        yield
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("chat_messages",)]
        connection.execute("DROP TABLE chat_messages")


@contextmanager
def locked_before_its_first_use(path):
    with opened(path) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (missing_folder, StoreUnavailableError, "folder .* does not exist.*Create it"),
        (folder_in_its_place, StoreUnavailableError, "It must be a file|Is it a file"),
        (other_file_in_its_place, StoreUnavailableError, "not a database.*another path"),
        (other_tables_of_the_same_name, StoreUnavailableError, "table chat_messages already exists"),
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
    """
    No page can be added to the file, as on a full disk.
    """
    for connection in connections_of_stores(path):
        connection.execute("PRAGMA max_page_count = 1")
    yield


@contextmanager
def limited_in_size(path):
    """
    The system refuses to let the files grow, as with a quota.
    """
    resource = pytest.importorskip("resource", reason="this platform does not limit the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(f"{path}-wal") + 100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
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
    assert len(connections_of_stores(path)) == 1
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


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


def try_without_rights(store, report, text):
    """
    Report what happens when a user who is not root writes.
    """
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
    assert rows(path, "SELECT count(*) FROM chat_messages") == [(2,)]


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
    """
    Write, and once more at each line of input.
    """
    import sys

    from haystack.dataclasses import ChatMessage

    while True:
        store.write_messages("history", [ChatMessage.from_user("from another process")])
        report("said")
        sys.stdin.readline()


# ---------------------------------------------------------------------- connections


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("normal", 1)])
def test_every_connection_has_the_durability_asked_for(new_store, path, durability, synchronous):
    store = new_store(durability=durability)

    async def write_at_once():
        messages = [ChatMessage.from_user("Hi!")]
        await asyncio.gather(*(store.write_messages_async("history", messages) for _ in range(20)))

    say(store, "Hi!")
    asyncio.run(write_at_once())
    connections = connections_of_stores(path)
    assert connections
    for connection in connections:
        assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_durability_is_full_unless_asked_otherwise(path):
    assert SQLiteChatMessageStore(path).to_dict()["init_parameters"]["durability"] == "full"


def test_stores_with_equal_settings_share_connections(new_store, path):
    stores = [new_store(namespace=f"tenant {number}", last_k=number) for number in range(5)]
    say(stores[0], "Hi!")
    assert len(connections_of_stores(path)) == 1
    for store in stores:
        say(store, "Hi!")
        asyncio.run(store.retrieve_messages_async("history"))
    assert len(connections_of_stores(path)) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc, where open files are looked up, is Linux's")
def test_closing_one_of_several_stores_closes_the_file(new_store, path):
    def open_files():
        targets = []
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the descriptor that listed them
                targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return [target for target in targets if target.startswith(path)]

    stores = [new_store() for _ in range(5)]
    for store in stores:
        say(store, "Hi!")
        asyncio.run(store.retrieve_messages_async("history"))
    assert len(open_files()) == 3  # the database, its log and the log's index, once each
    stores[0].close()
    assert open_files() == []
    assert os.listdir(os.path.dirname(path)) == ["chat_history.db"]
    assert said(stores[1]) == ["Hi!"] * 5


def test_stores_with_other_settings_have_connections_of_their_own(new_store, path):
    full, normal = new_store(), new_store(durability="normal")
    say(full, "Hi!")
    say(normal, "Hi!")
    assert len(connections_of_stores(path)) == 2
    normal.close()
    assert len(connections_of_stores(path)) == 1
    assert said(full) == said(normal) == ["Hi!", "Hi!"]


# ---------------------------------------------------------------------- the schema


def test_the_schema_version_is_recorded(store, path):
    say(store, "Hi!")
    assert rows(path, "SELECT version FROM chat_store_schema") == [(len(schema.MIGRATIONS),)]


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_a_database_from_a_newer_version_is_refused_and_left_untouched(store, path, write, journal_mode):
    say(store, "Hi!")
    store.close()
    newer = len(schema.MIGRATIONS) + 1
    with opened(path) as connection:
        connection.execute("UPDATE chat_store_schema SET version = ?", (newer,))
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
    before = Path(path).read_bytes()
    for call in (lambda: write(store, SECRET), lambda: said(store), store.delete_all_messages):
        with pytest.raises(SchemaVersionError, match=f"version {newer}.*Upgrade haystack-chat-store") as raised:
            call()
        assert SECRET not in str(raised.value)
    store.close()
    assert os.listdir(os.path.dirname(path)) == ["chat_history.db"]
    assert Path(path).read_bytes() == before


def write_to_new_files(store, report, count, text):
    """
    Write to one new file after the other. Who comes late to a file finds it made, and so catches up with the others.
    """
    from haystack.dataclasses import ChatMessage

    from haystack_chat_store import SQLiteChatMessageStore

    for number in range(count):
        new_store = SQLiteChatMessageStore(f"{store.path}.{number}")
        new_store.write_messages("history", [ChatMessage.from_user(text)])
        new_store.close()


def test_processes_that_make_the_same_files_at_once_do_not_disturb_each_other(store, path):
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(write_to_new_files, store, 60, text)) for text in "0123"]
        Program.begin(*programs)
        for program in programs:
            program.reports_to_the_end()
    query = "SELECT json_extract(content, '$.content[0].text') FROM chat_messages"
    for number in range(60):
        assert sorted(rows(f"{path}.{number}", query)) == [(text,) for text in "0123"]


NEXT_MIGRATION = [
    "ALTER TABLE chat_histories ADD COLUMN mood TEXT DEFAULT 'fine'",
    "CREATE TABLE IF NOT EXISTS upgrades (upgraded_at)",
    "INSERT INTO upgrades VALUES (datetime())",
]


def test_a_database_of_the_version_before_is_upgraded_in_place_once(store, path, monkeypatch):
    say(store, "before")
    store.close()
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, NEXT_MIGRATION])
    assert said(store) == ["before"]
    say(store, "afterwards")
    store.close()
    assert said(store) == ["before", "afterwards"]
    assert rows(path, "SELECT version FROM chat_store_schema") == [(len(schema.MIGRATIONS),)]
    assert rows(path, "SELECT mood FROM chat_histories") == [("fine",)]
    assert rows(path, "SELECT count(*) FROM upgrades") == [(1,)]


def write_with_next_migration(store, report, migration, text):
    """
    Write, as a next version of this package would.
    """
    from haystack.dataclasses import ChatMessage

    from haystack_chat_store.stores.sqlite import schema

    schema.MIGRATIONS.append(migration)
    store.write_messages("history", [ChatMessage.from_user(text)])


def test_processes_that_start_together_upgrade_a_database_once(store, path):
    say(store, "before")
    store.close()
    with ExitStack() as stack:
        programs = [
            stack.enter_context(Program(write_with_next_migration, store, NEXT_MIGRATION, text)) for text in "012345"
        ]
        Program.begin(*programs)
        for program in programs:
            program.reports_to_the_end()
    assert rows(path, "SELECT count(*) FROM upgrades") == [(1,)]
    assert rows(path, "SELECT version FROM chat_store_schema") == [(len(schema.MIGRATIONS) + 1,)]
    found = [
        content for (content,) in rows(path, "SELECT json_extract(content, '$.content[0].text') FROM chat_messages")
    ]
    assert found[0] == "before"
    assert sorted(found[1:]) == list("012345")


def test_an_upgrade_that_fails_leaves_the_version_before_intact(store, path, monkeypatch):
    say(store, "before")
    store.close()
    tables = rows(path, "SELECT sql FROM sqlite_master")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, [*NEXT_MIGRATION, "INSERT INTO nowhere VALUES (1)"]])
        with pytest.raises(ChatMessageStoreError, match="no such table: nowhere") as raised:
            say(store, SECRET)
        assert_says(raised.value, path, "")
    assert rows(path, "SELECT sql FROM sqlite_master") == tables
    assert said(store) == ["before"]
    say(store, "afterwards")


def test_the_file_may_hold_other_tables(store, path):
    with opened(path) as connection:
        connection.execute("CREATE TABLE notes (text)")
        connection.execute("INSERT INTO notes VALUES ('mine')")
        connection.execute("PRAGMA user_version = 42")
        connection.execute("PRAGMA application_id = 7")
    say(store, "Hi!")
    store.delete_all_messages()
    assert rows(path, "SELECT * FROM notes") == [("mine",)]
    assert rows(path, "PRAGMA user_version") == [(42,)]
    assert rows(path, "PRAGMA application_id") == [(7,)]


def test_the_view_shows_what_was_written(new_store, path):
    messages = [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!", meta={"chat_message_id": "a1"})]
    for namespace in ("a", "b"):
        for history in ("first", "it's 'another'"):
            new_store(namespace=namespace).write_messages(history, messages)
    new_store(namespace="b").delete_messages("first")
    query = """
        SELECT namespace, chat_history_id, position, role, json_extract(content, '$.content[0].text')
        FROM chat_transcripts
        ORDER BY namespace, chat_history_id, position
    """
    assert rows(path, query) == [
        (namespace, history, position, role, text)
        for namespace, history in (("a", "first"), ("a", "it's 'another'"), ("b", "it's 'another'"))
        for position, (role, text) in enumerate([("user", "Hi!"), ("assistant", "Hello!")])
    ]
    assert rows(path, "SELECT DISTINCT message_id FROM chat_transcripts WHERE position = 1") == [("a1",)]
    now, created_at = rows(path, "SELECT datetime(), max(created_at) FROM chat_transcripts")[0]
    assert created_at <= now
    assert created_at[:4] >= "2025"


# ---------------------------------------------------------------------- the plans of the queries


def plans_of_all_calls(store, other_store, path):
    """
    The plan of each statement that the calls run, in their order.
    """
    statements = []
    store.count_messages("history")
    (connection,) = connections_of_stores(path)
    connection.set_trace_callback(statements.append)
    store.write_messages("history", store.retrieve_messages("history", last_k=2))
    say(store, "new")
    store.retrieve_messages("history", last_k=10**9)
    store.retrieve_messages("history")
    store.count_messages("history")
    say(other_store, "new")
    other_store.delete_messages("history")
    say(other_store, "new")
    other_store.delete_all_messages()
    connection.set_trace_callback(None)
    with opened(path) as connection:
        return [
            (re.sub(r"\d+|'[^']*'", "?", statement), step)
            for statement in statements
            if re.match(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE)\b", statement)
            # Before Python 3.11, values are not filled in. Which they are makes no difference to a plan.
            for *_, step in connection.execute("EXPLAIN QUERY PLAN " + re.sub(r"\?\d*", "1", statement))
        ]


@pytest.mark.parametrize("last_k_unit", ["round", "message"])
def test_every_statement_uses_an_index_whatever_the_length_of_the_history(new_store, path, last_k_unit):
    store = new_store(last_k_unit=last_k_unit)
    other_store = new_store(last_k_unit=last_k_unit, namespace="other")
    plans = []
    for length in (10, 10_000):
        turns = [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")] * (length // 2)
        store.write_messages("history", turns)
        for number in range(100):
            say(store, "Hi!", f"history {number}")
        plans.append(plans_of_all_calls(store, other_store, path))
    assert plans[0] == plans[1]
    words = {word for _, step in plans[0] for word in step.split()}
    assert {"chat_histories", "chat_messages", "chat_messages_by_id"} <= words
    assert ("chat_messages_from_user" in words) == (last_k_unit == "round")
    for statement, step in plans[0]:
        assert not re.search(r"SCAN|TEMP B-TREE|AUTOMATIC", step), f"{step}: {statement}"
    assert rows(path, "SELECT name FROM sqlite_master WHERE name LIKE 'sqlite_stat%'") == []


# ---------------------------------------------------------------------- damaged rows


@pytest.mark.parametrize(
    "content",
    [
        SECRET,
        f'{{"role": "user", "content": [{{"text": "{SECRET}',
        f'["{SECRET}"]',
        f'{{"text": "{SECRET}"}}',
        f'{{"role": "{SECRET}", "meta": {{}}, "name": null, "content": [{{"text": "{SECRET}"}}]}}',
        f'{{"role": "user", "meta": {{}}, "name": null, "content": [{{"{SECRET}": "{SECRET}"}}]}}',
        f'{{"role": "user", "meta": {{}}, "name": null, "content": [{{"text": "{SECRET}"}}]}}, {{}}',
        "null",
        "",
        f"{SECRET} \x80".encode("latin-1"),
    ],
    ids=str,
)
def test_a_damaged_message_is_an_error_that_does_not_quote_it(store, path, write, content):
    write(store, "first")
    write(store, "second")
    with opened(path) as connection:
        text = "CAST(? AS TEXT)" if isinstance(content, bytes) else "?"
        connection.execute(f"UPDATE chat_messages SET content = {text} WHERE message_key & 0xffffffff = 1", (content,))
    for read in (
        lambda: store.retrieve_messages("history"),
        lambda: asyncio.run(store.retrieve_messages_async("history")),
    ):
        with pytest.raises(MessageDecodingError) as raised:
            read()
        assert_says(raised.value, "", "damaged")
    assert texts(store.retrieve_messages("history", last_k=1)) == ["second", "You said: second"]
    assert store.count_messages("history") == 4
    assert write(store, "third") == 2
