# SPDX-License-Identifier: Apache-2.0
"""Times, the directory, and erasing."""

import threading
from dataclasses import replace
from time import sleep

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from imported import NEW, import_rows, rows
from postgres_stores import (
    DIRECTLY_OR_POOLED,
    NEWEST_AND_OLDEST,
    counted,
    execute,
    said,
    say,
    store_at,
    stores_on,
)
from servers import PASSWORD, wait_until

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.stores.postgres import histories
from haystack_chat_store.stores.postgres.histories import LockedHistory
from haystack_chat_store.testing.messages import with_id

VERSIONS = NEWEST_AND_OLDEST
WAYS = DIRECTLY_OR_POOLED


# ---------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("rename_chat_history", {"new_id": "other"}),
        ("update_chat_history", {"title": "new"}),
        ("create_chat_history", {"exist_ok": True}),
    ],
)
def test_a_history_may_expire_while_it_is_changed(make_store, calls, monkeypatch, change, options):
    store = make_store(ttl=0.3)

    def locked(*row):
        sleep(0.4)
        return LockedHistory(*row)

    calls.write(store, "chat", [with_id("a", "Hi!")])
    monkeypatch.setattr(histories, "LockedHistory", locked)
    assert calls.call(store, change, "chat", **options).message_count == 1


def updated_at(store, history):
    return store.get_chat_history(history).updated_at


def test_the_time_of_a_change_never_goes_back(server, make_store):
    """Another server, which was the primary before, may have had a clock that was ahead."""
    store = make_store()
    store.write_messages("source", [with_id(f"{number}") for number in range(5)])
    store.copy_messages("source", "history")
    ahead = "UPDATE {}.haystack_chat_histories SET updated_at = '2999-01-01 00:00:00+00'"
    execute(server.url, ahead.format(store.schema_name))
    changes = [
        lambda: store.write_messages("history", [with_id("a")]),
        lambda: store.write_messages("history", [with_id("a"), with_id("b")]),
        lambda: store.write_messages("history", [with_id("a", "other")], policy=DuplicatePolicy.OVERWRITE),
        lambda: store.delete_messages("history", from_message_id="a"),
        lambda: import_rows(store, rows(10, 12), expected_revision=store.get_chat_history("history").revision),
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
        writer.execute(f"SELECT FROM {store.schema_name}.haystack_chat_histories FOR UPDATE")
        waits = threading.Thread(target=lambda: say(store, "second"))
        waits.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: server.execute(waiting) == [(1,)], "the write to wait")
        histories = f"{store.schema_name}.haystack_chat_histories"
        change = f"UPDATE {histories} SET updated_at = clock_timestamp() RETURNING updated_at"
        ((changed_at,),) = writer.execute(change).fetchall()
    waits.join()
    assert updated_at(store, "history") >= changed_at


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
            history = replace(NEW, chat_history_id=f"{moment}", created_at=moment, updated_at=moment)
            import_rows(store, rows(0, 1, created_at=moment), history=history)
            row = store.engine.run(store.engine.history, store.scope, f"{moment}")
            assert (row.created_at, row.updated_at) == (moment, moment)
            (page,) = store.engine.run(store.engine.page, store.scope, f"{moment}", None, None, 10)
            assert page.created_at == moment
        listed, cursor = [], None
        while cursor is not None or not listed:
            page = store.list_chat_histories(limit=2, cursor=cursor)
            listed += [int(info.chat_history_id) for info in page.items]
            cursor = page.cursor
        assert listed == sorted(MOMENTS, reverse=True)


# ---------------------------------------------------------------------- the directory


@pytest.mark.parametrize("tried_at_first", [1, 3, 256])
@pytest.mark.parametrize("partitions", [None, 3], ids=["whole", "partitioned"])
def test_a_prefix_finds_the_same_whether_few_or_many_histories_have_it(
    server, make_store, calls, monkeypatch, tried_at_first, partitions
):
    monkeypatch.setattr("haystack_chat_store.stores.postgres.directory._FIRST_TRY", tried_at_first)
    store = make_store()
    execute(server.url, store.create_schema_sql(partitions))
    ids = [f"old/{number}" for number in range(20)] + [f"{'ab'[number % 2]}/{number}" for number in range(40)]
    for number, history in enumerate([*ids, "new/1"]):
        import_rows(store, rows(0, 1), history=replace(NEW, chat_history_id=history, updated_at=number))
    say(make_store(namespace="other"), "Hi!", history="a/other")
    for prefix in ("a/", "old/", "a", "new/", "old/1", "nobody"):
        cursor, found = None, []
        while cursor is not None or not found:
            page = calls.call(store, "list_chat_histories", prefix=prefix, limit=7, cursor=cursor)
            found += [info.chat_history_id for info in page.items]
            cursor = page.cursor
            if not page.items:
                break
        assert found == [history for history in ["new/1", *reversed(ids)] if history.startswith(prefix)]


