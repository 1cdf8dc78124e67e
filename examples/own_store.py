# SPDX-License-Identifier: Apache-2.0
"""
A store of one's own: each chat history is a file of JSON lines in a folder.

It shows all there is to write: how an operation is run, and the five operations. Validation, ids, encoding, windows and
the public methods come from the base class. It is for one process at a time, and rewrites a file to append to it, which
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

from haystack_chat_store import BaseChatMessageStore, EncodedMessage, Window

Row = tuple[str, str, str]  # message id, role, content
_lock = threading.Lock()


class FolderChatMessageStore(BaseChatMessageStore[Path]):
    """
    Keeps each chat history in a file of its own.
    """

    def __init__(self, folder: str, **settings: Any) -> None:
        """
        Keep the settings. `settings` are those of the base class.
        """
        super().__init__(**settings)
        self.folder = folder

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings.
        """
        return self._settings_to_dict(folder=self.folder)

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        with _lock:
            session = Path(self.folder) / _file_name(self.namespace)
            session.mkdir(parents=True, exist_ok=True)
            return operation(session, *arguments)

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(self._run, operation, *arguments)

    def _write(self, session: Path, chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        file = session / _file_name(chat_history_id)
        rows = _rows(file)
        known = {message_id for message_id, _, _ in rows}
        new = [(m.message_id, m.role, m.content) for m in messages if m.message_id not in known]
        # Written beside it and moved over it, so that a crash leaves either the old file or the new one.
        temporary = file.with_suffix(".new")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *new]), encoding="ascii")
        os.replace(temporary, file)
        return len(new)

    def _read(self, session: Path, chat_history_id: str, window: Window) -> tuple[list[str], int]:
        rows = _rows(session / _file_name(chat_history_id))
        start, size = _start_and_size(rows, window)
        return [content for _, _, content in rows[start:]], size

    def _count(self, session: Path, chat_history_id: str) -> int:
        return len(_rows(session / _file_name(chat_history_id)))

    def _delete(self, session: Path, chat_history_id: str) -> None:
        (session / _file_name(chat_history_id)).unlink(missing_ok=True)

    def _delete_all(self, session: Path) -> None:
        for file in session.iterdir():
            file.unlink()


def _file_name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()  # a file name that any id has, and no two ids share


def _rows(file: Path) -> list[Row]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()]


def _start_and_size(rows: Sequence[Row], window: Window) -> tuple[int, int]:
    if window.count is None:
        return 0, len(rows)
    if window.unit == "round":
        starts = [index for index, (_, role, _) in enumerate(rows) if role == "user"]
        size = window.size(len(starts))
        return (starts[-size] if size <= len(starts) else 0), size
    size = window.size(len(rows))
    start = max(len(rows) - size, 0)
    while start > 0 and rows[start][1] == "tool":
        start -= 1
    return start, size
