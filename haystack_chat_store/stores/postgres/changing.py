# SPDX-License-Identifier: Apache-2.0
"""
What changes the messages of a history otherwise than by appending to it.

Whoever does so locks the row of the history first, as writers do.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from haystack.dataclasses import ChatRole
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_count,
    history_has_messages,
    history_not_found,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.postgres.base import MAX_POSITION, PostgresOperations
from haystack_chat_store.stores.postgres.terms import tsvectors
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow

if TYPE_CHECKING:
    from haystack_chat_store.stores.postgres.connections import Session

# So many characters are sent to the server at once while importing, or one message.
_CHARACTERS_PER_STATEMENT = 8_000_000
# The terms of so many characters are found on the event loop itself, in a few milliseconds.
_CHARACTERS_ON_LOOP = 100_000


class Changing(PostgresOperations):
    """
    The operations that write, replace, delete, copy and import messages.
    """

    async def _write(self, session: "Session", chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        """
        Append in one statement, unless others change the history at the same time.
        """
        key = self._history_key(chat_history_id)
        brought = [message.message_id for message in messages if message.brought_its_id]
        known = await session.fetch(self._statements.known_ids, [key, brought]) if brought else []
        known_ids = {row[0] for row in known}
        new = [message for message in messages if message.message_id not in known_ids]
        if not new:
            return 0
        statement = self._statements.append_rest if known else self._statements.append_all
        parameters = await self._to_append(session, key, chat_history_id, new)
        parameters["version"] = known[0][3] if known else None
        if await session.appended(statement, parameters):
            return len(new)
        # Since we looked, somebody has written one of them, or has changed the history.
        return await self._write_checked(session, chat_history_id, messages, DuplicatePolicy.SKIP, None)

    async def _write_checked(
        self,
        session: "Session",
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        return await session.in_transaction(self._write_locked, chat_history_id, messages, policy, expected_count)

    async def _write_locked(
        self,
        session: "Session",
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        key = self._history_key(chat_history_id)
        _, count = await self._locked(session, chat_history_id, make=bool(messages)) or (0, 0)
        if expected_count not in (None, count):
            raise check_count(expected_count, count)
        ids = [message.message_id for message in messages if message.brought_its_id]
        found = await session.fetch(self._statements.known_ids, [key, ids]) if ids else []
        places = {message_id: (position, role) for message_id, position, role, _ in found}
        known = {message_id: places[message_id] for message_id in ids if message_id in places}
        new, replaced = planned(messages, known, policy)
        if not new and not replaced:
            return 0
        parameters = await self._to_append(session, key, chat_history_id, new)
        if replaced:
            sent = await self._sent(session, list(replaced.values()))
            sent["numbers"] = " ".join(str(position) for position, _ in replaced)
            await session.run(self._statements.overwrite, {**sent, "key": key})
            parameters["rounds"] += _rounds(message.role for message in replaced.values())
            parameters["rounds"] -= _rounds(role for _, role in replaced)
        await session.run(self._statements.append_all, parameters)
        return len(new) + len(replaced)

    async def _delete_some(
        self, session: "Session", chat_history_id: str, message_ids: Sequence[str] | None, from_message_id: str | None
    ) -> None:
        await session.in_transaction(self._delete_locked, chat_history_id, message_ids, from_message_id)

    async def _delete_locked(
        self, session: "Session", chat_history_id: str, message_ids: Sequence[str] | None, from_message_id: str | None
    ) -> None:
        key = self._history_key(chat_history_id)
        history = await self._locked(session, chat_history_id)
        if from_message_id is not None:
            start = await self._position_of(session, key, from_message_id) if history else None
            if start is None:
                raise message_not_found(from_message_id)
            await session.run(self._statements.delete_from, {"key": key, "start": start, "end": MAX_POSITION})
        elif history:
            await session.run(self._statements.delete_by_id, {"key": key, "ids": list(message_ids or ())})

    async def _remove(self, session: "Session", chat_history_id: str, positions: Sequence[int]) -> None:
        await session.in_transaction(self._remove_locked, chat_history_id, positions)

    async def _remove_locked(self, session: "Session", chat_history_id: str, positions: Sequence[int]) -> None:
        if await self._locked(session, chat_history_id):
            parameters = {"key": self._history_key(chat_history_id), "places": list(positions)}
            await session.run(self._statements.delete_by_position, parameters)

    async def _copy(self, session: "Session", source_id: str, target_id: str, until_message_id: str | None) -> int:
        return await session.in_transaction(self._copy_locked, source_id, target_id, until_message_id)

    async def _copy_locked(
        self, session: "Session", source_id: str, target_id: str, until_message_id: str | None
    ) -> int:
        # In one order, whichever way the copy goes.
        locked = {history: await self._locked(session, history) for history in sorted({source_id, target_id})}
        source, target = locked[source_id], locked[target_id]
        if source is None:
            raise history_not_found(source_id)
        has_messages_to_copy = source[1] > 0
        source_key, end = self._history_key(source_id), MAX_POSITION
        if until_message_id is not None:
            found = await self._position_of(session, source_key, until_message_id)
            if found is None:
                raise message_not_found(until_message_id)
            end = found
        if target is None and has_messages_to_copy:
            target = await self._locked(session, target_id, make=True)
        start, count = target or (0, 0)
        if count:
            raise history_has_messages(target_id)
        if not has_messages_to_copy:
            return 0
        parameters = {"source": source_key, "target": self._history_key(target_id), "start": start, "end": end}
        ((copied,),) = await session.fetch(self._statements.copy_messages, parameters)
        return int(copied)

    async def _import(
        self,
        session: "Session",
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_count: int,
    ) -> int:
        return await session.in_transaction(self._import_locked, history, batches, expected_count, repeatable=False)

    async def _import_several(
        self, session: "Session", histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        return await session.in_transaction(self._import_several_locked, histories)

    async def _import_several_locked(
        self, session: "Session", histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        for history, _ in histories:
            if not await self._made(session, history.chat_history_id):
                _, count = await self._locked(session, history.chat_history_id) or (0, 0)
                raise check_count(0, count)
        return sum([await self._append_imported(session, history, [rows], 0, True) for history, rows in histories])

    async def _import_locked(
        self,
        session: "Session",
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_count: int,
    ) -> int:
        is_new = False
        while (locked := await self._locked(session, history.chat_history_id)) is None:
            is_new = await self._made(session, history.chat_history_id)
        start, count = locked
        if count != expected_count:
            raise check_count(expected_count, count)
        return await self._append_imported(session, history, batches, start, is_new)

    async def _append_imported(
        self, session: "Session", history: HistoryRow, batches: Iterable[Sequence[MessageRow]], start: int, is_new: bool
    ) -> int:
        """
        Append to a history that is locked.

        :param start: Its next position.
        :param is_new: Whether it gets title, meta and times.
        """
        parameters: dict[str, Any] = history._asdict()
        parameters["key"] = key = self._history_key(history.chat_history_id)
        if is_new:
            await session.run(self._statements.import_history, parameters)
        imported = rounds = 0
        parts = _in_parts(batches)
        while (rows := await session.aside(next, parts, None)) is not None:
            session.renew_deadline()
            sent = await self._sent(session, rows)
            sent["numbers"] = " ".join([str(row.created_at) for row in rows])
            await session.run(self._statements.import_messages, {**sent, "key": key, "start": start + imported})
            imported += len(rows)
            rounds += _rounds(row.role for row in rows)
        session.renew_deadline()
        await session.run(self._statements.imported, {**parameters, "count": imported, "rounds": rounds})
        return imported

    async def _locked(self, session: "Session", chat_history_id: str, *, make: bool = False) -> tuple[int, int] | None:
        """
        Lock a history until the transaction ends, and return its next position and its number of messages.

        :param make: Whether to make it if there is none. If not, that is `None`.
        """
        key = self._history_key(chat_history_id)
        while not (rows := await session.fetch(self._statements.lock_history, [key])) and make:
            await self._made(session, chat_history_id)
        return (rows[0][0], rows[0][1]) if rows else None

    async def _made(self, session: "Session", chat_history_id: str) -> bool:
        """
        Make a history, unless it is there. Return whether this transaction has, and so holds its lock.
        """
        parameters = [self._history_key(chat_history_id), self.namespace, chat_history_id]
        return bool((await session.run(self._statements.make_history, parameters)).rowcount)

    async def _position_of(self, session: "Session", key: uuid.UUID, message_id: str) -> int | None:
        rows = await session.fetch(self._statements.position_of, [key, message_id])
        return int(rows[0][0]) if rows else None

    async def _to_append(
        self, session: "Session", key: uuid.UUID, chat_history_id: str, new: Sequence[EncodedMessage]
    ) -> dict[str, Any]:
        return {
            **await self._sent(session, new),
            "key": key,
            "namespace": self.namespace,
            "id": chat_history_id,
            "count": len(new),
            "rounds": _rounds(message.role for message in new),
        }

    @staticmethod
    async def _sent(session: "Session", messages: "Sequence[EncodedMessage | MessageRow]") -> dict[str, Any]:
        """
        Return messages as the statements that write them take them.
        """
        # Contents that somebody else has written may have line breaks, which are blanks in JSON.
        contents = [message.content.replace("\n", " ") for message in messages]
        terms = None
        if session.pool.has_search:
            is_long = sum(map(len, contents)) > _CHARACTERS_ON_LOOP
            terms = await session.aside(tsvectors, contents) if is_long else tsvectors(contents)
        return {
            "message_ids": json.dumps([message.message_id for message in messages]),
            "roles": " ".join([message.role for message in messages]),
            "contents": "\n".join(contents),
            "terms": None if terms is None else "\n".join(terms),
        }


def _rounds(roles: Iterable[str]) -> int:
    return sum(role == ChatRole.USER.value for role in roles)


def _in_parts(batches: Iterable[Sequence[MessageRow]]) -> Iterator[list[MessageRow]]:
    """
    Divide batches, so that no part is too large to be sent at once.
    """
    for batch in batches:
        part: list[MessageRow] = []
        size = 0
        for row in batch:
            if part and size + len(row.content) > _CHARACTERS_PER_STATEMENT:
                yield part
                part, size = [], 0
            part.append(row)
            size += len(row.content)
        if part:
            yield part
