# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001  (letters that look like others are what this is about)
"""What search means: the terms of texts, the phrases of queries, and what matches what. SQLite's FTS5 agrees."""

import base64
import random
import sqlite3
import sys
from unicodedata import category, normalize

import pytest
from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from haystack_chat_store import search_text
from haystack_chat_store.codec import encode_message
from haystack_chat_store.conversation.provider_content import refusal_of
from haystack_chat_store.search_text import (
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_QUERY_CHARACTERS,
    MAX_QUERY_TERMS,
    MAX_TERM_LENGTH,
    MAX_TERMS,
    Phrase,
    matches,
    parsed_query,
    searchable_text_of_content,
    snippet,
    terms,
)
from haystack_chat_store.testing.kit import number_of_examples
from haystack_chat_store.testing.messages import messages, sample_messages

CALL = ToolCall("weather", {"city": "Rome"}, id="call_1")

# How long an example takes says something about the machine, nothing about the rules.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Few characters of many scripts, so that what is searched for is often there, and whatever else there is.
LETTERS = "abAB15eé\u0301ßıİñœŁΣσςάЁеЙשׁלأاكَـहिन्दकาน้ำ中文東京都がか\u3099カｶﾞー한국ㅎᄒ\u1161ກຂကခខ្មㄅ々〇"
SIGNS = (
    " \n\u3000\u200b\u00ad\u200d\ufe0f\x00'’\"“”«»„「」『』_-*^():&|!<>\\%.,、。…😀👨‍👩‍👧🇩🇪1️⃣½㍿㎏™ﷺ\ud800\U000e0100𠮷"
)
texts = st.text(st.sampled_from(LETTERS * 3 + SIGNS), max_size=20) | st.text(st.characters(exclude_categories=()))


def found(query, text):
    return matches(parsed_query(query), terms(text))


def phrases(*words):
    return [Phrase(tuple(phrase.split()), is_prefix=False) for phrase in words]


# ---------------------------------------------------------------------- what of a message is searched


def searchable_text(message):
    """What is searched of a message, said of the message itself."""

    def texts(parts):
        for part in parts:
            if isinstance(part, TextContent):
                yield part.text
            elif isinstance(part, ToolCallResult):
                yield from [part.result] if isinstance(part.result, str) else texts(part.result)

    said = (*texts(message._content), refusal_of(message) or None)
    return "\n".join(text for text in said if isinstance(text, str))


def test_texts_and_texts_of_tool_results_are_searched():
    image = sample_messages()["image"].images[0]
    user = ChatMessage.from_user(content_parts=["one", image, "two"])
    tool = ChatMessage(
        ChatRole.TOOL,
        [ToolCallResult("22 °C", CALL, False), ToolCallResult([TextContent("a map"), image], CALL, False)],
    )
    assert searchable_text(user) == "one\ntwo"
    assert searchable_text(tool) == "22 °C\na map"


def test_reasoning_calls_names_and_meta_are_not_searched():
    reasoning = ReasoningContent("secret thought")
    message = ChatMessage.from_assistant("Yes.", {"note": "hidden"}, "Ada", [CALL], reasoning=reasoning)
    assert searchable_text(message) == "Yes."


@pytest.mark.parametrize("message", sample_messages().values(), ids=sample_messages())
def test_stored_content_has_the_same_text(message):
    assert searchable_text_of_content(encode_message(message, "id")) == searchable_text(message)


@untimed
@given(messages())
def test_any_stored_content_has_the_same_text(message):
    assert searchable_text_of_content(encode_message(message, "id")) == searchable_text(message)


def test_text_that_is_no_text_is_not_searched():
    content = encode_message(ChatMessage(ChatRole.USER, [TextContent("none"), TextContent("found")]), "id")
    assert searchable_text_of_content(content.replace('"none"', "5")) == "found"


def test_stored_content_with_a_very_long_integer_is_searched():
    message = ChatMessage.from_user("found", meta={"number": 10**4000})
    assert searchable_text_of_content(encode_message(message, "id")) == "found"


