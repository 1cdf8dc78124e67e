# SPDX-License-Identifier: Apache-2.0
"""
The operations that change messages.

Only an append that replaces nothing does without a lock of its own. All other changes first lock the row of the
history, for which appends queue, too.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_revision,
    compares_contents,
    history_exists,
    history_has_messages,
    history_not_found,
    is_replaced_already,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.schema import MAX_POSITION, history_key
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.terms import tsvectors
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, branch_origin, round_count
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP

# An import sends up to this many characters in one statement, or one message.
_STATEMENT_CHARACTERS = 8_000_000


class _Locked(NamedTuple):
    """
    A history that the transaction has locked.

    :param revision: Its revision, 0 if this transaction has made it.
    :param next_revision: The revision that it gets by the change.
    """

    next_position: int
    message_count: int
    revision: int
    next_revision: int


_NO_HISTORY = _Locked(0, 0, 0, 0)


class Writing(Engine[Session]):
    """The operations that change messages."""

    async def append(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_revision: int | None,
    ) -> int:
        """Append in one statement if the history exists, nothing is replaced or expected, and no writer interferes."""
        if policy is DuplicatePolicy.SKIP and expected_revision is None:
            appended = await _append_new(session, scope, chat_history_id, messages)
            if appended is None:
                appended = await session.in_transaction(_append_first, scope, chat_history_id, messages)
            if appended is not None:
                return appended
        return await session.in_transaction(_append_locked, scope, chat_history_id, messages, policy, expected_revision)

    async def delete_messages(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
        expected_revision: int | None,
    ) -> None:
        """Delete messages in a transaction that has the history locked."""
        await session.in_transaction(
            _delete_locked, scope, chat_history_id, message_ids, from_message_id, expected_revision
        )

    async def replace(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        from_message_id: str,
        messages: Sequence[EncodedMessage],
        expected_revision: int | None,
    ) -> int:
        """Delete and append in a transaction that has the history locked."""
        return await session.in_transaction(
            _replace_locked, scope, chat_history_id, from_message_id, messages, expected_revision
        )

    async def remove(self, session: Session, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
        """Delete messages in a transaction that has the history locked."""
        await session.in_transaction(_remove_locked, scope, chat_history_id, positions)

    async def copy(
        self, session: Session, scope: Scope, source_id: str, target_id: str, until_message_id: str | None
    ) -> int:
        """Copy inside the server, in a transaction that has both histories locked."""
        return await session.in_transaction(_copy_locked, scope, source_id, target_id, until_message_id)

    async def import_history(
        self,
        session: Session,
        scope: Scope,
        history: HistoryRow,
        batches: Iterable[Sequence[MessageRow]],
        expected_revision: int,
    ) -> int:
        """Read and send the batches in one transaction, in which each part has a time limit of its own."""
        return await session.in_transaction(
            _import_locked, scope, history, batches, expected_revision, repeatable=False
        )

    async def import_histories(
        self, session: Session, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
    ) -> int:
        """Import all of them in one transaction."""
        return await session.in_transaction(_import_several_locked, scope, histories)


async def _append_new(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> int | None:
    """
    Append the messages that the history does not have, without a lock. Return their number.

    :returns: `None` if nothing was appended, because the history does not exist, or because another writer has appended
        one of them or changed the history.
    """
    key = history_key(scope, chat_history_id)
    ids = _caller_ids(messages)
    known = await session.fetch(session.statements.known_ids, [key, ids], prepare=True) if ids else []
    known_ids = {row[0] for row in known}
    new = [message for message in messages if message.message_id not in known_ids]
    if not new:
        return 0
    statement = session.statements.append_rest if known else session.statements.append_all
    parameters = await _append_parameters(session, scope, chat_history_id, new)
    parameters["version"] = known[0][3] if known else None
    return len(new) if await session.try_append(statement, parameters) else None


async def _append_first(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> int | None:
    """Append to a history that does not exist. Return the number of messages, or `None` if it exists."""
    if not await _make(session, scope, chat_history_id):
        return None
    parameters = await _append_parameters(session, scope, chat_history_id, messages)
    await session.run(session.statements.append_first, parameters, prepare=True)
    return len(messages)


async def _append_locked(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    messages: Sequence[EncodedMessage],
    policy: DuplicatePolicy,
    expected_revision: int | None,
) -> int:
    key = history_key(scope, chat_history_id)
    history = await _lock(session, scope, chat_history_id, make=bool(messages)) or _NO_HISTORY
    ids = _caller_ids(messages)
    found = await session.fetch(session.statements.known_ids, [key, ids], prepare=True) if ids else []
    places = {message_id: (position, role) for message_id, position, role, _ in found}
    known = {message_id: places[message_id] for message_id in ids if message_id in places}
    compares = known and compares_contents(policy, expected_revision, history.revision)
    equal = await _equal(session, key, [each for each in messages if each.message_id in known]) if compares else ()
    plan = planned(messages, known, equal, policy, expected_revision, history.revision)
    if not plan.new and not plan.replaced:
        return 0
    parameters = await _append_parameters(session, scope, chat_history_id, plan.new)
    parameters["revision"] = history.next_revision
    if plan.replaced:
        sent = await _sent(session, list(plan.replaced.values()))
        sent["numbers"] = " ".join(str(position) for position, _ in plan.replaced)
        await session.run(session.statements.overwrite, {**sent, "key": key, "revision": history.next_revision})
        parameters["rounds"] += round_count(list(plan.replaced.values()))
        parameters["rounds"] -= sum(role == "user" for _, role in plan.replaced)
    await session.run(session.statements.append_locked, parameters, prepare=True)
    return len(plan.new) + len(plan.replaced)


async def _delete_locked(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    message_ids: Sequence[str] | None,
    from_message_id: str | None,
    expected_revision: int | None,
) -> None:
    key = history_key(scope, chat_history_id)
    locked = await _lock(session, scope, chat_history_id)
    history = locked or _NO_HISTORY
    parameters = {"key": key, "revision": history.next_revision}
    if from_message_id is not None:
        check_revision(expected_revision, history.revision)
        start = await _position_of(session, key, from_message_id) if locked else None
        if start is None:
            raise message_not_found(from_message_id)
        await session.run(session.statements.delete_from, {**parameters, "start": start, "end": MAX_POSITION})
    elif locked:
        deleted = await session.run(session.statements.delete_by_id, {**parameters, "ids": list(message_ids or ())})
        if deleted.rowcount:
            check_revision(expected_revision, history.revision)  # undoes the transaction


async def _replace_locked(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    from_message_id: str,
    messages: Sequence[EncodedMessage],
    expected_revision: int | None,
) -> int:
    key = history_key(scope, chat_history_id)
    history = await _lock(session, scope, chat_history_id)
    if history is None:
        check_revision(expected_revision, 0)
        raise message_not_found(from_message_id)
    start = await _position_of(session, key, from_message_id)
    ids = _caller_ids(messages)
    found = await session.fetch(session.statements.known_ids, [key, ids], prepare=True) if ids else []
    known = {message_id: position for message_id, position, _, _ in found}
    if messages and len(known) == len(messages) and len(await _equal(session, key, messages)) == len(messages):
        positions = [known[message.message_id] for message in messages]
        first = positions[-1] if start is None else start
        ((following,),) = await session.fetch(session.statements.count_from, [key, first])
        if is_replaced_already(positions, first, following):
            return 0
    check_revision(expected_revision, history.revision)
    if start is None:
        raise message_not_found(from_message_id)
    revision = {"revision": history.next_revision}
    parameters = {"key": key, "start": start, "end": MAX_POSITION, **revision}
    await session.run(session.statements.delete_from, parameters)
    new = [message for message in messages if known.get(message.message_id, start) >= start]
    if new:
        parameters = await _append_parameters(session, scope, chat_history_id, new)
        await session.run(session.statements.append_locked, {**parameters, **revision}, prepare=True)
    return len(new)


async def _remove_locked(session: Session, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
    if history := await _lock(session, scope, chat_history_id):
        key = history_key(scope, chat_history_id)
        parameters = {"key": key, "places": list(positions), "revision": history.next_revision}
        await session.run(session.statements.delete_by_position, parameters)


async def _copy_locked(
    session: Session, scope: Scope, source_id: str, target_id: str, until_message_id: str | None
) -> int:
    # In the order of their ids, so that two copies in opposite directions do not deadlock.
    locked = {history: await _lock(session, scope, history) for history in sorted({source_id, target_id})}
    source, target = locked[source_id], locked[target_id]
    if source is None:
        raise history_not_found(source_id)
    has_messages_to_copy = source.message_count > 0
    source_key, end = history_key(scope, source_id), MAX_POSITION
    if until_message_id is not None:
        found = await _position_of(session, source_key, until_message_id)
        if found is None:
            raise message_not_found(until_message_id)
        end = found
    if target is None and has_messages_to_copy:
        target = await _lock(session, scope, target_id, make=True)
    if target is not None and target.message_count:
        raise history_has_messages(target_id)
    if target is None or not has_messages_to_copy:
        return 0
    parameters = {
        "source": source_key,
        "target": history_key(scope, target_id),
        "start": target.next_position,
        "end": end,
        "revision": target.next_revision,
    }
    ((copied,),) = await session.fetch(session.statements.copy_messages, parameters)
    return int(copied)


async def _import_several_locked(
    session: Session, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
) -> int:
    for history, _ in histories:
        if not await _make(session, scope, history.chat_history_id):
            raise history_exists(history.chat_history_id)
    return sum(
        [await _append_imported(session, scope, history, [rows], _NO_HISTORY, True) for history, rows in histories]
    )


async def _import_locked(
    session: Session, scope: Scope, history: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_revision: int
) -> int:
    is_new = False
    while (locked := await _lock(session, scope, history.chat_history_id)) is None:
        is_new = await _make(session, scope, history.chat_history_id)
    check_revision(expected_revision, locked.revision)
    return await _append_imported(session, scope, history, batches, locked, is_new)


async def _append_imported(
    session: Session,
    scope: Scope,
    history: HistoryRow,
    batches: Iterable[Sequence[MessageRow]],
    locked: _Locked,
    is_new: bool,
) -> int:
    """
    Append to a history that is locked.

    :param locked: The state in which it was locked.
    :param is_new: Whether it gets title, meta and times.
    """
    key, revision = history_key(scope, history.chat_history_id), locked.next_revision
    if is_new:
        parameters = {
            "key": key,
            "namespace": scope.namespace,
            "title": history.title,
            "meta": history.meta,
            "branch_of": branch_origin(history.chat_history_id, history.meta),
            "created_at": history.created_at,
            "updated_at": history.updated_at,
        }
        ((revision,),) = await session.fetch(session.statements.import_history, parameters)
    imported = rounds = 0
    parts = _parts(batches)
    while (rows := await session.to_thread(next, parts, None)) is not None:
        session.renew_deadline()
        sent = await _sent(session, rows)
        sent["numbers"] = " ".join([str(row.created_at) for row in rows])
        place = {"key": key, "start": locked.next_position + imported, "revision": revision}
        await session.run(session.statements.import_messages, {**sent, **place})
        imported += len(rows)
        rounds += round_count(rows)
    session.renew_deadline()
    counted = {"key": key, "count": imported, "rounds": rounds, "updated_at": history.updated_at}
    await session.run(session.statements.imported, {**counted, "revision": revision})
    return imported


async def _lock(session: Session, scope: Scope, chat_history_id: str, *, make: bool = False) -> _Locked | None:
    """
    Lock a history until the transaction ends.

    :param make: Whether to make the history if it does not exist.
    :returns: `None` if it does not exist and is not made.
    """
    parameters = {"key": history_key(scope, chat_history_id), "namespace": scope.namespace}
    while not (rows := await session.fetch(session.statements.lock_history, parameters)) and make:
        await _make(session, scope, chat_history_id)
    return _Locked(*rows[0]) if rows else None


async def _make(session: Session, scope: Scope, chat_history_id: str) -> bool:
    """Make a history unless it exists. Return whether this transaction has made it, and so holds its lock."""
    key = history_key(scope, chat_history_id)
    parameters = {"key": key, "namespace": scope.namespace, "id": chat_history_id}
    return bool((await session.run(session.statements.make_history, parameters)).rowcount)


async def _equal(session: Session, key: uuid.UUID, messages: Sequence[EncodedMessage]) -> set[str]:
    """Return the ids of the messages that are stored already, equal."""
    sent = await _sent(session, messages, with_terms=False)
    return {message_id for (message_id,) in await session.fetch(session.statements.equal, {**sent, "key": key})}


async def _position_of(session: Session, key: uuid.UUID, message_id: str) -> int | None:
    rows = await session.fetch(session.statements.position_of, [key, message_id])
    return int(rows[0][0]) if rows else None


async def _append_parameters(
    session: Session, scope: Scope, chat_history_id: str, new: Sequence[EncodedMessage]
) -> dict[str, Any]:
    return {
        **await _sent(session, new),
        "key": history_key(scope, chat_history_id),
        "namespace": scope.namespace,
        "count": len(new),
        "rounds": round_count(new),
    }


async def _sent(
    session: Session, messages: Sequence[EncodedMessage] | Sequence[MessageRow], *, with_terms: bool = True
) -> dict[str, Any]:
    """Return messages as parameters of the statements that write or compare them (see the fragment `sent`)."""
    # Another program's JSON may have line breaks. They are white space there, and separate the contents here.
    contents = [message.content.replace("\n", " ") for message in messages]
    terms = None
    if session.database.has_search and with_terms:
        is_long = sum(map(len, contents)) > MAX_CHARACTERS_ON_LOOP
        terms = await session.to_thread(tsvectors, contents) if is_long else tsvectors(contents)
    return {
        "message_ids": json.dumps([message.message_id for message in messages]),
        "roles": " ".join([message.role for message in messages]),
        "contents": "\n".join(contents),
        "terms": None if terms is None else "\n".join(terms),
    }


def _caller_ids(messages: Sequence[EncodedMessage]) -> list[str]:
    return [message.message_id for message in messages if message.has_caller_id]


def _parts(batches: Iterable[Sequence[MessageRow]]) -> Iterator[list[MessageRow]]:
    """Divide batches into parts that are small enough for one statement."""
    for batch in batches:
        part: list[MessageRow] = []
        size = 0
        for row in batch:
            if part and size + len(row.content) > _STATEMENT_CHARACTERS:
                yield part
                part, size = [], 0
            part.append(row)
            size += len(row.content)
        if part:
            yield part
