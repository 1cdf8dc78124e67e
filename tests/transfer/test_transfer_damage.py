# SPDX-License-Identifier: Apache-2.0
"""What is damaged in a store is left out and reported, and hides nothing else."""

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice

import pytest
from engine_stores import store_on
from haystack.dataclasses import ChatMessage, ToolCall
from servers import RedisServer
from transferred import MOMENT, content, counts, everything, moved, put

from haystack_chat_store import (
    Fault,
    StoreUnavailableError,
    store_from_url,
)
from haystack_chat_store.iteration import walk_histories
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine
from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.testing.messages import conversation, sample_messages, user
from haystack_chat_store.transfer import (
    EXPORT_FORMATS,
    copy_histories,
    export_histories,
    import_histories,
)


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
            "UPDATE haystack_chat_messages SET content = ? WHERE message_id = 'm1'", (damaged,)
        ).rowcount
    assert changed == 1

    fault = Fault(
        chat_history_id="a", position=1, description="The message cannot be read, and was left out.", is_repaired=False
    )
    for name in EXPORT_FORMATS:
        exported = export_histories(sqlite, file.with_name(name), format=name)
        assert exported.faults[:1] == (fault,)
    assert copy_histories(sqlite, target) == export_histories(sqlite, file) == moved(2, 3, 0, (fault,))
    assert [[m[1] for m in messages] for _, messages in everything(target)] == [["m0", "m2"], ["m0"]]
    assert import_histories(target, file).skipped == 3


def test_a_damaged_text_of_the_engine_is_left_out_and_reported(sqlite, target):
    put(sqlite, "a", "zero", "one", "two")
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as connection:
        connection.execute(
            "UPDATE haystack_chat_messages SET content = CAST(x'7bff7d' AS TEXT) WHERE message_id = 'm1'"
        )
    assert [fault.position for fault in copy_histories(sqlite, target).faults] == [1]


def test_damaged_meta_is_left_out_and_reported(sqlite, target):
    put(sqlite, "a", "zero", title="T", meta='{"cut')
    assert copy_histories(sqlite, target) == moved(
        1,
        1,
        0,
        (
            Fault(
                chat_history_id="a",
                position=None,
                description="Its meta cannot be read, and was left out.",
                is_repaired=False,
            ),
        ),
    )
    assert target.get_chat_history("a").title == "T"
    assert target.get_chat_history("a").meta == {}


def change(store, statement, *values):
    """Change one row of an SQLite file, as other software could."""
    with closing(sqlite3.connect(store.path, isolation_level=None)) as connection:
        assert connection.execute(statement, values).rowcount == 1


NO_TITLE = "Its title cannot be read, and was left out."
NO_META = "Its meta cannot be read, and was left out."
NOT_CREATED = "Its time of creation cannot be read, and was replaced."
NOT_CHANGED = "Its time of change cannot be read, and was replaced."


@pytest.mark.parametrize(
    ("column", "damaged", "description"),
    [
        ("title", b"\xff\x00", NO_TITLE),
        ("title", "t" * 1_001, NO_TITLE),
        ("title", "a\0b", NO_TITLE),
        ("meta", "5", NO_META),
        ("meta", f'{{"a":{"[" * 250}{"]" * 250}}}', NO_META),
        ("created_at", "noon", NOT_CREATED),
        ("created_at", 2**62, NOT_CREATED),
        ("created_at", 0.5, NOT_CREATED),
        ("updated_at", "noon", NOT_CHANGED),
        ("updated_at", -(2**62), NOT_CHANGED),
    ],
)
def test_what_is_damaged_beside_the_messages_is_reported_and_the_history_comes(
    sqlite, memory, file, column, damaged, description
):
    put(sqlite, "a", "zero", title="T", meta='{"a":1}')
    put(sqlite, "b", "zero")
    change(sqlite, f"UPDATE haystack_chat_histories SET {column} = ? WHERE chat_history_id = 'a'", damaged)
    expected = moved(2, 2, 0, (Fault(chat_history_id="a", position=None, description=description, is_repaired=False),))

    for name in EXPORT_FORMATS:
        assert export_histories(sqlite, file.with_name(name), format=name).faults[:1] == expected.faults
    exported, copied = memory(), memory()
    assert export_histories(sqlite, file) == copy_histories(sqlite, copied) == expected
    assert import_histories(exported, file) == moved(2, 2, 0, ())

    assert everything(exported) == everything(copied)
    ((row, messages), _) = everything(copied)
    as_before = {"title": "T", "meta": '{"a":1}', "created_at": MOMENT, "updated_at": MOMENT}
    instead = {"title": None, "meta": None}
    assert asdict(row).items() >= {**as_before, column: instead.get(column, MOMENT)}.items()
    assert len(messages) == 1


