# SPDX-License-Identifier: Apache-2.0
"""The commands, in the order in which the help lists them."""

from collections.abc import Callable

import typer

from haystack_chat_store.cli.erasing import delete, purge
from haystack_chat_store.cli.looking import ls, namespaces, search, show, stats, title
from haystack_chat_store.cli.moving import copy, export_, import_
from haystack_chat_store.cli.upkeep import backup, doctor, index

app = typer.Typer(
    help="List, show, search, move and repair chat histories.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": ls,
    "namespaces": namespaces,
    "show": show,
    "search": search,
    "index": index,
    "backup": backup,
    "stats": stats,
    "title": title,
    "export": export_,
    "import": import_,
    "copy": copy,
    "delete": delete,
    "purge": purge,
    "doctor": doctor,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)
