# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from haystack.document_stores.types import DuplicatePolicy
from haystack.lazy_imports import LazyImport
from haystack.utils import Secret

from haystack_chat_store.errors import StoreUnavailableError, UnsupportedOperationError
from haystack_chat_store.rounds import LastKUnit, Window
from haystack_chat_store.stores.conflicts import check_count, duplicate, message_not_found
from haystack_chat_store.stores.redis.base import MAX_COUNT, STEP, new_name
from haystack_chat_store.stores.redis.checking import RedisChecking
from haystack_chat_store.stores.redis.keys import BUCKETS, Keys, bucket_of
from haystack_chat_store.stores.redis.scripts import directory as of_directory
from haystack_chat_store.stores.redis.scripts import messages as scripts
from haystack_chat_store.stores.rows import EncodedMessage, MessageRow
from haystack_chat_store.stores.sync_async import run_sync
from haystack_chat_store.validation import validated_flag, validated_seconds

with LazyImport(
    'It comes with the extra \'redis\': pip install "haystack-chat-store[redis]", or "redis>=5.1".'
) as redis_import:
    from haystack_chat_store.stores.redis.connections import Server, Session, Settings, servers

_READ = {"round": scripts.READ_ROUNDS, "message": scripts.READ_MESSAGES}
# `delete_all_messages` keeps the server busy with so many histories at once.
_HISTORIES_PER_STEP = 100


