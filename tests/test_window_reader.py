# SPDX-License-Identifier: Apache-2.0
"""How much of a history a model is shown: rounds, tokens, steps, pages."""

import asyncio
import json
import threading
import uuid
from collections import Counter
from dataclasses import replace

import pytest
from conversations import marked_histories, untimed
from haystack.dataclasses import ChatMessage, ChatRole, ToolCall
from haystack.token_counters import ApproximateTokenCounter
from haystack_experimental.chat_message_stores.in_memory import InMemoryChatMessageStore as ExperimentalStore
from hypothesis import given
from hypothesis import strategies as st
from strict_model import problems

from haystack_chat_store import InMemoryChatMessageStore
from haystack_chat_store.conversation.rounds import in_question_order
from haystack_chat_store.conversation.shown import INTERRUPTED, messages_for_model
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY
from haystack_chat_store.testing.messages import conversation, positions
from haystack_chat_store.window_reader import WindowReader

USER, ASSISTANT = ChatMessage.from_user, ChatMessage.from_assistant


class MessageCounter:
    """Counts messages instead of tokens."""

    def __init__(self):
        self.counted = []
        self.threads = set()

    def count(self, messages, tools=None):
        self.threads.add(threading.current_thread())
        self.counted.append(len(messages))
        return len(messages)


class RecordingStore(InMemoryChatMessageStore):
    """Notes which reads it was asked for."""

    def __init__(self, **settings):
        super().__init__(**{"skip_system_messages": False, "last_k": None, "namespace": uuid.uuid4().hex, **settings})
        self.asked = []

    def retrieve_window(self, chat_history_id, last_k=None, *, window_step=1):
        self.asked.append((last_k, window_step))
        return super().retrieve_window(chat_history_id, last_k, window_step=window_step)

    async def retrieve_window_async(self, chat_history_id, last_k=None, *, window_step=1):
        return self.retrieve_window(chat_history_id, last_k, window_step=window_step)


def read_sync(reader, *arguments, **options):
    return reader.read(*arguments, **options)


def read_async(reader, *arguments, **options):
    return asyncio.run(reader.read_async(*arguments, **options))


@pytest.fixture(params=[read_sync, read_async], ids=["sync", "async"])
def read(request):
    return request.param


def store_with(roles, **settings):
    store = RecordingStore(**settings)
    store.write_messages("h", conversation(roles))
    return store


def budget(messages, last_k=None, **settings):
    return WindowReader(last_k, max_tokens=messages, token_counter=MessageCounter(), **settings)


class TestSettings:
    def test_tokens_are_counted_approximately_unless_said_otherwise(self):
        assert type(WindowReader(max_tokens=1).token_counter) is ApproximateTokenCounter
        assert WindowReader().token_counter is None

    @pytest.mark.parametrize(
        "setting",
        [
            {"last_k": -1},
            {"last_k": True},
            {"max_tokens": 0},
            {"max_tokens": True},
            {"max_tokens": 1.5},
            {"token_counter": 4},
            {"token_counter": "words"},
            {"token_counter": []},
            {"token_counter": ApproximateTokenCounter},
            {"window_step": 0},
            {"window_step": None},
            {"model": ""},
            {"model": " "},
            {"model": 4},
        ],
    )
    def test_that_cannot_be_are_refused(self, setting):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
            WindowReader(**setting)

    def test_last_k_of_a_read_that_cannot_be_is_refused_before_the_store_is_asked(self, read):
        store = store_with("ua")
        with pytest.raises(ValueError, match="last_k must be"):
            read(WindowReader(), store, "h", last_k=-1)
        assert store.asked == []


