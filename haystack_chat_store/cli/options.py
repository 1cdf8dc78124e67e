# SPDX-License-Identifier: Apache-2.0
"""
The options and arguments of the commands, and the store that they name.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from haystack_chat_store.cli.completion import is_plain
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.urls import store_from_url

_URL_VARIABLE = "HAYSTACK_CHAT_STORE_URL"
# Whoever presses the tabulator key does not wait longer for a server, in seconds.
_COMPLETION_TIMEOUT = 2
_COMPLETED_AT_ONCE = 100

_age = re.compile("([0-9]{1,6})([hdw])")
# Python's own idea of ISO 8601 grows from version to version.
_date = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?(Z|[+-][0-9]{2}:[0-9]{2})?)?")

_STANDARD_INPUT = "-"
_GZIP_MAGIC = b"\x1f\x8b"


def completed_ids(context: typer.Context, incomplete: str) -> list[str]:
    """
    Return the ids of histories that begin as what was typed, and need no quotation marks in any shell.

    None rather than an error, whatever the reason.
    """
    url = context.params.get("store") or os.environ.get(_URL_VARIABLE)
    namespace = context.params.get("namespace") or "default"
    try:
        with opened(url, namespace, timeout=_COMPLETION_TIMEOUT) as store:
            page = store.list_chat_histories(prefix=incomplete, limit=_COMPLETED_AT_ONCE)
    except Exception:  # a shell that completes a word has nowhere to show an error
        return []
    return [history.chat_history_id for history in page.items if is_plain(history.chat_history_id)]


Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        envvar=_URL_VARIABLE,
        help="The store, such as sqlite:///chat_history.db.",
        show_default=False,
    ),
]
Namespace = Annotated[str, typer.Option("--namespace", metavar="NAME", help="The namespace within the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, one object a line.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Vacuum = Annotated[
    bool, typer.Option("--vacuum", help="Have what was deleted leave the engine's files too. Takes long.")
]
Prefix = Annotated[
    str, typer.Option("--prefix", metavar="TEXT", help="Only histories whose ids begin so.", show_default=False)
]
HistoryId = Annotated[
    str,
    typer.Argument(metavar="ID", help="The id of the history.", show_default=False, autocompletion=completed_ids),
]
HistoryIds = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID", help="The ids of the histories.", show_default=False, autocompletion=completed_ids),
]


@contextmanager
def opened(
    url: str | None, namespace: str, *, to_fill: bool = False, **settings: Any
) -> "Iterator[BaseChatMessageStore]":
    """
    Lend the store that a URL names, and close it at the end.

    :param to_fill: Whether histories are moved there. A database file that is not there is then made, rather than taken
        for a mistake.
    :raises typer.BadParameter: If there is no URL, or it is none of a store, or the one to fill would not outlive us.
    :raises StoreConfigurationError: If there is no such database.
    """
    if not url:
        raise typer.BadParameter(
            f"Say which store: with --store URL, or in the environment variable {_URL_VARIABLE}. "
            "For example: --store sqlite:///chat_history.db"
        )
    try:
        store = store_from_url(url, namespace=namespace, **settings)
    except ValueError as error:
        hint = f" Did you mean sqlite:///{url}?" if "://" not in url and os.path.exists(url) else ""
        raise typer.BadParameter(f"{error}{hint}") from None
    if not to_fill:
        store.engine.check_exists()
    elif not store.engine.is_durable:
        raise typer.BadParameter(f"What is moved to {url} would be gone when this command ends.")
    try:
        yield store
    finally:
        store.close()


def time_from(text: str) -> datetime:
    """
    Return the time that is so long ago, such as `90d`, `36h` or `2w`, or that a date in ISO 8601 names.

    :raises typer.BadParameter: If it is neither, or not in the past.
    """
    now = datetime.now(timezone.utc)
    age = _age.fullmatch(text)
    try:
        if age is not None:
            unit = {"h": "hours", "d": "days", "w": "weeks"}[age[2]]
            time = now - timedelta(**{unit: int(age[1])})
        elif _date.fullmatch(text):
            time = datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone()  # Python 3.10 knows no Z
        else:
            raise ValueError
    except OverflowError:
        raise typer.BadParameter(f"{text} is longer ago than the calendar goes back.") from None
    except ValueError:
        raise typer.BadParameter(
            f"{text} is neither an age, such as 90d, 36h or 2w, nor a date, such as 2026-01-31."
        ) from None
    if time >= now:
        raise typer.BadParameter(
            f"{text} would leave nothing: it is not in the past. To delete histories whatever their age, use delete."
        )
    return time


def chosen(chat_history_ids: list[str] | None, prefix: str, *, or_all: bool) -> list[str] | None:
    """
    Return the ids of the histories that were named, or `None` for those with the prefix.

    :raises typer.BadParameter: If both were given, or neither though that does not mean all.
    """
    if chat_history_ids and prefix:
        raise typer.BadParameter("Give ids or --prefix, not both.")
    if not (chat_history_ids or prefix or or_all):
        raise typer.BadParameter("Give the ids of histories, or --prefix.")
    return list(dict.fromkeys(chat_history_ids)) if chat_history_ids else None


InputFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="The file to read, or - for the standard input.",
        show_default=False,
    ),
]


@contextmanager
def readable(file: Path) -> Iterator[Path]:
    """
    Lend the file that was named or, of a stream such as the standard input, a copy: imports read what they read twice.

    :raises typer.BadParameter: If there is none, or it is compressed.
    """
    if file.is_file():
        _refuse_compressed(file)
        yield file
        return
    is_standard_input = str(file) == _STANDARD_INPUT
    if is_standard_input and sys.stdin.isatty():
        raise typer.BadParameter("Name a file, or send one to the standard input.")
    if not is_standard_input and (file.is_dir() or not file.exists()):
        raise typer.BadParameter(f"{file} is a folder." if file.is_dir() else f"There is no file {file}.")
    with TemporaryDirectory(prefix="haystack-chat-store-") as folder:
        copy = Path(folder, "stdin")
        with copy.open("wb") as target:
            if is_standard_input:
                shutil.copyfileobj(sys.stdin.buffer, target)
            else:
                with file.open("rb") as source:
                    shutil.copyfileobj(source, target)
        _refuse_compressed(copy)
        yield copy


def _refuse_compressed(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC:
            raise typer.BadParameter(
                f"{file} is compressed. Import it so: gunzip -c FILE | haystack-chat-store import -"
            )
