# SPDX-License-Identifier: Apache-2.0
"""The commands that move histories: export, import, copy."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from haystack_chat_store import transfer
from haystack_chat_store.cli import terminal
from haystack_chat_store.cli.histories import note_other_namespaces
from haystack_chat_store.cli.options import (
    AsJson,
    HistoryIds,
    InputFile,
    Namespace,
    Prefix,
    Store,
    User,
    chosen_ids,
    open_store,
    readable_file,
)
from haystack_chat_store.cli.printing import amount, fault_line

_EXPORTED = "Exported"


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
            note_other_namespaces(chat_store)
    _report(_EXPORTED, moved, as_json, terminal.messages() if output is None else terminal.output())


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
            note_other_namespaces(source)
    _report("Copied", moved, as_json, terminal.output())


def _report(done: str, moved: transfer.TransferResult, as_json: bool, console: Console) -> None:
    """
    Print the result of a move and its faults. Faults make the command fail.

    :raises typer.Exit: If there are faults.
    """
    if as_json:
        terminal.print_json(moved.to_dict())
    else:
        # An export (in OpenAI's format) skips what a model cannot be trained on; an import skips what the store has.
        why = "cannot be trained on" if done == _EXPORTED else "were there already"
        skipped = f", {moved.skipped:,} {why}" if moved.skipped else ""
        console.print(f"{done} {amount(moved.chat_histories, moved.messages)}{skipped}.", soft_wrap=True)
    for fault in moved.faults:
        terminal.messages().print(fault_line(fault), soft_wrap=True)
    if moved.faults:
        raise typer.Exit(1)
