# SPDX-License-Identifier: Apache-2.0
"""The rules of conversations: rounds, windows, what a model accepts."""

import asyncio
import copy
from collections import Counter
from dataclasses import replace

import pytest
from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strict_model import StrictChatGenerator, call_key, problems, problems_when_asked

from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY
from haystack_chat_store.rounds import (
    Window,
    in_question_order,
    last_messages,
    last_rounds,
    question_groups,
    question_of,
    split_system_history_current,
    valid_for_model,
)
from haystack_chat_store.validation import validate_last_k, validate_window_step

SYSTEM = ChatMessage.from_system("Be brief.")
GREETING = ChatMessage.from_assistant("Hello, how can I help?")
QUESTION = ChatMessage.from_user("What is the weather in Rome and in Oslo?")
ANSWER = ChatMessage.from_assistant("Sunny in Rome, snow in Oslo.")
ROME = ToolCall("weather", {"city": "Rome"}, id="call_1")
OSLO = ToolCall("weather", {"city": "Oslo"}, id="call_2")
NAMELESS = ToolCall("weather", {"city": "Rome"})


def calling(*calls, text=None, reasoning=None):
    return ChatMessage.from_assistant(text, tool_calls=list(calls), reasoning=reasoning)


def result_of(*calls):
    return ChatMessage(ChatRole.TOOL, [ToolCallResult("done", call, False) for call in calls])


def with_id(message, message_id):
    return ChatMessage(message.role, message._content, _meta={MESSAGE_ID_KEY: message_id})


def same_objects(some, others):
    return [*map(id, some)] == [*map(id, others)]


class TestValidateLastK:
    @pytest.mark.parametrize("last_k", [None, 0, 1, 10**30])
    def test_takes_none_and_any_count(self, last_k):
        validate_last_k(last_k)

    @pytest.mark.parametrize("last_k", [-1, True, 1.0, "1", [1]])
    def test_refuses_what_is_no_count(self, last_k):
        with pytest.raises(ValueError, match="last_k must be"):
            validate_last_k(last_k)


class TestValidateWindowStep:
    @pytest.mark.parametrize("window_step", [1, 2, 10**30])
    def test_takes_any_count(self, window_step):
        validate_window_step(window_step)

    @pytest.mark.parametrize("window_step", [0, -1, True, 1.0, "1", None])
    def test_refuses_what_is_no_count(self, window_step):
        with pytest.raises(ValueError, match="window_step must be"):
            validate_window_step(window_step)


class TestLastRounds:
    HISTORY = (GREETING, QUESTION, ANSWER, QUESTION, QUESTION, calling(ROME), result_of(ROME), ANSWER)

    @pytest.mark.parametrize(("count", "start"), [(1, 4), (2, 3), (3, 1), (4, 0), (None, 0)])
    def test_begins_at_a_user_message_or_with_everything(self, count, start):
        assert same_objects(last_rounds(self.HISTORY, Window("round", count)), self.HISTORY[start:])

    @pytest.mark.parametrize(("count", "step", "start"), [(1, 2, 4), (2, 2, 1), (1, 3, 1), (4, 3, 0), (1, 9, 1)])
    def test_moves_by_whole_steps_only(self, count, step, start):
        assert same_objects(last_rounds(self.HISTORY, Window("round", count, step)), self.HISTORY[start:])

    @given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 12))
    def test_a_window_holds_its_count_and_less_than_a_step_more_and_begins_at_a_whole_step(self, total, count, step):
        size = Window("round", count, step).size(total)
        if total <= count:
            assert size == count
        else:
            assert count <= size < count + step
            assert (total - size) % step == 0


