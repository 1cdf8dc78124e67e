# SPDX-License-Identifier: Apache-2.0
"""Search on PostgreSQL: the first store with search turns it on, all writers index, and searches use the index."""

from contextlib import ExitStack

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from postgres_stores import (
    DIRECTLY_OR_POOLED,
    NEWEST_AND_OLDEST,
    counted,
    execute,
    say,
    statements_of,
    store_at,
    stores_on,
)

from haystack_chat_store import search_text
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.stores.postgres import terms
from haystack_chat_store.testing.messages import with_id
from haystack_chat_store.testing.processes import Program

VERSIONS = NEWEST_AND_OLDEST
WAYS = DIRECTLY_OR_POOLED


@pytest.fixture(params=[None, 3], ids=["whole", "partitioned"])
def make_store_on_any_tables(request, server, make_store):
    execute(server.url, make_store().create_schema_sql(request.param))
    return make_store


def found(store, query, **where):
    return sorted(hit.message_id for hit in store.search_messages(query, **where))


def indexes(server, store):
    statement = "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind IN ('i', 'I')"
    names = {name for (name,) in server.execute(statement, [store.schema_name])}
    return names & {"haystack_chat_messages_by_terms", "haystack_chat_messages_unindexed"}


def test_a_store_without_search_indexes_nothing(make_store, server):
    store = make_store()
    say(store, "Hello")
    assert indexes(server, store) == set()
    assert server.execute(f"SELECT search_terms FROM {store.schema_name}.haystack_chat_messages") == [(None,)]


