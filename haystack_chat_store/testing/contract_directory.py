# SPDX-License-Identifier: Apache-2.0
"""Rules 17 and 22: the directory of histories, and erasing."""

import base64
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from haystack_chat_store.errors import ChatHistoryNotFoundError
from haystack_chat_store.testing.contract_isolation import HOSTILE_IDS
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, texts
from haystack_chat_store.testing.messages import conversation, user, with_id
from haystack_chat_store.types import ChatHistoryPage

_MINUTE = timedelta(minutes=1)


def listed(calls: Calls, store: ClosableStore, **options: Any) -> list[str]:
    """Return the ids of the whole directory, page by page."""
    found: list[str] = []
    cursor = None
    while True:
        page = calls.call(store, "list_chat_histories", cursor=cursor, **options)
        found += [info.chat_history_id for info in page.items]
        cursor = page.cursor
        if cursor is None:
            return found


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(timezone.utc)


class Rule17DirectoryTest(ContractTest):
    """Rule 17: the directory lists histories, the latest change first."""

    def test_history_is_listed_with_its_counts_and_times(self, store: ClosableStore, calls: Calls) -> None:
        before = now()
        calls.write(store, "chat", conversation("a uctta ua"))
        (info,) = calls.call(store, "list_chat_histories").items
        assert info.chat_history_id == "chat"
        assert (info.message_count, info.round_count, info.title, info.meta) == (8, 2, None, {})
        assert before - _MINUTE < info.created_at <= info.updated_at < now() + _MINUTE
        assert info.created_at.utcoffset() == info.updated_at.utcoffset() == timedelta(0)
        assert calls.call(store, "get_chat_history", "chat") == info

    def test_history_that_does_not_exist_is_none(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.call(store, "get_chat_history", "chat") is None
        assert calls.call(store, "list_chat_histories") == ChatHistoryPage(items=[], cursor=None)
        calls.write(store, "chat", [user()])
        calls.delete(store, "chat")
        assert calls.call(store, "get_chat_history", "chat") is None
        assert calls.call(store, "list_chat_histories") == ChatHistoryPage(items=[], cursor=None)

    def test_namespaces_with_histories_are_listed(self, new_store: StoreFactory, calls: Calls) -> None:
        store, *others = (new_store(namespace=name) for name in ("default", "a:b}", "ünder_score", "%2A*", "0"))
        assert calls.call(store, "list_namespaces") == []
        for each in others:
            calls.write(each, "chat", [user()])
            calls.write(each, "other", [user()])
        assert calls.call(store, "list_namespaces") == sorted(("a:b}", "ünder_score", "%2A*", "0"))
        calls.delete_all(others[0])
        calls.delete(others[1], "chat")
        assert calls.call(store, "list_namespaces") == sorted(("ünder_score", "%2A*", "0"))

    def test_the_one_that_changed_last_comes_first(self, store: ClosableStore, calls: Calls) -> None:
        for name in "abcdbac":
            calls.write(store, name, [user()])
            time.sleep(0.002)
        assert listed(calls, store) == ["c", "a", "b", "d"]

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 1000])
    def test_pages_put_together_are_the_whole(self, store: ClosableStore, calls: Calls, limit: int) -> None:
        names = [f"chat {number}" for number in range(7)]
        for name in names:
            calls.write(store, name, [user()])
            time.sleep(0.001)
        assert listed(calls, store, limit=limit) == names[::-1]

    def test_histories_of_one_moment_are_each_listed_once(
        self, store: ClosableStore, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moment = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: moment)  # for engines that use the time of this process
        for name in HOSTILE_IDS:
            calls.write(store, name, [user()])
        monkeypatch.undo()
        assert sorted(listed(calls, store, limit=3)) == sorted(HOSTILE_IDS)

    def test_walk_sees_once_what_is_there_throughout(self, store: ClosableStore, calls: Calls) -> None:
        names = [f"chat {number:02}" for number in range(20)]
        for name in names:
            calls.write(store, name, [user()])
            time.sleep(0.001)
        seen: list[str] = []
        page = calls.call(store, "list_chat_histories", limit=3)
        step = 0
        while True:
            seen += [info.chat_history_id for info in page.items]
            calls.write(store, f"new {step}", [user()])  # comes first
            calls.write(store, seen[step], [user()])  # was listed already, and moves
            if step == 2:
                calls.delete(store, names[0])  # was not listed yet
            step += 1
            if page.cursor is None:
                break
            page = calls.call(store, "list_chat_histories", limit=3, cursor=page.cursor)
        assert seen == names[:0:-1]

    def test_cursor_stays_good_when_its_history_goes(self, store: ClosableStore, calls: Calls) -> None:
        for name in "abcd":
            calls.write(store, name, [user()])
            time.sleep(0.001)
        page = calls.call(store, "list_chat_histories", limit=2)
        calls.delete(store, "c")
        rest = calls.call(store, "list_chat_histories", limit=2, cursor=page.cursor)
        assert [info.chat_history_id for info in rest.items] == ["b", "a"]

    def test_prefix_is_literal_text(self, store: ClosableStore, calls: Calls) -> None:
        names = [
            *HOSTILE_IDS,
            "a/1",
            "a/2",
            "a%",
            "ab",
            "\U0010ffff",
            "\U0010ffff1",
            "a\U0010ffff",
            "\ud7ff1",
            "\ue000",
        ]
        names = list(dict.fromkeys(name for name in names if len(name) <= self.max_id_length))
        for name in names:
            calls.write(store, name, [user()])
        for prefix in [
            "",
            "a",
            "a/",
            "%",
            "_",
            "a%",
            "ch",
            "*",
            "\\",
            "'",
            "\U0010ffff",
            "a\U0010ffff",
            "\ud7ff",
            "é",
            "zz",
        ]:
            expected = {name for name in names if name.startswith(prefix)}
            found = listed(calls, store, prefix=prefix, limit=5)
            assert (set(found), len(found)) == (expected, len(expected)), prefix

    def test_histories_with_a_prefix_come_in_order_too(self, store: ClosableStore, calls: Calls) -> None:
        for number in (3, 1, 4, 2, 3, 0):
            calls.write(store, f"a/{number}", [user()])
            calls.write(store, f"b/{number}", [user()])
            time.sleep(0.001)
        assert listed(calls, store, prefix="a/", limit=2) == ["a/0", "a/3", "a/2", "a/4", "a/1"]

    def test_title_and_meta_can_be_set_one_by_one(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user()])
        before = calls.call(store, "get_chat_history", "chat")
        odd = 'Grüße 👋 "\\ %s \n'
        meta = {"a": [1, 2.5, None, {"": True}], "é\ud800\x00": 2**70}
        assert calls.call(store, "update_chat_history", "chat", title=odd) == replace(before, title=odd)
        assert calls.call(store, "update_chat_history", "chat", meta=meta) == replace(before, title=odd, meta=meta)
        after = calls.call(store, "get_chat_history", "chat")
        assert after == replace(before, title=odd, meta=meta)
        calls.write(store, "chat", [user()])
        after = calls.call(store, "get_chat_history", "chat")
        assert (after.title, after.meta, after.message_count) == (odd, meta, 2)
        calls.call(store, "update_chat_history", "chat", title=None)
        assert calls.call(store, "get_chat_history", "chat") == replace(after, title=None)
        calls.call(store, "update_chat_history", "chat", meta=None)
        assert calls.call(store, "get_chat_history", "chat") == replace(after, title=None, meta={})

    def test_setting_a_title_is_no_change_of_messages(self, store: ClosableStore, calls: Calls) -> None:
        for name in "ab":
            calls.write(store, name, [user()])
            time.sleep(0.001)
        calls.call(store, "update_chat_history", "a", title="first")
        assert listed(calls, store) == ["b", "a"]

    def test_history_that_does_not_exist_gets_no_title(self, store: ClosableStore, calls: Calls) -> None:
        with pytest.raises(ChatHistoryNotFoundError, match="chat"):
            calls.call(store, "update_chat_history", "chat", title="first")
        assert calls.call(store, "get_chat_history", "chat") is None

    def test_title_goes_with_its_history(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user()])
        calls.call(store, "update_chat_history", "chat", title="old", meta={"a": 1})
        calls.delete(store, "chat")
        calls.write(store, "chat", [user()])
        info = calls.call(store, "get_chat_history", "chat")
        assert (info.title, info.meta, info.message_count) == (None, {}, 1)

    @pytest.mark.parametrize(
        "wrong",
        [{"limit": 0}, {"limit": 1001}, {"limit": True}, {"prefix": None}, {"prefix": "a\x00"}, {"prefix": "a" * 513}]
        + [{"cursor": cursor} for cursor in ("", "x", 1, b"", "bnVsbA==", base64.b64encode(b'["1", "a"]').decode())],
    )
    def test_wrong_arguments_are_refused(self, store: ClosableStore, calls: Calls, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            calls.call(store, "list_chat_histories", **wrong)

    @pytest.mark.parametrize(
        "wrong", [{"title": 1}, {"title": "a\x00"}, {"title": "a" * 1001}, {"meta": [1]}, {"meta": {"a": print}}]
    )
    def test_wrong_titles_and_meta_are_refused(self, store: ClosableStore, calls: Calls, wrong: dict[str, Any]) -> None:
        calls.write(store, "chat", [user()])
        before = calls.call(store, "get_chat_history", "chat")
        with pytest.raises(ValueError, match=next(iter(wrong))):
            calls.call(store, "update_chat_history", "chat", **wrong)
        assert calls.call(store, "get_chat_history", "chat") == before

    def test_namespaces_have_directories_of_their_own(self, new_store: StoreFactory, calls: Calls) -> None:
        ours, others = new_store(), new_store(namespace="other")
        calls.write(ours, "chat", [user()])
        calls.write(others, "chat", [user(), user()])
        calls.call(others, "update_chat_history", "chat", title="theirs")
        assert calls.call(ours, "get_chat_history", "chat").title is None
        assert [info.message_count for info in calls.call(ours, "list_chat_histories").items] == [1]
        calls.delete_all(others)
        assert listed(calls, ours) == ["chat"]
        assert listed(calls, others) == []

    def test_statistics_count_what_is_there(self, new_store: StoreFactory, calls: Calls) -> None:
        store, other = new_store(), new_store(namespace="other")
        empty = calls.call(store, "statistics")
        assert (empty.chat_histories, empty.messages, empty.rounds, dict(empty.messages_per_day)) == (0, 0, 0, {})
        days = {now().date()}
        calls.write(store, "a/1", conversation("ucta ua"))
        calls.write(store, "a/2", conversation("ua"))
        calls.write(store, "b/1", conversation("a"))
        calls.write(other, "a/1", conversation("uuu"))
        days.add(now().date())
        found = calls.call(store, "statistics")
        assert (found.chat_histories, found.messages, found.rounds) == (3, 9, 3)
        assert sum(found.messages_per_day.values()) == 9
        assert set(found.messages_per_day) <= days
        assert found.size is None or found.size > 0
        found = calls.call(store, "statistics", prefix="a/")
        assert (found.chat_histories, found.messages, sum(found.messages_per_day.values())) == (2, 8, 8)


class Rule22ErasingTest(ContractTest):
    """Rule 22: a history, all histories of a user, and all old histories can be deleted."""

    def test_one_history_is_deleted_with_all_that_belongs_to_it(self, store: ClosableStore, calls: Calls) -> None:
        for name in ("chat", "chat/2"):
            calls.write(store, name, conversation("ua"))
            calls.call(store, "update_chat_history", name, title=name)
        calls.call(store, "delete_chat_history", "chat")
        assert listed(calls, store) == ["chat/2"]
        assert calls.call(store, "get_chat_history", "chat") is None
        assert calls.retrieve(store, "chat") == []
        calls.call(store, "delete_chat_history", "chat")
        calls.write(store, "chat", [user("again")])
        info = calls.call(store, "get_chat_history", "chat")
        assert (info.message_count, info.title) == (1, None)
        with pytest.raises(ValueError, match="chat_history_id"):
            calls.call(store, "delete_chat_history", "")

    def test_everything_with_a_prefix_is_deleted(self, store: ClosableStore, calls: Calls) -> None:
        for name in ("user_1/a", "user_1/b", "user_10/a", "user_%/a", "User_1/a", "user_1"):
            calls.write(store, name, [user(name)])
        assert calls.call(store, "delete_chat_histories", prefix="user_1/") == 2
        assert sorted(listed(calls, store)) == ["User_1/a", "user_%/a", "user_1", "user_10/a"]
        assert [calls.count(store, name) for name in ("user_1/a", "user_10/a")] == [0, 1]
        assert calls.call(store, "delete_chat_histories", prefix="user_1/") == 0

    def test_more_histories_than_one_step_takes_are_deleted(self, store: ClosableStore, calls: Calls) -> None:
        for number in range(250):
            calls.write(store, f"{'ab'[number % 2]}/{number}", [user()])
        assert calls.call(store, "delete_chat_histories", prefix="a/") == 125
        assert len(listed(calls, store)) == 125
        assert calls.call(store, "purge", older_than=now() + _MINUTE) == 125
        assert listed(calls, store) == []

    @pytest.mark.parametrize("prefix", ["", None, "a\x00"])
    def test_empty_and_wrong_prefixes_are_refused(self, store: ClosableStore, calls: Calls, prefix: Any) -> None:
        calls.write(store, "chat", [user()])
        with pytest.raises(ValueError, match="prefix"):
            calls.call(store, "delete_chat_histories", prefix=prefix)
        assert calls.count(store, "chat") == 1

    def test_what_has_not_changed_for_long_is_deleted(self, store: ClosableStore, calls: Calls) -> None:
        for name in "abc":
            calls.write(store, name, [user()])
            time.sleep(0.002)
        middle = calls.call(store, "get_chat_history", "b").updated_at
        time.sleep(0.002)
        calls.write(store, "a", [user()])
        assert calls.call(store, "purge", older_than=middle) == 0
        assert calls.call(store, "purge", older_than=middle + timedelta(microseconds=1)) == 1
        assert listed(calls, store) == ["a", "c"]
        assert calls.call(store, "purge", older_than=middle.astimezone(timezone(timedelta(hours=5))) - _MINUTE) == 0
        assert calls.call(store, "purge", older_than=now() + _MINUTE) == 2

    @pytest.mark.parametrize("moment", [datetime(2100, 1, 1), "2100-01-01", None])  # noqa: DTZ001  (that is the point)
    def test_time_without_a_time_zone_is_refused(self, store: ClosableStore, calls: Calls, moment: Any) -> None:
        calls.write(store, "chat", [user()])
        with pytest.raises(ValueError, match="older_than"):
            calls.call(store, "purge", older_than=moment)
        assert calls.count(store, "chat") == 1

    def test_other_namespaces_keep_theirs(self, new_store: StoreFactory, calls: Calls) -> None:
        ours, others = new_store(), new_store(namespace="other")
        for store in (ours, others):
            calls.write(store, "a/1", [user()])
            calls.write(store, "b/1", [user()])
        assert calls.call(ours, "delete_chat_histories", prefix="a/") == 1
        assert calls.call(ours, "purge", older_than=now() + _MINUTE) == 1
        assert sorted(listed(calls, others)) == ["a/1", "b/1"]

    def test_histories_begin_anew_after_erasing(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "a/1", [with_id("1", "old")])
        with pytest.raises(ValueError, match="vacuum"):
            calls.call(store, "delete_chat_histories", prefix="a/", vacuum="no")
        assert calls.count(store, "a/1") == 1
        calls.call(store, "delete_chat_histories", prefix="a/", vacuum=True)
        assert calls.write(store, "a/1", [with_id("1", "new")]) == 1
        assert texts(calls.retrieve(store, "a/1")) == ["new"]
