# SPDX-License-Identifier: Apache-2.0
"""The commands that show what a store has, and the one that sets a title."""

from collections.abc import Iterator
from itertools import chain
from typing import Annotated

import typer
from rich.text import Text

from haystack_chat_store.cli import terminal
from haystack_chat_store.cli.conversation import print_messages
from haystack_chat_store.cli.histories import existing, histories_of, note_other_namespaces, pages_of
from haystack_chat_store.cli.options import AsJson, Branches, HistoryId, Namespace, Prefix, Store, User, open_store
from haystack_chat_store.cli.printing import (
    DirectoryPrinter,
    history_fields,
    message_fields,
    print_hits,
    print_statistics,
    sizes_of,
)
from haystack_chat_store.display import harmless_line
from haystack_chat_store.doctor import ExaminedMessage, examine, examined_messages
from haystack_chat_store.iteration import walk_pages
from haystack_chat_store.validation import MAX_LIMIT

_DEFAULT_HISTORIES = 50
_DEFAULT_MESSAGES = 20


def ls(
    *,
    prefix: Prefix = "",
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="COUNT", min=1, help="The most to list. Defaults to 50.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="List all.")] = False,
    branches: Branches = False,
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """List histories, the latest change first."""
    if show_all and limit is not None:
        raise typer.BadParameter("Give --limit or --all, not both.")
    directory = DirectoryPrinter(terminal.output())
    listed = 0
    with open_store(store, namespace, user) as chat_store:
        for page in pages_of(chat_store, prefix, None if show_all else limit or _DEFAULT_HISTORIES, branches=branches):
            listed += len(page.items)
            if as_json:
                for history in page.items:
                    terminal.print_json(history_fields(history))
            elif page.items:
                directory.add(page.items)
        if not (listed or as_json):
            terminal.note("No chat histories.")
        if not listed:
            note_other_namespaces(chat_store)
        if page.cursor is not None:
            terminal.note("There are more: --limit or --all.")


def namespaces(*, store: Store = None, as_json: AsJson = False) -> None:
    """List the namespaces that have histories."""
    with open_store(store, "default") as chat_store:
        for name in chat_store.list_namespaces():
            if as_json:
                terminal.print_json({"namespace": name})
            else:
                terminal.output().print(Text(harmless_line(name)), soft_wrap=True)


def show(
    *,
    history: HistoryId,
    last: Annotated[
        int | None,
        typer.Option(
            "--last",
            "-n",
            metavar="COUNT",
            min=1,
            max=MAX_LIMIT,
            help="How many messages: the newest, or those nearest to the position. Defaults to 20.",
        ),
    ] = None,
    before: Annotated[
        int | None, typer.Option("--before", metavar="POSITION", min=0, help="The messages just before a position.")
    ] = None,
    after: Annotated[
        int | None, typer.Option("--after", metavar="POSITION", min=0, help="The messages just after a position.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="All messages.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Do not shorten long texts.")] = False,
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """Show the messages of a history."""
    if [before is not None, after is not None, show_all].count(True) > 1:
        raise typer.BadParameter("Give one of --before, --after and --all.")
    if show_all and last is not None:
        raise typer.BadParameter("Give --last or --all, not both.")
    limit = last or _DEFAULT_MESSAGES
    console = terminal.output()
    with open_store(store, namespace, user) as chat_store:
        info = existing(chat_store, history)
        messages: Iterator[ExaminedMessage]
        if show_all:
            messages = map(examine, chain.from_iterable(walk_pages(chat_store, history)))
        else:
            page = examined_messages(chat_store, history, before=before, after=after, limit=limit)
            messages = iter(page)
        if as_json:
            for message in messages:
                terminal.print_json(message_fields(message))
            return
        if terminal.is_terminal(console):
            console.print(Text(harmless_line(info.title or history), "bold underline"), end="\n\n")
        print_messages(console, messages, full=full)
        if not show_all and len(page) == limit:
            direction, position = ("before", page[0].position) if after is None else ("after", page[-1].position)
            if examined_messages(chat_store, history, **{direction: position}, limit=1):
                terminal.note(f"To go on: --{direction} {position}")


def search(
    *,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help='Words, and phrases in "quotation marks".', show_default=False)
    ],
    history: Annotated[
        str | None, typer.Option("--in", metavar="ID", help="Only in this history.", show_default=False)
    ] = None,
    prefix: Prefix = "",
    match_prefix: Annotated[
        bool, typer.Option("--match-prefix", help="The last word may be the beginning of a word.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MAX_LIMIT, help="The most hits to show.")] = 20,
    branches: Branches = False,
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """Find titles and messages by their words, the best match first."""
    with open_store(store, namespace, user, search=True) as chat_store:
        hits = chat_store.search_messages(
            query,
            chat_history_id=history,
            prefix=prefix,
            match_prefix=match_prefix,
            branches=branches,
            limit=limit,
        )
        if as_json:
            for hit in hits:
                terminal.print_json(hit.to_dict())
        else:
            print_hits(terminal.output(), hits, query, match_prefix=match_prefix)
        if not (hits or as_json):
            terminal.note("Nothing found.")
        if not hits:
            note_other_namespaces(chat_store)


def stats(
    *,
    prefix: Prefix = "",
    days: Annotated[int, typer.Option("--days", min=1, max=10_000, help="The most days to show.")] = 30,
    branches: Branches = False,
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """Show totals, messages by day, and histories by size."""
    with open_store(store, namespace, user) as chat_store, terminal.progress("Counting") as shown:
        shown(0, None)
        statistics = chat_store.statistics(prefix=prefix, branches=branches)
        sizes = sizes_of(histories_of(chat_store, prefix, branches=branches))
        if not statistics.chat_histories:
            note_other_namespaces(chat_store)
    if as_json:
        by_size = {str(size): sizes[size] for size in sorted(sizes)}
        terminal.print_json({**statistics.to_dict(), "chat_histories_by_message_count": by_size})
    else:
        print_statistics(terminal.output(), statistics, sizes, days)


def title(
    *,
    history: HistoryId,
    text: Annotated[str | None, typer.Argument(metavar="TITLE", help="The new title.", show_default=False)] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the title.")] = False,
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """Show the title of a history, or set it."""
    if clear and text is not None:
        raise typer.BadParameter("Give a title or --clear, not both.")
    if text is not None and not text.strip():
        raise typer.BadParameter("A title must not be empty. To remove it, use --clear.")
    with open_store(store, namespace, user) as chat_store:
        if clear or text is not None:
            info = chat_store.update_chat_history(history, title=text)
        else:
            info = existing(chat_store, history)
    if as_json:
        terminal.print_json(history_fields(info))
    elif info.title is not None:
        terminal.output().print(harmless_line(info.title), soft_wrap=True)
    else:
        terminal.note("It has no title.")
