# SPDX-License-Identifier: Apache-2.0
"""Users on Redis: directories of users, and what crosses hash slots."""

import time

import pytest
from haystack.dataclasses import ChatMessage
from redis_stores import keys_of, on_a_cluster, on_every_engine

from haystack_chat_store import ChatHistoryExistsError
from haystack_chat_store.doctor import check
from haystack_chat_store.stores.redis import renaming
from haystack_chat_store.stores.redis.histories import read_state
from haystack_chat_store.stores.redis.sync_session import SyncSession
from haystack_chat_store.testing.kit import texts


def say(store, chat, *said):
    store.write_messages(chat, [ChatMessage.from_user(text) for text in said])


def begin_renaming(store, old_id, new_id):
    """Do what a client does that is killed before the old history goes."""

    async def begin(session, scope):
        keys = store.engine.keys(scope)
        old = await read_state(session, keys, old_id)
        return await store.engine._copy_whole(session, keys, old, new_id, None)

    assert store.engine.run(begin, store.scope)


@on_a_cluster
def test_a_repeated_call_finishes_renaming(make_store):
    store = make_store(user_id="ada", last_k=None)
    say(store, "old", "one", "two", "three")
    store.delete_messages("old", message_ids=[store.list_messages("old")[1].message.meta["chat_message_id"]])
    before = store.list_messages("old")
    begin_renaming(store, "old", "new")
    assert {info.chat_history_id for info in store.list_chat_histories().items} == {"old", "new"}
    for _ in range(2):
        assert store.rename_chat_history("old", "new").message_count == 2
        assert store.list_messages("new") == before
        assert [info.chat_history_id for info in store.list_chat_histories().items] == ["new"]
    assert store.engine.run(store.engine.check, make_store().scope) == []


@on_a_cluster
def test_what_is_written_while_a_history_is_renamed_is_not_lost(make_store):
    store = make_store(last_k=None)
    say(store, "old", "one")
    begin_renaming(store, "old", "new")
    say(store, "old", "two")
    store.rename_chat_history("old", "new")
    assert texts(store.retrieve_messages("new")) == ["one", "two"]
    assert store.get_chat_history("old") is None
    say(store, "another", "one")
    with pytest.raises(ChatHistoryExistsError):
        store.rename_chat_history("another", "new")


@on_a_cluster
def test_a_renaming_goes_on_from_one_that_was_cut_off_for_another_user(make_store, monkeypatch):
    monkeypatch.setattr(renaming, "_CLAIM_MILLISECONDS", 0)
    store = make_store(last_k=None)
    say(store.for_user("ada"), "old", "one")
    begin_renaming(store, "old", "new")
    store.update_chat_history("old", user_id="bob")
    store.for_user("bob").rename_chat_history("old", "other")
    assert [(info.chat_history_id, info.user_id) for info in store.list_chat_histories().items] == [("other", "bob")]
    assert texts(store.retrieve_messages("other")) == ["one"]
    assert check(store) == []


@on_a_cluster
def test_a_claim_for_an_id_that_is_taken_holds_no_renaming_up(make_store, monkeypatch):
    monkeypatch.setattr(renaming, "_CLAIM_MILLISECONDS", 0)
    store = make_store(last_k=None)
    say(store, "old", "one")
    begin_renaming(store, "old", "new")
    say(store, "new", "two")
    say(store, "old", "three")
    store.rename_chat_history("old", "other")
    assert [texts(store.retrieve_messages(each)) for each in ("new", "other")] == [["one", "two"], ["one", "three"]]
    assert store.get_chat_history("old") is None


@on_a_cluster
def test_a_check_takes_no_renaming_that_goes_on_for_a_fault(make_store, monkeypatch):
    store = make_store()
    say(store, "old", "one")
    begin_renaming(store, "old", "new")
    assert [fault.chat_history_id for fault in check(store)] == ["new"]

    async def finish(_):
        store.rename_chat_history("old", "new")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(SyncSession, "pause", finish)
        assert check(store) == []


@on_every_engine
def test_nothing_is_left_of_a_user_that_is_erased(make_store, client):
    store = make_store()
    for number in range(5):
        say(store.for_user("ada"), f"chat {number}", "Hi!")
    store.update_chat_history("chat 0", user_id="bob")
    store.rename_chat_history("chat 0", "of bob")
    assert store.delete_user("ada") == 4
    assert store.delete_user("bob") == 1
    left = [key for key in keys_of(store, client) if "users" in key or "owners" in key]
    assert left == []


@on_every_engine
def test_expired_histories_leave_the_directory_of_their_user(make_store, client):
    short, store = make_store(user_id="ada", ttl=3), make_store()
    say(short, "chat", "Hi!")
    assert [info.chat_history_id for info in short.list_chat_histories().items] == ["chat"]
    time.sleep(3.2)
    assert short.list_chat_histories().items == []
    store.delete_all_messages()
    assert [key for key in keys_of(store, client) if "users" in key or "owners" in key] == []
