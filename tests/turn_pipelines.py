# SPDX-License-Identifier: Apache-2.0
"""A pipeline that stores the question first, a model that never says the same twice, and failures at chosen moments."""

import asyncio
import itertools
import threading
import uuid

import pytest
from haystack import Pipeline, component
from haystack.components.builders import ChatPromptBuilder
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from strict_model import problems_when_asked

from haystack_chat_store import (
    InMemoryChatMessageStore,
    PostgresChatMessageStore,
    RedisChatMessageStore,
    SQLiteChatMessageStore,
)

TEMPLATE = """
{% message role="system" %}Be brief.{% endmessage %}
{% message role="user" meta={"chat_message_id": request_id} %}{{ query }}{% endmessage %}
"""


ENGINES = [
    "memory",
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.servers),
    pytest.param("redis", marks=pytest.mark.servers),
    pytest.param("redis_cluster", marks=[pytest.mark.servers, pytest.mark.full]),
]


def store_of(engine, request, tmp_path, monkeypatch):
    """A store on an engine of `ENGINES`, in a namespace of its own, that returns whole histories."""
    settings = {"last_k": None, "namespace": uuid.uuid4().hex}
    if engine == "memory":
        return InMemoryChatMessageStore(**settings)
    if engine == "sqlite":
        return SQLiteChatMessageStore(tmp_path / "h.db", durability="normal", **settings)
    server = request.getfixturevalue("redis_server" if engine == "redis" else engine)
    monkeypatch.setenv("CHAT_STORE_URL", server.url.replace("redis+cluster", "redis"))
    url = Secret.from_env_var("CHAT_STORE_URL")
    if engine == "postgres":
        return PostgresChatMessageStore(url, **settings)
    return RedisChatMessageStore(url, cluster=engine == "redis_cluster", **settings)


class CrashError(BaseException):
    """The end of a process, as far as its own code can see it: nothing handles it."""


class Moments:
    """
    The moments of a turn: before and after each call of the store and of the model.

    :param failing: The number of the moment at which the turn fails.
    :param failure: The kind of exception that it fails with, or `None` if its task is cancelled.
    """

    def __init__(self, failing=None, failure=None):
        self.failing, self.failure = failing, failure
        self.passed = 0
        self.task = None

    def begins(self):
        """Whether the turn fails at this moment."""
        self.passed += 1
        return self.passed == self.failing

    def next(self):
        if self.begins():
            raise self.failure or CrashError

    async def next_async(self):
        if self.begins():
            if self.failure is not None:
                raise self.failure
            self.task.cancel()
            await asyncio.sleep(60)


class FailingEngine:
    """An engine whose calls fail before they begin, or after they are done: then the answer is lost."""

    def __init__(self, engine, moments):
        self._engine, self._moments = engine, moments

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def run(self, operation, *arguments):
        self._moments.next()
        result = self._engine.run(operation, *arguments)
        self._moments.next()
        return result

    async def run_async(self, operation, *arguments):
        await self._moments.next_async()
        result = await self._engine.run_async(operation, *arguments)
        await self._moments.next_async()
        return result


@component
class Model:
    """Repeats what the user said last, with a number that is new each time. Refuses what a strict provider refuses."""

    numbers = itertools.count()

    def __init__(self, moments=None):
        self.moments = moments or Moments()
        self.asked = 0
        self._lock = threading.Lock()

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage]):
        self.moments.next()
        answer = self._answer(messages)
        self.moments.next()
        return answer

    @component.output_types(replies=list[ChatMessage])
    async def run_async(self, messages: list[ChatMessage]):
        await self.moments.next_async()
        answer = self._answer(messages)
        await self.moments.next_async()
        return answer

    def _answer(self, messages):
        found = problems_when_asked(messages)
        assert not found, found
        with self._lock:
            self.asked += 1
            number = next(self.numbers)
        return {"replies": [ChatMessage.from_assistant(f"{messages[-1].text} (answer {number})")]}


def turn_pipeline(store, model, last_k=3):
    pipeline = Pipeline()
    pipeline.add_component("prompt_builder", ChatPromptBuilder(TEMPLATE, required_variables=["query"]))
    pipeline.add_component("question_writer", ChatMessageWriter(store))
    pipeline.add_component("retriever", ChatMessageRetriever(store, last_k))
    pipeline.add_component("llm", model)
    pipeline.add_component("answer_writer", ChatMessageWriter(store, question_is_stored=True))
    pipeline.connect("prompt_builder.prompt", "question_writer.messages")
    pipeline.connect("question_writer.messages", "retriever.current_messages")
    pipeline.connect("question_writer.messages", "answer_writer.messages")
    pipeline.connect("retriever.messages", "llm.messages")
    pipeline.connect("llm.replies", "answer_writer.replies")
    pipeline.connect("retriever.replies", "answer_writer.replies")
    return pipeline


def ask(pipeline, query, request_id=None, chat_history_id="h"):
    """Run a turn, and return what the answer's writer returned."""
    data = {"query": query, "request_id": request_id, "chat_history_id": chat_history_id}
    return pipeline.run(data)["answer_writer"]


async def ask_async(pipeline, query, request_id=None, chat_history_id="h"):
    data = {"query": query, "request_id": request_id, "chat_history_id": chat_history_id}
    return (await pipeline.run_async(data))["answer_writer"]
