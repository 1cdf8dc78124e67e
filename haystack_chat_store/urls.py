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
# Drivers that other libraries write into the scheme, behind a plus. They are ignored: the stores have their own.
_DRIVERS = {
    "postgresql": {"psycopg", "psycopg_async", "psycopg2", "psycopg2cffi", "asyncpg", "pg8000"},
    "sqlite": {"pysqlite", "aiosqlite"},
}
# The forms of URLs that an error shows. Schemes of other packages are added.
# The command line masks passwords in errors. It lets `:password@host:port` pass.
_FORMS = (
    "sqlite:///relative.db",
    "sqlite:////absolute.db",
    "postgresql://user:password@host:port/database",
    "redis://:password@host:port/0",
    "redis+cluster://:password@host:port",
    "redis+sentinel://:password@host:port/0?service=name",
    "memory://",
    "with TLS rediss://, rediss+cluster:// and rediss+sentinel://",
)
_SCHEMES_OF_FORMS = {"sqlite", "postgresql", "postgres", "redis", "rediss", "memory"}


def store_from_url(url: str, **settings: Any) -> BaseChatMessageStore:
    """
    Create the store that a URL names. It connects on first use.

    | URL | store |
    |---|---|
    | `sqlite:///relative.db`, `sqlite:////absolute.db` | `SQLiteChatMessageStore` |
    | `postgresql://user:password@host:5432/database` | `PostgresChatMessageStore` |
    | `redis://:password@host:6379/0`, `rediss://…` with TLS | `RedisChatMessageStore` |
    | `redis+cluster://:password@host:6379`, `rediss+cluster://…` | `RedisChatMessageStore` on a Redis Cluster |
    | `redis+sentinel://:password@host:26379,host:26379/0?service=name` | `RedisChatMessageStore` with Sentinel |
    | `memory://` | `InMemoryChatMessageStore` |

    Other packages can register stores for more schemes. A driver that SQLAlchemy's URLs name in the scheme, such as
    `postgresql+psycopg://`, is passed over.

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
    url = without_driver(url) if isinstance(url, str) else ""
    scheme, separator, _ = url.partition("://")
    for name in dict.fromkeys([scheme, scheme.partition("+")[0]]) if separator else ():
        for entry_point in entry_points(group=_ENTRY_POINTS, name=name):
            store: BaseChatMessageStore = entry_point.load().from_url(url, **settings)
            return store
    schemes = {entry_point.name for entry_point in entry_points(group=_ENTRY_POINTS)} - _SCHEMES_OF_FORMS
    raise ValueError(
        f"The URL must have one of these forms: {', '.join([*_FORMS, *(f'{name}://…' for name in sorted(schemes))])}."
    )


def without_driver(url: str) -> str:
    """Return a URL without the name of another library's driver in its scheme, such as `postgresql+psycopg://`."""
    scheme, separator, rest = url.partition("://")
    engine, _, driver = scheme.partition("+")
    if separator and driver in _DRIVERS.get("postgresql" if engine == "postgres" else engine, ()):
        return f"{engine}://{rest}"
    return url
