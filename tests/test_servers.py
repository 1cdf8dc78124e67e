# SPDX-License-Identifier: Apache-2.0
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import psycopg
import pytest
import redis
from servers import (
    HOST,
    PASSWORD,
    PgBouncer,
    PostgresServer,
    RedisCluster,
    RedisServer,
    postgres_binaries,
    redis_binaries,
    require,
    silent_port,
    unused_port,
    wait_until,
)


def each_of(binaries):
    """A fixture's parameters: every program found here; without any, the server itself says what is missing."""
    found = binaries or {"none": None}
    programs = [
        pytest.param(each, marks=[pytest.mark.full] * (number > 0)) for number, each in enumerate(found.values())
    ]
    return {"scope": "module", "params": programs, "ids": found.keys()}


@pytest.fixture(**each_of(postgres_binaries()))
def postgres(request):
    with PostgresServer(request.param, max_connections=7) as server:
        yield server


@pytest.fixture(**each_of(redis_binaries()))
def redis_server(request):
    with RedisServer(request.param) as server:
        yield server


def listens(port):
    with suppress(ConnectionRefusedError), socket.create_connection((HOST, port)):
        return True
    return False


@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_postgresql_cuts_its_connections_and_keeps_what_it_acknowledged(postgres, ending):
    database = postgres.create_database()
    postgres.execute("CREATE TABLE numbers AS SELECT 41 AS number", url=database)
    with closing(psycopg.connect(database, autocommit=True)) as connection:
        connection.execute("UPDATE numbers SET number = 42")
        getattr(postgres, ending)()
        assert not listens(postgres.port)
        postgres.start()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert postgres.execute("SELECT number FROM numbers", url=database) == [(42,)]


def test_postgresql_gives_each_test_an_empty_database(postgres):
    for database in (postgres.create_database(), postgres.create_database()):
        postgres.execute("CREATE TABLE numbers (number int)", url=database)
    with closing(psycopg.connect(database)):
        postgres.drop_database(database)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        postgres.execute("SELECT 1", url=database)


def test_postgresql_wants_the_password(postgres):
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres.url.replace(PASSWORD, "guessed"))


def test_postgresql_takes_settings_and_tells_its_version(postgres):
    assert postgres.execute("SHOW max_connections") == [("7",)]
    assert postgres.execute("SHOW fsync") == [("on",)]
    assert f"PostgreSQL {postgres.version}" in postgres.execute("SELECT version()")[0][0]


@pytest.mark.servers
def test_pgbouncer_gives_two_clients_one_connection_by_turns():
    with PostgresServer() as postgres, PgBouncer(postgres, pool_size=1) as server:
        database = server.create_database()
        with closing(psycopg.connect(database, autocommit=True)) as one, closing(psycopg.connect(database)) as other:
            backends = {connection.execute("SELECT pg_backend_pid()").fetchone() for connection in (one, other)}
        assert len(backends) == 1


@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_redis_cuts_its_connections_and_keeps_what_it_acknowledged(redis_server, ending):
    with redis_server.client() as client:
        client.set("number", 42)
        getattr(redis_server, ending)()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        redis_server.start()
        assert client.get("number") == b"42"


def test_redis_wants_the_password(redis_server):
    with redis.Redis.from_url(redis_server.url.replace(PASSWORD, "guessed")) as client:
        with pytest.raises(redis.AuthenticationError):
            client.ping()


def test_redis_tells_what_it_is(redis_server):
    printed = subprocess.run([redis_server.binary, "--version"], check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"{'Valkey' if redis_server.is_valkey else 'Redis'} server v={redis_server.version} ")


@pytest.mark.servers
def test_redis_forgets_on_restart_when_told_so():
    with RedisServer(appendonly="no") as server, server.client() as client:
        client.set("number", 42)
        server.restart()
        assert client.get("number") is None


@pytest.mark.full
def test_a_redis_cluster_spreads_its_keys_and_survives_a_failover_and_a_crash(redis_server):
    names = [f"key {i}" for i in range(100)]
    with RedisCluster(redis_server.binary, replicas=1) as cluster, cluster.client() as client, ExitStack() as stack:
        for name in names:
            client.set(name, name)
        for node in cluster.nodes:
            with node.client() as single:
                assert single.dbsize() > 0

        cluster.failover(0)
        cluster.failover(0)
        cluster.nodes[1].kill()
        cluster.wait_until_ok()
        cluster.start_node(1)

        def open_connections():
            return sum(len(single.client_list(_type="normal")) for single in singles)

        singles = [stack.enter_context(node.client()) for node in cluster.nodes]
        before = open_connections()
        with cluster.client(asked=2) as fresh:
            assert [fresh.get(name).decode() for name in names] == names
            assert open_connections() > before
        wait_until(lambda: open_connections() == before, "the client's connections to be closed")


@pytest.mark.servers
def test_a_redis_cluster_is_whole_again_when_a_stopped_node_starts():
    with RedisCluster() as cluster:
        cluster.stop_node(0)
        assert not listens(cluster.nodes[0].port)
        cluster.start_node(0)
        with cluster.client() as client:
            assert client.set("name", "value")


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
@pytest.mark.servers
def test_a_server_that_does_not_start_says_why_and_leaves_nothing(kind):
    server = kind(no_such_setting="1")
    with pytest.raises(RuntimeError, match=r"no.such.setting"), server:
        pass
    assert not server.folder.exists()


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
@pytest.mark.servers
def test_an_error_in_a_test_leaves_nothing(kind):
    with pytest.raises(ZeroDivisionError), kind() as server:
        raise ZeroDivisionError
    assert not server.folder.exists()
    assert not listens(server.port)


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        ("RedisServer", signal.SIGINT),
        ("RedisServer", signal.SIGTERM),
        ("RedisServer", signal.SIGKILL),
        ("PostgresServer", signal.SIGKILL),
    ],
)
@pytest.mark.servers
def test_the_end_of_the_test_process_leaves_nothing(kind, by):
    script = f"""
import servers, time
with servers.{kind}() as server:
    print(server.port, server.folder, flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE) as process:
        port, folder = process.stdout.readline().decode().split()
        assert listens(int(port))
        process.send_signal(by)
    wait_until(lambda: not listens(int(port)), "the server to end")
    wait_until(lambda: not Path(folder).exists(), "its folder to go")


def test_nobody_listens_on_an_unused_port():
    port = unused_port()
    assert port != unused_port()
    assert not listens(port)


def test_a_silent_port_accepts_and_never_answers():
    with silent_port() as port, socket.create_connection((HOST, port), timeout=0.2) as connection:
        connection.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_what_is_missing_skips_a_test_but_fails_in_continuous_integration(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt install pgbouncer"):
        require({}, "PgBouncer")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt install pgbouncer"):
        require({}, "PgBouncer")
    assert require({"first": Path("a"), "second": Path("b")}, "PgBouncer") == Path("a")