class TestLastMessages:
    EXCHANGE = (QUESTION, calling(ROME, OSLO), result_of(ROME), result_of(OSLO), ANSWER)

    @pytest.mark.parametrize(("count", "start"), [(0, 5), (1, 4), (4, 1), (5, 0), (99, 0)])
    def test_counts_messages(self, count, start):
        assert same_objects(last_messages(self.EXCHANGE, count), self.EXCHANGE[start:])

    @pytest.mark.parametrize("count", [2, 3])
    def test_widens_to_the_call_of_a_result(self, count):
        assert same_objects(last_messages(self.EXCHANGE, count), self.EXCHANGE[1:])

    def test_does_not_widen_for_a_result_without_a_call(self):
        assert last_messages([QUESTION, result_of(ROME)], 1) == [result_of(ROME)]

    def test_does_not_widen_for_a_second_result_of_the_same_call(self):
        history = [calling(ROME), result_of(ROME), result_of(ROME)]
        assert same_objects(last_messages(history, 1), history[2:])

    def test_of_nothing_is_nothing(self):
        assert last_messages([], 3) == []


class TestParted:
    def test_system_messages_come_first_then_the_history_then_the_rest(self):
        current = [QUESTION, SYSTEM, ANSWER]
        history = [SYSTEM, GREETING]
        parts = split_system_history_current(history, current)
        assert parts == ([SYSTEM], history, [QUESTION, ANSWER])
        assert same_objects(parts.history + parts.current, [*history, QUESTION, ANSWER])

    def test_what_the_history_has_is_not_repeated_after_it(self):
        history = [with_id(QUESTION, "1"), with_id(ANSWER, "2")]
        assert split_system_history_current(history, [with_id(QUESTION, "1")]) == ([], history, [])
        assert split_system_history_current(history, [*history, QUESTION]) == ([], history, [QUESTION])

    def test_of_a_transcript_that_is_longer_than_the_history_only_what_is_new_comes(self):
        transcript = [with_id(QUESTION, str(number)) for number in range(6)]
        new = [*transcript[5:], ANSWER]
        assert split_system_history_current(transcript[2:5], [*transcript, ANSWER]) == ([], transcript[2:5], new)

    def test_messages_without_an_id_are_new_wherever_they_stand(self):
        history = [with_id(QUESTION, "1"), with_id(ANSWER, "2")]
        assert split_system_history_current(history, [GREETING, *history]).current == [GREETING]

    def test_a_system_message_comes_first_even_if_the_history_has_it(self):
        history = [with_id(QUESTION, "1"), with_id(SYSTEM, "2"), with_id(ANSWER, "3")]
        assert split_system_history_current(history, [with_id(SYSTEM, "2")]) == (
            [history[1]],
            [history[0], history[2]],
            [],
        )

    @pytest.mark.parametrize("no_id", [None, ""])
    def test_messages_without_an_id_are_all_different(self, no_id):
        assert len(split_system_history_current([with_id(QUESTION, no_id)], [with_id(QUESTION, no_id)]).current) == 1

    def test_an_id_that_could_be_none_of_ours_does_no_harm(self):
        assert len(split_system_history_current([with_id(QUESTION, "1")], [with_id(ANSWER, ["1"])]).current) == 1


