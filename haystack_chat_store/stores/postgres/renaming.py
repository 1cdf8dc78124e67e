# SPDX-License-Identifier: Apache-2.0
"""Gives a history another id. Its branches follow it."""

from typing import Any

from haystack_chat_store.stores.conflicts import check_access, history_is_there, history_not_found
from haystack_chat_store.stores.postgres.histories import (
    BRANCHES,
    delete_histories,
    history_row,
    lock_history,
    make_history,
    meta_of,
)
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import Statement
from haystack_chat_store.stores.rows import HistoryRow, Scope, branch_origin, meta_of_branch, renamed_branch_ids

# The old row keeps its revision for the namespace when it is deleted.
_TAKE_OVER_HISTORY = Statement("""
    UPDATE {histories} AS h SET next_position = old.next_position, message_count = old.message_count,
        round_count = old.round_count, revision = greatest({first_revision}, old.revision + 1),
        created_at = old.created_at, updated_at = old.updated_at,
        title = old.title, title_terms = old.title_terms, meta = %(meta)s::json,
        user_id = old.user_id, expires_at = old.expires_at, branch_of = %(branch_of)s, preview = old.preview,
        last_role = old.last_role, last_text = old.last_text, last_at = old.last_at, summary = old.summary
    FROM {histories} AS old WHERE h.history_key = %(key)s AND old.history_key = %(old_key)s
""")
_TAKE_OVER_MESSAGES = Statement("""
    INSERT INTO {messages} (history_key, position, created_at, message_id, role, content, search_terms, revision,
        question_id)
    SELECT %(key)s, position, created_at, message_id, role, content, search_terms, revision, question_id
    FROM {messages} WHERE history_key = %(old_key)s
""")


async def rename_locked(session: Session, scope: Scope, old_id: str, new_id: str) -> HistoryRow:
    """Copy the rows of a history under another key, and delete the old ones. Do the same with its branches."""
    # In the order of their ids, so that two calls in opposite directions do not deadlock.
    locked = {each: await lock_history(session, scope, each, is_checked=False) for each in sorted((old_id, new_id))}
    old = locked[old_id]
    if old is None:
        raise history_not_found(old_id)
    for history in (old, locked[new_id]):
        if history is not None:
            check_access(scope, history.user_id)
    if locked[new_id] is not None or not await make_history(session, scope, new_id):
        raise history_is_there(new_id)
    await _take_over(session, scope, old_id, new_id, await meta_of(session, history_key(scope, old_id)))
    await _rename_branches(session, scope, old.user_id, old_id, new_id)
    return await history_row(session, history_key(scope, new_id))


async def _take_over(session: Session, scope: Scope, old_id: str, new_id: str, meta: str | None) -> None:
    """Move a history to another one, which this transaction has made, and give it a meta."""
    keys: dict[str, Any] = {
        "key": history_key(scope, new_id),
        "old_key": history_key(scope, old_id),
        "namespace": scope.namespace,
        "meta": meta,
        "branch_of": branch_origin(new_id, meta),
    }
    await session.run(_TAKE_OVER_HISTORY, keys)
    await session.run(_TAKE_OVER_MESSAGES, keys)
    await delete_histories(session, [keys["old_key"]])


async def _rename_branches(session: Session, scope: Scope, owner: str | None, old_id: str, new_id: str) -> None:
    """Have the branches of a history that was renamed follow it, and theirs: those that have the same user."""
    origin = {"namespace": scope.namespace, "user": scope.user_id, "is_there": True, "owner": owner, "ids": [old_id]}
    for branch, key, _ in await session.fetch(BRANCHES, origin):
        locked = await lock_history(session, scope, branch, is_checked=False)
        meta = None if locked is None else await meta_of(session, key)
        if locked is None or locked.user_id != owner or branch_origin(branch, meta) != old_id:
            continue  # it was changed meanwhile
        for name in renamed_branch_ids(branch, old_id, new_id):
            is_free = await lock_history(session, scope, name, is_checked=False) is None
            if is_free and await make_history(session, scope, name):
                await _take_over(session, scope, branch, name, meta_of_branch(meta, new_id))
                await _rename_branches(session, scope, owner, branch, name)
                break
