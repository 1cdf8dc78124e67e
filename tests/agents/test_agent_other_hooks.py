# SPDX-License-Identifier: Apache-2.0
"""The memory beside other hooks, and several runs at the same time."""

import asyncio
import threading

import pytest
from agent_programs import HISTORY, ScriptedModel, ids, questions, tool
from agent_runs import HANG_LIMIT, agent_with, asked, call, look_up, reply, result, says, stored_in, user
from haystack.components.agents import Agent, State
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.hooks import hook
from haystack.hooks.compaction import CompactionHook, SlidingWindowCompactor
from haystack.hooks.human_in_the_loop import ConfirmationHook, ToolExecutionDecision
from haystack.hooks.tool_result_offloading import AlwaysOffload, FileSystemToolResultStore, ToolResultOffloadHook
from haystack_integrations.hooks.chat_store import ChatHistorySaver, chat_history_hooks

from haystack_chat_store.conversation.shown import UNANSWERED

# ---------------------------------------------------------------------- with other hooks


class ScriptedStrategy:
    """Decides on tool calls by their key: rejects "no", changes "other", confirms all else."""

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
    # Some providers refuse a user message directly after results: Haystack's hook adds one.
    assert asked(later) == says([*stored[:5], reply(UNANSWERED), *stored[5:], user("Really?")])


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
    """A hook that waits for the other run. It blocks, so an asynchronous run calls it in a thread."""

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
