# SPDX-License-Identifier: Apache-2.0
"""
The engines that are compared. To add one, write how to open and empty its store and its floor, and add it to
`EMBEDDED` or, if it needs a server, to `SERVERS`.
"""

import os
import sqlite3
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import redis
from floors import PostgresFloor, RedisFloor, SQLiteFloor
from haystack.utils import Secret
from haystack_experimental.chat_message_stores.in_memory import InMemoryChatMessageStore as ExperimentalStore
from measuring import LOOP
from psycopg import sql

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.stores.sqlite.connections import Durability

# The tests have the code that starts private servers.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
import servers

SYNC, ASYNC = "", "_async"


class Engine(NamedTuple):
    """
    A store, its floor, and its targets.

    :param key: The name for `--engines`.
    :param open_store: Opens the store in a separate folder, and removes its data at the end of the block.
    :param open_floor: Opens the floor, which takes encoded texts instead of messages.
    :param forms: The endings of the names of the methods to measure.
    :param stored_bytes: Returns the size of the stored data. `None` measures the memory of Python.
    :param limits: The longest time of "append" and "read", as a multiple of the floor's. `None` for no target.
    :param max_size: The longest history to measure.
    :param server: The server's name and version.
    """

    key: str
    name: str
    open_store: Callable[[Path], AbstractContextManager[Any]]
    open_floor: Callable[[Path], AbstractContextManager[Any]] | None = None
    floor_name: str = ""
    forms: tuple[str, ...] = (SYNC,)
    stored_bytes: Callable[[Any], int] | None = None
    limits: dict[str, float] | None = None
    max_size: int | None = None
    server: str = ""

    def row(self, form: str) -> str:
        return _named(self.name, form)

    def floor_row(self, form: str) -> str:
        return _named(self.floor_name, form)


def _named(name: str, form: str) -> str:
    return name + form.replace("_", ", ")


@contextmanager
def _in_memory(folder: Path) -> Iterator[InMemoryChatMessageStore]:
    store = InMemoryChatMessageStore(namespace=folder.name)
    yield store
    store.delete_all_messages()


@contextmanager
def _experimental(_folder: Path) -> Iterator[ExperimentalStore]:
    store = ExperimentalStore()
    yield store
    store.delete_all_messages()


def _sqlite(durability: Durability, limits: dict[str, float] | None = None) -> Engine:
    return Engine(
        key=f"sqlite-{durability}",
        name=f"SQLiteChatMessageStore, {durability}",
        open_store=lambda folder: closing(SQLiteChatMessageStore(folder / "store.db", durability=durability)),
        open_floor=lambda folder: closing(SQLiteFloor(folder / "floor.db", durability)),
        floor_name=f"floor: raw sqlite3, {durability}",
        stored_bytes=_bytes_in_file,
        limits=limits,
    )


def _bytes_in_file(store: SQLiteChatMessageStore) -> int:
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return os.path.getsize(store.path)


def _postgres(url: str) -> Engine:
    @contextmanager
    def schema() -> Iterator[str]:
        name = f"benchmark_{uuid.uuid4().hex}"
        _execute(url, "CREATE SCHEMA {}", name)
        try:
            yield name
        finally:
            _execute(url, "DROP SCHEMA {} CASCADE", name)

    @contextmanager
    def open_store(_folder: Path) -> Iterator[PostgresChatMessageStore]:
        with schema() as name, _closing(PostgresChatMessageStore(Secret.from_token(url), schema_name=name)) as store:
            store.count_messages("none: it makes the tables")
            _never_analyse(url, name)
            yield store

    @contextmanager
    def open_floor(_folder: Path) -> Iterator[PostgresFloor]:
        with schema() as name, closing(PostgresFloor(url, name)) as floor:
            _never_analyse(url, name)
            yield floor

    def stored_bytes(store: PostgresChatMessageStore) -> int:
        for table in _tables(url, store.schema_name):
            _execute(url, "VACUUM {}", store.schema_name, table)
        total = """
            SELECT sum(pg_total_relation_size(oid)) FROM pg_class
            WHERE relkind = 'r' AND relnamespace = %s::regnamespace
        """
        ((found,),) = _execute(url, total, parameters=[store.schema_name])
        return int(found)

    ((version,),) = _execute(url, "SHOW server_version")
    return Engine(
        key="postgres",
        name="PostgresChatMessageStore",
        open_store=open_store,
        open_floor=open_floor,
        floor_name="floor: raw psycopg",
        forms=(SYNC, ASYNC),
        stored_bytes=stored_bytes,
        limits={"append": 1.8, "read": 2},
        server=f"PostgreSQL {version.split()[0]}",
    )


