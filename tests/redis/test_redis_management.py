# SPDX-License-Identifier: Apache-2.0
"""Managing conversations on Redis, Valkey and Redis Cluster. `test_redis_search` has search."""

from breadth import ENGINE, ONCE
from redis_stores import OnRedis, on_a_cluster, on_one_server, on_the_other_servers

from haystack_chat_store.testing import ManagementContract, RandomWalkTest


@on_one_server
class TestServer(OnRedis, ManagementContract):
    breadth = ENGINE
    searches = False


@on_the_other_servers
class TestOtherServers(OnRedis, RandomWalkTest):
    searches = False
    walks = 10


@on_a_cluster
class TestCluster(OnRedis, ManagementContract):
    breadth = ONCE
    searches = False
