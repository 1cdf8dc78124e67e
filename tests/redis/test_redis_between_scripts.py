# SPDX-License-Identifier: Apache-2.0
"""What others change between two scripts of one call: no change is lost, and no user sees what is another's."""

import math
import threading
import zlib
from contextlib import closing, suppress
from functools import partial
from itertools import count

import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from redis_stores import LosesAnswers, before_script, neighbours, on_every_engine, on_one_server, said, say
from servers import wait_until

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    ChatMessageStoreError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.redis import RedisChatMessageStore, renaming
from haystack_chat_store.testing.concurrency import in_threads
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


#: Before how many scripts of a call the fast suite makes a change. The full suite makes it before each.
IN_FAST_SUITE = 5


@pytest.fixture
def at_each_script(make_store, is_full, request):
    """Makes a call on one store after another, and each time does something before one of its scripts."""

    def at_each_script(prepare, call, action, history=""):
        """
        Make a change before one script after the other.

        :param history: The history whose keys the scripts use that count, or nothing for all scripts.
        :returns: Each store, and whether the change was made. The last time, it is not.
        """
        stores = (make_store(namespace=f"namespace {number}", ttl=1000) for number in count())
        prepare(store := next(stores))
        with before_script(math.inf, history, None) as scripts:
            call(store)
        step = 1 if is_full else math.ceil(scripts.count / IN_FAST_SUITE)
        first = zlib.crc32(request.node.name.encode()) % step
        for number in count(first, step):
            prepare(store := next(stores))
            change = partial(action, store)
            with before_script(number, history, change) as scripts, suppress(ChatMessageStoreError):
                call(store)
            yield store, scripts.is_done
            if not scripts.is_done:
                assert number > first
                return

    return at_each_script


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
def test_a_change_while_a_history_is_renamed_is_not_lost(make_store, at_each_script, change):
    after = []

    def changed(store):
        if store.get_chat_history("old") is not None:  # otherwise it has its new id already
            CHANGES[change](store)
            after.append([each for each in told(store) if each not in before] or before)

    def rename(store):
        store.for_user("ada").rename_chat_history("old", "new")

    prepare(store := make_store(namespace="before"))
    before = told(store)
    for store, _ in at_each_script(prepare, rename, changed):
        expected = after.pop() if after else before
        assert told(store) in ([expected, []] if change == "deletion" else [expected])
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
@pytest.mark.parametrize("is_changed", [False, True])
def test_what_is_written_to_a_history_that_has_its_new_id_is_not_lost(at_each_script, is_changed):
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

    for store, _ in at_each_script(prepare, rename, change):
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


def left_of(store):
    """The histories that are there, each with the ids of its messages."""
    found = store.list_chat_histories().items
    return {
        info.chat_history_id: [
            message.meta["chat_message_id"] for message in store.retrieve_messages(info.chat_history_id, 1000)
        ]
        for info in found
    }


@on_every_engine
@pytest.mark.parametrize("messages", [["a", "b"], []], ids=["with messages", "empty"])
def test_a_renaming_that_takes_too_long_gives_way_to_another(at_each_script, monkeypatch, messages):
    """Before one of its scripts, another client renames the history to another id."""
    monkeypatch.setattr(renaming, "_CLAIM_MILLISECONDS", 0)

    def prepare_history(store):
        succeeded.clear()
        store.create_chat_history("old", user_id="ada")
        store.write_messages("old", list(map(with_id, messages)))

    def rename(store, new_id):
        try:
            store.rename_chat_history("old", new_id)
        except ChatHistoryNotFoundError:
            return
        succeeded.append(new_id)

    succeeded = []
    for store, _ in at_each_script(
        prepare_history, lambda store: rename(store, "new"), lambda store: rename(store, "other")
    ):
        assert left_of(store) == dict.fromkeys(succeeded, messages)
        assert len(succeeded) == 1
        assert check(store) == []


@on_every_engine
def test_a_renaming_to_another_id_goes_on_from_one_that_was_cut_off(at_each_script, monkeypatch):
    monkeypatch.setattr(renaming, "_CLAIM_MILLISECONDS", 0)

    def cut_off(_):
        raise StoreUnavailableError("The process has ended.")

    for store, _ in at_each_script(prepare, lambda store: store.rename_chat_history("old", "new"), cut_off):
        store.write_messages("old" if "old" in left_of(store) else "new", [with_id("c")])
        with suppress(ChatHistoryNotFoundError):
            store.rename_chat_history("old", "other")
        ((found, messages),) = left_of(store).items()
        assert (found in {"new", "other"}, messages) == (True, ["a", "b", "c"])
        if found == "new":  # its old id was gone, and only the note of that is left
            check(store, repair=True)
        assert check(store) == []


@on_every_engine
def test_of_several_renamings_of_one_history_one_succeeds_and_no_write_is_lost(store):
    for number in range(8):
        old, new_ids = f"old {number}", [f"new {number} {index}" for index in range(3)]
        succeeded, written, start = [], ["0"], threading.Barrier(4)
        store.write_messages(old, [with_id("0")])

        def rename(new_id, old=old, succeeded=succeeded, start=start):
            start.wait()
            with suppress(ChatHistoryNotFoundError):
                store.rename_chat_history(old, new_id)
                succeeded.append(new_id)

        def write(old=old, written=written, start=start):
            start.wait()
            with suppress(ChatHistoryChangedError):  # it has its new id
                for revision in range(1, 20):
                    store.write_messages(old, [with_id(str(revision))], expected_revision=revision)
                    written.append(str(revision))

        in_threads(*(partial(rename, new_id) for new_id in new_ids), write)
        assert len(succeeded) == 1
        found = left_of(store)
        assert {each: found[each] for each in found.keys() & {old, *new_ids}} == {succeeded[0]: written}
    assert check(store) == []


