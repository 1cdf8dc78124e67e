# SPDX-License-Identifier: Apache-2.0
"""Rules 9 and 10: isolation of histories and namespaces, and of stored and returned objects."""

import dataclasses
import enum
from typing import Any

from haystack.dataclasses import ChatMessage
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    exactly,
    ids,
    number_of_examples,
    texts,
)
from haystack_chat_store.testing.messages import (
    conversation,
    expected_rounds,
    positions,
    sample_messages,
    user,
    with_id,
)

#: Ids that a store may confuse with each other, or with the language of its engine.
HOSTILE_IDS = [
    "chat",
    "Chat",
    "CHAT",
    "chat ",
    " chat",
    "chat\t",
    "chat\n",
    "\n",
    " ",
    "  ",
    "chat\r\n",
    "chat'",
    'chat"',
    "chat`",
    "chat\\",
    "%",
    "_",
    "ch%",
    "c_at",
    "*",
    "chat*",
    "?",
    "[a-z]hat",
    "{chat}",
    "{}",
    "{chat}:messages",
    "chat:messages",
    "chat:",
    ":chat",
    "default",
    "default:chat",
    "default\x1fchat",
    "chat\x01",
    "chat/../chat",
    "../../etc/passwd",
    "C:\\chat",
    "chat; DROP TABLE chat_messages; --",
    "' OR '1'='1",
    "\r\nFLUSHALL\r\n",
    "$1",
    "?1",
    ":id",
    "None",
    "null",
    "0",
    "00",
    "1e3",
    "caf\u00e9",  # one character
    "cafe\u0301",  # the same to the eye: a letter and a combining accent
    "\ufb01n",  # a ligature
    "fin",
    "stra\u00dfe",
    "strasse",
    "\u0130stanbul",
    "istanbul",
    "👩‍👩‍👧",
    "👩👩👧",
    "שלום",
    "\u202eמolב",
    "\u200bchat",
    "\ufeffchat",
    "chat\ufffd",
    "\U0010ffff",
    "x" * 511 + "a",
    "x" * 511 + "b",
]


class _Chat(str, enum.Enum):
    FIRST = "first"


class Rule09IsolationTest(ContractTest):
    """Rule 9: histories and namespaces never mix, whatever characters their ids contain."""

    def test_histories_never_mix(self, store: ClosableStore, calls: Calls) -> None:
        for chat_history_id in HOSTILE_IDS:
            assert calls.write(store, chat_history_id, [with_id("1", chat_history_id), user(chat_history_id)]) == 2
        for index, chat_history_id in enumerate(HOSTILE_IDS):
            assert texts(calls.retrieve(store, chat_history_id)) == [chat_history_id] * 2
            calls.delete(store, chat_history_id)
            remaining = [calls.count(store, other) for other in HOSTILE_IDS]
            assert remaining == [0] * (index + 1) + [2] * (len(HOSTILE_IDS) - index - 1)

    def test_id_from_an_enum_is_its_text(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, _Chat.FIRST, [with_id(_Chat.FIRST)])
        assert ids(calls.retrieve(store, "first")) == ["first"]
        assert calls.write(store, "first", [with_id("first")]) == 0
        calls.delete(store, _Chat.FIRST)
        assert calls.count(store, "first") == 0

    def test_namespaces_never_mix(self, new_store: StoreFactory, calls: Calls) -> None:
        namespaces = [name for name in HOSTILE_IDS if len(name) <= self.max_namespace_length]
        stores = [new_store(namespace=namespace) for namespace in namespaces]
        for store, namespace in zip(stores, namespaces, strict=True):
            assert calls.write(store, "chat", [with_id("1", namespace)]) == 1
        for index, store in enumerate(stores):
            assert texts(calls.retrieve(store, "chat")) == [namespaces[index]]
            calls.delete_all(store)
            remaining = [calls.count(other, "chat") for other in stores]
            assert remaining == [0] * (index + 1) + [1] * (len(stores) - index - 1)

    def test_namespace_and_history_id_do_not_run_into_each_other(self, new_store: StoreFactory, calls: Calls) -> None:
        parts = [("a", "b:c"), ("a:b", "c"), ("a{b", "}c"), ("a", "{b}c"), ("a}b", "c"), ("a/b", "c"), ("a", "b/c")]
        for namespace, chat_history_id in parts:
            calls.write(new_store(namespace=namespace), chat_history_id, [user(f"{namespace} {chat_history_id}")])
        for namespace, chat_history_id in parts:
            found = calls.retrieve(new_store(namespace=namespace), chat_history_id)
            assert texts(found) == [f"{namespace} {chat_history_id}"]

    def test_no_call_reaches_another_namespace(self, new_store: StoreFactory, calls: Calls) -> None:
        mine, yours = new_store(), new_store(namespace="yours")
        calls.write(yours, "chat", conversation("uaua"))
        assert calls.retrieve(mine, "chat") == []
        assert calls.count(mine, "chat") == 0
        calls.write(mine, "chat", [user()])
        calls.delete(mine, "chat")
        calls.write(mine, "chat", [user()])
        calls.delete_all(mine)
        assert calls.count(mine, "chat") == 0
        assert positions(calls.retrieve(yours, "chat")) == [0, 1, 2, 3]

    def test_any_sequence_of_calls_does_what_it_does_to_lists(self, new_store: StoreFactory, calls: Calls) -> None:
        stores = [new_store(namespace="mine"), new_store(namespace="yours")]
        run_state_machine_as_test(
            lambda: _Histories(stores, calls),  # type: ignore[arg-type]  # hypothesis calls it, class or not
            settings=settings(max_examples=number_of_examples(25), stateful_step_count=25, deadline=None),
        )


