# SPDX-License-Identifier: Apache-2.0
"""
Processes that fork, overwrite, delete, import and erase in one file at the same time, and are killed while they do.
"""

import sqlite3
import threading
import time
from contextlib import ExitStack, closing

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from sqlite_stores import connections_of_stores

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    DuplicateMessageError,
    MessageNotFoundError,
    StoreTimeoutError,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.sqlite import visibility
from haystack_chat_store.stores.times import microseconds_now
from haystack_chat_store.testing.kit import message_rows, texts
from haystack_chat_store.testing.messages import conversation, user, with_id
from haystack_chat_store.testing.processes import Program


@pytest.fixture
def new_store(path):
    with ExitStack() as stack:
        yield lambda at=path, **settings: stack.enter_context(
            closing(SQLiteChatMessageStore(at, **{"durability": "normal", "last_k": None, **settings}))
        )


@pytest.fixture
def store(new_store):
    return new_store()


def run_together(function, store, *all_arguments):
    """Run a function in a process for each list of arguments, all at once, and return what each of them reported."""
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(function, store, *arguments)) for arguments in all_arguments]
        Program.begin(*programs)
        return [program.reports_to_the_end() for program in programs]


def imported_rows(count, start=0):
    return [
        MessageRow(
            position=number,
            created_at=0,
            message_id=str(number),
            role="user",
            content=f'{{"content": [{{"text": "imported {number}"}}]}}',
        )
        for number in range(start, start + count)
    ]


def new_history(name):
    return HistoryRow(chat_history_id=name, created_at=1, updated_at=1)


# ---------------------------------------------------------------------- at the same time


def change_everything(store, report, name, count):
    """Change the same few histories in all ways, as far as others let it."""
    import random

    from haystack.dataclasses import ChatMessage
    from haystack.document_stores.types import DuplicatePolicy

    from haystack_chat_store.errors import ChatHistoryNotFoundError, ConflictError, MessageNotFoundError

    chance = random.Random(name)
    for number in range(count):
        history, other = chance.sample(["a", "b", "c", "d"], 2)
        message_id = str(chance.randrange(10))
        made = chance.choice([ChatMessage.from_user, ChatMessage.from_assistant])
        message = made(f"fox {name} {number}", meta={"chat_message_id": message_id})
        try:
            match chance.randrange(8):
                case 0 | 1:
                    store.write_messages(history, [message, made(name)], policy=DuplicatePolicy.OVERWRITE)
                case 2:
                    info = store.get_chat_history(history)
                    store.write_messages(history, [message], expected_revision=info.revision if info else 0)
                case 3:
                    store.delete_messages(history, message_ids=[message_id])
                case 4:
                    store.delete_messages(history, from_message_id=message_id)
                case 5:
                    store.copy_messages(history, other)
                case 6:
                    store.delete_chat_histories(prefix=other)
                case 7:
                    store.replace_messages(history, message_id, [message, made(name)])
        except (ConflictError, ChatHistoryNotFoundError, MessageNotFoundError) as error:
            report(type(error).__name__)
    store.close()


@pytest.mark.parametrize("search", [False, True], ids=["without search", "with search"])
def test_after_all_have_changed_everything_it_fits_together(new_store, search):
    store = new_store(search=search)
    store.write_messages("a", conversation("uauaua"))
    reports = run_together(change_everything, store, ("1", 150), ("2", 150), ("3", 150))
    assert {"ChatHistoryExistsError", "MessageNotFoundError"} <= {name for report in reports for name in report}
    assert store.engine.run(store.engine.check, store.scope) == []
    for info in store.list_chat_histories().items:
        positions = [stored.position for stored in store.list_messages(info.chat_history_id, limit=1000)]
        assert positions == sorted(set(positions))
        assert len(positions) == info.message_count
        written = texts(store.retrieve_messages(info.chat_history_id))
        assert sum(text.startswith("fox") for text in written) <= 10  # of each id one, wherever it came from


