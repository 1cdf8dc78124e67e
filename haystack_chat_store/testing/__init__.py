# SPDX-License-Identifier: Apache-2.0
"""
A pytest kit that shows whether a chat message store keeps the contract. It needs `haystack-chat-store[testing]`.

Write a store of your own, say how one is made, and run pytest:

```python
import pytest
from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.testing import ChatMessageStoreContract, ConcurrencyTest, ProcessesTest

class TestMyStore(ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    @pytest.fixture
    def make_store(self, tmp_path):
        # settings: skip_system_messages, last_k, last_k_unit, namespace
        return lambda **settings: SQLiteChatMessageStore(tmp_path / "chat.db", **settings)
```

`make_store` is called several times within a test. All stores it makes lead to one database, empty when the test
begins. A store that does not outlive its process says so with the class attribute `durable = False`; what else an
engine can state is described in `ContractTest` and `ConcurrencyTest`. Each rule of the contract (see
`haystack_chat_store.types.ChatMessageStore`) is also a test class of its own, so that a store can be built up rule by
rule. What goes beyond the published protocol, the directory, pages, search and so on (rules 17 to 23), is in
`ManagementContract`. Tests with the parameter `sync` call the store's methods, those with `async` their asynchronous
twins.

Hypothesis makes the cases of some tests. Their number follows the profile that is loaded: one with `max_examples=20`
tries a fifth of what the default profile tries.

Samples and hypothesis strategies for tests of your own are in `haystack_chat_store.testing.messages`.
"""

import pytest

# So that a failing assertion shows its values. Has to come before the modules are imported.
_MODULES = (
    "concurrency",
    "contract_arguments",
    "contract_changes",
    "contract_content",
    "contract_directory",
    "contract_isolation",
    "contract_lifecycle",
    "contract_management",
    "contract_moving",
    "contract_random_walk",
    "contract_search",
    "contract_windows",
    "contract_writes",
    "kit",
    "messages",
    "processes",
)
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES))

# ruff: noqa: E402  (pytest rewrites only what is imported after it was registered)
from haystack_chat_store.testing.concurrency import ConcurrencyTest
from haystack_chat_store.testing.contract import ChatMessageStoreContract
from haystack_chat_store.testing.contract_arguments import Rule01SignaturesTest, Rule02ValidationTest, Rule15ErrorsTest
from haystack_chat_store.testing.contract_changes import Rule18PagesTest, Rule19ChangesTest, Rule20ForkingTest
from haystack_chat_store.testing.contract_content import Rule11LosslessTest
from haystack_chat_store.testing.contract_directory import Rule17DirectoryTest, Rule22ErasingTest
from haystack_chat_store.testing.contract_isolation import Rule09IsolationTest, Rule10NoAliasingTest
from haystack_chat_store.testing.contract_lifecycle import Rule13LifecycleTest, Rule14SerializationTest
from haystack_chat_store.testing.contract_management import ManagementContract
from haystack_chat_store.testing.contract_moving import Rule23MovingTest
from haystack_chat_store.testing.contract_random_walk import RandomWalkTest
from haystack_chat_store.testing.contract_search import Rule21SearchTest
from haystack_chat_store.testing.contract_windows import Rule07WindowsTest, Rule08CostTest
from haystack_chat_store.testing.contract_writes import (
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule05MessageIdsTest,
    Rule06IdempotentWritesTest,
)
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, only_where
from haystack_chat_store.testing.processes import ProcessesTest

__all__ = [
    "Calls",
    "ChatMessageStoreContract",
    "ClosableStore",
    "ConcurrencyTest",
    "ContractTest",
    "ManagementContract",
    "ProcessesTest",
    "RandomWalkTest",
    "Rule01SignaturesTest",
    "Rule02ValidationTest",
    "Rule03AtomicBatchesTest",
    "Rule04OrderTest",
    "Rule05MessageIdsTest",
    "Rule06IdempotentWritesTest",
    "Rule07WindowsTest",
    "Rule08CostTest",
    "Rule09IsolationTest",
    "Rule10NoAliasingTest",
    "Rule11LosslessTest",
    "Rule13LifecycleTest",
    "Rule14SerializationTest",
    "Rule15ErrorsTest",
    "Rule17DirectoryTest",
    "Rule18PagesTest",
    "Rule19ChangesTest",
    "Rule20ForkingTest",
    "Rule21SearchTest",
    "Rule22ErasingTest",
    "Rule23MovingTest",
    "StoreFactory",
    "only_where",
]
