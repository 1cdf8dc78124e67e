# SPDX-License-Identifier: Apache-2.0
"""
Agents with a memory: what is stored of a run, what the model sees of a history, and what happens in special cases.
"""

import asyncio
import copy
import json
import logging
import subprocess
import sys
import threading
from dataclasses import replace
from typing import ClassVar

import pytest
from agent_programs import (
    ENGINES,
    HISTORY,
    WAYS,
    ScriptedModel,
    databases,
    ids,
    questions,
    said,
    tool,
)
from haystack import DeserializationError, Pipeline
from haystack.components.agents import Agent, State
from haystack.components.generators.chat import MockChatGenerator
from haystack.components.generators.utils import print_streaming_chunk
from haystack.dataclasses import ChatMessage, ChatRole, ImageContent, TextContent, ToolCall
from haystack.hooks import hook
from haystack.hooks.compaction import CompactionHook, SlidingWindowCompactor
from haystack.hooks.human_in_the_loop import ConfirmationHook, ToolExecutionDecision
from haystack.hooks.tool_result_offloading import AlwaysOffload, FileSystemToolResultStore, ToolResultOffloadHook
from haystack.token_counters import ApproximateTokenCounter
from haystack_integrations.hooks.chat_store import ChatHistoryLoader, ChatHistorySaver, chat_history_hooks

from haystack_chat_store import ChatMessageStoreError, SQLiteChatMessageStore
from haystack_chat_store.errors import MessageEncodingError
from haystack_chat_store.rounds import MESSAGE_ID_KEY

HANG_LIMIT = 60


class FailingStore(SQLiteChatMessageStore):
    """
    A store that fails to write as often as it is told to.
    """

    failures: ClassVar = []

    def write_messages(self, chat_history_id, messages):
        if self.failures:
            raise self.failures.pop(0)
        return super().write_messages(chat_history_id, messages)

    async def write_messages_async(self, chat_history_id, messages):
        if self.failures:
            raise self.failures.pop(0)
        return await super().write_messages_async(chat_history_id, messages)


@pytest.fixture
def failing_store(tmp_path, monkeypatch):
    monkeypatch.setattr(FailingStore, "failures", [])
    store = FailingStore(tmp_path / "h.db", last_k=None)
    yield store
    store.close()


@pytest.fixture(scope="module")
def make_store():
    with databases() as make:
        yield make


@pytest.fixture(params=ENGINES)
def store(request, make_store, tmp_path):
    return make_store(request.param, tmp_path)


@pytest.fixture(params=WAYS)
def run(request):
    return WAYS[request.param]


def user(text, **meta):
    return ChatMessage.from_user(text, meta=meta)


def reply(text=None, *calls, **meta):
    return ChatMessage.from_assistant(text, tool_calls=list(calls), meta=meta)


def call(key, name="look_up", call_id=None):
    return ToolCall(tool_name=name, arguments={"key": key}, id=call_id or f"call {key}")


def result(key, name="look_up"):
    return ChatMessage.from_tool(f"value of {key}", origin=call(key, name))


def look_up(key: str) -> str:
    return f"value of {key}"


def break_down(key: str) -> str:
    raise RuntimeError("The tool is broken.")


def agent_with(store, *replies, hooks=None, hook_options=None, **options):
    options.setdefault("tools", [tool("look_up", look_up), tool("measure", look_up)])
    mapping = chat_history_hooks(store, hooks=hooks, **(hook_options or {}))
    return Agent(chat_generator=ScriptedModel(*replies), hooks=mapping, **options)


def asked(agent, time=-1):
    return [said(message) for message in agent.chat_generator.asked[time]]


def says(messages):
    return [said(message) for message in messages]


def stored_in(store, history="h"):
    return store.retrieve_messages(history)


# ---------------------------------------------------------------------- what is stored, and seen again


def test_a_run_is_stored_whole_and_seen_by_the_next_one(store, run):
    agent = agent_with(
        store,
        reply("Let me see.", call("a"), call("b", "measure")),
        reply("It is a."),
        reply("As I said."),
        system_prompt="Be brief.",
    )
    first = run(agent, [user("What is it?")])
    assert first["exit_reason"] == "text"
    expected = says(
        [
            user("What is it?"),
            reply("Let me see.", call("a"), call("b", "measure")),
            result("a"),
            result("b", "measure"),
        ]
    )
    expected += says([reply("It is a.")])
    assert says(stored_in(store)) == expected

    second = run(agent, [user("Really?")])
    system = says([ChatMessage.from_system("Be brief.")])
    assert asked(agent) == system + expected + says([user("Really?")])
    assert says(stored_in(store)) == expected + says([user("Really?"), reply("As I said.")])
    assert says(second["messages"]) == asked(agent) + says([reply("As I said.")])


def test_what_a_run_produces_names_its_question_and_what_it_was_given_does_not(store, run):
    run(agent_with(store, reply(None, call("a")), reply("Done.")), [user("Hi"), reply("Hello!"), user("Look!")])
    stored = stored_in(store)
    question = stored[2].meta[MESSAGE_ID_KEY]
    assert questions(stored) == [None, None, None, question, question, question]


def test_the_question_is_stored_before_the_model_is_asked(store, run):
    def look(messages):
        assert says(stored_in(store)) == says([user("Hi")])
        return reply("Hello!")

    run(agent_with(store, look), [user("Hi")])


def test_every_step_is_stored_before_the_next_one_begins(store, run):
    seen = []

    def look_and_tell(key: str) -> str:
        seen.append(says(stored_in(store)))
        return f"value of {key}"

    def answer(messages):
        seen.append(says(stored_in(store)))
        return reply("Done.")

    agent = agent_with(store, reply(None, call("a")), answer, tools=[tool("look_up", look_and_tell)])
    run(agent, [user("Hi")])
    assert seen == [says([user("Hi"), reply(None, call("a"))]), says([user("Hi"), reply(None, call("a")), result("a")])]


def test_only_the_end_of_the_history_is_loaded(store, run):
    for number in range(5):
        store.write_messages("h", [user(f"question {number}"), reply(f"answer {number}")])
    agent = agent_with(store, reply("Yes."), hook_options={"last_k": 2})
    run(agent, [user("Really?")])
    window = [user("question 3"), reply("answer 3"), user("question 4"), reply("answer 4"), user("Really?")]
    assert asked(agent) == says(window)


def test_what_is_loaded_fits_the_tokens(store, run):
    for number in range(50):
        store.write_messages("h", [user(f"question {number}"), reply("blah " * 50)])
    counter = ApproximateTokenCounter()
    agent = agent_with(store, reply("Yes."), hook_options={"last_k": None, "max_tokens": 500, "token_counter": counter})
    run(agent, [user("Really?")])
    (seen,) = agent.chat_generator.asked
    assert 400 < counter.count(seen) <= 500