def answer_what_was_read(store, report, name, count):
    """Append the next number, if the history is as it was when it was read."""
    from haystack.dataclasses import ChatMessage

    from haystack_chat_store.errors import ChatHistoryChangedError

    won = 0
    while won < count:
        info = store.get_chat_history("chat")
        read = store.retrieve_messages("chat")
        try:
            revision = info.revision if info else 0
            store.write_messages("chat", [ChatMessage.from_user(str(len(read)))], expected_revision=revision)
        except ChatHistoryChangedError:
            report("lost")
        else:
            won += 1


def test_of_those_who_expect_the_same_revision_one_writes(store):
    run_together(answer_what_was_read, store, ("1", 30), ("2", 30), ("3", 30))
    assert texts(store.retrieve_messages("chat")) == [str(number) for number in range(90)]


def fork_to_each(store, report, name, count):
    """Copy to one history after the other, and report which copies were this process's."""
    from haystack_chat_store.errors import ChatHistoryExistsError

    for number in range(count):
        try:
            assert store.copy_messages("source", f"target {number}") == 40
        except ChatHistoryExistsError:
            pass
        else:
            report(number)


def test_of_those_who_fork_to_the_same_history_one_does(store):
    store.write_messages("source", conversation("ua" * 20))
    reports = run_together(fork_to_each, store, ("1", 40), ("2", 40), ("3", 40))
    assert sorted(number for report in reports for number in report) == list(range(40))
    assert {store.count_messages(f"target {number}") for number in range(40)} == {40}
    assert store.engine.run(store.engine.check, store.scope) == []


# ---------------------------------------------------------------------- long writes


def import_without_end(store, report):
    """Import, and report each batch."""
    from itertools import count

    from haystack_chat_store.stores.rows import HistoryRow, MessageRow

    def batches():
        for number in count():
            yield [
                MessageRow(position=0, created_at=0, message_id=f"{number}.{index}", role="user", content="{}")
                for index in range(1000)
            ]
            report(number)

    store.engine.run(
        store.engine.import_history,
        store.scope,
        HistoryRow(chat_history_id="chat", created_at=1, updated_at=1),
        batches(),
        0,
    )


@pytest.mark.parametrize("search", [False, True], ids=["without search", "with search"])
def test_an_import_that_is_killed_leaves_nothing(new_store, search):
    store = new_store(search=search)
    store.write_messages("other", [user()])
    with Program(import_without_end, store) as program:
        program.begin()
        for _ in range(20):
            next(program.reports())
        assert store.get_chat_history("chat") is None  # those who read see nothing of it, and do not wait
        program.kill()
    assert store.get_chat_history("chat") is None
    assert store.statistics().messages == 1
    assert store.engine.run(store.engine.check, store.scope) == []
    assert store.engine.run(store.engine.import_history, store.scope, new_history("chat"), [imported_rows(3)], 0) == 3


def test_an_import_that_fails_in_the_middle_leaves_nothing(store):
    def batches():
        yield imported_rows(1000, 10)
        raise OSError("the disk with the file is gone")

    store.engine.run(store.engine.import_history, store.scope, new_history("there"), [imported_rows(5)], 0)
    for name, revision in (("new", 0), ("there", store.get_chat_history("there").revision)):
        with pytest.raises(OSError, match="gone"):
            store.engine.run(store.engine.import_history, store.scope, new_history(name), batches(), revision)
    assert store.get_chat_history("new") is None
    assert store.count_messages("there") == 5
    assert store.engine.run(store.engine.check, store.scope) == []


def test_who_writes_during_an_import_waits_no_longer_than_its_timeout(new_store):
    importer, impatient = new_store(), new_store(timeout=0.1)
    impatient.write_messages("other", [user()])

    def batches():
        yield imported_rows(10)
        with pytest.raises(StoreTimeoutError):
            impatient.write_messages("other", [user()])
        assert impatient.count_messages("other") == 1
        yield imported_rows(10, 10)

    assert importer.engine.run(importer.engine.import_history, importer.scope, new_history("chat"), batches(), 0) == 20
    assert impatient.write_messages("other", [user()]) == 1


