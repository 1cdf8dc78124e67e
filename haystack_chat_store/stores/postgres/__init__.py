# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from haystack.dataclasses import ChatRole
from haystack.lazy_imports import LazyImport
from haystack.utils import Secret

from haystack_chat_store.errors import ChatMessageStoreError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.stores.base import BaseChatMessageStore, contents_and_size
from haystack_chat_store.stores.coroutines import run_to_end
from haystack_chat_store.stores.operations import EncodedMessage

with LazyImport(
    'It comes with the extra \'postgres\': pip install "haystack-chat-store[postgres]", or "psycopg[binary]>=3.3".'
) as psycopg_import:
    import psycopg

    from haystack_chat_store.stores.postgres.connections import Pool, Session, Settings, pool_of, pools
    from haystack_chat_store.stores.postgres.schema import BEGIN, Tables

# PostgreSQL cuts names at 63 bytes, and the longest that begins with the prefix has 20 more.
_MAX_PREFIX_LENGTH = 40
_MAX_POSITION = 2**63 - 1
# What `delete_all_messages` deletes in one transaction: so many histories, or fewer if they have more messages.
_HISTORIES_PER_STEP = 1_000
_MESSAGES_PER_STEP = 100_000


class PostgresChatMessageStore(BaseChatMessageStore["Session"]):
    """
    Keeps chat histories in a PostgreSQL database: for many machines at once, beside the data you already have there.

    Needs PostgreSQL 12 or newer and `pip install "haystack-chat-store[postgres]"`. The tables are made on first use. A
    pooler such as pgbouncer may stand in between, in transaction mode too.

    `delete_all_messages` deletes up to 1,000 histories at a time. If it fails, some are gone and others whole; call it
    again. A history that is written to meanwhile may be deleted or begin anew.

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
        search: bool = False,
        schema_name: str = "public",
        table_prefix: str = "chat",
        min_pool_size: int = 1,
        max_pool_size: int = 10,
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. It connects on first use.

        :param connection_string: A secret with a URL, `postgresql://user:password@host:port/database`, or with libpq's
            `key=value` pairs. Defaults to the environment variable `PG_CONN_STR`. Read at each call: when it has
            changed, the store connects to where it leads now, and closes what it had open.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Separates tenants, applications or test runs in one database. Defaults to `"default"`.
        :param search: Whether messages can be searched. What is written is then indexed with it. Defaults to False.
        :param schema_name: The PostgreSQL schema that holds the tables. Defaults to `"public"`; made if it is missing.
        :param table_prefix: What the tables' names begin with. Defaults to `"chat"`. 1 to 40 characters.
        :param min_pool_size: How many idle connections are kept however long nobody needs them. Others are closed by
            the first call after they were idle for ten minutes. Defaults to 1.
        :param max_pool_size: How many connections are open at most: so many for all synchronous calls of the process,
            and so many for each event loop. Defaults to 10.
        :param timeout: How long a call may take, in seconds: waiting for a connection, connecting (2 seconds at least
            for each address of the server), and waiting for the server. In `delete_all_messages`, each step may take as
            long. Defaults to 30.
        :raises ValueError: If a setting is not one of these.
        :raises ImportError: If psycopg is not installed.
        """
        psycopg_import.check()
        super().__init__(skip_system_messages, last_k, last_k_unit=last_k_unit, namespace=namespace, search=search)
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
        self._settings = Settings(connection_string, schema_name, table_prefix, min_pool_size, max_pool_size, timeout)
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

        The role then needs SELECT, INSERT, UPDATE and DELETE on the histories and messages, SELECT on the version, and
        USAGE on the schema.

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
        pools.close(self._settings)

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        pool = pool_of(self._settings)
        try:
            with pool.session() as session:
                return run_to_end(operation(session, *arguments))
        except (psycopg.Error, OSError) as error:
            raise self._explained(error, pool) from error

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        pool = pool_of(self._settings)
        try:
            async with pool.session_async() as session:
                return await operation(session, *arguments)
        except (psycopg.Error, OSError) as error:
            raise self._explained(error, pool) from error

    async def _write(self, session: "Session", chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        key = self._history_key(chat_history_id)
        brought = [message.message_id for message in messages if message.brought_its_id]
        known = await self._known_ids(session, key, brought) if brought else {}
        while new := [message for message in messages if message.message_id not in known]:
            statement = self._statements.append_rest if known else self._statements.append_all
            parameters = self._to_append(key, chat_history_id, new, known)
            try:
                if (await session.run(statement, parameters)).rowcount:
                    break
            except psycopg.errors.UniqueViolation as violation:
                # A name of a constraint says less: partitions have their own.
                if "message_id" not in (violation.diag.message_detail or ""):
                    raise
            # Since we looked, somebody has written one of them, or has deleted the history.
            known = await self._known_ids(session, key, [message.message_id for message in messages])
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
        await self._delete_histories(session, [self._history_key(chat_history_id)])

    async def _delete_all(self, session: "Session") -> None:
        """
        Delete in steps, each with a time limit of its own, so that any number of histories can be deleted.
        """
        last_id = ""
        while found := await session.fetch(
            self._statements.next_histories, [self.namespace, last_id, _HISTORIES_PER_STEP]
        ):
            keys: list[uuid.UUID] = []
            messages = 0
            for chat_history_id, key, count in found:
                if keys and messages + count > _MESSAGES_PER_STEP:
                    break
                last_id, messages = chat_history_id, messages + count
                keys.append(key)
            await self._delete_histories(session, keys)
            session.renew_deadline()

    async def _delete_histories(self, session: "Session", keys: list[uuid.UUID]) -> None:
        await session.run(BEGIN)
        deleted = [key for (key,) in await session.fetch(self._statements.delete_histories, [keys])]
        await session.run(self._statements.delete_messages, [deleted])
        await session.run("COMMIT")

    async def _known_ids(self, session: "Session", key: uuid.UUID, message_ids: list[str]) -> dict[str, datetime]:
        """
        Return which of these ids the history has, each with the time when the history was created.

        If it is deleted and begins anew, that is another history, which has none of them.
        """
        return dict(await session.fetch(self._statements.known_ids, [key, message_ids]))

    def _to_append(
        self, key: uuid.UUID, chat_history_id: str, new: Sequence[EncodedMessage], known: dict[str, datetime]
    ) -> dict[str, Any]:
        return {
            "created_at": next(iter(known.values()), None),
            "key": key,
            "namespace": self.namespace,
            "id": chat_history_id,
            "count": len(new),
            "rounds": sum(message.role == ChatRole.USER.value for message in new),
            # psycopg takes as long to send three arrays as for all the rest. No content has a line break: it is JSON.
            "message_ids": json.dumps([message.message_id for message in new]),
            "roles": " ".join([message.role for message in new]),
            "contents": "\n".join([message.content for message in new]),
        }

    def _history_key(self, chat_history_id: str) -> uuid.UUID:
        # Neither of the two holds a NUL, so no two pairs become the same text.
        name = f"{self.namespace}\x00{chat_history_id}".encode()
        return uuid.UUID(bytes=hashlib.blake2b(name, digest_size=16).digest())

    def _explained(self, error: Exception, pool: "Pool") -> ChatMessageStoreError:
        """
        Turn an exception of psycopg into one of ours that says what to do.
        """
        address, password = pool.address_and_password()
        server = f"PostgreSQL at {address}"
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return StoreTimeoutError(f"{server}, did not answer in time. The timeout is {self.timeout} seconds.")
        if isinstance(error, (psycopg.errors.UndefinedTable, psycopg.errors.ReadOnlySqlTransaction)):
            # The tables were dropped, or this server is no longer the primary: the next call connects anew.
            pools.close(self._settings)
        said = type(error).__name__
        if isinstance(error, (psycopg.OperationalError, psycopg.ProgrammingError, psycopg.InterfaceError)):
            text = (error.diag.message_primary if error.sqlstate else None) or str(error)
            # A mask in the password's place would show which word, or which letter, it is.
            said = said if password and password in text else text
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            return StoreUnavailableError(
                f"{server}, refused: {said}. If this role may not create tables, let an "
                "administrator run what create_schema_sql() returns."
            )
        return StoreUnavailableError(f"{server}, failed: {said}")


def _validate_name(name: Any, setting: str, max_length: int) -> None:
    if not isinstance(name, str) or not name or "\x00" in name or len(name.encode()) > max_length:
        raise ValueError(f"{setting} must be a name of 1 to {max_length} bytes, got {name!r}.")
