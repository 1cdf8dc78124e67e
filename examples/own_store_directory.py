# SPDX-License-Identifier: Apache-2.0
"""
Your own store with lists, pages and search: more operations for the engine of `own_store.py`.

Each operation makes more of the store's methods and of the command line work:

| operation | methods | commands |
|---|---|---|
| `history` | `get_chat_history` | `show`, `title`, `delete ID` (with `page`) |
| `histories`, `histories_by_id` | `list_chat_histories` | `ls`, `export` (with `page`), `copy` |
| `page` | `list_messages`, `iterate_messages` | `show` |
| `search`, `search_titles` | `search_messages`, of a store made with `search=True` | `search` |
| `update_history` | `update_chat_history` | `title` |
| `statistics`, `erase_some` | `statistics`, `purge`, `delete_chat_histories` | `stats`, `purge`, `delete` |
| `import_history`, `check` | importing and checking | `import`, `copy --to`, `doctor` |

The URL `folder:///chats` names this
store in a project that registers it:

    [project.entry-points."haystack_chat_store.engines"]
    folder = "own_store_directory:SearchableFolderChatMessageStore"

Then `haystack-chat-store ls --store folder:///chats` lists the histories in the folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from own_store import FolderEngine, file_of, folder_of, lines_of

from haystack_chat_store import BaseChatMessageStore, FoundRow, HistoryRow, MessageRow, Scope
from haystack_chat_store.search_text import Phrase, matches, searchable_text_of_content, terms


class SearchableFolderEngine(FolderEngine):
    """Adds the directory, pages and search to `FolderEngine`. Lists and search read every file."""

    def history(self, session: Path, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        file = file_of(session, scope, chat_history_id)
        return _history_row(file) if file.exists() else None

    def histories(
        self, session: Path, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        rows = sorted(_rows(session, scope, prefix), key=_time_and_id, reverse=True)
        return [row for row in rows if before is None or _time_and_id(row) < before][:limit]

    def histories_by_id(self, session: Path, scope: Scope, prefix: str, after: str, limit: int) -> list[HistoryRow]:
        rows = sorted(_rows(session, scope, prefix), key=lambda row: row.chat_history_id)
        return [row for row in rows if row.chat_history_id > after][:limit]

    def page(
        self, session: Path, scope: Scope, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        rows = _message_rows(file_of(session, scope, chat_history_id))
        return rows[after + 1 :][:limit] if after is not None else rows[:before][-limit:]

    def search(
        self,
        session: Path,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[FoundRow]:
        found = [
            FoundRow(
                chat_history_id=history.chat_history_id,
                position=row.position,
                message_id=row.message_id,
                role=row.role,
                created_at=row.created_at,
                content=row.content,
                score=sum(map(words.count, (term for phrase in phrases for term in phrase.terms))) / len(words),
            )
            for history in _rows(session, scope, prefix)
            if chat_history_id in (None, history.chat_history_id)
            for row in _message_rows(file_of(session, scope, history.chat_history_id))
            if matches(phrases, words := terms(searchable_text_of_content(row.content)))
        ]
        return sorted(found, key=lambda row: row.score, reverse=True)[:limit]

    def search_titles(self, *_: Any) -> list[HistoryRow]:
        return []  # without `update_history`, no history has a title


class SearchableFolderChatMessageStore(BaseChatMessageStore):
    """Keeps chat histories in a folder, with lists, pages and search."""

    def __init__(self, folder: str, **settings: Any) -> None:
        """Create the store. `settings` are the settings of the base class."""
        super().__init__(SearchableFolderEngine(folder), **settings)
        self.folder = folder

    def settings(self) -> dict[str, Any]:
        return {"folder": self.folder, **super().settings()}

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> "SearchableFolderChatMessageStore":
        return cls(url.partition(":///")[2], **settings)  # folder:///relative, folder:////absolute


def _rows(session: Path, scope: Scope, prefix: str) -> Iterator[HistoryRow]:
    rows = map(_history_row, folder_of(session, scope).glob("*[!w]"))  # not what a crash left: .new
    return (row for row in rows if row.chat_history_id.startswith(prefix))


def _history_row(file: Path) -> HistoryRow:
    (chat_history_id, revision), *messages = lines_of(file)
    return HistoryRow(
        chat_history_id=chat_history_id,
        message_count=len(messages),
        round_count=sum(role == "user" for _, role, _, _ in messages),
        created_at=messages[0][3],
        # The clock of files may be some milliseconds behind.
        updated_at=max(file.stat().st_mtime_ns // 1000, messages[-1][3]),
        revision=revision,
    )


def _message_rows(file: Path) -> list[MessageRow]:
    _, *messages = lines_of(file)
    return [
        MessageRow(position=position, created_at=created_at, message_id=message_id, role=role, content=content)
        for position, (message_id, role, content, created_at) in enumerate(messages)
    ]


def _time_and_id(row: HistoryRow) -> tuple[int, str]:
    return row.updated_at, row.chat_history_id
