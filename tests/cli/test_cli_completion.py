# SPDX-License-Identifier: Apache-2.0
"""A shell is offered what is right there, and what does nothing but stand there."""

import os
import sys

import pytest
from filled_stores import filled
from terminals import Terminal, forked_commands

from haystack_chat_store import store_from_url
from haystack_chat_store.testing.messages import conversation

#: Typer's own variable: the option to show a completion takes the name of the shell.
NO_SHELL_DETECTION = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"


@pytest.fixture
def completed(run, monkeypatch):
    """Return what bash is offered for the last of these words."""

    def completed(url, *words):
        monkeypatch.setenv("_HAYSTACK_CHAT_STORE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["haystack-chat-store", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setenv("HAYSTACK_CHAT_STORE_URL", url)
        _, out, err = run()
        assert err == ""
        return out.split()

    return completed


def test_the_shell_completes_commands_and_ids(url, completed):
    store = filled(url)
    store.write_messages("ada:\x1b[31m", conversation("u"))
    assert completed(url, "sh") == ["show"]
    assert set(completed(url, "show", "ada")) == {"ada:1", "ada:2"}
    assert completed(url, "title", "ada", ":", "2") == ["2"]
    assert set(completed(url, "title", "ada", ":")) == {"1", "2"}
    assert completed("", "show", "--store", url, "b") == ["bob:1"]
    assert completed(url, "title", "--namespace", "other", "b") == []


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite:///missing.db", "redis://127.0.0.1:1"])
def test_completion_is_quiet_about_errors(url, completed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert completed(url, "show", "x") == []
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ in a real shell


@pytest.fixture
def commands(request):
    """
    The folder of the command: where it is installed, if that is the fixture's parameter, or of one that starts at once.
    """
    if getattr(request, "param", None) == "installed":
        yield os.path.dirname(sys.executable)
    else:
        with forked_commands() as folder:
            yield folder


@pytest.fixture
def bash(url, commands):
    """Bash in a terminal, with our completion. Returns a function that types lines, and waits until they are obeyed."""
    path = os.pathsep.join((commands, os.environ["PATH"]))
    # A command that is forked is no child of this shell, so the shell cannot be found among its parents.
    is_named = {} if commands == os.path.dirname(sys.executable) else {NO_SHELL_DETECTION: "1"}
    terminal = Terminal(program=("bash", "--norc", "-i"), PATH=path, HAYSTACK_CHAT_STORE_URL=url, **is_named)
    typed = 0

    def type_(*lines):
        nonlocal typed
        for line in lines:
            typed += 1
            terminal.type(f"{line}\necho obeyed ''{typed}\n")
            terminal.read_until(f"obeyed {typed}")

    type_("bind 'set bell-style none'", "source <(haystack-chat-store --show-completion bash)")
    yield type_
    terminal.type("\nexit\n")
    terminal.end()


HOSTILE = (
    "zoe/$(touch${IFS}ran)",
    "zoe/`touch${IFS}ran`",
    "zoe/;touch ran;",
    "zoe/&touch ran&",
    "zoe/|touch ran",
    "zoe/>ran",
    "zoe/\ntouch ran\n",
    "zoe/'$(touch ran)'",
    'zoe/"$(touch ran)"',
    "zoe/*",
    "zoe/a b",
    "zoe/\\",
    "zoe/!!",
    "zoe/#",
    "zoe/{a,b}",
    "zoe/~",
    "~",
    "-zoe",
)


def test_an_id_does_nothing_when_it_is_completed(url, bash, tmp_path):
    store = store_from_url(url)
    for hostile in HOSTILE:
        store.delete_all_messages()
        store.write_messages(hostile, conversation("u"))
        bash(f"cd {tmp_path}", f"haystack-chat-store show {hostile[0]}\t")
        assert not (tmp_path / "ran").exists(), hostile


@pytest.mark.parametrize(
    ("chat_history_id", "typed"),
    [
        ("ada:1/zürich", "ada"),
        ("ada:1/zürich", "ada:"),
        ("ada:1/zürich", "ada:1"),
        ("ada:1/zürich", "'ada:1"),
        ("ada@example.org", "ada"),
        ("ada@example.org", "ada@"),
        ("ada@example.org", "ada@ex"),
        ("a=b::c@d:1", "a=b::c"),
        ("a=b::c@d:1", "a=b::c@d"),
        ("東京-1%+", "東"),
    ],
)
def test_what_is_completed_is_the_id(url, bash, chat_history_id, typed):
    store = store_from_url(url)
    for name in (chat_history_id, "1/another", "example.com", "another"):
        store.write_messages(name, conversation("u"))
    bash(f"haystack-chat-store title {typed}\t Done")
    assert store.get_chat_history(chat_history_id).title == "Done"


@pytest.mark.parametrize("commands", ["installed"], indirect=True)
def test_the_store_that_was_typed_is_asked(url, bash):
    store = store_from_url(url, namespace="elsewhere")
    store.write_messages("bob", conversation("u"))
    bash(
        "unset HAYSTACK_CHAT_STORE_URL",
        f"haystack-chat-store title --store {url} --namespace=elsewhere b\t One",
    )
    assert store.get_chat_history("bob").title == "One"
    bash(f"haystack-chat-store title --store={url} --namespace elsewhere b\t Two")
    assert store.get_chat_history("bob").title == "Two"
