# SPDX-License-Identifier: Apache-2.0
"""
What users call for whole chat histories: listing, titles, forks, erasing.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from haystack_chat_store import validation
from haystack_chat_store.stores.conflicts import history_not_found
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Scope, Unchanged
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage, StoreStatistics

# How many histories are erased in one step. Other writers wait for no longer than that.
_ERASE_BATCH_SIZE = 100
# Cursors begin with it. Other numbers are for other ways to order the directory.
_CURSOR_VERSION = 1


class DirectoryMethods:
    """
    The public methods for whole histories.
    """

    engine: Engine[Any]
    scope: Scope

    def list_chat_histories(self, *, prefix: str = "", limit: int = 50, cursor: str | None = None) -> ChatHistoryPage:
        """
        Return a page of the histories of this namespace, the one whose messages changed last first.

        To see all, call it again with the page's cursor until that is `None`. Each history that is there throughout,
        and is not changed meanwhile, is then seen exactly once, whatever happens to others; one that is changed moves
        to the front, and is seen once if its turn had come, else not.

        :param prefix: Only histories whose ids begin with this text, taken literally. Defaults to all.
        :param limit: How many a page has at most: 1 to 1,000. Defaults to 50.
        :param cursor: The cursor of the page before.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails.
        """
        prefix, limit, before = _checked_listing(prefix, limit, cursor)
        rows = self.engine.run(self.engine.histories, self.scope, prefix, before, limit + 1)
        return _page(rows, limit)

    async def list_chat_histories_async(
        self, *, prefix: str = "", limit: int = 50, cursor: str | None = None
    ) -> ChatHistoryPage:
        """
        Do what `list_chat_histories` does, without blocking the event loop.
        """
        prefix, limit, before = _checked_listing(prefix, limit, cursor)
        rows = await self.engine.run_async(self.engine.histories, self.scope, prefix, before, limit + 1)
        return _page(rows, limit)

    def get_chat_history(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """
        Return what is known of one history, or `None` if there is none with this id.

        :param chat_history_id: Which conversation.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        row = self.engine.run(self.engine.history, self.scope, history)
        return None if row is None else _info(row)

    async def get_chat_history_async(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """
        Do what `get_chat_history` does, without blocking the event loop.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        row = await self.engine.run_async(self.engine.history, self.scope, history)
        return None if row is None else _info(row)

    def update_chat_history(
        self,
        chat_history_id: str,
        *,
        title: str | Unchanged | None = UNCHANGED,
        meta: dict[str, Any] | Unchanged | None = UNCHANGED,
    ) -> ChatHistoryInfo:
        """
        Set the title or the meta of a history, and return what is then known of it. Its `updated_at` stays.

        :param chat_history_id: Which conversation. It must have been written to.
        :param title: The new title, up to 1,000 characters without NUL; `None` for none. Stays as it is if left out.
        :param meta: The new meta, in place of all of the old one; `None` for none. Stays as it is if left out. What
            JSON has no form for is stored in the form it has in messages.
        :raises ValueError: If an argument is wrong. Nothing was changed.
        :raises ChatHistoryNotFoundError: If there is no such history.
        :raises ChatMessageStoreError: If the engine fails.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        changes = validation.validated_title(title), validation.validated_meta(meta)
        row = self.engine.run(self.engine.update_history, self.scope, history, *changes)
        if row is None:
            raise history_not_found(history)
        return _info(row)

    async def update_chat_history_async(
        self,
        chat_history_id: str,
        *,
        title: str | Unchanged | None = UNCHANGED,
        meta: dict[str, Any] | Unchanged | None = UNCHANGED,
    ) -> ChatHistoryInfo:
        """
        Do what `update_chat_history` does, without blocking the event loop.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        changes = validation.validated_title(title), validation.validated_meta(meta)
        row = await self.engine.run_async(self.engine.update_history, self.scope, history, *changes)
        if row is None:
            raise history_not_found(history)
        return _info(row)

    def copy_messages(self, source_id: str, target_id: str, *, until_message_id: str | None = None) -> int:
        """
        Copy the messages of a history, or its beginning, to another: to go on from there in a different way.

        It appears whole or not at all, and happens inside the engine; only on Redis do most copies travel through the
        client (see `docs/redis.md`). The copies keep their ids and times. Title and meta are not copied.

        :param source_id: The history to copy from.
        :param target_id: The history to copy to. It may exist, but must have no messages.
        :param until_message_id: The id of the last message to copy. Defaults to `None`: all.
        :returns: How many messages were copied.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryNotFoundError: If there is no history `source_id`.
        :raises MessageNotFoundError: If it does not have `until_message_id`.
        :raises ChatHistoryExistsError: If the target has messages.
        :raises ChatMessageStoreError: If the engine fails.
        """
        copy = _checked_copy(source_id, target_id, until_message_id)
        return self.engine.run(self.engine.copy, self.scope, *copy)

    async def copy_messages_async(self, source_id: str, target_id: str, *, until_message_id: str | None = None) -> int:
        """
        Do what `copy_messages` does, without blocking the event loop.
        """
        copy = _checked_copy(source_id, target_id, until_message_id)
        return await self.engine.run_async(self.engine.copy, self.scope, *copy)

    def delete_chat_history(self, chat_history_id: str) -> None:
        """
        Delete a history with all that belongs to it, for good. Deleting one that does not exist does nothing.

        :param chat_history_id: Which conversation.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails. None or all of it was deleted.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        self.engine.run(self.engine.delete, self.scope, history)

    async def delete_chat_history_async(self, chat_history_id: str) -> None:
        """
        Do what `delete_chat_history` does, without blocking the event loop.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        await self.engine.run_async(self.engine.delete, self.scope, history)

    def delete_chat_histories(self, *, prefix: str, vacuum: bool = False) -> int:
        """
        Delete all histories whose ids begin with a text, for good: all of a user, if ids begin with the user's.

        They go some at a time, each whole: if this fails, some may be gone. Call it again to delete the rest.

        :param prefix: What the ids begin with, taken literally. Must not be empty: see `delete_all_messages`.
        :param vacuum: Whether to have what was deleted leave the engine's files too, where the bytes may stay until
            they are overwritten. Takes long on a large database. Defaults to False.
        :returns: How many histories were deleted.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails.
        """
        return self._erase(validation.validated_id(prefix, "prefix"), None, vacuum)

    async def delete_chat_histories_async(self, *, prefix: str, vacuum: bool = False) -> int:
        """
        Do what `delete_chat_histories` does, without blocking the event loop.
        """
        return await self._erase_async(validation.validated_id(prefix, "prefix"), None, vacuum)

    def purge(self, *, older_than: datetime, vacuum: bool = False) -> int:
        """
        Delete all histories whose messages have not changed since a time, for good.

        They go some at a time, each whole: if this fails, some may be gone. Call it again to delete the rest.

        :param older_than: An aware datetime. What changed at this time or later stays.
        :param vacuum: As in `delete_chat_histories`.
        :returns: How many histories were deleted.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails.
        """
        return self._erase("", validation.microseconds(older_than, "older_than"), vacuum)

    async def purge_async(self, *, older_than: datetime, vacuum: bool = False) -> int:
        """
        Do what `purge` does, without blocking the event loop.
        """
        return await self._erase_async("", validation.microseconds(older_than, "older_than"), vacuum)

    def statistics(self, *, prefix: str = "") -> StoreStatistics:
        """
        Return how much there is. It counts every message, so it takes the longer the more there are.

        :param prefix: Only of histories whose ids begin with this text. Defaults to all of this namespace.
        :raises ValueError: If `prefix` cannot be one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        return self.engine.run(self.engine.statistics, self.scope, validation.validated_text(prefix, "prefix"))

    async def statistics_async(self, *, prefix: str = "") -> StoreStatistics:
        """
        Do what `statistics` does, without blocking the event loop.
        """
        return await self.engine.run_async(
            self.engine.statistics, self.scope, validation.validated_text(prefix, "prefix")
        )

    def _erase(self, prefix: str, updated_before: int | None, vacuum: bool) -> int:
        count = 0
        erase = self.engine.erase_some
        while erased := self.engine.run(erase, self.scope, prefix, updated_before, _ERASE_BATCH_SIZE):
            count += erased
        if vacuum:
            self.engine.run(self.engine.vacuum, self.scope)
        return count

    async def _erase_async(self, prefix: str, updated_before: int | None, vacuum: bool) -> int:
        count = 0
        erase = self.engine.erase_some
        while erased := await self.engine.run_async(erase, self.scope, prefix, updated_before, _ERASE_BATCH_SIZE):
            count += erased
        if vacuum:
            await self.engine.run_async(self.engine.vacuum, self.scope)
        return count


def _checked_listing(prefix: str, limit: int, cursor: str | None) -> tuple[str, int, tuple[int, str] | None]:
    prefix = validation.validated_text(prefix, "prefix")
    limit = validation.validated_number(limit, "limit", 1, validation.MAX_LIMIT)
    return prefix, limit, None if cursor is None else _place_of(cursor)


def _checked_copy(source_id: str, target_id: str, until_message_id: str | None) -> tuple[str, str, str | None]:
    source = validation.validated_id(source_id, "source_id")
    target = validation.validated_id(target_id, "target_id")
    if until_message_id is not None:
        until_message_id = validation.validated_id(until_message_id, "until_message_id")
    return source, target, until_message_id


def _page(rows: Sequence[HistoryRow], limit: int) -> ChatHistoryPage:
    """
    Return a page of the directory.

    :param rows: Up to `limit + 1` histories. The one beyond the limit only tells that another page follows.
    """
    cursor = None if len(rows) <= limit else _cursor_after(rows[limit - 1])
    return ChatHistoryPage(items=list(map(_info, rows[:limit])), cursor=cursor)


def _info(row: HistoryRow) -> ChatHistoryInfo:
    return ChatHistoryInfo(
        chat_history_id=row.chat_history_id,
        message_count=row.message_count,
        round_count=row.round_count,
        created_at=readable_time(row.created_at),
        updated_at=readable_time(row.updated_at),
        title=row.title,
        meta=validation.parsed_meta(row.meta) or {},  # damaged meta hides no history
    )


def _cursor_after(row: HistoryRow) -> str:
    """
    Return the place after a history as a cursor.
    """
    place = [_CURSOR_VERSION, row.updated_at, row.chat_history_id]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _place_of(cursor: Any) -> tuple[int, str]:
    """
    Return the place that a cursor stands for: time of change and id of the last history before it.

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
