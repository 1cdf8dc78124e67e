# SPDX-License-Identifier: Apache-2.0
"""Changed copies of messages and their parts."""

from typing import TypeVar

from haystack.dataclasses import ChatMessage, FileContent, ImageContent, ToolCall, ToolCallResult

_Copied = TypeVar("_Copied", ChatMessage, ToolCall, ToolCallResult, ImageContent, FileContent)


def changed(original: _Copied, **fields: object) -> _Copied:
    """
    Do what `dataclasses.replace` does, without calling the constructor.

    The constructor would repeat validation that was done when the original was created, and takes several times as long
    as the copy. A model is shown dozens of copies in each turn.

    :param original: A message or a part of one. It is not changed.
    :param fields: The names of fields, and their new values.
    """
    copied = object.__new__(type(original))
    object.__setattr__(copied, "__dict__", {**vars(original), **fields})
    return copied
