# SPDX-License-Identifier: Apache-2.0
"""
The agent of `web_chatbot.py`. It remembers, and leaves sums to a tool. Rules answer, word by word, or a real model.

"My name is Ada.", "What is my name?" and "What is 12 * 3?" show what it can do.
"""

import re
import time
import uuid
from typing import Any

from agent_chatbot import calculate
from haystack import component
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator, OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk, ToolCall
from haystack.tools.from_function import create_tool_from_function
from haystack.tools.tool import Tool
from haystack_integrations.hooks.chat_store import chat_history_hooks
from terminal_chatbot import answer_from_memory

from haystack_chat_store import ChatMessageStore


def answer(messages: list[ChatMessage]) -> str | ChatMessage:
    """Answer by rules, only from the messages that a model would see."""
    if result := messages[-1].tool_call_result:
        return f"It is {result.result}."
    if sums := re.search(r"what is ([-+*/(). \d]+)\?", messages[-1].text or "", re.IGNORECASE):
        call = ToolCall("calculate", {"expression": sums[1]}, id=f"call_{uuid.uuid4().hex}")
        return ChatMessage.from_assistant(tool_calls=[call])
    return answer_from_memory(messages)


@component
class RuleBasedModel:
    """Answers by rules, and streams the answer as slowly as a model does."""

    @component.output_types(replies=list[ChatMessage])
    def run(
        self, messages: list[ChatMessage], tools: list[Tool] | None = None, streaming_callback: Any = None
    ) -> dict[str, list[ChatMessage]]:
        def slowly(chunk: StreamingChunk) -> None:
            time.sleep(0.03)
            streaming_callback(chunk)

        model = MockChatGenerator(response_fn=answer)
        return model.run(messages, tools=tools, streaming_callback=slowly if streaming_callback else None)


def build_agent(store: ChatMessageStore, llm: str) -> Agent:
    """Build the agent. `llm` is "demo" or "openai"."""
    model: Any = OpenAIChatGenerator() if llm == "openai" else RuleBasedModel()
    hooks, tools = chat_history_hooks(store, last_k=None, max_tokens=8000), [create_tool_from_function(calculate)]
    return Agent(chat_generator=model, tools=tools, system_prompt="You are helpful.", hooks=hooks)
