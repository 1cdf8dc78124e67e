# SPDX-License-Identifier: Apache-2.0
"""What something else has changed or evicted in Redis is found, and mended as far as it can be."""

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from redis_stores import (
    KINDS,
    cases_on_every_engine,
    everything,
    key_of,
    keys_of,
    neighbours,
    on_every_engine,
    on_one_server,
    said,
    say,
)
from test_redis_copying import HISTORY, row

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import MessageDecodingError
from haystack_chat_store.stores import faults
from haystack_chat_store.stores.redis import checking
from haystack_chat_store.stores.redis.keys import bucket_of
from haystack_chat_store.testing.messages import with_id

WORDS = ["one", "two", "three", "four", "five"]


@pytest.fixture
def damaged(store, client):
    """A store with a history of five messages, the middle one of which was deleted, and what a test breaks."""
    store.write_messages("history", [with_id(word, word) for word in WORDS])
    store.delete_messages("history", message_ids=["three"])
    say(store, "Hi!", history=next(neighbours("history")))  # which nothing is wrong with
    say(store, "Hi!", history="elsewhere")
    store.update_chat_history("history", title="Weather")
    return Damaged(store, client)


class Damaged:
    def __init__(self, store, client):
        self.store = store
        self.client = client

    def key(self, kind):
        (key,) = (key for key in keys_of(self.store, self.client) if key.endswith(f":history:{kind}"))
        return key

    def of_bucket(self, kind):
        return self.key("contents").split("}")[0] + "}:" + kind

    def faults(self, repair=False):
        return self.store.engine.run(self.store.engine.repair if repair else self.store.engine.check, self.store.scope)

    def assert_found_and_mended(self, *descriptions):
        before = everything(self.store, self.client)
        found = self.faults()
        assert found == self.faults()
        assert everything(self.store, self.client) == before
        assert {fault.chat_history_id for fault in found} == {"history"}
        assert not any(fault.is_repaired for fault in found)
        for description in descriptions:
            assert any(description in fault.description for fault in found), found
        assert self.faults(repair=True) == [replace(fault, is_repaired=True) for fault in found]
        assert self.faults() == []


LEFT = ["one", "two", "four", "five"]


@on_every_engine
def test_a_sound_store_has_no_faults(damaged, client):
    before = everything(damaged.store, client)
    assert damaged.faults(repair=True) == []
    assert everything(damaged.store, client) == before


@cases_on_every_engine(
    ("field", "value"),
    [("preview", "another"), ("preview", None), ("last_role", "t"), ("last_text", "another"), ("last_at", "5")],
)
def test_what_lists_show_of_a_history_is_compared_and_made_anew(damaged, client, field, value):
    before = damaged.store.get_chat_history("history")
    if value is None:
        client.hdel(damaged.key("history"), field)
    else:
        client.hset(damaged.key("history"), field, value)
    wrong = "its preview is not" if field == "preview" else "what it keeps of its last message is wrong"
    damaged.assert_found_and_mended(wrong)
    after = damaged.store.get_chat_history("history")
    assert (after.preview, after.last_message) == (before.preview, before.last_message)


@on_every_engine
def test_an_origin_that_does_not_know_of_its_branches_is_told(damaged, client):
    say(damaged.store, "Hi!", history="history~1")
    damaged.store.update_chat_history("history~1", meta={"branch_of": "history"})
    client.srem(damaged.of_bucket("origins"), "history")
    damaged.assert_found_and_mended("it has branches and does not know of them")
    damaged.store.delete_chat_history("history")
    assert damaged.store.get_chat_history("history~1") is None


@on_every_engine
def test_a_directory_of_a_user_has_only_what_is_this_users(damaged, client):
    directory = damaged.of_bucket("users::ada")
    client.zadd(directory, {"history": 1})
    damaged.assert_found_and_mended("it is in the directory of a user whose it is not")
    assert not client.exists(directory)


@on_every_engine
def test_a_key_that_looks_like_the_directory_of_a_user_is_left_alone(damaged, client):
    strangers = [damaged.of_bucket(kind).replace(":default:", ":default:9") for kind in ("users::ada", "x:users::ada")]
    for key in strangers:
        client.set(key, "of another program")
    assert damaged.faults() == []
    assert client.exists(*strangers[:1]) == client.exists(*strangers[1:]) == 1


