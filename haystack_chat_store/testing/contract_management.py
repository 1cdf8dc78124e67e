# SPDX-License-Identifier: Apache-2.0
"""All rules about managing conversations in one class."""

from haystack_chat_store.testing.contract_changes import Rule18PagesTest, Rule19ChangesTest, Rule20ForkingTest
from haystack_chat_store.testing.contract_directory import Rule17DirectoryTest, Rule22ErasingTest
from haystack_chat_store.testing.contract_moving import Rule23MovingTest
from haystack_chat_store.testing.contract_random_walk import RandomWalkTest
from haystack_chat_store.testing.contract_reading import Rule24ReadingTest
from haystack_chat_store.testing.contract_replacing import Rule27ReplacingTest
from haystack_chat_store.testing.contract_search import Rule21SearchTest


class ManagementContract(
    Rule17DirectoryTest,
    Rule18PagesTest,
    Rule19ChangesTest,
    Rule20ForkingTest,
    Rule21SearchTest,
    Rule22ErasingTest,
    Rule23MovingTest,
    Rule27ReplacingTest,
    Rule24ReadingTest,
    RandomWalkTest,
):
    """
    The rules beyond the published protocol, for stores whose engine has all operations.

    Subclass it like `ChatMessageStoreContract`. Set `searches = False` if the engine cannot search.
    """