def test_the_windows_start_moves_in_steps(store, run):
    starts = []
    for number in range(12):
        agent = agent_with(store, reply("Yes."), hook_options={"last_k": 2, "window_step": 3})
        run(agent, [user(str(number))])
        starts.append(agent.chat_generator.asked[0][0].text)
    assert starts == ["0"] * 5 + ["3"] * 3 + ["6"] * 3 + ["9"]


# ---------------------------------------------------------------------- which history


def test_the_history_may_come_from_the_state(store, run):
    agent = agent_with(store, reply("Hello!"), state_schema={"chat_history_id": {"type": str}})
    run(agent, [user("Hi")], hook_context=None, chat_history_id="from the state")
    assert says(stored_in(store, "from the state")) == says([user("Hi"), reply("Hello!")])


def test_the_history_of_the_hook_context_goes_first(store, run):
    agent = agent_with(store, reply("Hello!"), state_schema={"chat_history_id": {"type": str}})
    run(agent, [user("Hi")], hook_context={"chat_history_id": "from the context"}, chat_history_id="from the state")
    assert store.count_messages("from the context") == 2
    assert store.count_messages("from the state") == 0


@pytest.mark.parametrize(
    "context", [None, {}, {"chat_history_id": None}, {"chat_history_id": ""}, {"chat_history_id": 7}]
)
def test_without_a_history_the_run_fails_before_the_model_is_asked(store, run, context):
    agent = agent_with(store, reply("Hello!"))
    with pytest.raises(ValueError, match="chat_history_id"):
        run(agent, [user("Hi")], hook_context=context)
    assert agent.chat_generator.asked == []


@pytest.mark.parametrize("history", ["\ud800", "NUL \x00", "x" * 513])
@pytest.mark.parametrize("last_k", [10, 0])
def test_with_an_id_that_cannot_be_one_the_run_fails_before_the_model_is_asked(store, run, history, last_k):
    agent = agent_with(store, reply("Hello!"), hook_options={"last_k": last_k})
    with pytest.raises(ValueError, match="chat_history_id"):
        run(agent, [user("Hi")], hook_context={"chat_history_id": history})
    assert agent.chat_generator.asked == []


def test_a_message_with_an_id_that_cannot_be_one_fails_before_the_model_is_asked(store, run):
    agent = agent_with(store, reply("Hello!"))
    with pytest.raises(ValueError, match="chat_message_id"):
        run(agent, [user("Hi", chat_message_id=["not", "text"])])
    assert agent.chat_generator.asked == []


# ---------------------------------------------------------------------- what is the caller's


def test_the_state_of_a_run_can_be_serialized_and_goes_on(failing_store, run):
    @hook
    def serialize(state: State) -> None:
        data = State.from_dict(state.to_dict()).data
        assert data["messages"] == state.data["messages"]
        assert data["hook_context"] == state.data["hook_context"]
        state.data.update(data)

    # The question is not saved when the state is serialized.
    failing_store.failures.append(ChatMessageStoreError("The disk is full."))
    hooks = {"before_llm": [serialize], "on_exit": [serialize]}
    options = {"hooks": hooks, "hook_options": {"raise_on_failure": False}, "tools": []}
    run(agent_with(failing_store, reply("Hello!"), **options), [user("Hi")])
    assert says(stored_in(failing_store)) == says([user("Hi"), reply("Hello!")])


def test_nothing_of_the_callers_is_changed(store, run):
    class Connection:
        def __deepcopy__(self, memo):
            raise TypeError("A connection cannot be copied.")

    connection = Connection()
    messages = [user("Hi", mine=True), reply("Hello!"), user("Look!", chat_message_id="own")]
    before = copy.deepcopy(messages)
    answer = reply("Done.", model="m")
    answer_before = copy.deepcopy(answer)
    context = {**HISTORY, "connection": connection}
    same_messages, same_context = list(messages), dict(context)

    run(agent_with(store, answer), messages, hook_context=context)

    assert all(one is other for one, other in zip(messages, same_messages, strict=True))
    assert (messages, answer, context) == (before, answer_before, same_context)


def test_an_object_that_is_said_twice_is_stored_twice(store, run):
    yes = user("Yes.")
    run(agent_with(store, reply("Good.")), [yes, reply("Really?"), yes])
    assert says(stored_in(store)) == says([yes, reply("Really?"), yes, reply("Good.")])


def test_other_hooks_find_what_the_caller_put_into_the_context(store, run):
    found = []

    @hook
    def look(state: State) -> None:
        found.append(state.data["hook_context"]["connection"])

    connection = threading.Lock()  # which cannot be copied
    agent = agent_with(store, reply("Hello!"), hooks={"before_run": [look], "after_run": [look]})
    run(agent, [user("Hi")], hook_context={**HISTORY, "connection": connection})
    assert found == [connection, connection]


# ---------------------------------------------------------------------- ids, and messages that come back


def test_messages_keep_the_ids_that_they_bring(store, run):
    agent = agent_with(store, reply("Hello!", chat_message_id="answer"))
    run(agent, [user("Hi", chat_message_id="question")])
    assert ids(stored_in(store)) == ["question", "answer"]
    assert questions(stored_in(store)) == [None, "question"]


def test_a_message_that_brings_an_id_is_not_thereby_stored(store, run):
    run(agent_with(store, reply("Hello!")), [user("Hi", chat_message_id="own")])
    run(agent_with(store, reply("Hello!")), [user("Hi", chat_message_id="own")], hook_context={"chat_history_id": "i"})
    assert says(stored_in(store, "i")) == says([user("Hi"), reply("Hello!")])


@pytest.mark.parametrize("last_k", [10, 1, None])
def test_feeding_the_whole_transcript_back_stores_nothing_twice(store, run, last_k):
    agent = agent_with(store, hook_options={"last_k": last_k}, system_prompt="Be brief.")
    transcript = []
    for number in range(4):
        agent.chat_generator.replies += [reply(None, call(str(number))), reply(f"answer {number}")]
        transcript = run(agent, [*transcript, user(f"question {number}")])["messages"]
        transcript = [message for message in transcript if message.role is not ChatRole.SYSTEM]
    expected = [
        message
        for number in range(4)
        for message in (
            user(f"question {number}"),
            reply(None, call(str(number))),
            result(str(number)),
            reply(f"answer {number}"),
        )
    ]
    assert says(stored_in(store)) == says(expected)
    seen = [text for _, text, _, _ in asked(agent) if text and text.startswith("question")]
    assert seen == [f"question {number}" for number in range({10: 0, 1: 2, None: 0}[last_k], 4)]


