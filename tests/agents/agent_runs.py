# SPDX-License-Identifier: Apache-2.0
"""Agents with scripted models, and what they were asked."""

from typing import ClassVar

from agent_programs import ScriptedModel, said, tool
from haystack.components.agents import Agent
from haystack.dataclasses import ChatMessage, ToolCall
from haystack_integrations.hooks.chat_store import chat_history_hooks

from haystack_chat_store import SQLiteChatMessageStore

HANG_LIMIT = 60


class FailingStore(SQLiteChatMessageStore):
    """A store that fails to write as often as it is told to."""

    failures: ClassVar = []

    def write_messages(self, chat_history_id, messages):
        if self.failures:
            raise self.failures.pop(0)
        return super().write_messages(chat_history_id, messages)

    async def write_messages_async(self, chat_history_id, messages):
        if self.failures:
            raise self.failures.pop(0)
        return await super().write_messages_async(chat_history_id, messages)


def user(text, **meta):
    return ChatMessage.from_user(text, meta=meta)


def reply(text=None, *calls, **meta):
    return ChatMessage.from_assistant(text, tool_calls=list(calls), meta=meta)


def call(key, name="look_up", call_id=None):
    return ToolCall(tool_name=name, arguments={"key": key}, id=call_id or f"call {key}")


def result(key, name="look_up"):
    return ChatMessage.from_tool(f"value of {key}", origin=call(key, name))


def look_up(key: str) -> str:
    return f"value of {key}"


def break_down(key: str) -> str:
    raise RuntimeError("The tool is broken.")


def agent_with(store, *replies, hooks=None, hook_options=None, **options):
    options.setdefault("tools", [tool("look_up", look_up), tool("measure", look_up)])
    mapping = chat_history_hooks(store, hooks=hooks, **(hook_options or {}))
    return Agent(chat_generator=ScriptedModel(*replies), hooks=mapping, **options)


def asked(agent, time=-1):
    return [said(message) for message in agent.chat_generator.asked[time]]


def says(messages):
    return [said(message) for message in messages]


def stored_in(store, history="h"):
    return store.retrieve_messages(history)


TURN = [user("Look!", chat_message_id="q"), reply("I look.", call("a")), result("a"), reply("It is " + "a" * 400)]
EARLIER = [message for number in range(3) for message in (user(f"question {number}"), reply("answer"))]
