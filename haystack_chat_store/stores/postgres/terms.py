# SPDX-License-Identifier: Apache-2.0
"""
Terms and phrases as PostgreSQL's types for full-text search have them.

A `tsvector` keeps 255 positions of a lexeme. What stands more often in a text, the 256th time and on, is there under
names of its own: `the`, then `the+1`, `the+2`. No term holds a `+`.
"""

from collections import defaultdict
from collections.abc import Sequence

from haystack_chat_store.search_text import Phrase, searchable_text_of_content, terms

_POSITIONS = 255


def tsvector(content: str) -> str:
    """
    Return the terms of a stored message, with their positions, as text for the type `tsvector`. It is never empty.

    :param content: The message as JSON text. If it is damaged, it has no terms.
    """
    found = terms(searchable_text_of_content(content))
    if len(found) <= _POSITIONS:
        return " ".join([f"{term}:{position}" for position, term in enumerate(found, 1)]) or " "
    counts: defaultdict[str, int] = defaultdict(int)
    lexemes = []
    for position, term in enumerate(found, 1):
        part, counts[term] = counts[term] // _POSITIONS, counts[term] + 1
        lexemes.append(f"{term}+{part}:{position}" if part else f"{term}:{position}")
    return " ".join(lexemes)


def tsvectors(contents: Sequence[str]) -> list[str]:
    """
    Return the terms of each of these messages.
    """
    return [tsvector(content) for content in contents]


def tsquery(phrases: Sequence[Phrase]) -> str:
    """
    Return what finds the messages that have all phrases, as text for the type `tsquery`.
    """
    return " & ".join(map(_operand, phrases))


def _operand(phrase: Phrase) -> str:
    if len(phrase.terms) == 1:
        return f"'{phrase.terms[0]}'{':*' if phrase.is_prefix else ''}"
    return "(" + " <-> ".join(f"('{term}' | '{term}+':*)" for term in phrase.terms) + ")"
