# SPDX-License-Identifier: Apache-2.0
"""An inverted index of the words of messages."""

from collections.abc import Sequence

from haystack_chat_store.search_text import Phrase, terms

Place = tuple[str, int]  # a history's id, and a message's position


class SearchIndex:
    """The places of each term."""

    def __init__(self) -> None:
        """Start without terms, and without histories to index."""
        self._places: dict[str, dict[Place, None]] = {}
        #: The histories with messages that are not indexed yet, each with the position of the first of these messages.
        self.unindexed: dict[str, int] = {}

    def add(self, place: Place, text: str) -> None:
        """Add the terms of a message."""
        for term in terms(text):
            self._places.setdefault(term, {})[place] = None

    def forget(self, place: Place, text: str) -> None:
        """Remove the terms of a message."""
        for term in terms(text) if self._places else ():
            places = self._places.get(term, {})
            places.pop(place, None)
            if not places:
                self._places.pop(term, None)

    def candidates(self, phrases: Sequence[Phrase]) -> list[Place]:
        """Return the places that have all terms of all phrases, in an order that does not depend on other places."""
        found: list[set[Place]] = []
        for phrase in phrases:
            if phrase.is_prefix:
                (prefix,) = phrase.terms
                starting = [places for term, places in self._places.items() if term.startswith(prefix)]
                found.append(set().union(*starting))
            else:
                found += [set(self._places.get(term, {})) for term in phrase.terms]
        return sorted(set.intersection(*found), key=lambda place: (-place[1], place[0]))
