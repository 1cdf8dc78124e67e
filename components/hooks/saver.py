# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack import default_to_dict, logging
from haystack.components.agents.state import State
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import protocol, store_requests
from haystack_chat_store.conversation.turns import exit_reason
from haystack_chat_store.errors import (
    ChatHistoryAccessError,
    ChatHistoryChangedError,
    ChatMessageStoreError,
    ConflictError,
    MessageNotFoundError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.store_requests import Requests, Write, append_answer, read_until, replace_keeping_others
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validated_flag

from .agent_run import AgentRun, correct_result, message_id, run_of, set_messages

logger = logging.getLogger(__name__)

# Another attempt would be refused, too.
_REFUSALS = (ChatHistoryAccessError, ConflictError, MessageNotFoundError)


class ChatHistorySaver:
    """
    Saves the messages of an agent's run to its chat history: the question before the first model call, then every step.

    The saver belongs at every hook point that it allows. `chat_history_hooks` puts it there, in the right order with
    other hooks. At each hook point it writes the messages that are not saved yet, as one batch. Saved messages stay,
    even if the process crashes afterwards. System messages and messages that a compactor created are not saved.

    With `hook_context["replace_from_message_id"]`, the run replaces this message and all after it. Nothing is saved
    before the first reply is there. Then the question and the reply replace the old messages in one step. All further
    steps are appended. With `hook_context["expected_revision"]`, the first write is refused if the history has
    another revision.
    """

    allowed_hook_points = ("before_run", "before_tool", "after_tool", "on_exit", "after_run")

    def __init__(
        self, chat_message_store: ChatMessageStore, *, raise_on_failure: bool = True, require_user_id: bool = False
    ) -> None:
        """
        Create the hook.

        :param chat_message_store: The store of the chat histories: any object that follows the `ChatMessageStore`
            protocol.
        :param raise_on_failure: Whether the run fails if saving fails. Defaults to True. With False, the error is
            logged, the run goes on, and the next hook point tries again. Only a message that cannot be encoded, or has
            an id that the store does not take, is left out.
        :param require_user_id: Whether a run without `hook_context["user_id"]` is refused. Defaults to False.
        :raises ValueError: If an argument is wrong.
        """
        if not isinstance(raise_on_failure, bool):
            raise ValueError(f"raise_on_failure must be True or False, got {raise_on_failure!r}.")
        self.chat_message_store = protocol.validated_store(chat_message_store)
        self.raise_on_failure = raise_on_failure
        self.require_user_id = validated_flag(require_user_id, "require_user_id")

    def run(self, state: State) -> None:
        """
        Save the messages that this run has not saved yet.

        :param state: The state of the agent's run.
        :raises ValueError: If the run has no chat history id or nothing to answer, another run has stored its question
            meanwhile, or a message cannot be stored.
        :raises MessageNotFoundError: If the history does not have the `replace_from_message_id`, or was deleted during
            the run.
        :raises ChatHistoryAccessError: If the history is another user's.
        :raises ConflictError: If the history has another revision than the `expected_revision`, or another run has
            stored a step of the same turn meanwhile.
        :raises ChatMessageStoreError: If the store fails.
        """
        run = self._collected(state)
        store = protocol.for_user(self.chat_message_store, run.user_id, is_required=self.require_user_id)
        store_requests.run(self._saving(state, run, store), store, run.chat_history_id)

    async def run_async(self, state: State) -> None:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param state: The state of the agent's run.
        :raises ValueError: If the run has no chat history id or nothing to answer, another run has stored its question
            meanwhile, or a message cannot be stored.
        :raises MessageNotFoundError: If the history does not have the `replace_from_message_id`, or was deleted during
            the run.
        :raises ChatHistoryAccessError: If the history is another user's.
        :raises ConflictError: If the history has another revision than the `expected_revision`, or another run has
            stored a step of the same turn meanwhile.
        :raises ChatMessageStoreError: If the store fails.
        """
        run = self._collected(state)
        store = protocol.for_user(self.chat_message_store, run.user_id, is_required=self.require_user_id)
        await store_requests.run_async(self._saving(state, run, store), store, run.chat_history_id)

    def to_dict(self) -> dict[str, Any]:
        """Serialize the hook and its store."""
        return default_to_dict(
            self,
            chat_message_store=self.chat_message_store,
            raise_on_failure=self.raise_on_failure,
            require_user_id=self.require_user_id,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatHistorySaver":
        """
        Create the hook and its store from the result of `to_dict`.

        :param data: The serialized hook. It is not changed.
        :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
        """
        return protocol.component_from_dict(cls, data)

    def close(self) -> None:
        """Close the store. The next run opens it again."""
        protocol.close(self.chat_message_store)

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await protocol.close_async(self.chat_message_store)

    def _collected(self, state: State) -> AgentRun:
        """
        Collect what a run has to save.

        :raises ValueError: If the store cannot do what the run asks for, or the run has nothing to answer. It is raised
            before the model is asked.
        """
        run = run_of(state)
        if run.replaced_id is not None:
            protocol.validate_replaces(self.chat_message_store)
        elif run.expected_revision is not None:
            protocol.write_options(self.chat_message_store, DuplicatePolicy.SKIP, run.expected_revision)
        # A run that ends before its first step has produced no messages, even if hooks have added some.
        if run.exit_reason is None:
            if run.brought is None and all(message.role is ChatRole.SYSTEM for message in state.data["messages"]):
                raise ValueError(
                    "The agent has nothing to answer: the run has no messages, and its history has no question. Pass a "
                    "question."
                )
            set_messages(state, run.collect(state.data["messages"]))
        else:
            correct_result(state, run.exit_reason)
        if run.brought is None:
            is_before_run = state.data["step_count"] == 0 and state.data["exit_reason"] is None
            run.brought = len(run.unsaved) if is_before_run else 0
        return run

    def _saving(self, state: State, run: AgentRun, store: ChatMessageStore) -> Requests[None]:
        if run.replaced_id is not None and not run.has_reply:
            return  # until then, the old messages stay
        size = run.tried or len(run.unsaved)
        while run.unsaved:
            messages = run.unsaved[:size]
            try:
                written = yield from self._write(run, store, messages)
            except Exception as error:
                if self.raise_on_failure or isinstance(error, _REFUSALS):
                    raise
                if not isinstance(error, ValueError):
                    _note_failure(run, messages, error)
                    return
                # A MessageEncodingError is one, and so is the error of an id that a store does not take.
                if size > 1:
                    size = 1  # save one by one, to leave out only messages that cannot be saved
                    continue
                logger.error("A message of an agent's run cannot be saved: {error}", error=error)
            else:
                yield from self._check_written(state, run, messages, written)
            run.unsaved = run.unsaved[size:]

    @staticmethod
    def _write(run: AgentRun, store: ChatMessageStore, messages: list[ChatMessage]) -> Requests[int]:
        """Write messages. If the question was stored before, write only as long as the history has it."""
        options = {} if run.expected_revision is None else {"expected_revision": run.expected_revision}
        if run.replaced_id is not None:
            return (yield from replace_keeping_others(store, run.replaced_id, messages, options))
        if run.is_question_stored and not options and protocol.takes_revisions(store):
            return (yield from append_answer(store, messages, run.question_id, options))
        return int((yield Write(messages, options)))

    def _check_written(self, state: State, run: AgentRun, messages: list[ChatMessage], written: int) -> Requests[None]:
        """
        Note that messages are saved, and look at those that the store has skipped.

        :raises ValueError: If another run has stored the question meanwhile.
        :raises ChatHistoryChangedError: If another run has stored another step of the turn meanwhile.
        """
        asks, replaced_id = run.question_id in map(message_id, messages), run.replaced_id
        run.is_question_stored |= asks or replaced_id is not None
        run.replaced_id = run.expected_revision = run.tried = None
        if written == 0 and asks and replaced_id is None and not run.is_question_tried:
            raise ValueError(
                f"Another run has stored the question with the {MESSAGE_ID_KEY} {run.question_id!r} since this run "
                "loaded the history, and is answering it. Repeat the run later: then it returns the stored answer, or "
                "goes on."
            )
        if written < len(messages):
            yield from self._compare(state, run, messages)

    def _compare(self, state: State, run: AgentRun, written: list[ChatMessage]) -> Requests[None]:
        """
        Compare messages that the store has skipped with those that it has under their ids.

        If another run has stored the answer to the same question meanwhile, this run returns that answer.

        :raises ChatHistoryChangedError: If another run has stored another step of the turn meanwhile.
        """
        ids = {message_id(message) for message in written}
        try:
            page = yield from read_until(lambda read: ids <= set(map(message_id, read)))
        except Exception:  # whatever a store of another package raises, as for a write
            if self.raise_on_failure:
                raise
            return
        stored = {message_id(message): message for message in page.messages}
        others = {message_id(each): stored.get(message_id(each), each) for each in written}
        different = [each for each in written if not _says_the_same(each, others[message_id(each)])]
        for message in different:
            other = others[message_id(message)]
            if message is not written[-1] or None in (exit_reason([message], ()), exit_reason([other], ())):
                raise ChatHistoryChangedError(
                    f"Another run answers the question with the {MESSAGE_ID_KEY} {run.question_id!r}, and has stored a "
                    "step of it before this run. Repeat the run later: then it returns the stored answer, or goes on."
                )
            set_messages(
                state, [other if message_id(each) == message_id(other) else each for each in state.data["messages"]]
            )


def _note_failure(run: AgentRun, messages: list[ChatMessage], error: Exception) -> None:
    """Note that a write has failed. The messages may be stored nevertheless."""
    run.is_question_tried |= run.question_id in map(message_id, messages)
    is_repeated = run.replaced_id is not None or run.expected_revision is not None
    run.tried = len(messages) if is_repeated else None
    logger.error(
        "{number} messages of an agent's run are not saved yet: {error}",
        number=len(run.unsaved),
        # The text of any other error may contain message text.
        error=error if isinstance(error, ChatMessageStoreError) else type(error).__name__,
    )


def _says_the_same(message: ChatMessage, other: ChatMessage) -> bool:
    return message.role is other.role and message._content == other._content
