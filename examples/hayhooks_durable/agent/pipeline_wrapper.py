# SPDX-License-Identifier: Apache-2.0
"""
An agent with a memory whose runs survive the server, and that asks before it deletes anything.

    HAYHOOKS_DURABLE_MODE=true hayhooks run --pipelines-dir examples/hayhooks_durable
    curl localhost:1416/agent/run-durable -H "X-User: ada" -H "Idempotency-Key: 1" \
      --json '{"chat_history_id": "shopping", "text": "Note milk, eggs"}'

HAYHOOKS_DURABLE_REDIS_URL names the Redis of the runs, HAYSTACK_CHAT_STORE_URL another store than chat_history.db.
Rules answer or, with OPENAI_API_KEY, a real model.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Header
from hayhooks import BasePipelineWrapper
from hayhooks.durable import DurableContext, current_durable_context
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator, OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.hooks.human_in_the_loop import (
    AlwaysAskPolicy,
    BlockingConfirmationStrategy,
    ConfirmationHook,
    ConfirmationUIResult,
)
from haystack.tools import tool
from haystack_integrations.hooks.chat_store import chat_history_hooks
from pydantic import BaseModel

from haystack_chat_store import store_from_url


def notes_of_the_user() -> Path:
    """Return the file with the notes of the user whose run this is."""
    return Path(f"notes-{quote(current_durable_context().owner_id, safe='')}.txt")


@tool
def note(text: Annotated[str, "what to note"]) -> str:
    """Note something."""
    line, notes = f"{text}\n", notes_of_the_user()
    # After a crash, the tool may be called a second time. So what is noted already is not noted again.
    if not notes.exists() or line not in notes.read_text(encoding="utf-8").splitlines(keepends=True):
        with notes.open("a", encoding="utf-8") as file:
            file.write(line)
    return f"Noted: {text}"


@tool
def delete_notes() -> str:
    """Delete all notes."""
    notes_of_the_user().unlink(missing_ok=True)
    return "All notes are deleted."


def answer(messages: list[ChatMessage]) -> str | ChatMessage:
    """Call the tools, one thing after the other. Then say how many questions a model would have seen."""
    questions = [message for message in messages if message.is_from("user")]
    text, turn = questions[-1].text or "", messages[messages.index(questions[-1]) :]
    results = [message.tool_call_result.result for message in turn if message.tool_call_result]
    things = text.removeprefix("Note ").split(", ") if text.startswith("Note ") else []
    for thing in things:
        if f"Noted: {thing}" not in results:
            return ChatMessage.from_assistant(tool_calls=[ToolCall("note", {"text": thing})])
    if text == "Delete my notes." and not results:
        return ChatMessage.from_assistant(tool_calls=[ToolCall("delete_notes", {})])
    return f"{' '.join(results[-1:])} I have seen {len(questions)} questions.".strip()


class AskLater:
    """Suspends the run until `POST …/resume` says `{"approved": true}` or `{"approved": false}`."""

    def get_user_confirmation(
        self, tool_name: str, tool_description: str, tool_params: dict[str, Any]
    ) -> ConfirmationUIResult:
        context, call = current_durable_context(), f"{tool_name}({json.dumps(tool_params)})"
        answers = context.state.setdefault("answers", {})
        if call not in answers:
            context.suspend_sync({"kind": "approval", "message": call}, update={"asked": call})
        return ConfirmationUIResult("confirm" if answers.pop(call) else "reject")  # the next such call asks again


class Question(BaseModel):
    chat_history_id: str
    text: str


class Approval(BaseModel):
    approved: bool


class PipelineWrapper(BasePipelineWrapper):
    durable_revision = "1"  # runs go on only with the revision that began them
    durable_resume_model = Approval

    def setup(self) -> None:
        store = store_from_url(os.environ.get("HAYSTACK_CHAT_STORE_URL", "sqlite:///chat_history.db"))
        ask = BlockingConfirmationStrategy(confirmation_policy=AlwaysAskPolicy(), confirmation_ui=AskLater())
        confirm = ConfirmationHook(confirmation_strategies={"delete_notes": ask})
        hooks = chat_history_hooks(store, last_k=None, max_tokens=8000, hooks={"before_tool": [confirm]})
        llm = OpenAIChatGenerator() if os.environ.get("OPENAI_API_KEY") else MockChatGenerator(response_fn=answer)
        self.pipeline = Agent(chat_generator=llm, tools=[note, delete_notes], hooks=hooks)

    def durable_owner_id(self, x_user: Annotated[str, Header()]) -> str:
        return x_user  # a header proves nothing: your login comes here

    def run_durable(self, context: DurableContext, request: Question) -> dict[str, str]:
        if said := context.resume_input:  # the model is asked again, and the answer is for the same call
            context.state.setdefault("answers", {})[context.state["asked"]] = said["approved"]
        # The id is the same in all attempts of the run, so the question is stored once.
        question = ChatMessage.from_user(request.text, meta={"chat_message_id": context.execution_id})
        ids = {"chat_history_id": request.chat_history_id, "user_id": context.owner_id}
        result = context.run_agent(messages=[question], hook_context=ids)
        return {"answer": result["last_message"].text}