@on_every_engine
def test_a_copy_has_only_what_its_user_may_see(at_each_script):
    def hand_over(store):
        store.update_chat_history("old", user_id="bob")
        store.for_user("bob").write_messages("old", [with_id("of bob")])

    def copy(store):
        store.copy_messages("old", "copy")

    for store, _ in at_each_script(prepare, copy, hand_over):
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
def test_statistics_of_a_user_have_nothing_of_a_history_that_is_handed_over_meanwhile(at_each_script):
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
    for _, was_handed_over in at_each_script(prepare_two, count_all, hand_over, "old"):
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
def test_a_branch_that_is_made_goes_where_its_history_goes_meanwhile(at_each_script, change):
    def go(store):
        listed.append([info.chat_history_id for info in store.list_chat_histories().items])
        if change == "renaming":
            store.rename_chat_history("old", "new")
        else:
            CHANGES[change](store)

    def make_branch(store):
        store.copy_messages("old", "old~1", meta=BRANCH)

    listed = []
    for store, _ in at_each_script(prepare, make_branch, go):
        history, left = store.get_chat_history("old"), branches_of_old(store)
        users = set() if history is None else {history.user_id}
        assert {info.user_id for info in left.values()} <= users
        if change == "renaming":
            of_new = [info for info in store.list_chat_histories(branches=True).items if info.meta]
            assert {info.meta["branch_of"] for info in of_new} <= {"new" if history is None else "old"}
        assert store.engine.run(store.engine.check, store.scope) == []
    assert listed == [["old"]] * len(listed)  # a branch is never seen as a history of its own


@on_every_engine
def test_a_history_takes_the_branches_along_that_are_made_while_it_is_handed_over(at_each_script):
    for store, _ in at_each_script(
        prepare,
        lambda store: store.update_chat_history("old", user_id="bob"),
        lambda store: store.copy_messages("old", "old~1", meta=BRANCH),
    ):
        assert {info.user_id for info in store.list_chat_histories(branches=True).items} == {"bob"}


def family(store):
    prepare(store)
    store.copy_messages("old", "old~1", meta=BRANCH)


@on_every_engine
def test_the_meta_of_a_branch_that_is_changed_while_its_history_is_renamed_is_kept(at_each_script):
    def change(store):
        for branch, info in branches_of_old(store).items():
            store.update_chat_history(branch, meta={**info.meta, "mine": 1})
            changed.append(branch)

    changed = []
    for store, _ in at_each_script(family, lambda store: store.rename_chat_history("old", "new"), change):
        (branch,) = (info for info in store.list_chat_histories(branches=True).items if info.meta)
        assert branch.meta == {"branch_of": "new", **({"mine": 1} if changed else {})}
        changed.clear()


@on_every_engine
def test_a_history_that_is_deleted_while_it_is_renamed_leaves_no_branch(at_each_script):
    def delete(store):
        for each in ("old", "new"):
            store.delete_chat_history(each)

    for store, is_deleted in at_each_script(family, lambda store: store.rename_chat_history("old", "new"), delete):
        left = {info.chat_history_id for info in store.list_chat_histories(branches=True).items}
        assert left == (set() if is_deleted else {"new", "new~1"})


@on_every_engine
@pytest.mark.parametrize("is_repeated", [True, False])
@pytest.mark.parametrize("history", ["old", "old~1", "old~1~2"])
def test_a_renaming_that_was_cut_off_is_finished_by_the_same_call_or_by_a_repair(at_each_script, history, is_repeated):
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
    for store, _ in at_each_script(prepare_family, rename, cut_off, history):
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


@on_every_engine
@pytest.mark.parametrize("history", ["old", "old~1"])
def test_a_history_that_is_deleted_after_its_renaming_was_cut_off_leaves_no_branch(at_each_script, history):
    def prepare_family(store):
        family(store)
        store.copy_messages("old~1", "old~1~2", meta={"branch_of": "old~1"})

    def cut_off(_):
        raise StoreUnavailableError("The process has ended.")

    for store, _ in at_each_script(
        prepare_family, lambda store: store.rename_chat_history("old", "new"), cut_off, history
    ):
        for each in ("old", "new"):
            store.delete_chat_history(each)
        assert store.list_chat_histories(branches=True).items == []


@on_every_engine
def test_a_history_whose_renaming_was_cut_off_takes_all_branches_along_to_a_further_id(at_each_script, monkeypatch):
    monkeypatch.setattr(renaming, "_CLAIM_MILLISECONDS", 0)

    def cut_off(_):
        raise StoreUnavailableError("The process has ended.")

    for store, _ in at_each_script(family, lambda store: store.rename_chat_history("old", "new"), cut_off):
        for each in ("old", "new"):
            with suppress(ChatHistoryNotFoundError):
                store.rename_chat_history(each, "newest")
        found = {info.chat_history_id: info.meta for info in store.list_chat_histories(branches=True).items}
        assert found == {"newest": {}, "newest~1": {"branch_of": "newest"}}
        assert check(store) == []


@on_every_engine
@pytest.mark.parametrize("history", ["old", "old~1"])
def test_a_check_takes_no_deletion_for_a_fault(at_each_script, history):
    def delete(store):
        store.delete_chat_history("old")
        say(store, "another", history="old")

    faults = []
    for store, _ in at_each_script(family, lambda store: faults.extend(check(store)), delete, history):
        assert faults == []
        assert check(store) == []
