# SPDX-License-Identifier: Apache-2.0
import asyncio
import heapq
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.search_text import Phrase, matches, searchable_text_of_content, terms
from haystack_chat_store.stores.arguments import time_of
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.in_memory.histories import History, Namespace, Stored
from haystack_chat_store.stores.in_memory.search_index import SearchIndex
from haystack_chat_store.stores.operations import (
    UNCHANGED,
    EncodedMessage,
    FoundRow,
    HistoryRow,
    MessageRow,
    Unchanged,
    changed_meanwhile,
    has_messages,
    no_history,
    not_found,
    planned,
)
from haystack_chat_store.types import Fault, StoreStatistics

_namespaces: dict[str, Namespace] = {}
# One lock for all. Reentrant, for an operation may be interrupted by a signal handler or a finalizer of the same thread
# that writes, too.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child gets the histories as they were between two operations
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
# The calls that hold the lock for long, or wait to do so. An event loop does not wait for them.
_long_calls: set[object] = set()


class InMemoryChatMessageStore(BaseChatMessageStore[Namespace]):
    """
    Keeps chat histories in the memory of the process, for tests, notebooks and conversations that need not last.

    All stores of a namespace in one process hold the same histories, so that the writer and the retriever of a
    pipeline that was loaded from YAML see each other's messages. They last as long as the process.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore

    store = InMemoryChatMessageStore()
    store.write_messages("user_456", [ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    print(store.retrieve_messages("user_456"))
    ```
    """

    def __init__(
        self,
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        *,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
        search: bool = False,
    ) -> None:
        """
        Create the store.

        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Which of the process's sets of histories this store holds. Defaults to `"default"`.
        :param search: Whether messages can be searched. The index takes several times the memory of the messages; it is
            made by the first search. Defaults to False.
        :raises ValueError: If a setting is not one of these.
        """
        super().__init__(skip_system_messages, last_k, last_k_unit=last_k_unit, namespace=namespace, search=search)

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings. The histories are not among them.
        """
        return self._settings_to_dict()

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        if operation == self._import:  # what it imports may come slowly, from a file or another store
            history, batches, expected_count = arguments
            arguments = (history, list(batches), expected_count)
        if self._is_brief(operation):
            return self._run_now(operation, *arguments)
        call = object()
        try:
            _long_calls.add(call)
            return self._run_now(operation, *arguments)
        finally:
            _long_calls.discard(call)

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        if self._is_brief(operation) and not _long_calls:
            return self._run_now(operation, *arguments)
        return await asyncio.to_thread(self._run, operation, *arguments)

    def _run_now(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        with _lock:
            return operation(_namespaces.setdefault(self.namespace, Namespace()), *arguments)

    def _is_brief(self, operation: Callable[..., Any]) -> bool:
        """
        Whether an operation looks at no more than it returns. Others may look at every message.
        """
        return operation in (self._write, self._read, self._count, self._page, self._history)

    def _write(self, session: Namespace, chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        now = _now()
        history = session.histories.setdefault(chat_history_id, History(now))
        known = history.known(messages)
        new = [_stored(message, now) for message in messages if message.message_id not in known]
        if new:
            session.index.unindexed.setdefault(chat_history_id, len(history.messages))
            history.append(new, now)
        return len(new)

    def _read(self, session: Namespace, chat_history_id: str, window: Window) -> tuple[list[str], int]:
        history = session.find(chat_history_id)
        return ([], 0) if history is None else history.read(window)

    def _count(self, session: Namespace, chat_history_id: str) -> int:
        history = session.find(chat_history_id)
        return 0 if history is None else history.count()

    def _delete(self, session: Namespace, chat_history_id: str) -> None:
        session.put(chat_history_id, None)

    def _delete_all(self, session: Namespace) -> None:
        session.histories, session.index = {}, SearchIndex()

    def _write_checked(
        self,
        session: Namespace,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        now = _now()
        history = session.find(chat_history_id) or History(now)
        if expected_count not in (None, history.count()):
            raise changed_meanwhile(expected_count, history.count())
        new, replaced = planned(messages, history.known(messages), policy)
        if new and not replaced:
            return self._write(session, chat_history_id, new)
        if replaced:
            times = {position: message.created_at for position in replaced if (message := history.messages[position])}
            changes = {position: _stored(message, times[position]) for position, message in replaced.items()}
            session.put(chat_history_id, history.changed(now, changes, [_stored(m, now) for m in new]))
        return len(new) + len(replaced)

    def _delete_some(
        self, session: Namespace, chat_history_id: str, message_ids: Sequence[str] | None, from_message_id: str | None
    ) -> None:
        history = session.find(chat_history_id)
        positions = {} if history is None else history.caught_up().positions
        if from_message_id is not None:
            if from_message_id not in positions:
                raise not_found(from_message_id)
            gone = [position for position in positions.values() if position >= positions[from_message_id]]
        else:
            gone = [positions[message_id] for message_id in message_ids or () if message_id in positions]
        self._remove(session, chat_history_id, gone)

    def _copy(self, session: Namespace, source_id: str, target_id: str, until_message_id: str | None) -> int:
        source, target = session.find(source_id), session.find(target_id)
        if source is None:
            raise no_history(source_id)
        if until_message_id is not None and until_message_id not in source.caught_up().positions:
            raise not_found(until_message_id)
        if target is not None and target.count():
            raise has_messages(target_id)
        end = len(source.messages) if until_message_id is None else source.positions[until_message_id] + 1
        copied = [message for message in source.messages[:end] if message is not None]
        if not copied:
            return 0
        now = _now()
        session.put(target_id, (target or History(now)).changed(now, {}, copied))
        return len(copied)

    def _import(
        self, session: Namespace, history: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_count: int
    ) -> int:
        target = session.find(history.chat_history_id)
        count = 0 if target is None else target.count()
        if count != expected_count:
            raise changed_meanwhile(expected_count, count)
        imported = [Stored(*row[1:]) for rows in batches for row in rows]
        if target is None:
            target = History(history.created_at, title=history.title, meta=history.meta, is_kept=True)
        updated_at = max(target.updated_at, history.updated_at)
        session.put(history.chat_history_id, target.changed(updated_at, {}, imported))
        return len(imported)

    def _import_several(self, session: Namespace, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]) -> int:
        for history, _ in histories:
            there = session.find(history.chat_history_id)
            if there is not None:
                raise changed_meanwhile(0, there.count())
        return sum(self._import(session, history, [rows], 0) for history, rows in histories)

    def _history(self, session: Namespace, chat_history_id: str) -> HistoryRow | None:
        history = session.find(chat_history_id)
        return None if history is None else history.row(chat_history_id)

    def _histories(
        self, session: Namespace, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        keys = (
            (history.updated_at, chat_history_id)
            for chat_history_id, history in session.histories.items()
            if history.is_there and chat_history_id.startswith(prefix)
        )
        wanted = heapq.nlargest(limit, keys if before is None else (key for key in keys if key < before))
        return [session.histories[chat_history_id].row(chat_history_id) for _, chat_history_id in wanted]

    def _histories_by_id(self, session: Namespace, prefix: str, after: str, limit: int) -> list[HistoryRow]:
        wanted = heapq.nsmallest(limit, (key for key in self._with_prefix(session, prefix) if key > after))
        return [session.histories[chat_history_id].row(chat_history_id) for chat_history_id in wanted]

    def _update_history(
        self, session: Namespace, chat_history_id: str, title: str | Unchanged | None, meta: str | Unchanged | None
    ) -> HistoryRow | None:
        history = session.find(chat_history_id)
        if history is None:
            return None
        title = history.title if title is UNCHANGED else title
        meta = history.meta if meta is UNCHANGED else meta
        session.histories[chat_history_id] = replace(history, title=title, meta=meta)
        return session.histories[chat_history_id].row(chat_history_id)

    def _page(
        self, session: Namespace, chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        history = session.find(chat_history_id)
        return [] if history is None else history.page(before, after, limit)

    def _search(
        self, session: Namespace, phrases: Sequence[Phrase], chat_history_id: str | None, prefix: str, limit: int
    ) -> list[FoundRow] | None:
        if session.index.unindexed:
            return None
        found = []
        for place in session.index.candidates(phrases):
            if not place[0].startswith(prefix) or chat_history_id not in (None, place[0]):
                continue
            message = session.histories[place[0]].messages[place[1]]
            words = terms(searchable_text_of_content(message.content)) if message is not None else []
            if message is not None and matches(phrases, words):
                counts = Counter(words)
                score = sum(counts[term] for phrase in phrases for term in phrase.terms) / len(words)
                found.append(FoundRow(*place, message.message_id, message.content, score))
        return heapq.nlargest(limit, found, key=lambda row: row.score)

    def _index_some(self, session: Namespace, limit: int) -> bool:
        unindexed = session.index.unindexed
        for chat_history_id, start in list(unindexed.items()):
            messages = session.histories[chat_history_id].messages
            for position in range(start, min(start + limit, len(messages))):
                message = messages[position]
                if message is not None:
                    session.index.add((chat_history_id, position), searchable_text_of_content(message.content))
            limit -= len(messages) - start
            if limit < 0:
                unindexed[chat_history_id] = len(messages) + limit
                break
            del unindexed[chat_history_id]
        return bool(unindexed)

    def _statistics(self, session: Namespace, prefix: str) -> StoreStatistics:
        rows = [session.histories[each].row(each) for each in self._with_prefix(session, prefix)]
        days = Counter(
            time_of(message.created_at).date()
            for row in rows
            for message in session.histories[row.chat_history_id].messages
            if message is not None
        )
        messages, rounds = sum(row.message_count for row in rows), sum(row.round_count for row in rows)
        return StoreStatistics(len(rows), messages, rounds, None, dict(sorted(days.items())))

    def _erase_some(self, session: Namespace, prefix: str, updated_before: int | None, limit: int) -> int:
        erased = [
            chat_history_id
            for chat_history_id in self._with_prefix(session, prefix)
            if updated_before is None or session.histories[chat_history_id].updated_at < updated_before
        ][:limit]
        for chat_history_id in erased:
            self._delete(session, chat_history_id)
        return len(erased)

    def _vacuum(self, session: Namespace) -> None:
        pass  # nothing is left of what was deleted

    def _faults(self, session: Namespace, repair: bool) -> list[Fault]:  # noqa: ARG002  (an operation takes these)
        return []  # nothing but this code can have written what is there

    def _remove(self, session: Namespace, chat_history_id: str, positions: Sequence[int]) -> None:
        history = session.find(chat_history_id)
        if history is not None and positions:
            session.put(chat_history_id, history.changed(_now(), dict.fromkeys(positions)))

    @staticmethod
    def _with_prefix(session: Namespace, prefix: str) -> list[str]:
        return [
            chat_history_id
            for chat_history_id, history in session.histories.items()
            if history.is_there and chat_history_id.startswith(prefix)
        ]


def _stored(message: EncodedMessage, created_at: int) -> Stored:
    return Stored(created_at, message.message_id, message.role, message.content)


def _now() -> int:
    return time.time_ns() // 1000
