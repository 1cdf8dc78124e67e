# SPDX-License-Identifier: Apache-2.0
"""Rules 3 to 6: writes, as far as one thread can check them."""

import copy
import re
import time

import pytest
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import ChatHistoryChangedError, DuplicateMessageError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.contract_isolation import HOSTILE_IDS
from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    ids,
    only_where,
    texts,
)
from haystack_chat_store.testing.messages import TOO_LONG, conversation, positions, sample_messages, user, with_id


class Rule03AtomicBatchesTest(ContractTest):
    """Rule 3: a write is one batch, stored whole or not at all."""

    @pytest.mark.parametrize("place", [0, 1, 700])
    def test_one_message_that_cannot_be_stored_keeps_out_the_whole_batch(
        self, store: ClosableStore, calls: Calls, place: int
    ) -> None:
        calls.write(store, "chat", [user("before")])
        batch = [user(str(number)) for number in range(701)]
        batch[place] = user(bad=TOO_LONG)
        with pytest.raises(ValueError, match=rf"messages\[{place}\]"):
            calls.write(store, "chat", batch)
        assert texts(calls.retrieve(store, "chat", last_k=1000)) == ["before"]
        assert calls.count(store, "chat") == 1

    def test_history_goes_on_after_a_refused_batch(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user("before")])
        with pytest.raises(ValueError, match="messages"):
            calls.write(store, "chat", [with_id("a", "refused"), user(bad=TOO_LONG)])
        assert calls.write(store, "chat", [with_id("a", "after")]) == 1
        assert texts(calls.retrieve(store, "chat")) == ["before", "after"]


