# SPDX-License-Identifier: Apache-2.0
"""Which histories a statement sees: those of the scope that have not expired."""

from typing import TypeAlias

from haystack_chat_store.stores.rows import Scope
from haystack_chat_store.stores.times import microseconds_now

#: The condition that a history of the namespace is in the scope. ?3 and ?4 are the user and the present time.
IS_VISIBLE = "(?3 IS NULL OR user_id = ?3) AND coalesce(expires_at > ?4, 1)"
#: The condition for one history of the scope.
IS_VISIBLE_HISTORY = f"namespace = ?1 AND chat_history_id = ?2 AND {IS_VISIBLE}"

#: The parameters of `IS_VISIBLE_HISTORY`.
VisibleHistory: TypeAlias = "tuple[str, str, str | None, int]"


def visible_history(scope: Scope, chat_history_id: str) -> VisibleHistory:
    """Return the parameters of `IS_VISIBLE_HISTORY`."""
    return scope.namespace, chat_history_id, scope.user_id, microseconds_now()