class TestValidForModel:
    @pytest.mark.parametrize(
        "conversation",
        [
            [],
            [SYSTEM, QUESTION, ANSWER],
            [QUESTION, calling(ROME, OSLO), result_of(ROME), result_of(OSLO), ANSWER],
            [QUESTION, calling(ROME, OSLO), result_of(OSLO, ROME)],
            [QUESTION, calling(ROME), result_of(ROME), calling(ROME), result_of(ROME)],
            [QUESTION, calling(NAMELESS, NAMELESS), result_of(NAMELESS), result_of(NAMELESS)],
            [QUESTION, calling(ROME, text="Let me look.", reasoning="I need the weather."), result_of(ROME)],
        ],
        ids=["empty", "plain", "exchange", "any order", "id again in the next exchange", "without ids", "all parts"],
    )
    def test_leaves_what_is_valid_as_it_is(self, conversation):
        assert problems(conversation) == []
        assert same_objects(valid_for_model(conversation), conversation)

    @pytest.mark.parametrize(
        ("conversation", "expected"),
        [
            ([QUESTION, calling(ROME)], [QUESTION]),
            ([calling(ROME), QUESTION], [QUESTION]),
            ([calling(ROME, reasoning="Hm."), QUESTION], [QUESTION]),
            ([calling(ROME, text="Let me look.")], [ChatMessage.from_assistant("Let me look.")]),
            ([calling(ROME, OSLO), result_of(OSLO)], [calling(OSLO), result_of(OSLO)]),
            ([calling(ROME, ROME), result_of(ROME)], [calling(ROME), result_of(ROME)]),
            ([calling(NAMELESS, NAMELESS), result_of(NAMELESS)], [calling(NAMELESS), result_of(NAMELESS)]),
        ],
        ids=[
            "last",
            "before the next round",
            "with reasoning",
            "with text",
            "one of two",
            "id twice",
            "one of two without ids",
        ],
    )
    def test_leaves_out_calls_without_a_result(self, conversation, expected):
        assert valid_for_model([QUESTION, *conversation]) == [QUESTION, *expected]

    @pytest.mark.parametrize(
        ("conversation", "expected"),
        [
            ([result_of(ROME), QUESTION], [QUESTION]),
            ([QUESTION, result_of(ROME)], [QUESTION]),
            ([calling(ROME), QUESTION, result_of(ROME)], [QUESTION]),
            ([calling(ROME), GREETING, result_of(ROME)], [GREETING]),
            ([calling(ROME), result_of(ROME), result_of(ROME)], [calling(ROME), result_of(ROME)]),
            ([calling(ROME), result_of(OSLO, ROME)], [calling(ROME), result_of(ROME)]),
            ([calling(ROME), result_of(NAMELESS), result_of(ROME)], [calling(ROME), result_of(ROME)]),
            ([calling(NAMELESS), result_of(ROME)], []),
            ([QUESTION, ChatMessage(ChatRole.TOOL, [TextContent("done")])], [QUESTION]),
        ],
        ids=[
            "first",
            "after a user",
            "too late",
            "after a reply",
            "twice",
            "two in a message",
            "id missing",
            "id not called",
            "no result at all",
        ],
    )
    def test_leaves_out_results_without_a_call(self, conversation, expected):
        assert valid_for_model([QUESTION, *conversation]) == [QUESTION, *expected]

    def test_keeps_name_and_meta_of_a_message_that_loses_a_call(self):
        message = ChatMessage.from_assistant("Let me look.", {"model": "x"}, "bot", [ROME])
        expected = ChatMessage.from_assistant("Let me look.", {"model": "x"}, "bot")
        assert valid_for_model([QUESTION, message]) == [QUESTION, expected]

    def test_what_a_provider_needs_only_with_a_call_goes_with_it(self):
        meta = {"thought_signatures": [{"part_index": 1, "signature": "x"}], "model": "x"}
        message = ChatMessage.from_assistant("Let me look.", meta, None, [ROME, OSLO], reasoning="Hm.")
        without_calls = ChatMessage.from_assistant("Let me look.", {"model": "x"})
        with_one = ChatMessage.from_assistant("Let me look.", {"model": "x"}, None, [OSLO], reasoning="Hm.")
        assert valid_for_model([QUESTION, message]) == [QUESTION, without_calls]
        assert valid_for_model([QUESTION, message, result_of(OSLO)]) == [QUESTION, with_one, result_of(OSLO)]
        assert "thought_signatures" in message.meta

    def test_and_stays_where_no_call_has_to_go(self):
        meta = {"thought_signatures": [{"part_index": 0, "signature": "x"}]}
        parts = [ReasoningContent("Hm."), TextContent("Let me look."), TextContent(" ")]
        valid = valid_for_model([QUESTION, ChatMessage(ChatRole.ASSISTANT, parts, _meta=meta)])
        assert valid == [QUESTION, ChatMessage(ChatRole.ASSISTANT, parts[:2], _meta=meta)]

    def test_keeps_calls_and_other_parts_in_their_order(self):
        parts = [ReasoningContent("Hm."), OSLO, TextContent("Let me look."), ROME]
        expected = [ReasoningContent("Hm."), OSLO, TextContent("Let me look.")]
        valid = valid_for_model([QUESTION, ChatMessage(ChatRole.ASSISTANT, parts), result_of(OSLO)])
        assert valid[1]._content == expected

    @pytest.mark.parametrize("role", [ChatRole.USER, ChatRole.ASSISTANT, ChatRole.SYSTEM])
    @pytest.mark.parametrize(
        "parts",
        [[], [ReasoningContent("Hm.")], [TextContent(" \n")], [ReasoningContent("Hm."), TextContent("")]],
        ids=["empty", "reasoning", "blank", "reasoning and blank"],
    )
    def test_leaves_out_messages_that_say_nothing(self, role, parts):
        assert valid_for_model([QUESTION, ChatMessage(role, parts), ANSWER]) == [QUESTION, ANSWER]

    @pytest.mark.parametrize(
        ("before", "expected"),
        [
            ([GREETING], []),
            ([SYSTEM, GREETING], [SYSTEM]),
            ([calling(ROME), result_of(ROME), ANSWER], []),
            ([ChatMessage.from_user(""), ANSWER], []),
            ([ChatMessage(ChatRole.USER, [ROME]), ANSWER], []),
        ],
        ids=["greeting", "system message", "exchange", "user who says nothing", "user who only calls"],
    )
    def test_the_user_speaks_first_in_a_history(self, before, expected):
        assert valid_for_model([*before, QUESTION, ANSWER]) == [*expected, QUESTION, ANSWER]
        assert valid_for_model(before) == expected

    def test_puts_the_current_messages_around_the_history(self):
        assert valid_for_model([GREETING, QUESTION], [ANSWER, SYSTEM]) == [SYSTEM, QUESTION, ANSWER]

    def test_who_speaks_first_in_the_current_messages_is_up_to_the_caller(self):
        assert valid_for_model([], [GREETING, QUESTION]) == [GREETING, QUESTION]

    def test_results_in_the_current_messages_answer_calls_in_the_history(self):
        assert valid_for_model([QUESTION, calling(ROME)], [result_of(ROME)]) == [
            *(QUESTION, calling(ROME), result_of(ROME))
        ]
        assert valid_for_model([calling(ROME)], [result_of(ROME), QUESTION]) == [QUESTION]


