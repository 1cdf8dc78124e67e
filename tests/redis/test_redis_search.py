# SPDX-License-Identifier: Apache-2.0
"""Search on a server that has the query engine, and what is said on others."""

import time
from contextlib import suppress
from itertools import islice

import pytest
from breadth import VARIANT, WHOLE
from haystack.dataclasses import ChatMessage
from redis.exceptions import ResponseError
from redis_stores import (
    OnRedis,
    all_keys_of,
    before_script,
    neighbours,
    on_a_cluster,
    on_a_searching_server,
    on_one_server,
    say,
    stores_on,
)
from servers import RedisServer, require_query_engine

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import StoreConfigurationError, StoreUnavailableError, UnsupportedOperationError
from haystack_chat_store.stores.redis import checking, documents, search
from haystack_chat_store.testing import (
    RandomWalkTest,
    Rule17DirectoryTest,
    Rule19ChangesTest,
    Rule20ForkingTest,
    Rule21SearchTest,
    Rule22ErasingTest,
    Rule23MovingTest,
    Rule24ReadingTest,
    Rule25UsersTest,
    Rule27ReplacingTest,
)
from haystack_chat_store.testing.messages import with_id


@pytest.fixture(autouse=True)
def _drop_indexes(request):
    """An index that a test leaves would be looked through for each new one."""
    server = request.getfixturevalue("server") if "server" in request.fixturenames else None
    yield
    if isinstance(server, RedisServer):
        with server.client() as client, suppress(ResponseError):  # without the query engine, there are none
            for index in client.execute_command("FT._LIST"):
                client.execute_command("FT.DROPINDEX", index)


@on_a_searching_server
class TestSearch(OnRedis, Rule21SearchTest):
    breadth = WHOLE


@on_a_searching_server
class TestSearchingStore(OnRedis, Rule25UsersTest, RandomWalkTest):
    """A store that searches keeps the other rules, too: as the walks do that call all methods."""

    breadth = VARIANT
    walks = 10

    @pytest.fixture
    def make_store(self, server):
        with stores_on(server, search=True) as make:
            yield make


@pytest.mark.full
@on_a_searching_server
class TestOtherRules(
    OnRedis,
    Rule17DirectoryTest,
    Rule19ChangesTest,
    Rule20ForkingTest,
    Rule22ErasingTest,
    Rule23MovingTest,
    Rule24ReadingTest,
    Rule27ReplacingTest,
):
    """The same, rule by rule."""

    breadth = VARIANT

    @pytest.fixture
    def make_store(self, server):
        with stores_on(server, search=True) as make:
            yield make


@pytest.fixture
def searching(make_store):
    return make_store(search=True)


def found(store, query, **options):
    return sorted((hit.chat_history_id, hit.position) for hit in store.search_messages(query, **options))


def words_of(store, client):
    """The places of which words are kept."""
    names = [key for key in all_keys_of(store, client) if key.startswith("terms")]
    return sorted((name.split(":")[-2], int(name.split(":")[-1])) for name in names)