@pytest.mark.parametrize(
    "content",
    [
        *[
            "",
            "{",
            "null",
            "[]",
            "5",
            '"text"',
            "{}",
            '{"content": null}',
            '{"content": 5}',
            '{"content": {"text": 1}}',
        ],
        *['{"content": [null]}', '{"content": [5]}', '{"content": [{"text": null}]}', '{"content": ["text"]}'],
        *['{"content": [{"tool_call_result": null}]}', '{"content": [{"tool_call_result": {"result": 5}}]}'],
        '{"content": [{"tool_call_result": {}}]}',
        "[" * 1_000_000,
    ],
    ids=lambda content: content[:60],
)
def test_damaged_content_has_no_text(content):
    assert searchable_text_of_content(content) == ""


# ---------------------------------------------------------------------- terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("The quick brown fox, 42!", "the quick brown fox 42"),
        ("don't e-mail snake_case a.b@c.de", "don t e mail snake case a b c de"),
        ("Straße STRASSE ẞ", "strasse strasse ss"),
        ("ＡＢＣ１ ﬁt x² Ⅷ ① ㎏ ½", "abc1 fit x2 viii 1 kg 1 2"),
        ("Élan e\u0301lan NAÏVE ñandú Łódź smørrebrød Œuvre", "elan elan naive nandu lodz smorrebrod oeuvre"),
        ("İstanbul ISPARTA ısparta", "istanbul isparta isparta"),
        ("ΌΔΟΣ οδός ΐ", "οδοσ οδοσ ι"),
        ("Ёжик ёжик Й", "ежик ежик и"),
        ("كَتَبَ محـمد أب آب", "كتب محمد اب اب"),
        ("שָׁלוֹם", "שלום"),
        ("हिन्दी क़िताब", "हिन्दी क़िताब"),
        ("می\u200cخواهم Do\u00adnau \ufeffbyte", "میخواهم donau byte"),
        ("one\u200btwo", "one two"),
        ("a\x00b c\ud800d", "a b c d"),
        ("Haystack™ №5 25℃ €3", "haystack 5 25 3 ™ № ℃ €"),
        ("😀 👨‍👩‍👧 🇩🇪 1️⃣ 👍🏽", "1 😀 👨 👩 👧 🇩🇪 👍"),
        ("C++ and C# and c, issue #42, ＃４２, 1+1, C++11", "c and c and c issue 42 42 1 1 c 11 c＋＋ c＃ ＃42 1＋"),
        ("#東京 #snake_case a# b", "東京 京 snake case a b ＃東 ＃snake a＃"),
        ("+ # ++ a + b", "a b"),
    ],
)
def test_words_are_folded(text, expected):
    assert terms(text) == normalize("NFC", expected).split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("東京都", "東京 京都 都"),
        ("都", "都"),
        ("東京 大阪", "東京 京 大阪 阪"),
        ("東京、大阪。", "東京 京 大阪 阪"),
        ("iPhone15を買う", "iphone15 を買 買う う"),
        ("買うiPhone", "買う う iphone"),
        ("がｶﾞか\u3099", "がガ ガが が"),
        ("한국어를", "한국 국어 어를 를"),
        ("\u1112\u1161\u11ab국", "한국 국"),
        ("ㅋㅋ", "\u110f\u110f \u110f"),
        ("ขนม", "ขน นม ม"),
        ("น้า", "น้ ้า า"),
        ("ສະບ", "ສະ ະບ ບ"),
        ("မြန", "မြ ြန န"),
        ("ខ្មែ", "ខ្ ្ម មែ ែ"),
        ("㍿", "株式 式会 会社 社"),
        ("⽇本", "日本 本"),
        ("葛\U000e0100城", "葛城 城"),
        ("𠮷野家", "𠮷野 野家 家"),
    ],
)
def test_scripts_without_spaces_become_pairs_and_their_last_character(text, expected):
    assert terms(text) == expected.split()


def test_voiced_kana_are_letters_of_their_own():
    assert terms("かき") != terms("がき")