def test_a_transcript_that_is_longer_than_the_window_is_not_doubled(store, run):
    agent = agent_with(store, hook_options={"last_k": 1})
    whole = []
    for number in range(4):
        agent.chat_generator.replies.append(reply(f"answer {number}"))
        whole.append(user(f"question {number}", chat_message_id=f"q{number}"))
        whole.append(run(agent, whole)["last_message"])
    assert says(stored_in(store)) == says(whole)
    assert asked(agent) == says(whole[4:7])


def test_a_transcript_without_anything_new_costs_no_call_of_the_model(store, run):
    whole = []
    for number in range(3):
        agent = agent_with(store, reply(f"answer {number}"))
        whole = run(agent, [*whole, user(f"question {number}")])["messages"]
    again = agent_with(store, hook_options={"last_k": 1})
    assert run(again, whole)["last_message"].text == "answer 2"
    assert again.chat_generator.asked == []
    assert store.count_messages("h") == 6


def test_a_new_message_is_seen_wherever_it_stands(store, run):
    hello = user("Hello!", chat_message_id="known")
    store.write_messages("h", [hello, reply("Hi!")])
    agent = agent_with(store, reply("Well."))
    run(agent, [user("This is new."), hello])
    assert asked(agent) == says([hello, reply("Hi!"), user("This is new.")])
    stored = stored_in(store)
    assert says(stored) == asked(agent) + says([reply("Well.")])
    assert questions(stored)[-1] == ids(stored)[-2]


def test_messages_of_another_transcript_are_not_lost(store, run):
    store.write_messages("h", [user("Hi", chat_message_id="known"), reply("Hello!")])
    # The second stands before a stored one, and is not.
    messages = [user("Elsewhere", chat_message_id="new"), user("Hi", chat_message_id="known"), user("So?")]
    agent = agent_with(store, reply("Well."))
    run(agent, messages)
    assert sorted(says(stored_in(store))) == sorted(
        says([user("Hi"), reply("Hello!"), user("Elsewhere"), user("So?"), reply("Well.")])
    )


def test_what_the_model_must_not_see_of_the_question_is_stored(store, run):
    orphan = result("z")
    agent = agent_with(store, reply("Well."))
    run(agent, [user("Hi"), reply("Wait.", call("y")), user(" "), orphan, user("So?")])
    assert asked(agent) == says([user("Hi"), reply("Wait."), user("So?")])
    everything = [user("Hi"), reply("Wait.", call("y")), user(" "), orphan, user("So?"), reply("Well.")]
    assert says(stored_in(store)) == says(everything)


def test_the_same_question_again_gets_the_stored_answer(store, run):
    run(agent_with(store, reply("Hello!")), [user("Hi", chat_message_id="own")])
    again = agent_with(store)
    outcome = run(again, [user("Hi", chat_message_id="own")])
    assert again.chat_generator.asked == []
    assert outcome["last_message"].text == "Hello!"
    assert outcome["exit_reason"] == "text"
    assert outcome["step_count"] == 0
    assert store.count_messages("h") == 2


def test_an_older_question_again_gets_its_own_answer(store, run):
    for number in range(3):
        run(agent_with(store, reply(f"answer {number}")), [user(f"question {number}", chat_message_id=f"q{number}")])
    outcome = run(agent_with(store), [user("question 1", chat_message_id="q1")])
    assert outcome["last_message"].text == "answer 1"
    assert store.count_messages("h") == 6


@pytest.mark.parametrize("raise_on_failure", [True, False])
def test_a_question_from_before_the_window_is_not_answered_twice(store, run, raise_on_failure):
    for number in range(3):
        run(agent_with(store, reply(f"answer {number}")), [user(f"question {number}", chat_message_id=f"q{number}")])
    agent = agent_with(store, hook_options={"last_k": 1, "raise_on_failure": raise_on_failure})
    with pytest.raises(ValueError, match="'q0' was asked before, further back than"):
        run(agent, [user("question 0", chat_message_id="q0")])
    assert agent.chat_generator.asked == []
    assert store.count_messages("h") == 6


def test_a_question_that_another_run_has_begun_to_answer_meanwhile_is_not_answered_twice(store, run):
    question = user("Look!", chat_message_id="q")

    @hook
    def ask_elsewhere(state: State) -> None:
        store.write_messages("h", [question])

    agent = agent_with(store, hooks={"before_run": [ask_elsewhere]})
    with pytest.raises(ValueError, match="or another run is answering it"):
        run(agent, [question])
    assert agent.chat_generator.asked == []


def test_a_reply_with_the_meta_of_its_question_is_stored_all_the_same(store, run):
    question = user("Hi", chat_message_id="q")
    run(agent_with(store, ChatMessage.from_assistant("Hello!", meta=question.meta)), [question])
    assert says(stored_in(store)) == says([question, reply("Hello!")])


def test_a_transcript_that_is_longer_than_the_window_may_come_without_a_new_question(store, run):
    messages = []
    for number in range(3):
        outcome = run(agent_with(store, reply(f"answer {number}")), [*messages, user(f"question {number}")])
        messages = outcome["messages"]
    agent = agent_with(store, hook_options={"last_k": 1})
    assert run(agent, messages)["last_message"].text == "answer 2"
    assert agent.chat_generator.asked == []


def test_an_older_question_whose_answer_failed_is_answered_at_its_place(store, run):
    failing = agent_with(store, RuntimeError("The model is down."))
    with pytest.raises(RuntimeError):
        run(failing, [user("first", chat_message_id="q1")])
    run(agent_with(store, reply("second answer")), [user("second", chat_message_id="q2")])
    retry = agent_with(store, reply("first answer"))
    run(retry, [user("first", chat_message_id="q1")])
    assert asked(retry) == says([user("first")])

    later = agent_with(store, reply("Yes."))
    run(later, [user("third")])
    expected = [user("first"), reply("first answer"), user("second"), reply("second answer"), user("third")]
    assert asked(later) == says(expected)


# ---------------------------------------------------------------------- going on


