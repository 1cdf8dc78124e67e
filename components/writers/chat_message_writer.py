# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack import DeserializationError, component, default_to_dict
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import protocol_calls
from haystack_chat_store.ids import is_shown_only
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validated_messages


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

    def __init__(self, chat_message_store: ChatMessageStore, policy: DuplicatePolicy = DuplicatePolicy.SKIP) -> None:
        """
        Create the component.

        :param chat_message_store: The store of the chat histories: any object that follows the `ChatMessageStore`
            protocol.
        :param policy: Decides about a message whose id (in its `meta["chat_message_id"]`) the history already has. With
            SKIP, the default, and NONE, the message is skipped. With OVERWRITE, it replaces the stored message. With
            FAIL, nothing of the batch is written.
        :raises ValueError: If `chat_message_store` does not follow the protocol, or its `write_messages` does not take
            a `policy` and the policy is not SKIP or NONE.
        """
        self.chat_message_store = protocol_calls.validated_store(chat_message_store)
        self.policy = policy
        protocol_calls.write_options(self.chat_message_store, policy, None)

    def to_dict(self) -> dict[str, Any]:
        """Serialize the component and its store."""
        return default_to_dict(self, chat_message_store=self.chat_message_store, policy=self.policy.name)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatMessageWriter":
        """
        Create the component and its store from the result of `to_dict`.

        :param data: The serialized component. It is not changed.
        :raises DeserializationError: If the store is missing, its class cannot be imported or is not trusted, or the
            policy is not the name of a `DuplicatePolicy`.
        """
        settings = data.get("init_parameters") or {}
        if isinstance(settings.get("policy"), str):
            if settings["policy"] not in DuplicatePolicy.__members__:
                raise DeserializationError(f"policy must be one of {[*DuplicatePolicy.__members__]}.")
            data = {**data, "init_parameters": {**settings, "policy": DuplicatePolicy[settings["policy"]]}}
        return protocol_calls.component_from_dict(cls, data)

    @component.output_types(messages_written=int)
    def run(
        self,
        chat_history_id: str,
        messages: list[ChatMessage],
        replies: list[ChatMessage] | None = None,
        *,
        expected_count: int | None = None,
    ) -> dict[str, int]:
        """
        Write `messages`, then `replies`, as one batch that is stored whole or not at all.

        :param chat_history_id: The history's id. A history that does not exist is created.
        :param messages: The messages of this turn, oldest first. The `policy` decides about messages whose ids the
            history already has.
        :param replies: The model's replies: connect a ChatGenerator's `replies` here. (If both were connected to one
            list input, Haystack would not promise their order.) Defaults to none.
        :param expected_count: The number of messages that the history must have; if it has another number, nothing is
            written. The store's `write_messages` must take it. Defaults to `None`: any number.
        :returns: A dictionary with the key `messages_written`: the number of messages that this call wrote. Messages
            that a retriever or an agent's hook has shown otherwise than they are stored are not written.
        :raises ValueError: If an argument is wrong. Nothing was written.
        :raises ConflictError: If the policy or `expected_count` forbids the write. Nothing was written.
        :raises ChatMessageStoreError: If the store fails.
        """
        batch, names = _batch(messages, replies)
        options = protocol_calls.write_options(self.chat_message_store, self.policy, expected_count)
        with protocol_calls.arguments_named(names):
            return {"messages_written": self.chat_message_store.write_messages(chat_history_id, batch, **options)}

    @component.output_types(messages_written=int)
    async def run_async(
        self,
        chat_history_id: str,
        messages: list[ChatMessage],
        replies: list[ChatMessage] | None = None,
        *,
        expected_count: int | None = None,
    ) -> dict[str, int]:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param chat_history_id: The history's id. A history that does not exist is created.
        :param messages: The messages of this turn, oldest first.
        :param replies: The model's replies. Defaults to none.
        :param expected_count: The number of messages that the history must have; if it has another number, nothing is
            written. Defaults to `None`: any number.
        :returns: A dictionary with the key `messages_written`: the number of messages that this call wrote.
        :raises ValueError: If an argument is wrong. Nothing was written.
        :raises ConflictError: If the policy or `expected_count` forbids the write. Nothing was written.
        :raises ChatMessageStoreError: If the store fails.
        """
        batch, names = _batch(messages, replies)
        options = protocol_calls.write_options(self.chat_message_store, self.policy, expected_count)
        with protocol_calls.arguments_named(names):
            written = await protocol_calls.write_async(self.chat_message_store, chat_history_id, batch, **options)
        return {"messages_written": written}

    def close(self) -> None:
        """Close the store. The next run opens it again."""
        protocol_calls.close(self.chat_message_store)

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await protocol_calls.close_async(self.chat_message_store)


def _batch(messages: list[ChatMessage], replies: list[ChatMessage] | None) -> tuple[list[ChatMessage], list[str]]:
    """Return the messages to write, and the name of each in errors, such as `replies[0]`."""
    arguments = {"messages": messages, "replies": [] if replies is None else replies}
    named = [
        (message, f"{name}[{index}]")
        for name, argument in arguments.items()
        for index, message in enumerate(validated_messages(argument, name))
        if not is_shown_only(message)
    ]
    return [message for message, _ in named], [name for _, name in named]
