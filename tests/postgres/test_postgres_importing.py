# SPDX-License-Identifier: Apache-2.0
"""Imports: in batches, all or nothing."""

import asyncio
import threading
import time
from dataclasses import replace
from itertools import count

import pytest
from event_loops import assert_loop_goes_on_beside, largest_gap_beside
from imported import NEW, assert_sound, import_rows, rows
from postgres_stores import DIRECTLY_OR_POOLED, NEWEST_AND_OLDEST, said, say

from haystack_chat_store.errors import ChatHistoryChangedError, StoreTimeoutError
from haystack_chat_store.testing.messages import user, with_id
from haystack_chat_store.testing.processes import Program

VERSIONS = NEWEST_AND_OLDEST
WAYS = DIRECTLY_OR_POOLED


def test_an_import_of_many_batches_and_large_messages_is_whole(server, make_store, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.postgres.importing._STATEMENT_CHARACTERS", 5_000)
    store = make_store(search=True)
    batches = [rows(0, 100), rows(100, 101, text="large " * 10_000), [], rows(101, 300)]
    assert import_rows(store, *batches) == 300
    info = store.get_chat_history("history")
    assert (info.message_count, info.round_count, info.title, info.meta) == (300, 300, "a title", {"a": 1})
    assert [stored.position for stored in store.list_messages("history", limit=1000)] == list(range(300))
    assert [hit.message_id for hit in store.search_messages("large")] == ["100"]
    assert (
        import_rows(store, rows(300, 310), history=replace(NEW, title="another"), expected_revision=info.revision) == 10
    )
    assert store.get_chat_history("history").title == "a title"
    assert_sound(server, store)


def test_an_import_that_fails_on_the_way_leaves_nothing(server, make_store):
    store = make_store()

    def batches():
        yield rows(0, 1000)
        raise OSError("the file is damaged")

    with pytest.raises(OSError, match=r"^the file is damaged$"):
        store.engine.run(store.engine.import_history, store.scope, NEW, batches(), 0)
    with pytest.raises(OSError, match=r"^the file is damaged$"):
        asyncio.run(store.engine.run_async(store.engine.import_history, store.scope, NEW, batches(), 0))
    with pytest.raises(Exception, match="unique violation"):
        import_rows(store, rows(0, 10), rows(5, 6))
    assert store.get_chat_history("history") is None
    assert server.execute(f"SELECT FROM {store.schema_name}.haystack_chat_messages") == []


def test_several_histories_are_imported_together_unless_one_is_there_even_an_empty_one(server, make_store):
    store = make_store()
    store.write_messages("there", [with_id("x")])
    store.delete_messages("there", message_ids=["x"])
    histories = [(replace(NEW, chat_history_id=history), rows(0, 3)) for history in ("a", "there", "b")]
    with pytest.raises(ChatHistoryChangedError, match="exists by now"):
        store.engine.run(store.engine.import_histories, store.scope, histories)
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["there"]
    assert store.get_chat_history("there").title is None
    assert store.engine.run(store.engine.import_histories, store.scope, histories[::2]) == 6
    assert {store.get_chat_history(history).title for history in "ab"} == {"a title"}
    assert_sound(server, store)


def test_reading_what_is_imported_does_not_hold_up_the_event_loop(make_store):
    store = make_store()
    is_read, loop_goes_on = threading.Event(), threading.Event()

    def batches():
        is_read.set()
        assert loop_goes_on.wait(60), "the event loop waits for what is being read"
        yield rows(0, 10)

    async def main():
        importing = asyncio.create_task(
            store.engine.run_async(store.engine.import_history, store.scope, NEW, batches(), 0)
        )
        while not (is_read.is_set() or importing.done()):
            await asyncio.sleep(0.001)
        loop_goes_on.set()
        await importing

    asyncio.run(main())
    assert store.count_messages("history") == 10


def test_a_source_that_fails_after_the_timeout_raises_its_own_error(make_store, calls):
    store = make_store(timeout=0.3)

    def batches():
        time.sleep(0.5)
        raise StoreTimeoutError("The source did not answer.")
        yield []

    with pytest.raises(StoreTimeoutError, match="The source"):
        calls.call(store.engine, "run", store.engine.import_history, store.scope, NEW, batches(), 0)
    assert calls.write(store, "history", [user()]) == 1


def test_indexing_large_messages_does_not_hold_up_the_event_loop(make_store):
    """When they are written, and when they were there before search was turned on."""
    store, searching = make_store(), make_store(search=True)
    messages = [with_id(f"{number}", "some words of many " * 600) for number in range(400)]
    store.write_messages("before", messages)
    largest_gap, took = largest_gap_beside(searching.index_messages_async)
    assert largest_gap < took / 2
    histories = map(str, count())
    assert_loop_goes_on_beside(lambda: searching.write_messages_async(next(histories), messages))


def import_slowly(store, report):
    import json
    import time

    from haystack_chat_store.stores.rows import HistoryRow, MessageRow

    def batches():
        for batch in range(100_000):
            content = json.dumps({"role": "user", "meta": {}, "name": None, "content": [{"text": "half"}]})
            yield [
                MessageRow(position=0, created_at=0, message_id=f"{batch}.{number}", role="user", content=content)
                for number in range(1000)
            ]
            if batch == 5:
                report("has begun")
            if batch > 5:
                time.sleep(0.01)

    store.engine.run(
        store.engine.import_history,
        store.scope,
        HistoryRow(chat_history_id="history", created_at=0, updated_at=0),
        batches(),
        0,
    )


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
    assert server.execute(f"SELECT count(*) FROM {store.schema_name}.haystack_chat_messages") == [(1,)]
