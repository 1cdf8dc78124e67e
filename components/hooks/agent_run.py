# SPDX-License-Identifier: Apache-2.0
"""
What the hooks know of one run of an agent, from hook point to hook point.

Hooks are told neither at which point they run nor whether one object stands at several points (loaded from YAML, it is
several objects). So what they know travels with the run, in its state.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from haystack.components.agents.state import State, replace_values
from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY, new_message_id

#: Where the chat history's id is looked for: in the `hook_context` of the run, else in its state.
CHAT_HISTORY_ID_KEY = "chat_history_id"

_RUN_KEY = "_haystack_chat_store"
# Haystack's mark on what a compactor made, not the model, the user or a tool.
_COMPACTION_KEY = "context_compaction"
_TOO_MANY_STEPS = sys.maxsize


@dataclass
class AgentRun:
    """
    What is known of one run.

    :param chat_history_id: Where its messages are stored.
    :param question_id: The id of the user message that the run answers.
    :param given: The ids of the messages that the run began with. All others it has produced.
    :param known: The ids of the messages that are stored or wait to be.
    :param unsaved: The messages that wait to be stored, in order.
    :param exit_reason: What the result shall say if the run ends before its first step.
    """

    chat_history_id: str
    question_id: str | None = None
    given: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    unsaved: list[ChatMessage] = field(default_factory=list)
    exit_reason: str | None = None

    def know(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Note what is stored.

        :returns: The messages, with an id in each: somebody's store may keep none. Those passed in are not changed.
        """
        known = [with_id(message) for message in messages]
        self.known.update(map(message_id, known))
        return known

    def give(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Note what the run begins with.

        :returns: The messages, with an id in each that is to be stored. Those passed in are not changed.
        :raises ValueError: If a message has an id that is not text.
        """
        given = [with_id(message) if is_said(message) else message for message in messages]
        self.given.update(message_id(message) for message in given if is_said(message))
        return given

    def collect(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Note which of the messages are not stored yet.

        :returns: The messages, with an id in each that is to be stored, and in each that the run has produced, the id
            of its question. Those passed in are not changed.
        """
        collected: list[ChatMessage] = []
        first_with_id: dict[str, ChatMessage] = {}
        for message in messages:
            kept = self._identified(message, first_with_id) if is_said(message) else message
            if is_said(message) and message_id(kept) not in self.known:
                kept = self._marked(kept)
                self.known.add(message_id(kept))
                self.unsaved.append(kept)
            collected.append(kept)
        return collected

    @staticmethod
    def _identified(message: ChatMessage, first_with_id: dict[str, ChatMessage]) -> ChatMessage:
        identified = with_id(message)
        first = first_with_id.setdefault(message_id(identified), message)
        # Haystack's confirmation makes several messages of one, and they share its meta; so may a reply its question's.
        return identified if first == message else with_new_id(message)

    def _marked(self, message: ChatMessage) -> ChatMessage:
        if self.question_id is None or message_id(message) in self.given:
            return message
        return replace(message, _meta={**message.meta, QUESTION_ID_KEY: self.question_id})

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize what is known: a state in which something cannot be serialized cannot be kept whole.
        """
        unsaved = [message.to_dict() for message in self.unsaved]
        return {**vars(self), "given": sorted(self.given), "known": sorted(self.known), "unsaved": unsaved}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AgentRun":
        """
        Know again what `to_dict` returned.
        """
        unsaved = [ChatMessage.from_dict(message) for message in data["unsaved"]]
        return cls(**{**data, "given": set(data["given"]), "known": set(data["known"]), "unsaved": unsaved})


def begin_run(state: State) -> AgentRun:
    """
    Begin to know of a run.

    :raises ValueError: If the run has no chat history.
    """
    hook_context = state.data.get("hook_context") or {}
    chat_history_id = hook_context.get(CHAT_HISTORY_ID_KEY)
    if chat_history_id is None:
        chat_history_id = state.data.get(CHAT_HISTORY_ID_KEY)
    if not isinstance(chat_history_id, str) or not chat_history_id:
        raise ValueError(
            f"The agent has no chat history to load and to save to: {CHAT_HISTORY_ID_KEY} must be non-empty text, got "
            f"{type(chat_history_id).__name__}. Pass hook_context={{'{CHAT_HISTORY_ID_KEY}': ...}} to the run, or "
            f"{CHAT_HISTORY_ID_KEY}=... if the agent's state_schema has such a key."
        )
    run = AgentRun(chat_history_id)
    # The context is the caller's, and may be used for the next run: nothing is written to it. Nor is what it holds
    # copied, as State.get would, for it may hold connections.
    state.set("hook_context", {**hook_context, _RUN_KEY: run}, handler_override=replace_values)
    return run


def run_of(state: State) -> AgentRun:
    """
    Return what is known of a run. If that is nothing yet, it begins here.
    """
    run = (state.data.get("hook_context") or {}).get(_RUN_KEY)
    if not isinstance(run, AgentRun):
        run = begin_run(state)
        given = run.give(state.data["messages"])
        run.question_id = last_question_id(given)
        set_messages(state, given)
    return run


def set_messages(state: State, messages: list[ChatMessage]) -> None:
    """
    Replace the messages of a run, whatever its schema says about adding to them.
    """
    state.set("messages", messages, handler_override=replace_values)


def end_before_first_step(state: State) -> None:
    """
    Let a run end at once. To be called before its first step.

    Haystack begins to count steps where a `before_run` hook leaves the count. (Newer versions also read `stop_run` in
    the state, but only after the `before_llm` hooks, and one of those that compacts may ask a model.)
    """
    state.set("step_count", _TOO_MANY_STEPS)


def put_result_right(state: State, reason: str | None) -> None:
    """
    Undo, after the run, what `end_before_first_step` did to its result.

    :param reason: What the result shall have as `exit_reason`.
    """
    if state.data["step_count"] == _TOO_MANY_STEPS and state.data["exit_reason"] is not None:
        state.set("step_count", 0)
        state.set("exit_reason", reason)


def is_compacted(message: ChatMessage) -> bool:
    """
    Whether a message is what a compactor made of others.
    """
    return _COMPACTION_KEY in message.meta


def is_said(message: ChatMessage) -> bool:
    """
    Whether a message belongs in the history. Instructions to the model and what a compactor made do not.
    """
    return message.role is not ChatRole.SYSTEM and not is_compacted(message)


def message_id(message: ChatMessage) -> Any:
    """
    Return a message's own id, `None` if it has none.
    """
    return message.meta.get(MESSAGE_ID_KEY)


def with_id(message: ChatMessage) -> ChatMessage:
    """
    Return the message with an id: its own, if it has one.

    :param message: It is not changed.
    :raises ValueError: If its own id is not text.
    """
    own_id = message_id(message)
    if own_id is None:
        return with_new_id(message)
    if not isinstance(own_id, str):
        raise ValueError(f"meta[{MESSAGE_ID_KEY!r}] of a message must be text, got {type(own_id).__name__}.")
    return message


def with_new_id(message: ChatMessage) -> ChatMessage:
    """
    Return the message with an id that no other has.

    :param message: It is not changed.
    """
    return replace(message, _meta={**message.meta, MESSAGE_ID_KEY: new_message_id()})


def last_question_id(messages: Sequence[ChatMessage]) -> str | None:
    """
    Return the id of the question that the last user message asks or, if a run produced it, belongs to.
    """
    for message in reversed(messages):
        if message.role is ChatRole.USER and is_said(message):
            question_id: str = message.meta.get(QUESTION_ID_KEY) or message_id(message)
            return question_id
    return None
