# SPDX-License-Identifier: Apache-2.0
"""Redis, Valkey and Redis Cluster keep the contract."""

import pytest
from breadth import ENGINE, ONCE, VARIANT
from haystack.utils import Secret
from redis_stores import OnRedis, on_a_cluster, on_one_server, on_the_other_servers
from servers import HOST, PASSWORD, unused_port

from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.testing import (
    ChatMessageStoreContract,
    ConcurrencyTest,
    ProcessesTest,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule07WindowsTest,
    Rule13LifecycleTest,
)


@on_one_server
class TestServer(OnRedis, ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    breadth = ENGINE


@on_the_other_servers
class TestOtherServers(
    OnRedis,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule07WindowsTest,
    Rule13LifecycleTest,
):
    """What could depend on the server's make and version."""

    breadth = VARIANT


@on_a_cluster
class TestCluster(OnRedis, ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    breadth = ONCE

    @pytest.fixture
    def make_unreachable_store(self, monkeypatch):
        def make(**settings):
            monkeypatch.setenv("NO_SERVER", f"redis://:{PASSWORD}@{HOST}:{unused_port()}")
            return RedisChatMessageStore(Secret.from_env_var("NO_SERVER"), cluster=True, **settings)

        return make
