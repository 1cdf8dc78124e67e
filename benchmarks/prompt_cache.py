# SPDX-License-Identifier: Apache-2.0
"""
Simulate a conversation, and show how much of its prompts a provider's prompt cache can reuse.

It depends on `window_step` and, if the replies have reasoning, on `portable`.

Nothing is timed and no model is called, so the figures are the same on every machine.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from conversations import ASSISTANT_TEXT, TOOL_RESULT, USER_TEXT
from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, ToolCall
from haystack.token_counters import ApproximateTokenCounter
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.conversation.provider_content import as_text

COUNTER = ApproximateTokenCounter()
INSTRUCTIONS = ChatMessage.from_system("You work at the help desk of a shop. " + USER_TEXT * 8)
# The sizes of windows, and the steps of each.
WINDOWS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "everything": ({"last_k": None}, [1]),
    "`last_k=10`": ({"last_k": 10}, [1, 4, 8, 16]),
    "`max_tokens=4000`": ({"last_k": None, "max_tokens": 4000}, [1, 4, 8, 16]),
}


class Prompts(NamedTuple):
    """
    Totals over all prompts of a conversation.

    :param rounds: The number of rounds, including those of the questions.
    :param tokens: The number of tokens.
    :param cached: The number of tokens at the beginning of a prompt that the last prompt of the turn before had too.
    """

    rounds: int
    tokens: int
    cached: int


def turn(number: int, randomly: random.Random, *, reasons: bool) -> list[ChatMessage]:
    """Return a question and its answer, every third time with a tool call in between. All turns differ."""
    question = ChatMessage.from_user(f"{number}. {USER_TEXT[: randomly.randint(40, 120)]}")
    answer = ChatMessage.from_assistant(
        f"{number}. {ASSISTANT_TEXT[: randomly.randint(100, 600)]}", reasoning=reasoning(randomly) if reasons else None
    )
    if number % 3:
        return [question, answer]
    call = ToolCall("find_orders", {"customer": number}, id=f"call_{number}")
    result = ChatMessage.from_tool(TOOL_RESULT[: randomly.randint(200, 2000)], origin=call)
    calling = ChatMessage.from_assistant(tool_calls=[call], reasoning=reasoning(randomly) if reasons else None)
    return [question, calling, result, answer]


def reasoning(randomly: random.Random) -> ReasoningContent:
    return ReasoningContent(ASSISTANT_TEXT[: randomly.randint(200, 600)], extra={"signature": 40 * "signed "})


def simulate(turns: int, settings: dict[str, Any], folder: Path, *, reasons: bool = False) -> Prompts:
    """
    Simulate a conversation, and count the first prompt of each turn. Prompts after a tool call begin with it unchanged.

    :param turns: The number of turns.
    :param settings: The settings of the retriever.
    :param folder: Where the store is.
    :param reasons: Whether each reply has reasoning and a signature.
    """
    randomly = random.Random(0)
    rounds = tokens = cached = 0
    before: list[ChatMessage] = []
    with closing(SQLiteChatMessageStore(folder / "chats.db", last_k=None, durability="normal")) as store:
        retriever = ChatMessageRetriever(store, **settings)
        history = f"{settings} {reasons}"
        for number in range(turns):
            messages = turn(number, randomly, reasons=reasons)
            prompt = retriever.run(history, current_messages=[INSTRUCTIONS, messages[0]])["messages"]
            rounds += sum(message.role is ChatRole.USER for message in prompt)
            tokens += count(prompt)
            cached += count(common_beginning(before, prompt))
            before = [*prompt, *messages[1:-1]]  # the last prompt of the turn
            store.write_messages(history, messages)
    return Prompts(rounds, tokens, cached)


def count(messages: Sequence[ChatMessage]) -> int:
    return COUNTER.count([as_text(message) for message in messages])


def common_beginning(one: Sequence[ChatMessage], other: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with which both begin, without their meta, which is not sent to a model."""
    length = 0
    while length < min(len(one), len(other)) and said(one[length]) == said(other[length]):
        length += 1
    return list(other[:length])


def said(message: ChatMessage) -> dict[str, Any]:
    return {**message.to_dict(), "meta": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=200, help="how long the conversation is (%(default)s)")
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory(prefix="chat-store-simulation-") as folder:
        print("| window | `window_step` | rounds shown | tokens a prompt | of these cacheable | not cacheable |")
        print("|---|---|---|---|---|---|")
        for name, (window, steps) in WINDOWS.items():
            for step in steps:
                prompts = simulate(turns, {**window, "window_step": step}, Path(folder))
                print(f"| {name} | {step} | {prompts.rounds / turns:.1f} | {cells(prompts, turns)} |", flush=True)
        print("\nReplies with reasoning:\n")
        print("| window | `portable` | tokens a prompt | of these cacheable | not cacheable |")
        print("|---|---|---|---|---|")
        for name, window in {
            "everything": {"last_k": None},
            "`last_k=10`, `window_step=8`": {"window_step": 8},
        }.items():
            for portable in (True, False):
                prompts = simulate(turns, {**window, "portable": portable}, Path(folder), reasons=True)
                print(f"| {name} | {portable} | {cells(prompts, turns)} |", flush=True)


def cells(prompts: Prompts, turns: int) -> str:
    tokens, cached = prompts.tokens / turns, prompts.cached / turns
    return f"{tokens:,.0f} | {cached / tokens:.0%} | {tokens - cached:,.0f}"


if __name__ == "__main__":
    main()