class Rule04OrderTest(ContractTest):
    """Rule 4: messages keep the order of the writes."""

    def test_messages_come_back_in_the_order_they_were_written(self, store: ClosableStore, calls: Calls) -> None:
        written = conversation("ucta uadttaua")
        for start in range(0, len(written), 3):
            calls.write(store, "chat", written[start : start + 3])
        assert positions(calls.retrieve(store, "chat")) == list(range(len(written)))

    def test_order_of_ids_does_not_matter(self, store: ClosableStore, calls: Calls) -> None:
        for batch in (["z", "y"], ["b", "a"], ["A", "é"]):
            calls.write(store, "chat", [with_id(message_id) for message_id in batch])
        assert ids(calls.retrieve(store, "chat")) == ["z", "y", "b", "a", "A", "é"]

    def test_clock_does_not_matter(self, store: ClosableStore, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
        for year in range(2070, 1990, -20):
            nanoseconds = (year - 1970) * 31_556_952 * 10**9
            monkeypatch.setattr(time, "time_ns", lambda now=nanoseconds: now)
            monkeypatch.setattr(time, "time", lambda now=nanoseconds: now / 10**9)
            calls.write(store, "chat", [user(f"{year}, first"), user(f"{year}, second")])
        monkeypatch.undo()
        assert texts(calls.retrieve(store, "chat")) == [
            f"{year}, {which}" for year in range(2070, 1990, -20) for which in ("first", "second")
        ]

    def test_histories_written_in_turns_keep_their_own_order(self, store: ClosableStore, calls: Calls) -> None:
        written = conversation("ua" * 6)
        for message in written:
            calls.write(store, f"chat {message.meta['position'] % 3}", [message])
        for number in range(3):
            assert positions(calls.retrieve(store, f"chat {number}")) == list(range(number, 12, 3))


class Rule05MessageIdsTest(ContractTest):
    """Rule 5: every message has an id, and the caller's objects are never changed."""

    def test_messages_without_an_id_get_unique_ones(self, new_store: StoreFactory, calls: Calls) -> None:
        seen: set[str] = set()
        for store in (new_store(), new_store(namespace="other")):
            for chat_history_id in ("a", "b"):
                calls.write(store, chat_history_id, [user("the same"), user("the same")])
                seen.update(ids(calls.retrieve(store, chat_history_id)))
        assert len(seen) == 8
        assert all(isinstance(message_id, str) and message_id for message_id in seen)

    def test_ids_are_not_used_again_after_deleting(self, store: ClosableStore, calls: Calls) -> None:
        seen: set[str] = set()
        for _ in range(3):
            calls.write(store, "chat", [user(), user()])
            seen.update(ids(calls.retrieve(store, "chat")))
            calls.delete(store, "chat")
        assert len(seen) == 6

    def test_id_stays_the_same_at_every_read(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store()
        calls.write(store, "chat", [user()])
        calls.write(store, "chat", [user()])
        assert ids(calls.retrieve(store, "chat")) == ids(calls.retrieve(new_store(), "chat"))
        assert ids(calls.retrieve(store, "chat", last_k=1)) == ids(calls.retrieve(store, "chat"))[1:]

    def test_id_that_a_message_brings_is_kept(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", [with_id(message_id) for message_id in HOSTILE_IDS]) == len(HOSTILE_IDS)
        assert ids(calls.retrieve(store, "chat", last_k=1000)) == HOSTILE_IDS

    def test_none_counts_as_no_id(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", [with_id(None), with_id(None)]) == 2
        first, second = ids(calls.retrieve(store, "chat"))
        assert first
        assert second not in (first, None)

    def test_rest_of_the_meta_is_kept(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user(a=1, b={"c": [2]}), with_id("mine")])
        first, second = calls.retrieve(store, "chat")
        assert first.meta == {"a": 1, "b": {"c": [2]}, MESSAGE_ID_KEY: ids([first])[0]}
        assert second.meta == {MESSAGE_ID_KEY: "mine"}

    def test_what_is_written_is_not_changed(self, store: ClosableStore, calls: Calls) -> None:
        written = [*sample_messages().values(), with_id("mine"), with_id(None), user(odd=(1, {2}), nan=float("inf"))]
        before = copy.deepcopy(written)
        assert calls.write(store, "chat", written) == len(written) - 1  # the system message is skipped
        assert written == before
        assert all(MESSAGE_ID_KEY not in message.meta for message in written[:-3])


class Rule06IdempotentWritesTest(ContractTest):
    """Rule 6: a message whose id the history already has is skipped."""

    def test_id_that_the_history_has_is_skipped(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", [with_id("a", "first"), with_id("b", "second")]) == 2
        assert calls.write(store, "chat", [with_id("b", "again"), with_id("c", "third"), with_id("a", "again")]) == 1
        assert texts(calls.retrieve(store, "chat")) == ["first", "second", "third"]
        assert calls.count(store, "chat") == 3

    def test_batch_that_the_history_has_writes_nothing(self, store: ClosableStore, calls: Calls) -> None:
        batch = [with_id("a"), with_id("b")]
        assert [calls.write(store, "chat", batch) for _ in range(3)] == [2, 0, 0]
        assert calls.count(store, "chat") == 2

    def test_id_twice_in_a_batch_is_written_once(self, store: ClosableStore, calls: Calls) -> None:
        batch = [with_id("a", "first"), with_id("b", "second"), with_id("a", "again"), user("third"), with_id("b")]
        assert calls.write(store, "chat", batch) == 3
        assert texts(calls.retrieve(store, "chat")) == ["first", "second", "third"]

    def test_same_object_twice_without_an_id_is_two_messages(self, store: ClosableStore, calls: Calls) -> None:
        message = user("again")
        assert calls.write(store, "chat", [message, message]) == 2
        assert calls.write(store, "chat", [message]) == 1
        assert calls.count(store, "chat") == 3

    def test_writing_back_a_transcript_and_one_more_stores_one(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", conversation("a ucta ua"))
        for more in range(3):
            transcript = calls.retrieve(store, "chat", last_k=100)
            assert calls.write(store, "chat", [*transcript, user("one more", position=7 + more)]) == 1
        assert positions(calls.retrieve(store, "chat", last_k=100)) == list(range(10))

    def test_same_id_in_two_histories_is_two_messages(self, new_store: StoreFactory, calls: Calls) -> None:
        for store in (new_store(), new_store(namespace="other")):
            for chat_history_id in ("a", "b"):
                assert calls.write(store, chat_history_id, [with_id("1", chat_history_id)]) == 1
                assert texts(calls.retrieve(store, chat_history_id)) == [chat_history_id]

    def test_transcript_can_be_copied_to_another_history(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "original", conversation("uctaua"))
        original = calls.retrieve(store, "original")
        assert calls.write(store, "copy", original) == 6
        assert calls.retrieve(store, "copy") == original == calls.retrieve(store, "original")

    @only_where("takes_policy")
    def test_policy_decides_about_an_id_that_the_history_has(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("a", "old"), with_id("b", "kept")])
        with pytest.raises(DuplicateMessageError):
            calls.write(store, "chat", [with_id("c"), with_id("a", "new")], policy=DuplicatePolicy.FAIL)
        assert texts(calls.retrieve(store, "chat")) == ["old", "kept"]
        batch = [with_id("c", "last"), with_id("a", "new")]
        assert calls.write(store, "chat", batch, policy=DuplicatePolicy.OVERWRITE) == 2
        assert texts(calls.retrieve(store, "chat")) == ["new", "kept", "last"]

    @only_where("takes_policy")
    def test_write_to_a_history_of_another_revision_than_expected_is_refused(
        self, store: ClosableStore, calls: Calls
    ) -> None:
        batch = [with_id("a", "first")]
        assert [calls.write(store, "chat", batch, expected_revision=0) for _ in range(2)] == [1, 0]
        with pytest.raises(ChatHistoryChangedError, match="not 0 as expected") as caught:
            calls.write(store, "chat", [user("refused")], expected_revision=0)
        revision = int(re.findall(r"has revision (\d+)", str(caught.value))[0])
        with pytest.raises(ChatHistoryChangedError, match=f"revision {revision}, not {revision + 1} as expected"):
            calls.write(store, "chat", [user("refused")], expected_revision=revision + 1)
        assert calls.write(store, "chat", [user("second")], expected_revision=revision) == 1
        assert texts(calls.retrieve(store, "chat")) == ["first", "second"]

    def test_skipped_message_leaves_no_gap(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("a", "0")])
        for number in range(1, 4):
            assert calls.write(store, "chat", [with_id("a"), user(str(number)), with_id("a")]) == 1
            assert texts(calls.retrieve(store, "chat", last_k=1)) == [str(number)]
        assert calls.count(store, "chat") == 4
