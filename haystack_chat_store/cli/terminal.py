# SPDX-License-Identifier: Apache-2.0
"""
What reaches the terminal: nothing that it would obey.

All text that comes from a store, an argument or an error passes `harmless` or `harmless_line` before it is printed, and
all JSON `print_json`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from haystack_chat_store.transfer.readable import harmless

# Longer lines are hard to read.
_MAX_WIDTH = 110

# What an error that shows how URLs are written has in the place of a password.
_PLACEHOLDER = ":password@host:port"
_password = re.compile(
    rf"""
    (\w://) (?: (?!{_PLACEHOLDER}) . )* (?=@)                # a URL, up to its last @
    | (\w://) (?!\S*{_PLACEHOLDER}) [^\s/@]* : (?!\d) .*     # a URL that breaks off before it
    | (\w*password\s*=\s*) (?: \\?['"].* | [^\s&]*? (?=['")]*\.?(?:[\s&]|$)) )
    """,
    re.IGNORECASE | re.VERBOSE,
)


def without_passwords(text: str) -> str:
    """
    Return a text without what is, or may be, the password in a URL or another way to name a database.
    """
    return _password.sub(r"\1\2\3***", text)


def output() -> Console:
    """
    Return the console of the standard output. What is printed there is never taken for markup.
    """
    return _console(stderr=False)


def messages() -> Console:
    """
    Return the console of the standard error output, for all that is not the command's result.
    """
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    console.width = min(console.width, _MAX_WIDTH)
    return console


def is_terminal(console: Console) -> bool:
    """
    Return whether somebody sits before a console. Rich's own answer is also yes where colours are wanted in a file.
    """
    return console.file.isatty()


def print_plain(text: str) -> None:
    """
    Print harmless text for programs: as it is, lines and tabs included.
    """
    sys.stdout.write(f"{text}\n")


def print_json(data: dict[str, Any]) -> None:
    """
    Print a JSON object as one line of printable ASCII.
    """
    print_plain(json.dumps(data))


def error(message: object) -> None:
    """
    Say what went wrong.
    """
    console = messages()
    text = Text.assemble(("Error: ", "bold red"), harmless(without_passwords(str(message))))
    console.print(text, soft_wrap=not is_terminal(console))


def note(message: str) -> None:
    """
    Say something that is not part of the result, to whoever sits before the terminal.
    """
    console = messages()
    if is_terminal(console):
        console.print(Text(harmless(message), "dim"))


@contextmanager
def progress(description: str) -> "Iterator[Callable[[int, int | None], None]]":
    """
    Lend a function that is told how far something has come, and shows it: what is done, and the total, if known.

    It is shown on a terminal only, from the first call on, and gone at the end.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}", markup=False),
    )
    console = messages()
    if not (is_terminal(console) and console.is_interactive):
        yield lambda _done, _total: None
        return
    # Where results go to a program, they must not be led to the terminal, and where both go there, not into the bar.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=redirect, redirect_stderr=False) as shown:
        task = shown.add_task(description, total=None, visible=False, amount="")

        def show(done: int, total: int | None) -> None:
            amount = (f"{done:,}" if done else "") if total is None else f"{done:,} of {total:,}"
            shown.update(task, completed=done, total=total, amount=amount, visible=True)

        yield show
