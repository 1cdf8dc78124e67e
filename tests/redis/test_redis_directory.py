# SPDX-License-Identifier: Apache-2.0
"""
The directory of Redis' buckets: what has expired is not in it, what a page costs, and what leaves the server's files.
"""

import asyncio
import itertools
import json
import re
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from haystack.utils import Secret
from redis_stores import (
    DOCUMENTATION,
    ENGINES,
    EVERY_SERVER,
    SECRET,
    LosesAnswers,
    keys_of,
    neighbours,
    nodes_of,
    on_every_engine,
    on_every_server,
    on_one_server,
    said,
    say,
    stores_on,
)
from servers import HOST, RedisServer, wait_until

from haystack_chat_store import ChatMessageStoreError, RedisChatMessageStore
from haystack_chat_store.errors import StoreConfigurationError, StoreUnavailableError
from haystack_chat_store.stores.redis import erasing, writing
from haystack_chat_store.stores.redis.keys import bucket_of
from haystack_chat_store.stores.redis.writing import remove_ids
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing.messages import with_id

MANY = [f"user_{number:03d}" for number in range(300)]  # some in every bucket


IN_AN_HOUR = int(time.time() + 3600) * 10**6


def ids(page):
    return [info.chat_history_id for info in page.items]


def walked(store, **arguments):
    found, cursor = [], None
    while True:
        page = store.list_chat_histories(cursor=cursor, **arguments)
        found += ids(page)
        cursor = page.cursor
        if cursor is None:
            return found


@on_every_engine
def test_a_walk_sees_all_buckets_in_one_order(store):
    for history in MANY:
        say(store, "Hi!", history=history)
    for history in MANY[100:120]:
        say(store, "Are you there?", history=history)
    newest_first = [*MANY[100:120], *MANY[120:][::-1], *MANY[:100][::-1]]
    newest_first[:20] = newest_first[:20][::-1]
    for limit in (1, 7, 100, 1000):
        if limit > 1:
            assert walked(store, limit=limit) == newest_first
        assert walked(store, limit=limit, prefix="user_01") == MANY[10:20][::-1]
    assert asyncio.run(store.list_chat_histories_async(limit=50)) == store.list_chat_histories(limit=50)


def import_empty(store, chat_history_id, updated_at):
    history = HistoryRow(chat_history_id=chat_history_id, created_at=0, updated_at=updated_at)
    store.engine.run(store.engine.import_history, store.scope, history, [], 0)


@on_every_engine
def test_histories_of_the_same_moment_are_in_the_order_of_their_code_points(store):
    ids_ = [*MANY, "\u00e4", "\uffee", "\U0001f600", "Z", "z", "\u00c4"]
    for history in ids_:
        import_empty(store, history, 1_000_000)
    import_empty(store, "before", -(10**15))
    import_empty(store, "after", 253_402_300_799_999_999)
    expected = ["after", *sorted(ids_, reverse=True), "before"]
    assert walked(store, limit=7) == expected
    by_id = store.engine.run(store.engine.histories_by_id, store.scope, "", "", 1000)
    assert [row.chat_history_id for row in by_id] == sorted(expected)
    with_prefix = [history for history in expected if history.startswith("user_1")]
    assert walked(store, limit=7, prefix="user_1") == with_prefix
    assert store.get_chat_history("after").updated_at.year == 9999


@on_one_server
def test_a_prefix_that_few_of_many_have_is_found_wherever_they_stand(store, client):
    # In one bucket there are more ids than a script looks at.
    others = [history for history, _ in zip(neighbours("history"), range(1500), strict=False)]
    import_empty(store, "history", 5)
    for number, history in enumerate(others):
        import_empty(store, history, 10 + number)
    assert walked(store, prefix="history", limit=10) == ["history"]
    assert walked(store, prefix="another", limit=100) == others[::-1]
    assert walked(store, prefix="another_9", limit=100) == [
        each for each in others[::-1] if each.startswith("another_9")
    ]
    assert walked(store, limit=500) == [*others[::-1], "history"]
    assert store.delete_chat_histories(prefix="another") == 1500
    assert walked(store) == ["history"]


