# SPDX-License-Identifier: Apache-2.0
"""The options and arguments of the commands, and opening the store that they name."""

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
from haystack_chat_store.errors import DamagedFileError
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.urls import store_from_url

_URL_VARIABLE = "HAYSTACK_CHAT_STORE_URL"
# Seconds that a completion waits for a server.
_COMPLETION_TIMEOUT = 2
_MAX_COMPLETIONS = 100

_AGE = re.compile("([0-9]{1,6})([hdw])")
# `datetime.fromisoformat` accepts different formats in each version of Python.
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?(Z|[+-][0-9]{2}:[0-9]{2})?)?")

_STANDARD_INPUT = "-"
_GZIP_MAGIC = b"\x1f\x8b"


def completed_ids(context: typer.Context, incomplete: str) -> list[str]:
    """
    Return the ids of histories that begin with the typed text and need no quotation marks in any shell.

    After an error, there are no completions.
    """
    url = context.params.get("store") or os.environ.get(_URL_VARIABLE)
    namespace = context.params.get("namespace") or "default"
    try:
        with open_store(url, namespace, context.params.get("user"), timeout=_COMPLETION_TIMEOUT) as store:
            page = store.list_chat_histories(prefix=incomplete, limit=_MAX_COMPLETIONS)
    except Exception:  # a shell cannot show an error while it completes a word
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
User = Annotated[
    str | None,
    typer.Option("--user", metavar="ID", help="Only the histories of this user.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, one object a line.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Vacuum = Annotated[
    bool, typer.Option("--vacuum", help="Also remove the deleted data from the engine's files. This takes long.")
]
Prefix = Annotated[
    str,
    typer.Option("--prefix", metavar="TEXT", help="Only histories whose ids begin with this text.", show_default=False),
]
Branches = Annotated[bool, typer.Option("--branches", help="Also branches, which keep what was taken back.")]
HistoryId = Annotated[
    str,
    typer.Argument(metavar="ID", help="The id of the history.", show_default=False, autocompletion=completed_ids),
]
HistoryIds = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID", help="The ids of the histories.", show_default=False, autocompletion=completed_ids),
]


@contextmanager
def open_store(
    url: str | None, namespace: str, user: str | None = None, *, to_fill: bool = False, **settings: Any
) -> "Iterator[BaseChatMessageStore]":
    """
    Open the store that a URL names, and close it at the end of the block.

    :param user: The user whose histories alone the command sees, or `None` for all.
    :param to_fill: Whether the command moves histories to the store. If so, a missing database is created. Otherwise it
        is an error.
    :param settings: More settings of the store.
    :raises typer.BadParameter: If the URL is missing or wrong, or the store to fill is not durable.
    :raises StoreConfigurationError: If the database does not exist.
    """
    if not url:
        raise typer.BadParameter(
            f"Give the store with --store URL, or in the environment variable {_URL_VARIABLE}. "
            "For example: --store sqlite:///chat_history.db"
        )
    if user is not None:
        settings["user_id"] = user
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
    Return the time that a text means: an age, such as `90d`, `36h` or `2w`, or a date in ISO 8601.

    :raises typer.BadParameter: If the text is neither, or the time is not in the past.
    """
    now = datetime.now(timezone.utc)
    age = _AGE.fullmatch(text)
    try:
        if age is not None:
            unit = {"h": "hours", "d": "days", "w": "weeks"}[age[2]]
            time = now - timedelta(**{unit: int(age[1])})
        elif _DATE.fullmatch(text):
            time = datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone()  # Python 3.10 does not accept Z
        else:
            raise ValueError
    except OverflowError:
        raise typer.BadParameter(f"{text} is before the first day of the calendar. Give a shorter age.") from None
    except ValueError:
        raise typer.BadParameter(
            f"{text} is neither an age, such as 90d, 36h or 2w, nor a date, such as 2026-01-31."
        ) from None
    if time >= now:
        raise typer.BadParameter(
            f"{text} is not in the past, so every history would be deleted. To delete histories of any age, use delete."
        )
    return time


def chosen_ids(chat_history_ids: list[str] | None, prefix: str, *, or_all: bool) -> list[str] | None:
    """
    Return the ids of the named histories, or `None` to choose by the prefix.

    :param or_all: Whether neither ids nor a prefix mean all histories.
    :raises typer.BadParameter: If both ids and a prefix are given, or neither and `or_all` is False.
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
def readable_file(file: Path) -> Iterator[Path]:
    """
    Return the named file or, for a stream such as the standard input, a temporary copy. Imports read a file twice.

    Errors name the stream, not the copy.

    :raises typer.BadParameter: If the file does not exist, or is compressed.
    """
    if file.is_file():
        _refuse_compressed(file, str(file))
        yield file
        return
    is_standard_input = str(file) == _STANDARD_INPUT
    if is_standard_input and sys.stdin.isatty():
        raise typer.BadParameter("Give a file, or redirect one to the standard input.")
    if not is_standard_input and (file.is_dir() or not file.exists()):
        raise typer.BadParameter(f"{file} is a folder." if file.is_dir() else f"There is no file {file}.")
    name = "The standard input" if is_standard_input else str(file)
    with TemporaryDirectory(prefix="haystack-chat-store-") as folder:
        copy = Path(folder, "stdin")
        with copy.open("wb") as target:
            if is_standard_input:
                shutil.copyfileobj(sys.stdin.buffer, target)
            else:
                with file.open("rb") as source:
                    shutil.copyfileobj(source, target)
        _refuse_compressed(copy, name)
        try:
            yield copy
        except DamagedFileError as error:
            raise DamagedFileError(str(error).replace(str(copy), name)) from error.__cause__


def _refuse_compressed(file: Path, name: str) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC:
            raise typer.BadParameter(
                f"{name} is compressed. Uncompress it first: gunzip -c FILE | haystack-chat-store import -"
            )
