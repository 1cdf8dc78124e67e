# SPDX-License-Identifier: Apache-2.0
"""
A store of one's own: each chat history is a file of JSON lines in a folder.

An engine has five operations and two ways to run one. Validation, ids, encoding, the rules of windows and the public
methods come from the base classes. This engine is for one process at a time, and rewrites a file to append to it: that
is where it falls short of the stores of this package.
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

from haystack_chat_store import BaseChatMessageStore, EncodedMessage, Engine, Scope, Window
from haystack_chat_store.rounds import window_start
from haystack_chat_store.stores.conflicts import check_count, planned

_lock = threading.Lock()


class FolderEngine(Engine[Path]):
    """
    Keeps each chat history in a file of its own. The session of its operations is the folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def run(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with _lock:
            return operation(self.folder, *arguments, **options)

    async def run_async(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self.run, operation, *arguments, **options)

    def append(
        self,
        session: Path,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        rows = _rows(session, scope, chat_history_id)
        check_count(expected_count, len(rows))
        places = {message_id: place for place, (message_id, _, _) in enumerate(rows)}
        known = {each.message_id: places[each.message_id] for each in messages if each.message_id in places}
        plan = planned(messages, known, policy)
        for place, message in plan.replaced.items():
            rows[place] = [message.message_id, message.role, message.content]
        rows += [[message.message_id, message.role, message.content] for message in plan.new]
        file = _file(session, scope, chat_history_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the file and moved over it, so that a crash leaves either the old file or the new one.
        temporary = file.with_suffix(".new")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
        os.replace(temporary, file)
        return len(plan.new) + len(plan.replaced)

    def read(self, session: Path, scope: Scope, chat_history_id: str, window: Window) -> tuple[list[str], int]:
        rows = _rows(session, scope, chat_history_id)
        start, size = window_start([role for _, role, _ in rows], window)
        return [content for _, _, content in rows[start:]], size

    def count(self, session: Path, scope: Scope, chat_history_id: str) -> int:
        return len(_rows(session, scope, chat_history_id))

    def delete(self, session: Path, scope: Scope, chat_history_id: str) -> None:
        _file(session, scope, chat_history_id).unlink(missing_ok=True)

    def delete_all(self, session: Path, scope: Scope) -> None:
        for file in (session / _name(scope.namespace)).glob("*"):
            file.unlink()


class FolderChatMessageStore(BaseChatMessageStore):
    """
    Keeps chat histories in a folder.
    """

    def __init__(self, folder: str, **settings: Any) -> None:
        """
        Create the store. `settings` are those of the base class.
        """
        super().__init__(FolderEngine(folder), **settings)
        self.folder = folder

    def settings(self) -> dict[str, Any]:
        return {"folder": self.folder, **super().settings()}

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> "FolderChatMessageStore":
        return cls(url.partition(":///")[2], **settings)  # such as folder:///chats


def _file(session: Path, scope: Scope, chat_history_id: str) -> Path:
    return session / _name(scope.namespace) / _name(chat_history_id)


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()  # a file name that any id has, and no two ids share


def _rows(session: Path, scope: Scope, chat_history_id: str) -> list[list[str]]:
    file = _file(session, scope, chat_history_id)
    return [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()] if file.exists() else []
