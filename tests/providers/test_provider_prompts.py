# SPDX-License-Identifier: Apache-2.0
"""The prompts of one conversation: how they begin, how long they are, and what they do not carry."""

import random
from dataclasses import replace

import pytest
from cases import ALTERNATING, PORTABLE, Case, show
from haystack.dataclasses import ChatRole
from histories import PROVIDERS, Talk, speaker
from judging import Asked
from sending import OUTLINE, REQUEST, characters
from windows import WHOLE, Window

from haystack_chat_store.conversation.shown import GO_ON
from haystack_chat_store.ids import MESSAGE_ID_KEY

SYSTEM = {"openai": "messages", "responses": "input", "gemini": "contents"}


def entries(provider, messages):
    """Return the messages of a request, one after the other, in a form that can be compared."""
    request = REQUEST[provider](messages)
    return [repr(entry) for entry in request[SYSTEM.get(provider, "messages")]]


def moments(rng, provider):
    """Yield each moment of a conversation at which a model is asked: the round, what is stored, what is new."""
    talk = Talk(rng)
    by = speaker(rng, provider)
    stored = []
    for number, spoken in enumerate(talk.rounds(by, 5)):
        messages = [
            replace(message, _meta={**message.meta, MESSAGE_ID_KEY: f"{number}.{place}"})  # as a store keeps it
            for place, message in enumerate(spoken)
        ]
        yield by, number, list(stored), messages[:1]
        for end, message in enumerate(messages[1:], 2):
            is_next = end < len(messages) and messages[end].role is not ChatRole.TOOL
            if message.role is ChatRole.TOOL and is_next:
                yield by, number, [*stored, *messages[:end]], []
        stored += messages


@pytest.mark.parametrize("portable", PORTABLE)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_stands_before_the_round_under_way_stays_as_it_is(provider, portable, is_full):
    for seed in range(40 if is_full else 6):
        settled = []
        for by, _, stored, new in moments(random.Random(f"{provider} {seed}"), provider):
            asked = Asked(provider, by.model, by.thinking)
            model = by.model if seed % 2 else None
            case = Case("prompts", asked, stored, new, WHOLE, portable, provider in ALTERNATING, model=model)
            shown = show(case)
            last = max(index for index, message in enumerate(shown) if message.role is ChatRole.USER)
            prompt = entries(provider, shown)
            before = entries(provider, shown[:last]) if last else []
            assert prompt[: len(before)] == before, "the round under way changes what stands before it"
            assert before[: len(settled)] == settled, f"seed {seed}: the prompt does not begin as the one before"
            # A question that follows an unanswered one is joined to it as soon as both are stored.
            apart = [index for index, message in enumerate(shown[:last]) if message.text == GO_ON]
            settled = entries(provider, shown[: apart[-1] - 1]) if apart and apart[-1] else before


@pytest.mark.parametrize("portable", PORTABLE)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_as_much_is_counted_as_is_sent(provider, portable, is_full):
    for seed in range(60 if is_full else 8):
        rng = random.Random(f"tokens {provider} {seed}")
        talk = Talk(rng)
        by = speaker(rng, provider)
        stored = [message for messages in talk.rounds(by, 6) for message in messages]
        question = talk.question(by)
        for tokens in (50, 200, 800, 3000):
            window = Window("max_tokens", max_tokens=tokens)
            asked = Asked(provider, by.model, by.thinking)
            shown = show(Case("tokens", asked, stored, [question], window, portable, provider in ALTERNATING))
            sent = characters(OUTLINE[provider](REQUEST[provider](shown)))
            assert sent // 4 <= tokens, f"seed {seed}: {sent} characters are sent for {tokens} tokens"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_request_carries_keys_of_this_package(provider):
    for seed in range(5):
        rng = random.Random(f"keys {provider} {seed}")
        talk = Talk(rng)
        by = speaker(rng, provider)
        stored = [message for messages in talk.rounds(by, 3) for message in messages]
        del stored[-2:]
        shown = show(Case("keys", Asked(provider, by.model, by.thinking), stored, [talk.question(by)]))
        request = repr(REQUEST[provider](shown))
        assert not [key for key in ("chat_shown", "chat_message_id", "chat_question_id") if key in request]
