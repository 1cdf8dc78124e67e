# SPDX-License-Identifier: Apache-2.0
"""What others change between two scripts of one call: no change is lost, and no user sees what is another's."""

import threading
from contextlib import closing, suppress
from itertools import count

import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from redis_stores import LosesAnswers, before_script, neighbours, on_every_engine, on_one_server, said, say
from servers import RedisCluster, wait_until

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import ChatHistoryExistsError, ChatMessageStoreError, StoreUnavailableError
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.testing.messages import with_id

CHANGES = {
    "title": lambda store: store.update_chat_history("old", title="New"),
    "meta": lambda store: store.update_chat_history("old", merge_meta={"new": True}),
    "hand-over": lambda store: store.update_chat_history("old", user_id="bob"),
    "write": lambda store: store.write_messages("old", [with_id("new")]),
    "meta of a message": lambda store: store.update_message_meta("old", "a", merge={"new": True}),
    "deletion of a message": lambda store: store.delete_messages("old", message_ids=["a"]),
    "lifetime": lambda store: store.engine.run(store.engine.renew, store.scope, "old"),
    "deletion": lambda store: store.delete_chat_history("old"),
    "another history": lambda store: (store.delete_chat_history("old"), say(store, "another", history="old")),
}


def at_each_script(make_store, prepare, call, action, history="", first=0, step=1):
    """
    Make a call on one store after another, and each time do something before another one of its scripts.

    :param history: The history whose keys the scripts use that count, or nothing for all scripts.
    :param first: The number of the first script to do it at, from 0.
    :param step: At which of the scripts after it: at each, or each third, for example.
    :returns: Each store, and whether anything was done. The last time, nothing is.
    """
    for number in count(first, step):
        store = make_store(namespace=f"namespace {number}", ttl=1000)
        prepare(store)
        with before_script(number, history, lambda store=store: action(store)) as done, suppress(ChatMessageStoreError):
            call(store)
        yield store, bool(done)
        if not done:
            assert number > first
            return


def prepare(store):
    store.create_chat_history("old", user_id="ada")
    store.write_messages("old", [with_id("a"), with_id("b")])


def told(store):
    """What users are told of each history, apart from its id and its times."""
    found = [(info, store.list_messages(info.chat_history_id)) for info in store.list_chat_histories().items]
    return [
        (info.user_id, info.title, info.meta, [(each.position, each.message) for each in messages])
        for info, messages in found
    ]


@on_every_engine
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_a_history_is_renamed_is_not_lost(make_store, server, change, is_full):
    """On a cluster, there are many scripts. In the fast suite, each change is made before each third one of them."""
    after, step = [], 3 if isinstance(server, RedisCluster) and not is_full else 1

    def changed(store):
        if store.get_chat_history("old") is not None:  # otherwise it has its new id already
            CHANGES[change](store)
            after.append([each for each in told(store) if each not in before] or before)

    def rename(store):
        store.for_user("ada").rename_chat_history("old", "new")

    prepare(store := make_store(namespace="before"))
    before = told(store)
    first = list(CHANGES).index(change) % step
    for store, _ in at_each_script(make_store, prepare, rename, changed, first=first, step=step):
        expected = after.pop() if after else before
        assert told(store) in ([expected, []] if change == "deletion" else [expected])
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
@pytest.mark.parametrize("is_changed", [False, True])
def test_what_is_written_to_a_history_that_has_its_new_id_is_not_lost(make_store, is_changed):
    """Neither of the two goes if each has a change that the other lacks."""
    written = []

    def change(store):
        if store.get_chat_history("new") is not None:
            store.write_messages("new", [with_id("c")])
            written.append("c")
            if is_changed and store.get_chat_history("old") is not None:
                store.write_messages("old", [with_id("d")])
                written.append("d")

    def rename(store):
        store.rename_chat_history("old", "new")

    for store, _ in at_each_script(make_store, prepare, rename, change):
        left = [each.chat_history_id for each in store.list_chat_histories().items]
        assert sorted(left) == (["new", "old"] if "d" in written else ["new"])
        kept = {message.meta["chat_message_id"] for each in left for message in store.retrieve_messages(each)}
        assert kept == {"a", "b", *written}
        written.clear()


