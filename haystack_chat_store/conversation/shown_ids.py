# SPDX-License-Identifier: Apache-2.0
"""The ids of calls, reasoning and files that a model is shown: the same in each prompt, and none twice."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from haystack.dataclasses import ChatMessage, ReasoningContent, ToolCall

from haystack_chat_store.conversation import provider_content
from haystack_chat_store.ids import message_id_of

# `fc`, which OpenAI's Responses API wants, and seven letters and digits: Mistral takes exactly nine.
_CALL_ID_PREFIX = "fc"
_CALL_ID_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_CALL_ID_LENGTH = 7


class ShownIds:
    """The ids in one prompt. Ask for them in the order in which the messages are shown."""

    def __init__(self) -> None:
        """Begin a prompt."""
        self._call_ids: set[str] = set()
        self._reasoning_ids: set[str] = set()
        self._seeds: dict[str, int] = {}

    def mark_of_file(self, message: ChatMessage, number: int) -> str:
        """Return a text that only this file of a message has, and that is the same in each prompt."""
        seed = message_id_of(message)
        if seed is None:
            self._seeds[""] = number = self._seeds.get("", -1) + 1
        return _short_id(f"{seed} file {number}").removeprefix(_CALL_ID_PREFIX)

    def with_neutral_ids(self, reply: ChatMessage, content: Sequence[Any]) -> list[Any]:
        """Give the calls in the content of a reply ids that every provider takes."""
        number = -1
        shown = []
        for part in content:
            if isinstance(part, ToolCall):
                number += 1
                shown.append(provider_content.with_id(part, self._new_id(reply, number, part)))
            else:
                shown.append(part)
        return shown

    def with_unique_ids(self, reply: ChatMessage) -> ChatMessage:
        """Give ids to calls that have none, or one that was shown before. Leave out reasoning whose id was."""
        reasoning_ids = [
            str(part.extra.get("id") or "") for part in reply._content if isinstance(part, ReasoningContent)
        ]
        if any(each in self._reasoning_ids for each in reasoning_ids if each):
            reply = provider_content.without_provider_content(reply)
        self._reasoning_ids.update(each for each in reasoning_ids if each)
        ids: list[str] = []
        for number, call in enumerate(reply.tool_calls):
            is_usable = call.id and call.id not in self._call_ids
            ids.append(call.id if call.id and is_usable else self._new_id(reply, number, call))
            self._call_ids.add(ids[-1])
        if ids == [call.id for call in reply.tool_calls]:
            return reply
        if provider_content.is_bound_to_ids(reply):
            reply = provider_content.without_provider_content(reply)
            ids = [self._new_id(reply, number, call) for number, call in enumerate(reply.tool_calls)]
        return provider_content.with_call_ids(reply, ids)

    def _new_id(self, reply: ChatMessage, number: int, call: ToolCall) -> str:
        """
        Make an id of a call that is the same in each prompt, from the id of its message and its number there.

        Without an id of the message it is made from what the call says, and from the number of equal calls before it.
        """
        seed = message_id_of(reply)
        if seed is None:
            arguments = json.dumps(call.arguments, sort_keys=True, default=str)
            seed = f"{call.id} {call.tool_name} {arguments}"
            self._seeds[seed] = number = self._seeds.get(seed, -1) + 1
        while (new := _short_id(f"{seed} {number}")) in self._call_ids:
            seed = f"{seed} again"
        self._call_ids.add(new)
        return new


@lru_cache(maxsize=4096)
def _short_id(seed: str) -> str:
    digest = int.from_bytes(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest(), "big")
    letters = ""
    for _ in range(_CALL_ID_LENGTH):
        digest, letter = divmod(digest, len(_CALL_ID_LETTERS))
        letters += _CALL_ID_LETTERS[letter]
    return _CALL_ID_PREFIX + letters