@untimed
@given(texts)
def test_terms_hold_nothing_but_letters_digits_marks_and_symbols_that_mean_nothing_to_an_engine(text):
    for term in terms(text):
        assert 0 < len(term) <= MAX_TERM_LENGTH
        assert all(character.isalnum() or not character.isascii() for character in term)
        assert all(category(character)[0] in "LNMS" or character == "＃" for character in term)
        assert term.encode()


def test_every_character_is_folded_once_and_for_all():
    for codepoint in range(sys.maxunicode + 1):
        once = search_text._folded(chr(codepoint))
        assert once.translate(search_text._folding_table) == once, hex(codepoint)


@untimed
@given(texts)
def test_canonically_equivalent_texts_have_the_same_terms(text):
    assert terms(normalize("NFC", text)) == terms(normalize("NFD", text))


def test_memory_of_characters_is_not_filled_by_those_that_nobody_writes():
    terms("".join(map(chr, range(0xF0000, 0x110000))))
    assert not any(codepoint >= 0xF0000 for codepoint in search_text._folding_table)


# ---------------------------------------------------------------------- limits


def test_long_words_are_cut_in_text_and_query_alike():
    assert terms("x" * 100 + " y " + "é" * 65) == ["x" * MAX_TERM_LENGTH, "y", "e" * MAX_TERM_LENGTH]
    assert found("x" * 100, "x" * 90)


@pytest.mark.parametrize("text", ["word ", "größe ", "東"])
def test_terms_end_at_their_number(text):
    assert terms(text * 20_000) == terms(text * MAX_TERMS + text)[:MAX_TERMS]
    assert len(terms(text * 20_000)) == MAX_TERMS


@pytest.mark.parametrize("letter", ["x", "ж", "अ", "𐌰"])
def test_terms_end_at_their_bytes(letter):
    all_terms = terms(f"{letter * MAX_TERM_LENGTH} " * 15_300)
    size = sum(len(term.encode()) for term in all_terms)
    assert MAX_BYTES - MAX_TERM_LENGTH * 4 < size <= MAX_BYTES


HUGE = {
    "base64": base64.b64encode(random.Random(1).randbytes(15_000_000)).decode(),
    "one word": "x" * 20_000_000,
    "one word with accents": "é" * 20_000_000,
    "blanks": " " * 20_000_000 + "word",
    "Chinese": "東京都の天気は晴れです。" * 2_000_000,
    "German": "Die schöne Müllerin läuft. " * 1_000_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_huge_texts_give_what_their_beginning_gives(text):
    assert terms(text) == terms(text[:MAX_CHARACTERS])
    assert len(snippet(text, [Phrase((term,), False) for term in terms(text)[-1:]])) <= 162


# ---------------------------------------------------------------------- queries


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Rome  Weather", ["rome", "weather"]),
        ('"the weather" in Rome', ["the weather", "in", "rome"]),
        ("„das Wetter“ “the weather” ”väder i” « le temps » »ja doch«",
         ["das wetter", "the weather", "vader i", "le temps", "ja doch"]),
        ("「the weather」『in it』｢and on｣ ＂so on＂", ["the weather", "in it", "and on", "so on"]),
        ('say "not closed at', ["say", "not closed at"]),
        ('"" “” " " x', ["x"]),
        ("e-mail don't", ["e mail", "don t"]),
        ("東京都 天気", ["東京 京都", "天気"]),
        ('"東京 大阪"', ["東京 京 大阪"]),
        ("iPhone15を買う", ["iphone15 を買 買う"]),
        ("NOT a AND b* OR (c:d)", ["not", "a", "and", "b", "or", "c d"]),
        ("", []),
        ("?! — \x00 \ud800", []),
        ("C++ 😀 #42 a+b", ["c", "c＋＋", "😀", "42", "＃42", "a b"]),
    ],
)  # fmt: skip
def test_query_is_words_and_quoted_phrases(query, expected):
    assert parsed_query(query) == phrases(*expected)