class TestStrictModel:
    @pytest.mark.parametrize(
        "conversation",
        [
            [calling(ROME)],
            [calling(ROME), QUESTION],
            [calling(ROME, OSLO), result_of(OSLO), QUESTION],
            [result_of(ROME)],
            [calling(ROME), result_of(ROME), result_of(ROME)],
            [calling(ROME), GREETING, result_of(ROME)],
            [calling(ROME, ROME), result_of(ROME), result_of(ROME)],
            [calling(NAMELESS), result_of(ROME)],
            [ChatMessage(ChatRole.TOOL, [TextContent("done")])],
            [ChatMessage(ChatRole.ASSISTANT, [])],
            [ChatMessage(ChatRole.ASSISTANT, [ReasoningContent("Hm.")])],
            [ChatMessage(ChatRole.USER, [TextContent(" ")])],
            [ChatMessage(ChatRole.USER, [ROME]), result_of(ROME)],
            [calling(ROME), ChatMessage(ChatRole.USER, [ToolCallResult("done", ROME, False)])],
        ],
    )
    def test_refuses_what_providers_refuse(self, conversation):
        conversation = [QUESTION, *conversation]
        assert problems(conversation) != []
        for run in (StrictChatGenerator().run, lambda messages: asyncio.run(StrictChatGenerator().run_async(messages))):
            with pytest.raises(ValueError, match="refuses the conversation"):
                run(conversation)

    @pytest.mark.parametrize("first", [GREETING, calling(ROME)])
    def test_refuses_a_conversation_in_which_the_user_does_not_speak_first(self, first):
        assert problems([SYSTEM, QUESTION, ANSWER]) == []
        assert problems([SYSTEM, first, QUESTION, ANSWER]) != []

    @pytest.mark.parametrize("conversation", [[], [SYSTEM], [QUESTION, ANSWER], [QUESTION, GREETING]])
    def test_refuses_to_answer_where_it_is_not_asked(self, conversation):
        assert problems(conversation) == []
        assert problems_when_asked(conversation) != []
        assert problems_when_asked([*conversation, QUESTION]) == []
        with pytest.raises(ValueError, match="refuses the conversation"):
            StrictChatGenerator().run(conversation)


