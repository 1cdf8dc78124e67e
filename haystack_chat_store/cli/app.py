# SPDX-License-Identifier: Apache-2.0
"""The commands."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from haystack_chat_store import doctor as diagnosis
from haystack_chat_store import transfer
from haystack_chat_store.cli import terminal
from haystack_chat_store.cli.conversation import print_messages
from haystack_chat_store.cli.options import (
    AsJson,
    Branches,
    HistoryId,
    HistoryIds,
    InputFile,
    Namespace,
    Prefix,
    Store,
    User,
    Vacuum,
    Yes,
    chosen_ids,
    open_store,
    readable_file,
    time_from,
)
from haystack_chat_store.cli.printing import (
    DirectoryPrinter,
    amount,
    fault_line,
    history_fields,
    message_fields,
    plural,
    print_hits,
    print_statistics,
    sizes_of,
)
from haystack_chat_store.display import harmless_line
from haystack_chat_store.doctor import ExaminedMessage, examine, examined_messages
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.iteration import walk_pages
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.conflicts import history_not_found
from haystack_chat_store.stores.directory import deletions_stated
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage
from haystack_chat_store.validation import MAX_LIMIT

_DEFAULT_HISTORIES = 50
_DEFAULT_MESSAGES = 20
# The question whether to delete histories names up to this many.
_MAX_NAMED = 10

EXPORTED = "Exported"

app = typer.Typer(
    help="List, show, search, move and repair chat histories.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
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
        for page in _pages(chat_store, prefix, None if show_all else limit or _DEFAULT_HISTORIES, branches=branches):
            listed += len(page.items)
            if as_json:
                for history in page.items:
                    terminal.print_json(history_fields(history))
            elif page.items:
                directory.add(page.items)
        if not (listed or as_json):
            terminal.note("No chat histories.")
        if not listed:
            _note_other_namespaces(chat_store)
        if page.cursor is not None:
            terminal.note("There are more: --limit or --all.")


@app.command()
def namespaces(*, store: Store = None, as_json: AsJson = False) -> None:
    """List the namespaces that have histories."""
    with open_store(store, "default") as chat_store:
        for name in chat_store.list_namespaces():
            if as_json:
                terminal.print_json({"namespace": name})
            else:
                terminal.output().print(Text(harmless_line(name)), soft_wrap=True)


@app.command()
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
        info = _existing(chat_store, history)
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


@app.command()
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
            _note_other_namespaces(chat_store)


@app.command()
def index(
    *,
    store: Store = None,
    namespace: Namespace = "default",
) -> None:
    """
    Make the search index, so that all messages can be searched.

    From then on, every store indexes what it writes to this database. On Redis, this holds for the namespace and for
    stores with search=True.
    """
    with (
        open_store(store, namespace, search=True) as chat_store,
        terminal.progress("Indexing messages") as shown,
    ):
        chat_store.index_messages(shown)
    terminal.output().print("All messages are indexed.")


@app.command()
def backup(
    *,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write. It must not exist.", show_default=False)
    ],
    store: Store = None,
    namespace: Namespace = "default",
) -> None:
    """
    Copy an SQLite database to a file, while others go on writing.

    The copy has all namespaces. For other engines, use their servers' own programs.
    """
    with open_store(store, namespace) as chat_store, terminal.progress("Copying") as shown:
        shown(0, None)
        chat_store.engine.run(chat_store.engine.backup, chat_store.scope, os.path.abspath(file))
    terminal.output().print(f"Wrote {harmless_line(str(file))}.", soft_wrap=True)


@app.command()
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
        sizes = sizes_of(_histories(chat_store, prefix, branches=branches))
        if not statistics.chat_histories:
            _note_other_namespaces(chat_store)
    if as_json:
        by_size = {str(size): sizes[size] for size in sorted(sizes)}
        terminal.print_json({**statistics.to_dict(), "chat_histories_by_message_count": by_size})
    else:
        print_statistics(terminal.output(), statistics, sizes, days)


@app.command()
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
            info = _existing(chat_store, history)
    if as_json:
        terminal.print_json(history_fields(info))
    elif info.title is not None:
        terminal.output().print(harmless_line(info.title), soft_wrap=True)
    else:
        terminal.note("It has no title.")


@app.command(name="export")
def export_(
    *,
    histories: HistoryIds = None,
    prefix: Prefix = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            dir_okay=False,
            show_default=False,
            help="The file to write. Defaults to the standard output.",
        ),
    ] = None,
    format_: Annotated[transfer.ExportFormat, typer.Option("--format", help="The format to write.")] = "jsonl",
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """
    Write histories to a file.

    Exports the named histories, those with a prefix, or all. Data that cannot be read is left out and reported, and the
    status is 1.
    """
    chat_history_ids = chosen_ids(histories, prefix, or_all=True)
    if output is None and as_json:
        raise typer.BadParameter("--json needs --output FILE, because it prints the result of writing that file.")
    if output is None and sys.stdout.isatty():
        raise typer.BadParameter("Give --output FILE, or redirect the standard output to a file or a program.")
    with open_store(store, namespace, user) as chat_store, terminal.progress("Exporting") as shown:
        what: dict[str, Any] = {"chat_history_ids": chat_history_ids, "prefix": prefix, "format": format_}
        if output is None:
            moved = transfer.export_to(chat_store, sys.stdout.buffer, **what, progress=shown)
        else:
            moved = transfer.export_histories(chat_store, output, **what, progress=shown)
        if not moved.chat_histories:
            _note_other_namespaces(chat_store)
    _report(EXPORTED, moved, as_json, terminal.messages() if output is None else terminal.output())


@app.command(name="import")
def import_(
    *,
    file: InputFile,
    format_: Annotated[transfer.ImportFormat, typer.Option("--format", help="The format of the file.")] = "jsonl",
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """
    Read histories from a file.

    Nothing of a damaged file is imported. Messages that the store has already are skipped, so an import can be
    repeated.
    """
    with (
        open_store(store, namespace, user, to_fill=True) as chat_store,
        readable_file(file) as source,
        terminal.progress("Importing") as shown,
    ):
        moved = transfer.import_histories(chat_store, source, format=format_, progress=shown)
    _report("Imported", moved, as_json, terminal.output())


@app.command()
def copy(
    *,
    histories: HistoryIds = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="URL", help="The store to copy to.", show_default=False)
    ] = None,
    to_namespace: Annotated[
        str | None,
        typer.Option(
            "--to-namespace",
            metavar="NAME",
            help="The namespace to copy to. Defaults to the same name.",
            show_default=False,
        ),
    ] = None,
    prefix: Prefix = "",
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """
    Copy histories to another store or namespace.

    Copies the named histories, those with a prefix, or all. Messages that the target has already are skipped, so a copy
    can be repeated.
    """
    chat_history_ids = chosen_ids(histories, prefix, or_all=True)
    if to is None and to_namespace is None:
        raise typer.BadParameter("Give --to URL, or --to-namespace NAME for the same store.")
    with (
        open_store(store, namespace, user) as source,
        open_store(to or store, to_namespace or namespace, user, to_fill=True) as target,
    ):
        if source == target:
            raise typer.BadParameter("The source and the target are the same. Choose another --to or --to-namespace.")
        with terminal.progress("Copying") as shown:
            moved = transfer.copy_histories(
                source, target, chat_history_ids=chat_history_ids, prefix=prefix, progress=shown
            )
        if not moved.chat_histories:
            _note_other_namespaces(source)
    _report("Copied", moved, as_json, terminal.output())


@app.command()
def delete(
    *,
    histories: HistoryIds = None,
    prefix: Prefix = "",
    vacuum: Vacuum = False,
    yes: Yes = False,
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """Delete the named histories, those with a prefix, or all of a user."""
    chat_history_ids = chosen_ids(histories, prefix, or_all=user is not None)
    with open_store(store, namespace, user) as chat_store:
        if chat_history_ids is None:
            found = _histories(chat_store, prefix, branches=True)
        else:
            found = iter([_existing(chat_store, history) for history in chat_history_ids])
        if not yes:
            _confirm(found)
        with terminal.progress("Deleting") as shown:
            shown(0, None)
            if chat_history_ids is None:
                erase_user = user is not None and not prefix
                deleted = (
                    chat_store.delete_user(str(user)) if erase_user else chat_store.delete_chat_histories(prefix=prefix)
                )
            else:
                deleted = 0
                for number, history in enumerate(chat_history_ids, 1):
                    deleted += chat_store.get_chat_history(history) is not None
                    chat_store.delete_messages(history)
                    shown(number, len(chat_history_ids))
            _vacuum(chat_store, vacuum)
        if not deleted:
            _note_other_namespaces(chat_store)
    _report_deleted(deleted, as_json)


@app.command()
def purge(
    *,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="An age such as 90d, 36h or 2w, or a date.")
    ],
    prefix: Prefix = "",
    vacuum: Vacuum = False,
    yes: Yes = False,
    store: Store = None,
    namespace: Namespace = "default",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """Delete histories that have not changed for a long time."""
    time = time_from(older_than)
    with open_store(store, namespace, user) as chat_store:
        if not yes:
            found = _histories(chat_store, prefix, branches=True)
            _confirm(history for history in found if history.updated_at < time)
        with terminal.progress("Deleting") as shown:
            shown(0, None)
            deleted = chat_store.purge(older_than=time, prefix=prefix)
            _vacuum(chat_store, vacuum)
        if not deleted:
            _note_other_namespaces(chat_store)
    _report_deleted(deleted, as_json)


@app.command()
def doctor(
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Repair the faults.")] = False,
    salvage: Annotated[
        Path | None,
        typer.Option(
            "--salvage",
            metavar="FILE",
            dir_okay=False,
            show_default=False,
            help="With --repair: save messages that cannot be read to this file, and remove them from the store.",
        ),
    ] = None,
    store: Store = None,
    namespace: Namespace = "default",
    as_json: AsJson = False,
) -> None:
    """
    Check a store, and report each fault.

    The status is 1 if any fault is not repaired.
    """
    if salvage is not None and not repair:
        raise typer.BadParameter("--salvage needs --repair.")
    console = terminal.output()
    found = unrepaired = 0
    with open_store(store, namespace) as chat_store, terminal.progress("Checking") as shown:
        shown(0, None)
        for fault in diagnosis.check(chat_store, repair=repair, salvage=salvage, progress=shown):
            found += fault.count
            unrepaired += 0 if fault.is_repaired else fault.count
            if as_json:
                terminal.print_json(fault.to_dict())
            else:
                console.print(fault_line(fault), soft_wrap=True)
        if not found:
            _note_other_namespaces(chat_store)
    if not as_json:
        left = f", {unrepaired:,} not repaired" if unrepaired else ""
        console.print(f"{plural(found, 'fault', 'faults')}{left}." if found else "No faults.")
    if unrepaired:
        if not repair:
            terminal.note("To repair them: --repair")
        elif salvage is None:
            terminal.note("To remove messages that cannot be read: --repair --salvage FILE")
        raise typer.Exit(1)


def _pages(
    store: BaseChatMessageStore, prefix: str, limit: int | None = None, *, branches: bool = False
) -> Iterator[ChatHistoryPage]:
    """
    Yield the pages of the directory.

    :param limit: The greatest number of histories in all. `None` for no limit.
    """
    cursor, left = None, limit
    while True:
        size = MAX_LIMIT if left is None else min(left, MAX_LIMIT)
        page = store.list_chat_histories(prefix=prefix, branches=branches, limit=size, cursor=cursor)
        yield page
        cursor = page.cursor
        if left is not None:
            left -= len(page.items)
        if cursor is None or left == 0:
            return


def _vacuum(store: BaseChatMessageStore, is_wanted: bool) -> None:
    """Remove what was deleted from the engine's files, also after a command for one user."""
    if is_wanted:
        with deletions_stated():
            store.engine.run(store.engine.vacuum, store.scope)


