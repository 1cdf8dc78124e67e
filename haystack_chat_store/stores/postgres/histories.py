# SPDX-License-Identifier: Apache-2.0
"""What a transaction does with one history: it locks, makes or deletes it, and finds its previews anew."""

import uuid
from collections.abc import Sequence
from typing import NamedTuple, cast

from haystack_chat_store.stores.conflicts import check_access
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import Statement
from haystack_chat_store.stores.previews import beginning_of_content, first_beginning
from haystack_chat_store.stores.rows import HistoryRow, Scope

# A history that this transaction has made has revision 0 until its first change.
_LOCK_HISTORY = Statement("""
    SELECT next_position, message_count, revision,
        CASE WHEN revision = 0 THEN {first_revision} ELSE revision + 1 END, user_id, {has_expired}
    FROM {histories} WHERE history_key = %(key)s FOR UPDATE
""")
_MAKE_HISTORY = Statement("""
    INSERT INTO {histories}
        (history_key, namespace, chat_history_id, next_position, message_count, round_count, revision, user_id,
        expires_at)
    VALUES (%(key)s, %(namespace)s, %(id)s, 0, 0, 0, 0, %(user)s, {expires_at}) ON CONFLICT (history_key) DO NOTHING
""")
# The namespace keeps the greatest revision. Its row is written, and locked, only if that grows.
_DELETE = """
    WITH gone AS (
        DELETE FROM {{histories}} WHERE history_key = ANY (%(keys)s) AND {before}
        RETURNING history_key, namespace, revision, user_id, {{has_expired}} AS has_expired
    ), kept AS (
        INSERT INTO {{namespaces}} AS n (namespace, deleted_revision)
        SELECT namespace, greatest_revision
        FROM (SELECT namespace, max(revision) AS greatest_revision FROM gone GROUP BY namespace) AS greatest
        WHERE NOT EXISTS (
            SELECT FROM {{namespaces}} AS k
            WHERE k.namespace = greatest.namespace AND deleted_revision >= greatest_revision
        )
        ON CONFLICT (namespace) DO UPDATE SET deleted_revision = greatest(n.deleted_revision, excluded.deleted_revision)
    )
    SELECT history_key, revision, user_id, has_expired FROM gone
"""
# The history's row goes first: its lock keeps writers out until the messages are deleted, too.
DELETE_HISTORIES = Statement(_DELETE.format(before="{of_user}"))
_DELETE_OLD_HISTORIES = Statement(
    _DELETE.format(before="{of_user} AND (updated_at < {updated_before} OR {has_expired})")
)
DELETE_MESSAGES = Statement("DELETE FROM {messages} WHERE history_key = ANY (%s)")
HISTORY = Statement("SELECT {history_row} FROM {histories} WHERE history_key = %(key)s AND {visible}")
_LOCKED_HISTORY = Statement("SELECT {history_row} FROM {histories} WHERE history_key = %s")
_META = Statement("SELECT meta FROM {histories} WHERE history_key = %s")
# Those of a history that is there are its user's. Otherwise all of the scope are asked for.
BRANCHES = Statement("""
    SELECT chat_history_id, history_key, user_id FROM {histories}
    WHERE namespace = %(namespace)s AND branch_of = ANY (%(ids)s)
        AND CASE WHEN %(is_there)s THEN user_id IS NOT DISTINCT FROM %(owner)s ELSE {of_user} END
""")
NEXT_QUESTIONS = Statement("""
    SELECT position, content FROM {messages} WHERE history_key = %s AND role = 'user' AND position > %s
    ORDER BY position LIMIT 10
""")
_LAST_MESSAGE = Statement("""
    SELECT position, role, content FROM {messages} WHERE history_key = %s AND role <> 'system' AND position >= 0
    ORDER BY position DESC LIMIT 1
""")
_SET_PREVIEWS = Statement("""
    UPDATE {histories} SET preview = %(preview)s, last_role = %(last_role)s, last_text = %(last_text)s,
        last_at = (SELECT created_at FROM {messages} WHERE history_key = %(key)s AND position = %(position)s)
    WHERE history_key = %(key)s
""")
_POSITION_OF = Statement("SELECT position FROM {messages} WHERE history_key = %s AND message_id = %s")


class LockedHistory(NamedTuple):
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


#: What a history is before it exists.
NO_HISTORY = LockedHistory(0, 0, 0, 0, None)


async def lock_history(
    session: Session,
    scope: Scope,
    chat_history_id: str,
    *,
    make: bool = False,
    user_id: str | None = None,
    is_read: bool = False,
    is_checked: bool = True,
) -> LockedHistory | None:
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
        rows = await session.fetch(_LOCK_HISTORY, parameters)
        if rows and rows[0][-1] and not (is_read and not scope.includes(rows[0][-2])):
            await delete_histories(session, [key])
            rows = []
        if rows:
            locked = LockedHistory(*rows[0][:-1])
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
    return bool((await session.run(_MAKE_HISTORY, parameters)).rowcount)


async def delete_histories(
    session: Session, keys: Sequence[uuid.UUID], user_id: str | None = None, updated_before: int | None = None
) -> int:
    """
    Delete histories with their messages, and return their number.

    :param user_id: Only histories of this user, or `None` for all.
    :param updated_before: Only histories that have not changed since this time, or have expired, or `None` for all.
    """
    parameters = {"keys": keys, "user": user_id, "updated_before": updated_before}
    statement = DELETE_HISTORIES if updated_before is None else _DELETE_OLD_HISTORIES
    rows = await session.fetch(statement, parameters)
    await session.run(DELETE_MESSAGES, [[key for key, *_ in rows]])
    return len(rows)


async def history_row(session: Session, key: uuid.UUID) -> HistoryRow:
    """Return a history that the transaction has locked. It may expire meanwhile."""
    return HistoryRow(*(await session.fetch(_LOCKED_HISTORY, [key]))[0])


async def meta_of(session: Session, key: uuid.UUID) -> str | None:
    """Return the meta of a history that the transaction has locked, as the text of a JSON object."""
    ((meta,),) = await session.fetch(_META, [key])
    return cast(str | None, meta)


async def find_previews(session: Session, key: uuid.UUID) -> None:
    """Find the first question and the last message of a history anew."""
    preview, position = None, -1
    while preview is None and (rows := await session.fetch(NEXT_QUESTIONS, [key, position])):
        contents, position = [content for _, content in rows], rows[-1][0]
        preview = await session.to_thread_if_large(contents, first_beginning, contents)
    found = await session.fetch(_LAST_MESSAGE, [key])
    last, role, content = found[0] if found else (None, None, "")
    last_text = await session.to_thread_if_large([content], beginning_of_content, content)
    parameters = {"key": key, "preview": preview, "position": last, "last_role": role, "last_text": last_text}
    await session.run(_SET_PREVIEWS, parameters)


async def position_of(session: Session, key: uuid.UUID, message_id: str) -> int | None:
    """Return the position of a message, or `None` if the history does not have it."""
    rows = await session.fetch(_POSITION_OF, [key, message_id])
    return int(rows[0][0]) if rows else None
