# SPDX-License-Identifier: Apache-2.0
"""
What all stores do alike, once: the public methods, validation, ids, encoding, skipping system messages.

An engine is a subclass that adds how its operations are run and the few operations themselves.
"""

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from haystack import default_from_dict, default_to_dict
from haystack.dataclasses import ChatMessage, ChatRole
from typing_extensions import Self

from haystack_chat_store import rounds
from haystack_chat_store.codec import decode_messages, encode_message
from haystack_chat_store.rounds import MESSAGE_ID_KEY, LastKUnit, Window

#: The longest `chat_history_id` and message id, in characters. Keys of every engine hold as much.
MAX_ID_LENGTH = 512
#: The longest `namespace`, in characters.
MAX_NAMESPACE_LENGTH = 128

# As much is encoded or decoded on the event loop itself, in a few milliseconds. More goes to a thread. (A single text
# of many megabytes holds the loop up all the same, for json lets no other thread run while it works on it.)
_CHARACTERS_PER_LOOP_STEP = 100_000

ResultT = TypeVar("ResultT")
SessionT = TypeVar("SessionT")


class EncodedMessage(NamedTuple):
    """
    A message as an engine stores it.

    :param message_id: Its id, unique in its history.
    :param role: `"user"`, `"assistant"`, `"tool"` or `"system"`.
    :param content: The whole message as JSON text, id included.
    :param brought_its_id: Whether the id came with the message. If not, no history can have it yet.
    """

    message_id: str
    role: str
    content: str
    brought_its_id: bool


class BaseChatMessageStore(ABC, Generic[SessionT]):
    """
    The base of all stores: everything that does not depend on the engine.

    To write a store, implement `to_dict`, the five operations (`_write`, `_read`, `_count`, `_delete`, `_delete_all`)
    and the two ways to run one (`_run`, `_run_async`). An operation is a method whose first argument is the engine's
    *session*, such as a connection: `_run` and `_run_async` provide it. An operation is written once and serves both:
    as a plain function if `_run_async` runs it on a thread or it never waits, or as a coroutine function that awaits
    what its session does. Later versions may know more operations; those will not have to be implemented.
    """

    def __init__(
        self,
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        *,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
    ) -> None:
        """
        Check and keep the settings that all stores have.

        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: What separates tenants, applications or test runs that share one database: a store sees only
            its own namespace. Defaults to `"default"`. 1 to 128 characters.
        :raises ValueError: If a setting is not one of these.
        """
        rounds.validate_last_k(last_k)
        if last_k_unit not in ("round", "message"):
            raise ValueError(f'last_k_unit must be "round" or "message", got {last_k_unit!r}.')
        if not isinstance(skip_system_messages, bool):
            raise ValueError(f"skip_system_messages must be True or False, got {skip_system_messages!r}.")
        self.skip_system_messages = skip_system_messages
        self.last_k = last_k
        self.last_k_unit = last_k_unit
        self.namespace = _validated_id(namespace, "namespace", MAX_NAMESPACE_LENGTH)

    # ------------------------------------------------------------------ what an engine adds

    @abstractmethod
    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """
        Run an operation to its end: open a session, call `operation(session, *arguments)`, return its result.

        Raises the engine's exceptions as `ChatMessageStoreError`s.
        """

    @abstractmethod
    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """
        Do what `_run` does, without ever blocking the event loop.
        """

    @abstractmethod
    def _write(
        self, session: SessionT, chat_history_id: str, messages: Sequence[EncodedMessage]
    ) -> "int | Coroutine[Any, Any, int]":
        """
        Append the messages whose id the history does not have, as one atomic batch. Return their number.

        :param messages: At least one, no id twice.
        """

    @abstractmethod
    def _read(
        self, session: SessionT, chat_history_id: str, window: Window
    ) -> "tuple[list[str], int] | Coroutine[Any, Any, tuple[list[str], int]]":
        """
        Return the contents in the window, oldest first, and the window's size, as of one moment.

        The size is `window.size` of the number of rounds or messages that the history has, which an engine keeps count
        of; it is not asked for a window of everything. For the unit `"round"`, the window begins at the `size`-th last
        user message, or holds everything if there are fewer. For the unit `"message"`, it holds the last `size`
        messages; where the first of these is a tool message, they are preceded by what comes before it up to and
        including the nearest message that is not.
        """

    @abstractmethod
    def _count(self, session: SessionT, chat_history_id: str) -> "int | Coroutine[Any, Any, int]":
        """
        Return the number of messages in a history, from a counter.
        """

    @abstractmethod
    def _delete(self, session: SessionT, chat_history_id: str) -> "Coroutine[Any, Any, None] | None":
        """
        Delete a history and all that belongs to it.
        """

    @abstractmethod
    def _delete_all(self, session: SessionT) -> "Coroutine[Any, Any, None] | None":
        """
        Delete every history of this namespace.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings.

        :returns: A dictionary for `from_dict`, YAML and JSON. Secrets are named in it, never written out.
        """

    # ------------------------------------------------------------------ what users call

    def write_messages(self, chat_history_id: str, messages: Iterable[ChatMessage]) -> int:
        """
        Append messages to a history, as one batch that becomes visible and durable whole or not at all.

        A message that carries an id in `meta["chat_message_id"]` which the history already has is skipped, so it is
        safe to write again what was retrieved. Others get an id of their own, a new one at each call: to be able to
        repeat a call that may have failed, give its messages ids first. The objects passed in are not changed.

        :param chat_history_id: Which conversation: 1 to 512 characters, anything but NUL and lone surrogates.
        :param messages: A list or other iterable of `ChatMessage`s, oldest first.
        :returns: The number of messages that this call wrote.
        :raises ValueError: If an argument is wrong, or a message holds something that cannot be stored (then it is a
            `MessageEncodingError`). Nothing was written.
        :raises ChatMessageStoreError: If the engine fails. None or all of the batch was written.
        """
        history, wanted = self._to_write(chat_history_id, messages)
        encoded = _encoded(wanted)
        written: int = self._run(self._write, history, encoded) if encoded else 0
        return written

    async def write_messages_async(self, chat_history_id: str, messages: Iterable[ChatMessage]) -> int:
        """
        Do what `write_messages` does, without blocking the event loop.
        """
        history, wanted = self._to_write(chat_history_id, messages)
        encoded = await _off_loop_if(_is_much_to_encode(wanted), _encoded, wanted)
        written: int = await self._run_async(self._write, history, encoded) if encoded else 0
        return written

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
        history, window = self._to_read(chat_history_id, last_k, window_step)
        if window.count == 0:
            return []
        contents, size = self._run(self._read, history, window)
        return _decoded(contents, size, window)

    async def retrieve_messages_async(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """
        Do what `retrieve_messages` does, without blocking the event loop.
        """
        history, window = self._to_read(chat_history_id, last_k, window_step)
        if window.count == 0:
            return []
        contents, size = await self._run_async(self._read, history, window)
        is_much = sum(map(len, contents)) > _CHARACTERS_PER_LOOP_STEP
        return await _off_loop_if(is_much, _decoded, contents, size, window)

    def count_messages(self, chat_history_id: str) -> int:
        """
        Return the number of messages in a history. It is read from a counter, at the same cost for any length.

        :param chat_history_id: Which conversation. One that does not exist has 0.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        count: int = self._run(self._count, _validated_id(chat_history_id, "chat_history_id"))
        return count

    async def count_messages_async(self, chat_history_id: str) -> int:
        """
        Do what `count_messages` does, without blocking the event loop.
        """
        count: int = await self._run_async(self._count, _validated_id(chat_history_id, "chat_history_id"))
        return count

    def delete_messages(self, chat_history_id: str) -> None:
        """
        Delete a history, for good. Deleting one that does not exist does nothing.

        :param chat_history_id: Which conversation.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails. None or all of it was deleted.
        """
        self._run(self._delete, _validated_id(chat_history_id, "chat_history_id"))

    async def delete_messages_async(self, chat_history_id: str) -> None:
        """
        Do what `delete_messages` does, without blocking the event loop.
        """
        await self._run_async(self._delete, _validated_id(chat_history_id, "chat_history_id"))

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
        )

    def _to_write(
        self, chat_history_id: str, messages: Iterable[ChatMessage]
    ) -> tuple[str, list[tuple[str, ChatMessage]]]:
        """
        Check the arguments of a write.

        :returns: The history's id, and the messages to write, each under the name that errors give it.
        """
        history = _validated_id(chat_history_id, "chat_history_id")
        return history, [
            (f"messages[{index}]", message)
            for index, message in enumerate(rounds.validated_messages(messages))
            if not (self.skip_system_messages and message.role is ChatRole.SYSTEM)
        ]

    def _to_read(self, chat_history_id: str, last_k: int | None, window_step: int) -> tuple[str, Window]:
        history = _validated_id(chat_history_id, "chat_history_id")
        rounds.validate_last_k(last_k)
        rounds.validate_window_step(window_step)
        return history, Window(self.last_k_unit, self.last_k if last_k is None else last_k, window_step)


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


def _validated_id(value: Any, name: str, max_length: int = MAX_ID_LENGTH) -> str:
    """
    Return an id as plain text.

    :raises ValueError: If it is not non-empty text within `max_length`, without NUL and without lone surrogates.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}.")
    text = str.__str__(value)  # plain, whatever a subclass makes of its methods
    if not 0 < len(text) <= max_length:
        raise ValueError(f"{name} must have 1 to {max_length} characters, got {len(text)}.")
    if "\x00" in text:
        raise ValueError(f"{name} must not contain NUL characters.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must not contain lone surrogates.") from None
    return text


