# SPDX-License-Identifier: Apache-2.0
"""
The base of all stores: settings, validation, ids, encoding; writing, reading and deleting messages.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from haystack import default_from_dict, default_to_dict
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.document_stores.types import DuplicatePolicy
from typing_extensions import Self

from haystack_chat_store import rounds, validation
from haystack_chat_store.codec import decode_messages, encode_message
from haystack_chat_store.ids import MESSAGE_ID_KEY, new_message_id
from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.stores.conflicts import duplicate
from haystack_chat_store.stores.directory import DirectoryMethods
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.reading import ReadingMethods
from haystack_chat_store.stores.rows import EncodedMessage, Scope
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP, to_thread_if_large

# Encoding a value takes as long as encoding this many characters of text.
_CHARACTERS_PER_VALUE = 100


@dataclass(frozen=True)
class _Write:
    """
    The checked arguments of `write_messages`.

    :param named: The messages to store, each under the name that errors give it.
    """

    chat_history_id: str
    named: list[tuple[str, ChatMessage]]
    policy: DuplicatePolicy
    expected_count: int | None
    strict: bool


class BaseChatMessageStore(DirectoryMethods, ReadingMethods):
    """
    The base of all stores: everything that does not depend on the engine.

    To write a store, subclass `Engine`, which says what an engine has to do, and this class: pass the engine to
    `__init__`, and add the store's own settings to `settings`. Later versions may know more operations of engines; an
    engine will not have to implement them.
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
    ) -> None:
        """
        Check and keep the settings that all stores have.

        :param engine: What stores the messages.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: What separates tenants, applications or test runs that share one database: a store sees only
            its own namespace. Defaults to `"default"`. 1 to 128 characters.
        :param search: Whether messages can be searched. Defaults to False.
        :param strict: Whether a message is refused if its `meta` holds a value without a JSON form, such as a function.
            Defaults to False: the `repr` of such a value is stored, and the log says so.
        :raises ValueError: If a setting is not one of these.
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
        self.scope = Scope(self.namespace)

    def settings(self) -> dict[str, Any]:
        """
        Return the arguments that make an equal store. A subclass adds those of its own constructor.
        """
        return {
            "skip_system_messages": self.skip_system_messages,
            "last_k": self.last_k,
            "last_k_unit": self.last_k_unit,
            "namespace": self.namespace,
            "search": self.search,
            "strict": self.strict,
        }

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings.

        :returns: A dictionary for `from_dict`, YAML and JSON. Secrets are named in it, never written out.
        :raises ValueError: If a secret does not come from an environment variable.
        """
        return default_to_dict(self, **self.settings())

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
        write = self._checked_write(chat_history_id, messages, policy, expected_count)
        encoded = _encoded(write)
        if not encoded and expected_count is None:
            return 0
        return self.engine.run(
            self.engine.append, self.scope, write.chat_history_id, encoded, write.policy, expected_count
        )

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
        write = self._checked_write(chat_history_id, messages, policy, expected_count)
        encoded = await to_thread_if_large(_work_to_encode(write), _encoded, write)
        if not encoded and expected_count is None:
            return 0
        return await self.engine.run_async(
            self.engine.append, self.scope, write.chat_history_id, encoded, write.policy, expected_count
        )

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
        history = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        if window.count == 0:
            return []
        contents, size = self.engine.run(self.engine.read, self.scope, history, window)
        return _decoded(contents, size, window)

    async def retrieve_messages_async(
        self, chat_history_id: str, last_k: int | None = None, *, window_step: int = 1
    ) -> list[ChatMessage]:
        """
        Do what `retrieve_messages` does, without blocking the event loop.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        window = self._checked_window(last_k, window_step)
        if window.count == 0:
            return []
        contents, size = await self.engine.run_async(self.engine.read, self.scope, history, window)
        return await to_thread_if_large(sum(map(len, contents)), _decoded, contents, size, window)

    def count_messages(self, chat_history_id: str) -> int:
        """
        Return the number of messages in a history. It is read from a counter, at the same cost for any length.

        :param chat_history_id: Which conversation. One that does not exist has 0.
        :raises ValueError: If `chat_history_id` cannot be one.
        :raises ChatMessageStoreError: If the engine fails.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        return self.engine.run(self.engine.count, self.scope, history)

    async def count_messages_async(self, chat_history_id: str) -> int:
        """
        Do what `count_messages` does, without blocking the event loop.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        return await self.engine.run_async(self.engine.count, self.scope, history)

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
        history = validation.validated_id(chat_history_id, "chat_history_id")
        if message_ids is None and from_message_id is None:
            self.engine.run(self.engine.delete, self.scope, history)
            return
        chosen = validation.validated_choice(message_ids, from_message_id)
        if chosen != ([], None):
            self.engine.run(self.engine.delete_messages, self.scope, history, *chosen)

    async def delete_messages_async(
        self, chat_history_id: str, *, message_ids: Iterable[str] | None = None, from_message_id: str | None = None
    ) -> None:
        """
        Do what `delete_messages` does, without blocking the event loop.
        """
        history = validation.validated_id(chat_history_id, "chat_history_id")
        if message_ids is None and from_message_id is None:
            await self.engine.run_async(self.engine.delete, self.scope, history)
            return
        chosen = validation.validated_choice(message_ids, from_message_id)
        if chosen != ([], None):
            await self.engine.run_async(self.engine.delete_messages, self.scope, history, *chosen)

    def delete_all_messages(self) -> None:
        """
        Delete every history of this store's namespace, for good. Other namespaces keep theirs.

        Each history goes whole, but servers delete some at a time: if this fails, some may be gone and others not.

        :raises ChatMessageStoreError: If the engine fails. Call it again to delete the rest.
        """
        self.engine.run(self.engine.delete_all, self.scope)

    async def delete_all_messages_async(self) -> None:
        """
        Do what `delete_all_messages` does, without blocking the event loop.
        """
        await self.engine.run_async(self.engine.delete_all, self.scope)

    def close(self) -> None:
        """
        Release connections and threads. The next use opens them again; closing twice does nothing.

        Stores with equal settings share their connections: this closes them for all of these stores.
        """
        self.engine.close()

    async def close_async(self) -> None:
        """
        Do what `close` does, without blocking the event loop.
        """
        await self.engine.close_async()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """
        Make a store from what `to_dict` returned. Connects to nothing, and does not change `data`.

        :param data: The serialized store.
        :raises DeserializationError: If `data` is not of this class.
        """
        return default_from_dict(cls, data)

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """
        Make a store from a URL whose scheme is registered for this class: see `store_from_url`.

        :param url: The URL, with its scheme.
        :param settings: Further settings of the constructor.
        :raises ValueError: If the URL is not one of this store's. The error does not repeat it, for it may hold a
            password.
        """
        raise ValueError(f"{cls.__name__} cannot be made from a URL.")

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

    def _checked_write(
        self,
        chat_history_id: str,
        messages: Iterable[ChatMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> _Write:
        history = validation.validated_id(chat_history_id, "chat_history_id")
        policy = validation.validated_policy(policy)
        if expected_count is not None:
            validation.validated_number(expected_count, "expected_count", 0)
        named = [
            (f"messages[{index}]", message)
            for index, message in enumerate(validation.validated_messages(messages))
            if not (self.skip_system_messages and message.role is ChatRole.SYSTEM)
        ]
        return _Write(history, named, policy, expected_count, self.strict)

    def _checked_window(self, last_k: int | None, window_step: int) -> Window:
        validation.validate_last_k(last_k)
        validation.validate_window_step(window_step)
        return Window(self.last_k_unit, self.last_k if last_k is None else last_k, window_step)


def _encoded(write: _Write) -> list[EncodedMessage]:
    """
    Give each message its id and encode it.

    Of messages with the same id the first counts. Under the policy OVERWRITE it is the last, and FAIL refuses them.
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
                raise duplicate(message_id)
            if write.policy is DuplicatePolicy.SKIP:
                continue
        encoded[message_id] = EncodedMessage(
            message_id=message_id, role=message.role.value, content=content, has_caller_id=own_id is not None
        )
    return list(encoded.values())


def _decoded(contents: Sequence[str], size: int, window: Window) -> list[ChatMessage]:
    messages = decode_messages(contents)
    if window.unit == "message" and window.count is not None:
        return rounds.last_messages(messages, size)
    return messages


def _work_to_encode(write: _Write) -> int:
    """
    Estimate the cost of encoding, in characters of text. Stops counting at the limit of what the event loop does.
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