def _note_other_namespaces(store: BaseChatMessageStore) -> None:
    """Say where there are chat histories, if there are none in the store's namespace, unless it is one user's store."""
    if store.scope.user_id is not None:
        return
    with suppress(UnsupportedOperationError):
        names = store.list_namespaces()
        if names and store.namespace not in names:
            shown = ", ".join(map(harmless_line, names[:_MAX_NAMED]))
            more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
            terminal.warning(
                f"The namespace {harmless_line(store.namespace)} is empty. There are chat histories in: {shown}{more}. "
                "Choose one: --namespace NAME"
            )


def _histories(store: BaseChatMessageStore, prefix: str = "", *, branches: bool = False) -> Iterator[ChatHistoryInfo]:
    for page in _pages(store, prefix, branches=branches):
        yield from page.items


def _existing(store: BaseChatMessageStore, chat_history_id: str) -> ChatHistoryInfo:
    """
    Return the directory's entry of a history.

    :raises ChatHistoryNotFoundError: If there is no history with this id.
    """
    info = store.get_chat_history(chat_history_id)
    if info is None:
        raise history_not_found(chat_history_id)
    return info


def _confirm(found: Iterator[ChatHistoryInfo]) -> None:
    """
    Ask whether to delete these histories, if there are any.

    :raises typer.BadParameter: If the command does not run on a terminal.
    :raises typer.Exit: If the answer is not yes.
    """
    histories = list(found)
    if not histories:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise typer.BadParameter("Confirming the deletion needs a terminal. Without one, use --yes.")
    console = terminal.messages()
    for history in histories[:_MAX_NAMED]:
        console.print(Text(f"  {harmless_line(history.chat_history_id)}", "dim"))
    if len(histories) > _MAX_NAMED:
        console.print(Text(f"  … and {len(histories) - _MAX_NAMED:,} more", "dim"))
    messages = sum(history.message_count for history in histories)
    answer = ""
    try:
        console.print(f"Delete {amount(len(histories), messages)} for good? [y/N] ", end="")
        answer = sys.stdin.readline()
    finally:  # after an interrupt too, the next output begins on a new line
        if not answer.endswith("\n"):
            console.print()
    if answer.strip().lower() not in ("y", "yes"):
        terminal.note("Nothing was deleted.")
        raise typer.Exit(1)


def _report(done: str, moved: transfer.TransferResult, as_json: bool, console: Console) -> None:
    """
    Print the result of a move and its faults. Faults make the command fail.

    :raises typer.Exit: If there are faults.
    """
    if as_json:
        terminal.print_json(moved.to_dict())
    else:
        # An export (in OpenAI's format) skips what a model cannot be trained on; an import skips what the store has.
        why = "cannot be trained on" if done == EXPORTED else "were there already"
        skipped = f", {moved.skipped:,} {why}" if moved.skipped else ""
        console.print(f"{done} {amount(moved.chat_histories, moved.messages)}{skipped}.", soft_wrap=True)
    for fault in moved.faults:
        terminal.messages().print(fault_line(fault), soft_wrap=True)
    if moved.faults:
        raise typer.Exit(1)


def _report_deleted(chat_histories: int, as_json: bool) -> None:
    """Print how many histories were deleted. Other writers may have changed the number since the question."""
    if as_json:
        terminal.print_json({"chat_histories": chat_histories})
    else:
        terminal.output().print(f"Deleted {plural(chat_histories, 'chat history', 'chat histories')}.")
