# SPDX-License-Identifier: Apache-2.0
"""
The messages that a model is shown.

The store keeps a history as it was said. Providers refuse some of it: a tool call without a result, a call id that
another provider gave, a signature of another model. So what is shown differs from what is stored. `messages_for_model`
repairs what can be repaired, and leaves out the rest.

The **round under way** is the last question and what follows it. The model that works on it needs it as it is stored.
All rounds before it are completed. In a **portable** form they hold only what every provider takes.
"""

import operator
from collections.abc import Sequence
from typing import Any, TypeVar

from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)

from haystack_chat_store.conversation import provider_content
from haystack_chat_store.conversation.copies import changed
from haystack_chat_store.conversation.media import as_text, is_media, portable_question, with_joined_texts
from haystack_chat_store.conversation.model_names import is_same_model
from haystack_chat_store.conversation.parts import split_system_history_current
from haystack_chat_store.conversation.replies import Found, joined, steps_of, without_alternatives
from haystack_chat_store.conversation.rounds import is_question, said_parts
from haystack_chat_store.conversation.shown_ids import ShownIds
from haystack_chat_store.conversation.tool_calls import results_of_calls
from haystack_chat_store.ids import SHOWN_KEY, message_id_of, question_id_of

#: The result that answers a tool call whose own result is not there.
INTERRUPTED = "The call was interrupted. It is not known whether the tool has run, and what its result was."
#: The reply that stands for the answer of a turn that ended after the results of its tools. Mistral takes no question
#: directly after results, and Amazon Bedrock no two messages of the user.
UNANSWERED = "I was interrupted before I could answer."
#: What asks a model to go on with the round that another model began. Claude and Gemini take calls without their own
#: thoughts in completed rounds only. So the other model's steps are shown as a round that ended with `UNANSWERED`.
GO_ON = "Please go on."
_NO_OUTPUT = "(no output)"
_OTHERS = (ChatRole.USER, ChatRole.SYSTEM)
# The roles that speak in turns: the other one for each.
_SPEAKERS = {ChatRole.USER: ChatRole.ASSISTANT, ChatRole.ASSISTANT: ChatRole.USER}
_Part = TypeVar("_Part")


def messages_for_model(
    history: Sequence[ChatMessage],
    current_messages: Sequence[ChatMessage] = (),
    *,
    portable: bool = True,
    merge_consecutive: bool = False,
    model: str | None = None,
) -> list[ChatMessage]:
    """
    Put the messages of this turn around a window of history, in a form that model providers accept.

    Repaired is:

    - A tool call without a result is answered by a result that says that the call was interrupted.
    - The results of a reply are put in the order of its calls, one a message.
    - Replies that follow each other and call tools are joined, so that the results come directly after their calls.
    - Calls without an id, or with one that was given before, get one.
    - Between tool results and the next question, and what a hook says to the model in a completed round that is shown
      in portable form, stands a reply that says that no answer was given.
    - Where a question was deleted, and an answer and the steps to another one follow each other, a question to go on
      stands between them, unless they are portable.
    - Where another model goes on with the round under way, such a reply and a question to go on stand before its steps.
    - What a generator keeps for its provider goes, if the message was edited since.
    - In a completed round in portable form, the name of who speaks goes from its field into the text.

    Left out are results without a call, blank texts, messages that say nothing, all but the first of several
    alternative replies, marks for prompt caches that were stored, and assistant and tool messages before the first user
    message of the history.

    A message of the history that is not shown as it is stored carries `meta["chat_shown"]`. All others are the objects
    that were passed in.

    :param history: A window of a history, oldest first. Neither the list nor its messages are changed.
    :param current_messages: The messages of this turn. See `split_system_history_current` for where they go. Their
        tool results answer calls in the history.
    :param portable: Whether completed rounds are shown in a form that every provider takes: without reasoning,
        signatures, raw blocks and names, with neutral ids of calls, and with text for images and files in replies and
        results and for those of the user that only some take. Defaults to True. If False, they are shown as stored.
    :param merge_consecutive: Whether user and assistant speak in turns, for models that insist on it: stored messages
        of the same role that follow each other are joined. A message that this turn brings stays as it is, and
        "Please go on." stands before it. Defaults to False.
    :param model: The name of the model that is asked. In the round under way, replies of other models are shown in the
        portable form, as a round that was interrupted. Images and files in completed rounds, all of whose replies
        name this model, are shown as they are stored. A name with a version, such as the one in a reply's
        `meta["model"]`, is the same model as the name without it. Without `portable`, the name has no effect.
        Defaults to the model of the newest reply in the round under way, and is not known for completed rounds.
    """
    system, shown, current = split_system_history_current(history, current_messages)
    view = _View([*_from_first_user(shown), *current], current, current_messages, portable=portable, model=model)
    messages = view.messages()
    return [*system, *(view.in_turns(messages) if merge_consecutive else messages)]


