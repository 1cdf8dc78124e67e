# SPDX-License-Identifier: Apache-2.0
"""The process starts with what is installed. It ends cleanly after Ctrl-C, and when its output is closed."""

import os
import signal
import subprocess
import sys
from importlib import metadata

import pytest
from filled_stores import command
from haystack.dataclasses import ChatMessage

from haystack_chat_store import store_from_url
from haystack_chat_store.testing.fork_server import start_python
from haystack_chat_store.testing.messages import conversation


def test_it_is_installed_as_a_command_of_its_own():
    program = os.path.join(os.path.dirname(sys.executable), "haystack-chat-store")
    for start in ([program], [sys.executable, *command()]):
        result = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True)
        assert "Usage: haystack-chat-store" in result.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from haystack_chat_store.cli import main
main(["ls"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "haystack-chat-store[cli]" in result.stderr
    extra = metadata.requires("haystack-chat-store")
    for driver in ("typer", "rich"):  # installing these works from a clone, too
        (requirement,) = [each.partition(";")[0].strip() for each in extra if each.startswith(f"{driver}>")]
        assert f'"{requirement}"' in result.stderr
    assert "Traceback" not in result.stderr


def test_the_package_itself_needs_neither_typer_nor_rich():
    code = """
import sys
import haystack_chat_store, haystack_chat_store.doctor, haystack_chat_store.transfer
imported = set(sys.modules)
sys.modules.update(typer=None, rich=None)
import haystack_chat_store.cli
print("haystack_chat_store.cli.app" in imported, "typer" in imported)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


@pytest.mark.parametrize("arguments", [("show", "long", "--all"), ("ls", "--all", "--json"), ("export",)])
def test_whoever_reads_may_stop_reading(url, arguments):
    store = store_from_url(url, durability="normal")
    store.write_messages("long", [ChatMessage.from_user("word " * 1000) for _ in range(200)])
    for number in range(200):
        store.write_messages("x" * 400 + str(number), conversation("u"))
    process = start_python(
        command(*arguments, "--store", url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_text_that_the_encoding_does_not_have_is_printed_all_the_same(url):
    store_from_url(url).write_messages("chat", [ChatMessage.from_user("Zürich 京都 \ud800")])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for arguments in (("show", "chat"), ("ls",), ("stats",)):
        line = [sys.executable, *command(*arguments, "--store", url)]
        subprocess.run(line, check=True, capture_output=True, env=environment, encoding="ascii")


@pytest.mark.parametrize(("completing", "said"), [(False, "\n"), (True, "")])
def test_it_ends_quietly_when_it_is_interrupted_before_it_has_started(completing, said):
    code = """
import sys
class CtrlC:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
from haystack_chat_store.cli import main
sys.meta_path.insert(0, CtrlC())
main(["ls"])
"""
    environment = {**os.environ, **({"_HAYSTACK_CHAT_STORE_COMPLETE": "complete_bash"} if completing else {})}
    arguments = [sys.executable, "-c", code]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", said)
