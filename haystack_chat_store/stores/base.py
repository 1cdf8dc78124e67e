# SPDX-License-Identifier: Apache-2.0
"""
What all stores do alike, once: the public methods, validation, ids, encoding, skipping system messages.

An engine is a subclass that adds how its operations are run and the few operations themselves.
"""

import asyncio
import os
import time
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from haystack import default_from_dict, default_to_dict
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.document_stores.types import DuplicatePolicy
from typing_extensions import Self

from haystack_chat_store import rounds
from haystack_chat_store.codec import decode_messages, encode_message
from haystack_chat_store.rounds import MESSAGE_ID_KEY, LastKUnit, Window
from haystack_chat_store.stores.arguments import (
    MAX_NAMESPACE_LENGTH,
    validated_flag,
    validated_id,
    validated_number,
    validated_policy,
)
from haystack_chat_store.stores.contents import Contents
from haystack_chat_store.stores.directory import Directory
from haystack_chat_store.stores.operations import EncodedMessage, SessionT, duplicate
from haystack_chat_store.stores.steps import CHARACTERS_PER_LOOP_STEP, Step, Steps

# To encode a value takes as long as so many characters of text, whatever it is.
_WORK_PER_VALUE = 100


class BaseChatMessageStore(Directory[SessionT], Contents[SessionT]):
    """
    The base of all stores: everything that does not depend on the engine.

    To write a store, implement `to_dict`, the five operations that every store has (`_write`, `_read`, `_count`,
    `_delete`, `_delete_all`) and the two ways to run one (`_run`, `_run_async`). `Operations` says what each has to do,
    and which others make the rest of the methods work: directory, pages, search, and so on. Later versions may know
    more operations; those will not have to be implemented.
    """

    def __init__(
        self,
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        *,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
        search: bool = False,
    ) -> None:
        """
        Check and keep the settings that all stores have.

        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: What separates tenants, applications or test runs that share one database: a store sees only
            its own namespace. Defaults to `"default"`. 1 to 128 characters.
        :param search: Whether messages can be searched. Defaults to False.
        :raises ValueError: If a setting is not one of these.
        """
        rounds.validate_last_k(last_k)
        if last_k_unit not in ("round", "message"):
            raise ValueError(f'last_k_unit must be "round" or "message", got {last_k_unit!r}.')
        self.skip_system_messages = validated_flag(skip_system_messages, "skip_system_messages")
        self.last_k = last_k
        self.last_k_unit = last_k_unit
        self.namespace = validated_id(namespace, "namespace", MAX_NAMESPACE_LENGTH)
        self.search = validated_flag(search, "search")

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings.

        :returns: A dictionary for `from_dict`, YAML and JSON. Secrets are named in it, never written out.
        """

    # ------------------------------------------------------------------ what users call

    def write_messages(
        self,
        chat_history_id: str,
        messages: Iterable[ChatMessage],
        *,
        policy: DuplicatePolicy = DuplicatePolicy.SKIP,
        expected_count: int | None = None,
    ) -> int:
        """
        Append messages to a history, as one batch that becomes visible and durable whole or not at all.

        A message that carries an id in `meta["chat_message_id"]` which the history already has is skipped, so it is
        safe to write again what was retrieved. Others get an id of their own, a new one at each call: to be able to
        repeat a call that may have failed, give its messages ids first. The objects passed in are not changed.

        :param chat_history_id: Which conversation: 1 to 512 characters, anything but NUL and lone surrogates.
        :param messages: A list or other iterable of `ChatMessage`s, oldest first.
        :param policy: What becomes of a message whose id is there already. With SKIP, the default, and NONE it is
            skipped. With OVERWRITE it takes the place of the one that is there, at the same position; of several in the
            batch, the last one. With FAIL nothing is written.
        :param expected_count: How many messages the history must have; if it has another number, nothing is written.
            So of two who answer the same message, the second one hears of the first. Defaults to `None`: any number.
        :returns: The number of messages that this call wrote, those that took another's place included.
        :raises ValueError: If an argument is wrong, or a message holds something that cannot be stored (then it is a
            `MessageEncodingError`). Nothing was written.
        :raises DuplicateMessageError: If an id is there already, or twice in the batch, and the policy is FAIL.
        :raises ChatHistoryChangedError: If the history does not have `expected_count` messages.
        :raises ChatMessageStoreError: If the engine fails. None or all of the batch was written.
        """
        return self._take(self._writing(chat_history_id, messages, policy, expected_count))

    async def write_messages_async(
        self,
        chat_history_id: str,
        messages: Iterable[ChatMessage],
        *,
        policy: DuplicatePolicy = DuplicatePolicy.SKIP,
        expected_count: int | None = None,
    ) -> int:
        """
        Do what `write_messages` does, without blocking the event loop.
        """
        return await self._take_async(self._writing(chat_history_id, messages, policy, expected_count))

    def retrieve_messages(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """
        Return the last rounds of a history, oldest message first.

        A round begins at each user message and lasts until the next one, so that a window never starts in the middle
        of an exchange. When the history has fewer than `last_k` rounds, what came before its first user message is
        returned too. (With `last_k_unit="message"`, `last_k` counts single messages; as many more are returned as it
        takes for no tool result to come without its call.)

        :param chat_history_id: Which conversation. One that does not exist is empty.
        :param last_k: How many rounds. 0 for none; `None`, the default, for the store's own `last_k`.
        :param window_step: How many rounds have to come before the window's start moves on: it then stands at the first
            round, or so many after it, or twice as many, and the window holds up to `window_step - 1` rounds more than
            `last_k`. Defaults to 1. (With `last_k_unit="message"`, it counts messages.)
        :returns: Messages that are the caller's own, each with its id in `meta["chat_message_id"]`.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the engine fails, or a stored message cannot be read back.
        """
        return self._take(self._reading(chat_history_id, last_k, window_step))

    async def retrieve_messages_async(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """
        Do what `retrieve_messages` does, without blocking the event loop.
        """
        return await self._take_async(self._reading(chat_history_id, last_k, window_step))

    def count_messages(self, chat_history_id: str) -> int:
        """
        Return the number of messages in a history. It is read from a counter, at the same cost for any length.

        :param chat_history_id: Which conversation. One that does not exist has 0.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        count: int = self._run(self._count, validated_id(chat_history_id, "chat_history_id"))
        return count

    async def count_messages_async(self, chat_history_id: str) -> int:
        """
        Do what `count_messages` does, without blocking the event loop.
        """
        count: int = await self._run_async(self._count, validated_id(chat_history_id, "chat_history_id"))
        return count

    def delete_messages(
        self, chat_history_id: str, *, message_ids: Iterable[str] | None = None, from_message_id: str | None = None
    ) -> None:
        """
        Delete a history, or some of its messages, for good. Deleting what does not exist does nothing.

        :param chat_history_id: Which conversation.
        :param message_ids: The ids of the messages to delete. The history stays, with its title and meta, even when
            none are left. Defaults to `None`: the whole history.
        :param from_message_id: The id of a message to delete, with all that come after it, to go on from before it.
            Not both.
        :raises ValueError: If an argument is wrong.
        :raises MessageNotFoundError: If the history does not have `from_message_id`. Nothing was deleted.
        :raises ChatMessageStoreError: If the engine fails. None or all of it was deleted.
        """
        self._take(self._deleting(chat_history_id, message_ids, from_message_id))

    async def delete_messages_async(
        self, chat_history_id: str, *, message_ids: Iterable[str] | None = None, from_message_id: str | None = None
    ) -> None:
        """
        Do what `delete_messages` does, without blocking the event loop.
        """
        await self._take_async(self._deleting(chat_history_id, message_ids, from_message_id))

    def delete_all_messages(self) -> None:
        """
        Delete every history of this store's namespace, for good. Other namespaces keep theirs.

        Each history goes whole, but servers delete some at a time: if this fails, some may be gone and others not.

        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        self._run(self._delete_all)

    async def delete_all_messages_async(self) -> None:
        """
        Do what `delete_all_messages` does, without blocking the event loop.
        """
        await self._run_async(self._delete_all)

    def close(self) -> None:
        """
        Release connections and threads. The next use opens them again; closing twice does nothing.
        """

    async def close_async(self) -> None:
        """
        Do what `close` does, without blocking the event loop.
        """
        await asyncio.to_thread(self.close)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """
        Make a store from what `to_dict` returned. Connects to nothing, and does not change `data`.

        :param data: The serialized store.
        :raises DeserializationError: If `data` is not of this class.
        """
        return default_from_dict(cls, data)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.namespace))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(namespace={self.namespace!r})"

    # ------------------------------------------------------------------ shared by engines

    def _settings_to_dict(self, **engine_settings: Any) -> dict[str, Any]:
        """
        Serialize the engine's own settings together with those that all stores have.
        """
        return default_to_dict(
            self,
            **engine_settings,
            skip_system_messages=self.skip_system_messages,
            last_k=self.last_k,
            last_k_unit=self.last_k_unit,
            namespace=self.namespace,
            search=self.search,
        )

    # ------------------------------------------------------------------ the public methods, once, in steps

    def _writing(
        self,
        chat_history_id: str,
        messages: Iterable[ChatMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> "Steps[int]":
        history = validated_id(chat_history_id, "chat_history_id")
        policy = validated_policy(policy)
        if expected_count is not None:
            validated_number(expected_count, "expected_count", 0)
        wanted = [
            (f"messages[{index}]", message)
            for index, message in enumerate(rounds.validated_messages(messages))
            if not (self.skip_system_messages and message.role is ChatRole.SYSTEM)
        ]
        encoded: list[EncodedMessage] = yield Step(_encoded, (wanted, policy), _work_to_encode)
        written: int = 0
        if expected_count is not None or (policy is not DuplicatePolicy.SKIP and encoded):
            written = yield Step(self._write_checked, (history, encoded, policy, expected_count))
        elif encoded:
            written = yield Step(self._write, (history, encoded))
        return written

    def _reading(self, chat_history_id: str, last_k: int | None, window_step: int) -> "Steps[list[ChatMessage]]":
        history = validated_id(chat_history_id, "chat_history_id")
        rounds.validate_last_k(last_k)
        rounds.validate_window_step(window_step)
        window = Window(self.last_k_unit, self.last_k if last_k is None else last_k, window_step)
        if window.count == 0:
            return []
        contents, size = yield Step(self._read, (history, window))
        messages: list[ChatMessage] = yield Step(_decoded, (contents, size, window), _work_to_decode)
        return messages

    def _deleting(
        self, chat_history_id: str, message_ids: Iterable[str] | None, from_message_id: str | None
    ) -> "Steps[None]":
        history = validated_id(chat_history_id, "chat_history_id")
        if message_ids is None and from_message_id is None:
            yield Step(self._delete, (history,))
            return
        if message_ids is not None and from_message_id is not None:
            raise ValueError("Give message_ids or from_message_id, not both.")
        if from_message_id is not None:
            from_message_id = validated_id(from_message_id, "from_message_id")
        if message_ids is not None:
            if isinstance(message_ids, (str, bytes)) or not isinstance(message_ids, Iterable):
                raise ValueError(f"message_ids must be a list of ids, got {type(message_ids).__name__}.")
            message_ids = [validated_id(each, f"message_ids[{index}]") for index, each in enumerate(message_ids)]
            if not message_ids:
                return
        yield Step(self._delete_some, (history, message_ids, from_message_id))


def new_message_id() -> str:
    """
    Return an id that is unique everywhere: 48 bits of time in milliseconds and 80 random bits, in 32 hex digits.

    Ids that begin with the time lie side by side in an index, which makes it smaller and appending to it faster
    (the idea of UUID version 7, RFC 9562). Nothing reads the time back: positions alone decide the order.
    """
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def contents_and_size(rows: Iterable[tuple[str, int]]) -> tuple[list[str], int]:
    """
    Return what `_read` has to, from rows that each hold a content and the window's size.
    """
    found = list(rows)
    return [content for content, _ in found], found[-1][1] if found else 0


def _encoded(named: Sequence[tuple[str, ChatMessage]], policy: DuplicatePolicy) -> list[EncodedMessage]:
    """
    Give each message its id and encode it.

    Of messages with the same id the first counts, unless the policy forbids them or has the last one overwrite others.

    :param named: The messages, each under the name that errors give it.
    """
    encoded: dict[str, EncodedMessage] = {}
    for name, message in named:
        own_id = message.meta.get(MESSAGE_ID_KEY)
        if own_id is None:
            message_id = new_message_id()
        else:
            message_id = validated_id(own_id, f"{name}.meta[{MESSAGE_ID_KEY!r}]")
        content = encode_message(message, message_id, name)
        if message_id in encoded:
            if policy is DuplicatePolicy.FAIL:
                raise duplicate(message_id)
            if policy is DuplicatePolicy.SKIP:
                continue
        encoded[message_id] = EncodedMessage(message_id, message.role.value, content, own_id is not None)
    return list(encoded.values())


def _decoded(contents: Sequence[str], size: int, window: Window) -> list[ChatMessage]:
    messages = decode_messages(contents)
    if window.unit == "message" and window.count is not None:
        return rounds.last_messages(messages, size)
    return messages


def _work_to_encode(named: Sequence[tuple[str, ChatMessage]], _policy: DuplicatePolicy) -> int:
    """
    Return how much there is to encode, in characters of text that take as long. What is too much is not counted on.
    """
    work, left = 0, [part for _, message in named for part in (message.meta, *message._content)]
    while left and work <= CHARACTERS_PER_LOOP_STEP:
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
        work += _WORK_PER_VALUE * (1 + len(inside))
        if work <= CHARACTERS_PER_LOOP_STEP:
            left += inside
    return work


def _work_to_decode(contents: Sequence[str], _size: int, _window: Window) -> int:
    return sum(map(len, contents))
