# SPDX-License-Identifier: Apache-2.0
"""
What each provider refuses, or misreads, in a request.

A rule is what a provider's documentation says, or its error messages in public reports. `RULES` names the source of
each, and how well it is known: `"sure"`, `"likely"` or `"unsure"`. Unsure rules fail no test, and neither do those that
an integration itself breaks (`"theirs"`). Rules without a provider's source are about meaning: a result under another
call's arguments is worse: providers accept it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from replies import checksum, opened, value_of
from sending import Step, strings_in


class Rule(NamedTuple):
    level: str
    source: str


class Problem(NamedTuple):
    rule: str
    where: str


class Asked(NamedTuple):
    """Whom a request is for. `thinking` says whether the model is asked to think."""

    provider: str
    model: str
    thinking: bool = False


_OURS = "what a model is to understand"
_ANTHROPIC = "https://platform.claude.com/docs/en"
_GEMINI = "https://ai.google.dev/gemini-api/docs"
_CONVERSE = "https://docs.aws.amazon.com/bedrock/latest/APIReference"
_GITHUB = "https://github.com"

#: Rules that hold for requests to all providers.
COMMON_RULES = {
    "converter-error": Rule("sure", "an exception of the generator's own converter, before any request"),
    "pair-wrong": Rule("sure", f"{_OURS}: a result that is not the call's"),
    "pair-lost": Rule("sure", f"{_OURS}: a call and its result that are stored together"),
    "question-lost": Rule("sure", f"{_OURS}: the user's words in the rounds that are shown"),
    "file-lost": Rule("sure", f"{_OURS}: what a file in an earlier round was"),
    "answer-lost": Rule("sure", f"{_OURS}: the model's words in the rounds that are shown"),
    "old-text": Rule("sure", f"{_OURS}: words that were edited or deleted"),
    "alternative-shown": Rule("sure", f"{_OURS}: of alternative replies, the first"),
    "over-budget": Rule("sure", "max_tokens of the retriever"),
    "key-leaked": Rule("sure", "keys of this package are not sent"),
    "seal-foreign": Rule("sure", f"{_GITHUB}/vybestack/llxprt-code/issues/2335"),
}

RULES: dict[str, dict[str, Rule]] = {
    "openai": {
        "name": Rule(
            "sure", f"{_GITHUB}/jekalmin/extended_openai_conversation/issues/251 (the pattern is wider since)"
        ),
        "call-unanswered": Rule("sure", f"{_GITHUB}/camel-ai/camel/issues/3027"),
        "result-orphan": Rule("sure", "https://platform.openai.com/docs/guides/function-calling"),
        "result-twice": Rule("likely", "https://platform.openai.com/docs/guides/function-calling"),
        "id-missing": Rule("likely", f"{_GITHUB}/vercel/ai/issues/5171 (string_below_min_length)"),
        "id-pattern": Rule("likely", f"{_GITHUB}/vercel/ai/issues/5171 (40 characters; 64 since the summer of 2026)"),
        "id-twice": Rule("likely", f"{_GITHUB}/TanStack/ai/issues/199"),
        "id-repeated": Rule("unsure", "not known to be refused"),
        "blank-text": Rule("unsure", "not known to be refused"),
        "empty-content": Rule("unsure", "an assistant message without content is accepted as an empty text"),
        "ends-with-assistant": Rule("unsure", "accepted, the model goes on"),
    },
    "responses": {
        "call-unanswered": Rule("sure", f"{_GITHUB}/openai/openai-agents-python/issues/2069"),
        "result-orphan": Rule("sure", f"{_GITHUB}/openai/openai-agents-python/issues/2069"),
        "result-twice": Rule("likely", f"{_GITHUB}/earendil-works/pi/issues/9057"),
        "id-missing": Rule("sure", f"{_GITHUB}/earendil-works/pi/issues/9057"),
        "id-pattern": Rule("sure", f"{_GITHUB}/earendil-works/pi/issues/3369 (call_id of 64 characters)"),
        "id-twice": Rule("likely", f"{_GITHUB}/earendil-works/pi/issues/9057"),
        "id-repeated": Rule("likely", f"{_GITHUB}/earendil-works/pi/issues/9057"),
        "name": Rule("sure", f"{_GITHUB}/theopenco/llmgateway/pull/2820 (input messages take no name)"),
        "item-id-pattern": Rule("sure", "'Expected an ID that begins with fc', https://community.openai.com"),
        "item-id-twice": Rule("sure", f"{_GITHUB}/vercel/ai/issues/7883"),
        "reasoning-item": Rule("sure", "https://platform.openai.com/docs/api-reference/responses/create"),
        "reasoning-alone": Rule("sure", f"{_GITHUB}/langchain-ai/langchain/issues/38372"),
        "call-without-reasoning": Rule("sure", f"{_GITHUB}/vercel/ai/issues/7883"),
        "blank-text": Rule("unsure", "not known to be refused"),
        "empty-content": Rule("unsure", "not known to be refused"),
        "ends-with-assistant": Rule("unsure", "accepted"),
    },
    "anthropic": {
        "call-unanswered": Rule("sure", f"{_GITHUB}/anthropics/claude-code/issues/8612"),
        "result-orphan": Rule("sure", f"{_ANTHROPIC}/agents-and-tools/tool-use/implement-tool-use"),
        "result-twice": Rule("sure", "'each tool_use must have a single result', as for call-unanswered"),
        "id-missing": Rule("sure", f"{_ANTHROPIC}/api/messages"),
        "id-pattern": Rule("sure", f"{_GITHUB}/microsoft/vscode/issues/325813 (^[a-zA-Z0-9_-]+$)"),
        "id-twice": Rule("sure", f"{_GITHUB}/anthropics/claude-code/issues/20901"),
        "id-repeated": Rule("sure", f"{_GITHUB}/NVIDIA-NeMo/Switchyard/issues/502"),
        "signature": Rule("sure", f"{_GITHUB}/anthropics/anthropic-sdk-python/issues/1598"),
        "thinking-first": Rule(
            "likely", f"{_ANTHROPIC}/build-with-claude/extended-thinking#preserving-thinking-blocks"
        ),
        "server-tool-unpaired": Rule("likely", f"{_ANTHROPIC}/agents-and-tools/tool-use/web-search-tool"),
        "cache-marks": Rule("sure", f"{_GITHUB}/rescrv/claudius/issues/42"),
        "cache-mark-place": Rule("sure", f"{_ANTHROPIC}/build-with-claude/prompt-caching"),
        "blank-text": Rule("sure", f"{_GITHUB}/NousResearch/hermes-agent/pull/60628"),
        "empty-content": Rule("sure", "'all messages must have non-empty content except the optional final one'"),
        "first-not-user": Rule("likely", f"{_ANTHROPIC}/api/messages"),
        "ends-with-assistant": Rule("likely", f"{_ANTHROPIC}/build-with-claude/prompt-engineering (no prefill)"),
    },
    "gemini": {
        "call-unanswered": Rule("sure", f"{_GITHUB}/google-gemini/gemini-cli/issues/3814"),
        "result-orphan": Rule("sure", f"{_GITHUB}/GoogleCloudPlatform/generative-ai/pull/368"),
        "result-twice": Rule("sure", f"{_GITHUB}/google-gemini/gemini-cli/issues/3814"),
        "id-twice": Rule("likely", f"{_GEMINI}/function-calling"),
        "call-turn": Rule("likely", f"{_GITHUB}/google-gemini/gemini-cli/issues/26486"),
        "signature-missing": Rule("sure", f"{_GEMINI}/thought-signatures"),
        "blank-text": Rule("likely", f"{_GEMINI}/troubleshooting"),
        "empty-content": Rule("sure", "'Unable to submit request because it must include at least one parts field'"),
        "first-not-user": Rule("likely", f"{_GEMINI}/text-generation"),
        "ends-with-assistant": Rule("likely", "'Please ensure that multiturn requests end with a user role'"),
    },
    "bedrock": {
        "call-unanswered": Rule("sure", f"{_CONVERSE}/API_runtime_ToolResultBlock.html"),
        "result-orphan": Rule("sure", f"{_CONVERSE}/API_runtime_ToolResultBlock.html"),
        "result-twice": Rule("sure", "'The number of toolResult blocks exceeds the number of toolUse blocks'"),
        "id-missing": Rule("sure", f"{_CONVERSE}/API_runtime_ToolUseBlock.html"),
        "id-pattern": Rule("sure", f"{_CONVERSE}/API_runtime_ToolUseBlock.html"),
        "id-twice": Rule("sure", f"{_GITHUB}/anthropics/claude-code/issues/20901 (Claude behind it)"),
        "id-repeated": Rule("likely", f"{_GITHUB}/anthropics/claude-code/issues/20901 (Claude behind it)"),
        "signature": Rule("sure", f"{_CONVERSE}/API_runtime_ReasoningTextBlock.html (Claude behind it)"),
        "thinking-first": Rule("likely", f"{_ANTHROPIC}/build-with-claude/extended-thinking (Claude behind it)"),
        "cache-marks": Rule("sure", "https://docs.aws.amazon.com/bedrock/latest/userguide/prompt-caching.html"),
        "alternation": Rule("likely", f"{_GITHUB}/langgenius/dify/issues/9294"),
        "user-after-results": Rule("likely", f"{_GITHUB}/langgenius/dify/issues/9294 (results are the user's)"),
        "blank-text": Rule("sure", f"{_GITHUB}/NousResearch/hermes-agent/pull/63983"),
        "empty-content": Rule("sure", f"{_GITHUB}/earendil-works/pi/pull/3443"),
        "document-name": Rule("theirs", f"{_CONVERSE}/API_runtime_DocumentBlock.html"),
        "first-not-user": Rule("sure", f"{_GITHUB}/NousResearch/hermes-agent/pull/63983"),
        "ends-with-assistant": Rule("likely", "'A conversation must end with a user message', some models"),
    },
    "mistral": {
        "name": Rule("sure", f"{_GITHUB}/nomtek/mistralai_client_dart/issues/44 (messages take no name)"),
        "call-unanswered": Rule("sure", f"{_GITHUB}/mistralai/client-ts/issues/106"),
        "result-orphan": Rule("sure", f"{_GITHUB}/mistralai/mistral-inference/issues/135"),
        "result-twice": Rule("sure", f"{_GITHUB}/mistralai/client-ts/issues/106"),
        "id-missing": Rule("sure", f"{_GITHUB}/karthink/gptel/issues/1203"),
        "id-pattern": Rule("sure", f"{_GITHUB}/karthink/gptel/issues/1203 (9 letters or digits)"),
        "id-twice": Rule("likely", f"{_GITHUB}/mistralai/client-ts/issues/106"),
        "id-repeated": Rule("unsure", "not known to be refused"),
        "user-after-results": Rule("likely", f"{_GITHUB}/BerriAI/litellm/issues/6323"),
        "blank-text": Rule("unsure", "not known to be refused"),
        "empty-content": Rule("sure", "'Assistant message must have either content or tool_calls'"),
        "ends-with-assistant": Rule("sure", "'Expected last role User or Tool (or Assistant with prefix True)'"),
    },
    "cohere": {
        "call-unanswered": Rule("likely", "https://docs.cohere.com/docs/tool-use-overview"),
        "result-orphan": Rule("likely", "https://docs.cohere.com/docs/tool-use-overview"),
        "result-twice": Rule("likely", "https://docs.cohere.com/docs/tool-use-overview"),
        "id-missing": Rule("likely", "https://docs.cohere.com/reference/chat"),
        "id-twice": Rule("likely", "https://docs.cohere.com/reference/chat"),
        "id-repeated": Rule("unsure", "not known to be refused"),
        "blank-text": Rule("likely", f"{_GITHUB}/kwaroran/Risuai/issues/504"),
        "empty-content": Rule("likely", f"{_GITHUB}/kwaroran/Risuai/issues/458"),
        "ends-with-assistant": Rule("unsure", "not known to be refused"),
    },
    "ollama": {
        "call-unanswered": Rule("likely", "accepted; but results are paired by order, so later ones move"),
        "result-orphan": Rule("likely", "as call-unanswered"),
        "blank-text": Rule("unsure", "accepted"),
        "empty-content": Rule("unsure", "accepted"),
        "ends-with-assistant": Rule("likely", "https://github.com/ollama/ollama/issues (continued as a prefill)"),
    },
    "openrouter": {
        "call-unanswered": Rule("sure", f"{_GITHUB}/anthropics/claude-code/issues/8612 (Claude behind it)"),
        "result-orphan": Rule("sure", f"{_ANTHROPIC}/agents-and-tools/tool-use/implement-tool-use (Claude behind it)"),
        "result-twice": Rule("likely", "as openai"),
        "id-missing": Rule("likely", "as openai"),
        "id-pattern": Rule("likely", f"{_GITHUB}/microsoft/vscode/issues/325813; {_GITHUB}/openclaw/openclaw/pull/875"),
        "id-twice": Rule("likely", f"{_GITHUB}/BerriAI/litellm/issues/23510"),
        "id-repeated": Rule("likely", f"{_GITHUB}/BerriAI/litellm/issues/23510"),
        "signature": Rule("likely", f"{_GITHUB}/linanwx/nagobot/issues/21"),
        "blank-text": Rule("unsure", "depends on the provider behind it"),
        "empty-content": Rule("unsure", "depends on the provider behind it"),
        "ends-with-assistant": Rule("unsure", "depends on the provider behind it"),
    },
}

ID_PATTERNS = {
    "openai": re.compile(r".{1,40}", re.DOTALL),
    "responses": re.compile(r".{1,64}", re.DOTALL),
    "anthropic": re.compile(r"[a-zA-Z0-9_-]+"),
    "bedrock": re.compile(r"[a-zA-Z0-9_-]{1,64}"),
    "mistral": re.compile(r"[a-zA-Z0-9]{9}"),
    "openrouter": re.compile(r"[a-zA-Z0-9_-]{1,40}"),
}
#: Providers that pair results by their order, where calls have no ids.
BY_ORDER = {"ollama", "gemini"}

_VALUE = re.compile(r"value of (\w+)\.")


@cache
def rule_of(provider: str, rule: str) -> Rule:
    return RULES[provider].get(rule) or COMMON_RULES[rule]


def problems_of(request: dict[str, Any], steps: list[Step], asked: Asked) -> list[Problem]:
    """Return why the provider refuses a request, or misreads it: nothing if it is good."""
    problems = [*_pairing(steps, asked.provider), *_speakers(steps, asked.provider), *_names(request, asked.provider)]
    own = _OWN.get(asked.provider)
    if own is not None:
        problems += own(request, steps, asked)
    known = RULES[asked.provider]
    return [problem for problem in problems if problem.rule in known or problem.rule in COMMON_RULES]


# ---------------------------------------------------------------------- calls and results


def exchanges(steps: list[Step], provider: str) -> Iterator[tuple[int, list[Any], list[tuple[Any, Any]]]]:
    """Yield the index of each step with calls or results, its results, and the pairs in them."""
    index = 0
    while index < len(steps):
        step = steps[index]
        if not (step.calls or step.results):
            index += 1
            continue
        results = list(step.results)
        following = index + 1
        while following < len(steps) and steps[following].results:
            results += steps[following].results
            following += 1
        yield index, results, _pairs(step.calls, results, provider)
        index = following


def _pairs(calls: list[Any], results: list[Any], provider: str) -> list[tuple[Any, Any]]:
    if provider in BY_ORDER and not all(call.id for call in calls):
        return list(zip(calls, results, strict=False))
    left = list(results)
    pairs = []
    for call in calls:
        found = next((result for result in left if result.id == call.id), None)
        if found is not None:
            left.remove(found)
            pairs.append((call, found))
    return pairs


def _pairing(steps: list[Step], provider: str) -> Iterator[Problem]:
    pattern = ID_PATTERNS.get(provider)
    seen: set[Any] = set()
    for index, results, pairs in exchanges(steps, provider):
        calls = steps[index].calls
        if len(pairs) < len(calls):
            yield Problem("call-unanswered", f"steps[{index}] has {len(calls)} calls, {len(pairs)} answered")
        if len(pairs) < len(results):
            ids = {call.id for call in calls}
            by_order = provider in BY_ORDER
            for result in results:
                if not any(result is paired for _, paired in pairs):
                    rule = "result-twice" if result.id in ids and not by_order else "result-orphan"
                    yield Problem(rule, f"steps[{index}] is followed by a result of {result.id!r}")
        for call, result in pairs:
            said = _VALUE.search(result.text)
            key = call.arguments.get("key") if isinstance(call.arguments, dict) else None
            if said and key is not None and said[1] != key:
                yield Problem("pair-wrong", f"steps[{index}] has {call.name}({key}) with {said[0]!r}")
            if provider == "gemini" and result.name is not None and result.name != call.name:
                yield Problem("call-unanswered", f"steps[{index}] has {call.name} answered by {result.name}")
        ids_here = [call.id for call in calls]
        for call_id in ids_here:
            if not call_id:
                yield Problem("id-missing", f"steps[{index}] has a call with the id {call_id!r}")
            elif pattern and not pattern.fullmatch(call_id):
                yield Problem("id-pattern", f"steps[{index}] has a call with the id {call_id!r}")
        filled = [call_id for call_id in ids_here if call_id]
        if len(set(filled)) < len(filled):
            yield Problem("id-twice", f"steps[{index}] has calls with one id: {filled}")
        elif not seen.isdisjoint(filled):
            yield Problem("id-repeated", f"steps[{index}] repeats {seen.intersection(filled)}")
        seen.update(filled)


# ---------------------------------------------------------------------- who speaks, and says nothing


def _speakers(steps: list[Step], provider: str) -> Iterator[Problem]:
    spoken = [step for step in steps if step.role != "system"]
    if not spoken or spoken[0].role != "user":
        yield Problem("first-not-user", f"the first is {spoken[0].role if spoken else 'nobody'}")
    if spoken and spoken[-1].role == "assistant" and not spoken[-1].raw:
        yield Problem("ends-with-assistant", "the last is the assistant")
    previous = None
    for index, step in enumerate(steps):
        for text in step.texts:
            if not text.strip() and not (provider in ("openai", "openrouter") and step.role == "assistant"):
                yield Problem("blank-text", f"steps[{index}] ({step.role}) has {text!r}")
        if step.role == "assistant" and not (step.texts or step.calls or step.raw):
            yield Problem("empty-content", f"steps[{index}] says nothing")
        if step.role == "user" and not (step.texts or step.media):
            yield Problem("empty-content", f"steps[{index}] asks nothing")
        if step.role != "system" and step.role == previous:
            yield Problem("alternation", f"steps[{index}] and the one before are both of the {step.role}")
        previous = step.role
        if step.role == "user" and index and steps[index - 1].role == "result":
            yield Problem("user-after-results", f"steps[{index}] asks directly after results")
        if step.calls and (not index or steps[index - 1].role in ("assistant", "system")):
            yield Problem("call-turn", f"steps[{index}] calls directly after {steps[index - 1].role}")


# ---------------------------------------------------------------------- each provider's own


def _seal_problem(value: Any, asked: Asked, where: str, text: str | None = None, any_model: bool = False) -> Any:
    """Return a problem if a provider cannot open what it is sent, or if it is not for this text."""
    found = opened(value)
    if found is None:
        return None
    if found.provider != asked.provider or (found.model != asked.model and not any_model):
        return Problem("seal-foreign", f"{where} is sealed by {found.provider}, {found.model}")
    if text is not None and found.checksum != checksum(text):
        return Problem("signature", f"{where} is signed for another text")
    return None


_NAME = re.compile(r"[^\s<|\\/>]{1,64}")


def _names(request: dict[str, Any], provider: str) -> Iterator[Problem]:
    for index, message in enumerate(request.get("messages") or request.get("input") or ()):
        if isinstance(message, dict) and "role" in message and "name" in message:
            if provider != "openai" or not _NAME.fullmatch(message["name"]):
                yield Problem("name", f"messages[{index}] has the name {message['name']!r}")


def _anthropic(request: dict[str, Any], steps: list[Step], asked: Asked) -> Iterator[Problem]:
    marks = sum("cache_control" in block for block in request["system"])
    turns: list[tuple[str, list[dict[str, Any]]]] = []
    for index, message in enumerate(request["messages"]):
        if not message["content"]:
            yield Problem("empty-content", f"messages[{index}] is empty")
        if not turns or turns[-1][0] != message["role"]:
            turns.append((message["role"], []))
        turns[-1][1].extend(message["content"])
        for block in message["content"]:
            kind = block["type"]
            if block.get("cache_control"):
                marks += 1
                if kind in ("thinking", "redacted_thinking") or (kind == "text" and not block["text"]):
                    yield Problem("cache-mark-place", f"messages[{index}] has a mark on {kind}")
            if kind == "thinking":
                if not block.get("signature"):
                    yield Problem("signature", f"messages[{index}] has a thought without a signature")
                problem = _seal_problem(block.get("signature"), asked, f"messages[{index}]", block["thinking"])
                if problem:
                    yield problem
            elif kind not in ("text", "tool_use", "tool_result", "image", "document"):
                for value in strings_in(block):
                    problem = _seal_problem(value, asked, f"messages[{index}]", any_model=kind != "redacted_thinking")
                    if problem:
                        yield problem
    if marks > 4:
        yield Problem("cache-marks", f"{marks} marks")
    for number, (role, blocks) in enumerate(turns):
        if role != "assistant":
            continue
        asked_for = {block["id"] for block in blocks if block["type"] == "server_tool_use"}
        found = {block["tool_use_id"] for block in blocks if block["type"] == "web_search_tool_result"}
        is_last = number == len(turns) - 1
        if found - asked_for or (asked_for - found and not is_last):
            yield Problem("server-tool-unpaired", f"turn {number} has {asked_for} and results of {found}")
    if asked.thinking and len(turns) > 1 and steps[-1].role == "result":
        role, blocks = turns[-2]
        if role == "assistant" and blocks[0]["type"] not in ("thinking", "redacted_thinking"):
            yield Problem("thinking-first", f"the turn under way begins with {blocks[0]['type']}")


def _bedrock(request: dict[str, Any], steps: list[Step], asked: Asked) -> Iterator[Problem]:
    marks = sum("cachePoint" in block for block in request["system"])
    names: Counter[str] = Counter()
    for index, message in enumerate(request["messages"]):
        content = message["content"]
        if not content:
            yield Problem("empty-content", f"messages[{index}] is empty")
        for block in content:
            if "cachePoint" in block:
                marks += 1
            elif "document" in block:
                names[block["document"]["name"]] += 1
            elif "reasoningContent" in block:
                thought = block["reasoningContent"].get("reasoningText", {})
                if not thought.get("signature") or not str(thought.get("text") or "").strip():
                    yield Problem("signature", f"messages[{index}] has a thought without a signature or a text")
                problem = _seal_problem(thought.get("signature"), asked, f"messages[{index}]", thought.get("text"))
                if problem:
                    yield problem
    if marks > 4:
        yield Problem("cache-marks", f"{marks} marks")
    if names and max(names.values()) > 1:
        yield Problem("document-name", f"documents with one name: {names}")
    if asked.thinking and steps and steps[-1].role == "result":
        last = next((message for message in reversed(request["messages"]) if message["role"] == "assistant"), None)
        if last is not None and "reasoningContent" not in last["content"][0]:
            yield Problem("thinking-first", "the turn under way begins without thoughts")


_ITEM_ID = re.compile(r"fc[A-Za-z0-9_-]*")
_LED_TO = re.compile(r"fc_r(\d{10})_\d{6}")


def _responses(request: dict[str, Any], steps: list[Step], asked: Asked) -> Iterator[Problem]:
    items = request["input"]
    ids: set[str] = set()
    shown_reasoning: set[str] = set()
    for index, item in enumerate(items):
        item_id = item.get("id")
        if item_id is not None:
            if item_id in ids:
                yield Problem("item-id-twice", f"input[{index}] repeats {item_id!r}")
            ids.add(item_id)
        if "summary" in item:
            if item.get("type") != "reasoning" or not str(item_id or "").startswith("rs"):
                yield Problem("reasoning-item", f"input[{index}] has the type {item.get('type')!r}, the id {item_id!r}")
            following = items[index + 1] if index + 1 < len(items) else {}
            if not (following.get("type") == "function_call" or following.get("role") == "assistant"):
                yield Problem("reasoning-alone", f"input[{index}] leads to nothing")
            shown_reasoning.add(str(item_id))
            problem = _seal_problem(item.get("encrypted_content"), asked, f"input[{index}]")
            if problem:
                yield problem
        elif item.get("type") == "function_call":
            if item_id is not None and not _ITEM_ID.fullmatch(item_id):
                yield Problem("item-id-pattern", f"input[{index}] has the id {item_id!r}")
            led_to = _LED_TO.fullmatch(item_id or "")
            if led_to and f"rs_{led_to[1]}" not in shown_reasoning:
                yield Problem("call-without-reasoning", f"input[{index}] is without rs_{led_to[1]}")
        elif item.get("type") == "function_call_output" and not item.get("call_id"):
            yield Problem("id-missing", f"input[{index}] answers {item.get('call_id')!r}")


def _gemini(request: dict[str, Any], steps: list[Step], asked: Asked) -> Iterator[Problem]:
    contents = request["contents"]
    # The current turn is what follows the last message in which the user says something.
    current = 0
    for index, content in enumerate(contents):
        parts = content.parts or ()
        if not parts:
            yield Problem("empty-content", f"contents[{index}] has no parts")
        if content.role == "user" and not any(part.function_response for part in parts):
            current = index
        for part in parts:
            has_data = part.text is not None or part.function_call or part.function_response or part.inline_data
            if not has_data:
                yield Problem("empty-content", f"contents[{index}] has an empty part")
            problem = _seal_problem(part.thought_signature, asked, f"contents[{index}]", any_model=True)
            if problem:
                yield problem
    if asked.model.startswith("gemini-3"):
        for index, content in enumerate(contents[current:], current):
            calls = [part for part in content.parts or () if part.function_call]
            if content.role == "model" and calls and not calls[0].thought_signature:
                yield Problem("signature-missing", f"contents[{index}], in the current turn")


def _openrouter(request: dict[str, Any], steps: list[Step], asked: Asked) -> Iterator[Problem]:
    for index, message in enumerate(request["messages"]):
        for detail in message.get("reasoning_details", ()):
            problem = _seal_problem(detail.get("signature"), asked, f"messages[{index}]", detail.get("text"))
            if problem:
                yield problem


_OWN = {
    "anthropic": _anthropic,
    "bedrock": _bedrock,
    "responses": _responses,
    "gemini": _gemini,
    "openrouter": _openrouter,
}


# ---------------------------------------------------------------------- meaning


def lost_pairs(steps: list[Step], provider: str, keys: set[str]) -> list[Problem]:
    """Return the calls that should be shown with their own results and are not."""
    shown = set()
    for _, _, pairs in exchanges(steps, provider):
        for call, result in pairs:
            key = call.arguments.get("key") if isinstance(call.arguments, dict) else None
            if key is not None and value_of(key) in result.text:
                shown.add(key)
    return [Problem("pair-lost", f"look_up({key}) and its result") for key in sorted(keys - shown)]


def texts_of(steps: list[Step]) -> str:
    """Return all that is said in a request, in one text."""
    texts = [text for step in steps for text in step.texts]
    texts += [string for step in steps if step.raw for string in strings_in(step.raw)]
    return "\n".join(texts)


def leaked_keys(request: Any) -> bool:
    return "chat_shown" in json.dumps(request, default=str)
