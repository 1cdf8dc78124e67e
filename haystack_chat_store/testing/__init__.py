# SPDX-License-Identifier: Apache-2.0
"""
A pytest kit that checks whether a chat message store follows the contract. It needs `haystack-chat-store[testing]`.

Write a store, provide a fixture that makes one, and run pytest:

```python
import pytest
from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.testing import ChatMessageStoreContract, ConcurrencyTest, ProcessesTest

class TestMyStore(ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    @pytest.fixture
    def make_store(self, tmp_path):
        # settings: skip_system_messages, last_k, last_k_unit, namespace, search, strict, user_id, ttl,
        # renew_ttl_on_read
        return lambda **settings: SQLiteChatMessageStore(tmp_path / "chat.db", **settings)
```

A test may call `make_store` several times. All its stores use one database, which is empty when the test begins. For a
store whose histories do not outlive the process, set the class attribute `durable = False`. Override the fixture
`make_unreachable_store`, too, to check how the store reports an engine that does not answer. `ContractTest` and
`ConcurrencyTest` describe the other attributes: `lacks` names the optional operations that an engine does not have, so
that the tests that come to them are skipped. Each rule of the contract (see
`haystack_chat_store.types.ChatMessageStore`) is also a separate test class, so a store can be built rule by rule.
`ManagementContract` has the rules beyond the published protocol (17 to 25, and 27): the directory, pages, search and so
on. Override the fixture `database_state`, too, to check that calls that read change nothing.
Tests with the parameter `sync` call the store's methods, and tests with `async` call their asynchronous twins.

Hypothesis makes the cases of some tests. Their number follows the loaded profile: one with `max_examples=20` tries a
fifth of what the default profile tries.

`haystack_chat_store.testing.messages` has sample messages and hypothesis strategies for your own tests.
"""

import pytest

# Makes failing assertions show their values. It must run before the modules are imported.
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
    "contract_replacing",
    "contract_reading",
    "contract_search",
    "contract_transcripts",
    "contract_sidebar",
    "contract_turns",
    "contract_users",
    "contract_windows",
    "contract_writes",
    "kit",
    "messages",
    "processes",
)
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES))

# ruff: noqa: E402  (pytest rewrites only modules that are imported after the registration)
from haystack_chat_store.testing.concurrency import ConcurrencyTest
from haystack_chat_store.testing.contract import ChatMessageStoreContract
from haystack_chat_store.testing.contract_arguments import Rule01SignaturesTest, Rule02ValidationTest, Rule15ErrorsTest
from haystack_chat_store.testing.contract_branches import Rule17BranchesTest
from haystack_chat_store.testing.contract_changes import Rule18PagesTest, Rule19ChangesTest, Rule20ForkingTest
from haystack_chat_store.testing.contract_content import Rule11LosslessTest
from haystack_chat_store.testing.contract_directory import Rule17DirectoryTest, Rule22ErasingTest
from haystack_chat_store.testing.contract_isolation import Rule09IsolationTest, Rule10NoAliasingTest
from haystack_chat_store.testing.contract_lifecycle import Rule13LifecycleTest, Rule14SerializationTest
from haystack_chat_store.testing.contract_management import ManagementContract
from haystack_chat_store.testing.contract_moving import Rule23MovingTest
from haystack_chat_store.testing.contract_random_walk import RandomWalkTest
from haystack_chat_store.testing.contract_reading import Rule24ReadingTest
from haystack_chat_store.testing.contract_replacing import Rule27ReplacingTest
from haystack_chat_store.testing.contract_search import Rule21SearchTest
from haystack_chat_store.testing.contract_sidebar import Rule17SidebarTest
from haystack_chat_store.testing.contract_transcripts import Rule29TranscriptsTest
from haystack_chat_store.testing.contract_turns import Rule26TurnsTest
from haystack_chat_store.testing.contract_users import Rule25UsersTest
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
    "Rule17BranchesTest",
    "Rule17DirectoryTest",
    "Rule17SidebarTest",
    "Rule18PagesTest",
    "Rule19ChangesTest",
    "Rule20ForkingTest",
    "Rule21SearchTest",
    "Rule22ErasingTest",
    "Rule23MovingTest",
    "Rule24ReadingTest",
    "Rule25UsersTest",
    "Rule26TurnsTest",
    "Rule27ReplacingTest",
    "Rule29TranscriptsTest",
    "StoreFactory",
    "only_where",
]