def test_what_was_written_before_search_was_turned_on_is_found(make_store_on_any_tables, server, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.reading._INDEX_BATCH_SIZE", 7)
    monkeypatch.setattr("haystack_chat_store.stores.postgres.search._INDEX_BATCH_BYTES", 1000)
    store, searching = make_store_on_any_tables(), make_store_on_any_tables(search=True)
    for history in range(4):
        say(store, *(f"message {number}" for number in range(10)), history=f"{history}")
    store.write_messages("long", [ChatMessage.from_user("long " * 1000, meta={"chat_message_id": "long"})])
    with pytest.raises(UnsupportedOperationError, match="index_messages"):
        searching.search_messages("message")
    searching.index_messages()
    assert len(searching.search_messages("message", limit=100)) == 40
    assert found(searching, "long") == ["long"]
    assert indexes(server, store) == {"haystack_chat_messages_by_terms", "haystack_chat_messages_unindexed"}
    assert server.execute(f"SELECT FROM {store.schema_name}.haystack_chat_messages WHERE search_terms IS NULL") == []


def index_and_search(store, report, query):
    store.index_messages()
    report(len(store.search_messages(query, limit=1000)))


def test_many_processes_turn_search_on_at_once(make_store, server):
    store = make_store()
    for history in range(5):
        say(store, *(f"message {number}" for number in range(100)), history=f"{history}")
    with ExitStack() as stack:
        searching = make_store(search=True)
        programs = [stack.enter_context(Program(index_and_search, searching, "message")) for _ in range(5)]
        Program.begin(*programs)
        assert [program.reports_to_the_end() for program in programs] == [[500]] * 5
    assert len(indexes(server, store)) == 2


def test_what_a_process_writes_that_connected_before_search_was_turned_on_is_found(
    make_store_on_any_tables, monkeypatch
):
    """Its connections do not know. (A pool of its own, as in another process.)"""
    unknowing, searching = make_store_on_any_tables(max_pool_size=3), make_store_on_any_tables(search=True)
    unknowing.write_messages("history", [ChatMessage.from_user("first", meta={"chat_message_id": "1"})])
    searching.index_messages()
    assert found(searching, "first") == ["1"]
    replaced = [ChatMessage.from_user("second", meta={"chat_message_id": "1"})]
    unknowing.write_messages("history", replaced, policy=DuplicatePolicy.OVERWRITE)
    unknowing.write_messages("history", [ChatMessage.from_user("third second", meta={"chat_message_id": "2"})])
    with pytest.raises(UnsupportedOperationError, match="index_messages"):
        found(searching, "second")
    searching.index_messages()
    assert found(searching, "first") == []
    assert found(searching, "second") == ["1", "2"]
    unknowing.close()
    unknowing.write_messages("history", [ChatMessage.from_user("fourth", meta={"chat_message_id": "3"})])
    assert found(searching, "fourth") == ["3"]


@pytest.mark.parametrize("index", ["messages_by_terms", "histories_by_title", "messages_unindexed"])
def test_an_index_of_search_may_take_longer_than_a_call(database, index):
    """The larger the table, the longer it takes."""
    say(store_at(database), "message")
    execute(
        database,
        "CREATE FUNCTION slowly() RETURNS event_trigger LANGUAGE plpgsql AS "
        f"$$BEGIN IF current_query() LIKE '%{index}%' THEN PERFORM pg_sleep(3); END IF; END$$",
        "CREATE EVENT TRIGGER slowly ON ddl_command_start WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION slowly()",
    )
    searching = store_at(database, search=True, timeout=2)
    searching.index_messages()
    assert [hit.snippet for hit in searching.search_messages("message")] == ["message"]
    searching.close()


def test_a_store_without_search_keeps_the_index_once_it_is_there(make_store, server):
    searching = make_store(search=True)
    searching.index_messages()  # which turns search on
    store = make_store(max_pool_size=3)
    store.write_messages("history", [with_id("a"), with_id("b")])
    store.copy_messages("history", "fork")
    assert server.execute(f"SELECT FROM {store.schema_name}.haystack_chat_messages WHERE search_terms IS NULL") == []


def test_a_phrase_is_found_wherever_it_stands_in_a_text_of_few_words(make_store):
    """The type tsvector keeps no more than 255 places of a word."""
    store = make_store(search=True)
    text = "the end of the " * 2000 + "story. The cat sat. " + "the the " * 3000 + "the last word"
    store.write_messages("history", [ChatMessage.from_user(text, meta={"chat_message_id": "a"})])
    other = ChatMessage.from_user("the end of the theory, the cat", meta={"chat_message_id": "b"})
    store.write_messages("history", [other])
    for query in (
        '"the cat sat"',
        '"the cat"',
        '"the last word"',
        '"of the story"',
        '"the the the"',
        "the",
        '"end of"',
    ):
        words = {"a": text, "b": "the end of the theory, the cat"}
        phrases = search_text.parsed_query(query)
        matching = [key for key, words in words.items() if search_text.matches(phrases, search_text.terms(words))]
        assert found(store, query) == matching
    assert found(store, '"cat the"') == []


def test_a_text_of_as_many_and_as_long_words_as_are_searched_is_stored(make_store):
    store = make_store(search=True)
    texts = [
        " ".join(f"{number}" for number in range(20_000)),
        " ".join(f"{number:x<64}" for number in range(20_000)),
        " ".join(f"{number:\U00010400<64}" for number in range(20_000)),
        "same " * 20_000,
        "東京都" * 10_000,
        "",
    ]
    for number, text in enumerate(texts):
        store.write_messages("history", [ChatMessage.from_user(text, meta={"chat_message_id": f"{number}"})])
    assert found(store, "9999") == ["0"]
    assert found(store, f"{9999:x<64}") == ["1"]
    assert found(store, "same") == ["3"]
    assert found(store, "京都東京") == ["4"]


HOSTILE = ["'", "\\", "a' | 'b", "a & b", "!a", "(a", "a:*", "a:A", "<->", "%s", "a\\'b", "'a' <2> 'b'", "a+1", '"']


@pytest.mark.parametrize("query", HOSTILE)
def test_nothing_in_a_query_is_an_operator(make_store, query):
    store = make_store(search=True)
    said = ["a", "b", "a b", "b a", "a 1 b", "s", "ab"]
    for text in said:
        store.write_messages("history", [ChatMessage.from_user(text, meta={"chat_message_id": text})])
    phrases = search_text.parsed_query(query)
    assert found(store, query) == sorted(text for text in said if search_text.matches(phrases, search_text.terms(text)))


@pytest.mark.parametrize("few_messages", [0, 5_000])
def test_a_search_in_few_messages_looks_at_no_others(server, monkeypatch, few_messages):
    """However many others there are that match."""
    monkeypatch.setattr("haystack_chat_store.stores.postgres.search._FEW_MESSAGES", few_messages)
    with stores_on(server.url) as make:
        store, other = make(search=True), make(search=True, namespace="other")
        for history in ("a/1", "a/2", "b"):
            store.write_messages(history, [with_id(f"{history} {number}", "a common word") for number in range(10)])
        say(other, *["common"] * 5000)
        expected = [f"{history} {number}" for history in ("a/1", "a/2", "b") for number in range(10)]
        for where in ({}, {"prefix": "a/"}, {"chat_history_id": "b"}):
            with counted(server, store, "haystack_chat_messages") as looked_up:
                hits = found(store, "common", limit=100, **where)
            start = where.get("prefix", where.get("chat_history_id", ""))
            assert hits == [message_id for message_id in expected if message_id.startswith(start)]
            assert len(hits) <= looked_up() < 500


@pytest.mark.parametrize("few_histories", [0, 2, 1_000])
def test_a_search_finds_the_same_whichever_way_it_goes(make_store_on_any_tables, monkeypatch, few_histories):
    monkeypatch.setattr("haystack_chat_store.stores.postgres.search._FEW_MESSAGES", 0)
    monkeypatch.setattr("haystack_chat_store.stores.postgres.search._FEW_HISTORIES", few_histories)
    store, other = (make_store_on_any_tables(search=True, namespace=name) for name in ("default", "other"))
    for history in ("a/1", "a/2", "b"):
        words = [f"rare {history[0]}", *["common"] * 9]
        store.write_messages(history, [with_id(f"{history} {n}", word) for n, word in enumerate(words)])
    say(other, "rare", *["common"] * 50, history="a/1")
    assert found(store, "rare") == ["a/1 0", "a/2 0", "b 0"]
    assert found(store, "rare", prefix="a/") == ["a/1 0", "a/2 0"]
    assert found(store, "rare", chat_history_id="a/1") == ["a/1 0"]
    assert len(found(store, "common", limit=100)) == 27
    assert len(found(store, "common", prefix="a/", limit=100)) == 18
    assert len(found(store, "common", chat_history_id="b", limit=100)) == 9
    assert found(store, "common", prefix="nobody") == found(store, "common", chat_history_id="none") == []


def test_a_search_reads_along_the_index(make_store, server):
    """Whatever is off on the store's connections."""
    store = make_store(search=True)
    store.index_messages()
    execute(
        server.url,
        f"INSERT INTO {store.schema_name}.haystack_chat_messages "
        f"SELECT md5((n / 10)::text)::uuid, n, now(), n, 'user', json_build_object('text', repeat('x', 1000)), "
        f"to_tsvector('simple', 'common word' || n), 1 FROM generate_series(1, 20000) n",
    )
    statement = statements_of(store)["search"] % {
        "query": f"'{terms.tsquery(search_text.parsed_query('word77')).replace(chr(39), chr(39) * 2)}'",
        "namespace": "'default'",
        "user": "NULL",
        "prefix": "''",
        "end": "'x'",
        "with_branches": "false",
        "limit": 20,
    }

    async def plan(session):
        return "\n".join(line for (line,) in await session.fetch(f"EXPLAIN (COSTS OFF) {statement}".replace("%", "%%")))

    assert "Bitmap Index Scan on haystack_chat_messages_by_terms" in store.engine.run(plan)
