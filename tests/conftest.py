# SPDX-License-Identifier: Apache-2.0
"""What all tests take: how many of them run, and servers that they share."""

import gc
import os
import shutil
import signal
import tempfile
from contextlib import ExitStack

# Before anything imports Haystack: tests send nothing anywhere.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

import pytest
from hypothesis import HealthCheck, settings
from servers import RUN_FOLDER, PostgresServer, RedisCluster, RedisServer, postgres_binaries, redis_binaries, require

from haystack_chat_store.testing import fork_server

# What a shell runs in the background ignores Ctrl-C, and so do its children. Some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the machine may be busy. The same goes for how long it takes to make an example.
settings.register_profile("dev", max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ---------------------------------------------------------------------- where files go

#: A folder in memory, where Linux has one, and how many bytes must be free in it.
IN_MEMORY, NEEDED_BYTES = "/dev/shm", 4 * 10**9
#: The folder of this run, which all its processes share.
FOLDER = pytest.StashKey[str]()


def use_memory_for_files(config):
    """Put files and folders of servers into memory, if there is room. On a disk, much of the time goes into flushes."""
    if os.path.isdir(IN_MEMORY) and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > NEEDED_BYTES:
        config.stash[FOLDER] = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="chat-store-tests-", dir=IN_MEMORY)
        os.environ[RUN_FOLDER] = config.stash[FOLDER]
        os.chmod(config.stash[FOLDER], 0o711)  # a server may run as another user
        tempfile.tempdir = None  # it is looked up again


def pytest_unconfigure(config):
    if FOLDER in config.stash:
        shutil.rmtree(config.stash[FOLDER], ignore_errors=True)


# ---------------------------------------------------------------------- how many tests run

#: How many tests do not run, by the words that say why.
LEFT_OUT = pytest.StashKey[dict[str, int]]()
#: The fixtures that need a server, in every test that takes them.
NEED_SERVERS = {"shared_server", "server", "pooler", "postgres", "redis_server", "redis_cluster", "cluster"}


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run all variants, with many examples (see tests/breadth.py)")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a further variant, which runs in the full suite only (pytest --full)")
    config.addinivalue_line("markers", "left_to(command): needs what only this command installs")
    config.addinivalue_line("markers", "servers: needs a server of PostgreSQL or Redis, which it starts")
    config.stash[LEFT_OUT] = {}
    fork_server.ENDS_AT_ONCE = not config.getoption("--full")
    if not (config.getoption("--full") or hasattr(config, "workerinput")):  # the full suite runs on a disk
        use_memory_for_files(config)
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("nightly" if config.getoption("--full") else "dev")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    from breadth import is_left_to_full

    seen = set()
    for item in items:
        if NEED_SERVERS.intersection(item.fixturenames):
            item.add_marker("servers")
        if is_left_to_full(item, seen):
            item.add_marker("full")
    is_full = config.getoption("--full") or "full" in config.option.markexpr
    left, kept = {}, []
    for item in items:
        if mark := item.get_closest_marker("left_to"):
            left.setdefault(f"to `{mark.args[0]}`", []).append(item)
        elif item.get_closest_marker("full") and not is_full:
            left.setdefault("to `nox -s full`, or `pytest --full`", []).append(item)
        else:
            kept.append(item)
    items[:] = kept
    for command, those in left.items():
        config.hook.pytest_deselected(items=those)
        config.stash[LEFT_OUT][command] = len(those)
    chosen_from = len(items)
    yield  # here the options -m and -k choose
    if chosen_from > len(items):
        config.stash[LEFT_OUT]["out by the options -m and -k"] = chosen_from - len(items)


def pytest_collection():
    # The collector would look at what was imported and collected again and again.
    gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config):
    for where, number in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"{number} tests are left {where}.")


@pytest.fixture
def is_full(request):
    """Whether the full suite runs."""
    return bool(request.config.getoption("--full"))


# ---------------------------------------------------------------------- servers


@pytest.fixture(scope="session")
def shared_server():
    """
    A function that returns a running server of a kind with its settings: the same one to all who ask in this process.

    It starts when the first asks, and ends with the process. Each process of pytest-xdist has its own: to start one
    takes about a second, and no test meets what another one does at the same moment. A test that stops its server,
    or leaves it changed, starts a private one instead. None of these tests looks at what a power cut would lose, so the
    shared servers wait for no disk.
    """
    with ExitStack() as stack:
        running = {}

        def shared(kind, *what, **settings):
            asked_for = (kind, what, tuple(settings.items()))
            if asked_for not in running:
                running[asked_for] = stack.enter_context(kind(*what, **settings))
            return running[asked_for]

        yield shared


@pytest.fixture(scope="session")
def postgres(shared_server):
    return shared_server(PostgresServer, require(postgres_binaries(), "PostgreSQL"), fsync="off", autovacuum="off")


@pytest.fixture(scope="session")
def redis_server(shared_server):
    return shared_server(RedisServer, require(redis_binaries(), "Redis"), appendfsync="no")


@pytest.fixture(scope="session")
def redis_cluster(shared_server):
    return shared_server(RedisCluster, require(redis_binaries(), "Redis"), appendfsync="no")
