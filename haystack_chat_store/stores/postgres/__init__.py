# SPDX-License-Identifier: Apache-2.0
from typing import Any

from haystack.lazy_imports import LazyImport
from haystack.utils import Secret
from typing_extensions import Self

from haystack_chat_store import validation
from haystack_chat_store.conversation.rounds import LastKUnit
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.urls import without_driver

with LazyImport(
    'It comes with the extra \'postgres\': pip install "haystack-chat-store[postgres]", or "psycopg[binary]>=3.3,<4"'
) as psycopg_import:
    from haystack_chat_store.stores.postgres.connection_string import DEFAULT_SCHEMA, parsed
    from haystack_chat_store.stores.postgres.connections import Settings
    from haystack_chat_store.stores.postgres.engine import PostgresEngine
    from haystack_chat_store.stores.postgres.schema import Tables

# PostgreSQL cuts names at 63 bytes, and the longest that begins with the prefix has 21 more.
_MAX_PREFIX_LENGTH = 40


class PostgresChatMessageStore(BaseChatMessageStore):
    """
    Keeps chat histories in a PostgreSQL database: for many machines at once, beside the data you already have there.

    Needs PostgreSQL 12 or newer and `pip install "haystack-chat-store[postgres]"`. The tables are created by the first
    write. A pooler such as PgBouncer may stand in between, also in transaction mode.

    `delete_all_messages` deletes up to 1,000 histories at a time. If it fails, some histories may be deleted; call it
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
        *,
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
        search: bool = False,
        strict: bool = False,
        user_id: str | None = None,
        ttl: float | None = None,
        renew_ttl_on_read: bool = False,
        schema_name: str | None = None,
        table_prefix: str = "haystack_chat",
        min_pool_size: int = 1,
        max_pool_size: int = 10,
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. It connects on first use.

        :param connection_string: A secret with a URL, `postgresql://user:password@host:port/database`, or with libpq's
            `key=value` pairs. A driver in its scheme (`postgresql+psycopg://`) is ignored. Defaults to the environment
            variable `PG_CONN_STR`. The secret is read at each call. If it has changed, the store closes its connections
            and connects to the new address.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: The number of rounds that `retrieve_messages` returns if it is called without `last_k`. Defaults
            to 10. `None` for all.
        :param last_k_unit: The unit of `last_k`: `"round"`, the default, or `"message"`.
        :param namespace: The namespace of the store's histories, 1 to 128 characters. A store sees only its own
            namespace, so tenants, applications or test runs can share one database. Defaults to `"default"`.
        :param search: Whether messages can be searched. Each message is then indexed as it is written. Defaults to
            False.
        :param strict: Whether a message is refused if its `meta` contains a value without a JSON form. Defaults to
            False: the value's `repr` is stored, and the log says so.
        :param user_id: The store sees and changes only histories of this user: see `for_user`. Defaults to `None`: all
            histories of the namespace.
        :param ttl: The number of seconds after which a history expires as a whole. The time starts anew when messages
            are stored in it. Defaults to `None`: a history never expires.
        :param renew_ttl_on_read: Whether reading messages of a history starts the time anew, too. Defaults to False.
        :param schema_name: The PostgreSQL schema of the tables. It is created if it is missing. Defaults to `None`: the
            first one of the connection string's `search_path` (`?options=-csearch_path%3Dapp`), else `"public"`.
        :param table_prefix: The beginning of the tables' names, 1 to 40 characters. Defaults to `"haystack_chat"`.
        :param min_pool_size: The number of idle connections that stay open. If more were idle for ten minutes, the next
            call closes them. Defaults to 1.
        :param max_pool_size: The largest number of open connections for all synchronous calls of the process, and for
            each event loop. Defaults to 10.
        :param timeout: The largest number of seconds that a call takes: to wait for a connection, to connect, and to
            wait for the server. In `delete_all_messages`, each step may take as long. Defaults to 30.
        :raises ValueError: If a setting is wrong.
        :raises ImportError: If psycopg is not installed.
        """
        psycopg_import.check()
        if not isinstance(connection_string, Secret):
            raise ValueError("connection_string must be a Secret, such as Secret.from_env_var('PG_CONN_STR').")
        if schema_name is not None:
            _validate_name(schema_name, "schema_name", 63)
        _validate_name(table_prefix, "table_prefix", _MAX_PREFIX_LENGTH)
        if "." in table_prefix:
            raise ValueError(
                f"table_prefix must not contain a dot, got {table_prefix!r}. A schema goes to schema_name."
            )
        self.connection_string = connection_string
        self.schema_name = schema_name
        self.table_prefix = table_prefix
        self.max_pool_size = validation.validated_number(max_pool_size, "max_pool_size", 1)
        self.min_pool_size = validation.validated_number(min_pool_size, "min_pool_size", 0, self.max_pool_size)
        self.timeout = validation.validated_seconds(timeout, "timeout", 0.001, 1_000_000)
        settings = Settings(
            connection_string, schema_name, table_prefix, self.min_pool_size, self.max_pool_size, self.timeout
        )
        super().__init__(
            PostgresEngine(settings, search=search),
            skip_system_messages=skip_system_messages,
            last_k=last_k,
            last_k_unit=last_k_unit,
            namespace=namespace,
            search=search,
            strict=strict,
            user_id=user_id,
            ttl=ttl,
            renew_ttl_on_read=renew_ttl_on_read,
        )

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """
        Create a store from `postgresql://user:password@host:port/database`.

        :param url: A connection string as a URL.
        :param settings: Further arguments of the constructor.
        :raises ValueError: If the URL has nothing after its scheme, or a scheme of another engine.
        """
        scheme, _, rest = without_driver(url).partition("://")
        if not rest or scheme not in ("postgresql", "postgres"):
            raise ValueError("The URL must be like postgresql://user:password@host:port/database.")
        return cls(Secret.from_token(url), **settings)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for an equal store."""
        return {
            "connection_string": self.connection_string,
            **super().settings(),
            "schema_name": self.schema_name,
            "table_prefix": self.table_prefix,
            "min_pool_size": self.min_pool_size,
            "max_pool_size": self.max_pool_size,
            "timeout": self.timeout,
        }

    def create_schema_sql(self, partitions: int | None = None) -> str:
        """
        Return the SQL that makes the tables, for an administrator to run if the store's own role may not.

        What exists already stays as it is. If the store has `search=True`, the SQL turns search on as well. The role
        then needs SELECT, INSERT, UPDATE and DELETE on the histories, messages and namespaces, SELECT on the version,
        and USAGE on the schema.

        :param partitions: Into how many partitions the tables are divided, by a hash of the history: 1 to 1,000. For
            billions of messages on one server; tables that exist cannot be divided any more. Defaults to `None`, for
            not at all.
        :raises ValueError: If `partitions` is not one of these.
        """
        if partitions is not None:
            partitions = validation.validated_number(partitions, "partitions", 1, 1000)
        schema_name = self.schema_name
        if schema_name is None:
            try:
                schema_name = parsed(self.connection_string.resolve_value() or "").schema_name
            except ValueError:  # its environment variable is missing: the SQL does not need it
                schema_name = None
        return Tables(schema_name or DEFAULT_SCHEMA, self.table_prefix).script(partitions or 0, search=self.search)


def _validate_name(name: Any, setting: str, max_length: int) -> None:
    if not isinstance(name, str) or not name or "\x00" in name or len(name.encode()) > max_length:
        raise ValueError(f"{setting} must be a name of 1 to {max_length} bytes, got {name!r}.")
