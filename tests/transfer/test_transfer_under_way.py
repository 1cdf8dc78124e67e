# SPDX-License-Identifier: Apache-2.0
"""What is seen and held of an export, import or copy while it is under way, and what is left when it is interrupted."""

import asyncio
import os
import threading
import time
import tracemalloc
from itertools import cycle

import pytest
from engine_stores import store_on
from haystack.document_stores.types import DuplicatePolicy
from transferred import MOMENT, everything, moved

from haystack_chat_store import (
    SQLiteChatMessageStore,
)
from haystack_chat_store.doctor import check
from haystack_chat_store.stores import reading
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine
from haystack_chat_store.stores.rows import HistoryRow
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import conversation, user
from haystack_chat_store.transfer import (
    copy_histories,
    copy_histories_async,
    export_histories,
    export_histories_async,
    export_to,
    import_histories,
    import_histories_async,
)
from haystack_chat_store.transfer.stored import StoredHistories


def test_progress_tells_what_is_done_of_how_much(store, target, file):
    store.write_messages("a", [user(str(number)) for number in range(2_500)])
    store.write_messages("b", [user()])
    for work in (
        lambda step: export_histories(store, file, progress=step),
        lambda step: import_histories(target, file, progress=step),
        lambda step: import_histories(target, file, progress=step),
        lambda step: copy_histories(store, target, progress=step),
    ):
        seen = []
        work(lambda done, total, seen=seen: seen.append((done, total)))
        known = [(done, total) for done, total in seen if total is not None]
        assert known[-1] == (2_501, 2_501)
        assert known == sorted(known)
        assert len(known) > 3


def test_an_import_that_is_interrupted_leaves_whole_histories(store, sqlite, file):
    store.write_messages("a", conversation("ua"))
    store.write_messages("b", [user(str(number)) for number in range(2_500)])
    export_histories(store, file)

    def step(done, total):
        if total is not None and done > 1_500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_histories(sqlite, file, progress=step)
    assert [(row.chat_history_id, row.message_count) for row, _ in everything(sqlite)] == [("a", 2)]
    assert import_histories(sqlite, file) == moved(1, 2_500, 2, ())
    assert everything(sqlite) == everything(store)


def test_the_asynchronous_calls_do_the_same(several, target, sqlite, file):
    async def move():
        exported = await export_histories_async(several, file, prefix="a")
        return exported, await import_histories_async(target, file), await copy_histories_async(target, sqlite)

    assert asyncio.run(move()) == (moved(2, 4, 0, ()),) * 3
    assert everything(sqlite) == everything(target)


def test_the_asynchronous_calls_work_on_another_thread(several, file):
    threads = set()
    asyncio.run(export_histories_async(several, file, progress=lambda *_: threads.add(threading.get_ident())))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("what", ["export", "import", "copy"])
