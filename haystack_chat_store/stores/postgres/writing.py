# SPDX-License-Identifier: Apache-2.0
"""
The operations that change messages.

Only an append that replaces nothing does without a lock of its own. All other changes first lock the row of the
history, for which appends queue, too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import starmap
from typing import Any

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.stores.conflicts import (
    check_access,
    check_revision,
    check_same_user,
    history_has_messages,
    history_not_found,
    is_replaced_already,
    message_not_found,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.appending import (
    APPEND_LOCKED,
    append_again,
    append_locked,
    append_parameters,
    append_to_new_history,
    append_without_lock,
    equal_ids,
    known_messages,
)
from haystack_chat_store.stores.postgres.histories import NO_HISTORY, find_previews, lock_history, position_of
from haystack_chat_store.stores.postgres.importing import import_locked, import_several_locked
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.postgres.session import Session, in_transaction
from haystack_chat_store.stores.postgres.statements import Statement
from haystack_chat_store.stores.rows import EncodedMessage, HistoryRow, MessageRow, Scope, branch_origin, compare_rows
from haystack_chat_store.validation import MAX_POSITION

_DELETE_SOME = """
    WITH gone AS (DELETE FROM {{messages}} WHERE history_key = %(key)s AND {which} RETURNING role),
        counted AS (SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds FROM gone)
    UPDATE {{histories}} SET
        message_count = message_count - messages,
        round_count = round_count - rounds,
        revision = %(revision)s,
        updated_at = {{now}}
    FROM counted WHERE history_key = %(key)s AND messages > 0
"""
_DELETE_BY_ID, _DELETE_FROM, _DELETE_BY_POSITION = (
    Statement(_DELETE_SOME.format(which=which))
    for which in ("message_id = ANY (%(ids)s)", "position BETWEEN %(start)s AND %(end)s", "position = ANY (%(places)s)")
)
_COUNT_FROM = Statement("SELECT count(*) FROM {messages} WHERE history_key = %s AND position >= %s")
_MESSAGES = Statement("SELECT {message_row} FROM {messages} WHERE history_key = %s AND position = ANY (%s)")
_SET_CONTENT = Statement("""
    WITH history AS (UPDATE {histories} SET revision = %(revision)s WHERE history_key = %(key)s)
    UPDATE {messages} SET content = %(content)s::json, revision = %(revision)s
    WHERE history_key = %(key)s AND position = %(position)s
""")
_COPY_MESSAGES = Statement("""
    WITH copied AS (
        INSERT INTO {messages}
            (history_key, position, created_at, message_id, role, content, search_terms, revision)
        SELECT %(target)s, %(start)s + row_number() OVER (ORDER BY position) - 1,
            created_at, message_id, role, content, search_terms, %(revision)s
        FROM {messages} WHERE history_key = %(source)s AND position BETWEEN 0 AND %(end)s
        RETURNING role
    ), counted AS (SELECT count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS rounds FROM copied)
    UPDATE {histories} SET
        next_position = next_position + messages,
        message_count = message_count + messages,
        round_count = round_count + rounds,
        revision = %(revision)s,
        expires_at = {expires_at},
        updated_at = {now},
        meta = coalesce(%(meta)s::json, meta),
        branch_of = CASE WHEN %(meta)s::text IS NULL THEN branch_of ELSE %(branch_of)s END
    FROM counted WHERE history_key = %(target)s RETURNING messages