@on_one_server
def test_a_renaming_whose_answer_was_lost_is_not_done_twice(make_store, server, monkeypatch):
    store = make_store()
    other = RedisChatMessageStore(Secret.from_token(server.url), key_prefix=store.key_prefix)
    prepare(other)
    with closing(LosesAnswers(server)) as proxy:
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        assert store.count_messages("old") == 2  # so that there is a connection
        proxy.meanwhile = lambda: say(other, "another", history="old")
        proxy.to_lose = 1
        assert store.rename_chat_history("old", "new").message_count == 2
        store.close()
    assert proxy.to_lose == 0
    assert [said(other, each) for each in ("old", "new")] == [["another"], ["Hello", "Hello"]]
    other.close()


@on_every_engine
def test_another_history_under_the_old_id_is_no_renaming_that_was_begun(store):
    say(store, "one", history="old")
    store.rename_chat_history("old", "new")
    say(store, "two", history="old")
    with pytest.raises(ChatHistoryExistsError):
        store.rename_chat_history("old", "new")
    assert [said(store, "old"), said(store, "new")] == [["two"], ["one"]]


@on_every_engine
def test_a_copy_has_only_what_its_user_may_see(make_store):
    def hand_over(store):
        store.update_chat_history("old", user_id="bob")
        store.for_user("bob").write_messages("old", [with_id("of bob")])

    def copy(store):
        store.copy_messages("old", "copy")

    for store, _ in at_each_script(make_store, prepare, copy, hand_over):
        kept = [message.meta["chat_message_id"] for message in store.retrieve_messages("copy")]
        is_of_bob = store.get_chat_history("copy").user_id == "bob"
        assert kept == ["a", "b", *(["of bob"] if is_of_bob else [])]


@on_every_engine
def test_a_copy_of_a_history_that_changes_hands_all_the_time_is_of_one_user(store):
    ada, bob, ends = store.for_user("ada"), store.for_user("bob"), threading.Event()
    say(ada, "of ada", history="chat")

    def hand_over():
        while not ends.is_set():
            store.update_chat_history("chat", user_id="bob")
            bob.write_messages("chat", [with_id("b", "of bob")])
            bob.delete_messages("chat", message_ids=["b"])
            store.update_chat_history("chat", user_id="ada")

    thread = threading.Thread(target=hand_over)
    thread.start()
    try:
        for number in range(150):
            with suppress(StoreUnavailableError):  # it has begun again ten times
                store.copy_messages("chat", f"copy {number}")
            assert "of bob" not in said(ada, f"copy {number}")
    finally:
        ends.set()
        thread.join()


@on_every_engine
def test_statistics_of_a_user_have_nothing_of_a_history_that_is_handed_over_meanwhile(make_store):
    def reply(model):
        return ChatMessage.from_assistant("Hi!", meta={"usage": {"total_tokens": 1}, "model": model})

    def prepare_two(store):
        for history in ("old", "other"):
            store.for_user("ada").write_messages(history, [with_id("a"), reply("hers")])

    def hand_over(store):
        store.update_chat_history("old", user_id="bob")
        store.write_messages("old", [reply("his")])

    def count_all(store):
        found = store.for_user("ada").statistics()
        counted.append((found.chat_histories, found.messages, found.rounds, sum(found.messages_per_day.values())))
        usage.append({model: each.total_tokens for model, each in found.usage.items()})

    counted, usage = [], []
    for _, was_handed_over in at_each_script(make_store, prepare_two, count_all, hand_over, "old"):
        histories = 1 if was_handed_over else 2
        assert counted.pop() == (histories, 2 * histories, histories, 2 * histories)
        assert usage.pop() == {"hers": histories}


