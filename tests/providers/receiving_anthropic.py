# SPDX-License-Identifier: Apache-2.0
"""What Claude answers: Anthropic and Amazon Bedrock."""

import json
from functools import cache
from typing import Any

from haystack.dataclasses import ChatMessage
from replies import INFO, KEY, Reply, ignore, pieces, seal


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
