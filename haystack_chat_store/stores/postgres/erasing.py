# SPDX-License-Identifier: Apache-2.0
"""The operations that delete whole histories."""

import math
from collections.abc import Sequence
from typing import Any

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.stores.conflicts import check_access, check_revision
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.postgres.histories import BRANCHES, DELETE_HISTORIES, DELETE_MESSAGES, delete_histories
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.stores.postgres.session import Session, in_transaction
from haystack_chat_store.stores.postgres.statements import Statement, prefix_parameters
from haystack_chat_store.stores.rows import Scope

_NEXT_HISTORIES = Statement("""
    SELECT chat_history_id, history_key, message_count FROM {histories}
    WHERE namespace = %s AND chat_history_id COLLATE "C" > %s ORDER BY chat_history_id COLLATE "C" LIMIT %s
""")
# Those of a user, or that have expired, are found by indexes of their own, and others by that of ids or of times.
_ERASABLE = """
    SELECT chat_history_id, history_key, message_count FROM {{histories}}
    WHERE namespace = %(namespace)s AND {which} ORDER BY {order} LIMIT %(limit)s
"""
_IN_RANGE = "{by_id} >= %(prefix)s AND {by_id} < %(end)s"
_STARTS = "starts_with(chat_history_id, %(prefix)s)"
_ERASABLE_BY_PREFIX = Statement(_ERASABLE.format(which=_IN_RANGE, order="{by_id}"))
_ERASABLE_BY_AGE = Statement(
    _ERASABLE.format(which=f"{_IN_RANGE} AND updated_at < {{updated_before}}", order="updated_at, {by_id}")
)
_ERASABLE_OF_USER = Statement(
    _ERASABLE.format(
        which=f"user_id = %(user)s AND {_STARTS}"
        " AND (%(updated_before)s::bigint IS NULL OR updated_at < {updated_before})",
        order="updated_at, {by_id}",
    )
)
_ERASABLE_EXPIRED = Statement(
    _ERASABLE.format(which=f"expires_at <= statement_timestamp() AND {_STARTS} AND {{of_user}}", order="expires_at")
)
_VACUUM_MESSAGES = Statement("VACUUM (FULL) {messages}")
_VACUUM_HISTORIES = Statement("VACUUM (FULL) {histories}")


# The number of histories that one transaction deletes. It deletes fewer if they have more messages than this.
_DELETE_BATCH_SIZE = 1_000
_DELETE_BATCH_MESSAGES = 100_000


class Erasing(Engine[Session]):
    """The operations that delete whole histories."""

    @in_transaction
    async def delete(self, session: Session, scope: Scope, chat_history_id: str, expected_revision: int | None) -> None:
        """Delete a history and its branches, and theirs, but none of another user."""
        parameters = {"keys": [history_key(scope, chat_history_id)], "user": None}
        is_there, owner = False, None
        for key, revision, user_id, has_expired in await session.fetch(DELETE_HISTORIES, parameters):
            if not has_expired:
                check_access(scope, user_id)  # an error undoes the transaction
                check_revision(expected_revision, revision)
                is_there, owner = True, user_id
            await session.run(DELETE_MESSAGES, [[key]])
        origins = [(is_there, owner, [chat_history_id])]
        while origins:
            is_there, owner, ids = origins.pop()
            origin = {"is_there": is_there, "owner": owner, "ids": ids}
            found = await session.fetch(BRANCHES, {"namespace": scope.namespace, "user": scope.user_id, **origin})
            await delete_histories(session, [key for _, key, _ in found], scope.user_id)
            for user_id in {user_id for *_, user_id in found}:
                origins.append((True, user_id, [branch for branch, _, owner in found if owner == user_id]))

    async def delete_all(self, session: Session, scope: Scope) -> bool:
        """Delete in batches, each with a time limit of its own, so that any number of histories can be deleted."""
        if scope.user_id is not None:
            return bool(await self.erase_some(session, scope, "", None, _DELETE_BATCH_SIZE))
        last_id = ""
        while found := await session.fetch(_NEXT_HISTORIES, [scope.namespace, last_id, _DELETE_BATCH_SIZE]):
            batch = _batch_of(found)
            last_id = batch[-1][0]
            await session.in_transaction(delete_histories, [key for _, key, _ in batch], is_result=lambda _: False)
            session.renew_deadline()
        return False

    async def erase_some(
        self, session: Session, scope: Scope, prefix: str, updated_before: int | None, limit: int
    ) -> int:
        """Delete a batch of histories, but none that changes meanwhile and is then too new."""
        parameters = {**prefix_parameters(scope, prefix), "limit": limit, "updated_before": updated_before}
        statement = _ERASABLE_BY_PREFIX if updated_before is None else _ERASABLE_BY_AGE
        if scope.user_id is not None:
            statement = _ERASABLE_OF_USER
        for each in (statement,) if updated_before is None else (statement, _ERASABLE_EXPIRED):
            while found := await session.fetch(each, parameters):
                keys = [key for _, key, _ in _batch_of(found)]
                if erased := await session.in_transaction(
                    delete_histories, keys, scope.user_id, updated_before, is_result=bool
                ):
                    return erased
        return 0

    async def vacuum(self, session: Session, scope: Scope) -> None:  # noqa: ARG002  (the tables of all namespaces)
        """Rewrite the tables and their indexes, however long it takes."""
        for statement in (_VACUUM_MESSAGES, _VACUUM_HISTORIES):
            session.renew_deadline(math.inf)
            if not await session.vacuum(statement):
                raise UnsupportedOperationError("This role may not vacuum the tables. Let their owner run VACUUM FULL.")


def _batch_of(found: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Return the first of these histories: as many as have not too many messages together, and at least one."""
    messages = 0
    for index, (_, _, count) in enumerate(found):
        messages += count
        if index and messages > _DELETE_BATCH_MESSAGES:
            return found[:index]
    return found
