# SPDX-License-Identifier: Apache-2.0
"""
What each provider answers, and what the receiving side of its Haystack generator makes of it.

The answers have the form of the provider's documentation, as objects of its SDK. The generator's own functions turn
them into messages: the same ones that its `run` calls, for answers that are streamed and for those that are not.
"""

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.components.generators.chat.openai import _convert_chat_completion_to_chat_message
from haystack.components.generators.chat.openai_responses import _convert_response_to_chat_message
from haystack.dataclasses import ChatMessage, ComponentInfo
from haystack.utils import Secret
from openai.types import responses as openai_responses
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from replies import Reply, pieces, seal

KEY = Secret.from_token("no key")
INFO = ComponentInfo(type="generator", name="generator")


def ignore(chunk: Any) -> None:
    pass


# ---------------------------------------------------------------------- OpenAI, and those that speak like it


def openai_call_id(reply: Reply, index: int) -> str:
    return f"call_{reply.number:012d}{index:012d}"


def mistral_call_id(reply: Reply, index: int) -> str:
    return f"m{reply.number:04d}{index:04d}"


def _openai_calls(reply: Reply, call_id: Any) -> list[dict[str, Any]]:
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
        message["tool_calls"] = _openai_calls(reply, call_id)
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
    for index, call in enumerate(_openai_calls(reply, call_id)):
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


# ---------------------------------------------------------------------- OpenAI Responses


def responses_call_ids(reply: Reply, index: int) -> tuple[str, str]:
    """
    Return the id of the item and the id of the call.

    The letter behind `fc_` says whether reasoning led to the call, which must then stand before it.
    """
    led_to = "r" if reply.thinking else "n"
    return f"fc_{led_to}{reply.number:010d}_{index:06d}", f"call_{reply.number:010d}_{index:08d}"


def reasoning_item_id(number: int) -> str:
    return f"rs_{number:010d}"


@cache
def responses_generator() -> OpenAIResponsesChatGenerator:
    return OpenAIResponsesChatGenerator(api_key=KEY)


def _responses_output(reply: Reply, model: str) -> list[dict[str, Any]]:
    output: list[dict[str, Any]] = []
    if reply.thinking:
        output.append(
            {
                "type": "reasoning",
                "id": reasoning_item_id(reply.number),
                "summary": [{"type": "summary_text", "text": reply.thinking}],
                "encrypted_content": seal("responses", model, reply.thinking, 40),
                "status": None,
            }
        )
    if reply.text:
        content: dict[str, Any] = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": []}
        if reply.ends == "refusal":
            content = {"type": "refusal", "refusal": reply.text}
        output.append(
            {
                "type": "message",
                "id": f"msg_{reply.number:010d}",
                "role": "assistant",
                "status": "completed",
                "content": [content],
            }
        )
    for index, call in enumerate(reply.calls):
        item_id, call_id = responses_call_ids(reply, index)
        output.append(
            {
                "type": "function_call",
                "id": item_id,
                "call_id": call_id,
                "name": call.tool,
                "arguments": json.dumps(call.arguments),
                "status": "completed",
            }
        )
    return output


