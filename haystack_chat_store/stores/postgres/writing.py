# SPDX-License-Identifier: Apache-2.0
"""
The operations that change messages.

Only an append that replaces nothing does without a lock of its own. All other changes first lock the row of the
history, for which appends queue, too.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_access,
    check_revision,
    check_same_user,
    compares_contents,
    history_exists,
    history_has_messages,
    history_not_found,
    is_replaced_already,
    message_not_found,
    planned,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.schema import MAX_POSITION, history_key, history_parameters
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.terms import title_tsvector, tsvectors
from haystack_chat_store.stores.postgres.turns import Append
from haystack_chat_store.stores.previews import beginning_of_content, first_question, last_said
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, branch_origin, round_count
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP

# An import sends up to this many characters in one statement, or one message.
_STATEMENT_CHARACTERS = 8_000_000


class _Locked(NamedTuple):
    """
    A history that the transaction has locked.

    :param revision: Its revision, 0 if this transaction has made it.
    :param next_revision: The revision that it gets by the change.
    :param user_id: The user that it belongs to, or `None`.
    """

    next_position: int
    message_count: int
    revision: int
    next_revision: int
    user_id: str | None


# The state of a history without messages, or of none.
_NO_HISTORY = _Locked(0, 0, 0, 0, None)


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
        if session.appended_earlier:
            return await session.in_transaction(_append_again, scope, chat_history_id, messages)
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

    async def update_message(
        self, session: Session, scope: Scope, chat_history_id: str, message_id: str, change: Callable[[str], str]
    ) -> MessageRow:
        """Read and write the content in a transaction that has the history locked."""
        return await session.in_transaction(_update_message_locked, scope, chat_history_id, message_id, change)

    async def remove(self, session: Session, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
        """Delete messages in a transaction that has the history locked."""
        await session.in_transaction(_remove_locked, scope, chat_history_id, positions)

    async def copy(
        self,
        session: Session,
        scope: Scope,
        source_id: str,
        target_id: str,
        until_message_id: str | None,
        meta: str | None,
    ) -> int:
        """Copy inside the server, in a transaction that has both histories locked."""
        return await session.in_transaction(_copy_locked, scope, source_id, target_id, until_message_id, meta)

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
            _import_locked,
            scope,
            history,
            batches,
            expected_revision,
            repeatable=not isinstance(batches, Iterator),
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
    known = await _known(session, scope, chat_history_id, messages)
    if known and not known[0][4]:
        return None
    known_ids = {row[0] for row in known}
    new = [message for message in messages if message.message_id not in known_ids]
    if not new:
        return 0
    statement = session.statements.append_rest if known else session.statements.append_all
    parameters = await _append_parameters(session, scope, chat_history_id, new)
    parameters["version"] = known[0][3] if known else None
    ids = [message.message_id for message in new]
    return len(new) if await session.try_append(statement, parameters, ids) else None


async def append_together(session: Session, scope: Scope, chat_history_id: str, appends: Sequence[Append]) -> None:
    """
    Append the messages of several appends that the history does not have, in one statement, without a lock.

    Each append that is made gets its result. Before the statement is sent, each gets the ids that it may store. If two
    have the same new message, the second is not made.
    """
    if session.appended_earlier:
        return  # each finds out alone whether an earlier attempt has made it
    known = await _known(session, scope, chat_history_id, [each for append in appends for each in append.messages])
    if known and not known[0][4]:
        return
    known_ids = {row[0] for row in known}
    new: dict[str, EncodedMessage] = {}
    made: list[Append] = []
    for append in appends:
        append.sent = ()  # an earlier attempt has sent nothing
        of_append = {each.message_id: each for each in append.messages if each.message_id not in known_ids}
        if new.keys().isdisjoint(of_append):
            new.update(of_append)
            append.sent = list(of_append)
            made.append(append)
    statement = session.statements.append_rest if known else session.statements.append_all
    parameters = await _append_parameters(session, scope, chat_history_id, list(new.values()))
    parameters["version"] = known[0][3] if known else None
    is_appended = not new or await session.try_append(statement, parameters, list(new))
    for append in made:
        append.result = len(append.sent) if is_appended else None
        append.sent = ()


async def _append_first(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> int | None:
    """Append to a history that does not exist. Return the number of messages, or `None` if it exists."""
    if not await make_history(session, scope, chat_history_id):
        return None
    parameters = await _append_parameters(session, scope, chat_history_id, messages)
    await session.run(session.statements.append_first, parameters, prepare=True)
    return len(messages)


async def _append_again(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> int:
    """Append messages of which an earlier attempt may have appended some, and return the number of these, too."""
    earlier = list(session.appended_earlier)
    await lock_history(session, scope, chat_history_id)  # waits for the earlier attempt
    parameters = {**history_parameters(scope, chat_history_id), "ids": earlier}
    if len(await session.fetch(session.statements.known_ids, parameters, prepare=True)) == len(earlier):
        return len(earlier)
    messages = [replace(message, has_caller_id=True) for message in messages]
    return await _append_locked(session, scope, chat_history_id, messages, DuplicatePolicy.SKIP, None)


async def _append_locked(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    messages: Sequence[EncodedMessage],
    policy: DuplicatePolicy,
    expected_revision: int | None,
) -> int:
    key = history_key(scope, chat_history_id)
    history = await lock_history(session, scope, chat_history_id, make=bool(messages)) or _NO_HISTORY
    found = await _known(session, scope, chat_history_id, messages)
    places = {message_id: (position, role) for message_id, position, role, *_ in found}
    known = {message_id: places[message_id] for message_id in _caller_ids(messages) if message_id in places}
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
    if plan.replaced:
        await find_previews(session, key)
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
    locked = await lock_history(session, scope, chat_history_id)
    history = locked or _NO_HISTORY
    parameters = {"key": key, "revision": history.next_revision}
    if from_message_id is not None:
        check_revision(expected_revision, history.revision)
        start = await _position_of(session, key, from_message_id) if locked else None
        if start is None:
            raise message_not_found(from_message_id)
        await session.run(session.statements.delete_from, {**parameters, "start": start, "end": MAX_POSITION})
        await find_previews(session, key)
    elif locked:
        deleted = await session.run(session.statements.delete_by_id, {**parameters, "ids": list(message_ids or ())})
        if deleted.rowcount:
            check_revision(expected_revision, history.revision)  # undoes the transaction
            await find_previews(session, key)


async def _replace_locked(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    from_message_id: str,
    messages: Sequence[EncodedMessage],
    expected_revision: int | None,
) -> int:
    key = history_key(scope, chat_history_id)
    history = await lock_history(session, scope, chat_history_id)
    if history is None:
        check_revision(expected_revision, 0)
        raise message_not_found(from_message_id)
    start = await _position_of(session, key, from_message_id)
    found = await _known(session, scope, chat_history_id, messages)
    known = {message_id: position for message_id, position, *_ in found}
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
    await find_previews(session, key)
    return len(new)


async def _update_message_locked(
    session: Session, scope: Scope, chat_history_id: str, message_id: str, change: Callable[[str], str]
) -> MessageRow:
    key = history_key(scope, chat_history_id)
    history = await lock_history(session, scope, chat_history_id)
    position = None if history is None else await _position_of(session, key, message_id)
    if history is None or position is None:
        raise message_not_found(message_id)
    row = MessageRow(*(await session.fetch(session.statements.message, [key, position]))[0])
    row.content = change(row.content)
    parameters = {"key": key, "position": position, "content": row.content, "revision": history.next_revision}
    await session.run(session.statements.set_content, parameters)
    return row


async def _remove_locked(session: Session, scope: Scope, chat_history_id: str, positions: Sequence[int]) -> None:
    if history := await lock_history(session, scope, chat_history_id):
        key = history_key(scope, chat_history_id)
        parameters = {"key": key, "places": list(positions), "revision": history.next_revision}
        await session.run(session.statements.delete_by_position, parameters)
        await find_previews(session, key)


async def _copy_locked(
    session: Session, scope: Scope, source_id: str, target_id: str, until_message_id: str | None, meta: str | None
) -> int:
    # In the order of their ids, so that two copies in opposite directions do not deadlock.
    locked = {
        history: await lock_history(session, scope, history, is_read=history == source_id, is_checked=False)
        for history in sorted({source_id, target_id})
    }
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
    if target is not None:
        check_access(scope, target.user_id)
    if target is None and has_messages_to_copy:
        target = await lock_history(session, scope, target_id, make=True, user_id=source.user_id)
    if target is not None and target.message_count:
        raise history_has_messages(target_id)
    if target is None or not has_messages_to_copy:
        return 0
    check_same_user(source.user_id, target.user_id)
    parameters: dict[str, Any] = {
        "source": source_key,
        "target": history_key(scope, target_id),
        "start": target.next_position,
        "end": end,
        "revision": target.next_revision,
        "lifetime": scope.lifetime,
        "meta": meta,
        "branch_of": branch_origin(target_id, meta),
    }
    ((copied,),) = await session.fetch(session.statements.copy_messages, parameters)
    await find_previews(session, parameters["target"])
    return int(copied)


async def _import_several_locked(
    session: Session, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
) -> int:
    for history, _ in histories:
        new_id = history.chat_history_id
        if not await make_history(session, scope, new_id) and (
            await lock_history(session, scope, new_id) is not None or not await make_history(session, scope, new_id)
        ):
            raise history_exists(new_id)
    return sum(
        [await _append_imported(session, scope, history, [rows], _NO_HISTORY, True) for history, rows in histories]
    )


async def _import_locked(
    session: Session, scope: Scope, history: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_revision: int
) -> int:
    is_new = False
    while (locked := await lock_history(session, scope, history.chat_history_id)) is None:
        is_new = await make_history(session, scope, history.chat_history_id)
    check_revision(expected_revision, locked.revision)
    if not is_new:
        check_same_user(history.user_id if scope.user_id is None else scope.user_id, locked.user_id)
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

    :param locked: The state in which it was locked, or `_NO_HISTORY` if the transaction has made it.
    :param is_new: Whether it gets the title, the meta and the times of `history`.
    """
    key, revision = history_key(scope, history.chat_history_id), locked.next_revision
    if is_new:
        parameters = {
            "key": key,
            "namespace": scope.namespace,
            "title": history.title,
            "title_terms": title_tsvector(history.title),
            "meta": history.meta,
            "branch_of": branch_origin(history.chat_history_id, history.meta),
            "created_at": history.created_at,
            "updated_at": history.updated_at,
            "user": history.user_id if scope.user_id is None else scope.user_id,
        }
        ((revision,),) = await session.fetch(session.statements.import_history, parameters)
    imported = rounds = 0
    parts, preview, last = _parts(batches), None, None
    while (rows := await session.to_thread(next, parts, None)) is not None:
        session.renew_deadline()
        sent = await _sent(session, rows)
        sent["numbers"] = " ".join([str(row.created_at) for row in rows])
        place = {"key": key, "start": locked.next_position + imported, "revision": revision}
        await session.run(session.statements.import_messages, {**sent, **place})
        imported += len(rows)
        rounds += round_count(rows)
        preview, last = preview or first_question(rows), last_said(rows) or last
    session.renew_deadline()
    counted = {"key": key, "count": imported, "rounds": rounds, "updated_at": history.updated_at}
    previews = {
        "lifetime": scope.lifetime,
        "preview": preview,
        "last_role": last and last.role,
        "last_text": last and beginning_of_content(last.content),
        "last_at": last and last.created_at,
    }
    await session.run(session.statements.imported, {**counted, **previews, "revision": revision})
    return imported


