# SPDX-License-Identifier: Apache-2.0
"""The commands for a database as a whole: index, backup, doctor."""

import os
from pathlib import Path
from typing import Annotated

import typer

from haystack_chat_store import doctor as diagnosis
from haystack_chat_store.cli import terminal
from haystack_chat_store.cli.histories import note_other_namespaces
from haystack_chat_store.cli.options import AsJson, Namespace, Store, open_store
from haystack_chat_store.cli.printing import fault_line, plural
from haystack_chat_store.display import harmless_line


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
            note_other_namespaces(chat_store)
    if not as_json:
        left = f", {unrepaired:,} not repaired" if unrepaired else ""
        console.print(f"{plural(found, 'fault', 'faults')}{left}." if found else "No faults.")
    if unrepaired:
        if not repair:
            terminal.note("To repair them: --repair")
        elif salvage is None:
            terminal.note("To remove messages that cannot be read: --repair --salvage FILE")
        raise typer.Exit(1)
