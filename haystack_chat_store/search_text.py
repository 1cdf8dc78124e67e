# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001, RUF002  (this module is about letters that look alike)
"""
The rules of search, the same on every engine: which terms a text has, and which texts a query matches.

Engines only store terms and intersect them. The terms of a text are its folded words:

| in a text | in its terms |
|---|---|
| `Straße`, `ＡＢＣ`, `ﬁt`, `x²` | `strasse`, `abc`, `fit`, `x2`: compatibility forms (NFKC) and case are the same |
| `Élan`, `Łódź`, `Ёж`, `שָׁלוֹם`, `كَتَبَ` | `elan`, `lodz`, `еж`, `שלום`, `كتب`: accents and vowel points are left out |
| `が`, `हिन्दी`, `น้ำ` | the same: marks that make a different letter, vowel signs and tones stay |
| `don't`, `e-mail`, `snake_case` | `don` `t`, `e` `mail`, `snake` `case`: only letters, digits and their marks |
| `東京都` | `東京` `京都` `都`: text without spaces, and Hangul, becomes overlapping pairs and the last character |
| `iPhone15を買う` | `iphone15` `を買` `買う` `う`: a word ends where a script without spaces begins |
| `C++`, `#42` | also `c＋＋`, `＃42`: a word with the `+` or `#` that it touches |
| `😀`, `→`, `€` | `😀`, `→`, `€` |
| a soft hyphen, a joiner, a variation selector, a skin tone | nothing |

A term contains no character that is an operator in an engine's query syntax. In a script without spaces, a sequence of
characters is found as a sequence of pairs, and a single character is found as the beginning of a term. The terms of
symbols come after all words, so that a phrase is found across a symbol.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple
from unicodedata import category, combining, name, normalize

from haystack_chat_store.conversation.provider_content import refusal_in
from haystack_chat_store.json_values import parse_json

#: The largest number of terms of a message. Further terms are not indexed. PostgreSQL keeps positions up to 16,383.
MAX_TERMS = 16_000

#: The largest size of all terms of a message, in bytes of UTF-8. A tsvector holds 1 MB, positions included.
MAX_BYTES = 900_000

#: The largest number of characters of a message that are split into terms.
MAX_CHARACTERS = 1_000_000

#: The largest length of a term, in characters. Longer terms are cut, in texts and in queries.
MAX_TERM_LENGTH = 64

#: The largest number of terms of a query. Further terms are ignored.
MAX_QUERY_TERMS = 64

#: The largest number of characters of a query that are split into terms.
MAX_QUERY_CHARACTERS = 10_000

_MAX_UTF8_BYTES_PER_CHARACTER = 4

# Scripts without spaces, after folding: Thai, Lao, Myanmar, Hangul, Khmer, kana and bopomofo, Han, and supplements.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3031-\u3035\u303b\u3041-\u318f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\ua9e0-\ua9ff\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff"
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_unspaced_character = re.compile(f"[{_UNSPACED}]")
_run = re.compile(rf"([{_UNSPACED}]+)|[^{_UNSPACED}\s]+")

# Symbols that stand for several characters, or for another character, such as ㍿, ㎏ and, in text from PDFs, ⽇.
_written_out = re.compile("[\u2e80-\u2fdf\u3200-\u33ff]")

# Letters that Unicode does not decompose, and the Arabic tatweel, which only stretches a word.
_UNDECOMPOSED = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "ـ": ""})

# Symbols, and pairs of the letters that make flags. Of these ranges, only what Unicode calls a symbol counts.
_symbol = re.compile(
    "[\U0001f1e6-\U0001f1ff]{2}|[\xa2-\xae\xb0\xb1\xd7\xf7\u2044\u2052\u20a0-\u20cf\u2100-\u2bff\u3004\u3012\u3013\u3020"
    "\u3030-\u303f\U0001f000-\U0001f3fa\U0001f400-\U0001faff]"
)
# Characters that belong to the word that they touch.
_PLUS_AND_NUMBER_SIGN = str.maketrans("+#", "＋＃")
_marks = re.compile("[+#＋＃]+")
_word = re.compile(r"[^\W_]+")
_word_at_end = re.compile(r"[^\W_]+\Z")

_quotation_mark = re.compile('["«»“”„‟「」『』\uff02\uff62\uff63]')
_blanks = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


class Phrase(NamedTuple):
    """
    A sequence of terms.

    :param terms: The terms, at least one.
    :param is_prefix: Whether any term matches that begins with the phrase's term. Such a phrase has exactly one term.
    """

    terms: tuple[str, ...]
    is_prefix: bool


def searchable_text_of_content(content: str) -> str:
    """
    Return the searchable text of a message: its texts, the texts of its tool results, and a refusal, one per line.

    Its reasoning, images, files and tool calls are not searchable, nor is its `meta`, but for a refusal. The message is
    not decoded.

    :param content: The JSON text of `ChatMessage.to_dict()`. If it is damaged, the searchable text is empty.
    """
    try:
        message = parse_json(content)
        texts = [text for text in _texts(message["content"]) if isinstance(text, str)]
        refusal = refusal_in(message.get("role"), message.get("meta"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return "\n".join([*texts, refusal] if refusal else texts)


def _texts(parts: list[dict[str, Any]]) -> Iterator[Any]:
    for part in parts:
        if "text" in part:
            yield part["text"]
        elif "tool_call_result" in part:
            result = part["tool_call_result"]["result"]
            yield from [result] if isinstance(result, str) else _texts(result)


class _FoldingTable(dict[int, str]):
    """A table for `str.translate`, filled as characters occur. Known characters are translated in C code."""

    def __missing__(self, codepoint: int) -> str:
        character = chr(codepoint)
        folded = _folded(character)
        # Unassigned and private characters and surrogates are not kept: a text with a million of them would fill the
        # memory.
        if category(character) not in ("Cn", "Co", "Cs"):
            self[codepoint] = folded
        return folded


def _folded(character: str) -> str:
    """
    Return the folded form of a character: letters and digits of a word, a blank if it separates words, or nothing.
    """
    if _written_out.match(character) or _is_word_character(character):
        character = normalize("NFKD", character)
    parts = [part if _is_word_character(part) else " " for part in character if not _is_ignored(part)]
    return normalize("NFC", "".join(parts).casefold().translate(_UNDECOMPOSED))


def _is_word_character(character: str) -> bool:
    return character.isalnum() or category(character).startswith("M")


def _is_ignored(character: str) -> bool:
    """
    Whether search ignores a character: an accent, a vowel point or an invisible character.

    Accents have a combining class in Unicode of 200 and above, strokes 1, and the points of Hebrew, Arabic and Syriac
    10 to 36. The signs of Indic, Japanese, Thai and Tibetan scripts have other classes.
    """
    mark = combining(character)
    return (
        mark == 1
        or 10 <= mark <= 36
        or mark >= 200
        or category(character) == "Me"
        or (category(character) == "Cf" and character != "\u200b")  # the zero-width space separates words
        or "VARIATION SELECTOR" in name(character, "")
    )


_folding_table = _FoldingTable()


def terms(text: str) -> list[str]:
    """
    Return the terms of a text: its words in order, and then its symbols. A term's index in the list is its position.

    :param text: Any text.
    """
    text = text[:MAX_CHARACTERS]
    found = _words(text)
    symbols = dict.fromkeys(term for term, _, _ in _symbol_terms(text))
    if symbols:
        found += islice(symbols, MAX_TERMS - len(found))
    if len(found) * MAX_TERM_LENGTH * _MAX_UTF8_BYTES_PER_CHARACTER > MAX_BYTES:
        sizes = accumulate(len(term.encode()) for term in found)
        found = found[: sum(size <= MAX_BYTES for size in sizes)]
    return found


def _words(text: str) -> list[str]:
    # NFKD of each character, and then NFC of the whole text, are together NFKC.
    folded = normalize("NFC", text.translate(_folding_table))
    if folded.isascii() or not _unspaced_character.search(folded):
        return [word[:MAX_TERM_LENGTH] for word in folded.split(None, MAX_TERMS)[:MAX_TERMS]]
    return list(islice(_terms_of_runs(folded), MAX_TERMS))


def _symbol_terms(text: str, *, is_query: bool = False) -> Iterator[tuple[str, int, int]]:
    """
    Find the terms of symbols, each with the places in the text where it begins and ends.

    :param text: Any text. Of text that is not in NFC, the places are those in its NFC.
    :param is_query: Whether a word and the `+` or `#` that it touches count only where both end. `C++11` has `c＋＋`
        as a text, and as a query it means two words.
    """
    if not text.isascii():
        text = normalize("NFC", text)
        for found in _symbol.finditer(text):
            symbol = found[0]
            if category(symbol[0]) in ("So", "Sm", "Sc") and not _is_word_character(symbol[0]):
                yield symbol, *found.span()
    if "+" in text or "#" in text or "＋" in text or "＃" in text:
        for found in _marks.finditer(text):
            start, end = found.span()
            before = _word_at_end.search(text[max(0, start - MAX_TERM_LENGTH) : start])
            after = _word.match(text, end)
            if before and not (is_query and after):
                term = f"{_end_of_word(before[0])}{found[0].translate(_PLUS_AND_NUMBER_SIGN)}"
                yield term[:MAX_TERM_LENGTH], start - len(before[0]), end
            if after and found[0][-1] in "#＃" and not (is_query and before):
                yield f"＃{_beginning_of_word(after[0])}"[:MAX_TERM_LENGTH], end - 1, after.end()


def _end_of_word(word: str) -> str:
    last = (_words(word) or [""])[-1]
    return last[-1:] if _unspaced_character.match(last) else last


def _beginning_of_word(word: str) -> str:
    first = (_words(word[:MAX_TERM_LENGTH]) or [""])[0]
    return first[:1] if _unspaced_character.match(first) else first


def _terms_of_runs(folded: str) -> Iterator[str]:
    for run in _run.finditer(folded):
        text = run[0]
        if run[1]:
            for start in range(len(text)):
                yield text[start : start + 2]
        else:
            yield text[:MAX_TERM_LENGTH]


def parsed_query(query: str, *, match_prefix: bool = False) -> list[Phrase]:
    """
    Return the phrases of a query. A text matches the query if it has all of them. Any text is a valid query.

    :param query: Words, and phrases in quotation marks of any kind. A phrase without a closing mark goes to the end.
    :param match_prefix: Whether the last word may be the beginning of a word. Defaults to False.
    :returns: The phrases; a single word is a phrase, too. The list is empty if the query has no word and no symbol.
    """
    parts = enumerate(_quotation_mark.split(query[:MAX_QUERY_CHARACTERS]))
    chunks = [words for index, part in parts for words in ([part] if index % 2 else part.split()) if terms(words)]
    phrases: list[Phrase] = []
    room = MAX_QUERY_TERMS
    for number, words in enumerate(chunks, 1):
        for phrase in _phrases(words, match_prefix=match_prefix and number == len(chunks)):
            if room:
                phrases.append(phrase._replace(terms=phrase.terms[:room]))
                room -= len(phrases[-1].terms)
    return phrases


def _phrases(words: str, *, match_prefix: bool) -> Iterator[Phrase]:
    """
    Make phrases of words of a query. In a script without spaces, the last term is a prefix: the text may continue it.
    """
    found = _words(words)
    is_unspaced = bool(found and _unspaced_character.match(found[-1]))
    is_continuable = bool(found) and (is_unspaced or match_prefix)
    exact = found[:-1] if is_continuable else found
    if exact:
        yield Phrase(tuple(exact), is_prefix=False)
    # In a script without spaces, the pair before it may already end with the last character.
    if is_continuable and not (is_unspaced and exact and exact[-1][1:] == found[-1]):
        yield Phrase((found[-1],), is_prefix=True)
    for term in dict.fromkeys(term for term, _, _ in _symbol_terms(words, is_query=True)):
        yield Phrase((term,), is_prefix=match_prefix)


def matches(phrases: Sequence[Phrase], text_terms: Sequence[str]) -> bool:
    """
    Whether a text has all phrases of a query, anywhere and in any order.

    :param phrases: The result of `parsed_query`. A query without phrases matches no text.
    :param text_terms: The `terms` of the text.
    """
    return bool(phrases) and all(_index_of(phrase, text_terms) is not None for phrase in phrases)


def spaced(text_terms: Sequence[str]) -> str:
    """Return terms with a blank before and after each of them. `spaced_patterns` are parts of it."""
    return f" {'  '.join(text_terms)} " if text_terms else ""


def spaced_patterns(phrases: Sequence[Phrase]) -> list[str]:
    """Return what `spaced` terms of a text contain for each term of a query."""
    return list(dict.fromkeys(f" {term}{'' if p.is_prefix else ' '}" for p in phrases for term in p.terms))


def relevance(phrases: Sequence[Phrase], text_terms: Sequence[str]) -> float:
    """
    Return how much of a text is what a query asks for: the share of its bytes that its terms have in common with it.

    It depends on nothing but the query and the text: a score must not tell what else is stored.

    :param phrases: The result of `parsed_query`.
    :param text_terms: The `terms` of the text.
    """
    text = spaced(text_terms).encode()
    found = sum(text.count(pattern) * len(pattern) for pattern in map(str.encode, spaced_patterns(phrases)))
    return found / len(text) if text else 0.0


def _index_of(phrase: Phrase, text_terms: Sequence[str]) -> int | None:
    first, count = phrase.terms[0], len(phrase.terms)
    for index, term in enumerate(text_terms):
        if phrase.is_prefix:
            if term.startswith(first):
                return index
        elif term == first and tuple(text_terms[index : index + count]) == phrase.terms:
            return index
    return None


def title_terms(title: str | None) -> str | None:
    """Return the terms of a title between blanks, or `None` if it has none. `title_patterns` are parts of it."""
    found = terms(title or "")
    return f" {' '.join(found)} " if found else None


def title_patterns(phrases: Sequence[Phrase]) -> list[str]:
    """Return what `title_terms` of a title contains if the title matches, for each phrase."""
    return [f" {' '.join(phrase.terms)}{'' if phrase.is_prefix else ' '}" for phrase in phrases]


def snippet(text: str, phrases: Sequence[Phrase], length: int = 160) -> str:
    """
    Return the part of a text around the first match of any phrase, on one line.

    :param text: The text as it was written.
    :param phrases: The result of `parsed_query`.
    :param length: The largest number of characters to return, not counting a `…` where the text was cut. Defaults to
        160. If the match itself is longer, its beginning is returned.
    """
    text = text[:MAX_CHARACTERS]  # the rest is not indexed
    reach = 4 * length  # more than the length, because blanks are joined
    start, end = _first_match(text, phrases, reach)
    match = _one_line(text[start:end])
    all_before = _one_line(text[max(start - reach, 0) : start]).lstrip()
    all_after = (match[length:] + _one_line(text[end : end + reach])).rstrip()
    room = length - len(match[:length])
    before = _last_words(all_before, max(room // 3, room - len(all_after)))
    after = _first_words(all_after, room - len(before))
    is_cut_before = len(before) < len(all_before) or start > reach
    is_cut_after = len(after) < len(all_after) or len(text) > end + reach
    return "…" * is_cut_before + f"{before}{match[:length]}{after}".strip() + "…" * is_cut_after


def _last_words(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    rest = text[len(text) - room - 1 :]  # one more character: it may be the blank before the first word that fits
    return rest.partition(" ")[2] if " " in rest else rest[1:]


def _first_words(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    rest = text[: room + 1]
    return rest.rpartition(" ")[0] if " " in rest else rest[:-1]


def _one_line(text: str) -> str:
    return _blanks.sub(" ", text)


def _first_match(text: str, phrases: Sequence[Phrase], reach: int) -> tuple[int, int]:
    """
    Return the index of the character at which the first match begins, and that at which the next term begins.

    :param reach: The largest number of characters to search for the end of the match.
    """
    words = _words(text)
    found = [(index, phrase) for phrase in phrases if (index := _index_of(phrase, words)) is not None]
    if not found:
        return min((place for phrase in phrases for place in _places_of_symbol(text, phrase)), default=(0, 0))
    index, phrase = min(found)
    start = _start_of_term(text, index)
    matched = text[start : start + reach]
    return start, start + _start_of_term(matched, len(phrase.terms))


def _places_of_symbol(text: str, phrase: Phrase) -> Iterator[tuple[int, int]]:
    for term, start, end in _symbol_terms(text):
        if term == phrase.terms[0] or (phrase.is_prefix and term.startswith(phrase.terms[0])):
            yield start, end
            return


def _start_of_term(text: str, index: int) -> int:
    """
    Return the index of the character at which a term begins, or the text's length if the text has no such term.

    Terms do not keep their places in the text. Bisection finds the place, in about the time that it takes to make the
    terms of the text twice.
    """
    start, end = 0, len(text)
    while start < end:
        middle = (start + end) // 2 + 1
        count = len(_words(text[start:middle]))
        if index < count:
            end = middle - 1
        else:
            index -= count - _extra_terms(text[max(start, middle - 32) : middle], text[middle : middle + 32])
            start = middle
    return start


def _extra_terms(left: str, right: str) -> int:
    """Return how many more terms two parts of a text have than the whole, because the cut splits a word."""
    return len(_words(left)) + len(_words(right)) - len(_words(left + right))
