# SPDX-License-Identifier: Apache-2.0
"""
In a real terminal, the command line is readable, asks before it deletes, and lets no message do anything but be read.
"""

import io
import json
import re
import subprocess
import sys
from datetime import datetime, timezone

import pytest
from filled_stores import age, branched, change
from haystack.dataclasses import ChatMessage, FileContent, ImageContent, ReasoningContent, TextContent, ToolCall
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from terminals import Terminal

from haystack_chat_store import store_from_url
from haystack_chat_store.cli import main
from haystack_chat_store.cli.conversation import print_messages
from haystack_chat_store.display import harmless, harmless_line
from haystack_chat_store.doctor import ExaminedMessage
from haystack_chat_store.testing.kit import number_of_examples
from haystack_chat_store.testing.messages import conversation, messages

# What a terminal obeys: every control character, and what a hostile message would do with them.
CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
REORDERING = "\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff\U000e0041"
HOSTILE = "".join(
    (
        "\x1b]0;title\x07 \x1b[2J \x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\ \x9b31m \x90q\x9c",
        " \x1b]52;c;ZXZpbA==\x07",
        " [red]markup[/red] [link=http://evil.example]here[/link] :smile: [/] \ud800 &#27;[31m &#x202e;gpj.exe &#155; ",
        CONTROLS,
        REORDERING,
    )
)

# What the command line itself sends: colours and the like and, for progress bars, the cursor.
STYLE = re.compile(r"\x1b\[[0-9;]*m")
CURSOR = re.compile(r"\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r(?!\n)")


@pytest.fixture
def shown(capsys, monkeypatch):
    """
    Return what a command that succeeds prints for a terminal, in this process and without styles: its result, or else
    what it says beside it.
    """

    def shown(*arguments, columns=80, beside=False):
        sits_before_it(monkeypatch)
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        out, err = capsys.readouterr()
        assert exit_.value.code == 0, err
        assert_harmless(out + err)
        return STYLE.sub("", err if beside else out)

    return shown


