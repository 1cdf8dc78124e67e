# SPDX-License-Identifier: Apache-2.0
"""
Chat histories as Markdown, to read. Nothing in a message is taken for Markdown or HTML.
"""

import re
from collections.abc import Iterable
from typing import BinaryIO

from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.transfer.histories import Rows, TransferResult
from haystack_chat_store.transfer.readable import Part, harmless_line, shown_messages, shown_time, title_of

_SPECIAL = re.compile(r"[\\`*_\[\]<>#|~&$]|(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE)
# What would begin an address or somebody's name. GitHub looks for them after all escapes have been resolved, so only
# something between the parts keeps them apart.
_ADDRESS = re.compile(r"@(?=\S)")
_NOTHING = "<!-- -->"
# What is special only where a line begins: lists, underlines of headings.
_LINE_START = re.compile(r"^(\d*)([-+=.):])")


def write(histories: Iterable[tuple[HistoryRow, Rows]], stream: BinaryIO) -> TransferResult:
    """
    Write histories.

    :returns: What was written.
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
    """
    Return Markdown that shows this text, with its line breaks and indentation.
    """
    escaped = "\n".join(map(_escaped_line, text.split("\n")))
    return re.sub(r"(?<=[^\n])\n(?=[^\n])", "\\\\\n", escaped)


def _escaped_line(line: str) -> str:
    said = line.lstrip(" \t")
    if not said:
        return ""
    indentation = "&nbsp;" * len(line[: len(line) - len(said)].expandtabs(4))
    escaped = _LINE_START.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", said))
    return indentation + _ADDRESS.sub(f"@{_NOTHING}", escaped)
