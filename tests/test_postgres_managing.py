# SPDX-License-Identifier: Apache-2.0
"""
Changing, forking, importing, listing and erasing on PostgreSQL: beside each other, cut short, in any time zone.
"""

import asyncio
import json
import threading
import time
from contextlib import ExitStack

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from servers import PASSWORD, PgBouncer, PostgresServer, wait_until
from test_postgres import ENGINES, NEWEST, OLDER, execute, said, say, store_at, stores_on

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    DuplicateMessageError,
    MessageNotFoundError,
    UnsupportedOperationError,
)
from haystack_chat_store.stores.operations import HistoryRow, MessageRow
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.messages import with_id
from haystack_chat_store.testing.processes import Program

NEW = HistoryRow("history", 0, 0, 1_000_000, 2_000_000, "a title", '{"a": 1}')


@pytest.fixture(scope="module", params=[NEWEST, *OLDER[-1:]])
def server(request):
    with PostgresServer(ENGINES.get(request.param), fsync="off", autovacuum="off") as server:
        yield server


@pytest.fixture(params=["directly", "behind PgBouncer"])
def url(request, server):
    if request.param == "directly":
        yield server.url
    else:
        with PgBouncer(server) as pooler:
            yield pooler.url


@pytest.fixture
def make_store(url):
    with stores_on(url, last_k=None) as make:
        yield make


def rows(start, end, created_at=1_500_000, text="imported"):
    contents = [ChatMessage.from_user(text, meta={"chat_message_id": f"{n}"}).to_dict() for n in range(start, end)]
    return [
        MessageRow(0, created_at, f"{number}", "user", json.dumps(content))
        for number, content in enumerate(contents, start)
    ]


def import_rows(store, *batches, history=NEW, expected_count=0):
    return store._run(store._import, history, batches, expected_count)


def assert_sound(server, store):
    """
    The counters say what there is, and no position is twice or to come.
    """
    assert store._run(store._faults, False) == []
    counted = f"SELECT history_key, count(DISTINCT position) FROM {store.schema_name}.chat_messages GROUP BY 1"
    counters = f"SELECT history_key, message_count FROM {store.schema_name}.chat_histories WHERE message_count > 0"
    assert sorted(server.execute(counted)) == sorted(server.execute(counters))


# ---------------------------------------------------------------------- beside each other


def test_copies_in_both_directions_at_once_disturb_each_other_not(server, make_store):
    store = make_store()

    def copy(source, target):
        for _ in range(60):
            try:
                store.copy_messages(source, target)
                store.delete_messages(target, message_ids=[f"{number}" for number in range(5)])
            except ChatHistoryExistsError:
                pass

    store.write_messages("a", [with_id(f"{number}") for number in range(5)])
    store.write_messages("b", [with_id("x")])
    store.delete_messages("b", message_ids=["x"])
    in_threads(*[lambda: copy("a", "b"), lambda: copy("b", "a")] * 2)
    assert_sound(server, store)


def change_at_random(store, report, seed):
    import random

    from haystack.dataclasses import ChatMessage
    from haystack.document_stores.types import DuplicatePolicy

    from haystack_chat_store.errors import ConflictError, MessageNotFoundError

    choose = random.Random(seed)
    done = 0
    for number in range(150):
        history, other = choose.choice("abc"), choose.choice("abc")
        some = [f"{choose.randrange(30)}" for _ in range(3)]
        role = choose.choice([ChatMessage.from_user, ChatMessage.from_assistant])
        messages = [role(f"{seed} {number}", meta={"chat_message_id": message_id}) for message_id in some]
        try:
            choose.choice(
                [
                    lambda history=history, messages=messages: store.write_messages(history, messages),
                    lambda history=history, messages=messages: store.write_messages(
                        history, messages, policy=DuplicatePolicy.OVERWRITE
                    ),
                    lambda history=history, messages=messages: store.write_messages(
                        history, messages, expected_count=store.count_messages(history)
                    ),
                    lambda history=history, some=some: store.delete_messages(history, message_ids=some),
                    lambda history=history, some=some: store.delete_messages(history, from_message_id=some[0]),
                    lambda history=history, other=other: store.copy_messages(history, other),
                    lambda history=history: store.delete_messages(history),
                    lambda: store.search_messages(f"{seed}"),
                ]
            )()
            done += 1
        except (ConflictError, MessageNotFoundError, LookupError):
            pass
    report(done)


