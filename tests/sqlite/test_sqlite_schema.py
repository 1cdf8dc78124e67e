# SPDX-License-Identifier: Apache-2.0
"""Schema versions, the plans of the queries, damaged rows."""

import asyncio
import os
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage
from sqlite_stores import SECRET, assert_says, connections_of_stores, opened, rows, said, say

from haystack_chat_store import ChatMessageStoreError
from haystack_chat_store.errors import MessageDecodingError, SchemaVersionError
from haystack_chat_store.stores.sqlite import schema
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.processes import Program

# ---------------------------------------------------------------------- the schema


def test_the_schema_version_is_recorded(store, path):
    say(store, "Hi!")
    assert rows(path, "SELECT version FROM haystack_chat_schema") == [(len(schema.MIGRATIONS),)]


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_a_database_from_a_newer_version_is_refused_and_left_untouched(store, path, write, journal_mode):
    say(store, "Hi!")
    store.close()
    newer = len(schema.MIGRATIONS) + 1
    with opened(path) as connection:
        connection.execute("UPDATE haystack_chat_schema SET version = ?", (newer,))
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
    query = "SELECT json_extract(content, '$.content[0].text') FROM haystack_chat_messages"
    for number in range(60):
        assert sorted(rows(f"{path}.{number}", query)) == [(text,) for text in "0123"]


NEXT_MIGRATION = [
    "ALTER TABLE haystack_chat_histories ADD COLUMN mood TEXT DEFAULT 'fine'",
    "CREATE TABLE IF NOT EXISTS upgrades (upgraded_at)",
    "INSERT INTO upgrades VALUES (datetime())",
]


@pytest.mark.parametrize("by", ["a write", "a repair"])
def test_a_database_of_the_version_before_is_upgraded_in_place_once(store, path, monkeypatch, by):
    say(store, "before")
    store.close()
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, NEXT_MIGRATION])
    with pytest.raises(SchemaVersionError, match=r"earlier version.*Upgrade it: write to it, or run .*doctor --repair"):
        said(store)
    if by == "a write":
        say(store, "afterwards")
    else:
        store.engine.run(store.engine.repair, store.scope)
    store.close()
    assert said(store) == ["before", "afterwards"][: 1 + (by == "a write")]
    assert rows(path, "SELECT version FROM haystack_chat_schema") == [(len(schema.MIGRATIONS),)]
    assert rows(path, "SELECT mood FROM haystack_chat_histories") == [("fine",)]
    assert rows(path, "SELECT count(*) FROM upgrades") == [(1,)]


def write_with_next_migration(store, report, migration, text):
    """Write, as a next version of this package would."""
    from haystack.dataclasses import ChatMessage

    from haystack_chat_store.stores.sqlite import schema

    schema.MIGRATIONS.append(migration)
    store.write_messages("history", [ChatMessage.from_user(text)])


def test_processes_that_start_together_upgrade_a_database_once(new_store, path):
    store = new_store(timeout=60)
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
    assert rows(path, "SELECT version FROM haystack_chat_schema") == [(len(schema.MIGRATIONS) + 1,)]
    found = [
        content
        for (content,) in rows(path, "SELECT json_extract(content, '$.content[0].text') FROM haystack_chat_messages")
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


def test_the_file_may_get_other_tables(store, path):
    say(store, "Hi!")
    with opened(path) as connection:
        connection.execute("CREATE TABLE notes (text)")
        connection.execute("INSERT INTO notes VALUES ('mine')")
        connection.execute("PRAGMA user_version = 42")
        connection.execute("PRAGMA application_id = 7")
    store.close()
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
        FROM haystack_chat_transcripts
        ORDER BY namespace, chat_history_id, position
    """
    assert rows(path, query) == [
        (namespace, history, position, role, text)
        for namespace, history in (("a", "first"), ("a", "it's 'another'"), ("b", "it's 'another'"))
        for position, (role, text) in enumerate([("user", "Hi!"), ("assistant", "Hello!")])
    ]
    assert rows(path, "SELECT DISTINCT message_id FROM haystack_chat_transcripts WHERE position = 1") == [("a1",)]
    now, created_at = rows(path, "SELECT datetime(), max(created_at) FROM haystack_chat_transcripts")[0]
    assert created_at <= now
    assert created_at[:4] >= "2025"


# ---------------------------------------------------------------------- the plans of the queries


def plans_of_all_calls(store, other_store, path):
    """The plan of each statement that the calls run, in their order."""
    statements = []
    store.count_messages("history")
    (connection,) = connections_of_stores(path)
    connection.set_trace_callback(statements.append)
    store.write_messages("history", store.retrieve_messages("history", last_k=2))
    say(store, "new")
    store.retrieve_messages("history", last_k=10**9)
    store.retrieve_messages("history")
    store.count_messages("history")
    store.engine.run(store.engine.position, store.scope, "history", "an id")
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
    assert {"haystack_chat_histories", "haystack_chat_messages", "haystack_chat_messages_by_id"} <= words
    assert ("haystack_chat_messages_from_user" in words) == (last_k_unit == "round")
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
        connection.execute(
            f"UPDATE haystack_chat_messages SET content = {text} WHERE message_key & 0xffffffff = 1", (content,)
        )
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