@on_every_engine
def test_what_has_expired_is_neither_listed_nor_counted_nor_erased_nor_copied(make_store, client):
    mortal, immortal = make_store(ttl=1), make_store()
    for history in MANY[:100]:
        say(immortal, "Hi!", history=f"immortal_{history}")
    for history in MANY[:100]:
        say(mortal, "Hi!", history=history)
    mortal.update_chat_history(history, title="Weather")
    time.sleep(1.1)
    assert len(walked(immortal)) == 100
    assert walked(immortal, prefix="user") == []
    assert immortal.get_chat_history(MANY[0]) is None
    statistics = immortal.statistics()
    assert (statistics.chat_histories, statistics.messages, statistics.rounds) == (100, 100, 100)
    assert immortal.delete_chat_histories(prefix="user") == 0
    assert immortal.purge(older_than=datetime.now(timezone.utc) - timedelta(seconds=0.3)) == 100
    with pytest.raises(ChatMessageStoreError, match="no chat history"):
        immortal.copy_messages(MANY[0], "copy")
    assert immortal.engine.run(immortal.engine.check, immortal.scope) == []
    assert keys_of(immortal, client) == []


@on_every_engine
def test_all_that_belongs_to_a_history_expires_with_it_however_it_came(make_store, client):
    store = make_store(ttl=60)
    say(store, "Hi!", "Are you there?", history="source")
    for target in MANY[:100]:  # of its own bucket and of others
        store.copy_messages("source", target)
    history = HistoryRow(chat_history_id="imported", created_at=1, updated_at=1)
    message = MessageRow(position=0, created_at=1, message_id="a", role="user", content="{}")
    store.engine.run(store.engine.import_history, store.scope, history, [[message]], 0)
    store.update_chat_history("source", title="Weather")
    messages = [with_id("a"), with_id("b")]
    store.write_messages("edited", messages)
    store.delete_messages("edited", message_ids=["a"])
    assert [key for key in keys_of(store, client) if client.pttl(key) <= 0] == []
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
def test_the_directory_of_a_user_ends_with_the_last_history_of_its_bucket(make_store, client):
    mortal, immortal = make_store(ttl=60), make_store()
    lasting, *others = itertools.islice(neighbours("history"), 4)
    say(immortal.for_user("ada"), "Hi!", history=lasting)
    for user, history in zip("ada bob bob".split(), others, strict=True):
        say(mortal.for_user(user), "Hi!", history=history)
    assert [key for key in keys_of(immortal, client) if "users::" in key and client.pttl(key) > 0] == []
    immortal.delete_chat_history(lasting)
    assert [key for key in keys_of(immortal, client) if client.pttl(key) <= 0] == []


@on_every_engine
def test_a_history_that_changes_while_it_is_purged_stays(store, monkeypatch):
    for history in MANY[:20]:
        say(store, "Hi!", history=history)
    delete_histories = erasing.delete_histories

    async def write_and_delete(session, keys, bucket, histories, *arguments):
        for history in histories[:1]:
            if history == MANY[7]:
                say(store, "Are you there?", history=history)
        return await delete_histories(session, keys, bucket, histories, *arguments)

    now = datetime.now(timezone.utc)
    monkeypatch.setattr(erasing, "delete_histories", write_and_delete)
    assert store.purge(older_than=now) == 19
    assert walked(store) == [MANY[7]]


@on_every_engine
def test_a_page_costs_the_same_however_long_the_histories_are(store, server):
    def work():
        calls = 0
        for node in nodes_of(server):
            with node.client() as client:
                stats = client.info("commandstats")
                calls += sum(
                    each["calls"] for name, each in stats.items() if name not in ("cmdstat_info", "cmdstat_auth")
                )
        return calls

    def cost():
        store.list_chat_histories(limit=10)
        before = work()
        store.list_chat_histories(limit=10)
        return work() - before

    for history in MANY:
        say(store, "Hi!", history=history)
    short = cost()
    for history in MANY:
        say(store, *100 * ["Hi!"], history=history)
    assert cost() < 1.3 * short


def list_in_a_bucket(store, client, **counts):
    """Have one bucket list histories whose ids begin with these prefixes, the oldest first, and return their ids."""
    listed = []
    for prefix, number in counts.items():
        names = (f"{prefix}/{name}" for name in itertools.count())
        listed += itertools.islice((name for name in names if bucket_of(name) == 7), number)
    keys = store.engine.keys(store.scope)
    bucket = keys.of_bucket(7)
    client.set(bucket.schema_version, 1)
    pipeline = client.pipeline(transaction=False)
    for time_, chat_history_id in enumerate(listed):
        pipeline.zadd(bucket.directory, {chat_history_id: time_})
        pipeline.zadd(bucket.names, {chat_history_id: 0})
        counters = {"chat_history_id": chat_history_id, "message_count": 0, "updated_at": time_}
        pipeline.hset(keys.of_history(chat_history_id).counters, mapping=counters)
    pipeline.execute()
    return listed


