# SPDX-License-Identifier: Apache-2.0
"""What the store keeps in Redis, how long, and what it does when something else has changed it."""

import json
import re
import time
from itertools import combinations, islice

import pytest
from haystack.dataclasses import ChatMessage
from redis.crc import key_slot
from redis_stores import (
    DOCUMENTATION,
    KINDS,
    SECRET,
    all_keys_of,
    everything,
    key_of,
    keys_of,
    neighbours,
    nodes_of,
    on_a_cluster,
    on_every_engine,
    on_every_server,
    on_one_server,
    said,
    say,
)

from haystack_chat_store.errors import MessageDecodingError, SchemaVersionError, StoreConfigurationError
from haystack_chat_store.ids import MESSAGE_ID_KEY as ID
from haystack_chat_store.stores.redis import erasing
from haystack_chat_store.stores.redis.scripts import messages as scripts
from haystack_chat_store.testing.messages import with_id

# ---------------------------------------------------------------------- keys


@on_every_engine
def test_what_is_kept_can_be_read_by_anyone(store, client):
    store.write_messages("user 456", [with_id("a", "Hi!"), ChatMessage.from_assistant("Hello!")])
    tag = re.match(r"\{.*\}", keys_of(store, client)[0])[0]
    assert tag in [f"{{{store.key_prefix}:default:{bucket}}}" for bucket in range(64)]
    history = f"{tag}:user%20456"
    assert keys_of(store, client) == sorted(
        [f"{tag}:schema_version", f"{tag}:histories", f"{tag}:names"]
        + [f"{history}:{kind}" for kind in ("history", "contents", "roles", "message_ids", "times")]
    )
    contents = [json.loads(content) for content in client.lrange(f"{history}:contents", 0, -1)]
    assert [message["content"] for message in contents] == [[{"text": "Hi!"}], [{"text": "Hello!"}]]
    assert client.get(f"{history}:roles") == b"ua"
    assert client.hget(f"{history}:message_ids", "a") == b"0"
    counters = client.hgetall(f"{history}:history")
    created_at, updated_at = int(counters.pop(b"created_at")), int(counters.pop(b"updated_at"))
    assert re.fullmatch(rb"[0-9a-f]{16}=2 ", counters.pop(b"calls"))
    assert abs(created_at / 10**6 - time.time()) < 60
    assert counters == {
        b"next_position": b"2",
        b"message_count": b"2",
        b"round_count": b"1",
        b"chat_history_id": b"user 456",
        b"revision": b"1",
        b"preview": b"Hi!",
        b"last_role": b"a",
        b"last_text": b"Hello!",
        b"last_at": str(created_at).encode(),
    }
    assert client.get(f"{history}:times") == (2 * b"%018d") % (created_at, created_at)
    assert client.zrange(f"{tag}:histories", 0, -1, withscores=True) == [(b"user 456", updated_at)]
    assert client.zrange(f"{tag}:names", 0, -1, withscores=True) == [(b"user 456", 0)]


@on_one_server
def test_the_documentation_names_all_that_is_kept_of_a_history_and_no_more(make_store, client):
    store = make_store(ttl=60, user_id="ada")
    store.write_messages("old", [with_id("a"), with_id("b")], expected_revision=0)
    store.rename_chat_history("old", "history")
    store.delete_messages("history", message_ids=["a"])
    store.update_chat_history("history", title="Weather", meta={"pinned": True})
    (described,) = re.findall(r"^\| `\S+:history` \| hash \| (.*) \|$", DOCUMENTATION, re.MULTILINE)
    fields = [field.decode() for field in client.hkeys(key_of(store, client, "history:history"))]
    assert sorted(set(re.findall("`(.*?)`", described)) - {"ttl"}) == sorted(fields)


@on_every_engine
def test_a_history_that_has_expired_begins_anew_with_a_greater_revision(make_store, client):
    store, mortal = make_store(), make_store(ttl=0.1)
    changes = [
        lambda: say(mortal, "one", "two"),
        lambda: mortal.delete_messages("history", message_ids=[mortal.retrieve_messages("history")[0].meta[ID]]),
        lambda: mortal.replace_messages("history", mortal.retrieve_messages("history")[0].meta[ID], [with_id("a")]),
    ]
    revision = 0
    for number in range(1, 1 + len(changes)):
        for change in changes[:number]:
            change()
            before, revision = revision, mortal.get_chat_history("history").revision
            assert revision > before
        time.sleep(0.2)
        assert store.get_chat_history("history") is None
    say(store, "Hi!")
    assert store.get_chat_history("history").revision > revision
    (kept,) = set(all_keys_of(store, client)) - set(keys_of(store, client))
    assert kept.endswith("}:deleted_revision")
    assert (client.get(kept), client.ttl(kept)) == (b"%d" % revision, -1)
    store.delete_all_messages()
    assert all_keys_of(store, client) == [kept]
    assert client.get(kept) == b"%d" % (revision + 1)


