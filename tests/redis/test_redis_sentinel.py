# SPDX-License-Identifier: Apache-2.0
"""A master that Sentinels watch, and the one that takes its place."""

import asyncio
import signal
import time
from contextlib import closing

import pytest
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from redis_stores import SERVERS, said, say, writers_at_work
from servers import HOST, PASSWORD, RedisSentinels, RedisServer, redis_binaries, silent_port, unused_port, wait_until
from stopwatch import Stopwatch

from haystack_chat_store import store_from_url
from haystack_chat_store.errors import ChatMessageStoreError, StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.stores.idle_connections import PROBE_SECONDS
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.stores.redis.nodes import MASTER_KNOWN_SECONDS
from haystack_chat_store.testing.concurrency import assert_whole_and_in_order
from haystack_chat_store.testing.kit import Calls
from haystack_chat_store.testing.messages import with_id

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def sentinels():
    with RedisSentinels(redis_binaries().get(SERVERS[0])) as sentinels:
        yield sentinels


@pytest.fixture
def own_sentinels():
    """For a test that changes them."""
    with RedisSentinels(redis_binaries().get(SERVERS[0])) as sentinels:
        yield sentinels


@pytest.fixture
def store(sentinels):
    with closing(store_from_url(sentinels.url, last_k=None, timeout=20)) as store:
        store.delete_all_messages()
        yield store


@pytest.fixture(params=["sync", "async"])
def calls(request):
    calls = Calls(is_async=request.param == "async")
    yield calls
    calls.end()


def test_a_store_finds_the_master_by_its_sentinels(sentinels, store, calls):
    assert calls.write(store, "history", [with_id("a"), with_id("b")]) == 2
    with sentinels.master.client() as client:
        assert client.keys("*")
    assert calls.count(store, "history") == 2
    assert calls.call(store, "statistics").messages == 2
    assert len(calls.call(store, "list_chat_histories").items) == 1
    calls.close(store)


def test_a_failover_in_good_order_is_followed(own_sentinels, calls):
    """Also before the former master has learned of it, which takes Redis up to ten seconds."""
    store = store_from_url(own_sentinels.url, last_k=None)
    calls.write(store, "history", [with_id("a")])
    own_sentinels.failover()
    with closing(store_from_url(own_sentinels.url)) as other:
        say(other, "of a new process")
        time.sleep(MASTER_KNOWN_SECONDS)
        assert calls.count(store, "history") == 2
        assert calls.write(store, "history", [with_id("b")]) == 1
        assert other.count_messages("history") == 3
    calls.close(store)


def test_a_master_that_is_known_is_used_while_no_sentinel_answers(own_sentinels, calls):
    store = store_from_url(own_sentinels.url)
    calls.write(store, "history", [with_id("a")])
    for sentinel in own_sentinels.sentinels:
        sentinel.kill()
    time.sleep(MASTER_KNOWN_SECONDS)
    for number in range(3):
        assert calls.write(store, "history", [with_id(f"{number}")]) == 1
    calls.close(store)


@pytest.mark.parametrize("hanging", [1, 3])
def test_sentinels_that_hang_delay_a_call_by_no_more_than_a_moment(own_sentinels, calls, hanging):
    store = store_from_url(own_sentinels.url)
    calls.write(store, "history", [with_id("a")])
    for sentinel in own_sentinels.sentinels[:hanging]:
        sentinel._process.send_signal(signal.SIGSTOP)
    time.sleep(MASTER_KNOWN_SECONDS)
    with Stopwatch() as seconds:
        for number in range(20):
            assert calls.write(store, "history", [with_id(f"{number}")]) == 1
        assert seconds() < hanging * PROBE_SECONDS + 1
    calls.close(store)


def test_a_master_that_dies_while_others_write_is_followed(own_sentinels):
    store = store_from_url(own_sentinels.url, last_k=None, timeout=30)
    with writers_at_work(store, StoreUnavailableError) as (writers, acknowledged):
        master = own_sentinels.master
        master.kill()
        before = len(acknowledged)
        wait_until(lambda: len(acknowledged) > before + 20, "the replica to take over")
        wait_until(lambda: own_sentinels.master is not master, "the Sentinels to name the new master")
    found = said(store)
    # What the replica had not got is lost, in whole batches: Redis answers first.
    assert_whole_and_in_order(found, writers, [batch for batch in acknowledged if set(batch) <= set(found)])
    store.close()