def _response(reply: Reply, model: str) -> dict[str, Any]:
    incomplete = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reply.ends)
    return {
        "id": f"resp_{reply.number:010d}",
        "object": "response",
        "created_at": 1_780_000_000,
        "model": model,
        "status": "incomplete" if incomplete else "completed",
        "incomplete_details": {"reason": incomplete} if incomplete else None,
        "error": None,
        "instructions": None,
        "metadata": {},
        "output": _responses_output(reply, model),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "temperature": 1.0,
        "top_p": 1.0,
        "usage": {
            "input_tokens": 100,
            "output_tokens": 20,
            "total_tokens": 120,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def _responses_stream(reply: Reply, model: str) -> list[Any]:
    events: list[Any] = []

    def event(kind: Any, **fields: Any) -> None:
        events.append(kind.model_validate({**fields, "sequence_number": len(events)}))

    for index, item in enumerate(_responses_output(reply, model)):
        place = {"output_index": index, "item_id": item["id"]}
        started = {**item, "status": "in_progress"}
        if item["type"] == "reasoning":
            started = {**item, "summary": [], "encrypted_content": seal("responses", model, "", 20)}
        elif item["type"] == "function_call":
            started["arguments"] = ""
        else:
            started["content"] = []
        added = openai_responses.ResponseOutputItemAddedEvent
        event(added, type="response.output_item.added", output_index=index, item=started)
        if item["type"] == "reasoning":
            for piece in pieces(reply.thinking):
                event(
                    openai_responses.ResponseReasoningSummaryTextDeltaEvent,
                    type="response.reasoning_summary_text.delta",
                    summary_index=0,
                    delta=piece,
                    **place,
                )
        elif item["type"] == "function_call":
            for piece in pieces(item["arguments"]):
                event(
                    openai_responses.ResponseFunctionCallArgumentsDeltaEvent,
                    type="response.function_call_arguments.delta",
                    delta=piece,
                    **place,
                )
        elif reply.ends == "refusal":
            for piece in pieces(reply.text):
                event(
                    openai_responses.ResponseRefusalDeltaEvent,
                    type="response.refusal.delta",
                    content_index=0,
                    delta=piece,
                    **place,
                )
        else:
            for piece in pieces(reply.text):
                event(
                    openai_responses.ResponseTextDeltaEvent,
                    type="response.output_text.delta",
                    content_index=0,
                    delta=piece,
                    logprobs=[],
                    **place,
                )
        done = openai_responses.ResponseOutputItemDoneEvent
        event(done, type="response.output_item.done", output_index=index, item=item)
    response = _response(reply, model)
    if response["status"] == "completed":
        event(openai_responses.ResponseCompletedEvent, type="response.completed", response=response)
    else:
        event(openai_responses.ResponseIncompleteEvent, type="response.incomplete", response=response)
    return events


def from_responses(reply: Reply, model: str) -> ChatMessage:
    if reply.streamed:
        return responses_generator()._handle_stream_response(iter(_responses_stream(reply, model)), ignore)[0]
    return _convert_response_to_chat_message(openai_responses.Response.model_validate(_response(reply, model)))


# ---------------------------------------------------------------------- Anthropic


@cache
def anthropic_generator(hides_text_beside_calls: bool) -> Any:
    from haystack_integrations.components.generators.anthropic import AnthropicChatGenerator

    return AnthropicChatGenerator(
        api_key=KEY,
        ignore_tools_thinking_messages=hides_text_beside_calls,
        anthropic_server_tools=[{"type": "web_search_20250305", "name": "web_search"}],
    )


def anthropic_call_id(reply: Reply, index: int) -> str:
    return f"toolu_{reply.number:012d}{index:06d}"


def _search_result(search_id: str, reply: Reply, model: str) -> dict[str, Any]:
    return {
        "type": "web_search_tool_result",
        "tool_use_id": search_id,
        "content": [
            {
                "type": "web_search_result",
                "url": "https://example.org",
                "title": f"Found for {reply.number}",
                "encrypted_content": seal("anthropic", model, "page", 1500),
                "page_age": None,
            }
        ],
    }


def _anthropic_blocks(reply: Reply, model: str) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.continues:
        blocks.append(_search_result(f"srvtoolu_{reply.number - 1:012d}", reply, model))
    if reply.thinking:
        signature = seal("anthropic", model, reply.thinking)
        blocks.append({"type": "thinking", "thinking": reply.thinking, "signature": signature})
        if reply.number % 5 == 0:
            blocks.append({"type": "redacted_thinking", "data": seal("anthropic", model, "redacted", 30)})
    if reply.searches:
        search_id = f"srvtoolu_{reply.number:012d}"
        query = {"query": f"search {reply.number}"}
        blocks.append({"type": "server_tool_use", "id": search_id, "name": "web_search", "input": query})
        if reply.ends != "pause":
            blocks.append(_search_result(search_id, reply, model))
    if reply.text and reply.ends != "pause":
        text: dict[str, Any] = {"type": "text", "text": reply.text}
        if reply.cites:
            text["citations"] = [
                {
                    "type": "web_search_result_location",
                    "cited_text": "cited",
                    "url": "https://example.org",
                    "title": "Example",
                    "encrypted_index": seal("anthropic", model, "index", 40),
                }
            ]
        blocks.append(text)
    blocks += [
        {"type": "tool_use", "id": anthropic_call_id(reply, index), "name": call.tool, "input": call.arguments}
        for index, call in enumerate(reply.calls)
    ]
    return blocks


_ANTHROPIC_STOPS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "content_filter": "refusal",
    "refusal": "refusal",
    "pause": "pause_turn",
}


def _anthropic_stream(reply: Reply, model: str) -> list[Any]:
    from anthropic import types

    usage = {"input_tokens": 100, "output_tokens": 20}
    message = {"id": f"msg_{reply.number}", "type": "message", "role": "assistant", "model": model, "content": []}
    events: list[Any] = [
        types.RawMessageStartEvent.model_validate(
            {
                "type": "message_start",
                "message": {**message, "stop_reason": None, "stop_sequence": None, "usage": usage},
            }
        )
    ]

    def delta(index: int, **fields: Any) -> None:
        event = {"type": "content_block_delta", "index": index, "delta": fields}
        events.append(types.RawContentBlockDeltaEvent.model_validate(event))

    for index, block in enumerate(_anthropic_blocks(reply, model)):
        kind = block["type"]
        started = dict(block)
        if kind == "text":
            started["text"] = ""
            started.pop("citations", None)
        elif kind == "thinking":
            started.update(thinking="", signature="")
        elif kind in ("tool_use", "server_tool_use"):
            started["input"] = {}
        start = {"type": "content_block_start", "index": index, "content_block": started}
        events.append(types.RawContentBlockStartEvent.model_validate(start))
        if kind == "text":
            for piece in pieces(block["text"]):
                delta(index, type="text_delta", text=piece)
            for citation in block.get("citations", ()):
                delta(index, type="citations_delta", citation=citation)
        elif kind == "thinking":
            for piece in pieces(block["thinking"]):
                delta(index, type="thinking_delta", thinking=piece)
            delta(index, type="signature_delta", signature=block["signature"])
        elif kind in ("tool_use", "server_tool_use"):
            for piece in pieces(json.dumps(block["input"])):
                delta(index, type="input_json_delta", partial_json=piece)
        stop = {"type": "content_block_stop", "index": index}
        events.append(types.RawContentBlockStopEvent.model_validate(stop))
    ending = {"stop_reason": _ANTHROPIC_STOPS[reply.ends], "stop_sequence": None}
    end = {"type": "message_delta", "delta": ending, "usage": {"output_tokens": 20}}
    events.append(types.RawMessageDeltaEvent.model_validate(end))
    return events


def from_anthropic(reply: Reply, model: str) -> ChatMessage:
    from anthropic import types

    generator = anthropic_generator(reply.number % 2 == 0)
    if reply.streamed:
        return generator._process_response(iter(_anthropic_stream(reply, model)))["replies"][0]
    message = types.Message.model_validate(
        {
            "id": f"msg_{reply.number}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": _anthropic_blocks(reply, model),
            "stop_reason": _ANTHROPIC_STOPS[reply.ends],
            "stop_sequence": None,
            "usage": {"input_tokens": 100, "output_tokens": 20},
        }
    )
    return generator._process_response(message)["replies"][0]


# ---------------------------------------------------------------------- Gemini


def _gemini_parts(reply: Reply, model: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    signs = model.startswith("gemini-3")
    if reply.thinking:
        parts.append({"text": reply.thinking, "thought": True})
    if reply.text:
        parts.append({"text": reply.text})
    for index, call in enumerate(reply.calls):
        call_id = f"gem{reply.number:05d}{index:03d}" if reply.has_ids else None
        part: dict[str, Any] = {"function_call": {"id": call_id, "name": call.tool, "args": call.arguments}}
        if signs and index == 0:
            part["thought_signature"] = seal("gemini", model, call.key)
        parts.append(part)
    if signs and reply.thinking and reply.text and not reply.calls:
        parts[-1]["thought_signature"] = seal("gemini", model, reply.text)
    return parts


_GEMINI_ENDS = {"length": "MAX_TOKENS", "content_filter": "SAFETY", "refusal": "PROHIBITED_CONTENT"}


def _gemini_responses(reply: Reply, model: str) -> list[Any]:
    from google.genai import types

    parts = _gemini_parts(reply, model)
    chunks = [parts]
    if reply.streamed:
        thoughts = [part for part in parts if part.get("thought")]
        texts = [part for part in parts if "text" in part and not part.get("thought")]
        # All calls of a reply in one chunk: the generator joins calls of several chunks into one.
        chunks = [*([part] for part in thoughts), *([part] for part in texts)]
        calls = [part for part in parts if "function_call" in part]
        chunks += [calls] if calls else []
    usage = {"prompt_token_count": 100, "candidates_token_count": 20, "total_token_count": 120}
    responses = [{"candidates": [{"content": {"role": "model", "parts": chunk}}]} for chunk in chunks or [[]]]
    last: dict[str, Any] = responses[-1]
    last["candidates"][0]["finish_reason"] = _GEMINI_ENDS.get(reply.ends, "STOP")
    last["usage_metadata"] = usage
    return [types.GenerateContentResponse.model_validate(response) for response in responses]


def from_gemini(reply: Reply, model: str) -> ChatMessage:
    from haystack_integrations.components.generators.google_genai.chat import utils

    responses = _gemini_responses(reply, model)
    if not reply.streamed:
        return utils._convert_google_genai_response_to_chatmessage(responses[0], model)
    chunks: list[Any] = []
    called = False
    for index, response in enumerate(responses):
        chunk = utils._convert_google_chunk_to_streaming_chunk(
            chunk=response, index=index, component_info=INFO, model=model, tool_calls_seen=called
        )
        called = called or bool(chunk.tool_calls)
        chunks.append(chunk)
    return utils._aggregate_streaming_chunks_with_reasoning(chunks)


# ---------------------------------------------------------------------- Amazon Bedrock


def bedrock_call_id(reply: Reply, index: int) -> str:
    return f"tooluse_{reply.number:010d}_{index:010d}"


_BEDROCK_STOPS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "content_filter": "content_filtered",
    "refusal": "guardrail_intervened",
}


def _bedrock_blocks(reply: Reply, model: str) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.thinking:
        thought = {"text": reply.thinking, "signature": seal("bedrock", model, reply.thinking)}
        blocks.append({"reasoningContent": {"reasoningText": thought}})
    if reply.text and reply.cites and not reply.streamed:
        cited = {"content": [{"text": reply.text}], "citations": [{"title": "Paper", "location": {}}]}
        blocks.append({"citationsContent": cited})
    elif reply.text:
        blocks.append({"text": reply.text})
    blocks += [
        {"toolUse": {"toolUseId": bedrock_call_id(reply, index), "name": call.tool, "input": call.arguments}}
        for index, call in enumerate(reply.calls)
    ]
    return blocks


def _bedrock_stream(reply: Reply, model: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"messageStart": {"role": "assistant"}}]
    for index, block in enumerate(_bedrock_blocks(reply, model)):

        def delta(index: int = index, **fields: Any) -> None:
            events.append({"contentBlockDelta": {"contentBlockIndex": index, "delta": fields}})

        if "text" in block:
            for piece in pieces(block["text"]):
                delta(text=piece)
        elif "toolUse" in block:
            use = block["toolUse"]
            start = {"toolUse": {"toolUseId": use["toolUseId"], "name": use["name"]}}
            events.append({"contentBlockStart": {"contentBlockIndex": index, "start": start}})
            for piece in pieces(json.dumps(use["input"])):
                delta(toolUse={"input": piece})
        else:
            thought = block["reasoningContent"]["reasoningText"]
            for piece in pieces(thought["text"]):
                delta(reasoningContent={"text": piece})
            delta(reasoningContent={"signature": thought["signature"]})
        events.append({"contentBlockStop": {"contentBlockIndex": index}})
    events.append({"messageStop": {"stopReason": _BEDROCK_STOPS[reply.ends]}})
    events.append({"metadata": {"usage": {"inputTokens": 100, "outputTokens": 20, "totalTokens": 120}}})
    return events


