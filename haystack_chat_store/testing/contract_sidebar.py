# SPDX-License-Identifier: Apache-2.0
"""Rule 17, continued: what a list of conversations is made of, and histories that expire."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    MessageNotFoundError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.contract_directory import listed
from haystack_chat_store.testing.contract_users import answer, imported, skip_without
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, ids, message_rows, texts
from haystack_chat_store.testing.messages import user, with_id

# Long enough for a test to write and read within it, in seconds.
_TTL = 2.0
_A_CALL = ToolCall("search", {"query": "x"}, id="1")


def shown(calls: Calls, store: ClosableStore, chat: str = "chat") -> tuple[str | None, str | None, str | None]:
    """Return the preview of a history, and role and text of its last message. Check the time of that."""
    info = calls.call(store, "get_chat_history", chat)
    (in_list,) = [each for each in calls.call(store, "list_chat_histories").items if each.chat_history_id == chat]
    assert in_list == info
    if info.last_message is None:
        return info.preview, None, None
    said = [
        each for each in calls.call(store, "list_messages", chat, limit=1000) if each.message.role.value != "system"
    ]
    assert info.last_message.created_at == said[-1].created_at
    return info.preview, info.last_message.role, info.last_message.text


class Rule17SidebarTest(ContractTest):
    """Rule 17: conversations before their first message, previews, meta, ratings, other ids, and expiry."""

    # ------------------------------------------------------------------ before the first message

    def test_conversation_is_there_before_its_first_message(self, store: ClosableStore, calls: Calls) -> None:
        info = calls.call(store, "create_chat_history", "chat", title="New chat", meta={"model": "small"})
        assert info == calls.call(store, "get_chat_history", "chat")
        assert (info.title, info.meta, info.message_count, info.round_count) == ("New chat", {"model": "small"}, 0, 0)
        assert (info.user_id, info.preview, info.last_message) == (None, None, None)
        assert info.revision >= 1
        assert info.created_at == info.updated_at
        assert listed(calls, store) == ["chat"]
        assert calls.retrieve(store, "chat") == calls.call(store, "list_messages", "chat") == []
        with pytest.raises(ChatHistoryChangedError):
            calls.write(store, "chat", [user()], expected_revision=0)
        assert calls.write(store, "chat", [user("Hi!")], expected_revision=info.revision) == 1
        later = calls.call(store, "get_chat_history", "chat")
        assert (later.title, later.created_at, later.message_count) == ("New chat", info.created_at, 1)

    def test_conversation_is_not_made_twice(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user("Hi!")])
        with pytest.raises(ChatHistoryExistsError):
            calls.call(store, "create_chat_history", "chat", title="x")
        info = calls.call(store, "create_chat_history", "chat", title="x", exist_ok=True)
        assert (info.title, info.message_count) == (None, 1)
        wrong: Any
        for wrong in ({"title": 1}, {"meta": []}, {"exist_ok": "yes"}, {"user_id": ""}):
            with pytest.raises(ValueError):
                calls.call(store, "create_chat_history", "new", **wrong)
        assert listed(calls, store) == ["chat"]

    def test_of_two_that_make_a_conversation_one_succeeds(self, store: ClosableStore) -> None:
        store_: Any = store
        store_.create_chat_history("first")

        def make() -> str:
            try:
                store_.create_chat_history("chat")
            except ChatHistoryExistsError:
                return "exists"
            return "made"

        assert sorted(in_threads(*[make] * 4)) == ["exists", "exists", "exists", "made"]

    def test_history_made_anew_has_greater_revisions(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user()])
        calls.write(store, "chat", [user()])
        before = calls.call(store, "get_chat_history", "chat").revision
        calls.delete(store, "chat")
        assert calls.call(store, "create_chat_history", "chat").revision > before

    # ------------------------------------------------------------------ previews

    def test_preview_is_the_first_question_and_what_was_said_last(self, store: ClosableStore, calls: Calls) -> None:
        skip_without(self, "keeps_previews")
        calls.write(store, "chat", [ChatMessage.from_assistant("Welcome!")])
        assert shown(calls, store) == (None, "assistant", "Welcome!")
        calls.write(store, "chat", [user(" \n"), user("\n How are you?\n"), ChatMessage.from_assistant("Fine.")])
        assert shown(calls, store) == ("How are you?\n", "assistant", "Fine.")
        calls.write(store, "chat", [user("And now?")])
        assert shown(calls, store) == ("How are you?\n", "user", "And now?")

    def test_preview_is_short_and_whole_characters(self, store: ClosableStore, calls: Calls) -> None:
        skip_without(self, "keeps_previews")
        for text in ("é" * 300, "東京" * 150, "\U0001f600" * 250, "a\x00b" + "x" * 300, "\ud800 lone \udfff"):
            calls.delete(store, "chat")
            calls.write(store, "chat", [with_id("q", text), answer("a", text), with_id("z", text)])
            preview, _, last = shown(calls, store)
            assert (
                preview
                == last
                == text[:200].replace("\x00", "\ufffd").replace("\ud800", "\ufffd").replace("\udfff", "\ufffd")
            )
            calls.delete(store, "chat", message_ids=["z"])  # which finds them anew
            assert shown(calls, store) == (preview, "assistant", preview)

    def test_last_message_may_be_a_call_or_the_result_of_a_tool(self, store: ClosableStore, calls: Calls) -> None:
        skip_without(self, "keeps_previews")
        result = ChatMessage.from_tool("42 degrees", _A_CALL, meta={MESSAGE_ID_KEY: "r"})
        calls.write(store, "chat", [ChatMessage.from_assistant(tool_calls=[_A_CALL], meta={MESSAGE_ID_KEY: "c"})])
        assert shown(calls, store) == (None, "assistant", None)
        calls.write(store, "chat", [result, answer("z")])
        calls.delete(store, "chat", message_ids=["z"])
        assert shown(calls, store) == (None, "tool", "42 degrees")
        calls.delete(store, "chat", message_ids=["r"])
        assert shown(calls, store) == (None, "assistant", None)

    def test_system_messages_are_no_last_message(self, new_store: StoreFactory, calls: Calls) -> None:
        skip_without(self, "keeps_previews")
        store = new_store(skip_system_messages=False)
        calls.write(store, "chat", [ChatMessage.from_system("Be kind.", meta={MESSAGE_ID_KEY: "s"})])
        assert shown(calls, store) == (None, None, None)
        calls.write(store, "chat", [with_id("q", "Hi!"), ChatMessage.from_system("Be brief.")])
        assert shown(calls, store) == ("Hi!", "user", "Hi!")
        calls.delete(store, "chat", message_ids=["q"])
        assert shown(calls, store) == (None, None, None)

    _EDITS: dict[str, tuple[Callable[[Calls, Any], Any], tuple[str | None, str | None, str | None]]] = {  # noqa: RUF012
        "delete first": (lambda calls, store: calls.delete(store, "chat", message_ids=["q"]), ("2", "assistant", "B")),
        "delete last": (lambda calls, store: calls.delete(store, "chat", message_ids=["b"]), ("1", "user", "2")),
        "delete all": (
            lambda calls, store: calls.delete(store, "chat", message_ids=["q", "a", "r", "b"]),
            (None, None, None),
        ),
        "rewind": (lambda calls, store: calls.delete(store, "chat", from_message_id="r"), ("1", "assistant", "A")),
        "overwrite first": (
            lambda calls, store: calls.write(store, "chat", [with_id("q", "edited")], policy=DuplicatePolicy.OVERWRITE),
            ("edited", "assistant", "B"),
        ),
        "overwrite last": (
            lambda calls, store: calls.write(store, "chat", [answer("b", "edited")], policy=DuplicatePolicy.OVERWRITE),
            ("1", "assistant", "edited"),
        ),
        "replace": (
            lambda calls, store: calls.call(store, "replace_messages", "chat", "q", [with_id("n", "new")]),
            ("new", "user", "new"),
        ),
        "take back": (
            lambda calls, store: calls.call(store, "replace_messages", "chat", "b", []),
            ("1", "user", "2"),
        ),
        "skip": (
            lambda calls, store: calls.write(store, "chat", [with_id("n", "3"), with_id("q", "x")]),
            ("1", "user", "3"),
        ),
        "remove": (
            lambda calls, store: store.engine.run(
                store.engine.remove, store.scope, "chat", message_rows(store, "chat", [0, 3])
            ),
            ("2", "user", "2"),
        ),
    }

    @pytest.mark.parametrize("edit", _EDITS)
    def test_previews_are_right_after_every_change(self, store: ClosableStore, calls: Calls, edit: str) -> None:
        skip_without(self, "keeps_previews")
        calls.write(store, "chat", [with_id("q", "1"), answer("a", "A"), with_id("r", "2"), answer("b", "B")])
        change, expected = self._EDITS[edit]
        change(calls, store)
        assert shown(calls, store) == expected

    def test_what_has_changed_since_it_was_read_is_not_removed(self, store: ClosableStore, calls: Calls) -> None:
        skip_without(self, "keeps_previews")
        engine: Any = store

        def remove(rows: list[MessageRow]) -> list[int]:
            others: list[int] = engine.engine.run(engine.engine.remove, engine.scope, "chat", rows)
            return others

        calls.write(store, "chat", [with_id("q", "1"), answer("a", "A"), with_id("r", "2"), answer("b", "B")])
        read = message_rows(store, "chat", range(4))
        calls.write(store, "chat", [with_id("r", "2, edited")], policy=DuplicatePolicy.OVERWRITE)
        calls.call(store, "delete_messages", "chat", message_ids=["q"])
        calls.write(store, "chat", [with_id("s", "3")])
        assert remove(read[:3]) == [2]
        assert texts(calls.call(store, "retrieve_messages", "chat", last_k=None)) == ["2, edited", "B", "3"]

        calls.call(store, "delete_messages", "chat")
        assert remove(read) == []
        calls.write(store, "chat", [with_id("q", "1"), with_id("a", "another")])  # begun anew
        assert remove(read) == [0, 1]
        assert texts(calls.call(store, "retrieve_messages", "chat", last_k=None)) == ["1", "another"]

    def test_copies_and_imports_have_previews(self, store: ClosableStore, calls: Calls) -> None:
        skip_without(self, "keeps_previews")
        calls.write(store, "chat", [with_id("q", "1"), answer("a", "A"), with_id("r", "2"), answer("b", "B")])
        calls.call(store, "copy_messages", "chat", "copy", until_message_id="a")
        assert shown(calls, store, "copy") == ("1", "assistant", "A")
        history = HistoryRow(chat_history_id="imported", created_at=5, updated_at=5)
        assert imported(calls, store, history, message_rows(store, "chat", range(3))) == 3
        assert shown(calls, store, "imported") == ("1", "user", "2")

    # ------------------------------------------------------------------ meta

    def test_list_has_only_histories_with_a_meta(self, store: ClosableStore, calls: Calls) -> None:
        metas: dict[str, dict[str, Any]] = {
            "none": {},
            "no": {"archived": False, "number": 1},
            "yes": {"archived": True, "number": 1.0},
            "null": {"archived": None, "number": True, "tags": ["a", {"b": 1}]},
            "zero": {"archived": 0, "number": "1", "tags": ["a", {"b": 1.0}]},
        }
        for name, meta in metas.items():
            calls.call(store, "create_chat_history", name, meta=meta)
            time.sleep(0.001)

        def with_meta(**meta: Any) -> list[str]:
            return listed(calls, store, meta=meta, limit=2)[::-1]

        assert with_meta(archived=False) == ["no"]
        assert with_meta(archived=True) == ["yes"]
        assert with_meta(archived=None) == ["none", "null"]
        assert with_meta(archived=0) == ["zero"]
        assert with_meta(number=1) == ["no", "yes"]
        assert with_meta(number=True) == ["null"]
        assert with_meta(tags=["a", {"b": 1}]) == ["null", "zero"]
        assert with_meta(archived=False, number=1.0) == ["no"]
        assert with_meta() == list(metas)
        assert listed(calls, store, meta={"number": 1}, prefix="y") == ["yes"]
        wrong: Any
        for wrong in ([], "archived", {"a": object()}):
            with pytest.raises(ValueError, match="meta"):
                calls.call(store, "list_chat_histories", meta=wrong)

    def test_page_with_a_meta_is_full_even_if_it_is_rare(self, store: ClosableStore, calls: Calls) -> None:
        for number in range(40):
            calls.call(store, "create_chat_history", f"{number:02}", meta={"rare": number % 10 == 0})
        page = calls.call(store, "list_chat_histories", meta={"rare": True}, limit=3)
        assert len(page.items) == 3
        rest = calls.call(store, "list_chat_histories", meta={"rare": True}, limit=3, cursor=page.cursor)
        assert rest.cursor is None
        assert sorted(info.chat_history_id for info in [*page.items, *rest.items]) == ["00", "10", "20", "30"]

    def test_keys_of_a_meta_are_merged(self, store: ClosableStore, calls: Calls) -> None:
        calls.call(store, "create_chat_history", "chat", meta={"a": 1, "b": {"c": 2}, "n": None})
        before = calls.call(store, "get_chat_history", "chat")
        merged = calls.call(store, "update_chat_history", "chat", merge_meta={"b": {"d": 3}, "a": None, "e": [1.0]})
        assert merged.meta == {"b": {"d": 3}, "n": None, "e": [1.0]}
        assert (merged.revision, merged.updated_at) == (before.revision, before.updated_at)
        assert calls.call(store, "update_chat_history", "chat", merge_meta={}, title="t").meta == merged.meta
        gone = calls.call(store, "update_chat_history", "chat", merge_meta=dict.fromkeys(merged.meta))
        assert gone.meta == {}
        with pytest.raises(ValueError, match="merge_meta"):
            calls.call(store, "update_chat_history", "chat", meta={}, merge_meta={})
        with pytest.raises(ValueError, match="merge_meta"):
            calls.call(store, "update_chat_history", "chat", merge_meta=[])
        with pytest.raises(ChatHistoryNotFoundError):
            calls.call(store, "update_chat_history", "nothing", merge_meta={"a": 1})

    def test_default_title_is_for_a_history_that_has_none(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(search=self.searches)
        for name, title in (("new", None), ("blank", ""), ("titled", "a title")):
            calls.call(store, "create_chat_history", name, title=title, meta={"a": 1})
        before = {name: calls.call(store, "get_chat_history", name) for name in ("new", "blank", "titled")}
        new = calls.call(store, "update_chat_history", "new", default_title="needle", merge_meta={"b": 2})
        assert new == replace(before["new"], title="needle", meta={"a": 1, "b": 2})
        assert calls.call(store, "update_chat_history", "new", default_title="another") == new
        for name in ("blank", "titled"):
            assert calls.call(store, "update_chat_history", name, default_title="needle") == before[name]
        if self.searches:
            assert [hit.chat_history_id for hit in calls.call(store, "search_messages", "needle")] == ["new"]
            assert [hit.chat_history_id for hit in calls.call(store, "search_messages", "title")] == ["titled"]
        calls.call(store, "update_chat_history", "new", title=None)
        assert calls.call(store, "update_chat_history", "new", default_title="").title == ""
        for wrong in ({"title": "x"}, {"title": None}):
            with pytest.raises(ValueError, match="default_title"):
                calls.call(store, "update_chat_history", "new", default_title="needle", **wrong)
        for odd in (1, "\0", "x" * 1_001, "\ud800"):
            with pytest.raises(ValueError, match="default_title"):
                calls.call(store, "update_chat_history", "new", default_title=odd)
        with pytest.raises(ChatHistoryNotFoundError):
            calls.call(store, "update_chat_history", "nothing", default_title="needle")

    def test_of_default_titles_at_the_same_time_one_is_set(self, store: ClosableStore) -> None:
        store_: Any = store
        titles = [f"title {number}" for number in range(8)]
        for round_ in range(5):
            store_.create_chat_history(f"chat {round_}")
            seen: list[str] = []

            def give(title: str, history: str = f"chat {round_}", seen: list[str] = seen) -> Callable[[], None]:
                return lambda: seen.append(store_.update_chat_history(history, default_title=title).title)

            in_threads(*map(give, titles))
            assert seen == [store_.get_chat_history(f"chat {round_}").title] * len(titles)

    def test_write_that_is_repeated_after_a_rating_is_no_conflict(self, store: ClosableStore, calls: Calls) -> None:
        turn = [with_id("q", "question"), with_id("a", "answer")]
        assert calls.write(store, "chat", turn, expected_revision=0) == 2
        calls.call(store, "update_message_meta", "chat", "a", merge={"rating": "up"})
        assert calls.write(store, "chat", turn, expected_revision=0) == 0
        for other in ([*turn, with_id("b")], [with_id("q", "another question")], [with_id("c")]):
            with pytest.raises(ChatHistoryChangedError):
                calls.write(store, "chat", other, expected_revision=0)
        assert calls.retrieve(store, "chat")[1].meta["rating"] == "up"

    @pytest.mark.parametrize("key", ["chat_message_id", "chat_question_id", "chat_shown", "chat_transcript"])
    def test_keys_of_the_store_are_not_merged(self, store: ClosableStore, calls: Calls, key: str) -> None:
        calls.write(store, "chat", [with_id("a")])
        stored = calls.retrieve(store, "chat")
        with pytest.raises(ValueError, match=key):
            calls.call(store, "update_message_meta", "chat", "a", merge={key: None})
        assert calls.retrieve(store, "chat") == stored

    def test_merges_at_the_same_time_lose_nothing(self, store: ClosableStore) -> None:
        store_: Any = store
        store_.create_chat_history("chat")
        store_.write_messages("chat", [with_id("m")])

        def merge(number: int) -> Callable[[], None]:
            def merge_both() -> None:
                store_.update_chat_history("chat", merge_meta={str(number): number})
                store_.update_message_meta("chat", "m", merge={str(number): number})

            return merge_both

        in_threads(*[merge(number) for number in range(6)])
        expected = {str(number): number for number in range(6)}
        assert store_.get_chat_history("chat").meta == expected
        assert store_.retrieve_messages("chat")[0].meta == {MESSAGE_ID_KEY: "m", **expected}

    def test_answer_is_rated_without_being_written_again(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("q", "Hi?"), answer("a", "Hi!", model="m", old=1), with_id("r", "Ok")])
        before = calls.call(store, "get_chat_history", "chat")
        changed = calls.call(store, "update_message_meta", "chat", "a", merge={"rating": 5, "old": None})
        assert changed.position == 1
        assert changed.message == ChatMessage.from_assistant(
            "Hi!", meta={"model": "m", "rating": 5, MESSAGE_ID_KEY: "a"}
        )
        stored = calls.call(store, "list_messages", "chat")
        assert stored[1] == changed
        assert ids([each.message for each in stored]) == ["q", "a", "r"]
        after = calls.call(store, "get_chat_history", "chat")
        assert after.revision > before.revision
        assert (after.updated_at, after.preview, after.last_message) == (
            before.updated_at,
            before.preview,
            before.last_message,
        )
        assert listed(calls, store) == ["chat"]
        for chat, message_id in (("chat", "z"), ("nothing", "a")):
            with pytest.raises(MessageNotFoundError):
                calls.call(store, "update_message_meta", chat, message_id, merge={})
        wrong: Any
        for wrong in ([], None, {MESSAGE_ID_KEY: "b"}, {"a": object()}):
            with pytest.raises(ValueError):
                calls.call(store, "update_message_meta", "chat", "a", merge=wrong)

    # ------------------------------------------------------------------ another id

    def test_history_gets_another_id(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "old", [with_id("q", "1"), answer("a", "A"), with_id("r", "2"), answer("b", "B")])
        calls.delete(store, "old", message_ids=["a"])
        calls.call(store, "update_chat_history", "old", title="Trip", meta={"a": 1})
        before = calls.call(store, "get_chat_history", "old")
        messages = calls.call(store, "list_messages", "old")
        info = calls.call(store, "rename_chat_history", "old", "new")
        assert info == calls.call(store, "get_chat_history", "new")
        assert info.revision > before.revision
        for name in ("message_count", "round_count", "created_at", "updated_at", "title", "meta", "preview"):
            assert getattr(info, name) == getattr(before, name)
        assert info.last_message == before.last_message
        assert calls.call(store, "list_messages", "new") == messages
        assert calls.call(store, "get_chat_history", "old") is None
        assert calls.call(store, "list_messages", "old") == []
        assert listed(calls, store) == ["new"]
        calls.write(store, "new", [user("go on")])
        assert [each.position for each in calls.call(store, "list_messages", "new")] == [0, 2, 3, 4]
        calls.write(store, "old", [user("anew")])
        assert calls.call(store, "get_chat_history", "old").revision > before.revision
        engine: Any = store
        assert engine.engine.run(engine.engine.check, engine.scope) == []

    def test_history_is_renamed_only_to_a_free_id(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "old", [user("1")])
        calls.write(store, "taken", [user("2")])
        with pytest.raises(ChatHistoryExistsError):
            calls.call(store, "rename_chat_history", "old", "taken")
        with pytest.raises(ChatHistoryNotFoundError):
            calls.call(store, "rename_chat_history", "nothing", "new")
        with pytest.raises(ValueError, match="new_id"):
            calls.call(store, "rename_chat_history", "old", "old")
        assert [texts(calls.retrieve(store, each)) for each in ("old", "taken", "new")] == [["1"], ["2"], []]

    def test_renamed_history_is_found_by_its_words(self, new_store: StoreFactory, calls: Calls) -> None:
        if not self.searches:
            pytest.skip("The engine cannot search.")
        store: Any = new_store(search=True)
        store.index_messages()
        calls.write(store, "old", [user("needle")])
        calls.call(store, "rename_chat_history", "old", "new")
        assert [hit.chat_history_id for hit in calls.call(store, "search_messages", "needle")] == ["new"]

    # ------------------------------------------------------------------ numbers

    def test_statistics_sum_the_tokens_of_replies(self, store: ClosableStore, calls: Calls) -> None:
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        calls.write(
            store,
            "a",
            [
                user(usage=usage),  # not a reply
                answer("1", model="small", usage=usage),
                answer("2", model="large", usage={"prompt_tokens": 7, "completion_tokens": 1}),
                answer("3", usage=usage),
                answer("4", model="small", usage={"prompt_tokens": "many", "completion_tokens": None}),
                answer("5", model="small", usage=[1, 2]),
                answer("6", 'meta: {"usage": {"prompt_tokens": 99}}'),
            ],
        )
        calls.write(store, "b", [answer("1", model="small", usage={**usage, "prompt_tokens_details": {"cached": 3}})])
        found = calls.call(store, "statistics")
        sums = {
            model: (each.prompt_tokens, each.completion_tokens, each.total_tokens)
            for model, each in found.usage.items()
        }
        assert sums == {"small": (20, 10, 30), "large": (7, 1, 8), "unknown": (10, 5, 15)}
        assert dict(found.usage_per_day) == {datetime.now(timezone.utc).date(): dict(found.usage)}
        assert dict(calls.call(store, "statistics", prefix="b").usage)["small"].total_tokens == 15

    def test_statistics_do_not_fail_whatever_replies_say(self, store: ClosableStore, calls: Calls) -> None:
        hostile: list[Any] = [
            *("\x00", "\ud800", "\udc00 \ud800", "1", "", 10**400, -(10**400), 2**63, -1, 1.0, 1e300),
            *(True, False, None, [1], {"total_tokens": 5}, [[[{"a": [None]}]]], {"usage": {"model": 1}}),
        ]
        said: list[tuple[str, dict[str, Any]]] = [
            *(("Hi", {"model": each, "usage": {"total_tokens": 1}}) for each in hostile if each != "1"),
            *(("Hi", {"model": "m", "usage": {"total_tokens": each}}) for each in (float("nan"), float("inf"))),
            *(("Hi", {"model": "m", "usage": {"prompt_tokens": each, "total_tokens": each}}) for each in hostile),
            *(("Hi", {"model": "m", "usage": each}) for each in hostile),
            *(("Hi", {"model": "m", "usage": {"\x00": each, "\ud800": 1, "total_tokens": 100}}) for each in hostile),
            *((text, {"model": "m", "usage": {"total_tokens": 1000}}) for text in ("\x00", "\ud800", "\\u0000")),
            ("Hi", {"model": "m", "usage": {"total_tokens": 2**63 - 1}}),
        ]
        replies = [ChatMessage.from_assistant(text, meta=meta) for text, meta in said]
        calls.write(store, "a", replies)
        found = calls.call(store, "statistics")
        totals = {model: each.total_tokens for model, each in found.usage.items()}
        # Of the usages that are a dict, one says how many tokens there were.
        known = 5 + 100 * len(hostile) + 1000 * 3 + 2**63 - 1
        assert totals == {"unknown": len(hostile) - 1, "m": known}
        assert found.messages == len(replies)
        json.dumps(found.to_dict(), allow_nan=False).encode()
        calls.write(
            store, "a", [user("\x00 \ud800"), ChatMessage.from_assistant("\x00 \ud800", meta={"\x00": "\udc00"})]
        )
        info = calls.call(store, "list_chat_histories").items[0]
        assert (info.preview, info.last_message.text) == ("\ufffd \ufffd", "\ufffd \ufffd")

    # ------------------------------------------------------------------ expiry

    def test_what_has_expired_is_not_there_for_any_reader(self, new_store: StoreFactory, calls: Calls) -> None:
        skip_without(self, "keeps_expiry")
        store: Any = new_store(**({"search": True} if self.searches else {}))
        if self.searches:
            store.index_messages()
        short: Any = new_store(ttl=_TTL)
        calls.write(short, "chat", [with_id("q", "needle"), answer("a")])
        calls.call(short, "create_chat_history", "empty")
        calls.write(store, "stays", [with_id("q", "hay")])
        assert sorted(listed(calls, store)) == ["chat", "empty", "stays"]
        assert calls.count(store, "chat") == 2
        time.sleep(_TTL + 0.2)
        assert listed(calls, store) == ["stays"]
        assert calls.retrieve(store, "chat") == calls.retrieve(store, "chat", last_k=1) == []
        assert calls.call(store, "list_messages", "chat") == calls.call(store, "list_messages", "chat", after=-1) == []
        assert (calls.count(store, "chat"), calls.call(store, "get_chat_history", "chat")) == (0, None)
        assert calls.call(store, "statistics").messages == 1
        if self.searches:
            assert calls.call(store, "search_messages", "needle") == []
        with pytest.raises(ChatHistoryNotFoundError):
            calls.call(store, "copy_messages", "chat", "copy")
        with pytest.raises(ChatHistoryNotFoundError):
            calls.call(store, "update_chat_history", "chat", title="x")
        with pytest.raises(MessageNotFoundError):
            calls.delete(store, "chat", from_message_id="q")
        assert calls.write(store, "chat", [with_id("q", "anew")], expected_revision=0) == 1
        assert texts(calls.retrieve(store, "chat")) == ["anew"]
        assert calls.call(store, "create_chat_history", "empty").message_count == 0

    def test_writes_start_the_time_anew(self, new_store: StoreFactory, calls: Calls) -> None:
        skip_without(self, "keeps_expiry")
        short = new_store(ttl=_TTL)
        calls.write(short, "written", [user()])
        calls.write(short, "kept", [user()])
        calls.write(short, "left", [user()])
        time.sleep(_TTL * 0.6)
        calls.write(short, "written", [user()])
        calls.write(new_store(), "kept", [user()])  # a store without a ttl
        time.sleep(_TTL * 0.6)
        assert sorted(listed(calls, short)) == ["kept", "written"]
        time.sleep(_TTL * 0.6)
        assert listed(calls, short) == ["kept"]

    def test_writes_of_what_is_stored_already_do_not_start_the_time_anew(
        self, new_store: StoreFactory, calls: Calls
    ) -> None:
        skip_without(self, "keeps_expiry")
        short, lasting = new_store(ttl=_TTL), new_store()
        policies = (None, DuplicatePolicy.OVERWRITE) if self.takes_policy else (None,)
        messages = [with_id("q"), answer("a")]
        for policy in policies:
            for store, name in ((short, "short"), (short, "repeated"), (lasting, "lasting")):
                calls.write(store, f"{name} {policy}", messages)
        time.sleep(_TTL * 0.6)
        for policy in policies:
            further = {} if policy is None else {"policy": policy}
            for store, name in ((lasting, "short"), (short, "repeated"), (short, "lasting")):
                assert calls.write(store, f"{name} {policy}", messages, **further) == 0
        time.sleep(_TTL * 0.6)
        assert sorted(listed(calls, short)) == sorted(f"lasting {policy}" for policy in policies)

    def test_reads_start_the_time_anew_if_wanted(self, new_store: StoreFactory, calls: Calls) -> None:
        skip_without(self, "keeps_expiry")
        short, reading = new_store(ttl=_TTL), new_store(ttl=_TTL, renew_ttl_on_read=True)
        for name in ("retrieved", "listed", "walked", "left"):
            calls.write(short, name, [user()])
        calls.write(new_store(), "never", [user()])
        time.sleep(_TTL * 0.6)
        calls.retrieve(reading, "retrieved")
        calls.call(reading, "list_messages", "listed")
        calls.iterate(reading, "walked")
        calls.retrieve(reading, "never")
        calls.retrieve(reading, "nothing")
        calls.retrieve(short, "left")
        time.sleep(_TTL * 0.6)
        assert sorted(listed(calls, short)) == ["listed", "never", "retrieved", "walked"]
        with pytest.raises(ValueError, match="ttl"):
            new_store(renew_ttl_on_read=True)
        with pytest.raises(ValueError, match="ttl"):
            new_store(ttl=0)

    def test_purge_deletes_what_has_expired(self, new_store: StoreFactory, calls: Calls) -> None:
        skip_without(self, "keeps_expiry")
        store: Any = new_store()
        calls.write(store, "before", [user()])
        moment = calls.call(store, "get_chat_history", "before").updated_at
        calls.write(new_store(ttl=_TTL), "chat", [user()])
        time.sleep(_TTL + 0.2)
        calls.call(store, "purge", older_than=moment)
        assert listed(calls, store) == ["before"]
        assert store.engine.run(store.engine.check, store.scope) == []