def test_single_character_of_a_script_without_spaces_is_a_prefix():
    assert parsed_query("京") == [Phrase(("京",), is_prefix=True)]
    assert parsed_query("第3回") == [Phrase(("第", "3"), is_prefix=False), Phrase(("回",), is_prefix=True)]
    assert parsed_query('"京 京"') == [Phrase(("京",), is_prefix=False), Phrase(("京",), is_prefix=True)]


@pytest.mark.parametrize("query", ["word " * 100, '"' + "word " * 100, "東" * 100, "é" * 30_000 + "東" * 30_000])
def test_terms_of_a_query_are_limited(query):
    assert sum(len(phrase.terms) for phrase in parsed_query(query)) <= MAX_QUERY_TERMS
    assert found(query, query)


def test_query_is_read_up_to_its_limit():
    assert parsed_query(f"{' ' * (MAX_QUERY_CHARACTERS - 4)}word more") == phrases("word")


# ---------------------------------------------------------------------- matches


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("weather rome", "Rome, and its weather"),
        ('"weather in rome"', "What's the weather in Rome?"),
        ("strasse", "Große Straße"),
        ("ELAN", "l’élan"),
        ("京", "東京都"),
        ("都", "東京都"),
        ("東京都の", "今日の東京都の天気"),
        ("京都", "東京都"),
        ("iphone", "新しいiPhone15を iPhone"),
        ("15を買", "iPhone 15を買う"),
        ("第3回", "これは第3回目です"),
        ("국어", "한국어를"),
        ("ガラス", "ｶﾞﾗｽ"),
        ("x" * 70, "x" * 80),
    ],
)
def test_found(query, text):
    assert found(query, text)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("weather rome", "the weather"),
        ('"rome weather"', "weather in rome, my weather"),
        ("wea", "weather"),
        ("東都", "東京都"),
        ("京大", "東京 大阪"),
        ("か", "が"),
        ("東京都", "東京、京都"),
        ("", "anything"),
        ("?!", "?!"),
    ],
)
def test_not_found(query, text):
    assert not found(query, text)


@untimed
@given(texts, st.integers(0, 20), st.integers(2, 20))
def test_any_part_of_a_run_without_spaces_is_found(text, start, length):
    text = "".join(character for character in text if "\u4e00" <= character <= "\u9fff")
    part = text[start : start + length]
    assert not part or found(part, f"x {text}。")


@untimed
@given(texts)
def test_text_is_found_by_all_of_its_words(text):
    words = [word for word in text.split() if terms(word) and not any(sign in word for sign in '"«»“”„‟「」『』＂｢｣')]
    assert found(" ".join(words), text) == bool(words)


# ---------------------------------------------------------------------- FTS5


@pytest.fixture(scope="module")
def fts5():
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE search USING fts5 (terms, tokenize = 'ascii')")
    yield connection
    connection.close()


def found_by_fts5(connection, query, text):
    expression = " AND ".join(f'"{" ".join(phrase.terms)}"' + " *" * phrase.is_prefix for phrase in parsed_query(query))
    if not expression:
        return False
    connection.execute("DELETE FROM search")
    connection.execute("INSERT INTO search VALUES (?)", [" ".join(terms(text))])
    return connection.execute("SELECT count(*) FROM search (?)", [expression]).fetchone() == (1,)


@settings(untimed, max_examples=number_of_examples(1000))
@given(texts, texts)
@example("a AND b", "b a")
@example('NEAR("a b")', "near a b")
@example("が", "か\u3099き")
@example("京", "東京都")
def test_fts5_agrees_on_any_query_and_text(fts5, query, text):
    assert found_by_fts5(fts5, query, text) == found(query, text)


@settings(untimed, max_examples=number_of_examples(1000))
@given(texts, st.integers(0, 20), st.integers(1, 8), st.sampled_from(["", '"', "“"]))
def test_fts5_agrees_on_any_part_of_a_text(fts5, text, start, length, quote):
    query = quote + text[start : start + length]
    assert found_by_fts5(fts5, query, text) == found(query, text)