class RedisChatMessageStore(RedisChecking):
    """
    Keeps chat histories in Redis or Valkey, on one server or a Redis Cluster: for speed, and for many machines at once.

    Needs Redis 6.2 or newer, or Valkey, and `pip install "haystack-chat-store[redis]"`. How much of what it has
    acknowledged survives a crash of the server is for the server's settings to say: see `docs/redis.md`.

    ```python
    from haystack_chat_store.stores.redis import RedisChatMessageStore

    store = RedisChatMessageStore(namespace="my_app", ttl=30 * 24 * 3600)  # REDIS_URL=redis://:password@host:6379/0
    print(store.to_dict())
    ```
    """

    def __init__(
        self,
        url: Secret = Secret.from_env_var("REDIS_URL"),
        skip_system_messages: bool = True,
        last_k: int | None = 10,
        *,
        last_k_unit: LastKUnit = "round",
        namespace: str = "default",
        search: bool = False,
        cluster: bool = False,
        key_prefix: str = "chat",
        ttl: float | None = None,
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. It connects on first use.

        :param url: A secret with a URL as redis-py takes it: `redis://user:password@host:port/database`, `rediss://`
            for TLS, `unix://` for a socket. Defaults to the environment variable `REDIS_URL`. Read at each call: when
            it has changed, the store connects to where it leads now, and closes what it had open.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: How many rounds `retrieve_messages` returns when it is not told. Defaults to 10; `None` for all.
        :param last_k_unit: What `last_k` counts: `"round"`, the default, or `"message"`.
        :param namespace: Separates tenants, applications or test runs in one database. Defaults to `"default"`.
        :param search: Must be False: see `docs/redis.md`.
        :param cluster: Whether the URL leads to a node of a Redis Cluster, which then says where the others are.
            Defaults to False.
        :param key_prefix: What the names of all keys begin with, after a brace. Defaults to `"chat"`. Without braces.
        :param ttl: After how many seconds without a write a history expires, all of it at once. A write starts the time
            anew. Defaults to `None`: never.
        :param timeout: How long a call may take, in seconds: waiting for a connection, connecting, waiting for the
            answer (a synchronous call: each of them). For so long a call waits for a server that is starting, and for
            a cluster to replace a master; a node of a cluster that does not answer for a quarter of it is taken for
            one that is to be replaced. Defaults to 30.
        :raises ValueError: If a setting is not one of these.
        :raises ImportError: If redis-py is not installed.
        """
        redis_import.check()
        super().__init__(skip_system_messages, last_k, last_k_unit=last_k_unit, namespace=namespace, search=search)
        if not isinstance(url, Secret):
            raise ValueError("url must be a Secret, such as Secret.from_env_var('REDIS_URL').")
        if not isinstance(key_prefix, str) or not key_prefix or not key_prefix.isprintable():
            raise ValueError(f"key_prefix must be printable text, got {key_prefix!r}.")
        if "{" in key_prefix or "}" in key_prefix:
            raise ValueError(f"key_prefix must not contain braces, by which a cluster places keys; got {key_prefix!r}.")
        if search:
            raise UnsupportedOperationError(
                "RedisChatMessageStore cannot search messages. SQLiteChatMessageStore and PostgresChatMessageStore can."
            )
        self.url = url
        self.cluster = validated_flag(cluster, "cluster")
        self.key_prefix = key_prefix
        self.ttl = None if ttl is None else validated_seconds(ttl, "ttl")
        self.timeout = validated_seconds(timeout, "timeout")
        self._keys = Keys(key_prefix, namespace)
        self._settings = Settings(url, cluster, timeout)

    def to_dict(self) -> dict[str, Any]:
        """
        Serialize the store's settings. The URL is named by its environment variable, never written out.

        :raises ValueError: If it is not a secret from the environment.
        """
        return self._settings_to_dict(
            url=self.url,
            cluster=self.cluster,
            key_prefix=self.key_prefix,
            ttl=self.ttl,
            timeout=self.timeout,
        )

    def close(self) -> None:
        """
        Close the connections, for every store with the same settings. The next use opens them again.
        """
        servers.close(self._settings)

    async def close_async(self) -> None:
        """
        Do what `close` does, without blocking the event loop.
        """
        with suppress(StoreUnavailableError):
            session = await self._server().session_async()
            await session.close()
        self.close()

    def _run(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        return run_sync(operation(self._server().session(), *arguments))

    async def _run_async(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        return await operation(await self._server().session_async(), *arguments)

    async def _write(self, session: "Session", chat_history_id: str, messages: Sequence[EncodedMessage]) -> int:
        written: int = await self._ask_to_write(session, chat_history_id, messages)
        return written

    async def _read(self, session: "Session", chat_history_id: str, window: Window) -> tuple[list[str], int]:
        bucket, history = self._keys_of(chat_history_id)
        script = scripts.READ_ALL if window.count is None else _READ[window.unit]
        counts = [min(window.count or 0, MAX_COUNT), min(window.step, MAX_COUNT)]
        size, contents = await session.run(script, [bucket.schema_version, *history], counts)
        return contents, size

    async def _count(self, session: "Session", chat_history_id: str) -> int:
        bucket, history = self._keys_of(chat_history_id)
        count: int = await session.run(scripts.COUNT, [bucket.schema_version, *history])
        return count

    async def _delete(self, session: "Session", chat_history_id: str) -> None:
        await self._delete_several(session, bucket_of(chat_history_id), [chat_history_id])

    async def _delete_all(self, session: "Session") -> None:
        for bucket in range(BUCKETS):
            until_time, is_last = "", False
            while not is_last:
                until_time, found = await session.run(
                    of_directory.LIST, self._keys.of_bucket(bucket), [until_time, _HISTORIES_PER_STEP]
                )
                is_last = not until_time
                for first in range(0, len(found), _HISTORIES_PER_STEP):
                    await self._delete_several(session, bucket, found[first : first + _HISTORIES_PER_STEP])

    async def _write_checked(
        self,
        session: "Session",
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        policy: DuplicatePolicy,
        expected_count: int | None,
    ) -> int:
        conditions = (policy.value, "" if expected_count is None else expected_count, new_name())
        answer = await self._ask_to_write(session, chat_history_id, messages, *conditions)
        if isinstance(answer, int):
            return answer
        reason, found = answer
        raise duplicate(found) if reason == "DUPLICATE" else check_count(expected_count or 0, found)

    async def _ask_to_write(
        self,
        session: "Session",
        chat_history_id: str,
        messages: Sequence[EncodedMessage],
        *conditions: str | int,
    ) -> Any:
        letters = (message.role[0] if message.brought_its_id else message.role[0].upper() for message in messages)
        bucket, history = self._keys_of(chat_history_id)
        return await session.run(
            scripts.WRITE,
            [*bucket, *history],
            [
                chat_history_id,
                self._lifetime(),
                "".join(letters),
                "\x00".join(message.message_id for message in messages),
                *(conditions or ("", "", "")),
                *(message.content for message in messages),
            ],
        )

    async def _delete_some(
        self,
        session: "Session",
        chat_history_id: str,
        message_ids: Sequence[str] | None,
        from_message_id: str | None,
    ) -> None:
        if from_message_id is None:
            await self._remove_ids(session, chat_history_id, message_ids or ())
            return
        (first,) = await self._positions(session, chat_history_id, [from_message_id])
        if first is None:
            raise message_not_found(from_message_id)
        gone: list[str] = []
        answer: Any = None
        while not isinstance(answer, int):  # until nothing has come meanwhile
            part = await self._part(session, chat_history_id, STEP, after=first - 1)
            gone += [row.message_id for row in part.rows]
            first = part.rows[-1].position + 1 if part.rows else part.next_position
            if first >= part.next_position:
                answer = await self._remove_ids(session, chat_history_id, gone, from_message_id, part.next_position)
                if answer == ["MISSING"]:
                    raise message_not_found(from_message_id)

    async def _page(
        self, session: "Session", chat_history_id: str, before: int | None, after: int | None, limit: int
    ) -> list[MessageRow]:
        end = MAX_COUNT if before is None else before
        return (await self._part(session, chat_history_id, limit, after=after, before=end)).rows

    def _server(self) -> "Server":
        return servers.get(self._settings)