def test_processes_that_change_the_same_histories_at_once_leave_them_sound(server, make_store):
    store = make_store(search=True)
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(change_at_random, store, seed)) for seed in range(4)]
        Program.begin(*programs)
        assert all(program.reports_to_the_end()[0] > 50 for program in programs)
    assert_sound(server, store)
    for seed in range(4):
        hits = store.search_messages(f"{seed}", limit=1000)
        assert {(hit.chat_history_id, hit.message_id) for hit in hits} == {
            (history, message.meta["chat_message_id"])
            for history in "abc"
            for message in store.retrieve_messages(history)
            if f"{seed}" in message.text.split()
        }


def test_of_two_who_expect_the_same_count_one_writes(server, make_store):
    store = make_store()
    say(store, "question")
    outcomes = []

    def answer():
        try:
            outcomes.append(store.write_messages("history", [ChatMessage.from_user("answer")], expected_count=1))
        except ChatHistoryChangedError:
            outcomes.append(None)

    in_threads(*[answer] * 8)
    assert sorted(outcomes, key=str) == [1, *[None] * 7]


def test_of_two_who_begin_the_same_history_one_does(server, make_store):
    store = make_store()
    outcomes = []

    def begin(number):
        try:
            store.write_messages(f"history {number}", [ChatMessage.from_user("Hi!")], expected_count=0)
            outcomes.append(number)
        except ChatHistoryChangedError:
            pass

    for number in range(20):
        in_threads(*[lambda number=number: begin(number)] * 3)
    assert sorted(outcomes) == list(range(20))


def test_a_batch_beside_a_rewind_is_there_whole_or_from_where_it_was_rewound_on_gone(server, make_store):
    """
    What a writer found to be there may be gone when it writes the rest.
    """
    store = make_store()
    done = threading.Event()

    def write():
        for number in range(150):
            store.write_messages("history", [with_id(f"first {number}")])
            store.write_messages("history", [with_id(f"first {number}"), with_id(f"second {number}")])
            found = [message.meta["chat_message_id"] for message in store.retrieve_messages("history")]
            assert (f"first {number}" in found) >= (f"second {number}" in found)
        done.set()

    def rewind():
        while not done.is_set():
            for stored in store.list_messages("history", limit=1):
                try:
                    store.delete_messages("history", from_message_id=stored.message.meta["chat_message_id"])
                except MessageNotFoundError:
                    pass

    in_threads(write, rewind)
    assert_sound(server, store)


async def process_of(session):
    return session.connection.info.backend_pid


def test_what_is_refused_costs_no_connection(server):
    with stores_on(server.url, last_k=None) as make:
        store = make()
        store.write_messages("history", [with_id("a")])
        before = store._run(process_of)
        for _ in range(3):
            with pytest.raises(DuplicateMessageError):
                store.write_messages("history", [with_id("a")], policy=DuplicatePolicy.FAIL)
            with pytest.raises(ChatHistoryChangedError):
                store.write_messages("other", [with_id("a")], expected_count=5)
            with pytest.raises(MessageNotFoundError):
                store.delete_messages("history", from_message_id="none")
        assert store._run(process_of) == before
        assert store.get_chat_history("other") is None


# ---------------------------------------------------------------------- forking


def test_a_fork_of_nothing_changes_nothing(server, make_store):
    store = make_store()
    for history in ("empty", "another"):
        store.write_messages(history, [with_id("a")])
        store.delete_messages(history, message_ids=["a"])
    before = store._run(store._history, "another")
    assert store.copy_messages("empty", "another") == store.copy_messages("empty", "new") == 0
    assert store.get_chat_history("new") is None
    assert store._run(store._history, "another") == before


def test_the_positions_of_a_fork_go_on_where_its_target_ended_without_the_gaps_of_its_source(server, make_store):
    store = make_store()
    store.write_messages("source", [with_id(f"{number}") for number in range(6)])
    store.delete_messages("source", message_ids=["0", "3"])
    store.write_messages("target", [with_id("a"), with_id("b")])
    store.delete_messages("target", message_ids=["a", "b"])
    assert store.copy_messages("source", "target") == 4
    assert [stored.position for stored in store.list_messages("target")] == [2, 3, 4, 5]
    assert_sound(server, store)


