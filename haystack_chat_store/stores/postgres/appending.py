# SPDX-License-Identifier: Apache-2.0
"""Appends to a history: in one statement without a lock, or in a transaction that has the history locked."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import compares_contents, planned
from haystack_chat_store.stores.postgres.histories import NO_HISTORY, find_previews, lock_history, make_history
from haystack_chat_store.stores.postgres.schema import history_key, history_parameters
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import Statement
from haystack_chat_store.stores.postgres.terms import tsvectors
from haystack_chat_store.stores.postgres.turns import Append
from haystack_chat_store.stores.previews import first_question, last_said
from haystack_chat_store.stores.rows import EncodedMessage, MessageRow, Scope, round_count

# The history's row is the lock that gives out positions. A writer holds it until its messages are committed. A history
# that this transaction has made has revision 0. Its first revision is looked up by a later statement than the one that
# has made it: that statement may have begun before another history with this id was deleted. The last message has the
# time that the history keeps of it.
_APPEND = """
    WITH history AS (
        UPDATE {{histories}} SET
            next_position = next_position + %(count)s,
            message_count = message_count + %(count)s,
            round_count = round_count + %(rounds)s,
            revision = {revision},
            expires_at = {{expires_at}},
            {{count_previews}},
            last_at = CASE WHEN %(last_role)s::text IS NULL THEN last_at
                ELSE greatest(last_at, statement_timestamp()) END,
            updated_at = {{now}}
        WHERE history_key = %(key)s {condition} RETURNING next_position - %(count)s AS start, revision, last_at
    )
    INSERT INTO {{messages}} (history_key, position, message_id, role, content, search_terms, revision, created_at)
    SELECT %(key)s, start + place - 1, message_id, role, content::json, terms::tsvector, revision,
        CASE WHEN %(last_role)s::text IS NULL THEN statement_timestamp() ELSE last_at END
    FROM history, {{sent}}
"""
_APPEND_ALL = Statement(_APPEND.format(revision="revision + 1", condition="AND {visible}"))
# The transaction that has locked the history has looked at its user and its expiry.
_APPEND_FIRST = Statement(_APPEND.format(revision="{first_revision}", condition=""))
APPEND_LOCKED = Statement(_APPEND.format(revision="%(revision)s", condition=""))
# Appends the rest of a batch, if the history is unchanged since it was found to have the other messages.
_APPEND_REST = Statement(_APPEND.format(revision="revision + 1", condition="AND xmin = %(version)s::xid AND {visible}"))
_KNOWN_IDS = Statement("""
    SELECT message_id, position, role, h.xmin::text, {visible}
    FROM {messages} JOIN {histories} AS h USING (history_key)
    WHERE history_key = %(key)s AND message_id = ANY (%(ids)s)
""")
# The messages that are stored as they are sent.
_EQUAL = Statement("""
    SELECT m.message_id FROM {messages} AS m JOIN {sent} USING (message_id)
    WHERE history_key = %(key)s AND m.role = sent.role AND m.content::text = sent.content
""")
_OVERWRITE = Statement("""
    UPDATE {messages} AS m SET role = sent.role, content = sent.content::json, search_terms = sent.terms::tsvector,
        revision = %(revision)s
    FROM {sent_with_numbers} WHERE history_key = %(key)s AND position = number
