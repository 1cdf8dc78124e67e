# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack import component, default_to_dict
from haystack.dataclasses import ChatMessage

from haystack_chat_store import any_store
from haystack_chat_store.rounds import valid_for_model, validate_last_k, validated_messages, with_current_messages
from haystack_chat_store.types import ChatMessageStore


@component
class ChatMessageRetriever:
    """
    Retrieves the end of a chat history and puts the messages of this turn around it, ready for a ChatGenerator.

    What comes out is valid for the model: tool calls that never got their result, and results without a call, are left
    out (the store keeps them).

    ```python
    from haystack import Pipeline
    from haystack.components.generators.chat import MockChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
    from haystack_integrations.components.writers.chat_store import ChatMessageWriter

    store = InMemoryChatMessageStore()
    pipeline = Pipeline()
    pipeline.add_component("retriever", ChatMessageRetriever(store))
    pipeline.add_component("llm", MockChatGenerator())
    pipeline.add_component("writer", ChatMessageWriter(store))
    pipeline.connect("retriever.messages", "llm.messages")
    pipeline.connect("llm.replies", "writer.replies")

    question = [ChatMessage.from_user("Hello!")]
    pipeline.run(
        {
            "retriever": {"chat_history_id": "user_456", "current_messages": question},
            "writer": {"chat_history_id": "user_456", "messages": question},
        }
    )
    ```
    """

    def __init__(self, chat_message_store: ChatMessageStore, last_k: int | None = 10) -> None:
        """
        Create the component.

        :param chat_message_store: Where the chat histories are kept. Any object that follows the `ChatMessageStore`
            protocol.
        :param last_k: How many rounds of the history to retrieve when a run does not say. Defaults to 10, whatever the
            store's own `last_k` is; `None` for the store's own, where `None` means all. A round is a user message and
            everything up to the next one. (If the store has `last_k_unit="message"`, these are messages.)
        :raises ValueError: If `last_k` is neither `None` nor an integer of 0 or more, or `chat_message_store` does not
            follow the protocol.
        """
        validate_last_k(last_k)
        self.chat_message_store = any_store.validated_store(chat_message_store)
        self.last_k = last_k

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the component and its store.
        """
        return default_to_dict(self, chat_message_store=self.chat_message_store, last_k=self.last_k)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatMessageRetriever":
        """
        Make the component, and its store, from what `to_dict` returned.

        :param data: The serialized component. It is not changed.
        :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
        """
        return any_store.component_from_dict(cls, data)

    @component.output_types(messages=list[ChatMessage])
    def run(
        self,
        chat_history_id: str,
        *,
        last_k: int | None = None,
        current_messages: list[ChatMessage] | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """
        Retrieve the end of a history and put the messages of this turn around it.

        :param chat_history_id: Which conversation.
        :param last_k: How many rounds of the history to retrieve; 0 for none. Defaults to the component's `last_k`.
        :param current_messages: The messages of this turn. Their system messages come before the history, all others
            after it. One that carries the id of a stored message is not repeated from the history. Tool results among
            them count as answers to stored calls.
        :returns: A dictionary with the key `messages`: a list of `ChatMessage`s that a ChatGenerator takes as it is.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the store fails.
        """
        current = validated_messages([] if current_messages is None else current_messages, "current_messages")
        last_k = self._resolved(last_k)
        # Not left to the store: to anybody's slice of the last 0 messages, 0 may mean all.
        history = [] if last_k == 0 else self.chat_message_store.retrieve_messages(chat_history_id, last_k)
        return {"messages": valid_for_model(with_current_messages(history, current))}

    @component.output_types(messages=list[ChatMessage])
    async def run_async(
        self,
        chat_history_id: str,
        *,
        last_k: int | None = None,
        current_messages: list[ChatMessage] | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param chat_history_id: Which conversation.
        :param last_k: How many rounds of the history to retrieve; 0 for none. Defaults to the component's `last_k`.
        :param current_messages: The messages of this turn.
        :returns: A dictionary with the key `messages`: a list of `ChatMessage`s that a ChatGenerator takes as it is.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the store fails.
        """
        current = validated_messages([] if current_messages is None else current_messages, "current_messages")
        last_k, store = self._resolved(last_k), self.chat_message_store
        history = [] if last_k == 0 else await any_store.retrieve_async(store, chat_history_id, last_k)
        return {"messages": valid_for_model(with_current_messages(history, current))}

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

    def _resolved(self, last_k: int | None) -> int | None:
        validate_last_k(last_k)
        return self.last_k if last_k is None else last_k
