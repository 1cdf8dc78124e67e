# SPDX-License-Identifier: Apache-2.0
"""The examples with agents run as they are: each in a process of its own, as a user would start it."""

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
from agent_programs import completed, ids, said

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.testing.fork_server import run_python

ROOT = Path(__file__).parents[2]
CHATBOT = ROOT / "examples" / "agent_chatbot.py"
HANG_LIMIT = 300
needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL to be killed by")


def run(folder, script, *arguments, text_in=""):
    return run_python(
        [script, *arguments],
        cwd=folder,
        input=text_in,
        capture_output=True,
        encoding="utf-8",
        env={name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"},
        timeout=HANG_LIMIT,
    )


def say(folder, text, *arguments):
    result = run(folder, CHATBOT, "--say", text, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.splitlines()[-1].removeprefix("bot> ")


def stored_in(folder):
    store = SQLiteChatMessageStore(folder / "agent_history.db", last_k=None)
    messages = store.retrieve_messages("terminal")
    store.close()
    return messages


# ---------------------------------------------------------------------- the chatbot


def test_the_agent_remembers_the_conversation_across_restarts(tmp_path):
    assert say(tmp_path, "What is 12 * (3 + 4)?") == "12 * (3 + 4) = 84."
    assert say(tmp_path, "I like tea.").startswith('The last thing you said was: "What is 12 * (3 + 4)?"')
    assert say(tmp_path, "What was the result?") == "The last result: 12 * (3 + 4) = 84."


def test_the_agent_keeps_notes(tmp_path):
    assert say(tmp_path, "Remember that the cat is called Mia.") == "Noted: the cat is called Mia."
    assert say(tmp_path, "Please remember tea is at five. Remember that the cat is called Mia.")
    assert (tmp_path / "notes.txt").read_text().splitlines() == ["the cat is called Mia", "tea is at five"]
    assert say(tmp_path, "What do you know about the CAT?") == "the cat is called Mia."
    assert say(tmp_path, "What do you know about dogs?") == "There is no note about dogs."
    assert say(tmp_path, "List my notes.") == "the cat is called Mia; tea is at five."


def test_the_agent_takes_several_steps_and_several_tools_in_one(tmp_path):
    answer = say(tmp_path, "Add 2+3 and note the result. What is 10/4? List my notes.")
    assert answer == "2+3 = 5. 10/4 = 2.5. There are no notes. Noted: 2+3 = 5. Noted: 10/4 = 2.5."
    roles = [message.role.value for message in stored_in(tmp_path)]
    assert roles == ["user", "assistant", "tool", "tool", "tool", "assistant", "tool", "tool", "assistant"]


def test_the_agent_says_that_a_tool_failed(tmp_path):
    division = run(tmp_path, CHATBOT, "--say", "What is 1/0?")
    assert division.stdout.splitlines()[-1] == "bot> My tool calculate failed."
    assert "division by zero" in division.stderr
    note = run(tmp_path, CHATBOT, "--say", "Remember this.", "--notes", "no folder/notes.txt")
    assert note.stdout.splitlines()[-1] == "bot> My tool add_note failed."


def test_the_agent_chats_until_the_end_of_input(tmp_path):
    result = run(tmp_path, CHATBOT, text_in="Remember that 東京 is far.\n\nList my notes.\n")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == [
        *("tool>", "bot>", "tool>", "bot>", "Goodbye!")
    ]
    again = run(tmp_path, CHATBOT)
    assert again.stdout.splitlines()[:2] == ["Messages that I remember: 8", 'My last words: "東京 is far."']


def test_histories_databases_and_stores_of_the_agent_are_apart(tmp_path):
    say(tmp_path, "I like tea.")
    for other in (["--history", "other"], ["--db", "other.db"], ["--store", "sqlite:///third.db"]):
        assert say(tmp_path, "Hello.", *other).startswith("Nice to meet you!")
    assert "I like tea." in say(tmp_path, "Hello.", "--store", "sqlite:///agent_history.db")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--db", "missing/chat.db", "--say", "Hello."], 1, "does not exist"),
        (["--history", "", "--say", "Hello."], 1, "chat_history_id must have 1 to 512 characters"),
        (["--store", "redis//host"], 2, "The URL must have one of these forms"),
    ],
)
def test_the_agent_says_in_one_line_what_is_wrong(tmp_path, arguments, status, message):
    result = run(tmp_path, CHATBOT, *arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm", "openai"], "needs the environment variable OPENAI_API_KEY"),
        (["--db", "chat.db", "--store", "memory://"], "not allowed with argument"),
        (["--crash-after", "0"], "must be question, model, tools or a number"),
        (["--crash-after", "lunch"], "must be question, model, tools or a number"),
    ],
)
def test_the_agent_says_which_arguments_are_wrong(tmp_path, arguments, message):
    result = run(tmp_path, CHATBOT, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------------- the calculator


@pytest.fixture
def calculate(monkeypatch):
    monkeypatch.syspath_prepend(CHATBOT.parent)
    return importlib.import_module("agent_chatbot").calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [(" 12 * (3 + 4)", "84"), ("-2 ** 2 % 7", "3"), ("0.1 + 0.2", "0.3"), ("7 / 2", "3.5"), ("2 ** 100", str(2**100))],
)
def test_the_calculator_calculates(calculate, expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("__import__('os')", "x", "'a' * 9", "(lambda: 1)()", "[1]", "1, 2", "1 +"),  # no arithmetic
        *("True + 1", "1 if 1 else 2", "1 < 2", "~1", "1 << 9"),  # none of ours
        *("9 ** 9 ** 9", "2 ** 1001", "1" * 201, "1e999", "-1e200 * 1e200", "1 / 0", "(-8) ** 0.5"),  # no result
    ],
)
def test_the_calculator_does_nothing_else(calculate, expression):
    with pytest.raises((ValueError, ArithmeticError, SyntaxError)):
        calculate(expression)


