# SPDX-License-Identifier: Apache-2.0
"""
A chat pipeline with a memory behind Hayhooks, for every client of OpenAI's chat completions and responses.

    HAYHOOKS_STARTUP_DEPLOY_STRATEGY=sequential hayhooks run --pipelines-dir examples/hayhooks

HAYSTACK_CHAT_STORE_URL names another store than chat_history.db. Replace the mock by any ChatGenerator.
"""

import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import HTTPException
from hayhooks import BasePipelineWrapper, async_streaming_generator, chat_messages_from_openai_response
from haystack import Pipeline
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from starlette.datastructures import Headers

from haystack_chat_store import errors, match_transcript_async, store_from_url

# Where the ids of conversations and users come from: Open WebUI's own headers, and those that docs/hayhooks.md lets
# LibreChat send. A header or a body proves nothing about who asks: let clients reach Hayhooks only through a proxy that
# knows its users, and that sets the user's header itself.
CHAT_HEADERS = ("x-openwebui-chat-id", "x-librechat-conversation-id")
USER_HEADERS = ("x-openwebui-user-id", "x-librechat-user-id")


def said(messages: list[ChatMessage]) -> str:
    """Say what a model would have seen."""
    questions = [message.text for message in messages if message.is_from("user")]
    return f"I have seen {len(questions)} questions. The last one was: {questions[-1]}"


class PipelineWrapper(BasePipelineWrapper):
    def setup(self) -> None:
        self.store = store_from_url(os.environ.get("HAYSTACK_CHAT_STORE_URL", "sqlite:///chat_history.db"))
        self.llm = MockChatGenerator(response_fn=said)
        self.question_writer = ChatMessageWriter(self.store)  # not in the pipeline, so that a refusal has its status
        self.pipeline = Pipeline()
        self.pipeline.add_component("retriever", ChatMessageRetriever(self.store, last_k=None, max_tokens=8000))
        self.pipeline.add_component("llm", self.llm)
        self.pipeline.add_component("answer_writer", ChatMessageWriter(self.store, question_is_stored=True))
        self.pipeline.connect("retriever.messages", "llm.messages")
        self.pipeline.connect("llm.replies", "answer_writer.replies")
        self.pipeline.connect("retriever.replies", "answer_writer.replies")

    # Hayhooks passes headers only to a parameter with exactly this annotation.
    async def run_chat_completion_async(
        self, model: str, messages: list[dict], body: dict, headers: Headers | None = None
    ) -> AsyncGenerator | str:
        """Answer a client that sends the whole conversation with each request."""
        headers, metadata = headers or Headers({}), body.get("metadata") or {}
        with refusals():
            if not isinstance(metadata, dict):
                raise ValueError('metadata must be an object, such as {"chat_history_id": "trip"}.')
            transcript = [ChatMessage.from_openai_dict_format(message) for message in messages]
            questions = [message for message in transcript if message.is_from("user")]
            if not any(each.images or each.files or (each.text or "").strip() for each in questions):
                raise ValueError("The request has no message of a user that says something.")
            user, chat = ids_of(headers, body, metadata.get("chat_history_id"))
            if chat is not None and not is_task(transcript, headers):
                mine = self.store.for_user(user)
                with suppress(errors.TranscriptError):  # another task, such as LibreChat's request for a title
                    turn = await match_transcript_async(mine, chat, transcript, is_retry=is_retry(headers))
                    system = [message for message in transcript if message.is_from("system")]
                    return await self.answer(user, chat, [*system, *turn.messages])
        return await self.answer_beside(transcript)

    async def run_response_async(
        self, model: str, input_items: list[dict], body: dict, headers: Headers | None = None
    ) -> AsyncGenerator | str:
        """Answer a client that sends what is new, with the id of the conversation."""
        headers, conversation = headers or Headers({}), body.get("conversation")
        new = chat_messages_from_openai_response(input_items)
        system = [ChatMessage.from_system(body["instructions"])] if body.get("instructions") else []
        with refusals():
            if body.get("previous_response_id"):
                raise ValueError("Name the conversation (conversation=…) instead of the previous response.")
            if not new:
                raise ValueError("The input says nothing.")
            is_object = isinstance(conversation, dict) and conversation.get("id")
            user, chat = ids_of(headers, body, conversation["id"] if is_object else conversation)
            if chat is not None:
                if is_retry(headers):  # the question may be stored already, with an id
                    stored = await self.store.for_user(user).retrieve_messages_async(chat, last_k=1)
                    new = [stored[0] if stored and stored[0].text == message.text else message for message in new]
                return await self.answer(user, chat, [*system, *new])
        return await self.answer_beside([*system, *new])

    async def answer(self, user: str, chat: str, messages: list[ChatMessage]) -> AsyncGenerator:
        """Store the question, and stream the answer. If the client goes away, the answer is stored all the same."""
        ids = {"chat_history_id": chat, "user_id": user}
        question = (await self.question_writer.run_async(messages=messages, **ids))["messages"]
        inputs = {"retriever": {**ids, "current_messages": question}, "answer_writer": {**ids, "messages": question}}

        def stored_answer(result: dict[str, Any]) -> str | None:
            return None if "llm" in result else result["answer_writer"]["replies"][0].text

        return async_streaming_generator(
            self.pipeline,
            pipeline_run_args=inputs,
            include_outputs_from={"llm"},
            on_pipeline_end=stored_answer,  # the model was not asked, and has streamed nothing
            shield_pipeline_task=True,
        )

    async def answer_beside(self, messages: list[ChatMessage]) -> str:
        """Answer without a history, and store nothing."""
        return (await self.llm.run_async(messages))["replies"][0].text


@contextmanager
def refusals() -> Iterator[None]:
    """Answer with a status what the client can act upon."""
    try:
        yield
    except errors.ChatHistoryAccessError as error:
        raise HTTPException(404, "There is no such conversation.") from error
    except errors.ConflictError as error:
        raise HTTPException(409, str(error)) from error
    except ValueError as error:  # such as an id that is too long, or a question that says nothing
        raise HTTPException(400, str(error)) from error


def ids_of(headers: Headers, body: dict[str, Any], chat: Any) -> tuple[Any, Any]:
    """Return the user, and the id of the user's history or, if the client names no conversation, `None`."""
    chat = next((headers[name] for name in CHAT_HEADERS if headers.get(name)), chat)
    user = next((headers[name] for name in USER_HEADERS if headers.get(name)), body.get("user"))
    if chat is not None and user is None:
        raise ValueError(f"A conversation needs a user: the header {USER_HEADERS[0]}, or user=… in the body.")
    return user, chat


def is_task(transcript: list[ChatMessage], headers: Headers) -> bool:
    """Whether Open WebUI asks for a title, tags or the like, which it does with the id of the conversation."""
    return bool(headers.get("x-openwebui-task")) or (transcript[-1].text or "").startswith("### Task:")


def is_retry(headers: Headers) -> bool:
    """Whether the `openai` package repeats a request that may have failed."""
    return headers.get("x-stainless-retry-count", "0") != "0"
