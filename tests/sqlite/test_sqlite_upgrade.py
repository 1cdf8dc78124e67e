# SPDX-License-Identifier: Apache-2.0
"""
A file that version 1 of the schema left behind becomes one of this version, with all that is in it.
"""

import json
import sqlite3
from contextlib import ExitStack, closing

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.stores.sqlite import schema
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.processes import Program

# What the first release ran, word for word.
VERSION_1 = """
    CREATE TABLE chat_histories (
        history_key INTEGER PRIMARY KEY,
        namespace TEXT NOT NULL,
        chat_history_id TEXT NOT NULL,
        next_position INTEGER NOT NULL,
        message_count INTEGER NOT NULL,
        round_count INTEGER NOT NULL,
        created_at INTEGER NOT NULL,  -- microseconds since 1970, UTC
        updated_at INTEGER NOT NULL,
        title TEXT,
        meta TEXT,
        UNIQUE (namespace, chat_history_id)
    );
    CREATE TABLE chat_messages (
        message_key INTEGER PRIMARY KEY,  -- history_key << 32 | position
        message_id TEXT NOT NULL,
        role TEXT NOT NULL,
        created_at INTEGER NOT NULL,  -- microseconds since 1970, UTC
        content TEXT NOT NULL  -- ChatMessage.to_dict() as JSON
    );
    CREATE UNIQUE INDEX chat_messages_by_id ON chat_messages (message_key >> 32, message_id);
    CREATE INDEX chat_messages_from_user ON chat_messages (message_key) WHERE role = 'user';
    CREATE VIEW chat_transcripts AS
    SELECT namespace, chat_history_id, message_key & 0xffffffff AS position, message_id, role,
        datetime(chat_messages.created_at / 1000000, 'unixepoch') AS created_at, content
    FROM chat_histories JOIN chat_messages
        ON message_key BETWEEN history_key << 32 AND (history_key << 32) + 0xffffffff;
    CREATE TABLE chat_store_schema (version INTEGER NOT NULL);
    INSERT INTO chat_store_schema VALUES (1);
    PRAGMA journal_mode = wal;
"""
STORED_AT = 1_700_000_000_000_000


@pytest.fixture
def path(tmp_path):
    """
    A file of version 1 with three histories of two messages.
    """
    path = str(tmp_path / "chat_history.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1)
        for key, name in enumerate(("first", "second", "third"), 1):
            times = (STORED_AT, STORED_AT + key)
            connection.execute(
                "INSERT INTO chat_histories VALUES (?, 'default', ?, 2, 2, 1, ?, ?, NULL, NULL)", (key, name, *times)
            )
            for position, role in enumerate(("user", "assistant")):
                message_id = f"{name} {role}"
                content = {
                    "role": role,
                    "meta": {"chat_message_id": message_id},
                    "name": None,
                    "content": [{"text": f"{role} of the {name}"}],
                }
                connection.execute(
                    "INSERT INTO chat_messages VALUES (?, ?, ?, ?, ?)",
                    ((key << 32) + position, message_id, role, STORED_AT + key, json.dumps(content)),
                )
        connection.commit()
    return path


@pytest.fixture
def store(path):
    store = SQLiteChatMessageStore(path)
    yield store
    store.close()


def version(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT version FROM chat_store_schema").fetchall()


def test_everything_is_still_there(store, path):
    assert texts(store.retrieve_messages("second")) == ["user of the second", "assistant of the second"]
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["third", "second", "first"]
    info = store.get_chat_history("second")
    assert (info.message_count, info.round_count, info.title, info.meta) == (2, 1, None, {})
    assert info.updated_at.timestamp() == pytest.approx(STORED_AT / 1_000_000)
    assert [stored.position for stored in store.list_messages("second")] == [0, 1]
    assert store.engine.run(store.engine.check, store.scope, False) == []
    assert version(path) == [(len(schema.MIGRATIONS),)]


def test_everything_that_is_new_works(store):
    store.write_messages("first", [ChatMessage.from_user("new")], expected_count=2)
    assert store.copy_messages("first", "fork", until_message_id="first assistant") == 2
    store.delete_messages("fork", from_message_id="first assistant")
    assert texts(store.retrieve_messages("fork")) == ["user of the first"]
    assert [info.chat_history_id for info in store.list_chat_histories(limit=2).items] == ["fork", "first"]


def test_search_finds_what_version_1_wrote(path):
    with closing(SQLiteChatMessageStore(path, search=True)) as store:
        assert [hit.chat_history_id for hit in store.search_messages("assistant third")] == ["third"]
        assert store.engine.run(store.engine.check, store.scope, False) == []


def list_and_search(store, report, name):
    """
    Upgrade the file, if no other process has, and use what is new.
    """
    from haystack.dataclasses import ChatMessage

    store.write_messages(name, [ChatMessage.from_user(f"user of process {name}")])
    report(len(store.list_chat_histories(prefix=name).items))
    report(len(store.search_messages("user third")))
    store.close()


def test_processes_that_start_together_upgrade_it_once(path):
    store = SQLiteChatMessageStore(path, search=True)
    names = "012345"
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(list_and_search, store, name)) for name in names]
        Program.begin(*programs)
        for program in programs:
            assert program.reports_to_the_end() == [1, 1]
    assert version(path) == [(len(schema.MIGRATIONS),)]
    with closing(store):
        assert {hit.chat_history_id for hit in store.search_messages("user")} == {"first", "second", "third", *names}
        assert store.engine.run(store.engine.check, store.scope, False) == []
