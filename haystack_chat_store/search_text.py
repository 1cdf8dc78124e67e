# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001, RUF002  (letters that look like others are what this is about)
"""
What search means, the same on every engine: which terms a text has, and which texts a query matches.

Engines only store terms and intersect them. A text's terms are its words, folded:

| in a text | in its terms |
|---|---|
| `Straße`, `ＡＢＣ`, `ﬁt`, `x²` | `strasse`, `abc`, `fit`, `x2`: compatibility forms (NFKC) and case are the same |
| `Élan`, `Łódź`, `Ёж`, `שָׁלוֹם`, `كَتَبَ` | `elan`, `lodz`, `еж`, `שלום`, `كتب`: accents and vowel points are left out |
| `が`, `हिन्दी`, `น้ำ` | the same: marks that make another letter of it, vowel signs and tones stay |
| `don't`, `e-mail`, `snake_case` | `don` `t`, `e` `mail`, `snake` `case`: only letters, digits and their marks |
| `東京都` | `東京` `京都` `都`: scripts without spaces, and Hangul, become overlapping pairs and the last character |
| `iPhone15を買う` | `iphone15` `を買` `買う` `う`: a word ends where such a script begins |
| a soft hyphen, a joiner, a variation selector | nothing |

So a term holds nothing that the syntax of an engine could take for an operator. Pairs that follow each other are found
wherever the characters do, and a single character is found as the beginning of a term.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple
from unicodedata import category, combining, name, normalize

from haystack.dataclasses import ChatMessage, TextContent, ToolCallResult

from haystack_chat_store.json_values import parse_json

#: How many terms a message has at most; the rest of it is not found. PostgreSQL keeps positions up to 16,383.
MAX_TERMS = 16_000

#: How many bytes of UTF-8 a message's terms have at most, in all. A tsvector holds 1 MB, positions included.
MAX_BYTES = 900_000

#: How many characters a message is searched for terms in.
MAX_CHARACTERS = 1_000_000

#: What a longer term is cut to, in a text and in a query alike.
MAX_TERM_LENGTH = 64

#: How many terms of a query count, and in how many characters of it they are looked for.
MAX_QUERY_TERMS = 64
MAX_QUERY_CHARACTERS = 10_000

_UTF8_LENGTH = 4  # of one character, at most

# Thai, Lao, Myanmar, Hangul, Khmer, kana and bopomofo, Han, and the supplements of these. As they are after folding.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3031-\u3035\u303b\u3041-\u318f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\ua9e0-\ua9ff\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff"
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_unspaced_character = re.compile(f"[{_UNSPACED}]")
_run = re.compile(rf"([{_UNSPACED}]+)|[^{_UNSPACED}\s]+")

# Symbols that are written for the words and characters they consist of, such as ㍿, ㎏ and, in text from PDFs, ⽇.
_written_out = re.compile("[\u2e80-\u2fdf\u3200-\u33ff]")

# Letters that Unicode does not decompose, and the Arabic tatweel, which only makes a word longer.
_UNDECOMPOSED = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "ـ": ""})

_quotation_mark = re.compile('["«»“”„‟「」『』\uff02\uff62\uff63]')
_blanks = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


class Phrase(NamedTuple):
    """
    Terms that follow each other.

    :param terms: The terms, at least one.
    :param is_prefix: Whether any term that begins with the only one will do.
    """

    terms: tuple[str, ...]
    is_prefix: bool


def searchable_text(message: ChatMessage) -> str:
    """
    Return what of a message is searched: its texts and those of tool results, a line each.

    :param message: The message. Its reasoning, images, files, calls of tools and `meta` are not searched.
    """
    return "\n".join(text for text in _texts(message._content) if isinstance(text, str))


def _texts(parts: Sequence[Any]) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, TextContent):
            yield part.text
        elif isinstance(part, ToolCallResult):
            yield from [part.result] if isinstance(part.result, str) else _texts(part.result)


def searchable_text_of_content(content: str) -> str:
    """
    Return the `searchable_text` of a message as it is stored, without making a message of it.

    :param content: The JSON text of `ChatMessage.to_dict()`. If it is damaged, there is nothing to find in it.
    """
    try:
        return "\n".join(text for text in _texts_of_dicts(parse_json(content)["content"]) if isinstance(text, str))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def _texts_of_dicts(parts: list[dict[str, Any]]) -> Iterator[Any]:
    for part in parts:
        if "text" in part:
            yield part["text"]
        elif "tool_call_result" in part:
            result = part["tool_call_result"]["result"]
            yield from [result] if isinstance(result, str) else _texts_of_dicts(result)


class _Folds(dict[int, str]):
    """
    What becomes of each character, for `str.translate`, which keeps to C code once a character is known.
    """

    def __missing__(self, codepoint: int) -> str:
        character = chr(codepoint)
        folded = _folded(character)
        if category(character) not in ("Cn", "Co", "Cs"):  # a million of these could be made to fill the memory
            self[codepoint] = folded
        return folded


def _folded(character: str) -> str:
    """
    Return what a character adds to a word, or a blank if it ends one.
    """
    if _written_out.match(character) or _stands_in_words(character):
        character = normalize("NFKD", character)
    parts = [part if _stands_in_words(part) else " " for part in character if not _is_ignored(part)]
    return normalize("NFC", "".join(parts).casefold().translate(_UNDECOMPOSED))


def _stands_in_words(character: str) -> bool:
    return character.isalnum() or category(character).startswith("M")


def _is_ignored(character: str) -> bool:
    """
    Whether a character makes no difference: an accent, a vowel point, an invisible one.

    The combining classes of Unicode tell accents (200 and above, 1 for strokes) and the points of Hebrew, Arabic and
    Syriac (10 to 36) from the signs of Indic, Japanese, Thai and Tibetan writing.
    """
    mark = combining(character)
    return (
        mark == 1
        or 10 <= mark <= 36
        or mark >= 200
        or category(character) == "Me"
        or (category(character) == "Cf" and character != "\u200b")  # a space, if one of no width
        or "VARIATION SELECTOR" in name(character, "")
    )


_folds = _Folds()


def terms(text: str) -> list[str]:
    """
    Return the terms of a text in order. A term's index in the list is its position.

    :param text: Any text.
    """
    # Of each character first, then NFC for what two of them make together, which comes to NFKC.
    folded = normalize("NFC", text[:MAX_CHARACTERS].translate(_folds))
    if folded.isascii() or not _unspaced_character.search(folded):
        words = folded.split(None, MAX_TERMS)[:MAX_TERMS]
        found = [word[:MAX_TERM_LENGTH] for word in words]
    else:
        found = list(islice(_terms_of_runs(folded), MAX_TERMS))
    if len(found) * MAX_TERM_LENGTH * _UTF8_LENGTH > MAX_BYTES:
        sizes = accumulate(len(term.encode()) for term in found)
        found = found[: sum(size <= MAX_BYTES for size in sizes)]
    return found


def _terms_of_runs(folded: str) -> Iterator[str]:
    for run in _run.finditer(folded):
        text = run[0]
        if run[1]:
            for start in range(len(text)):
                yield text[start : start + 2]
        else:
            yield text[:MAX_TERM_LENGTH]


def parsed_query(query: str) -> list[Phrase]:
    """
    Return the phrases that a text must all have to match a query. Any text is a query.

    :param query: Words, and phrases in quotation marks of any kind. A phrase that is not closed goes to the end.
    :returns: A phrase for each. None if there is nothing in the query that can be found.
    """
    phrases: list[Phrase] = []
    room = MAX_QUERY_TERMS
    for index, part in enumerate(_quotation_mark.split(query[:MAX_QUERY_CHARACTERS])):
        for words in [part] if index % 2 else part.split():
            for phrase in _phrases(terms(words)):
                if room:
                    phrases.append(phrase._replace(terms=phrase.terms[:room]))
                    room -= len(phrases[-1].terms)
    return phrases


def _phrases(found: list[str]) -> Iterator[Phrase]:
    """
    Make a phrase of a query's terms. What it ends with may go on in a text, if its script has no spaces.
    """
    goes_on = bool(found and _unspaced_character.match(found[-1]))
    exact = found[:-1] if goes_on else found
    if exact:
        yield Phrase(tuple(exact), is_prefix=False)
    if goes_on and not (exact and exact[-1][1:] == found[-1]):  # else the pair before it has said it
        yield Phrase((found[-1],), is_prefix=True)


def matches(phrases: Sequence[Phrase], text_terms: Sequence[str]) -> bool:
    """
    Whether a text matches a query: it has all phrases, anywhere and in any order.

    :param phrases: What `parsed_query` returned. Nothing matches a query without any.
    :param text_terms: The `terms` of the text.
    """
    return bool(phrases) and all(_found_at(phrase, text_terms) is not None for phrase in phrases)


def _found_at(phrase: Phrase, text_terms: Sequence[str]) -> int | None:
    first, count = phrase.terms[0], len(phrase.terms)
    for index, term in enumerate(text_terms):
        if phrase.is_prefix:
            if term.startswith(first):
                return index
        elif term == first and tuple(text_terms[index : index + count]) == phrase.terms:
            return index
    return None


def snippet(text: str, phrases: Sequence[Phrase], length: int = 160) -> str:
    """
    Return the part of a text around the first phrase that is found in it, on one line.

    :param text: The text as it was written.
    :param phrases: What `parsed_query` returned.
    :param length: How many characters to return at most, not counting a `…` where something was cut. If what was
        found is longer than that, its beginning is returned.
    """
    text = text[:MAX_CHARACTERS]  # there are no terms in the rest
    reach = 4 * length  # so much is looked at on each side, for much of it may be blanks
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
    rest = text[len(text) - room - 1 :]  # with the blank, if it is one, before the first word that fits
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
    Return where in a text the first phrase that is found begins, and where the next term does.

    :param reach: How far to look for the end.
    """
    text_terms = terms(text)
    found = [(index, phrase) for phrase in phrases if (index := _found_at(phrase, text_terms)) is not None]
    if not found:
        return 0, 0
    index, phrase = min(found)
    start = _start_of_term(text, index)
    matched = text[start : start + reach]
    return start, start + _start_of_term(matched, len(phrase.terms))


def _start_of_term(text: str, index: int) -> int:
    """
    Return where in a text its term of that index begins, or the text's length if it has none.

    Halves the text until one character is left, so it takes about as long as to make the terms twice.
    """
    start, end = 0, len(text)
    while start < end:
        middle = (start + end) // 2 + 1
        count = len(terms(text[start:middle]))
        if index < count:
            end = middle - 1
        else:
            index -= count - _words_cut(text[max(start, middle - 32) : middle], text[middle : middle + 32])
            start = middle
    return start


def _words_cut(left: str, right: str) -> int:
    """
    Return how many terms two parts of a text have more than the whole.
    """
    return len(terms(left)) + len(terms(right)) - len(terms(left + right))