def test_an_import_may_read_from_the_file_it_writes_to(store, new_store):
    store.write_messages("chat", [with_id(str(number), "fox") for number in range(1203)])

    def batches():
        after = -1
        while rows := store.engine.run(store.engine.page, store.scope, "chat", None, after, 500):
            yield rows
            after = rows[-1].position

    other = new_store(namespace="other")
    assert (
        other.engine.run(
            other.engine.import_history,
            other.scope,
            store.engine.run(store.engine.history, store.scope, "chat"),
            batches(),
            0,
        )
        == 1203
    )
    assert texts(other.retrieve_messages("chat")) == ["fox"] * 1203
    assert other.get_chat_history("chat") == store.get_chat_history("chat")


def write_now_and_then(store, report):
    """Write until the history "stop" is there, and report how often."""
    import time

    from haystack.dataclasses import ChatMessage

    written = 0
    while not store.count_messages("stop"):
        store.write_messages("meanwhile", [ChatMessage.from_user("fox")])
        written += 1
        report(written)
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("operation", "arguments"), [("erase_some", ("chat ", None, 50)), ("index_some", (2000,))], ids=["erase", "index"]
)
def test_work_in_many_steps_lets_others_write_in_between(new_store, tmp_path, operation, arguments):
    """Without a pause after each of the 20 steps, who waits for the file would hardly ever find it free."""

    def written_meanwhile(path):
        filler = new_store(path, search=operation == "erase_some")
        filler.write_messages("chat 0", [user("the quick brown fox " * 12)] * 40)
        for number in range(1, 1000):
            filler.copy_messages("chat 0", f"chat {number}")
        worker = new_store(path, search=True)
        with Program(write_now_and_then, filler) as program:
            program.begin()
            next(program.reports())
            before = filler.count_messages("meanwhile")
            while worker.engine.run(getattr(worker.engine, operation), worker.scope, *arguments):
                pass
            written = filler.count_messages("meanwhile") - before
            filler.write_messages("stop", [user()])
            assert program.reports_to_the_end()
        assert worker.engine.run(worker.engine.check, worker.scope) == []
        return written

    # A busy machine may give the other process no turn: then it is tried again.
    assert any(written_meanwhile(str(tmp_path / f"{attempt}.db")) > 5 for attempt in range(3))


# ---------------------------------------------------------------------- refusals


def test_a_call_that_is_refused_keeps_its_connection(store, path):
    store.write_messages("chat", [with_id("1", "fox"), with_id("2", "fox")])
    before = connections_of_stores(path)
    refused = {
        ChatHistoryChangedError: lambda: store.write_messages("chat", [user()], expected_revision=7),
        DuplicateMessageError: lambda: store.write_messages(
            "chat", [user(), with_id("1", "x")], policy=DuplicatePolicy.FAIL
        ),
        MessageNotFoundError: lambda: store.delete_messages("chat", from_message_id="3"),
        ChatHistoryExistsError: lambda: store.copy_messages("chat", "chat"),
    }
    for error, call in refused.items():
        with pytest.raises(error):
            call()
        assert [id(connection) for connection in connections_of_stores(path)] == [id(each) for each in before]
        assert not before[0].in_transaction
    assert [message.meta[MESSAGE_ID_KEY] for message in store.retrieve_messages("chat")] == ["1", "2"]


def test_a_fork_closes_the_gaps_of_its_source(store):
    store.write_messages("chat", [with_id(str(number), str(number)) for number in range(20)])
    store.delete_messages("chat", message_ids=[str(number) for number in range(20) if number % 3])
    store.write_messages("fork", [with_id("0", "gone"), with_id("1", "gone")])
    store.delete_messages("fork", from_message_id="0")
    assert store.copy_messages("chat", "fork", until_message_id="15") == 6
    store.write_messages("fork", [ChatMessage.from_user("new")])
    assert texts(store.retrieve_messages("fork")) == ["0", "3", "6", "9", "12", "15", "new"]
    assert texts(store.retrieve_messages("fork", last_k=2)) == ["15", "new"]
    assert [stored.position for stored in store.list_messages("fork")] == list(range(2, 9))
    assert store.engine.run(store.engine.check, store.scope) == []


