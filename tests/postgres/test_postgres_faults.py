# SPDX-License-Identifier: Apache-2.0
"""
What a check finds in a PostgreSQL database that somebody else has changed by hand, and what it mends.
"""

import uuid
from datetime import datetime, timedelta, timezone

import pytest
from haystack.dataclasses import ChatMessage
from postgres_stores import NEWEST_AND_OLDEST, execute, say, stores_on

from haystack_chat_store.doctor import check
from haystack_chat_store.testing.kit import texts

VERSIONS = NEWEST_AND_OLDEST


@pytest.fixture(params=["directly", "behind PgBouncer", "partitioned"])
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
    """
    Execute SQL, in which {0} is the store's schema.
    """
    return lambda *statements: execute(server.url, *(each.format(store.schema_name) for each in statements))


def faults(store, repair=False):
    return store.engine.run(store.engine.check, store.scope, repair)


def test_what_fits_together_has_no_faults(store):
    assert faults(store) == faults(store, repair=True) == []


@pytest.mark.parametrize(
    ("damage", "description"),
    [
        ("UPDATE {0}.chat_histories SET message_count = 7", "7 messages, but has 3"),
        ("UPDATE {0}.chat_histories SET round_count = -1", "-1 rounds, but has 2"),
        ("UPDATE {0}.chat_histories SET next_position = 2", "next position is 2, but its last message has"),
    ],
)
def test_a_counter_that_is_wrong_is_found_and_set_right(store, change, damage, description):
    change(damage + " WHERE chat_history_id = 'history'")
    (fault,) = faults(store)
    assert fault[:2] == ("history", None)
    assert description in fault.description
    assert not fault.is_repaired
    (repaired,) = faults(store, repair=True)
    assert repaired == fault._replace(is_repaired=True)
    assert faults(store) == []
    assert say(store, "third") == 1
    assert [stored.position for stored in store.list_messages("history")] == [0, 1, 2, 3]


def test_messages_that_were_deleted_by_hand_are_counted_again(store, change):
    change("DELETE FROM {0}.chat_messages WHERE message_id = 'c'")
    assert len(faults(store, repair=True)) == 4
    assert faults(store) == []
    info = store.get_chat_history("history")
    assert (info.message_count, info.round_count) == (2, 1)


def test_a_history_under_a_key_that_is_not_its_own_gets_its_own_with_all_messages(store, change):
    wrong = uuid.uuid4()
    for table in ("histories", "messages"):
        change(
            f"UPDATE {{0}}.chat_{table} SET history_key = '{wrong}' WHERE history_key = "
            f"'{store._history_key('history')}'"
        )
    assert store.count_messages("history") == 0
    (fault,) = faults(store, repair=True)
    assert (fault.chat_history_id, fault.is_repaired) == ("history", True)
    assert faults(store) == []
    assert len(texts(store.retrieve_messages("history"))) == store.count_messages("history") == 3


def test_messages_get_their_history_back_if_it_is_there_under_another_key(store, change):
    change(f"UPDATE {{0}}.chat_histories SET history_key = '{uuid.uuid4()}' WHERE chat_history_id = 'history'")
    found = faults(store, repair=True)
    assert {fault.chat_history_id for fault in found if fault.is_repaired} == {"history"}
    assert faults(store) == []
    assert len(texts(store.retrieve_messages("history"))) == store.count_messages("history") == 3


def test_a_history_whose_place_another_has_is_reported_and_left(store, change):
    change(
        "INSERT INTO {0}.chat_histories SELECT gen_random_uuid(), namespace, chat_history_id, 0, 0, 0 "
        "FROM {0}.chat_histories WHERE chat_history_id = 'history'"
    )
    for repair in (False, True, False):
        (fault,) = faults(store, repair)
        assert (fault.chat_history_id, fault.is_repaired) == ("history", False)
    assert store.count_messages("history") == 3


