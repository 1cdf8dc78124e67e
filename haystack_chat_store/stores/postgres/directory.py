# SPDX-License-Identifier: Apache-2.0
"""The operations on whole histories: the directory of them, titles, statistics, and erasing."""

import math
import uuid
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import starmap
from typing import Any

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.search_text import Phrase
from haystack_chat_store.stores.conflicts import check_access, check_revision, history_is_there, history_not_found
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.schema import history_key, history_parameters
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import (
    AFTER_ALL_IDS,
    AFTER_ALL_TIMES,
    BEGIN_READING,
    READ_WHOLE_TABLES,
    prefix_parameters,
)
from haystack_chat_store.stores.postgres.terms import title_tsvector, tsquery
from haystack_chat_store.stores.postgres.writing import delete_key, lock_history, make_history
from haystack_chat_store.stores.rows import (
    UNCHANGED,
    HistoryChange,
    HistoryRow,
    Scope,
    branch_origin,
    meta_of_branch,
    renamed_branch_ids,
)
from haystack_chat_store.stores.usage import UsageCounter
from haystack_chat_store.types import StoreStatistics

# Up to this many histories are sorted, or passed on the walk by time. If they do not suffice, four times as many are.
_FIRST_TRY = 256
# The number of histories that one transaction deletes. It deletes fewer if they have more messages than this.
_DELETE_BATCH_SIZE = 1_000
_DELETE_BATCH_MESSAGES = 100_000
_EPOCH = date(1970, 1, 1)