def test_a_fork_of_a_history_without_messages_changes_nothing(store):
    for name in ("empty", "also empty"):
        store.write_messages(name, [with_id("1", "gone")])
        store.delete_messages(name, message_ids=["1"])
    before = store.list_chat_histories()
    for target in ("new", "empty", "also empty"):
        assert store.copy_messages("empty", target) == 0
    assert store.list_chat_histories() == before


def test_what_is_there_is_found_before_any_of_several_histories_is_imported(store):
    store.write_messages("empty", [with_id("1", "gone")])
    store.delete_messages("empty", message_ids=["1"])
    store.write_messages("chat", [user(), user()])
    for name in ("empty", "chat"):
        imported = [(new_history(each), imported_rows(3)) for each in ("new", name, "also new")]
        with pytest.raises(ChatHistoryChangedError, match="exists by now"):
            store.engine.run(store.engine.import_histories, store.scope, imported)
    assert {info.chat_history_id for info in store.list_chat_histories().items} == {"empty", "chat"}


# ---------------------------------------------------------------------- times

CHANGES = {
    "write": lambda store: store.write_messages("chat", [user()]),
    "overwrite": lambda store: store.write_messages("chat", [with_id("1", "new")], policy=DuplicatePolicy.OVERWRITE),
    "delete": lambda store: store.delete_messages("chat", message_ids=["1"]),
    "copy": lambda store: store.copy_messages("source", "chat"),
    "import": lambda store: store.engine.run(
        store.engine.import_history,
        store.scope,
        new_history("chat"),
        [imported_rows(3, 5)],
        store.get_chat_history("chat").revision,
    ),
    "remove": lambda store: store.engine.run(
        store.engine.remove, store.scope, "chat", message_rows(store, "chat", [0])
    ),
}


@pytest.fixture
def written(store):
    store.write_messages("source", [user()])
    store.write_messages("chat", [with_id("1", "fox"), with_id("2", "fox")])
    return store


@pytest.mark.parametrize("change", CHANGES)
def test_the_time_of_change_never_goes_back(written, path, change):
    if change == "copy":
        written.delete_messages("chat", from_message_id="1")
    later = 4_000_000_000_000_000
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE haystack_chat_histories SET updated_at = ? WHERE chat_history_id = 'chat'", (later,))
    before = written.engine.run(written.engine.page, written.scope, "chat", None, None, 9)
    CHANGES[change](written)
    assert written.engine.run(written.engine.page, written.scope, "chat", None, None, 9) != before
    assert written.engine.run(written.engine.history, written.scope, "chat").updated_at == later


@pytest.mark.parametrize("change", ["write", "overwrite", "delete", "copy", "remove"])
def test_who_waits_for_the_file_changes_it_when_its_turn_has_come(written, path, change):
    if change == "copy":
        written.delete_messages("chat", from_message_id="1")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        thread = threading.Thread(target=CHANGES[change], args=(written,))
        thread.start()
        time.sleep(0.1)  # it waits by now, or has not begun
        until = time.time_ns() // 1000
        connection.execute("COMMIT")
    thread.join()
    assert written.engine.run(written.engine.history, written.scope, "chat").updated_at >= until


@pytest.mark.parametrize("call", ["create", "update", "rename"])
def test_a_history_that_expires_in_the_middle_of_a_change_is_returned_as_it_was_written(new_store, monkeypatch, call):
    store = new_store(ttl=60)
    store.write_messages("old", [user()])
    monkeypatch.setattr(visibility, "microseconds_now", lambda: microseconds_now() + 61_000_000)
    changed = {
        "create": lambda: store.create_chat_history("new"),
        "update": lambda: store.update_chat_history("old", title="new"),
        "rename": lambda: store.rename_chat_history("old", "new"),
    }[call]()
    assert "new" in (changed.chat_history_id, changed.title)