@on_every_engine
def test_an_owner_of_a_history_that_is_gone_is_forgotten(damaged, client):
    owners = damaged.of_bucket("owners")
    damaged.store.delete_chat_history("history")
    client.hset(owners, "history", "ada")
    damaged.assert_found_and_mended("is listed, but not there")
    assert not client.exists(owners)


@on_every_engine
@pytest.mark.parametrize("lost", [kind for kind in KINDS if kind != "contents"])
def test_a_history_that_has_lost_a_key_is_rebuilt_from_its_messages(damaged, client, lost):
    times = [each.created_at for each in damaged.store.list_messages("history")]
    client.delete(damaged.key(lost))
    with pytest.raises(MessageDecodingError):
        said(damaged.store)
    damaged.assert_found_and_mended()
    assert said(damaged.store) == LEFT
    info = damaged.store.get_chat_history("history")
    assert (info.message_count, info.round_count) == (4, 4)
    assert info.title == (None if lost == "history" else "Weather")
    found = damaged.store.list_messages("history")
    assert [each.position for each in found] == [0, 1, 3, 4]
    assert [each.created_at for each in found] == times
    assert damaged.store.write_messages("history", [with_id("one"), with_id("six", "six")]) == 1
    assert damaged.store.list_chat_histories().items[0].chat_history_id == "history"


@on_every_engine
def test_a_history_whose_messages_are_gone_can_be_written_to_again(damaged, client):
    client.delete(damaged.key("contents"))
    found = damaged.faults(repair=True)
    assert any("4 of its messages are gone" in fault.description for fault in found)
    assert damaged.faults() == []
    assert said(damaged.store) == []
    assert damaged.store.get_chat_history("history").title == "Weather"
    assert say(damaged.store, "Hi!") == 1
    assert [each.position for each in damaged.store.list_messages("history")] == [5]


@on_every_engine
@pytest.mark.parametrize("lost", ["histories", "names", "schema_version"])
def test_a_history_that_the_bucket_does_not_list_is_listed_again(store, client, lost):
    say(store, "Hi!")
    store.update_chat_history("history", title="Weather")
    info = store.get_chat_history("history")
    client.delete(key_of(store, client, lost))
    found = store.engine.run(store.engine.check, store.scope)
    assert [fault.chat_history_id for fault in found] == ["history"]
    assert [fault.is_repaired for fault in store.engine.run(store.engine.repair, store.scope)] == [True]
    assert store.engine.run(store.engine.check, store.scope) == []
    (listed,) = store.list_chat_histories().items
    assert store.list_chat_histories(prefix="h").items == [listed]
    assert replace(listed, revision=info.revision) == info
    assert listed.revision > info.revision
    by_id = store.engine.run(store.engine.histories_by_id, store.scope, "", "", 9)
    assert [row.chat_history_id for row in by_id] == ["history"]


@on_every_engine
def test_orphans_of_a_bucket_that_has_lost_everything_are_found(store, client):
    histories = ["a{b}", "*[x]?", "user 456", "\u00e4\\^"]
    for history in histories:
        say(store, history, history=history)
    for key in keys_of(store, client):
        if key.endswith(("}:histories", "}:names", "}:schema_version")):
            client.delete(key)
    assert store.list_chat_histories().items == []
    found = store.engine.run(store.engine.repair, store.scope)
    assert sorted({fault.chat_history_id for fault in found}) == sorted(histories)
    assert store.engine.run(store.engine.check, store.scope) == []
    assert sorted(info.chat_history_id for info in store.list_chat_histories().items) == sorted(histories)
    assert [said(store, history) for history in histories] == [[history] for history in histories]


@on_every_engine
def test_an_entry_without_a_history_is_removed(damaged, client):
    client.delete(*(damaged.key(kind) for kind in KINDS))
    (fault,) = damaged.faults(repair=True)
    assert (fault.chat_history_id, fault.is_repaired) == ("history", True)
    assert damaged.faults() == []
    assert len(damaged.store.list_chat_histories().items) == 2


