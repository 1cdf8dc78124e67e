# SPDX-License-Identifier: Apache-2.0
"""
An agent for the terminal with two tools, notes and a calculator. Kill it in the middle of a turn and start it again: it
goes on where it stopped.

    python examples/agent_chatbot.py                             chat; needs no API key
    python examples/agent_chatbot.py --say "Add 2 + 3 and note the result."
    python examples/agent_chatbot.py --say "Add 4 + 5 and note the result." --crash-after tools
    python examples/agent_chatbot.py --llm openai                chat with a real model; needs OPENAI_API_KEY
    python examples/agent_chatbot.py --store redis://host        remember in another store than a file

Without a model, rules decide which tools to call. They understand "Remember that …", "What do you know about …?",
"List my notes.", "What is 12 * (3 + 4)?", "Add 2 + 3 and note the result." and "What was the result?".
"""

import argparse
import ast
import logging
import math
import operator
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

from haystack import component
from haystack.components.agents import Agent, State
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ChatRole, ToolCall, ToolCallResult
from haystack.hooks import hook
from haystack.tools.from_function import create_tool_from_function
from haystack.tools.tool import Tool
from haystack_integrations.hooks.chat_store import chat_history_hooks
from openai import OpenAIError

from haystack_chat_store import ChatMessageStore, ChatMessageStoreError, SQLiteChatMessageStore, store_from_url

# A run without new messages resumes an interrupted turn. Haystack warns of such a run and, if the turn is complete, of
# its early end.
EXPECTED_WARNINGS = ("All messages provided to the Agent component are system messages", "Agent reached maximum agent")
logging.getLogger("haystack.components.agents.agent").addFilter(
    lambda record: not record.getMessage().startswith(EXPECTED_WARNINGS)
)

SYSTEM_PROMPT = (
    "You are a friendly assistant. Keep what the user wants remembered as notes, look there for what you do not know, "
    "and leave all arithmetic to the calculator."
)

# ---------------------------------------------------------------------- tools


class Notes:
    """
    Notes in a plain text file, one per line.

    If the result of a tool was not saved before a crash, the tool is called again. So adding a note is idempotent.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()  # an agent calls the tools of one step in parallel

    def add_note(self, text: str) -> str:
        """Note something the user wants remembered."""
        note = " ".join(text.split())
        with self._lock:
            if note not in self._lines():
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"{note}\n")
        return f"Noted: {note}"

    def list_notes(self) -> str:
        """List all notes."""
        return "; ".join(self._lines()) or "There are no notes."

    def search_notes(self, words: str) -> str:
        """Find the notes that contain all of these words."""
        wanted = words.lower().split()
        found = [note for note in self._lines() if all(word in note.lower() for word in wanted)]
        return "; ".join(found) or f"There is no note about {words}."

    def _lines(self) -> list[str]:
        return self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []


OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculate(expression: str) -> str:
    """Calculate with numbers, + - * / % ** and parentheses, such as 12 * (3 + 4)."""
    if len(expression) > 200:
        raise ValueError("The expression is too long.")
    value = evaluate(ast.parse(expression.strip(), mode="eval").body)
    if isinstance(value, complex) or not math.isfinite(value):
        raise ValueError("The result is no real number.")
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def evaluate(node: ast.AST) -> Any:
    """Return the value of an expression of numbers and the operators in `OPERATIONS`."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = evaluate(node.left), evaluate(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * math.log2(abs(left) + 1) > 1000:
            raise ValueError("The result has too many digits.")
        return OPERATIONS[type(node.op)](left, right)
    raise ValueError("This is not arithmetic.")


def make_tools(notes: Notes) -> list[Tool]:
    """Make the tools of the agent."""
    functions = (notes.add_note, notes.list_notes, notes.search_notes, calculate)
    return [create_tool_from_function(function) for function in functions]


# ---------------------------------------------------------------------- a model that needs no key


