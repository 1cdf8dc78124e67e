# SPDX-License-Identifier: Apache-2.0
"""
The rules about managing conversations in one class.
"""

from haystack_chat_store.testing.contract_changes import Rule18PagesTest, Rule19ChangesTest, Rule20ForkingTest
from haystack_chat_store.testing.contract_directory import Rule17DirectoryTest, Rule22ErasingTest
from haystack_chat_store.testing.contract_moving import Rule23MovingTest
from haystack_chat_store.testing.contract_random_walk import RandomWalkTest
from haystack_chat_store.testing.contract_search import Rule21SearchTest


class ManagementContract(
    Rule17DirectoryTest,
    Rule18PagesTest,
    Rule19ChangesTest,
    Rule20ForkingTest,
    Rule21SearchTest,
    Rule22ErasingTest,
    Rule23MovingTest,
    RandomWalkTest,
):
    """
    What stores promise beyond the published protocol, for those that have all operations of `Operations`.

    Subclass it like `ChatMessageStoreContract`. Where an engine cannot search, say `searches = False`.
    """
