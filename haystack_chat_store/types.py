# SPDX-License-Identifier: Apache-2.0
"""
The protocols that components and hooks hang on, and what stores return.

Anything that follows the protocols is a chat message store.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import Any, Protocol, runtime_checkable

from haystack.dataclasses import ChatMessage


@runtime_checkable
class ChatMessageStore(Protocol):
    """
    Keeps the messages of many chat histories, each under its `chat_history_id`.

    These are the methods of haystack-experimental's `ChatMessageStore`, so its store is one too. What our own stores
    promise beyond the signatures is this contract. `haystack_chat_store.testing` checks it, by these numbers.

    1. **Signatures.** Those below. Each call but `to_dict` and `from_dict` has a twin that ends in `_async` and takes
       the same arguments. Constructors take `skip_system_messages=True` and `last_k=10`.
    2. **Validation comes before any I/O.** Wrong arguments raise a `ValueError` that says which, and write nothing. An
       iterable of messages is written whole or refused. `last_k=0` returns nothing; `last_k=None` stands for the
       store's own `last_k`, and there `None` for everything. Ids are non-empty text of a stated length, without NUL
       and without lone surrogates.
    3. **A write is one atomic batch.** All of it becomes visible at once, or none. What a call has acknowledged stays,
       on a durable engine.
    4. **One order.** Positions 0, 1, 2 … without gaps, given at commit. Concurrent writers never lose, double, split
       or reorder a batch. Clocks decide nothing.
    5. **Every message has an id**, in `meta["chat_message_id"]` of what is returned. A message that brings one keeps
       it; else it gets one that is unique everywhere. The caller's objects are never changed.
    6. **Writing is idempotent by id.** A message whose id the history has already is skipped; the number returned
       counts those really written.
    7. **`last_k` counts rounds.** A round begins at each user message. What comes before the first belongs to no round
       and is returned when the history has fewer than `last_k` rounds. With `last_k_unit="message"` it counts single
       messages, and returns as many more as it takes for no tool result to come without its call. Our own stores also
       take `window_step`: the window's start moves only by so many rounds (or messages) at a time, and the window holds
       `last_k` to `last_k + window_step - 1` of them. All others are read whole where a component is given a step.
    8. **Cost follows the window**, not the length of the history.
    9. **Isolation.** Histories never mix, whatever their ids contain; neither do namespaces.
    10. **No aliasing.** Changing what was written or returned changes nothing stored.
    11. **Lossless.** Every part of a message comes back equal. What JSON has no form for is stored in a documented
        form or refused with a `MessageEncodingError`, never dropped.
    12. **Threads, event loops, processes.** One object serves them all, a forked child included. Asynchronous calls
        never block the loop; cancelling one leaves neither half a batch nor a leaked connection.
    13. **Lifecycle.** The constructor opens nothing, the first use does, `close()` releases, the next use reopens.
        Stores with equal connection settings share their connections.
    14. **Serialization.** `from_dict(to_dict(store))` equals the store; no secret is ever written out.
    15. **Errors** are `ChatMessageStoreError`s, and contain neither message text nor credentials.
    16. **Schema versions.** A durable store records its version, upgrades in place, and leaves alone what a newer
        version wrote.

    What our own stores can do beyond this protocol has rules too:

    17. **Directory.** `list_chat_histories` returns pages of the histories whose ids begin with a literal prefix, the
        one whose messages changed last first. A walk along its cursors sees each history once that is there throughout
        and not changed meanwhile; one that is changed moves to the front, and is seen once at most. What a page
        costs does not grow with the messages. `get_chat_history` and `update_chat_history` read and set
        title and meta; setting them is not a change of messages. Times are aware, in UTC.
    18. **Pages.** `list_messages` returns messages by position, in order: the newest, those just before a position, or
        those just after one. Positions rise and are never used again. `iterate_messages` walks a whole history, in
        memory that does not grow with it.
    19. **Changing what was said.** A write takes a `DuplicatePolicy`: OVERWRITE puts a message in the place of the one
        with its id, FAIL refuses the batch. With `expected_count` a write is refused if the history has another number
        of messages. Single messages, or all from one on, can be deleted. Rounds, counts and windows are right after it.
    20. **Forking.** `copy_messages` copies a history, or its beginning, whole or not at all, to one without messages.
    21. **Search.** `search_messages` finds the messages that have all words and phrases, whatever is asked, in any
        language, and nothing else. What is written can be found at once; what is deleted cannot.
    22. **Erasing.** `delete_chat_histories` deletes the histories with a prefix, `purge` those that have not changed
        for long: in batches, each history whole.
    23. **Moving.** What is exported and imported has equal messages, ids, order, titles and meta, on any engine.
        Importing again adds nothing; a damaged file is refused; of no history is there ever a part.
    """

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings.
        """
        ...

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatMessageStore":
        """
        Make a store from what `to_dict` returned.
        """
        ...

    def count_messages(self, chat_history_id: str) -> int:
        """
        Return the number of messages in a history.
        """
        ...

    def write_messages(self, chat_history_id: str, messages: list[ChatMessage]) -> int:
        """
        Append messages to a history and return how many were written.
        """
        ...

    def retrieve_messages(self, chat_history_id: str, last_k: int | None = None) -> list[ChatMessage]:
        """
        Return the end of a history, oldest message first.
        """
        ...

    def delete_messages(self, chat_history_id: str) -> None:
        """
        Delete a history.
        """
        ...

    def delete_all_messages(self) -> None:
        """
        Delete every history.
        """
        ...


