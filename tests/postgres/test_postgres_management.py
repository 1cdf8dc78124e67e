# SPDX-License-Identifier: Apache-2.0
"""Managing conversations on PostgreSQL: what every store does."""

from datetime import datetime, timezone

import pytest
from breadth import ENGINE
from postgres_stores import OnPostgres, execute, on_the_newest, on_the_oldest, stores_on

from haystack_chat_store.testing import ManagementContract, RandomWalkTest
from haystack_chat_store.testing.messages import conversation


@on_the_newest
class TestNewest(OnPostgres, ManagementContract):
    breadth = ENGINE


class Walking(OnPostgres, RandomWalkTest):
    """What could depend on the server's version, on a pooler or on the tables."""

    walks = 10

    def test_statistics_count_what_was_written_today(self, new_store):
        first_day = datetime.now(timezone.utc).date()
        store = new_store()
        store.write_messages("history", conversation("uaua"))
        (day, count), *_ = store.statistics().messages_per_day.items()
        assert first_day <= day <= datetime.now(timezone.utc).date()
        assert count == 4


@on_the_oldest
class TestOldest(Walking):
    pass


@on_the_newest
class TestBehindPgBouncer(Walking):
    @pytest.fixture
    def make_store(self, pooler):
        with stores_on(pooler.url) as make:
            yield make


@on_the_newest
class TestPartitioned(Walking):
    @pytest.fixture
    def make_store(self, server):
        with stores_on(server.url) as make:
            execute(server.url, make().create_schema_sql(partitions=3))
            yield make
