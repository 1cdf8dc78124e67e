# SPDX-License-Identifier: Apache-2.0
"""
Your own store: each chat history is a file of JSON lines in a folder.

An engine needs five operations, and two methods that run an operation. Validation, ids, encoding, the rules of windows
and the public methods come from the base classes. Unlike the engines of this package, this one works for one process at
a time, and rewrites a file to append to it. `own_store_directory.py` adds lists, pages and search.
"""

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import (
    BaseChatMessageStore,
    EncodedMessage,
    Engine,
    Scope,
    StoreUnavailableError,
    Window,
    WindowRows,
)
from haystack_chat_store.conversation.rounds import window_start
from haystack_chat_store.stores.conflicts import check_revision, planned
from haystack_chat_store.stores.times import microseconds_now

_lock = threading.Lock()


class FolderEngine(Engine[Path]):
    """Keeps each chat history in its own file. The session of its operations is the folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def run(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with _lock:
                return operation(self.folder, *arguments, **options)
        except OSError as error:
            raise StoreUnavailableError(f"The folder cannot be used: {error.strerror}.") from error

    async def run_async(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self.run, operation, *arguments, **options)

    def append(
        self,
        session: Path,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_revision: int | None,
    ) -> int:
        file = file_of(session, scope, chat_history_id)
        (_, revision), *rows = lines_of(file)
        brought = {message.message_id: [message.role, message.content] for message in messages}
        known = {row[0]: place for place, row in enumerate(rows) if row[0] in brought}
        equal = [message_id for message_id, place in known.items() if rows[place][1:3] == brought[message_id]]
        plan = planned(messages, known, equal, policy, expected_revision, revision)
        for place, message in plan.replaced.items():
            rows[place][1:3] = [message.role, message.content]
        rows += [[message.message_id, message.role, message.content, microseconds_now()] for message in plan.new]
        changed = len(plan.new) + len(plan.replaced)
        if not changed:  # no history is made for nothing, and the file's time stays
            return 0
        file.parent.mkdir(parents=True, exist_ok=True)
        # Write a new file and move it over the old one, so that a crash leaves either the old file or the new one.
        temporary = file.with_suffix(".new")
        first_line = [chat_history_id, (revision or deleted_revision(session, scope)) + 1]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [first_line, *rows]), encoding="ascii")
        os.replace(temporary, file)
        return changed

    def read(self, session: Path, scope: Scope, chat_history_id: str, window: Window) -> WindowRows:
        (_, revision), *rows = lines_of(file_of(session, scope, chat_history_id))
        roles = [role for _, role, *_ in rows]
        start, size = window_start(roles, window)
        return WindowRows([content for _, _, content, _ in rows[start:]], size, revision, roles.count("user"))

    def count(self, session: Path, scope: Scope, chat_history_id: str) -> int:
        return len(lines_of(file_of(session, scope, chat_history_id))) - 1

    def delete(self, session: Path, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        file = file_of(session, scope, chat_history_id)
        (_, revision), *_ = lines_of(file)
        if revision:
            check_revision(expected_revision, revision)
            # A history that begins anew has greater revisions than before.
            kept = max(revision, deleted_revision(session, scope))
            _revision_file(session, scope).write_text(str(kept), encoding="ascii")
            file.unlink()

    def delete_all(self, session: Path, scope: Scope) -> bool:
        for file in folder_of(session, scope).glob("*[!w]"):  # not what a crash left: .new
            (chat_history_id, _), *_ = lines_of(file)
            self.delete(session, scope, chat_history_id, None)
        return False


class FolderChatMessageStore(BaseChatMessageStore):
    """Keeps chat histories in a folder."""

    def __init__(self, folder: str, **settings: Any) -> None:
        """Create the store. `settings` are the settings of the base class."""
        super().__init__(FolderEngine(folder), **settings)
        self.folder = folder

    def settings(self) -> dict[str, Any]:
        return {"folder": self.folder, **super().settings()}


def folder_of(session: Path, scope: Scope) -> Path:
    return session / _hashed(scope.namespace)


def file_of(session: Path, scope: Scope, chat_history_id: str) -> Path:
    return folder_of(session, scope) / _hashed(chat_history_id)


def lines_of(file: Path) -> list[Any]:
    """
    Return id and revision of a history, then its messages: lists of id, role, content and time. Without a file, the id
    is None and the revision 0.
    """
    return (
        [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()] if file.exists() else [[None, 0]]
    )


def deleted_revision(session: Path, scope: Scope) -> int:
    file = _revision_file(session, scope)
    return int(file.read_text(encoding="ascii")) if file.exists() else 0


def _revision_file(session: Path, scope: Scope) -> Path:
    return folder_of(session, scope).with_suffix(".revision")


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()  # a valid file name for any id, different for different ids
