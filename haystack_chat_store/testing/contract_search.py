# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001  (these are letters that look alike)
"""Rule 21: search."""

from pathlib import Path
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.document_stores.types import DuplicatePolicy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.search_text import matches, parsed_query, terms
from haystack_chat_store.testing.contract_isolation import HOSTILE_IDS
from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    number_of_examples,
    only_where,
)
from haystack_chat_store.testing.messages import texts as any_texts
from haystack_chat_store.testing.messages import user, with_id
from haystack_chat_store.transfer import copy_histories, export_histories, import_histories

SAYINGS = {
    "en": "The quick brown fox jumps over the lazy dog.",
    "de": "Straße, Fuß und Grüße: übermütig!",
    "fr": "L'été, déjà vu à Orléans…",
    "tr": "İstanbul'da ılık bir gün",
    "ru": "Съешь ещё этих мягких французских булок",
    "ar": "مرحبا بالعالم",
    "hi": "नमस्ते दुनिया",
    "ja": "東京都で寿司を食べました。iPhone15を買う",
    "zh": "我今天在北京学习中文。",
    "ko": "안녕하세요 세계",
    "th": "สวัสดีชาวโลก",
    "code": "SELECT * FROM chat_messages WHERE id = 'x'; -- NEAR(a b)",
}
FOUND = [
    ("quick fox", {"en"}),
    ("FOX quick", {"en"}),
    ('"quick brown"', {"en"}),
    ('"quick fox"', set()),
    ('"brown fox" lazy', {"en"}),
    ("foxes", set()),
    ("strasse", {"de"}),
    ("GRÜSSE", {"de"}),
    ("grusse", {"de"}),
    ("orleans", {"fr"}),
    ("déjà-vu", {"fr"}),
    ("булок", {"ru"}),
    ("еще", {"ru"}),
    ("مرحبا", {"ar"}),
    ("दुनिया", {"hi"}),
    ("東京", {"ja"}),
    ("京都", {"ja"}),
    ("東都", set()),
    ("寿", {"ja"}),
    ("iphone15", {"ja"}),
    ("中文", {"zh"}),
    ("北京 学习", {"zh"}),
    ("京", {"ja", "zh"}),
    ("세계", {"ko"}),
    ("ชาวโลก", {"th"}),
    ("chat messages", {"code"}),
    ("NEAR", {"code"}),
    ("", set()),
    ("!?… ''", set()),
]
SYMBOLS = {
    "cpp": "Why is C++ so hard? C++11 was fine.",
    "csharp": "And C# too",
    "c": "Plain c, and a + b",
    "issue": "See #42 😀 tomorrow",
    "number": "It is 42 👍🏽 or 420",
    "tag": "#haystack #東京タワー",
}
FOUND_SYMBOLS = [
    ("C++", {"cpp"}),
    ("c++ hard", {"cpp"}),
    ('"is C++ so"', {"cpp"}),
    ("Ｃ＋＋", {"cpp"}),
    ("C++11", {"cpp"}),
    ("c#", {"csharp"}),
    ("C", {"cpp", "csharp", "c"}),
    ("a+b", {"c"}),
    ("#42", {"issue"}),
    ("42", {"issue", "number"}),
    ("😀", {"issue"}),
    ("👍", {"number"}),
    ("👍🏿", {"number"}),
    ("42 😀", {"issue"}),
    ('"42 tomorrow"', {"issue"}),
    ("🎉", set()),
    ("#Haystack", {"tag"}),
    ("#東京", {"tag"}),
    ("+", set()),
]
FOUND_BEGINNINGS = [
    ("kyo", {"en"}),
    ("KYŌ", {"en"}),
    ("in kyo", {"en"}),
    ("kyo in", set()),
    ("ky temple", set()),  # only the last word is a beginning
    ('"in kyo', {"en"}),
    ('"see kyo"', set()),
    ("kyoto", {"en"}),
    ("kyotos", set()),
    ("e-ma", {"en"}),
    ("#4", {"en"}),
    ("東", {"ja"}),
    ("東京", {"ja"}),
    ("京", {"ja"}),
    ("", set()),
]
HOSTILE_QUERIES = [
    *HOSTILE_IDS,
    *('"', '""', '"a', "a AND", "NOT a", "a OR b", "a*", "*", "a NEAR b", "NEAR(a b, 5)", "col:a", "{a} : b", "^a"),
    *("a + b", "-a", "(", ")", "((a)", "a & b", "a | !b", "a <-> b", "a:*", "a:ABC", "\\", "'; DROP TABLE x; --", "%s"),
    *("$1", ":name", "\x00", "a\x00b", "\ud800", "\U0010ffff", "\u202e", "a\nb", " " * 1000, "\"'`", "a\u0301"),
    "@tag:{x}",
]


