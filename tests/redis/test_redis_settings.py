# SPDX-License-Identifier: Apache-2.0
"""Settings of the store, and what a URL says."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import closing

import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from redis_stores import clients_of, on_a_cluster, on_one_server, say
from servers import HOST, PASSWORD, RedisServer, unused_port, wait_until

from haystack_chat_store.errors import (
    StoreConfigurationError,
    StoreTimeoutError,
    StoreUnavailableError,
    UnsupportedOperationError,
)
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.testing.concurrency import in_threads


@pytest.mark.parametrize(
    "setting",
    [
        {"url": "redis://localhost"},
        {"key_prefix": ""},
        {"key_prefix": "a{b"},
        {"key_prefix": "a}b"},
        {"key_prefix": "a\nb"},
        {"key_prefix": None},
        {"cluster": "false"},
        {"cluster": 1},
        {"cluster": None},
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": True},
        {"ttl": "60"},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": None},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        RedisChatMessageStore(**setting)


def test_a_store_loads_where_the_environment_variable_is_missing(monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)
    store = RedisChatMessageStore(cluster=True, key_prefix="my app", ttl=60, timeout=5.5)
    data = store.to_dict()
    assert data["init_parameters"]["url"] == {"type": "env_var", "env_vars": ["REDIS_URL"], "strict": True}
    loaded = RedisChatMessageStore.from_dict(json.loads(json.dumps(data)))
    assert loaded == store
    assert loaded.to_dict() == data
    loaded.close()
    with pytest.raises(StoreConfigurationError, match="REDIS_URL"):
        say(loaded, "Hi!")


def test_a_store_that_searches_survives_the_trip_to_yaml():
    store = RedisChatMessageStore(search=True)
    assert store.to_dict()["init_parameters"]["search"] is True
    assert RedisChatMessageStore.from_dict(store.to_dict()) == store


def test_a_store_that_is_to_search_a_cluster_is_refused():
    with pytest.raises(UnsupportedOperationError, match="SQLiteChatMessageStore"):
        RedisChatMessageStore(search=True, cluster=True)


def test_a_url_that_is_no_environment_variable_is_never_written_out():
    store = RedisChatMessageStore(Secret.from_token(f"redis://:{PASSWORD}@{HOST}"))
    with pytest.raises(ValueError, match="token"):
        store.to_dict()
    assert PASSWORD not in repr(store)
    assert store == RedisChatMessageStore(Secret.from_token(f"redis://:{PASSWORD}@{HOST}"))


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{PASSWORD}@{HOST}",
        f"redis://:{PASSWORD}@{HOST}?colour=blue",
        # Cut off there, what comes before would be taken for a host and its port.
        f"redis://:{PASSWORD}#?/@{HOST}",
        f"redis://:4711#{PASSWORD}@{HOST}",
        f"redis://user:4711/{PASSWORD}@{HOST}",
        f"redis://user:4711?{PASSWORD}@{HOST}",
    ],
)
def test_a_url_that_cannot_work_is_not_repeated(url, write):
    with pytest.raises(StoreConfigurationError, match="url") as raised:
        write(RedisChatMessageStore(Secret.from_token(url)), "Hi!")
    shown = "".join(traceback.format_exception(raised.value))
    assert PASSWORD not in shown
    assert "4711" not in shown


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"redis://:{PASSWORD}@{HOST}?colour={PASSWORD}", "no option 'colour'"),
        (f"redis://:{PASSWORD}@{HOST}?ssl_cert_reqs=none", "no option 'ssl_cert_reqs'.*rediss://"),
        (f"redis://:{PASSWORD}@{HOST}?ssl=true", "no option 'ssl'.*rediss://"),
        (f"redis://:{PASSWORD}@{HOST}/chats", "database behind the slash must be a number"),
        (f"redis://:{PASSWORD}@{HOST}:4711x/0", "port must be a number"),
        (f"redis://user:{PASSWORD}@{HOST}?db=nought", "option 'db'"),
        (f"redis://:4711@{PASSWORD}@{HOST}#1", "Percent-encode"),
        (f"http://:{PASSWORD}@{HOST}", "must be like redis://"),
        (f"redis+cluster://:{PASSWORD}@{HOST}", "cluster=True and write redis://, or make it by store_from_url"),
        (f"rediss+cluster://:{PASSWORD}@{HOST}", "cluster=True and write rediss://"),
    ],
)
def test_the_wrong_part_of_a_url_is_named(url, says, write):
    with pytest.raises(StoreConfigurationError, match=says) as raised:
        write(RedisChatMessageStore(Secret.from_token(url)), "Hi!")
    shown = "".join(traceback.format_exception(raised.value))
    assert PASSWORD not in shown
    assert "4711" not in shown


@on_one_server
def test_what_the_server_refuses_of_a_url_is_named(server, write):
    store = RedisChatMessageStore(Secret.from_token(f"{server.url.removesuffix('/0')}/4711"))
    with pytest.raises(StoreConfigurationError, match="does not have the database"):
        write(store, "Hi!")


@on_a_cluster
def test_a_database_of_a_cluster_is_refused(server, write):
    url = Secret.from_token(server.url.replace("+cluster", "") + "/3")
    with pytest.raises(StoreConfigurationError, match="only database 0"):
        write(RedisChatMessageStore(url, cluster=True), "Hi!")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", f"subjectAltName=IP:{HOST}", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def tls_server(certificate):
    """A server with TLS at a second port, and the URL of this port."""
    tls_port = unused_port()
    files = {"tls_cert_file": certificate / "cert.pem", "tls_key_file": certificate / "key.pem"}
    files["tls_ca_cert_file"] = certificate / "cert.pem"
    with RedisServer(tls_port=tls_port, tls_auth_clients="no", **files) as server:
        yield server, f"rediss://:{PASSWORD}@{HOST}:{tls_port}/0"


needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl for a certificate")


@needs_openssl
def test_tls_is_used_and_a_certificate_that_is_not_trusted_is_named(certificate, tls_server, write):
    _, url = tls_server
    with pytest.raises(StoreConfigurationError, match=r"does not trust.*ssl_ca_certs"):
        write(RedisChatMessageStore(Secret.from_token(url)), "Hi!")
    store = RedisChatMessageStore(Secret.from_token(f"{url}?ssl_ca_certs={certificate / 'cert.pem'}"))
    assert write(store, "Hi!") == 1
    store.close()
    with pytest.raises(StoreUnavailableError, match="rediss://"):
        write(RedisChatMessageStore(Secret.from_token(url.replace("rediss", "redis"))), "Hi!")


@needs_openssl
def test_an_event_loop_ends_soon_if_the_other_side_of_tls_is_dead(certificate, tls_server):
    server, url = tls_server
    store = RedisChatMessageStore(Secret.from_token(f"{url}?ssl_ca_certs={certificate / 'cert.pem'}"))
    with server.client() as client:
        process_id = client.info("server")["process_id"]

    async def use():
        await asyncio.gather(*(store.count_messages_async(f"history {number}") for number in range(5)))
        os.kill(process_id, signal.SIGSTOP)

    loop = threading.Thread(target=asyncio.run, args=[use()], daemon=True)
    loop.start()
    try:
        wait_until(lambda: not loop.is_alive(), "the event loop to end")
    finally:
        os.kill(process_id, signal.SIGCONT)
    loop.join()
    store.close()


def test_without_the_driver_the_error_says_what_to_install():
    program = """
