# SPDX-License-Identifier: Apache-2.0
from typing import Any
from urllib.parse import urlsplit

from haystack.lazy_imports import LazyImport
from haystack.utils import Secret
from typing_extensions import Self

from haystack_chat_store.conversation.rounds import LastKUnit
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.validation import validated_flag, validated_seconds

with LazyImport(
    'It comes with the extra \'redis\': pip install "haystack-chat-store[redis]", or "redis>=5.1,<9"'
) as redis_import:
    from haystack_chat_store.stores.redis.engine import RedisEngine

_SCHEMES = {f"{protocol}{kind}" for protocol in ("redis", "rediss") for kind in ("", "+cluster", "+sentinel")}


class RedisChatMessageStore(BaseChatMessageStore):
    """
    Keeps chat histories in Redis or Valkey, on one server or a Redis Cluster: for speed, and for many machines at once.

    Needs Redis 6.2 or newer, or Valkey, and `pip install "haystack-chat-store[redis]"`. How much of what was
    acknowledged survives a crash of the server depends on the server's settings: see `docs/redis.md`.

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
        strict: bool = False,
        user_id: str | None = None,
        ttl: float | None = None,
        renew_ttl_on_read: bool = False,
        cluster: bool = False,
        key_prefix: str = "haystack_chat",
        timeout: float = 30.0,
    ) -> None:
        """
        Create the store. It connects on first use.

        :param url: A secret with a URL as redis-py takes it: `redis://user:password@host:port/database`, `rediss://`
            for TLS, `unix://` for a socket. Or with Redis Sentinels:
            `redis+sentinel://user:password@host:port,host:port/database?service=name`. Defaults to the environment
            variable `REDIS_URL`. It is read at each call: when it has changed, the store connects to the new address,
            and closes what it had open.
        :param skip_system_messages: Whether system messages are left out when writing. Defaults to True.
        :param last_k: The number of rounds that `retrieve_messages` returns if it is called without `last_k`. Defaults
            to 10. `None` for all.
        :param last_k_unit: The unit of `last_k`: `"round"`, the default, or `"message"`.
        :param namespace: The namespace of the store's histories, 1 to 128 characters. A store sees only its own
            namespace, so tenants, applications or test runs can share one database. Defaults to `"default"`.
        :param search: Whether messages can be searched. What the store writes is then indexed. The server needs the
            query engine of Redis 8 or Redis Stack, and must be no cluster. Defaults to False.
        :param strict: Whether a message is refused if its `meta` contains a value without a JSON form. Defaults to
            False: the value's `repr` is stored, and the log says so.
        :param user_id: The store sees and changes only histories of this user: see `for_user`. Defaults to `None`: all
            histories of the namespace.
        :param ttl: The number of seconds after which a history expires as a whole. The time starts anew when messages
            are stored in it. Defaults to `None`: a history never expires.
        :param renew_ttl_on_read: Whether reading messages of a history starts the time anew, too. Defaults to False.
        :param cluster: Whether the URL leads to a node of a Redis Cluster, which is then asked for the others.
            Defaults to False.
        :param key_prefix: What the names of all keys begin with, after a brace. Defaults to `"haystack_chat"`. Without
            braces.
        :param timeout: How long a call may take, in seconds: waiting for a connection, connecting, waiting for the
            answer. A call waits as long for a server that is starting, and for another master; a node of a cluster, or
            a master of Sentinels, that does not answer for a quarter of it counts as failed. An operation of several
            steps, such as a list or an import, takes as long for each. Defaults to 30.
        :raises ValueError: If a setting is wrong.
        :raises UnsupportedOperationError: If `search` and `cluster` are both True.
        :raises ImportError: If redis-py is not installed.
        """
        redis_import.check()
        if not isinstance(url, Secret):
            raise ValueError("url must be a Secret, such as Secret.from_env_var('REDIS_URL').")
        if not isinstance(key_prefix, str) or not key_prefix or not key_prefix.isprintable():
            raise ValueError(f"key_prefix must be printable text, got {key_prefix!r}.")
        if "{" in key_prefix or "}" in key_prefix:
            raise ValueError(f"key_prefix must not contain braces, by which a cluster places keys; got {key_prefix!r}.")
        self.url = url
        self.cluster = validated_flag(cluster, "cluster")
        self.key_prefix = key_prefix
        self.timeout = validated_seconds(timeout, "timeout")
        if validated_flag(search, "search") and self.cluster:
            raise UnsupportedOperationError(
                "RedisChatMessageStore cannot search messages on a Redis Cluster. It can on one server that has the "
                "query engine of Redis 8 or Redis Stack; SQLiteChatMessageStore and PostgresChatMessageStore can, too."
            )
        super().__init__(
            RedisEngine(url, cluster=cluster, key_prefix=key_prefix, timeout=self.timeout, search=search),
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

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments for an equal store."""
        return {
            "url": self.url,
            **super().settings(),
            "cluster": self.cluster,
            "key_prefix": self.key_prefix,
            "timeout": self.timeout,
        }

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:
        """
        Make a store from `redis://…` or `rediss://…`, with `+cluster` or `+sentinel` in the scheme.

        :param url: The URL, with its scheme. The store holds it as a token secret, which cannot be serialized.
        :param settings: Further arguments of the constructor.
        :raises ValueError: If the URL names no host, or has another scheme.
        """
        scheme, _, rest = url.partition("://")
        try:
            has_host = bool(urlsplit(url).netloc)
        except ValueError:  # which may quote the password
            has_host = False
        if not has_host or scheme not in _SCHEMES:
            raise ValueError(
                "The URL of a Redis server must name its host: redis://:password@host:6379/0, or with one of the "
                f"schemes {', '.join(sorted(_SCHEMES))}. Percent-encode what is not a letter or a digit in the user "
                "name and the password."
            )
        if scheme.endswith("+cluster"):
            return cls(Secret.from_token(f"{scheme.partition('+')[0]}://{rest}"), cluster=True, **settings)
        return cls(Secret.from_token(url), **settings)