""")


def _is_appended(appended: int | None) -> bool:
    """Whether a transaction has done the whole write. Otherwise another one goes on with it."""
    return appended is not None


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
            return await session.in_transaction(append_again, scope, chat_history_id, messages)
        if policy is DuplicatePolicy.SKIP and expected_revision is None:
            appended = await append_without_lock(session, scope, chat_history_id, messages)
            if appended is None:
                appended = await session.in_transaction(
                    append_to_new_history, scope, chat_history_id, messages, is_result=_is_appended
                )
            if appended is not None:
                return appended
        return await session.in_transaction(append_locked, scope, chat_history_id, messages, policy, expected_revision)

    @in_transaction
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
        key = history_key(scope, chat_history_id)
        locked = await lock_history(session, scope, chat_history_id)
        history = locked or NO_HISTORY
        parameters = {"key": key, "revision": history.next_revision}
        if from_message_id is not None:
            check_revision(expected_revision, history.revision)
            start = await position_of(session, key, from_message_id) if locked else None
            if start is None:
                raise message_not_found(from_message_id)
            await session.run(_DELETE_FROM, {**parameters, "start": start, "end": MAX_POSITION})
            await find_previews(session, key)
        elif locked:
            deleted = await session.run(_DELETE_BY_ID, {**parameters, "ids": list(message_ids or ())})
            if deleted.rowcount:
                check_revision(expected_revision, history.revision)  # undoes the transaction
                await find_previews(session, key)

    @in_transaction
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
        key = history_key(scope, chat_history_id)
        history = await lock_history(session, scope, chat_history_id)
        if history is None:
            check_revision(expected_revision, 0)
            raise message_not_found(from_message_id)
        start = await position_of(session, key, from_message_id)
        found = await known_messages(session, scope, chat_history_id, messages)
        known = {each.message_id: each.position for each in found}
        if messages and len(known) == len(messages) and len(await equal_ids(session, key, messages)) == len(messages):
            positions = [known[message.message_id] for message in messages]
            first = positions[-1] if start is None else start
            ((following,),) = await session.fetch(_COUNT_FROM, [key, first])
            if is_replaced_already(positions, first, following):
                return 0
        check_revision(expected_revision, history.revision)
        if start is None:
            raise message_not_found(from_message_id)
        revision = {"revision": history.next_revision}
        parameters = {"key": key, "start": start, "end": MAX_POSITION, **revision}
        await session.run(_DELETE_FROM, parameters)
        new = [message for message in messages if known.get(message.message_id, start) >= start]
        if new:
            parameters = await append_parameters(session, scope, chat_history_id, new)
            await session.run(APPEND_LOCKED, {**parameters, **revision}, prepare=True)
        await find_previews(session, key)
        return len(new)

    @in_transaction
    async def update_message(
        self, session: Session, scope: Scope, chat_history_id: str, message_id: str, change: Callable[[str], str]
    ) -> MessageRow:
        """Read and write the content in a transaction that has the history locked."""
        key = history_key(scope, chat_history_id)
        history = await lock_history(session, scope, chat_history_id)
        position = None if history is None else await position_of(session, key, message_id)
        if history is None or position is None:
            raise message_not_found(message_id)
        row = MessageRow(*(await session.fetch(_MESSAGES, [key, [position]]))[0])
        row.content = await session.to_thread_if_large([row.content], change, row.content)
        parameters = {"key": key, "position": position, "content": row.content, "revision": history.next_revision}
        await session.run(_SET_CONTENT, parameters)
        return row

    @in_transaction
    async def remove(
        self, session: Session, scope: Scope, chat_history_id: str, rows: Sequence[MessageRow]
    ) -> list[int]:
        """Compare and delete messages in a transaction that has the history locked."""
        history = await lock_history(session, scope, chat_history_id)
        if history is None:
            return []
        key = history_key(scope, chat_history_id)
        stored = await session.fetch(_MESSAGES, [key, [row.position for row in rows]])
        gone, others = compare_rows(rows, starmap(MessageRow, stored))
        await session.run(_DELETE_BY_POSITION, {"key": key, "places": gone, "revision": history.next_revision})
        await find_previews(session, key)
        return others

    @in_transaction
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
            found = await position_of(session, source_key, until_message_id)
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
        ((copied,),) = await session.fetch(_COPY_MESSAGES, parameters)
        await find_previews(session, parameters["target"])
        return int(copied)

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
            import_locked,
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
        return await session.in_transaction(import_several_locked, scope, histories)
