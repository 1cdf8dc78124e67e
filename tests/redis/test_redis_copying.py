# SPDX-License-Identifier: Apache-2.0
"""Copies and imports in Redis: they wait under keys of their own, appear at once, and leave nothing when they fail."""

import asyncio
import threading
from dataclasses import replace
from itertools import islice

import pytest
from redis_stores import SECRET, everything, keys_of, neighbours, nodes_of, on_every_engine, on_one_server, said, say

from haystack_chat_store import ChatHistoryExistsError
from haystack_chat_store.errors import ChatHistoryChangedError, DuplicateMessageError, StoreUnavailableError
from haystack_chat_store.stores.redis import directory, staging, writing
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.messages import with_id
from haystack_chat_store.testing.processes import Program
from haystack_chat_store.transfer import export_histories, import_histories

HISTORY = HistoryRow(chat_history_id="imported", created_at=5, updated_at=7, title="Weather", meta='{"a": 1}')


def row(message_id, text="Hi!", created_at=3):
    content = '{"role": "user", "meta": {"chat_message_id": "%s"}, "name": null, "content": [{"text": "%s"}]}'
    content %= (message_id, text)
    return MessageRow(position=0, created_at=created_at, message_id=message_id, role="user", content=content)


def import_(store, batches, expected_revision=0, history=HISTORY):
    return store.engine.run(store.engine.import_history, store.scope, history, batches, expected_revision)


def revision_of(store, history="imported"):
    return store.get_chat_history(history).revision


def staged(store, client):
    return [key for key in keys_of(store, client) if ":staged:" in key]


def some_batches(count, size=1000):
    return ([row(f"{batch}-{number}") for number in range(size)] for batch in range(count))


@on_every_engine
def test_what_is_imported_appears_at_once(store, client):
    seen = []

    def batches():
        for batch in some_batches(3):
            yield batch
            seen.append(
                (store.count_messages("imported"), store.get_chat_history("imported"), len(staged(store, client)))
            )

    assert import_(store, batches()) == 3000
    assert seen == [(0, None, 4)] * 3
    assert staged(store, client) == []
    assert store.count_messages("imported") == 3000
    assert [client.ttl(key) for key in keys_of(store, client)] == [-1] * 8
    info = store.get_chat_history("imported")
    assert (info.message_count, info.round_count, info.title, info.meta) == (3000, 3000, "Weather", {"a": 1})
    assert (info.created_at.microsecond, info.updated_at.microsecond) == (5, 7)
    assert [each.position for each in store.list_messages("imported", limit=2)] == [2998, 2999]
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
def test_an_import_goes_on_where_a_history_ends(store):
    assert import_(store, some_batches(1, 10)) == 10
    store.delete_messages("imported", from_message_id="0-5")
    assert import_(store, [[row(f"more {number}") for number in range(2500)]], revision_of(store)) == 2500
    positions = [each.position for each in store.iterate_messages("imported")]
    assert positions == [*range(5), *range(10, 2510)]
    assert store.engine.run(store.engine.check, store.scope) == []
    store.delete_messages("imported", from_message_id="more 0")
    assert said(store, "imported") == 5 * ["Hi!"]


@on_every_engine
def test_messages_that_come_to_a_history_without_any_last_as_long_as_it_does(make_store, client):
    store, passing = make_store(), make_store(ttl=60)
    say(passing, "Hi!", history="passing")
    copy = next(neighbours("passing"))
    for history in ("imported", copy):
        import_(store, [], history=replace(HISTORY, chat_history_id=history))
    assert import_(store, some_batches(1, 10), revision_of(store)) == 10
    assert store.copy_messages("passing", copy) == 1
    lasting = [key for key in keys_of(store, client) if ":passing:" not in key]
    assert [client.ttl(key) for key in lasting] == [-1] * len(lasting)
    assert (store.count_messages("imported"), said(store, copy)) == (10, ["Hi!"])


