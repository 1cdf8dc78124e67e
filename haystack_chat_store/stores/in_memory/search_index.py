# SPDX-License-Identifier: Apache-2.0
"""
An inverted index of the words of messages.
"""

from collections.abc import Iterator, Sequence

from haystack_chat_store.search_text import Phrase, terms

Place = tuple[str, int]  # a history's id, and a position


class SearchIndex:
    """
    Where each term stands.
    """

    def __init__(self) -> None:
        """
        Start with no terms, and no histories to index.
        """
        self._places: dict[str, dict[Place, None]] = {}
        #: The histories that have messages which are not indexed, each with the position of the first of them.
        self.unindexed: dict[str, int] = {}

    def add(self, place: Place, text: str) -> None:
        """
        Index what a message says.
        """
        for term in terms(text):
            self._places.setdefault(term, {})[place] = None

    def forget(self, place: Place, text: str) -> None:
        """
        Do away with what `add` has done.
        """
        for term in terms(text) if self._places else ():
            places = self._places.get(term, {})
            places.pop(place, None)
            if not places:
                self._places.pop(term, None)

    def candidates(self, phrases: Sequence[Phrase]) -> list[Place]:
        """
        Return the places that have all terms of all phrases, the latest first.
        """
        found: list[set[Place]] = []
        for phrase in phrases:
            if phrase.is_prefix:
                found.append({place for term in self._terms(phrase) for place in self._places[term]})
            else:
                found += [set(self._places.get(term, {})) for term in phrase.terms]
        return sorted(set.intersection(*found), key=lambda place: place[1], reverse=True)

    def _terms(self, phrase: Phrase) -> Iterator[str]:
        if not phrase.is_prefix:
            yield from phrase.terms
            return
        (beginning,) = phrase.terms
        yield from [term for term in self._places if term.startswith(beginning)]
