# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack import DeserializationError, component, default_to_dict
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import protocol
from haystack_chat_store.ids import is_shown_only
from haystack_chat_store.turn_writer import TurnWriter, WrittenTurn
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validated_flag, validated_messages


@component
class ChatMessageWriter:
    """
    Writes the messages of a turn to a chat history, and returns them as the history has them.

    One writer can write question and answer as one batch, in this order. To keep the question even if the model fails,
    use two: one writes the question before the model is asked, the other the answer after it. Connect the `messages` of
    the first to the `messages` of the second. If a turn is sent again, with the same id of its question, it is stored
    once.

    ```python
    from haystack.dataclasses import ChatMessage
    from haystack_chat_store import InMemoryChatMessageStore
    from haystack_integrations.components.writers.chat_store import ChatMessageWriter

    writer = ChatMessageWriter(InMemoryChatMessageStore())
    question, answer = ChatMessage.from_user("Hello!"), ChatMessage.from_assistant("Hi, how can I help?")
    writer.run("user_456", messages=[question], replies=[answer])["messages_written"]  # 2
    ```
    """

    def __init__(
        self,
        chat_message_store: ChatMessageStore,
        policy: DuplicatePolicy = DuplicatePolicy.SKIP,
        *,
        require_user_id: bool = False,
        question_is_stored: bool = False,
    ) -> None:
        """
        Create the component.

        :param chat_message_store: The store of the chat histories: any object that follows the `ChatMessageStore`
            protocol.
        :param policy: Decides about a message whose id (in its `meta["chat_message_id"]`) the history already has. With
            SKIP, the default, and NONE, the message is skipped. With OVERWRITE, it replaces the stored message. With
            FAIL, nothing of the batch is written.
        :param require_user_id: Whether a run without a `user_id` is refused. Defaults to False.
        :param question_is_stored: Whether a run is refused if the question of the replies is not stored. Set it for the
            writer after the model if another writer has stored the question. Then a chat that is deleted while the
            model answers stays deleted. It has no effect on a run with `replace_from_message_id`. Defaults to False.
        :raises ValueError: If `chat_message_store` does not follow the protocol, or its `write_messages` does not take
            a `policy` and the policy is not SKIP or NONE.
        """
        self.chat_message_store = protocol.validated_store(chat_message_store)
        self.policy = policy
        self.require_user_id = validated_flag(require_user_id, "require_user_id")
        self.question_is_stored = validated_flag(question_is_stored, "question_is_stored")
        protocol.write_options(self.chat_message_store, policy, None)

    def to_dict(self) -> dict[str, Any]:
        """Serialize the component and its store."""
        return default_to_dict(
            self,
            chat_message_store=self.chat_message_store,
            policy=self.policy.name,
            require_user_id=self.require_user_id,
            question_is_stored=self.question_is_stored,
        )

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
        return protocol.component_from_dict(cls, data)

    @component.output_types(messages_written=int, messages=list[ChatMessage], replies=list[ChatMessage])
    def run(
        self,
        chat_history_id: str,
        messages: list[ChatMessage],
        replies: list[ChatMessage] | None = None,
        *,
        user_id: str | None = None,
        expected_revision: int | None = None,
        replace_from_message_id: str | None = None,
    ) -> dict[str, Any]:
        """
        Write `messages`, then `replies`, as one batch that is stored whole or not at all.

        A reply names its question in `meta["chat_question_id"]`: the last question in `messages` or, if there is none,
        the last one in the history. Its id is made from the id of the question. So if the same question, by its id, is
        answered again, the first answer stays.

        :param chat_history_id: The history's id. A history that does not exist is created.
        :param messages: The messages of this turn, oldest first. The `policy` decides about messages whose ids the
            history already has.
        :param replies: The replies to them. Connect the `replies` of the ChatGenerator and of the retriever here: each
            run has one of the two. (This is an input of its own, because Haystack does not promise the order of
            several connections to one list.) Defaults to none.
        :param user_id: The user of the history. A history that is created is this user's. Defaults to `None`: the user
            of the store, if it has one.
        :param expected_revision: The revision that the history must have, 0 if it must not exist. If it has another
            one, nothing is written. The store's `write_messages` must have this argument. Defaults to `None`: any
            revision.
        :param replace_from_message_id: The id of a message of the history, to regenerate an answer or to edit a
            question. This batch replaces it and all messages after it, in one step. Answers to earlier questions stay,
            and messages of the batch that the history has before it are skipped. Ask the model first, so that a failing
            model costs nothing. Pass the retriever's `revision` as `expected_revision`, so that nothing is replaced
            that was stored meanwhile. If the call is repeated, it returns what the first call has stored. The store
            must have `replace_messages`. Defaults to `None`: the batch is appended.
        :returns: A dictionary with the keys

            - `messages_written`: the number of messages that this call wrote. Messages with `meta["chat_shown"]` are
              not written: a retriever or an agent's hook has shown them in another form than they are stored.
            - `messages`: the batch as the history has it now, with ids. If a turn is sent again, these are the stored
              messages. System messages are included unchanged, even if the store skips them.
            - `replies`: the replies of the turn as the history has them. If the question was answered before, this is
              the stored answer.
        :raises ValueError: If an argument is wrong, or the question says nothing. Nothing was written.
        :raises ChatHistoryAccessError: If the history is another user's, or the store belongs to another user than
            `user_id`. Nothing was written.
        :raises MessageNotFoundError: If the history does not have `replace_from_message_id` or, with
            `question_is_stored`, the question. Nothing was written.
        :raises ConflictError: If the policy or `expected_revision` forbids the write. Nothing was written.
        :raises ChatMessageStoreError: If the store fails.
        """
        store = protocol.for_user(self.chat_message_store, user_id, is_required=self.require_user_id)
        writer = TurnWriter(
            store,
            self.policy,
            expected_revision,
            replace_from_message_id,
            question_is_stored=self.question_is_stored,
        )
        stored, stored_replies, names = _stored(messages, replies)
        with protocol.arguments_named(names):
            return _outputs(writer.write(chat_history_id, stored, stored_replies))

    @component.output_types(messages_written=int, messages=list[ChatMessage], replies=list[ChatMessage])
    async def run_async(
        self,
        chat_history_id: str,
        messages: list[ChatMessage],
        replies: list[ChatMessage] | None = None,
        *,
        user_id: str | None = None,
        expected_revision: int | None = None,
        replace_from_message_id: str | None = None,
    ) -> dict[str, Any]:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param chat_history_id: The history's id. A history that does not exist is created.
        :param messages: The messages of this turn, oldest first.
        :param replies: The replies to them. Defaults to none.
        :param user_id: The user of the history. A history that is created is this user's. Defaults to `None`: the user
            of the store, if it has one.
        :param expected_revision: The revision that the history must have, 0 if it must not exist; if it has another
            one, nothing is written. Defaults to `None`: any revision.
        :param replace_from_message_id: The id of the first message that the batch replaces. Defaults to `None`: the
            batch is appended.
        :returns: A dictionary with the keys `messages_written`, `messages` and `replies`.
        :raises ValueError: If an argument is wrong, or the question says nothing. Nothing was written.
        :raises ChatHistoryAccessError: If the history is another user's, or the store belongs to another user than
            `user_id`. Nothing was written.
        :raises MessageNotFoundError: If the history does not have `replace_from_message_id` or, with
            `question_is_stored`, the question. Nothing was written.
        :raises ConflictError: If the policy or `expected_revision` forbids the write. Nothing was written.
        :raises ChatMessageStoreError: If the store fails.
        """
        store = protocol.for_user(self.chat_message_store, user_id, is_required=self.require_user_id)
        writer = TurnWriter(
            store,
            self.policy,
            expected_revision,
            replace_from_message_id,
            question_is_stored=self.question_is_stored,
        )
        stored, stored_replies, names = _stored(messages, replies)
        with protocol.arguments_named(names):
            return _outputs(await writer.write_async(chat_history_id, stored, stored_replies))

    def close(self) -> None:
        """Close the store. The next run opens it again."""
        protocol.close(self.chat_message_store)

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await protocol.close_async(self.chat_message_store)


def _stored(
    messages: list[ChatMessage], replies: list[ChatMessage] | None
) -> tuple[list[ChatMessage], list[ChatMessage], list[str]]:
    """
    Return both lists without messages that are not as they are stored, and the name of each message in errors.

    A name is such as `replies[0]`.
    """
    names: list[str] = []

    def stored(argument: list[ChatMessage], name: str) -> list[ChatMessage]:
        kept = [each for each in enumerate(validated_messages(argument, name)) if not is_shown_only(each[1])]
        names.extend(f"{name}[{index}]" for index, _ in kept)
        return [message for _, message in kept]

    return stored(messages, "messages"), stored([] if replies is None else replies, "replies"), names


def _outputs(turn: WrittenTurn) -> dict[str, Any]:
    return {"messages_written": turn.messages_written, "messages": turn.messages, "replies": turn.replies}