def _never_analyse(url: str, schema: str) -> None:
    for table in _tables(url, schema):
        _execute(url, "ALTER TABLE {} SET (autovacuum_enabled = off)", schema, table)


def _tables(url: str, schema: str) -> list[str]:
    found = _execute(url, "SELECT tablename FROM pg_tables WHERE schemaname = %s", parameters=[schema])
    return [name for (name,) in found]


def _execute(url: str, statement: str, *name: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        cursor = connection.execute(sql.SQL(statement).format(sql.Identifier(*name or "-")), parameters)
        return cursor.fetchall() if cursor.description else []


def _redis(url: str) -> Engine:
    @contextmanager
    def prefix() -> Iterator[str]:
        name = f"benchmark-{uuid.uuid4().hex}"
        try:
            yield name
        finally:
            with closing(redis.Redis.from_url(url)) as client:
                for key in client.scan_iter(f"*{name}*", count=1000):
                    client.unlink(key)

    @contextmanager
    def open_store(_folder: Path) -> Iterator[RedisChatMessageStore]:
        with prefix() as name, _closing(RedisChatMessageStore(Secret.from_token(url), key_prefix=name)) as store:
            yield store

    @contextmanager
    def open_floor(_folder: Path) -> Iterator[RedisFloor]:
        with prefix() as name, closing(RedisFloor(url, name)) as floor:
            yield floor

    def stored_bytes(store: RedisChatMessageStore) -> int:
        with closing(redis.Redis.from_url(url)) as client:
            keys = client.scan_iter(f"*{store.key_prefix}*", count=1000)
            return sum(client.memory_usage(key, samples=0) for key in keys)

    with closing(redis.Redis.from_url(url)) as client:
        found = client.info("server")
        version = found.get("valkey_version", found["redis_version"])
        durability = client.config_get("append*")
    return Engine(
        key="redis",
        name="RedisChatMessageStore",
        open_store=open_store,
        open_floor=open_floor,
        floor_name="floor: raw redis-py",
        forms=(SYNC, ASYNC),
        stored_bytes=stored_bytes,
        limits={"append": 1.9, "read": 2.2},
        server=(
            f"{'Valkey' if 'valkey_version' in found else 'Redis'} {version} "
            f"(appendonly {durability['appendonly']}, appendfsync {durability['appendfsync']})"
        ),
    )


@contextmanager
def _closing(store: Any) -> Iterator[Any]:
    try:
        yield store
    finally:
        LOOP.run_until_complete(store.close_async())


IN_MEMORY = Engine("memory", "InMemoryChatMessageStore", _in_memory, limits={})
# Each write of haystack-experimental reads the whole history, so longer histories take too long.
EXPERIMENTAL = Engine("experimental", "haystack-experimental, in memory", _experimental, max_size=10_000)
EMBEDDED = [_sqlite("full", {"append": 1.6, "read": 8}), _sqlite("normal"), IN_MEMORY, EXPERIMENTAL]


class Kind(NamedTuple):
    """
    A kind of server.

    :param binaries: The folder with its programs.
    :param start: Starts a private server.
    :param engine: Makes the engine from the server's URL.
    """

    binaries: Callable[[], dict[str, Path]]
    start: Callable[[Path], AbstractContextManager[Any]]
    engine: Callable[[str], Engine]


# Redis has its default settings: it answers before the data is on the disk, so the disk does not hide the store's cost.
SERVERS = {
    "postgres": Kind(servers.postgres_binaries, servers.PostgresServer, _postgres),
    "redis": Kind(servers.redis_binaries, lambda binary: servers.RedisServer(binary, appendonly="no"), _redis),
}
KEYS = [*(engine.key for engine in EMBEDDED), *SERVERS]


def chosen(keys: list[str], urls: dict[str, str | None], running: ExitStack) -> list[Engine]:
    """Return the engines with these names. A server without a URL is started, and runs until `running` is closed."""
    engines = [engine for engine in EMBEDDED if engine.key in keys]
    for key, kind in SERVERS.items():
        if key not in keys:
            continue
        url = urls[key]
        if url is None:
            binaries = kind.binaries()
            if not binaries:
                print(f"{key} is left out: found no server that this user can run.", file=sys.stderr)
                continue
            url = running.enter_context(kind.start(next(iter(binaries.values())))).url
        engines.append(kind.engine(url))
    return engines