class Rule10NoAliasingTest(ContractTest):
    """Rule 10: changes of written or returned objects do not change the store."""

    def test_changing_what_was_returned_changes_nothing_stored(self, store: ClosableStore, calls: Calls) -> None:
        samples = [message for name, message in sample_messages().items() if name != "system"]
        calls.write(store, "chat", samples)
        before = exactly(calls.retrieve(store, "chat", last_k=100))
        returned = calls.retrieve(store, "chat", last_k=100)
        for message in returned:
            _change(message)
        returned.clear()
        assert exactly(calls.retrieve(store, "chat", last_k=100)) == before

    def test_changing_what_was_written_changes_nothing_stored(self, store: ClosableStore, calls: Calls) -> None:
        written = [message for name, message in sample_messages().items() if name != "system"]
        calls.write(store, "chat", written)
        before = exactly(calls.retrieve(store, "chat", last_k=100))
        for message in written:
            _change(message)
        written.clear()
        assert exactly(calls.retrieve(store, "chat", last_k=100)) == before

    def test_two_reads_share_nothing(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user(usage={"tokens": [1]})])
        (first,), (second,) = calls.retrieve(store, "chat"), calls.retrieve(store, "chat")
        first.meta["usage"]["tokens"].append(2)
        assert second.meta["usage"] == {"tokens": [1]}


class _Histories(RuleBasedStateMachine):
    """Two namespaces with three histories each, and plain lists as the model."""

    _which = st.tuples(st.integers(0, 1), st.sampled_from(["a", "A", "b"]))
    _new_message = st.tuples(st.sampled_from("uuacts"), st.none() | st.sampled_from(["1", "2", "3", "4"]))

    def __init__(self, stores: list[ClosableStore], calls: Calls) -> None:
        super().__init__()
        self.stores, self.calls = stores, calls
        self.written = 0
        self.histories: dict[tuple[int, str], list[ChatMessage]] = {}

    @rule(which=_which, new=st.lists(_new_message, max_size=5))
    def write(self, which: tuple[int, str], new: list[tuple[str, str | None]]) -> None:
        history = self.histories.setdefault(which, [])
        batch, added = [], 0
        for role, message_id in new:
            (message,) = conversation(role)
            self.written += 1
            message.meta["position"] = self.written
            if message_id is not None:
                message.meta[MESSAGE_ID_KEY] = message_id
            batch.append(message)
            known = [other.meta.get(MESSAGE_ID_KEY) for other in history]
            if role != "s" and (message_id is None or message_id not in known):
                history.append(message)
                added += 1
        namespace, chat_history_id = which
        assert self.calls.write(self.stores[namespace], chat_history_id, batch) == added

    @rule(which=_which, last_k=st.sampled_from([None, 0, 1, 2, 3, 5, 10**30]))
    def retrieve(self, which: tuple[int, str], last_k: int | None) -> None:
        namespace, chat_history_id = which
        found = self.calls.retrieve(self.stores[namespace], chat_history_id, last_k=last_k)
        expected = expected_rounds(self.histories.get(which, []), 10 if last_k is None else last_k)
        assert positions(found) == positions(expected)
        assert len(set(ids(found))) == len(found)

    @rule(which=_which)
    def write_back(self, which: tuple[int, str]) -> None:
        store, chat_history_id = self.stores[which[0]], which[1]
        assert self.calls.write(store, chat_history_id, self.calls.retrieve(store, chat_history_id)) == 0

    @rule(which=_which)
    def count(self, which: tuple[int, str]) -> None:
        namespace, chat_history_id = which
        assert self.calls.count(self.stores[namespace], chat_history_id) == len(self.histories.get(which, []))

    @rule(which=_which)
    def delete(self, which: tuple[int, str]) -> None:
        namespace, chat_history_id = which
        self.calls.delete(self.stores[namespace], chat_history_id)
        self.histories.pop(which, None)

    @rule(namespace=st.integers(0, 1))
    def delete_all(self, namespace: int) -> None:
        self.calls.delete_all(self.stores[namespace])
        self.histories = {which: history for which, history in self.histories.items() if which[0] != namespace}

    @rule(namespace=st.integers(0, 1))
    def close(self, namespace: int) -> None:
        self.calls.close(self.stores[namespace])

    def teardown(self) -> None:
        for namespace in range(2):
            for chat_history_id in ("a", "A", "b"):
                self.count((namespace, chat_history_id))
            self.calls.delete_all(self.stores[namespace])


def _change(value: Any) -> None:
    """Change every mutable part of a message in place."""
    if dataclasses.is_dataclass(value):
        for item in vars(value).values():
            _change(item)
    elif isinstance(value, dict):
        for item in value.values():
            _change(item)
        value["changed"] = True
    elif isinstance(value, list):
        for item in value:
            _change(item)
        value.append("changed")
