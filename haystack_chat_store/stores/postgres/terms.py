# SPDX-License-Identifier: Apache-2.0
"""
Terms and phrases as text for PostgreSQL's types `tsvector` and `tsquery`.

A `tsvector` keeps up to 255 positions of a lexeme. Further occurrences of a term become lexemes of their own: the 256th
`the` is `the+1`, the 511th `the+2`. No term contains a `+`.
"""

from collections import defaultdict
from collections.abc import Sequence

from haystack_chat_store.search_text import Phrase, searchable_text_of_content, terms

# The number of positions of a lexeme that a tsvector keeps.
_MAX_POSITIONS = 255


def tsvector(content: str) -> str:
    """
    Return the terms of a stored message with their positions, as text for the type `tsvector`.

    :param content: The message as JSON text. If it is damaged, it has no terms.
    :returns: Text that is never empty.
    """
    return _tsvector_of(terms(searchable_text_of_content(content)))


def title_tsvector(title: str | None) -> str | None:
    """Return the terms of a title with their positions, or `None` if it has none."""
    found = terms(title or "")
    return _tsvector_of(found) if found else None


def _tsvector_of(found: Sequence[str]) -> str:
    if len(found) <= _MAX_POSITIONS:
        return " ".join([f"{term}:{position}" for position, term in enumerate(found, 1)]) or " "
    counts: defaultdict[str, int] = defaultdict(int)
    lexemes = []
    for position, term in enumerate(found, 1):
        part, counts[term] = counts[term] // _MAX_POSITIONS, counts[term] + 1
        lexemes.append(f"{term}+{part}:{position}" if part else f"{term}:{position}")
    return " ".join(lexemes)


def tsvectors(contents: Sequence[str]) -> list[str]:
    """Return the terms of several messages."""
    return [tsvector(content) for content in contents]


def tsquery(phrases: Sequence[Phrase]) -> str:
    """Return text for the type `tsquery` that matches messages with all phrases."""
    return " & ".join(map(_operand, phrases))


def _operand(phrase: Phrase) -> str:
    if len(phrase.terms) == 1:
        return f"'{phrase.terms[0]}'{':*' if phrase.is_prefix else ''}"
    return "(" + " <-> ".join(f"('{term}' | '{term}+':*)" for term in phrase.terms) + ")"
