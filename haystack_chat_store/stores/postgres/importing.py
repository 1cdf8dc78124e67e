# SPDX-License-Identifier: Apache-2.0
"""Imports of histories: each is one transaction, in which the messages are sent in parts."""

from collections.abc import Iterable, Iterator, Sequence

from haystack_chat_store.stores.conflicts import check_revision, check_same_user, history_exists
from haystack_chat_store.stores.postgres.appending import sent_parameters
from haystack_chat_store.stores.postgres.histories import NO_HISTORY, LockedHistory, lock_history, make_history
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import Statement
from haystack_chat_store.stores.postgres.terms import title_tsvector
from haystack_chat_store.stores.previews import beginning_of_content, first_question, last_said
from haystack_chat_store.stores.rows import HistoryRow, MessageRow, Scope, branch_origin, round_count

_IMPORT_HISTORY = Statement("""
    UPDATE {histories} SET created_at = {created_at}, updated_at = {updated_at},
        title = %(title)s, title_terms = %(title_terms)s::tsvector, meta = %(meta)s::json,
        branch_of = %(branch_of)s, user_id = %(user)s
    WHERE history_key = %(key)s RETURNING {first_revision}
""")
_IMPORT_MESSAGES = Statement("""
    INSERT INTO {messages} (history_key, position, created_at, message_id, role, content, search_terms, revision)
    SELECT %(key)s, %(start)s + place - 1, {time_sent}, message_id, role, content::json, terms::tsvector,
        %(revision)s
    FROM {sent_with_numbers}
""")
_IMPORTED = Statement("""
    UPDATE {histories} SET
        next_position = next_position + %(count)s,
        message_count = message_count + %(count)s,
        round_count = round_count + %(rounds)s,
        revision = %(revision)s,
        expires_at = {expires_at},
        {count_previews},
        last_at = CASE WHEN %(last_role)s::text IS NULL THEN last_at ELSE {last_at} END,
        updated_at = greatest(updated_at, {updated_at})
    WHERE history_key = %(key)s
""")


# An import sends up to this many characters in one statement, or one message.
_STATEMENT_CHARACTERS = 8_000_000


async def import_several_locked(
    session: Session, scope: Scope, histories: Sequence[tuple[HistoryRow, Sequence[MessageRow]]]
) -> int:
    """Import new histories, each with its messages, and return the number of messages."""
    for history, _ in histories:
        new_id = history.chat_history_id
        if not await make_history(session, scope, new_id) and (
            await lock_history(session, scope, new_id) is not None or not await make_history(session, scope, new_id)
        ):
            raise history_exists(new_id)
    return sum(
        [await _append_imported(session, scope, history, [rows], NO_HISTORY, True) for history, rows in histories]
    )


async def import_locked(
    session: Session, scope: Scope, history: HistoryRow, batches: Iterable[Sequence[MessageRow]], expected_revision: int
) -> int:
    """Import messages to a history, which is made if it does not exist, and return their number."""
    locked = await lock_history(session, scope, history.chat_history_id, make=True) or NO_HISTORY
    is_new = locked.revision == 0
    check_revision(expected_revision, locked.revision)
    if not is_new:
        check_same_user(history.user_id if scope.user_id is None else scope.user_id, locked.user_id)
    return await _append_imported(session, scope, history, batches, locked, is_new)


async def _append_imported(
    session: Session,
    scope: Scope,
    history: HistoryRow,
    batches: Iterable[Sequence[MessageRow]],
    locked: LockedHistory,
    is_new: bool,
) -> int:
    """
    Append to a history that is locked.

    :param locked: The state in which it was locked, or `NO_HISTORY` if the transaction has made it.
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
        ((revision,),) = await session.fetch(_IMPORT_HISTORY, parameters)
    imported = rounds = 0
    preview: str | None = None
    last: MessageRow | None = None
    parts = _parts(batches)
    while (rows := await session.to_thread(next, parts, None)) is not None:
        session.renew_deadline()
        sent = await sent_parameters(session, rows)
        sent["numbers"] = " ".join([str(row.created_at) for row in rows])
        place = {"key": key, "start": locked.next_position + imported, "revision": revision}
        await session.run(_IMPORT_MESSAGES, {**sent, **place})
        imported += len(rows)
        rounds += round_count(rows)
        preview = preview or await session.to_thread(first_question, rows)
        last = last_said(rows) or last
    session.renew_deadline()
    last_text: str | None = None
    if last is not None:
        last_text = await session.to_thread_if_large([last.content], beginning_of_content, last.content)
    counted = {"key": key, "count": imported, "rounds": rounds, "updated_at": history.updated_at}
    previews = {
        "lifetime": scope.lifetime,
        "preview": preview,
        "last_role": last and last.role,
        "last_text": last_text,
        "last_at": last and last.created_at,
    }
    await session.run(_IMPORTED, {**counted, **previews, "revision": revision})
    return imported


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
