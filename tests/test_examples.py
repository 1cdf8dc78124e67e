# SPDX-License-Identifier: Apache-2.0
"""
The examples run as they are: each here in a process of its own, as a user would start it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path):
    def run_example(name, *arguments, text_in=""):
        environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
        return subprocess.run(
            [sys.executable, EXAMPLES / name, *arguments],
            cwd=tmp_path,
            input=text_in,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**environment, "PYTHONIOENCODING": "utf-8"},
            timeout=120,
            check=False,
        )

    return run_example


def test_the_chatbot_remembers_across_restarts(run):
    first = run("terminal_chatbot.py", "--say", "I like tea.")
    second = run("terminal_chatbot.py", "--say", "My name is Ada.")
    third = run("terminal_chatbot.py", "--say", "What is my name?")

    assert "Nice to meet you!" in first.stdout
    assert 'you have told me 1 thing. The first was: "I like tea."' in second.stdout
    assert "Your name is Ada." in third.stdout
    assert [result.returncode for result in (first, second, third)] == [0, 0, 0]


def test_the_chatbot_chats_until_the_end_of_input(run):
    result = run("terminal_chatbot.py", text_in="Grüße aus 東京!\n\nHow are you?\n")

    assert result.returncode == 0, result.stderr
    assert 'The first was: "Grüße aus 東京!"' in result.stdout
    assert "Goodbye!" in result.stdout
    assert "I remember 4 messages" in run("terminal_chatbot.py").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_the_chatbot_leaves_cleanly_on_ctrl_c(tmp_path):
    command = [sys.executable, "-u", EXAMPLES / "terminal_chatbot.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as chatbot:
        while not chatbot.stdout.readline().startswith("Say something"):
            pass
        chatbot.send_signal(signal.SIGINT)
        out, err = chatbot.communicate(timeout=60)

    assert chatbot.returncode == 0
    assert "Goodbye!" in out
    assert err == ""


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
        (["--llm", "openai"], 2, "needs the environment variable OPENAI_API_KEY"),
    ],
)
def test_the_chatbot_says_what_is_wrong(run, arguments, status, message):
    result = run("terminal_chatbot.py", *arguments)

    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_yaml_pipeline_continues_in_the_next_process(run):
    first = run("run_yaml_pipeline.py", "I am Ada.")
    second = run("run_yaml_pipeline.py", "Who am I?")

    assert first.stdout.count("user:") == 1
    assert [line.split() for line in second.stdout.splitlines()[1:5]] == [
        ["system:", "You", "are", "a", "friendly", "chatbot."],
        ["user:", "I", "am", "Ada."],
        ["assistant:", "I", "am", "Ada."],
        ["user:", "Who", "am", "I?"],
    ]
    assert "Messages stored: 2" in second.stdout


def test_the_yaml_script_imports_nothing_of_ours():
    assert "chat_store" not in (EXAMPLES / "run_yaml_pipeline.py").read_text(encoding="utf-8")
