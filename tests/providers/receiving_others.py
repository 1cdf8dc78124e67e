# SPDX-License-Identifier: Apache-2.0
"""What Gemini, Cohere and Ollama answer, each in a form of its own."""

from functools import cache
from types import SimpleNamespace
from typing import Any

from haystack.dataclasses import ChatMessage
from receiving_openai import mistral_call_id, openai_calls
from replies import INFO, Reply, ignore, pieces, seal

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


# ---------------------------------------------------------------------- Cohere


def from_cohere(reply: Reply, model: str) -> ChatMessage:
    import cohere
    from haystack_integrations.components.generators.cohere.chat import chat_generator

    calls = [
        {**call, "id": f"{call['function']['name']}_{call['id']}"} for call in openai_calls(reply, mistral_call_id)
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
