# SPDX-License-Identifier: Apache-2.0
"""
The examples run as they are: each here in a process of its own, as a user would start it. Some of these processes are
forked from one that has imported Haystack; those that restart or that run YAML are fresh.
"""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.testing.fork_server import run_python

EXAMPLES = Path(__file__).parent.parent / "examples"


def options(folder, text_in, **environment):
    inherited = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    return {
        "cwd": folder,
        "input": text_in,
        "capture_output": True,
        "encoding": "utf-8",
        "env": {**inherited, "PYTHONIOENCODING": "utf-8", **environment},
        "timeout": 120,
    }


@pytest.fixture
def run(tmp_path):
    def run_example(name, *arguments, text_in=""):
        return run_python([EXAMPLES / name, *arguments], **options(tmp_path, text_in))

    return run_example


@pytest.fixture
def run_fresh(tmp_path):
    def run_example(name, *arguments):
        return subprocess.run([sys.executable, EXAMPLES / name, *arguments], **options(tmp_path, ""), check=False)

    return run_example


@pytest.fixture
def run_script(tmp_path):
    def run_beside_the_examples(script, *arguments, text_in=""):
        return run_python(["-c", script, *arguments], **options(tmp_path, text_in, PYTHONPATH=str(EXAMPLES)))

    return run_beside_the_examples


def test_the_chatbot_remembers_across_restarts(run_fresh):
    first = run_fresh("terminal_chatbot.py", "--say", "I like tea.")
    second = run_fresh("terminal_chatbot.py", "--say", "My name is Ada.")
    third = run_fresh("terminal_chatbot.py", "--say", "What is my name?")

    assert "Nice to meet you!" in first.stdout
    assert 'you have told me 1 thing. The first was: "I like tea."' in second.stdout
    assert "Your name is Ada." in third.stdout
    assert [result.returncode for result in (first, second, third)] == [0, 0, 0]


def test_the_chatbot_chats_until_the_end_of_input(run):
    result = run("terminal_chatbot.py", text_in="Grüße aus 東京!\n\nHow are you?\n")

    assert result.returncode == 0, result.stderr
    assert [line.split(maxsplit=1)[0] for line in result.stdout.splitlines()[2:]] == ["bot>", "bot>", "Goodbye!"]
    assert 'The first was: "Grüße aus 東京!"' in result.stdout
    assert "Messages that I remember: 4" in run("terminal_chatbot.py").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_the_chatbot_leaves_cleanly_on_ctrl_c(tmp_path):
    command = [sys.executable, "-u", EXAMPLES / "terminal_chatbot.py"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    ) as chatbot:
        while not chatbot.stdout.readline().startswith("Say something"):
            pass
        chatbot.send_signal(signal.SIGINT)
        out, err = chatbot.communicate(timeout=60)

    assert chatbot.returncode == 0
    assert "Goodbye!" in out
    assert err == ""


def test_the_chatbot_leaves_cleanly_on_ctrl_c_before_it_has_asked(run_script):
    script = """
import builtins, signal, terminal_chatbot
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored

def print_and_press_ctrl_c(*values, **options):
    builtins.print(*values, **options)
    if values[0].startswith("Say something."):
        signal.raise_signal(signal.SIGINT)

terminal_chatbot.print = print_and_press_ctrl_c
terminal_chatbot.main([])
"""
    result = run_script(script)

    assert (result.returncode, result.stderr) == (0, "")
    assert "Goodbye! I will remember." in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(("arguments", "text_in"), [(["--say", "Hello."], ""), ([], "Hello.\n")])
def test_the_chatbot_remembers_the_question_of_a_turn_that_ctrl_c_ended(run_script, arguments, text_in):
    script = """
import signal, sys, terminal_chatbot
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored

def answer_until_ctrl_c(messages):
    signal.raise_signal(signal.SIGINT)
    return "never said"

terminal_chatbot.answer_from_memory = answer_until_ctrl_c
terminal_chatbot.main(sys.argv[1:])
"""
    result = run_script(script, *arguments, text_in=text_in)

    assert result.returncode == 130
    assert result.stderr == "\nGoodbye! I remember what you said, but not my answer.\n"
    assert "I will remember" not in result.stdout
    assert "Messages that I remember: 1" in run_script("import terminal_chatbot\nterminal_chatbot.main([])").stdout


def test_the_chatbot_remembers_in_the_store_that_a_url_names(run):
    run("terminal_chatbot.py", "--say", "My name is Ada.", "--store", "sqlite:///other.db")
    same_store = run("terminal_chatbot.py", "--say", "What is my name?", "--store", "sqlite:///other.db")
    same_file = run("terminal_chatbot.py", "--say", "What is my name?", "--db", "other.db")
    other_store = run("terminal_chatbot.py", "--say", "What is my name?", "--store", "memory://")

    assert "Your name is Ada." in same_store.stdout
    assert "Your name is Ada." in same_file.stdout
    assert "Nice to meet you!" in other_store.stdout


def test_the_chatbot_shows_a_model_only_as_much_of_a_long_history_as_its_context_holds(run, tmp_path):
    with closing(SQLiteChatMessageStore(tmp_path / "chat_history.db")) as store:
        for place in range(30):
            said = ChatMessage.from_user(f"I know fact {place}. " + "It is long. " * 200)
            store.write_messages("terminal", [said, ChatMessage.from_assistant("I see.")])

    answer = run("terminal_chatbot.py", "--say", "What do you know?").stdout

    number = int(re.search(r"you have told me (\d+) things", answer)[1])
    assert 10 <= number < 20  # each has some 600 tokens
    assert f"I know fact {30 - number}." in answer