class TestRounds:
    @pytest.mark.parametrize(
        ("last_k", "of_read", "rounds"), [(10, None, 10), (3, None, 3), (3, 5, 5), (None, None, 12)]
    )
    def test_the_reads_last_k_goes_before_the_readers(self, read, last_k, of_read, rounds):
        found = read(WindowReader(last_k), store_with("ua" * 12), "h", last_k=of_read)
        assert positions(found) == [*range(24 - 2 * rounds, 24)]

    @pytest.mark.parametrize("max_tokens", [None, 100])
    def test_of_none_does_not_even_ask_the_store(self, read, max_tokens):
        store = store_with("ua")
        assert read(WindowReader(max_tokens=max_tokens), store, "h", last_k=0) == []
        assert store.asked == []

    def test_the_messages_of_a_question_stand_behind_it(self, read):
        store = RecordingStore()
        questions = [USER(f"q{number}", meta={MESSAGE_ID_KEY: str(number)}) for number in range(2)]
        answers = [ASSISTANT(f"a{number}", meta={QUESTION_ID_KEY: str(number)}) for number in range(2)]
        store.write_messages("h", [*questions, *answers])
        for reader in (WindowReader(), WindowReader(max_tokens=1000)):
            assert [message.text for message in read(reader, store, "h")] == ["q0", "a0", "q1", "a1"]

    def test_what_a_model_would_reject_is_still_there(self, read):
        assert positions(read(WindowReader(), store_with("a uc"), "h")) == [0, 1, 2]
        assert positions(read(WindowReader(max_tokens=1000), store_with("a uc"), "h")) == [0, 1, 2]


def turn(number, *shape):
    """A question and what its run produced: `h` is a user message of a hook, any other letter a reply."""
    marks = {QUESTION_ID_KEY: f"q{number}"}
    produced = [USER("hint", meta=marks) if kind == "h" else ASSISTANT(f"{kind}{number}", meta=marks) for kind in shape]
    return [USER(f"q{number}", meta={MESSAGE_ID_KEY: f"q{number}"}), *produced]


def said(messages):
    return " ".join(message.text for message in messages)


class TestWholeTurns:
    """A window that would begin in the middle of a turn begins at its question."""

    @pytest.mark.parametrize(
        ("last_k", "start", "asked"),
        [(1, 4, [1, 9]), (2, 4, [2, 10]), (3, 4, [3]), (4, 2, [4, 12]), (5, 2, [5]), (7, 0, [7]), (None, 2, [None])],
    )
    def test_of_a_store_that_counts_messages(self, read, last_k, start, asked):
        store = store_with("ua ua uaa", last_k_unit="message", last_k=5)
        assert positions(read(WindowReader(last_k), store, "h")) == [*range(start, 7)]
        assert [count for count, _ in store.asked] == asked

    def test_is_looked_for_in_growing_pages(self, read):
        store = store_with("ua u" + "a" * 100, last_k_unit="message")
        assert positions(read(WindowReader(3), store, "h")) == [*range(2, 103)]
        assert [count for count, _ in store.asked] == [3, 11, 35, 131]

    @pytest.mark.parametrize(("roles", "last_k"), [("aaaa", 2), ("s a ua", 3), ("a" * 20 + "ua", 4)])
    def test_where_there_is_no_question_the_window_stays_as_it_is(self, read, roles, last_k):
        store = store_with(roles, last_k_unit="message")
        end = len(conversation(roles))
        assert positions(read(WindowReader(last_k), store, "h")) == [*range(end - last_k, end)]

    def test_a_greeting_before_a_window_of_rounds_costs_no_second_read(self, read):
        store = store_with("a ua ua")
        assert positions(read(WindowReader(5), store, "h")) == [0, 1, 2, 3, 4]
        assert store.asked == [(5, 1)]

    @pytest.mark.parametrize(
        ("last_k", "shown", "asked"),
        [
            (1, "q1 c1 hint a1", [1, 9]),
            (2, "q1 c1 hint a1", [2]),
            (3, "q0 hint hint a0 q1 c1 hint a1", [3, 11]),
            (5, "q0 hint hint a0 q1 c1 hint a1", [5]),
        ],
    )
    def test_a_user_message_of_a_hook_begins_no_window(self, read, last_k, shown, asked):
        store = RecordingStore()
        store.write_messages("h", [*turn(0, "h", "h", "a"), *turn(1, "c", "h", "a")])
        assert said(read(WindowReader(last_k), store, "h")) == shown
        assert [count for count, _ in store.asked] == asked

    def test_of_a_run_among_others_the_question_is_its_own(self, read):
        store = RecordingStore()
        (q0, c0, hint, a0), (q1, a1) = turn(0, "c", "h", "a"), turn(1, "a")
        store.write_messages("h", [q0, q1, c0, hint, a1, a0])
        assert said(read(WindowReader(1), store, "h")) == "q0 c0 hint a0 q1 a1"

    @pytest.mark.parametrize("last_k", [None, 1, 4, 10])
    def test_a_budget_takes_rounds_from_their_question_on(self, read, last_k):
        store = RecordingStore()
        store.write_messages("h", [*turn(0, "h", "a"), *turn(1, "c", "h", "d", "h", "a")])
        for messages, shown in [(6, "q1 c1 hint d1 hint a1"), (5, "q1 hint d1 hint a1"), (3, "q1 hint a1"), (1, "q1")]:
            assert said(read(budget(messages, last_k), store, "h")) == shown

    def test_pages_of_a_budget_too(self, read):
        store = RecordingStore()
        store.write_messages("h", [*turn(0, *"ha" * 20), *turn(1, "a")])
        found = read(budget(10), store, "h")
        assert said(found) == "q1 a1"
        found = read(budget(43), store, "h")
        assert len(found) == 43
        store.write_messages("h", turn(2, *"ha" * 20))
        assert said(read(budget(5), store, "h")) == "q2 hint a2 hint a2"