@on_every_engine
def test_a_history_that_has_expired_is_no_longer_listed_for_its_user(make_store):
    store, short, neighbour = make_store(ttl=1000), make_store(ttl=0.05), next(neighbours("chat"))
    say(store.for_user("ada"), "stays", history=neighbour)
    say(short.for_user("ada"), "expires", history="chat")
    wait_until(lambda: store.get_chat_history("chat") is None, "the history to expire")
    say(store.for_user("bob"), "another", history="chat")
    assert store.delete_user("ada") == 1
    assert [info.user_id for info in store.list_chat_histories().items] == ["bob"]


BRANCH = {"branch_of": "old"}


def branches_of_old(store):
    return {
        info.chat_history_id: info for info in store.list_chat_histories(branches=True).items if info.meta == BRANCH
    }


@on_every_engine
@pytest.mark.parametrize("change", ["hand-over", "deletion", "renaming"])
def test_a_branch_that_is_made_goes_where_its_history_goes_meanwhile(make_store, change):
    def go(store):
        listed.append([info.chat_history_id for info in store.list_chat_histories().items])
        if change == "renaming":
            store.rename_chat_history("old", "new")
        else:
            CHANGES[change](store)

    def make_branch(store):
        store.copy_messages("old", "old~1", meta=BRANCH)

    listed = []
    for store, _ in at_each_script(make_store, prepare, make_branch, go):
        history, left = store.get_chat_history("old"), branches_of_old(store)
        assert {info.user_id for info in left.values()} <= {history.user_id if history else "nobody"}
        if change == "renaming":
            of_new = [info for info in store.list_chat_histories(branches=True).items if info.meta]
            assert {info.meta["branch_of"] for info in of_new} <= {"new" if history is None else "old"}
        assert store.engine.run(store.engine.check, store.scope) == []
    assert listed == [["old"]] * len(listed)  # a branch is never seen as a history of its own


@on_every_engine
def test_a_history_takes_the_branches_along_that_are_made_while_it_is_handed_over(make_store):
    for store, _ in at_each_script(
        make_store,
        prepare,
        lambda store: store.update_chat_history("old", user_id="bob"),
        lambda store: store.copy_messages("old", "old~1", meta=BRANCH),
    ):
        assert {info.user_id for info in store.list_chat_histories(branches=True).items} == {"bob"}


@on_every_engine
@pytest.mark.parametrize("is_repeated", [True, False])
@pytest.mark.parametrize("history", ["old", "old~1", "old~1~2"])
def test_a_renaming_that_was_cut_off_is_finished_by_the_same_call_or_by_a_repair(make_store, history, is_repeated):
    def prepare_family(store):
        prepare(store)
        store.copy_messages("old", "old~1", meta=BRANCH)
        store.copy_messages("old~1", "old~1~2", meta={"branch_of": "old~1"})
        store.copy_messages("old", "old~3", meta=BRANCH)

    def cut_off(_):
        raise StoreUnavailableError("The process has ended.")

    def rename(store):
        store.rename_chat_history("old", "new")

    begun = 0
    for store, _ in at_each_script(make_store, prepare_family, rename, cut_off, history):
        if is_repeated:
            rename(store)
        else:
            faults = check(store, repair=True)
            assert all(fault.is_repaired for fault in faults)
            begun += bool(faults)
            if {info.chat_history_id for info in store.list_chat_histories().items} == {"old"}:  # not begun yet
                rename(store)
        found = {info.chat_history_id: info for info in store.list_chat_histories(branches=True).items}
        assert {each: info.meta.get("branch_of") for each, info in found.items()} == {
            "new": None,
            "new~1": "new",
            "new~1~2": "new~1",
            "new~3": "new",
        }
        assert {info.user_id for info in found.values()} == {"ada"}
        assert all(said(store, each) == ["Hello", "Hello"] for each in found)
        assert check(store) == []
    assert is_repeated or begun or history == "old"