@on_every_engine
def test_an_import_without_messages_makes_a_history_where_there_is_none(store, client):
    assert import_(store, []) == 0
    info = store.get_chat_history("imported")
    assert (info.message_count, info.title, info.updated_at.microsecond) == (0, "Weather", 7)
    assert [each.chat_history_id for each in store.list_chat_histories().items] == ["imported"]
    store.write_messages("emptied", [with_id("a")])
    store.delete_messages("emptied", message_ids=["a"])
    before = everything(store, client)
    for history in ("imported", "emptied"):
        again = replace(HISTORY, chat_history_id=history, updated_at=9, title="New")
        assert import_(store, [[]], revision_of(store, history), again) == 0
    assert everything(store, client) == before
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
def test_emptied_histories_can_be_imported_twice(make_store, tmp_path):
    store, other = make_store(), make_store(namespace="other")
    for history in ("a", "b"):
        store.write_messages(history, [with_id("1")])
        store.delete_messages(history, message_ids=["1"])
    export_histories(store, tmp_path / "chats.jsonl")
    before = [replace(info, revision=0) for info in store.list_chat_histories().items]
    for target in (other, other, store, store):
        import_histories(target, tmp_path / "chats.jsonl")
        assert [replace(info, revision=0) for info in target.list_chat_histories().items] == before


@on_every_engine
def test_several_histories_are_imported_only_if_none_of_them_is_there(store, client):
    several = [(replace(HISTORY, chat_history_id=name), [row("a")]) for name in ("first", "second", "third")]
    store.write_messages("second", [with_id("a")])
    store.delete_messages("second", message_ids=["a"])
    before = everything(store, client)
    with pytest.raises(ChatHistoryChangedError, match=r"second.*exists by now"):
        store.engine.run(store.engine.import_histories, store.scope, several)
    assert everything(store, client) == before
    store.delete_messages("second")
    assert store.engine.run(store.engine.import_histories, store.scope, several) == 3


@on_every_engine
def test_an_import_that_fails_leaves_nothing(store, client):
    say(store, "Hi!", history="imported")
    before = everything(store, client)

    def damaged():
        yield from some_batches(2)
        raise ValueError(SECRET)

    with pytest.raises(ValueError, match=SECRET):
        import_(store, damaged(), 1)
    with pytest.raises(ChatHistoryChangedError):
        import_(store, some_batches(2), 0)
    with pytest.raises(DuplicateMessageError):
        import_(store, [[row("a"), row("b")], [row("b")]], 1)

    async def cancelled():
        begun, was_cancelled = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slow():
            yield from some_batches(2)
            loop.call_soon_threadsafe(begun.set)
            while not was_cancelled.is_set():
                yield []

        importing = store.engine.run_async(store.engine.import_history, store.scope, HISTORY, slow(), 1)
        task = asyncio.ensure_future(importing)
        await begun.wait()
        task.cancel()
        was_cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert everything(store, client) == before


@on_every_engine
def test_an_id_that_the_history_has_already_refuses_the_import(store, client):
    store.write_messages("imported", [with_id("a")])
    before = everything(store, client)
    with pytest.raises(DuplicateMessageError):
        import_(store, [[row("b"), row("a")]], 1)
    assert everything(store, client) == before


@on_every_engine
def test_a_history_that_is_written_to_during_an_import_refuses_it(store):
    def batches():
        yield from some_batches(1)
        say(store, "meanwhile", history="imported")

    with pytest.raises(ChatHistoryChangedError):
        import_(store, batches())
    assert said(store, "imported") == ["meanwhile"]


def import_for_ever(store, report):
    from haystack_chat_store.stores.rows import HistoryRow, MessageRow

    def batches():
        number = 0
        while True:
            number += 1
            ids = [f"{number}-{index}" for index in range(100)]
            yield [MessageRow(position=0, created_at=3, message_id=each, role="user", content="{}") for each in ids]
            report(number)

    history = HistoryRow(chat_history_id="imported", created_at=5, updated_at=7)
    store.engine.run(store.engine.import_history, store.scope, history, batches(), 1)


