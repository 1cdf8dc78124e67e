# SPDX-License-Identifier: Apache-2.0
"""The rules themselves: each finds what it is for, in a request past the retriever, and nothing in a good one."""

import pytest
from cases import fails
from haystack.dataclasses import ChatMessage, ReasoningContent, ToolCall
from histories import PROVIDERS, model_of
from judging import COMMON_RULES, RULES, Asked, problems_of
from receiving import RECEIVE
from replies import Call, Reply, seal
from sending import OUTLINE, REQUEST

U, A, T, S = ChatMessage.from_user, ChatMessage.from_assistant, ChatMessage.from_tool, ChatMessage.from_system
WITH_IDS = ["openai", "responses", "anthropic", "bedrock", "mistral", "cohere", "openrouter"]


def broken(provider, messages, thinking=False, model=None):
    request = REQUEST[provider](messages)
    asked = Asked(provider, model or model_of(provider, thinking), thinking)
    return {problem.rule for problem in problems_of(request, OUTLINE[provider](request), asked)}


def said(provider, number, *keys, **fields):
    calls = tuple(Call("look_up", key) for key in keys)
    reply = Reply(number, calls=calls, ends="tool_calls" if keys else "stop", **fields)
    return RECEIVE[provider](reply, model_of(provider, bool(fields.get("thinking"))))


def answers(message):
    return [T(Call("look_up", call.arguments["key"]).value, origin=call) for call in message.tool_calls]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("thinking", ["", "Let me see."])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_good_conversation_breaks_no_rule(provider, thinking, streamed):
    fields = {"thinking": thinking, "streamed": streamed}
    first = said(provider, 1, "k1", **fields)
    second = said(provider, 2, "k2", **fields) if thinking else said(provider, 2, "k2", "k3", **fields)
    talk = [S("Be brief."), U("Question"), first, *answers(first), second, *answers(second)]
    assert not [rule for rule in broken(provider, talk, bool(thinking)) if fails(provider, rule)]
    talk += [said(provider, 3, text="Answer.", **fields), U("And now?")]
    assert not [rule for rule in broken(provider, talk, bool(thinking)) if fails(provider, rule)]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_calls_and_results_that_do_not_match(provider):
    message = said(provider, 1, "k1", "k2")
    first, second = answers(message)
    unanswered = broken(provider, [U("Question"), message, first, A("Answer."), U("And now?")])
    assert unanswered >= {"call-unanswered"}
    swapped = [T(second.tool_call_results[0].result, origin=first.tool_call_results[0].origin)]
    swapped += [T(first.tool_call_results[0].result, origin=second.tool_call_results[0].origin)]
    assert "pair-wrong" in broken(provider, [U("Question"), message, *swapped])
    if provider != "bedrock":  # its converter leaves out results without a call
        assert "result-orphan" in broken(provider, [U("Question"), A("Answer."), first, U("And now?")])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ids_that_a_provider_does_not_take(provider):
    def talk(*ids):
        calls = [ToolCall("look_up", {"key": f"k{n}"}, id=i, extra={"call_id": i}) for n, i in enumerate(ids)]
        return [U("Question"), A(tool_calls=calls), *answers(A(tool_calls=calls))]

    known = RULES[provider]
    if "id-pattern" in known:
        assert "id-pattern" in broken(provider, talk("functions.look_up:0" + "x" * 60))
    if "id-missing" in known:
        assert "id-missing" in broken(provider, talk(""))
    if "id-twice" in known:
        assert "id-twice" in broken(provider, talk("fc_000001", "fc_000001"))
    if "id-repeated" in known:
        assert "id-repeated" in broken(provider, [*talk("fc_000001"), A("Answer."), *talk("fc_000001")])


@pytest.mark.parametrize("provider", ["responses", "anthropic", "gemini", "bedrock", "openrouter"])
def test_what_another_model_sealed(provider):
    message = said(provider, 1, "k1", thinking="Let me see.")
    talk = [U("Question"), message, *answers(message)]
    assert broken(provider, talk, thinking=True) == set()
    if provider != "gemini":
        assert "seal-foreign" in broken(provider, talk, thinking=True, model="another model")
    else:
        message.meta["thought_signatures"][0]["signature"] = seal("anthropic", "a model", "k1")
        assert "seal-foreign" in broken(provider, talk, thinking=True)


