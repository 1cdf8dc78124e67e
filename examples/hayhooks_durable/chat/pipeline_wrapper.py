# SPDX-License-Identifier: Apache-2.0
"""
A chat pipeline with a memory whose runs survive the server.

    HAYHOOKS_DURABLE_MODE=true hayhooks run --pipelines-dir examples/hayhooks_durable
    curl localhost:1416/chat/run-durable -H "X-User: ada" -H "Idempotency-Key: 1" \
      --json '{"chat_history_id": "greeting", "text": "Hello!"}'

HAYHOOKS_DURABLE_REDIS_URL names the Redis of the runs, HAYSTACK_CHAT_STORE_URL another store than chat_history.db.
The mock repeats the question. With OPENAI_API_KEY, a real model answers.
"""

import os
from typing import Annotated

from fastapi import Header
from hayhooks import BasePipelineWrapper
from hayhooks.durable import DurableContext
from haystack import Pipeline
from haystack.components.generators.chat import MockChatGenerator, OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from pydantic import BaseModel

from haystack_chat_store import store_from_url


class Question(BaseModel):
    chat_history_id: str
    text: str


class PipelineWrapper(BasePipelineWrapper):
    durable_revision = "1"  # a run goes on only in the revision that began it

    def setup(self) -> None:
        store = store_from_url(os.environ.get("HAYSTACK_CHAT_STORE_URL", "sqlite:///chat_history.db"))
        self.pipeline = Pipeline()
        self.pipeline.add_component("question_writer", ChatMessageWriter(store))
        self.pipeline.add_component("retriever", ChatMessageRetriever(store, last_k=None, max_tokens=8000))
        llm = OpenAIChatGenerator() if os.environ.get("OPENAI_API_KEY") else MockChatGenerator()
        self.pipeline.add_component("llm", llm)
        self.pipeline.add_component("answer_writer", ChatMessageWriter(store, question_is_stored=True))
        self.pipeline.connect("question_writer.messages", "retriever.current_messages")
        self.pipeline.connect("question_writer.messages", "answer_writer.messages")
        self.pipeline.connect("retriever.messages", "llm.messages")
        self.pipeline.connect("llm.replies", "answer_writer.replies")
        self.pipeline.connect("retriever.replies", "answer_writer.replies")

    def durable_owner_id(self, x_user: Annotated[str, Header()]) -> str:
        return x_user  # a header proves nothing: your login comes here

    def run_durable(self, context: DurableContext, request: Question) -> dict[str, str]:
        # The id is the same in all attempts of the run, so the question is stored once.
        question = ChatMessage.from_user(request.text, meta={"chat_message_id": context.execution_id})
        ids = {"chat_history_id": request.chat_history_id, "user_id": context.owner_id}
        inputs = {"question_writer": {**ids, "messages": [question]}, "retriever": ids, "answer_writer": ids}
        # What the model has answered is not asked again: it is kept before it is stored.
        result = context.run_pipeline(inputs, checkpoint_at="answer_writer")
        return {"answer": result["answer_writer"]["replies"][0].text}
