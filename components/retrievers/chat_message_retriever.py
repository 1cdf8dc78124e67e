# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack import component, default_to_dict
from haystack.dataclasses import ChatMessage
from haystack.token_counters import TokenCounter

from haystack_chat_store import protocol_calls
from haystack_chat_store.rounds import valid_for_model
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validated_messages
from haystack_chat_store.window_reader import WindowReader


@component
class ChatMessageRetriever:
    """
    Retrieves the end of a chat history and puts the messages of this turn around it, ready for a ChatGenerator.

    What comes out is valid for the model: tool calls that never got their result, results without a call, and what an
    assistant said before the user did, are left out (the store keeps them). It fits `max_tokens`. Where several agents
    ran on the history at the same time, each question is followed by what belongs to it.

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

    def __init__(
        self,
        chat_message_store: ChatMessageStore,
        last_k: int | None = 10,
        *,
        max_tokens: int | None = None,
        token_counter: TokenCounter | None = None,
        window_step: int = 1,
    ) -> None:
        """
        Create the component.

        :param chat_message_store: Where the chat histories are kept. Any object that follows the `ChatMessageStore`
            protocol.
        :param last_k: How many rounds of the history to retrieve when a run does not say. Defaults to 10, whatever the
            store's own `last_k` is. `None` for as many as fit `max_tokens` or, without `max_tokens`, for the store's
            own, where `None` means all. A round is a user message and everything up to the next one. (If the store has
            `last_k_unit="message"`, these are messages, and as many before them as
            belong to the round in which they begin.)
        :param max_tokens: How many tokens `messages` may have, those of this turn included. Only these can be more by
            themselves. Defaults to `None`: any number. Of a longer history come the newest whole rounds that fit; if
            not even the newest round fits, its question and the newest of its steps (a step is an assistant message
            and the tool messages after it); if not even the question fits, nothing.
        :param token_counter: What counts the tokens: any Haystack `TokenCounter`. Defaults to
            `ApproximateTokenCounter()`.
        :param window_step: How many rounds have to come before the start of the history that is shown moves on.
            Defaults to 1. Greater values hold up to `window_step - 1` rounds more than `last_k` (or so many fewer than
            fit `max_tokens`), and let the prompts of several turns begin with the same messages, as a provider's
            prompt cache wants it. Stores that are not of this package are read whole for it.
        :raises ValueError: If a setting is not one of these, or `chat_message_store` does not follow the protocol.
        """
        self.chat_message_store = protocol_calls.validated_store(chat_message_store)
        self.last_k = last_k
        self.max_tokens = max_tokens
        self.token_counter = token_counter
        self.window_step = window_step
        self._window_reader()  # refuses settings that cannot be

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the component, its store and its token counter.
        """
        return default_to_dict(
            self,
            chat_message_store=self.chat_message_store,
            last_k=self.last_k,
            max_tokens=self.max_tokens,
            token_counter=self.token_counter,
            window_step=self.window_step,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatMessageRetriever":
        """
        Make the component, and its store, from what `to_dict` returned.

        :param data: The serialized component. It is not changed.
        :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
        """
        return protocol_calls.component_from_dict(cls, data)

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
            after it. What the retrieved history has is not repeated after it: a message with the id of a stored one,
            and others with ids that stand before such a message, as in a whole transcript. Tool results among them
            count as answers to stored calls.
        :returns: A dictionary with the key `messages`: a list of `ChatMessage`s that a ChatGenerator takes as it is.
        :raises ValueError: If an argument is wrong.
        :raises ChatMessageStoreError: If the store fails.
        """
        current = validated_messages([] if current_messages is None else current_messages, "current_messages")
        history = self._window_reader().read(self.chat_message_store, chat_history_id, current, last_k)
        return {"messages": valid_for_model(history, current)}

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
        history = await self._window_reader().read_async(self.chat_message_store, chat_history_id, current, last_k)
        return {"messages": valid_for_model(history, current)}

    def warm_up(self) -> None:
        """
        Warm up the token counter, if there is something to.
        """
        self._window_reader().warm_up()

    def close(self) -> None:
        """
        Close the store. The next run opens it again.
        """
        protocol_calls.close(self.chat_message_store)

    async def close_async(self) -> None:
        """
        Do what `close` does, without blocking the event loop.
        """
        await protocol_calls.close_async(self.chat_message_store)

    def _window_reader(self) -> WindowReader:
        # Made anew for each run, for the settings are attributes that anybody may change.
        return WindowReader(
            self.last_k, max_tokens=self.max_tokens, token_counter=self.token_counter, window_step=self.window_step
        )