@pytest.mark.provider("anthropic")
def test_the_rules_of_anthropic():
    provider, mark = "anthropic", {"cache_control": {"type": "ephemeral"}}
    assert "cache-marks" in broken(provider, [U("Question", meta=mark) for _ in range(5)])
    assert "empty-content" in broken(provider, [U("Question"), A(""), U("And now?")])
    assert "blank-text" in broken(provider, [U("Question"), A(" "), U("And now?")])
    assert "first-not-user" in broken(provider, [A("Hello."), U("Question")])
    assert "ends-with-assistant" in broken(provider, [U("Question"), A("Answer.")])
    plain = said(provider, 1, "k1")
    assert "thinking-first" in broken(provider, [U("Question"), plain, *answers(plain)], thinking=True)
    thought = said(provider, 1, text="Answer.", thinking="Let me see.")
    thought.reasoning.extra["reasoning_contents"][0]["reasoning_content"]["reasoning_text"]["text"] = "Otherwise."
    assert "signature" in broken(provider, [U("Question"), thought, U("And now?")], thinking=True)
    paused = RECEIVE[provider](Reply(1, searches=True, ends="pause"), model_of(provider, False))
    resumed = said(provider, 2, text="Found it.", continues=True)
    assert broken(provider, [U("Question"), paused]) == set()
    assert broken(provider, [U("Question"), paused, resumed, U("And now?")]) == set()
    assert "server-tool-unpaired" in broken(provider, [U("Question"), paused, U("And now?")])
    assert "server-tool-unpaired" in broken(provider, [U("Question"), resumed, U("And now?")])


def test_the_rules_of_responses():
    provider = "responses"
    message = said(provider, 1, "k1", thinking="Let me see.")
    alone = A(tool_calls=message.tool_calls)
    assert "call-without-reasoning" in broken(provider, [U("Question"), alone, *answers(alone)])
    assert "reasoning-alone" in broken(provider, [U("Question"), A(reasoning=message.reasoning), U("And now?")])
    foreign = ReasoningContent(reasoning_text="Let me see.")
    assert "reasoning-item" in broken(provider, [U("Question"), A("Answer.", reasoning=foreign), U("And now?")])
    twice = [U("Question"), said(provider, 1, text="Answer.", thinking="Let me see.")] * 2
    assert "item-id-twice" in broken(provider, [*twice, U("And now?")])
    call = ToolCall("look_up", {"key": "k1"}, id="call_1", extra={"call_id": "call_1"})
    assert "item-id-pattern" in broken(provider, [U("Question"), A(tool_calls=[call]), *answers(A(tool_calls=[call]))])


@pytest.mark.provider("gemini")
def test_the_rules_of_gemini():
    provider = "gemini"
    message = said(provider, 1, "k1")
    turn = [U("Question"), message, *answers(message)]
    assert "signature-missing" in broken(provider, turn, thinking=True)
    assert broken(provider, [*turn, A("Answer."), U("And now?")], thinking=True) == set()  # in an old turn
    assert "call-turn" in broken(provider, [U("Question"), A("Wait."), message, *answers(message)])
    assert "empty-content" in broken(provider, [U("Question"), A(""), U("And now?")])
    both = said(provider, 1, "k1", "k2", thinking="Let me see.")
    assert "result-orphan" in broken(provider, [U("Question"), both, *answers(both)], thinking=True)


@pytest.mark.provider("bedrock")
def test_the_rules_of_bedrock():
    provider, mark = "bedrock", {"cachePoint": {"type": "default"}}
    assert "alternation" in broken(provider, [U("Question"), U("And now?")])
    assert "cache-marks" in broken(provider, [m for n in range(5) for m in (U(f"{n}", meta=mark), A("Answer."))])
    foreign = ReasoningContent(reasoning_text="Let me see.")
    assert "signature" in broken(provider, [U("Question"), A("Answer.", reasoning=foreign), U("And now?")])
    message = said(provider, 1, "k1")
    assert "user-after-results" in broken(provider, [U("Question"), message, *answers(message), U("And now?")])


@pytest.mark.provider("mistral")
def test_the_rules_of_mistral():
    message = said("mistral", 1, "k1")
    assert "user-after-results" in broken("mistral", [U("Question"), message, *answers(message), U("And now?")])
    assert "ends-with-assistant" in broken("mistral", [U("Question"), A("Answer.")])


@pytest.mark.parametrize("provider", ["openai", "responses", "mistral"])
def test_names_that_a_provider_does_not_take(provider):
    assert "name" in broken(provider, [U("Question", name="Ada Lovelace")])
    assert ("name" in broken(provider, [U("Question", name="Ada")])) == (provider != "openai")


def test_every_rule_has_a_source():
    rules = [*COMMON_RULES.values(), *(rule for known in RULES.values() for rule in known.values())]
    assert all(rule.source and rule.level in ("sure", "likely", "unsure", "theirs") for rule in rules)
