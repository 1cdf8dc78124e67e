# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder take: a way to run commands, and databases of every engine."""

import json

import pytest

from haystack_chat_store import store_from_url
from haystack_chat_store.cli import main


@pytest.fixture(autouse=True)
def as_started_anew(monkeypatch):
    """The environment of a new shell."""
    for name in ("HAYSTACK_CHAT_STORE_URL", "FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys):
    """Run a command in this process; returns its exit status, its output, and what it said on the other output."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def run_json(run):
    """Run a command with `--json`; returns its objects."""

    def run_json(*arguments, status=0):
        code, out, err = run(*arguments, "--json")
        assert code == status, err
        assert out.isascii()
        return [json.loads(line) for line in out.splitlines()]

    return run_json


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.db"


@pytest.fixture
def url(path):
    return f"sqlite:///{path}"


SERVERS = ["postgres", "redis_server", "redis_cluster"]


@pytest.fixture(params=["sqlite", *(pytest.param(server, marks=pytest.mark.servers) for server in SERVERS)])
def any_url(request):
    """The URL of an empty database of each engine."""
    if request.param == "sqlite":
        return request.getfixturevalue("url")
    server = request.getfixturevalue(request.param)
    if request.param == "postgres":
        return server.create_database()
    store = store_from_url(server.url)
    store.delete_all_messages()
    store.close()
    return server.url
