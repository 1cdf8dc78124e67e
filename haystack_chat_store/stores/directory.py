# SPDX-License-Identifier: Apache-2.0
"""The public methods of stores for whole chat histories: lists, titles, forks, erasing."""

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from haystack_chat_store import validation
from haystack_chat_store.errors import ChatMessageStoreError
from haystack_chat_store.stores.conflicts import history_not_found
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.rows import UNCHANGED, HistoryRow, Scope, Unchanged
from haystack_chat_store.stores.times import readable_time
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage, StoreStatistics

# The number of histories that one step erases. Other writers wait no longer than for one step.
_ERASE_BATCH_SIZE = 100
# The first element of a cursor. A later version with another order of the directory gets another number.
_CURSOR_VERSION = 1


class DirectoryMethods:
    """The public methods of stores for whole histories."""

    engine: Engine[Any]
    scope: Scope

    def list_chat_histories(
        self, *, prefix: str = "", branches: bool = False, limit: int = 50, cursor: str | None = None
    ) -> ChatHistoryPage:
        """
        Return a page of the histories of this namespace. The history whose messages changed last comes first.

        To walk through all histories, call this method again with the page's cursor until the cursor is `None`. The
        walk then sees each history exactly once that exists during the whole walk and does not change. A history that
        changes moves to the front: it is seen once if the walk had already reached it, otherwise not at all.

        :param prefix: Only histories whose ids begin with this text, taken literally. Defaults to all.
        :param branches: Whether branches are listed, too: what `match_transcript` keeps of what it takes back. Defaults
            to False.
        :param limit: The largest number of histories on the page, 1 to 1,000. Defaults to 50.
        :param cursor: The cursor of the page before. Defaults to `None`: the first page.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails.
        """
        scope, (prefix, limit, before) = seen_scope(self.scope, branches), _checked_listing(prefix, limit, cursor)
        rows = self.engine.run(self.engine.histories, scope, prefix, before, limit + 1)
        return _page(rows, limit)

    async def list_chat_histories_async(
        self, *, prefix: str = "", branches: bool = False, limit: int = 50, cursor: str | None = None
    ) -> ChatHistoryPage:
        """Do what `list_chat_histories` does, without blocking the event loop."""
        scope, (prefix, limit, before) = seen_scope(self.scope, branches), _checked_listing(prefix, limit, cursor)
        rows = await self.engine.run_async(self.engine.histories, scope, prefix, before, limit + 1)
        return _page(rows, limit)

    def get_chat_history(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """
        Return the counts, times, title and meta of a history, or `None` if the history does not exist.

        :param chat_history_id: The history's id.
        :raises ValueError: If `chat_history_id` is not a valid id.
        :raises ChatMessageStoreError: If the engine fails.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        row = self.engine.run(self.engine.history, self.scope, history)
        return None if row is None else _info(row)

    async def get_chat_history_async(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """Do what `get_chat_history` does, without blocking the event loop."""
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
        Set the title or the meta of a history, and return the history. Its `updated_at` does not change.

        :param chat_history_id: The history's id. The history must exist.
        :param title: The new title, up to 1,000 characters without NUL. `None` removes the title. Defaults to
            `UNCHANGED`.
        :param meta: The new meta, which replaces the whole old meta. `None` removes the meta. Defaults to `UNCHANGED`.
            Values that JSON does not know are stored in the same form as in messages.
        :returns: The history after the change.
        :raises ValueError: If an argument is wrong. Nothing was changed.
        :raises ChatHistoryNotFoundError: If the history does not exist.
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
        """Do what `update_chat_history` does, without blocking the event loop."""
        history = validation.validated_id(chat_history_id, "chat_history_id")
        changes = validation.validated_title(title), validation.validated_meta(meta)
        row = await self.engine.run_async(self.engine.update_history, self.scope, history, *changes)
        if row is None:
            raise history_not_found(history)
        return _info(row)

    def copy_messages(self, source_id: str, target_id: str, *, until_message_id: str | None = None) -> int:
        """
        Fork a conversation: copy the messages of a history, or its beginning, to another history.

        The copy appears whole or not at all. The engine copies by itself; only on Redis, most copies travel through the
        client (see `docs/redis.md`). The copies keep their ids and times. Title and meta are not copied.

        :param source_id: The id of the history to copy from.
        :param target_id: The id of the history to copy to. It may exist, but must have no messages.
        :param until_message_id: The id of the last message to copy. Defaults to `None`: all messages.
        :returns: The number of messages copied.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryNotFoundError: If the source does not exist.
        :raises MessageNotFoundError: If the source does not have `until_message_id`.
        :raises ChatHistoryExistsError: If the target already has messages.
        :raises ChatMessageStoreError: If the engine fails.
        """
        copy = _checked_copy(source_id, target_id, until_message_id)
        return self.engine.run(self.engine.copy, self.scope, *copy)

    async def copy_messages_async(self, source_id: str, target_id: str, *, until_message_id: str | None = None) -> int:
        """Do what `copy_messages` does, without blocking the event loop."""
        copy = _checked_copy(source_id, target_id, until_message_id)
        return await self.engine.run_async(self.engine.copy, self.scope, *copy)

    def delete_chat_history(self, chat_history_id: str) -> None:
        """
        Delete a history with its messages, title and meta, and its branches, for good.

        A history that does not exist is ignored. The history and its branches go in one step; on Redis, it goes first,
        then its branches.

        :param chat_history_id: The history's id.
        :raises ValueError: If `chat_history_id` is not a valid id.
        :raises ChatMessageStoreError: If the engine fails. The whole history was deleted, or nothing of it.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        self.engine.run(self.engine.delete, self.scope, history, None)

    async def delete_chat_history_async(self, chat_history_id: str) -> None:
        """Do what `delete_chat_history` does, without blocking the event loop."""
        history = validation.validated_id(chat_history_id, "chat_history_id")
        await self.engine.run_async(self.engine.delete, self.scope, history, None)

    def delete_chat_histories(self, *, prefix: str, vacuum: bool = False) -> int:
        """
        Delete all histories whose ids begin with a text, for good. If ids begin with a user's name, this erases a user.

        The engine deletes in batches, and each history whole. After an error, some histories may be deleted.

        :param prefix: The text that the ids begin with, taken literally. It must not be empty; to delete everything,
            call `delete_all_messages`.
        :param vacuum: Whether to remove the deleted bytes from the engine's files, too, where they may stay until they
            are overwritten. This takes long on a large database. Defaults to False.
        :returns: The number of histories deleted.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        return self._erase(validation.validated_id(prefix, "prefix"), None, vacuum)

    async def delete_chat_histories_async(self, *, prefix: str, vacuum: bool = False) -> int:
        """Do what `delete_chat_histories` does, without blocking the event loop."""
        return await self._erase_async(validation.validated_id(prefix, "prefix"), None, vacuum)

    def purge(self, *, older_than: datetime, vacuum: bool = False) -> int:
        """
        Delete all histories whose messages have not changed since a time, for good.

        The engine deletes in batches, and each history whole. After an error, some histories may be deleted.

        :param older_than: An aware datetime. Histories that changed at this time or later stay.
        :param vacuum: Whether to remove the deleted bytes from the engine's files, as in `delete_chat_histories`.
            Defaults to False.
        :returns: The number of histories deleted.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        return self._erase("", validation.microseconds(older_than, "older_than"), vacuum)

    async def purge_async(self, *, older_than: datetime, vacuum: bool = False) -> int:
        """Do what `purge` does, without blocking the event loop."""
        return await self._erase_async("", validation.microseconds(older_than, "older_than"), vacuum)

    def statistics(self, *, prefix: str = "", branches: bool = False) -> StoreStatistics:
        """
        Return the numbers of histories, messages and rounds. The call reads every message, so its cost grows with them.

        :param prefix: Only histories whose ids begin with this text. Defaults to all histories of this namespace.
        :param branches: Whether branches count, too. Defaults to False.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails.
        """
        scope, prefix = seen_scope(self.scope, branches), validation.validated_text(prefix, "prefix")
        return self.engine.run(self.engine.statistics, scope, prefix)

    async def statistics_async(self, *, prefix: str = "", branches: bool = False) -> StoreStatistics:
        """Do what `statistics` does, without blocking the event loop."""
        scope, prefix = seen_scope(self.scope, branches), validation.validated_text(prefix, "prefix")
        return await self.engine.run_async(self.engine.statistics, scope, prefix)

    def _erase(self, prefix: str, updated_before: int | None, vacuum: bool) -> int:
        count = 0
        erase = self.engine.erase_some
        while erased := self.engine.run(erase, self.scope, prefix, updated_before, _ERASE_BATCH_SIZE):
            count += erased
        if vacuum:
            with deletions_stated():
                self.engine.run(self.engine.vacuum, self.scope)
        return count

    async def _erase_async(self, prefix: str, updated_before: int | None, vacuum: bool) -> int:
        count = 0
        erase = self.engine.erase_some
        while erased := await self.engine.run_async(erase, self.scope, prefix, updated_before, _ERASE_BATCH_SIZE):
            count += erased
        if vacuum:
            with deletions_stated():
                await self.engine.run_async(self.engine.vacuum, self.scope)
        return count


@contextmanager
def deletions_stated() -> Iterator[None]:
    """Make the errors of a vacuum say that the deletions before it are done."""
    try:
        yield
    except ChatMessageStoreError as error:
        stated = type(error)(f"The histories were deleted, but their bytes may still be in the engine's files. {error}")
        vars(stated).update(vars(error))
        raise stated from error.__cause__


def seen_scope(scope: Scope, branches: Any) -> Scope:
    """
    Return the scope of a list, a search or of statistics.

    :param branches: Whether it has branches.
    :raises ValueError: If `branches` is not a bool.
    """
    return replace(scope, with_branches=validation.validated_flag(branches, "branches"))


def _checked_listing(prefix: str, limit: int, cursor: str | None) -> tuple[str, int, tuple[int, str] | None]:
    prefix = validation.validated_text(prefix, "prefix")
    limit = validation.validated_number(limit, "limit", 1, validation.MAX_LIMIT)
    return prefix, limit, None if cursor is None else _decoded_cursor(cursor)


def _checked_copy(source_id: str, target_id: str, until_message_id: str | None) -> tuple[str, str, str | None]:
    source = validation.validated_id(source_id, "source_id")
    target = validation.validated_id(target_id, "target_id")
    if until_message_id is not None:
        until_message_id = validation.validated_id(until_message_id, "until_message_id")
    return source, target, until_message_id


def _page(rows: Sequence[HistoryRow], limit: int) -> ChatHistoryPage:
    """
    Return a page of the directory.

    :param rows: Up to `limit + 1` histories. The last one is not on the page: it shows that another page follows.
    """
    cursor = None if len(rows) <= limit else _encoded_cursor(rows[limit - 1])
    return ChatHistoryPage(items=list(map(_info, rows[:limit])), cursor=cursor)


def _info(row: HistoryRow) -> ChatHistoryInfo:
    return ChatHistoryInfo(
        chat_history_id=row.chat_history_id,
        message_count=row.message_count,
        round_count=row.round_count,
        revision=row.revision,
        created_at=readable_time(row.created_at),
        updated_at=readable_time(row.updated_at),
        title=row.title,
        meta={} if row.meta is None else validation.parsed_meta(row.meta) or {},  # even if it is damaged
    )


def _encoded_cursor(row: HistoryRow) -> str:
    """Return the cursor of a page that ends with a history."""
    place = [_CURSOR_VERSION, row.updated_at, row.chat_history_id]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _decoded_cursor(cursor: Any) -> tuple[int, str]:
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
