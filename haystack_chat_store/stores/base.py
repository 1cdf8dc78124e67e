# SPDX-License-Identifier: Apache-2.0
"""The base of all stores: its settings, and the public methods that write, change and delete messages."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

from haystack import default_from_dict, default_to_dict
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.document_stores.types import DuplicatePolicy
from typing_extensions import Self

from haystack_chat_store import validation
from haystack_chat_store.codec import with_merged_meta
from haystack_chat_store.conversation.rounds import LastKUnit
from haystack_chat_store.errors import ChatHistoryChangedError, UnsupportedOperationError
from haystack_chat_store.ids import OWN_META_KEYS
from haystack_chat_store.stores.conflicts import only_one_user
from haystack_chat_store.stores.directory import DirectoryMethods
from haystack_chat_store.stores.encoding import (
    CheckedWrite,
    encoded_messages,
    is_equal_without_meta,
    may_be_stored,
    work_to_encode,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.reading import ReadingMethods, stored_messages
from haystack_chat_store.stores.rows import EncodedMessage, Scope
from haystack_chat_store.stores.sync_async import to_thread_if_large
from haystack_chat_store.types import StoredMessage

_MICROSECONDS_PER_SECOND = 1_000_000


class BaseChatMessageStore(DirectoryMethods, ReadingMethods):
    """
    The base of all stores: everything that does not depend on the engine.

    To write a store, subclass `Engine`, whose docstrings define the operations of an engine. Then subclass this class:
    pass the engine to `__init__`, and add the store's own settings to `settings`. Later versions may add operations to
    `Engine`; an engine will not have to implement them.
    """

    def __init__(
        self,
        engine: Engine[Any],
        *,
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
        search: bool = False,
        strict: bool = False,
        user_id: str | None = None,
        ttl: float | None = None,
        renew_ttl_on_read: bool = False,
    ) -> None:
        """
        Check and keep the settings that all stores have.

        :param engine: The engine that stores the messages.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: The number of rounds that `retrieve_messages` returns if it is called without `last_k`. Defaults
            to 10. `None` for all.
        :param last_k_unit: The unit of `last_k`: `"round"`, the default, or `"message"`.
        :param namespace: The namespace of the store's histories, 1 to 128 characters. A store sees only its own
            namespace, so tenants, applications or test runs can share one database. Defaults to `"default"`.
        :param search: Whether messages can be searched. Defaults to False.
        :param strict: Whether a message is refused if its `meta` contains a value without a JSON form, such as a
            function. Defaults to False: the `repr` of such a value is stored, and the log says so.
        :param user_id: The store sees and changes only histories of this user, 1 to 512 characters: see `for_user`.
            Defaults to `None`: all histories of the namespace.
        :param ttl: The number of seconds after which a history expires, by the server's clock. The time starts anew
            when messages are stored in the history, with the `ttl` of the store that stores them. A new title or meta
            does not start it anew. Defaults to `None`: a history never expires.
        :param renew_ttl_on_read: Whether reading messages of a history starts the time anew, too. Defaults to False.
        :raises ValueError: If a setting is wrong.
        :raises UnsupportedOperationError: If the engine has no users, or no histories that expire.
        """
        validation.validate_last_k(last_k)
        if last_k_unit not in ("round", "message"):
            raise ValueError(f'last_k_unit must be "round" or "message", got {last_k_unit!r}.')
        self.engine = engine
        self.skip_system_messages = validation.validated_flag(skip_system_messages, "skip_system_messages")
        self.last_k = last_k
        self.last_k_unit = last_k_unit
        self.namespace = validation.validated_id(namespace, "namespace", validation.MAX_NAMESPACE_LENGTH)
        self.search = validation.validated_flag(search, "search")
        self.strict = validation.validated_flag(strict, "strict")
        self.user_id = None if user_id is None else validation.validated_id(user_id, "user_id")
        self.ttl = None if ttl is None else validation.validated_seconds(ttl, "ttl")
        self.renew_ttl_on_read = validation.validated_flag(renew_ttl_on_read, "renew_ttl_on_read")
        if self.renew_ttl_on_read and self.ttl is None:
            raise ValueError("renew_ttl_on_read needs a ttl.")
        self._check_engine()
        lifetime = None if self.ttl is None else round(self.ttl * _MICROSECONDS_PER_SECOND)
        #: What operations of the engine may see and change.
        self.scope = Scope(self.namespace, self.user_id, lifetime)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for an equal store. A subclass adds its own arguments."""
        return {
            "skip_system_messages": self.skip_system_messages,
            "last_k": self.last_k,
            "last_k_unit": self.last_k_unit,
            "namespace": self.namespace,
            "search": self.search,
            "strict": self.strict,
            "user_id": self.user_id,
            "ttl": self.ttl,
            "renew_ttl_on_read": self.renew_ttl_on_read,
        }

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings.

        :returns: A dictionary for `from_dict`, YAML and JSON. It contains the names of secrets, never their values.
        :raises ValueError: If a secret does not come from an environment variable.
        """
        return default_to_dict(self, **self.settings())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """
        Create a store from the result of `to_dict`. It connects on first use.

        :param data: The serialized store. It is not changed.
        :raises DeserializationError: If `data` is not of this class.
        """
        return default_from_dict(cls, data)

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:  # noqa: ARG003  (overrides use them)
        """
        Create a store from a URL whose scheme is registered for this class: see `store_from_url`.

        :param url: The URL, with its scheme.
        :param settings: Further arguments of the constructor.
        :raises ValueError: If this class does not accept the URL. The error does not repeat the URL, because it may
            contain a password.
        """
        raise ValueError(f"{cls.__name__} cannot be created from a URL. Call its constructor.")

    def for_user(self, user_id: str) -> Self:
        """
        Return a copy of this store that sees and changes only the histories of one user.

        Calls of it that read treat a history of another user, or of no user, like one that does not exist. A write to
        such a history raises a `ChatHistoryAccessError`. A history that is created through it belongs to the user. It
        shares the connections of this store, so it is cheap: make one for each request.

        :param user_id: The user's id: 1 to 512 characters, without NUL and lone surrogates.
        :returns: A store of this class. Its `user_id` is a setting like others, which `to_dict` contains.
        :raises ValueError: If `user_id` is not a valid id.
        :raises ChatHistoryAccessError: If this store belongs to another user.
        :raises UnsupportedOperationError: If the engine has no users.
        """
        user = validation.validated_id(user_id, "user_id")
        if user == self.user_id:
            return self
        if self.user_id is not None:
            raise only_one_user("become that of another user")
        store = copy(self)
        store.user_id, store.scope = user, replace(self.scope, user_id=user)
        store._check_engine()
        return store

    def write_messages(
        self,
        chat_history_id: str,
        messages: Iterable[ChatMessage],
        *,
        policy: DuplicatePolicy = DuplicatePolicy.SKIP,
        expected_revision: int | None = None,
    ) -> int:
        """
        Append messages to a history, as one batch: either all of it is stored, or nothing.

        A message is skipped if the history already has its id (in `meta["chat_message_id"]`), so retrieved messages can
        safely be written again. A message without an id gets a new one at each call. To repeat a call that may have
        failed, give its messages ids before the first call. The objects passed in are not changed.

        :param chat_history_id: The history's id: 1 to 512 characters, without NUL and lone surrogates. A history that
            does not exist is created.
        :param messages: A list or other iterable of `ChatMessage`s, oldest first.
        :param policy: Decides about a message whose id the history already has. With SKIP, the default, and NONE, the
            message is skipped. With OVERWRITE, it replaces the stored message, at the same position. (Of several
            messages in the batch with the same id, the last one counts.) With FAIL, nothing is written.
        :param expected_revision: The `revision` that the history must have (see `get_chat_history`), 0 if it must not
            exist. If it has another one, nothing is written. So if two writers answer the same message, the second one
            gets an error. Defaults to `None`: any revision.
        :returns: The number of messages that this call wrote, including replacements. If the history already has equal
            messages under all the ids, the call returns 0, whatever `expected_revision` is: a repeated call is no
            conflict with itself. (With SKIP, messages are equal even if their meta differs, as after a rating.)
        :raises ValueError: If an argument is wrong. If a message contains a value that cannot be stored, the error is a
            `MessageEncodingError`. Nothing was written.
        :raises DuplicateMessageError: If the policy is FAIL, and the history already has an id, or the batch has an id
            twice. Nothing was written.
        :raises ChatHistoryChangedError: If the history has another revision than `expected_revision`. Nothing was
            written.
        :raises ChatHistoryAccessError: If the history is another user's. Nothing was written.
        :raises ChatMessageStoreError: If the engine fails. All of the batch was written, or nothing.
        """
        write = self._checked_write(chat_history_id, messages, policy, expected_revision)
        encoded = encoded_messages(write)
        if not encoded and write.expected_revision is None:
            return 0
        try:
            return self.engine.run(
                self.engine.append, self.scope, write.chat_history_id, encoded, write.policy, write.expected_revision
            )
        except ChatHistoryChangedError:
            if not self._has_all(write, encoded):
                raise
            return 0

    async def write_messages_async(
        self,
        chat_history_id: str,
        messages: Iterable[ChatMessage],
        *,
        policy: DuplicatePolicy = DuplicatePolicy.SKIP,
        expected_revision: int | None = None,
    ) -> int:
        """Do what `write_messages` does, without blocking the event loop."""
        write = self._checked_write(chat_history_id, messages, policy, expected_revision)
        encoded = await to_thread_if_large(work_to_encode(write), encoded_messages, write)
        if not encoded and write.expected_revision is None:
            return 0
        try:
            return await self.engine.run_async(
                self.engine.append, self.scope, write.chat_history_id, encoded, write.policy, write.expected_revision
            )
        except ChatHistoryChangedError:
            if not await self._has_all_async(write, encoded):
                raise
            return 0

    def replace_messages(
        self,
        chat_history_id: str,
        from_message_id: str,
        messages: Iterable[ChatMessage],
        *,
        expected_revision: int | None = None,
    ) -> int:
        """
        Delete a message and all messages after it, and append others in their place, in one atomic step.

        Use it to regenerate an answer or to edit a question. Ask the model first and replace afterwards, so that a
        failing model costs nothing.

        The new messages get new positions. They may have the ids of deleted messages. A message is skipped if the
        history has its id before `from_message_id`. To repeat a call that may have failed, give its messages ids
        before the first call (see `with_message_ids`): if the first call was successful, and its messages are still
        the end of the history, the second one changes nothing and returns 0.

        :param chat_history_id: The history's id.
        :param from_message_id: The id of the first message to delete.
        :param messages: The messages to append, oldest first. If there are none, the call only deletes.
        :param expected_revision: The `revision` that the history must have. If it has another one, nothing is changed.
            Defaults to `None`: any revision.
        :returns: The number of messages that this call appended.
        :raises ValueError: If an argument is wrong. If a message contains a value that cannot be stored, the error is a
            `MessageEncodingError`. Nothing was changed.
        :raises MessageNotFoundError: If the history does not have `from_message_id`. Nothing was changed.
        :raises ChatHistoryChangedError: If the history has another revision than `expected_revision`. Nothing was
            changed.
        :raises ChatHistoryAccessError: If the history is another user's. Nothing was changed.
        :raises ChatMessageStoreError: If the engine fails. The messages were replaced, or nothing was changed.
        """
        write = self._checked_write(chat_history_id, messages, DuplicatePolicy.SKIP, expected_revision)
        from_message_id = validation.validated_id(from_message_id, "from_message_id")
        encoded = encoded_messages(write)
        return self.engine.run(
            self.engine.replace, self.scope, write.chat_history_id, from_message_id, encoded, write.expected_revision
        )

    async def replace_messages_async(
        self,
        chat_history_id: str,
        from_message_id: str,
        messages: Iterable[ChatMessage],
        *,
        expected_revision: int | None = None,
    ) -> int:
        """Do what `replace_messages` does, without blocking the event loop."""
        write = self._checked_write(chat_history_id, messages, DuplicatePolicy.SKIP, expected_revision)
        from_message_id = validation.validated_id(from_message_id, "from_message_id")
        encoded = await to_thread_if_large(work_to_encode(write), encoded_messages, write)
        return await self.engine.run_async(
            self.engine.replace, self.scope, write.chat_history_id, from_message_id, encoded, write.expected_revision
        )

    def update_message_meta(self, chat_history_id: str, message_id: str, *, merge: dict[str, Any]) -> StoredMessage:
        """
        Set keys in the meta of a message, such as a rating. Its other keys and its content stay.

        Changes that others make at the same time are kept. The history's revision becomes greater, and its `updated_at`
        stays.

        :param chat_history_id: The history's id.
        :param message_id: The message's id.
        :param merge: The keys to set, with their values. The value `None` deletes a key. The message's id cannot be
            changed.
        :returns: The message after the change.
        :raises ValueError: If an argument is wrong. Nothing was changed.
        :raises MessageNotFoundError: If the history does not have the message.
        :raises ChatHistoryAccessError: If the history is another user's.
        :raises ChatMessageStoreError: If the engine fails.
        """
        arguments = _checked_merge(chat_history_id, message_id, merge)
        return stored_messages([self.engine.run(self.engine.update_message, self.scope, *arguments)])[0]

    async def update_message_meta_async(
        self, chat_history_id: str, message_id: str, *, merge: dict[str, Any]
    ) -> StoredMessage:
        """Do what `update_message_meta` does, without blocking the event loop."""
        arguments = _checked_merge(chat_history_id, message_id, merge)
        row = await self.engine.run_async(self.engine.update_message, self.scope, *arguments)
        return (await to_thread_if_large(len(row.content), stored_messages, [row]))[0]

    def delete_messages(
        self,
        chat_history_id: str,
        *,
        message_ids: Iterable[str] | None = None,
        from_message_id: str | None = None,
        expected_revision: int | None = None,
    ) -> None:
        """
        Delete a history with its branches, or some of its messages, for good.

        A history, and ids in `message_ids`, that do not exist are ignored.

        :param chat_history_id: The history's id.
        :param message_ids: The ids of the messages to delete. The history stays, with its title and meta, even if it
            has no messages any more. Defaults to `None`: the whole history is deleted.
        :param from_message_id: The id of a message. It is deleted with all messages after it, so that the conversation
            can go on from before it. Cannot be given together with `message_ids`.
        :param expected_revision: The `revision` that the history must have. If it has another one, nothing is deleted.
            If the history has none of the messages to delete, the revision is not checked. Defaults to `None`: any
            revision.
        :raises ValueError: If an argument is wrong.
        :raises MessageNotFoundError: If the history does not have `from_message_id`. Nothing was deleted.
        :raises ChatHistoryChangedError: If the history has another revision than `expected_revision`. Nothing was
            deleted.
        :raises ChatHistoryAccessError: If the history is another user's. Nothing was deleted.
        :raises ChatMessageStoreError: If the engine fails. All of the messages were deleted, or none.
        """
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        expected_revision = validation.validated_revision(expected_revision)
        if message_ids is None and from_message_id is None:
            self.engine.run(self.engine.delete, self.scope, chat_history_id, expected_revision)
            return
        chosen = validation.validated_choice(message_ids, from_message_id)
        if chosen != ([], None):
            self.engine.run(self.engine.delete_messages, self.scope, chat_history_id, *chosen, expected_revision)

    async def delete_messages_async(
        self,
        chat_history_id: str,
        *,
        message_ids: Iterable[str] | None = None,
        from_message_id: str | None = None,
        expected_revision: int | None = None,
    ) -> None:
        """Do what `delete_messages` does, without blocking the event loop."""
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        expected_revision = validation.validated_revision(expected_revision)
        if message_ids is None and from_message_id is None:
            await self.engine.run_async(self.engine.delete, self.scope, chat_history_id, expected_revision)
            return
        chosen = validation.validated_choice(message_ids, from_message_id)
        if chosen != ([], None):
            await self.engine.run_async(
                self.engine.delete_messages, self.scope, chat_history_id, *chosen, expected_revision
            )

    def delete_all_messages(self) -> None:
        """
        Delete every history of this store, for good: those of its namespace or, in a store of one user, the user's.

        The engine deletes in batches, and each history whole. After an error, some histories may be deleted.

        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        while self.engine.run(self.engine.delete_all, self.scope):
            pass

    async def delete_all_messages_async(self) -> None:
        """Do what `delete_all_messages` does, without blocking the event loop."""
        while await self.engine.run_async(self.engine.delete_all, self.scope):
            pass

    def close(self) -> None:
        """
        Release connections and threads. The next use opens them again. Closing twice does nothing.

        Stores with equal settings share their connections, so this closes them for all of these stores.
        """
        self.engine.close()

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await self.engine.close_async()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BaseChatMessageStore)
            and type(other) is type(self)
            and other.settings() == self.settings()
        )

    def __hash__(self) -> int:
        return hash((type(self), self.namespace))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(namespace={self.namespace!r})"

    def _check_engine(self) -> None:
        """
        Check that the engine can do what the settings ask for.

        :raises UnsupportedOperationError: If it has no users, or no histories that expire.
        """
        if self.user_id is not None and not self.engine.keeps_users:
            raise _not_kept(self.engine, "users", "keeps_users")
        if self.ttl is not None and not self.engine.keeps_expiry:
            raise _not_kept(self.engine, "a ttl", "keeps_expiry")

    def _checked_write(
        self,
        chat_history_id: str,
        messages: Iterable[ChatMessage],
        policy: DuplicatePolicy,
        expected_revision: int | None,
    ) -> CheckedWrite:
        chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
        policy = validation.validated_policy(policy)
        expected_revision = validation.validated_revision(expected_revision)
        named = [
            (f"messages[{index}]", message)
            for index, message in enumerate(validation.validated_messages(messages))
            if not (self.skip_system_messages and message.role is ChatRole.SYSTEM)
        ]
        return CheckedWrite(chat_history_id, named, policy, expected_revision, self.strict)

    def _has_all(self, write: CheckedWrite, encoded: Sequence[EncodedMessage]) -> bool:
        """Whether the history has all messages of a write already. Their meta may differ, as after a rating."""
        if not may_be_stored(write, encoded):
            return False
        where = self.scope, write.chat_history_id
        for message in encoded:
            try:
                position = self.engine.run(self.engine.position, *where, message.message_id)
                if position is None:
                    return False
                rows = self.engine.run(self.engine.page, *where, None, position - 1, 1)
            except UnsupportedOperationError:
                return False
            if not is_equal_without_meta(message, rows):
                return False
        return True

    async def _has_all_async(self, write: CheckedWrite, encoded: Sequence[EncodedMessage]) -> bool:
        if not may_be_stored(write, encoded):
            return False
        where = self.scope, write.chat_history_id
        for message in encoded:
            try:
                position = await self.engine.run_async(self.engine.position, *where, message.message_id)
                if position is None:
                    return False
                rows = await self.engine.run_async(self.engine.page, *where, None, position - 1, 1)
            except UnsupportedOperationError:
                return False
            if not is_equal_without_meta(message, rows):
                return False
        return True


def _checked_merge(
    chat_history_id: str, message_id: str, merge: dict[str, Any]
) -> tuple[str, str, Callable[[str], str]]:
    """Return the arguments of the engine's `update_message`."""
    chat_history_id = validation.validated_id(chat_history_id, "chat_history_id")
    message_id = validation.validated_id(message_id, "message_id")
    merged = validation.validated_merge(merge, "merge")
    for key in OWN_META_KEYS.intersection(merge):
        raise ValueError(f"merge must not have the key {key!r}: the store sets it, and it stays.")
    return chat_history_id, message_id, partial(with_merged_meta, merged=merged)


def _not_kept(engine: Engine[Any], what: str, attribute: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(f"{type(engine).__name__} does not support {what}.", attribute)
