# SPDX-License-Identifier: Apache-2.0
"""One line of configuration becomes a store."""

import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from haystack.utils import Secret

from haystack_chat_store import (
    InMemoryChatMessageStore,
    PostgresChatMessageStore,
    RedisChatMessageStore,
    SQLiteChatMessageStore,
    store_from_url,
    urls,
)

TOKEN = Secret.from_token


@pytest.mark.parametrize(
    ("url", "store"),
    [
        ("memory://", InMemoryChatMessageStore()),
        ("sqlite:///relative.db", SQLiteChatMessageStore("relative.db")),
        ("sqlite:///a/b.db", SQLiteChatMessageStore("a/b.db")),
        ("sqlite:////absolute.db", SQLiteChatMessageStore("/absolute.db")),
        ("sqlite:///two%20words%3F.db", SQLiteChatMessageStore("two words?.db")),
        *(
            (url, PostgresChatMessageStore(TOKEN(url)))
            for url in (
                "postgresql://u:p@host:5433/db?sslmode=require",
                "postgres://a,b/db",
                "postgresql:///db?host=/run",
            )
        ),
        *((url, RedisChatMessageStore(TOKEN(url))) for url in ("redis://:p@host:6380/1", "rediss://u:p@host")),
        ("postgresql+psycopg://u:p@host/db", PostgresChatMessageStore(TOKEN("postgresql://u:p@host/db"))),
        ("postgres+asyncpg://u:p@host/db", PostgresChatMessageStore(TOKEN("postgres://u:p@host/db"))),
        ("sqlite+aiosqlite:///relative.db", SQLiteChatMessageStore("relative.db")),
        (
            "redis+sentinel://:p@a,b:1/0?service=s",
            RedisChatMessageStore(TOKEN("redis+sentinel://:p@a,b:1/0?service=s")),
        ),
        ("redis+cluster://:p@host:7000", RedisChatMessageStore(TOKEN("redis://:p@host:7000"), cluster=True)),
        ("rediss+cluster://host", RedisChatMessageStore(TOKEN("rediss://host"), cluster=True)),
    ],
    ids=str,
)
def test_each_form_makes_its_store(url, store):
    assert store_from_url(url) == store


@pytest.mark.parametrize(
    "url", ["memory://", "sqlite:///chat.db", "postgresql://host/db", "redis://host", "redis+cluster://host"]
)
def test_settings_go_to_the_store(url):
    store = store_from_url(url, last_k=3, last_k_unit="message", namespace="tenant", skip_system_messages=False)
    settings = (store.last_k, store.last_k_unit, store.namespace, store.skip_system_messages)
    assert settings == (3, "message", "tenant", False)


def test_an_engines_own_settings_go_to_it_too():
    assert store_from_url("redis://host", ttl=60).ttl == 60
    assert store_from_url("postgresql://host/db", table_prefix="t").table_prefix == "t"
    assert Path(store_from_url("sqlite:///chat.db", timeout=1).path) == Path("chat.db")


@pytest.mark.parametrize(
    "url",
    [
        None,
        "",
        "chat.db",
        "sqlite:///chat.db?s3cret=1",
        "sqlite:///chat.db#s3cret",
        "sqlite://",
        "sqlite:///",
        "sqlite://host/s3cret.db",
        "memory://s3cret",
        "postgresql://",
        "redis:/s3cret",
        "redis://user:s3cret℀@host:1",
        "redis+sentinel://:[s3cret@host:1",
        "mysql://user:s3cret@host/db",
        "REDIS//:s3cret@host",
        "redis+psycopg://:s3cret@host",
        "postgresql+mysql://user:s3cret@host/db",
        "sqlite+psycopg:///s3cret.db",
        "memory+s3cret://",
    ],
)
def test_other_forms_are_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="URL") as caught:
        store_from_url(url)
    assert "s3cret" not in str(caught.value)


def test_the_error_shows_each_form_that_the_docs_show():
    with pytest.raises(ValueError, match="URL") as caught:
        store_from_url("chat.db")
    schemes = set(re.findall(r"[a-z+]+(?=://)", str(caught.value)))
    page = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
    table = page[page.index("| URL | store |") :].split("\n\n", 1)[0]
    assert schemes == set(re.findall(r"[a-z+]+(?=://)", table))


def test_the_error_shows_schemes_of_other_packages(monkeypatch):
    registered = entry_points(group="haystack_chat_store.engines")
    other = EntryPoint("folder", "own_store_directory:SearchableFolderChatMessageStore", "haystack_chat_store.engines")
    monkeypatch.setattr(urls, "entry_points", lambda name=None, **_: [*registered, other] if name is None else [])
    with pytest.raises(ValueError, match=r"memory://.*, folder://…\."):
        store_from_url("folder2")