@runtime_checkable
class AsyncChatMessageStore(ChatMessageStore, Protocol):
    """
    A `ChatMessageStore` that also has the asynchronous twins. All stores of this package do.
    """

    async def count_messages_async(self, chat_history_id: str) -> int:
        """
        Return the number of messages in a history.
        """
        ...

    async def write_messages_async(self, chat_history_id: str, messages: list[ChatMessage]) -> int:
        """
        Append messages to a history and return how many were written.
        """
        ...

    async def retrieve_messages_async(self, chat_history_id: str, last_k: int | None = None) -> list[ChatMessage]:
        """
        Return the end of a history, oldest message first.
        """
        ...

    async def delete_messages_async(self, chat_history_id: str) -> None:
        """
        Delete a history.
        """
        ...

    async def delete_all_messages_async(self) -> None:
        """
        Delete every history.
        """
        ...


class Result:
    """
    The base of what stores return: frozen dataclasses that are ready for JSON.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """
        Return the fields as a dictionary that JSON has a form for. Times are in ISO 8601.
        """
        return {field.name: _json_ready(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]  # all subclasses are dataclasses


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatHistoryInfo(Result):
    """
    What a store knows of a chat history beside its messages.

    :param chat_history_id: Which conversation.
    :param message_count: How many messages it has.
    :param round_count: How many rounds: user messages, each with what follows it.
    :param created_at: When its first message was stored. Aware, in UTC.
    :param updated_at: When its messages last changed. A new title or meta does not count.
    :param title: What `update_chat_history` set, or `None`.
    :param meta: Likewise, or an empty dict.
    """

    chat_history_id: str
    message_count: int
    round_count: int
    created_at: datetime
    updated_at: datetime
    title: str | None
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatHistoryPage(Result):
    """
    A part of the directory.

    :param items: The histories, the one that changed last first.
    :param cursor: What to give `list_chat_histories` for the next page; `None` if this is the last one.
    """

    items: list[ChatHistoryInfo]
    cursor: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMessage(Result):
    """
    A message and its place in its history.

    :param position: Its position. Positions rise from 0 and are never used again, so after deletions there are gaps.
    :param created_at: When it was stored. Aware, in UTC.
    :param message: The message, with its id in `meta["chat_message_id"]`.
    """

    position: int
    created_at: datetime
    message: ChatMessage


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchHit(Result):
    """
    A message that a search has found.

    :param chat_history_id: Its history.
    :param message_id: Its id.
    :param position: Its position in its history.
    :param snippet: The part of its text around the first match, on one line.
    :param score: How well it matches; more is better. Comparable within one search only.
    """

    chat_history_id: str
    message_id: str
    position: int
    snippet: str
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics(Result):
    """
    How much there is in a store's namespace.

    :param chat_histories: The number of chat histories.
    :param messages: The number of their messages.
    :param rounds: The number of their rounds.
    :param size: How many bytes the engine holds, of everything in the same file, tables or keys, or `None` if it does
        not say.
    :param messages_per_day: How many messages were stored on each day (UTC) on which there were any, in order.
    """

    chat_histories: int
    messages: int
    rounds: int
    size: int | None
    messages_per_day: Mapping[date, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault(Result):
    """
    Something in a store that does not fit together.

    :param chat_history_id: The history that it is about, or `None`.
    :param position: The position of the message that it is about, or `None`.
    :param description: What is wrong. Never says what a message says.
    :param is_repaired: Whether it has been mended.
    """

    chat_history_id: str | None = None
    position: int | None = None
    description: str
    is_repaired: bool = False


def _json_ready(value: Any) -> Any:
    if isinstance(value, (Result, ChatMessage)):
        return value.to_dict()
    if isinstance(value, date):  # a datetime, too
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(_json_ready(key)): _json_ready(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json_ready(item) for item in value]
    return value