@on_a_searching_server
class TestWords:
    def test_a_write_does_not_wait_until_all_that_others_have_left_is_indexed(self, make_store, searching, client):
        say(searching, "Hi!", history="other")
        plain = make_store()
        plain.write_messages("chat", [with_id(str(each), "needle") for each in range(3000)])
        steps = {
            "append": lambda: searching.write_messages("chat", [with_id("a", "needle")]),
            "replace": lambda: searching.replace_messages("chat", "a", [with_id("b", "needle")]),
            "update": lambda: searching.update_message_meta("chat", "b", merge={"rating": "good"}),
        }
        indexed = 1
        for name, write in steps.items():
            write()
            before, indexed = indexed, len(words_of(searching, client))
            assert indexed - before <= 1001, name
        searching.index_messages()
        assert len(words_of(searching, client)) == 3002

    def test_words_go_with_their_messages(self, searching, client):
        searching.write_messages("chat", [with_id(each, f"needle {each}") for each in "abcdef"])
        assert words_of(searching, client) == [("chat", position) for position in range(6)]
        searching.delete_messages("chat", message_ids=["b"])
        assert words_of(searching, client) == [("chat", position) for position in (0, 2, 3, 4, 5)]
        searching.delete_messages("chat", from_message_id="e")
        assert words_of(searching, client) == [("chat", position) for position in (0, 2, 3)]
        searching.replace_messages("chat", "d", [with_id("g", "needle")])
        assert words_of(searching, client) == [("chat", position) for position in (0, 2, 6)]
        searching.rename_chat_history("chat", "other")
        assert words_of(searching, client) == [("other", position) for position in (0, 2, 6)]
        searching.copy_messages("other", "copy")
        searching.delete_chat_history("other")
        assert words_of(searching, client) == [("copy", position) for position in range(3)]
        assert found(searching, "needle") == [("copy", position) for position in range(3)]
        searching.delete_all_messages()
        assert words_of(searching, client) == []

    def test_words_expire_with_their_history(self, make_store, client):
        store = make_store(search=True, ttl=60)
        say(store, "needle", "pin")
        keys = [key for key in all_keys_of(store, client) if key.startswith("terms") or key.endswith(":contents")]
        before = [client.pexpiretime(key) for key in keys]
        assert len(set(before)) == 1 < len(before)
        time.sleep(0.01)
        say(store, "needle")
        (now,) = {client.pexpiretime(key) for key in keys}
        assert now > before[0]
        say(make_store(search=True), "needle")
        assert {client.pexpiretime(key) for key in keys} == {-1}

    def test_words_are_gone_when_their_history_has_expired(self, make_store, client):
        store = make_store(search=True, ttl=0.3)
        say(store, "needle")
        time.sleep(0.4)
        assert store.search_messages("needle") == []
        assert words_of(store, client) == []

    def test_messages_of_a_user_are_found_after_they_are_handed_over(self, searching):
        say(searching.for_user("ada"), "needle")
        assert found(searching.for_user("ada"), "needle") == [("history", 0)]
        searching.update_chat_history("history", user_id="bob")
        assert found(searching.for_user("ada"), "needle") == []
        assert found(searching.for_user("bob"), "needle") == [("history", 0)]

    def test_a_refusal_that_comes_later_is_found(self, searching):
        searching.write_messages("chat", [with_id("a", "needle"), ChatMessage.from_assistant("No.", meta={"id": 1})])
        message = searching.list_messages("chat")[1].message
        searching.update_message_meta("chat", message.meta["chat_message_id"], merge={"refusal": "a haystack"})
        assert found(searching, "haystack") == [("chat", 1)]
        assert check(searching) == []

    def test_nothing_is_kept_without_search(self, make_store, client):
        store = make_store()
        say(store, "needle")
        assert not [key for key in all_keys_of(store, client) if key.startswith("terms") or key.endswith(":search")]

    def test_key_prefixes_and_namespaces_do_not_mix(self, make_store):
        prefix = make_store().key_prefix
        first = make_store(search=True, key_prefix=prefix, namespace="a")
        other = make_store(search=True, key_prefix=f"{prefix}:a", namespace="1")
        say(first, "needle")
        say(other, "needle", history="other")
        assert found(first, "needle") == [("history", 0)]
        assert found(other, "needle") == [("other", 0)]

    def test_more_words_than_the_server_expands_begin_alike(self, searching):
        messages = [with_id(str(number), f"kyo{number}") for number in range(500)]
        searching.write_messages("chat", messages)
        assert len(searching.search_messages("kyo", match_prefix=True, limit=1000)) == 500
        assert len(searching.search_messages("kyo1", match_prefix=True, limit=1000)) == 111