def test_a_history_whose_id_is_too_long_is_left_out_and_reported(sqlite, target, file):
    put(sqlite, "a", "zero")
    put(sqlite, "b", "zero")
    change(sqlite, "UPDATE haystack_chat_histories SET chat_history_id = ? WHERE chat_history_id = 'a'", "a" * 513)

    exported = export_histories(sqlite, file)

    (fault,) = exported.faults
    assert counts(exported) == counts(import_histories(target, file)) == (1, 1, 0)
    assert fault.description.startswith("'aaaa")
    assert fault.description.endswith("was left out: its id must have at most 512 characters, got 513.")


@pytest.mark.parametrize("damaged", ["''", "CAST(x'ff' AS TEXT)", "x'61'", "x'ff'"])
def test_histories_without_an_id_that_can_be_read_are_counted_and_reported(sqlite, target, file, damaged):
    for name in "abc":
        put(sqlite, name, "zero")
    change(sqlite, f"UPDATE haystack_chat_histories SET chat_history_id = {damaged} WHERE chat_history_id = 'a'")

    description = "1 history has an id that cannot be read, and was left out. To find out: haystack-chat-store doctor"
    expected = moved(2, 2, 0, (Fault(chat_history_id=None, position=None, description=description, is_repaired=False),))
    assert export_histories(sqlite, file) == copy_histories(sqlite, target) == expected
    assert export_histories(sqlite, file, chat_history_ids=["b"]).faults == ()
    assert export_histories(sqlite, file, prefix="b").faults == ()


def test_a_walk_ends_at_an_engine_that_goes_on_with_an_empty_id():
    class Nameless(InMemoryEngine):
        def histories_by_id(self, *_):
            return [
                HistoryRow(
                    chat_history_id="",
                    message_count=0,
                    round_count=0,
                    created_at=MOMENT,
                    updated_at=MOMENT,
                    title=None,
                    meta=None,
                )
            ]

    assert len(list(islice(walk_histories(store_on(Nameless())), 3))) == 1


@pytest.mark.parametrize("ahead", [-1, 10**12], ids=["past", "future"])
def test_histories_that_come_and_go_meanwhile_are_not_taken_for_damaged_ones(file, ahead):
    class Busy(InMemoryEngine):
        def histories_by_id(self, session, scope, prefix, after, limit):
            if not after:
                store.delete_messages("z")
            rows = super().histories_by_id(session, scope, prefix, after, limit)
            if not rows:
                store.write_messages("z", [user()])
            return rows

    store = store_on(Busy())
    history = HistoryRow(chat_history_id="a", created_at=MOMENT, updated_at=microseconds_now() + ahead)
    store.engine.run(store.engine.import_history, store.scope, history, [], 0)
    store.write_messages("a", [user()])
    store.write_messages("z", [user()])
    assert export_histories(store, file) == moved(1, 1, 0, ())
    assert store.count_messages("z") == 1


def test_of_two_messages_with_one_id_the_second_is_left_out_and_reported(target, file):
    class Doubling(InMemoryEngine):
        def page(self, *arguments):
            return [replace(row, message_id="m0", content=content("m0", "x")) for row in super().page(*arguments)]

    store = store_on(Doubling())
    put(store, "a", "zero", "one")

    fault = Fault(
        chat_history_id="a",
        position=1,
        description="The message has the id of another one, and was left out.",
        is_repaired=False,
    )
    assert export_histories(store, file) == copy_histories(store, target) == moved(1, 1, 0, (fault,))
    assert import_histories(target, file) == moved(0, 0, 1, ())