# ---------------------------------------------------------------------- importing


def test_an_import_of_many_batches_and_large_messages_is_whole(server, make_store, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.postgres.changing._CHARACTERS_PER_STATEMENT", 5_000)
    store = make_store(search=True)
    batches = [rows(0, 100), rows(100, 101, text="large " * 10_000), [], rows(101, 300)]
    assert import_rows(store, *batches) == 300
    info = store.get_chat_history("history")
    assert (info.message_count, info.round_count, info.title, info.meta) == (300, 300, "a title", {"a": 1})
    assert [stored.position for stored in store.list_messages("history", limit=1000)] == list(range(300))
    assert [hit.message_id for hit in store.search_messages("large")] == ["100"]
    assert import_rows(store, rows(300, 310), history=NEW._replace(title="another"), expected_count=300) == 10
    assert store.get_chat_history("history").title == "a title"
    assert_sound(server, store)


def test_an_import_that_fails_on_the_way_leaves_nothing(server, make_store):
    store = make_store()

    def batches():
        yield rows(0, 1000)
        raise OSError("the file is damaged")

    with pytest.raises(OSError, match=r"^the file is damaged$"):
        store._run(store._import, NEW, batches(), 0)
    with pytest.raises(OSError, match=r"^the file is damaged$"):
        asyncio.run(store._run_async(store._import, NEW, batches(), 0))
    with pytest.raises(Exception, match="UniqueViolation"):
        import_rows(store, rows(0, 10), rows(5, 6))
    assert store.get_chat_history("history") is None
    assert server.execute(f"SELECT FROM {store.schema_name}.chat_messages") == []


def test_several_histories_are_imported_together_unless_one_is_there_even_an_empty_one(server, make_store):
    store = make_store()
    store.write_messages("there", [with_id("x")])
    store.delete_messages("there", message_ids=["x"])
    histories = [(NEW._replace(chat_history_id=history), rows(0, 3)) for history in ("a", "there", "b")]
    with pytest.raises(ChatHistoryChangedError, match="has 0 messages now"):
        store._run(store._import_several, histories)
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["there"]
    assert store.get_chat_history("there").title is None
    assert store._run(store._import_several, histories[::2]) == 6
    assert {store.get_chat_history(history).title for history in "ab"} == {"a title"}
    assert_sound(server, store)


def largest_gap_beside(call):
    """
    Return for how long an event loop did nothing else while it awaited a call, at most, and how long the call took.
    """
    gaps = []

    async def tick():
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    async def main():
        ticker = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        gaps.clear()
        started = time.perf_counter()
        await call()
        took = time.perf_counter() - started
        await asyncio.sleep(0.01)
        ticker.cancel()
        return max(gaps), took

    return asyncio.run(main())


def test_reading_what_is_imported_does_not_hold_up_the_event_loop(make_store):
    store = make_store()

    def batches():
        time.sleep(1)
        yield rows(0, 10)

    store.count_messages("history")
    largest_gap, took = largest_gap_beside(lambda: store._run_async(store._import, NEW, batches(), 0))
    assert took > 1 > 2 * largest_gap
    assert store.count_messages("history") == 10


def test_indexing_large_messages_does_not_hold_up_the_event_loop(make_store):
    """
    When they are written, and when they were there before search was turned on.
    """
    store, searching = make_store(), make_store(search=True)
    messages = [with_id(f"{number}", "some words of many " * 600) for number in range(400)]
    store.write_messages("before", messages)
    largest_gap, took = largest_gap_beside(lambda: searching.search_messages_async("words"))
    assert largest_gap < took / 2
    largest_gap, took = largest_gap_beside(lambda: searching.write_messages_async("history", messages))
    assert largest_gap < took / 2


def import_slowly(store, report):
    import json
    import time

    from haystack_chat_store.stores.operations import HistoryRow, MessageRow

    def batches():
        for batch in range(100_000):
            content = json.dumps({"role": "user", "meta": {}, "name": None, "content": [{"text": "half"}]})
            yield [MessageRow(0, 0, f"{batch}.{number}", "user", content) for number in range(1000)]
            if batch == 5:
                report("has begun")
            if batch > 5:
                time.sleep(0.01)

    store._run(store._import, HistoryRow("history", 0, 0, 0, 0, None, None), batches(), 0)


def test_an_import_that_is_killed_leaves_nothing(server, make_store):
    store = make_store(search=True)
    store.count_messages("history")
    with Program(import_slowly, store) as program:
        program.begin()
        assert next(program.reports()) == "has begun"
        assert store.get_chat_history("history") is None
        program.kill()
    assert say(store, "Hello") == 1  # which waits for the server to notice
    assert said(store) == ["Hello"]
    assert server.execute(f"SELECT count(*) FROM {store.schema_name}.chat_messages") == [(1,)]


# ---------------------------------------------------------------------- times


def updated_at(store, history):
    return store.get_chat_history(history).updated_at


def test_the_time_of_a_change_never_goes_back(server, make_store):
    """
    Another server, which was the primary before, may have had a clock that was ahead.
    """
    store = make_store()
    store.write_messages("source", [with_id(f"{number}") for number in range(5)])
    store.copy_messages("source", "history")
    ahead = "UPDATE {}.chat_histories SET updated_at = '2999-01-01 00:00:00+00'"
    execute(server.url, ahead.format(store.schema_name))
    changes = [
        lambda: store.write_messages("history", [with_id("a")]),
        lambda: store.write_messages("history", [with_id("a"), with_id("b")]),
        lambda: store.write_messages("history", [with_id("a", "other")], policy=DuplicatePolicy.OVERWRITE),
        lambda: store.delete_messages("history", from_message_id="a"),
        lambda: import_rows(store, rows(10, 12), expected_count=5),
        lambda: store.delete_messages("history", message_ids=[f"{number}" for number in range(12)]),
        lambda: store.copy_messages("source", "history"),
    ]
    for change in changes:
        before = store.list_messages("history")
        change()
        assert store.list_messages("history") != before
        assert updated_at(store, "history").year == 2999


def test_the_time_of_a_change_is_not_before_that_of_the_one_it_waited_for(server, make_store):
    store = make_store(max_pool_size=2)
    say(store, "first")
    with psycopg.connect(server.url) as writer:
        writer.execute(f"SELECT FROM {store.schema_name}.chat_histories FOR UPDATE")
        waits = threading.Thread(target=lambda: say(store, "second"))
        waits.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: server.execute(waiting) == [(1,)], "the write to wait")
        writer.execute(f"UPDATE {store.schema_name}.chat_histories SET round_count = round_count")
        ((released_at,),) = writer.execute("SELECT clock_timestamp()").fetchall()
    waits.join()
    assert updated_at(store, "history") >= released_at