@cases_on_every_engine(
    ("field", "value"),
    [
        ("message_count", 7),
        ("round_count", 0),
        ("next_position", 3),
        ("next_position", 9),
        ("round_count", "many"),
        ("updated_at", "never"),
        ("created_at", ""),
        ("created_at", b"\xff"),
        ("created_at", "1e300"),
        ("expires_at", "never"),
        ("chat_history_id", "another"),
    ],
)
def test_wrong_counters_are_mended(damaged, client, field, value):
    before = damaged.store.get_chat_history("history")
    client.hset(damaged.key("history"), field, value)
    damaged.assert_found_and_mended()
    after = damaged.store.get_chat_history("history")
    positions = [each.position for each in damaged.store.list_messages("history")]
    assert positions == [0, 1, 3, 4]
    assert (after.message_count, after.round_count, after.title) == (4, 4, "Weather")
    assert abs(after.updated_at - before.updated_at).total_seconds() < 5
    assert abs(after.created_at - before.created_at).total_seconds() < 5
    assert said(damaged.store) == LEFT


@on_every_engine
def test_an_index_that_does_not_fit_the_messages_is_mended(damaged, client):
    client.hdel(damaged.key("message_ids"), "two")
    client.hset(damaged.key("message_ids"), mapping={"one": 3, "nobody": 1})
    client.hset(damaged.key("history"), "message_count", 5)
    client.hset(damaged.key("message_ids"), "nobody else", 12)
    damaged.assert_found_and_mended("index", "message_count")
    assert damaged.store.write_messages("history", [with_id(word) for word in LEFT]) == 0
    damaged.store.delete_messages("history", from_message_id="two")
    assert said(damaged.store) == ["one"]


@on_every_engine
def test_roles_that_do_not_fit_the_messages_are_mended(damaged, client):
    client.set(damaged.key("roles"), "uxxxa")
    damaged.assert_found_and_mended("roles")
    assert said(damaged.store) == LEFT
    assert len(damaged.store.retrieve_messages("history", last_k=4)) == 4


@on_every_engine
def test_what_has_no_time_left_at_all_is_mended_to_be_of_now(store, client):
    say(store, "Hi!")
    client.hset(key_of(store, client, "history:history"), mapping={"created_at": "never", "updated_at": "never"})
    client.set(key_of(store, client, "times"), 18 * "?")
    assert all(fault.is_repaired for fault in store.engine.run(store.engine.repair, store.scope))
    assert store.engine.run(store.engine.check, store.scope) == []
    (message,) = store.list_messages("history")
    assert timedelta() <= datetime.now(timezone.utc) - message.created_at < timedelta(minutes=5)


@on_every_engine
def test_times_long_after_ours_are_no_fault(store):
    last = replace(HISTORY, created_at=253402300799999997, updated_at=253402300799999999)
    rows = [row("a", created_at=253402300799999998)]
    assert store.engine.run(store.engine.import_history, store.scope, last, [rows], 0) == 1
    assert store.list_messages("imported")[0].created_at.microsecond == 999998
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
@pytest.mark.parametrize("is_write", [True, False], ids=["write", "delete"])
def test_a_history_with_a_counter_that_is_none_is_left_alone(damaged, client, is_write):
    client.hset(damaged.key("history"), "round_count", "many")
    before = everything(damaged.store, client)
    with pytest.raises(MessageDecodingError):
        say(damaged.store, "Hi!") if is_write else damaged.store.delete_messages("history", message_ids=["one"])
    assert everything(damaged.store, client) == before


@cases_on_every_engine(["junk"], [b"\xff{", b"[]", b'{"role": "user", "meta": {}}', b'{"role": "robot"}'])
def test_a_message_that_cannot_be_read_hides_no_other_and_can_be_removed(damaged, client, junk):
    client.lset(damaged.key("contents"), 1, junk)
    assert damaged.faults() == []  # what single messages say is for the caller to check
    for lost in ("message_ids", "roles"):
        client.delete(damaged.key(lost))
        assert all(fault.is_repaired for fault in damaged.faults(repair=True))
        assert damaged.faults() == []
    engine, scope = damaged.store.engine, damaged.store.scope
    rows = engine.run(engine.page, scope, "history", None, None, 10)
    assert [row.position for row in rows] == [0, 1, 3, 4]
    assert all(row.message_id for row in rows)
    assert rows[1].content.encode(errors="surrogateescape") == junk
    engine.run(engine.remove, scope, "history", [row for row in rows if row.position in (1, 4)])
    assert said(damaged.store) == ["one", "four"]
    assert damaged.store.get_chat_history("history").round_count == 2
    assert damaged.faults() == []


