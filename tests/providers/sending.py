# SPDX-License-Identifier: Apache-2.0
"""
The request that each Haystack generator makes of messages, by its own converter, without a network.

`REQUEST` calls what the generator's `run` calls. `OUTLINE` reads the request back as a list of steps, in one form for
all providers, for the rules that all of them have: who speaks, which calls are answered by which results.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole
from receiving_openai import mistral_generator, openai_generator, openrouter_generator
from receiving_responses import responses_generator

# ---------------------------------------------------------------------- requests


def openai_request(messages: list[ChatMessage]) -> dict[str, Any]:
    return openai_generator()._prepare_api_call(messages=messages)


def responses_request(messages: list[ChatMessage]) -> dict[str, Any]:
    return responses_generator()._prepare_api_call(messages=messages)


def mistral_request(messages: list[ChatMessage]) -> dict[str, Any]:
    return mistral_generator()._prepare_api_call(messages=messages)


def openrouter_request(messages: list[ChatMessage]) -> dict[str, Any]:
    return openrouter_generator()._prepare_api_call(messages=messages)


def anthropic_request(messages: list[ChatMessage]) -> dict[str, Any]:
    from haystack_integrations.components.generators.anthropic.chat import utils

    system, others = utils._convert_messages_to_anthropic_format(messages)
    return {"system": system, "messages": others}


def gemini_request(messages: list[ChatMessage]) -> dict[str, Any]:
    from haystack_integrations.components.generators.google_genai.chat import utils

    system = None
    if messages and messages[0].is_from(ChatRole.SYSTEM):
        system, messages = messages[0].text or "", messages[1:]
    return {"system": system, "contents": [utils._convert_message_to_google_genai_format(m) for m in messages]}


def bedrock_request(messages: list[ChatMessage]) -> dict[str, Any]:
    from haystack_integrations.components.generators.amazon_bedrock.chat import utils

    system, others = utils._format_messages(messages)
    return {"system": system, "messages": others}


def cohere_request(messages: list[ChatMessage]) -> dict[str, Any]:
    from haystack_integrations.components.generators.cohere.chat import chat_generator

    return {"messages": [chat_generator._format_message(message) for message in messages]}


def ollama_request(messages: list[ChatMessage]) -> dict[str, Any]:
    from haystack_integrations.components.generators.ollama.chat import chat_generator
    from ollama._client import _copy_messages

    # The client checks the types of all fields before it sends anything.
    formatted = chat_generator._convert_chatmessages_to_ollama_format(messages)
    return {"messages": [message.model_dump(exclude_none=True) for message in _copy_messages(formatted)]}


REQUEST = {
    "openai": openai_request,
    "responses": responses_request,
    "anthropic": anthropic_request,
    "gemini": gemini_request,
    "bedrock": bedrock_request,
    "mistral": mistral_request,
    "cohere": cohere_request,
    "ollama": ollama_request,
    "openrouter": openrouter_request,
}


# ---------------------------------------------------------------------- outlines


@dataclass(slots=True)
class SentCall:
    id: Any
    name: str
    arguments: Any


@dataclass(slots=True)
class SentResult:
    id: Any
    name: str | None
    text: str


@dataclass(slots=True)
class Step:
    """
    One message of a request.

    :param role: `"system"`, `"user"`, `"assistant"` or `"result"`.
    :param thoughts: The texts of thoughts.
    :param raw: What else is sent as it was received, such as the blocks of server tools.
    """

    role: str
    texts: list[str] = field(default_factory=list)
    calls: list[SentCall] = field(default_factory=list)
    results: list[SentResult] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    raw: list[Any] = field(default_factory=list)
    media: int = 0


def _arguments(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _openai_step(message: dict[str, Any]) -> Step:
    role = message["role"]
    content = message.get("content")
    step = Step("result" if role == "tool" else role)
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        kind = part["type"]
        if kind in ("text", "refusal"):
            step.texts.append(part[kind])
        elif kind == "thinking":
            step.thoughts += [thought["text"] for thought in part["thinking"]]
        else:
            step.media += 1
    if message.get("refusal"):
        step.texts.append(message["refusal"])
    for detail in message.get("reasoning_details", ()):
        step.thoughts.append(detail.get("text") or detail.get("summary") or "")
    for call in message.get("tool_calls", ()):
        function = call["function"]
        step.calls.append(SentCall(call.get("id"), function["name"], _arguments(function["arguments"])))
    if role == "tool":
        step.results.append(SentResult(message.get("tool_call_id"), None, " ".join(step.texts)))
        step.texts = []
    return step


def openai_outline(request: dict[str, Any]) -> list[Step]:
    return [_openai_step(message) for message in request["messages"]]


def responses_outline(request: dict[str, Any]) -> list[Step]:
    steps: list[Step] = []

    def step_of(role: str) -> Step:
        # Items of one reply are one step: its reasoning, its calls and its text.
        if not (steps and steps[-1].role == role == "assistant"):
            steps.append(Step(role))
        return steps[-1]

    for item in request["input"]:
        kind = item.get("type")
        if kind == "function_call_output":
            output = item["output"]
            texts = [output] if isinstance(output, str) else [part.get("text", "") for part in output]
            step = step_of("result")
            step.results.append(SentResult(item.get("call_id"), None, " ".join(texts)))
            step.media += 0 if isinstance(output, str) else sum("text" not in part for part in output)
        elif kind == "function_call":
            call = SentCall(item.get("call_id"), item["name"], _arguments(item["arguments"]))
            step_of("assistant").calls.append(call)
        elif kind == "reasoning" or "summary" in item:
            step = step_of("assistant")
            step.thoughts += [part["text"] for part in item.get("summary") or ()]
            step.thoughts += [part.get("text", "") for part in item.get("content") or ()]
        else:
            step = step_of(item["role"])
            content = item["content"]
            for part in [{"text": content}] if isinstance(content, str) else content:
                if "text" in part:
                    step.texts.append(part["text"])
                else:
                    step.media += 1
    return steps


def _block_text(blocks: Any) -> str:
    if isinstance(blocks, str):
        return blocks
    return " ".join(json.dumps(block["json"]) if "json" in block else block.get("text", "") for block in blocks)


def anthropic_outline(request: dict[str, Any]) -> list[Step]:
    steps = [Step("system", [block["text"]]) for block in request["system"]]
    for message in request["messages"]:
        step = Step(message["role"])
        steps.append(step)
        for block in message["content"]:
            kind = block["type"]
            if kind == "text":
                step.texts.append(block["text"])
                step.raw += block.get("citations") or ()
            elif kind == "tool_use":
                step.calls.append(SentCall(block["id"], block["name"], block["input"]))
            elif kind == "tool_result":
                step.results.append(SentResult(block["tool_use_id"], None, _block_text(block["content"])))
                step.role = "result"
                step.media += sum(part["type"] not in ("text",) for part in block["content"])
            elif kind == "thinking":
                step.thoughts.append(block["thinking"])
            elif kind in ("image", "document"):
                step.media += 1
            else:
                step.raw.append(block)
    return steps


def gemini_outline(request: dict[str, Any]) -> list[Step]:
    steps = [] if request["system"] is None else [Step("system", [request["system"]])]
    for content in request["contents"]:
        step = Step("assistant" if content.role == "model" else "user")
        steps.append(step)
        for part in content.parts or ():
            if part.function_call is not None:
                call = part.function_call
                step.calls.append(SentCall(call.id or None, call.name, call.args))
            elif part.function_response is not None:
                answer = part.function_response
                text = (answer.response or {}).get("result", "")
                for blob in answer.parts or ():
                    if blob.inline_data.mime_type == "text/plain":
                        text += blob.inline_data.data.decode()
                    else:
                        step.media += 1
                step.results.append(SentResult(answer.id or None, answer.name, text))
                step.role = "result"
            elif part.inline_data is not None:
                step.media += 1
            elif part.thought:
                step.thoughts.append(part.text or "")
            elif part.text is not None:
                step.texts.append(part.text)
    return steps


def bedrock_outline(request: dict[str, Any]) -> list[Step]:
    steps = [Step("system", [block["text"]]) for block in request["system"] if "text" in block]
    for message in request["messages"]:
        step = Step(message["role"])
        steps.append(step)
        for block in message["content"]:
            if "text" in block:
                step.texts.append(block["text"])
            elif "toolUse" in block:
                use = block["toolUse"]
                step.calls.append(SentCall(use["toolUseId"], use["name"], use["input"]))
            elif "toolResult" in block:
                result = block["toolResult"]
                step.results.append(SentResult(result["toolUseId"], None, _block_text(result["content"])))
                step.role = "result"
                step.media += sum("image" in part or "document" in part for part in result["content"])
            elif "reasoningContent" in block:
                step.thoughts.append(block["reasoningContent"].get("reasoningText", {}).get("text") or "")
            elif "cachePoint" not in block:
                step.media += 1
    return steps


def cohere_outline(request: dict[str, Any]) -> list[Step]:
    steps = []
    for message in request["messages"]:
        step = _openai_step(message)
        if message.get("tool_plan"):
            step.texts.append(message["tool_plan"])
        steps.append(step)
    return steps


def ollama_outline(request: dict[str, Any]) -> list[Step]:
    steps = []
    for message in request["messages"]:
        step = _openai_step(message)
        step.thoughts += [message["thinking"]] if message.get("thinking") else []
        step.media += len(message.get("images") or ())
        steps.append(step)
    return steps


OUTLINE = {
    "openai": openai_outline,
    "responses": responses_outline,
    "anthropic": anthropic_outline,
    "gemini": gemini_outline,
    "bedrock": bedrock_outline,
    "mistral": openai_outline,
    "cohere": cohere_outline,
    "ollama": ollama_outline,
    "openrouter": openai_outline,
}


# ---------------------------------------------------------------------- texts of requests


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string in a value that JSON could hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)


def characters(steps: list[Step]) -> int:
    """Count what a model reads of a request as text: texts, calls, results, thoughts and raw blocks."""
    count = 0
    for step in steps:
        count += sum(map(len, step.texts)) + sum(map(len, step.thoughts))
        count += sum(len(result.text) for result in step.results)
        count += sum(len(call.name) + len(json.dumps(call.arguments)) for call in step.calls)
        count += sum(map(len, strings_in(step.raw))) if step.raw else 0
    return count
