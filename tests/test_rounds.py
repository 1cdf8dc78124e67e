# SPDX-License-Identifier: Apache-2.0
"""
The rules of conversations: rounds, windows, what a model accepts.
"""

import asyncio
import copy
from collections import Counter

import pytest
from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall, ToolCallResult
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strict_model import StrictChatGenerator, call_key, problems

from haystack_chat_store.rounds import (
    MESSAGE_ID_KEY,
    last_messages,
    valid_for_model,
    validate_last_k,
    with_current_messages,
)

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


class TestWithCurrentMessages:
    def test_system_messages_come_first_then_the_history_then_the_rest(self):
        current = [QUESTION, SYSTEM, ANSWER]
        history = [SYSTEM, GREETING]
        assert same_objects(with_current_messages(history, current), [SYSTEM, SYSTEM, GREETING, QUESTION, ANSWER])

    def test_a_message_brought_along_with_its_id_is_not_repeated(self):
        brought = with_id(QUESTION, "1")
        merged = with_current_messages([with_id(QUESTION, "1"), with_id(ANSWER, "2")], [brought])
        assert same_objects(merged[1:], [brought])
        assert merged[0].meta[MESSAGE_ID_KEY] == "2"

    @pytest.mark.parametrize("no_id", [None, ""])
    def test_messages_without_an_id_are_all_different(self, no_id):
        assert len(with_current_messages([with_id(QUESTION, no_id)], [with_id(QUESTION, no_id)])) == 2

    def test_an_id_that_could_be_none_of_ours_does_no_harm(self):
        assert len(with_current_messages([with_id(QUESTION, "1")], [with_id(ANSWER, ["1"])])) == 2


class TestValidForModel:
    @pytest.mark.parametrize(
        "conversation",
        [
            [],
            [SYSTEM, GREETING, QUESTION, ANSWER],
            [QUESTION, calling(ROME, OSLO), result_of(ROME), result_of(OSLO), ANSWER],
            [QUESTION, calling(ROME, OSLO), result_of(OSLO, ROME)],
            [calling(ROME), result_of(ROME), calling(ROME), result_of(ROME)],
            [calling(NAMELESS, NAMELESS), result_of(NAMELESS), result_of(NAMELESS)],
            [calling(ROME, text="Let me look.", reasoning="I need the weather."), result_of(ROME)],
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
        assert valid_for_model(conversation) == expected

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
        assert valid_for_model(conversation) == expected

    def test_keeps_name_and_meta_of_a_message_that_loses_a_call(self):
        message = ChatMessage.from_assistant("Let me look.", {"model": "x"}, "bot", [ROME])
        assert valid_for_model([message]) == [ChatMessage.from_assistant("Let me look.", {"model": "x"}, "bot")]

    def test_keeps_calls_and_other_parts_in_their_order(self):
        parts = [ReasoningContent("Hm."), OSLO, TextContent("Let me look."), ROME]
        expected = [ReasoningContent("Hm."), OSLO, TextContent("Let me look.")]
        valid = valid_for_model([ChatMessage(ChatRole.ASSISTANT, parts), result_of(OSLO)])
        assert valid[0]._content == expected

    @pytest.mark.parametrize("parts", [[], [ReasoningContent("Hm.")]], ids=["empty", "reasoning"])
    def test_does_not_judge_messages_that_never_held_a_call(self, parts):
        conversation = [ChatMessage(ChatRole.ASSISTANT, parts)]
        assert same_objects(valid_for_model(conversation), conversation)


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
            [ChatMessage(ChatRole.USER, [ROME]), result_of(ROME)],
            [calling(ROME), ChatMessage(ChatRole.USER, [ToolCallResult("done", ROME, False)])],
        ],
    )
    def test_refuses_what_providers_refuse(self, conversation):
        assert problems(conversation) != []
        for run in (StrictChatGenerator().run, lambda messages: asyncio.run(StrictChatGenerator().run_async(messages))):
            with pytest.raises(ValueError, match="refuses the conversation"):
                run(conversation)


# ---------------------------------------------------------------------- properties

# How long an example takes says something about the machine, nothing about the rules.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

plain_messages = st.one_of(
    st.sampled_from([SYSTEM, GREETING]),
    st.text(max_size=3).map(ChatMessage.from_user),
    st.text(max_size=3).map(ChatMessage.from_assistant),
)
tool_calls = st.builds(
    ToolCall,
    tool_name=st.sampled_from(["weather", "time"]),
    arguments=st.sampled_from([{}, {"city": "Rome"}]),
    id=st.sampled_from([None, "a", "b", "c"]),
)
texts = st.none() | st.sampled_from(["", "Let me look."])
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
    exchange = [calling(*calls, text=draw(texts), reasoning=draw(reasonings))]
    while answered:
        size = draw(st.integers(1, len(answered)))
        exchange.append(result_of(*answered[:size]))
        answered = answered[size:]
    return exchange


def conversations_of(*pieces):
    return st.lists(st.one_of(*pieces), max_size=8).map(lambda drawn: [message for piece in drawn for message in piece])


single_messages = st.one_of(
    plain_messages,
    st.builds(calling, tool_calls, text=texts, reasoning=reasonings),
    st.lists(tool_calls, min_size=1, max_size=3).map(lambda calls: result_of(*calls)),
).map(lambda message: [message])
valid_conversations = conversations_of(plain_messages.map(lambda message: [message]), exchanges(complete=True))
any_conversations = conversations_of(single_messages, exchanges(), exchanges(complete=True))


def pairs(messages):
    """
    Return (index of the call's message, index of its result's message) for each call that has a result.
    """
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
@given(any_conversations)
def test_what_people_and_models_said_is_never_lost_or_reordered(conversation):
    def said(messages):
        return [(message.role, message.texts) for message in messages if any(message.texts)]

    def untouched(messages):
        return [message for message in messages if message.role in (ChatRole.USER, ChatRole.SYSTEM)]

    valid = valid_for_model(conversation)
    assert said(valid) == said(conversation)
    assert same_objects(untouched(valid), untouched(conversation))


@untimed
@given(any_conversations)
def test_the_conversation_passed_in_is_not_changed(conversation):
    before, objects = copy.deepcopy(conversation), list(conversation)
    valid_for_model(conversation)
    assert conversation == before
    assert same_objects(conversation, objects)


@untimed
@given(any_conversations)
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

    kept = {call.id for message in valid_for_model(conversation) for call in message.tool_calls}
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