def test_cancelling_stops_at_the_next_batch_and_leaves_no_part(store, sqlite, file, what):
    store.write_messages("a", [user(str(number)) for number in range(5_000)])
    export_histories(store, file)
    other = file.with_name("other")
    under_way, steps = threading.Event(), []
    may_go_on = threading.Event()

    def step(done, total):
        if total is not None:
            steps.append(done)
            under_way.set()
            may_go_on.wait(60)

    async def cancel():
        work = {
            "export": lambda: export_histories_async(store, other, progress=step),
            "import": lambda: import_histories_async(sqlite, file, progress=step),
            "copy": lambda: copy_histories_async(store, sqlite, progress=step),
        }
        task = asyncio.create_task(work[what]())
        while not under_way.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        asyncio.get_running_loop().call_later(0.1, may_go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert may_go_on.is_set()  # it has waited for its thread, which works on nothing any more

    asyncio.run(cancel())
    assert len(steps) == 1
    assert not other.exists()
    assert everything(sqlite) == []


@pytest.mark.parametrize("progress", [None, lambda *_: None], ids=["without progress", "with progress"])
def test_an_export_that_is_cancelled_at_its_end_writes_no_file(store, file, monkeypatch, progress):
    store.write_messages("a", conversation("ua"))
    at_the_end, may_go_on = threading.Event(), threading.Event()
    sync = os.fsync

    def slow_disk(descriptor):
        at_the_end.set()
        may_go_on.wait(60)
        sync(descriptor)

    async def cancel():
        task = asyncio.create_task(export_histories_async(store, file, progress=progress))
        while not at_the_end.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        asyncio.get_running_loop().call_later(0.1, may_go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    file.write_text("before")
    monkeypatch.setattr(os, "fsync", slow_disk)
    asyncio.run(cancel())
    assert file.read_text() == "before"
    assert list(file.parent.glob(".haystack-chat-store*")) == []


@pytest.mark.parametrize("progress", [None, lambda *_: None], ids=["without progress", "with progress"])
def test_messages_are_counted_beforehand_only_if_the_progress_is_wanted(store, target, file, monkeypatch, progress):
    counted = []
    count = StoredHistories.message_count
    monkeypatch.setattr(StoredHistories, "message_count", lambda self: counted.append(1) or count(self))
    store.write_messages("a", conversation("ua"))
    asyncio.run(export_histories_async(store, file, progress=progress))
    asyncio.run(copy_histories_async(store, target, progress=progress))
    assert len(counted) == (0 if progress is None else 2)


def peak_memory(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peaks_of_moving(count, path):
    here, there = (SQLiteChatMessageStore(path, namespace=name) for name in ("here", "there"))
    for number in range(count):
        here.write_messages(f"chat {number}", [user("x" * 14_000) for _ in range(300)])
    file = path.with_suffix(".jsonl")
    return [
        peak_memory(lambda: export_histories(here, path.with_suffix(".md"), format="markdown")),
        peak_memory(lambda: export_histories(here, path.with_suffix(".html"), format="html")),
        peak_memory(lambda: export_histories(here, file)),
        peak_memory(lambda: import_histories(there, file)),
        peak_memory(lambda: import_histories(there, file)),
    ]


def test_memory_does_not_grow_with_what_is_moved(tmp_path):
    few, many = (peaks_of_moving(count, tmp_path / f"{count}.db") for count in (1, 4))
    for small, large in zip(few, many, strict=True):
        assert large < 1.5 * small


def test_large_messages_are_read_a_few_at_a_time(sqlite, file):
    sqlite.write_messages("a", [user("x" * 200_000) for _ in range(300)])
    with file.open("wb") as stream:
        assert peak_memory(lambda: export_to(sqlite, stream)) < 120_000_000
    assert file.stat().st_size > 60_000_000


@pytest.mark.parametrize("kind", ["store", "sqlite"])
def test_messages_larger_than_a_page_may_be_are_read_one_by_one_and_none_is_missed(request, target, file, kind):
    source = request.getfixturevalue(kind)
    source.write_messages("a", [user(f"{number} {'x' * 1_000}") for number in range(105)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "PAGE_CHARACTERS", 900)
        assert export_histories(source, file) == moved(1, 105, 0, ())
        assert len(list(source.iterate_messages("a"))) == 105
        assert list(check(source)) == []
    assert import_histories(target, file) == moved(1, 105, 0, ())


class ChangesWhileItIsRead(InMemoryEngine):
    """Another writer changes a history after its first page was read, for a number of times."""

    times = 0

    def page(self, session, scope, chat_history_id, before, after, limit):
        page = super().page(session, scope, chat_history_id, before, after, limit)
        if after == -1 and self.times:
            self.times -= 1
            self.change()
        return page


def changes_while_it_is_read(change, times=1):
    store = store_on(ChangesWhileItIsRead(), last_k=None)
    store.engine.change = lambda: change(store)
    store.engine.times = times
    return store


def edit_both_ends(store):
    ends = [store.list_messages("a", after=position, limit=1)[0].message for position in (0, 1_998)]
    edited = [user(f"edited {time.time_ns()}", chat_message_id=message.meta["chat_message_id"]) for message in ends]
    store.write_messages("a", edited, policy=DuplicatePolicy.OVERWRITE)


def erase_the_rest(store):
    store.delete_messages(
        "a", from_message_id=store.list_messages("a", after=50, limit=1)[0].message.meta["chat_message_id"]
    )


# The time of the last change never goes back. If a clock was wrong once, it stays where it is for a while.
@pytest.mark.parametrize("updated_at", [MOMENT, microseconds_now() + 10**12], ids=["past", "future"])
@pytest.mark.parametrize("change", [edit_both_ends, erase_the_rest])
def test_a_history_that_changes_while_it_is_read_is_exported_as_of_one_moment(target, file, change, updated_at):
    store = changes_while_it_is_read(change)
    history = HistoryRow(chat_history_id="a", created_at=MOMENT, updated_at=updated_at)
    store.engine.run(store.engine.import_history, store.scope, history, [], 0)
    store.write_messages("a", [user(str(number)) for number in range(2_000)])

    assert export_histories(store, file).faults == ()
    import_histories(target, file)

    assert texts(target.retrieve_messages("a", last_k=9_999)) == texts(store.retrieve_messages("a"))


def test_a_history_that_changes_all_the_time_is_exported_and_reported(file):
    store = changes_while_it_is_read(edit_both_ends, times=1_000)
    store.write_messages("a", [user(str(number)) for number in range(2_000)])

    exported = export_histories(store, file)

    assert exported.messages == 2_000
    assert [fault.chat_history_id for fault in exported.faults] == ["a"]


@pytest.mark.parametrize("number", [1, 2_500])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_export_gives_no_user_what_another_one_has_written(store, target, file, monkeypatch, number, moment):
    """A hand-over changes neither the messages nor their time. So it is looked for by itself."""
    store.create_chat_history("chat", user_id="ada")
    store.write_messages("chat", [user(f"of ada {place}") for place in range(number)])
    page = InMemoryEngine.page

    def read(self, *arguments):
        monkeypatch.setattr(InMemoryEngine, "page", page)
        rows = page(self, *arguments) if moment == "after" else None
        store.update_chat_history("chat", user_id="bob")
        store.write_messages("chat", [user("of bob")])
        return page(self, *arguments) if rows is None else rows

    monkeypatch.setattr(InMemoryEngine, "page", read)
    assert export_histories(store, file) == moved(1, number + 1, 0, ())
    import_histories(target, file)
    assert target.get_chat_history("chat").user_id == "bob"
    assert "of bob" in texts(target.retrieve_messages("chat", last_k=10_000))


def test_a_history_that_changes_hands_all_the_time_is_exported_without_messages(store, target, file, monkeypatch):
    store.create_chat_history("chat", user_id="ada")
    store.write_messages("chat", [user("secret")])
    users, page = cycle(["bob", "ada"]), InMemoryEngine.page

    def read(self, *arguments):
        store.update_chat_history("chat", user_id=next(users))
        return page(self, *arguments)

    monkeypatch.setattr(InMemoryEngine, "page", read)
    (fault,) = export_histories(store, file).faults
    assert (fault.chat_history_id, "another user all the time" in fault.description) == ("chat", True)
    assert "secret" not in file.read_text(encoding="utf-8")


def test_a_history_that_is_deleted_while_it_is_read_is_not_exported(store, target, file, monkeypatch):
    store.write_messages("chat", [user("secret")])
    page = InMemoryEngine.page

    def read(self, *arguments):
        rows = page(self, *arguments)
        store.delete_chat_history("chat")
        return rows

    monkeypatch.setattr(InMemoryEngine, "page", read)
    assert export_histories(store, file) == moved(0, 0, 0, ())