def _encoded(named: Sequence[tuple[str, ChatMessage]]) -> list[EncodedMessage]:
    """
    Give each message its id and encode it. Of messages with the same id, the first counts.
    """
    encoded: dict[str, EncodedMessage] = {}
    for name, message in named:
        own_id = message.meta.get(MESSAGE_ID_KEY)
        if own_id is None:
            message_id = new_message_id()
        else:
            message_id = _validated_id(own_id, f"{name}.meta[{MESSAGE_ID_KEY!r}]")
        content = encode_message(message, message_id, name)
        encoded.setdefault(message_id, EncodedMessage(message_id, message.role.value, content, own_id is not None))
    return list(encoded.values())


def _decoded(contents: Sequence[str], size: int, window: Window) -> list[ChatMessage]:
    messages = decode_messages(contents)
    if window.unit == "message" and window.count is not None:
        return rounds.last_messages(messages, size)
    return messages


def _is_much_to_encode(named: Sequence[tuple[str, ChatMessage]]) -> bool:
    """
    Whether encoding takes more than a few milliseconds, judged by the lengths of texts and of what is in the meta.
    """
    work = 100 * len(named)
    for _, message in named:
        work += sum(100 * len(value) for value in message.meta.values() if isinstance(value, (list, dict)))
        for part in message._content:
            work += sum(len(value) for value in getattr(part, "__dict__", {}).values() if isinstance(value, str))
    return work > _CHARACTERS_PER_LOOP_STEP


async def _off_loop_if(is_much: bool, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """
    Call `function(*arguments)`: at once, or in a thread if there is so much to do that the event loop would wait.
    """
    return await asyncio.to_thread(function, *arguments) if is_much else function(*arguments)
