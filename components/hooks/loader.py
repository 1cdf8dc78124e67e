# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

from haystack import default_to_dict
from haystack.components.agents.state import State
from haystack.dataclasses import ChatMessage
from haystack.token_counters import TokenCounter

from haystack_chat_store import any_store
from haystack_chat_store.rounds import valid_for_model, with_current_messages
from haystack_chat_store.types import ChatMessageStore
from haystack_chat_store.window_reader import WindowReader

from .agent_run import (
    AgentRun,
    begin_run,
    end_before_first_step,
    is_compacted,
    is_said,
    last_question_id,
    message_id,
    set_messages,
    with_id,
)
from .interrupted_turn import exit_reason, up_to_turn, without_open_step


class ChatHistoryLoader:
    """
    Loads the end of a chat history before an agent's run, so that the model sees what was said before.

    Which history it is says `hook_context["chat_history_id"]`, else the agent's state under the same key. The loader
    stands at `before_run`, before all other hooks, and needs a `ChatHistorySaver` beside it;
    `chat_history_hooks` puts both where they belong.

    A run without new messages (`messages=[]`, or a user message again that is stored already, by its id) goes on with
    the turn where it was interrupted, after its last complete step. If the turn is complete, the run ends at once, with
    what is stored and without a call of the model.
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
        exit_conditions: list[str] | None = None,
    ) -> None:
        """
        Create the hook.

        :param chat_message_store: Where the chat histories are kept. Any object that follows the `ChatMessageStore`
            protocol.
        :param last_k: How many rounds of the history to load. Defaults to 10; `None` for the store's own `last_k` or,
            with `max_tokens`, for as many as fit.
        :param max_tokens: How many tokens the model may see, those of the run's own messages included. Defaults to
            `None`, for no limit.
        :param token_counter: What counts them. Defaults to Haystack's `ApproximateTokenCounter`.
        :param window_step: In steps of how many rounds the window's beginning moves, so that a provider's prompt cache
            can be used again. Defaults to 1.
        :param exit_conditions: Those of the agent, if it ends with a tool: a turn that ended with a successful result
            of one of these tools is complete.
        :raises ValueError: If an argument is wrong.
        """
        self.chat_message_store = any_store.validated_store(chat_message_store)
        self.window_reader = WindowReader(
            last_k, max_tokens=max_tokens, token_counter=token_counter, window_step=window_step
        )
        self.exit_conditions = exit_conditions

    def run(self, state: State) -> None:
        """
        Put the end of the history before the run's messages.

        :param state: The state of the agent's run.
        :raises ValueError: If the run has no chat history, or one of its messages has an id that cannot be one.
        :raises ChatMessageStoreError: If the store fails.
        """
        run, current = _begun(state)
        history = self.window_reader.read(self.chat_message_store, run.chat_history_id, current)
        self._load(state, run, history, current)

    async def run_async(self, state: State) -> None:
        """
        Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

        :param state: The state of the agent's run.
        :raises ValueError: If the run has no chat history, or one of its messages has an id that cannot be one.
        :raises ChatMessageStoreError: If the store fails.
        """
        run, current = _begun(state)
        history = await self.window_reader.read_async(self.chat_message_store, run.chat_history_id, current)
        self._load(state, run, history, current)

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the hook, its store and its token counter.
        """
        return default_to_dict(
            self,
            chat_message_store=self.chat_message_store,
            **self.window_reader.settings(),
            exit_conditions=self.exit_conditions,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ChatHistoryLoader":
        """
        Make the hook, and its store, from what `to_dict` returned.

        :param data: The serialized hook. It is not changed.
        :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
        """
        return any_store.component_from_dict(cls, data)

    def warm_up(self) -> None:
        """
        Warm up the token counter, if there is something to.
        """
        counter: Any = self.window_reader.token_counter
        if hasattr(counter, "warm_up"):
            counter.warm_up()

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

    def _load(self, state: State, run: AgentRun, history: list[ChatMessage], current: list[ChatMessage]) -> None:
        history = [with_id(message) for message in history]  # somebody's store may keep none
        run.known.update(map(message_id, history))
        given = run.give(current)
        # Only now do all have ids: without one, a message is new wherever it stands.
        given_as = {id(message): identified for message, identified in zip(current, given, strict=True)}
        around = [given_as[id(m)] for m in with_current_messages(history, current) if id(m) in given_as]
        run.question_id = last_question_id(around) or run.question_id or last_question_id(history)
        if not any(map(is_said, around)):
            history = up_to_turn(history, run.question_id)
            run.exit_reason = exit_reason(history, self.exit_conditions or ())
            history = without_open_step(history)

        loaded = valid_for_model(history, around)
        # What the model does not get to see of them is stored too, and first what comes before it, in order.
        seen = set(map(id, loaded))
        hidden = [index for index, message in enumerate(given) if id(message) not in seen]
        run.collect(given[: hidden[-1] + 1] if hidden else [])
        set_messages(state, loaded)
        if run.exit_reason is not None:
            end_before_first_step(state)


def _begun(state: State) -> tuple[AgentRun, list[ChatMessage]]:
    # What a compactor made of messages that the caller brings back stands for a history that is now loaded itself. The
    # others are copied, so that each is an object of its own.
    return begin_run(state), [replace(message) for message in state.data["messages"] if not is_compacted(message)]
