# SPDX-License-Identifier: Apache-2.0
"""
A chat service: FastAPI streams answers as server-sent events, a store keeps the conversations.

    uvicorn --app-dir examples fastapi_chat:app --workers 2
    curl -N localhost:8000/chats/trip/messages -H "X-User: ada" --json '{"text": "My name is Ada.", "request_id": "1"}'

HAYSTACK_CHAT_STORE_URL names another store than chat_history.db. Rules answer or, with OPENAI_API_KEY, a real model.
"""

import json
import os
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import anyio
from fastapi import Body, Depends, FastAPI, Header, HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from haystack.components.generators.chat import MockChatGenerator, OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from terminal_chatbot import answer_from_memory

from haystack_chat_store import BaseChatMessageStore, errors, store_from_url

SYSTEM = ChatMessage.from_system("You are helpful.")
STATUS: dict[type, int] = {LookupError: 404, ValueError: 422, ConnectionError: 503, errors.ConflictError: 409}
STATUS |= {errors.UnsupportedOperationError: 501}
url = os.environ.get("HAYSTACK_CHAT_STORE_URL", "sqlite:///chat_history.db")
store = store_from_url(url, search=not url.startswith("redis"))  # few servers of Redis can
llm = OpenAIChatGenerator() if os.environ.get("OPENAI_API_KEY") else MockChatGenerator(response_fn=answer_from_memory)


@asynccontextmanager
async def lifespan(app: FastAPI) -> Any:
    async with anyio.create_task_group() as app.state.turns:  # waits for turns whose clients have gone
        yield
    await store.close_async()


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()  # ASCII: half an emoji has no UTF-8


app = FastAPI(lifespan=lifespan, default_response_class=Json)
# Each user's store has this user's histories, and no others. A header proves nothing: your login comes here.
Store = Annotated[BaseChatMessageStore, Depends(lambda x_user=Header(): store.for_user(x_user))]
Text = Annotated[str, Body(embed=True)]


@app.exception_handler(ValueError)
@app.exception_handler(errors.ChatMessageStoreError)
async def failed(_: object, error: Exception) -> Json:
    if isinstance(error, errors.ChatHistoryAccessError | errors.ChatHistoryNotFoundError):
        error = errors.ChatHistoryNotFoundError("There is no such chat.")  # the same for chats of other users
    status = next((STATUS[each] for each in STATUS if isinstance(error, each)), 500)
    return Json({"status": status, "error": type(error).__name__, "text": str(error)}, status)


async def streamed(mine: Store, chat: str, question: list[ChatMessage], replace: Any = None, **show: Any) -> Response:
    """Stream the answer. If the client goes away, the turn goes on. What is replaced stays until its end."""
    retriever = ChatMessageRetriever(mine, last_k=None, max_tokens=8000)
    shown = await retriever.run_async(chat, current_messages=[SYSTEM, *question], **show)
    sender, events = anyio.create_memory_object_stream(float("inf"))
    sender.send_nowait(("question", Json([message.to_dict() for message in question])))
    app.state.turns.start_soon(answer, sender, mine, chat, question, shown, replace)
    texts = (f"event: {name}\ndata: {data.body.decode()}\n\n" async for name, data in events)
    return StreamingResponse(texts, media_type="text/event-stream")


async def answer(sender: Any, mine: Store, chat: str, question: Any, shown: Any, replace: Any) -> None:
    async def on_chunk(chunk: StreamingChunk) -> None:
        sender.send_nowait(("token", Json(chunk.content)))

    writer = ChatMessageWriter(mine, question_is_stored=True)  # a chat that is deleted meanwhile stays deleted
    instead = {"replace_from_message_id": replace, "expected_revision": shown["revision"]} if replace else {}
    with sender:
        try:
            asked = shown if "replies" in shown else await llm.run_async(shown["messages"], streaming_callback=on_chunk)
            stored = await writer.run_async(chat, question, asked["replies"], **instead)
            sender.send_nowait(("done", Json([message.to_dict() for message in stored["replies"]])))
        except Exception as error:
            sender.send_nowait(("error", await failed(None, error)))


@app.post("/chats/{chat}/messages")
async def ask(mine: Store, chat: str, text: Text, request_id: Text) -> Response:
    """Ask a question. The client makes the request id, once for each question: sent again, it is answered once."""
    asked = [ChatMessage.from_user(text, meta={"chat_message_id": request_id})]
    return await streamed(mine, chat, (await ChatMessageWriter(mine).run_async(chat, asked))["messages"])


@app.post("/chats/{chat}/messages/{question_id}/regenerate")
async def regenerate(mine: Store, chat: str, question_id: str, answer_id: Text) -> Response:
    return await streamed(mine, chat, [], replace=answer_id, until_message_id=question_id)


@app.post("/chats/{chat}/messages/{question_id}/stop")
async def stop(mine: Store, chat: str, question_id: str, text: Text) -> list[dict[str, Any]]:
    """Keep what the user has seen as the answer. The model's own answer comes second, so it is not stored."""
    question = [ChatMessage.from_user("?", meta={"chat_message_id": question_id})]  # the stored text stays
    seen = [ChatMessage.from_assistant(text.strip() or "(stopped)")]
    stored = await ChatMessageWriter(mine, question_is_stored=True).run_async(chat, question, seen)
    return [message.to_dict() for message in stored["replies"]]


@app.put("/chats/{chat}/messages/{question_id}")
async def edit(mine: Store, chat: str, question_id: str, text: Text, request_id: Text) -> Response:
    """Ask an edited question in the place of the old one and of all after it."""
    edited = [ChatMessage.from_user(text, meta={"chat_message_id": request_id})]
    ids = [each.message.meta["chat_message_id"] async for each in mine.iterate_messages_async(chat)]
    if request_id in ids:  # the request is sent again
        return await streamed(mine, chat, edited)
    if question_id not in ids:
        raise HTTPException(404)
    show = {"last_k": 0} if ids[0] == question_id else {"until_message_id": ids[ids.index(question_id) - 1]}
    return await streamed(mine, chat, edited, replace=question_id, **show)


@app.get("/chats/{chat}/messages")
async def page(mine: Store, chat: str, before: int | None = None, limit: int = 50) -> list[dict[str, Any]]:
    return [each.to_dict() for each in await mine.list_messages_async(chat, before=before, limit=limit)]


@app.get("/chats")
async def chats(mine: Store, cursor: str | None = None, limit: int = 50) -> dict[str, Any]:
    return (await mine.list_chat_histories_async(cursor=cursor, limit=limit)).to_dict()


@app.patch("/chats/{chat}")
async def rename(mine: Store, chat: str, title: Text) -> dict[str, Any]:
    return (await mine.update_chat_history_async(chat, title=title)).to_dict()


@app.post("/chats/{chat}/fork/{target}", status_code=201)
async def fork(mine: Store, chat: str, target: str, until: str | None = None) -> None:
    await mine.copy_messages_async(chat, target, until_message_id=until)


@app.get("/search")
async def search(mine: Store, q: str) -> list[dict[str, Any]]:
    return [hit.to_dict() for hit in await mine.search_messages_async(q, match_prefix=True)]


@app.delete("/chats/{chat}", status_code=204)
async def delete(mine: Store, chat: str) -> None:
    with suppress(errors.ChatHistoryAccessError):
        await mine.delete_chat_history_async(chat)
