# SPDX-License-Identifier: Apache-2.0
"""What a check finds in a PostgreSQL database that was changed by hand, and what it repairs."""

from dataclasses import replace

import pytest
from haystack.dataclasses import ChatMessage, ImageContent
from postgres_stores import NEWEST_AND_OLDEST, execute, say, stores_on

from haystack_chat_store.doctor import check
from haystack_chat_store.stores import faults as listed_faults
from haystack_chat_store.stores.postgres import checking
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.testing.kit import message_rows

VERSIONS = NEWEST_AND_OLDEST
IMAGE = ImageContent(base64_image="iVBORw0KGgo=", mime_type="image/png", validation=False)


@pytest.fixture(params=["directly", pytest.param("behind PgBouncer", marks=pytest.mark.full), "partitioned"])
def make_store(request, server, pooler):
    with stores_on(pooler.url if request.param == "behind PgBouncer" else server.url, last_k=None) as make:
        if request.param == "partitioned":
            execute(server.url, make().create_schema_sql(3))
        yield make


@pytest.fixture
def store(make_store):
    store = make_store(search=True)
    for history in ("history", "another"):
        store.write_messages(
            history,
            [
                ChatMessage.from_user("first question", meta={"chat_message_id": "a"}),
                ChatMessage.from_assistant("first answer", meta={"chat_message_id": "b"}),
                ChatMessage.from_user("second question", meta={"chat_message_id": "c"}),
            ],
        )
    return store


@pytest.fixture
def change(server, store):
    """Execute SQL, in which {0} is the store's schema."""
    return lambda *statements: execute(server.url, *(each.format(store.schema_name) for each in statements))


def faults(store, repair=False):
    return store.engine.run(store.engine.repair if repair else store.engine.check, store.scope)


def test_what_fits_together_has_no_faults(store):
    assert faults(store) == faults(store, repair=True) == []


@pytest.mark.parametrize(
    ("damage", "description"),
    [
        ("UPDATE {0}.haystack_chat_histories SET message_count = 7", "7 messages, but it has 3"),
        ("UPDATE {0}.haystack_chat_histories SET round_count = -1", "-1 rounds, but it has 2"),
        ("UPDATE {0}.haystack_chat_histories SET next_position = 2", "next position is 2, but its last message has"),
    ],
)
def test_a_counter_that_is_wrong_is_found_and_set_right(store, change, damage, description):
    change(damage + " WHERE chat_history_id = 'history'")
    (fault,) = faults(store)
    assert (fault.chat_history_id, fault.position) == ("history", None)
    assert description in fault.description
    assert not fault.is_repaired
    (repaired,) = faults(store, repair=True)
    assert repaired == replace(fault, is_repaired=True)
    assert faults(store) == []
    assert say(store, "third") == 1
    assert [stored.position for stored in store.list_messages("history")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("damage", "description"),
    [
        ("preview = 'another'", "Its preview is not the beginning of its first question."),
        ("preview = NULL", "Its preview is not the beginning of its first question."),
        ("last_role = 'tool'", "What it keeps of its last message is wrong."),
        ("last_text = NULL", "What it keeps of its last message is wrong."),
        ("last_at = last_at + interval '1 second'", "What it keeps of its last message is wrong."),
        ("title_terms = 'another'", "The search index has other words than its title."),
        ("title_terms = NULL", "The search index has other words than its title."),
        ("branch_of = 'another'", "It is listed as a branch of another history than its meta names, or as none."),
        ("branch_of = NULL", "It is listed as a branch of another history than its meta names, or as none."),
    ],
)
def test_what_lists_and_searches_show_of_a_history_is_compared_and_made_anew(store, change, damage, description):
    store.update_chat_history("history", title="A trip to Kyoto")
    say(store, "first question", history="history~1")
    store.update_chat_history("history~1", title="A trip to Nara", meta={"branch_of": "history"})
    assert faults(store) == []
    damaged = "history~1" if damage == "branch_of = NULL" else "history"
    before = store.get_chat_history(damaged)
    change(f"UPDATE {{0}}.haystack_chat_histories SET {damage} WHERE chat_history_id = '{damaged}'")
    (fault,) = faults(store)
    assert (fault.chat_history_id, fault.description) == (damaged, description)
    assert faults(store, repair=True) == [replace(fault, is_repaired=True)]
    assert faults(store) == []
    assert store.get_chat_history(damaged) == before
    assert {info.chat_history_id for info in store.list_chat_histories().items} == {"another", "history"}


def test_a_first_question_without_text_is_passed_over(store):
    questions = [ChatMessage.from_user(content_parts=[IMAGE]) for _ in range(12)]
    store.write_messages("images", [*questions, ChatMessage.from_user("What is this?")])
    assert faults(store) == []
    assert store.get_chat_history("images").preview == "What is this?"


def test_messages_that_were_deleted_by_hand_are_counted_again(store, change):
    change("DELETE FROM {0}.haystack_chat_messages WHERE message_id = 'c'")
    assert len(faults(store, repair=True)) == 6
    assert faults(store) == []
    info = store.get_chat_history("history")
    assert (info.message_count, info.round_count) == (2, 1)
    assert info.last_message.text == "first answer"


def test_messages_without_a_history_are_reported_and_left(store, change):
    change("DELETE FROM {0}.haystack_chat_histories WHERE chat_history_id = 'history'")
    for repair in (False, True, False):
        (fault,) = faults(store, repair)
        assert (fault.chat_history_id, fault.position, fault.is_repaired) == (None, None, False)
        assert f"3 messages have the history_key {history_key(store.scope, 'history')}" in fault.description