@component
class RuleBasedModel:
    """Decides by rules which tools to call and what to answer, only from the messages that a model would see."""

    # The pattern of a sentence, the tool to call for it, and the name of the tool's argument.
    RULES = (
        (r"(?:what is|add|calculate) ([-+\d(.][^?]*?)(?: and note .*)?", "calculate", "expression"),
        (r"(?:please )?remember (?:that )?(.+)", "add_note", "text"),
        (r"what do you know about (.+)", "search_notes", "words"),
        (r"list my notes", "list_notes", None),
    )

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], tools: list[Tool] | None = None) -> dict[str, list[ChatMessage]]:
        messages = self._without_interrupted_steps(messages)
        asked = max(index for index, message in enumerate(messages) if message.role is ChatRole.USER)
        question = messages[asked].text or ""
        results = [result for message in messages[asked:] for result in message.tool_call_results]
        step = sum(bool(message.tool_calls) for message in messages[asked:])
        calls = list(self._calls(question)) if step == 0 else list(self._calls_after(question, results, step))
        if calls and tools:
            return {"replies": [ChatMessage.from_assistant(tool_calls=calls)]}
        answer = self._from_results(results) if results else self._from_memory(question, messages[:asked])
        return {"replies": [ChatMessage.from_assistant(answer)]}

    @staticmethod
    def _without_interrupted_steps(messages: list[ChatMessage]) -> list[ChatMessage]:
        """After a crash, this model takes interrupted steps again. Its tools may be called twice."""
        told = [
            any(result.error and "interrupted" in str(result.result) for result in m.tool_call_results)
            for m in messages
        ]
        return [
            message
            for message, is_told, is_told_next in zip(messages, told, [*told[1:], False], strict=True)
            if not is_told and not (message.tool_calls and is_told_next)
        ]

    def _calls(self, question: str) -> Iterator[ToolCall]:
        for number, sentence in enumerate(re.split(r"(?<=[.?!])\s+", question)):
            for pattern, tool, argument in self.RULES:
                match = re.fullmatch(pattern, sentence.rstrip(".?! "), re.IGNORECASE)
                if match:
                    yield ToolCall(tool, {argument: match[1]} if argument else {}, id=f"call_{number}")
                    break

    def _calls_after(self, question: str, results: list[ToolCallResult], step: int) -> Iterator[ToolCall]:
        if step == 1 and re.search(r"\band note\b", question, re.IGNORECASE):
            for number, result in enumerate(results):
                if result.origin.tool_name == "calculate" and not result.error:
                    text = f"{result.origin.arguments['expression']} = {result.result}"
                    yield ToolCall("add_note", {"text": text}, id=f"call_then_{number}")

    def _from_results(self, results: list[ToolCallResult]) -> str:
        return " ".join(self._told(result) for result in results)

    def _from_memory(self, question: str, earlier: list[ChatMessage]) -> str:
        results = [result for message in earlier for result in message.tool_call_results]
        calculated = [result for result in results if result.origin.tool_name == "calculate" and not result.error]
        if calculated and "result" in question.lower():
            return f"The last result: {self._told(calculated[-1])}"
        said = [message.text for message in earlier if message.role is ChatRole.USER]
        before = f'The last thing you said was: "{said[-1]}"' if said else "Nice to meet you!"
        return f"{before} I can remember things, look them up and calculate."

    def _told(self, result: ToolCallResult) -> str:
        if result.error:
            return f"My tool {result.origin.tool_name} failed."
        if result.origin.tool_name == "calculate":
            return f"{result.origin.arguments['expression']} = {result.result}."
        return str(result.result).rstrip(".") + "."


# ---------------------------------------------------------------------- the agent

# The steps of a turn after which the process can end itself, and the hook points right after these steps.
STEPS = {"question": ["before_llm"], "model": ["before_tool", "on_exit"], "tools": ["after_tool"]}


class Crash:
    """A hook that kills its process when it runs for the n-th time. Nothing can be saved or closed afterwards."""

    def __init__(self, number: int = 1) -> None:
        self._left = number

    def run(self, state: State) -> None:  # noqa: ARG002  (Haystack passes it by this name)
        self._left -= 1
        if self._left == 0:
            sys.stdout.flush()
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows, SIGTERM does the same


def step_to_crash_after(text: str) -> str | int:
    """Parse the value of `--crash-after`."""
    if text in STEPS:
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be {', '.join(STEPS)} or a number of steps, got {text!r}.")


@hook
def show_tools(state: State) -> None:
    """Print the results of the tools of this step."""
    messages: list[ChatMessage] = state.data["messages"]
    last_step = max(index for index, message in enumerate(messages) if message.tool_calls)
    for message in messages[last_step:]:
        for result in message.tool_call_results:
            arguments = ", ".join(map(str, result.origin.arguments.values()))
            print(f"tool> {result.origin.tool_name}({arguments}): {result.result}", flush=True)