def test_histories_and_databases_of_the_chatbot_are_apart(run):
    run("terminal_chatbot.py", "--say", "I like tea.", "--history", "ada")
    other_history = run("terminal_chatbot.py", "--say", "Hello.", "--history", "grace")
    other_database = run("terminal_chatbot.py", "--say", "Hello.", "--history", "ada", "--db", "other.db")

    assert "Nice to meet you!" in other_history.stdout
    assert "Nice to meet you!" in other_database.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--db", "missing/chat.db", "--say", "Hello."], 1, "does not exist"),
        (["--history", "", "--say", "Hello."], 1, "chat_history_id must have 1 to 512 characters"),
        (["--store", "redis//host", "--say", "Hello."], 2, "The URL must have one of these forms"),
        (["--store", "sqlite:///missing/chat.db"], 1, "does not exist"),
    ],
)
def test_the_chatbot_says_in_one_line_what_is_wrong(run, arguments, status, message):
    result = run("terminal_chatbot.py", *arguments)

    assert result.returncode == status
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm", "openai"], "needs the environment variable OPENAI_API_KEY"),
        (["--db", "chat.db", "--store", "memory://"], "not allowed with argument"),
    ],
)
def test_the_chatbot_says_which_arguments_are_wrong(run, arguments, message):
    result = run("terminal_chatbot.py", *arguments)

    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_yaml_pipeline_continues_in_the_next_process(run_fresh):
    first = run_fresh("run_yaml_pipeline.py", "I am Ada.")
    second = run_fresh("run_yaml_pipeline.py", "Who am I?")

    assert first.stdout.count("user:") == 1
    assert [line.split() for line in second.stdout.splitlines()[1:5]] == [
        ["system:", "You", "are", "a", "friendly", "chatbot."],
        ["user:", "I", "am", "Ada."],
        ["assistant:", "I", "am", "Ada."],
        ["user:", "Who", "am", "I?"],
    ]
    assert "Messages written with the answer: 1" in second.stdout


def test_the_yaml_pipeline_answers_a_request_that_is_sent_again_once(run):
    first = run("run_yaml_pipeline.py", "--request-id", "1", "I am Ada.")
    again = run("run_yaml_pipeline.py", "--request-id", "1", "I am Ada.")

    assert "Messages written with the answer: 1" in first.stdout
    assert again.stdout.splitlines() == [
        "The model was not asked.",
        "The stored answer: I am Ada.",
        "Messages written with the answer: 0",
    ]


@pytest.mark.parametrize("name", ["rag_pipeline.yaml", "rag_followup_pipeline.yaml"])
def test_the_yaml_script_shows_the_documents_that_the_model_saw(run, name):
    default = run("run_yaml_pipeline.py", "--file", name, "When does the palace in Kyoto open?")
    own = run("run_yaml_pipeline.py", "--file", name, "--document", "In Leeds it rains.", "Does it rain in Leeds?")

    assert "user: Document: The palace in Kyoto opens at nine.\n" in default.stdout
    assert "user: When does the palace in Kyoto open?\n" in own.stdout
    assert "user: Document: In Leeds it rains.\n" in own.stdout


RAG_SCRIPT = """
import json, sys
from pathlib import Path
from haystack import Document, Pipeline
from haystack.document_stores.in_memory import InMemoryDocumentStore

texts = ["The palace in Kyoto opens at nine.", "In Oslo one needs a coat."]
InMemoryDocumentStore(index="examples").write_documents([Document(content=text) for text in texts])
pipeline = Pipeline.loads(Path(sys.argv[1]).read_text())
for number, query in enumerate(["When does the palace in Kyoto open?", "And is that early?", "And is that early?"]):
    data = {"query": query, "chat_history_id": "h", "request_id": str(min(number, 1))}
    outputs = pipeline.run(data, include_outputs_from={"prompt_builder"})
    shown = [message.text for message in outputs.get("prompt_builder", {}).get("prompt", [])]
    print(json.dumps([shown, outputs["answer_writer"]["replies"][0].text]))

from haystack_chat_store import SQLiteChatMessageStore
print(json.dumps([message.text for message in SQLiteChatMessageStore("chat_history.db").retrieve_messages("h")]))
"""


@pytest.mark.parametrize(
    ("name", "is_rewritten"),
    [("rag_pipeline.yaml", False), ("rag_followup_pipeline.yaml", True)],
    ids=["rag", "followup"],
)
def test_rag_from_yaml_stores_what_was_typed_and_asks_once(run_script, name, is_rewritten):
    result = run_script(RAG_SCRIPT, EXAMPLES / name)
    assert result.returncode == 0, result.stderr
    first, second, again, stored = map(json.loads, result.stdout.splitlines())

    questions = ["When does the palace in Kyoto open?", "And is that early?"]
    document = "Document: The palace in Kyoto opens at nine.\n\nQuestion: "
    assert first[0] == ["Answer from the documents.", f"{document}{questions[0]}"]
    assert second[0][1:3] == [questions[0], first[1]]
    assert ("Kyoto" in second[0][3]) is is_rewritten
    assert second[0][3].endswith(questions[1])
    assert again == [[], second[1]]
    assert stored == [questions[0], first[1], questions[1], second[1]]


def test_the_yaml_script_takes_the_readers_own_file(run, tmp_path):
    (tmp_path / "own.yaml").write_text((EXAMPLES / "chat_pipeline.yaml").read_text().replace("friendly", "terse"))
    assert "You are a terse chatbot." in run("run_yaml_pipeline.py", "--file", "own.yaml").stdout
    missing = run("run_yaml_pipeline.py", "--file", "missing.yaml")
    assert missing.returncode == 2
    assert "There is no missing.yaml." in missing.stderr


def test_the_yaml_script_imports_nothing_of_ours():
    assert "chat_store" not in (EXAMPLES / "run_yaml_pipeline.py").read_text(encoding="utf-8")
