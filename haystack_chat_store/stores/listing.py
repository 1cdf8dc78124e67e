# SPDX-License-Identifier: Apache-2.0
"""Pages of the directory: how they are put together, their cursors, and what they show of a history."""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from haystack_chat_store import validation
from haystack_chat_store.json_values import equal_json
from haystack_chat_store.stores.rows import HistoryRow, Scope
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage, MessagePreview

# The number of histories that the engine returns at a time while a list looks for a meta.
_SEARCHED_AT_ONCE = 1_000
# The first element of a cursor. A later version with another order of the directory gets another number.
_CURSOR_VERSION = 1


class Listing:
    """A page of the list of histories that is being put together: what was asked for, and what was found so far."""

    def __init__(
        self, scope: Scope, prefix: str, meta: dict[str, Any], limit: int, before: tuple[int, str] | None
    ) -> None:
        """
        Begin with nothing found.

        :param meta: Values that the meta of each history must have.
        :param before: The place of the last history on the page before, or `None`.
        """
        self.is_unfinished = True
        self._scope, self._prefix, self._meta, self._limit, self._before = scope, prefix, meta, limit, before
        self._asked = limit + 1  # the last one is not on the page: it shows that another page follows
        self._found: list[HistoryRow] = []

    def next_arguments(self) -> tuple[Scope, str, tuple[int, str] | None, int]:
        """Return the arguments of the next call of the engine."""
        return self._scope, self._prefix, self._before, self._asked

    def add(self, rows: Sequence[HistoryRow]) -> None:
        """Keep those of the next histories that have the meta."""
        self._found += rows if not self._meta else filter(self._has_meta, rows)
        self.is_unfinished = len(rows) == self._asked and len(self._found) <= self._limit
        if self.is_unfinished:
            self._before, self._asked = (rows[-1].updated_at, rows[-1].chat_history_id), _SEARCHED_AT_ONCE

    def page(self) -> ChatHistoryPage:
        """Return the page."""
        cursor = None if len(self._found) <= self._limit else _encoded_cursor(self._found[self._limit - 1])
        return ChatHistoryPage(items=list(map(history_info, self._found[: self._limit])), cursor=cursor)

    def _has_meta(self, row: HistoryRow) -> bool:
        meta = validation.parsed_meta(row.meta) or {}
        return all(equal_json(meta.get(key), value) for key, value in self._meta.items())


def history_info(row: HistoryRow) -> ChatHistoryInfo:
    """Return what users see of a history. A damaged meta appears as an empty one."""
    return ChatHistoryInfo(
        chat_history_id=row.chat_history_id,
        message_count=row.message_count,
        round_count=row.round_count,
        revision=row.revision,
        created_at=readable_time(row.created_at),
        updated_at=readable_time(row.updated_at),
        title=row.title,
        meta={} if row.meta is None else validation.parsed_meta(row.meta) or {},
        user_id=row.user_id,
        preview=row.preview,
        last_message=None
        if row.last_role is None
        else MessagePreview(role=row.last_role, text=row.last_text, created_at=readable_time(row.last_at)),
    )


def _encoded_cursor(row: HistoryRow) -> str:
    """Return the cursor of a page that ends with a history."""
    place = [_CURSOR_VERSION, row.updated_at, row.chat_history_id]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def decoded_cursor(cursor: Any) -> tuple[int, str]:
    """
    Return `updated_at` and id of the last history on the cursor's page.

    :raises ValueError: If it is not a cursor of this version.
    """
    try:
        version, updated_at, chat_history_id = json.loads(base64.urlsafe_b64decode(cursor))
        validation.validated_number(version, "cursor", _CURSOR_VERSION, _CURSOR_VERSION)
        return validation.validated_number(updated_at, "cursor", -(2**62), 2**62), validation.validated_id(
            chat_history_id, "cursor"
        )
    except (TypeError, ValueError, RecursionError, binascii.Error):
        raise ValueError("cursor must be the cursor of a ChatHistoryPage, or None.") from None