HOSTILE = [
    "}",
    "{}",
    "{other}",
    "a}:b{",
    ":",
    "a:contents",
    "a",
    "A",
    "a ",
    "%7D",
    "*",
    "a\nb",
    "\u00e4",
    "a\u0308",
    "💬" * 512,
]


@on_every_engine
def test_no_id_can_forge_a_hash_tag_or_another_key(make_store, client):
    stores = [make_store(namespace=namespace[:128]) for namespace in ("default", *HOSTILE)]
    for store in stores:
        for history in HOSTILE:
            assert say(store, f"{store.namespace} {history}", history=history) == 1
    keys = keys_of(stores[0], client)
    assert len([key for key in keys if key.endswith(":contents")]) == len(stores) * len(HOSTILE)
    for key in keys:
        assert re.fullmatch(rf"\{{{stores[0].key_prefix}:[\w.~%-]+:\d+\}}(:[\w.~%-]+){{1,2}}", key, re.ASCII)
        assert key_slot(key.encode()) == key_slot(key[1 : key.index("}")].encode())
    for store in stores:
        assert [said(store, history) for history in HOSTILE] == [[f"{store.namespace} {each}"] for each in HOSTILE]


@on_a_cluster
def test_the_histories_of_a_namespace_spread_over_the_masters(store, server):
    for number in range(200):
        say(store, "Hi!", history=f"user_{number}")
    sizes = []
    for node in server.nodes:
        with node.client() as client:
            sizes.append(len([key for key in client.keys(f"*{store.key_prefix}*") if key.endswith(b":contents")]))
    assert sum(sizes) == 200
    assert min(sizes) > 20


@on_every_engine
def test_deleting_everything_leaves_all_other_keys_alone(make_store, client):
    store, other, longer = make_store(), make_store(namespace="other"), make_store(namespace="default:1")
    for each in (store, other, longer):
        for number in range(150):
            say(each, "Hi!", history=f"user_{number}")
    tag = f"{{{store.key_prefix}:default:7}}"
    foreign = [f"{store.key_prefix}:default:7", f"{tag}:user_1:notes", f"{tag}:mine", f"{{{store.key_prefix}:default}}"]
    for key in foreign:
        client.set(key, "keep me")
    store.delete_all_messages()
    assert [other.count_messages("user_1"), longer.count_messages("user_149")] == [1, 1]
    other.delete_all_messages()
    longer.delete_all_messages()
    assert keys_of(store, client) == sorted(foreign)


@on_one_server
def test_deleting_everything_comes_to_an_end_however_fast_others_write(store, monkeypatch):
    delete_histories = erasing.delete_histories
    steps = []

    async def delete_and_write_again(session, keys, bucket, histories):
        await delete_histories(session, keys, bucket, histories)
        steps.append(bucket)
        assert len(steps) < 1000, "it does not come to an end"
        for history in histories:
            say(store, "Hi again!", history=history)

    for history in MANY:
        say(store, "Hi!", history=history)
    monkeypatch.setattr(erasing, "delete_histories", delete_and_write_again)
    store.delete_all_messages()
    assert [said(store, history) for history in MANY] == [["Hi again!"]] * len(MANY)


@on_one_server
def test_deleting_everything_leaves_nothing_of_a_history_that_is_written_to_meanwhile(store, monkeypatch):
    delete_histories = erasing.delete_histories

    async def write_and_delete(session, keys, bucket, histories):
        say(store, "meanwhile")
        await delete_histories(session, keys, bucket, histories)

    for history in islice(neighbours("history"), 150):
        say(store, "Hi!", history=history)
    say(store, "Hi!")
    monkeypatch.setattr(erasing, "delete_histories", write_and_delete)
    store.delete_all_messages()
    assert said(store) == []


@on_every_engine
def test_each_call_is_one_script_and_one_round_trip(store, client, server):
    def calls():
        counted = {}
        for node in nodes_of(server):
            with node.client() as client:
                for name, stats in client.info("commandstats").items():
                    counted[name] = counted.get(name, 0) + stats["calls"]
        return sum(counted.get(f"cmdstat_{name}", 0) for name in ("evalsha", "eval", "cluster|slots"))

    def use():
        say(store, "Hi!", "Are you there?")
        store.retrieve_messages("history")
        store.retrieve_messages("history", last_k=1)
        store.count_messages("history")
        store.delete_messages("history")

    use()
    before = calls()
    use()
    assert calls() - before == 5