""")


class KnownMessage(NamedTuple):
    """
    A stored message whose id a batch has, too.

    :param version: The version of its history's row. It is another one after each change of the row.
    :param is_visible: Whether its history belongs to the scope and has not expired.
    """

    message_id: str
    position: int
    role: str
    version: str
    is_visible: bool


async def append_without_lock(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> int | None:
    """
    Append the messages that the history does not have, without a lock. Return their number.

    :returns: `None` if nothing was appended, because the history does not exist, or because another writer has appended
        one of them or changed the history.
    """
    known = await known_messages(session, scope, chat_history_id, messages)
    if known and not known[0].is_visible:
        return None
    known_ids = {each.message_id for each in known}
    new = [message for message in messages if message.message_id not in known_ids]
    return len(new) if not new or await _try_append(session, scope, chat_history_id, known, new) else None


async def append_together(session: Session, scope: Scope, chat_history_id: str, appends: Sequence[Append]) -> None:
    """
    Append the messages of several appends that the history does not have, in one statement, without a lock.

    Each append that is made gets its result. Before the statement is sent, each gets the ids that it may store. If two
    have the same new message, the second is not made.
    """
    if session.appended_earlier:
        return  # each finds out alone whether an earlier attempt has made it
    messages = [message for append in appends for message in append.messages]
    known = await known_messages(session, scope, chat_history_id, messages)
    if known and not known[0].is_visible:
        return
    known_ids = {each.message_id for each in known}
    new: dict[str, EncodedMessage] = {}
    made: list[Append] = []
    for append in appends:
        append.sent = ()  # an earlier attempt has sent nothing
        of_append = {each.message_id: each for each in append.messages if each.message_id not in known_ids}
        if new.keys().isdisjoint(of_append):
            new.update(of_append)
            append.sent = list(of_append)
            made.append(append)
    is_appended = not new or await _try_append(session, scope, chat_history_id, known, list(new.values()))
    for append in made:
        append.result = len(append.sent) if is_appended else None
        append.sent = ()


async def _try_append(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    known: Sequence[KnownMessage],
    new: Sequence[EncodedMessage],
) -> bool:
    """
    Append the messages that a history does not have, in one statement. Return whether they were appended.

    :param known: The messages of the batch that the history has. If it has changed since they were looked up, nothing
        is appended.
    """
    parameters = await append_parameters(session, scope, chat_history_id, new)
    if known:
        parameters["version"] = known[0].version
    return await session.try_append(_APPEND_REST if known else _APPEND_ALL, parameters, [m.message_id for m in new])


async def append_to_new_history(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> int | None:
    """Append to a history that does not exist. Return the number of messages, or `None` if it exists."""
    if not await make_history(session, scope, chat_history_id):
        return None
    parameters = await append_parameters(session, scope, chat_history_id, messages)
    await session.run(_APPEND_FIRST, parameters, prepare=True)
    session.appended_in_transaction = [message.message_id for message in messages]
    return len(messages)


async def append_again(session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
    """Append messages of which an earlier attempt may have appended some, and return the number of these, too."""
    earlier = list(session.appended_earlier)
    await lock_history(session, scope, chat_history_id)  # waits for the earlier attempt
    if len(await _find_ids(session, scope, chat_history_id, earlier)) == len(earlier):
        return len(earlier)
    messages = [replace(message, has_caller_id=True) for message in messages]
    return await append_locked(session, scope, chat_history_id, messages, DuplicatePolicy.SKIP, None)


async def append_locked(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    messages: Sequence[EncodedMessage],
    policy: DuplicatePolicy,
    expected_revision: int | None,
) -> int:
    """Lock the history, carry out what `conflicts.planned` plans, and return the number of messages written."""
    key = history_key(scope, chat_history_id)
    history = await lock_history(session, scope, chat_history_id, make=bool(messages)) or NO_HISTORY
    found = await known_messages(session, scope, chat_history_id, messages)
    places = {each.message_id: (each.position, each.role) for each in found}
    known = {message_id: places[message_id] for message_id in _caller_ids(messages) if message_id in places}
    compares = known and compares_contents(policy, expected_revision, history.revision)
    equal = await equal_ids(session, key, [each for each in messages if each.message_id in known]) if compares else ()
    plan = planned(messages, known, equal, policy, expected_revision, history.revision)
    if not plan.new and not plan.replaced:
        return 0
    parameters = await append_parameters(session, scope, chat_history_id, plan.new)
    parameters["revision"] = history.next_revision
    if plan.replaced:
        sent = await sent_parameters(session, list(plan.replaced.values()))
        sent["numbers"] = " ".join(str(position) for position, _ in plan.replaced)
        await session.run(_OVERWRITE, {**sent, "key": key, "revision": history.next_revision})
        parameters["rounds"] += round_count(list(plan.replaced.values()))
        parameters["rounds"] -= sum(role == "user" for _, role in plan.replaced)
    await session.run(APPEND_LOCKED, parameters, prepare=True)
    if plan.replaced:
        await find_previews(session, key)
    if policy is DuplicatePolicy.SKIP and expected_revision is None:
        session.appended_in_transaction = [message.message_id for message in plan.new]
    return len(plan.new) + len(plan.replaced)


async def known_messages(
    session: Session, scope: Scope, chat_history_id: str, messages: Sequence[EncodedMessage]
) -> list[KnownMessage]:
    """Return those messages of a batch that the history has already."""
    return await _find_ids(session, scope, chat_history_id, _caller_ids(messages))


async def _find_ids(
    session: Session, scope: Scope, chat_history_id: str, message_ids: Sequence[str]
) -> list[KnownMessage]:
    if not message_ids:
        return []
    parameters = {**history_parameters(scope, chat_history_id), "ids": message_ids}
    return [KnownMessage(*row) for row in await session.fetch(_KNOWN_IDS, parameters, prepare=True)]


async def equal_ids(session: Session, key: uuid.UUID, messages: Sequence[EncodedMessage]) -> set[str]:
    """Return the ids of the messages that are stored already, equal."""
    sent = await sent_parameters(session, messages, with_terms=False)
    return {message_id for (message_id,) in await session.fetch(_EQUAL, {**sent, "key": key})}


async def append_parameters(
    session: Session, scope: Scope, chat_history_id: str, new: Sequence[EncodedMessage]
) -> dict[str, Any]:
    """Return the parameters of the statements that append messages."""
    last = last_said(new)
    return {
        **await sent_parameters(session, new),
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


async def sent_parameters(
    session: Session, messages: Sequence[EncodedMessage] | Sequence[MessageRow], *, with_terms: bool = True
) -> dict[str, Any]:
    """Return messages as parameters of the fragments `sent` and `sent_with_numbers`."""
    # Another program's JSON may have line breaks. They are white space there, and separate the contents here.
    contents = [message.content.replace("\n", " ") for message in messages]
    terms = None
    if session.database.has_search and with_terms:
        terms = await session.to_thread_if_large(contents, tsvectors, contents)
    return {
        "message_ids": json.dumps([message.message_id for message in messages]),
        "roles": " ".join([message.role for message in messages]),
        "contents": "\n".join(contents),
        "terms": None if terms is None else "\n".join(terms),
    }


def _caller_ids(messages: Sequence[EncodedMessage]) -> list[str]:
    return [message.message_id for message in messages if message.has_caller_id]
