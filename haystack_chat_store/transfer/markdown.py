# SPDX-License-Identifier: Apache-2.0
"""Chat histories as Markdown. All Markdown and HTML in messages is escaped."""

import re
from collections.abc import Iterable
from typing import BinaryIO

from haystack_chat_store.display import Part, harmless_line, shown_messages, shown_time, title_of
from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.transfer.histories import Rows, TransferResult

_SPECIAL = re.compile(r"[\\`*_\[\]<>#|~&$]|(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE)
# GitHub turns e-mail addresses and @names into links after it has resolved all escapes. Only an HTML comment after
# the @ prevents that.
_ADDRESS = re.compile(r"@(?=\S)")
_EMPTY_COMMENT = "<!-- -->"
# Special only at the beginning of a line: lists and underlines of headings.
_LINE_START = re.compile(r"^(\d*)([-+=.):])")


def write(histories: Iterable[tuple[HistoryRow, Rows]], stream: BinaryIO) -> TransferResult:
    """
    Write histories as Markdown.

    :returns: The numbers of histories and messages written.
    """
    chat_histories = messages = 0
    for history, rows in histories:
        title, chat_history_id = _escaped(title_of(history)), _escaped(harmless_line(history.chat_history_id))
        times = f"created {shown_time(history.created_at)}, changed {shown_time(history.updated_at)}"
        stream.write(f"# {title}\n\n{chat_history_id}, {times}\n\n".encode())
        for batch in rows:
            for speaker, time, parts in shown_messages(batch):
                stream.write(f"## {_escaped(speaker)}, {time}\n\n{''.join(map(_block, parts))}".encode())
            messages += len(batch)
        chat_histories += 1
    return TransferResult(chat_histories=chat_histories, messages=messages)


def _block(part: Part) -> str:
    label = f"**{_escaped(part.label)}**\n\n" if part.label else ""
    if not part.text:
        return label
    if part.kind in ("call", "result", "error"):
        return f"{label}{_fenced(part.text)}\n\n"
    text = _escaped(part.text)
    if part.kind == "reasoning":
        text = "\n".join(f"> {line}" for line in text.split("\n"))
    return f"{label}{text}\n\n"


def _fenced(text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _escaped(text: str) -> str:
    """Return Markdown that renders as this text, with its line breaks and indentation."""
    escaped = "\n".join(map(_escaped_line, text.split("\n")))
    return re.sub(r"(?<=[^\n])\n(?=[^\n])", "\\\\\n", escaped)


def _escaped_line(line: str) -> str:
    stripped = line.lstrip(" \t")
    if not stripped:
        return ""
    indentation = "&nbsp;" * len(line[: len(line) - len(stripped)].expandtabs(4))
    escaped = _LINE_START.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", stripped))
    return indentation + _ADDRESS.sub(f"@{_EMPTY_COMMENT}", escaped)