# What a message takes in memory, in bytes, beyond the JSON that it is.
@on_every_server
@pytest.mark.parametrize(("histories", "rounds"), [(1, 5000), (500, 10)])
def test_a_message_takes_little_more_memory_than_its_text(store, client, histories, rounds):
    client.flushall()
    client.config_set("appendfsync", "no")  # or it takes long
    content = 250 * "x"

    def used():
        return client.info("memory")["used_memory"] - client.info("memory").get("used_memory_scripts", 0)

    say(store, "so that the script is known", history="another")
    before = used()
    for history in range(histories):
        for _ in range(rounds):
            turn = [ChatMessage.from_user(content), ChatMessage.from_assistant(content)]
            store.write_messages(f"user_{history}", turn)
    size = len(client.lindex(next(k for k in keys_of(store, client) if k.endswith("user_0:contents")), 0))
    client.config_set("appendfsync", "always")
    assert (used() - before) / (2 * rounds * histories) <= 1.3 * size + 150


# ---------------------------------------------------------------------- expiry


def expiry(store, client):
    """When the only history expires, in milliseconds. Its keys and those of its bucket have to agree."""
    keys = keys_of(store, client)
    assert len(keys) == 9
    left = client.eval("for i, key in ipairs(KEYS) do KEYS[i] = redis.call('PTTL', key) end return KEYS", 9, *keys)
    assert max(left) - min(left) <= 2  # Redis 6 lets the time pass while a script runs
    expires_at = int(client.hget(key_of(store, client, "history"), "expires_at"))
    assert abs(time.time() * 1000 + left[0] - expires_at) < 1000
    return expires_at


@on_every_engine
def test_a_history_expires_as_a_whole(make_store, client):
    store = make_store(ttl=60)
    store.write_messages("history", [ChatMessage.from_assistant("Hello!")])
    say(store, "Hi!")
    assert abs(expiry(store, client) / 1000 - time.time() - 60) < 20


@on_every_engine
def test_a_write_renews_the_expiry(make_store, client):
    store = make_store(ttl=60)
    store.write_messages("history", [with_id("a")])
    before = expiry(store, client)
    time.sleep(0.01)
    say(store, "Hi!")
    renewed = expiry(store, client)
    assert before < renewed < before + 30_000
    for again in (store, make_store()):
        time.sleep(0.01)
        assert again.write_messages("history", [with_id("a")]) == 0
        assert expiry(store, client) == renewed


@on_every_engine
def test_an_expired_history_is_gone_and_its_next_life_begins_empty(make_store, client):
    store, mortal = make_store(ttl=60), make_store(ttl=0.1)
    assert mortal.write_messages("history", [with_id("a", "Hi!")]) == 1
    time.sleep(0.2)
    assert said(store) == []
    assert store.count_messages("history") == 0
    assert keys_of(store, client) == []
    assert store.write_messages("history", [with_id("a", "Hi again!")]) == 1
    assert said(store) == ["Hi again!"]


MANY = [f"user_{number}" for number in range(300)]  # some in every bucket


@on_every_engine
def test_expired_histories_leave_the_directory(make_store, client):
    short, long = make_store(ttl=0.2), make_store(ttl=60)
    for history in MANY:
        say(long, "Hi!", history=history)
        say(short, "Hi!", history=f"another {history}")
    time.sleep(0.3)
    for history in MANY:
        say(long, "Hi!", history=history)
    for kind in ("histories", "names", "expiries"):
        assert sum(client.zcard(key) for key in keys_of(long, client) if key.endswith(f"}}:{kind}")) == len(MANY)


@on_every_engine
def test_none_means_never(make_store, client):
    mortal, immortal = make_store(ttl=1), make_store(ttl=None)
    for history in MANY:
        say(immortal, "one", history=history)
    say(mortal, "one", history="lost")
    say(mortal, "one", history="saved")
    say(immortal, "two", history="saved")
    time.sleep(1.1)
    say(immortal, "two", history="lost")  # anew
    for history in MANY:  # writes that look for what has expired
        say(mortal, "one", history=f"another {history}")
    time.sleep(1.1)
    assert [said(immortal, history) for history in ("lost", "saved", MANY[7])] == [["two"], ["one", "two"], ["one"]]
    immortal.delete_all_messages()
    assert [immortal.count_messages(history) for history in ("lost", "saved", MANY[7])] == [0, 0, 0]


@on_every_engine
def test_a_bucket_is_gone_when_all_its_histories_have_expired_or_been_deleted(make_store, client):
    mortal, immortal = make_store(ttl=0.2), make_store(ttl=None)
    first, second = islice(neighbours("history"), 2)

    def fill():
        say(immortal, "Hi!")
        say(mortal, "Hi!", history=first)
        say(mortal, "Hi!", history=second)

    fill()
    immortal.delete_messages("history")
    time.sleep(0.3)
    assert keys_of(immortal, client) == []
    fill()
    time.sleep(0.3)
    immortal.delete_messages("history")
    assert keys_of(immortal, client) == []
    fill()
    time.sleep(0.3)
    say(immortal, "Are you there?")
    (kept,) = (key for key in keys_of(immortal, client) if key.endswith("}:histories"))
    assert client.zrange(kept, 0, -1) == [b"history"]
    immortal.delete_messages("history")
    assert keys_of(immortal, client) == []