class Directory(Engine[Session]):
    """The operations on whole histories."""

    async def delete(self, session: Session, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        """Delete a history and its branches, with their messages, in one transaction."""
        await session.in_transaction(_delete_expected, scope, chat_history_id, expected_revision)

    async def delete_all(self, session: Session, scope: Scope) -> bool:
        """Delete in batches, each with a time limit of its own, so that any number of histories can be deleted."""
        if scope.user_id is not None:
            return bool(await self.erase_some(session, scope, "", None, _DELETE_BATCH_SIZE))
        last_id = ""
        while found := await session.fetch(
            session.statements.next_histories, [scope.namespace, last_id, _DELETE_BATCH_SIZE]
        ):
            batch = _delete_batch(found)
            last_id = batch[-1][0]
            keys = [key for _, key, _ in batch]
            await session.in_transaction(_delete_histories, scope, keys, is_result=lambda _: False)
            session.renew_deadline()
        return False

    async def history(self, session: Session, scope: Scope, chat_history_id: str) -> HistoryRow | None:
        """Return one history, or `None` if it does not exist."""
        rows = await session.fetch(session.statements.history, history_parameters(scope, chat_history_id), prepare=True)
        return HistoryRow(*rows[0]) if rows else None

    async def histories(
        self, session: Session, scope: Scope, prefix: str, before: tuple[int, str] | None, limit: int
    ) -> list[HistoryRow]:
        """
        Sort the histories with the prefix if they are few, and walk by time if they are many.

        Both are tried with growing limits until one completes. The page is always the result of one statement.
        """
        statements = session.statements
        updated_at, chat_history_id = before or (AFTER_ALL_TIMES, AFTER_ALL_IDS)
        parameters = prefix_parameters(scope, prefix) | {
            "updated_at": updated_at,
            "id": chat_history_id,
            "limit": limit,
        }
        if scope.user_id is not None:
            rows = await session.fetch(statements.histories_of_user, parameters, prepare=True)
            return list(starmap(HistoryRow, rows))
        if not prefix:
            return list(starmap(HistoryRow, await session.fetch(statements.all_histories, parameters, prepare=True)))
        few, statement = _FIRST_TRY, statements.histories
        while True:
            parameters |= {"few": few, "near": limit + few}
            ((have_prefix, follow),) = await session.fetch(statements.have_more, parameters)
            if not have_prefix:
                statement = statements.histories_of_few
            if not have_prefix or not follow:
                break
            rows = await session.fetch(statements.histories_near, parameters)
            if len(rows) == limit:
                return list(starmap(HistoryRow, rows))
            few *= 4
        return list(starmap(HistoryRow, await session.fetch(statement, parameters)))

    async def histories_by_id(
        self, session: Session, scope: Scope, prefix: str, after: str, limit: int
    ) -> list[HistoryRow]:
        """Walk along the index by id."""
        parameters = {**prefix_parameters(scope, prefix), "after": after, "limit": limit}
        return list(starmap(HistoryRow, await session.fetch(session.statements.histories_by_id, parameters)))

    async def update_history(
        self,
        session: Session,
        scope: Scope,
        chat_history_id: str,
        change: HistoryChange,
    ) -> HistoryRow | None:
        """Change the row in a transaction that has it locked, and hand over its branches."""
        return await session.in_transaction(_update_locked, scope, chat_history_id, change)

    async def create_history(self, session: Session, scope: Scope, history: HistoryRow) -> tuple[HistoryRow, bool]:
        """Insert the row in a transaction, unless it is there."""
        return await session.in_transaction(_create_locked, scope, history)

    async def rename_history(self, session: Session, scope: Scope, old_id: str, new_id: str) -> HistoryRow:
        """Copy the rows under other keys, and delete the old ones, in one transaction."""
        return await session.in_transaction(_rename_locked, scope, old_id, new_id)

    async def renew(self, session: Session, scope: Scope, chat_history_id: str) -> None:
        """Change the row."""
        parameters = {**history_parameters(scope, chat_history_id), "lifetime": scope.lifetime}
        await session.run(session.statements.renew, parameters)

    async def search_titles(
        self,
        session: Session,
        scope: Scope,
        phrases: Sequence[Phrase],
        chat_history_id: str | None,
        prefix: str,
        limit: int,
    ) -> list[HistoryRow]:
        """Look titles up by their terms."""
        parameters = {**prefix_parameters(scope, prefix), "query": tsquery(phrases), "limit": limit}
        if chat_history_id is not None:
            parameters |= {"prefix": chat_history_id, "end": f"{chat_history_id}\x01"}  # only this id is between them
        return list(starmap(HistoryRow, await session.fetch(session.statements.titles, parameters)))

    async def namespaces(self, session: Session, scope: Scope) -> list[str]:  # noqa: ARG002  (all namespaces)
        """Go from one namespace to the next in the index by id."""
        return sorted(name for (name,) in await session.fetch(session.statements.namespaces))

    async def statistics(self, session: Session, scope: Scope, prefix: str) -> StoreStatistics:
        """Count every message, as of one moment."""
        return await session.in_transaction(_statistics, prefix_parameters(scope, prefix), begin=BEGIN_READING)

    async def erase_some(
        self, session: Session, scope: Scope, prefix: str, updated_before: int | None, limit: int
    ) -> int:
        """Delete a batch of histories, but none that changes meanwhile and is then too new."""
        parameters = {**prefix_parameters(scope, prefix), "limit": limit, "updated_before": updated_before}
        statements = session.statements
        statement = statements.erasable_by_prefix if updated_before is None else statements.erasable_by_age
        if scope.user_id is not None:
            statement = statements.erasable_of_user
        for each in (statement,) if updated_before is None else (statement, statements.erasable_expired):
            while found := await session.fetch(each, parameters):
                keys = [key for _, key, _ in _delete_batch(found)]
                if erased := await session.in_transaction(
                    _delete_histories, scope, keys, updated_before, is_result=bool
                ):
                    return erased
        return 0

    async def vacuum(self, session: Session, scope: Scope) -> None:  # noqa: ARG002  (the tables of all namespaces)
        """Rewrite the tables and their indexes, however long it takes."""
        for statement in (session.statements.vacuum_messages, session.statements.vacuum_histories):
            session.renew_deadline(math.inf)
            if not await session.vacuum(statement):
                raise UnsupportedOperationError("This role may not vacuum the tables. Let their owner run VACUUM FULL.")


async def _statistics(session: Session, parameters: dict[str, Any]) -> StoreStatistics:
    await session.run(READ_WHOLE_TABLES)
    ((histories, messages, rounds),) = await session.fetch(session.statements.totals, parameters)
    ((size,),) = await session.fetch(session.statements.size_on_disk)
    per_day = await session.fetch(session.statements.per_day, parameters)
    usage = UsageCounter()
    for created_at, meta in await session.fetch(session.statements.usage, parameters):
        usage.add_text(created_at, meta)
    return StoreStatistics(
        chat_histories=histories,
        messages=messages,
        rounds=rounds,
        # The size is that of the whole database, so a store of one user does not tell it.
        size=size if parameters["user"] is None else None,
        messages_per_day={_EPOCH + timedelta(days=day): count for day, count in per_day},
        usage=usage.total(),
        usage_per_day=usage.per_day(),
    )


async def _update_locked(
    session: Session, scope: Scope, chat_history_id: str, change: HistoryChange
) -> HistoryRow | None:
    locked = await lock_history(session, scope, chat_history_id)
    if locked is None:
        return None
    key = history_key(scope, chat_history_id)
    has_meta = change.meta is not UNCHANGED or change.merged is not None
    stored = (await session.fetch(session.statements.meta, [key]))[0][0] if change.merged is not None else None
    meta = change.new_meta(stored) if has_meta else None
    parameters = {
        "key": key,
        "has_title": change.title is not UNCHANGED,
        "title": change.given_title,
        "title_terms": title_tsvector(change.given_title),
        "has_meta": has_meta,
        "meta": meta,
        "branch_of": branch_origin(chat_history_id, meta),
        "has_user": change.user_id is not UNCHANGED,
        "user": None if change.user_id is UNCHANGED else change.user_id,
    }
    row = HistoryRow(*(await session.fetch(session.statements.update_history, parameters))[0])
    origins: dict[str, Any] = {"namespace": scope.namespace, "owner": locked.user_id, "new_owner": row.user_id}
    origins["ids"] = [chat_history_id] if row.user_id != locked.user_id else []
    while origins["ids"]:
        found = await session.fetch(session.statements.hand_over_branches, origins)
        origins["ids"] = [branch for (branch,) in found]
    return row


async def _create_locked(session: Session, scope: Scope, history: HistoryRow) -> tuple[HistoryRow, bool]:
    is_new = await lock_history(session, scope, history.chat_history_id) is None and await make_history(
        session, scope, history.chat_history_id, history.user_id
    )
    locked = await lock_history(session, scope, history.chat_history_id)
    key = history_key(scope, history.chat_history_id)
    if is_new and locked is not None:
        parameters = {
            "key": key,
            "title": history.title,
            "title_terms": title_tsvector(history.title),
            "meta": history.meta,
            "branch_of": branch_origin(history.chat_history_id, history.meta),
            "revision": locked.next_revision,
        }
        await session.run(session.statements.begin_history, parameters)
    rows = await session.fetch(session.statements.history, {"key": key, "user": None})
    return HistoryRow(*rows[0]), is_new


async def _rename_locked(session: Session, scope: Scope, old_id: str, new_id: str) -> HistoryRow:
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
    ((meta,),) = await session.fetch(session.statements.meta, [history_key(scope, old_id)])
    await _take_over(session, scope, old_id, new_id, meta)
    await _rename_branches(session, scope, old.user_id, old_id, new_id)
    rows = await session.fetch(session.statements.history, {"key": history_key(scope, new_id), "user": None})
    return HistoryRow(*rows[0])


async def _take_over(session: Session, scope: Scope, old_id: str, new_id: str, meta: str | None) -> None:
    """Move a history to another one, which this transaction has made, and give it a meta."""
    keys: dict[str, Any] = {
        "key": history_key(scope, new_id),
        "old_key": history_key(scope, old_id),
        "namespace": scope.namespace,
        "meta": meta,
        "branch_of": branch_origin(new_id, meta),
    }
    await session.run(session.statements.take_over_history, keys)
    await session.run(session.statements.take_over_messages, keys)
    await delete_key(session, keys["old_key"])


async def _rename_branches(session: Session, scope: Scope, owner: str | None, old_id: str, new_id: str) -> None:
    """Have the branches of a history that was renamed follow it, and theirs: those that have the same user."""
    origin = {"namespace": scope.namespace, "user": scope.user_id, "is_there": True, "owner": owner, "ids": [old_id]}
    for branch, key, _ in await session.fetch(session.statements.branches, origin):
        locked = await lock_history(session, scope, branch, is_checked=False)
        found = await session.fetch(session.statements.meta, [key])
        if locked is None or locked.user_id != owner or branch_origin(branch, found[0][0]) != old_id:
            continue  # it was changed meanwhile
        for name in renamed_branch_ids(branch, old_id, new_id):
            is_free = await lock_history(session, scope, name, is_checked=False) is None
            if is_free and await make_history(session, scope, name):
                await _take_over(session, scope, branch, name, meta_of_branch(found[0][0], new_id))
                await _rename_branches(session, scope, owner, branch, name)
                break


async def _delete_expected(session: Session, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
    """
    Delete a history and its branches, and theirs, but none of another user.

    If it is another user's, or has another revision, raise an error, which undoes the transaction.
    """
    parameters = {"keys": [history_key(scope, chat_history_id)], "user": None}
    is_there, owner = False, None
    for key, revision, user_id, has_expired in await session.fetch(session.statements.delete_histories, parameters):
        if not has_expired:
            check_access(scope, user_id)
            check_revision(expected_revision, revision)
            is_there, owner = True, user_id
        await session.run(session.statements.delete_messages, [[key]])
    origins = [(is_there, owner, [chat_history_id])]
    while origins:
        is_there, owner, ids = origins.pop()
        named = {"namespace": scope.namespace, "user": scope.user_id, "is_there": is_there, "owner": owner, "ids": ids}
        found = await session.fetch(session.statements.branches, named)
        await _delete_histories(session, scope, [key for _, key, _ in found])
        for user_id in {user_id for *_, user_id in found}:
            origins.append((True, user_id, [branch for branch, _, owner in found if owner == user_id]))


async def _delete_histories(
    session: Session, scope: Scope, keys: Sequence[uuid.UUID], updated_before: int | None = None
) -> int:
    """Delete histories, but only those that have not changed since a time, if that is given. Return their number."""
    parameters = {"keys": keys, "user": scope.user_id}
    if updated_before is None:
        rows = await session.fetch(session.statements.delete_histories, parameters)
    else:
        old = {**parameters, "updated_before": updated_before}
        rows = await session.fetch(session.statements.delete_old_histories, old)
    await session.run(session.statements.delete_messages, [[key for key, *_ in rows]])
    return len(rows)


def _delete_batch(found: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Return the first of these histories: as many as have not too many messages together, and at least one."""
    messages = 0
    for index, (_, _, count) in enumerate(found):
        messages += count
        if index and messages > _DELETE_BATCH_MESSAGES:
            return found[:index]
    return found
