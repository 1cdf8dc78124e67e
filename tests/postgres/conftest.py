# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder take: a server, a pooler before it, and stores on it."""

import pytest
from postgres_stores import BEHIND_PGBOUNCER, ENGINES, NEWEST, stores_on
from servers import PgBouncer, PostgresServer

from haystack_chat_store.testing.kit import Calls


def pytest_generate_tests(metafunc):
    """A module that has `VERSIONS` or `WAYS` runs its tests on these servers, or on these ways to a server."""
    for fixture, wanted in (("server", "VERSIONS"), ("url", "WAYS")):
        if fixture in metafunc.fixturenames and hasattr(metafunc.module, wanted):
            metafunc.parametrize(fixture, getattr(metafunc.module, wanted), indirect=True)


@pytest.fixture(scope="module")
def server(request, shared_server):
    # What the machine's own crash would lose, these tests do not look at.
    engine = getattr(request, "param", NEWEST)
    return shared_server(PostgresServer, ENGINES.get(engine), fsync="off", autovacuum="off")


@pytest.fixture(scope="module")
def pooler(server, shared_server):
    return shared_server(PgBouncer, server)


@pytest.fixture
def url(request, server):
    is_pooled = getattr(request, "param", None) == BEHIND_PGBOUNCER
    return request.getfixturevalue("pooler").url if is_pooled else server.url


@pytest.fixture
def make_store(url):
    with stores_on(url, last_k=None) as make:
        yield make


@pytest.fixture
def store(make_store):
    return make_store()


@pytest.fixture
def database(server):
    """The URL of an empty database."""
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture(params=["sync", "async"])
def calls(request):
    calls = Calls(is_async=request.param == "async")
    yield calls
    calls.end()