def of_run(question, *numbers):
    """What a run for a question produced: assistant messages with these numbers as texts."""
    return [ChatMessage.from_assistant(number, meta={QUESTION_ID_KEY: question}) for number in numbers]


def said(messages):
    return " ".join(message.text for message in messages)


class TestInQuestionOrder:
    ONE, TWO = (ChatMessage.from_user(number, meta={MESSAGE_ID_KEY: number}) for number in ("Q1", "Q2"))

    def test_without_marks_a_history_stays_as_it_is(self):
        history = [GREETING, self.ONE, ANSWER, SYSTEM, self.TWO, self.TWO, ANSWER]
        assert same_objects(in_question_order(history), history)

    def test_runs_at_the_same_time_come_one_after_the_other(self):
        (c1, a1), (c2, a2) = of_run("Q1", "c1", "a1"), of_run("Q2", "c2", "a2")
        history = [self.ONE, self.TWO, c1, c2, a2, a1]
        assert said(in_question_order(history)) == "Q1 c1 a1 Q2 c2 a2"

    def test_calls_and_results_of_different_runs_are_no_longer_between_each_other(self):
        rome, oslo = calling(ROME), calling(OSLO)
        interleaved = [(self.ONE, None), (self.TWO, None), (rome, "Q1"), (oslo, "Q2")]
        interleaved += [(result_of(ROME), "Q1"), (result_of(OSLO), "Q2"), (ANSWER, "Q1"), (ANSWER, "Q2")]
        history = [
            message if question is None else replace(message, _meta={QUESTION_ID_KEY: question})
            for message, question in interleaved
        ]
        assert problems(history) != []
        assert problems(in_question_order(history)) == []
        assert valid_for_model(in_question_order(history)) == in_question_order(history)

    def test_what_belongs_to_a_question_before_the_window_is_left_out(self):
        history = [self.TWO, *of_run("Q1", "c1"), *of_run("Q2", "c2"), *of_run("Q1", "a1"), *of_run("Q2", "a2")]
        assert said(in_question_order(history)) == "Q2 c2 a2"

    def test_a_user_message_of_a_run_joins_its_question(self):
        hint = ChatMessage.from_user("hint", meta={QUESTION_ID_KEY: "Q1"})
        history = [self.ONE, self.TWO, *of_run("Q2", "a2"), hint, *of_run("Q1", "a1")]
        assert said(in_question_order(history)) == "Q1 hint a1 Q2 a2"

    def test_and_does_not_begin_a_group_of_its_own(self):
        hint = ChatMessage.from_user("hint", meta={QUESTION_ID_KEY: "Q1"})
        history = [GREETING, self.ONE, *of_run("Q1", "c1"), hint, *of_run("Q1", "a1"), self.TWO]
        assert [said(group) for group in question_groups(history)] == [GREETING.text, "Q1 c1 hint a1", "Q2"]

    def test_or_stands_for_it_where_there_is_no_question(self):
        hint = ChatMessage.from_user("hint", meta={QUESTION_ID_KEY: "Q1"})
        history = [hint, self.TWO, *of_run("Q1", "a1"), *of_run("Q2", "a2")]
        assert said(in_question_order(history)) == "hint a1 Q2 a2"

    def test_messages_without_a_mark_stay_with_the_message_before_them(self):
        history = [GREETING, self.ONE, self.TWO, *of_run("Q1", "a1"), ANSWER, *of_run("Q2", "a2"), SYSTEM]
        assert said(in_question_order(history)) == f"{GREETING.text} Q1 a1 {ANSWER.text} Q2 a2 {SYSTEM.text}"

    @pytest.mark.parametrize("mark", [None, "", ["Q1"], {}])
    def test_a_mark_that_is_no_id_is_none(self, mark):
        (answer,) = of_run(mark, "a1")
        assert said(in_question_order([self.ONE, self.TWO, answer])) == "Q1 Q2 a1"