def from_bedrock(reply: Reply, model: str) -> ChatMessage:
    from haystack_integrations.components.generators.amazon_bedrock.chat import utils

    if reply.streamed:
        stream: Any = _bedrock_stream(reply, model)
        return utils._parse_streaming_response(stream, ignore, model, INFO)[0]
    body = {
        "output": {"message": {"role": "assistant", "content": _bedrock_blocks(reply, model)}},
        "stopReason": _BEDROCK_STOPS[reply.ends],
        "usage": {"inputTokens": 100, "outputTokens": 20, "totalTokens": 120},
    }
    return utils._parse_completion_response(body, model)[0]


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


# ---------------------------------------------------------------------- Cohere


def from_cohere(reply: Reply, model: str) -> ChatMessage:
    import cohere
    from haystack_integrations.components.generators.cohere.chat import chat_generator

    calls = [
        {**call, "id": f"{call['function']['name']}_{call['id']}"} for call in _openai_calls(reply, mistral_call_id)
    ]
    ends = {"tool_calls": "TOOL_CALL", "length": "MAX_TOKENS", "content_filter": "ERROR"}.get(reply.ends, "COMPLETE")
    citation = cohere.Citation(start=0, end=4, text=reply.text[:4], sources=[]) if reply.cites else None
    if not reply.streamed:
        message: dict[str, Any] = {"role": "assistant"}
        if reply.calls:
            message.update(tool_calls=calls, tool_plan=reply.text or None)
        elif reply.text:
            message["content"] = [{"type": "text", "text": reply.text}]
        response = cohere.ChatResponse.model_validate(
            {
                "id": str(reply.number),
                "finish_reason": ends,
                "message": message,
                "usage": {"billed_units": {"input_tokens": 100, "output_tokens": 20}},
            }
        )
        if citation:
            response.message.citations = [citation]
        return chat_generator._parse_response(response, model)
    chunks: list[Any] = [SimpleNamespace(type="message-start", delta=None)]

    def chunk(kind: str, **message: Any) -> None:
        chunks.append(SimpleNamespace(type=kind, delta=SimpleNamespace(message=SimpleNamespace(**message))))

    if reply.calls:
        for piece in pieces(reply.text):
            chunk("tool-plan-delta", tool_plan=piece)
        for call in calls:
            started = SimpleNamespace(name=call["function"]["name"], arguments="")
            chunk("tool-call-start", tool_calls=SimpleNamespace(id=call["id"], function=started))
            for piece in pieces(call["function"]["arguments"]):
                chunk("tool-call-delta", tool_calls=SimpleNamespace(function=SimpleNamespace(arguments=piece)))
    elif reply.text:
        chunks.append(SimpleNamespace(type="content-start", delta=None))
        for piece in pieces(reply.text):
            chunk("content-delta", content=SimpleNamespace(text=piece))
        if citation:
            chunk("citation-start", citations=citation)
    usage = {"billed_units": {"input_tokens": 100, "output_tokens": 20}}
    chunks.append(SimpleNamespace(type="message-end", delta=SimpleNamespace(finish_reason=ends, usage=usage)))
    return chat_generator._parse_streaming_response(iter(chunks), model, ignore, INFO)


