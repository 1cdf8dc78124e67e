# SPDX-License-Identifier: Apache-2.0
"""
Export, import and copy chat histories, from any engine to any engine.

| format | export | import | |
|---|---|---|---|
| `jsonl` | yes | yes | everything, without loss: for backups and for moving (see the module `jsonl`) |
| `markdown`, `html` | yes | | for people to read |
| `openai` | yes | yes | messages in OpenAI's chat format: JSON lines, as for fine-tuning, and JSON |
| `chatgpt` | | yes | the data export of ChatGPT |
| `claude` | | yes | the data export of Claude |
| `llm` | | yes | the database of the command line tool `llm` |
| `openai-agents` | | yes | the OpenAI Agents SDK's `SQLiteSession` and `AdvancedSQLiteSession` |
| `langchain` | | yes | LangChain's `SQLChatMessageHistory`, on SQLite |
| `llama-index` | | yes | LlamaIndex's `SQLiteChatStore` and `SimpleChatStore` |

`import_messages` imports one conversation from a program of one's own.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar, get_args

from haystack.dataclasses import ChatMessage

from haystack_chat_store.errors import DamagedFileError
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.transfer import html, importers, jsonl, markdown, openai_format
from haystack_chat_store.transfer.files import atomic_file
from haystack_chat_store.transfer.given import given_history
from haystack_chat_store.transfer.histories import Faults, Histories, Progress, TransferResult, with_progress
from haystack_chat_store.transfer.stored import StoredHistories, import_into

__all__ = [
    "EXPORT_FORMATS",
    "IMPORT_FORMATS",
    "ExportFormat",
    "ImportFormat",
    "Progress",
    "TransferResult",
    "copy_histories",
    "copy_histories_async",
    "export_histories",
    "export_histories_async",
    "export_to",
    "import_histories",
    "import_histories_async",
    "import_messages",
    "import_messages_async",
]

ResultT = TypeVar("ResultT")

Store: TypeAlias = BaseChatMessageStore
File: TypeAlias = "str | os.PathLike[str]"
ExportFormat = Literal["jsonl", "markdown", "html", "openai"]
ImportFormat = Literal["jsonl", "openai", "chatgpt", "claude", "llm", "openai-agents", "langchain", "llama-index"]

EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)
IMPORT_FORMATS: tuple[str, ...] = get_args(ImportFormat)

_WRITERS = {
    "jsonl": jsonl.write,
    "markdown": markdown.write,
    "html": html.write,
    "openai": openai_format.write,
}


def export_histories(
    store: Store,
    file: File,
    *,
    format: ExportFormat = "jsonl",  # noqa: A002  (the usual name)
    chat_history_ids: Iterable[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> TransferResult:
    """
    Write chat histories to a file.

    The memory it needs does not grow with the number of histories. It does not grow with their length either, except
    in the format `"openai"`, which holds one history at a time.

    The new file replaces an old one only when it is complete and on the disk. If anything fails, the old file stays.
    Only the file's owner may read it.

    Every history that exists during the whole export is exported once. Other writers may go on: the file may or may not
    hold what they write meanwhile. Data that cannot be read is left out and reported in `faults`: a message, a title,
    or all messages of a history. An export of all histories also compares the number it has read with the number that
    the store counts, unless histories come and go all the time.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_chat_store.transfer import export_histories, import_histories

    store = InMemoryChatMessageStore()
    store.write_messages("user_456", [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    export_histories(store, "chat_histories.jsonl")
    print(import_histories(InMemoryChatMessageStore(namespace="copy"), "chat_histories.jsonl"))
    ```

    :param store: The store to export from.
    :param file: The path of the file to write.
    :param format: `"jsonl"`, without loss; `"markdown"` or `"html"`, for reading; or `"openai"`, for fine-tuning: one
        conversation a line, up to its last assistant message, without messages that the model provider rejects.
        Defaults to `"jsonl"`.
    :param chat_history_ids: The ids of the histories to export, in this order. Defaults to all histories.
    :param prefix: Export only histories whose ids begin with this literal text. Cannot be combined with
        `chat_history_ids`. Defaults to all histories.
    :param progress: Called now and then with the number of messages done and the total number. It must not call the
        store.
    :returns: The numbers of histories and messages written, and the faults.
    :raises ValueError: If an argument is wrong.
    :raises ChatHistoryNotFoundError: If one of the ids has no history. Nothing was written.
    :raises UnsupportedOperationError: If the store has no directory of histories.
    :raises ChatMessageStoreError: If the engine fails.
    :raises OSError: If the file cannot be written.
    """
    return _export(store, file, format, chat_history_ids, prefix, _Work(progress))


def export_to(
    store: Store,
    stream: BinaryIO,
    *,
    format: ExportFormat = "jsonl",  # noqa: A002
    chat_history_ids: Iterable[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> TransferResult:
    """
    Do what `export_histories` does, but write to an open stream, such as `sys.stdout.buffer`.

    :param stream: A binary stream. This function does not flush or close it.
    """
    return _export_to(store, stream, format, chat_history_ids, prefix, _Work(progress))


def import_histories(
    store: Store,
    file: File,
    *,
    format: ImportFormat = "jsonl",  # noqa: A002
    progress: Progress | None = None,
) -> TransferResult:
    """
    Read chat histories from a file into a store.

    The memory it needs grows neither with the number of histories nor with their length.

    A file in the format `"jsonl"` is first read and checked as a whole. If anything is wrong with it, nothing is
    imported. Each history becomes visible whole or not at all, with its title, meta, times, and its messages with their
    ids, in the same order. System messages are imported whatever the store's settings.

    An import can be repeated: it skips messages that the store has already. If the file continues a history of the
    store, the new messages are added. If the store continues a history of the file, the history stays as it is.

    :param store: The store to import into.
    :param file: The path of a file that `export_histories` wrote in the format `"jsonl"`, or of a file of another
        program, which is only read.
    :param format: `"jsonl"`; `"openai"` for messages in OpenAI's chat format, as JSON or JSON lines; `"chatgpt"` or
        `"claude"` for the data exports of these; `"llm"`, `"openai-agents"`, `"langchain"` or `"llama-index"` for the
        files of these libraries. Other branches of a conversation become histories `{id}~{branch}`. What cannot
        become messages is reported in `faults`. Defaults to `"jsonl"`.
    :param progress: Called now and then with the number of messages done, and the total number or `None` while it is
        not known. It must not call the store.
    :returns: The numbers of histories and messages added, the number of messages skipped, and the faults.
    :raises ValueError: If an argument is wrong.
    :raises DamagedFileError: If the file is damaged or has another format. Nothing was imported, unless the file
        changed during the import: then the histories before the damage were imported.
    :raises ChatHistoryExistsError: If the store has other messages under the ids of some histories. The error names up
        to ten of these ids. All other histories were imported.
    :raises ChatHistoryAccessError: If the store has one of the histories for another user. Histories before it may have
        been imported.
    :raises UnsupportedOperationError: If the store cannot import.
    :raises ChatMessageStoreError: If the engine fails. Each history was imported whole or not at all.
    :raises OSError: If the file cannot be read.
    """
    return _import(store, file, format, _Work(progress))


def copy_histories(
    source: Store,
    target: Store,
    *,
    chat_history_ids: Iterable[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> TransferResult:
    """
    Copy chat histories to another store, on any engine, or to another namespace.

    A copy is an export and an import without a file, and keeps the same promises. Stores on the same server must be
    able to open two connections.

    :param source: The store to copy from.
    :param target: The store to copy to.
    :param chat_history_ids: The ids of the histories to copy. Defaults to all histories.
    :param prefix: Copy only histories whose ids begin with this literal text. Cannot be combined with
        `chat_history_ids`. Defaults to all histories.
    :param progress: Called now and then with the number of messages done and the total number. It must not call the
        stores.
    :returns: The numbers of histories and messages added, the number of messages skipped, and the faults.
    :raises ValueError: If an argument is wrong.
    :raises ChatHistoryNotFoundError: If one of the ids has no history. Nothing was copied.
    :raises ChatHistoryExistsError: If the target has other messages under the ids of some histories. The error names up
        to ten of these ids. All other histories were copied.
    :raises ChatHistoryAccessError: If the target has one of the histories for another user. Histories before it
        may have been copied.
    :raises UnsupportedOperationError: If the source has no directory of histories, or the target cannot import.
    :raises ChatMessageStoreError: If an engine fails. Each history was copied whole or not at all.
    """
    return _copy(source, target, chat_history_ids, prefix, _Work(progress))


def import_messages(
    store: Store,
    chat_history_id: str,
    messages: Iterable[tuple[datetime, ChatMessage]],
    *,
    title: str | None = None,
    meta: dict[str, Any] | None = None,
    user_id: str | None = None,
) -> int:
    """
    Import one conversation, with the times at which its messages were said: from a program of one's own.

    The history becomes visible whole or not at all. A message without an id (see `with_message_ids`) gets one that is
    made from it and all messages before it. So an import can be repeated, also after the conversation went on: it adds
    what is new. System messages are imported whatever the store's settings.

    ```python
    from datetime import datetime, timezone

    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_chat_store.transfer import import_messages

    store = InMemoryChatMessageStore()
    when = datetime(2026, 1, 31, 8, 30, tzinfo=timezone.utc)
    messages = [(when, ChatMessage.from_user("Hi!")), (when, ChatMessage.from_assistant("Hello!"))]
    print(import_messages(store, "user_456", messages, title="A greeting"))
    ```

    :param store: The store to import into.
    :param chat_history_id: The id of the history.
    :param messages: The messages, oldest first, each with its time, which is an aware datetime.
    :param title: The title of the history. A history that exists keeps its own. Defaults to none.
    :param meta: The meta of the history, likewise. Defaults to none.
    :param user_id: The user that the history belongs to. Defaults to `None`: the user of the store, if it has one.
    :returns: The number of messages added.
    :raises ValueError: If an argument is wrong. If a message contains a value that cannot be stored, the error is a
        `MessageEncodingError`. Nothing was imported.
    :raises DuplicateMessageError: If two messages have the same id. Nothing was imported.
    :raises ChatHistoryExistsError: If the store has other messages under this id. Nothing was imported.
    :raises ChatHistoryAccessError: If the history is another user's, or this store belongs to another user. Nothing was
        imported.
    :raises UnsupportedOperationError: If the store cannot import, or has no users.
    :raises ChatMessageStoreError: If the engine fails. Nothing was imported.
    """
    store = _checked_store(store) if user_id is None else _checked_store(store).for_user(user_id)
    history = given_history(chat_history_id, messages, title, meta, strict=store.strict)
    return import_into(store, iter([history]), Faults()).messages


async def export_histories_async(
    store: Store,
    file: File,
    *,
    format: ExportFormat = "jsonl",  # noqa: A002
    chat_history_ids: Iterable[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> TransferResult:
    """
    Do what `export_histories` does, without blocking the event loop.

    A thread does the work and calls `progress`. If the call is cancelled, no file is written, unless it was complete
    already.
    """
    return await _on_thread(lambda work: _export(store, file, format, chat_history_ids, prefix, work), progress)


async def import_histories_async(
    store: Store,
    file: File,
    *,
    format: ImportFormat = "jsonl",  # noqa: A002
    progress: Progress | None = None,
) -> TransferResult:
    """
    Do what `import_histories` does, without blocking the event loop.

    A thread does the work and calls `progress`. If the call is cancelled, the import stops at the next batch, and the
    store has nothing of the unfinished history.
    """
    return await _on_thread(lambda work: _import(store, file, format, work), progress)


async def import_messages_async(
    store: Store,
    chat_history_id: str,
    messages: Iterable[tuple[datetime, ChatMessage]],
    *,
    title: str | None = None,
    meta: dict[str, Any] | None = None,
    user_id: str | None = None,
) -> int:
    """Do what `import_messages` does, without blocking the event loop. If it is cancelled, all or nothing is there."""
    given = list(messages)
    return await _on_thread(
        lambda _: import_messages(store, chat_history_id, given, title=title, meta=meta, user_id=user_id), None
    )


async def copy_histories_async(
    source: Store,
    target: Store,
    *,
    chat_history_ids: Iterable[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> TransferResult:
    """
    Do what `copy_histories` does, without blocking the event loop.

    A thread does the work and calls `progress`. If the call is cancelled, the copy stops at the next batch, and the
    target has nothing of the unfinished history.
    """
    return await _on_thread(lambda work: _copy(source, target, chat_history_ids, prefix, work), progress)


class _CancelledError(Exception):
    """Stops the work on the thread. It never leaves this module."""


class _Work:
    """Work under way: it reports progress, and stops when it is cancelled."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._is_cancelled = False

    @property
    def has_progress(self) -> bool:
        """Whether anything wants to know the progress. If not, nothing needs to be counted."""
        return self._progress is not None

    def cancel(self) -> None:
        """Make the work stop when it next reports progress."""
        self._is_cancelled = True

    def go_on(self) -> None:
        """Raise an error if the work is cancelled."""
        if self._is_cancelled:
            raise _CancelledError

    def report(self, done: int, total: int | None) -> None:
        self.go_on()
        if self._progress is not None:
            self._progress(done, total)


def _export(
    store: Store,
    file: File,
    format: str,  # noqa: A002
    chat_history_ids: Iterable[str] | None,
    prefix: str,
    work: _Work,
) -> TransferResult:
    _checked_format(format, EXPORT_FORMATS)
    _checked_store(store)
    with atomic_file(file, before_replacing=work.go_on) as stream:
        return _export_to(store, stream, format, chat_history_ids, prefix, work)


def _export_to(
    store: Store,
    stream: BinaryIO,
    format: str,  # noqa: A002
    chat_history_ids: Iterable[str] | None,
    prefix: str,
    work: _Work,
) -> TransferResult:
    write = _WRITERS[_checked_format(format, EXPORT_FORMATS)]
    faults = Faults()
    written = write(_exported(store, chat_history_ids, prefix, work, faults), stream)
    faults.extend(written.faults)
    return replace(written, faults=tuple(faults))


def _import(store: Store, file: File, format: str, work: _Work) -> TransferResult:  # noqa: A002
    _checked_format(format, IMPORT_FORMATS)
    _checked_store(store)
    faults = Faults()
    if format == "jsonl":
        with open(file, "rb") as stream:
            name = os.fspath(file)
            total = jsonl.verify(stream, name, work.report)
            try:
                histories = with_progress(jsonl.read(stream, name), work.report, total)
                return import_into(store, histories, faults)
            except DamagedFileError as error:
                raise DamagedFileError(f"{error} The file was changed while it was imported.") from None
    with importers.open_source(format, file) as source:
        rows = source.message_count() if work.has_progress else None
        return import_into(store, with_progress(source.histories(faults), work.report, rows), faults)


def _copy(
    source: Store, target: Store, chat_history_ids: Iterable[str] | None, prefix: str, work: _Work
) -> TransferResult:
    faults = Faults()
    return import_into(_checked_store(target), _exported(source, chat_history_ids, prefix, work, faults), faults)


def _exported(
    store: Store, chat_history_ids: Iterable[str] | None, prefix: str, work: _Work, faults: Faults
) -> Histories:
    histories = StoredHistories(_checked_store(store), chat_history_ids, prefix, faults)
    return with_progress(iter(histories), work.report, histories.message_count() if work.has_progress else None)


def _checked_format(format: str, formats: tuple[str, ...]) -> str:  # noqa: A002
    if format not in formats:
        raise ValueError(f"format must be one of {', '.join(map(repr, formats))}, got {format!r}.")
    return format


def _checked_store(store: Store) -> Store:
    if not isinstance(store, BaseChatMessageStore):
        raise ValueError(f"The store must be a BaseChatMessageStore, got {type(store).__name__}.")
    return store


async def _on_thread(function: Callable[[_Work], ResultT], progress: Progress | None) -> ResultT:
    """
    Run work on a thread.

    If the call is cancelled, the work stops when it next reports progress. The call returns after that.
    """
    work = _Work(progress)
    working = asyncio.ensure_future(asyncio.to_thread(function, work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        work.cancel()
        await asyncio.wait([working])
        working.exception()  # marks the exception as retrieved, so that asyncio does not log it
        raise
