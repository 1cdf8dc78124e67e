# SPDX-License-Identifier: Apache-2.0
"""Prints the messages of a history."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from textwrap import indent

from haystack.dataclasses import ChatRole
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from haystack_chat_store.cli.terminal import is_terminal, print_plain
from haystack_chat_store.display import Part, harmless, harmless_line, shown_parts
from haystack_chat_store.doctor import ExaminedMessage

# Longer texts are shortened on a terminal, unless --full is given.
_MAX_CHARACTERS = 4_000
_MAX_LINES = 40

_ROLE_STYLES = {"user": "bold cyan", "assistant": "bold green", "tool": "bold yellow", "system": "bold magenta"}
_INDENT = 2
_PLAIN_INDENT = " " * 4


def print_messages(console: Console, examined: Iterable[ExaminedMessage], *, full: bool) -> None:
    """
    Print messages: rendered on a terminal, else as plain text.

    Plain text is indented, so that the text of a message cannot look like the heading of another message.

    :param full: Whether to show long texts on a terminal without shortening them.
    """
    for message in examined:
        if is_terminal(console):
            console.print(_heading(message))
            for renderable in _rendered(message, full):
                console.print(Padding.indent(renderable, _INDENT))
            console.print()
        else:
            print_plain(f"[{message.position}] {harmless_line(message.role)} {message.created_at.isoformat()}")
            texts = [*_damage(message), *map(_text, _parts(message))]
            print_plain(indent("\n".join(text.plain for text in texts), _PLAIN_INDENT) + "\n")


def local_time(time: datetime) -> str:
    """Return a time in the local time zone, to the minute."""
    with suppress(OverflowError, ValueError):  # the first and last days of the calendar have no local time
        time = time.astimezone()
    return time.replace(tzinfo=None).isoformat(" ", "minutes")


def _heading(message: ExaminedMessage) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(overflow="fold")
    line.add_column(justify="right", no_wrap=True)
    name = message.message.name if message.message is not None else None
    line.add_row(
        Text.assemble(
            (harmless_line(message.role), _ROLE_STYLES.get(message.role, "bold")),
            f" {harmless_line(name)}" if name else "",
        ),
        Text(f"{message.position} · {local_time(message.created_at)}", "dim"),
    )
    return line


def _rendered(message: ExaminedMessage, full: bool) -> Iterator[RenderableType]:
    yield from _damage(message)
    is_markdown = message.role == ChatRole.ASSISTANT.value and message.fault is None
    for part in _parts(message):
        if is_markdown and part.kind == "text" and len(part.text) <= _MAX_CHARACTERS:
            yield _SafeMarkdown(part.text)
        else:
            yield _text(part) if full else _shortened(_text(part))


def _damage(message: ExaminedMessage) -> list[Text]:
    return [] if message.fault is None else [Text(f"This message is damaged: {message.fault}", "red")]


def _parts(message: ExaminedMessage) -> Iterator[Part]:
    return iter(()) if message.message is None else shown_parts(message.message)


def _text(part: Part) -> Text:
    if part.kind == "call":
        return Text.assemble(("→ ", "dim"), (part.name, "bold"), f" {part.text}")
    if part.kind in ("result", "error"):
        failed = ("failed: ", "bold red") if part.kind == "error" else ""
        return Text.assemble(("← ", "dim"), (part.name, "bold"), " ", failed, part.text)
    if part.kind in ("image", "file"):
        return Text(f"[{'image, ' if part.kind == 'image' else ''}{part.name}]", "blue")
    if part.kind == "refusal":
        return Text.assemble(("Refused: ", "bold red"), part.text)
    return Text(part.text, "dim italic" if part.kind == "reasoning" else "")


def _shortened(text: Text) -> Text:
    """Return the beginning of a long text, and the number of characters left out."""
    end = min(_MAX_CHARACTERS, _end_of_line(text.plain, _MAX_LINES))
    left_out = len(text.plain) - end
    if left_out <= 0:
        return text
    return Text.assemble(text[:end], (f"\n… {left_out:,} characters more: --full", "dim"))


def _end_of_line(text: str, count: int) -> int:
    end = -1
    for _ in range(count):
        end = text.find("\n", end + 1)
        if end < 0:
            return len(text)
    return end


class _PlainHeading(Heading):
    """A heading in bold, aligned left. Rich would centre it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _SafeMarkdown(Markdown):
    """Markdown that hides nothing: link targets, images and HTML are shown as written, and line breaks are kept."""

    elements = {**Markdown.elements, "heading_open": _PlainHeading}  # noqa: RUF012  (as in the base class)

    def __init__(self, text: str) -> None:
        """Parse Markdown text."""
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("image")
        self.markup = text
        self.parsed = parser.parse(text)
        _make_safe(self.parsed)


def _make_safe(tokens: Iterable[Token]) -> None:
    """Keep line breaks, and escape characters that were written as entities, such as `&#8238;`."""
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        token.content = harmless(token.content)
        token.attrs = {name: harmless(value) for name, value in token.attrs.items()}
        _make_safe(token.children or ())
