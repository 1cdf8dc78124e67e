# SPDX-License-Identifier: Apache-2.0
"""
A chatbot for the terminal that remembers: leave it, start it again, and it still knows what you said.

    python examples/terminal_chatbot.py                          chat; needs no API key
    python examples/terminal_chatbot.py --say "My name is Ada."  one turn, without a prompt
    python examples/terminal_chatbot.py --llm openai             chat with a real model; needs OPENAI_API_KEY
    python examples/terminal_chatbot.py --store redis://host     remember in another store than a file

Without a model it answers by simple rules that show what it remembers.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

from haystack import Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.generators.chat import MockChatGenerator, OpenAIChatGenerator
from haystack.core.errors import PipelineRuntimeError
from haystack.dataclasses import ChatMessage, ChatRole, StreamingChunk
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter

from haystack_chat_store import ChatMessageStore, ChatMessageStoreError, SQLiteChatMessageStore, store_from_url

SYSTEM_PROMPT = "You are a friendly chatbot. Use what the user has told you so far."


def answer_from_memory(messages: list[ChatMessage]) -> str:
    """Answer by rules, only from the messages that a model would see."""
    said = [message.text or "" for message in messages if message.role is ChatRole.USER]
    *earlier, latest = said
    if not earlier:
        return f'Nice to meet you! You said: "{latest}" Tell me more, or leave and come back: I will remember.'
    facts = {}
    for text in said:
        for what, value in re.findall(r"\bmy (\w+) is ([^.,;!?]+)", text, re.IGNORECASE):
            facts[what.lower()] = value.strip()
    for what in re.findall(r"\bmy (\w+)", latest, re.IGNORECASE):
        if latest.rstrip().endswith("?") and what.lower() in facts:
            return f"Your {what.lower()} is {facts[what.lower()]}. You told me."
    things = "1 thing" if len(earlier) == 1 else f"{len(earlier)} things"
    known = "".join(f" Your {what} is {value}." for what, value in facts.items())
    return f'Before this you have told me {things}. The first was: "{earlier[0]}"{known}'


class TurnInterruptedError(Exception):
    """Ctrl-C interrupted a turn."""


def print_chunk(chunk: StreamingChunk) -> None:
    """Print the answer while it arrives."""
    print("bot> " if chunk.start else "", chunk.content, sep="", end="", flush=True)


def build_pipeline(store: ChatMessageStore, llm: str) -> Pipeline:
    """Build the pipeline: the question is stored, joins its history, goes to the model, and the answer is stored."""
    generator: Any = OpenAIChatGenerator() if llm == "openai" else MockChatGenerator(response_fn=answer_from_memory)
    pipeline = Pipeline()
    template = [ChatMessage.from_system(SYSTEM_PROMPT), ChatMessage.from_user("{{ query }}")]
    pipeline.add_component("prompt_builder", ChatPromptBuilder(template, required_variables="*"))
    pipeline.add_component("question_writer", ChatMessageWriter(store))
    pipeline.add_component("retriever", ChatMessageRetriever(store, last_k=None, max_tokens=8000))
    pipeline.add_component("llm", generator)
    pipeline.add_component("answer_writer", ChatMessageWriter(store, question_is_stored=True))
    pipeline.connect("prompt_builder.prompt", "question_writer.messages")
    pipeline.connect("question_writer.messages", "retriever.current_messages")
    pipeline.connect("question_writer.messages", "answer_writer.messages")
    pipeline.connect("retriever.messages", "llm.messages")
    pipeline.connect("llm.replies", "answer_writer.replies")
    pipeline.connect("retriever.replies", "answer_writer.replies")
    return pipeline


def say(pipeline: Pipeline, chat_history_id: str, text: str) -> None:
    """Run one turn and print the answer."""
    try:
        pipeline.run(
            {
                "prompt_builder": {"query": text},
                "question_writer": {"chat_history_id": chat_history_id},
                "retriever": {"chat_history_id": chat_history_id},
                "llm": {"streaming_callback": print_chunk},
                "answer_writer": {"chat_history_id": chat_history_id},
            }
        )
    except KeyboardInterrupt as interrupt:
        raise TurnInterruptedError from interrupt
    print()


def chat(pipeline: Pipeline, store: ChatMessageStore, chat_history_id: str) -> None:
    """Chat until the end of input, or Ctrl-C between two turns."""
    remembered = store.count_messages(chat_history_id)
    print(f"Messages that I remember: {remembered}" if remembered else "We have not met yet.")
    prompt = "you> " if sys.stdin.isatty() else ""
    try:
        print("Say something. Ctrl-D or Ctrl-C leaves; start me again and I remember.")
        while True:
            text = input(prompt).strip()
            if text:
                say(pipeline, chat_history_id, text)
    except (EOFError, KeyboardInterrupt):
        print("\n" if prompt else "", "Goodbye! I will remember.", sep="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and chat."""
    parser = argparse.ArgumentParser(description="A chatbot that remembers across restarts.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--db", default="chat_history.db", metavar="PATH", help="database file (%(default)s)")
    where.add_argument("--store", metavar="URL", help="another store, such as postgresql://… or redis://…")
    parser.add_argument("--history", default="terminal", metavar="ID", help="which conversation (%(default)s)")
    parser.add_argument("--say", metavar="TEXT", help="say this, print the answer and leave")
    parser.add_argument("--llm", choices=["mock", "openai"], default="mock", help="who answers (%(default)s)")
    options = parser.parse_args(arguments)
    if options.llm == "openai" and not os.environ.get("OPENAI_API_KEY"):
        parser.error("--llm openai needs the environment variable OPENAI_API_KEY.")
    store: Any
    try:
        if options.store is None:
            store = SQLiteChatMessageStore(options.db)
        else:
            store = store_from_url(options.store)
    except (ImportError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    try:
        with closing(store):
            pipeline = build_pipeline(store, options.llm)
            if options.say is None:
                chat(pipeline, store, options.history)
            else:
                say(pipeline, options.history, options.say)
    except TurnInterruptedError:
        parser.exit(130, "\nGoodbye! I remember what you said, but not my answer.\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nGoodbye!\n")
    except PipelineRuntimeError as error:
        parser.exit(1, f"{parser.prog}: {error.__cause__ or error}\n")
    except (ChatMessageStoreError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