import sys
import threading
sys.modules["redis"] = None
import haystack_chat_store
from haystack_chat_store.stores.redis import RedisChatMessageStore
try:
    RedisChatMessageStore()
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert 'pip install "haystack-chat-store[redis]", or "redis>=5.1,<9". Original error' in output


def test_the_driver_is_not_imported_with_the_package():
    program = "import sys, haystack_chat_store; print('redis' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"


@on_one_server
def test_a_url_may_name_a_database_and_a_socket(server, monkeypatch):
    with RedisServer(server.binary, unixsocket="redis.sock") as local:
        path = local.folder / "redis.sock"
        monkeypatch.setenv("CHAT_STORE_URL", f"unix://:{PASSWORD}@{path}?db=3")
        with closing(RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"))) as store:
            assert say(store, "Hi!") == 1
            with local.client() as client:
                assert set(client.info("keyspace")) == {"db3"}
            local.stop()
            with pytest.raises(StoreUnavailableError, match=re.escape(str(path))):
                say(store, "Hi!")


@on_one_server
def test_a_url_that_changes_is_followed_and_leaves_no_connection_behind(server, monkeypatch):
    def move():
        for database in range(5):
            monkeypatch.setenv("CHAT_STORE_URL", f"redis://:{PASSWORD}@{HOST}:{private.port}/{database}")
            yield
            wait_until(lambda: len(clients_of(private)) <= 1, "connections to be closed")

    def use():
        for _ in move():
            assert say(store, "Hi!") == 1

    async def use_async():
        for _ in move():
            assert await store.write_messages_async("history", [ChatMessage.from_user("Hi!")]) == 1
            await asyncio.sleep(0.1)  # in which the loop closes what was open

    with RedisServer(server.binary) as private, private.client() as client:
        store = RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"))
        use()
        monkeypatch.delenv("CHAT_STORE_URL")
        store.close()
        wait_until(lambda: not clients_of(private), "connections to be closed")
        asyncio.run(use_async())
        assert set(client.info("keyspace")) == {"db0", "db1", "db2", "db3", "db4"}
        store.close()


@on_one_server
def test_max_connections_of_the_url_is_kept(server, monkeypatch):
    monkeypatch.setenv("CHAT_STORE_URL", f"{server.url}?max_connections=2")
    before = len(clients_of(server))

    async def count_often(store):
        await asyncio.gather(*(store.count_messages_async("history") for _ in range(50)))
        return len(clients_of(server))

    with closing(RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"))) as store:
        assert asyncio.run(count_often(store)) == before + 2
        in_threads(*(lambda: store.count_messages("history") for _ in range(20)))
        assert len(clients_of(server)) <= before + 2


@on_one_server
def test_a_call_that_finds_no_connection_free_is_given_up(server, monkeypatch):
    monkeypatch.setenv("CHAT_STORE_URL", f"{server.url}?max_connections=1")

    def count():
        with pytest.raises(StoreTimeoutError) as raised:
            store.count_messages("history")
        return str(raised.value)

    async def count_often():
        calls = [store.count_messages_async("history") for _ in range(10)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with (
        closing(RedisChatMessageStore(Secret.from_env_var("CHAT_STORE_URL"), timeout=0.5)) as store,
        server.client() as client,
    ):
        client.client_pause(60_000, all=False)
        try:
            assert "All 1 connections" in "".join(in_threads(*[count] * 10))
            results = asyncio.run(count_often())
            assert {type(result) for result in results} == {StoreTimeoutError}
            assert "All 1 connections" in "".join(map(str, results))
        finally:
            client.client_unpause()
        assert store.count_messages("history") == 0
