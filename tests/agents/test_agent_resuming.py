# SPDX-License-Identifier: Apache-2.0
"""Going on with an interrupted turn, and the ends of a run."""

import asyncio
from dataclasses import replace

import pytest
from agent_programs import HISTORY, ScriptedModel, ids, questions, tool
from agent_runs import EARLIER, TURN, agent_with, asked, break_down, call, look_up, reply, result, says, stored_in, user
from haystack.components.agents import Agent, State
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage, ChatRole, ImageContent, TextContent
from haystack.hooks import hook
from haystack_integrations.hooks.chat_store import chat_history_hooks

from haystack_chat_store import MessageNotFoundError
from haystack_chat_store.conversation.shown import INTERRUPTED
from haystack_chat_store.ids import MESSAGE_ID_KEY

# ---------------------------------------------------------------------- going on


def interrupted(a_call):
    return ChatMessage.from_tool(INTERRUPTED, origin=a_call, error=True)


def test_a_run_without_new_messages_goes_on_after_the_last_step_whose_open_calls_were_interrupted(store, run):
    begun = [user("Look!"), reply(None, call("a")), result("a"), reply("Once more.", call("b"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Done."), system_prompt="Be brief.")
    outcome = run(agent, [])
    assert asked(agent) == says([ChatMessage.from_system("Be brief."), *begun, interrupted(call("b"))])
    assert outcome["last_message"].text == "Done."
    stored = stored_in(store)
    assert says(stored) == says([*begun, reply("Done.")])
    assert questions(stored)[-1] == stored[0].meta[MESSAGE_ID_KEY]


def test_a_turn_that_was_interrupted_twice_goes_on(store, run):
    begun = [user("Look!"), reply("I try.", call("a")), reply("I try.", call("a"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Done."))
    run(agent, [])
    assert asked(agent) == says(
        [begun[0], begun[1], interrupted(call("a")), begun[2], interrupted(call("a"))]  # two steps, one after the other
    )


def test_a_new_question_after_an_interrupted_turn_is_answered(store, run):
    begun = [user("Look!"), reply(None, call("a")), result("a"), reply("Once more.", call("b"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Hello!"))
    run(agent, [user("Hi")])
    stored = stored_in(store)
    assert says(stored) == says([*begun, user("Hi"), reply("Hello!")])
    assert questions(stored)[-1] == ids(stored)[-2]


def test_a_question_is_answered_anew_if_the_agent_sees_the_conversation_until_it(store, run):
    begun = [user("Hi"), reply("Hello!"), user("Look!", chat_message_id="q"), reply("No."), user("Why?"), reply("So.")]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Yes."))
    outcome = run(agent, [], hook_context={**HISTORY, "until_message_id": "q"})
    assert asked(agent) == says(begun[:3])
    assert outcome["last_message"].text == "Yes."
    assert questions(stored_in(store))[-1] == "q"


def test_a_question_is_edited_if_the_agent_sees_the_conversation_before_it(store, run):
    store.write_messages("h", [user("Hi"), reply("Hello!", chat_message_id="a"), user("Look!"), reply("No.")])
    agent = agent_with(store, reply("Yes."))
    run(agent, [user("Listen!")], hook_context={**HISTORY, "until_message_id": "a"})
    assert asked(agent) == says([user("Hi"), reply("Hello!"), user("Listen!")])


def test_a_conversation_until_a_message_that_is_not_there_is_an_error(store, run):
    store.write_messages("h", [user("Hi")])
    for messages in ([], [user("Look!")]):
        with pytest.raises(MessageNotFoundError, match="nowhere"):
            run(agent_with(store), messages, hook_context={**HISTORY, "until_message_id": "nowhere"})


def test_a_complete_history_costs_no_call_of_the_model(store, run):
    run(agent_with(store, reply(None, call("a")), reply("Done.")), [user("Look!")])
    agent = agent_with(store)
    outcome = run(agent, [])
    assert agent.chat_generator.asked == []
    assert says(outcome["messages"]) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])
    assert (outcome["last_message"].text, outcome["exit_reason"], outcome["step_count"]) == ("Done.", "text", 0)
    assert store.count_messages("h") == 4


def test_on_a_complete_history_no_hook_before_the_model_runs(store, run):
    """It could ask a model itself, to summarize what is there."""
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


@pytest.mark.parametrize("before", [[], [user(" ")]], ids=["empty", "blank"])
def test_without_a_question_the_run_fails_before_the_model_is_asked(store, run, before):
    store.write_messages("h", before)
    agent = agent_with(store, reply("Hello!"), system_prompt="Be brief.")
    with pytest.raises(ValueError, match="nothing to answer"):
        run(agent, [])
    assert agent.chat_generator.asked == []
    assert says(stored_in(store)) == says(before)


def test_the_question_may_come_from_a_hook(store, run):
    @hook
    def ask(state: State) -> None:
        state.set("messages", [user("Hi")])

    agent = agent_with(store, reply("Hello!"), hooks={"before_run": [ask]})
    run(agent, [])
    assert asked(agent) == says([user("Hi")])


def test_a_tool_result_that_the_caller_brings_answers_the_stored_call(store, run):
    begun = [user("Look!", chat_message_id="q"), reply(None, call("a"))]
    store.write_messages("h", begun)
    agent = agent_with(store, reply("Done."))
    run(agent, [result("a")])
    assert asked(agent) == says([*begun, result("a")])
    assert questions(stored_in(store)) == [None, None, None, "q"]


SMALL_WINDOWS = {
    "no history": {"last_k": 0},
    "not the question": {"max_tokens": 1},
    "not the last step": {"max_tokens": 20},
    "as many as fit": {"last_k": None, "max_tokens": 20},
    "one round": {"last_k": 1},
}


@pytest.fixture(params=["round", "message"])
def counting_store(request, make_store, tmp_path):
    """A store that counts rounds, or one that counts messages."""
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
    """Haystack asks an agent's model again then."""
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


def test_after_an_error_of_a_tool_the_model_hears_that_its_calls_were_interrupted(store, run):
    calls = [call("a"), call("b", "break_down")]
    tools = [tool("look_up", look_up), tool("break_down", break_down)]
    failing = agent_with(store, reply("I look.", *calls), tools=tools, raise_on_tool_invocation_failure=True)
    with pytest.raises(Exception, match="broken"):
        run(failing, [user("Look!")])
    assert says(stored_in(store)) == says([user("Look!"), reply("I look.", *calls)])
    agent = agent_with(store, reply("Done."), tools=tools)
    run(agent, [])
    assert asked(agent) == says([user("Look!"), reply("I look.", *calls), *map(interrupted, calls)])


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


@pytest.mark.parametrize("brought", [[], [user("Look!", chat_message_id="q")]])
def test_a_turn_that_another_model_ended_with_a_tool_ends_with_its_result(store, run, brought):
    store.write_messages(
        "h", [user("Look!", chat_message_id="q"), reply("I look.", call("a"), model="one"), result("a")]
    )
    conditions = ["look_up"]
    hook_options = {"exit_conditions": conditions, "model": "another"}
    outcome = run(agent_with(store, exit_conditions=conditions, hook_options=hook_options), brought)
    assert outcome["exit_reason"] == "look_up"
    assert says([outcome["last_message"]]) == says([result("a")])


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
