# SPDX-License-Identifier: Apache-2.0
"""The rules of conversations: rounds, windows, what a model accepts."""

from dataclasses import replace

import pytest
from conversations import (
    ANSWER,
    GREETING,
    OSLO,
    QUESTION,
    ROME,
    SYSTEM,
    any_conversations,
    calling,
    marked_histories,
    pairs,
    result_of,
    same_objects,
    untimed,
)
from haystack.dataclasses import ChatMessage, ChatRole
from hypothesis import given
from hypothesis import strategies as st
from strict_model import problems

from haystack_chat_store.conversation.rounds import (
    Window,
    in_question_order,
    last_messages,
    last_rounds,
    question_groups,
    question_of,
    window_start,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY
from haystack_chat_store.validation import validate_last_k, validate_window_step


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


def test_a_window_of_messages_goes_back_to_the_call_of_its_first_result_up_to_the_beginning():
    assert window_start(["assistant", "tool", "user"], Window("message", 2)) == (0, 2)
    assert window_start(["tool", "tool", "user"], Window("message", 2)) == (0, 2)


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

    @given(marked_histories())
    def test_is_that_of_the_groups(self, history):
        grouped = [message for group in question_groups(history) for message in group]
        assert same_objects(in_question_order(history), grouped)

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

    def test_what_belongs_to_a_question_before_the_window_is_left_out_of_the_round_of_another_run(self):
        history = [self.TWO, *of_run("Q1", "c1"), *of_run("Q2", "c2"), *of_run("Q1", "a1"), *of_run("Q2", "a2")]
        assert said(in_question_order(history)) == "Q2 c2 a2"

    def test_the_answer_to_a_question_that_was_replaced_stays_where_it_stands(self):
        history = [self.ONE, *of_run("Q1", "a1"), ChatMessage.from_user("Q2 anew"), *of_run("Q2", "a2"), QUESTION]
        assert said(in_question_order(history)) == f"Q1 a1 Q2 anew a2 {QUESTION.text}"
        assert said(question_groups(history, with_strays=False)[2]) == "Q2 anew"

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
        question = message.meta.get(QUESTION_ID_KEY)
        place = next(place for place, other in enumerate(history) if other is message)
        if message.role != ChatRole.USER and question in _asked(history[:place]):
            assert question in _asked(ordered[:index])


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


def _asked(messages):
    metas = [message.meta for message in messages if message.role == ChatRole.USER]
    return {meta[key] for meta in metas for key in (MESSAGE_ID_KEY, QUESTION_ID_KEY) if key in meta}
