# SPDX-License-Identifier: Apache-2.0
"""
The example of a store of one's own keeps the contract, apart from what it says it does not: it is for one process.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
from breadth import ONCE

from haystack_chat_store.testing import ChatMessageStoreContract

_path = Path(__file__).parent.parent / "examples" / "own_store.py"
_spec = importlib.util.spec_from_file_location("own_store", _path)
own_store = sys.modules["own_store"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(own_store)


class TestFolderChatMessageStore(ChatMessageStoreContract):
    breadth = ONCE

    @pytest.fixture
    def make_store(self, tmp_path):
        return lambda **settings: own_store.FolderChatMessageStore(str(tmp_path), **settings)