def looked_at(server, call):
    """How many histories the server passes in its directory, or looks up, for a call: those its commands ask for."""
    passed = looked_up = 0
    with server.client() as client, server.client() as other, client.monitor() as monitor:
        call()
        other.echo("done")
        for entry in monitor.listen():
            name, *arguments = entry["command"].split(" ")
            if name.upper() == "ZREVRANGE":
                passed += int(arguments[2]) - int(arguments[1]) + 1
            elif name.upper() == "ZMSCORE":
                looked_up += len(arguments) - 1
            elif name.upper() == "ECHO":
                return passed, looked_up


@on_one_server
def test_a_page_with_a_prefix_that_the_newest_have_looks_at_as_few_as_one_without(store, client, server):
    list_in_a_bucket(store, client, old=2000, new=2000)
    passed, looked_up = looked_at(server, lambda: store.list_chat_histories(limit=20))
    assert 20 < passed < 100
    assert looked_at(server, lambda: store.list_chat_histories(limit=20, prefix="new/")) == (passed, looked_up)


@on_one_server
@pytest.mark.parametrize(
    ("old", "new"), [(100, 2000), (1500, 1500), (2000, 100)], ids=["few of many", "half", "most of all"]
)
def test_a_page_with_a_prefix_that_only_the_oldest_have_looks_at_few_of_it_or_of_the_others(
    store, client, server, old, new
):
    listed = list_in_a_bucket(store, client, old=old, new=new)
    passed, looked_up = looked_at(server, lambda: store.list_chat_histories(limit=2, prefix="old/"))
    assert passed < min(new, 5 * old) + 1000  # the last step passes up to 1,000
    assert looked_up <= (old if 5 * old < new else 0)
    assert walked(store, limit=20, prefix="old/") == listed[:old][::-1]


@on_one_server
def test_a_prefix_that_more_histories_have_than_a_script_looks_up_is_walked_through_whole(store, client, server):
    listed = list_in_a_bucket(store, client, old=5001, new=25_100)
    assert walked(store, limit=1000, prefix="old/") == listed[:5001][::-1]
    _, looked_up = looked_at(server, lambda: store.list_chat_histories(prefix="old/"))
    assert looked_up == 0


@on_one_server
@pytest.mark.parametrize("prefix", ["", "old/"])
def test_histories_that_have_expired_are_passed_and_stay_listed(store, client, prefix):
    listed = list_in_a_bucket(store, client, new=10, old=9000)
    bucket = store.engine.keys(store.scope).of_bucket(7)
    client.zadd(bucket.expiries, dict.fromkeys(listed[10:], 1))
    assert walked(store, prefix=prefix) == ([] if prefix else listed[:10][::-1])
    assert client.zcard(bucket.directory) == len(listed)  # reading changes nothing


@on_one_server
def test_a_listing_goes_on_where_the_server_accepts_no_writes(make_store, client):
    say(make_store(ttl=0.2), "Hi!", history="mortal")
    store = make_store()
    for history in MANY:
        say(store, "Hi!", history=history)
    time.sleep(0.3)
    client.config_set("min-replicas-to-write", 1)
    try:
        assert len(walked(store, limit=1000)) == 300
        assert walked(store, prefix="m") == []
    finally:
        client.config_set("min-replicas-to-write", 0)


@on_one_server
def test_a_purge_says_that_the_server_accepts_no_writes(store, client):
    listed = list_in_a_bucket(store, client, old=2500)
    bucket = store.engine.keys(store.scope).of_bucket(7)
    client.zadd(bucket.expiries, dict.fromkeys(listed, 1))
    client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(StoreUnavailableError, match="accepts no writes"):
            store.purge(older_than=datetime.now(timezone.utc))
        assert client.zcard(bucket.directory) == 2500
    finally:
        client.config_set("min-replicas-to-write", 0)
    store.purge(older_than=datetime.now(timezone.utc))
    assert client.zcard(bucket.directory) == 0


# ---------------------------------------------------------------------- the server's files


def bytes_on_disk(server):
    return b"".join(path.read_bytes() for path in server.folder.rglob("*") if path.is_file() and path.name != "log")


