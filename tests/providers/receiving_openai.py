# SPDX-License-Identifier: Apache-2.0
"""What OpenAI answers, and those that speak like it: Mistral and OpenRouter."""

import json
from functools import cache
from typing import Any

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.components.generators.chat.openai import _convert_chat_completion_to_chat_message
from haystack.dataclasses import ChatMessage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from replies import KEY, Reply, ignore, pieces, seal


def openai_call_id(reply: Reply, index: int) -> str:
    return f"call_{reply.number:012d}{index:012d}"


def mistral_call_id(reply: Reply, index: int) -> str:
    return f"m{reply.number:04d}{index:04d}"


def openai_calls(reply: Reply, call_id: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": call_id(reply, index),
            "type": "function",
            "function": {"name": call.tool, "arguments": json.dumps(call.arguments)},
        }
        for index, call in enumerate(reply.calls)
    ]


def _usage() -> dict[str, Any]:
    return {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


def _openai_completion(reply: Reply, model: str, call_id: Any = openai_call_id, **message: Any) -> dict[str, Any]:
    refuses = reply.ends == "refusal"
    message = {
        "role": "assistant",
        "content": (None if refuses else reply.text or None),
        "refusal": reply.text if refuses else None,
        **message,
    }
    if reply.calls:
        message["tool_calls"] = openai_calls(reply, call_id)
    return {
        "id": f"chatcmpl-{reply.number}",
        "object": "chat.completion",
        "created": 1_780_000_000,
        "model": model,
        "choices": [{"index": 0, "finish_reason": reply.finish_reason, "logprobs": None, "message": message}],
        "usage": _usage(),
    }


def _openai_stream(reply: Reply, model: str, call_id: Any = openai_call_id, thoughts: Any = ()) -> list[Any]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *thoughts]
    if reply.ends == "refusal":
        deltas += [{"refusal": piece} for piece in pieces(reply.text)]
    else:
        deltas += [{"content": piece} for piece in pieces(reply.text)]
    for index, call in enumerate(openai_calls(reply, call_id)):
        arguments = call["function"]["arguments"]
        start = {**call, "index": index, "function": {**call["function"], "arguments": ""}}
        deltas.append({"tool_calls": [start]})
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces(arguments)]
    base = {"id": f"chatcmpl-{reply.number}", "object": "chat.completion.chunk", "created": 1_780_000_000}
    chunks: list[dict[str, Any]] = [
        {**base, "model": model, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    chunks.append(
        {**base, "model": model, "choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]}
    )
    chunks.append({**base, "model": model, "choices": [], "usage": _usage()})
    return [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]


@cache
def openai_generator() -> OpenAIChatGenerator:
    return OpenAIChatGenerator(api_key=KEY)


def from_openai(reply: Reply, model: str) -> ChatMessage:
    if reply.ends == "refusal" and reply.number % 2:
        # As programs store it that read the API themselves: the generator drops refusals.
        return ChatMessage.from_openai_dict_format({"role": "assistant", "content": None, "refusal": reply.text})
    if reply.streamed:
        return openai_generator()._handle_stream_response(iter(_openai_stream(reply, model)), ignore)[0]
    completion = ChatCompletion.model_validate(_openai_completion(reply, model))
    return _convert_chat_completion_to_chat_message(completion, completion.choices[0])


# ---------------------------------------------------------------------- Mistral


@cache
def mistral_generator() -> Any:
    from haystack_integrations.components.generators.mistral import MistralChatGenerator

    return MistralChatGenerator(api_key=KEY)


def from_mistral(reply: Reply, model: str) -> ChatMessage:
    if reply.streamed:
        stream: Any = iter(_openai_stream(reply, model, mistral_call_id))
        return mistral_generator()._handle_stream_response(stream, ignore)[0]
    from haystack_integrations.components.generators.mistral.chat import chat_generator

    content: Any = reply.text
    if reply.thinking:
        content = [{"type": "thinking", "thinking": [{"type": "text", "text": reply.thinking}]}]
        content += [{"type": "text", "text": reply.text}] if reply.text else []
    completion = _openai_completion(reply, model, mistral_call_id, content=content)
    return chat_generator._convert_mistral_response_to_chat_messages(completion)[0]


# ---------------------------------------------------------------------- OpenRouter


@cache
def openrouter_generator() -> Any:
    from haystack_integrations.components.generators.openrouter import OpenRouterChatGenerator

    return OpenRouterChatGenerator(api_key=KEY)


def from_openrouter(reply: Reply, model: str) -> ChatMessage:
    def detail(text: str, **more: Any) -> dict[str, Any]:
        return {"type": "reasoning.text", "index": 0, "format": "anthropic-claude-v1", "text": text, **more}

    signed = {"signature": seal("openrouter", model, reply.thinking)}
    if reply.streamed:
        thoughts = []
        if reply.thinking:
            thoughts = [{"reasoning": piece, "reasoning_details": [detail(piece)]} for piece in pieces(reply.thinking)]
            thoughts.append({"reasoning_details": [detail("", **signed)]})
        stream: Any = iter(_openai_stream(reply, model, openai_call_id, thoughts))
        return openrouter_generator()._handle_stream_response(stream, ignore)[0]
    from haystack_integrations.components.generators.openrouter.chat import chat_generator

    more: dict[str, Any] = {}
    if reply.thinking:
        more = {"reasoning": reply.thinking, "reasoning_details": [detail(reply.thinking, **signed)]}
    completion = ChatCompletion.model_validate(_openai_completion(reply, model, openai_call_id, **more))
    return chat_generator._convert_openrouter_completion_to_chat_message(completion, completion.choices[0])