def test_a_run_without_new_messages_goes_on_after_the_last_complete_step(store, run):
    begun = [user("Look!"), reply(None, call("a")), result("a"), reply("Once more.", call("b"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Done."), system_prompt="Be brief.")
    outcome = run(agent, [])
    assert asked(agent) == says([ChatMessage.from_system("Be brief."), *begun[:3]])
    assert outcome["last_message"].text == "Done."
    stored = stored_in(store)
    assert says(stored) == says([*begun, reply("Done.")])
    assert questions(stored)[-1] == stored[0].meta[MESSAGE_ID_KEY]


def test_a_turn_that_was_interrupted_twice_goes_on(store, run):
    begun = [user("Look!"), reply("I try.", call("a")), reply("I try.", call("a"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Done."))
    run(agent, [])
    assert asked(agent) == says([user("Look!")])


def test_a_new_question_after_an_interrupted_turn_is_answered(store, run):
    begun = [user("Look!"), reply(None, call("a")), result("a"), reply("Once more.", call("b"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Hello!"))
    run(agent, [user("Hi")])
    stored = stored_in(store)
    assert says(stored) == says([*begun, user("Hi"), reply("Hello!")])
    assert questions(stored)[-1] == ids(stored)[-2]


def test_a_complete_history_costs_no_call_of_the_model(store, run):
    run(agent_with(store, reply(None, call("a")), reply("Done.")), [user("Look!")])
    agent = agent_with(store)
    outcome = run(agent, [])
    assert agent.chat_generator.asked == []
    assert says(outcome["messages"]) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])
    assert (outcome["last_message"].text, outcome["exit_reason"], outcome["step_count"]) == ("Done.", "text", 0)
    assert store.count_messages("h") == 4


def test_on_a_complete_history_no_hook_before_the_model_runs(store, run):
    """
    It could ask a model itself, to summarize what is there.
    """
    seen = []

    @hook
    def look(state: State) -> None:
        seen.append(len(state.data["messages"]))

    run(agent_with(store, reply("Hello!"), hooks={"before_llm": [look]}), [user("Hi")])
    run(agent_with(store, hooks={"before_llm": [look]}), [])
    assert seen == [1]


def test_a_reply_that_was_cut_short_is_complete(store, run):
    run(agent_with(store, reply("And so on and", finish_reason="length"), tools=[]), [user("Tell me.")])
    agent = agent_with(store)
    assert run(agent, [])["exit_reason"] == "length"
    assert agent.chat_generator.asked == []


def test_an_empty_history_is_left_to_the_agent(store, run):
    agent = agent_with(store, reply("Hello!"))
    run(agent, [])
    assert asked(agent) == []


def test_a_tool_result_that_the_caller_brings_answers_the_stored_call(store, run):
    begun = [user("Look!", chat_message_id="q"), reply(None, call("a"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Done."))
    run(agent, [result("a")])
    assert asked(agent) == says([*begun, result("a")])
    assert questions(stored_in(store)) == [None, None, None, "q"]


TURN = [user("Look!", chat_message_id="q"), reply("I look.", call("a")), result("a"), reply("It is " + "a" * 400)]
EARLIER = [message for number in range(3) for message in (user(f"question {number}"), reply("answer"))]
SMALL_WINDOWS = {
    "no history": {"last_k": 0},
    "not the question": {"max_tokens": 1},
    "not the last step": {"max_tokens": 20},
    "as many as fit": {"last_k": None, "max_tokens": 20},
    "one round": {"last_k": 1},
}


@pytest.fixture(params=["round", "message"])
def counting_store(request, make_store, tmp_path):
    """
    A store that counts rounds, or one that counts messages.
    """
    return make_store("sqlite", tmp_path, last_k_unit=request.param)


@pytest.fixture(params=SMALL_WINDOWS.values(), ids=SMALL_WINDOWS)
def small_window(request):
    return request.param


@pytest.mark.parametrize("brought", [[], TURN[:1]], ids=["nothing new", "the question again"])
def test_a_complete_turn_is_complete_however_small_the_window(counting_store, run, small_window, brought):
    counting_store.write_messages("h", [*EARLIER, *TURN])
    agent = agent_with(counting_store, hook_options=small_window)
    outcome = run(agent, brought)
    assert (outcome["last_message"].text, outcome["exit_reason"]) == (TURN[-1].text, "text")
    assert agent.chat_generator.asked == []
    assert says(stored_in(counting_store)) == says([*EARLIER, *TURN])


@pytest.mark.parametrize("brought", [[], TURN[:1]], ids=["nothing new", "the question again"])
@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_turn_goes_on_whole_however_small_the_window(counting_store, run, small_window, brought, done):
    counting_store.write_messages("h", [*EARLIER, *TURN[:done]])
    agent = agent_with(counting_store, reply("Done."), hook_options=small_window)
    run(agent, brought)
    assert asked(agent)[-done:] == says(TURN[:done])
    stored = stored_in(counting_store)
    assert says(stored) == says([*EARLIER, *TURN[:done], reply("Done.")])
    assert questions(stored)[-1] == "q"


@pytest.mark.parametrize("window", [{"last_k": 0}, {"last_k": 2}, {"last_k": 2, "window_step": 3}, {"max_tokens": 40}])
def test_before_an_interrupted_turn_the_model_sees_what_it_saw_when_the_turn_began(store, run, window):
    store.write_messages("h", [*EARLIER, *EARLIER])
    agent = agent_with(store, reply(None, call("a")), RuntimeError("The model is down."), hook_options=window)
    with pytest.raises(RuntimeError):
        run(agent, [user("Look!")])
    again = agent_with(store, reply("Done."), hook_options=window)
    run(again, [])
    # Of a budget, the steps of the turn have their share.
    seen, seen_first = asked(again), asked(agent)
    assert seen == seen_first if "max_tokens" not in window else seen == seen_first[-len(seen) :]


def test_a_question_of_the_last_rounds_is_known_again(store, run):
    store.write_messages("h", [*TURN, *EARLIER])
    agent = agent_with(store, hook_options={"last_k": 4})
    assert run(agent, TURN[:1])["last_message"].text == TURN[-1].text
    assert agent.chat_generator.asked == []


def test_the_question_of_a_long_turn_is_found_however_often_a_hook_spoke_for_the_user(store, run):
    spoken = [user(f"More, {number}.", chat_question_id="q") for number in range(70)]
    store.write_messages("h", [*EARLIER, user("Look!", chat_message_id="q"), *spoken])
    agent = agent_with(store, reply("Done."), hook_options={"last_k": 1})
    run(agent, [])
    assert asked(agent)[-71:] == says([user("Look!"), *spoken])
    assert questions(stored_in(store))[-1] == "q"


def test_a_question_that_says_nothing_is_no_turn(store, run):
    store.write_messages("h", [user("Hi"), reply("Hello!"), user(" ")])
    agent = agent_with(store)
    assert run(agent, [])["last_message"].text == "Hello!"
    assert agent.chat_generator.asked == []


@pytest.mark.parametrize("before", [[], [user("Hi"), reply("Hello!")]])
@pytest.mark.parametrize("brought", [user(" "), result("nothing")])
def test_new_messages_that_say_nothing_fail_before_the_model_is_asked(store, run, before, brought):
    store.write_messages("h", before)
    agent = agent_with(store, reply("What?"))
    with pytest.raises(ValueError, match="says anything to a model"):
        run(agent, [brought])
    assert agent.chat_generator.asked == []
    assert says(stored_in(store)) == says(before)


def test_a_run_that_ends_at_once_stores_nothing_that_hooks_add(store, run):
    @hook
    def remind(state: State) -> None:
        state.set("messages", [user("Be polite.")])

    hooks = {"before_run": [remind], "after_run": [remind]}
    run(agent_with(store, reply("Hello!"), hooks={"before_run": [remind]}), [user("Hi")])
    stored = stored_in(store)
    for _start in range(2):
        agent = agent_with(store, hooks=hooks)
        assert run(agent, [])["exit_reason"] == "text"
        assert agent.chat_generator.asked == []
    assert stored_in(store) == stored


def test_a_run_that_ends_at_once_stores_what_the_caller_brings_besides(store, run):
    store.write_messages("h", [user("Hi", chat_message_id="q"), reply("Hello!")])
    agent = agent_with(store)
    run(agent, [user("Elsewhere", chat_message_id="other"), user("Hi", chat_message_id="q")])
    assert says(stored_in(store)) == says([user("Hi"), reply("Hello!"), user("Elsewhere")])


def test_a_reply_without_text_does_not_end_a_turn(store, run):
    """
    Haystack asks an agent's model again then.
    """
    picture = ImageContent(base64_image="aGk=", mime_type="image/png", validation=False)
    store.write_messages("h", [user("Draw!"), ChatMessage(ChatRole.ASSISTANT, [picture])])
    agent = agent_with(store, reply("Done."))
    agent.chat_generator = MockChatGenerator("Done.")
    assert run(agent, [])["step_count"] == 1


# ---------------------------------------------------------------------- ends of a run


def test_after_an_error_of_the_model_the_turn_goes_on(store, run):
    failing = agent_with(store, reply(None, call("a")), RuntimeError("The model is down."))
    with pytest.raises(RuntimeError, match="down"):
        run(failing, [user("Look!")])
    steps = [user("Look!"), reply(None, call("a")), result("a")]
    assert says(stored_in(store)) == says(steps)
    agent = agent_with(store, reply("Done."))
    run(agent, [])
    assert asked(agent) == says(steps)
    assert says(stored_in(store)) == says([*steps, reply("Done.")])


def test_after_an_error_of_a_tool_the_step_is_taken_again(store, run):
    calls = [call("a"), call("b", "break_down")]
    tools = [tool("look_up", look_up), tool("break_down", break_down)]
    failing = agent_with(store, reply("I look.", *calls), tools=tools, raise_on_tool_invocation_failure=True)
    with pytest.raises(Exception, match="broken"):
        run(failing, [user("Look!")])
    assert says(stored_in(store)) == says([user("Look!"), reply("I look.", *calls)])
    agent = agent_with(store, reply("Done."), tools=tools)
    run(agent, [])
    assert asked(agent) == says([user("Look!")])


def test_an_error_of_a_tool_that_the_model_is_told_is_stored(store, run):
    agent = agent_with(
        store,
        reply(None, call("a", "break_down")),
        reply("It is broken."),
        tools=[tool("break_down", break_down)],
        raise_on_tool_invocation_failure=False,
    )
    run(agent, [user("Look!")])
    stored = stored_in(store)
    assert [message.role.value for message in stored] == ["user", "assistant", "tool", "assistant"]
    assert stored[2].tool_call_result.error


def test_a_cancelled_run_keeps_what_it_saved(store):
    class WaitingModel:
        def __init__(self, *replies):
            self.run = ScriptedModel(*replies).run

        async def run_async(self, messages, tools):
            outcome = self.run(messages, tools)
            if len(messages) > 1:
                answering.set()
                await asyncio.Event().wait()
            return outcome

    async def cancel():
        mapping = chat_history_hooks(store)
        model = WaitingModel(reply(None, call("a")), reply("Never heard."))
        agent = Agent(chat_generator=model, tools=[tool("look_up", look_up)], hooks=mapping)
        task = asyncio.create_task(agent.run_async([user("Look!")], hook_context=HISTORY))
        await answering.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        steps = [user("Look!"), reply(None, call("a")), result("a")]
        assert says(stored_in(store)) == says(steps)
        again = agent_with(store, reply("Done."))
        await again.run_async([], hook_context=HISTORY)
        assert says(stored_in(store)) == says([*steps, reply("Done.")])

    answering = asyncio.Event()
    asyncio.run(cancel())


def test_a_run_that_ends_for_want_of_steps_is_stored_and_goes_on(store, run):
    agent = agent_with(store, reply(None, call("a")), reply(None, call("b")), max_agent_steps=2)
    assert run(agent, [user("Look!")])["exit_reason"] == "max_agent_steps"
    steps = [user("Look!"), reply(None, call("a")), result("a"), reply(None, call("b")), result("b")]
    assert says(stored_in(store)) == says(steps)
    again = agent_with(store, reply("Done."))
    run(again, [])
    assert asked(again) == says(steps)


def test_a_turn_that_ended_with_a_tool_is_complete(store, run):
    options = {"exit_conditions": ["text", "look_up"]}
    hook_options = {"exit_conditions": options["exit_conditions"]}
    agent = agent_with(store, reply(None, call("m", "measure"), call("a")), hook_options=hook_options, **options)
    assert run(agent, [user("Look!")])["exit_reason"] == "look_up"
    steps = [user("Look!"), reply(None, call("m", "measure"), call("a")), result("m", "measure"), result("a")]
    assert says(stored_in(store)) == says(steps)

    again = agent_with(store, hook_options=hook_options, **options)
    outcome = run(again, [])
    assert again.chat_generator.asked == []
    assert (outcome["exit_reason"], says(outcome["messages"])) == ("look_up", says(steps))


def test_a_turn_whose_last_tool_failed_is_not_complete(store, run):
    options = {"exit_conditions": ["look_up"], "tools": [tool("look_up", break_down)], "max_agent_steps": 1}
    options["raise_on_tool_invocation_failure"] = False
    hook_options = {"exit_conditions": ["look_up"]}
    run(agent_with(store, reply(None, call("a")), hook_options=hook_options, **options), [user("Look!")])
    again = agent_with(store, reply("It is broken."), hook_options=hook_options, **options)
    assert run(again, [])["last_message"].text == "It is broken."


@pytest.mark.parametrize("added", [[], [user("Call look_up first.")], [ChatMessage.from_system("Call look_up.")]])
def test_what_comes_after_an_exit_that_a_hook_prevented_is_stored(store, run, added):
    @hook
    def keep_running(state: State) -> None:
        if not state.data["tool_call_counts"]["look_up"]:
            state.set("messages", added)
            state.set("continue_run", True)

    agent = agent_with(
        store, reply("Done."), reply(None, call("a")), reply("Now it is."), hooks={"on_exit": [keep_running]}
    )
    run(agent, [user("Look!")])
    expected = [user("Look!"), reply("Done."), *added, reply(None, call("a")), result("a"), reply("Now it is.")]
    expected = [message for message in expected if message.role is not ChatRole.SYSTEM]
    stored = stored_in(store)
    assert says(stored) == says(expected)
    assert questions(stored) == [None] + [ids(stored)[0]] * (len(stored) - 1)


def test_a_turn_goes_on_whole_though_a_hook_said_something_in_the_middle_of_it(store, run):
    @hook
    def keep_running(state: State) -> None:
        state.set("messages", [user("And now look.")])
        state.set("continue_run", True)

    options = {"hooks": {"on_exit": [keep_running]}, "hook_options": {"last_k": 1}}
    failing = agent_with(store, reply("No."), reply(None, call("a")), RuntimeError("The model is down."), **options)
    with pytest.raises(RuntimeError):
        run(failing, [user("Look!", chat_message_id="q")])
    again = agent_with(store, reply("Done."), hook_options={"last_k": 1})
    run(again, [])
    assert asked(again) == says(
        [user("Look!"), reply("No."), user("And now look."), reply(None, call("a")), result("a")]
    )
    assert questions(stored_in(store)) == [None, *["q"] * 5]


def test_an_answer_that_a_hook_changes_at_the_exit_is_stored_as_it_left_it(store, run):
    @hook
    def redact(state: State) -> None:
        *others, answer = state.data["messages"]
        changed = replace(answer, _content=[TextContent(answer.text.replace("4711", "…"))])
        state.set("messages", [*others, changed], handler_override=lambda old, new: new)

    run(agent_with(store, reply("It is 4711."), hooks={"on_exit": [redact]}), [user("My number?")])
    assert says(stored_in(store)) == says([user("My number?"), reply("It is ….")])


# ---------------------------------------------------------------------- with other hooks


class ScriptedStrategy:
    """
    Decides on tool calls by their key: rejects "no", changes "other", confirms all else.
    """

    def run(self, *, tool_name, tool_description, tool_params, tool_call_id=None, confirmation_strategy_context=None):
        key = tool_params["key"]
        return ToolExecutionDecision(
            tool_name=tool_name,
            tool_call_id=tool_call_id,
            execute=key != "no",
            final_tool_params={"key": "changed"} if key == "other" else tool_params,
        )


def confirming(store, *replies):
    strategies = {"*": ScriptedStrategy()}
    return agent_with(store, *replies, hooks={"before_tool": [ConfirmationHook(strategies)]})


@pytest.mark.parametrize("has_own_id", [False, True])
def test_calls_that_a_person_rejected_or_changed_are_stored_as_they_were_done(store, run, has_own_id):
    calls = [call("no"), call("yes"), call("other", "measure"), call("no", "measure", call_id="call no 2")]
    meta = {"chat_message_id": "own"} if has_own_id else {}
    run(confirming(store, reply("I look.", *calls, **meta), reply("Done.")), [user("Look!")])

    stored = stored_in(store)
    assert [(message.role.value, *(c.arguments["key"] for c in message.tool_calls)) for message in stored] == [
        ("user",),
        ("assistant", "no"),
        ("tool",),
        ("assistant", "no"),
        ("tool",),
        ("user",),
        ("assistant", "yes", "changed"),
        ("tool",),
        ("tool",),
        ("assistant",),
    ]
    assert [message.tool_call_result.error for message in stored if message.tool_call_result] == [
        True,
        True,
        False,
        False,
    ]
    assert len(set(ids(stored))) == len(stored)
    assert questions(stored) == [None] + [ids(stored)[0]] * 9

    later = agent_with(store, reply("Yes."))
    run(later, [user("Really?")])
    assert asked(later) == says([*stored, user("Really?")])


def test_a_turn_in_which_every_call_was_rejected_goes_on(store, run):
    failing = confirming(store, reply(None, call("no")), RuntimeError("The model is down."))
    with pytest.raises(RuntimeError):
        run(failing, [user("Look!")])
    again = agent_with(store, reply("As you like."))
    run(again, [])
    assert [role for role, *_ in asked(again)] == ["user", "assistant", "tool"]
    assert says(stored_in(store)) == asked(again) + says([reply("As you like.")])


@pytest.mark.filterwarnings("ignore:.* is an experimental component")
def test_what_compaction_leaves_out_is_stored_and_its_note_is_not(store, run):
    for number in range(20):
        store.write_messages("h", [user(f"question {number}"), reply("blah " * 40)])
    before = says(stored_in(store))
    compaction = CompactionHook(SlidingWindowCompactor(), context_window=1000, compact_at=0.5, compact_to=0.3)
    agent = agent_with(
        store,
        *(reply("blah " * 40, call(key)) for key in "abcdefgh"),
        reply("Done."),
        hooks={"before_llm": [compaction]},
        hook_options={"last_k": 20},
    )
    outcome = run(agent, [user("Look!")])
    steps = [message for key in "abcdefgh" for message in (reply("blah " * 40, call(key)), result(key))]
    assert says(stored_in(store)) == before + says([user("Look!"), *steps, reply("Done.")])
    notes = [message for message in outcome["messages"] if "context_compaction" in message.meta]
    assert len(notes) == 1

    # Brought back by the caller, the note is neither stored nor shown: the history is there itself.
    later = agent_with(store, reply("Yes."))
    run(later, [*outcome["messages"], user("Really?")])
    assert not any("context_compaction" in message.meta for message in later.chat_generator.asked[0])
    assert says(stored_in(store)) == before + says(
        [user("Look!"), *steps, reply("Done."), user("Really?"), reply("Yes.")]
    )


def test_a_tool_result_is_stored_whole_though_the_model_sees_where_it_was_offloaded_to(store, run, tmp_path):
    offloading = ToolResultOffloadHook(FileSystemToolResultStore(str(tmp_path / "results")), {"*": AlwaysOffload()})
    agent = agent_with(store, reply(None, call("a")), reply("Done."), hooks={"after_tool": [offloading]})
    run(agent, [user("Look!")])
    assert "offloaded" in agent.chat_generator.asked[-1][-1].tool_call_result.result
    assert says(stored_in(store)) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])


def test_what_a_hook_makes_of_the_question_is_what_is_stored(store, run):
    @hook
    def redact(state: State) -> None:
        messages = [
            ChatMessage.from_user(message.text.replace("4711", "…")) if message.role is ChatRole.USER else message
            for message in state.data["messages"]
        ]
        state.set("messages", messages, handler_override=lambda old, new: new)

    run(agent_with(store, reply("Thanks."), hooks={"before_run": [redact]}), [user("My number is 4711.")])
    later = agent_with(store, reply("Yes."))
    run(later, [user("Do you know it?")])
    assert asked(later) == says([user("My number is …."), reply("Thanks."), user("Do you know it?")])
    assert says(stored_in(store)) == asked(later) + says([reply("Yes.")])


def test_the_saver_alone_stores_a_run(store, run):
    saver = ChatHistorySaver(store)
    agent = Agent(
        chat_generator=ScriptedModel(reply(None, call("a")), reply("Done.")),
        tools=[tool("look_up", look_up)],
        hooks={point: [saver] for point in saver.allowed_hook_points},
    )
    run(agent, [user("Look!")])
    stored = stored_in(store)
    assert says(stored) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])
    assert questions(stored) == [None] + [ids(stored)[0]] * 3


def test_the_hooks_of_the_caller_are_put_in_order_and_the_mapping_stays_as_it_is(store):
    others = {point: [object()] for point in ("before_run", "before_llm", "before_tool", "after_tool", "on_exit")}
    others["after_run"] = (object(),)
    before = {point: list(hooks) for point, hooks in others.items()}
    merged = chat_history_hooks(store, hooks=others)
    kinds = {
        point: [type(one).__name__.removeprefix("ChatHistory") for one in hooks] for point, hooks in merged.items()
    }
    assert kinds == {
        "before_run": ["Loader", "object", "Saver"],
        "before_llm": ["object"],
        "before_tool": ["object", "Saver"],
        "after_tool": ["Saver", "object"],
        "on_exit": ["object", "Saver"],
        "after_run": ["Saver", "object", "Saver"],
    }
    assert {point: list(hooks) for point, hooks in others.items()} == before


# ---------------------------------------------------------------------- at the same time


class Meeting:
    """
    A hook that waits for the other run. It blocks, so an asynchronous run calls it in a thread.
    """

    def __init__(self, barrier):
        self.barrier = barrier

    def run(self, state):
        self.barrier.wait()


def interleaved_tools(barrier):
    def look_up_together(key: str) -> str:
        barrier.wait()
        return f"value of {key}"

    return [tool("look_up", look_up_together)]


def assert_together_under_their_questions(store):
    stored = stored_in(store)
    assert len(stored) == 12
    assert len(set(ids(stored))) == 12
    asked_first, asked_next = [message.text for message in stored if message.role is ChatRole.USER]
    # Their steps did interleave.
    assert [message.role.value for message in stored[:4]] == ["user", "user", "assistant", "assistant"]

    later = agent_with(store, reply("Yes."))
    later.run([user("Really?")], hook_context=HISTORY)
    expected = [
        message
        for name in (asked_first, asked_next)
        for message in (
            user(name),
            reply(None, call(f"{name} 1")),
            result(f"{name} 1"),
            reply(None, call(f"{name} 2")),
            result(f"{name} 2"),
            reply(f"Done, {name}."),
        )
    ]
    assert asked(later) == says([*expected, user("Really?")])


def script(name):
    return reply(None, call(f"{name} 1")), reply(None, call(f"{name} 2")), reply(f"Done, {name}.")


def test_two_threads_on_one_history_store_everything_and_the_model_sees_each_turn_together(store):
    barrier = threading.Barrier(2, timeout=HANG_LIMIT)
    begun = threading.Barrier(2, timeout=HANG_LIMIT)

    def turn(name):
        agent = agent_with(
            store, *script(name), tools=interleaved_tools(barrier), hooks={"before_llm": [Meeting(begun)]}
        )
        agent.run([user(name)], hook_context=HISTORY)

    threads = [threading.Thread(target=turn, args=(name,)) for name in ("Ada", "Bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_LIMIT)
    assert_together_under_their_questions(store)


def test_two_tasks_on_one_history_store_everything_and_the_model_sees_each_turn_together(store):
    barrier = threading.Barrier(2, timeout=HANG_LIMIT)  # the tools run in threads
    begun = threading.Barrier(2, timeout=HANG_LIMIT)

    def turn(name):
        agent = agent_with(
            store, *script(name), tools=interleaved_tools(barrier), hooks={"before_llm": [Meeting(begun)]}
        )
        return agent.run_async([user(name)], hook_context=HISTORY)

    async def both():
        await asyncio.gather(turn("Ada"), turn("Bob"))

    asyncio.run(both())
    assert_together_under_their_questions(store)


# ---------------------------------------------------------------------- saving fails


def test_a_run_fails_if_saving_does(failing_store, run):
    failing_store.failures.append(ChatMessageStoreError("The disk is full."))
    agent = agent_with(failing_store, reply("Hello!"))
    with pytest.raises(ChatMessageStoreError, match="disk is full"):
        run(agent, [user("Hi")])
    assert agent.chat_generator.asked == []


@pytest.mark.parametrize("times", range(1, 5))
def test_a_run_can_go_on_though_saving_fails_and_saves_later(failing_store, run, times, caplog):
    failing_store.failures += [ChatMessageStoreError("The disk is full."), RuntimeError("Secret: Look!")] * 2
    del failing_store.failures[times:]
    agent = agent_with(failing_store, reply(None, call("a")), reply("Done."), hook_options={"raise_on_failure": False})
    with caplog.at_level(logging.ERROR):
        assert run(agent, [user("Look!")])["last_message"].text == "Done."
    assert says(stored_in(failing_store)) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == times
    for number, text in enumerate(logged):
        assert ("RuntimeError" if number % 2 else "The disk is full.") in text
    assert "Look!" not in caplog.text


def test_what_cannot_be_stored_is_left_out_if_the_run_shall_go_on(store, run, caplog):
    replies = [reply(None, call("a")), reply("Done.")]
    agent = agent_with(store, *replies, hook_options={"raise_on_failure": False})
    unclear = [user("Look!"), reply("At what?", clock=object()), user("At a. Secret!")]
    with caplog.at_level(logging.ERROR):
        run(agent, unclear)
    expected = [unclear[0], unclear[2], reply(None, call("a")), result("a"), reply("Done.")]
    assert says(stored_in(store)) == says(expected)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1
    assert "cannot be saved" in logged[0]
    assert "clock" in logged[0]
    assert "At what?" not in caplog.text


def test_if_saving_fails_after_a_message_was_left_out_the_rest_is_saved_later(failing_store, run):
    agent = agent_with(failing_store, reply("Done."), hook_options={"raise_on_failure": False})
    failing_store.failures += [MessageEncodingError("No form."), MessageEncodingError("No form.")]
    failing_store.failures += [ChatMessageStoreError("The disk is full.")]
    run(agent, [user("1"), user("2"), user("3")])
    assert says(stored_in(failing_store)) == says([user("2"), user("3"), reply("Done.")])


def test_what_could_not_be_saved_is_saved_whole_though_it_was_offloaded_meanwhile(failing_store, run, tmp_path):
    offloading = ToolResultOffloadHook(FileSystemToolResultStore(str(tmp_path / "results")), {"*": AlwaysOffload()})
    agent = agent_with(
        failing_store,
        reply(None, call("a")),
        reply("Done."),
        hooks={"after_tool": [offloading]},
        hook_options={"raise_on_failure": False},
    )
    failing_store.failures += [ChatMessageStoreError("The disk is full.")] * 3
    run(agent, [user("Look!")])
    assert says(stored_in(failing_store)) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])


def test_a_run_fails_if_loading_does(tmp_path, run):
    store = SQLiteChatMessageStore(tmp_path / "no folder" / "h.db")
    agent = agent_with(store, reply("Hello!"), hook_options={"raise_on_failure": False})
    with pytest.raises(ChatMessageStoreError):
        run(agent, [user("Hi")])
    assert agent.chat_generator.asked == []


# ---------------------------------------------------------------------- settings, YAML, life


@pytest.mark.parametrize(
    "settings",
    [
        {"last_k": -1},
        {"last_k": "2"},
        {"max_tokens": 0},
        {"token_counter": object()},
        {"window_step": 0},
        {"raise_on_failure": "never"},
        {"exit_conditions": "book"},
        {"exit_conditions": [1]},
        {"chat_message_store": object()},
        {"chat_message_store": SQLiteChatMessageStore},
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        chat_history_hooks(**{"chat_message_store": SQLiteChatMessageStore(tmp_path / "h.db"), **settings})


def test_the_hooks_stand_only_where_they_make_sense(tmp_path):
    store = SQLiteChatMessageStore(tmp_path / "h.db")
    for point, one in (("before_llm", ChatHistorySaver(store)), ("after_run", ChatHistoryLoader(store))):
        with pytest.raises(ValueError, match=point):
            Agent(chat_generator=ScriptedModel(), hooks={point: [one]})


def test_the_hooks_are_serialized_with_their_store_and_all_settings(tmp_path):
    store = SQLiteChatMessageStore(tmp_path / "h.db", namespace="n")
    loader = ChatHistoryLoader(
        store,
        5,
        max_tokens=900,
        token_counter=ApproximateTokenCounter(),
        window_step=3,
        exit_conditions=["look_up"],
    )
    saver = ChatHistorySaver(store, raise_on_failure=False)
    for one in (loader, saver):
        data = one.to_dict()
        before = copy.deepcopy(data)
        again = type(one).from_dict(data)
        assert data == before
        assert again.to_dict() == data == json.loads(json.dumps(data))
        assert again.chat_message_store == store
    parameters = loader.to_dict()["init_parameters"]
    assert (parameters["last_k"], parameters["max_tokens"], parameters["window_step"]) == (5, 900, 3)
    assert parameters["exit_conditions"] == ["look_up"]
    assert saver.to_dict()["init_parameters"]["raise_on_failure"] is False


@pytest.mark.parametrize("kind", [ChatHistoryLoader, ChatHistorySaver])
def test_without_a_store_nothing_is_made(kind):
    name = f"{kind.__module__}.{kind.__name__}"
    with pytest.raises(DeserializationError, match="chat_message_store"):
        kind.from_dict({"type": name, "init_parameters": {}})


# Nothing of ours is imported here.
SCRIPT = """
import sys
from haystack import Pipeline
from haystack.dataclasses import ChatMessage

pipeline = Pipeline.loads(sys.stdin.read())
data = {"messages": [ChatMessage.from_user(sys.argv[1])], "hook_context": {"chat_history_id": "h"}}
print(len(pipeline.run({"agent": data})["agent"]["messages"]))
pipeline.close()
"""


def test_an_agent_with_a_memory_loads_from_yaml_in_a_process_that_knows_nothing_of_us(tmp_path):
    store = SQLiteChatMessageStore(tmp_path / "h.db", last_k=None)
    pipeline = Pipeline()
    agent = Agent(
        chat_generator=MockChatGenerator("Hello!"),
        hooks=chat_history_hooks(store, max_tokens=1000, window_step=2, exit_conditions=["text"]),
        streaming_callback=print_streaming_chunk,
    )
    pipeline.add_component("agent", agent)
    numbers = []
    for question in ("Hi", "Really?"):
        command = [sys.executable, "-W", "error", "-c", SCRIPT, question]
        finished = subprocess.run(
            command, input=pipeline.dumps(), capture_output=True, text=True, check=False, timeout=300
        )
        assert finished.returncode == 0, finished.stderr
        numbers.append(int(finished.stdout.split()[-1]))
    assert numbers == [2, 4]
    assert [message.text for message in stored_in(store)] == ["Hi", "Hello!", "Really?", "Hello!"]
    store.close()


def test_closing_the_agent_closes_the_store_and_the_next_run_opens_it(store, run):
    agent = agent_with(store, reply("Hello!"), reply("Yes."))
    run(agent, [user("Hi")])
    agent.close()
    asyncio.run(agent.close_async())
    run(agent, [user("Really?")])
    assert store.count_messages("h") == 4


def test_the_token_counter_is_warmed_up(tmp_path):
    class Counter(ApproximateTokenCounter):
        is_warm = False

        def warm_up(self):
            self.is_warm = True

    counter = Counter()
    agent = agent_with(
        SQLiteChatMessageStore(tmp_path / "h.db"), hook_options={"max_tokens": 9, "token_counter": counter}
    )
    agent.warm_up()
    assert counter.is_warm


@pytest.mark.parametrize("keeps_meta", [True, False])
def test_a_store_that_only_follows_the_protocol_is_enough(run, keeps_meta):
    class ListStore:
        def __init__(self):
            self.messages = {}

        def to_dict(self):
            return {}

        @classmethod
        def from_dict(cls, data):
            return cls()

        def count_messages(self, chat_history_id):
            return len(self.messages.get(chat_history_id, []))

        def write_messages(self, chat_history_id, messages):
            kept = messages if keeps_meta else [replace(message, _meta={}) for message in messages]
            self.messages.setdefault(chat_history_id, []).extend(kept)
            return len(messages)

        def retrieve_messages(self, chat_history_id, last_k=None):
            return list(self.messages.get(chat_history_id, []))

        def delete_messages(self, chat_history_id):
            del self.messages[chat_history_id]

        def delete_all_messages(self):
            self.messages.clear()

    store = ListStore()
    agent = agent_with(store, reply(None, call("a")), reply("Done."), reply("Yes."))
    run(agent, [user("Look!")])
    run(agent, [user("Really?")])
    turn = [user("Look!"), reply(None, call("a")), result("a"), reply("Done.")]
    assert asked(agent) == says([*turn, user("Really?")])
    assert says(store.messages["h"]) == says([*turn, user("Really?"), reply("Yes.")])