@pytest.mark.servers
def test_a_history_that_the_engine_cannot_read_hides_no_other(target, file):
    with RedisServer() as server, closing(store_from_url(server.url)) as store, server.client() as client:
        for name in ("ada", "bob", "eve"):
            put(store, name, "zero", "one", title=name)
        (roles,) = client.keys("*bob:roles")
        client.set(roles, "u")

        fault = Fault(
            chat_history_id="bob",
            position=None,
            description="Its messages cannot be read, and were left out.",
            is_repaired=False,
        )
        for name in EXPORT_FORMATS:
            assert export_histories(store, file.with_name(name), format=name).faults[0] == fault
        assert copy_histories(store, target) == export_histories(store, file) == moved(3, 4, 0, (fault,))

        client.delete(roles)
        client.lpush(roles, "of another type")
        exported = export_histories(store, file)
        assert counts(exported) == (3, 4, 0)
        uncounted = "Histories cannot be counted, so it is not known whether any was left out. "
        assert [each.description for each in exported.faults] == [
            fault.description,
            f"{uncounted}To find out: haystack-chat-store doctor",
        ]
    assert [(row.title, len(messages)) for row, messages in everything(target)] == [("ada", 2), ("bob", 0), ("eve", 2)]


def test_an_engine_that_does_not_answer_is_an_error_and_no_fault(file):
    class Gone(InMemoryEngine):
        def page(self, *_):
            raise StoreUnavailableError("gone")

        history = page

    store = store_on(Gone())
    store.write_messages("a", [user()])
    with pytest.raises(StoreUnavailableError, match="gone"):
        export_histories(store, file)
    assert not file.exists()


@pytest.mark.parametrize("is_copied", [False, True])
def test_any_number_of_faults_makes_a_bounded_list_that_says_that_there_are_more(
    sqlite, target, file, monkeypatch, is_copied
):
    monkeypatch.setattr("haystack_chat_store.transfer.histories.MAX_FAULTS", 10)
    for number in range(13):
        put(sqlite, f"{number:02}", "zero", "one")
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as connection:
        connection.execute("UPDATE haystack_chat_messages SET content = 'no JSON' WHERE message_id = 'm1'")
    result = copy_histories(sqlite, target) if is_copied else export_histories(sqlite, file)
    assert result.chat_histories == 13
    assert [fault.chat_history_id for fault in result.faults] == [*(f"{number:02}" for number in range(10)), None]
    assert "more faults" in result.faults[-1].description


@pytest.mark.parametrize(("name", "nameless"), [("chatgpt", {"mapping": {}}), ("claude", {"chat_messages": []})])
def test_any_number_of_faults_of_another_programs_file_makes_a_bounded_list_too(
    target, file, monkeypatch, name, nameless
):
    monkeypatch.setattr("haystack_chat_store.transfer.histories.MAX_FAULTS", 10)
    file.write_text(json.dumps([nameless] * 13))
    faults = import_histories(target, file, format=name).faults
    assert len(faults) == 11
    assert "more faults" in faults[-1].description


def test_the_faults_of_a_store_and_those_of_a_format_are_one_bounded_list(sqlite, file, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.transfer.histories.MAX_FAULTS", 3)
    call = ToolCall("camera", {}, id="1")
    image = ChatMessage.from_tool([sample_messages()["image"].images[0]], origin=call)
    asked = [ChatMessage.from_assistant(tool_calls=[call]), image, *conversation("a")]
    for number in range(4):
        sqlite.write_messages(str(number), [user("damaged"), user("find it"), *asked])
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as connection:
        connection.execute("UPDATE haystack_chat_messages SET content = 'no JSON' WHERE content LIKE '%damaged%'")
    faults = export_histories(sqlite, file, format="openai").faults
    assert len(faults) == 4
    assert "more faults" in faults[-1].description
