# SPDX-License-Identifier: Apache-2.0
"""
Exporting, importing and copying chat histories, from any engine to any engine.

| format | export | import | |
|---|---|---|---|
| `jsonl` | yes | yes | everything, without loss: to keep, and to move (see the module `jsonl`) |
| `markdown`, `html` | yes | | to read |
| `openai` | yes | | examples to fine-tune OpenAI's models with, as JSON lines |
| `openai-agents` | | yes | the OpenAI Agents SDK's `SQLiteSession` |
| `langchain` | | yes | LangChain's `SQLChatMessageHistory`, on SQLite |
| `llama-index` | | yes | LlamaIndex's `SQLiteChatStore` |
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import BinaryIO, Literal, TypeAlias, TypeVar, get_args

from haystack_chat_store.errors import DamagedFileError
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.transfer import html, importers, jsonl, markdown, openai_format
from haystack_chat_store.transfer.files import whole_file
from haystack_chat_store.transfer.histories import Faults, Histories, Progress, TransferResult, watched
from haystack_chat_store.transfer.stored import StoredHistories, imported

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
]

ResultT = TypeVar("ResultT")

Store: TypeAlias = BaseChatMessageStore
File: TypeAlias = "str | os.PathLike[str]"
ExportFormat = Literal["jsonl", "markdown", "html", "openai"]
ImportFormat = Literal["jsonl", "openai-agents", "langchain", "llama-index"]

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
    Write chat histories to a file, in memory that does not grow with their number nor (but for OpenAI) their length.

    The file appears when it is complete and safe on the disk; if anything fails, what was there before stays. Only its
    owner may read it.

    Each history that is there throughout is exported once. Others may go on writing: what they write meanwhile is in
    the file or not. What cannot be read is left out and reported in `faults`, whatever it is: a message, a title, or
    all messages of a history. An export of all histories also compares how many it has met with how many there are,
    unless others write all the time.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_chat_store.transfer import export_histories, import_histories

    store = InMemoryChatMessageStore()
    store.write_messages("user_456", [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    export_histories(store, "chat_histories.jsonl")
    print(import_histories(InMemoryChatMessageStore(namespace="copy"), "chat_histories.jsonl"))
    ```

    :param store: Where the histories are.
    :param file: The file to write.
    :param format: `"jsonl"`, the default, without loss; `"markdown"` or `"html"`, to read; or `"openai"`, to fine-tune
        a model: one conversation a line, up to its last assistant message, without what the model provider rejects.
    :param chat_history_ids: Which histories, in this order. Defaults to all.
    :param prefix: Only histories whose ids begin with this text, taken literally. Not both.
    :param progress: Called now and then with the number of messages done, and that of all. Must not call the stores.
    :returns: How many histories and messages were written, and what could not be read.
    :raises ValueError: If an argument is wrong.
    :raises ChatHistoryNotFoundError: If there is no history with one of the ids. Nothing was written.
    :raises UnsupportedOperationError: If the store has no directory of histories.
    :raises ChatMessageStoreError: If the engine fails.
    :raises OSError: If the file cannot be written.
    """
    _checked(format, EXPORT_FORMATS)
    with whole_file(file) as stream:
        return export_to(
            store, stream, format=format, chat_history_ids=chat_history_ids, prefix=prefix, progress=progress
        )


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
    Do what `export_histories` does, to a stream that is open, such as `sys.stdout.buffer`.

    :param stream: A binary stream. It is neither flushed nor closed.
    """
    write = _WRITERS[_checked(format, EXPORT_FORMATS)]
    faults: Faults = {}
    histories = _leaving(store, chat_history_ids, prefix, progress, faults)
    written = write(histories, stream)
    return replace(written, faults=(*faults, *written.faults))


def import_histories(
    store: Store,
    file: File,
    *,
    format: ImportFormat = "jsonl",  # noqa: A002
    progress: Progress | None = None,
) -> TransferResult:
    """
    Bring chat histories from a file into a store, in memory that does not grow with their number nor their length.

    First the whole file is read and checked; if anything is wrong with it, nothing is imported. Then each history
    becomes visible whole or not at all, with its title, meta and times, its messages with their ids, in the same order.
    System messages are imported too, whatever the store's settings.

    It can be run again: what is there already is not imported again. A history that was continued in the file gets what
    is new; one that was continued in the store stays as it is.

    :param store: Where the histories go.
    :param file: What `export_histories` wrote in the format `"jsonl"`, or another library's database, which is only
        read.
    :param format: `"jsonl"`, the default; or `"openai-agents"`, `"langchain"` or `"llama-index"`: their SQLite files.
        What they hold that cannot be a message here is reported in `faults`.
    :param progress: Called now and then with the number of messages done, and that of all, once it is known. Must not
        call the store.
    :returns: How many histories and messages were added, how many messages were there already, and what was left out.
    :raises ValueError: If an argument is wrong.
    :raises DamagedFileError: If the file is damaged or of another format. Nothing was imported; only if the file
        changes while it is imported, what came before.
    :raises ChatHistoryExistsError: If the store has other messages under the ids of some of the histories. It names
        them. All others were imported.
    :raises UnsupportedOperationError: If the store cannot import.
    :raises ChatMessageStoreError: If the engine fails. Each history was imported whole or not at all.
    :raises OSError: If the file cannot be read.
    """
    _checked(format, IMPORT_FORMATS)
    faults: Faults = {}
    if format == "jsonl":
        with open(file, "rb") as stream:
            name = os.fspath(file)
            total = jsonl.verify(stream, name, progress or _silent)
            try:
                return imported(_checked_store(store), _watched(jsonl.read(stream, name), progress, total), faults)
            except DamagedFileError as error:
                raise DamagedFileError(f"{error} It was not so before: it was changed while it was imported.") from None
    with importers.opened(format, file) as source:
        histories = _watched(source.histories(faults), progress, source.message_count())
        return imported(_checked_store(store), histories, faults)


def copy_histories(
    source: Store,
    target: Store,
    *,
    chat_history_ids: Iterable[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> TransferResult:
    """
    Copy chat histories from one store to another: of any engine, or in another namespace.

    It is an export and an import without the file between them, and keeps the same promises. Stores on the same server
    must be able to open two connections.

    :param source: Where the histories are.
    :param target: Where they go.
    :param chat_history_ids: Which histories. Defaults to all.
    :param prefix: Only histories whose ids begin with this text, taken literally. Not both.
    :param progress: Called now and then with the number of messages done, and that of all. Must not call the stores.
    :returns: How many histories and messages were added, how many messages were there already, and what could not be
        read.
    :raises ValueError: If an argument is wrong.
    :raises ChatHistoryNotFoundError: If there is no history with one of the ids. Nothing was copied.
    :raises ChatHistoryExistsError: If the target has other messages under the ids of some of the histories. It names
        them. All others were copied.
    :raises UnsupportedOperationError: If the source has no directory of histories, or the target cannot import.
    :raises ChatMessageStoreError: If an engine fails. Each history was copied whole or not at all.
    """
    faults: Faults = {}
    return imported(_checked_store(target), _leaving(source, chat_history_ids, prefix, progress, faults), faults)


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
    Do what `export_histories` does, on a thread, which also calls `progress`. If cancelled, there is no file.
    """
    return await _on_a_thread(
        lambda step: export_histories(
            store, file, format=format, chat_history_ids=chat_history_ids, prefix=prefix, progress=step
        ),
        progress,
    )


