# SPDX-License-Identifier: Apache-2.0
"""
Output that cannot control the terminal.

All text from a store, an argument or an error passes through `harmless` or `harmless_line` before it is printed. All
JSON passes through `print_json`.
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

from haystack_chat_store.display import harmless

# Longer lines are hard to read.
_MAX_WIDTH = 110

# Errors that show the form of a URL have this in the place of a password.
_PLACEHOLDER = ":password@host:port"
_PASSWORD = re.compile(
    rf"""
    (\w://) (?: (?!{_PLACEHOLDER}) . )* (?=@)                # a URL, up to its last @
    | (\w://) (?!\S*{_PLACEHOLDER}) [^\s/@]* : (?!\d) .*     # an incomplete URL, without its @
    | (\w*password\s*=\s*) (?: \\?['"].* | [^\s&]*? (?=['")]*\.?(?:[\s&]|$)) )
    """,
    re.IGNORECASE | re.VERBOSE,
)


def without_passwords(text: str) -> str:
    """Remove possible passwords from a text: in URLs, and after `password=`."""
    return _PASSWORD.sub(r"\1\2\3***", text)


def output() -> Console:
    """Return the console of the standard output. It does not interpret markup."""
    return _console(stderr=False)


def messages() -> Console:
    """Return the console of the standard error output, for everything except the command's result."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    console.width = min(console.width, _MAX_WIDTH)
    return console


def is_terminal(console: Console) -> bool:
    """Whether a console is a terminal. Rich's own property is also true for a file if FORCE_COLOR is set."""
    return console.file.isatty()


def print_plain(text: str) -> None:
    """Print escaped text for programs, without wrapping or colours."""
    sys.stdout.write(f"{text}\n")


def print_json(data: dict[str, Any]) -> None:
    """Print a JSON object as one line of printable ASCII."""
    print_plain(json.dumps(data))


def error(message: object) -> None:
    """Print an error, without passwords."""
    console = messages()
    text = Text.assemble(("Error: ", "bold red"), harmless(without_passwords(str(message))))
    console.print(text, soft_wrap=not is_terminal(console))


def note(message: str) -> None:
    """Print a hint that is not part of the result. It is shown on a terminal only."""
    console = messages()
    if is_terminal(console):
        console.print(Text(harmless(message), "dim"))


def warning(message: str) -> None:
    """Print what a user should know about the result, also to a file or a program."""
    console = messages()
    console.print(Text(harmless(message)), soft_wrap=not is_terminal(console))


@contextmanager
def progress(description: str) -> "Iterator[Callable[[int, int | None], None]]":
    """
    Return a function that shows progress: it takes the number done, and the total or `None` if it is not known.

    Progress is shown on a terminal only, from the first call until the end of the block.
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
    # Rich must redirect the results only if they go to the terminal too, where they would be printed into the bar.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=redirect, redirect_stderr=False) as shown:
        task = shown.add_task(description, total=None, visible=False, amount="")

        def show(done: int, total: int | None) -> None:
            amount = (f"{done:,}" if done else "") if total is None else f"{done:,} of {total:,}"
            shown.update(task, completed=done, total=total, amount=amount, visible=True)

        yield show
