# SPDX-License-Identifier: Apache-2.0
"""
No provider refuses, or misreads, what it is shown of a stored conversation.

Each test generates conversations, damages them, and shows them through windows of every kind. The example in a failure
is the smallest one found: messages that it does not need were removed.
"""

from itertools import chain

import pytest
from cases import after_damage, after_resumption, after_switch, explained, refused
from damages import DAMAGES
from histories import PROVIDERS

KNOWN: dict[tuple[str, str], set[str]] = {}  # what is not repaired with `portable=False`, by provider and damage


def check(cases, known=frozenset()):
    found = {rule: case for rule, case in refused(cases).items() if case.portable or rule not in known}
    assert not found, "\n\n".join(explained(case, rule) for rule, case in sorted(found.items()))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_damaged_history_is_good_for_its_own_provider(provider, damage, is_full):
    seeds = range(14 if is_full else 2)
    cases = chain.from_iterable(after_damage(f"test {seed}", provider, [damage]) for seed in seeds)
    check(cases, KNOWN.get((provider, damage), frozenset()))


@pytest.mark.parametrize("second", PROVIDERS)
@pytest.mark.parametrize("first", PROVIDERS)
def test_another_model_goes_on_with_the_conversation(first, second, is_full):
    seeds = range(20 if is_full else 1)
    check(chain.from_iterable(after_switch(f"test {seed}", first, second) for seed in seeds))


@pytest.mark.parametrize("second", PROVIDERS)
@pytest.mark.parametrize("first", PROVIDERS)
def test_another_model_resumes_an_interrupted_round(first, second, is_full):
    seeds = range(20 if is_full else 1)
    check(chain.from_iterable(after_resumption(f"test {seed}", first, second) for seed in seeds))