async def import_histories_async(
    store: Store,
    file: File,
    *,
    format: ImportFormat = "jsonl",  # noqa: A002
    progress: Progress | None = None,
) -> TransferResult:
    """
    Do what `import_histories` does, on a thread, which also calls `progress`.

    If cancelled, it stops at the next batch. Of the history under way nothing is stored.
    """
    return await _on_a_thread(lambda step: import_histories(store, file, format=format, progress=step), progress)


async def copy_histories_async(
    source: Store,
    target: Store,
    *,
    chat_history_ids: Iterable[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> TransferResult:
    """
    Do what `copy_histories` does, on a thread, which also calls `progress`.

    If cancelled, it stops at the next batch. Of the history under way nothing is stored.
    """
    return await _on_a_thread(
        lambda step: copy_histories(source, target, chat_history_ids=chat_history_ids, prefix=prefix, progress=step),
        progress,
    )


def _leaving(
    store: Store, chat_history_ids: Iterable[str] | None, prefix: str, progress: Progress | None, faults: Faults
) -> Histories:
    histories = StoredHistories(_checked_store(store), chat_history_ids, prefix, faults)
    return _watched(iter(histories), progress, None if progress is None else histories.message_count())


def _watched(histories: Histories, progress: Progress | None, total: int | None) -> Histories:
    return histories if progress is None else watched(histories, progress, total)


def _silent(_done: int, _total: int | None) -> None:
    pass


def _checked(format: str, formats: tuple[str, ...]) -> str:  # noqa: A002
    if format not in formats:
        raise ValueError(f"format must be one of {', '.join(map(repr, formats))}, got {format!r}.")
    return format


def _checked_store(store: Store) -> Store:
    if not isinstance(store, BaseChatMessageStore):
        raise ValueError(f"This needs a store that is a BaseChatMessageStore, got {type(store).__name__}.")
    return store


class _CancelledError(Exception):
    """
    Ends the work on the thread. Nobody sees it.
    """


async def _on_a_thread(work: Callable[[Progress], ResultT], progress: Progress | None) -> ResultT:
    """
    Do work on a thread. If cancelled, have it stop where it next reports, and wait until it has.
    """
    is_cancelled = threading.Event()

    def step(done: int, total: int | None) -> None:
        if is_cancelled.is_set():
            raise _CancelledError
        if progress is not None:
            progress(done, total)

    working = asyncio.ensure_future(asyncio.to_thread(work, step))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        is_cancelled.set()
        await asyncio.wait([working])
        working.exception()  # nobody else will ask for it
        raise