# ---------------------------------------------------------------------- crashes

# What is said, and how many steps the agent takes then.
TURNS = {"Remember that tea is at five.": 2, "Add 2 + 3 and note the result.": 3, "What was the result?": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What is stored and noted of a conversation without a crash."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for turn in TURNS:
        say(folder, turn)
    return [said(message) for message in stored_in(folder)], (folder / "notes.txt").read_text()


@needs_sigkill
@pytest.mark.parametrize("step", ["question", "model", "tools", "1", "2", "3"])
def test_a_turn_that_was_killed_goes_on_at_the_next_start(tmp_path, undisturbed, step):
    was_interrupted = []
    for turn, whole_steps in TURNS.items():
        crash = run(tmp_path, CHATBOT, "--say", turn, "--crash-after", step)
        comes_so_far = int(step) <= whole_steps if step.isdecimal() else step != "tools" or whole_steps > 1
        assert crash.returncode == (-signal.SIGKILL if comes_so_far else 0)
        was_interrupted.append(turn if comes_so_far and step != str(whole_steps) else None)
        assert_goes_on(crash, [None, *was_interrupted][-2])
    assert_goes_on(run(tmp_path, CHATBOT), was_interrupted[-1])

    transcript, notes = undisturbed
    stored = stored_in(tmp_path)
    assert [said(message) for message in completed(stored)] == transcript
    assert len(set(ids(stored))) == len(stored)
    # Nothing is taken twice but what was not saved: two turns have calls that the crash left without results.
    assert len(stored) - len(transcript) == (2 if step == "tools" else 0)
    assert (tmp_path / "notes.txt").read_text() == notes


def assert_goes_on(start, turn):
    assert ("I was interrupted" in start.stdout) is (turn is not None)
    assert turn is None or f'I was interrupted when you had said: "{turn}"\nbot> ' in start.stdout


@needs_sigkill
def test_an_interrupted_turn_is_finished_before_the_next_question(tmp_path):
    run(tmp_path, CHATBOT, "--say", "What is 2 + 3?", "--crash-after", "1")
    assert say(tmp_path, "What was the result?") == "The last result: 2 + 3 = 5."
    texts = [message.text for message in stored_in(tmp_path) if message.text]
    assert texts == ["What is 2 + 3?", "2 + 3 = 5.", "What was the result?", "The last result: 2 + 3 = 5."]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(("arguments", "text_in"), [(["--say", "What is 2 + 3?"], ""), ([], "What is 2 + 3?\n")])
def test_after_ctrl_c_the_turn_goes_on_at_the_next_start(tmp_path, arguments, text_in):
    script = """
import signal, sys, agent_chatbot
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
agent_chatbot.RuleBasedModel._from_results = lambda self, results: signal.raise_signal(signal.SIGINT)
agent_chatbot.main(sys.argv[1:])
"""
    (tmp_path / "interrupted.py").write_text(f"import sys; sys.path.insert(0, {str(CHATBOT.parent)!r})\n{script}")
    interrupted = run(tmp_path, "interrupted.py", *arguments, text_in=text_in)
    assert interrupted.returncode == 130
    assert interrupted.stderr == "\nGoodbye! Start me again, and I go on after what I have saved.\n"

    assert 'I was interrupted when you had said: "What is 2 + 3?"\nbot> 2 + 3 = 5.' in run(tmp_path, CHATBOT).stdout


# ---------------------------------------------------------------------- YAML, and the simulation


def test_the_agent_pipeline_continues_in_the_next_process(tmp_path):
    arguments = (ROOT / "examples" / "run_yaml_pipeline.py", "--file", "agent_pipeline.yaml", "How much is pi?")
    first, second = run(tmp_path, *arguments), run(tmp_path, *arguments)

    turn = ["user: How much is pi?", "assistant: round_number", "tool: 3.14"]
    assert [line.strip() for line in first.stdout.splitlines()] == [
        "What the model saw:",
        *("system: You are a friendly assistant.", *turn),
        "It answered: Pi is about 3.14.",
    ]
    assert [line.strip() for line in second.stdout.splitlines()] == [
        "What the model saw:",
        *("system: You are a friendly assistant.", *turn, "assistant: Pi is about 3.14.", *turn),
        "It answered: Pi is about 3.14.",
    ]


def test_the_simulation_shows_that_a_step_keeps_prompts_cacheable(tmp_path):
    result = run(tmp_path, ROOT / "benchmarks" / "prompt_cache.py", "--turns", "40")
    assert result.returncode == 0, result.stderr
    steps, forms = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
        for table in result.stdout.split("Replies with reasoning:")
    )
    cacheable = {(row[0], row[1]): int(row[4].removesuffix("%")) for row in steps}
    for window in ("`last_k=10`", "`max_tokens=4000`"):
        assert cacheable[window, "1"] + 25 < cacheable[window, "8"]
    tokens = {(row[0], row[1]): int(row[2].replace(",", "")) for row in forms}
    assert tokens["everything", "True"] < tokens["everything", "False"]
