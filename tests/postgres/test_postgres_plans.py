# SPDX-License-Identifier: Apache-2.0
"""Every statement walks along an index, whatever the server knows about its tables."""

import re
import uuid
from contextlib import ExitStack
from hashlib import md5

import pytest
from postgres_stores import ENGINES, NEWEST, STATEMENTS, connections_of, execute, said, say, statements_of, stores_on
from servers import PgBouncer, PostgresServer, wait_until

from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.stores.postgres.schema import BEGINNING, history_key
from haystack_chat_store.stores.postgres.statements import prefix_parameters
from haystack_chat_store.testing.messages import conversation, with_id
from haystack_chat_store.validation import MAX_POSITION

HISTORIES = 20_000
LENGTH = 50_000


@pytest.fixture(scope="module")
def large_store(server):
    """A store of many histories of five messages, and one of 50,000. Never analysed."""
    with stores_on(server.url) as make:
        store = make(last_k=None, search=True)
        say(store, "Hello", history="user/long")
        key = history_key(store.scope, "user/long")
        execute(
            server.url,
            f"INSERT INTO {store.schema_name}.haystack_chat_histories (history_key, namespace, chat_history_id, "
            "next_position, message_count, round_count, revision, updated_at) "
            "SELECT md5(n::text)::uuid, 'default', 'user' || n % 200 || '/' || n, 0, 0, 0, 1, "
            f"'2020-01-01Z'::timestamptz + n * interval '1s' FROM generate_series(1, {HISTORIES}) n",
            f"INSERT INTO {store.schema_name}.haystack_chat_messages "
            "SELECT key, n, now(), n, CASE n % 2 WHEN 0 THEN 'user' ELSE 'assistant' END, "
            "json_build_object('text', repeat('x', 200)), to_tsvector('simple', 'common word' || n), 1 "
            f"FROM (SELECT '{key}'::uuid AS key, n FROM generate_series(1, {LENGTH}) n "
            "UNION ALL SELECT md5(h::text)::uuid, n "
            f"FROM generate_series(1, {HISTORIES}) h, generate_series(0, 4) n) AS m",
        )
        yield store


@pytest.fixture(scope="module")
def analysed_store(server, large_store):
    execute(server.url, "ANALYZE")
    return large_store


READ_MUCH = {"version", "per_day", "size_on_disk", "orphans", "miscounted", "rows", "mismatched"}
READ_MUCH |= {"unreadable_times", "totals", "vacuum_messages", "vacuum_histories", "usage"}
# These sort what they have found along an index.
SORTS = {"copy_messages", "histories_of_few", "search", "search_few", "search_for_few", "titles", "unindexed_contents"}
SORTS |= {name for name in STATEMENTS if name.startswith("read_")}
# These may sort what they have found, too, while the server has no statistics and takes it for little.
SORTS_WITHOUT_STATISTICS = {"next_histories", "histories", "histories_near", "histories_by_id", "have_more"}
SORTS_WITHOUT_STATISTICS |= {"erasable_by_prefix", "erasable_by_age", "find_few_histories"}
# These look at whole histories. A third of the table had better be read from end to end.
OF_WHOLE_HISTORIES = {"take_over_messages", "delete_messages", "recount", "search_few", "copy_messages"}


def parameters_of(store, name, statement):
    key = uuid.UUID(md5(b"1").hexdigest()) if name in OF_WHOLE_HISTORIES else history_key(store.scope, "user/long")
    positional = {
        "next_histories": ["default", "user/l", 100],
        "messages": [key, [5, 7]],
        "next_questions": [key, -1],
        "described": ["default", BEGINNING[0], 100],
        "mismatched_titles": [[key], ["'word'"]],
        "describe_anew": ["'word'", None, key],
        "position_of": [key, "a"],
        "count_from": [key, LENGTH - 90],
        "delete_messages": [[key]],
        "forget_terms": [key, 5],
        "unindexed": [*BEGINNING, 100],
        "unindexed_contents": [key, 5, key, 105],
        "set_terms": [[key] * 100, list(range(100)), "\n".join("abc")],
    }
    if name in positional:
        return positional[name]
    if "%s" in statement:
        return [key]
    sent = {"message_ids": '["a", "b"]', "roles": "user user", "contents": "{}\n{}", "terms": "a\nb", "numbers": "7 8"}
    one = {"key": key, "source": key, "target": uuid.uuid4(), "id": "user/long", "ids": ["a"], "places": [5]}
    numbers = {"count": 10, "step": 5, "rounds": 1, "version": "5", "start": LENGTH - 90, "revision": 3}
    numbers |= {"created_at": 0, "updated_at": 1_700_000_000_000_000}
    numbers |= {"limit": 50, "few": 256, "near": 306, "messages": 5_000, "updated_before": 0}
    other = {"title": None, "title_terms": None, "meta": None, "has_title": True, "has_meta": True, "after": "user/l"}
    other |= {"query": "word77", "keys": [key], "namespace": "default", "branch_of": None, "with_branches": False}
    other |= {"user": None, "lifetime": None, "preview": None, "last_role": None, "last_text": None, "last_at": 0}
    other |= {"message_id": "a", "place": 1000, "position": 5, "content": "{}", "old_key": key, "has_user": False}
    other |= {"is_there": True, "owner": "ada", "new_owner": "bob"}
    end = prefix_parameters(store.scope, "user7/") if "%(prefix)s" in statement else {"end": MAX_POSITION}
    of_user = {"user": "ada"} if name.endswith("_of_user") else {}
    return {**sent, **one, **numbers, **other, **end, **of_user}


