# SPDX-License-Identifier: Apache-2.0
"""
Which tests of the contract the fast suite (`nox -s tests`) leaves to the full one (`nox -s full`, or `pytest --full`).

The rules of the contract are in the public kit. A class that runs them on an engine says by its attribute `breadth` how
many of their cases the fast suite runs. All other tests say it themselves: a test or case with the mark `full` is a
further variant of one that the fast suite runs.
"""

from typing import Any

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

#: All cases, both ways; asynchronously only the first case of each test of the codec. The store in memory runs them,
#: because it is the fastest.
WHOLE = "whole"
#: All cases of the rules that the engine's own code keeps, though of costly tests only some, and a smoke test of those
#: that the base class keeps.
ENGINE = "engine"
#: The first case of each test.
ONCE = "once"
#: The same without threads and event loops: for another server of an engine, or other tables.
VARIANT = "variant"

#: `BaseChatMessageStore` keeps these rules for all stores: it checks arguments and calls the codec. The smoke test is
#: the first case of each test, called synchronously.
KEPT_BY_THE_BASE_CLASS = [Rule01SignaturesTest, Rule02ValidationTest, Rule11LosslessTest, Rule15ErrorsTest]

#: The tests of these call a store both ways. For other rules the asynchronous twin takes the same road to the engine:
#: there only the walks call it, each method both ways.
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

#: Texts and values that the base class turns into JSON, but that a database or its driver could still change.
MAY_STUMBLE = {
    "test_hard_text_comes_back_equal_wherever_it_stands",
    "test_hard_value_comes_back_equal_and_of_the_same_type",
}
#: Further cases of tests that take a second of processor time each, by the values of their parameters: each value is in
#: another case, too, or takes the same road at another moment.
COSTLY = {
    "test_threads_lose_double_split_and_reorder_nothing": [
        {"histories": 1, "stores": "a store object each"},
        {"histories": 3, "stores": "one store object"},
    ],
    "test_a_process_killed_while_it_writes_a_huge_batch_leaves_all_or_nothing": [{"moment": 0.3}, {"moment": 0.9}],
}
#: These call all methods, in any order.
WALKS = {"test_any_sequence_of_calls_does_what_it_does_to_lists"}
#: The fixtures that say which way a store is called.
WAYS = {"calls", "moving"}


def is_left_to_full(item: pytest.Item, seen: set[Any]) -> bool:
    """
    Whether a collected test of the contract is left to the full suite.

    :param seen: What the tests before it were. It grows by this one.
    """
    if not (isinstance(item, pytest.Function) and item.cls and issubclass(item.cls, ContractTest)):
        return False
    breadth = getattr(item.cls, "breadth", WHOLE)
    if not hasattr(item, "callspec"):
        return False
    rule = item.function.__qualname__.partition(".")[0]  # the class that the test is written in
    name = item.function.__name__
    is_async = any(item.callspec.params.get(way) == "async" for way in WAYS)
    case = item.cls, name, *(item.callspec.params.get(which) for which in sorted({*WAYS, "server"}))
    is_first = case not in seen
    seen.add(case)
    if breadth == ENGINE and any(case.items() <= item.callspec.params.items() for case in COSTLY.get(name, [])):
        return True
    if breadth == WHOLE:
        return rule == Rule11LosslessTest.__name__ and is_async and not is_first  # both ways call the same codec
    if rule in names(KEPT_BY_THE_BASE_CLASS):
        return is_async or not (is_first or (breadth == ENGINE and name in MAY_STUMBLE))
    if breadth == VARIANT and rule == ConcurrencyTest.__name__:
        return True
    if is_async and name not in WALKS and rule not in names(ROAD_DIFFERS):
        return True
    return breadth in (ONCE, VARIANT) and not is_first


def names(classes: list[type]) -> set[str]:
    return {each.__name__ for each in classes}
