# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack import component, default_to_dict
from haystack.dataclasses import ChatMessage

from haystack_chat_store import any_store
from haystack_chat_store.rounds import validated_messages
from haystack_chat_store.types import ChatMessageStore


@component
class ChatMessageWriter:
    """
    Writes the messages of a turn to a chat history: the question and its answer as one batch, in this order.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_integrations.components.writers.chat_store import ChatMessageWriter

    writer = ChatMessageWriter(InMemoryChatMessageStore())
    question, answer = ChatMessage.from_user("Hello!"), ChatMessage.from_assistant("Hi, how can I help?")
    writer.run("user_456", messages=[question], replies=[answer])  # {"messages_written": 2}
    ```
    """

    def __init__(self, chat_message_store: ChatMessageStore) -> None:
        """
        Create the component.

        :param chat_message_store: Where the chat histories are kept. Any object that follows the `ChatMessageStore`
            protocol.
        :raises ValueError: If `chat_message_store` does not.
        """
        self.chat_message_store = any_store.validated_store(chat_message_store)

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the component and its store.
        """
        return default_to_dict(self, chat_message_store=self.chat_message_store)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatMessageWriter":
        """
        Make the component, and its store, from what `to_dict` returned.

        :param data: The serialized component. It is not changed.
        :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
        """
        return any_store.component_from_dict(cls, data)

    @component.output_types(messages_written=int)
    def run(
        self, chat_history_id: str, messages: list[ChatMessage], replies: list[ChatMessage] | None = None
    ) -> dict[str, int]:
        """
        Write `messages`, then `replies`, as one batch that is stored whole or not at all.

        :param chat_history_id: Which conversation.
        :param messages: The messages of this turn, oldest first. Those that the history has already, by the id in
            their `meta["chat_message_id"]`, are skipped.
        :param replies: What the model answered; connect a ChatGenerator's `replies` here. (Two connections to one
            list input would be joined in an order that Haystack does not promise.)
        :returns: A dictionary with the key `messages_written`: the number of messages this call stored.
        :raises ValueError: If an argument is wrong. Nothing was written.
        :raises ChatMessageStoreError: If the store fails.
        """
        batch = validated_messages(messages) + validated_messages([] if replies is None else replies, "replies")
        return {"messages_written": self.chat_message_store.write_messages(chat_history_id, batch)}

    @component.output_types(messages_written=int)
    async def run_async(
        self, chat_history_id: str, messages: list[ChatMessage], replies: list[ChatMessage] | None = None
    ) -> dict[str, int]:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param chat_history_id: Which conversation.
        :param messages: The messages of this turn, oldest first.
        :param replies: What the model answered.
        :returns: A dictionary with the key `messages_written`: the number of messages this call stored.
        :raises ValueError: If an argument is wrong. Nothing was written.
        :raises ChatMessageStoreError: If the store fails.
        """
        batch = validated_messages(messages) + validated_messages([] if replies is None else replies, "replies")
        written = await any_store.write_async(self.chat_message_store, chat_history_id, batch)
        return {"messages_written": written}

    def close(self) -> None:
        """
        Close the store. The next run opens it again.
        """
        any_store.close(self.chat_message_store)

    async def close_async(self) -> None:
        """
        Do what `close` does, without blocking the event loop.
        """
        await any_store.close_async(self.chat_message_store)