@on_every_engine
def test_a_process_killed_in_the_middle_of_an_import_leaves_nothing_that_lasts(store, client):
    say(store, "Hi!", history="imported")
    before = everything(store, client)
    with Program(import_for_ever, store) as program:
        program.begin()
        assert list(islice(program.reports(), 5)) == [1, 2, 3, 4, 5]
        program.kill()
    left = staged(store, client)
    assert len(left) == 4
    assert all(0 < client.ttl(key) <= 600 for key in left)
    assert {key: value for key, value in everything(store, client).items() if key not in left} == before
    assert said(store, "imported") == ["Hi!"]
    store.delete_all_messages()
    assert keys_of(store, client) == left


# ---------------------------------------------------------------------- copies


def targets():
    """Of the source's own bucket, and of another."""
    return [next(neighbours("history")), "somewhere else"]


@on_every_engine
@pytest.mark.parametrize("target", targets(), ids=["in its bucket", "elsewhere"])
def test_a_copy_is_like_its_source(store, target):
    say(store, *map(str, range(2500)))
    ids = [each.message.meta["chat_message_id"] for each in store.iterate_messages("history")]
    store.delete_messages("history", message_ids=ids[100:1400:2])
    store.update_chat_history("history", title="Weather")
    assert store.copy_messages("history", target) == 1850
    source, copy = (list(store.iterate_messages(each)) for each in ("history", target))
    assert [(each.created_at, each.message) for each in copy] == [(each.created_at, each.message) for each in source]
    assert store.get_chat_history(target).title is None
    assert store.engine.run(store.engine.check, store.scope) == []
    store.delete_messages(target, from_message_id=ids[7])
    assert say(store, "Where was I?", history=target) == 1
    assert said(store, target) == [*map(str, range(7)), "Where was I?"]
    assert store.count_messages("history") == 1850
    with pytest.raises(ChatHistoryExistsError):
        store.copy_messages("history", target)
    store.delete_messages(target, from_message_id=ids[0])
    assert store.copy_messages("history", target, until_message_id=ids[2]) == 3
    assert [each.position for each in store.list_messages(target)] == [1851, 1852, 1853]
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
@pytest.mark.parametrize("target", targets(), ids=["in its bucket", "elsewhere"])
def test_a_copy_has_no_gaps(store, target):
    store.write_messages("history", [with_id(str(number), str(number)) for number in range(6)])
    store.delete_messages("history", message_ids=["0", "2", "3"])
    assert store.copy_messages("history", target) == 3
    copy = store.list_messages(target)
    assert [(each.position, each.message.text) for each in copy] == [(0, "1"), (1, "4"), (2, "5")]
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
@pytest.mark.parametrize("target", targets(), ids=["in its bucket", "elsewhere"])
def test_a_copy_of_nothing_changes_nothing(store, client, target):
    store.write_messages("history", [with_id("a")])
    store.delete_messages("history", message_ids=["a"])
    before = everything(store, client)
    assert store.copy_messages("history", target) == 0
    assert everything(store, client) == before
    store.write_messages(target, [with_id("b")])
    with pytest.raises(ChatHistoryExistsError):
        store.copy_messages("history", target)
    store.delete_messages(target, message_ids=["b"])
    before = everything(store, client)
    assert store.copy_messages("history", target) == 0
    assert everything(store, client) == before


