# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL keeps the contract, also behind PgBouncer and in partitions."""

import pytest
from breadth import ENGINE, VARIANT
from postgres_stores import OnPostgres, execute, on_the_newest, on_the_oldest, stores_on

from haystack_chat_store.testing import (
    ChatMessageStoreContract,
    ConcurrencyTest,
    ProcessesTest,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule13LifecycleTest,
    Rule19ChangesTest,
)


@on_the_newest
class TestNewest(OnPostgres, ChatMessageStoreContract, ConcurrencyTest, ProcessesTest):
    breadth = ENGINE


class Writing(
    OnPostgres,
    Rule03AtomicBatchesTest,
    Rule04OrderTest,
    Rule06IdempotentWritesTest,
    Rule13LifecycleTest,
    Rule19ChangesTest,
):
    """What could depend on the tables."""

    breadth = VARIANT


class PartOfTheContract(Writing, ConcurrencyTest):
    """What could depend on the server's version, or on a pooler."""


@on_the_oldest
class TestOldest(PartOfTheContract):
    pass


@on_the_newest
class TestBehindPgBouncer(PartOfTheContract):
    @pytest.fixture
    def make_store(self, pooler):
        with stores_on(pooler.url) as make:
            yield make


@on_the_newest
class TestPartitioned(Writing):
    @pytest.fixture
    def make_store(self, server):
        with stores_on(server.url) as make:
            execute(server.url, make().create_schema_sql(partitions=3))
            yield make