class TestBudget:
    @pytest.mark.parametrize(
        ("roles", "messages", "start"),
        [
            ("ua ua ua", 6, 0),
            ("ua ua ua", 5, 2),
            ("ua ua ua", 4, 2),
            ("ua ua ua", 2, 4),
            ("s ua ua", 5, 0),
            ("s ua ua", 4, 1),
            ("ua ucta ua", 7, 2),
            ("ua ucta ua", 5, 6),
        ],
    )
    def test_the_newest_whole_rounds_that_fit(self, read, roles, messages, start):
        written = conversation(roles)
        assert positions(read(budget(messages), store_with(roles), "h")) == [*range(start, len(written))]

    @pytest.mark.parametrize(
        ("messages", "shown"),
        [(7, [2, 3, 4, 5, 6, 7, 8]), (6, [2, 5, 6, 7, 8]), (4, [2, 7, 8]), (3, [2, 7, 8]), (2, [2]), (1, [2])],
    )
    def test_of_a_round_too_big_its_question_and_the_newest_steps(self, read, messages, shown):
        found = read(budget(messages), store_with("ua uct ct ct"), "h")
        assert positions(found) == shown

    def test_of_a_question_too_big_nothing(self, read):
        store = RecordingStore()
        store.write_messages("h", [USER("a question of many words"), ASSISTANT("Yes.")])
        assert read(WindowReader(max_tokens=5), store, "h") == []

    def test_the_messages_of_this_turn_count_first(self, read):
        store = store_with("ua ua ua")
        current = [ChatMessage.from_system("Be brief."), USER("And now?")]
        assert positions(read(budget(6), store, "h", current)) == [2, 3, 4, 5]
        assert positions(read(budget(2), store, "h", current)) == []
        assert positions(read(budget(1), store, "h", current)) == []

    def test_what_the_model_is_not_shown_does_not_count(self, read):
        store = store_with("a ua uctce")  # a greeting, a call that is answered as interrupted, an empty reply
        assert positions(read(budget(7), store, "h")) == [*range(8)]
        assert positions(read(budget(6), store, "h")) == [*range(3, 8)]

    def test_results_of_this_turn_keep_the_step_they_belong_to(self, read):
        store = RecordingStore()
        call = ToolCall("search", {}, id="call_1")
        store.write_messages("h", [*conversation("ua uctct"), ASSISTANT(tool_calls=[call])])
        found = read(budget(3), store, "h", [ChatMessage.from_tool("found", call)])
        assert [message.role for message in found] == [ChatRole.USER, ChatRole.ASSISTANT]
        assert found[-1].tool_calls == [call]

    def test_a_transcript_brought_back_counts_once(self, read):
        store = store_with("ua ua ua")
        transcript = store.retrieve_messages("h")
        assert positions(read(budget(4), store, "h", transcript)) == [2, 3, 4, 5]
        assert messages_for_model(transcript[2:], transcript) == transcript[2:]

    def test_goes_together_with_last_k(self, read):
        store = store_with("ua" * 20)
        assert len(read(budget(12, last_k=3), store, "h")) == 6
        assert len(read(budget(12, last_k=9), store, "h")) == 12
        assert store.asked == [(3, 1), (9, 1)]

    def test_is_searched_for_not_counted_message_by_message(self, read):
        store, reader = store_with("ua" * 1000), budget(700, last_k=1000)
        assert len(read(reader, store, "h")) == 700
        assert len(reader.token_counter.counted) < 15

    def test_a_counter_that_waits_does_not_block_the_event_loop(self):
        reader = budget(2)
        asyncio.run(reader.read_async(store_with("ua ua"), "h"))
        assert threading.current_thread() not in reader.token_counter.threads