@pytest.mark.servers
@pytest.mark.parametrize("engine", EVERY_SERVER)
@pytest.mark.parametrize(
    "settings", [{}, {"appendonly": "no", "save": "3600 1"}, {"save": "3600 1"}], ids=["log", "snapshots", "both"]
)
def test_after_a_vacuum_what_was_erased_is_in_no_file(engine, settings):
    with RedisServer(ENGINES.get(engine), **settings) as server, stores_on(server) as make, server.client() as client:
        store = make()
        say(store, SECRET, history="user_1:a")
        say(store, "Hi!", history="user_2:a")
        say(store, f"not {SECRET}", history="user_2:b")
        store.update_chat_history("user_1:a", title=f"{SECRET}, too")
        if "save" in settings:
            client.save()
        assert SECRET.encode() in bytes_on_disk(server)
        assert store.delete_chat_histories(prefix="user_1:") == 1
        assert store.delete_chat_histories(prefix="user_2:b", vacuum=True) == 1
        wait_until(
            lambda: SECRET.encode() not in bytes_on_disk(server), "the text to go"
        )  # old files are removed in the background
        server.restart()
        assert said(store, "user_2:a") == ["Hi!"]
        assert walked(store) == ["user_2:a"]


@on_every_server
def test_a_user_that_may_not_vacuum_is_told_and_may_all_else(make_store, client, server, monkeypatch):
    store = make_store(ttl=60)
    rights = f"on >guest-pw ~{{{store.key_prefix}:* resetchannels -@all +@connection +@read +@write -@dangerous"
    client.execute_command("ACL SETUSER", "guest", "reset", *rights.split(), "+eval", "+evalsha", "+time")
    monkeypatch.setenv("CHAT_STORE_URL", f"redis://guest:guest-pw@{HOST}:{server.port}")
    say(store, "Hi!", "Are you there?")
    for target in ("another", *MANY[:70]):
        assert store.copy_messages("history", target) == 2
    assert store.statistics().size is None
    assert store.statistics().messages == 144
    assert store.engine.run(store.engine.repair, store.scope) == []
    with pytest.raises(StoreConfigurationError, match=r"The histories were deleted.* permit"):
        store.delete_chat_histories(prefix="user", vacuum=True)
    assert sorted(walked(store)) == ["another", "history"]


@on_every_server
def test_a_user_with_the_documented_rights_can_vacuum(make_store, client, server, monkeypatch):
    (rights,) = re.findall(r"ACL SETUSER chatbot (.*?)\n", DOCUMENTATION)
    (more,) = re.findall(r"`(\+info .*?)`", DOCUMENTATION)
    store = make_store()
    rights = rights.replace("{haystack_chat:", f"{{{store.key_prefix}:").replace(">password", ">guest-pw")
    client.execute_command("ACL SETUSER", "chatbot", "reset", *rights.split(), *more.split())
    monkeypatch.setenv("CHAT_STORE_URL", f"redis://chatbot:guest-pw@{HOST}:{server.port}")
    say(store, "Hi!")
    assert store.delete_chat_histories(prefix="h", vacuum=True) == 1
    assert store.statistics().size > 0


@on_every_engine
def test_the_size_is_what_the_servers_say(store, server):
    say(store, "Hi!")
    used = 0
    for node in nodes_of(server):
        with node.client() as client:
            used += client.info("memory")["used_memory"]
    assert used / 2 < store.statistics().size < 2 * used


# ---------------------------------------------------------------------- calls whose answer was lost


def lose_answer_of(proxy, operation, monkeypatch, module):
    """Have the proxy lose the first answer after a function is called, whatever a call does before."""
    original = getattr(module, operation)

    def losing(*arguments):
        monkeypatch.setattr(module, operation, original)
        proxy.to_lose = 1
        return original(*arguments)

    monkeypatch.setattr(module, operation, losing)


@on_every_server
def test_a_change_whose_answer_was_lost_is_not_taken_for_somebody_elses(make_store, server, monkeypatch):
    with closing(LosesAnswers(server)) as proxy:
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        store = make_store(last_k=None)

        def losing(call):
            assert store.count_messages("history") is not None  # so that there is a connection
            proxy.to_lose = 1
            result = call()
            assert proxy.to_lose == 0
            return result

        batch = [with_id("a", "one"), with_id("b", "two")]
        for policy in (DuplicatePolicy.FAIL, DuplicatePolicy.OVERWRITE):
            store.delete_messages("history")
            assert (
                losing(lambda policy=policy: store.write_messages("history", batch, policy=policy, expected_revision=0))
                == 2
            )
        repeated = [with_id("b", "two"), with_id("c", "three")]
        revision = store.get_chat_history("history").revision
        assert losing(lambda: store.delete_messages("history", message_ids=["a"], expected_revision=revision)) is None
        say(store, "more")
        lose_answer_of(proxy, "letters_of", monkeypatch, writing)
        assert store.replace_messages("history", "b", repeated) == 2
        assert proxy.to_lose == 0
        assert said(store) == ["two", "three"]
        store.delete_messages("history")
        store.write_messages("history", batch)
        keys = store.engine.keys(store.scope)
        assert losing(lambda: store.engine.run(remove_ids, keys, "history", ["b"], required="b", next_position=2)) == 1
        say(store, "three")
        same_bucket = next(neighbours("history"))
        assert losing(lambda: store.copy_messages("history", same_bucket)) == 2
        for target in (same_bucket, "history"):
            assert said(store, target) == ["one", "three"]
        store.close()