@on_a_searching_server
class TestUnindexed:
    def test_a_few_messages_that_are_not_indexed_are_found(self, make_store, searching):
        say(searching, "needle")
        say(make_store(), "needle")  # a store that does not index
        assert found(searching, "needle") == [("history", 0), ("history", 1)]

    def test_many_messages_that_are_not_indexed_are_an_error(self, make_store, searching):
        say(searching, "needle")
        say(make_store(), *["needle"] * 1001)
        with pytest.raises(UnsupportedOperationError, match="index_messages"):
            searching.search_messages("needle")
        searching.index_messages()
        assert len(searching.search_messages("needle", limit=1000)) == 1000

    def test_a_write_that_cannot_index_is_found(self, searching, monkeypatch):
        def fail(*_):
            raise StoreUnavailableError("Gone.")

        say(searching, "needle")
        with monkeypatch.context() as context:
            context.setattr(documents, "index_history", fail)
            assert say(searching, "needle") == 1
        assert found(searching, "needle") == [("history", 0), ("history", 1)]

    def test_a_message_that_is_replaced_while_it_is_indexed_is_found_as_it_is(self, make_store, client):
        searching, plain = make_store(search=True), make_store()
        searching.write_messages("chat", [with_id("a", "needle")])

        def replace():
            plain.replace_messages("chat", "b", [with_id("c", "pin")])

        with before_script(2, "chat", replace) as scripts:  # after WRITE and NEXT_UNINDEXED
            searching.write_messages("chat", [with_id("b", "needle")])
        assert scripts.is_done
        assert words_of(searching, client) == [("chat", 0), ("chat", 2)]
        assert found(searching, "needle") == [("chat", 0)]
        assert found(searching, "pin") == [("chat", 2)]

    def test_a_search_never_leaves_out_what_is_noted_beyond_its_limit(self, make_store):
        """It says that messages are to be indexed, also if it looks for those of one history."""
        searching, plain = make_store(search=True), make_store()
        say(searching, "pin", history="first")
        names = list(islice((each for each in neighbours("chat") if each != "first"), 60))
        for name in names:
            say(plain, "needle", history=name)
        for options in ({}, {"chat_history_id": names[-1]}, {"prefix": names[0]}):
            with pytest.raises(UnsupportedOperationError, match="index"):
                searching.search_messages("needle", **options)
        searching.index_messages()
        assert found(searching, "needle", chat_history_id=names[-1]) == [(names[-1], 0)]

    def test_a_search_finds_what_is_renamed_or_handed_over_meanwhile(self, make_store, monkeypatch):
        searching, plain = make_store(search=True), make_store()
        for history in ("renamed", "given"):
            say(searching, "needle", history=history)
        asked = search.ask_index

        async def change_first(session, *command):
            if command[0] == "FT.SEARCH":
                plain.rename_chat_history("renamed", "new")
                plain.update_chat_history("given", user_id="ada")
            return await asked(session, *command)

        monkeypatch.setattr(search, "ask_index", change_first)
        assert found(searching, "needle") == [("given", 0), ("new", 0)]

    def test_a_hand_over_indexes_no_other_histories(self, make_store, client):
        searching, plain = make_store(search=True), make_store()
        say(searching, "needle", history="given")
        say(plain, "needle", history="noted")
        searching.update_chat_history("given", user_id="ada")
        assert words_of(searching, client) == [("given", 0)]

    def test_a_damaged_history_stays_noted_until_it_can_be_indexed(self, make_store, client):
        searching, plain = make_store(search=True), make_store()
        say(searching, "pin", history="first")
        say(plain, "needle")
        client.delete(searching.engine.keys(searching.scope).of_history("history").roles)
        searching.index_messages()
        plain.delete_chat_history("history")
        say(plain, "needle")
        assert found(searching, "needle") == [("history", 0)]

    def test_damaged_histories_do_not_keep_others_from_being_indexed(self, make_store, client):
        searching, plain = make_store(search=True), make_store()
        say(searching, "pin", history="first")
        names = sorted(islice((each for each in neighbours("chat") if each != "first"), 60))
        for name in names:
            say(plain, "needle", history=name)
        for name in names[:50]:
            client.delete(searching.engine.keys(searching.scope).of_history(name).roles)
        searching.index_messages()
        assert {name for name, _ in words_of(searching, client)} == {"first", *names[50:]}

    def test_an_index_that_is_gone_is_made_again(self, searching, client):
        say(searching, "needle")
        (index,) = [name for name in client.execute_command("FT._LIST") if searching.key_prefix.encode() in name]
        client.execute_command("FT.DROPINDEX", index)
        with pytest.raises(UnsupportedOperationError, match="index_messages"):
            searching.search_messages("needle")
        assert [fault.description for fault in check(searching)] == ["The search index is gone."]
        searching.index_messages()
        assert found(searching, "needle") == [("history", 0)]
        assert check(searching) == []


