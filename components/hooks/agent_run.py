# SPDX-License-Identifier: Apache-2.0
"""
The record of one run of an agent, which the hooks share from hook point to hook point.

A hook is not told at which point it runs. Hooks loaded from YAML are a separate object at each point. So the record
travels with the run, in its state.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from haystack.components.agents.state import State, replace_values
from haystack.dataclasses import ChatMessage, ChatRole

from haystack_chat_store.ids import (
    MESSAGE_ID_KEY,
    QUESTION_ID_KEY,
    first_step_id,
    is_shown_only,
    new_message_id,
    step_id,
)
from haystack_chat_store.validation import validated_id, validated_revision

#: The key of the chat history's id, in the `hook_context` of the run or else in its state.
CHAT_HISTORY_ID_KEY = "chat_history_id"

#: The key of the id of the last message of the history that the run is shown, in its `hook_context`.
UNTIL_MESSAGE_ID_KEY = "until_message_id"

#: The key of the id of the first message that the run replaces, in its `hook_context`.
REPLACE_FROM_MESSAGE_ID_KEY = "replace_from_message_id"

#: The key of the revision that the history must have when the run is first saved, in its `hook_context`.
EXPECTED_REVISION_KEY = "expected_revision"

#: The key of the user of the history, in its `hook_context`.
USER_ID_KEY = "user_id"

_RUN_KEY = "_haystack_chat_store"
# Haystack sets this key in the meta of a message that a compactor created.
_COMPACTION_KEY = "context_compaction"
_TOO_MANY_STEPS = sys.maxsize


@dataclass
class AgentRun:
    """
    The record of one run.

    :param chat_history_id: The id of the history that its messages are stored in.
    :param user_id: The user of the history, or `None`.
    :param until_message_id: The id of the last message of the history that the run is shown, or `None` for all.
    :param replaced_id: The id of the first message that the run still has to replace, or `None`.
    :param expected_revision: The revision that the history must have at the next write, or `None` for any revision.
    :param brought: The number of messages in `unsaved` before the model was first asked. `None` until the saver runs.
    :param tried: The number of messages in a write that has failed, but may have been done nevertheless, and that
        replaces messages or expects a revision. It is tried again with the same messages. Otherwise `None`.
    :param replaces: The id of the first message that the run replaces, also after it was replaced, or `None`.
    :param question_id: The id of the user message that the run answers.
    :param is_question_stored: Whether the question is known to have been stored.
    :param is_question_tried: Whether a write of the question has failed, but may have been done nevertheless.
    :param steps: The number of messages of the turn after its question that are stored or wait to be stored.
    :param given: The ids of the messages that the run began with. The run produced all other messages.
    :param known: The ids of the messages that are stored or wait to be stored.
    :param unsaved: The messages that wait to be stored, in order.
    :param exit_reason: The `exit_reason` of the result if the run ends before its first step.
    """

    chat_history_id: str
    user_id: str | None = None
    until_message_id: str | None = None
    replaced_id: str | None = None
    expected_revision: int | None = None
    brought: int | None = None
    tried: int | None = None
    replaces: str | None = None
    question_id: str | None = None
    is_question_stored: bool = False
    is_question_tried: bool = False
    steps: int = 0
    given: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    unsaved: list[ChatMessage] = field(default_factory=list)
    exit_reason: str | None = None

    @property
    def before_message_id(self) -> str | None:
        """The id of the message before which the history ends for the run, unless `until_message_id` ends it."""
        return self.replaced_id if self.until_message_id is None else None

    @property
    def has_reply(self) -> bool:
        """Whether a reply of the model waits to be stored."""
        return self.brought is not None and any(map(_is_reply, self.unsaved[self.brought :]))

    def know(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Record messages that are stored.

        :param messages: Messages from the store. They are not changed.
        :returns: The messages, each with an id. (A store of another package may not keep ids.)
        """
        known = [with_id(message) for message in messages]
        self.known.update(map(message_id, known))
        return known

    def give(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Record the messages that the run begins with.

        :param messages: The messages. They are not changed.
        :returns: The messages. Each message that belongs in the history has an id.
        :raises ValueError: If a message has an id that is not text.
        """
        given = [with_id(message) if is_said(message) else message for message in messages]
        self.given.update(message_id(message) for message in given if is_said(message))
        return given

    def collect(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Add the messages that are not stored yet to `unsaved`.

        :param messages: The messages of the run. They are not changed.
        :returns: The messages. Each message that belongs in the history has an id, and each new message that the run
            produced also has the id of its question.
        """
        collected: list[ChatMessage] = []
        first_with_id: dict[str, ChatMessage] = {}
        for message in messages:
            kept = self._identified(message, first_with_id) if is_said(message) else message
            if is_said(message) and message_id(kept) not in self.known:
                if self._is_first_step(kept):
                    kept = replace(kept, _meta={**kept.meta, MESSAGE_ID_KEY: first_step_id(str(self.replaced_id))})
                elif message_id(kept) != message_id(message):
                    kept = self._with_step_id(kept)
                kept = self._with_question_id(kept)
                is_given_by_user = message_id(kept) in self.given and kept.role is ChatRole.USER
                self.steps += not is_given_by_user
                self.known.add(message_id(kept))
                self.unsaved.append(kept)
            collected.append(kept)
        return collected

    def _is_first_step(self, message: ChatMessage) -> bool:
        """Whether the message is the first reply of a run that replaces others."""
        is_asked = self.replaced_id is not None and self.brought is not None
        return is_asked and _is_reply(message) and not self.has_reply

    @staticmethod
    def _identified(message: ChatMessage, first_with_id: dict[str, ChatMessage]) -> ChatMessage:
        identified = with_id(message)
        first = first_with_id.setdefault(message_id(identified), message)
        # Different messages can share one meta, and so one id: Haystack's confirmation splits a message into several,
        # and a generator may give its reply the question's meta. All but the first get a new id.
        return identified if first == message else with_new_id(message)

    def _with_step_id(self, message: ChatMessage) -> ChatMessage:
        """Return a message that the run produced, and that has a new id, with the id of its step instead."""
        if self.question_id is None or message_id(message) in self.given:
            return message
        taken = {*self.known, self.replaces}
        ids = (step_id(self.question_id, number) for number in count(self.steps))
        return replace(message, _meta={**message.meta, MESSAGE_ID_KEY: next(each for each in ids if each not in taken)})

    def _with_question_id(self, message: ChatMessage) -> ChatMessage:
        if self.question_id is None or message_id(message) in self.given:
            return message
        return replace(message, _meta={**message.meta, QUESTION_ID_KEY: self.question_id})

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the record. Haystack serializes the whole state of an agent, so everything in it must be serializable.
        """
        unsaved = [message.to_dict() for message in self.unsaved]
        return {**vars(self), "given": sorted(self.given), "known": sorted(self.known), "unsaved": unsaved}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AgentRun":
        """Restore a record from the result of `to_dict`."""
        unsaved = [ChatMessage.from_dict(message) for message in data["unsaved"]]
        return cls(**{**data, "given": set(data["given"]), "known": set(data["known"]), "unsaved": unsaved})


def begin_run(state: State) -> AgentRun:
    """
    Create the run's record.

    :raises ValueError: If the run has no chat history id, or a value of its `hook_context` is wrong.
    """
    hook_context = state.data.get("hook_context") or {}
    chat_history_id = hook_context.get(CHAT_HISTORY_ID_KEY)
    if chat_history_id is None:
        chat_history_id = state.data.get(CHAT_HISTORY_ID_KEY)
    if not isinstance(chat_history_id, str) or not chat_history_id:
        raise ValueError(
            f"The agent has no chat history: {CHAT_HISTORY_ID_KEY} must be non-empty text, got "
            f"{type(chat_history_id).__name__}. Pass hook_context={{'{CHAT_HISTORY_ID_KEY}': ...}} to the run, or "
            f"{CHAT_HISTORY_ID_KEY}=... if the agent's state_schema has this key."
        )
    replaced_id = hook_context.get(REPLACE_FROM_MESSAGE_ID_KEY)
    replaced_id = None if replaced_id is None else validated_id(replaced_id, REPLACE_FROM_MESSAGE_ID_KEY)
    run = AgentRun(
        chat_history_id,
        user_id=hook_context.get(USER_ID_KEY),
        until_message_id=hook_context.get(UNTIL_MESSAGE_ID_KEY),
        replaced_id=replaced_id,
        replaces=replaced_id,
        expected_revision=validated_revision(hook_context.get(EXPECTED_REVISION_KEY)),
    )
    # The caller may use the same context for the next run, so it is replaced by a new dict and not changed. Its values
    # are not copied, as State.get would do, because they may be connections.
    state.set("hook_context", {**hook_context, _RUN_KEY: run}, handler_override=replace_values)
    return run


def run_of(state: State) -> AgentRun:
    """Return the run's record. If it does not exist yet, create it from the run's messages."""
    run = (state.data.get("hook_context") or {}).get(_RUN_KEY)
    if not isinstance(run, AgentRun):
        run = begin_run(state)
        given = run.give(state.data["messages"])
        run.question_id = last_question_id(given)
        set_messages(state, given)
    return run


def set_messages(state: State, messages: list[ChatMessage]) -> None:
    """Replace the messages of a run, even if its schema says that new messages are appended."""
    state.set("messages", messages, handler_override=replace_values)


def end_before_first_step(state: State) -> None:
    """
    End a run before its first step.

    This sets the step count, because Haystack starts counting at the value that a `before_run` hook leaves. (Newer
    versions also read `stop_run` in the state, but only after the `before_llm` hooks, and a hook that compacts may call
    a model there.)
    """
    state.set("step_count", _TOO_MANY_STEPS)


def correct_result(state: State, reason: str | None) -> None:
    """
    Undo the changes of `end_before_first_step` to the result, after the run.

    :param reason: The `exit_reason` of the result.
    """
    if state.data["step_count"] == _TOO_MANY_STEPS and state.data["exit_reason"] is not None:
        state.set("step_count", 0)
        state.set("exit_reason", reason)


def is_compacted(message: ChatMessage) -> bool:
    """Whether a compactor created the message from other messages."""
    return _COMPACTION_KEY in message.meta


def is_said(message: ChatMessage) -> bool:
    """
    Whether a message belongs in the history.

    System messages do not, nor messages that a compactor created, nor those that are only shown.
    """
    return message.role is not ChatRole.SYSTEM and not is_compacted(message) and not is_shown_only(message)


def _is_reply(message: ChatMessage) -> bool:
    return message.role is ChatRole.ASSISTANT


def message_id(message: ChatMessage) -> Any:
    """Return a message's id, or `None` if it has none."""
    return message.meta.get(MESSAGE_ID_KEY)


def with_id(message: ChatMessage) -> ChatMessage:
    """
    Return the message if it has an id, otherwise a copy with a new id.

    :param message: The message. It is not changed.
    :raises ValueError: If its id is not text.
    """
    own_id = message_id(message)
    if own_id is None:
        return with_new_id(message)
    if not isinstance(own_id, str):
        raise ValueError(f"meta[{MESSAGE_ID_KEY!r}] of a message must be text, got {type(own_id).__name__}.")
    return message


def with_new_id(message: ChatMessage) -> ChatMessage:
    """
    Return a copy of the message with a new, unique id.

    :param message: The message. It is not changed.
    """
    return replace(message, _meta={**message.meta, MESSAGE_ID_KEY: new_message_id()})


def last_question_id(messages: Sequence[ChatMessage]) -> str | None:
    """Return the question's id of the last user message: the id that it names or, if it names none, its own."""
    for message in reversed(messages):
        if message.role is ChatRole.USER and not is_compacted(message):
            question_id: str = message.meta.get(QUESTION_ID_KEY) or message_id(message)
            return question_id
    return None
