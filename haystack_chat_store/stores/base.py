# SPDX-License-Identifier: Apache-2.0
"""The base of all stores: settings, validation, ids, encoding; writing, reading and deleting messages."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from haystack import default_from_dict, default_to_dict
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.document_stores.types import DuplicatePolicy
from typing_extensions import Self

from haystack_chat_store import validation
from haystack_chat_store.codec import decode_messages, encode_message, with_merged_meta
from haystack_chat_store.conversation import rounds
from haystack_chat_store.conversation.rounds import LastKUnit, Window
from haystack_chat_store.errors import ChatHistoryChangedError, UnsupportedOperationError
from haystack_chat_store.ids import MESSAGE_ID_KEY, OWN_META_KEYS, new_message_id
from haystack_chat_store.stores.conflicts import duplicate_in_batch, only_one_user
from haystack_chat_store.stores.directory import DirectoryMethods
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.previews import beginning_of
from haystack_chat_store.stores.reading import ReadingMethods, stored
from haystack_chat_store.stores.rows import EncodedMessage, MessageRow, Scope, WindowRows
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP, to_thread_if_large
from haystack_chat_store.types import HistoryWindow, StoredMessage

MICROSECONDS_PER_SECOND = 1_000_000
# The cost of encoding one value, in characters of text that take as long to encode.
_CHARACTERS_PER_VALUE = 100


@dataclass(frozen=True)
class _Write:
    """
    The checked arguments of `write_messages`.

    :param named: The messages to store, each with its name in errors, such as `messages[2]`.
    """

    chat_history_id: str
    named: list[tuple[str, ChatMessage]]
    policy: DuplicatePolicy
    expected_revision: int | None
    strict: bool


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
        lifetime = None if self.ttl is None else round(self.ttl * MICROSECONDS_PER_SECOND)
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

    # ------------------------------------------------------------------ public methods

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
        encoded = _encoded(write)
        if not encoded and write.expected_revision is None:
            return 0
        try:
            return self.engine.run(
                self.engine.append, self.scope, write.chat_history_id, encoded, write.policy, write.expected_revision
            )
        except ChatHistoryChangedError:
            is_repeated = bool(encoded) and write.policy is DuplicatePolicy.SKIP
            if not is_repeated or not all(map(partial(self._is_said, write), encoded)):
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
        encoded = await to_thread_if_large(_work_to_encode(write), _encoded, write)
        if not encoded and write.expected_revision is None:
            return 0
        try:
            return await self.engine.run_async(
                self.engine.append, self.scope, write.chat_history_id, encoded, write.policy, write.expected_revision
            )
        except ChatHistoryChangedError:
            if not encoded or write.policy is not DuplicatePolicy.SKIP:
                raise
            for message in encoded:
                if not await self._is_said_async(write, message):
                    raise
        return 0

    def retrieve_messages(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """
        Return the last rounds of a history, oldest message first.

        A round begins at each user message and lasts until the next one, so a window never begins in the middle of an
        exchange. If the history has fewer than `last_k` rounds, the messages before its first user message are
        returned, too. (With `last_k_unit="message"`, `last_k` counts single messages, and more are returned if a tool
        result would otherwise come without its call.)

        :param chat_history_id: The history's id. A history that does not exist is empty.
        :param last_k: The number of rounds, 0 for none. Defaults to `None`: the store's own `last_k`.
        :param window_step: The start of the window moves only in steps of this many rounds: it is the first round, or
            a multiple of `window_step` after it. The window then holds up to `window_step - 1` rounds more than
            `last_k`. Defaults to 1. (With `last_k_unit="message"`, it counts messages.)
        :returns: New message objects, each with its id in `meta["chat_message_id"]`.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        if window.count == 0:
            return []
        rows = self.engine.run(self.engine.read, self.scope, history, window)
        if rows.contents and self.renew_ttl_on_read:
            self.engine.run(self.engine.renew, self.scope, history)
        return _decoded(rows, window)

    async def retrieve_messages_async(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """Do what `retrieve_messages` does, without blocking the event loop."""
        history = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        if window.count == 0:
            return []
        rows = await self.engine.run_async(self.engine.read, self.scope, history, window)
        if rows.contents and self.renew_ttl_on_read:
            await self.engine.run_async(self.engine.renew, self.scope, history)
        return await to_thread_if_large(sum(map(len, rows.contents)), _decoded, rows, window)

    def retrieve_window(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> HistoryWindow:
        """
        Return what `retrieve_messages` returns, with the revision and the number of rounds of the whole history.

        :param chat_history_id: The history's id. A history that does not exist is empty, and has revision 0.
        :param last_k: The number of rounds, 0 for none. Defaults to `None`: the store's own `last_k`.
        :param window_step: The start of the window moves only in steps of this many rounds. Defaults to 1.
        :returns: New message objects, the revision and the number of rounds, all as of one moment.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        rows = self.engine.run(self.engine.read, self.scope, history, _at_least_one(window))
        if rows.contents and self.renew_ttl_on_read:
            self.engine.run(self.engine.renew, self.scope, history)
        return _window(rows, window)

    async def retrieve_window_async(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> HistoryWindow:
        """Do what `retrieve_window` does, without blocking the event loop."""
        history = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        rows = await self.engine.run_async(self.engine.read, self.scope, history, _at_least_one(window))
        if rows.contents and self.renew_ttl_on_read:
            await self.engine.run_async(self.engine.renew, self.scope, history)
        return await to_thread_if_large(sum(map(len, rows.contents)), _window, rows, window)

    def count_messages(self, chat_history_id: str) -> int:
        """
        Return the number of messages in a history. It is read from a counter, so it costs the same for any length.

        :param chat_history_id: The history's id. A history that does not exist has 0 messages.
        :raises ValueError: If `chat_history_id` is not a valid id.
        :raises ChatMessageStoreError: If the engine fails.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        return self.engine.run(self.engine.count, self.scope, history)

    async def count_messages_async(self, chat_history_id: str) -> int:
        """Do what `count_messages` does, without blocking the event loop."""
        history = validation.validated_id(chat_history_id, "chat_history_id")
        return await self.engine.run_async(self.engine.count, self.scope, history)

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
        first = validation.validated_id(from_message_id, "from_message_id")
        encoded = _encoded(write)
        return self.engine.run(
            self.engine.replace, self.scope, write.chat_history_id, first, encoded, write.expected_revision
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
        first = validation.validated_id(from_message_id, "from_message_id")
        encoded = await to_thread_if_large(_work_to_encode(write), _encoded, write)
        return await self.engine.run_async(
            self.engine.replace, self.scope, write.chat_history_id, first, encoded, write.expected_revision
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
        message = _checked_merge(chat_history_id, message_id, merge)
        return stored([self.engine.run(self.engine.update_message, self.scope, *message)])[0]

    async def update_message_meta_async(
        self, chat_history_id: str, message_id: str, *, merge: dict[str, Any]
    ) -> StoredMessage:
        """Do what `update_message_meta` does, without blocking the event loop."""
        message = _checked_merge(chat_history_id, message_id, merge)
        return stored([await self.engine.run_async(self.engine.update_message, self.scope, *message)])[0]

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

        Histories and ids that do not exist are ignored.

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
        history = validation.validated_id(chat_history_id, "chat_history_id")
        expected_revision = validation.validated_revision(expected_revision)
        if message_ids is None and from_message_id is None:
            self.engine.run(self.engine.delete, self.scope, history, expected_revision)
            return
        chosen = validation.validated_choice(message_ids, from_message_id)
        if chosen != ([], None):
            self.engine.run(self.engine.delete_messages, self.scope, history, *chosen, expected_revision)

    async def delete_messages_async(
        self,
        chat_history_id: str,
        *,
        message_ids: Iterable[str] | None = None,
        from_message_id: str | None = None,
        expected_revision: int | None = None,
    ) -> None:
        """Do what `delete_messages` does, without blocking the event loop."""
        history = validation.validated_id(chat_history_id, "chat_history_id")
        expected_revision = validation.validated_revision(expected_revision)
        if message_ids is None and from_message_id is None:
            await self.engine.run_async(self.engine.delete, self.scope, history, expected_revision)
            return
        chosen = validation.validated_choice(message_ids, from_message_id)
        if chosen != ([], None):
            await self.engine.run_async(self.engine.delete_messages, self.scope, history, *chosen, expected_revision)

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
    ) -> _Write:
        history = validation.validated_id(chat_history_id, "chat_history_id")
        policy = validation.validated_policy(policy)
        expected_revision = validation.validated_revision(expected_revision)
        named = [
            (f"messages[{index}]", message)
            for index, message in enumerate(validation.validated_messages(messages))
            if not (self.skip_system_messages and message.role is ChatRole.SYSTEM)
        ]
        return _Write(history, named, policy, expected_revision, self.strict)

    def _is_said(self, write: _Write, message: EncodedMessage) -> bool:
        """Whether the history has a message of a repeated write. Its meta may differ, as after a rating."""
        where = self.scope, write.chat_history_id
        if not message.has_caller_id:
            return False
        try:
            position = self.engine.run(self.engine.position, *where, message.message_id)
            if position is None:
                return False
            return _says_the_same(message, self.engine.run(self.engine.page, *where, None, position - 1, 1))
        except UnsupportedOperationError:
            return False

    async def _is_said_async(self, write: _Write, message: EncodedMessage) -> bool:
        where = self.scope, write.chat_history_id
        if not message.has_caller_id:
            return False
        try:
            position = await self.engine.run_async(self.engine.position, *where, message.message_id)
            if position is None:
                return False
            return _says_the_same(message, await self.engine.run_async(self.engine.page, *where, None, position - 1, 1))
        except UnsupportedOperationError:
            return False

    def _checked_window(self, last_k: int | None, window_step: int) -> Window:
        validation.validate_last_k(last_k)
        validation.validate_window_step(window_step)
        return Window(self.last_k_unit, self.last_k if last_k is None else last_k, window_step)


def _checked_merge(
    chat_history_id: str, message_id: str, merge: dict[str, Any]
) -> tuple[str, str, Callable[[str], str]]:
    """Return the arguments of the engine's `update_message`."""
    history = validation.validated_id(chat_history_id, "chat_history_id")
    message = validation.validated_id(message_id, "message_id")
    merged = validation.validated_merge(merge, "merge")
    for key in OWN_META_KEYS.intersection(merge):
        raise ValueError(f"merge must not have the key {key!r}: the store sets it, and it stays.")
    return history, message, partial(with_merged_meta, merged=merged)


def _says_the_same(message: EncodedMessage, rows: list[MessageRow]) -> bool:
    """Whether the stored message is the same, apart from its meta."""
    said = [{**json.loads(content), "meta": None} for content in (message.content, *(row.content for row in rows))]
    return len(said) == 2 and rows[0].message_id == message.message_id and said[0] == said[1]


def _not_kept(engine: Engine[Any], what: str, attribute: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(f"{type(engine).__name__} does not support {what}.", attribute)


def _encoded(write: _Write) -> list[EncodedMessage]:
    """
    Give each message its id, and encode it.

    Of several messages with the same id, the first counts or, with the policy OVERWRITE, the last. FAIL refuses them.
    """
    encoded: dict[str, EncodedMessage] = {}
    for name, message in write.named:
        own_id = message.meta.get(MESSAGE_ID_KEY)
        if own_id is None:
            message_id = new_message_id()
        else:
            message_id = validation.validated_id(own_id, f"{name}.meta[{MESSAGE_ID_KEY!r}]")
        content = encode_message(message, message_id, name, strict=write.strict)
        if message_id in encoded:
            if write.policy is DuplicatePolicy.FAIL:
                raise duplicate_in_batch(name, message_id)
            if write.policy is DuplicatePolicy.SKIP:
                continue
        encoded[message_id] = EncodedMessage(
            message_id=message_id,
            role=message.role.value,
            content=content,
            has_caller_id=own_id is not None,
            text=beginning_of(message),
        )
    return list(encoded.values())


def _at_least_one(window: Window) -> Window:
    """Return the window, or one of a single round or message: an engine cannot read an empty window."""
    return Window(window.unit, 1) if window.count == 0 else window


def _window(rows: WindowRows, window: Window) -> HistoryWindow:
    messages = [] if window.count == 0 else _decoded(rows, window)
    return HistoryWindow(messages=messages, revision=rows.revision, round_count=rows.round_count)


def _decoded(rows: WindowRows, window: Window) -> list[ChatMessage]:
    messages = decode_messages(rows.contents)
    if window.unit == "message" and window.count is not None:
        return rounds.last_messages(messages, rows.size)
    return messages


def _work_to_encode(write: _Write) -> int:
    """
    Estimate the cost of encoding, as a number of characters.

    Counting stops as soon as the number is too large for the event loop.
    """
    work, left = 0, [part for _, message in write.named for part in (message.meta, *message._content)]
    while left and work <= MAX_CHARACTERS_ON_LOOP:
        value = left.pop()
        inside: Collection[Any] = ()
        if isinstance(value, (str, bytes)):
            work += len(value)
        elif isinstance(value, Mapping):
            inside = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = value
        else:
            inside = getattr(value, "__dict__", {}).values()
        work += _CHARACTERS_PER_VALUE * (1 + len(inside))
        if work <= MAX_CHARACTERS_ON_LOOP:
            left += inside
    return work
