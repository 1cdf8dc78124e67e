# SPDX-License-Identifier: Apache-2.0
"""
Import chat histories from the databases of other libraries.

A module for each library states where its messages are and how they are converted. A message's id consists of the
library's name and the key of its row, so a repeated import adds nothing.
"""

import os

from haystack_chat_store.transfer.importers import langchain, llama_index, openai_agents
from haystack_chat_store.transfer.importers.database import ForeignDatabase

_LAYOUTS = {layout.library: layout for layout in (openai_agents.LAYOUT, langchain.LAYOUT, llama_index.LAYOUT)}


def open_database(library: str, file: "str | os.PathLike[str]") -> ForeignDatabase:
    """
    Open a library's database for reading only.

    :param library: The library's name, such as `"langchain"`.
    :param file: The path of the database.
    :raises DamagedFileError: If the file is not a database of this library.
    :raises OSError: If the file cannot be read.
    """
    return ForeignDatabase(file, _LAYOUTS[library])
