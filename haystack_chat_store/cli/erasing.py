# SPDX-License-Identifier: Apache-2.0
"""The commands that delete histories."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.text import Text

from haystack_chat_store.cli import terminal
from haystack_chat_store.cli.histories import MAX_NAMED, existing, histories_of, note_other_namespaces, with_branches
from haystack_chat_store.cli.options import (
    AsJson,
    HistoryIds,
    Namespace,
    Prefix,
    Store,
    User,
    Vacuum,
    Yes,
    chosen_ids,
    open_store,
    time_from,
)
from haystack_chat_store.cli.printing import amount, plural
from haystack_chat_store.display import harmless_line
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.directory import deletions_stated
from haystack_chat_store.types import ChatHistoryInfo


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
    """
    Delete the named histories, those with a prefix, or all of a user.

    The branches of a named history go with it, and are counted.
    """
    chat_history_ids = chosen_ids(histories, prefix, or_all=user is not None)
    with open_store(store, namespace, user) as chat_store:
        if chat_history_ids is None:
            found = histories_of(chat_store, prefix, branches=True)
        else:
            named = [existing(chat_store, history) for history in chat_history_ids]
            found = _all_with_branches(chat_store, named)
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
                    info = chat_store.get_chat_history(history)
                    deleted += 0 if info is None else len(with_branches(chat_store, info))
                    chat_store.delete_messages(history)
                    shown(number, len(chat_history_ids))
            _vacuum_files(chat_store, vacuum)
        if not deleted:
            note_other_namespaces(chat_store)
    _report_deleted(deleted, as_json)


def _all_with_branches(store: BaseChatMessageStore, histories: list[ChatHistoryInfo]) -> Iterator[ChatHistoryInfo]:
    """Yield histories and what is deleted with them, each once."""
    going = {each.chat_history_id: each for history in histories for each in with_branches(store, history)}
    yield from going.values()


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
            found = histories_of(chat_store, prefix, branches=True)
            _confirm(history for history in found if history.updated_at < time)
        with terminal.progress("Deleting") as shown:
            shown(0, None)
            deleted = chat_store.purge(older_than=time, prefix=prefix)
            _vacuum_files(chat_store, vacuum)
        if not deleted:
            note_other_namespaces(chat_store)
    _report_deleted(deleted, as_json)


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
    for history in histories[:MAX_NAMED]:
        console.print(Text(f"  {harmless_line(history.chat_history_id)}", "dim"))
    if len(histories) > MAX_NAMED:
        console.print(Text(f"  … and {len(histories) - MAX_NAMED:,} more", "dim"))
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


def _vacuum_files(store: BaseChatMessageStore, is_wanted: bool) -> None:
    """Remove what was deleted from the engine's files, also after a command for one user."""
    if is_wanted:
        with deletions_stated():
            store.engine.run(store.engine.vacuum, store.scope)


def _report_deleted(chat_histories: int, as_json: bool) -> None:
    """Print how many histories were deleted. Other writers may have changed the number since the question."""
    if as_json:
        terminal.print_json({"chat_histories": chat_histories})
    else:
        terminal.output().print(f"Deleted {plural(chat_histories, 'chat history', 'chat histories')}.")
