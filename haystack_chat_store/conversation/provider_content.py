# SPDX-License-Identifier: Apache-2.0
"""
What Haystack's chat generators keep in messages for their own provider, beside the content that all providers share.

A generator writes it when it receives a reply, and sends it back with the next request. It belongs to the parts of the
message that it stands for: if they change, it must go. Another provider does not understand it, and neither does
another model of the same provider. Keys that are not in these tables are left alone.

Read in the generators' conversion functions: haystack-ai 3.4 (`ChatMessage.to_openai_dict_format`,
`openai_responses.py`), anthropic-haystack 8.0, google-genai-haystack 7.0, amazon-bedrock-haystack 9.0,
mistral-haystack 3.0, openrouter-haystack 2.0 and ollama-haystack 7.0.
"""

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall

from haystack_chat_store.conversation.copies import changed
from haystack_chat_store.ids import message_id_of

# Anthropic: all blocks of a reply in which a server tool ran, such as web search. They are sent instead of the content.
_RAW_BLOCKS = "raw_content_for_server_tools"
# Gemini: a list with an entry for each signed part of the reply. Parts without an entry are not sent.
_SIGNATURES = "thought_signatures"
#: OpenAI: the text with which the model refused to answer.
REFUSAL_KEY = "refusal"
# OpenAI's Responses API: the id of a call, in its `extra`. There, `ToolCall.id` is the id of the item.
_CALL_ID = "call_id"

#: Keys of a message's meta that are instructions for one request: where the provider's prompt cache may begin.
REQUEST_KEYS = frozenset({"cache_control", "cachePoint"})  # Anthropic and OpenRouter; Amazon Bedrock


@dataclass(frozen=True)
class _MetaKey:
    """
    A key of a message's meta that a generator sends back.

    :param current: Returns the value that still fits the message's content, or `None` if none does.
    :param with_ids: Returns the value with other ids of calls.
    """

    current: Callable[[ChatMessage, Any], Any]
    with_ids: Callable[[Any, Sequence[str | None]], Any]


def requests_of(messages: Sequence[ChatMessage]) -> dict[str | int | None, dict[str, Any]] | None:
    """Return the instructions for this request in messages that have ids, by id. `None` if there are none."""
    requests = {
        message_id_of(message): {key: message.meta[key] for key in REQUEST_KEYS & message.meta.keys()}
        for message in messages
    }
    requests.pop(None, None)
    return requests if any(requests.values()) else None


def is_in(reply: ChatMessage) -> bool:
    """Whether a reply has provider content. Reasoning that is empty does not count."""
    return not _META_KEYS.keys().isdisjoint(reply.meta) or any(
        part.reasoning_text or any((part.extra or {}).values())
        for part in reply._content
        if isinstance(part, ReasoningContent)
    )


def says(reply: ChatMessage) -> bool:
    """Whether a reply says something by its provider content alone: a refusal, or a paused reply of server tools."""
    return bool(refusal_of(reply) or reply.meta.get(_RAW_BLOCKS))


def is_paused(reply: ChatMessage) -> bool:
    """Whether Claude has paused in the middle of the reply, while a server tool ran. It goes on in its next reply."""
    blocks = reply.meta.get(_RAW_BLOCKS)
    last = blocks[-1] if isinstance(blocks, list) and blocks else None
    return isinstance(last, dict) and last.get("type") not in ("text", "tool_use")


