# SPDX-License-Identifier: Apache-2.0
"""
The messages that are measured. They are made anew at every call, because a store sees each message for the first time.
"""

import json

from haystack.dataclasses import ChatMessage, ToolCall

from haystack_chat_store.codec import encode_message
from haystack_chat_store.ids import new_message_id

_PROSE = (
    "The parcel left our warehouse on Tuesday and reached the regional centre the next morning; from there it usually "
    'takes two more days. If it has not come by Friday, reply with "still missing" and we will send another one. '
)
_CITIES = ("Leeds", "Köln", "Porto", "Ghent")
_ORDERS = [
    {"order_id": 48_210 + index, "status": "shipped", "total": 19.9 + index, "city": _CITIES[index % 4], "gift": False}
    for index in range(40)
]
USER_TEXT = _PROSE[:120]
ASSISTANT_TEXT = (_PROSE * 3)[:600]
# The result of a tool, as Haystack turns it into text: JSON with many quotes, which are escaped when it is stored.
TOOL_RESULT = json.dumps(_ORDERS, ensure_ascii=False)[:2048]


def conversation(messages: int) -> list[ChatMessage]:
    """Return alternating questions and answers."""
    return [
        ChatMessage.from_assistant(ASSISTANT_TEXT) if index % 2 else ChatMessage.from_user(USER_TEXT)
        for index in range(messages)
    ]


def encoded_conversation(messages: int) -> list[str]:
    """Return the same conversation as encoded texts, so that floors store and read as many bytes."""
    return [encode_message(message, new_message_id()) for message in conversation(messages)]


def kinds_of_message() -> dict[str, ChatMessage]:
    """Return one message of each kind that the codec is measured with."""
    call = ToolCall("find_orders", {"customer": "c-1042", "status": ["shipped", "open"], "limit": 40}, id="call_9f31c7")
    return {
        "user, 120 characters": ChatMessage.from_user(USER_TEXT),
        "assistant, 600 characters": ChatMessage.from_assistant(ASSISTANT_TEXT),
        "assistant, a tool call": ChatMessage.from_assistant(tool_calls=[call]),
        "tool, a result of 2 KB": ChatMessage.from_tool(TOOL_RESULT, origin=call),
    }


def reply_with_usage() -> ChatMessage:
    """Return an assistant message with the meta that Haystack's OpenAI generator adds."""
    usage = {
        "completion_tokens": 131,
        "prompt_tokens": 912,
        "total_tokens": 1043,
        "completion_tokens_details": {"audio_tokens": 0, "reasoning_tokens": 64, "accepted_prediction_tokens": 0},
        "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 768},
    }
    meta = {"model": "gpt-5-mini-2025-08-07", "index": 0, "finish_reason": "stop", "usage": usage}
    return ChatMessage.from_assistant(ASSISTANT_TEXT, meta=meta)