@pytest.mark.parametrize("known", ["large_store", "analysed_store"])
@pytest.mark.parametrize("name", [name for name in STATEMENTS if name not in READ_MUCH])
def test_every_statement_walks_along_an_index(request, known, name):
    """As PostgreSQL plans it each time, whether it has statistics or not."""
    store = request.getfixturevalue(known)
    statement = statements_of(store)[name]
    parameters = parameters_of(store, name, statement)

    async def plan_of(session):
        return "\n".join(line for (line,) in await session.fetch(f"EXPLAIN (COSTS OFF) {statement}", parameters))

    plan = store.engine.run(plan_of)
    assert "Seq Scan" not in plan, plan
    may_sort = SORTS if known == "analysed_store" else SORTS | SORTS_WITHOUT_STATISTICS
    # Of the histories of a user, only those are sorted by id that changed in the same microsecond.
    sorts_ties = name.endswith("_of_user") and "Incremental Sort" in plan and "Presorted Key: updated_at" in plan
    assert "Sort" not in plan or name in may_sort or sorts_ties, plan


KEPT = ["message_count", "history", "page_before", "page_after", "all_histories"]


@pytest.mark.parametrize("known", ["large_store", "analysed_store"])
@pytest.mark.parametrize("name", KEPT)
def test_a_plan_that_is_kept_walks_along_an_index_whatever_the_parameters(request, known, name):
    store = request.getfixturevalue(known)
    names = re.findall(r"%\(\w+\)s|%s", statements_of(store)[name])
    statement = statements_of(store)[name]
    for number, parameter in enumerate(names, 1):
        statement = statement.replace(parameter, f"${number}", 1)

    async def plan_of(session):
        await session.run("SET plan_cache_mode = force_generic_plan")
        await session.run(f"PREPARE kept AS {statement}")
        explain = f"EXPLAIN (COSTS OFF) EXECUTE kept ({', '.join(['NULL'] * len(names))})"
        plan = "\n".join(line for (line,) in await session.fetch(explain))
        await session.run("DEALLOCATE kept")
        await session.run("RESET plan_cache_mode")
        return plan

    plan = store.engine.run(plan_of)
    assert "Seq Scan" not in plan, plan
    assert "Sort" not in plan, plan


@pytest.mark.parametrize("mode", ["auto", "force_custom_plan"])
def test_no_call_reads_a_whole_table_while_a_history_grows(server, mode):
    """On a database that was never analysed, from the first message on."""
    with stores_on(f"{server.url}?options=-c%20plan_cache_mode%3D{mode}") as make:
        store, by_message = make(), make(last_k_unit="message")

        def scans():
            store.close()
            wait_until(lambda: not connections_of(server, store), "the statistics to be complete")
            statement = "SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE schemaname = %s"
            return server.execute(f"{statement} AND relname <> 'haystack_chat_version'", [store.schema_name])

        store.write_messages("history", [with_id("first")])
        before = scans()  # some, to make the indexes
        for number in range(300):
            store.write_messages("history", [with_id(f"{number}"), *conversation("ua")])
            store.retrieve_messages("history")
            by_message.retrieve_messages("history")
            store.count_messages("history")
        store.delete_messages("history")
        assert scans() == before


def test_no_function_that_changes_its_mind_sets_a_value_in_an_update():
    """
    Databases that distribute their tables refuse these, such as the clock; and of an upsert every one that is not
    immutable.
    """
    statements = statements_of(PostgresChatMessageStore()).values()
    assert not [statement for statement in statements if "clock_timestamp" in statement]
    upserts = [statement.partition("DO UPDATE SET")[2] for statement in statements]
    assert [re.findall(r"\w+(?=\()", upsert.partition("RETURNING")[0]) for upsert in upserts if upsert] == [
        ["greatest"],
        ["greatest"],
    ]


def test_a_call_looks_into_one_partition(server, make_store):
    store = make_store()
    execute(server.url, store.create_schema_sql(partitions=5))
    for number in range(20):  # so often that plans for any parameters are in use
        store.write_messages("history", [with_id(f"{number}"), *conversation("ua")])
        store.retrieve_messages("history")
        store.count_messages("history")
    store.close()
    wait_until(lambda: not connections_of(server, store), "the statistics to be complete")

    statement = "SELECT relname FROM pg_stat_user_tables WHERE schemaname = %s AND idx_scan > 0"
    used = [name for (name,) in server.execute(statement, [store.schema_name])]
    assert sorted(name.rstrip("01234") for name in used) == [
        "haystack_chat_histories_",
        "haystack_chat_messages_",
        "haystack_chat_namespaces",
    ]


@pytest.mark.parametrize("partitions", [0, -1, 1001, True, "4"])
def test_a_number_of_partitions_that_cannot_be_is_refused(partitions):
    with pytest.raises(ValueError, match="partitions must be"):
        PostgresChatMessageStore().create_schema_sql(partitions)


@pytest.mark.servers
@pytest.mark.parametrize("way", ["directly", "behind PgBouncer"])
def test_statements_of_every_turn_are_prepared_unless_a_pooler_stands_between(way):
    """A pooler would hand a prepared statement to other clients."""
    with PostgresServer(ENGINES.get(NEWEST), fsync="off", log_statement="all") as server, ExitStack() as stack:
        url = server.url if way == "directly" else stack.enter_context(PgBouncer(server)).url
        with stores_on(url) as make:
            store = make()
            for _ in range(10):
                say(store, "Hello")
                said(store)
        runs = re.findall(r"execute (\S+):\s+(?:WITH history|SELECT content)", server.log.read_text(errors="replace"))
    assert runs
    assert (set(runs) == {"<unnamed>"}) == (way == "behind PgBouncer")
