# SPDX-License-Identifier: Apache-2.0
"""The public methods of stores for whole chat histories: lists, titles, forks, erasing."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from typing_extensions import Self

from haystack_chat_store import validation
from haystack_chat_store.errors import ChatMessageStoreError
from haystack_chat_store.json_values import parse_json
from haystack_chat_store.stores.conflicts import history_is_there, history_not_found, no_access, only_one_user
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.listing import Listing, decoded_cursor, history_info
from haystack_chat_store.stores.rows import UNCHANGED, HistoryChange, HistoryRow, Scope, Unchanged
from haystack_chat_store.types import ChatHistoryInfo, ChatHistoryPage, StoreStatistics

# The number of histories that one step erases. Other writers wait no longer than for one step.
_ERASE_BATCH_SIZE = 100


class DirectoryMethods:
    """The public methods of stores for whole histories."""

    engine: Engine[Any]
    scope: Scope

    @abstractmethod
    def for_user(self, user_id: str) -> Self:
        """Return this store for one user."""

    def list_chat_histories(
        self,
        *,
        prefix: str = "",
        user_id: str | None = None,
        meta: dict[str, Any] | None = None,
        branches: bool = False,
        limit: int = 50,
        cursor: str | None = None,
    ) -> ChatHistoryPage:
        """
        Return a page of the histories of this namespace. The history whose messages changed last comes first.

        To walk through all histories, call this method again with the page's cursor until the cursor is `None`. A
        history that exists during the whole walk, and does not change, is on exactly one of the pages. A history that
        changes moves to the front: it is on one page if the walk had already reached it, otherwise on none.

        :param prefix: Only histories whose ids begin with this text, taken literally. Defaults to all.
        :param user_id: Only histories of this user. They are found by an index. Defaults to `None`: all histories.
        :param meta: Only histories whose meta has these values under these keys. JSON values are compared: 1 equals
            1.0, and not `True`. The value `None` matches a key that is null or missing. There is no index: histories
            are read until the page is full. Defaults to `None`: all histories.
        :param branches: Whether branches are listed, too. (Branches are the copies that `match_transcript` keeps before
            it deletes messages.) Defaults to False.
        :param limit: The largest number of histories on the page, 1 to 1,000. Defaults to 50.
        :param cursor: The cursor of the page before. Defaults to `None`: the first page.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If this store belongs to another user.
        :raises ChatMessageStoreError: If the engine fails.
        """
        listing = self._checked_listing(prefix, user_id, meta, branches, limit, cursor)
        while listing.is_unfinished:
            listing.add(self.engine.run(self.engine.histories, *listing.next_arguments()))
        return listing.page()

    async def list_chat_histories_async(
        self,
        *,
        prefix: str = "",
        user_id: str | None = None,
        meta: dict[str, Any] | None = None,
        branches: bool = False,
        limit: int = 50,
        cursor: str | None = None,
    ) -> ChatHistoryPage:
        """Do what `list_chat_histories` does, without blocking the event loop."""
        listing = self._checked_listing(prefix, user_id, meta, branches, limit, cursor)
        while listing.is_unfinished:
            listing.add(await self.engine.run_async(self.engine.histories, *listing.next_arguments()))
        return listing.page()

    def get_chat_history(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """
        Return a history's title, meta, counters and times, or `None` if the history does not exist.

        :param chat_history_id: The history's id.
        :raises ValueError: If `chat_history_id` is not a valid id.
        :raises ChatMessageStoreError: If the engine fails.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        row = self.engine.run(self.engine.history, self.scope, chat_history_id)
        return None if row is None else history_info(row)

    async def get_chat_history_async(self, chat_history_id: str) -> ChatHistoryInfo | None:
        """Do what `get_chat_history` does, without blocking the event loop."""
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        row = await self.engine.run_async(self.engine.history, self.scope, chat_history_id)
        return None if row is None else history_info(row)

    def create_chat_history(
        self,
        chat_history_id: str,
        *,
        user_id: str | None = None,
        title: str | None = None,
        meta: dict[str, Any] | None = None,
        exist_ok: bool = False,
    ) -> ChatHistoryInfo:
        """
        Create a history before its first message, and return it.

        :param chat_history_id: The history's id.
        :param user_id: The user that it belongs to. Defaults to `None`: the user of this store, if it has one.
        :param title: Its title, up to 1,000 characters without NUL. Defaults to `None`: no title.
        :param meta: Its meta. Defaults to `None`: an empty meta.
        :param exist_ok: Whether a history that exists is returned unchanged. Defaults to False.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryExistsError: If there is a history with this id, and `exist_ok` is False.
        :raises ChatHistoryAccessError: If there is a history with this id that is not this user's, or this store
            belongs to another user.
        :raises ChatMessageStoreError: If the engine fails.
        """
        history = self._checked_creation(chat_history_id, user_id, title, meta, exist_ok)
        return _created(self.engine.run(self.engine.create_history, self.scope, history), history.user_id, exist_ok)

    async def create_chat_history_async(
        self,
        chat_history_id: str,
        *,
        user_id: str | None = None,
        title: str | None = None,
        meta: dict[str, Any] | None = None,
        exist_ok: bool = False,
    ) -> ChatHistoryInfo:
        """Do what `create_chat_history` does, without blocking the event loop."""
        history = self._checked_creation(chat_history_id, user_id, title, meta, exist_ok)
        created = await self.engine.run_async(self.engine.create_history, self.scope, history)
        return _created(created, history.user_id, exist_ok)

    def update_chat_history(
        self,
        chat_history_id: str,
        *,
        title: str | Unchanged | None = UNCHANGED,
        default_title: str | None = None,
        meta: dict[str, Any] | Unchanged | None = UNCHANGED,
        merge_meta: dict[str, Any] | None = None,
        user_id: str | Unchanged | None = UNCHANGED,
    ) -> ChatHistoryInfo:
        """
        Set the title, the meta or the user of a history, and return the history. Its `updated_at` does not change.

        :param chat_history_id: The history's id. The history must exist.
        :param title: The new title, up to 1,000 characters without NUL. `None` removes the title. Defaults to
            `UNCHANGED`.
        :param default_title: A title that the history gets only if it has none. So a title that was set meanwhile
            stays. Cannot be given together with `title`. Defaults to `None`: no change.
        :param meta: The new meta, which replaces the whole old meta. `None` removes the meta. Defaults to `UNCHANGED`.
            Values that JSON does not know are stored in the same form as in messages.
        :param merge_meta: Keys of the meta to set, with their values. Other keys stay, also those that others set at
            the same time. The value `None` deletes a key. Cannot be given together with `meta`. Defaults to `None`: no
            change.
        :param user_id: The user that the history and its branches belong to from now on, or `None` for no user. All
            change in one step. (On Redis, the branches change first. If the call fails, call it again.) A store of one
            user refuses this argument. Defaults to `UNCHANGED`.
        :returns: The history after the change.
        :raises ValueError: If an argument is wrong. Nothing was changed.
        :raises ChatHistoryNotFoundError: If the history does not exist.
        :raises ChatHistoryAccessError: If it is another user's, or `user_id` is given and this store belongs to one
            user. Nothing was changed.
        :raises ChatMessageStoreError: If the engine fails.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        change = self._checked_change(title, default_title, meta, merge_meta, user_id)
        row = self.engine.run(self.engine.update_history, self.scope, chat_history_id, change)
        if row is None:
            raise history_not_found(chat_history_id)
        return history_info(row)

    async def update_chat_history_async(
        self,
        chat_history_id: str,
        *,
        title: str | Unchanged | None = UNCHANGED,
        default_title: str | None = None,
        meta: dict[str, Any] | Unchanged | None = UNCHANGED,
        merge_meta: dict[str, Any] | None = None,
        user_id: str | Unchanged | None = UNCHANGED,
    ) -> ChatHistoryInfo:
        """Do what `update_chat_history` does, without blocking the event loop."""
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        change = self._checked_change(title, default_title, meta, merge_meta, user_id)
        row = await self.engine.run_async(self.engine.update_history, self.scope, chat_history_id, change)
        if row is None:
            raise history_not_found(chat_history_id)
        return history_info(row)

    def rename_chat_history(self, old_id: str, new_id: str) -> ChatHistoryInfo:
        """
        Give a history another id, and return the history. Its revision becomes greater, and all else stays.

        Its branches follow it: their ids begin with the new id. If such an id is taken, the branch gets another one.
        All of this is one atomic step. On Redis, the branches follow one by one after the history. Between hash slots
        of a Redis Cluster, a history is complete under its new id before the old one is deleted: a reader may see both.
        If a call fails there, call it again, or run `doctor` with `repair`. Either finishes it.

        :param old_id: The history's id.
        :param new_id: Its new id. No other history may have it.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryNotFoundError: If there is no history `old_id`.
        :raises ChatHistoryExistsError: If there is a history `new_id`.
        :raises ChatHistoryAccessError: If one of them is another user's.
        :raises ChatMessageStoreError: If the engine fails.
        """
        ids = _checked_renaming(old_id, new_id)
        return history_info(self.engine.run(self.engine.rename_history, self.scope, *ids))

    async def rename_chat_history_async(self, old_id: str, new_id: str) -> ChatHistoryInfo:
        """Do what `rename_chat_history` does, without blocking the event loop."""
        ids = _checked_renaming(old_id, new_id)
        return history_info(await self.engine.run_async(self.engine.rename_history, self.scope, *ids))

    def copy_messages(
        self,
        source_id: str,
        target_id: str,
        *,
        until_message_id: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> int:
        """
        Fork a conversation: copy the messages of a history, or its beginning, to another history.

        The copy appears whole or not at all. The database copies by itself. (On Redis, most copies travel through the
        client: see `docs/redis.md`.) The copied messages keep their ids and times. The copy belongs to the user of its
        source. Title and meta are not copied.

        The copy is a branch of its source if its meta has the source's id as `branch_of`, and its own id begins with
        the source's id and `~`. A branch is renamed, handed over and deleted with its source.

        :param source_id: The id of the history to copy from.
        :param target_id: The id of the history to copy to. If it exists, it must have no messages.
        :param until_message_id: The id of the last message to copy. Defaults to `None`: all messages.
        :param meta: The meta of the copy, from its first moment on. Defaults to `None`: no meta or, if the target
            exists, the meta that the target has.
        :returns: The number of messages copied.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryNotFoundError: If the source does not exist.
        :raises MessageNotFoundError: If the source does not have `until_message_id`.
        :raises ChatHistoryExistsError: If the target already has messages.
        :raises ChatHistoryAccessError: If the target is another user's, or if it exists without a user and the source
            belongs to one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        copy = _checked_copy(source_id, target_id, until_message_id, meta)
        return self.engine.run(self.engine.copy, self.scope, *copy)

    async def copy_messages_async(
        self,
        source_id: str,
        target_id: str,
        *,
        until_message_id: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> int:
        """Do what `copy_messages` does, without blocking the event loop."""
        copy = _checked_copy(source_id, target_id, until_message_id, meta)
        return await self.engine.run_async(self.engine.copy, self.scope, *copy)

    def delete_chat_history(self, chat_history_id: str) -> None:
        """
        Delete a history with its messages, title and meta, and its branches, for good.

        A history that does not exist is ignored. The history and its branches are deleted in one step. (On Redis, the
        history is deleted first, then its branches. If the call fails, call it again.)

        :param chat_history_id: The history's id.
        :raises ValueError: If `chat_history_id` is not a valid id.
        :raises ChatHistoryAccessError: If the history is another user's. Nothing was deleted.
        :raises ChatMessageStoreError: If the engine fails. The whole history was deleted, or nothing of it.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        self.engine.run(self.engine.delete, self.scope, chat_history_id, None)

    async def delete_chat_history_async(self, chat_history_id: str) -> None:
        """Do what `delete_chat_history` does, without blocking the event loop."""
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        await self.engine.run_async(self.engine.delete, self.scope, chat_history_id, None)

    def delete_chat_histories(self, *, prefix: str, vacuum: bool = False) -> int:
        """
        Delete all histories whose ids begin with a text, for good.

        The engine deletes in batches, and each history whole. After an error, some histories may be deleted.

        :param prefix: The text that the ids begin with, taken literally. It must not be empty; to delete everything,
            call `delete_all_messages`.
        :param vacuum: Whether to remove the deleted bytes from the engine's files, too. Otherwise they may stay there
            until they are overwritten. This rewrites the data of all users and takes long on a large database. A store
            of one user refuses it. Defaults to False.
        :returns: The number of histories deleted.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If this store belongs to one user, and `vacuum` is given. Nothing was deleted.
        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        return self._erase(self.scope, validation.validated_id(prefix, "prefix"), None, vacuum)

    async def delete_chat_histories_async(self, *, prefix: str, vacuum: bool = False) -> int:
        """Do what `delete_chat_histories` does, without blocking the event loop."""
        return await self._erase_async(self.scope, validation.validated_id(prefix, "prefix"), None, vacuum)

    def delete_user(self, user_id: str, *, vacuum: bool = False) -> int:
        """
        Delete all histories of a user with their branches, for good.

        The engine deletes in batches, and each history whole. After an error, some histories may be deleted.

        :param user_id: The user's id.
        :param vacuum: Whether to remove the deleted bytes from the engine's files, as in `delete_chat_histories`.
            Defaults to False.
        :returns: The number of histories deleted.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If this store belongs to another user. Also if it belongs to one user, and
            `vacuum` is given. Nothing was deleted.
        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        return self._erase(self._scope_of(validation.validated_id(user_id, "user_id")), "", None, vacuum)

    async def delete_user_async(self, user_id: str, *, vacuum: bool = False) -> int:
        """Do what `delete_user` does, without blocking the event loop."""
        return await self._erase_async(self._scope_of(validation.validated_id(user_id, "user_id")), "", None, vacuum)

    def list_namespaces(self) -> list[str]:
        """
        Return the names of all namespaces in the database that have histories, in order.

        A namespace whose histories have all expired may be listed until they are deleted. On Redis, the call looks
        through the keys of the whole server.

        :raises ChatHistoryAccessError: If this store belongs to one user.
        :raises ChatMessageStoreError: If the engine fails.
        """
        return self.engine.run(self.engine.namespaces, self._scope_of_everyone())

    async def list_namespaces_async(self) -> list[str]:
        """Do what `list_namespaces` does, without blocking the event loop."""
        return await self.engine.run_async(self.engine.namespaces, self._scope_of_everyone())

    def purge(self, *, older_than: datetime, prefix: str = "", user_id: str | None = None, vacuum: bool = False) -> int:
        """
        Delete histories whose messages have not changed since a time, or that have expired, for good.

        The engine deletes in batches, and each history whole. After an error, some histories may be deleted.

        :param older_than: An aware datetime. Histories that changed at this time or later stay, unless they have
            expired.
        :param prefix: Only histories, expired ones included, whose ids begin with this text, taken literally. Defaults
            to all.
        :param user_id: Only histories of this user. Defaults to `None`: all histories.
        :param vacuum: Whether to remove the deleted bytes from the engine's files, as in `delete_chat_histories`.
            Defaults to False.
        :returns: The number of histories deleted. On Redis, expired histories do not count, because the server itself
            has deleted them.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If this store belongs to another user. Also if it belongs to one user, and
            `vacuum` is given. Nothing was deleted.
        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        return self._erase(*self._checked_purge(older_than, prefix, user_id), vacuum)

    async def purge_async(
        self, *, older_than: datetime, prefix: str = "", user_id: str | None = None, vacuum: bool = False
    ) -> int:
        """Do what `purge` does, without blocking the event loop."""
        return await self._erase_async(*self._checked_purge(older_than, prefix, user_id), vacuum)

    def statistics(self, *, prefix: str = "", user_id: str | None = None, branches: bool = False) -> StoreStatistics:
        """
        Return the numbers of histories, messages and rounds, and the sum of the token usage in the replies' meta.

        The call reads every message, so its cost grows with their number.

        :param prefix: Only histories whose ids begin with this text. Defaults to all histories of this namespace.
        :param user_id: Only histories of this user. Defaults to `None`: all histories.
        :param branches: Whether branches count, too. Defaults to False.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If this store belongs to another user.
        :raises ChatMessageStoreError: If the engine fails.
        """
        prefix = validation.validated_text(prefix, "prefix")
        return self.engine.run(self.engine.statistics, seen_scope(self._scope_of(user_id), branches), prefix)

    async def statistics_async(
        self, *, prefix: str = "", user_id: str | None = None, branches: bool = False
    ) -> StoreStatistics:
        """Do what `statistics` does, without blocking the event loop."""
        prefix = validation.validated_text(prefix, "prefix")
        return await self.engine.run_async(
            self.engine.statistics, seen_scope(self._scope_of(user_id), branches), prefix
        )

    def _scope_of(self, user_id: str | None) -> Scope:
        """
        Return this store's scope, limited to a user.

        :param user_id: A user's id, or `None` for the whole scope.
        :raises ChatHistoryAccessError: If this store belongs to another user.
        """
        return self.scope if user_id is None else self.for_user(user_id).scope

    def _scope_of_everyone(self) -> Scope:
        if self.scope.user_id is not None:
            raise only_one_user("list the namespaces of the database")
        return self.scope

    def _checked_listing(
        self,
        prefix: str,
        user_id: str | None,
        meta: dict[str, Any] | None,
        branches: bool,
        limit: int,
        cursor: str | None,
    ) -> Listing:
        prefix = validation.validated_text(prefix, "prefix")
        limit = validation.validated_number(limit, "limit", 1, validation.MAX_LIMIT)
        wanted = {} if meta is None else parse_json(validation.validated_merge(meta, "meta"))
        place = None if cursor is None else decoded_cursor(cursor)
        return Listing(seen_scope(self._scope_of(user_id), branches), prefix, wanted, limit, place)

    def _checked_creation(
        self, chat_history_id: str, user_id: str | None, title: str | None, meta: dict[str, Any] | None, exist_ok: bool
    ) -> HistoryRow:
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        validation.validated_flag(exist_ok, "exist_ok")
        change = validation.validated_change(title, meta, None, None)
        if change.title is UNCHANGED or change.meta is UNCHANGED:
            raise ValueError("title and meta cannot be UNCHANGED: the history is new.")
        if user_id is not None:
            user_id = self._scope_of(user_id).user_id
        return HistoryRow(
            chat_history_id=chat_history_id,
            created_at=0,
            updated_at=0,
            title=change.title if isinstance(change.title, str) else None,
            meta=change.new_meta(None),
            user_id=self.scope.user_id if user_id is None else user_id,
        )

    def _checked_change(
        self, title: Any, default_title: Any, meta: Any, merge_meta: Any, user_id: Any
    ) -> HistoryChange:
        change = validation.validated_change(title, meta, merge_meta, user_id, default_title)
        if change.user_id is not UNCHANGED:
            if self.scope.user_id is not None:
                raise only_one_user("claim a chat history or hand one over")
            if change.user_id is not None:
                self._scope_of(change.user_id)  # raises the error of an engine without users
        return change

    def _checked_purge(self, older_than: datetime, prefix: str, user_id: str | None) -> tuple[Scope, str, int]:
        time = validation.microseconds(older_than, "older_than")
        return self._scope_of(user_id), validation.validated_text(prefix, "prefix"), time

    def _check_vacuum(self, vacuum: bool) -> None:
        if validation.validated_flag(vacuum, "vacuum") and self.scope.user_id is not None:
            raise only_one_user("rewrite the files of all users")

    def _erase(self, scope: Scope, prefix: str, updated_before: int | None, vacuum: bool) -> int:
        self._check_vacuum(vacuum)
        count = 0
        while erased := self.engine.run(self.engine.erase_some, scope, prefix, updated_before, _ERASE_BATCH_SIZE):
            count += erased
        if vacuum:
            with deletions_stated():
                self.engine.run(self.engine.vacuum, self.scope)
        return count

    async def _erase_async(self, scope: Scope, prefix: str, updated_before: int | None, vacuum: bool) -> int:
        self._check_vacuum(vacuum)
        count = 0
        erase = self.engine.erase_some
        while erased := await self.engine.run_async(erase, scope, prefix, updated_before, _ERASE_BATCH_SIZE):
            count += erased
        if vacuum:
            with deletions_stated():
                await self.engine.run_async(self.engine.vacuum, self.scope)
        return count


@contextmanager
def deletions_stated() -> Iterator[None]:
    """Make the errors of a vacuum say that the histories were deleted."""
    try:
        yield
    except ChatMessageStoreError as error:
        stated = type(error)(f"The histories were deleted, but their bytes may still be in the engine's files. {error}")
        vars(stated).update(vars(error))
        raise stated from error.__cause__


def seen_scope(scope: Scope, branches: Any) -> Scope:
    """
    Return the scope with which lists, searches and statistics are made.

    :param branches: Whether branches are included.
    :raises ValueError: If `branches` is not a bool.
    """
    return replace(scope, with_branches=validation.validated_flag(branches, "branches"))


def _checked_renaming(old_id: str, new_id: str) -> tuple[str, str]:
    ids = validation.validated_id(old_id, "old_id"), validation.validated_id(new_id, "new_id")
    if ids[0] == ids[1]:
        raise ValueError("new_id must be another id than old_id.")
    return ids


def _created(created: tuple[HistoryRow, bool], user_id: str | None, exist_ok: bool) -> ChatHistoryInfo:
    row, is_new = created
    if user_id is not None and row.user_id != user_id:
        raise no_access()
    if not is_new and not exist_ok:
        raise history_is_there(row.chat_history_id)
    return history_info(row)


def _checked_copy(
    source_id: str, target_id: str, until_message_id: str | None, meta: dict[str, Any] | None
) -> tuple[str, str, str | None, str | None]:
    source = validation.validated_id(source_id, "source_id")
    target = validation.validated_id(target_id, "target_id")
    if until_message_id is not None:
        until_message_id = validation.validated_id(until_message_id, "until_message_id")
    return source, target, until_message_id, HistoryChange(meta=validation.validated_meta(meta)).new_meta(None)
