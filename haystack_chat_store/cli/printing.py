# SPDX-License-Identifier: Apache-2.0
"""Prints the directory, search hits, statistics and faults."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from haystack_chat_store.cli.conversation import local_time
from haystack_chat_store.cli.terminal import is_terminal, print_plain
from haystack_chat_store.display import harmless_line, shown_size
from haystack_chat_store.doctor import ExaminedMessage
from haystack_chat_store.search_text import parsed_query, terms
from haystack_chat_store.types import ChatHistoryInfo, Fault, SearchHit, StoreStatistics, TokenUsage

# On a narrower terminal, a history takes several lines instead of a row of a table.
_MIN_TABLE_WIDTH = 76
_WIDTH_OF_COUNTS_AND_TIME = 16 + 8 + 6 + 4 * 2
_MIN_TITLE_WIDTH = 16
_MAX_BAR_WIDTH = 40
_MAX_USER_WIDTH = 16

_WORD = re.compile(r"[^\W_]+")


def plural(number: int, singular: str, plural: str) -> str:
    """Return a number and its noun."""
    return f"{number:,} {singular if number == 1 else plural}"


def amount(chat_histories: int, messages: int) -> str:
    """Return the numbers of histories and messages in words."""
    histories = plural(chat_histories, "chat history", "chat histories")
    return f"{histories} with {plural(messages, 'message', 'messages')}"


def history_fields(history: ChatHistoryInfo) -> dict[str, Any]:
    """Return the JSON object of a history."""
    return history.to_dict()


def message_fields(message: ExaminedMessage) -> dict[str, Any]:
    """Return the JSON object of a message."""
    return {
        "position": message.position,
        "created_at": message.created_at.isoformat(),
        "message": None if message.message is None else message.message.to_dict(),
        "fault": message.fault,
    }


class DirectoryPrinter:
    """Prints histories page by page. All pages have the same columns."""

    def __init__(self, console: Console) -> None:
        """Start an empty list."""
        self._console = console
        self._widths: tuple[int, int] | None = None
        self._user_width = 0

    def add(self, histories: Sequence[ChatHistoryInfo]) -> None:
        """Print more histories."""
        if not is_terminal(self._console):
            self._add_plain(histories)
        elif self._console.width < _MIN_TABLE_WIDTH:
            self._add_items(histories)
        else:
            self._add_rows(histories)

    def _add_plain(self, histories: Sequence[ChatHistoryInfo]) -> None:
        for history in histories:
            row = (
                harmless_line(history.chat_history_id),
                harmless_line(history.title or ""),
                str(history.message_count),
                str(history.round_count),
                history.updated_at.isoformat(),
                harmless_line(history.user_id or ""),
                harmless_line(history.preview or ""),
            )
            print_plain("\t".join(row))

    def _add_items(self, histories: Sequence[ChatHistoryInfo]) -> None:
        for history in histories:
            counts = plural(history.message_count, "message", "messages")
            self._console.print(Text(harmless_line(history.chat_history_id), "bold", overflow="fold"))
            if history.title or history.preview:
                self._console.print(_named(history, "fold"))
            user = f" · {harmless_line(history.user_id)}" if history.user_id else ""
            self._console.print(Text(f"{counts} · {local_time(history.updated_at)}{user}\n", "dim"))

    def _add_rows(self, histories: Sequence[ChatHistoryInfo]) -> None:
        is_first = self._widths is None
        if self._widths is None:
            users = [len(harmless_line(history.user_id)) for history in histories if history.user_id]
            self._user_width = max(min(max(users), _MAX_USER_WIDTH), len("user")) if users else 0
            room = self._console.width - _WIDTH_OF_COUNTS_AND_TIME - (self._user_width + 2 if users else 0)
            longest = max((len(harmless_line(history.chat_history_id)) for history in histories), default=0)
            id_width = max(min(longest, room - _MIN_TITLE_WIDTH, room * 2 // 3), len("id"))
            self._widths = id_width, room - id_width
        table = Table(box=None, show_header=is_first, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("id", width=self._widths[0], overflow="fold")
        table.add_column("title", width=self._widths[1], overflow="ellipsis", no_wrap=True)
        if self._user_width:
            table.add_column("user", width=self._user_width, overflow="ellipsis", no_wrap=True)
        table.add_column("messages", width=8, justify="right")
        table.add_column("rounds", width=6, justify="right")
        table.add_column("updated", width=16)
        for history in histories:
            table.add_row(
                Text(harmless_line(history.chat_history_id), "bold"),
                _named(history, "ellipsis"),
                *([Text(harmless_line(history.user_id or ""))] if self._user_width else []),
                f"{history.message_count:,}",
                f"{history.round_count:,}",
                Text(local_time(history.updated_at), "dim"),
            )
        self._console.print(table)


def _named(history: ChatHistoryInfo, overflow: Literal["fold", "ellipsis"]) -> Text:
    """Return the title of a history or, if it has none, the beginning of its first question."""
    if history.title:
        return Text(harmless_line(history.title), overflow=overflow)
    return Text(harmless_line(history.preview or ""), "italic dim", overflow=overflow)


def print_hits(console: Console, hits: Iterable[SearchHit], query: str, *, match_prefix: bool) -> None:
    """Print search hits. On a terminal, the matching words are highlighted."""
    for hit in hits:
        position = "title" if hit.position is None else str(hit.position)
        place = Text.assemble((harmless_line(hit.chat_history_id), "bold"), (f" {position}", "dim"))
        if is_terminal(console):
            console.print(place, overflow="fold")
            console.print(_highlighted(harmless_line(hit.snippet), query, match_prefix), overflow="fold")
            console.print()
        else:
            row = (harmless_line(hit.chat_history_id), position, harmless_line(hit.snippet))
            print_plain("\t".join(row))


def _highlighted(snippet: str, query: str, match_prefix: bool) -> Text:
    """
    Highlight the words of a query in a snippet. In scripts without spaces, highlight matching pairs of characters.
    """
    phrases = parsed_query(query, match_prefix=match_prefix)
    wanted = {term for phrase in phrases for term in phrase.terms}
    beginnings = tuple(phrase.terms[-1] for phrase in phrases if match_prefix and phrase.is_prefix)
    text = Text(snippet)
    for word in _WORD.finditer(snippet):
        if len(terms(word[0])) == 1:
            spans = [word.span()]
        else:
            spans = [(start, start + size) for size in (1, 2) for start in range(word.start(), word.end() + 1 - size)]
        for start, end in spans:
            found = "".join(terms(snippet[start:end])[:1])
            if found and (found in wanted or found.startswith(beginnings)):
                text.stylize("bold reverse", start, end)
    return text


def print_statistics(console: Console, statistics: StoreStatistics, sizes: Mapping[int, int], days: int) -> None:
    """
    Print totals, messages by day, and histories by size.

    :param sizes: The number of histories by their `size_class`.
    :param days: The greatest number of days to show, up to the last day with messages.
    """
    totals = Table.grid(padding=(0, 2, 0, 0))
    totals.add_column(style="dim")
    totals.add_column(justify="right")
    totals.add_row("chat histories", f"{statistics.chat_histories:,}")
    totals.add_row("messages", f"{statistics.messages:,}")
    totals.add_row("rounds", f"{statistics.rounds:,}")
    if statistics.size is not None:
        totals.add_row("database size", shown_size(statistics.size))
    console.print(totals)
    if statistics.usage:
        _print_usage(console, statistics.usage)
    if statistics.messages_per_day:
        _print_bars(console, "messages per day (UTC)", _last_days(statistics.messages_per_day, days))
    if sizes:
        _print_bars(console, "histories by messages", {_size_name(size): sizes[size] for size in sorted(sizes)})


def _print_usage(console: Console, usage: Mapping[str, TokenUsage]) -> None:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tokens of", overflow="fold")
    for name in ("prompt", "completion", "total"):
        table.add_column(name, justify="right")
    for model, each in usage.items():
        counts = (each.prompt_tokens, each.completion_tokens, each.total_tokens)
        table.add_row(Text(harmless_line(model)), *(f"{count:,}" for count in counts))
    console.print()
    console.print(table)


def size_class(message_count: int) -> int:
    """Return the smallest number of messages with as many digits: 0, 1, 10, 100 …"""
    return 10 ** (len(str(message_count)) - 1) if message_count else 0


def sizes_of(histories: Iterable[ChatHistoryInfo]) -> Mapping[int, int]:
    """Return the number of histories by their `size_class`."""
    return Counter(size_class(history.message_count) for history in histories)


def _size_name(size: int) -> str:
    return f"{size:,} to {size * 10 - 1:,}" if size else "0"


def _last_days(messages_per_day: Mapping[date, int], count: int) -> dict[str, int]:
    """
    Return the number of messages of each day, for up to `count` days before and including the last day with messages.
    """
    last = max(messages_per_day)
    first = min(day for day in messages_per_day if (last - day).days < count)
    days = (first + timedelta(days=number) for number in range((last - first).days + 1))
    return {day.isoformat(): messages_per_day.get(day, 0) for day in days}


def _print_bars(console: Console, title: str, numbers: Mapping[str, int]) -> None:
    most = max([*numbers.values(), 1])
    number_width = max(len(f"{number:,}") for number in numbers.values())
    name_width = max(map(len, numbers))
    width = max(min(_MAX_BAR_WIDTH, console.width - name_width - number_width - 5), 1)
    bar = "█" if console.encoding.startswith("utf") else "#"
    console.print()
    console.print(Text(title, "dim"))
    for name, number in numbers.items():
        length = max(round(number * width / most), 1) if number else 0
        console.print(
            Text.assemble(f"{name:>{name_width}}  ", f"{number:>{number_width},} ", (bar * length, "cyan")),
            soft_wrap=True,
        )


def fault_line(fault: Fault) -> Text:
    """Return a fault as one line."""
    place = "" if fault.chat_history_id is None else harmless_line(fault.chat_history_id)
    place += "" if fault.position is None else f" {fault.position}"
    state = ("repaired ", "green") if fault.is_repaired else ("fault    ", "red")
    return Text.assemble(state, (f"{place}: " if place else "", "bold"), harmless_line(fault.description))