@on_a_searching_server
class TestDoctor:
    def test_wrong_words_are_found_and_repaired(self, searching, client):
        say(searching, "needle", "pin", "hay")
        names = sorted(key for key in all_keys_of(searching, client) if key.startswith("terms"))
        client.delete(names[0])
        client.hset(names[1], "terms", "xabcdef")
        client.copy(names[2], names[2].removesuffix("2") + "7")
        (fault,) = check(searching)
        assert "search index" in fault.description
        assert not fault.is_repaired
        assert [each.is_repaired for each in check(searching, repair=True)] == [True]
        assert check(searching) == []
        assert found(searching, "needle") == [("history", 0)]
        assert words_of(searching, client) == [("history", position) for position in range(3)]

    def test_words_without_a_history_are_found_and_removed(self, searching, client):
        say(searching, "needle")
        (name,) = [key for key in all_keys_of(searching, client) if key.startswith("terms")]
        client.copy(name, name.replace(":history:", f":{next(neighbours('history'))}:"))
        assert [fault.is_repaired for fault in check(searching)] == [False]
        assert [fault.is_repaired for fault in check(searching, repair=True)] == [True]
        assert words_of(searching, client) == [("history", 0)]
        assert check(searching) == []

    def test_a_check_takes_no_deletion_for_a_fault(self, make_store):
        for number in range(12):
            store = make_store(namespace=f"namespace {number}", search=True)
            say(store, "needle", "pin")
            with before_script(number, "history", lambda store=store: store.delete_chat_history("history")) as scripts:
                assert check(store) == []
            if not scripts.is_done:
                break
        assert number > 3

    def test_a_check_looks_once_at_what_is_noted_in_a_bucket(self, make_store, monkeypatch):
        searching, looked = make_store(search=True), []
        for name in islice(neighbours("history"), 20):
            say(searching, "needle", history=name)
        read_unindexed = checking.read_unindexed

        def counted(*arguments):
            looked.append(arguments)
            return read_unindexed(*arguments)

        monkeypatch.setattr(checking, "read_unindexed", counted)
        assert check(searching) == []
        assert len(looked) == 1

    def test_words_of_a_rebuilt_history_are_right(self, searching, client):
        say(searching, "needle", "pin")
        (roles,) = [key for key in all_keys_of(searching, client) if key.endswith(":roles")]
        client.delete(roles)
        assert all(fault.is_repaired for fault in check(searching, repair=True))
        assert check(searching) == []
        assert found(searching, "pin") == [("history", 1)]


def test_search_survives_a_restart_of_the_server(tmp_path):
    program, module = require_query_engine()
    with RedisServer(program, loadmodule=module) as server, stores_on(server) as make:
        store = make(search=True)
        say(store, *["needle"] * 500)
        server.restart()
        assert len(store.search_messages("needle", limit=1000)) == 500


@on_a_searching_server
def test_only_database_0_can_be_searched(server, monkeypatch):
    with stores_on(server) as make:
        monkeypatch.setenv("CHAT_STORE_URL", server.url.removesuffix("0") + "1")
        with pytest.raises(StoreConfigurationError, match="database 0"):
            say(make(search=True), "needle")


@on_one_server
def test_a_server_without_the_query_engine_is_refused(make_store):
    store = make_store(search=True)
    for call in (lambda: say(store, "Hi!"), lambda: store.search_messages("hi"), store.index_messages):
        with pytest.raises(UnsupportedOperationError, match="RediSearch"):
            call()
    assert make_store().list_chat_histories().items == []


@on_a_cluster
def test_a_cluster_is_refused(make_store):
    with pytest.raises(UnsupportedOperationError, match="Redis Cluster"):
        make_store(search=True)
