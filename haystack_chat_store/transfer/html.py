# SPDX-License-Identifier: Apache-2.0
"""Chat histories as one HTML page. It loads nothing from elsewhere, and all text of messages is escaped."""

from collections.abc import Iterable
from html import escape
from typing import BinaryIO

from haystack_chat_store.display import Part, harmless_line, shown_messages, shown_time, title_of
from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.transfer.histories import Rows, TransferResult

_BEGINNING = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chat histories</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 3rem 0 0; overflow-wrap: anywhere; }
header p, time { opacity: .65; font-size: .85rem; margin: 0; overflow-wrap: anywhere; }
article { border-top: 1px solid var(--line); padding: .75rem 0; }
article.user { border-inline-start: 3px solid light-dark(#2563eb, #7aa2f7); padding-inline-start: 1rem; }
h2 { font-size: .95rem; margin: 0; display: flex; justify-content: space-between; gap: 1rem; overflow-wrap: anywhere; }
p, pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
pre { font: .85rem/1.45 ui-monospace, monospace; background: color-mix(in srgb, currentColor 6%, transparent);
  padding: .6rem .8rem; border-radius: .4rem; }
figcaption, summary { font-size: .85rem; opacity: .75; overflow-wrap: anywhere; }
figure { margin: .5rem 0; }
</style>
</head>
<body>
"""
_END = "</body>\n</html>\n"


def write(histories: Iterable[tuple[HistoryRow, Rows]], stream: BinaryIO) -> TransferResult:
    """
    Write histories as an HTML page.

    :returns: The numbers of histories and messages written.
    """
    chat_histories = messages = 0
    stream.write(_BEGINNING.encode())
    for history, rows in histories:
        times = f"created {shown_time(history.created_at)}, changed {shown_time(history.updated_at)}"
        stream.write(
            f"<section>\n<header>\n<h1>{escape(title_of(history))}</h1>\n"
            f"<p>{escape(harmless_line(history.chat_history_id))}, {times}</p>\n</header>\n".encode()
        )
        for batch in rows:
            for row, (speaker, time, parts) in zip(batch, shown_messages(batch), strict=True):
                stream.write(
                    f'<article class="{escape(row.role)}">\n<h2>{escape(speaker)} <time>{time}</time></h2>\n'
                    f"{''.join(map(_element, parts))}</article>\n".encode()
                )
            messages += len(batch)
        stream.write(b"</section>\n")
        chat_histories += 1
    stream.write(_END.encode())
    return TransferResult(chat_histories=chat_histories, messages=messages)


def _element(part: Part) -> str:
    label, text = escape(part.label), escape(part.text)
    if part.kind == "text":
        return f"<p>{text}</p>\n"
    if part.kind == "reasoning":
        return f"<details><summary>{label}</summary><p>{text}</p></details>\n"
    if part.kind == "refusal":
        return f"<figure><figcaption>{label}</figcaption><p>{text}</p></figure>\n"
    body = f"<pre>\n{text}</pre>" if text else ""  # HTML ignores a line feed right after <pre>
    return f"<figure><figcaption>{label}</figcaption>{body}</figure>\n"