@on_every_server
def test_an_erasure_whose_answer_was_lost_counts_what_it_has_erased(make_store, server, monkeypatch):
    with closing(LosesAnswers(server)) as proxy:
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        store = make_store()
        for erase, erased in (
            (lambda: store.delete_chat_histories(prefix="history"), 1),
            (lambda: store.purge(older_than=datetime.now(timezone.utc) + timedelta(days=1)), 2),
        ):
            say(store, "Hi!")
            say(store, "Hi!", history=next(neighbours("history")))
            lose_answer_of(proxy, "delete_histories", monkeypatch, erasing)
            assert erase() == erased
            assert proxy.to_lose == 0
            assert len(walked(store)) == 2 - erased
        store.close()


@on_every_server
def test_what_others_do_before_a_change_is_tried_again_does_not_hide_that_it_was_done(make_store, server, monkeypatch):
    store = make_store()
    other = RedisChatMessageStore(Secret.from_token(server.url), last_k=None, key_prefix=store.key_prefix)

    def go_on_with_the_conversation():
        for count in range(1, 11):
            assert other.write_messages("history", [ChatMessage.from_user(str(count))], expected_revision=count) == 1

    with closing(LosesAnswers(server)) as proxy:
        monkeypatch.setenv("CHAT_STORE_URL", proxy.url)
        assert store.count_messages("history") == 0  # so that there is a connection
        proxy.meanwhile = go_on_with_the_conversation
        proxy.to_lose = 1
        assert store.write_messages("history", [ChatMessage.from_user("0")], expected_revision=0) == 1
        store.close()
    assert proxy.to_lose == 0
    assert said(other) == [str(number) for number in range(11)]
    other.close()


@on_every_engine
@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.write_messages("history", [with_id("c")]),
        lambda store: store.write_messages("history", [with_id("a", "Oh!")], policy=DuplicatePolicy.OVERWRITE),
        lambda store: store.delete_messages("history", message_ids=["a"]),
        lambda store: store.delete_messages("history", from_message_id="b"),
        lambda store: [
            store.delete_messages("history", from_message_id="a"),
            store.write_messages("source", [with_id("a")]),
            store.copy_messages("source", "history"),
        ],
    ],
    ids=["write", "overwrite", "delete", "rewind", "copy"],
)
def test_a_clock_that_was_set_back_moves_no_history_back(store, change):
    contents = {name: json.dumps(with_id(name).to_dict()) for name in "ab"}
    rows = [
        MessageRow(position=0, created_at=IN_AN_HOUR, message_id=name, role="user", content=content)
        for name, content in contents.items()
    ]
    history = HistoryRow(chat_history_id="history", created_at=5, updated_at=IN_AN_HOUR)
    store.engine.run(store.engine.import_history, store.scope, history, [rows], 0)
    store.write_messages("newer", [with_id("a")])
    change(store)
    assert store.get_chat_history("history").updated_at.timestamp() == IN_AN_HOUR / 10**6
    assert ids(store.list_chat_histories())[0] == "history"
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
@pytest.mark.parametrize("stray", ["another user's", "gone", "too old"])
def test_erasing_ends_though_a_directory_lists_what_cannot_be_erased(store, client, stray):
    say(store.for_user("ada"), "Hi!", history="hers")
    say(store.for_user("eve"), "Hi!", history="another")
    history = {"another user's": "another", "gone": "gone", "too old": "hers"}[stray]
    directory = store.engine.keys(store.scope).of_bucket_of(history).directory
    of_ada = directory.replace("}:histories", "}:users::ada")
    client.zadd(of_ada, {history: 1})
    if stray == "too old":
        assert store.purge(older_than=datetime(2000, 1, 1, tzinfo=timezone.utc), user_id="ada") == 0
        assert store.count_messages("hers") == 1
    assert store.delete_user("ada") == 1
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["another"]
    assert not client.exists(of_ada)
