# SPDX-License-Identifier: Apache-2.0
"""Rules 7 and 8: which messages at the end of a history are returned."""

import uuid
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage, ToolCall
from hypothesis import given, settings
from hypothesis import strategies as st

from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    number_of_examples,
    only_where,
    texts,
)
from haystack_chat_store.testing.messages import (
    conversation,
    conversations,
    expected_messages,
    expected_rounds,
    positions,
    user,
    with_id,
)


class Rule07WindowsTest(ContractTest):
    """Rule 7: `last_k` counts rounds, or messages with `last_k_unit="message"`."""

    @pytest.mark.parametrize(
        ("roles", "last_k", "expected"),
        [
            ("ua ua ua", 0, ""),
            ("ua ua ua", 1, "ua"),
            ("ua ua ua", 2, "ua ua"),
            ("ua ua ua", 3, "ua ua ua"),
            ("ua ua ua", 4, "ua ua ua"),
            ("ua ua ua", 10**30, "ua ua ua"),
            ("a ua ua", 1, "ua"),  # a greeting belongs to no round
            ("a ua ua", 2, "ua ua"),
            ("a ua ua", 3, "a ua ua"),
            ("aca", 1, "aca"),
            ("aca", 0, ""),
            ("ua ucta", 1, "ucta"),  # calls and results belong to the round
            ("ua ucta ua", 2, "ucta ua"),
            ("ua udttctae ua", 2, "udttctae ua"),
            ("ua uct", 1, "uct"),  # a result does not end a round
            ("ua ue ua", 2, "ue ua"),  # an empty reply does not end a round
            ("ua uaa", 1, "uaa"),
            ("ua u", 1, "u"),
            ("ua u u u", 2, "u u"),  # each of several user messages in a row begins a round
            ("ua u u ua", 3, "u u ua"),
            ("t ua", 1, "ua"),
        ],
    )
    def test_last_k_counts_rounds(
        self, store: ClosableStore, calls: Calls, roles: str, last_k: int, expected: str
    ) -> None:
        written = conversation(roles)
        calls.write(store, "chat", written)
        length = len(expected.replace(" ", ""))
        assert positions(calls.retrieve(store, "chat", last_k=last_k)) == positions(written)[len(written) - length :]

    @pytest.mark.parametrize(
        ("roles", "last_k", "expected"),
        [
            ("s ua ua", 2, "ua ua"),  # a system message before the first user message belongs to no round
            ("s ua ua", 3, "s ua ua"),
            ("s ua s ua", 1, "ua"),
            ("s ua sua", 2, "ua sua"),
            ("ua usa", 1, "usa"),
        ],
    )
    def test_stored_system_messages_belong_to_the_round_they_stand_in(
        self, new_store: StoreFactory, calls: Calls, roles: str, last_k: int, expected: str
    ) -> None:
        store, written = new_store(skip_system_messages=False), conversation(roles)
        calls.write(store, "chat", written)
        length = len(expected.replace(" ", ""))
        assert positions(calls.retrieve(store, "chat", last_k=last_k)) == positions(written)[len(written) - length :]

    @pytest.mark.parametrize(
        ("roles", "last_k", "expected"),
        [
            ("ua ua", 0, 0),
            ("ua ua", 1, 1),
            ("ua ua", 3, 3),
            ("ua ua", 10**30, 4),
            ("ua ucta", 2, 3),  # a result adds its call to the window
            ("ua ucta", 3, 3),
            ("ua udtta", 2, 4),  # and all results of that call
            ("ua udtta", 3, 4),
            ("ua uctcta", 2, 3),  # but not an earlier call
            ("ua uct", 1, 2),
            ("ua t", 1, 1),  # an orphan adds nothing
            ("uat ta", 2, 2),
            ("uctta", 2, 2),  # nor does an orphan after an answered call
            ("uctta", 3, 4),
            ("t", 1, 1),
            ("ttt", 2, 2),
        ],
    )
    def test_last_k_counts_messages_if_told_so(
        self, new_store: StoreFactory, calls: Calls, roles: str, last_k: int, expected: int
    ) -> None:
        store, written = new_store(last_k_unit="message"), conversation(roles)
        calls.write(store, "chat", written)
        assert positions(calls.retrieve(store, "chat", last_k=last_k)) == positions(written)[len(written) - expected :]

    def test_result_brings_its_call_when_neither_has_an_id(self, new_store: StoreFactory, calls: Calls) -> None:
        store, call, other = new_store(last_k_unit="message"), ToolCall("now", {"tz": "UTC"}), ToolCall("now", {})
        asked = ChatMessage.from_assistant("asked", tool_calls=[call])
        calls.write(store, "answered", [user("Hello"), asked, ChatMessage.from_tool("12:00", origin=call)])
        calls.write(store, "orphan", [user("Hello"), asked, ChatMessage.from_tool("12:00", origin=other)])
        assert texts(calls.retrieve(store, "answered", last_k=1)) == ["asked", None]
        assert texts(calls.retrieve(store, "orphan", last_k=1)) == [None]

    def test_own_last_k_none_means_all_messages_too(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(last_k=None, last_k_unit="message")
        calls.write(store, "chat", conversation("ua" * 20))
        assert len(calls.retrieve(store, "chat")) == 40

    @pytest.mark.parametrize(("unit", "expected"), [("round", expected_rounds), ("message", expected_messages)])
    def test_any_window_of_any_conversation_is_that_of_a_list(
        self, new_store: StoreFactory, calls: Calls, unit: str, expected: Any
    ) -> None:
        store = new_store(skip_system_messages=False, last_k=None, last_k_unit=unit)

        @settings(max_examples=number_of_examples(60), deadline=None)
        @given(conversations(), st.none() | st.integers(0, 12))
        def holds(roles: str, last_k: int | None) -> None:
            chat_history_id, written = uuid.uuid4().hex, conversation(roles)
            calls.write(store, chat_history_id, written)
            window = calls.retrieve(store, chat_history_id, last_k=last_k)
            assert positions(window) == positions(expected(written, last_k))

        holds()

    @only_where("takes_window_step")
    @pytest.mark.parametrize(
        ("rounds", "last_k", "window_step", "start"),
        [
            (2, 3, 4, 0),
            (3, 3, 4, 0),
            (6, 3, 4, 0),
            (7, 3, 4, 4),  # one more round would complete last_k and a whole step
            (10, 3, 4, 4),
            (11, 3, 4, 8),
            (11, 3, 1, 8),
            (11, 0, 4, 11),
            (11, None, 4, 0),
            (11, 10**30, 4, 0),
            (11, 3, 10**30, 0),
        ],
    )
    def test_with_a_window_step_the_start_moves_only_by_whole_steps(
        self,
        new_store: StoreFactory,
        calls: Calls,
        rounds: int,
        last_k: int | None,
        window_step: int,
        start: int,
    ) -> None:
        store = new_store(last_k=None)
        calls.write(store, "chat", conversation("ucta" * rounds))
        window = calls.retrieve(store, "chat", last_k=last_k, window_step=window_step)
        assert positions(window) == list(range(4 * start, 4 * rounds))

    @only_where("takes_window_step")
    def test_with_a_window_step_too_what_comes_before_the_first_round_belongs_to_none(
        self, store: ClosableStore, calls: Calls
    ) -> None:
        calls.write(store, "chat", conversation("a ua ua ua"))
        assert positions(calls.retrieve(store, "chat", last_k=4, window_step=2)) == [0, 1, 2, 3, 4, 5, 6]
        assert positions(calls.retrieve(store, "chat", last_k=2, window_step=2)) == [1, 2, 3, 4, 5, 6]

    @only_where("takes_window_step")
    @pytest.mark.parametrize("window_step", [0, -1, True, 1.5, "2", None])
    def test_window_step_is_refused_if_it_is_no_count(
        self, store: ClosableStore, calls: Calls, window_step: Any
    ) -> None:
        with pytest.raises(ValueError, match="window_step must be"):
            calls.retrieve(store, "chat", window_step=window_step)

    @only_where("takes_window_step")
    @pytest.mark.parametrize(("unit", "expected"), [("round", expected_rounds), ("message", expected_messages)])
    def test_any_window_with_a_step_is_that_of_a_list(
        self, new_store: StoreFactory, calls: Calls, unit: str, expected: Any
    ) -> None:
        store = new_store(skip_system_messages=False, last_k=None, last_k_unit=unit)

        @settings(max_examples=number_of_examples(100), deadline=None)
        @given(conversations(), st.none() | st.integers(0, 12), st.integers(1, 9))
        def holds(roles: str, last_k: int | None, window_step: int) -> None:
            chat_history_id, written = uuid.uuid4().hex, conversation(roles)
            calls.write(store, chat_history_id, written)
            window = calls.retrieve(store, chat_history_id, last_k=last_k, window_step=window_step)
            assert positions(window) == positions(expected(written, last_k, window_step))

        holds()


class Rule08CostTest(ContractTest):
    """Rule 8: windows and counts are correct in a long history. The benchmarks measure their cost."""

    def test_window_and_count_of_a_long_history(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", conversation("ucta" * 750)) == 3000
        calls.write(store, "chat", [with_id("last", "last")])
        assert calls.write(store, "chat", [with_id("last", "again")]) == 0
        assert calls.count(store, "chat") == 3001
        assert positions(calls.retrieve(store, "chat", last_k=2)[:-1]) == [2996, 2997, 2998, 2999]
        assert len(calls.retrieve(store, "chat", last_k=10**6)) == 3001
        calls.delete(store, "chat")
        assert calls.count(store, "chat") == 0