def test_messages_without_a_history_get_one_in_a_namespace_of_their_own(make_store, store, change):
    """
    They may be another namespace's: a key does not tell.
    """
    recovered = make_store(namespace="recovered", search=True)
    for number in range(1, 3):
        change(
            "UPDATE {0}.chat_messages SET created_at = '2020-01-01Z'::timestamptz + position * interval '1 day'",
            "DELETE FROM {0}.chat_histories WHERE chat_history_id = 'history'",
        )
        (fault,) = faults(store)
        assert fault[:2] == (None, None)
        assert not fault.is_repaired
        (repaired,) = faults(store, repair=True)
        assert f"3 messages have the history_key {store._history_key('history')}" in repaired.description
        assert repaired.is_repaired
        assert faults(store) == faults(recovered) == []
        listed = recovered.list_chat_histories().items
        assert len(listed) == number
        found = [info for info in listed if f"{info.chat_history_id!r} of the namespace" in repaired.description]
        assert [(info.message_count, info.round_count) for info in found] == [(3, 2)]
        assert [info.created_at.isoformat() for info in found] == ["2020-01-01T00:00:00+00:00"]
        assert [info.updated_at.isoformat() for info in found] == ["2020-01-03T00:00:00+00:00"]
        assert texts(recovered.retrieve_messages(found[0].chat_history_id))[1] == "first answer"
        assert len(recovered.search_messages("first answer")) == number
        assert store.get_chat_history("history") is None
        messages = [ChatMessage.from_user("first question"), *map(ChatMessage.from_assistant, ["first answer"])]
        assert store.write_messages("history", [*messages, ChatMessage.from_user("third")]) == 3


@pytest.mark.parametrize(
    "damage",
    ["message_id = 'other'", "role = 'assistant'", "role = 'other', message_id = 'other'"],
)
def test_a_row_that_has_another_id_or_role_than_its_text_gets_those(store, change, damage):
    store.write_messages("history", [ChatMessage.from_user("\0 \ud800", meta={"chat_message_id": "d"})])
    change(f"UPDATE {{0}}.chat_messages SET {damage} WHERE message_id = 'd'")
    assert not any("text" in fault.description for fault in faults(store))  # the caller, who reads them, says so
    repaired = faults(store, repair=True)
    assert ("history", 3, "Its row had another id or role than its text.", True) in repaired
    assert all(fault.is_repaired for fault in repaired)
    assert list(check(store)) == faults(store, repair=True) == []
    (info,) = (info for info in store.list_chat_histories().items if info.chat_history_id == "history")
    assert (info.message_count, info.round_count) == (4, 3)
    assert store.write_messages("history", [ChatMessage.from_user("d", meta={"chat_message_id": "d"})]) == 0