async def lock_history(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    *,
    make: bool = False,
    user_id: str | None = None,
    is_read: bool = False,
    is_checked: bool = True,
) -> _Locked | None:
    """
    Lock a history until the transaction ends. If it has expired, delete it.

    :param make: Whether to make the history if it does not exist.
    :param user_id: The user of a history that is made in a scope without a user.
    :param is_read: Whether it is only read: then that of another user does not exist.
    :param is_checked: Whether that of another user is an error. Otherwise, the caller has to check it.
    :returns: `None` if it does not exist and is not made.
    :raises ChatHistoryAccessError: If it is another user's.
    """
    key = history_key(scope, chat_history_id)
    parameters = {"key": key, "namespace": scope.namespace}
    while True:
        rows = await session.fetch(session.statements.lock_history, parameters)
        if rows and rows[0][-1] and not (is_read and not scope.includes(rows[0][-2])):
            await delete_key(session, key)
            rows = []
        if rows:
            locked = _Locked(*rows[0][:-1])
            if is_read and not scope.includes(locked.user_id):
                return None
            if is_checked:
                check_access(scope, locked.user_id)
            return locked
        if not make:
            return None
        await make_history(session, scope, chat_history_id, user_id)


async def make_history(session: Session, scope: Scope, chat_history_id: str, user_id: str | None = None) -> bool:
    """Make a history unless it exists. Return whether this transaction has made it, and so holds its lock."""
    parameters = {
        "key": history_key(scope, chat_history_id),
        "namespace": scope.namespace,
        "id": chat_history_id,
        "user": user_id if scope.user_id is None else scope.user_id,
        "lifetime": scope.lifetime,
    }
    return bool((await session.run(session.statements.make_history, parameters)).rowcount)


