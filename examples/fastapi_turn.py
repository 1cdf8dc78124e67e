# SPDX-License-Identifier: Apache-2.0
"""
The turns of `fastapi_chat.py`: each is streamed, goes on if its client goes away, and ends early if its user stops it.

Rules answer or, with OPENAI_API_KEY, a real model.
"""

import asyncio
import json
import logging
import os
from contextlib import suppress
from typing import Any

import anyio
from fastapi.responses import JSONResponse, Response, StreamingResponse
from haystack.components.generators.chat import MockChatGenerator, OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from terminal_chatbot import answer_from_memory

from haystack_chat_store import BaseChatMessageStore, errors

SYSTEM = ChatMessage.from_system("You are helpful.")
# The errors that a user can act upon. Their texts are shown.
STATUS: dict[type, int] = {errors.ChatHistoryNotFoundError: 404, errors.MessageNotFoundError: 404}
STATUS |= {errors.ConflictError: 409, errors.UnsupportedOperationError: 501, ValueError: 422}
llm = OpenAIChatGenerator() if os.environ.get("OPENAI_API_KEY") else MockChatGenerator(response_fn=answer_from_memory)
turns: set[asyncio.Task[None]] = set()  # all that are under way


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()  # ASCII: half an emoji has no UTF-8


async def failed(_: object, error: Exception) -> Json:
    """Show what the user can act upon. Log everything else, which may name hosts, paths or other internals."""
    if isinstance(error, errors.ChatHistoryAccessError | errors.ChatHistoryNotFoundError):
        error = errors.ChatHistoryNotFoundError("There is no such chat.")  # the same for chats of other users
    status = next((STATUS[each] for each in STATUS if isinstance(error, each)), None)
    if status:
        return Json({"status": status, "error": type(error).__name__, "text": str(error)}, status)
    logging.getLogger(__name__).error("A request has failed.", exc_info=error)
    status, text = 500, "Something went wrong in the server."
    if isinstance(error, errors.StoreUnavailableError):
        status, text = 503, "The chats cannot be reached now. Try again later."
    return Json({"status": status, "error": "ServerError", "text": text}, status)


async def streamed(
    store: BaseChatMessageStore, chat: str, question: list[ChatMessage], replace: str | None = None
) -> Response:
    """Begin a turn, and stream it as server-sent events. What is replaced stays until the answer is there."""
    retriever = ChatMessageRetriever(store, last_k=None, max_tokens=8000)
    shown = await retriever.run_async(chat, current_messages=[SYSTEM, *question], before_message_id=replace)
    sender, events = anyio.create_memory_object_stream[tuple[str, Json]](float("inf"))
    sender.send_nowait(("question", Json([message.to_dict() for message in question])))
    turn = asyncio.create_task(run_turn(sender, store, chat, question, shown, replace))
    turns.add(turn)
    turn.add_done_callback(turns.discard)
    texts = (f"event: {name}\ndata: {data.body.decode()}\n\n" async for name, data in events)
    return StreamingResponse(texts, media_type="text/event-stream")


async def run_turn(
    sender: Any, store: BaseChatMessageStore, chat: str, question: list[ChatMessage], shown: Any, replace: str | None
) -> None:
    async def on_chunk(chunk: StreamingChunk) -> None:
        sender.send_nowait(("token", Json(chunk.content)))

    writer = ChatMessageWriter(store, question_is_stored=True)  # a chat that is deleted meanwhile stays deleted
    instead = {"replace_from_message_id": replace, "expected_revision": shown["revision"]} if replace else {}
    with sender:
        try:
            replies = shown.get("replies")
            if replies is None:
                model = asyncio.create_task(llm.run_async(shown["messages"], streaming_callback=on_chunk))
                replies = await replies_of(model, store, chat, [] if replace else question)
            stored = await writer.run_async(chat, question, replies, **instead)
            sender.send_nowait(("done", Json([message.to_dict() for message in stored["replies"]])))
        except Exception as error:
            sender.send_nowait(("error", await failed(None, error)))


async def replies_of(
    model: asyncio.Task[dict[str, Any]], store: BaseChatMessageStore, chat: str, question: list[ChatMessage]
) -> list[ChatMessage]:
    """Wait for the model. If the question gets an answer meanwhile, as from Stop in any worker, cancel the model."""
    retriever = ChatMessageRetriever(store, last_k=0)
    try:
        while not (await asyncio.wait([model], timeout=1 if question else None))[0]:
            look = asyncio.create_task(retriever.run_async(chat, current_messages=question))
            await asyncio.wait([model, look], return_when=asyncio.FIRST_COMPLETED)
            if not look.done():  # the model has finished first
                look.cancel()
                break
            with suppress(errors.ChatMessageStoreError):  # a look must not cost the answer
                if "replies" in look.result():
                    return look.result()["replies"]
        if error := model.exception():
            raise RuntimeError("The model has failed.") from error
        return model.result()["replies"]
    finally:
        model.cancel()
