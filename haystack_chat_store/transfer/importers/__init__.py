# SPDX-License-Identifier: Apache-2.0
"""
Import chat histories from the files and databases of other programs.

A module for each program states where its messages are and how they are converted. A message's id consists of the
program's name and what tells the message from others there, so a repeated import adds nothing. Branches of a
conversation become histories of their own.
"""

import os
from collections.abc import Callable
from typing import Protocol

from typing_extensions import Self

from haystack_chat_store.transfer.histories import Faults, Histories
from haystack_chat_store.transfer.importers import (
    chatgpt,
    claude,
    langchain,
    llama_index,
    openai_agents,
    openai_messages,
)
from haystack_chat_store.transfer.importers.database import ForeignDatabase
from haystack_chat_store.transfer.importers.json_files import JsonFile
from haystack_chat_store.transfer.importers.llm import LlmDatabase


class Source(Protocol):
    """Conversations of another program, in a file that is only read."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def message_count(self) -> int | None:
        """Return the number of messages, or `None` if it is not known before they are converted."""
        ...

    def histories(self, faults: Faults) -> Histories:
        """Yield each conversation as a history. `faults` receives what is left out."""
        ...


def _llama_index(file: "str | os.PathLike[str]") -> Source:
    with open(file, "rb") as stream:
        is_json = stream.read(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b'"')
    return JsonFile(file, llama_index.JSON_LAYOUT) if is_json else ForeignDatabase(file, llama_index.LAYOUT)


_SOURCES: "dict[str, Callable[[str | os.PathLike[str]], Source]]" = {
    "openai": lambda file: JsonFile(file, openai_messages.LAYOUT),
    "chatgpt": lambda file: JsonFile(file, chatgpt.LAYOUT),
    "claude": lambda file: JsonFile(file, claude.LAYOUT),
    "llm": LlmDatabase,
    "openai-agents": lambda file: openai_agents.AgentsDatabase(file, openai_agents.LAYOUT),
    "langchain": lambda file: ForeignDatabase(file, langchain.LAYOUT),
    "llama-index": _llama_index,
}


def open_source(program: str, file: "str | os.PathLike[str]") -> Source:
    """
    Open a file of another program for reading only.

    :param program: The program's name, such as `"langchain"`.
    :param file: The path of the file.
    :raises DamagedFileError: If the file is not of this program.
    :raises OSError: If the file cannot be read.
    """
    return _SOURCES[program](file)