def test_a_page_of_the_oldest_histories_does_not_pass_all_newer_ones(server):
    with stores_on(server.url) as make:
        store = make()
        store.delete_messages("history")  # makes the tables
        server.execute(
            f"INSERT INTO {store.schema_name}.haystack_chat_histories (history_key, namespace, chat_history_id, "
            "next_position, message_count, round_count, revision, updated_at) SELECT gen_random_uuid(), 'default', "
            "CASE WHEN n <= 1100 THEN 'old/' ELSE 'new/' END || n, 0, 0, 0, 1, "
            "'2020-01-01Z'::timestamptz + n * interval '1s' FROM generate_series(1, 60000) n"
        )
        server.execute("ANALYZE")  # as the server's autovacuum does within a minute
        with counted(server, store, "haystack_chat_histories", "pg_statio_user_tables.idx_blks_hit") as read:
            page = store.list_chat_histories(prefix="old/", limit=5)
        assert [info.chat_history_id for info in page.items] == [f"old/{number}" for number in range(1100, 1095, -1)]
        assert 0 < read() < 240  # to pass all newer ones takes 365 and more


def test_the_place_after_a_time_that_there_is_not_is_the_end(store):
    """No page has such a cursor, but a caller can make one."""
    say(store, "Hi!")
    for time in (-(2**61), -210_866_803_200_000_001):
        assert store.engine.run(store.engine.histories, store.scope, "", (time, "a"), 10) == []
    for time in (-210_866_803_200_000_000, 2**62 - 1):
        assert len(store.engine.run(store.engine.histories, store.scope, "", (time, "a"), 10)) == (time > 0)


# ---------------------------------------------------------------------- erasing


def test_a_history_that_changes_while_old_ones_are_purged_stays(server, make_store):
    store = make_store(max_pool_size=2)
    for history in ("old", "alive"):
        import_rows(store, rows(0, 1), history=replace(NEW, chat_history_id=history))
    with psycopg.connect(server.url) as writer:
        writer.execute(
            f"UPDATE {store.schema_name}.haystack_chat_histories SET updated_at = now() WHERE chat_history_id = 'alive'"
        )
        purged = []
        purge = threading.Thread(
            target=lambda: purged.append(store.engine.run(store.engine.erase_some, store.scope, "", 10_000_000, 100))
        )
        purge.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: server.execute(waiting) == [(1,)], "the purge to wait")
    purge.join()
    assert purged == [1]
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["alive"]
    assert len(said(store, "alive")) == 1


def test_erasing_keeps_to_few_messages_at_a_time(server, make_store, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.postgres.erasing._DELETE_BATCH_MESSAGES", 10)
    store = make_store()
    for number in range(6):
        import_rows(store, rows(0, 4), history=replace(NEW, chat_history_id=f"user/{number}"))
    say(store, "stays")
    assert [store.engine.run(store.engine.erase_some, store.scope, "user/", None, 100) for _ in range(4)] == [
        2,
        2,
        2,
        0,
    ]
    assert said(store) == ["stays"]


SECRET = "Kaleidoskopmacher"  # in no program or dictionary of the server


def bytes_of(server, database):
    """Everything the server keeps of a database but the write-ahead log, which is not for us to rewrite."""
    execute(database, "CHECKPOINT")
    [(number,)] = execute(database, "SELECT oid FROM pg_database WHERE datname = current_database()")
    files = (path for path in (server.folder / "data" / "base" / str(number)).rglob("*") if path.is_file())
    return b"".join(path.read_bytes().lower() for path in files)


@pytest.mark.parametrize("partitions", [None, 3], ids=["whole", "partitioned"])
def test_what_was_erased_is_gone_from_the_files_after_a_vacuum(server, database, partitions):
    with stores_on(database, search=True) as make:
        store = make()
        execute(database, store.create_schema_sql(partitions))
        for number in range(50):
            store.write_messages(f"user/{number}", [ChatMessage.from_user(f"I am {SECRET} {number}")])
            store.update_chat_history(f"user/{number}", title=f"{SECRET}'s", meta={"name": SECRET})
        say(store, "something else")
        execute(database, "ANALYZE")
        assert SECRET.lower().encode() in bytes_of(server, database)
        assert store.delete_chat_histories(prefix="user/", vacuum=True) == 50
        assert SECRET.lower().encode() not in bytes_of(server, database)
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
        with pytest.raises(UnsupportedOperationError, match=r"The histories were deleted.* VACUUM FULL"):
            restricted.delete_chat_histories(prefix="hist", vacuum=True)
        assert restricted.get_chat_history("history") is None
        restricted.close()


def test_a_history_that_is_created_has_one_time(make_store):
    store = make_store()
    created = [store.create_chat_history(f"{number}") for number in range(300)]
    assert [info for info in created if info.created_at != info.updated_at] == []