class _View:
    """
    The view of a model on the messages of a window and a turn, without system messages of this turn.

    :param given: All messages, in order.
    :param current: Those of this turn that are not in the history.
    :param current_messages: All messages of this turn.
    :param portable: Whether completed rounds are shown in a portable form.
    :param model: The name of the model that is asked, if it is known.
    """

    def __init__(
        self,
        given: Sequence[ChatMessage],
        current: Sequence[ChatMessage],
        current_messages: Sequence[ChatMessage],
        *,
        portable: bool,
        model: str | None,
    ) -> None:
        texts = self._texts = {id(message) for message in given if _is_text(message)}
        self._given = [message for message in given if id(message) in texts or _may_say_something(message)]
        self._current = {id(message) for message in current}
        # A stored message that this turn brings along again has the marks that this turn puts on it.
        self._requested = provider_content.requests_of(current_messages)
        self._under_way = len(self._given)
        self._asked = self._model = model
        while self._under_way > 0:
            self._under_way -= 1
            message = self._given[self._under_way]
            if _begins_round(message):
                break
            if self._model is None and _is_reply(message):
                self._model = message.meta.get("model")
        if portable:
            before = self._given[: self._under_way]
            self._given[: self._under_way] = [self._without_name(message) for message in before]
        self._portable = portable
        self._stored_of: dict[int, ChatMessage] = {}  # by the id() of a reply that is worked on
        self._ids = ShownIds()

    def messages(self) -> list[ChatMessage]:
        """Return the messages that the model is shown."""
        given, shown = self._given, list[ChatMessage]()
        end = len(given)
        index = 0
        portable = False  # the exchange before `index`
        while index < end:
            message = given[index]
            following = given[index + 1] if index + 1 < end else None
            if message._role is not ChatRole.ASSISTANT:
                self._close_round(shown, message, is_portable=portable)
                if message._role is not ChatRole.TOOL:  # a result without a call
                    shown.append(message if self._is_simple(message) else self._said(message, index))
                index += 1
            elif (following is None or following._role in _OTHERS) and self._is_simple(message):
                shown.append(message)  # as most replies are
                index += 1
            else:
                portable = self._is_portable(index)
                after_replies = self._end_of_replies(index, portable)
                after = _end_of_role(given, after_replies, ChatRole.TOOL)
                replies = given[index:after_replies]
                shown += self._exchange(replies, given[after_replies:after], portable, is_last=after == end)
                if self._ends_steps_of_other_model(index, after, portable):
                    self._hand_over(shown)
                index = after
        return shown

    def in_turns(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """
        Let user and assistant speak in turns. (What follows a call is its result.)

        Stored messages of a role that follow each other are joined. What this turn brings stays as it is, so that it is
        stored as it was said.

        :param messages: The messages that the model is shown.
        """
        turns: list[ChatMessage] = []
        for message in messages:
            last = turns[-1] if turns else None
            if last is None or last.role is not message.role or message.role not in _SPEAKERS:
                turns.append(message)
            elif not self._current.isdisjoint((id(last), id(message))):
                turns += [_go_on(_SPEAKERS[message.role]), message]
            else:
                both = joined([last, provider_content.without_provider_content(message)])
                turns[-1] = _marked(provider_content.up_to_date(both))
        return turns

    def _without_name(self, message: ChatMessage) -> ChatMessage:
        """Return a stored message without its name. The text of a user's message begins with it instead."""
        if message._name is None or id(message) in self._current:
            return message
        content: Sequence[Any] = message._content
        if message._role is ChatRole.USER and (name := message._name.strip()):
            first, *rest = said_parts(message)
            named = (
                [TextContent(f"{name}: {first.text}")]
                if isinstance(first, TextContent)
                else [TextContent(f"{name}:"), first]
            )
            content = [*named, *rest]
        shown = changed(message, _name=None, _content=content, _meta={**message._meta, SHOWN_KEY: True})
        if id(message) in self._texts:
            self._texts.add(id(shown))
        return shown

    def _is_simple(self, message: ChatMessage) -> bool:
        """Whether a message is one text without anything that only one provider takes. It is shown as it is."""
        is_text = id(message) in self._texts
        return is_text and self._requested is None and provider_content.ALL_KEYS.isdisjoint(message._meta)

    def _end_of_replies(self, index: int, portable: bool) -> int:
        """Return where the replies end that stand at `index`, or those of one model in the round under way."""
        end = index + 1
        while end < len(self._given) and _is_reply(self._given[end]) and self._is_portable(end) == portable:
            end += 1
        return end

    def _ends_steps_of_other_model(self, index: int, after: int, portable: bool) -> bool:
        """Whether the exchange that begins at `index` is the last one of another model in the round under way."""
        if index < self._under_way or not portable:
            return False
        following = self._given[after] if after < len(self._given) else None
        return following is None or (_is_reply(following) and not self._is_portable(after))

    @staticmethod
    def _hand_over(shown: list[ChatMessage]) -> None:
        if shown and shown[-1]._role is ChatRole.TOOL:
            shown.append(ChatMessage.from_assistant(UNANSWERED, meta={SHOWN_KEY: True}))
            shown.append(_go_on(ChatRole.USER))

    @staticmethod
    def _close_round(shown: list[ChatMessage], following: ChatMessage, *, is_portable: bool) -> None:
        is_asked = _begins_round(following) or (is_portable and is_question(following))
        if is_asked and shown and shown[-1]._role is ChatRole.TOOL:
            shown.append(ChatMessage.from_assistant(UNANSWERED, meta={SHOWN_KEY: True}))

    def _is_portable(self, index: int) -> bool:
        """Whether the message is shown in a portable form. In the round under way, steps of another model are."""
        if index < self._under_way or not _is_reply(self._given[index]):
            return self._portable and index < self._under_way
        model = self._given[index].meta.get("model")
        return self._portable and not is_same_model(model, self._model)

    def _said(self, message: ChatMessage, index: int) -> ChatMessage:
        """Show a message of the user or the system."""
        content = said_parts(message)
        if any(map(is_media, content)):
            if self._has_portable_media(index):
                content = portable_question(content, lambda number: self._ids.mark_of_file(message, number))
        elif len(content) > 1 and self._portable and id(message) not in self._current:
            content = with_joined_texts(content)  # of a stored question, whichever model it was for
        return self._as_shown(message, content, message.meta)

    def _has_portable_media(self, index: int) -> bool:
        """
        Whether the images and files of the message are shown in a form that every provider takes.

        They are shown as they are stored where the model that is asked has taken them before: all replies of the round
        are known to be its own. So they are in the round under way, unless another model has begun it.
        """
        if not self._portable or id(self._given[index]) in self._current:
            return False
        models = []
        for message in self._given[index + 1 :]:
            if _begins_round(message):
                break
            if _is_reply(message):
                models.append(message.meta.get("model"))
        if index >= self._under_way:
            return not all(is_same_model(model, self._model) for model in models)
        is_own = isinstance(self._asked, str) and all(isinstance(model, str) for model in models)
        return not (models and is_own and all(is_same_model(model, self._asked) for model in models))

    def _exchange(
        self, replies: Sequence[ChatMessage], answers: Sequence[ChatMessage], portable: bool, *, is_last: bool
    ) -> list[ChatMessage]:
        """Show replies that follow each other, and the tool messages after them."""
        if not portable:
            stored = replies
            current = list(map(provider_content.up_to_date, replies))
            replies = provider_content.without_broken_pauses(current, may_pause_at_end=is_last)
            self._stored_of = {id(reply): original for reply, original in zip(replies, stored, strict=True)}
        results = [(result, answer) for answer in answers for result in _parts_of_type(answer, ToolCallResult)]
        if len(replies) > 1:
            replies = without_alternatives(replies)
        calls = [call for reply in replies for call in _parts_of_type(reply, ToolCall)]
        paired = results_of_calls(calls, [result for result, _ in results])
        found = [None if index is None else results[index] for index in paired]
        if len(replies) == 1:
            return self._step(replies, found, portable)
        shown: list[ChatMessage] = []
        for step in steps_of(replies, found, portable):
            number = sum(len(reply.tool_calls) for reply in step)
            exchange = self._step(step, found[:number], portable)
            if not portable and shown and exchange and _begins_anew(shown[-1], exchange[0]):
                shown.append(_go_on(ChatRole.USER))
            shown += exchange
            found = found[number:]
        return shown

    def _step(self, replies: Sequence[ChatMessage], found: Sequence[Found | None], portable: bool) -> list[ChatMessage]:
        """Show one reply for several, and then a result for each of its calls."""
        reply = self._reply(replies, portable)
        if reply is None:
            return []
        shown = [reply]
        for call, result in zip(_parts_of_type(reply, ToolCall), found, strict=True):
            if result is None:
                shown.append(ChatMessage.from_tool(INTERRUPTED, origin=call, error=True, meta={SHOWN_KEY: True}))
            else:
                part, answer = result
                shown.append(self._as_shown(answer, [_shown_result(part, call, portable)], answer._meta))
        return shown

    def _reply(self, replies: Sequence[ChatMessage], portable: bool) -> ChatMessage | None:
        """Return one reply for several, or `None` if they say nothing."""
        if portable and len(replies) == 1 and _has_only_calls(replies[0]):  # as most steps are
            return self._as_shown(
                replies[0], self._ids.with_neutral_ids(replies[0], replies[0]._content), replies[0]._meta
            )
        stored = self._stored_of.get(id(replies[0]), replies[0])
        if portable:  # which is done first, so that parts of one reply can be joined
            replies = [provider_content.without_provider_content(reply) for reply in replies]
        reply = replies[0] if len(replies) == 1 else joined(replies)
        content = reply._content
        if _is_plain(reply):
            pass
        elif portable:
            content = said_parts(reply)
            if len(content) > 1 or not isinstance(content[0] if content else None, ToolCall):
                content = with_joined_texts(list(map(as_text, content)))
            content = self._ids.with_neutral_ids(reply, content)
        else:
            reply = self._ids.with_unique_ids(provider_content.up_to_date(reply))
            content = said_parts(reply)
        if _says_something(content) or provider_content.says(reply):
            return self._as_shown(stored, list(content), reply._meta)
        return None

    def _as_shown(self, stored: ChatMessage, content: list[Any], meta: dict[str, Any]) -> ChatMessage:
        """
        Return a message as it is shown: the stored one, or a marked copy if it differs.

        The marks for prompt caches that were stored are left out. What this turn brings is never marked as shown, so
        that it is stored.
        """
        is_current = id(stored) in self._current
        if not (is_current or (self._requested is None and provider_content.REQUEST_KEYS.isdisjoint(meta))):
            meta = self._with_request_of_this_turn(stored, meta)
        is_same = len(content) == len(stored._content) and all(map(operator.is_, content, stored._content))
        if is_same and (meta is stored._meta or meta == stored._meta):
            return stored
        shown = changed(stored, _content=content, _meta=meta if is_current else {**meta, SHOWN_KEY: True})
        if is_current:
            self._current.add(id(shown))
        return shown

    def _with_request_of_this_turn(self, stored: ChatMessage, meta: dict[str, Any]) -> dict[str, Any]:
        content = {key: value for key, value in meta.items() if key not in provider_content.REQUEST_KEYS}
        return {**content, **(self._requested or {}).get(message_id_of(stored), {})}


def _from_first_user(history: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Leave out the assistant and tool messages before the first question."""
    for index, message in enumerate(history):
        if is_question(message):
            return [*(message for message in history[:index] if message.role is ChatRole.SYSTEM), *history[index:]]
    return [message for message in history if message.role is ChatRole.SYSTEM]


def _begins_round(message: ChatMessage) -> bool:
    """Whether this is a question, and not a user message that a hook added."""
    return is_question(message) and question_id_of(message) is None


def _is_reply(message: ChatMessage) -> bool:
    return message._role is ChatRole.ASSISTANT


def _end_of_role(messages: Sequence[ChatMessage], index: int, role: ChatRole) -> int:
    """Return where the messages of a role end that stand at `index`."""
    while index < len(messages) and messages[index]._role is role:
        index += 1
    return index


def _parts_of_type(message: ChatMessage, kind: type[_Part]) -> list[_Part]:
    return [part for part in message._content if isinstance(part, kind)]


def _is_text(message: ChatMessage) -> bool:
    content = message._content
    return len(content) == 1 and type(content[0]) is TextContent and bool(content[0].text.strip())


def _may_say_something(message: ChatMessage) -> bool:
    if message.role is ChatRole.TOOL:
        return any(isinstance(part, ToolCallResult) for part in message._content)
    return bool(said_parts(message)) or provider_content.says(message)


def _has_only_calls(reply: ChatMessage) -> bool:
    """Whether a reply is tool calls and nothing else, neither text nor what only its provider takes."""
    only_calls = all(isinstance(part, ToolCall) for part in reply._content)
    return only_calls and bool(reply._content) and provider_content.ALL_KEYS.isdisjoint(reply._meta)


def _is_plain(reply: ChatMessage) -> bool:
    """Whether a reply is one text, which every provider takes as it is."""
    return _is_text(reply) and not provider_content.is_in(reply)


def _begins_anew(before: ChatMessage, reply: ChatMessage) -> bool:
    """Whether the question is missing that a model thought about before it called tools: it stands behind an answer."""
    is_answer = before._role is ChatRole.ASSISTANT and not before.tool_calls and not provider_content.is_paused(before)
    return is_answer and bool(reply.tool_calls) and provider_content.is_in(reply)


def _says_something(content: Sequence[Any]) -> bool:
    # Providers refuse reasoning without the text or call that it led to.
    return not all(isinstance(part, ReasoningContent) for part in content)


def _go_on(role: ChatRole) -> ChatMessage:
    return ChatMessage(role, [TextContent(GO_ON)], _meta={SHOWN_KEY: True})


def _marked(message: ChatMessage) -> ChatMessage:
    return changed(message, _meta={**message.meta, SHOWN_KEY: True})


def _shown_result(result: ToolCallResult, call: ToolCall, portable: bool) -> ToolCallResult:
    """Return a result as it is shown, as the result of a call."""
    said = result.result
    if portable:
        if not isinstance(said, str):
            said = "\n\n".join(part.text for part in map(as_text, said) if isinstance(part, TextContent))
        if not said.strip():
            said = _NO_OUTPUT
    if result.origin == call and said is result.result:
        return result
    return changed(result, result=said, origin=call)
