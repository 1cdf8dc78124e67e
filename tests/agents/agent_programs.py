# SPDX-License-Identifier: Apache-2.0
"""Agents to run in tests: their model, their tools, and the moments of a run at which it can be ended."""

import asyncio
import threading
import uuid
from contextlib import contextmanager
from functools import partial

import pytest
from haystack import component
from haystack.components.agents import Agent, State
from haystack.dataclasses import ChatMessage, ChatRole, ToolCall
from haystack.hooks import hook
from haystack.hooks.protocol import VALID_HOOK_POINTS
from haystack.tools import Tool
from haystack.utils import Secret
from haystack_integrations.hooks.chat_store import chat_history_hooks
from servers import PostgresServer, RedisCluster, RedisServer
from strict_model import problems

from haystack_chat_store import PostgresChatMessageStore, RedisChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.conversation.shown import INTERRUPTED
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY

HISTORY = {"chat_history_id": "h"}
ENGINES = ["sqlite", pytest.param("postgres", marks=pytest.mark.servers)]


# ---------------------------------------------------------------------- stores


@contextmanager
def databases():
    """
    A function that makes stores by the name of an engine: each time of a namespace of their own in one database.

    What the machine's own crash would lose, these tests do not look at.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        servers, made = {}, []
        kinds = {
            "postgres": partial(PostgresServer, fsync="off", autovacuum="off", jit="off"),
            "redis": partial(RedisServer, appendfsync="no"),
            "redis_cluster": partial(RedisCluster, appendfsync="no"),
        }

        def make(engine, folder, **settings):
            settings = {"namespace": uuid.uuid4().hex, "last_k": None, **settings}
            if engine == "sqlite":
                made.append(SQLiteChatMessageStore(folder / "chats.db", durability="normal", **settings))
            else:
                variable = f"CHAT_STORE_URL_OF_{engine.upper()}"
                if engine not in servers:
                    servers[engine] = kinds[engine]()
                    servers[engine].__enter__()
                    monkeypatch.setenv(variable, servers[engine].url.replace("redis+cluster", "redis"))
                url = Secret.from_env_var(variable)
                if engine == "postgres":
                    made.append(PostgresChatMessageStore(url, **settings))
                else:
                    made.append(RedisChatMessageStore(url, cluster=engine == "redis_cluster", **settings))
            return made[-1]

        try:
            yield make
        finally:
            for store in made:
                store.close()
            for server in servers.values():
                server.__exit__(None, None, None)


# ---------------------------------------------------------------------- running


def run_sync(agent, messages, **options):
    return agent.run(messages, **{"hook_context": HISTORY, **options})


def run_async(agent, messages, **options):
    return asyncio.run(agent.run_async(messages, **{"hook_context": HISTORY, **options}))


WAYS = {"sync": run_sync, "async": run_async}


# ---------------------------------------------------------------------- moments


class Moments:
    """
    Counts the moments that a run passes, from whatever thread, and does something at some of them.

    :param at: The numbers of these moments, the first one being 1.
    :param act: What to do.
    """

    def __init__(self, at=(), act=None):
        self.names = []
        self.acknowledged = []
        self._at, self._act = set(at), act
        self._lock = threading.Lock()

    def __call__(self, name):
        with self._lock:
            self.names.append(name)
            is_now = len(self.names) in self._at
        if is_now:
            self._act()


class MomentHook:
    """A moment at a hook point."""

    def __init__(self, moments, name):
        self.moments, self.name = moments, name

    def run(self, state):
        self.moments(self.name)


def with_moments(hooks, moments):
    """Return the hooks with a moment before each and after the last one, at every hook point."""
    return {
        point: [
            hook
            for index, ours in enumerate([*hooks.get(point, ()), None])
            for hook in (MomentHook(moments, f"{point} {index}"), ours)
            if hook is not None
        ]
        for point in VALID_HOOK_POINTS
    }


def watch(store, moments):
    """Let a store pass a moment before and after each read and write, and note the ids of what it has acknowledged."""
    write, write_async = store.write_messages, store.write_messages_async
    read, read_async = store.retrieve_window, store.retrieve_window_async

    def acknowledge(messages):
        moments.acknowledged += [message.meta[MESSAGE_ID_KEY] for message in messages]
        moments("written")

    def write_messages(history, messages):
        moments("write")
        number = write(history, messages)
        acknowledge(messages)
        return number

    async def write_messages_async(history, messages):
        moments("write")
        number = await write_async(history, messages)
        acknowledge(messages)
        return number

    def retrieve_window(*arguments, **options):
        moments("read")
        window = read(*arguments, **options)
        moments("has read")
        return window

    async def retrieve_window_async(*arguments, **options):
        moments("read")
        window = await read_async(*arguments, **options)
        moments("has read")
        return window

    store.write_messages, store.write_messages_async = write_messages, write_messages_async
    store.retrieve_window, store.retrieve_window_async = retrieve_window, retrieve_window_async
    return store


# ---------------------------------------------------------------------- models and tools


def planned_turn(messages):
    asked = max(i for i, m in enumerate(messages) if m.role is ChatRole.USER and (m.text or "").startswith("plan"))
    return messages[asked:]


@hook
def check(state: State) -> None:
    """Keep the agent running once, if its question wants that."""
    question, *others = planned_turn(state.data["messages"])
    if "check" in question.text and not any(message.text == "Are you sure?" for message in others):
        state.set("messages", [ChatMessage.from_user("Are you sure?")])
        state.set("continue_run", True)


def without_interrupted_steps(messages):
    """A model that is told that a call was interrupted takes the step again."""
    interrupted = [any(r.result == INTERRUPTED for r in message.tool_call_results) for message in messages]
    return [
        message
        for message, is_one, is_next in zip(messages, interrupted, [*interrupted[1:], False], strict=True)
        if not (is_one or (is_next and message.tool_calls))
    ]


@component
class PlannedModel:
    """
    A strict model whose answers follow from the conversation alone, so that a turn goes the same way after a crash.

    The question is a plan: "plan 2 1" asks for a step with two calls at once, a step with one, and the answer, which
    repeats all results of this turn. The model sees that a question is one by its first word. "plan 2 1 check" is not
    content with the first answer.
    """

    def __init__(self, moments=None, has_call_ids=True):
        self.moments = moments or Moments()
        self.has_call_ids = has_call_ids

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], tools: list[Tool] | None = None):
        self.moments("asked")
        found = problems(messages)
        if found:
            raise ValueError(f"The model refuses the conversation: {'; '.join(found)}.")
        turn = planned_turn(without_interrupted_steps(messages))
        plan = [int(number) for number in turn[0].text.split() if number.isdecimal()]
        results = [result.result for message in turn for result in message.tool_call_results]
        step = sum(bool(message.tool_calls) for message in turn)
        if step < len(plan):
            calls = [
                ToolCall(
                    tool_name=("look_up", "measure")[number % 2],
                    arguments={"key": f"{step}.{number}"},
                    id=uuid.uuid4().hex if self.has_call_ids else None,
                )
                for number in range(plan[step])
            ]
            reply = ChatMessage.from_assistant(f"Step {step}." if step % 2 else None, tool_calls=calls)
        else:
            reply = ChatMessage.from_assistant(f"Found: {', '.join(results)}.")
        self.moments("answered")
        return {"replies": [reply]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(self, messages: list[ChatMessage], tools: list[Tool] | None = None):
        return self.run(messages, tools)


@component
class ScriptedModel:
    """
    A strict model that gives the replies it was told, one after the other, and keeps what it was asked.

    :param replies: Messages; an exception is raised, a function is called with the conversation and returns a message.
    """

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], tools: list[Tool] | None = None):
        self.asked.append(list(messages))
        found = problems(messages)
        if found:
            raise ValueError(f"The model refuses the conversation: {'; '.join(found)}.")
        reply = self.replies.pop(0)
        if callable(reply):
            reply = reply(messages)
        if isinstance(reply, BaseException):
            raise reply
        return {"replies": [reply]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(self, messages: list[ChatMessage], tools: list[Tool] | None = None):
        return self.run(messages, tools)


def tool(name, function):
    parameters = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
    return Tool(name=name, description=name, parameters=parameters, function=function)


def tools_with(moments):
    """Two tools that are called at once. They return what follows from their argument alone."""

    def look_up(key: str) -> str:
        moments("tool begins")
        moments("tool ends")
        return f"value of {key}"

    def measure(key: str) -> str:
        moments("tool begins")
        moments("tool ends")
        return f"size of {key}"

    return [tool("look_up", look_up), tool("measure", measure)]


def planned_agent(store, moments=None, has_call_ids=True):
    """An agent with every moment there is."""
    moments = moments or Moments()
    return Agent(
        chat_generator=PlannedModel(moments, has_call_ids),
        tools=tools_with(moments),
        hooks=with_moments(chat_history_hooks(watch(store, moments), last_k=3, hooks={"on_exit": [check]}), moments),
    )


# ---------------------------------------------------------------------- transcripts


def said(message):
    """Return what a message says, in a form that is equal for two runs: without ids."""
    calls = [(call.tool_name, call.arguments) for call in message.tool_calls]
    results = [(result.origin.tool_name, result.result, result.error) for result in message.tool_call_results]
    return message.role.value, message.text, calls, results


def completed(messages):
    """Return a transcript without the steps that were begun and never completed."""
    kept, step = [], None
    for message in messages:
        if message.role is ChatRole.TOOL:
            step.append(message)
            if len(step) == 1 + len(step[0].tool_calls):
                kept += step
        elif message.tool_calls:
            step = [message]
        else:
            kept.append(message)
    return kept


def ids(messages):
    return [message.meta[MESSAGE_ID_KEY] for message in messages]


def questions(messages):
    return [message.meta.get(QUESTION_ID_KEY) for message in messages]
