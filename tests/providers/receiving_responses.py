# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's Responses API answers."""

import json
from functools import cache
from typing import Any

from haystack.components.generators.chat import OpenAIResponsesChatGenerator
from haystack.components.generators.chat.openai_responses import _convert_response_to_chat_message
from haystack.dataclasses import ChatMessage
from openai.types import responses as openai_responses
from replies import KEY, Reply, ignore, pieces, seal


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