SETTINGS = [
    "timezone=Asia/Kathmandu",
    "timezone=America/St_Johns",
    "DateStyle=German",
    "DateStyle=SQL,DMY",
    "IntervalStyle=sql_standard",
    "extra_float_digits=-15",
]
MOMENTS = [
    0,
    1,
    -1,
    -999_999,
    1_700_000_000_123_457,
    2_199_999_999_999_999,
    -2_208_988_800_000_001,  # in 1899
    253_402_300_799_999_999,  # the last of datetime
    -62_135_596_800_000_000,  # the first
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_times_are_exact_to_the_microsecond_whatever_the_session_is_set_to(server, setting):
    options = f"-c%20{setting.replace('=', '%3D').replace('/', '%2F')}"
    with stores_on(f"{server.url}?options={options}", last_k=None) as make:
        store = make()
        for moment in MOMENTS:
            history = NEW._replace(chat_history_id=f"{moment}", created_at=moment, updated_at=moment)
            import_rows(store, rows(0, 1, created_at=moment), history=history)
            row = store._run(store._history, f"{moment}")
            assert (row.created_at, row.updated_at) == (moment, moment)
            (page,) = store._run(store._page, f"{moment}", None, None, 10)
            assert page.created_at == moment
        listed, cursor = [], None
        while cursor is not None or not listed:
            page = store.list_chat_histories(limit=2, cursor=cursor)
            listed += [int(info.chat_history_id) for info in page.items]
            cursor = page.cursor
        assert listed == sorted(MOMENTS, reverse=True)


# ---------------------------------------------------------------------- the directory


def test_a_prefix_finds_the_same_whether_few_or_many_histories_have_it(make_store, monkeypatch):
    store = make_store()
    for number in range(40):
        say(store, "Hi!", history=f"{'ab'[number % 2]}/{number}")
    pages = []
    for few in (1000, 3):
        monkeypatch.setattr("haystack_chat_store.stores.postgres.directory._FEW_HISTORIES", few)
        cursor, found = None, []
        while cursor is not None or not found:
            page = store.list_chat_histories(prefix="a/", limit=7, cursor=cursor)
            found += [info.chat_history_id for info in page.items]
            cursor = page.cursor
        pages.append(found)
    assert pages == [[f"a/{number}" for number in range(38, -1, -2)]] * 2


# ---------------------------------------------------------------------- erasing


def test_a_history_that_changes_while_old_ones_are_purged_stays(server, make_store):
    store = make_store(max_pool_size=2)
    for history in ("old", "alive"):
        import_rows(store, rows(0, 1), history=NEW._replace(chat_history_id=history))
    with psycopg.connect(server.url) as writer:
        writer.execute(
            f"UPDATE {store.schema_name}.chat_histories SET updated_at = now() WHERE chat_history_id = 'alive'"
        )
        purged = []
        purge = threading.Thread(target=lambda: purged.append(store._run(store._erase_some, "", 10_000_000, 100)))
        purge.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: server.execute(waiting) == [(1,)], "the purge to wait")
    purge.join()
    assert purged == [1]
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["alive"]
    assert len(said(store, "alive")) == 1