class TestQuestionOf:
    ONE, TWO = (ChatMessage.from_user(number, meta={MESSAGE_ID_KEY: number}) for number in ("Q1", "Q2"))
    HINT = ChatMessage.from_user("hint", meta={QUESTION_ID_KEY: "Q1", MESSAGE_ID_KEY: "Q3"})
    HISTORY = (GREETING, ONE, ANSWER, TWO, *of_run("Q1", "c1"), HINT, ANSWER, *of_run("Q3", "a3"), QUESTION)

    @pytest.mark.parametrize(
        ("index", "question"),
        [(0, None), (1, 1), (2, 1), (3, 3), (4, 1), (5, 1), (6, 3), (7, 3), (8, 8)],
        ids=[
            "greeting",
            "question",
            "answer",
            "next",
            "marked",
            "marked user",
            "unmarked",
            "unknown mark",
            "without id",
        ],
    )
    def test_goes_by_the_mark_or_by_the_place(self, index, question):
        assert question_of(self.HISTORY, index) == question

    def test_a_user_who_says_nothing_asks_nothing(self):
        assert question_of([self.ONE, ChatMessage.from_user(" "), ANSWER], 2) == 0

    def test_of_a_message_before_all_questions_is_none(self):
        assert question_of([*of_run("Q1", "a1"), self.ONE], 0) is None


# ---------------------------------------------------------------------- properties

# How long an example takes says something about the machine, nothing about the rules.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plain_messages(said):
    return st.one_of(
        st.sampled_from([SYSTEM, GREETING]), said.map(ChatMessage.from_user), said.map(ChatMessage.from_assistant)
    )


tool_calls = st.builds(
    ToolCall,
    tool_name=st.sampled_from(["weather", "time"]),
    arguments=st.sampled_from([{}, {"city": "Rome"}]),
    id=st.sampled_from([None, "a", "b", "c"]),
)
remarks = st.none() | st.just("Let me look.")
reasonings = st.none() | st.just("Hm.")


@st.composite
def exchanges(draw, *, complete=False):
    """
    Calls, and results of them in any order and grouping. Unless complete: some missing, some twice, some of others.
    """
    calls = draw(st.lists(tool_calls, min_size=1, max_size=4, unique_by=call_key if complete else None))
    if complete:
        answered = draw(st.permutations(calls))
    else:
        answered = draw(st.lists(st.sampled_from(calls) | tool_calls, max_size=5))
    said = draw(remarks if complete else remarks | st.just(" "))
    exchange = [calling(*calls, text=said, reasoning=draw(reasonings))]
    while answered:
        size = draw(st.integers(1, len(answered)))
        exchange.append(result_of(*answered[:size]))
        answered = answered[size:]
    return exchange


def conversations_of(*pieces):
    return st.lists(st.one_of(*pieces), max_size=8).map(lambda drawn: [message for piece in drawn for message in piece])


