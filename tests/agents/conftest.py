# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder take: stores, and the ways to run an agent."""

import pytest
from agent_programs import ENGINES, WAYS, databases
from agent_runs import FailingStore


@pytest.fixture
def failing_store(tmp_path, monkeypatch):
    monkeypatch.setattr(FailingStore, "failures", [])
    store = FailingStore(tmp_path / "h.db", last_k=None)
    yield store
    store.close()


@pytest.fixture(scope="module")
def make_store():
    with databases() as make:
        yield make


@pytest.fixture(params=ENGINES)
def store(request, make_store, tmp_path):
    return make_store(request.param, tmp_path)


@pytest.fixture(params=WAYS)
def run(request):
    return WAYS[request.param]