async def delete_key(session: Session, key: uuid.UUID) -> None:
    """Delete a history that the transaction has locked."""
    await session.run(session.statements.delete_histories, {"keys": [key], "user": None})
    await session.run(session.statements.delete_messages, [[key]])


async def find_previews(session: Session, key: uuid.UUID) -> None:
    """Find the first question and the last message of a history anew."""
    preview, position = None, -1
    while preview is None and (rows := await session.fetch(session.statements.next_questions, [key, position])):
        preview, position = next(filter(None, (beginning_of_content(row[1]) for row in rows)), None), rows[-1][0]
    found = await session.fetch(session.statements.last_message, [key])
    last, role, content = found[0] if found else (None, None, "")
    parameters = {"key": key, "preview": preview, "position": last, "last_role": role}
    await session.run(session.statements.set_previews, {**parameters, "last_text": beginning_of_content(content)})


async def _known(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> list[tuple[Any, ...]]:
    """Return the rows of the statement `known_ids`."""
    ids = _caller_ids(messages)
    parameters = {**history_parameters(scope, chat_history_id), "ids": ids}
    return await session.fetch(session.statements.known_ids, parameters, prepare=True) if ids else []


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
    last = last_said(new)
    return {
        **await _sent(session, new),
        "key": history_key(scope, chat_history_id),
        "namespace": scope.namespace,
        "count": len(new),
        "rounds": round_count(new),
        "user": scope.user_id,
        "lifetime": scope.lifetime,
        "preview": first_question(new),
        "last_role": None if last is None else last.role,
        "last_text": None if last is None else last.text,
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