@on_every_engine
def test_a_message_that_no_id_points_to_is_not_reported_as_removed(damaged, client):
    client.hset(damaged.key("message_ids"), "five", 0)  # so that two ids point to the first message, and none to it
    engine, scope = damaged.store.engine, damaged.store.scope
    rows = engine.run(engine.page, scope, "history", None, None, 10)
    assert engine.run(engine.remove, scope, "history", [row for row in rows if row.position in (1, 4)]) == [4]
    assert said(damaged.store) == ["one", "four", "five"]
    assert engine.run(engine.remove, scope, "history", []) == []


@on_every_engine
def test_what_is_to_expire_is_mended_to_expire_together(make_store, client):
    damaged = Damaged(make_store(ttl=60, last_k=None), client)
    say(damaged.store, "Hi!")
    client.persist(damaged.key("contents"))
    damaged.assert_found_and_mended("expires at the same time")
    client.zrem(damaged.of_bucket("expiries"), "history")
    damaged.assert_found_and_mended("expires at the same time")
    client.delete(damaged.key("history"))
    damaged.assert_found_and_mended()
    assert all(50 < client.ttl(key) <= 60 for key in keys_of(damaged.store, client))


@on_one_server
def test_a_write_during_the_repair_is_not_lost(damaged, client, monkeypatch):
    client.hset(damaged.key("history"), "round_count", 0)
    examine_history = checking.examine_history
    comes = iter(["a", "b"])

    async def write_and_examine(session, keys, chat_history_id, inspected, stage=None):
        examination = await examine_history(session, keys, chat_history_id, inspected, stage)
        if chat_history_id == "history" and (message_id := next(comes, None)) is not None:
            damaged.store.write_messages("history", [with_id(message_id, message_id)])
        return examination

    monkeypatch.setattr(checking, "examine_history", write_and_examine)
    assert [fault.is_repaired for fault in damaged.faults(repair=True)] == [True]
    monkeypatch.undo()
    assert said(damaged.store) == [*LEFT, "a", "b"]
    assert damaged.store.get_chat_history("history").round_count == 6
    assert damaged.faults() == []


@on_one_server
def test_a_write_during_the_check_is_not_taken_for_a_fault(damaged, monkeypatch):
    read_raw = checking.read_raw
    comes = iter("abcdefgh")

    async def overwrite_and_read(session, keys, chat_history_id, *places):
        found = await read_raw(session, keys, chat_history_id, *places)
        if chat_history_id == "history" and (message_id := next(comes, None)) is not None:
            damaged.store.write_messages("history", [with_id(message_id)])
            damaged.store.delete_messages("history", message_ids=["two"])
            damaged.store.write_messages("history", [with_id("two", "two")])
        return found

    monkeypatch.setattr(checking, "read_raw", overwrite_and_read)
    assert damaged.faults() == []


@on_one_server
def test_a_long_history_is_rebuilt(store, client):
    messages = [with_id(str(number), 100 * "x") for number in range(2500)]
    store.write_messages("history", messages)
    store.delete_messages("history", message_ids=[str(number) for number in range(500, 2000)])
    client.delete(key_of(store, client, "message_ids"), key_of(store, client, "roles"))
    assert all(fault.is_repaired for fault in store.engine.run(store.engine.repair, store.scope))
    assert store.engine.run(store.engine.check, store.scope) == []
    ids = [each.message.meta["chat_message_id"] for each in store.iterate_messages("history")]
    assert ids == [str(number) for number in range(2500) if not 500 <= number < 2000]
    assert json.loads(client.lindex(key_of(store, client, "contents"), 0))["role"] == "user"


@on_every_engine
def test_infinite_times_in_the_directory_hide_no_history(store, client):
    names = [*(f"early {number}" for number in range(3)), "chat", *(f"late {number}" for number in range(3))]
    for name in names:
        say(store, "Hi!", history=name)
    keys = store.engine.keys(store.scope)
    for name in names:
        if name != "chat":
            bucket = keys.of_bucket(bucket_of(name))
            client.zadd(bucket.directory, {name: "inf" if name.startswith("late") else "-inf"})
    seen, cursor = [], None
    while cursor is not None or not seen:
        page = store.list_chat_histories(limit=1, cursor=cursor)
        seen += [history.chat_history_id for history in page.items]
        cursor = page.cursor
    assert seen == names[::-1]
    assert {fault.chat_history_id for fault in check(store)} == set(names) - {"chat"}
    assert all(fault.is_repaired for fault in check(store, repair=True))
    assert check(store) == []
    assert [history.chat_history_id for history in store.list_chat_histories().items] == names[::-1]