@pytest.mark.parametrize("text", ["größe ", "東京", "a "])
def test_fts5_finds_what_is_at_the_limit(fts5, text):
    assert found_by_fts5(fts5, text * 3, text * 20_000)


# ---------------------------------------------------------------------- snippets


def test_snippet_of_a_short_text_is_all_of_it_on_one_line():
    text = "  What's\r\n\tthe weather\u2028in\x00 \x1b[1mRome?\ud800 "
    assert snippet(text, parsed_query("rome")) == "What's the weather in [1mRome?"


def test_snippet_is_cut_at_words_around_the_match():
    text = "one two three four five six seven eight nine ten eleven twelve"
    assert snippet(text, parsed_query("six"), 20) == "…five six seven eight…"
    assert snippet(text, parsed_query("one"), 20) == "one two three four…"
    assert snippet(text, parsed_query("twelve"), 20) == "…ten eleven twelve"


def test_snippet_without_blanks_is_cut_between_characters():
    text = "東京都の天気は晴れです。明日は雨が降るでしょう。"
    assert snippet(text, parsed_query("明日"), 8) == "…す。明日は雨が降…"


def test_snippet_shows_the_first_of_what_matches():
    text = f"alpha {'x ' * 500} beta {'x ' * 500} gamma"
    assert snippet(text, parsed_query("gamma beta"), 20).strip("…x ") == "beta"


def test_snippet_begins_with_a_match_that_is_too_long():
    text = "so: " + "word " * 50
    assert snippet(text, parsed_query(f'"{"word " * 40}"'), 22) == "…word word word word wo…"


def test_snippet_shows_where_something_was_cut():
    text = f"start{' ' * 5000}needle{' ' * 5000}end"
    assert snippet(text, parsed_query("needle")) == "…needle…"
    assert snippet("x" * 50, parsed_query("x" * 50), 20) == "x" * 20 + "…"
    assert snippet(f" {'x' * 20} ", parsed_query("x" * 20), 20) == "x" * 20
    assert snippet("… needle", parsed_query("needle"), 8) == "… needle"


def test_snippet_of_what_is_not_found_is_the_beginning():
    assert snippet("one two three", parsed_query("four"), 8) == "one two…"
    assert snippet("", [], 8) == ""


@pytest.mark.parametrize(
    "filling", ["wort größer ", "東京都の", "a+b/c", "e\u0301\u0302\u0303", "ab\u00ad\u0301-", "ﷺㄱᄒ\u1161カ\u3099"]
)
@pytest.mark.parametrize("count", [0, 1, 7, 999])
def test_snippet_contains_the_match_wherever_it_is(filling, count):
    text = f"{filling * count} Nadel, im 大海 {filling * 500}"
    assert "Nadel, im" in snippet(text, parsed_query("„nadel im“"), 40)
    assert "大海" in snippet(text, parsed_query("大海"), 40)
    assert "大" in snippet(text, parsed_query("大"), 40)


@settings(untimed, max_examples=number_of_examples(500))
@given(st.lists(texts, max_size=8).map(" ".join), st.integers(0, 40), st.integers(1, 6), st.integers(1, 60))
def test_snippet_has_the_terms_of_the_match(text, start, count, length):
    """Not more than the terms, for what has no blanks may be cut within a word, or within what makes one character."""
    text_terms = terms(text)[start : start + count]
    if not text_terms:
        return
    shown = snippet(text, [Phrase(tuple(text_terms), is_prefix=False)], length=500)
    assert matches([Phrase(tuple(text_terms), is_prefix=False)], terms(shown))
    assert len(snippet(text, [Phrase(tuple(text_terms), is_prefix=False)], length).strip("…")) <= length


def test_snippet_has_no_line_breaks_or_control_characters():
    shown = snippet("".join(map(chr, range(0x3000))) + "needle", parsed_query("needle"), 100_000)
    assert not any(category(character) in ("Cc", "Cs", "Zl", "Zp") for character in shown)