@on_every_engine
def test_a_copy_is_of_one_moment_whatever_others_write(store):
    say(store, *map(str, range(3000)))
    ends = threading.Event()

    def append():
        while not ends.is_set():
            say(store, "more", "and more")

    def copy():
        try:
            for number in range(5):
                copied = store.copy_messages("history", f"copy {number}")
                messages = said(store, f"copy {number}")
                assert len(messages) == copied
                assert messages == [*map(str, range(3000)), *["more", "and more"] * ((copied - 3000) // 2)]
        finally:
            ends.set()

    in_threads(append, copy)


@on_one_server
def test_a_history_that_is_edited_while_it_is_copied_is_read_again(store, monkeypatch):
    say(store, *map(str, range(2500)))
    ids = [each.message.meta["chat_message_id"] for each in store.iterate_messages("history")]
    read_part = staging.read_part
    to_delete = iter([ids[0], ids[2400], None])

    async def edit_and_read(session, keys, chat_history_id, limit, **page):
        found = await read_part(session, keys, chat_history_id, limit, **page)
        if page["after"] > 0 and (message_id := next(to_delete, None)) is not None:
            await writing.remove_ids(session, keys, chat_history_id, [message_id])
        return found

    monkeypatch.setattr(staging, "read_part", edit_and_read)
    assert store.copy_messages("history", "somewhere else") == 2498
    monkeypatch.undo()
    assert said(store, "somewhere else") == [str(each) for each in range(1, 2500) if each != 2400]


@on_one_server
def test_a_copy_of_a_history_that_is_edited_all_the_time_is_given_up(store, client, monkeypatch):
    say(store, *map(str, range(1500)))
    read_part = staging.read_part

    async def edit_and_read(session, keys, chat_history_id, limit, **page):
        client.hincrby(next(key for key in keys_of(store, client) if key.endswith(":history:history")), "edits")
        return await read_part(session, keys, chat_history_id, limit, **page)

    monkeypatch.setattr(staging, "read_part", edit_and_read)
    with pytest.raises(StoreUnavailableError, match="edited each time"):
        store.copy_messages("history", "somewhere else")
    assert staged(store, client) == []
    assert store.count_messages("somewhere else") == 0


@on_every_engine
@pytest.mark.parametrize("target", targets(), ids=["in its bucket", "elsewhere"])
def test_of_many_copies_to_one_history_one_wins(store, target):
    say(store, *map(str, range(1200)))
    results = []

    def copy():
        try:
            results.append(store.copy_messages("history", target))
        except ChatHistoryExistsError:
            results.append(None)

    in_threads(*6 * [copy])
    assert sorted(results, key=str) == [1200, *5 * [None]]
    assert store.count_messages(target) == 1200
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
def test_a_server_that_is_out_of_memory_copies_and_imports_nothing(store, client, server):
    say(store, "Hi!")
    before = everything(store, client)
    for node in nodes_of(server):
        with node.client() as each:
            each.config_set("maxmemory", 1)
    try:
        for target in targets():
            with pytest.raises(StoreUnavailableError, match="maxmemory"):
                store.copy_messages("history", target)
        with pytest.raises(StoreUnavailableError, match="maxmemory"):
            import_(store, some_batches(1))
        assert everything(store, client) == before
        (message_id,) = [each.message.meta["chat_message_id"] for each in store.list_messages("history")]
        store.delete_messages("history", message_ids=[message_id])  # which makes room
    finally:
        for node in nodes_of(server):
            with node.client() as each:
                each.config_set("maxmemory", 0)
    assert said(store) == []
    assert store.engine.run(store.engine.check, store.scope) == []


# ---------------------------------------------------------------------- deleted messages


@on_every_engine
@pytest.mark.parametrize("unit", ["round", "message"])
def test_windows_are_right_however_long_the_gaps_are(make_store, unit):
    store = make_store(last_k=None, last_k_unit=unit)
    messages = [with_id(str(number), str(number)) for number in range(3000)]
    store.write_messages("history", messages)
    gone = [*range(10, 1200), *range(1300, 1399), *range(1500, 2990), *range(2992, 3000, 2)]
    store.delete_messages("history", message_ids=list(map(str, gone)))
    left = [str(number) for number in range(3000) if number not in gone]
    for last_k in (1, 5, 6, 7, 50, 200, 250, len(left), 5000):
        assert [each.text for each in store.retrieve_messages("history", last_k)] == left[-last_k:]
    for limit in (1, 6, 7, 300):
        pages, before = [], None
        while page := store.list_messages("history", before=before, limit=limit):
            pages = [each.message.text for each in page] + pages
            before = page[0].position
        assert pages == left
        assert [each.position for each in store.list_messages("history", after=9, limit=1)] == [1200]
    assert [each.message.text for each in store.iterate_messages("history")] == left
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
def test_a_rewind_deletes_all_that_follows(make_store, client):
    store = make_store(ttl=60, last_k=None)
    store.write_messages("history", [with_id(str(number), str(number)) for number in range(5000)])
    store.delete_messages("history", message_ids=["1500", "4999"])
    for start, left in (("2500", 2499), ("1499", 1499), ("0", 0)):
        store.delete_messages("history", from_message_id=start)
        assert said(store) == [str(number) for number in range(2500) if number != 1500][:left]
        assert store.get_chat_history("history").round_count == left
        assert store.engine.run(store.engine.check, store.scope) == []
    assert say(store, "Hi!") == 1
    assert [each.position for each in store.list_messages("history")] == [5000]


@on_every_engine
def test_a_rewind_begins_where_its_message_is_by_then(store, monkeypatch):
    store.write_messages("history", [with_id(str(number), str(number)) for number in range(3)])
    remove_ids = writing.remove_ids

    async def move_and_remove(*arguments, **conditions):
        monkeypatch.undo()
        store.delete_messages("history", message_ids=["1"])
        store.write_messages("history", [with_id("1"), with_id("3")])
        return await remove_ids(*arguments, **conditions)

    with monkeypatch.context():
        monkeypatch.setattr(writing, "remove_ids", move_and_remove)
        store.delete_messages("history", from_message_id="1")
    assert said(store) == ["0", "2"]
    assert store.engine.run(store.engine.check, store.scope) == []


@on_every_engine
def test_a_rewind_deletes_what_comes_while_it_looks(store, monkeypatch):
    store.write_messages("history", [with_id(str(number)) for number in range(5)])
    remove_ids = writing.remove_ids
    comes = iter(["a", "b"])

    async def write_and_remove(*arguments, **conditions):
        if (message_id := next(comes, None)) is not None:
            store.write_messages("history", [with_id(message_id)])
        return await remove_ids(*arguments, **conditions)

    monkeypatch.setattr(writing, "remove_ids", write_and_remove)
    store.delete_messages("history", from_message_id="3")
    assert [each.message.meta["chat_message_id"] for each in store.list_messages("history")] == ["0", "1", "2"]


@on_every_engine
def test_a_rewind_that_others_always_come_before_says_so(store, monkeypatch):
    names = map(str, range(2, 100))
    remove_ids = writing.remove_ids

    def begin_anew():
        store.delete_chat_history("history")
        store.write_messages("history", [with_id(each) for each in ("0", "1", next(names))])

    async def begin_anew_and_remove(*arguments, **conditions):
        begin_anew()
        return await remove_ids(*arguments, **conditions)

    begin_anew()
    monkeypatch.setattr(writing, "remove_ids", begin_anew_and_remove)
    with pytest.raises(StoreUnavailableError, match=r"Others changed the chat history 'history' .* each time"):
        store.delete_messages("history", from_message_id="1")
    assert store.count_messages("history") == 3
    monkeypatch.undo()
    store.delete_messages("history", from_message_id="1")
    assert store.count_messages("history") == 1


@on_every_engine
def test_a_history_that_others_always_delete_before_it_is_returned_says_so(store, monkeypatch):
    read_histories = directory.read_histories

    async def delete_and_read(*arguments, **options):
        store.delete_chat_history("history")
        return await read_histories(*arguments, **options)

    monkeypatch.setattr(directory, "read_histories", delete_and_read)
    with pytest.raises(StoreUnavailableError, match=r"Others changed the chat history 'history' .* each time"):
        store.create_chat_history("history")