@on_every_engine
def test_deleting_everything_finds_histories_that_expire(make_store, client):
    mortal, immortal = make_store(ttl=60), make_store()
    for number in range(100):
        say(mortal, "Hi!", history=f"user_{number}")
        say(immortal, "Hi!", history=f"another_{number}")
    mortal.delete_all_messages()
    assert keys_of(mortal, client) == []


# ---------------------------------------------------------------------- what others did to the keys


@on_every_engine
def test_a_key_that_holds_something_else_is_left_alone(store, client, write):
    say(store, "Hi!")
    for key in keys_of(store, client):
        if key.endswith("}:names"):
            continue  # only the first write to a history needs it
        kept = client.dump(key)
        client.delete(key)
        if key.endswith(("roles", "times", "schema_version")):
            client.rpush(key, "something else")
        else:
            client.set(key, "something else")
        before = everything(store, client)
        with pytest.raises(StoreConfigurationError, match="key_prefix"):
            write(store, SECRET)
        assert everything(store, client) == before
        client.delete(key)
        client.restore(key, 0, kept)
    assert write(store, "Are you there?") == 1
    assert said(store) == ["Hi!", "Are you there?"]


@on_every_engine
def test_a_new_history_is_not_written_where_the_names_are_something_else(store, client, write):
    say(store, "Hi!", history=next(neighbours("history")))
    key = key_of(store, client, "names")
    client.set(key, "something else")
    before = everything(store, client)
    with pytest.raises(StoreConfigurationError, match="key_prefix"):
        write(store, SECRET)
    assert everything(store, client) == before


@on_every_engine
@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(lost, id="+".join(lost), marks=[pytest.mark.full] * (size > 1))
        for size in (1, 2, 3, 4)
        for lost in combinations(KINDS, size)
    ],
)
def test_a_history_that_has_lost_keys_is_not_taken_for_a_whole_one(store, client, lost):
    say(store, "Hi!", "Are you there?")
    for kind in lost:
        client.delete(key_of(store, client, kind))
    before = everything(store, client)
    for call in (
        lambda: say(store, "Hello?"),
        lambda: said(store),
        lambda: store.retrieve_messages("history"),
        lambda: store.count_messages("history"),
    ):
        with pytest.raises(MessageDecodingError, match=r"doctor.*noeviction.*:history:'"):
            call()
    assert everything(store, client) == before
    store.delete_messages("history")
    assert say(store, "Hi again!") == 1
    assert said(store) == ["Hi again!"]


@on_every_engine
def test_what_separates_contents_in_an_answer_may_be_in_a_message_and_in_what_is_none(store, client):
    texts = [f"{number}{scripts.SEPARATOR}" for number in range(250)]
    store.write_messages("history", [ChatMessage.from_user(text) for text in texts])
    assert [message.text for message in store.retrieve_messages("history", 250)] == texts
    client.lset(key_of(store, client, "contents"), 120, f"not {scripts.SEPARATOR} a message")
    with pytest.raises(MessageDecodingError, match="Message 120 of those read"):
        store.retrieve_messages("history", 250)
    assert [message.text for message in store.retrieve_messages("history", 100)] == texts[150:]


@on_every_engine
def test_a_content_that_is_no_message_is_our_error(store, client):
    say(store, "Hi!")
    client.lset(key_of(store, client, "contents"), 0, b"\xff not a message")
    with pytest.raises(MessageDecodingError):
        said(store)


@on_every_engine
def test_histories_of_a_newer_schema_version_are_refused_untouched(store, client):
    say(store, "Hi!")
    client.set(key_of(store, client, "schema_version"), 2)
    before = everything(store, client)
    for call in (
        lambda: say(store, "Are you there?"),
        lambda: said(store),
        lambda: store.retrieve_messages("history", last_k=1),
        lambda: store.count_messages("history"),
        lambda: store.delete_messages("history"),
        store.delete_all_messages,
        store.list_chat_histories,
        lambda: store.update_chat_history("history", title="Hello"),
        lambda: store.list_messages("history"),
        lambda: store.delete_messages("history", message_ids=["a"]),
        lambda: store.copy_messages("history", "another"),
        lambda: store.delete_chat_histories(prefix="h"),
    ):
        with pytest.raises(SchemaVersionError, match="Upgrade"):
            call()
    assert everything(store, client) == before