def test_a_row_whose_texts_id_another_message_has_is_reported_and_left(store, change):
    change(
        f"UPDATE {{0}}.chat_messages SET content = replace(content::text, '\"a\"', '\"b\"')::json "
        f"WHERE message_id = 'a' AND history_key = '{store._history_key('history')}'"
    )
    for _ in range(2):
        assert faults(store, repair=True) == [("history", 0, "Its row had another id or role than its text.", False)]
    assert store.count_messages("history") == 3


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE {0}.chat_messages SET search_terms = '''wrong'':1'",
        "UPDATE {0}.chat_messages SET search_terms = ''",
        "UPDATE {0}.chat_messages SET content = replace(content::text, 'first answer', 'other words')::json",
    ],
)
def test_an_index_that_has_other_words_than_a_message_is_found_and_made_again(store, change, damage):
    change(damage + " WHERE message_id = 'b'")
    found = faults(store)
    assert sorted(fault[:2] for fault in found) == [("another", 1), ("history", 1)]
    assert not any("answer" in fault.description for fault in found)
    assert all(fault.is_repaired for fault in faults(store, repair=True))
    assert faults(store) == []
    words = "other words" if "other words" in damage else "first answer"
    assert len(store.search_messages(words)) == 2


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"content": 5}', '{"content": [{"text": 7}]}'])
def test_a_content_that_is_no_message_disturbs_no_check(store, change, content):
    quoted = content.replace("{", "{{").replace("}", "}}")
    change("UPDATE {0}.chat_messages SET content = '" + quoted + "' WHERE message_id = 'b'")
    assert len(faults(store, repair=True)) == 2
    assert faults(store) == []
    store.engine.run(store.engine.remove, store.scope, "history", [1, 99])
    assert store.count_messages("history") == 2
    assert faults(store) == []


UNREADABLE_TIMES = [
    "infinity",
    "-infinity",
    "4713-01-01 00:00:00+00 BC",
    "10000-01-01 00:00:00+00",
    "139999-12-31 23:59:59.999999+00",
]
# Of several that are even later than that, a walk need not see every one.
LAST_TIME = "294276-12-31 23:59:59.999999+00"


def walked(store):
    """
    The directory, a history at a time.
    """
    pages = [store.list_chat_histories(limit=1)]
    while pages[-1].cursor is not None:
        assert len(pages) < 100
        pages.append(store.list_chat_histories(limit=1, cursor=pages[-1].cursor))
    return [info.chat_history_id for page in pages for info in page.items]


@pytest.mark.parametrize("time", UNREADABLE_TIMES)
def test_a_time_that_is_none_hides_nothing(store, change, time):
    for history in ("third", "fourth"):
        say(store, "first", history=history)
    change(
        f"UPDATE {{0}}.chat_histories SET created_at = '{time}', updated_at = '{time}' "
        "WHERE chat_history_id IN ('history', 'third')",
        f"UPDATE {{0}}.chat_messages SET created_at = '{time}' WHERE message_id = 'b'",
    )
    assert sorted(walked(store)) == ["another", "fourth", "history", "third"]
    assert len(store.list_chat_histories(prefix="h").items) == len(store.list_chat_histories().items) - 3 == 1
    assert store.get_chat_history("history").updated_at.year == 1970
    assert store.update_chat_history("history", title="new").title == "new"
    assert [stored.message.text for stored in store.list_messages("history")][1] == "first answer"
    assert len(store.search_messages("first")) == 6
    assert store.statistics().messages == sum(store.statistics().messages_per_day.values()) == 8


@pytest.mark.parametrize("time", [*UNREADABLE_TIMES, LAST_TIME])
def test_a_time_that_is_none_is_found_and_becomes_that_of_the_nearest_message(store, change, time):
    change(
        "UPDATE {0}.chat_messages SET created_at = '2020-01-01 00:00:00+00'::timestamptz + position * interval '1 day'",
        f"UPDATE {{0}}.chat_histories SET created_at = '{time}', updated_at = '{time}' "
        "WHERE chat_history_id = 'history'",
        f"UPDATE {{0}}.chat_messages SET created_at = '{time}' WHERE position < 2 "
        f"AND history_key = '{store._history_key('history')}'",
    )
    creation, of_change = "Its time of creation is none.", "Its time of change is none."
    expected = [("history", place, creation, False) for place in (0, 1, None)] + [("history", None, of_change, False)]
    assert len(store.list_chat_histories().items) == 2
    assert faults(store) == expected
    assert faults(store, repair=True) == [(*fault[:3], True) for fault in expected]
    assert faults(store) == []
    assert {stored.created_at.day for stored in store.list_messages("history")} == {3}
    info = store.get_chat_history("history")
    assert (info.created_at.isoformat(), info.updated_at.isoformat()) == ("2020-01-03T00:00:00+00:00",) * 2


def test_a_time_that_is_none_without_another_to_go_by_becomes_now(store, change):
    say(store, "alone", history="alone")
    change(
        "UPDATE {0}.chat_histories SET created_at = 'infinity', updated_at = '-infinity' "
        "WHERE chat_history_id = 'alone'",
        f"UPDATE {{0}}.chat_messages SET created_at = 'infinity' WHERE history_key = '{store._history_key('alone')}'",
    )
    assert [fault.is_repaired for fault in faults(store, repair=True)] == [True] * 3
    info, (stored,) = store.get_chat_history("alone"), store.list_messages("alone")
    assert info.created_at == info.updated_at == stored.created_at
    assert abs(datetime.now(timezone.utc) - stored.created_at) < timedelta(hours=1)


def test_other_namespaces_are_not_looked_at(store, make_store, change):
    change(
        "UPDATE {0}.chat_histories SET message_count = 7, created_at = 'infinity'",
        "UPDATE {0}.chat_messages SET created_at = 'infinity'",
    )
    assert faults(make_store(namespace="other"), repair=True) == []
    assert len(faults(store)) == 2 + 2 + 6
