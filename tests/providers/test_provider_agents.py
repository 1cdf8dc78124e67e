# SPDX-License-Identifier: Apache-2.0
"""No provider refuses what an agent with the hooks of this package sends it, after any damage to its conversation."""

import random
from itertools import count

import pytest
from cases import ALTERNATING, PORTABLE
from damages import DAMAGES
from haystack import component
from haystack.components.agents import Agent
from haystack.dataclasses import ChatMessage
from haystack_integrations.hooks.chat_store import chat_history_hooks
from histories import PROVIDERS, Talk, speaker
from judging import Asked, problems_of, rule_of
from sending import OUTLINE, REQUEST
from test_provider_requests import KNOWN

from haystack_chat_store import InMemoryChatMessageStore

STORE = InMemoryChatMessageStore(last_k=None, namespace="agents of providers")
_histories = count()


@component
class Listener:
    """A model that keeps what it is sent, and answers."""

    def __init__(self, model):
        self.model = model
        self.sent = []

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], tools=None):
        self.sent.append(list(messages))
        return {"replies": [ChatMessage.from_assistant("Done.", meta={"model": self.model, "finish_reason": "stop"})]}


def prompts(asked, stored, turn, portable):
    """Return what the model of an agent is sent in one run over a stored history."""
    history_id = f"history {next(_histories)}"
    STORE.write_messages(history_id, stored)
    model = Listener(asked.model)
    merges = asked.provider in ALTERNATING
    hooks = chat_history_hooks(STORE, None, portable=portable, merge_consecutive=merges, model=asked.model)
    Agent(chat_generator=model, hooks=hooks).run(list(turn), hook_context={"chat_history_id": history_id})
    STORE.delete_messages(history_id)
    return model.sent


def problems(asked, stored, turn, portable):
    for sent in prompts(asked, stored, turn, portable):
        request = REQUEST[asked.provider](sent)
        for problem in problems_of(request, OUTLINE[asked.provider](request), asked):
            if rule_of(asked.provider, problem.rule).level in ("sure", "likely"):
                yield problem


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_agent_goes_on_with_a_damaged_conversation(provider, damage, is_full):
    known = KNOWN.get((provider, damage), frozenset())
    for seed in range(8 if is_full else 1):
        rng = random.Random(f"agents {seed} {provider} {damage}")
        talk = Talk(rng)
        by = speaker(rng, provider)
        asked = Asked(provider, by.model, by.thinking)
        damaged = DAMAGES[damage](talk.rounds(by, rng.choice((1, 2, 3))), by, rng, talk)
        if damaged is None:
            continue
        turns = [[talk.question(by)]] + ([[]] if damaged.goes_on else [])
        for turn in turns:
            for portable in PORTABLE:
                found = problems(asked, damaged.stored, turn, portable)
                wrong = [each for each in found if portable or each.rule not in known]
                assert not wrong, f"seed {seed}, portable={portable}, {'question' if turn else 'resumed'}"


@pytest.mark.parametrize("second", PROVIDERS)
@pytest.mark.parametrize("first", PROVIDERS)
def test_another_model_resumes_the_turn_of_an_agent(first, second, is_full):
    for seed in range(6 if is_full else 1):
        rng = random.Random(f"agents {seed} {first} {second}")
        talk = Talk(rng)
        before = speaker(rng, first)
        after = speaker(rng, second, other_model=first == second)
        stored = [message for messages in talk.rounds(before, rng.choice((0, 1))) for message in messages]
        stored += talk._named([talk.question(before), *talk.step(before)], before)
        asked = Asked(second, after.model, after.thinking)
        assert len(prompts(asked, stored, [], True)) == 1
        assert list(problems(asked, stored, [], True)) == []
