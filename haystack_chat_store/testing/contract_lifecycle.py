# SPDX-License-Identifier: Apache-2.0
"""Rules 13 and 14: opening and closing a store, and serialization."""

import copy
import json
from typing import Any

import pytest
import yaml

from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    only_where,
    texts,
)
from haystack_chat_store.testing.messages import conversation, user, with_id


class Rule13LifecycleTest(ContractTest):
    """Rule 13: the constructor opens nothing, `close` releases everything, and the next use opens the store again."""

    @only_where("make_unreachable_store")
    def test_constructor_opens_nothing(self, make_unreachable_store: StoreFactory, calls: Calls) -> None:
        calls.close(make_unreachable_store())

    def test_closed_store_opens_again_on_its_next_use(self, store: ClosableStore, calls: Calls) -> None:
        for number in range(3):
            assert calls.write(store, "chat", [user(str(number))]) == 1
            calls.close(store)
        assert texts(calls.retrieve(store, "chat")) == ["0", "1", "2"]
        calls.close(store)
        assert calls.count(store, "chat") == 3
        calls.close(store)
        calls.delete(store, "chat")
        calls.close(store)
        calls.delete_all(store)

    def test_closing_twice_does_nothing(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user()])
        calls.close(store)
        calls.close(store)
        assert calls.count(store, "chat") == 1

    def test_closing_before_the_first_use_does_nothing(self, store: ClosableStore, calls: Calls) -> None:
        calls.close(store)
        assert calls.count(store, "chat") == 0

    def test_both_ways_of_calling_can_be_mixed(self, store: ClosableStore) -> None:
        ways = [Calls(is_async=False), Calls(is_async=True)]
        for number in range(8):
            ways[number % 2].write(store, "chat", [user(str(number))])
            ways[number // 2 % 2].close(store)
            ways[number // 4].write(store, "chat", [user("!")])
        assert texts(ways[1].retrieve(store, "chat", last_k=20)) == [
            text for number in range(8) for text in (str(number), "!")
        ]
        ways[1].end()

    def test_stores_on_one_database_see_each_others_writes(self, new_store: StoreFactory, calls: Calls) -> None:
        first, second = new_store(), new_store(last_k=1)
        calls.write(first, "chat", [with_id("a", "first's")])
        assert calls.write(second, "chat", [with_id("a"), user("second's")]) == 1
        assert texts(calls.retrieve(first, "chat")) == ["first's", "second's"]
        assert texts(calls.retrieve(second, "chat")) == ["second's"]
        calls.delete(second, "chat")
        assert calls.count(first, "chat") == 0

    def test_closing_one_store_leaves_the_others_usable(self, new_store: StoreFactory, calls: Calls) -> None:
        first, second = new_store(), new_store()
        calls.write(first, "chat", [user()])
        calls.write(second, "chat", [user()])
        calls.close(first)
        assert calls.write(second, "chat", [user()]) == 1
        assert calls.count(second, "chat") == calls.count(first, "chat") == 3


class Rule14SerializationTest(ContractTest):
    """Rule 14: `from_dict(to_dict(store))` is an equal store."""

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"skip_system_messages": False, "last_k": None, "last_k_unit": "message", "namespace": "tenant: «7»"},
            {"last_k": 0},
        ],
    )
    def test_store_made_from_its_dict_is_equal(
        self, new_store: StoreFactory, calls: Calls, settings: dict[str, Any]
    ) -> None:
        store = new_store(**settings)
        data = store.to_dict()
        before = copy.deepcopy(data)
        first, second = type(store).from_dict(data), type(store).from_dict(data)
        assert data == before
        assert first == second == store
        assert first.to_dict() == data
        assert data["init_parameters"].items() >= settings.items()
        assert calls.write(first, "chat", conversation("s u a")) == (3 if "namespace" in settings else 2)
        assert len(calls.retrieve(second, "chat", last_k=5)) == calls.count(store, "chat") > 1

    @pytest.mark.parametrize(
        "other",
        [{"skip_system_messages": False}, {"last_k": 9}, {"last_k_unit": "message"}, {"namespace": "other"}],
    )
    def test_stores_with_other_settings_are_not_equal(self, make_store: StoreFactory, other: dict[str, Any]) -> None:
        assert make_store(**other) != make_store()

    def test_dict_is_plain_json_and_yaml(self, make_store: StoreFactory) -> None:
        data = make_store(last_k=None).to_dict()
        assert json.loads(json.dumps(data)) == data
        assert yaml.safe_load(yaml.safe_dump(data)) == data

    def test_dict_names_the_class(self, make_store: StoreFactory) -> None:
        store = make_store()
        assert store.to_dict()["type"] == f"{type(store).__module__}.{type(store).__qualname__}"

    @only_where("make_unreachable_store")
    def test_loading_connects_to_nothing(self, make_unreachable_store: StoreFactory) -> None:
        store = make_unreachable_store()
        assert type(store).from_dict(store.to_dict()) == store