def test_a_master_that_hangs_is_left_for_the_one_that_takes_over(own_sentinels, calls):
    store = store_from_url(own_sentinels.url, timeout=20)
    calls.write(store, "history", [with_id("a")])
    replica = own_sentinels.servers[1]
    wait_until(lambda: has_keys(replica), "the replica to have the write")
    own_sentinels.master._process.send_signal(signal.SIGSTOP)
    with Stopwatch() as seconds:
        assert calls.write(store, "history", [with_id("b")]) == 1
        assert seconds() < 20
    assert calls.count(store, "history") == 2
    calls.close(store)


def has_keys(server):
    with server.client() as client:
        return client.keys("*")


def test_sentinels_that_are_gone_are_passed_over(sentinels, calls):
    with silent_port() as silent:
        hosts = f"{HOST}:{unused_port()},{HOST}:{silent},{HOST}:{sentinels.sentinels[0].port}"
        store = store_from_url(f"redis+sentinel://:{PASSWORD}@{hosts}?service={sentinels.service}", timeout=4)
        calls.write(store, "elsewhere", [with_id("a")])
        calls.delete(store, "elsewhere")
        calls.close(store)


def test_sentinels_may_have_a_password_of_their_own(calls):
    with RedisSentinels(redis_binaries().get(SERVERS[0]), password="of-sentinels") as sentinels:
        store = store_from_url(sentinels.url)
        assert calls.write(store, "history", [with_id("a")]) == 1
        calls.close(store)
        for wrong in ("", "&sentinel_password=another"):
            store = store_from_url(sentinels.url.replace("&sentinel_password=of-sentinels", wrong), timeout=5)
            with pytest.raises(StoreConfigurationError, match=r"Sentinel at .* refused.*sentinel_password"):
                calls.count(store, "history")


def test_what_is_wrong_with_the_url_is_named(sentinels, calls):
    def refused(url, says, error=StoreConfigurationError, **settings):
        store = RedisChatMessageStore(Secret.from_token(url), timeout=5, **settings)
        with pytest.raises(error, match=says) as raised:
            calls.count(store, "history")
        assert PASSWORD not in str(raised.value)
        assert "wrong-pw" not in str(raised.value)

    refused(sentinels.url.replace("chats", "others"), "do not know the service 'others'")
    refused(sentinels.url.replace("?service=chats", ""), "service is missing")
    refused(sentinels.url.replace("?service=chats", "?service="), "service is missing")
    refused(sentinels.url.replace("/0", "/nought"), "database")
    refused(sentinels.url.replace(f"@{HOST}:", f"@{HOST}:x"), "port must be a number")
    refused(sentinels.url.replace(f"@{HOST}:", f"@,{HOST}:"), "no host")
    refused(sentinels.url + "&colour=blue", "no option 'colour'")
    refused(sentinels.url.replace(PASSWORD, "wrong-pw"), "refused the user name or password")
    refused(sentinels.url, "cluster=True", cluster=True)
    absent = f"redis+sentinel://:{PASSWORD}@{HOST}:{unused_port()},{HOST}:{unused_port()}/0?service=chats"
    refused(absent, "cannot be reached", StoreUnavailableError)


def test_a_server_that_is_no_sentinel_is_reported(calls):
    with RedisServer(redis_binaries().get(SERVERS[0])) as server:
        url = f"redis+sentinel://{HOST}:{server.port}?service=chats&sentinel_password={PASSWORD}"
        with pytest.raises(ChatMessageStoreError, match="SENTINEL"):
            calls.count(store_from_url(url, timeout=5), "history")


def test_many_calls_at_once_follow_a_failover(own_sentinels):
    store = store_from_url(own_sentinels.url)

    async def write_all(numbers):
        writes = (store.write_messages_async("history", [ChatMessage.from_user(f"{number}")]) for number in numbers)
        return await asyncio.gather(*writes)

    async def use():
        await write_all(range(20))
        await asyncio.to_thread(own_sentinels.failover)
        await asyncio.sleep(MASTER_KNOWN_SECONDS)
        return await write_all(range(20, 40))

    assert asyncio.run(use()) == [1] * 20
    assert store.count_messages("history") == 40
    store.close()