def sits_before_it(monkeypatch):
    """Have this process's outputs be taken for a terminal that knows colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)


def assert_harmless(text):
    """Nothing is left that a terminal obeys or shows in another order."""
    text = CURSOR.sub("", STYLE.sub("", text))
    assert set(text) & set(CONTROLS + REORDERING) <= {"\n"}
    assert not [character for character in text if 0xD800 <= ord(character) < 0xE000]


@pytest.fixture
def store(url):
    return store_from_url(url, last_k=None, skip_system_messages=False, search=True)


def hostile_messages(text):
    call = ToolCall(text, {text: [text, {text: text}]}, id=text, extra={text: text})
    image, file = (
        ImageContent("AAAA", text, validation=False),
        FileContent("AAAA", text, filename=text, validation=False),
    )
    return [
        ChatMessage.from_system(text),
        ChatMessage.from_user(content_parts=[text, image, file], name=text),
        ChatMessage.from_assistant(text, tool_calls=[call], reasoning=ReasoningContent(text), name=text),
        ChatMessage.from_assistant(
            f"# {text}\n- `{text}`\n```{text}\n{text}\n```\n> {text}\n\n[{text}]({text} '{text}')"
        ),
        ChatMessage.from_tool(text, origin=call, error=True),
        ChatMessage.from_tool([TextContent(text), image], origin=call),
    ]


# ------------------------------------------------------------------ nothing hostile gets through


@pytest.fixture
def hostile_id(store):
    chat_history_id = HOSTILE.replace("\0", "").replace("\ud800", "")
    store.write_messages(chat_history_id, hostile_messages(HOSTILE + " needle"))
    store.update_chat_history(chat_history_id, title=chat_history_id)
    return chat_history_id


def commands(hostile_id):
    return (
        ("ls",),
        ("show", hostile_id, "--all", "--full"),
        ("search", "needle"),
        ("title", hostile_id),
        ("stats",),
        ("doctor",),
    )


def test_no_hostile_byte_reaches_the_terminal(url, hostile_id):
    for arguments in commands(hostile_id):
        status, text = Terminal(*arguments, "--store", url).end()
        assert status == 0
        assert_harmless(text)
        if arguments[0] not in ("stats", "doctor"):
            assert r"\x1b]0;title\x07" in "".join(STYLE.sub("", text).split("\n")), arguments
            assert "[red]" in text


@pytest.mark.parametrize("columns", [10, 40, 75, 76])
def test_no_hostile_byte_gets_through_in_another_layout(url, hostile_id, shown, columns):
    for arguments in commands(hostile_id):
        shown(*arguments, "--store", url, columns=columns)


def test_no_hostile_byte_reaches_a_pipe_either(url, hostile_id, capsys):
    for arguments in commands(hostile_id):
        with pytest.raises(SystemExit):
            main([*arguments, "--store", url])
        out, err = capsys.readouterr()
        assert_harmless((out + err).replace("\t", " "))
        assert arguments[0] in ("stats", "doctor") or r"\x1b]0;title\x07" in out


def test_no_hostile_byte_reaches_the_terminal_with_an_error_or_a_question(url, hostile_id):
    for arguments, status in (
        (("show", HOSTILE.replace("\0", "").replace("\ud800", "?")), 1),
        (("delete", hostile_id), 1),
    ):
        terminal = Terminal(*arguments, "--store", url)
        if arguments[0] == "delete":
            terminal.read_until("[y/N]")
            terminal.type("n\n")
        ended, text = terminal.end()
        assert ended == status
        assert_harmless(text)


def test_what_looks_like_markup_or_an_emoji_code_is_shown_as_it_is(url, store, shown):
    text = "[bold]a[/bold] [link=http://b]c[/link] [/] :smile:"
    store.write_messages("[red]id[/red]", [ChatMessage.from_user(text), ChatMessage.from_assistant(text)])
    out = shown("show", "[red]id[/red]", "--store", url)
    assert out.startswith("[red]id[/red]\n")
    assert out.count(text) == 2


def test_markdown_hides_nothing(url, store, shown):
    text = "[a link](http://target.example) ![image](http://image.example) <b>html</b> List<int> <!-- comment -->"
    store.write_messages("chat", [ChatMessage.from_assistant(text)])
    out = shown("show", "chat", "--store", url, columns=110)
    for part in ("http://target.example", "http://image.example", "<b>html</b>", "List<int>", "<!-- comment -->"):
        assert part in out


# What Python takes for printable, and nobody sees: fillers, joiners and selectors.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)


@given(text=st.text(st.characters()))
@example(text="ok\U000e0168\u3164")
def test_cleaning_leaves_what_is_harmless_and_shows_what_is_not(text):
    assert_harmless(harmless(text).replace("\t", " "))
    assert_harmless(harmless_line(text))
    assert "\n" not in harmless_line(text)
    if text.isprintable():
        assert (harmless(text) == text) == (INVISIBLE.search(text) is None)


def test_letters_and_emoji_of_several_characters_stay_whole():
    for text in ("नमस्ते", "👩‍👩‍👧‍👦", "❤️", "می‌خواهم", "e\u0301", "東京"):
        assert harmless_line(text) == text


class Screen(io.StringIO):
    def isatty(self):
        return True


def rendered(message, width=80):
    console = Console(file=Screen(), force_terminal=True, width=width, markup=False, emoji=False, highlight=False)
    time_ = datetime(2026, 1, 1, tzinfo=timezone.utc)
    print_messages(
        console,
        [ExaminedMessage(position=7, created_at=time_, role=message.role.value, message=message, faults=())],
        full=True,
    )
    return console.file.getvalue()


@settings(max_examples=number_of_examples(300), deadline=None)
@given(message=messages(), width=st.sampled_from([1, 20, 40, 110]))
def test_every_message_can_be_shown_and_is_harmless(message, width):
    assert_harmless(rendered(message, width))


@settings(max_examples=number_of_examples(500), deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            [
                *"#*_-+>|`~<>[]()!\\\n\n  \t1.:ab\x1b\x9b",
                "```",
                "&#27;",
                "&#x202e;",
                "&#12;",
                "|-|",
                "](http://x",
                "![",
                "***",
            ]
        ),
        max_size=40,
    ).map("".join)
)
def test_any_markdown_can_be_shown_and_is_harmless(text):
    assert_harmless(rendered(ChatMessage.from_assistant(text)))


# ------------------------------------------------------------------ what it looks like


def test_markdown_of_the_model_is_rendered_and_words_of_the_user_are_not(url, store, shown):
    store.write_messages("chat", [ChatMessage.from_user("**mine**"), ChatMessage.from_assistant("**yours**\nnext")])
    out = shown("show", "chat", "--store", url)
    assert re.search(r"^  \*\*mine\*\* *$", out, re.MULTILINE)
    assert re.search(r"^  yours *\n  next *$", out, re.MULTILINE)


def test_roles_positions_and_tool_calls_are_shown(url, store, shown):
    store.write_messages("chat", conversation("uct"))
    out = shown("show", "chat", "--store", url)
    assert re.search(r"^user +0 · 20..-..-.. ..:..$", out, re.MULTILINE)
    assert '  → search {"q": 1}' in out
    assert "  ← search result 2" in out


def test_it_says_how_to_go_on(url, store, shown):
    store.write_messages("chat", conversation("ua" * 10))
    at = ("--store", url)
    assert shown("show", "chat", "-n", "5", *at, beside=True) == "To go on: --before 15\n"
    assert shown("show", "chat", "-n", "5", "--after", "3", *at, beside=True) == "To go on: --after 8\n"
    assert shown("show", "chat", "-n", "5", "--before", "5", *at, beside=True) == ""
    assert shown("show", "chat", "-n", "5", "--after", "14", *at, beside=True) == ""
    first = store.list_messages("chat", limit=20)[0].message
    store.delete_messages("chat", message_ids=[first.meta["chat_message_id"]])
    assert shown("show", "chat", "-n", "19", *at, beside=True) == ""
    assert shown("ls", *at, beside=True) == ""
    store.write_messages("other", conversation("u"))
    assert shown("ls", "-n", "1", *at, beside=True) == "There are more: --limit or --all.\n"
    assert shown("search", "nothing like it", *at, beside=True).endswith("Nothing found.\n")


def test_what_a_search_found_is_marked(url, store, capsys, monkeypatch):
    store.write_messages("chat", [ChatMessage.from_user("Élan, 東京都 and snake_case.")])
    sits_before_it(monkeypatch)
    for query, marked in (("elan", ["Élan"]), ("東京", ["東京"]), ("京", ["京"]), ("case ELAN", ["Élan", "case"])):
        with pytest.raises(SystemExit):
            main(["search", query, "--store", url])
        assert re.findall(r"\x1b\[1;7m(.*?)\x1b", capsys.readouterr().out) == marked


def test_a_long_text_is_shortened_unless_asked_for(url, store, shown):
    store.write_messages("chat", [ChatMessage.from_assistant("y" * 10_001)])
    store.write_messages(
        "chat", [ChatMessage.from_user("start " + "x" * 10_000 + " end"), ChatMessage.from_user("l\n" * 90)]
    )
    out = shown("show", "chat", "--store", url)
    assert "end" not in out
    assert "… 6,010 characters more: --full" in out
    assert "… 6,001 characters more: --full" in out
    assert len(re.findall("^  l *$", out, re.MULTILINE)) == 40
    assert "end" in shown("show", "chat", "--full", "--store", url)


@pytest.mark.parametrize("columns", [40, 75, 76, 80, 200])
def test_it_fits_terminals_of_any_width(url, store, columns, shown):
    for name in ("x" * 150, "short"):
        store.write_messages(name, [ChatMessage.from_user("word " * 100), ChatMessage.from_assistant("`y` " * 100)])
        store.update_chat_history(name, title="t" * 300)
    for arguments in (("ls",), ("show", "short"), ("stats",)):
        out = shown(*arguments, "--store", url, columns=columns)
        assert max(map(len, out.split("\n"))) <= columns
    listed = shown("ls", "--store", url, columns=columns)
    assert listed.count("x") >= 150  # ids in full
    assert len(re.findall(r"20..-..-.. ..:..", listed)) == 2
    assert columns >= 76 or listed.count("t") >= 600  # where there is no room for columns, titles too


def test_an_empty_list_says_so_to_whoever_sits_before_it(url, store, shown):
    store.write_messages("chat", conversation("u"))
    for arguments, beside in (
        (("--prefix", "nobody"), ""),
        (
            ("--namespace", "empty"),
            "The namespace empty is empty. There are chat histories in: default. Choose one: --namespace NAME",
        ),
    ):
        assert shown("ls", *arguments, "--store", url) == ""
        said = shown("ls", *arguments, "--store", url, beside=True)
        assert " ".join(said.split()) == f"No chat histories. {beside}".strip()
    assert shown("ls", "--json", "--prefix", "nobody", "--store", url, beside=True) == ""


def test_wanting_colours_makes_no_terminal_of_a_file(url, store, capsys, monkeypatch):
    store.write_messages("x" * 200, [ChatMessage.from_user("needle " * 50)])
    commands = (("ls",), ("show", "x" * 200), ("search", "needle"), ("stats",), ("doctor",), ("ls", "--prefix", "none"))

    def printed():
        for arguments in commands:
            with pytest.raises(SystemExit):
                main([*arguments, "--store", url])
        out, err = capsys.readouterr()
        return STYLE.sub("", out), STYLE.sub("", err)

    plain = printed()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert printed() == plain
    assert plain[1] == ""


def test_colours_can_be_turned_off(url, store):
    store.write_messages("chat", conversation("ua"))
    colour = re.compile(r"\x1b\[(\d+;)*(3|4|9|10)[0-7]")
    assert colour.search(Terminal("show", "chat", "--store", url).end()[1])
    assert not colour.search(Terminal("show", "chat", "--store", url, NO_COLOR="1").end()[1])
    assert "\x1b" not in Terminal("show", "chat", "--store", url, TERM="dumb").end()[1]


def test_an_export_does_not_go_to_the_terminal(url, store):
    store.write_messages("chat", [ChatMessage.from_user("needle")])
    status, text = Terminal("export", "--store", url).end()
    assert status == 2
    assert "needle" not in text


def test_indexing_shows_its_progress(url):
    store = store_from_url(url, durability="normal")
    for number in range(5):
        store.write_messages(str(number), [ChatMessage.from_user(f"word {n} " * 200) for n in range(1000)])
    shown = Terminal("index", "--store", url).end()[1]
    assert "Indexing messages" in shown
    assert "All messages are indexed." in shown


def test_results_reach_a_program_while_progress_is_shown_on_the_terminal(url, path, store):
    store.write_messages("chat", conversation("ua"))
    change(path, "UPDATE haystack_chat_messages SET content = 'no JSON'")
    terminal = Terminal("doctor", "--json", "--store", url, stdout=subprocess.PIPE)
    out, _ = terminal.process.communicate(timeout=120)
    positions = [json.loads(line)["position"] for line in out.splitlines()]
    assert [position for position in positions if position is not None] == [0, 1]  # beside a fault of the search index
    status, shown_beside = terminal.end()
    assert status == 1
    assert "Checking" in shown_beside
    assert "position" not in shown_beside


def test_on_one_terminal_results_and_progress_have_lines_of_their_own(url, path, store):
    store.write_messages("chat", conversation("ua"))
    change(path, "UPDATE haystack_chat_messages SET content = 'no JSON'")
    _, text = Terminal("doctor", "--store", url).end()
    lines = re.split(r"[\r\n]", CURSOR.sub("\n", STYLE.sub("", text)))
    faults = [line for line in lines if line.startswith("fault ") and "Checking" not in line]
    assert len([fault for fault in faults if "Its stored text" in fault]) == 2


# ------------------------------------------------------------------ questions and interruptions


def test_what_was_confirmed_is_deleted(url, store):
    store.write_messages("ada:1", conversation("uaua"))
    store.write_messages("ada:2", conversation("u"))
    terminal = Terminal("delete", "--prefix", "ada:", "--store", url)
    terminal.read_until("[y/N]")
    assert b"Delete 2 chat histories with 5 messages for good?" in terminal.screen
    assert b"ada:1" in terminal.screen
    assert store.count_messages("ada:1") == 4
    terminal.type("y\n")
    status, text = terminal.end()
    assert status == 0
    assert "Deleted 2 chat histories." in text
    assert store.list_chat_histories().items == []


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [(("delete", "chat"), "\n"), (("delete", "chat"), "\x04"), (("purge", "--older-than", "1d"), "no\n")],
)
def test_what_was_not_confirmed_stays(url, path, store, arguments, answer):
    store.write_messages("chat", conversation("ua"))
    age(path, 2, "chat")
    terminal = Terminal(*arguments, "--store", url)
    terminal.read_until("[y/N]")
    terminal.type(answer)
    status, text = terminal.end()
    assert status == 1
    assert "Nothing was deleted." in text
    assert store.count_messages("chat") == 2


@pytest.mark.parametrize(
    ("arguments", "deleted"),
    [
        (("delete", "--prefix", "ada:"), "Deleted 3 chat histories."),
        (("delete", "ada:1", "ada:2"), "Deleted 1 chat history."),
        (("purge", "--older-than", "1d"), "Deleted 0 chat histories."),
    ],
)
def test_what_changed_while_the_question_waited_is_not_taken_for_deleted(url, path, store, arguments, deleted):
    for name in ("ada:1", "ada:2"):
        store.write_messages(name, conversation("ua"))
    age(path, 2, "ada:1", "ada:2")
    terminal = Terminal(*arguments, "--store", url)
    terminal.read_until("[y/N]")
    if "--prefix" in arguments:
        store.write_messages("ada:3", conversation("ua"))
    elif arguments[0] == "delete":
        store.delete_messages("ada:2")
    else:
        for name in ("ada:1", "ada:2"):
            store.write_messages(name, conversation("u"))
    terminal.type("y\n")
    status, text = terminal.end()
    assert (status, text.splitlines()[-1].endswith(deleted)) == (0, True), text


def test_an_interrupted_command_ends_quietly_with_130(url, store):
    store.write_messages("chat", conversation("ua"))
    terminal = Terminal("delete", "chat", "--store", url)
    terminal.read_until("[y/N]")
    terminal.interrupt()
    status, text = terminal.end()
    assert status == 130
    assert text.endswith("[y/N] \n")
    assert store.count_messages("chat") == 2


@pytest.mark.parametrize("arguments", [("delete", "h"), ("delete", "--prefix", "h"), ("purge", "--older-than", "1d")])
def test_branches_that_would_be_deleted_are_named(url, path, arguments):
    store, branch = branched(url)
    age(path, 2, "h", branch)
    terminal = Terminal(*arguments, "--store", url)
    terminal.read_until("[y/N]")
    assert b"Delete 2 chat histories with 8 messages for good?" in terminal.screen
    assert branch.encode() in terminal.screen
    terminal.type("y\n")
    terminal.end()
    assert store.list_chat_histories(branches=True).items == []
