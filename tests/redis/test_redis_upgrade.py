# SPDX-License-Identifier: Apache-2.0
"""
What version 1 has left in Redis is upgraded in place, bucket by bucket and history by history, as they are written to.
"""

import json
import re

import pytest
from redis_stores import everything, key_of, keys_of, neighbours, on_every_engine, said, say

from haystack_chat_store import UnsupportedOperationError
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.stores.redis.keys import bucket_of
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.messages import with_id

CREATED_AT = 1_700_000_000_123_456
UPDATED_AT = CREATED_AT + 10**6


def write_as_version_1(store, client, chat_history_id, *said, expires_at=None):
    """
    Do what version 1 did with user messages, which have the ids a, b, c...
    """
    tag = f"{{{store.key_prefix}:default:{bucket_of(chat_history_id)}}}"
    history = f"{tag}:{chat_history_id}"
    for position, text in enumerate(said):
        message_id = chr(ord("a") + position)
        client.rpush(f"{history}:contents", json.dumps(with_id(message_id, text).to_dict()))
        client.append(f"{history}:roles", "u")
        client.hset(f"{history}:message_ids", message_id, position)
    counts = {"next_position": len(said), "message_count": len(said), "round_count": len(said)}
    times = {"created_at": CREATED_AT, "updated_at": UPDATED_AT}
    client.hset(f"{history}:history", mapping={"chat_history_id": chat_history_id, **counts, **times})
    client.zadd(f"{tag}:histories", {chat_history_id: UPDATED_AT})
    client.set(f"{tag}:schema_version", 1)
    if expires_at is not None:
        client.hset(f"{history}:history", "expires_at", expires_at)
        client.zadd(f"{tag}:expiries", {chat_history_id: expires_at})
        for key in keys_of(store, client):
            client.pexpireat(key, expires_at)


def times_of(store, chat_history_id):
    return [stored.created_at.timestamp() for stored in store.list_messages(chat_history_id)]


@on_every_engine
def test_reading_finds_everything_and_changes_nothing(store, client):
    write_as_version_1(store, client, "history", "Hi!", "Are you there?")
    before = everything(store, client)
    assert said(store) == ["Hi!", "Are you there?"]
    assert store.count_messages("history") == 2
    assert times_of(store, "history") == [CREATED_AT / 10**6] * 2
    info = store.get_chat_history("history")
    assert (info.message_count, info.round_count, info.title, info.meta) == (2, 2, None, {})
    assert everything(store, client) == before


@on_every_engine
def test_a_write_upgrades_its_bucket_and_its_history(store, client):
    other = next(neighbours("history"))
    write_as_version_1(store, client, "history", "Hi!", "Are you there?")
    write_as_version_1(store, client, other, "Hello!")
    assert say(store, "Hello?") == 1
    assert client.get(key_of(store, client, "schema_version")) == b"2"
    assert sorted(client.zrange(key_of(store, client, "names"), 0, -1)) == sorted([b"history", other.encode()])
    *before, last = times_of(store, "history")
    assert before == [CREATED_AT / 10**6] * 2
    assert last > UPDATED_AT / 10**6
    assert store.statistics().messages_per_day == {
        stored.created_at.date(): 3 if number == 0 else 1
        for number, stored in enumerate(store.list_messages("history")[1:])
    }
    assert said(store) == ["Hi!", "Are you there?", "Hello?"]
    assert said(store, other) == ["Hello!"]
    store.write_messages(other, [with_id("a", "Hello!"), with_id("z")])
    assert store.engine.run(store.engine.check, store.scope, False) == []


@on_every_engine
@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.list_chat_histories(),
        lambda store: store.list_chat_histories(prefix="hist"),
        lambda store: store.engine.run(store.engine.histories_by_id, store.scope, "", "", 10),
        lambda store: store.update_chat_history("history", title="Weather"),
        lambda store: store.delete_messages("history", message_ids=["a"]),
        lambda store: store.copy_messages("history", next(neighbours("history"))),
    ],
    ids=["list", "list with prefix", "walk by id", "title", "delete a message", "copy"],
)
def test_so_does_every_other_call_that_needs_it(store, client, call):
    write_as_version_1(store, client, "history", "Hi!", "Are you there?")
    call(store)
    assert client.get(key_of(store, client, "schema_version")) == b"2"
    assert [page.chat_history_id for page in store.list_chat_histories(prefix="history").items] == ["history"]
    assert say(store, "Hello?") == 1
    assert store.engine.run(store.engine.check, store.scope, False) == []


@on_every_engine
def test_what_was_to_expire_still_does(store, client):
    write_as_version_1(store, client, "history", "Hi!", expires_at=4 * 10**12)
    store.list_chat_histories(prefix="h")
    expiries = {re.sub(".*:", "", key): client.pttl(key) > 0 for key in keys_of(store, client)}
    kinds = ["contents", "expiries", "histories", "history", "message_ids", "names", "roles", "schema_version"]
    assert expiries == dict.fromkeys(kinds, True)
    assert store.engine.run(store.engine.check, store.scope, False) == []


@on_every_engine
def test_a_copy_of_what_version_1_wrote_has_its_times(store, client):
    write_as_version_1(store, client, "history", "Hi!", "Are you there?")
    targets = [next(neighbours("history")), "elsewhere", "in yet another place"]
    for target in targets:
        assert store.copy_messages("history", target) == 2
        assert times_of(store, target) == [CREATED_AT / 10**6] * 2
        assert said(store, target) == ["Hi!", "Are you there?"]


@on_every_engine
def test_many_that_upgrade_at_once_lose_nothing(make_store, client):
    store = make_store(last_k=None)
    histories = ["history", *(other for other, _ in zip(neighbours("history"), range(7), strict=False))]
    for history in histories:
        write_as_version_1(store, client, history, "Hi!")
    in_threads(
        *(lambda history=history, n=n: say(store, str(n), history=history) for history in histories for n in (1, 2))
    )
    assert {history: len(said(store, history)) for history in histories} == dict.fromkeys(histories, 3)
    assert len(store.list_chat_histories().items) == 8
    assert store.engine.run(store.engine.check, store.scope, False) == []


def test_a_store_that_is_to_search_is_refused():
    with pytest.raises(UnsupportedOperationError, match="SQLiteChatMessageStore"):
        RedisChatMessageStore(search=True)
