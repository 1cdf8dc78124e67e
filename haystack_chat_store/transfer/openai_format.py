# SPDX-License-Identifier: Apache-2.0
"""
Chat histories as examples for fine-tuning, in OpenAI's chat format: one JSON object a line, `{"messages": [...]}`.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, BinaryIO

from haystack.dataclasses import ChatMessage, ChatRole, TextContent

from haystack_chat_store.codec import decode_messages
from haystack_chat_store.conversation.rounds import in_question_order
from haystack_chat_store.conversation.shown import messages_for_model
from haystack_chat_store.ids import message_id_of
from haystack_chat_store.json_values import encode_values
from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.transfer.histories import Faults, Rows, TransferResult
from haystack_chat_store.types import Fault


def write(histories: Iterable[tuple[HistoryRow, Rows]], stream: BinaryIO) -> TransferResult:
    """
    Write each history as a model would see it, up to the last message of the assistant.

    Each history is held in memory as a whole, because the result of a tool call may come much later than the call.

    :returns: The numbers of histories and messages written, the number of messages left out, and a fault for each
        history that this format has no form for.
    """
    chat_histories = messages = total = 0
    faults = Faults()
    for history, rows in histories:
        stored = [message for batch in rows for message in decode_messages([row.content for row in batch])]
        total += len(stored)
        training_messages = _training_messages(stored)
        try:
            example = list(chain.from_iterable(map(_as_openai, training_messages)))
        except ValueError:  # Haystack's error quotes the message, so it is not shown
            description = "It was left out: OpenAI's format has no form for one of its tool calls or results."
            faults.add(Fault(chat_history_id=history.chat_history_id, description=description))
            continue
        if example:
            stream.write(encode_values({"messages": example}, "example").encode() + b"\n")
            chat_histories += 1
            # Messages that `messages_for_model` added have no id.
            messages += sum(message_id_of(message) is not None for message in training_messages)
    return TransferResult(
        chat_histories=chat_histories, messages=messages, skipped=total - messages, faults=tuple(faults)
    )


def _training_messages(history: list[ChatMessage]) -> list[ChatMessage]:
    """Return the messages that are valid for a model, up to the last message of the assistant."""
    valid = messages_for_model(in_question_order(history), portable=False)
    while valid and valid[-1].role is not ChatRole.ASSISTANT:
        del valid[-1]
    return valid


def _as_openai(message: ChatMessage) -> list[dict[str, Any]]:
    """
    Return a message in OpenAI's format.

    This format has one message for each tool result, and one text in a message of the assistant.
    """
    if message.role is ChatRole.TOOL:
        return [replace(message, _content=[result]).to_openai_dict_format() for result in message.tool_call_results]
    if message.role is not ChatRole.USER and len(message.texts) > 1:
        others = [part for part in message._content if not isinstance(part, TextContent)]
        message = replace(message, _content=[TextContent("\n\n".join(message.texts)), *others])
    return [message.to_openai_dict_format()]
