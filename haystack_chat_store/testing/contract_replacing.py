# SPDX-License-Identifier: Apache-2.0
"""Rule 27: the end of a history is replaced in one step."""

import threading
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ConflictError,
    MessageEncodingError,
    MessageNotFoundError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.contract_changes import named, places, revision_of
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, ids, only_where, texts
from haystack_chat_store.testing.messages import TOO_LONG, user, with_id


def answer(message_id: str, text: str = "Hello") -> ChatMessage:
    """Make an assistant message with an id."""
    return ChatMessage.from_assistant(text, meta={MESSAGE_ID_KEY: message_id})


def replace(
    calls: Calls, store: ClosableStore, from_message_id: Any, messages: Any, *, history: Any = "chat", **options: Any
) -> Any:
    """Call `replace_messages`."""
    return calls.call(store, "replace_messages", history, from_message_id, messages, **options)


class Rule27ReplacingTest(ContractTest):
    """Rule 27: a message and all after it are taken back and others appended, in one step."""

    def test_answer_takes_the_place_of_another(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ucta"))
        calls.call(store, "update_chat_history", "chat", title="kept", meta={"a": 1})
        before = calls.call(store, "get_chat_history", "chat")
        assert replace(calls, store, "3", [answer("new", "again"), user("next")]) == 2
        assert ids(calls.retrieve(store, "chat"))[:4] == ["0", "1", "2", "new"]
        assert [place for place, _ in places(calls.call(store, "list_messages", "chat"))] == [0, 1, 2, 6, 7]
        after = calls.call(store, "get_chat_history", "chat")
        assert (after.message_count, after.round_count, after.title, after.meta) == (5, 3, "kept", {"a": 1})
        assert after.revision > before.revision
        assert calls.write(store, "chat", [with_id("last")]) == 1
        assert texts(calls.retrieve(store, "chat", last_k=2)) == ["next", "Hello"]

    def test_ids_that_were_taken_back_can_be_used_again(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ua"))
        assert replace(calls, store, "2", [with_id("2", "asked differently"), answer("3", "so answered")]) == 2
        stored = calls.call(store, "list_messages", "chat")
        assert places(stored) == [(0, "0"), (1, "1"), (4, "2"), (5, "3")]
        assert [each.message.text for each in stored[2:]] == ["asked differently", "so answered"]
        assert replace(calls, store, "0", [answer("3"), with_id("0")]) == 2
        assert places(calls.call(store, "list_messages", "chat")) == [(6, "3"), (7, "0")]
        assert calls.call(store, "get_chat_history", "chat").round_count == 1

    def test_messages_that_the_history_keeps_are_skipped(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ua"))
        batch = [with_id("2", "the question"), answer("new"), answer("new", "twice"), with_id("0")]
        assert replace(calls, store, "3", batch) == 1
        assert ids(calls.retrieve(store, "chat")) == ["0", "1", "2", "new"]
        assert calls.retrieve(store, "chat")[-1].text == "Hello"

    def test_messages_without_ids_get_new_ones(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        mine = [user("one"), user("one")]
        assert replace(calls, store, "1", mine) == 2
        assert len(set(ids(calls.retrieve(store, "chat")))) == 3
        assert all(MESSAGE_ID_KEY not in message.meta for message in mine)

    def test_empty_batch_only_takes_back(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ua"))
        assert replace(calls, store, "2", []) == 0
        assert replace(calls, store, "1", [ChatMessage.from_system("left out")]) == 0
        assert ids(calls.retrieve(store, "chat")) == ["0"]
        with pytest.raises(MessageNotFoundError):
            replace(calls, store, "2", [])

    def test_system_messages_are_kept_where_the_store_keeps_them(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(skip_system_messages=False)
        calls.write(store, "chat", named("ua"))
        assert replace(calls, store, "1", [ChatMessage.from_system("kept")]) == 1
        assert texts(calls.retrieve(store, "chat"))[1] == "kept"

    def test_message_that_is_not_there_cannot_be_replaced(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        before = calls.call(store, "get_chat_history", "chat")
        for batch in ([with_id("new")], [with_id("0", "other text")], []):
            with pytest.raises(MessageNotFoundError, match="never there"):
                replace(calls, store, "never there", batch)
            with pytest.raises(MessageNotFoundError, match="never there"):
                replace(calls, store, "never there", batch, expected_revision=before.revision)
        for options in ({}, {"expected_revision": 0}):
            with pytest.raises(MessageNotFoundError):
                replace(calls, store, "0", [user()], history="no chat", **options)
        assert calls.call(store, "get_chat_history", "chat") == before
        assert calls.call(store, "get_chat_history", "no chat") is None

    def test_history_of_another_revision_than_expected_stays(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        before = calls.call(store, "get_chat_history", "chat")
        for wrong in (0, before.revision + 1):
            for first in ("1", "never there"):
                with pytest.raises(ChatHistoryChangedError, match=f"revision {before.revision}, not {wrong}"):
                    replace(calls, store, first, [user()], expected_revision=wrong)
        with pytest.raises(ChatHistoryChangedError, match=r"revision 0 \(it does not exist\), not 1"):
            replace(calls, store, "1", [user()], history="no chat", expected_revision=1)
        assert calls.call(store, "get_chat_history", "chat") == before
        assert replace(calls, store, "1", [user()], expected_revision=before.revision) == 1

    @pytest.mark.parametrize(
        "batch",
        [
            [answer("new"), with_id("newer")],
            [answer("3", "with the same id")],
            [with_id("2", "kept"), answer("new")],
            [answer("3"), with_id("2", "as it was")],
        ],
        ids=["new ids", "same id", "with the question", "without the id"],
    )
    @pytest.mark.parametrize("expects", [True, False])
    def test_repeated_call_changes_nothing(
        self, store: ClosableStore, calls: Calls, batch: list[ChatMessage], expects: bool
    ) -> None:
        calls.write(store, "chat", [*named("ua"), with_id("2", "kept"), answer("3")])
        options = {"expected_revision": revision_of(calls, store)} if expects else {}
        first = "2" if ids(batch) == ["3", "2"] else "3"
        written = replace(calls, store, first, batch, **options)
        assert written == len(batch) - (ids(batch)[0] == "2")
        before = calls.call(store, "get_chat_history", "chat"), calls.call(store, "list_messages", "chat")
        for _ in range(2):
            assert replace(calls, store, first, batch, **options) == 0
        assert before == (calls.call(store, "get_chat_history", "chat"), calls.call(store, "list_messages", "chat"))

    def test_call_is_not_taken_for_a_repeated_one(self, store: ClosableStore, calls: Calls) -> None:
        written = [with_id("0"), answer("1"), answer("2"), answer("3")]
        calls.write(store, "chat", written)
        assert replace(calls, store, "0", [written[0], written[3]]) == 2  # 1 and 2 are to go
        assert ids(calls.retrieve(store, "chat")) == ["0", "3"]
        assert replace(calls, store, "0", [written[3], written[0]]) == 2  # in another order
        assert ids(calls.retrieve(store, "chat", last_k=2)) == ["3", "0"]
        assert replace(calls, store, "3", [written[3]]) == 1  # 0 is to go
        assert ids(calls.retrieve(store, "chat")) == ["3"]
        assert replace(calls, store, "3", [answer("3", "another text")]) == 1
        assert texts(calls.retrieve(store, "chat")) == ["another text"]

    def test_repeated_call_is_refused_if_others_have_gone_on(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        revision = revision_of(calls, store)
        assert replace(calls, store, "1", [answer("new")], expected_revision=revision) == 1
        calls.write(store, "chat", [with_id("next")])
        with pytest.raises(MessageNotFoundError):
            replace(calls, store, "1", [answer("new")])
        with pytest.raises(ChatHistoryChangedError):
            replace(calls, store, "1", [answer("new")], expected_revision=revision)
        assert ids(calls.retrieve(store, "chat")) == ["0", "new", "next"]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"from_message_id": ""},
            {"from_message_id": None},
            {"from_message_id": 1},
            {"messages": "text"},
            {"messages": ["text"]},
            {"history": ""},
            {"expected_revision": -1},
            {"expected_revision": True},
        ],
    )
    def test_wrong_arguments_are_refused(self, store: ClosableStore, calls: Calls, wrong: dict[str, Any]) -> None:
        calls.write(store, "chat", named("ua"))
        arguments = {"from_message_id": "1", "messages": [user()], **wrong}
        with pytest.raises(ValueError, match="chat_history_id" if "history" in wrong else next(iter(wrong))):
            replace(calls, store, **arguments)
        assert ids(calls.retrieve(store, "chat")) == ["0", "1"]

    def test_message_that_cannot_be_stored_keeps_the_history_as_it_is(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        with pytest.raises(MessageEncodingError, match=r"messages\[1\]"):
            replace(calls, store, "0", [user(), user(bad=TOO_LONG)])
        assert ids(calls.retrieve(store, "chat")) == ["0", "1"]

    def test_long_end_is_replaced_by_a_long_one(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id(str(number)) for number in range(2_500)])
        calls.delete(store, "chat", message_ids=["50", "1200"])
        batch = [answer(f"new {number}") for number in range(2_300)]
        for expected in (2_300, 0):
            assert replace(calls, store, "100", batch) == expected
            info = calls.call(store, "get_chat_history", "chat")
            assert (info.message_count, info.round_count) == (2_399, 99)
        newest = places(calls.call(store, "list_messages", "chat", limit=1))
        assert newest == [(2_500 + 2_299, "new 2299")]
        store_with_engine: Any = store
        assert store_with_engine.engine.run(store_with_engine.engine.check, store_with_engine.scope) == []

    def test_history_stays_in_its_namespace(self, new_store: StoreFactory, calls: Calls) -> None:
        ours, others = new_store(), new_store(namespace="other")
        for store in (ours, others):
            calls.write(store, "chat", named("ua"))
            calls.write(store, "other chat", named("ua"))
        assert replace(calls, ours, "1", [user()]) == 1
        assert ids(calls.retrieve(others, "chat")) == ids(calls.retrieve(ours, "other chat")) == ["0", "1"]

    @only_where("searches")
    def test_search_finds_the_new_and_no_longer_the_old(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(search=True)
        calls.write(store, "chat", [with_id("0", "fox"), answer("1", "quick")])
        assert len(calls.call(store, "search_messages", "quick")) == 1
        replace(calls, store, "1", [answer("1", "brown")])
        assert calls.call(store, "search_messages", "quick") == []
        assert [hit.position for hit in calls.call(store, "search_messages", "brown")] == [2]

    def test_readers_see_the_old_end_or_the_new_one(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(last_k=None)
        calls.write(store, "chat", [with_id("question"), answer("first 0", "0"), answer("second 0", "0")])
        has_ended = threading.Event()

        def write() -> None:
            try:
                for number in range(1, 41):
                    batch = [answer(f"first {number}", str(number)), answer(f"second {number}", str(number))]
                    assert replace(calls, store, f"first {number - 1}", batch) == 2
            finally:
                has_ended.set()

        def read() -> None:
            while not has_ended.is_set():
                _, first, second = texts(calls.retrieve(store, "chat"))
                assert first == second

        in_threads(write, read)
        assert texts(calls.retrieve(store, "chat")) == ["Hello", "40", "40"]

    def test_of_two_that_replace_the_same_answer_one_is_refused(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(last_k=None)
        results: list[Any] = []

        def write(name: str) -> None:
            try:
                results.append(replace(calls, store, "1", [answer(name)], expected_revision=revisions[-1]))
            except ConflictError as error:
                results.append(type(error))

        revisions: list[int] = []
        for number in range(10):
            calls.delete(store, "chat")
            calls.write(store, "chat", named("ua"))
            revisions.append(revision_of(calls, store))
            results.clear()
            in_threads(*(lambda name=name: write(name) for name in (f"a{number}", f"b{number}")))
            assert sorted(results, key=str) == [1, ChatHistoryChangedError]
            assert calls.count(store, "chat") == 2