@cases_on_every_engine(["time"], ["9" * 400, "inf", "-inf", "noon"])
def test_a_time_of_change_that_is_no_time_is_found_and_mended(store, client, time):
    say(store, "Hi!")
    keys = store.engine.keys(store.scope)
    client.hset(keys.of_history("history").counters, "updated_at", time)
    client.zadd(keys.of_bucket(bucket_of("history")).directory, {"history": "inf"})
    assert [history.chat_history_id for history in store.list_chat_histories().items] == ["history"]
    assert store.get_chat_history("history").message_count == 1
    check(store, repair=True)
    assert check(store) == []


@on_one_server
def test_of_many_faults_of_a_kind_some_are_listed_and_all_are_mended(store, client, monkeypatch):
    monkeypatch.setattr(faults, "MAX_FAULTS_OF_KIND", 3)
    for word in WORDS:
        say(store, "Hi!", history=word)
    for key in keys_of(store, client):
        if key.endswith(":history"):
            client.hset(key, "message_count", 7)
    for repair in (False, True):
        found = check(store, repair=repair)
        assert [fault.count for fault in found if "message_count" in fault.description] == [1, 1, 1, 2]
        assert {fault.is_repaired for fault in found} == {repair}
    assert check(store) == []


def states_another_id(damaged):
    content = damaged.client.lindex(damaged.key("contents"), 3)
    damaged.client.lset(damaged.key("contents"), 3, content.replace(b'"four"', b'"other"'))


@on_every_engine
def test_a_message_that_states_another_id_than_the_index_has_is_not_changed(damaged, client):
    states_another_id(damaged)
    before = everything(damaged.store, client)
    with pytest.raises(MessageDecodingError, match=r"'history' .* contradict.*doctor"):
        damaged.store.update_message_meta("history", "four", merge={"rating": 1})
    assert everything(damaged.store, client) == before
    assert damaged.faults() != []


@on_every_engine
def test_a_message_that_states_another_id_than_the_index_has_can_be_deleted(damaged):
    states_another_id(damaged)
    damaged.store.delete_messages("history", from_message_id="four")
    assert said(damaged.store) == ["one", "two"]


@on_every_engine
def test_a_message_that_states_another_id_than_the_index_has_can_be_replaced(damaged):
    states_another_id(damaged)
    assert damaged.store.replace_messages("history", from_message_id="two", messages=[with_id("new", "new")]) == 1
    assert said(damaged.store) == ["one", "new"]


@on_every_engine
@pytest.mark.parametrize("position", [3, 99])
def test_an_index_with_a_wrong_position_is_reported_at_once(damaged, client, position):
    client.hset(damaged.key("message_ids"), "five", position)
    before = everything(damaged.store, client)
    with pytest.raises(MessageDecodingError):
        damaged.store.replace_messages("history", from_message_id="five", messages=[with_id("new", "new")])
    with pytest.raises(MessageDecodingError):
        damaged.store.update_message_meta("history", "five", merge={"rating": 1})
    assert everything(damaged.store, client) == before


@on_every_engine
def test_a_history_that_cannot_be_listed_is_not_created_again(damaged, client):
    damaged.store.create_chat_history("empty")
    (key,) = (key for key in keys_of(damaged.store, client) if key.endswith(":empty:history"))
    client.hdel(key, "message_count")
    with pytest.raises(MessageDecodingError, match=r"'empty'.*doctor"):
        damaged.store.create_chat_history("empty")


@on_every_engine
def test_a_history_that_the_directory_has_lost_is_handed_over(damaged, client):
    client.zrem(damaged.of_bucket("histories"), "history")
    assert damaged.store.update_chat_history("history", user_id="ada").user_id == "ada"
    assert [info.chat_history_id for info in damaged.store.for_user("ada").list_chat_histories().items] == ["history"]
    damaged.faults(repair=True)
    assert damaged.faults() == []


@on_every_engine
def test_a_history_that_has_lost_its_time_is_renamed(damaged, client):
    client.hdel(damaged.key("history"), "updated_at")
    damaged.store.rename_chat_history("history", "renamed")
    assert said(damaged.store, "renamed") == LEFT
