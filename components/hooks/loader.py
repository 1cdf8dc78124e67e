# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from haystack import default_to_dict
from haystack.components.agents.state import State
from haystack.dataclasses import ChatMessage
from haystack.token_counters import TokenCounter

from haystack_chat_store import protocol, store_requests
from haystack_chat_store.conversation.parts import split_system_history_current
from haystack_chat_store.conversation.rounds import round_starts
from haystack_chat_store.conversation.shown import messages_for_model
from haystack_chat_store.conversation.turns import before_turn, exit_reason, is_whole, turn_of
from haystack_chat_store.errors import MessageNotFoundError
from haystack_chat_store.ids import QUESTION_ID_KEY, first_step_id
from haystack_chat_store.store_requests import HasMessage, Requests, Retrieve, read_until
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.validation import validated_flag
from haystack_chat_store.window_reader import WindowReader

from .agent_run import (
    REPLACE_FROM_MESSAGE_ID_KEY,
    UNTIL_MESSAGE_ID_KEY,
    AgentRun,
    begin_run,
    end_before_first_step,
    is_compacted,
    is_said,
    last_question_id,
    message_id,
    set_messages,
)

# If a page does not contain the turn's question, the next page is larger by this factor.
_PAGE_GROWTH = 8


class ChatHistoryLoader:
    """
    Loads the end of a chat history before an agent's run, so that the model sees the conversation so far.

    The id of the history is `hook_context["chat_history_id"]` or, without it, the value of the same key in the agent's
    state. Its user, if it has one, is `hook_context["user_id"]`. The loader belongs at `before_run`, before all other
    hooks, together with a `ChatHistorySaver`. `chat_history_hooks` returns both at the right hook points.

    A run without new messages resumes an interrupted turn after its last step. The run has no new messages if
    `messages=[]`, or if its user message is stored already, by its id. Tool calls of the last step that have no result
    are answered by a result that says that they were interrupted. If the turn is complete, the run ends at once,
    returns the messages of the history and does not call the model.

    With `hook_context["until_message_id"]`, the conversation is shown up to and including this message, as if it ended
    there. With `hook_context["replace_from_message_id"]` alone, what comes before the replaced message is shown. If an
    earlier attempt of the same run has replaced it already, the run resumes its own turn.

    The history is shown in a form that providers accept, as `ChatMessageRetriever` shows it.
    """

    allowed_hook_points = ("before_run",)

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
        exit_conditions: list[str] | None = None,
        require_user_id: bool = False,
    ) -> None:
        """
        Create the hook.

        :param chat_message_store: The store of the chat histories: any object that follows the `ChatMessageStore`
            protocol.
        :param last_k: The number of rounds of the history to load. Defaults to 10. `None` for the store's own `last_k`
            or, with `max_tokens`, for as many as fit.
        :param max_tokens: The largest number of tokens that the model is shown, the run's own messages included.
            Defaults to `None`: any number.
        :param token_counter: The Haystack `TokenCounter` that counts the tokens. Defaults to `ApproximateTokenCounter`.
        :param window_step: The start of the window moves only in steps of this many rounds, so that a provider's prompt
            cache can be used. Defaults to 1.
        :param portable: Whether completed rounds are shown in a form that every provider takes, so that the model may
            change in the middle of a conversation: without reasoning, signatures and other content for one provider,
            and with neutral ids of tool calls. Defaults to True. If False, they are shown as they are stored. The round
            under way is shown as it is stored, because its model needs it.
        :param merge_consecutive: Whether user and assistant speak in turns, for models that insist on it: stored
            messages of the same role that follow each other are joined, and "Please go on." stands before a message of
            this turn that would follow one of its role. Defaults to False.
        :param model: The name of the model that is asked. In the round under way, replies of other models are shown in
            the portable form, so that another model can go on with an interrupted round. Files of rounds that this
            model has answered are shown as they are stored. Defaults to `None`: the model of the newest reply in the
            round under way, and files in the portable form.
        :param exit_conditions: The agent's own `exit_conditions`, if it ends with a tool. A turn is complete if it
            ended with a successful result of one of these tools. Defaults to `None`.
        :param require_user_id: Whether a run without `hook_context["user_id"]` is refused. Defaults to False.
        :raises ValueError: If an argument is wrong.
        """
        if exit_conditions is not None and not (
            isinstance(exit_conditions, list) and all(isinstance(condition, str) for condition in exit_conditions)
        ):
            raise ValueError(f"exit_conditions must be a list of texts or None, got {exit_conditions!r}.")
        reader = WindowReader(
            last_k,
            max_tokens=max_tokens,
            token_counter=token_counter,
            window_step=window_step,
            portable=portable,
            merge_consecutive=merge_consecutive,
            model=model,
        )
        self.chat_message_store = protocol.validated_store(chat_message_store)
        self.last_k = last_k
        self.max_tokens = max_tokens
        self.token_counter = reader.token_counter
        self.window_step = window_step
        self.portable = portable
        self.merge_consecutive = merge_consecutive
        self.model = model
        self.exit_conditions = exit_conditions
        self.require_user_id = validated_flag(require_user_id, "require_user_id")

    def run(self, state: State) -> None:
        """
        Put the end of the history before the run's messages.

        :param state: The state of the agent's run.
        :raises ValueError: If the run has no chat history id, one of its messages has an invalid id, or its new
            messages have no content for a model.
        :raises MessageNotFoundError: If the history does not have the `until_message_id` or the
            `replace_from_message_id`.
        :raises ChatHistoryAccessError: If the store belongs to another user than the run.
        :raises ChatMessageStoreError: If the store fails.
        """
        run = begin_run(state)
        store = protocol.for_user(self.chat_message_store, run.user_id, is_required=self.require_user_id)
        store_requests.run(self._loading(state, run, store), store, run.chat_history_id)

    async def run_async(self, state: State) -> None:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param state: The state of the agent's run.
        :raises ValueError: If the run has no chat history id, one of its messages has an invalid id, or its new
            messages have no content for a model.
        :raises MessageNotFoundError: If the history does not have the `until_message_id` or the
            `replace_from_message_id`.
        :raises ChatHistoryAccessError: If the store belongs to another user than the run.
        :raises ChatMessageStoreError: If the store fails.
        """
        run = begin_run(state)
        store = protocol.for_user(self.chat_message_store, run.user_id, is_required=self.require_user_id)
        await store_requests.run_async(
            self._loading(state, run, store),
            store,
            run.chat_history_id,
            computes_in_thread=self.max_tokens is not None,  # a token counter may be slow, or call a server
        )

    def to_dict(self) -> dict[str, Any]:
        """Serialize the hook, its store and its token counter."""
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
            exit_conditions=self.exit_conditions,
            require_user_id=self.require_user_id,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatHistoryLoader":
        """
        Create the hook and its store from the result of `to_dict`.

        :param data: The serialized hook. It is not changed.
        :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
        """
        return protocol.component_from_dict(cls, data)

    def warm_up(self) -> None:
        """Warm up the token counter, if it can be warmed up."""
        self._window_reader(self.last_k).warm_up()

    def close(self) -> None:
        """Close the store. The next run opens it again."""
        protocol.close(self.chat_message_store)

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await protocol.close_async(self.chat_message_store)

    def _loading(self, state: State, run: AgentRun, store: ChatMessageStore) -> Requests[None]:
        # The history itself is loaded now, so a summary of it that a compactor created and the caller passes again is
        # left out. All other messages are copied, so that no two are the same object.
        current = [replace(message) for message in state.data["messages"] if not is_compacted(message)]
        if run.replaced_id is not None and not (yield HasMessage(run.replaced_id)):
            yield from self._resume_replacement(state, run, store, current)
            return
        if run.replaced_id is not None and run.expected_revision is None and protocol.takes_revisions(store):
            # So the run does not replace messages that others store while the model answers.
            run.expected_revision = (yield Retrieve(1)).revision
        window: list[ChatMessage] = []
        if any(map(is_said, current)):
            window = yield from self._window_reader(self.last_k).requests(store, current, **_bounds(run))
        system, history, new = split_system_history_current(run.know(window), current)
        asked_before = yield from self._asked_before(run, store, new)
        if asked_before:
            history, new = [*history, *asked_before], split_system_history_current(asked_before, new).current
        new = run.give(new)
        new_ids = {None, *map(message_id, new)}
        run.collect(run.give([m for m in current if is_said(m) and message_id(m) not in new_ids]))
        if new:
            run.question_id = last_question_id(new) or last_question_id(current) or last_question_id(history)
            run.is_question_stored = last_question_id(new) is None and run.question_id in run.known
            run.steps = max(len(turn_of(history, run.question_id)) - 1, 0) if run.question_id is not None else 0
            loaded = self._shown(history, [*system, *new])
            run.collect(_until_last_hidden(new, loaded))
        else:
            stored = [message for message in current if message_id(message) in run.known]
            loaded = yield from self._resumed(run, store, system, last_question_id(stored), asked_before)
            if run.replaced_id is not None and run.exit_reason is not None:
                raise ValueError(
                    f"The agent has nothing to answer: what it is shown of the history, up to "
                    f"{REPLACE_FROM_MESSAGE_ID_KEY} or {UNTIL_MESSAGE_ID_KEY}, is answered already. Pass the edited "
                    f"question, or the id of the answer that is to be replaced."
                )
            if run.replaced_id is None:
                run.expected_revision = None  # the question was stored before, and that was a change
        self._set_loaded(state, run, loaded)

    def _resume_replacement(
        self, state: State, run: AgentRun, store: ChatMessageStore, current: list[ChatMessage]
    ) -> Requests[None]:
        """
        Resume the turn that has taken the place of others already, in an earlier attempt of this run.

        :raises MessageNotFoundError: If no run has replaced the message, or the messages of this one are others.
        """
        replaced_id = str(run.replaced_id)
        error = MessageNotFoundError(
            f"The history has no message with the id {replaced_id!r}, which {REPLACE_FROM_MESSAGE_ID_KEY} names. "
            "Nothing was changed. (To repeat a run that replaces messages, give its question an id.)"
        )
        first_step = first_step_id(replaced_id)
        if not (yield HasMessage(first_step)):
            raise error
        run.replaced_id = run.until_message_id = run.expected_revision = None
        question_id = yield from _question_of(first_step)
        system = [message for message in current if not is_said(message)]
        loaded = yield from self._resumed(run, store, system, question_id)
        stored = [message for message in loaded if message_id(message) in run.known]
        others = split_system_history_current(stored, current).current
        if run.question_id is None or any(map(is_said, others)):
            raise error
        run.give([message for message in current if is_said(message)])
        self._set_loaded(state, run, loaded)

    def _set_loaded(self, state: State, run: AgentRun, loaded: list[ChatMessage]) -> None:
        set_messages(state, loaded)
        if run.exit_reason is not None:
            end_before_first_step(state)

    def _shown(
        self, history: Sequence[ChatMessage], current: Sequence[ChatMessage], *, is_model_asked: bool = True
    ) -> list[ChatMessage]:
        return messages_for_model(
            history,
            current,
            portable=self.portable,
            merge_consecutive=self.merge_consecutive,
            model=self.model if is_model_asked else None,
        )

    def _asked_before(
        self, run: AgentRun, store: ChatMessageStore, new: list[ChatMessage]
    ) -> Requests[list[ChatMessage]]:
        """
        Read the turn of a question that is sent again, if it is stored outside the window.

        :param new: The messages of the run that are not in the window.
        :returns: The messages of the turn, or none if the question is new.
        """
        question_id = last_question_id(new)
        if question_id is None or run.replaced_id is not None or not (yield HasMessage(question_id)):
            return []
        return run.know((yield from _whole_turn(store, question_id)))

    def _resumed(
        self,
        run: AgentRun,
        store: ChatMessageStore,
        system: list[ChatMessage],
        question_id: str | None,
        turn: Sequence[ChatMessage] = (),
    ) -> Requests[list[ChatMessage]]:
        """
        Resume a turn, and return what the model is shown.

        The turn is read whole, because its end shows whether it is complete. `last_k` counts the rounds before the turn
        only.

        :param system: The system messages of this run.
        :param question_id: The id of the turn's question, or `None` for the last turn.
        :param turn: The turn, if it was read already, because its question is outside the window. Defaults to none.
        """
        is_outside_the_window = bool(turn)
        if not turn:
            turn = yield from _whole_turn(store, question_id, **_bounds(run))
        before: list[ChatMessage] = []
        if is_outside_the_window:
            bounds = _bounds(run) if run.until_message_id is not None else {"before_message_id": question_id}
            before = yield from self._window_reader(self.last_k).requests(store, [*system, *turn], **bounds)
        elif is_whole(turn) and self.last_k != 0:
            counts_rounds = protocol.last_k_unit(self.chat_message_store) == "round"
            turn_size = len(round_starts(turn) if counts_rounds else turn)
            last_k = None if self.last_k is None else self.last_k + turn_size
            window = yield from self._window_reader(last_k).requests(store, [*system, *turn], **_bounds(run))
            before = before_turn(window, turn)
        run.question_id, run.steps = last_question_id(turn), max(len(turn) - 1, 0)
        run.is_question_stored = run.question_id is not None
        run.exit_reason = exit_reason(turn, self.exit_conditions or ())
        # Of a complete turn no model is asked, so nothing asks one to go on.
        return self._shown(run.know([*before, *turn]), system, is_model_asked=run.exit_reason is None)

    def _window_reader(self, last_k: int | None) -> WindowReader:
        return WindowReader(
            last_k,
            max_tokens=self.max_tokens,
            token_counter=self.token_counter,
            window_step=self.window_step,
            portable=self.portable,
            merge_consecutive=self.merge_consecutive,
            model=self.model,
        )


def _bounds(run: AgentRun) -> dict[str, Any]:
    """Return where the history ends for a run."""
    return {"until_message_id": run.until_message_id, "before_message_id": run.before_message_id}


def _question_of(own_id: str) -> Requests[str | None]:
    """Find the id of the question that a stored message names."""
    page = yield from read_until(lambda read: own_id in map(message_id, read))
    named = (message.meta.get(QUESTION_ID_KEY) for message in page.messages if message_id(message) == own_id)
    return next(named, None)


def _whole_turn(store: ChatMessageStore, question_id: str | None, **bounds: Any) -> Requests[list[ChatMessage]]:
    """Read the turn of a question, or the last turn. `bounds` say where the history ends."""
    count = 1
    while True:
        page = yield from WindowReader(count).requests(store, **bounds)
        turn = turn_of(page, question_id)
        if is_whole(turn) or len(page) < count:
            return turn
        count *= _PAGE_GROWTH


def _until_last_hidden(new: list[ChatMessage], shown: list[ChatMessage]) -> list[ChatMessage]:
    """
    Return the new messages up to the last one that the model does not see, or does not see as it is.

    :param shown: The messages for the model.
    :raises ValueError: If the model sees none of the new messages.
    """
    seen = {message_id(message): message for message in shown}
    if not any(message_id(message) in seen for message in new):
        raise ValueError(
            "The agent has nothing to answer: none of its new messages says anything to a model. Pass a message with "
            "text."
        )
    hidden = [index for index, message in enumerate(new) if seen.get(message_id(message)) != message]
    return new[: hidden[-1] + 1] if hidden else []
