# SPDX-License-Identifier: Apache-2.0
"""
Chat histories out of the databases of other libraries.

Each library has a module that says where its messages are and what becomes of them. The ids of messages are made of the
library's name and the key of their row, so that importing again adds nothing.
"""

import os

from haystack_chat_store.transfer.importers import langchain, llama_index, openai_agents
from haystack_chat_store.transfer.importers.database import ForeignDatabase

_LAYOUTS = {layout.library: layout for layout in (openai_agents.LAYOUT, langchain.LAYOUT, llama_index.LAYOUT)}


def opened(library: str, file: "str | os.PathLike[str]") -> ForeignDatabase:
    """
    Open a library's database, for reading only.

    :param library: Its name as a format.
    :raises DamagedFileError: If it is not one.
    :raises OSError: If it cannot be read.
    """
    return ForeignDatabase(file, _LAYOUTS[library])