class TestPages:
    """Without `last_k`, only `max_tokens` says how much is read."""

    def test_grow_until_one_does_not_fit(self, read):
        store = store_with("ua" * 1000)
        assert len(read(budget(100), store, "h")) == 100
        assert store.asked == [(8, 1), (32, 1), (128, 1)]

    def test_a_first_that_does_not_fit_is_enough(self, read):
        store = store_with("ua" * 1000)
        assert len(read(budget(10), store, "h")) == 10
        assert store.asked == [(8, 1)]

    @pytest.mark.parametrize(("rounds", "asked"), [(0, [8]), (7, [8]), (8, [8, 32]), (40, [8, 32, 128])])
    def test_end_with_the_whole_history(self, read, rounds, asked):
        store = store_with("s" + "ua" * rounds)
        assert len(read(budget(10**6), store, "h")) == 1 + 2 * rounds
        assert [last_k for last_k, _ in store.asked] == asked

    def test_are_read_whatever_the_stores_own_last_k_is(self, read):
        assert len(read(budget(50), store_with("ua" * 100, last_k=3), "h")) == 50

    @pytest.mark.parametrize("unit", ["round", "message"])
    def test_of_a_store_that_counts_messages_too(self, read, unit):
        found = read(budget(60), store_with("ucta" * 30, last_k_unit=unit), "h")
        assert positions(found) == [*range(60, 120)]

    def test_of_a_store_that_does_not_say_what_it_counts(self, read):
        store, history = ExperimentalStore(), uuid.uuid4().hex
        store.write_messages(history, conversation("ucta" * 30))
        assert positions(read(budget(60), store, history)) == [*range(60, 120)]
        assert len(read(budget(10**6), store, history)) == 120
        store.delete_messages(history)


