# SPDX-License-Identifier: Apache-2.0
"""
The protocols that components and hooks hang on. Anything that follows them is a chat message store.
"""

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
