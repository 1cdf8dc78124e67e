# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from haystack import default_to_dict, logging
from haystack.components.agents.state import State
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import protocol_calls
from haystack_chat_store.conversation.turns import exit_reason
from haystack_chat_store.errors import (
    ChatHistoryAccessError,
    ChatHistoryChangedError,
    ChatMessageStoreError,
    ConflictError,
    MessageNotFoundError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.turn_writer import question_is_gone
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validated_flag

from .agent_run import AgentRun, correct_result, message_id, run_of, set_messages

logger = logging.getLogger(__name__)

# If a page does not have what is looked for, the next page is larger by this factor.
_PAGE_GROWTH = 8


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
        self.chat_message_store = protocol_calls.validated_store(chat_message_store)
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
        store = protocol_calls.for_user(self.chat_message_store, run.user_id, is_required=self.require_user_id)
        for attempt in self._attempts(state, run):
            with attempt:
                if isinstance(attempt, _LastRounds):
                    attempt.found = protocol_calls.retrieve(store, run.chat_history_id, attempt.last_k)
                elif isinstance(attempt, _IsStored):
                    attempt.answer = protocol_calls.has_message(store, run.chat_history_id, attempt.message_id)
                elif attempt.replaced_id is None:
                    attempt.written = store.write_messages(run.chat_history_id, attempt.messages, **attempt.options)
                else:
                    attempt.written = protocol_calls.replace_keeping_other_answers(
                        store, run.chat_history_id, attempt.replaced_id, attempt.messages, **attempt.options
                    )

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
        store = protocol_calls.for_user(self.chat_message_store, run.user_id, is_required=self.require_user_id)
        for attempt in self._attempts(state, run):
            with attempt:
                if isinstance(attempt, _LastRounds):
                    attempt.found = await protocol_calls.retrieve_async(store, run.chat_history_id, attempt.last_k)
                elif isinstance(attempt, _IsStored):
                    attempt.answer = await protocol_calls.has_message_async(
                        store, run.chat_history_id, attempt.message_id
                    )
                elif attempt.replaced_id is None:
                    attempt.written = await protocol_calls.write_async(
                        store, run.chat_history_id, attempt.messages, **attempt.options
                    )
                else:
                    attempt.written = await protocol_calls.replace_keeping_other_answers_async(
                        store, run.chat_history_id, attempt.replaced_id, attempt.messages, **attempt.options
                    )

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
        return protocol_calls.component_from_dict(cls, data)

    def close(self) -> None:
        """Close the store. The next run opens it again."""
        protocol_calls.close(self.chat_message_store)

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await protocol_calls.close_async(self.chat_message_store)

    def _collected(self, state: State) -> AgentRun:
        """
        Collect what a run has to save.

        :raises ValueError: If the store cannot do what the run asks for, or the run has nothing to answer. It is raised
            before the model is asked.
        """
        run = run_of(state)
        if run.replaced_id is not None:
            protocol_calls.validate_replaces(self.chat_message_store)
        elif run.expected_revision is not None:
            protocol_calls.write_options(self.chat_message_store, DuplicatePolicy.SKIP, run.expected_revision)
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

    def _attempts(self, state: State, run: AgentRun) -> Iterator["_Attempt | _LastRounds | _IsStored"]:
        if run.replaced_id is not None and not run.has_reply:
            return  # until then, the old messages stay
        size = run.tried or len(run.unsaved)
        while run.unsaved:
            attempt = _Attempt.of(run, size)
            yield from self._tried(run, attempt)
            if attempt.error is None:
                ids = map(message_id, attempt.messages)
                run.is_question_stored |= attempt.replaced_id is not None or run.question_id in ids
                run.replaced_id = run.expected_revision = run.tried = None
            if (
                attempt.written == 0
                and attempt.replaced_id is None
                and not run.is_question_tried
                and run.question_id in map(message_id, attempt.messages)
            ):
                raise ValueError(
                    f"Another run has stored the question with the {MESSAGE_ID_KEY} {run.question_id!r} since this run "
                    "loaded the history, and is answering it. Repeat the run later: then it returns the stored answer, "
                    "or goes on."
                )
            if attempt.written is not None and attempt.written < len(attempt.messages):
                yield from self._compare(state, run, attempt.messages)
            # Another attempt would be refused, too.
            is_refused = isinstance(attempt.error, (ChatHistoryAccessError, ConflictError, MessageNotFoundError))
            if attempt.error is not None and (self.raise_on_failure or is_refused):
                raise attempt.error
            # A MessageEncodingError is one, and so is the error of an id that a store does not take.
            is_invalid = isinstance(attempt.error, ValueError)
            if is_invalid and size > 1:
                size = 1  # save one by one, to leave out only messages that cannot be saved
                continue
            if is_invalid:
                logger.error("A message of an agent's run cannot be saved: {error}", error=attempt.error)
            elif attempt.error is not None:
                # The messages may be stored nevertheless.
                run.is_question_tried |= run.question_id in map(message_id, attempt.messages)
                is_repeated = attempt.replaced_id is not None or run.expected_revision is not None
                run.tried = len(attempt.messages) if is_repeated else None
                logger.error(
                    "{number} messages of an agent's run are not saved yet: {error}",
                    number=len(run.unsaved),
                    # The text of any other error may contain message text.
                    error=attempt.error
                    if isinstance(attempt.error, ChatMessageStoreError)
                    else type(attempt.error).__name__,
                )
                return
            run.unsaved = run.unsaved[size:]

    def _tried(self, run: AgentRun, attempt: "_Attempt") -> "Iterator[_Attempt | _LastRounds | _IsStored]":
        """Write. If the question was stored before, write only as long as the history has it."""
        is_free = attempt.replaced_id is not None or bool(attempt.options) or not run.is_question_stored
        if is_free or not protocol_calls.takes_revisions(self.chat_message_store):
            yield attempt
            return
        for _ in range(protocol_calls.MOST_ATTEMPTS):
            look, stored = _LastRounds(1), _IsStored(str(run.question_id))
            yield look
            if look.error is None and run.question_id not in map(message_id, look.found.messages):
                yield stored
                if stored.error is None and not stored.answer:
                    stored.error = question_is_gone(run.question_id)
            attempt.error = look.error or stored.error
            if attempt.error is not None:
                return
            attempt.options = {"expected_revision": look.found.revision}
            yield attempt
            if not isinstance(attempt.error, ChatHistoryChangedError):
                return

    def _compare(self, state: State, run: AgentRun, written: list[ChatMessage]) -> Iterator["_LastRounds"]:
        """
        Compare messages that the store has skipped with those that it has under their ids.

        If another run has stored the answer to the same question meanwhile, this run returns that answer.

        :raises ChatHistoryChangedError: If another run has stored another step of the turn meanwhile.
        """
        ids = {message_id(message) for message in written}
        look, stored = _LastRounds(1), dict[Any, ChatMessage]()
        while True:
            yield look
            if look.error is not None and self.raise_on_failure:
                raise look.error
            stored = {message_id(message): message for message in look.found.messages}
            if ids <= set(stored) or len(look.found.messages) < look.last_k:
                break
            look = _LastRounds(look.last_k * _PAGE_GROWTH)
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


def _says_the_same(message: ChatMessage, other: ChatMessage) -> bool:
    return message.role is other.role and message._content == other._content


class _Call:
    """One call of the store. Afterwards, it has the error that it failed with, or `None`."""

    error: Exception | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


class _LastRounds(_Call):
    """A read of the last rounds and, afterwards, their messages."""

    def __init__(self, last_k: int) -> None:
        self.last_k = last_k
        self.found = protocol_calls.Retrieved([])


class _IsStored(_Call):
    """The question whether the history has a message and, afterwards, the answer."""

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id
        self.answer = False


@dataclass
class _Attempt(_Call):
    """
    One write: its arguments and, afterwards, the number of messages written or the error that it failed with.

    :param replaced_id: The id of the first message to replace, or `None` if the messages are appended.
    :param options: Further arguments.
    """

    messages: list[ChatMessage]
    replaced_id: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    written: int | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, run: AgentRun, size: int) -> "_Attempt":
        """Return the attempt to write the next messages of a run."""
        options = {} if run.expected_revision is None else {"expected_revision": run.expected_revision}
        return cls(run.unsaved[:size], run.replaced_id, options)
