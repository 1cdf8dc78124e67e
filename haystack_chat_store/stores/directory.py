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

from haystack_chat_store.stores import arguments
from haystack_chat_store.stores.operations import UNCHANGED, HistoryRow, SessionT, Unchanged, no_history
from haystack_chat_store.stores.steps import Step, SteppedOperations, Steps
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage, StoreStatistics

# So many histories are erased at once, to keep nobody waiting for long.
_ERASED_AT_ONCE = 100


class Directory(SteppedOperations[SessionT]):
    """
    The public methods for whole histories.
    """

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
        return self._take(self._listing(prefix, limit, cursor))

    async def list_chat_histories_async(
        self, *, prefix: str = "", limit: int = 50, cursor: str | None = None
    ) -> ChatHistoryPage:
        """
        Do what `list_chat_histories` does, without blocking the event loop.
        """
        return await self._take_async(self._listing(prefix, limit, cursor))

    def get_chat_history(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """
        Return what is known of one history, or `None` if there is none with this id.

        :param chat_history_id: Which conversation.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        return self._take(self._getting(chat_history_id))

    async def get_chat_history_async(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """
        Do what `get_chat_history` does, without blocking the event loop.
        """
        return await self._take_async(self._getting(chat_history_id))

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
        return self._take(self._updating(chat_history_id, title, meta))

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
        return await self._take_async(self._updating(chat_history_id, title, meta))

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
        return self._take(self._copying(source_id, target_id, until_message_id))

    async def copy_messages_async(self, source_id: str, target_id: str, *, until_message_id: str | None = None) -> int:
        """
        Do what `copy_messages` does, without blocking the event loop.
        """
        return await self._take_async(self._copying(source_id, target_id, until_message_id))

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
        return self._take(self._erasing(arguments.validated_id(prefix, "prefix"), None, vacuum))

    async def delete_chat_histories_async(self, *, prefix: str, vacuum: bool = False) -> int:
        """
        Do what `delete_chat_histories` does, without blocking the event loop.
        """
        return await self._take_async(self._erasing(arguments.validated_id(prefix, "prefix"), None, vacuum))

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
        return self._take(self._erasing("", arguments.microseconds(older_than, "older_than"), vacuum))

    async def purge_async(self, *, older_than: datetime, vacuum: bool = False) -> int:
        """
        Do what `purge` does, without blocking the event loop.
        """
        return await self._take_async(self._erasing("", arguments.microseconds(older_than, "older_than"), vacuum))

    def statistics(self, *, prefix: str = "") -> StoreStatistics:
        """
        Return how much there is. It counts every message, so it takes the longer the more there are.

        :param prefix: Only of histories whose ids begin with this text. Defaults to all of this namespace.
        :raises ValueError: If `prefix` cannot be one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        return self._take(self._summing_up(prefix))

    async def statistics_async(self, *, prefix: str = "") -> StoreStatistics:
        """
        Do what `statistics` does, without blocking the event loop.
        """
        return await self._take_async(self._summing_up(prefix))

    # ------------------------------------------------------------------ each of them once, in steps

    def _listing(self, prefix: str, limit: int, cursor: str | None) -> "Steps[ChatHistoryPage]":
        prefix = arguments.validated_text(prefix, "prefix")
        limit = arguments.validated_number(limit, "limit", 1, arguments.MAX_LIMIT)
        before = None if cursor is None else _opened(cursor)
        rows: list[HistoryRow] = yield Step(self._histories, (prefix, before, limit + 1))
        items = _infos(rows[:limit])
        if len(rows) <= limit:
            return ChatHistoryPage(items, None)
        return ChatHistoryPage(items, _sealed(rows[limit - 1]))

    def _getting(self, chat_history_id: str) -> "Steps[ChatHistoryInfo | None]":
        row = yield Step(self._history, (arguments.validated_id(chat_history_id, "chat_history_id"),))
        return None if row is None else _infos([row])[0]

    def _updating(self, chat_history_id: str, title: Any, meta: Any) -> "Steps[ChatHistoryInfo]":
        history = arguments.validated_id(chat_history_id, "chat_history_id")
        changes = arguments.validated_title(title), arguments.validated_meta(meta)
        row = yield Step(self._update_history, (history, *changes))
        if row is None:
            raise no_history(history)
        return _infos([row])[0]

    def _copying(self, source_id: str, target_id: str, until_message_id: str | None) -> "Steps[int]":
        source = arguments.validated_id(source_id, "source_id")
        target = arguments.validated_id(target_id, "target_id")
        if until_message_id is not None:
            until_message_id = arguments.validated_id(until_message_id, "until_message_id")
        copied: int = yield Step(self._copy, (source, target, until_message_id))
        return copied

    def _erasing(self, prefix: str, updated_before: int | None, vacuum: bool) -> "Steps[int]":
        erased = 0
        while found := (yield Step(self._erase_some, (prefix, updated_before, _ERASED_AT_ONCE))):
            erased += found
        if vacuum:
            yield Step(self._vacuum, ())
        return erased

    def _summing_up(self, prefix: str) -> "Steps[StoreStatistics]":
        statistics: StoreStatistics = yield Step(self._statistics, (arguments.validated_text(prefix, "prefix"),))
        return statistics


def _infos(rows: Sequence[HistoryRow]) -> list[ChatHistoryInfo]:
    made, epoch, microsecond = ChatHistoryInfo._make, arguments.EPOCH, arguments.MICROSECOND
    try:
        return [
            # Written out, since making these is half of what a page costs.
            made(
                (name, messages, rounds, epoch + first * microsecond, epoch + last * microsecond, title, _parsed(meta))
            )
            for name, messages, rounds, first, last, title, meta in rows
        ]
    except (TypeError, OverflowError):  # a time that is none
        readable = [
            row._replace(created_at=_readable(row.created_at), updated_at=_readable(row.updated_at)) for row in rows
        ]
        return _infos(readable)


def _readable(time: Any) -> int:
    return arguments.microseconds(arguments.readable_time(time), "time")


def _parsed(meta: str | None) -> dict[str, Any]:
    """
    Return a history's meta. What something else has damaged is none, so that it hides no other history.
    """
    return {} if meta is None else arguments.parsed_meta(meta) or {}


def _sealed(row: HistoryRow) -> str:
    """
    Return the place after a history as a cursor.
    """
    return base64.urlsafe_b64encode(json.dumps([row.updated_at, row.chat_history_id]).encode()).decode()


def _opened(cursor: Any) -> tuple[int, str]:
    """
    Return the place that a cursor stands for.
    """
    try:
        updated_at, chat_history_id = json.loads(base64.urlsafe_b64decode(cursor))
        return arguments.validated_number(updated_at, "cursor", -(2**62), 2**62), arguments.validated_id(
            chat_history_id, "cursor"
        )
    except (TypeError, ValueError, RecursionError, binascii.Error):
        raise ValueError("cursor must be the cursor of a ChatHistoryPage, or None.") from None