single_messages = st.one_of(
    plain_messages(st.text(max_size=3)),
    st.builds(calling, tool_calls, text=remarks | st.just(""), reasoning=reasonings),
    st.lists(tool_calls, min_size=1, max_size=3).map(lambda calls: result_of(*calls)),
).map(lambda message: [message])
somethings = st.text(min_size=1, max_size=3).filter(str.strip)
valid_conversations = conversations_of(
    plain_messages(somethings).map(lambda message: [message]), exchanges(complete=True)
).map(lambda conversation: [QUESTION, *conversation])
any_conversations = conversations_of(single_messages, exchanges(), exchanges(complete=True))
after_a_question = any_conversations.map(lambda conversation: [QUESTION, *conversation])


def pairs(messages):
    """Return (index of the call's message, index of its result's message) for each call that has a result."""
    found = []
    for index, message in enumerate(messages):
        ids = {call.id for call in message.tool_calls if call.id is not None}
        open_calls = Counter(ids)
        open_calls.update(call_key(call) for call in message.tool_calls if call.id is None)
        for answer_index in range(index + 1, len(messages)):
            if messages[answer_index].role != ChatRole.TOOL:
                break
            for result in messages[answer_index].tool_call_results:
                key = call_key(result.origin) if result.origin.id is None else result.origin.id
                if open_calls[key] > 0:
                    open_calls[key] -= 1
                    found.append((index, answer_index))
    return found


@untimed
@given(any_conversations)
def test_what_is_left_is_valid_and_stays_as_it_is(conversation):
    valid = valid_for_model(conversation)
    assert problems(valid) == []
    assert same_objects(valid_for_model(valid), valid)


@untimed
@given(valid_conversations)
def test_a_valid_conversation_is_left_as_it_is(conversation):
    assert problems(conversation) == []
    assert same_objects(valid_for_model(conversation), conversation)


@untimed
@given(after_a_question)
def test_what_people_and_models_said_is_never_lost_or_reordered(conversation):
    def spoken(messages):
        return [(message.role, message.texts) for message in messages if "".join(message.texts).strip()]

    def untouched(messages):
        return [message for message in messages if message.role in (ChatRole.USER, ChatRole.SYSTEM) and message.text]

    valid = valid_for_model(conversation)
    assert spoken(valid) == spoken(conversation)
    assert same_objects(untouched(valid), [message for message in untouched(conversation) if message.text.strip()])


@untimed
@given(any_conversations)
def test_the_conversation_passed_in_is_not_changed(conversation):
    before, objects = copy.deepcopy(conversation), list(conversation)
    valid_for_model(conversation)
    assert conversation == before
    assert same_objects(conversation, objects)


@untimed
@given(after_a_question)
def test_all_answered_calls_and_their_results_are_kept(conversation):
    valid = valid_for_model(conversation)
    assert sum(len(message.tool_calls) for message in valid) == len(pairs(conversation))
    assert sum(len(message.tool_call_results) for message in valid) == len(pairs(conversation))


@untimed
@given(st.data())
def test_a_call_with_an_id_of_its_own_stays_if_nothing_but_tool_messages_come_before_its_result(data):
    calls = [ToolCall("weather", {}, id=str(number)) for number in range(data.draw(st.integers(0, 4)))]
    pieces = [*map(calling, calls), *map(result_of, calls), QUESTION, ANSWER]
    conversation = data.draw(st.permutations(pieces))
    conversation = conversation[: data.draw(st.integers(0, len(conversation)))]

    def is_answered(call):
        if calling(call) not in conversation or result_of(call) not in conversation:
            return False
        between = conversation[conversation.index(calling(call)) + 1 : conversation.index(result_of(call)) + 1]
        return bool(between) and all(message.role == ChatRole.TOOL for message in between)

    kept = {call.id for message in valid_for_model([QUESTION, *conversation]) for call in message.tool_calls}
    assert kept == {call.id for call in calls if is_answered(call)}