class Rule21SearchTest(ContractTest):
    """Rule 21: stores made with `search=True` find messages by their words."""

    @pytest.fixture
    def searching(self, new_store: StoreFactory) -> ClosableStore:
        """Return a store made with `search=True`."""
        return new_store(search=True)

    @only_where("searches")
    def test_words_and_phrases_of_any_language_are_found(self, searching: ClosableStore, calls: Calls) -> None:
        for name, text in SAYINGS.items():
            calls.write(searching, name, [with_id("1", text)])
        for query, expected in FOUND:
            assert {hit.chat_history_id for hit in search(calls, searching, query)} == expected, query

    @only_where("searches")
    def test_emoji_and_other_symbols_are_found(self, searching: ClosableStore, calls: Calls) -> None:
        for name, text in SYMBOLS.items():
            calls.write(searching, name, [with_id("1", text)])
        for query, expected in FOUND_SYMBOLS:
            hits = search(calls, searching, query)
            assert {hit.chat_history_id for hit in hits} == expected, query
            assert all(hit.snippet == SYMBOLS[hit.chat_history_id] for hit in hits)

    @only_where("searches")
    def test_last_word_may_be_the_beginning_of_a_word(self, searching: ClosableStore, calls: Calls) -> None:
        calls.write(searching, "en", [with_id("1", "The temples in Kyoto: e-mail about #42")])
        calls.write(searching, "ja", [with_id("1", "東京都")])
        for query, expected in FOUND_BEGINNINGS:
            found = search(calls, searching, query, match_prefix=True)
            assert {hit.chat_history_id for hit in found} == expected, query
        assert search(calls, searching, "kyo") == []
        (hit,) = search(calls, searching, "kyo", match_prefix=True, chat_history_id="en", prefix="e", limit=1)
        assert "Kyoto" in hit.snippet

    @only_where("searches")
    def test_index_can_be_made_before_the_first_search(self, new_store: StoreFactory, calls: Calls) -> None:
        calls.write(new_store(), "chat", [user("a needle"), user("hay")])
        searching, steps = new_store(search=True), []
        calls.call(searching, "index_messages", lambda done, total: steps.append((done, total)))
        assert all(total is None for _, total in steps)
        assert [hit.position for hit in search(calls, searching, "needle")] == [0]
        calls.call(searching, "index_messages")
        with pytest.raises(UnsupportedOperationError):
            calls.call(new_store(), "index_messages")

    @only_where("searches")
    def test_hit_says_where_it_is(self, searching: ClosableStore, calls: Calls) -> None:
        text = f"{'before ' * 100}the needle{' after' * 100}"
        calls.write(searching, "chat", [user(), with_id("mine", text), user()])
        (hit,) = search(calls, searching, "needle")
        assert (hit.chat_history_id, hit.message_id, hit.position, hit.role) == ("chat", "mine", 1, "user")
        assert hit.created_at == calls.call(searching, "list_messages", "chat")[1].created_at
        assert "before the needle after" in hit.snippet
        assert len(hit.snippet) < 300
        assert isinstance(hit.score, float)

    @only_where("searches")
    def test_refusals_are_searched(self, searching: ClosableStore, calls: Calls) -> None:
        refusal = ChatMessage.from_assistant(meta={"refusal": "I cannot help with burglary."})
        calls.write(searching, "chat", [user(refusal="no refusal of burglary"), refusal])
        (hit,) = search(calls, searching, "help burglary")
        assert (hit.position, hit.snippet) == (1, "I cannot help with burglary.")

    @only_where("searches")
    def test_results_of_tools_are_searched(self, searching: ClosableStore, calls: Calls) -> None:
        call = ToolCall("weather", {"city": "Zürich"}, id="1")
        calls.write(
            searching,
            "chat",
            [
                user("And there?", note="metadata"),
                ChatMessage.from_assistant("Let me look.", tool_calls=[call], reasoning="thinking"),
                ChatMessage.from_tool("sunny, 22 degrees", origin=call),
            ],
        )
        found = {query: len(search(calls, searching, query)) for query in ("there", "look", "sunny", "metadata")}
        assert found == {"there": 1, "look": 1, "sunny": 1, "metadata": 0}

    @only_where("searches")
    def test_more_about_it_comes_first(self, searching: ClosableStore, calls: Calls) -> None:
        calls.write(searching, "chat", [user(f"{'filler ' * 200}needle"), user("needle, needle"), user("haystack")])
        hits = search(calls, searching, "needle")
        assert [hit.position for hit in hits] == [1, 0]
        assert hits[0].score > hits[1].score
        assert [hit.position for hit in search(calls, searching, "needle", limit=1)] == [1]

    @only_where("searches")
    def test_titles_are_searched(self, searching: ClosableStore, calls: Calls) -> None:
        for name, title in (("a/1", "A trip to KYŌTO"), ("a/2", "Kyoto"), ("b/1", "東京タワー #42"), ("b/2", "😀 C++")):
            calls.write(searching, name, [with_id("1", "hello")])
            calls.call(searching, "update_chat_history", name, title=title)
        hit, longer = search(calls, searching, "kyoto")
        assert (hit.chat_history_id, hit.message_id, hit.position, hit.role) == ("a/2", None, None, None)
        assert hit.snippet == "Kyoto"
        assert hit.created_at == calls.call(searching, "get_chat_history", "a/2").created_at
        assert (longer.chat_history_id, longer.snippet) == ("a/1", "A trip to KYŌTO")
        assert hit.score > longer.score
        for query, expected in (
            ('"trip to kyoto"', ["a/1"]),
            ('"trip kyoto"', []),
            ("kyo", []),
            ("東京", ["b/1"]),
            ("#42", ["b/1"]),
            ("c++ 😀", ["b/2"]),
            ("c", ["b/2"]),
            ("to hello", []),  # one text has all words, the title or the message
        ):
            assert [hit.chat_history_id for hit in search(calls, searching, query)] == expected, query
        for query, expected in (("kyo", ["a/2", "a/1"]), ("to kyo", ["a/1"]), ('"to kyo', ["a/1"]), ("o kyo", [])):
            found = search(calls, searching, query, match_prefix=True)
            assert [hit.chat_history_id for hit in found] == expected, query
        assert [hit.chat_history_id for hit in search(calls, searching, "kyoto", chat_history_id="a/1")] == ["a/1"]
        assert search(calls, searching, "kyoto", prefix="b/") == []
        assert [hit.chat_history_id for hit in search(calls, searching, "kyoto", limit=1)] == ["a/2"]

    @only_where("searches")
    def test_titles_come_before_messages(self, searching: ClosableStore, calls: Calls) -> None:
        calls.write(searching, "said", [user("a needle in the hay"), user("needle, needle")])
        calls.write(searching, "titled", [user("hay")])
        calls.call(searching, "update_chat_history", "titled", title="A long title about a needle in the hay")
        hits = search(calls, searching, "needle")
        assert [(hit.chat_history_id, hit.position) for hit in hits] == [("titled", None), ("said", 1), ("said", 0)]
        assert hits[0].score > hits[1].score > hits[2].score
        assert search(calls, searching, "needle", limit=2) == hits[:2]

    @only_where("searches")
    def test_titles_are_found_as_they_are_now(self, new_store: StoreFactory, calls: Calls) -> None:
        plain, searching = new_store(), new_store(search=True)
        calls.write(searching, "chat", [user()])
        calls.call(plain, "update_chat_history", "chat", title="needle")  # a store that cannot search sets it
        assert [hit.snippet for hit in search(calls, searching, "needle")] == ["needle"]
        calls.call(plain, "update_chat_history", "chat", meta={"archived": True})
        assert [hit.snippet for hit in search(calls, searching, "needle")] == ["needle"]
        calls.call(searching, "update_chat_history", "chat", title="pin")
        assert search(calls, searching, "needle") == []
        assert [hit.snippet for hit in search(calls, searching, "pin")] == ["pin"]
        calls.call(searching, "update_chat_history", "chat", title=None)
        assert search(calls, searching, "pin") == []
        calls.call(searching, "update_chat_history", "chat", title="needle")
        calls.delete(searching, "chat")
        calls.write(searching, "chat", [user()])
        assert search(calls, searching, "needle") == []

    @only_where("searches")
    def test_titles_of_branches_are_found_if_asked_for(self, searching: ClosableStore, calls: Calls) -> None:
        calls.write(searching, "chat~1", [user()])
        calls.call(searching, "update_chat_history", "chat~1", title="needle", meta={"branch_of": "chat"})
        assert search(calls, searching, "needle") == []
        assert len(search(calls, searching, "needle", branches=True)) == 1
        assert len(search(calls, searching, "needle", chat_history_id="chat~1")) == 1

    @only_where("searches")
    def test_titles_of_other_namespaces_are_not_found(self, new_store: StoreFactory, calls: Calls) -> None:
        stores = [new_store(search=True, namespace=name) for name in ("one", "other")]
        for store in stores:
            calls.write(store, "chat", [user()])
        calls.call(stores[0], "update_chat_history", "chat", title="needle")
        assert [len(search(calls, store, "needle")) for store in stores] == [1, 0]

    @only_where("searches")
    def test_title_of_an_imported_history_is_found(self, new_store: StoreFactory, calls: Calls, tmp_path: Path) -> None:
        source: Any = new_store(namespace="source")
        target: Any = new_store(search=True)
        calls.write(source, "chat", [user()])
        calls.call(source, "update_chat_history", "chat", title="needle")
        export_histories(source, tmp_path / "chats.jsonl")
        import_histories(target, tmp_path / "chats.jsonl")
        calls.call(target, "index_messages")
        assert [hit.snippet for hit in search(calls, target, "needle")] == ["needle"]
        copy: Any = new_store(search=True, namespace="copy")
        copy_histories(source, copy)
        assert [hit.snippet for hit in search(calls, copy, "needle")] == ["needle"]

    @only_where("searches")
    def test_search_in_one_history_or_those_with_a_prefix(self, searching: ClosableStore, calls: Calls) -> None:
        for name in ("a/1", "a/2", "a%", "b/1"):
            calls.write(searching, name, [user("needle"), user("needle")])
        assert places(search(calls, searching, "needle", chat_history_id="a/2")) == [("a/2", 0), ("a/2", 1)]
        assert len(search(calls, searching, "needle", prefix="a/")) == 4
        assert len(search(calls, searching, "needle", prefix="a%")) == 2
        assert len(search(calls, searching, "needle", prefix="a/", chat_history_id="a/1")) == 2
        assert search(calls, searching, "needle", prefix="b/", chat_history_id="a/1") == []
        assert search(calls, searching, "needle", chat_history_id="never there") == []
        assert len(search(calls, searching, "needle", limit=3)) == 3

    @only_where("searches")
    def test_any_text_is_a_query(self, searching: ClosableStore, calls: Calls) -> None:
        calls.write(searching, "chat", [user("nothing that any of these could mean: zzz")])
        for query in HOSTILE_QUERIES:
            assert search(calls, searching, query) == [], repr(query)
            assert len(search(calls, searching, f"{query} zzz"[-1000:])) == (not terms(query)), repr(query)

    @only_where("searches")
    def test_search_finds_what_matches_and_nothing_else(self, searching: ClosableStore, calls: Calls) -> None:
        words = st.sampled_from(
            "fox Fox fóx fo quick brown 東京 東 a b e-mail 22 한국 İ ß ss C++ c# #22 😀 a+b".split()
        )
        phrases = st.lists(words, max_size=6).map(" ".join)
        quoted = st.lists(words, min_size=1, max_size=3).map(lambda some: f'"{" ".join(some)}"')
        written = 0

        @settings(
            max_examples=number_of_examples(40),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @example(said=["fox"], query="fox", match_prefix=False)
        @example(said=["C++ foxes"], query="C++ fo", match_prefix=True)
        @given(
            said=st.lists(phrases | any_texts(), min_size=1, max_size=4),
            query=st.lists(words | quoted | any_texts(), max_size=3).map(" ".join),
            match_prefix=st.booleans(),
        )
        def compare(said: list[str], query: str, match_prefix: bool) -> None:
            nonlocal written
            written += 1
            name = f"chat {written}"
            calls.write(searching, name, [user(text) for text in said])
            wanted = parsed_query(query, match_prefix=match_prefix)
            expected = [n for n, text in enumerate(said) if wanted and matches(wanted, terms(text))]
            hits = search(calls, searching, query, chat_history_id=name, match_prefix=match_prefix)
            assert sorted(hit.position for hit in hits) == expected

        compare()

    @only_where("searches")
    def test_what_is_changed_or_deleted_is_found_no_more(self, searching: ClosableStore, calls: Calls) -> None:
        calls.write(searching, "chat", [with_id(name, f"needle {name}") for name in "abcde"])
        calls.write(searching, "chat", [with_id("a", "pin")], policy=DuplicatePolicy.OVERWRITE)
        assert [hit.message_id for hit in search(calls, searching, "pin")] == ["a"]
        assert found_ids(calls, searching) == {"b", "c", "d", "e"}
        calls.delete(searching, "chat", message_ids=["c"])
        assert found_ids(calls, searching) == {"b", "d", "e"}
        calls.delete(searching, "chat", from_message_id="d")
        assert found_ids(calls, searching) == {"b"}
        calls.write(searching, "chat", [with_id("f", "needle")])
        assert found_ids(calls, searching) == {"b", "f"}
        calls.call(searching, "copy_messages", "chat", "fork")
        assert len(search(calls, searching, "needle")) == 4
        calls.delete(searching, "chat")
        assert {hit.chat_history_id for hit in search(calls, searching, "needle")} == {"fork"}
        calls.call(searching, "delete_chat_histories", prefix="f")
        assert search(calls, searching, "needle") == []
        calls.write(searching, "chat", [user("needle")])
        calls.delete_all(searching)
        assert search(calls, searching, "needle") == []

    @only_where("searches")
    def test_what_was_written_before_is_indexed(self, new_store: StoreFactory, calls: Calls) -> None:
        plain = new_store()
        for number in range(3):
            calls.write(plain, f"chat {number}", [user("needle")] * 1_000 + [user("pin")])
        calls.delete(plain, "chat 0")
        searching = new_store(search=True)
        calls.call(searching, "index_messages")
        assert len(search(calls, searching, "needle", limit=1000, chat_history_id="chat 1")) == 1_000
        assert len(search(calls, searching, "pin")) == 2
        calls.write(plain, "chat 3", [user("pin")])  # this store indexes it, although it cannot search
        calls.delete(plain, "chat 1")
        assert sorted(hit.chat_history_id for hit in search(calls, searching, "pin")) == ["chat 2", "chat 3"]

    @only_where("searches")
    def test_namespaces_never_mix(self, new_store: StoreFactory, calls: Calls) -> None:
        stores = [new_store(search=True, namespace=name) for name in ("one", "other")]
        for store, text in zip(stores, ("needle one", "needle other"), strict=True):
            calls.write(store, "chat", [user(text)])
        for store, text in zip(stores, ("needle one", "needle other"), strict=True):
            assert [hit.snippet for hit in search(calls, store, "needle")] == [text]

    @only_where("searches")
    @pytest.mark.parametrize(
        "wrong",
        [
            {"query": 1},
            {"query": "a" * 1001},
            {"query": "a", "limit": 0},
            {"query": "a", "prefix": None},
            {"query": "a", "match_prefix": 1},
        ],
    )
    def test_wrong_arguments_are_refused(self, searching: ClosableStore, calls: Calls, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            calls.call(searching, "search_messages", **wrong)

    def test_store_made_without_search_says_so(self, new_store: StoreFactory, calls: Calls) -> None:
        with pytest.raises(UnsupportedOperationError, match="search=True"):
            search(calls, new_store(), "needle")


def search(calls: Calls, store: ClosableStore, query: str, **options: Any) -> list[Any]:
    """Call `search_messages`."""
    found: list[Any] = calls.call(store, "search_messages", query, **options)
    return found


def places(hits: list[Any]) -> list[tuple[str, int]]:
    """Return the histories and positions of hits, sorted."""
    return sorted((hit.chat_history_id, hit.position) for hit in hits)


def found_ids(calls: Calls, store: ClosableStore) -> set[str]:
    """Return the ids of the messages with the word "needle"."""
    return {hit.message_id for hit in search(calls, store, "needle")}