@pytest.mark.parametrize("damage", ["message_id = 'other'", "role = 'assistant'"])
def test_a_row_that_has_another_id_or_role_than_its_text_is_reported(store, change, damage):
    store.write_messages("history", [ChatMessage.from_user("\0 \ud800", meta={"chat_message_id": "d"})])
    change(f"UPDATE {{0}}.haystack_chat_messages SET {damage} WHERE message_id = 'd'")
    found = list(check(store))
    assert any(fault.position == 3 and "than its row" in fault.description and not fault.is_repaired for fault in found)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE {0}.haystack_chat_messages SET search_terms = '''wrong'':1'",
        "UPDATE {0}.haystack_chat_messages SET search_terms = ''",
        "UPDATE {0}.haystack_chat_messages SET content = replace(content::text, 'first answer', 'other words')::json",
    ],
)
def test_an_index_that_has_other_words_than_a_message_is_found_and_made_again(store, change, damage):
    change(damage + " WHERE message_id = 'b'")
    found = faults(store)
    assert sorted((fault.chat_history_id, fault.position) for fault in found) == [("another", 1), ("history", 1)]
    assert not any("answer" in fault.description for fault in found)
    assert all(fault.is_repaired for fault in faults(store, repair=True))
    assert faults(store) == []
    words = "other words" if "other words" in damage else "first answer"
    assert len(store.search_messages(words)) == 2


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"content": 5}', '{"content": [{"text": 7}]}'])
def test_a_content_that_is_no_message_disturbs_no_check(store, change, content):
    quoted = content.replace("{", "{{").replace("}", "}}")
    change("UPDATE {0}.haystack_chat_messages SET content = '" + quoted + "' WHERE message_id = 'b'")
    assert len(faults(store, repair=True)) == 2
    assert faults(store) == []
    store.engine.run(store.engine.remove, store.scope, "history", message_rows(store, "history", [1]))
    assert store.count_messages("history") == 2
    assert faults(store) == []


@pytest.mark.parametrize("time", ["4713-01-01 00:00:00+00 BC", "10000-01-01 00:00:00+00", "139999-12-31 23:59:59+00"])
def test_a_time_that_python_does_not_have_is_reported_and_hides_nothing(store, change, time):
    change(
        f"UPDATE {{0}}.haystack_chat_histories SET created_at = '{time}', updated_at = '{time}' "
        "WHERE chat_history_id = 'history'",
        f"UPDATE {{0}}.haystack_chat_messages SET created_at = '{time}' WHERE message_id = 'b'",
    )
    assert {info.chat_history_id for info in store.list_chat_histories().items} == {"another", "history"}
    assert store.get_chat_history("history").updated_at.year == 1970
    assert [stored.message.text for stored in store.list_messages("history")][1] == "first answer"
    assert store.statistics().messages == sum(store.statistics().messages_per_day.values()) == 6
    (fault,) = faults(store, repair=True)
    assert (fault.chat_history_id, fault.description, fault.is_repaired) == (
        "history",
        "Its times cannot be read.",
        False,
    )
    assert {fault.position for fault in check(store) if fault.chat_history_id == "history"} == {None, 1}


def test_other_namespaces_are_not_looked_at(store, make_store, change):
    change(
        "UPDATE {0}.haystack_chat_histories SET message_count = 7, created_at = '10000-01-01 00:00:00+00'",
    )
    assert faults(make_store(namespace="other"), repair=True) == []
    assert len(faults(store)) == 2 + 2


@pytest.mark.parametrize(
    "damage",
    ["branch_of = NULL WHERE branch_of IS NOT NULL", "branch_of = 'another' WHERE chat_history_id = 'history'"],
)
def test_a_branch_that_is_not_what_its_meta_says_is_found_and_set_right(store, change, damage):
    store.copy_messages("history", "history~1")
    store.update_chat_history("history~1", meta={"branch_of": "history"})
    assert faults(store) == []
    change("UPDATE {0}.haystack_chat_histories SET " + damage)
    (fault,) = faults(store)
    assert "branch" in fault.description
    assert faults(store, repair=True) == [replace(fault, is_repaired=True)]
    assert faults(store) == []
    assert {info.chat_history_id for info in store.list_chat_histories().items} == {"history", "another"}


def test_of_many_faults_of_a_kind_some_are_listed_and_all_are_repaired(store, change, monkeypatch):
    for module in (checking, listed_faults):
        monkeypatch.setattr(module, "MAX_FAULTS_OF_KIND", 20)
    monkeypatch.setattr(checking, "_REPAIRED_AT_ONCE", 10)
    rows = [HistoryRow(chat_history_id=f"{number}", created_at=0, updated_at=0) for number in range(28)]
    store.engine.run(store.engine.import_histories, store.scope, [(row, []) for row in rows])
    change("UPDATE {0}.haystack_chat_histories SET message_count = 7")
    found = faults(store)
    assert (len(found), found[-1].count) == (21, 10)
    assert found[-1].description == "There are 10 more such faults: Its counter says … messages, but it has …."
    repaired = faults(store, repair=True)
    assert {fault.is_repaired for fault in repaired} == {True}
    assert (len(repaired), repaired[-1].count) == (21, 10)
    assert faults(store) == []
