# SPDX-License-Identifier: Apache-2.0
"""
From one line of configuration to a store.
"""

from typing import Any
from urllib.parse import unquote, urlsplit

from haystack.utils import Secret

from haystack_chat_store.stores.base import BaseChatMessageStore
from haystack_chat_store.stores.in_memory import InMemoryChatMessageStore
from haystack_chat_store.stores.sqlite import SQLiteChatMessageStore


def store_from_url(url: str, **settings: Any) -> BaseChatMessageStore[Any]:
    """
    Make the store that a URL names. It connects on first use.

    | URL | store |
    |---|---|
    | `sqlite:///relative.db`, `sqlite:////absolute.db` | `SQLiteChatMessageStore` |
    | `postgresql://user:password@host:5432/database` | `PostgresChatMessageStore` |
    | `redis://:password@host:6379/0`, `rediss://…` with TLS | `RedisChatMessageStore` |
    | `redis+cluster://:password@host:6379`, `rediss+cluster://…` | `RedisChatMessageStore` on a Redis Cluster |
    | `memory://` | `InMemoryChatMessageStore` |

    ```python
    from haystack_chat_store import store_from_url

    store = store_from_url("sqlite:///chat_history.db", last_k=20)
    ```

    A store on a server that is made from a URL holds it as a token secret, which cannot be serialized. For YAML, make
    the store by its class, which names an environment variable. Settings are arguments, not part of an SQLite URL;
    `?` and `#` in a file's name are `%3F` and `%23`.

    :param url: One of these forms.
    :param settings: Further settings of the store's constructor, such as `last_k` and `namespace`.
    :raises ValueError: If the URL has none of these forms. The error does not repeat it, for it may hold a password.
    :raises ImportError: If the engine's driver is not installed.
    """
    scheme, _, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1 and not {"?", "#"} & set(rest):
        return SQLiteChatMessageStore(unquote(rest[1:]), **settings)
    if scheme == "memory" and not rest:
        return InMemoryChatMessageStore(**settings)
    if scheme in ("postgresql", "postgres") and rest:
        from haystack_chat_store.stores.postgres import PostgresChatMessageStore

        return PostgresChatMessageStore(Secret.from_token(url), **settings)
    if scheme in ("redis", "rediss", "redis+cluster", "rediss+cluster") and urlsplit(url).netloc:
        from haystack_chat_store.stores.redis import RedisChatMessageStore

        protocol, _, cluster = scheme.partition("+")
        return RedisChatMessageStore(Secret.from_token(f"{protocol}://{rest}"), cluster=bool(cluster), **settings)
    raise ValueError(
        "The URL must have one of these forms: sqlite:///relative.db, sqlite:////absolute.db, "
        "postgresql://user:password@host:port/database, redis://:password@host:port/0, "
        "redis+cluster://:password@host:port, memory://."
    )
