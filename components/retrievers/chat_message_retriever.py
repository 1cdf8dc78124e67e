# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack import component, default_to_dict
from haystack.dataclasses import ChatMessage
from haystack.token_counters import TokenCounter

from haystack_chat_store import protocol
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validated_flag, validated_messages
from haystack_chat_store.window_reader import TurnWindow, WindowReader


@component
class ChatMessageRetriever:
    """
    Retrieves the end of a chat history, and adds the messages of this turn, ready for a ChatGenerator.

    System messages of this turn come before the history, all others after it. The result is in a form that model
    providers accept, and fits `max_tokens`. A tool call without a result is answered
    by a result that says that the call was interrupted. Results without a call and assistant messages before the first
    user message are left out. If several agents ran on the history at the same time, the messages of each question
    stand together. The store keeps everything as it was said. A message that is not shown as it is stored carries
    `meta["chat_shown"]`.

    The question of this turn stands last, even if it is stored already and others have asked since. If it is answered
    already, the output is the stored answer, as `replies`.

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
        portable: bool = True,
        merge_consecutive: bool = False,
        model: str | None = None,
        require_user_id: bool = False,
    ) -> None:
        """
        Create the component.

        :param chat_message_store: The store of the chat histories: any object that follows the `ChatMessageStore`
            protocol.
        :param last_k: The number of rounds of the history that a run without `last_k` retrieves. Defaults to 10,
            whatever the store's own `last_k` is. `None` for as many as fit `max_tokens` or, without `max_tokens`, for
            the store's own `last_k`. A round is a user message and everything up to the next one. (If the store has
            `last_k_unit="message"`, this is a number of messages, and the window goes back to the beginning of the
            round in which they begin.)
        :param max_tokens: The largest number of tokens of `messages`, the messages of this turn included. (These are
            never cut.) Defaults to `None`: any number. If the history has more, the newest whole rounds that fit are
            retrieved. If the newest round alone does not fit, its question and the newest of its steps are retrieved (a
            step is an assistant message and the tool messages after it). If the question alone does not fit, nothing is
            retrieved.
        :param token_counter: The Haystack `TokenCounter` that counts the tokens. Defaults to
            `ApproximateTokenCounter()`.
        :param window_step: The start of the window moves only in steps of this many rounds, so that the prompts of
            several turns begin with the same messages and a provider's prompt cache can be used. Defaults to 1. The
            window then holds up to `window_step - 1` rounds more than `last_k` or, with `max_tokens`, up to that many
            fewer than would fit. Above 1, histories in stores of other packages are read whole.
        :param portable: Whether completed rounds are shown in a form that every provider takes, so that the model may
            change in the middle of a conversation: without reasoning, signatures and other content for one provider,
            with neutral ids of tool calls, and with text for files that some refuse. Defaults to True. If False, they
            are shown as they are stored. The round under way is shown as it is stored, because its model needs it.
        :param merge_consecutive: Whether user and assistant speak in turns, for models that insist on it: stored
            messages of the same role that follow each other are joined, and "Please go on." stands before a message of
            this turn that would follow one of its role. Defaults to False.
        :param model: The name of the model that is asked. In the round under way, replies of other models are shown in
            the portable form, so that another model can go on with an interrupted round. Files of rounds that this
            model has answered are shown as they are stored. Defaults to `None`: the model of the newest reply in the
            round under way, and files in the portable form.
        :param require_user_id: Whether a run without a `user_id` is refused. Then a forgotten connection is an error,
            and never shows the conversations of all users. Defaults to False.
        :raises ValueError: If a setting is wrong, or `chat_message_store` does not follow the protocol.
        """
        self.chat_message_store = protocol.validated_store(chat_message_store)
        self.last_k = last_k
        self.max_tokens = max_tokens
        self.token_counter = token_counter
        self.window_step = window_step
        self.portable = portable
        self.merge_consecutive = merge_consecutive
        self.model = model
        self.require_user_id = validated_flag(require_user_id, "require_user_id")
        self._window_reader()  # raises the ValueError of a wrong setting

    def to_dict(self) -> dict[str, Any]:
        """Serialize the component, its store and its token counter."""
        return default_to_dict(
            self,
            chat_message_store=self.chat_message_store,
            last_k=self.last_k,
            max_tokens=self.max_tokens,
            token_counter=self.token_counter,
            window_step=self.window_step,
            portable=self.portable,
            merge_consecutive=self.merge_consecutive,
            model=self.model,
            require_user_id=self.require_user_id,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatMessageRetriever":
        """
        Create the component and its store from the result of `to_dict`.

        :param data: The serialized component. It is not changed.
        :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
        """
        return protocol.component_from_dict(cls, data)

    @component.output_types(messages=list[ChatMessage], replies=list[ChatMessage], revision=int, omitted_rounds=int)
    def run(
        self,
        chat_history_id: str,
        *,
        last_k: int | None = None,
        current_messages: list[ChatMessage] | None = None,
        user_id: str | None = None,
        until_message_id: str | None = None,
        before_message_id: str | None = None,
    ) -> dict[str, Any]:
        """
        Retrieve the end of a history, and add the messages of this turn.

        If the question of this turn is stored already, by its id, it is not repeated. What others have asked since is
        left out, so the question stands last. If it is answered already, the model need not be asked: the output has
        the answer as `replies`, and no `messages`.

        :param chat_history_id: The history's id. A history that does not exist is empty.
        :param last_k: The number of rounds before this turn to retrieve; 0 for none. Defaults to the component's
            `last_k`.
        :param current_messages: The messages of this turn. System messages come before the history, all others after
            it. If a message has the id of a retrieved one, it is left out, and so are the messages with ids before it:
            so a whole transcript is not repeated. The turn's question, which is the last user message, is shown as it
            stands here, even if it is stored with another content. Tool results answer stored calls.
        :param user_id: The user of the history. A history of another user looks empty. Defaults to `None`: the user of
            the store, if it has one.
        :param until_message_id: The id of a message. The conversation is shown up to and including it, as if it ended
            there. Defaults to `None`: the whole conversation.
        :param before_message_id: The id of a message, such as a question that is edited. The conversation is shown up
            to the message before it, as if it ended there. If the message is gone, but the question of this turn is
            stored, this turn has taken its place before, and the whole conversation is read. Give only one of the two.
            Defaults to `None`.
        :returns: A dictionary with the keys

            - `messages`: a list of `ChatMessage`s for a ChatGenerator. The key is missing if there are `replies`.
            - `replies`: a list with the stored answer to the question of this turn. The key is missing if it is not
              answered yet.
            - `revision`: the revision of the history that was read, 0 if it does not exist. Pass it to a write as
              `expected_revision`, if the write depends on what was read. (The key is missing if the store has no
              `retrieve_window`.)
            - `omitted_rounds`: the number of rounds before this turn that are not shown. (A store of another package
              may not count rounds. Then the key is missing, unless the whole history is shown.)
        :raises ValueError: If an argument is wrong, or the question of this turn says nothing.
        :raises MessageNotFoundError: If the history does not have `until_message_id` or `before_message_id`.
        :raises ChatHistoryAccessError: If `user_id` is given and the store belongs to another user.
        :raises ChatMessageStoreError: If the store fails.
        """
        current = validated_messages([] if current_messages is None else current_messages, "current_messages")
        store = protocol.for_user(self.chat_message_store, user_id, is_required=self.require_user_id)
        reader = self._window_reader()
        end = {"until_message_id": until_message_id, "before_message_id": before_message_id}
        window = reader.read_turn(store, chat_history_id, current, last_k, **end)
        return _outputs(reader, window, current)

    @component.output_types(messages=list[ChatMessage], replies=list[ChatMessage], revision=int, omitted_rounds=int)
    async def run_async(
        self,
        chat_history_id: str,
        *,
        last_k: int | None = None,
        current_messages: list[ChatMessage] | None = None,
        user_id: str | None = None,
        until_message_id: str | None = None,
        before_message_id: str | None = None,
    ) -> dict[str, Any]:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param chat_history_id: The history's id. A history that does not exist is empty.
        :param last_k: The number of rounds before this turn to retrieve; 0 for none. Defaults to the component's
            `last_k`.
        :param current_messages: The messages of this turn.
        :param user_id: The user of the history. Defaults to `None`: the user of the store, if it has one.
        :param until_message_id: The id of the last message to show. Defaults to `None`: the last one of the history.
        :param before_message_id: The id of the message after the last one to show. Defaults to `None`.
        :returns: A dictionary with the keys `messages` or `replies`, `revision`, and `omitted_rounds`.
        :raises ValueError: If an argument is wrong, or the question of this turn says nothing.
        :raises MessageNotFoundError: If the history does not have `until_message_id` or `before_message_id`.
        :raises ChatHistoryAccessError: If `user_id` is given and the store belongs to another user.
        :raises ChatMessageStoreError: If the store fails.
        """
        current = validated_messages([] if current_messages is None else current_messages, "current_messages")
        store = protocol.for_user(self.chat_message_store, user_id, is_required=self.require_user_id)
        reader = self._window_reader()
        end = {"until_message_id": until_message_id, "before_message_id": before_message_id}
        window = await reader.read_turn_async(store, chat_history_id, current, last_k, **end)
        return _outputs(reader, window, current)

    def warm_up(self) -> None:
        """Warm up the token counter, if it can be warmed up."""
        self._window_reader().warm_up()

    def close(self) -> None:
        """Close the store. The next run opens it again."""
        protocol.close(self.chat_message_store)

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await protocol.close_async(self.chat_message_store)

    def _window_reader(self) -> WindowReader:
        # Created for each run, because the settings are attributes that users may change.
        return WindowReader(
            self.last_k,
            max_tokens=self.max_tokens,
            token_counter=self.token_counter,
            window_step=self.window_step,
            portable=self.portable,
            merge_consecutive=self.merge_consecutive,
            model=self.model,
        )


def _outputs(reader: WindowReader, window: TurnWindow, current: list[ChatMessage]) -> dict[str, Any]:
    answer = window.answer(current)
    outputs: dict[str, Any]
    outputs = {"messages": reader.shown_turn(window, current)} if answer is None else {"replies": [answer]}
    outputs |= {"omitted_rounds": window.omitted_rounds(), "revision": window.revision}
    return {name: value for name, value in outputs.items() if value is not None}
