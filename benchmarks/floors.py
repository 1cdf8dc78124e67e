# SPDX-License-Identifier: Apache-2.0
"""
Floors: the lowest cost of an engine. They use its driver, a plain table, and rows that are already encoded.

Floors have the methods of stores, but take texts instead of messages. They remember the end of each history.
"""

import sqlite3
from collections import Counter
from pathlib import Path

import psycopg
import redis
import redis.asyncio
from measuring import LOOP
from psycopg.conninfo import make_conninfo

_CREATE = """
    CREATE TABLE messages (history TEXT, position INTEGER, content TEXT, PRIMARY KEY (history, position))
"""
_DELETE = "DELETE FROM messages WHERE history = {}"


class SQLiteFloor:
    """Plain `sqlite3` in WAL mode: one transaction per write. The module caches prepared statements."""

    _INSERT = "INSERT INTO messages VALUES (?, ?, ?)"
    _LAST = "SELECT content FROM messages WHERE history = ? ORDER BY position DESC LIMIT ?"

    def __init__(self, path: Path, synchronous: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute(f"PRAGMA synchronous = {synchronous}")
        self._connection.execute(_CREATE)
        self._ends: Counter[str] = Counter()

    def write_messages(self, chat_history_id: str, texts: list[str]) -> int:
        position = self._ends[chat_history_id]
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        self._connection.executemany(
            self._INSERT, [(chat_history_id, row, text) for row, text in enumerate(texts, position)]
        )
        execute("COMMIT")
        self._ends[chat_history_id] = position + len(texts)
        return len(texts)

    def retrieve_messages(self, chat_history_id: str, last_k: int) -> list[tuple[str]]:
        # Every round here is one question and one answer.
        return self._connection.execute(self._LAST, (chat_history_id, 2 * last_k)).fetchall()

    def delete_messages(self, chat_history_id: str) -> None:
        self._connection.execute(_DELETE.format("?"), (chat_history_id,))
        del self._ends[chat_history_id]

    def close(self) -> None:
        self._connection.close()


class PostgresFloor:
    """
    Plain psycopg: a synchronous and an asynchronous connection, autocommit, one prepared statement per call.

    More than one turn is written with COPY.

    :param url: The server's URL.
    :param schema: An empty schema, or the schema of another floor.
    :param has_tables: Whether the schema has the tables already.
    """

    # The row of the shared history assigns positions, and its lock orders the writers of all processes.
    _CREATE_SHARED = "CREATE TABLE shared (next_position INTEGER)"
    _BEGIN_SHARED = "INSERT INTO shared VALUES (0)"
    _INSERT = "INSERT INTO messages VALUES (%s, %s, %s), (%s, %s, %s)"
    _INSERT_SHARED = """
        WITH place AS (UPDATE shared SET next_position = next_position + 2 RETURNING next_position)
        INSERT INTO messages
        SELECT %s, next_position - 2, %s FROM place UNION ALL SELECT %s, next_position - 1, %s FROM place
    """
    _COPY = "COPY messages FROM STDIN"
    _LAST = "SELECT content FROM messages WHERE history = %s ORDER BY position DESC LIMIT {}"

    def __init__(self, url: str, schema: str, *, has_tables: bool = False) -> None:
        self._place = url, schema
        # Forces a scan by the primary key, although the planner has no statistics of the tables.
        where = make_conninfo(url, options=f"-c search_path={schema} -c enable_sort=off")
        self._connection = psycopg.connect(where, autocommit=True)
        self._connection_async = LOOP.run_until_complete(psycopg.AsyncConnection.connect(where, autocommit=True))
        if not has_tables:
            for statement in (_CREATE, self._CREATE_SHARED, self._BEGIN_SHARED):
                self._connection.execute(statement)
        self._ends: Counter[str] = Counter()

    def another(self) -> "PostgresFloor":
        """Open a floor on the same tables with its own connections, for other histories or for the shared one."""
        return PostgresFloor(*self._place, has_tables=True)

    def write_messages(self, chat_history_id: str, texts: list[str]) -> int:
        rows = self._rows(chat_history_id, texts)
        if len(texts) == 2:
            self._connection.execute(self._INSERT, [*rows[0], *rows[1]], prepare=True)
        else:
            with self._connection.cursor().copy(self._COPY) as copy:
                for row in rows:
                    copy.write_row(row)
        return len(texts)

    async def write_messages_async(self, chat_history_id: str, texts: list[str]) -> int:
        first, second = self._rows(chat_history_id, texts)
        await self._connection_async.execute(self._INSERT, [*first, *second], prepare=True)
        return len(texts)

    def write_shared(self, chat_history_id: str, texts: list[str]) -> int:
        parameters = [value for text in texts for value in (chat_history_id, text)]
        self._connection.execute(self._INSERT_SHARED, parameters, prepare=True)
        return len(texts)

    async def write_shared_async(self, chat_history_id: str, texts: list[str]) -> int:
        parameters = [value for text in texts for value in (chat_history_id, text)]
        await self._connection_async.execute(self._INSERT_SHARED, parameters, prepare=True)
        return len(texts)

    def retrieve_messages(self, chat_history_id: str, last_k: int) -> list[tuple[str]]:
        last = self._LAST.format(2 * last_k)
        return self._connection.execute(last, [chat_history_id], prepare=True).fetchall()

    async def retrieve_messages_async(self, chat_history_id: str, last_k: int) -> list[tuple[str]]:
        last = self._LAST.format(2 * last_k)
        return await (await self._connection_async.execute(last, [chat_history_id], prepare=True)).fetchall()

    def delete_messages(self, chat_history_id: str) -> None:
        self._connection.execute(_DELETE.format("%s"), [chat_history_id])
        del self._ends[chat_history_id]

    def close(self) -> None:
        self._connection.close()
        LOOP.run_until_complete(self._connection_async.close())

    def _rows(self, chat_history_id: str, texts: list[str]) -> list[tuple[str, int, str]]:
        position = self._ends[chat_history_id]
        self._ends[chat_history_id] += len(texts)
        return [(chat_history_id, row, text) for row, text in enumerate(texts, position)]


class RedisFloor:
    """
    Plain redis-py: a synchronous and an asynchronous client, a list per history, a transaction pipeline per write.

    :param url: The server's URL.
    :param prefix: The prefix of its keys.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self._place = url, prefix
        self._prefix = prefix
        self._client = redis.Redis.from_url(url)
        self._client_async = redis.asyncio.Redis.from_url(url)

    def another(self) -> "RedisFloor":
        """Open a floor on the same keys with its own connections."""
        return RedisFloor(*self._place)

    def write_messages(self, chat_history_id: str, texts: list[str]) -> int:
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.rpush(self._prefix + chat_history_id, *texts)
            pipeline.execute()
        return len(texts)

    async def write_messages_async(self, chat_history_id: str, texts: list[str]) -> int:
        async with self._client_async.pipeline(transaction=True) as pipeline:
            pipeline.rpush(self._prefix + chat_history_id, *texts)
            await pipeline.execute()
        return len(texts)

    # The server runs one command at a time, so appending to a list assigns positions.
    write_shared = write_messages
    write_shared_async = write_messages_async

    def retrieve_messages(self, chat_history_id: str, last_k: int) -> list[bytes]:
        return self._client.lrange(self._prefix + chat_history_id, -2 * last_k, -1)

    async def retrieve_messages_async(self, chat_history_id: str, last_k: int) -> list[bytes]:
        return await self._client_async.lrange(self._prefix + chat_history_id, -2 * last_k, -1)

    def delete_messages(self, chat_history_id: str) -> None:
        self._client.unlink(self._prefix + chat_history_id)

    def close(self) -> None:
        self._client.close()
        LOOP.run_until_complete(self._client_async.aclose())
