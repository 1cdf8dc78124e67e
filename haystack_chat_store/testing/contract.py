# SPDX-License-Identifier: Apache-2.0
"""The rules of the contract in one class."""

from haystack_chat_store.testing.contract_arguments import Rule01SignaturesTest, Rule02ValidationTest, Rule15ErrorsTest
from haystack_chat_store.testing.contract_content import Rule11LosslessTest
from haystack_chat_store.testing.contract_isolation import Rule09IsolationTest, Rule10NoAliasingTest
from haystack_chat_store.testing.contract_lifecycle import Rule13LifecycleTest, Rule14SerializationTest
from haystack_chat_store.testing.contract_turns import Rule26TurnsTest
from haystack_chat_store.testing.contract_windows import Rule07WindowsTest, Rule08CostTest
from haystack_chat_store.testing.contract_writes import (
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule05MessageIdsTest,
    Rule06IdempotentWritesTest,
)


class ChatMessageStoreContract(
    Rule01SignaturesTest,
    Rule02ValidationTest,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule05MessageIdsTest,
    Rule06IdempotentWritesTest,
    Rule07WindowsTest,
    Rule08CostTest,
    Rule09IsolationTest,
    Rule10NoAliasingTest,
    Rule11LosslessTest,
    Rule13LifecycleTest,
    Rule14SerializationTest,
    Rule15ErrorsTest,
    Rule26TurnsTest,
):
    """
    All rules of the contract that one thread can check. Subclass it and override the fixture `make_store`.

    ```python
    import pytest
    from haystack_chat_store import SQLiteChatMessageStore
    from haystack_chat_store.testing import ChatMessageStoreContract

    class TestMyStore(ChatMessageStoreContract):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda **settings: SQLiteChatMessageStore(tmp_path / "chat.db", **settings)
    ```

    `ConcurrencyTest` and `ProcessesTest` check the rules for several threads, event loops and processes.
    """
