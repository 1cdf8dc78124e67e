# SPDX-License-Identifier: Apache-2.0
"""Collects the faults of a check, however many there are."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from haystack_chat_store.types import Fault

#: The most faults of a kind that a check lists.
MAX_FAULTS_OF_KIND = 1_000

# What differs between faults of one kind: keys, quoted names and numbers.
_VARIABLE = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|'[^']*'|-?\d+")


def kind_of(description: str) -> str:
    """Return the description of a fault without what differs between faults of the same kind."""
    return _VARIABLE.sub("…", description)


class FaultList:
    """
    The faults of a check, in order, each once: up to 1,000 of each kind.

    One more fault for each kind that has more says how many. So neither memory nor a terminal is filled.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        """Begin with some faults."""
        self._listed: dict[Fault, None] = {}
        self._numbers: Counter[tuple[str, bool]] = Counter()
        self.extend(faults)

    def extend(self, faults: Iterable[Fault]) -> None:
        """Add faults."""
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Add a fault, unless it is listed."""
        kind = kind_of(fault.description), fault.is_repaired
        if fault.count > 1:
            self._listed[fault] = None
        elif fault not in self._listed:
            self._numbers[kind] += 1
            if self._numbers[kind] <= MAX_FAULTS_OF_KIND:
                self._listed[fault] = None

    def __iter__(self) -> Iterator[Fault]:
        """Go through the faults that are listed, then those that stand for more."""
        yield from self._listed
        for (kind, is_repaired), number in self._numbers.items():
            if number > MAX_FAULTS_OF_KIND:
                yield more_faults(kind, number - MAX_FAULTS_OF_KIND, is_repaired=is_repaired)


def more_faults(kind: str, number: int, *, is_repaired: bool) -> Fault:
    """Return the fault that stands for further ones of a kind."""
    return Fault(description=f"There are {number:,} more such faults: {kind}", is_repaired=is_repaired, count=number)
