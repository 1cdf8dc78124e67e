# SPDX-License-Identifier: Apache-2.0
"""
Messages that stand for others, because a model is shown several as one, or one in another form.

Such a message carries `meta["chat_shown"]`, and is never stored. If some of those that it stands for may not be stored
yet, such as the question of this turn, the value is a list of them. So a writer that gets what a model was shown stores
what was said.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall

from haystack_chat_store.conversation import provider_content
from haystack_chat_store.conversation.copies import changed
from haystack_chat_store.conversation.media import with_joined_texts
from haystack_chat_store.conversation.rounds import said_parts
from haystack_chat_store.ids import MESSAGE_ID_KEY, SHOWN_KEY, is_shown_only, message_id_of, new_message_id
from haystack_chat_store.validation import validated_messages


def merged(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """
    Join user messages that follow each other, and replies. (What follows a call is its result.)

    :param messages: Messages for a model. They are not changed.
    """
    groups: list[list[ChatMessage]] = []
    for message in messages:
        last = groups[-1][-1] if groups else None
        if last is not None and last.role is message.role and message.role in (ChatRole.USER, ChatRole.ASSISTANT):
            groups[-1].append(message)
        else:
            groups.append([message])
    return [group[0] if len(group) == 1 else _merged(group) for group in groups]


def _merged(group: Sequence[ChatMessage]) -> ChatMessage:
    first, *others = group
    message = joined([first, *map(provider_content.without_provider_content, others)])
    return standing_for(unjoined(group), provider_content.up_to_date(message))


def joined(messages: Sequence[ChatMessage]) -> ChatMessage:
    """
    Return one message for several of a role, with the meta of the first.

    Its texts become one, because some providers take only one. Calls come last. It has a name only if all have it.
    """
    content = [part for message in messages for part in said_parts(message)]
    texts = [part for part in content if isinstance(part, TextContent)]
    calls = [part for part in content if isinstance(part, ToolCall)]
    others = [part for part in content if not isinstance(part, (TextContent, ToolCall))]
    reasoning = [part for part in others if isinstance(part, ReasoningContent)]
    content = [*reasoning, *texts, *(part for part in others if part not in reasoning), *calls]
    name = messages[0]._name if len({message._name for message in messages}) == 1 else None
    return changed(messages[0], _content=with_joined_texts(content), _name=name)


def standing_for(originals: Iterable[ChatMessage], shown: ChatMessage) -> ChatMessage:
    """
    Return a message marked as one that is only shown, and that stands for others.

    :param originals: The messages that may not be stored yet. Those that are only shown themselves are left out. Those
        without an id get one, so that each of them is stored once.
    :param shown: The message that the model is shown instead. It is not changed.
    """
    said = [_with_id(original).to_dict() for original in originals if not is_shown_only(original)]
    return changed(shown, _meta={**shown.meta, SHOWN_KEY: said or True})


def _with_id(message: ChatMessage) -> ChatMessage:
    if message_id_of(message) is not None:
        return message
    return changed(message, _meta={**message.meta, MESSAGE_ID_KEY: new_message_id()})


def unjoined(messages: Iterable[ChatMessage]) -> Iterator[ChatMessage]:
    """
    Yield each message and, after one that stands for others, these.

    :param messages: Messages that a model was shown, or any others. They are not changed.
    :raises ValueError: If what a message is said to stand for are no messages.
    """
    for message in messages:
        said = message.meta.get(SHOWN_KEY)
        if isinstance(said, list):
            yield changed(message, _meta={**message.meta, SHOWN_KEY: True})
            yield from _originals(said)
        else:
            yield message


def _originals(said: list[Any]) -> list[ChatMessage]:
    name = f"meta[{SHOWN_KEY!r}]"
    try:
        originals = list(map(ChatMessage.from_dict, said))
    except Exception:  # Haystack raises errors of many kinds, which quote the message
        raise ValueError(f"{name} must be a list of messages as ChatMessage.to_dict() returns them.") from None
    return validated_messages(originals, name)