def without_broken_pauses(replies: Sequence[ChatMessage], *, may_pause_at_end: bool) -> list[ChatMessage]:
    """
    Return the replies without raw blocks that lack their other half.

    Claude may pause in the middle of a reply, while a server tool runs, and go on in its next reply. So the call of a
    server tool may stand in one reply and its result in the next.

    :param replies: Replies that follow each other. They are not changed.
    :param may_pause_at_end: Whether the last reply may be a pause, because the model is asked to go on with it.
    """
    given = list(replies)
    if all(_RAW_BLOCKS not in reply.meta for reply in given):
        return given
    ends = [_open_ends(reply) for reply in given]
    before: list[set[str]] = [set(), *(calls for calls, _ in ends[:-1])]
    after: list[set[str]] = [*(results for _, results in ends[1:]), ends[-1][0] if may_pause_at_end else set()]
    whole = [
        reply if calls <= following and results <= leading else without_provider_content(reply)
        for reply, (calls, results), leading, following in zip(given, ends, before, after, strict=True)
    ]
    is_whole = all(map(operator.is_, whole, given))
    return whole if is_whole else without_broken_pauses(whole, may_pause_at_end=may_pause_at_end)


def _open_ends(reply: ChatMessage) -> tuple[set[str], set[str]]:
    """Return the ids of the server tools whose result is in the next reply, and of those whose call is in the last."""
    blocks = reply.meta.get(_RAW_BLOCKS)
    blocks = [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    calls = {str(block.get("id")) for block in blocks if block.get("type") == "server_tool_use"}
    results = {str(block.get("tool_use_id")) for block in blocks if "tool_use_id" in block}
    return calls - results, results - calls


def refusal_of(message: ChatMessage) -> str:
    """Return the text with which the model refused to answer. It is empty if the model did not refuse."""
    return refusal_in(message.role.value, message.meta)


def refusal_in(role: Any, meta: Any) -> str:
    """Do what `refusal_of` does, for the stored role and meta of a message."""
    refusal = meta.get(REFUSAL_KEY) if role == ChatRole.ASSISTANT.value and isinstance(meta, dict) else None
    return refusal if isinstance(refusal, str) else ""


def is_bound_to_ids(message: ChatMessage) -> bool:
    """Whether the provider knows the reply's calls by their ids, so that they cannot have other ids."""
    return any(_CALL_ID in (call.extra or {}) for call in message.tool_calls)


def up_to_date(message: ChatMessage) -> ChatMessage:
    """
    Return a reply without provider content that no longer fits its text and calls, because the reply was edited.

    Gemini's generator leaves out calls and texts without a signature. They get an entry in the signatures.

    :param message: The reply. It is not changed.
    :returns: A new message, or the message itself if nothing changes.
    """
    if not (_META_KEYS.keys() & message.meta.keys()):
        return message
    meta = {}
    for key, value in message.meta.items():
        known = _META_KEYS.get(key)
        kept = known.current(message, value) if known and value else value
        if kept is not None or not known:
            meta[key] = kept
    return message if meta == message.meta else changed(message, _meta=meta)


def with_call_ids(message: ChatMessage, ids: Sequence[str | None]) -> ChatMessage:
    """
    Return the reply with other ids of its calls, also in its provider content.

    :param message: The reply. It is not changed.
    :param ids: The ids of its calls, in order.
    """
    meta = {
        key: _META_KEYS[key].with_ids(value, ids) if key in _META_KEYS else value for key, value in message.meta.items()
    }
    return changed(message, _content=with_ids_of_calls(message._content, ids), _meta=meta)


def with_ids_of_calls(content: Sequence[Any], ids: Sequence[str | None]) -> list[Any]:
    """Return the content of a reply with other ids of its calls, in order."""
    left = iter(ids)
    return [with_id(part, next(left)) if isinstance(part, ToolCall) else part for part in content]


def with_id(call: ToolCall, call_id: str | None) -> ToolCall:
    """Return a call with another id, which OpenAI's Responses API finds, too."""
    if call_id == call.id:
        return call
    return changed(call, id=call_id, extra={**(call.extra or {}), _CALL_ID: call_id})


def without_provider_content(message: ChatMessage) -> ChatMessage:
    """
    Return a reply without reasoning, signatures and raw blocks. A refusal becomes a text.

    Tool calls keep their ids and their `extra`. `with_call_ids` changes the ids.

    :param message: The reply. It is not changed.
    :returns: A new message, or the message itself if nothing changes.
    """
    if not any(isinstance(part, ReasoningContent) for part in message._content) and _META_KEYS.keys().isdisjoint(
        message.meta
    ):
        return message
    content = [part for part in message._content if not isinstance(part, ReasoningContent)]
    if refusal := refusal_of(message):
        after_texts = 1 + max(
            (place for place, part in enumerate(content) if isinstance(part, TextContent)), default=-1
        )
        content.insert(after_texts, TextContent(refusal))
    meta = {key: value for key, value in message.meta.items() if key not in _META_KEYS}
    return changed(message, _content=content, _meta=meta)


def as_text(message: ChatMessage) -> ChatMessage:
    """
    Return the message with its provider content as text, for a token counter, which does not know it.

    :param message: The message. It is not changed.
    :returns: A new message, or the message itself if it has no provider content.
    """
    raw = message.meta.get(_RAW_BLOCKS)
    if raw:
        return changed(message, _content=[TextContent(json.dumps(raw, default=str, ensure_ascii=False))])
    texts = [refusal_of(message)]
    texts += [json.dumps(value, default=str) for key, value in message.meta.items() if key == _SIGNATURES]
    for part in message._content:
        if isinstance(part, ReasoningContent):
            texts += [part.reasoning_text, json.dumps(part.extra, default=str, ensure_ascii=False)]
        elif isinstance(part, ToolCall) and part.extra:
            texts.append(json.dumps(part.extra, default=str))
    content = [part for part in message._content if not isinstance(part, ReasoningContent)]
    added = [TextContent(text) for text in texts if text and text != "{}"]
    return changed(message, _content=[*added, *content]) if added else message


def _current_raw_blocks(message: ChatMessage, blocks: Any) -> Any:
    """The blocks have the same calls and the same text as the message. Haystack joins the texts of blocks by blanks."""
    if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
        return None
    calls = [block.get("id") for block in blocks if block.get("type") == "tool_use"]
    texts = [str(block.get("text") or "") for block in blocks if block.get("type") == "text"]
    text = "".join("".join(texts).split())
    own_text = "".join("".join(message.texts).split())
    # The generator can be told to keep no text beside calls.
    is_same = text == own_text or (not any(message.texts) and bool(calls))
    return blocks if is_same and calls == [call.id for call in message.tool_calls] else None


def _raw_blocks_with_ids(blocks: Any, ids: Sequence[str | None]) -> Any:
    left = iter(ids)
    return [{**block, "id": next(left)} if block.get("type") == "tool_use" else block for block in blocks]


def _current_signatures(message: ChatMessage, signatures: Any) -> Any:
    """There is an entry for each call and each text. An entry without a signature makes the generator send the part."""
    if not (isinstance(signatures, list) and all(isinstance(entry, dict) for entry in signatures)):
        return None
    signed = sum(bool(entry.get("has_function_call")) for entry in signatures)
    if signed > len(message.tool_calls):
        return None
    has_text = any(entry.get("has_text") and not entry.get("is_thought") for entry in signatures)
    text = [] if has_text or not (message.text or "").strip() else [{"has_text": True, "signature": None}]
    calls = [{"has_function_call": True, "signature": None} for _ in message.tool_calls[signed:]]
    return [*text, *signatures, *calls]


def _current_refusal(_: ChatMessage, refusal: Any) -> Any:
    """A refusal stands for itself. It may follow a text."""
    return refusal


def _unchanged(value: Any, _: Sequence[str | None]) -> Any:
    return value


#: What is sent back from the meta of a reply. A generator that keeps something else is a further entry.
_META_KEYS: dict[str, _MetaKey] = {
    _RAW_BLOCKS: _MetaKey(_current_raw_blocks, _raw_blocks_with_ids),
    _SIGNATURES: _MetaKey(_current_signatures, _unchanged),
    REFUSAL_KEY: _MetaKey(_current_refusal, _unchanged),
}

#: All keys of a message's meta that this module knows.
ALL_KEYS = REQUEST_KEYS | _META_KEYS.keys()
