# SPDX-License-Identifier: Apache-2.0
"""
Every Python example in the documentation runs: those of a page together, in order, in a process of their own; those of
the README in one that has imported nothing before.

What a page shows below an example is what it prints, all of it but for lines of three dots, which stand for any others.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from haystack import Pipeline
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.tools import Tool
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.testing.fork_server import run_python

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "publishing" / "haystack-chat-store.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Their examples need a server, which tests/web starts.
SERVED = {"web_apps.md", "hayhooks.md"}
# Printed after each example.
END = "--- end of the example ---"
# A fenced block; a name behind the language is the file that the reader is told to save it as.
FENCE = re.compile(r"^ *```(\w+) *(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(text):
    for language, name, block in FENCE.findall(text):
        margin = min(len(line) - len(line.lstrip()) for line in block.splitlines() if line.strip())
        yield language, name, "\n".join(line[margin:] for line in block.splitlines())


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def sources_with_examples():
    for folder in ("haystack_chat_store", "components"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "```python" in path.read_text(encoding="utf-8"):
                yield path


def run(code, folder, is_fresh=False):
    environment = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "False", "PYTHONPATH": str(ROOT / "examples")}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    if is_fresh:
        result = subprocess.run([sys.executable, "-c", code], **options, check=False)
    else:
        result = run_python(["-c", code], **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in SERVED], ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path):
    code, shown = [], []
    for language, name, block in blocks(page.read_text(encoding="utf-8")):
        if name:
            (tmp_path / name).write_text(block, encoding="utf-8")
        elif language == "python":
            code += [block, f"print({END!r})"]
            shown.append(None)
        elif language == "output":
            assert shown.pop() is None, "An output stands below the example that prints it."
            shown.append(block)

    printed = run("\n".join(code), tmp_path, is_fresh=page.name == "README.md").split(f"{END}\n")
    assert printed.pop() == ""
    for output, text in zip(shown, printed, strict=True):
        if output is not None:
            lines = ["(.*\n)+" if line == "..." else re.escape(f"{line}\n") for line in output.split("\n")]
            assert re.fullmatch("".join(lines), text), f"The page shows:\n{output}\nThe example prints:\n{text}"


@pytest.mark.parametrize("source", list(sources_with_examples()), ids=lambda source: str(source.relative_to(ROOT)))
def test_the_examples_in_docstrings_run(source, tmp_path):
    for docstring in docstrings(source):
        for language, _, block in blocks(docstring):
            if language == "python":
                run(block, tmp_path)


def test_an_agent_between_the_components_doubles_nothing_as_the_readme_says(tmp_path):
    call = ChatMessage.from_assistant(tool_calls=[ToolCall("weather", {}, id="call")])
    model = MockChatGenerator([call, "It is sunny."])
    weather = Tool("weather", "Tells the weather.", {"type": "object", "properties": {}}, function=lambda: "Sun.")
    store = SQLiteChatMessageStore(tmp_path / "chat_history.db")
    pipeline = Pipeline()
    pipeline.add_component("retriever", ChatMessageRetriever(store))
    pipeline.add_component("agent", Agent(chat_generator=model, tools=[weather], system_prompt="You are helpful."))
    pipeline.add_component("writer", ChatMessageWriter(store))
    pipeline.connect("retriever.messages", "agent.messages")
    pipeline.connect("agent.messages", "writer.messages")

    for question in ("And today?", "And now?"):
        pipeline.run({"chat_history_id": "user_456", "current_messages": [ChatMessage.from_user(question)]})

    stored = store.retrieve_messages("user_456")
    assert [message.role.value for message in stored] == ["user", "assistant", "tool", "assistant"] * 2
    assert [message.text for message in stored if message.text] == [
        "And today?",
        "It is sunny.",
        "And now?",
        "It is sunny.",
    ]


def test_a_store_of_ones_own_loads_from_yaml_as_the_readme_says(tmp_path):
    code = """
from haystack import DeserializationError, Pipeline
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from own_store import FolderChatMessageStore

pipeline = Pipeline()
pipeline.add_component("retriever", ChatMessageRetriever(FolderChatMessageStore("histories")))
try:
    Pipeline.loads(pipeline.dumps())
except DeserializationError:
    Pipeline.loads(pipeline.dumps(), allowed_modules=["own_store"])
    print("It has to be allowed.")
"""
    assert run(code, tmp_path) == "It has to be allowed.\n"


def test_links_between_pages_lead_somewhere():
    for page in (*PAGES, *ROOT.glob("[A-Z]*.md"), *(ROOT / "docs" / "reference").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
