# SPDX-License-Identifier: Apache-2.0
"""
Every statement walks along an index, whatever the server knows about its tables.
"""

import re
from contextlib import ExitStack

import pytest
from postgres_stores import ENGINES, NEWEST, connections_of, execute, said, say, statements_of, store_at, stores_on
from servers import PgBouncer, PostgresServer, wait_until

from haystack_chat_store.stores.postgres import PostgresChatMessageStore, schema
from haystack_chat_store.testing.messages import conversation, with_id


@pytest.fixture(scope="module")
def long_history(server):
    """
    A store, one history of which has 100,000 messages.
    """
    with stores_on(server.url) as make:
        store = make(last_k=None, search=True)
        for _ in range(20):
            store.write_messages("history", conversation("ua" * 2500))
        yield store


ON_MESSAGES = ["append_all", "append_rest", "known_ids", "read_all", "read_rounds", "read_messages"]
ON_MESSAGES += ["page_before", "page_after", "search", "more_match"]
ON_MESSAGES += ["an_unindexed", "unindexed", "unindexed_contents"]
# These sort what they have found along an index.
SORTS = {"histories_of_few", "search", "search_few", "search_for_few", "unindexed_contents"}
READ_MUCH = {"per_day", "orphans", "miscounted", "keys", "rows", "mismatched", "unreadable_times"}
ON_BOTH_TABLES = [
    name
    for name in schema.Statements._fields
    if name not in {"version", "vacuum_messages", "vacuum_histories", "size_on_disk", *READ_MUCH}
]


@pytest.mark.parametrize("analysed", [False, True], ids=["never analysed", "analysed"])
@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("directly", name) for name in ON_BOTH_TABLES),
        # Here each statement is planned for itself; and a table of few histories is better read whole.
        *(("behind PgBouncer", name) for name in ON_MESSAGES),
    ],
)
def test_every_statement_walks_along_an_index(server, pooler, long_history, way, name, analysed):
    """
    As PostgreSQL plans it on the store's own connections for any parameters, which is how it soon runs when prepared.
    """
    numbers = {}
    statement = re.sub(
        r"%(?:\((\w+)\))?[sb]",
        lambda found: f"${numbers.setdefault(found[1] or len(numbers), len(numbers) + 1)}",
        getattr(statements_of(long_history), name),
    )
    prepared = [
        "BEGIN",
        *(f"ANALYZE {long_history.schema_name}.chat_{table}" for table in ("histories", "messages") if analysed),
        "SET LOCAL plan_cache_mode = force_generic_plan",
        f"PREPARE any_parameters AS {statement}",
    ]
    given = f"({', '.join(['NULL'] * len(numbers))})" if numbers else ""
    explained = f"EXPLAIN (COSTS OFF) EXECUTE any_parameters {given}"

    async def plan_of(session):
        for step in prepared:
            session.connection.execute(step)
        lines = session.connection.execute(explained).fetchall()
        session.connection.execute("DEALLOCATE any_parameters")
        return "\n".join(line for (line,) in lines)

    store = store_at(server.url if way == "directly" else pooler.url, schema_name=long_history.schema_name)
    plan = store.engine.run(plan_of)
    store.close()
    assert ("Seq Scan" if way == "directly" else "Seq Scan on chat_messages") not in plan, plan
    assert "Sort" not in plan or name in SORTS, plan


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan", "force_custom_plan"])
def test_no_call_reads_a_whole_table_while_a_history_grows(server, mode):
    """
    On a database that was never analysed, from the first message on.
    """
    with stores_on(f"{server.url}?options=-c%20plan_cache_mode%3D{mode}") as make:
        store, by_message = make(), make(last_k_unit="message")

        def scans():
            store.close()
            wait_until(lambda: not connections_of(server, store), "the statistics to be complete")
            statement = "SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE schemaname = %s"
            return server.execute(f"{statement} AND relname <> 'chat_version'", [store.schema_name])

        store.count_messages("history")
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
    statements = statements_of(PostgresChatMessageStore())
    assert not [statement for statement in statements if "clock_timestamp" in statement]
    upserts = [statement.partition("DO UPDATE SET")[2] for statement in statements]
    assert [re.findall(r"\w+(?=\()", upsert.partition("RETURNING")[0]) for upsert in upserts if upsert] == [
        ["greatest"]
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
    assert sorted(name.rstrip("01234") for name in used) == ["chat_histories_", "chat_messages_"]


@pytest.mark.parametrize("partitions", [0, -1, 1001, True, "4"])
def test_a_number_of_partitions_that_cannot_be_is_refused(partitions):
    with pytest.raises(ValueError, match="partitions must be a number from 1 to 1000"):
        PostgresChatMessageStore().create_schema_sql(partitions)


@pytest.mark.parametrize("way", ["directly", "behind PgBouncer"])
def test_statements_are_prepared_unless_a_pooler_stands_between(way):
    with PostgresServer(ENGINES.get(NEWEST), fsync="off", log_statement="all") as server, ExitStack() as stack:
        url = server.url if way == "directly" else stack.enter_context(PgBouncer(server)).url
        with stores_on(url) as make:
            store = make()
            for _ in range(3):
                say(store, "Hello")
                said(store)
        runs = re.findall(r"execute (\S+):\s+(?:WITH history|SELECT content)", server.log.read_text(errors="replace"))
    assert len(runs) == 6
    assert ("<unnamed>" in runs) == (way != "directly")
    assert len(set(runs)) == (2 if way == "directly" else 1)