class TestWindowStep:
    def starts(self, reader, turns, store=None):
        """Return where the window begins, in rounds, as a conversation grows."""
        store, found = store or RecordingStore(), []
        for turn in range(turns):
            found.append(USER("q") if not (window := reader.read(store, "h")) else window[0])
            store.write_messages("h", [USER("q", meta={"round": turn}), ASSISTANT("a")])
        return [message.meta.get("round", 0) for message in found]

    def test_of_last_k(self):
        starts = self.starts(WindowReader(4, window_step=5), 20)
        assert starts == [5 * max((turn - 4) // 5, 0) for turn in range(20)]

    @pytest.mark.parametrize("last_k", [None, 20])
    def test_of_max_tokens_keeps_the_start_for_several_turns(self, last_k):
        starts = self.starts(budget(16, last_k, window_step=4), 60)
        assert {start % 4 for start in starts} == {0}
        assert starts == sorted(starts)
        assert all(5 <= turn - start <= 8 for turn, start in enumerate(starts) if turn > 8)

    def test_where_no_step_fits_whole_newest_rounds_do(self, read):
        store = store_with("ua" * 40)
        assert len(read(budget(6, window_step=10), store, "h")) == 6
        assert len(read(budget(6, 9, window_step=10), store, "h")) == 6

    def test_is_left_to_the_store(self, read):
        store = store_with("ua" * 100)
        read(WindowReader(7, window_step=3), store, "h")
        read(budget(10**6, window_step=3), store, "h")
        assert store.asked == [(7, 3), (8, 3), (32, 3), (128, 3)]

    def test_of_a_store_that_does_not_know_it_is_cut_alike(self, read):
        store, history = ExperimentalStore(), uuid.uuid4().hex
        store.write_messages(history, conversation("ua" * 11))
        for reader in (WindowReader(3, window_step=4), budget(10, window_step=4), budget(7, window_step=4)):
            expected = positions(read(reader, store_with("ua" * 11), "h"))
            assert positions(read(reader, store, history)) == expected
        store.delete_messages(history)


# ---------------------------------------------------------------------- properties


def stored(history, unit="round"):
    """Return a store with the history, and the history as it has it."""
    store = InMemoryChatMessageStore(False, last_k=None, last_k_unit=unit, namespace="window reader")
    store.delete_all_messages()
    store.write_messages("h", history)
    return store, store.retrieve_messages("h")


@untimed
@given(marked_histories(), marked_histories(), st.none() | st.integers(0, 5), st.integers(1, 12), st.integers(1, 4))
def test_whatever_is_read_fits_and_is_valid_for_the_model(history, current, last_k, max_tokens, window_step):
    store, _ = stored(history)
    current = [USER("Well?"), *current]
    reader = budget(max_tokens, last_k, window_step=window_step)
    shown = messages_for_model(reader.read(store, "h", current), current)
    assert problems(shown) == []
    alone = messages_for_model([], current)
    assert len(shown) <= max_tokens or [each._content for each in shown] == [each._content for each in alone]


@untimed
@given(marked_histories(), st.integers(1, 30), st.integers(1, 4))
def test_whatever_is_read_is_the_newest_of_the_history_in_question_order(history, max_tokens, window_step):
    store, history = stored(history)
    ordered = in_question_order(history)
    window = budget(max_tokens, 10**6, window_step=window_step).read(store, "h")
    rounds = [index for index, message in enumerate(ordered) if message.role == ChatRole.USER]
    if window and len(window) > 1:
        assert window[1:] == ordered[len(ordered) - len(window) + 1 :]
    if window != ordered:
        assert window == [] or window[0] in [ordered[index] for index in rounds]
    # Not one round more would have fitted, were it not for the step.
    longer = [start for start in rounds if len(ordered) - start > len(window)]
    if window_step == 1 and longer:
        assert len(messages_for_model(ordered[longer[-1] :])) > max_tokens


def is_question(message):
    return message.role == ChatRole.USER and bool(message.text.strip()) and not message.meta.get(QUESTION_ID_KEY)


@untimed
@given(marked_histories(), st.none() | st.integers(1, 6), st.integers(1, 4), st.sampled_from(["round", "message"]))
def test_without_a_budget_it_is_the_stores_window_from_a_question_on(history, last_k, window_step, unit):
    store, whole = stored(history, unit)
    start = len(whole) - len(store.retrieve_messages("h", last_k, window_step=window_step))
    read = WindowReader(last_k, window_step=window_step).read(store, "h")
    asked = [index for index in range(start) if is_question(whole[index])]
    possible = [start] if start in (0, len(whole)) or is_question(whole[start]) else asked or [start]
    assert read in [in_question_order(without_answers_to(whole[:index], whole[index:])) for index in possible]


def without_answers_to(earlier, messages):
    ids = {message.meta.get(MESSAGE_ID_KEY) for message in earlier} - {None}
    return [message for message in messages if message.meta.get(QUESTION_ID_KEY) not in ids]


@untimed
@given(marked_histories(), st.integers(1, 30), st.integers(1, 4))
def test_of_a_store_that_counts_messages_no_exchange_in_the_window_is_lost(history, last_k, window_step):
    history = [replace(message, _meta={}) for message in history]
    store, whole = stored([USER("q"), *history], "message")
    window = store.retrieve_messages("h", last_k, window_step=window_step)
    shown = messages_for_model(WindowReader(last_k, window_step=window_step).read(store, "h"))
    assert said_calls(messages_for_model([whole[0], *window])) <= said_calls([whole[0], *shown])


def said_calls(messages):
    """The calls that have a result of their own, by what the results are results of."""
    results = [result for message in messages for result in message.tool_call_results if result.result != INTERRUPTED]
    return Counter(json.dumps([result.origin.tool_name, result.origin.arguments]) for result in results)


@untimed
@given(st.integers(0, 300), st.integers(1, 200), st.integers(1, 9))
def test_pages_show_what_one_read_of_everything_would(rounds, max_tokens, window_step):
    store, _ = stored([replace(message, _meta={}) for message in conversation("ua" * rounds)])
    paged = budget(max_tokens, window_step=window_step).read(store, "h")
    whole = budget(max_tokens, 10**6, window_step=window_step).read(store, "h")
    assert paged == whole
