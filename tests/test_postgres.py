# SPDX-License-Identifier: Apache-2.0
"""
The whole contract on PostgreSQL, and what is PostgreSQL's own.
"""

import pytest
from servers import PostgresServer, postgres_binaries

from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.testing import ChatMessageStoreContract


@pytest.fixture(scope="module", params=list(postgres_binaries()))
def server(request):
    with PostgresServer(postgres_binaries()[request.param]) as running:
        yield running


@pytest.fixture
def make_store(server, monkeypatch):
    monkeypatch.setenv("PG_CONN_STR", server.create_database())
    return PostgresChatMessageStore


class TestPostgresChatMessageStore(ChatMessageStoreContract):
    @pytest.fixture
    def make_store(self, server, monkeypatch):
        monkeypatch.setenv("PG_CONN_STR", server.create_database())
        return PostgresChatMessageStore
