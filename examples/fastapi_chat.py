# SPDX-License-Identifier: Apache-2.0
"""
A chat service: FastAPI streams answers as server-sent events, a store keeps the conversations.

    uvicorn --app-dir examples fastapi_chat:app --workers 2
    curl -N localhost:8000/chats/trip/messages -H "X-User: ada" --json '{"text": "My name is Ada.", "request_id": "1"}'

HAYSTACK_CHAT_STORE_URL names another store than chat_history.db. Rules answer or, with OPENAI_API_KEY, a real model.
`fastapi_turn.py` runs the turns.
"""

import asyncio
import os
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Header
from fastapi.responses import Response
from fastapi_turn import Json, failed, streamed, turns
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.writers.chat_store import ChatMessageWriter

from haystack_chat_store import BaseChatMessageStore, errors, store_from_url

url = os.environ.get("HAYSTACK_CHAT_STORE_URL", "sqlite:///chat_history.db")
store = store_from_url(url, search=not url.startswith("redis"))  # few servers of Redis can


@asynccontextmanager
async def lifespan(_: FastAPI) -> Any:
    yield
    await asyncio.gather(*turns)  # those whose clients have gone
    await store.close_async()


app = FastAPI(lifespan=lifespan, default_response_class=Json)
app.add_exception_handler(ValueError, failed)
app.add_exception_handler(errors.ChatMessageStoreError, failed)
# Each user's store has this user's histories, and no others. A header proves nothing: your login comes here.
Store = Annotated[BaseChatMessageStore, Depends(lambda x_user=Header(): store.for_user(x_user))]
Text = Annotated[str, Body(embed=True)]


@app.post("/chats/{chat}/messages")
async def ask(mine: Store, chat: str, text: Text, request_id: Text) -> Response:
    """Ask a question. The client makes the request id, once for each question: sent again, it is answered once."""
    asked = [ChatMessage.from_user(text, meta={"chat_message_id": request_id})]
    return await streamed(mine, chat, (await ChatMessageWriter(mine).run_async(chat, asked))["messages"])


@app.post("/chats/{chat}/messages/{question_id}/regenerate")
async def regenerate(mine: Store, chat: str, question_id: str, answer_id: Text) -> Response:
    """Give an answer anew. It takes the place of the old one and of all after it."""
    stored = {each.message.meta["chat_message_id"]: each.message async for each in mine.iterate_messages_async(chat)}
    if question_id not in stored:
        raise errors.MessageNotFoundError("There is no such question.")
    if answer_id in [*stored][: [*stored].index(question_id) + 1]:
        raise errors.ConflictError("The answer does not stand behind the question.")
    return await streamed(mine, chat, [stored[question_id]], answer_id)


@app.post("/chats/{chat}/messages/{question_id}/stop")
async def stop(mine: Store, chat: str, question_id: str, text: Text) -> list[dict[str, Any]]:
    """Keep what the user has seen as the answer. The turn finds it, in whatever worker it is, and cancels the model."""
    question = [ChatMessage.from_user("?", meta={"chat_message_id": question_id})]  # the stored text stays
    seen = [ChatMessage.from_assistant(text.strip() or "(stopped)")]
    stored = await ChatMessageWriter(mine, question_is_stored=True).run_async(chat, question, seen)
    return [message.to_dict() for message in stored["replies"]]


@app.put("/chats/{chat}/messages/{question_id}")
async def edit(mine: Store, chat: str, question_id: str, text: Text, request_id: Text) -> Response:
    """Ask an edited question in the place of the old one and of all after it."""
    edited = [ChatMessage.from_user(text, meta={"chat_message_id": request_id})]
    return await streamed(mine, chat, edited, question_id)


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
