# SPDX-License-Identifier: Apache-2.0
"""All rules about managing conversations in one class."""

from typing import Any

from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.testing.contract_branches import Rule17BranchesTest
from haystack_chat_store.testing.contract_changes import Rule18PagesTest, Rule19ChangesTest, Rule20ForkingTest
from haystack_chat_store.testing.contract_directory import Rule17DirectoryTest, Rule22ErasingTest
from haystack_chat_store.testing.contract_moving import Rule23MovingTest
from haystack_chat_store.testing.contract_random_walk import RandomWalkTest
from haystack_chat_store.testing.contract_reading import Rule24ReadingTest
from haystack_chat_store.testing.contract_replacing import Rule27ReplacingTest
from haystack_chat_store.testing.contract_search import Rule21SearchTest
from haystack_chat_store.testing.contract_sidebar import Rule17SidebarTest
from haystack_chat_store.testing.contract_transcripts import Rule29TranscriptsTest
from haystack_chat_store.testing.contract_users import Rule25UsersTest
from haystack_chat_store.testing.kit import ClosableStore


class ManagementContract(
    Rule17DirectoryTest,
    Rule17BranchesTest,
    Rule17SidebarTest,
    Rule18PagesTest,
    Rule19ChangesTest,
    Rule20ForkingTest,
    Rule21SearchTest,
    Rule22ErasingTest,
    Rule23MovingTest,
    Rule27ReplacingTest,
    Rule24ReadingTest,
    Rule25UsersTest,
    Rule29TranscriptsTest,
    RandomWalkTest,
):
    """
    The rules beyond the published protocol.

    Subclass it like `ChatMessageStoreContract`. Set `lacks` if the engine does not have all operations, and
    `searches = False` if no store can be made with `search=True`.
    """

    def test_what_the_engine_lacks_it_does_not_have(self, store: ClosableStore) -> None:
        engine: Any = getattr(store, "engine", None)
        has = [name for name in self.lacks if getattr(type(engine), name, None) is not getattr(Engine, name, None)]
        assert not has, f"`lacks` names operations that {type(engine).__name__} has, or that no engine has: {has}"
        assert all(hasattr(Engine, name) for name in self.lacks)
