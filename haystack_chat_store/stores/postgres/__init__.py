# SPDX-License-Identifier: Apache-2.0
import hashlib
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from haystack.dataclasses import ChatRole
from haystack.lazy_imports import LazyImport
from haystack.utils import Secret

from haystack_chat_store.errors import ChatMessageStoreError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.stores.base import BaseChatMessageStore, EncodedMessage, contents_and_size
from haystack_chat_store.stores.coroutines import run_to_end

with LazyImport("Run 'pip install \"haystack-chat-store[postgres]\"'") as psycopg_import:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    from haystack_chat_store.stores.postgres.connections import Session, Settings, pools
    from haystack_chat_store.stores.postgres.schema import BEGIN, Tables

# PostgreSQL cuts names at 63 bytes, and the longest that begins with the prefix has 20 more.
_MAX_PREFIX_LENGTH = 40
_MAX_POSITION = 2**63 - 1


class PostgresChatMessageStore(BaseChatMessageStore["Session"]):
    """
    Keeps chat histories in a PostgreSQL database: for many machines at once, beside the data you already have there.

    Needs PostgreSQL 12 or newer and `pip install "haystack-chat-store[postgres]"`. The tables are made on first use. A
    pooler such as pgbouncer may stand in between, in transaction mode too.

    ```python
    from haystack_chat_store.stores.postgres import PostgresChatMessageStore

    store = PostgresChatMessageStore()  # PG_CONN_STR=postgresql://user:password@host:5432/database
    print(store.create_schema_sql())
    ```
    """

    def __init__(
        self,
        connection_string: Secret = Secret.from_env_var("PG_CONN_STR"),
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        *,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
        schema_name: str = "public",
        table_prefix: str = "chat",
        min_pool_size: int = 1,
        max_pool_size: int = 10,
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. It connects on first use.

        :param connection_string: A secret with a URL, `postgresql://user:password@host:port/database`, or with libpq's
            `key=value` pairs. Defaults to the environment variable `PG_CONN_STR`, read when connecting.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Separates tenants, applications or test runs in one database. Defaults to `"default"`.
        :param schema_name: The PostgreSQL schema that holds the tables. Defaults to `"public"`; made if it is missing.
        :param table_prefix: What the tables' names begin with. Defaults to `"chat"`. 1 to 40 characters.
        :param min_pool_size: How many idle connections are kept however long nobody needs them. Others are closed after
            ten minutes. Defaults to 1.
        :param max_pool_size: How many connections are open at most: so many for all synchronous calls of the process,
            and so many for each event loop. Defaults to 10.
        :param timeout: How long a call may take, in seconds: waiting for a connection, connecting (2 seconds at least),
            and waiting for the server. Defaults to 30.
        :raises ValueError: If a setting is not one of these.
        :raises ImportError: If psycopg is not installed.
        """
        psycopg_import.check()
        super().__init__(skip_system_messages, last_k, last_k_unit=last_k_unit, namespace=namespace)
        if not isinstance(connection_string, Secret):
            raise ValueError("connection_string must be a Secret, such as Secret.from_env_var('PG_CONN_STR').")
        _validate_name(schema_name, "schema_name", 63)
        _validate_name(table_prefix, "table_prefix", _MAX_PREFIX_LENGTH)
        if not 0 <= min_pool_size <= max_pool_size or max_pool_size < 1:
            raise ValueError("min_pool_size must be 0 or more, and max_pool_size at least 1 and no less than that.")
        if not isinstance(timeout, (int, float)) or not 0 < timeout <= 1_000_000:
            raise ValueError(f"timeout must be a number of seconds over 0, up to 1,000,000, got {timeout!r}.")
        self.connection_string = connection_string
        self.schema_name = schema_name
        self.table_prefix = table_prefix
        self.min_pool_size = min_pool_size
        self.max_pool_size = max_pool_size
        self.timeout = timeout
        self._statements = Tables(schema_name, table_prefix).statements

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings. The connection string is named by its environment variable, never written out.

        :raises ValueError: If it is not a secret from the environment.
        """
        return self._settings_to_dict(
            connection_string=self.connection_string,
            schema_name=self.schema_name,
            table_prefix=self.table_prefix,
            min_pool_size=self.min_pool_size,
            max_pool_size=self.max_pool_size,
            timeout=self.timeout,
        )

    def create_schema_sql(self, partitions: int | None = None) -> str:
        """
        Return the SQL that makes the tables, for an administrator to run if the store's own role may not.

        The role then needs SELECT, INSERT, UPDATE and DELETE on them, and USAGE on the schema.

        :param partitions: Into how many partitions the tables are divided, by a hash of the history: 1 to 1,000. For
            billions of messages on one server; tables that exist cannot be divided any more. Defaults to `None`, for
            not at all.
        :raises ValueError: If `partitions` is not one of these.
        """
        if partitions is not None and (isinstance(partitions, bool) or partitions not in range(1, 1001)):
            raise ValueError(f"partitions must be a number from 1 to 1000, or None; got {partitions!r}.")
        return Tables(self.schema_name, self.table_prefix).script(partitions or 0)

    def close(self) -> None:
        """
        Close the connections, for every store with the same settings. The next use opens them again.
        """
        with suppress(StoreUnavailableError):  # without a connection string, nothing was opened
            pools.close(self._settings())

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        settings = self._settings()
        try:
            with pools.get(settings).session() as session:
                return run_to_end(operation(session, *arguments))
        except (psycopg.Error, OSError) as error:
            raise self._explained(error, settings) from error

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        settings = self._settings()
        try:
            async with pools.get(settings).session_async() as session:
                return await operation(session, *arguments)
        except (psycopg.Error, OSError) as error:
            raise self._explained(error, settings) from error

    async def _write(self, session: "Session", chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        key = self._history_key(chat_history_id)
        brought = [message.message_id for message in messages if message.brought_its_id]
        known = await self._known_ids(session, key, brought) if brought else set()
        while new := [message for message in messages if message.message_id not in known]:
            try:
                await session.run(self._statements.append, self._to_append(key, chat_history_id, new))
                break
            except psycopg.errors.UniqueViolation as violation:
                # The name is longer where the tables are distributed.
                if not (violation.diag.constraint_name or "").startswith(f"{self.table_prefix}_messages_by_id"):
                    raise
                # Somebody else has written one of them since we looked.
                known |= await self._known_ids(session, key, [message.message_id for message in new])
        return len(new)

    async def _read(self, session: "Session", chat_history_id: str, window: Window) -> tuple[list[str], int]:
        parameters = {"key": self._history_key(chat_history_id), "end": _MAX_POSITION}
        statement, by_round = self._statements.read_all, window.unit == "round"
        if window.count is not None:
            parameters["count"] = min(window.count, _MAX_POSITION)
            statement = self._statements.read_rounds if by_round else self._statements.read_messages
            if window.step > 1:
                parameters["step"] = min(window.step, _MAX_POSITION)
                statements = self._statements
                statement = statements.read_rounds_by_step if by_round else statements.read_messages_by_step
        return contents_and_size(await session.fetch(statement, parameters))

    async def _count(self, session: "Session", chat_history_id: str) -> int:
        rows = await session.fetch(self._statements.message_count, [self._history_key(chat_history_id)])
        return int(rows[0][0]) if rows else 0

    async def _delete(self, session: "Session", chat_history_id: str) -> None:
        await self._delete_locked(session, self._statements.lock_one, self._history_key(chat_history_id))

    async def _delete_all(self, session: "Session") -> None:
        await self._delete_locked(session, self._statements.lock_all, self.namespace)

    async def _delete_locked(self, session: "Session", lock: str, which: uuid.UUID | str) -> None:
        await session.run(BEGIN)
        keys = [key for (key,) in await session.fetch(lock, [which])]
        await session.run(self._statements.delete_messages, [keys])
        await session.run(self._statements.delete_histories, [keys])
        await session.run("COMMIT")

    async def _known_ids(self, session: "Session", key: uuid.UUID, message_ids: list[str]) -> set[str]:
        return {message_id for (message_id,) in await session.fetch(self._statements.known_ids, [key, message_ids])}

    def _to_append(self, key: uuid.UUID, chat_history_id: str, new: Sequence[EncodedMessage]) -> dict[str, Any]:
        return {
            "key": key,
            "namespace": self.namespace,
            "id": chat_history_id,
            "count": len(new),
            "rounds": sum(message.role == ChatRole.USER.value for message in new),
            "message_ids": [message.message_id for message in new],
            "roles": [message.role for message in new],
            "contents": [message.content for message in new],
        }

    def _history_key(self, chat_history_id: str) -> uuid.UUID:
        # Neither of the two holds a NUL, so no two pairs become the same text.
        name = f"{self.namespace}\x00{chat_history_id}".encode()
        return uuid.UUID(bytes=hashlib.blake2b(name, digest_size=16).digest())

    def _settings(self) -> "Settings":
        try:
            connection_string = self.connection_string.resolve_value() or ""
            _address_and_password(connection_string)
        except ValueError as error:
            raise StoreUnavailableError(f"The connection string cannot be used. {error}") from error
        return Settings(
            connection_string,
            self.schema_name,
            self.table_prefix,
            self.min_pool_size,
            self.max_pool_size,
            self.timeout,
        )

    def _explained(self, error: Exception, settings: "Settings") -> ChatMessageStoreError:
        """
        Turn an exception of psycopg into one of ours that says what to do.
        """
        address, password = _address_and_password(settings.connection_string)
        server = f"PostgreSQL at {address}"
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return StoreTimeoutError(f"{server}, did not answer within {self.timeout} seconds.")
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            return StoreUnavailableError(
                f"{server}, refused: {error.diag.message_primary}. If this role may not create tables, let an "
                "administrator run what create_schema_sql() returns."
            )
        if isinstance(error, (psycopg.errors.UndefinedTable, psycopg.errors.ReadOnlySqlTransaction)):
            # The tables were dropped, or this server is no longer the primary: the next call connects anew.
            pools.close(settings)
        if isinstance(error, (psycopg.OperationalError, psycopg.ProgrammingError)):
            said = (error.diag.message_primary if error.sqlstate else None) or str(error)
            return StoreUnavailableError(f"{server}, failed: {_without(password, said)}")
        return StoreUnavailableError(f"{server}, failed: {type(error).__name__}.")


def _validate_name(name: Any, setting: str, max_length: int) -> None:
    if not isinstance(name, str) or not name or "\x00" in name or len(name.encode()) > max_length:
        raise ValueError(f"{setting} must be a name of 1 to {max_length} bytes, got {name!r}.")


@lru_cache(maxsize=32)
def _address_and_password(connection_string: str) -> tuple[str, str]:
    try:
        parts = conninfo_to_dict(connection_string)
    except psycopg.ProgrammingError:
        # Without its cause, which quotes the connection string.
        raise ValueError("It must be like postgresql://user:password@host:port/database.") from None
    host, port = str(parts.get("host", "the local socket")), str(parts.get("port", 5432))
    if "@" in host or not port.replace(",", "").isdigit():
        # Part of a password, most likely: not to be repeated in errors.
        raise ValueError("Percent-encode what is neither letter nor digit in its password, such as %40 for @.")
    return f"{host}, port {port}", str(parts.get("password", ""))


def _without(secret: str, text: str) -> str:
    return text.replace(secret, "***") if secret else text
