# SPDX-License-Identifier: Apache-2.0
"""
The options and arguments of the commands, and the store that they name.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from haystack_chat_store.errors import StoreUnavailableError
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.sqlite import SQLiteChatMessageStore
from haystack_chat_store.urls import store_from_url

_URL_VARIABLE = "HAYSTACK_CHAT_STORE_URL"
# Whoever presses the tabulator key does not wait longer for a server, in seconds.
_COMPLETION_TIMEOUT = 2
_COMPLETED_AT_ONCE = 100


def completed_ids(context: typer.Context, incomplete: str) -> list[str]:
    """
    Return the ids of histories that begin as what was typed. None rather than an error, whatever the reason.
    """
    url = context.params.get("store") or os.environ.get(_URL_VARIABLE)
    namespace = context.params.get("namespace") or "default"
    try:
        with opened(url, namespace, timeout=_COMPLETION_TIMEOUT) as store:
            page = store.list_chat_histories(prefix=incomplete, limit=_COMPLETED_AT_ONCE)
    except Exception:  # a shell that completes a word has nowhere to show an error
        return []
    return [history.chat_history_id for history in page.items if history.chat_history_id.isprintable()]


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
    typer.Argument(
        metavar="[ID]...", help="The ids of the histories.", show_default=False, autocompletion=completed_ids
    ),
]


@contextmanager
def opened(
    url: str | None, namespace: str, *, may_create: bool = False, **settings: Any
) -> "Iterator[BaseChatMessageStore[Any]]":
    """
    Lend the store that a URL names, and close it at the end.

    :param may_create: Whether a database file that is not there is made, rather than taken for a mistake.
    :raises typer.BadParameter: If there is no URL, or it is none of a store.
    :raises StoreUnavailableError: If there is no such file.
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
    if isinstance(store, SQLiteChatMessageStore) and not may_create and not os.path.exists(store.path):
        raise StoreUnavailableError(f"There is no file {store.path}.")
    try:
        yield store
    finally:
        store.close()


def time_from(text: str) -> datetime:
    """
    Return the time that is so long ago, such as `90d`, `36h` or `2w`, or that a date in ISO 8601 names.

    :raises typer.BadParameter: If it is neither.
    """
    now = datetime.now(timezone.utc)
    age = re.fullmatch(r"([0-9]{1,6})([hdw])", text)
    if age is not None:
        unit = {"h": "hours", "d": "days", "w": "weeks"}[age[2]]
        try:
            return now - timedelta(**{unit: int(age[1])})
        except OverflowError:
            raise typer.BadParameter(f"{text} is longer ago than the calendar goes back.") from None
    try:
        return datetime.fromisoformat(re.sub("Z$", "+00:00", text)).astimezone()  # Python 3.10 knows no Z
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text} is neither an age, such as 90d, 36h or 2w, nor a date, such as 2026-01-31."
        ) from None


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
    typer.Argument(metavar="FILE", help="The file to read.", show_default=False, exists=True, dir_okay=False),
]