@untimed
@given(any_conversations, st.integers(0, 20))
def test_last_messages_widen_no_further_than_to_the_call_of_a_result(conversation, count):
    cut = max(len(conversation) - count, 0)
    start = min([cut, *(call for call, result in pairs(conversation) if call < cut <= result and count)])
    assert same_objects(last_messages(conversation, count), conversation[start:])


@untimed
@given(any_conversations, st.integers(0, 9), st.integers(0, 9))
def test_last_messages_need_no_more_of_the_history_than_the_exchange_they_begin_in(conversation, count, more):
    window = last_messages(conversation, count)
    enough = conversation[max(len(conversation) - len(window) - more, 0) :]
    assert same_objects(last_messages(enough, count), window)


ids = st.sampled_from(["1", "2", "3"])


@st.composite
def marked_histories(draw):
    """Conversations with ids that may be missing or come again, and marks that point anywhere."""
    history = []
    for message in draw(any_conversations):
        keys = {MESSAGE_ID_KEY: draw(st.none() | ids), QUESTION_ID_KEY: draw(st.none() | st.none() | ids)}
        history.append(replace(message, _meta={key: value for key, value in keys.items() if value is not None}))
    return history


@untimed
@given(marked_histories())
def test_in_question_order_nothing_that_has_no_mark_is_lost_and_nothing_comes_twice(history):
    ordered, objects = in_question_order(history), [*map(id, history)]
    assert len({*map(id, ordered)}) == len(ordered)
    assert {*map(id, ordered)} <= {*objects}
    unmarked = [message for message in history if QUESTION_ID_KEY not in message.meta]
    assert {*map(id, unmarked)} <= {*map(id, ordered)}
    assert sum(message.role == ChatRole.USER for message in ordered) == sum(
        message.role == ChatRole.USER for message in history
    )


@untimed
@given(marked_histories())
def test_in_question_order_what_a_run_said_stands_somewhere_behind_its_question(history):
    ordered = in_question_order(history)
    for index, message in enumerate(ordered):
        if message.role != ChatRole.USER and QUESTION_ID_KEY in message.meta:
            before = [other.meta for other in ordered[:index] if other.role == ChatRole.USER]
            asked = {meta.get(key) for meta in before for key in (MESSAGE_ID_KEY, QUESTION_ID_KEY)}
            assert message.meta[QUESTION_ID_KEY] in asked


@untimed
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
def test_in_question_order_runs_at_the_same_time_look_like_runs_in_turn(events):
    """Each event is something that the run of a question stores: first its question, then what it said."""
    history, runs = [], {}
    for run, is_call in events:
        mark = {QUESTION_ID_KEY: str(run)}
        if run not in runs:
            new = [ChatMessage.from_user(str(run), meta={MESSAGE_ID_KEY: str(run)})]
        elif is_call:
            new = [replace(message, _meta=mark) for message in (calling(ROME), result_of(ROME))]
        else:
            new = [ChatMessage.from_assistant("done", meta=mark)]
        history += new
        runs.setdefault(run, []).extend(new)
    assert same_objects(in_question_order(history), [message for run in runs.values() for message in run])


@untimed
@given(marked_histories(), marked_histories())
def test_whatever_comes_with_the_history_is_valid_and_no_new_message_is_lost(history, current):
    current = [QUESTION, *current]
    system, shown, new = split_system_history_current(history, current)
    merged = [*system, *shown, *new]
    assert problems(valid_for_model(history, current)) == []
    kept = {*map(id, merged)}
    assert {id(message) for message in current if MESSAGE_ID_KEY not in message.meta} <= kept
    assert same_objects([m for m in merged if id(m) in {*map(id, history)}], [m for m in history if id(m) in kept])


def _own_id(message):
    return message.meta.get(MESSAGE_ID_KEY)