# ---------------------------------------------------------------------- Ollama


@cache
def ollama_generator() -> Any:
    from haystack_integrations.components.generators.ollama import OllamaChatGenerator

    return OllamaChatGenerator()


def from_ollama(reply: Reply, model: str) -> ChatMessage:
    from haystack_integrations.components.generators.ollama.chat import chat_generator
    from ollama import ChatResponse

    def response(**message: Any) -> ChatResponse:
        return ChatResponse.model_validate(
            {"model": model, "created_at": "2026-11-30T00:00:00Z", "done": False, "message": message}
        )

    def ended(response: ChatResponse) -> ChatResponse:
        response.done = True
        response.done_reason = "length" if reply.ends == "length" else "stop"
        response.eval_count, response.prompt_eval_count = 20, 100
        return response

    calls = [{"function": {"name": call.tool, "arguments": call.arguments}} for call in reply.calls]
    if not reply.streamed:
        message = response(
            role="assistant", content=reply.text, thinking=reply.thinking or None, tool_calls=calls or None
        )
        return chat_generator._convert_ollama_response_to_chatmessage(ended(message))
    chunks = [response(role="assistant", content="", thinking=piece) for piece in pieces(reply.thinking)]
    chunks += [response(role="assistant", content=piece) for piece in pieces(reply.text)]
    # Each call in a chunk of its own: of several calls in one chunk, the generator keeps the last.
    chunks += [response(role="assistant", content="", tool_calls=[call]) for call in calls]
    chunks.append(ended(response(role="assistant", content="")))
    return ollama_generator()._handle_streaming_response(iter(chunks), ignore)["replies"][0]


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


RECEIVE = {
    "openai": from_openai,
    "responses": from_responses,
    "anthropic": from_anthropic,
    "gemini": from_gemini,
    "bedrock": from_bedrock,
    "mistral": from_mistral,
    "cohere": from_cohere,
    "ollama": from_ollama,
    "openrouter": from_openrouter,
}