def build_agent(store: ChatMessageStore, notes: Notes, llm: str, crash_after: str | int | None = None) -> Agent:
    """Build the agent with its memory and, if wanted, a crash."""
    hooks = chat_history_hooks(store, window_step=8, hooks={"after_tool": [show_tools]})
    if isinstance(crash_after, int):
        crash = Crash(crash_after)
        for point in ("after_tool", "on_exit"):
            hooks[point].append(crash)  # after the saver, so the step is saved
    elif crash_after is not None:
        crash = Crash()
        for point in STEPS[crash_after]:
            hooks[point] = [crash, *hooks.get(point, [])]  # before the saver, so the step is lost
    return Agent(
        chat_generator=OpenAIChatGenerator() if llm == "openai" else RuleBasedModel(),
        tools=make_tools(notes),
        system_prompt=SYSTEM_PROMPT,
        hooks=hooks,
    )


def run(agent: Agent, chat_history_id: str, messages: list[ChatMessage]) -> dict[str, Any]:
    """Run one turn, or the rest of one."""
    return agent.run(messages, hook_context={"chat_history_id": chat_history_id})


def say(agent: Agent, chat_history_id: str, text: str) -> None:
    """Run one turn and print the answer."""
    print_answer(run(agent, chat_history_id, [ChatMessage.from_user(text)]))


def go_on(agent: Agent, store: ChatMessageStore, chat_history_id: str) -> None:
    """Finish the last turn if it was interrupted."""
    if store.count_messages(chat_history_id) == 0:
        return
    # Without new messages, the agent finishes the last turn. If the turn is complete, it takes no step.
    result = run(agent, chat_history_id, [])
    if result["step_count"]:
        print(f'I was interrupted when you had said: "{last_text(result["messages"], ChatRole.USER)}"')
        print_answer(result)


def print_answer(result: dict[str, Any]) -> None:
    """Print how a turn ended."""
    print("bot>", result["last_message"].text or f"(no answer: {result['exit_reason']})")


def last_text(messages: list[ChatMessage], role: ChatRole) -> str:
    """Return what the user or the assistant said last."""
    return next((message.text for message in reversed(messages) if message.is_from(role) and message.text), "")


def chat(agent: Agent, store: ChatMessageStore, chat_history_id: str) -> None:
    """Chat until the end of input, or Ctrl-C at the prompt."""
    remembered = store.count_messages(chat_history_id)
    print(f"Messages that I remember: {remembered}" if remembered else "We have not met yet.")
    if remembered:
        # A process can crash between saving and printing, so the last answer may not have been shown.
        print(f'My last words: "{last_text(store.retrieve_messages(chat_history_id, last_k=1), ChatRole.ASSISTANT)}"')
    print("Say something. Ctrl-D or Ctrl-C leaves; start me again and I remember.")
    prompt = "you> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print("\n" if prompt else "", "Goodbye! I will remember.", sep="")
            return
        if text:
            say(agent, chat_history_id, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and chat."""
    parser = argparse.ArgumentParser(description="An agent that remembers, and survives its own end.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--db", default="agent_history.db", metavar="PATH", help="database file (%(default)s)")
    where.add_argument("--store", metavar="URL", help="another store, such as postgresql://… or redis://…")
    parser.add_argument("--history", default="terminal", metavar="ID", help="which conversation (%(default)s)")
    parser.add_argument("--notes", default="notes.txt", metavar="PATH", help="file with the notes (%(default)s)")
    parser.add_argument("--say", metavar="TEXT", help="say this, print the answer and leave")
    parser.add_argument("--llm", choices=["rules", "openai"], default="rules", help="who answers (%(default)s)")
    parser.add_argument(
        "--crash-after",
        type=step_to_crash_after,
        metavar="STEP",
        help="kill this process in the middle of its work. 'question': it is saved, and the model not asked yet. "
        "'model': it has replied, and nothing of that is saved. 'tools': they have run, and their results are not "
        "saved. A number: so many whole steps (a reply of the model, and the tools it called) are saved.",
    )
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
    notes = Notes(options.notes)
    try:
        with closing(store):
            go_on(build_agent(store, notes, options.llm), store, options.history)
            agent = build_agent(store, notes, options.llm, options.crash_after)
            if options.say is None:
                chat(agent, store, options.history)
            else:
                say(agent, options.history, options.say)
    except KeyboardInterrupt:
        parser.exit(130, "\nGoodbye! Start me again, and I go on after what I have saved.\n")
    except (ChatMessageStoreError, OpenAIError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
