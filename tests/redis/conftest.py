# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder take: a server, stores on it, and a client that knows nothing of them."""

import asyncio

import pytest
from haystack.dataclasses import ChatMessage
from redis_stores import CLUSTER, ENGINES, SEARCHING, stores_on
from servers import RedisCluster, RedisServer, require_query_engine


@pytest.fixture(scope="module")
def server(request, shared_server):
    if request.param == CLUSTER:
        return shared_server(RedisCluster, next(iter(ENGINES.values()), None), appendfsync="no")
    if request.param == SEARCHING:
        program, module = require_query_engine()
        return shared_server(RedisServer, program, appendfsync="no", loadmodule=module)
    return shared_server(RedisServer, ENGINES.get(request.param), appendfsync="no")


@pytest.fixture
def make_store(server):
    with stores_on(server) as make:
        yield make


@pytest.fixture
def store(make_store):
    return make_store(last_k=None)


@pytest.fixture
def client(server):
    """A client that knows nothing of our stores."""
    with server.client() as client:
        yield client


@pytest.fixture(params=["sync", "async"])
def write(request):
    def write(store, *said, history="history"):
        messages = [ChatMessage.from_user(text) for text in said]
        if request.param == "sync":
            return store.write_messages(history, messages)
        return asyncio.run(store.write_messages_async(history, messages))

    return write
