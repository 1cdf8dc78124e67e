# SPDX-License-Identifier: Apache-2.0
"""Rules 18, 19 and 20: pages of messages, changing messages, and forking."""

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    ConflictError,
    DuplicateMessageError,
    MessageNotFoundError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, exactly, ids, texts
from haystack_chat_store.testing.messages import conversation, expected_rounds, sample_messages, user, with_id

OVERWRITE, FAIL = DuplicatePolicy.OVERWRITE, DuplicatePolicy.FAIL


def named(roles: str) -> list[ChatMessage]:
    """Make a conversation whose messages have their places as ids."""
    made = conversation(roles)
    for message in made:
        message.meta[MESSAGE_ID_KEY] = str(message.meta["position"])
    return made


def places(stored: list[Any]) -> list[tuple[int, str]]:
    """Return positions and ids."""
    return [(each.position, each.message.meta[MESSAGE_ID_KEY]) for each in stored]


def revision_of(calls: Calls, store: ClosableStore, chat_history_id: str = "chat") -> int:
    """Return the revision of a history, 0 if it does not exist."""
    info = calls.call(store, "get_chat_history", chat_history_id)
    return 0 if info is None else int(info.revision)


class Rule18PagesTest(ContractTest):
    """Rule 18: any page of a history can be read, by position."""

    def test_pages_are_the_newest_or_before_or_after_a_position(self, store: ClosableStore, calls: Calls) -> None:
        for message in named("a uctta ua ua"):
            calls.write(store, "chat", [message])
        every = [(number, str(number)) for number in range(10)]

        def page(**options: Any) -> list[tuple[int, str]]:
            return places(calls.call(store, "list_messages", "chat", **options))

        assert page() == every
        assert page(limit=3) == every[7:]
        assert page(before=7, limit=3) == every[4:7]
        assert page(before=2) == every[:2]
        assert page(before=0) == []
        assert page(before=99, limit=2) == every[8:]
        assert page(after=3, limit=3) == every[4:7]
        assert page(after=0) == every[1:]
        assert page(after=-1, limit=2) == every[:2]
        assert page(after=9) == page(after=2**40) == []

    def test_messages_come_whole_with_their_times(self, store: ClosableStore, calls: Calls) -> None:
        before = datetime.now(timezone.utc) - timedelta(minutes=1)
        written = [m for m in sample_messages().values() if m.role.value != "system"]
        calls.write(store, "chat", written)
        stored = calls.call(store, "list_messages", "chat")
        assert exactly([each.message for each in stored]) == exactly(calls.retrieve(store, "chat", last_k=1000))
        assert all(before < each.created_at < before + timedelta(minutes=3) for each in stored)
        assert all(each.created_at.utcoffset() == timedelta(0) for each in stored)

    def test_later_messages_have_later_times(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user()])
        time.sleep(0.002)
        calls.write(store, "chat", [user(), user()])
        first, second, third = (each.created_at for each in calls.call(store, "list_messages", "chat"))
        assert first < second <= third

    def test_history_that_does_not_exist_has_no_pages(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.call(store, "list_messages", "chat") == []
        assert calls.iterate(store, "chat") == []

    @pytest.mark.parametrize("count", [1, 499, 500, 501, 1203])
    def test_iteration_walks_through_all(self, store: ClosableStore, calls: Calls, count: int) -> None:
        calls.write(store, "chat", [with_id(str(number)) for number in range(count)])
        calls.write(store, "other", [user()])
        assert places(calls.iterate(store, "chat")) == [(number, str(number)) for number in range(count)]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"limit": 0},
            {"limit": 1001},
            {"before": -1},
            {"after": -2},
            {"after": "1"},
            {"before": True},
            {"before": 1, "after": 1},
        ],
    )
    def test_wrong_arguments_are_refused(self, store: ClosableStore, calls: Calls, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            calls.call(store, "list_messages", "chat", **wrong)

    def test_wrong_id_is_refused_before_iterating(self, store: ClosableStore) -> None:
        with pytest.raises(ValueError, match="chat_history_id"):
            store.iterate_messages("")  # type: ignore[attr-defined]  # not in the protocol
        with pytest.raises(ValueError, match="chat_history_id"):
            store.iterate_messages_async("")  # type: ignore[attr-defined]  # not in the protocol


class Rule19ChangesTest(ContractTest):
    """Rule 19: messages can be replaced and deleted, and a write can state the expected number of messages."""

    def test_overwriting_puts_a_message_in_the_place_of_another(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ucta ua"))
        before = calls.call(store, "list_messages", "chat")
        batch = [with_id("4", "edited"), user("new"), with_id("fresh", "newer")]
        assert calls.write(store, "chat", batch, policy=OVERWRITE) == 3
        after = calls.call(store, "list_messages", "chat")
        assert texts([each.message for each in after[4:]]) == ["edited", "text 5", "new", "newer"]
        assert [each.position for each in after] == list(range(8))
        assert [each.created_at for each in after[:6]] == [each.created_at for each in before]
        assert [each.message for each in after[:4]] == [each.message for each in before[:4]]
        info = calls.call(store, "get_chat_history", "chat")
        assert (info.message_count, info.round_count) == (8, 4)

    def test_overwriting_may_change_who_spoke(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ua ua"))
        changed = ChatMessage.from_assistant("no question", meta={MESSAGE_ID_KEY: "2"})
        assert calls.write(store, "chat", [changed, with_id("1", "a question")], policy=OVERWRITE) == 2
        assert calls.call(store, "get_chat_history", "chat").round_count == 3
        assert ids(calls.retrieve(store, "chat", last_k=2)) == ["1", "2", "3", "4", "5"]
        assert ids(calls.retrieve(store, "chat", last_k=1)) == ["4", "5"]

    def test_of_several_the_last_one_overwrites(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("a", "old")])
        batch = [with_id("b", "b1"), with_id("a", "1"), with_id("b", "b2"), with_id("a", "2")]
        assert calls.write(store, "chat", batch, policy=OVERWRITE) == 2
        assert texts(calls.retrieve(store, "chat")) == ["2", "b2"]

    def test_failing_policy_refuses_the_whole_batch(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", [with_id("a", "old")], policy=FAIL) == 1
        for batch in ([with_id("b"), with_id("a")], [with_id("c"), with_id("c")]):
            with pytest.raises(DuplicateMessageError, match=batch[1].meta[MESSAGE_ID_KEY]) as caught:
                calls.write(store, "chat", batch, policy=FAIL)
            assert isinstance(caught.value, ConflictError)
            assert texts(calls.retrieve(store, "chat")) == ["old"]
        assert calls.write(store, "chat", [with_id("b"), user()], policy=FAIL) == 2

    def test_none_means_skip(self, store: ClosableStore, calls: Calls) -> None:
        for policy, text in ((DuplicatePolicy.NONE, "1"), (DuplicatePolicy.SKIP, "2")):
            calls.write(store, "chat", [with_id("a", text)], policy=policy)
        assert texts(calls.retrieve(store, "chat")) == ["1"]

    @pytest.mark.parametrize("policy", [DuplicatePolicy.SKIP, OVERWRITE, FAIL])
    def test_write_is_refused_where_the_revision_is_another(
        self, store: ClosableStore, calls: Calls, policy: DuplicatePolicy
    ) -> None:
        assert calls.write(store, "chat", [user("1"), user("2")], policy=policy, expected_revision=0) == 2
        revision = revision_of(calls, store)
        for wrong in (0, revision - 1, revision + 1, 2**60):
            for batch in ([user("3")], []):
                with pytest.raises(ChatHistoryChangedError, match=f"revision {revision}, not {min(wrong, 2**53)}"):
                    calls.write(store, "chat", batch, policy=policy, expected_revision=wrong)
        with pytest.raises(ChatHistoryChangedError, match=r"revision 0 \(it does not exist\), not 1 "):
            calls.write(store, "never", [user()], policy=policy, expected_revision=1)
        assert calls.write(store, "chat", [], policy=policy, expected_revision=revision) == 0
        assert calls.write(store, "chat", [user("3")], policy=policy, expected_revision=revision) == 1
        assert texts(calls.retrieve(store, "chat")) == ["1", "2", "3"]
        assert calls.call(store, "get_chat_history", "never") is None

    @pytest.mark.parametrize("policy", [DuplicatePolicy.SKIP, OVERWRITE])
    def test_batch_that_is_stored_already_is_no_conflict_with_itself(
        self, store: ClosableStore, calls: Calls, policy: DuplicatePolicy
    ) -> None:
        batch = [each for each in sample_messages().values() if each.role.value != "system"]
        for number, message in enumerate(batch):
            message.meta[MESSAGE_ID_KEY] = str(number)
        assert calls.write(store, "chat", batch, policy=policy, expected_revision=0) == len(batch)
        calls.write(store, "chat", [with_id("later")])
        before = calls.call(store, "get_chat_history", "chat")
        for expected in (0, before.revision, None):
            assert calls.write(store, "chat", batch, policy=policy, expected_revision=expected) == 0
            assert calls.write(store, "chat", batch[2:4], policy=policy, expected_revision=expected) == 0
        assert calls.call(store, "get_chat_history", "chat") == before
        for others in ([*batch, with_id("new")], [*batch[1:], with_id(batch[0].meta[MESSAGE_ID_KEY], "edited")]):
            with pytest.raises(ChatHistoryChangedError):
                calls.write(store, "chat", others, policy=policy, expected_revision=0)
        assert calls.call(store, "get_chat_history", "chat") == before

    def test_message_with_another_role_is_not_the_same(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("a", "Hi!")])
        other = ChatMessage.from_assistant("Hi!", meta={MESSAGE_ID_KEY: "a"})
        with pytest.raises(ChatHistoryChangedError):
            calls.write(store, "chat", [other], expected_revision=0)
        assert calls.write(store, "chat", [other], policy=OVERWRITE) == 1
        assert calls.call(store, "get_chat_history", "chat").round_count == 0

    def test_revision_grows_with_every_change_of_messages(self, store: ClosableStore, calls: Calls) -> None:

        def rewritten() -> None:
            calls.write(store, "chat", named("ua"), expected_revision=0)

        def deleted() -> None:
            calls.delete(store, "chat")
            rewritten()

        def all_deleted() -> None:
            calls.delete_all(store)
            calls.delete_all(store)  # which finds nothing
            rewritten()

        def erased() -> None:
            calls.call(store, "delete_chat_histories", prefix="ch")
            rewritten()

        def deleted_by_the_other_name() -> None:
            calls.call(store, "delete_chat_history", "chat")
            rewritten()

        def copied_anew() -> None:
            calls.delete(store, "chat")
            calls.write(store, "source", named("ua"))
            calls.call(store, "copy_messages", "source", "chat")

        changes: list[Callable[[], object]] = [
            lambda: calls.write(store, "chat", named("uaua")),
            lambda: calls.write(store, "chat", [with_id("1", "edited")], policy=OVERWRITE),
            lambda: calls.write(store, "chat", [with_id("1", "again"), user()], policy=OVERWRITE),
            lambda: calls.delete(store, "chat", message_ids=["1"]),
            lambda: calls.delete(store, "chat", from_message_id="2"),
            lambda: calls.call(store, "replace_messages", "chat", "0", [user()]),
            deleted,
            all_deleted,
            erased,
            deleted_by_the_other_name,
            copied_anew,
            lambda: calls.delete(store, "chat", from_message_id="0"),
            lambda: calls.write(store, "chat", named("ua")),
        ]
        revisions = [0]
        for change in changes:
            change()
            revisions.append(revision_of(calls, store))
        assert revisions == sorted(set(revisions))

    @pytest.mark.parametrize("unit", ["round", "message"])
    def test_window_comes_with_the_revision_and_the_number_of_rounds(
        self, new_store: StoreFactory, calls: Calls, unit: str
    ) -> None:
        store = new_store(last_k=2, last_k_unit=unit)

        def assert_right(round_count: int) -> None:
            revision = revision_of(calls, store)
            for window in ({}, {"last_k": 0}, {"last_k": 1}, {"last_k": 100}, {"last_k": 1, "window_step": 3}):
                found = calls.call(store, "retrieve_window", "chat", **window)
                assert found.messages == calls.retrieve(store, "chat", **window)
                assert (found.revision, found.round_count) == (revision, round_count)

        assert_right(0)
        for number in range(5):
            calls.write(store, "chat", named("uaua") if number == 0 else conversation("ucta"))
            assert_right(number + 2)
        calls.delete(store, "chat", message_ids=["2"])
        assert_right(5)
        calls.delete(store, "chat", from_message_id="0")  # the history stays, without messages
        assert_right(0)
        calls.delete(store, "chat")
        assert_right(0)
        calls.write(store, "chat", named("a"))
        assert_right(0)

    def test_revision_and_messages_of_a_window_are_of_one_moment(self, new_store: StoreFactory, calls: Calls) -> None:
        """Each write adds one message, and one to the revision. At times, the history does not exist."""
        store = new_store(last_k=None)
        has_ended = threading.Event()

        def write() -> None:
            try:
                for number in range(80):
                    if number % 10 == 0:
                        calls.delete(store, "chat")
                    calls.write(store, "chat", [user(str(revision_of(calls, store)))])
            finally:
                has_ended.set()

        def read() -> None:
            while not has_ended.is_set():
                found = calls.call(store, "retrieve_window", "chat")
                assert len(found.messages) == found.round_count
                if len(found.messages) > 1:
                    assert found.messages[-1].text == str(found.revision - 1)
                assert bool(found.messages) == bool(found.revision)

        in_threads(write, read)

    def test_what_changes_no_message_leaves_the_revision(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        before = revision_of(calls, store)
        calls.write(store, "chat", named("ua"))
        calls.write(store, "chat", named("ua"), policy=OVERWRITE)
        calls.write(store, "chat", [])
        calls.delete(store, "chat", message_ids=["never there"])
        calls.call(store, "update_chat_history", "chat", title="title", meta={"a": 1})
        calls.write(store, "other", named("ua"))
        calls.delete(store, "other")
        assert revision_of(calls, store) == before
        page = calls.call(store, "list_chat_histories")
        assert [info.revision for info in page.items] == [before]

    @pytest.mark.parametrize("options", [{"message_ids": ["1", "2"]}, {"from_message_id": "1"}, {}])
    def test_deletion_is_refused_where_the_revision_is_another(
        self, store: ClosableStore, calls: Calls, options: dict[str, Any]
    ) -> None:
        calls.write(store, "chat", named("uaa"))
        before = calls.call(store, "get_chat_history", "chat")
        for wrong in (0, before.revision + 1):
            with pytest.raises(ChatHistoryChangedError, match=f"revision {before.revision}, not {wrong}"):
                calls.delete(store, "chat", **options, expected_revision=wrong)
        assert calls.call(store, "get_chat_history", "chat") == before
        calls.delete(store, "chat", **options, expected_revision=before.revision)
        assert calls.count(store, "chat") == (1 if options else 0)

    def test_deletion_of_what_is_gone_is_no_conflict(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        before = revision_of(calls, store)
        for _ in range(2):
            calls.delete(store, "chat", message_ids=["1"], expected_revision=before)
        before = revision_of(calls, store)
        for _ in range(2):
            calls.delete(store, "chat", expected_revision=before)
        calls.delete(store, "chat", message_ids=["1"], expected_revision=before)
        with pytest.raises(ChatHistoryChangedError, match="revision 0"):
            calls.delete(store, "chat", from_message_id="1", expected_revision=before)

    def test_empty_write_makes_no_history(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", [], expected_revision=0) == 0
        assert calls.write(store, "chat", [], policy=OVERWRITE) == 0
        assert calls.call(store, "get_chat_history", "chat") is None

    @pytest.mark.parametrize("wrong", [{"policy": "skip"}, {"policy": None}, {"expected_revision": -1}])
    def test_wrong_arguments_are_refused(self, store: ClosableStore, calls: Calls, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            calls.write(store, "chat", [user()], **wrong)
        assert calls.count(store, "chat") == 0

    def test_single_messages_can_be_deleted(self, store: ClosableStore, calls: Calls) -> None:
        written = named("a uctta ua ua")
        calls.write(store, "chat", written)
        calls.delete(store, "chat", message_ids=["1", "4", "8", "never there", "4"])
        left = [message for message in written if message.meta[MESSAGE_ID_KEY] not in ("1", "4", "8")]
        assert calls.count(store, "chat") == 7
        assert calls.call(store, "get_chat_history", "chat").round_count == 1
        for last_k in (1, 2, None):
            assert ids(calls.retrieve(store, "chat", last_k=last_k)) == ids(expected_rounds(left, last_k))
        assert places(calls.call(store, "list_messages", "chat", limit=2)) == [(7, "7"), (9, "9")]
        assert places(calls.call(store, "list_messages", "chat", before=7, limit=2)) == [(5, "5"), (6, "6")]
        assert places(calls.call(store, "list_messages", "chat", after=3, limit=2)) == [(5, "5"), (6, "6")]

    def test_windows_of_messages_skip_what_was_deleted(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(last_k_unit="message")
        calls.write(store, "chat", named("ua udtta ua ua"))
        calls.delete(store, "chat", message_ids=["0", "6", "8", "9"])
        assert ids(calls.retrieve(store, "chat", last_k=2)) == ["7", "10"]
        assert ids(calls.retrieve(store, "chat", last_k=3)) == ["3", "4", "5", "7", "10"]
        assert ids(calls.retrieve(store, "chat", last_k=8)) == ["1", "2", "3", "4", "5", "7", "10"]
        assert ids(calls.retrieve(store, "chat", last_k=2, window_step=4)) == ["3", "4", "5", "7", "10"]

    def test_history_goes_on_after_deletions(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ua"))
        calls.delete(store, "chat", from_message_id="2")
        assert calls.write(store, "chat", [with_id("2", "asked differently")]) == 1
        stored = calls.call(store, "list_messages", "chat")
        assert places(stored) == [(0, "0"), (1, "1"), (4, "2")]
        assert stored[-1].message.text == "asked differently"

    def test_everything_from_a_message_on_can_be_deleted(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ucta ua"))
        calls.delete(store, "chat", from_message_id="4")
        info = calls.call(store, "get_chat_history", "chat")
        assert (info.message_count, info.round_count) == (4, 2)
        assert ids(calls.retrieve(store, "chat")) == ["0", "1", "2", "3"]
        for unknown in ("4", "never there"):
            with pytest.raises(MessageNotFoundError, match=unknown):
                calls.delete(store, "chat", from_message_id=unknown)
        with pytest.raises(MessageNotFoundError):
            calls.delete(store, "no chat", from_message_id="1")
        assert calls.count(store, "chat") == 4

    def test_history_stays_when_its_last_message_goes(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        calls.call(store, "update_chat_history", "chat", title="kept", meta={"a": 1})
        calls.delete(store, "chat", from_message_id="0")
        info = calls.call(store, "get_chat_history", "chat")
        assert (info.message_count, info.round_count, info.title, info.meta) == (0, 0, "kept", {"a": 1})
        assert calls.retrieve(store, "chat") == calls.call(store, "list_messages", "chat") == []
        assert calls.write(store, "chat", [with_id("0")]) == 1
        assert places(calls.call(store, "list_messages", "chat")) == [(2, "0")]
        assert calls.call(store, "get_chat_history", "chat").title == "kept"

    def test_deleting_what_is_not_there_does_nothing(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("a")])
        before = calls.call(store, "get_chat_history", "chat")
        calls.delete(store, "chat", message_ids=[])
        calls.delete(store, "chat", message_ids=["b"])
        calls.delete(store, "no chat", message_ids=["a"])
        assert calls.call(store, "get_chat_history", "chat") == before
        assert calls.call(store, "get_chat_history", "no chat") is None

    @pytest.mark.parametrize(
        "wrong",
        [
            {"message_ids": "a"},
            {"message_ids": [1]},
            {"message_ids": ["a", ""]},
            {"message_ids": 1},
            {"from_message_id": ""},
            {"from_message_id": 1},
            {"message_ids": ["a"], "from_message_id": "a"},
            {"expected_revision": "1", "message_ids": ["a"]},
            {"expected_revision": -1},
        ],
    )
    def test_wrong_deletions_are_refused(self, store: ClosableStore, calls: Calls, wrong: dict[str, Any]) -> None:
        calls.write(store, "chat", [with_id("a")])
        with pytest.raises(ValueError, match=next(iter(wrong))):
            calls.delete(store, "chat", **wrong)
        assert calls.count(store, "chat") == 1

    def test_changes_move_a_history_to_the_front(self, store: ClosableStore, calls: Calls) -> None:
        changes: list[Callable[[], object]] = [
            lambda: calls.write(store, "a", [with_id("1", "edited")], policy=OVERWRITE),
            lambda: calls.delete(store, "a", message_ids=["2"]),
            lambda: calls.delete(store, "a", from_message_id="1"),
        ]
        calls.write(store, "a", named("uaa"))
        for change in changes:
            time.sleep(0.001)
            calls.write(store, "b", [user()])
            time.sleep(0.001)
            change()
            page = calls.call(store, "list_chat_histories")
            assert [info.chat_history_id for info in page.items] == ["a", "b"]


class Rule20ForkingTest(ContractTest):
    """Rule 20: a history, or its first part, can be copied."""

    def test_fork_has_what_was_said_and_goes_its_own_way(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ucta ua"))
        calls.call(store, "update_chat_history", "chat", title="original", meta={"a": 1})
        original = calls.call(store, "list_messages", "chat")
        assert calls.call(store, "copy_messages", "chat", "fork") == 6
        assert calls.call(store, "list_messages", "fork") == original
        info = calls.call(store, "get_chat_history", "fork")
        assert (info.message_count, info.round_count, info.title, info.meta) == (6, 2, None, {})
        calls.write(store, "fork", [user("elsewhere")])
        calls.delete(store, "fork", message_ids=["0"])
        assert calls.call(store, "list_messages", "chat") == original
        assert calls.count(store, "fork") == 6
        assert ids(calls.retrieve(store, "fork", last_k=2))[:2] == ["4", "5"]

    @pytest.mark.parametrize("until", range(6))
    def test_fork_ends_with_the_message_named(self, store: ClosableStore, calls: Calls, until: int) -> None:
        written = named("ucta ua")
        calls.write(store, "chat", written)
        assert calls.call(store, "copy_messages", "chat", "fork", until_message_id=str(until)) == until + 1
        assert ids(calls.retrieve(store, "fork")) == [str(number) for number in range(until + 1)]
        rounds = sum(message.role.value == "user" for message in written[: until + 1])
        assert calls.call(store, "get_chat_history", "fork").round_count == rounds

    def test_fork_of_a_history_with_gaps_has_its_order(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua ua ua"))
        calls.delete(store, "chat", message_ids=["0", "3", "5"])
        assert calls.call(store, "copy_messages", "chat", "fork") == 3
        assert ids(calls.retrieve(store, "fork")) == ["1", "2", "4"]
        assert ids(calls.retrieve(store, "fork", last_k=1)) == ["4"]
        assert places(calls.call(store, "list_messages", "fork")) == [(0, "1"), (1, "2"), (2, "4")]
        calls.write(store, "fork", [with_id("new")])
        assert ids(calls.retrieve(store, "fork", last_k=2)) == ["4", "new"]

    def test_where_there_is_nothing_to_copy_nothing_changes(self, store: ClosableStore, calls: Calls) -> None:
        for name in ("empty", "other"):
            calls.write(store, name, [with_id("1")])
            calls.delete(store, name, from_message_id="1")
        before = calls.call(store, "get_chat_history", "other")
        for target in ("other", "new"):
            assert calls.call(store, "copy_messages", "empty", target) == 0
        assert calls.call(store, "get_chat_history", "other") == before
        assert calls.call(store, "get_chat_history", "new") is None

    def test_fork_of_many_messages_is_whole(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id(str(number)) for number in range(2_500)])
        assert calls.call(store, "copy_messages", "chat", "fork", until_message_id="2300") == 2_301
        assert calls.count(store, "fork") == 2_301
        assert ids(calls.retrieve(store, "fork", last_k=2)) == ["2299", "2300"]

    def test_history_with_messages_is_no_target(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        calls.write(store, "other", [user("theirs")])
        for target in ("other", "chat"):
            with pytest.raises(ChatHistoryExistsError, match=target):
                calls.call(store, "copy_messages", "chat", target)
        assert texts(calls.retrieve(store, "other")) == ["theirs"]
        assert calls.count(store, "chat") == 2

    def test_history_without_messages_is_a_target(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        calls.write(store, "emptied", [with_id("0", "old")])
        calls.call(store, "update_chat_history", "emptied", title="kept")
        calls.delete(store, "emptied", from_message_id="0")
        assert calls.call(store, "copy_messages", "chat", "emptied") == 2
        assert ids(calls.retrieve(store, "emptied")) == ["0", "1"]
        assert calls.call(store, "get_chat_history", "emptied").title == "kept"
        stored = calls.call(store, "list_messages", "emptied")
        assert stored[0].position >= 1  # position 0 must not be used again

    def test_what_is_not_there_cannot_be_copied(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", named("ua"))
        with pytest.raises(ChatHistoryNotFoundError, match="nothing"):
            calls.call(store, "copy_messages", "nothing", "fork")
        with pytest.raises(MessageNotFoundError, match="never there"):
            calls.call(store, "copy_messages", "chat", "fork", until_message_id="never there")
        assert calls.call(store, "get_chat_history", "fork") is None

    @pytest.mark.parametrize("wrong", [("", "fork"), ("chat", ""), ("chat", None), ("chat", "fork", "")])
    def test_wrong_arguments_are_refused(self, store: ClosableStore, calls: Calls, wrong: tuple[Any, ...]) -> None:
        calls.write(store, "chat", [user()])
        options = {"until_message_id": wrong[2]} if wrong[2:] else {}
        with pytest.raises(ValueError, match="_id"):
            calls.call(store, "copy_messages", *wrong[:2], **options)

    def test_fork_stays_in_its_namespace(self, new_store: StoreFactory, calls: Calls) -> None:
        ours, others = new_store(), new_store(namespace="other")
        calls.write(ours, "chat", named("ua"))
        calls.write(others, "fork", [user("theirs")])
        assert calls.call(ours, "copy_messages", "chat", "fork") == 2
        assert texts(calls.retrieve(others, "fork")) == ["theirs"]
        with pytest.raises(ChatHistoryNotFoundError):
            calls.call(others, "copy_messages", "chat", "third")
