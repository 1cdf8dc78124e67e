# SPDX-License-Identifier: Apache-2.0
"""
What a model says, before a provider puts it into its own form, and the seals by which a request shows where it is from.

A seal stands for whatever a provider signs or encrypts: signatures of thoughts, encrypted reasoning, contents of search
results. It names the provider and the model that made it and the text that it belongs to.
"""

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from haystack.dataclasses import ComponentInfo
from haystack.utils import Secret

_MARK = "sealed"
#: How every seal begins.
SEAL_START = base64.b64encode(b"sealed").decode()

# What the generators are given that receive the replies.
KEY = Secret.from_token("no key")
INFO = ComponentInfo(type="generator", name="generator")


class Seal(NamedTuple):
    provider: str
    model: str
    checksum: str


def seal(provider: str, model: str, text: str, padding: int = 0) -> str:
    """Return what a provider would sign or encrypt a text to: base64 that only it understands."""
    words = "|".join((_MARK, provider, model, str(zlib.crc32(text.encode())), "=" * padding))
    return base64.b64encode(words.encode()).decode()


def opened(value: object) -> Seal | None:
    """Return what a seal says, or `None` if the value is none."""
    if isinstance(value, bytes):
        words = value
    elif isinstance(value, str) and value.startswith(SEAL_START):
        words = base64.b64decode(value)
    else:
        return None
    parts = words.decode(errors="replace").split("|")
    return Seal(*parts[1:4]) if parts[0] == _MARK else None


def checksum(text: str) -> str:
    return str(zlib.crc32(text.encode()))


@dataclass(frozen=True)
class Call:
    """A call of a tool. From its key follows its result, so a result under another call's arguments is found."""

    tool: str
    key: str

    @property
    def arguments(self) -> dict[str, str]:
        return {"key": self.key}

    @property
    def value(self) -> str:
        return value_of(self.key)


def value_of(key: str) -> str:
    return f"value of {key}."


@dataclass(frozen=True)
class Reply:
    """
    One answer of a model.

    :param number: Unique in a conversation. Ids are made of it.
    :param ends: `"stop"`, `"tool_calls"`, `"length"`, `"content_filter"`, `"refusal"`, or `"pause"`, for a server tool
        that takes long.
    :param searches: Whether the provider's own web search ran.
    :param continues: Whether the reply before it was paused.
    """

    number: int
    text: str = ""
    thinking: str = ""
    calls: tuple[Call, ...] = ()
    ends: str = "stop"
    searches: bool = False
    continues: bool = False
    cites: bool = False
    streamed: bool = False
    has_ids: bool = True

    @property
    def finish_reason(self) -> str:
        return {"refusal": "stop", "pause": "stop"}.get(self.ends, self.ends)


def pieces(text: str) -> Iterator[str]:
    """Cut a text as a stream does."""
    size = max(len(text) // 3, 6)
    return (text[at : at + size] for at in range(0, len(text), size))


def ignore(chunk: Any) -> None:
    """Take a piece of a streamed reply."""
