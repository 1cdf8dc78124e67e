# SPDX-License-Identifier: Apache-2.0
"""
Runs that are begun again, from their question or from a checkpoint of their state, as Hayhooks' durable execution does.

A checkpoint has all messages of the run, those that were loaded included. It is restored before the history is loaded.
"""

import pytest
from agent_programs import HISTORY
from agent_runs import agent_with, asked, call, reply, result, says, stored_in, user
from haystack.components.agents import State
from haystack.hooks import hook

QUESTION = user("Look!", chat_message_id="q")
WINDOWS = [
    {"last_k": 0},
    {"last_k": 1},
    {"last_k": 2, "merge_consecutive": True},
    {"last_k": 2, "window_step": 3},
    {"last_k": None, "max_tokens": 40},
    {},
]
UNTIL = pytest.param({"until_message_id": "until"}, id="until", marks=pytest.mark.full)
OTHERS = [user("Other?"), reply("Other."), user("And?"), reply("So."), user("Well?"), reply("Well.")]


def a_turn(number):
    return [user(f"question {number} {'word ' * 10}"), reply(f"answer {number}")]


class Checkpoints:
    """Keeps the state of a run after each step, and puts it in the place of the state that a run begins with."""

    def __init__(self):
        self.kept = []

    def hooks(self):
        @hook
        def keep(state: State) -> None:
            self.kept.append(state.to_dict(skip_keys=["tools", "hook_context"]))

        return {"after_tool": [keep]}

    def restoring(self, hooks):
        """Return an agent's hooks with one before all others, which restores the last checkpoint."""

        @hook
        def restore(state: State) -> None:
            if self.kept:
                state.data.update(State.from_dict(self.kept[-1]).data)

        return {**hooks, "before_run": [restore, *hooks["before_run"]]}


def crash(store, run, options, context, *replies):
    """Run an agent until its model fails, and return the checkpoints of the run."""
    checkpoints = Checkpoints()
    agent = agent_with(store, *replies, hooks=checkpoints.hooks(), hook_options=options)
    with pytest.raises(Exception):  # noqa: B017  # the model has no more replies
        run(agent, [QUESTION], hook_context=context)
    return checkpoints


@pytest.mark.parametrize("others", [[], OTHERS], ids=["alone", "others meanwhile"])
@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize(
    "context", [{}, pytest.param({"until_message_id": "until"}, id="until", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_is_begun_again_stores_and_shows_each_message_once(store, run, steps, context, options, others):
    begun = [*a_turn(1), user("Before.", chat_message_id="b"), reply("Yes."), *a_turn(2)]
    begun[3].meta["chat_message_id"] = "until"
    store.write_messages("h", begun)
    context = {**HISTORY, **context}
    step = [reply(None, call("a")), result("a")] * steps
    checkpoints = crash(store, run, options, context, *step[:1])
    store.write_messages("h", others)

    agent = agent_with(store, reply("Done."), hook_options=options)
    agent.hooks = checkpoints.restoring(agent.hooks)
    outcome = run(agent, [QUESTION], hook_context=context)

    assert outcome["last_message"].text == "Done."
    assert says(stored_in(store)) == says([*begun, QUESTION, *step, *others, reply("Done.")])
    seen = asked(agent)
    assert seen[-1 - len(step) :] == says([QUESTION, *step])
    assert [text for text in seen if seen.count(text) > 1] == []


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_a_run_that_has_replaced_messages_goes_on_from_its_checkpoint(store, run, options):
    begun = [*a_turn(1), *a_turn(2), user("Old?", chat_message_id="old"), reply("Old.")]
    store.write_messages("h", begun)
    context = {**HISTORY, "replace_from_message_id": "old"}
    checkpoints = crash(store, run, options, context, reply(None, call("a")))

    agent = agent_with(store, reply("Done."), hook_options=options)
    agent.hooks = checkpoints.restoring(agent.hooks)
    run(agent, [QUESTION], hook_context=context)

    turn = [QUESTION, reply(None, call("a")), result("a"), reply("Done.")]
    assert says(stored_in(store)) == says([*begun[:4], *turn])
