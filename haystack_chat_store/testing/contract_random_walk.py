# SPDX-License-Identifier: Apache-2.0
"""All rules together: any sequence of calls changes a store exactly like a model made of plain lists."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    DuplicateMessageError,
    MessageNotFoundError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.search_text import matches, parsed_query, terms
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, number_of_examples
from haystack_chat_store.testing.messages import expected_rounds

_HISTORIES = st.sampled_from(["a", "a/1", "a/2", "b\n%", "東京"])
_IDS = st.sampled_from([None, *"0123456789"])
_REVISION_IS = st.sampled_from(["any", "any", "right", "wrong"])
_WORDS = st.sampled_from(["fox", "quick brown", "東京都", "Grüße", ""])
_ROLES: dict[str, Callable[..., ChatMessage]] = {
    "user": ChatMessage.from_user,
    "assistant": ChatMessage.from_assistant,
    "system": ChatMessage.from_system,
}


@dataclass
class _Kept:
    """A message in the model."""

    position: int
    message_id: str
    role: str
    text: str


@dataclass
class _Model:
    """A history in the model: a plain list."""

    messages: list[_Kept] = field(default_factory=list)
    next_position: int = 0
    revision: int = 0
    title: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def place_of(self, message_id: str | None) -> int | None:
        return next((n for n, kept in enumerate(self.messages) if kept.message_id == message_id), None)

    def append(self, message_id: str, role: str, text: str) -> None:
        self.messages.append(_Kept(self.next_position, message_id, role, text))
        self.next_position += 1


class RandomWalkTest(ContractTest):
    """Thousands of calls of all operations, the same in each run, compared with a plain Python model."""

    #: The number of walks, of 50 steps each, with hypothesis' default profile.
    walks = 40

    def test_random_walk_does_what_it_does_to_lists(
        self, new_store: StoreFactory, request: pytest.FixtureRequest
    ) -> None:
        if self.lacks:
            pytest.skip("The walk needs all operations.")
        options = {"search": True} if self.searches else {}
        stores = [new_store(last_k=None, **options), new_store(last_k=None, skip_system_messages=False, **options)]
        ways = [Calls(is_async=False), Calls(is_async=True)]
        request.addfinalizer(ways[1].end)
        other = new_store(namespace="other")
        ways[0].write(other, "a", [ChatMessage.from_user("fox")])
        if self.searches:
            ways[0].call(stores[0], "index_messages")
        run_state_machine_as_test(
            lambda: _Walk(stores, ways, searches=self.searches),  # type: ignore[arg-type]  # hypothesis calls it
            settings=settings(
                max_examples=number_of_examples(self.walks),
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        assert ways[0].count(other, "a") == 1


class _Walk(RuleBasedStateMachine):
    def __init__(self, stores: list[ClosableStore], ways: list[Calls], *, searches: bool) -> None:
        super().__init__()
        self._stores, self._ways, self._searches = stores, ways, searches
        self._model: dict[str, _Model] = {}
        self._order: list[str] = []  # the ids by their last change, the latest at the end
        self._changed: set[str] = set()  # the ids of the histories whose messages the last call has changed
        self._greatest: dict[str, int] = {}  # the greatest revision of each id, also of histories that were deleted
        self._steps = 0
        self._call("delete_all_messages")

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        self._steps += 1
        return self._ways[self._steps % 2].call(self._stores[0], method, *arguments, **options)

    def _is_changed(self, history: str) -> None:
        if history in self._order:
            self._order.remove(history)
        self._order.append(history)
        self._changed.add(history)
        time.sleep(0.001)  # makes the times differ, so that they give the order of the calls

    @rule(
        history=_HISTORIES,
        batch=st.lists(st.tuples(_IDS, st.sampled_from([*_ROLES, "user"]), _WORDS), max_size=5),
        policy=st.sampled_from(DuplicatePolicy),
        revision_is=_REVISION_IS,
        keeps_system=st.booleans(),
    )
    def write(
        self,
        history: str,
        batch: list[tuple[str | None, str, str]],
        policy: DuplicatePolicy,
        revision_is: str,
        *,
        keeps_system: bool,
    ) -> None:
        model = self._model.get(history, _Model())
        options = _expecting(model, revision_is)
        messages = _messages(batch)
        wanted = [each for each in batch if keeps_system or each[1] != "system"]
        brought = [message_id for message_id, _, _ in wanted if message_id is not None]
        self._steps += 1
        call = self._ways[self._steps % 2].write

        def write() -> int:
            return call(self._stores[keeps_system], history, messages, policy=policy, **options)

        if policy is DuplicatePolicy.FAIL and len(set(brought)) < len(brought):
            _raises(DuplicateMessageError, write)
        elif revision_is == "wrong" and (policy is DuplicatePolicy.FAIL or not self._has_all(model, wanted, policy)):
            _raises(ChatHistoryChangedError, write)
        elif policy is DuplicatePolicy.FAIL and any(model.place_of(each) is not None for each in brought):
            _raises(DuplicateMessageError, write)
        else:
            written = write()
            assert written == self._written(model, wanted, policy)
            if written:
                self._model[history] = model
                self._is_changed(history)
                self._learn_ids(history, model)
        self._check(history)

    @staticmethod
    def _written(model: _Model, wanted: list[tuple[str | None, str, str]], policy: DuplicatePolicy) -> int:
        changed: set[str] = set()
        for number, (message_id, role, text) in enumerate(wanted):
            place = model.place_of(message_id)
            if message_id is None or place is None:
                model.append(message_id or f"unknown {number}", role, text)
                changed.add(model.messages[-1].message_id)
            elif policy is DuplicatePolicy.OVERWRITE:
                kept = model.messages[place]
                last = [each[1:] for each in wanted if each[0] == message_id][-1]  # of several, the last one counts
                if (kept.role, kept.text) != last:
                    model.messages[place] = dataclasses.replace(kept, role=last[0], text=last[1])
                    changed.add(message_id)
        return len(changed)

    @staticmethod
    def _has_all(model: _Model, wanted: list[tuple[str | None, str, str]], policy: DuplicatePolicy) -> bool:
        """Whether all messages of a batch are stored already, equal."""
        counting: dict[str | None, tuple[str, str]] = {}
        for message_id, role, text in wanted:
            if message_id not in counting or policy is DuplicatePolicy.OVERWRITE:
                counting[message_id] = (role, text)
        return bool(wanted) and all(
            (place := model.place_of(message_id)) is not None
            and (model.messages[place].role, model.messages[place].text) == what
            for message_id, what in counting.items()
        )

    def _learn_ids(self, history: str, model: _Model) -> None:
        stored = self._call("list_messages", history, limit=1000)
        for kept, found in zip(model.messages, stored, strict=True):
            if kept.message_id.startswith("unknown"):
                kept.message_id = found.message.meta[MESSAGE_ID_KEY]

    @rule(history=_HISTORIES, revision_is=_REVISION_IS)
    def delete(self, history: str, revision_is: str) -> None:
        options = _expecting(self._model.get(history, _Model()), revision_is)
        if history in self._model and revision_is == "wrong":
            _raises(ChatHistoryChangedError, lambda: self._call("delete_messages", history, **options))
        else:
            self._call("delete_messages", history, **options)
            self._forget(history)
        self._check(history)

    @rule(history=_HISTORIES, message_ids=st.lists(_IDS.filter(bool), max_size=4), revision_is=_REVISION_IS)
    def delete_some(self, history: str, message_ids: list[str], revision_is: str) -> None:
        model = self._model.get(history, _Model())
        options = {"message_ids": message_ids, **_expecting(model, revision_is)}
        left = [kept for kept in model.messages if kept.message_id not in message_ids]
        is_there = len(left) < len(model.messages)
        if is_there and revision_is == "wrong":
            _raises(ChatHistoryChangedError, lambda: self._call("delete_messages", history, **options))
        else:
            self._call("delete_messages", history, **options)
            if is_there:
                model.messages = left
                self._is_changed(history)
        self._check(history)

    @rule(history=_HISTORIES, message_id=_IDS.filter(bool), revision_is=_REVISION_IS)
    def rewind(self, history: str, message_id: str, revision_is: str) -> None:
        model = self._model.get(history, _Model())
        options = {"from_message_id": message_id, **_expecting(model, revision_is)}
        place = model.place_of(message_id)
        if revision_is == "wrong":
            _raises(ChatHistoryChangedError, lambda: self._call("delete_messages", history, **options))
        elif place is None:
            _raises(MessageNotFoundError, lambda: self._call("delete_messages", history, **options))
        else:
            self._call("delete_messages", history, **options)
            del model.messages[place:]
            self._is_changed(history)
        self._check(history)

    @rule(
        history=_HISTORIES,
        message_id=_IDS.filter(bool),
        batch=st.lists(st.tuples(_IDS, st.sampled_from([*_ROLES, "user"]), _WORDS), max_size=4),
        revision_is=_REVISION_IS,
        is_repeated=st.booleans(),
    )
    def replace(
        self,
        history: str,
        message_id: str,
        batch: list[tuple[str | None, str, str]],
        revision_is: str,
        *,
        is_repeated: bool,
    ) -> None:
        model = self._model.get(history, _Model())
        messages, options = _messages(batch), _expecting(model, revision_is)
        first_ones: dict[str, tuple[str | None, str, str]] = {}
        for number, each in enumerate(batch):
            if each[1] != "system":
                first_ones.setdefault(each[0] or f"unknown {number}", each)

        def replace() -> Any:
            return self._call("replace_messages", history, message_id, messages, **options)

        place = model.place_of(message_id)
        if self._has_replaced(model, place, list(first_ones.values())):
            assert replace() == 0
        elif revision_is == "wrong":
            _raises(ChatHistoryChangedError, replace)
        elif place is None:
            _raises(MessageNotFoundError, replace)
        else:
            del model.messages[place:]
            new = [(key, each) for key, each in first_ones.items() if model.place_of(each[0]) is None]
            assert replace() == len(new)
            for key, (_, role, text) in new:
                model.append(key, role, text)
            self._is_changed(history)
            self._learn_ids(history, model)
            if is_repeated and new and new[-1][1] == list(first_ones.values())[-1] and _has_ids(first_ones):
                kept = {key: model.messages[model.place_of(key) or 0] for key in first_ones}
                if all((kept[key].role, kept[key].text) == each[1:] for key, each in first_ones.items()) and _rises(
                    [each.position for each in kept.values()]
                ):
                    assert replace() == 0
        self._check(history)

    @staticmethod
    def _has_replaced(model: _Model, place: int | None, wanted: list[tuple[str | None, str, str]]) -> bool:
        """Whether a history has what a replacement would make of it."""
        found = [model.place_of(message_id) for message_id, _, _ in wanted]
        if not wanted or None in found:
            return False
        stored = [(model.messages[each or 0].role, model.messages[each or 0].text) for each in found]
        if stored != [each[1:] for each in wanted] or not _rises([each or 0 for each in found]):
            return False
        start = (found[-1] or 0) if place is None else place
        return sum((each or 0) >= start for each in found) == len(model.messages) - start

    @rule(source=_HISTORIES, copy=_HISTORIES, until=_IDS)
    def copy(self, source: str, copy: str, until: str | None) -> None:
        origin, model = self._model.get(source), self._model.get(copy, _Model())

        def copied() -> Any:
            return self._call("copy_messages", source, copy, until_message_id=until)

        place = None if origin is None else origin.place_of(until)
        if origin is None:
            _raises(ChatHistoryNotFoundError, copied)
        elif until is not None and place is None:
            _raises((MessageNotFoundError, ChatHistoryExistsError), copied)
        elif model.messages:
            _raises(ChatHistoryExistsError, copied)
        else:
            wanted = origin.messages if until is None else origin.messages[: (place or 0) + 1]
            assert copied() == len(wanted)
            for kept in list(wanted):
                model.append(kept.message_id, kept.role, kept.text)
            if wanted:
                self._model[copy] = model
                self._is_changed(copy)
        self._check(source)
        self._check(copy)

    @rule(history=_HISTORIES, title=st.sampled_from([None, "", "Grüße"]), meta=st.sampled_from([None, {}, {"a": [1]}]))
    def update(self, history: str, title: str | None, meta: dict[str, Any] | None) -> None:
        if history not in self._model:
            _raises(ChatHistoryNotFoundError, lambda: self._call("update_chat_history", history, title=title))
            return
        self._call("update_chat_history", history, title=title, meta=meta)
        self._model[history].title, self._model[history].meta = title, meta or {}
        self._check(history)

    @rule(prefix=st.sampled_from(["a", "a/", "b\n%", "c", "東"]))
    def erase(self, prefix: str) -> None:
        gone = [history for history in self._model if history.startswith(prefix)]
        assert self._call("delete_chat_histories", prefix=prefix) == len(gone)
        for history in gone:
            self._forget(history)
            self._check(history)

    @rule(prefix=st.sampled_from(["", "a", "a/", "東京", "c"]), limit=st.integers(1, 4))
    def list_all(self, prefix: str, limit: int) -> None:
        found: list[str] = []
        cursor = None
        while True:
            page = self._call("list_chat_histories", prefix=prefix, limit=limit, cursor=cursor)
            found += [info.chat_history_id for info in page.items]
            cursor = page.cursor
            if cursor is None:
                break
        assert found == [history for history in self._order[::-1] if history.startswith(prefix)]

    @rule(
        history=_HISTORIES,
        limit=st.integers(1, 7),
        end=st.sampled_from(["before", "after", "newest"]),
        position=st.integers(0, 30),
    )
    def page(self, history: str, limit: int, end: str, position: int) -> None:
        kept = [each.position for each in self._model.get(history, _Model()).messages]
        options = {} if end == "newest" else {end: position}
        expected = {
            "newest": kept[-limit:],
            "before": [each for each in kept if each < position][-limit:],
            "after": [each for each in kept if each > position][:limit],
        }[end]
        found = self._call("list_messages", history, limit=limit, **options)
        assert [stored.position for stored in found] == expected

    @rule(history=_HISTORIES, last_k=st.integers(1, 6), window_step=st.integers(1, 3))
    def read(self, history: str, last_k: int, window_step: int) -> None:
        model = self._model.get(history, _Model())
        window = self._call("retrieve_window", history, last_k, window_step=window_step)
        everything = self._call("retrieve_messages", history)
        assert [message.meta[MESSAGE_ID_KEY] for message in everything] == [kept.message_id for kept in model.messages]
        assert window.messages == expected_rounds(everything, last_k, window_step)
        assert window.revision == model.revision
        assert window.round_count == sum(kept.role == "user" for kept in model.messages)

    @rule(query=_WORDS, history=st.none() | _HISTORIES, prefix=st.sampled_from(["", "a/"]))
    def search(self, query: str, history: str | None, prefix: str) -> None:
        if not self._searches:
            return
        wanted = parsed_query(query)
        expected = [
            (name, kept.position)
            for name, model in self._model.items()
            for kept in model.messages
            if wanted and matches(wanted, terms(kept.text)) and name.startswith(prefix) and history in (None, name)
        ]
        hits = self._call("search_messages", query, chat_history_id=history, prefix=prefix, limit=1000)
        assert sorted((hit.chat_history_id, hit.position) for hit in hits) == sorted(expected)

    @rule()
    def purge(self) -> None:
        if not self._order:
            return
        oldest = self._order[0]
        last_change = self._call("get_chat_history", oldest).updated_at
        assert self._call("purge", older_than=last_change) == 0
        assert self._call("purge", older_than=last_change + timedelta(microseconds=1)) == 1
        self._forget(oldest)
        self._check(oldest)

    @rule(prefix=st.sampled_from(["", "a/", "c"]))
    def sum_up(self, prefix: str) -> None:
        models = [model for history, model in self._model.items() if history.startswith(prefix)]
        found = self._call("statistics", prefix=prefix)
        messages = sum(len(model.messages) for model in models)
        rounds = sum(kept.role == "user" for model in models for kept in model.messages)
        assert (found.chat_histories, found.messages, found.rounds) == (len(models), messages, rounds)
        assert sum(found.messages_per_day.values()) == messages

    @rule(history=_HISTORIES)
    def iterate(self, history: str) -> None:
        self._steps += 1
        found = self._ways[self._steps % 2].iterate(self._stores[0], history)
        assert found == self._call("list_messages", history, limit=1000)

    @rule()
    def find_no_faults(self) -> None:
        store: Any = self._stores[0]
        assert store.engine.run(store.engine.check, store.scope) == []

    @rule()
    def close(self) -> None:
        self._call("close")

    def _forget(self, history: str) -> None:
        if self._model.pop(history, None) is not None:
            self._order.remove(history)

    def _check(self, history: str) -> None:
        model = self._model.get(history)
        info = self._call("get_chat_history", history)
        stored = self._call("list_messages", history, limit=1000)
        assert self._call("count_messages", history) == len(stored)
        if model is None:
            assert (info, stored) == (None, [])
            return
        if history in self._changed:
            assert info.revision > self._greatest.get(history, 0)
            self._changed.discard(history)
            model.revision = self._greatest[history] = info.revision
        assert info.revision == model.revision
        rounds = sum(kept.role == "user" for kept in model.messages)
        expected = (len(model.messages), rounds, model.title, model.meta)
        assert (info.message_count, info.round_count, info.title, info.meta) == expected
        assert [
            (each.position, each.message.meta[MESSAGE_ID_KEY], each.message.role.value, each.message.text)
            for each in stored
        ] == [(kept.position, kept.message_id, kept.role, kept.text) for kept in model.messages]


def _messages(batch: list[tuple[str | None, str, str]]) -> list[ChatMessage]:
    return [
        _ROLES[role](text, meta={} if message_id is None else {MESSAGE_ID_KEY: message_id})
        for message_id, role, text in batch
    ]


def _expecting(model: _Model, revision_is: str) -> dict[str, Any]:
    if revision_is == "any":
        return {}
    return {"expected_revision": model.revision + (revision_is == "wrong")}


def _has_ids(wanted: dict[str, tuple[str | None, str, str]]) -> bool:
    return all(message_id is not None for message_id, _, _ in wanted.values())


def _rises(numbers: list[int]) -> bool:
    return numbers == sorted(numbers)


def _raises(errors: Any, call: Callable[[], Any]) -> None:
    with pytest.raises(errors):
        call()
