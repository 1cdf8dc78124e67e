# SPDX-License-Identifier: Apache-2.0
"""
Creates the store that a URL names.

The scheme of the URL selects the store's class, from the entry points of the group `haystack_chat_store.engines`. A
package with its own store registers its class there:

```toml
[project.entry-points."haystack_chat_store.engines"]
folder = "my_package:FolderChatMessageStore"
```
"""

from importlib.metadata import entry_points
from typing import Any

from haystack_chat_store.stores.base import BaseChatMessageStore

_ENTRY_POINTS = "haystack_chat_store.engines"


def store_from_url(url: str, **settings: Any) -> BaseChatMessageStore:
    """
    Create the store that a URL names. It connects on first use.

    | URL | store |
    |---|---|
    | `sqlite:///relative.db`, `sqlite:////absolute.db` | `SQLiteChatMessageStore` |
    | `postgresql://user:password@host:5432/database` | `PostgresChatMessageStore` |
    | `redis://:password@host:6379/0`, `rediss://…` with TLS | `RedisChatMessageStore` |
    | `redis+cluster://:password@host:6379`, `rediss+cluster://…` | `RedisChatMessageStore` on a Redis Cluster |
    | `memory://` | `InMemoryChatMessageStore` |

    Other packages can register stores for more schemes.

    ```python
    from haystack_chat_store import store_from_url

    store = store_from_url("sqlite:///chat_history.db", last_k=20)
    ```

    A store on a server keeps the URL as a token secret, which cannot be serialized. For YAML, create the store from its
    class, with a secret from an environment variable. An SQLite URL contains no settings: pass them as arguments, and
    write `?` and `#` in a file's name as `%3F` and `%23`.

    :param url: A URL in one of these forms.
    :param settings: Further arguments of the store's constructor, such as `last_k` and `namespace`.
    :returns: The store.
    :raises ValueError: If the URL has none of these forms. The error does not repeat the URL, because it may contain a
        password.
    :raises ImportError: If the engine's driver is not installed.
    """
    scheme, separator, _ = url.partition("://") if isinstance(url, str) else ("", "", "")
    for entry_point in entry_points(group=_ENTRY_POINTS, name=scheme) if separator else ():
        store: BaseChatMessageStore = entry_point.load().from_url(url, **settings)
        return store
    schemes = ", ".join(sorted(f"{entry_point.name}://" for entry_point in entry_points(group=_ENTRY_POINTS)))
    raise ValueError(
        f"The URL must begin with one of {schemes}. For example: sqlite:///relative.db, sqlite:////absolute.db, "
        "postgresql://user:password@host:port/database, redis://:password@host:port/0, memory://."
    )
