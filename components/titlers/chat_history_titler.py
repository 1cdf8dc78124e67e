# SPDX-License-Identifier: Apache-2.0
import asyncio
from collections.abc import Sequence
from typing import Any

from haystack import component, default_to_dict
from haystack.components.generators.chat.types import ChatGenerator
from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store import protocol
from haystack_chat_store.errors import ChatHistoryAccessError, ChatHistoryNotFoundError
from haystack_chat_store.types import ChatHistoryInfo, ChatMessageStore, StoredMessage
from haystack_chat_store.validation import validated_flag

_INSTRUCTION = (
    "Write a title for the conversation below: at most six words, in the language of the conversation, without "
    "quotation marks. Answer with the title alone."
)
# The number of messages at the beginning of a history in which its first question and answer are looked for.
_FIRST_MESSAGES = 50
# The largest number of characters of a message that the model is shown.
_SHOWN_CHARACTERS = 2_000
_MAX_TITLE_LENGTH = 100
_QUOTATION_MARKS = "\"'`“”„«»* "
# The errors of a history that was deleted, or given to another user, while the model wrote its title.
_GONE = (ChatHistoryNotFoundError, ChatHistoryAccessError)
_NEEDED_METHODS = ("get_chat_history", "list_messages", "update_chat_history")


@component
class ChatHistoryTitler:
    """
    Gives a conversation a title that a ChatGenerator writes, once, after its first turn.

    If a conversation has a title, it stays, also one that a user sets while the model writes. Connect the writer's
    `messages_written`, so that the titler runs after the turn was written.

    ```python
    from haystack import Pipeline
    from haystack.components.generators.chat import MockChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_integrations.components.titlers.chat_store import ChatHistoryTitler
    from haystack_integrations.components.writers.chat_store import ChatMessageWriter

    store = InMemoryChatMessageStore()
    pipeline = Pipeline()
    pipeline.add_component("llm", MockChatGenerator("It is sunny."))
    pipeline.add_component("writer", ChatMessageWriter(store))
    pipeline.add_component("titler", ChatHistoryTitler(store, MockChatGenerator("The weather in Rome")))
    pipeline.connect("llm.replies", "writer.replies")
    pipeline.connect("writer.messages_written", "titler.messages_written")

    question = [ChatMessage.from_user("What is the weather in Rome?")]
    pipeline.run(
        {
            "llm": {"messages": question},
            "writer": {"chat_history_id": "user_456", "messages": question},
            "titler": {"chat_history_id": "user_456"},
        }
    )
    print(store.get_chat_history("user_456").title)  # The weather in Rome
    ```
    """

    def __init__(
        self, chat_message_store: ChatMessageStore, chat_generator: ChatGenerator, *, require_user_id: bool = False
    ) -> None:
        """
        Create the component.

        :param chat_message_store: The store of the chat histories. It must have `get_chat_history`, `list_messages` and
            `update_chat_history` with `default_title`, as all stores of this package have.
        :param chat_generator: The ChatGenerator that writes titles. A small and fast model suffices.
        :param require_user_id: Whether a run without a `user_id` is refused. Defaults to False.
        :raises ValueError: If a setting is wrong.
        """
        self.chat_message_store = protocol.validated_store(chat_message_store)
        missing = [name for name in _NEEDED_METHODS if not hasattr(chat_message_store, name)]
        if missing:
            raise ValueError(f"{type(chat_message_store).__name__} keeps no titles: it has no {missing[0]}.")
        self.chat_generator = chat_generator
        self.require_user_id = validated_flag(require_user_id, "require_user_id")

    def to_dict(self) -> dict[str, Any]:
        """Serialize the component, its store and its ChatGenerator."""
        return default_to_dict(
            self,
            chat_message_store=self.chat_message_store,
            chat_generator=self.chat_generator,
            require_user_id=self.require_user_id,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatHistoryTitler":
        """
        Create the component, its store and its ChatGenerator from the result of `to_dict`.

        :param data: The serialized component. It is not changed.
        :raises DeserializationError: If the store is missing, or a class cannot be imported or is not trusted.
        """
        return protocol.component_from_dict(cls, data)

    @component.output_types(title=str | None)
    def run(
        self,
        chat_history_id: str,
        *,
        user_id: str | None = None,
        messages_written: int | None = None,  # noqa: ARG002  (its connection gives the order)
    ) -> dict[str, Any]:
        """
        Give a conversation a title if it has none, and its first question was answered.

        :param chat_history_id: The history's id.
        :param user_id: The user of the history. Defaults to `None`: the user of the store, if it has one.
        :param messages_written: Connect the writer's output here, so that the titler runs after the writer. The value
            is not used.
        :returns: A dictionary with the key `title`: the title that the history has now, or `None`.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If `user_id` is given and the store belongs to another user.
        :raises ChatMessageStoreError: If the store fails. If the ChatGenerator fails, its error is raised.
        """
        store: Any = protocol.for_user(self.chat_message_store, user_id, is_required=self.require_user_id)
        info = store.get_chat_history(chat_history_id)
        prompt = None
        if not _is_settled(info):
            prompt = _prompt(store.list_messages(chat_history_id, after=-1, limit=_FIRST_MESSAGES))
        if prompt is not None:
            title = _title(self.chat_generator.run(messages=prompt))
            try:
                info = store.update_chat_history(chat_history_id, default_title=title)
            except _GONE:
                info = None
        return {"title": None if info is None else info.title}

    @component.output_types(title=str | None)
    async def run_async(
        self,
        chat_history_id: str,
        *,
        user_id: str | None = None,
        messages_written: int | None = None,  # noqa: ARG002  (its connection gives the order)
    ) -> dict[str, Any]:
        """
        Do what `run` does, without blocking the event loop.

        A store or a ChatGenerator without asynchronous methods runs in a thread.

        :param chat_history_id: The history's id.
        :param user_id: The user of the history. Defaults to `None`: the user of the store, if it has one.
        :param messages_written: Connected for the order only. The value is not used.
        :returns: A dictionary with the key `title`.
        :raises ValueError: If an argument is wrong.
        :raises ChatHistoryAccessError: If `user_id` is given and the store belongs to another user.
        :raises ChatMessageStoreError: If the store fails. If the ChatGenerator fails, its error is raised.
        """
        store: Any = protocol.for_user(self.chat_message_store, user_id, is_required=self.require_user_id)
        info = await _call(store, "get_chat_history", chat_history_id)
        prompt = None
        if not _is_settled(info):
            prompt = _prompt(await _call(store, "list_messages", chat_history_id, after=-1, limit=_FIRST_MESSAGES))
        if prompt is not None:
            title = _title(await _call(self.chat_generator, "run", messages=prompt))
            try:
                info = await _call(store, "update_chat_history", chat_history_id, default_title=title)
            except _GONE:
                info = None
        return {"title": None if info is None else info.title}

    def warm_up(self) -> None:
        """Warm up the ChatGenerator, if it can be warmed up."""
        if hasattr(self.chat_generator, "warm_up"):
            self.chat_generator.warm_up()

    async def warm_up_async(self) -> None:
        """Warm up the ChatGenerator, if it can be warmed up, asynchronously if it can."""
        if hasattr(self.chat_generator, "warm_up_async"):
            await self.chat_generator.warm_up_async()
        else:
            self.warm_up()

    def close(self) -> None:
        """Close the store and, if it can be closed, the ChatGenerator. The next run opens the store again."""
        try:
            if hasattr(self.chat_generator, "close"):
                self.chat_generator.close()
        finally:
            protocol.close(self.chat_message_store)

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        try:
            if hasattr(self.chat_generator, "close_async"):
                await self.chat_generator.close_async()
            elif hasattr(self.chat_generator, "close"):
                self.chat_generator.close()
        finally:
            await protocol.close_async(self.chat_message_store)


async def _call(owner: Any, name: str, *arguments: Any, **options: Any) -> Any:
    """Await a method's asynchronous form. If there is none, run the method in a thread."""
    if hasattr(owner, f"{name}_async"):
        return await getattr(owner, f"{name}_async")(*arguments, **options)
    return await asyncio.to_thread(getattr(owner, name), *arguments, **options)


def _is_settled(info: ChatHistoryInfo | None) -> bool:
    """Whether a history is not there, or has a title already."""
    return info is None or info.title is not None


def _prompt(stored: Sequence[StoredMessage]) -> list[ChatMessage] | None:
    """Return what the model is asked, or `None` if the first question has no answer yet."""
    said = [each.message for each in stored if each.message.text and each.message.text.strip()]
    question = next((index for index, message in enumerate(said) if message.role is ChatRole.USER), len(said))
    replies = [message for message in said[question:] if message.role is ChatRole.ASSISTANT]
    answer = next((message for message in replies if not message.tool_calls), None)  # others are steps of an agent
    if answer is None:
        return None
    texts = [(message.text or "")[:_SHOWN_CHARACTERS] for message in (said[question], answer)]
    conversation = f"User: {texts[0]}\n\nAssistant: {texts[1]}"
    return [ChatMessage.from_system(_INSTRUCTION), ChatMessage.from_user(conversation)]


def _title(result: dict[str, Any]) -> str | None:
    """Return the title in what a ChatGenerator returns, or `None` if there is none."""
    text = (result["replies"][0].text or "") if result.get("replies") else ""
    lines = [line.strip(_QUOTATION_MARKS) for line in text.replace("\x00", "").splitlines()]
    title = next(filter(None, lines), "")[:_MAX_TITLE_LENGTH].rstrip()
    return title.encode("utf-8", "replace").decode() or None