def test_erasing_keeps_to_few_messages_at_a_time(server, make_store, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.postgres.directory._MESSAGES_PER_STEP", 10)
    store = make_store()
    for number in range(6):
        import_rows(store, rows(0, 4), history=NEW._replace(chat_history_id=f"user/{number}"))
    say(store, "stays")
    assert [store._run(store._erase_some, "user/", None, 100) for _ in range(4)] == [2, 2, 2, 0]
    assert said(store) == ["stays"]


SECRET = "Kaleidoskopmacher"  # in no program or dictionary of the server


def bytes_of(server):
    """
    Everything the server keeps but the write-ahead log, which is not for us to rewrite.
    """
    server.execute("CHECKPOINT")
    files = (path for path in (server.folder / "data").rglob("*") if path.is_file() and "pg_wal" not in path.parts)
    return b"".join(path.read_bytes().lower() for path in files)


@pytest.mark.parametrize("partitions", [None, 3], ids=["whole", "partitioned"])
def test_what_was_erased_is_gone_from_the_files_after_a_vacuum(server, url, partitions):
    with stores_on(url, search=True) as make:
        store = make()
        execute(server.url, store.create_schema_sql(partitions))
        for number in range(50):
            store.write_messages(f"user/{number}", [ChatMessage.from_user(f"I am {SECRET} {number}")])
            store.update_chat_history(f"user/{number}", title=f"{SECRET}'s", meta={"name": SECRET})
        say(store, "something else")
        execute(server.url, "ANALYZE")
        assert SECRET.lower().encode() in bytes_of(server)
        assert store.delete_chat_histories(prefix="user/", vacuum=True) == 50
        assert SECRET.lower().encode() not in bytes_of(server)
        assert len(store.search_messages("something")) == 1


def test_a_role_that_may_not_vacuum_is_told_so(server, url):
    with stores_on(url) as make:
        store = make()
        execute(
            server.url,
            store.create_schema_sql(),
            f"CREATE ROLE {store.schema_name} LOGIN PASSWORD '{PASSWORD}'",
            f"GRANT USAGE ON SCHEMA {store.schema_name} TO {store.schema_name}",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {store.schema_name} TO {store.schema_name}",
        )
        restricted = store_at(server.url.replace("chat:", f"{store.schema_name}:"), schema_name=store.schema_name)
        say(restricted, "Hello")
        with pytest.raises(UnsupportedOperationError, match="VACUUM FULL"):
            restricted.delete_chat_histories(prefix="hist", vacuum=True)
        assert restricted.get_chat_history("history") is None
        restricted.close()
