# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

from haystack.lazy_imports import LazyImport
from haystack.utils import Secret

from haystack_chat_store import validation
from haystack_chat_store.errors import ChatMessageStoreError, StoreTimeoutError, StoreUnavailableError
from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.stores.base import contents_and_size
from haystack_chat_store.stores.postgres.base import MAX_POSITION
from haystack_chat_store.stores.postgres.changing import Changing
from haystack_chat_store.stores.postgres.checking import Checking
from haystack_chat_store.stores.postgres.directory import Directory
from haystack_chat_store.stores.rows import MessageRow
from haystack_chat_store.stores.sync_async import run_sync

with LazyImport(
    'It comes with the extra \'postgres\': pip install "haystack-chat-store[postgres]", or "psycopg[binary]>=3.3".'
) as psycopg_import:
    import psycopg

    from haystack_chat_store.stores.postgres.connections import (
        AsideError,
        MayNotMakeError,
        Pool,
        Session,
        Settings,
        pools,
    )
    from haystack_chat_store.stores.postgres.schema import MIGRATIONS, Tables

# PostgreSQL cuts names at 63 bytes, and the longest that begins with the prefix has 20 more.
_MAX_PREFIX_LENGTH = 40


class PostgresChatMessageStore(Changing, Directory, Checking):
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
        self.connection_string = connection_string
        self.schema_name = schema_name
        self.table_prefix = table_prefix
        self.max_pool_size = validation.validated_number(max_pool_size, "max_pool_size", 1)
        self.min_pool_size = validation.validated_number(min_pool_size, "min_pool_size", 0, self.max_pool_size)
        self.timeout = validation.validated_seconds(timeout, "timeout", 0.001, 1_000_000)
        self._settings = Settings(
            connection_string, schema_name, table_prefix, self.min_pool_size, self.max_pool_size, self.timeout
        )
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

    def create_schema_sql(self, partitions: int | None = None, *, from_version: int = 0) -> str:
        """
        Return the SQL that makes the tables, for an administrator to run if the store's own role may not.

        If the store has `search=True`, that turns search on as well. The role then needs SELECT, INSERT, UPDATE and
        DELETE on the histories and messages, SELECT on the version, and USAGE on the schema.

        :param partitions: Into how many partitions the tables are divided, by a hash of the history: 1 to 1,000. For
            billions of messages on one server; tables that exist cannot be divided any more. Defaults to `None`, for
            not at all.
        :param from_version: The version that the tables have, to upgrade them: the highest number in the table of
            versions. If it is the present one, only search is turned on. Defaults to 0, for new tables.
        :raises ValueError: If an argument is not one of these.
        """
        if partitions is not None and (isinstance(partitions, bool) or partitions not in range(1, 1001)):
            raise ValueError(f"partitions must be a number from 1 to 1000, or None; got {partitions!r}.")
        if isinstance(from_version, bool) or from_version not in range(len(MIGRATIONS) + 1):
            raise ValueError(f"from_version must be a number from 0 to {len(MIGRATIONS)}, got {from_version!r}.")
        if partitions and from_version:
            raise ValueError("Only new tables can be divided: give partitions or from_version, not both.")
        tables = Tables(self.schema_name, self.table_prefix)
        return tables.script(from_version, partitions or 0, search=self.search)

    def close(self) -> None:
        """
        Close the connections, for every store with the same settings. The next use opens them again.
        """
        pools.close(self._settings)

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        pool = pools.get(self._settings)
        try:
            with pool.session(search=self.search) as session:
                return run_sync(operation(session, *arguments))
        except AsideError as aside:
            raise aside.error from aside.error.__cause__
        except (psycopg.Error, OSError) as error:
            raise self._explained(error, pool) from error

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        pool = pools.get(self._settings)
        try:
            async with pool.session_async(search=self.search) as session:
                return await operation(session, *arguments)
        except AsideError as aside:
            raise aside.error from aside.error.__cause__
        except (psycopg.Error, OSError) as error:
            raise self._explained(error, pool) from error

    async def _read(self, session: "Session", chat_history_id: str, window: Window) -> tuple[list[str], int]:
        parameters = {"key": self._history_key(chat_history_id), "end": MAX_POSITION}
        statement, by_round = self._statements.read_all, window.unit == "round"
        if window.count is not None:
            parameters["count"] = min(window.count, MAX_POSITION)
            statement = self._statements.read_rounds if by_round else self._statements.read_messages
            if window.step > 1:
                parameters["step"] = min(window.step, MAX_POSITION)
                statements = self._statements
                statement = statements.read_rounds_by_step if by_round else statements.read_messages_by_step
        return contents_and_size(await session.fetch(statement, parameters))

    async def _page(
        self, session: "Session", chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        key = self._history_key(chat_history_id)
        if after is not None:
            rows = await session.fetch(self._statements.page_after, [key, min(after, MAX_POSITION), limit])
        else:
            end = MAX_POSITION if before is None else min(before, MAX_POSITION)
            rows = (await session.fetch(self._statements.page_before, [key, end, limit]))[::-1]
        return [MessageRow(*row) for row in rows]

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
        if isinstance(error, MayNotMakeError):
            upgrade = f"from_version={pool.version}" if pool.version else ""
            return StoreUnavailableError(
                f"{server}, refused: {said}. If this role may not create or change tables, let an "
                f"administrator run what create_schema_sql({upgrade}) returns."
            )
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            return StoreUnavailableError(
                f"{server}, refused: {said}. Let an administrator grant this role SELECT, INSERT, UPDATE and DELETE on "
                "the histories and messages, SELECT on the version, and USAGE on the schema."
            )
        return StoreUnavailableError(f"{server}, failed: {said}")


def _validate_name(name: Any, setting: str, max_length: int) -> None:
    if not isinstance(name, str) or not name or "\x00" in name or len(name.encode()) > max_length:
        raise ValueError(f"{setting} must be a name of 1 to {max_length} bytes, got {name!r}.")
