# SPDX-License-Identifier: Apache-2.0
"""
What of the contract the fast suite (`nox -s tests`) leaves to the full one (`nox -s full`, or `pytest --full`).

Elsewhere a test or case is marked `full` where it stands: it is a further variant of what the fast suite shows once.
The rules of the contract are in the public kit, which knows no such mark. A class of tests says by its attribute
`breadth` how much of them the fast suite runs on its engine.
"""

import pytest

from haystack_chat_store.testing import (
    ConcurrencyTest,
    ContractTest,
    ProcessesTest,
    RandomWalkTest,
    Rule01SignaturesTest,
    Rule02ValidationTest,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule07WindowsTest,
    Rule11LosslessTest,
    Rule13LifecycleTest,
    Rule15ErrorsTest,
)

#: All cases, called both ways: for the store that has the least of its own, so that the cases are quick.
WHOLE = "whole"
#: What the engine's own code keeps: all cases of its rules, and a smoke test of those that the base class keeps.
ENGINE = "engine"
#: A further server or layout of an engine that runs above: each test once, with its first case.
ONCE = "once"

#: `BaseChatMessageStore` keeps these for all stores: it checks arguments, and the codec turns messages into text.
KEPT_BY_THE_BASE_CLASS = [Rule01SignaturesTest, Rule02ValidationTest, Rule11LosslessTest, Rule15ErrorsTest]

#: Where the asynchronous twin takes another road, so that both ways are called. Elsewhere it calls the same engine by
#: the same road, and the walks, which call every method both ways, show that it does.
ROAD_DIFFERS = [
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule07WindowsTest,
    Rule13LifecycleTest,
    ConcurrencyTest,
    ProcessesTest,
    RandomWalkTest,
]

#: Of what the base class keeps, what an engine or its driver may stumble over all the same.
MAY_STUMBLE = {
    "test_hard_text_comes_back_equal_wherever_it_stands",
    "test_hard_value_comes_back_equal_and_of_the_same_type",
}
#: A short walk through all calls.
WALKS = {"test_any_sequence_of_calls_does_what_it_does_to_lists"}
#: The fixtures that say which way a store is called.
WAYS = {"calls", "moving"}


def is_left_to_full(item: pytest.Item) -> bool:
    """
    Whether a collected test of the contract is left to the full suite.
    """
    if not (isinstance(item, pytest.Function) and item.cls and issubclass(item.cls, ContractTest)):
        return False
    breadth = getattr(item.cls, "breadth", WHOLE)
    if breadth == WHOLE or not hasattr(item, "callspec"):
        return False
    rule = item.function.__qualname__.partition(".")[0]  # the class that the test is written in
    name = item.function.__name__
    is_async = any(item.callspec.params.get(way) == "async" for way in WAYS)
    is_first = all(n == 0 for parameter, n in item.callspec.indices.items() if parameter not in {*WAYS, "server"})
    if rule in names(KEPT_BY_THE_BASE_CLASS):
        return is_async or not (is_first or (breadth == ENGINE and name in MAY_STUMBLE))
    if is_async and name not in WALKS and rule not in names(ROAD_DIFFERS):
        return True
    return breadth == ONCE and not is_first


def names(classes: list[type]) -> set[str]:
    return {each.__name__ for each in classes}
