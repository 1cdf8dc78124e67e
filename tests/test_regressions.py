# SPDX-License-Identifier: Apache-2.0
"""Behaviour that has been wrong once and is easily broken again."""

import asyncio
import base64
import gc
import json
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
import uuid
from contextlib import closing, contextmanager
from datetime import datetime, timezone

import pytest
from event_loops import assert_loop_goes_on_beside
from haystack import DeserializationError
from haystack.dataclasses import ChatMessage, ChatRole, ReasoningContent, TextContent, ToolCall
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from pydantic import BaseModel, field_serializer

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.conversation.shown import messages_for_model
from haystack_chat_store.errors import ChatHistoryChangedError, MessageEncodingError, StoreUnavailableError
from haystack_chat_store.stores.in_memory.engine import _memory
from haystack_chat_store.stores.sqlite import connections
from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import user, with_id

HANG_LIMIT = 30.0
# Put together, so that it stands in no line of source that a traceback shows.
SECRET = " ".join(["my", "password", "is", "4711"])


def forks(test):
    """Mark a test that forks while it has other threads."""
    test = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork on this platform")(test)


@pytest.fixture
def store(request):
    store = InMemoryChatMessageStore(last_k=None, namespace=request.node.name[:128])
    yield store
    store.delete_all_messages()


@pytest.fixture
def new_sqlite_store(tmp_path):
    made = []

    def new(name="chat_history.db", **settings):
        made.append(SQLiteChatMessageStore(tmp_path / name, last_k=None, **settings))
        return made[-1]

    yield new
    for store in made:
        store.close()


@pytest.fixture(params=["run", "run_async"])
def run(request):
    """Run a component in one of the two ways."""

    def run(component, *arguments, **more):
        made = getattr(component, request.param)(*arguments, **more)
        return made if request.param == "run" else asyncio.run(made)

    return run


# ---------------------------------------------------------------------- components


def test_the_messages_of_this_turn_may_come_from_a_generator(store, run):
    messages = (ChatMessage.from_user(text) for text in ("Hi!", "Are you there?"))
    retrieved = run(ChatMessageRetriever(store), "history", current_messages=messages)["messages"]
    assert texts(retrieved) == ["Hi!", "Are you there?"]


@pytest.mark.parametrize(
    "messages", [ChatMessage.from_user("Hi!"), "Hi!", ["Hi!"], 0, "", {}], ids=lambda value: type(value).__name__
)
def test_what_is_no_list_of_messages_is_refused_as_messages_of_this_turn(store, run, messages):
    with pytest.raises(ValueError, match="current_messages"):
        run(ChatMessageRetriever(store), "history", current_messages=messages)


@pytest.mark.parametrize("replies", [0, "", {}], ids=repr)
def test_what_is_no_list_of_messages_is_refused_as_replies_even_if_it_is_empty(store, run, replies):
    with pytest.raises(ValueError, match="replies"):
        run(ChatMessageWriter(store), "history", messages=[ChatMessage.from_user("Hi!")], replies=replies)
    assert store.count_messages("history") == 0


@pytest.mark.parametrize("component", [ChatMessageRetriever, ChatMessageWriter])
@pytest.mark.parametrize("wrong", [None, "chat_history.db", InMemoryChatMessageStore], ids=str)
def test_what_is_no_store_is_refused_when_the_component_is_made(component, wrong):
    with pytest.raises(ValueError, match="chat_message_store"):
        component(wrong)


@pytest.mark.parametrize("component", [ChatMessageRetriever, ChatMessageWriter])
def test_init_parameters_left_empty_in_yaml_are_a_deserialization_error(store, component):
    data = {**component(store).to_dict(), "init_parameters": None}
    with pytest.raises(DeserializationError, match="chat_message_store"):
        component.from_dict(data)


@pytest.mark.parametrize("kind", [InMemoryChatMessageStore, SQLiteChatMessageStore])
@pytest.mark.parametrize("wrong", ["no", 0, None], ids=repr)
def test_a_store_takes_nothing_but_a_bool_for_skip_system_messages(kind, wrong):
    with pytest.raises(ValueError, match="skip_system_messages"):
        kind(skip_system_messages=wrong)


# ---------------------------------------------------------------------- tool calls


@pytest.mark.parametrize(
    "beside",
    [
        [TextContent("")],
        [TextContent(" \n")],
        [ReasoningContent("I should search.")],
        [ReasoningContent("I should search."), TextContent("")],
    ],
    ids=["empty text", "blank text", "reasoning", "reasoning and empty text"],
)
def test_an_unanswered_call_leaves_no_message_that_says_nothing(beside):
    asked = ChatMessage(ChatRole.ASSISTANT, [*beside, ToolCall("search", {"q": 1}, id="call_1")])
    question, next_question = ChatMessage.from_user("Find it."), ChatMessage.from_user("Well?")
    shown = messages_for_model([question, asked, next_question])
    assert [bool(message.tool_calls or message.text or message.tool_call_results) for message in shown] == [True] * 5
    assert not any(isinstance(part, TextContent) and not part.text.strip() for part in shown[1]._content)


def test_parallel_calls_with_empty_ids_are_paired_by_name_and_arguments():
    calls = [ToolCall("search", {"q": number}, id="") for number in range(3)]
    question, asked = ChatMessage.from_user("Find them."), ChatMessage.from_assistant(tool_calls=calls)
    answers = [ChatMessage.from_tool(f"found {call.arguments['q']}", origin=call) for call in reversed(calls)]
    for given in (answers, answers[:2]):
        shown = messages_for_model([question, asked, *given])
        results = [result for message in shown for result in message.tool_call_results]
        assert [result.origin.arguments for result in results] == [call.arguments for call in calls]
        assert len({result.origin.id for result in results}) == 3
        assert sum(result.result == f"found {result.origin.arguments['q']}" for result in results) == len(given)


# ---------------------------------------------------------------------- SQLite: asynchronous calls


@contextmanager
def locked(path):
    """Hold the file's write lock, as another process may."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


async def begun_writes(store, count):
    writes = [
        asyncio.create_task(store.write_messages_async("history", [ChatMessage.from_user(f"{number}")]))
        for number in range(count)
    ]
    await asyncio.sleep(0)  # each goes to its thread, or into the queue there
    return writes


def test_reads_do_not_wait_behind_writes_that_wait_for_a_lock(new_sqlite_store):
    store = new_sqlite_store(timeout=4 * HANG_LIMIT)
    store.write_messages("history", [ChatMessage.from_user("Hi!")])

    async def read_while_writes_wait():
        with locked(store.path):
            writes = await begun_writes(store, 30)
            read = asyncio.create_task(store.retrieve_messages_async("history"))
            await asyncio.wait([read], timeout=HANG_LIMIT)
            was_read, written = read.done(), sum(write.done() for write in writes)
        assert await asyncio.gather(*writes) == [1] * 30
        return was_read, written, texts(await read)

    was_read, written, said = asyncio.run(read_while_writes_wait())
    assert (was_read, written) == (True, 0)
    assert said[0] == "Hi!"
    assert store.count_messages("history") == 31


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux tells which files a process has open")
def test_closing_lets_queued_writes_finish_and_leaves_no_file_open(new_sqlite_store):
    store = new_sqlite_store(timeout=4 * HANG_LIMIT)
    store.write_messages("history", [ChatMessage.from_user("Hi!")])

    async def close_while_writes_wait():
        with locked(store.path):
            writes = await begun_writes(store, 30)
            await store.close_async()
        return await asyncio.gather(*writes)

    assert asyncio.run(close_while_writes_wait()) == [1] * 30
    targets = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert [target for target in targets if target.startswith(os.path.realpath(store.path))] == []
    assert store.count_messages("history") == 31


# ---------------------------------------------------------------------- SQLite: forks


def in_child(function):
    """Return what a function returns in a forked child; of what it raises, the class's name and the message."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(HANG_LIMIT))
            try:
                outcome = function()
            except BaseException as error:
                outcome = [type(error).__name__, str(error)]
            os.write(writer, json.dumps(outcome).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcome = pipe.read()
    os.waitpid(child, 0)
    return json.loads(outcome)


@contextmanager
def lent(store, until=None):
    """Have another thread hold a connection in the middle of a write: until the end, or until something else."""
    is_lent, is_over = threading.Event(), until or threading.Event()

    def hold():
        with connections.databases.get(store.engine.settings).transaction():
            is_lent.set()
            is_over.wait(3 * HANG_LIMIT)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_lent.wait(HANG_LIMIT)
    try:
        yield
    finally:
        is_over.set()
        holder.join()


@forks
def test_a_child_forked_during_a_long_write_is_told_that_it_cannot_use_the_file(new_sqlite_store, monkeypatch):
    monkeypatch.setattr(connections, "_MIN_FORK_WAIT_SECONDS", 0.1)
    store, other = new_sqlite_store(timeout=0.1), new_sqlite_store("other.db", timeout=HANG_LIMIT)
    for each in (store, other):
        each.write_messages("history", [ChatMessage.from_user("Hi!")])
    with lent(store):
        name, message = in_child(lambda: store.write_messages("history", [ChatMessage.from_user("Lost?")]))
        assert name == StoreUnavailableError.__name__, message
        assert str(store.path) in message
        assert "fork" in message
        assert in_child(lambda: other.write_messages("history", [ChatMessage.from_user("From a child")])) == 1
    assert texts(other.retrieve_messages("history")) == ["Hi!", "From a child"]
    store.write_messages("history", [ChatMessage.from_user("Still there?")])
    assert texts(store.retrieve_messages("history")) == ["Hi!", "Still there?"]
    assert in_child(lambda: store.count_messages("history")) == 2


@forks
def test_a_fork_waits_for_a_database_in_the_making(new_sqlite_store, monkeypatch):
    """Its connection holds locks of SQLite that all files share. A child that gets them held waits for ever."""
    store, other = new_sqlite_store(), new_sqlite_store("other.db")
    migrate, is_begun, is_made = connections.schema.migrate, threading.Event(), threading.Event()

    def migrate_while_the_process_forks(connection, path):
        is_begun.set()
        while not connections.databases.get(store.engine.settings)._forks:
            time.sleep(0.001)
        time.sleep(0.2)
        migrate(connection, path)
        is_made.set()

    monkeypatch.setattr(connections.schema, "migrate", migrate_while_the_process_forks)
    thread = threading.Thread(target=store.write_messages, args=("history", [ChatMessage.from_user("Hi!")]))
    thread.start()
    assert is_begun.wait(HANG_LIMIT)
    assert in_child(is_made.is_set)
    thread.join()
    monkeypatch.undo()
    assert in_child(
        lambda: [each.write_messages("history", [ChatMessage.from_user("From a child")]) for each in (store, other)]
    ) == [1, 1]
    assert texts(store.retrieve_messages("history")) == ["Hi!", "From a child"]


@forks
def test_a_child_that_frees_a_connection_of_its_parent_does_not_damage_the_file(new_sqlite_store, monkeypatch):
    monkeypatch.setattr(connections, "_MIN_FORK_WAIT_SECONDS", 0.1)
    store = new_sqlite_store(timeout=0.05)
    store.write_messages("history", [ChatMessage.from_user("Hi!")])
    database = connections.databases.get(store.engine.settings)
    lost = [database._writer_in_transaction(time.monotonic() + 1)]  # as a call does that is interrupted just then
    rows = [(1_000 + number, str(number), "x" * 10_000) for number in range(400)]  # more than SQLite's cache holds
    lost[0].executemany(
        "INSERT INTO haystack_chat_messages (message_key, message_id, role, created_at, revision, content)"
        " VALUES ((1 << 32) + ?, ?, 'user', 0, 1, ?)",
        rows,
    )

    def free():
        lost.clear()
        gc.collect()  # closing it here would take back what the parent has written so far
        return "freed"

    assert in_child(free) == "freed"
    lost[0].execute("COMMIT")
    lost[0].close()
    with closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM haystack_chat_messages").fetchone() == (401,)


@forks
@pytest.mark.parametrize("child_raises", [True, False], ids=["raises", "goes on"])
def test_a_call_that_forks_in_its_middle_stays_the_parents(new_sqlite_store, child_raises):
    store = new_sqlite_store()
    store.write_messages("history", [ChatMessage.from_user("Hi!")])
    rows = [(1_000 + number, str(number), "x" * 10_000) for number in range(400)]  # more than SQLite's cache holds
    parent, child = os.getpid(), None

    def operation(session):
        nonlocal child
        with session.transaction() as connection:
            connection.executemany(
                "INSERT INTO haystack_chat_messages (message_key, message_id, role, created_at, revision, content)"
                " VALUES ((1 << 32) + ?, ?, 'user', 0, 1, ?)",
                rows,
            )
            child = os.fork()
            if child == 0 and child_raises:
                raise RuntimeError

    try:
        store.engine.run(operation)
    except BaseException:
        if os.getpid() == parent:
            raise
        gc.collect()
        os._exit(7)
    if os.getpid() != parent:
        os._exit(8)  # it has committed what is not its own
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM haystack_chat_messages").fetchone() == (401,)


@forks
def test_a_child_forked_during_a_long_call_in_memory_waits_for_nothing_and_has_the_histories(store):
    store.write_messages("history", [ChatMessage.from_user("Hi!")])
    is_under_way, may_end = threading.Event(), threading.Event()

    def operation(session):
        with session.lock:
            is_under_way.set()
            may_end.wait(3 * HANG_LIMIT)

    thread = threading.Thread(target=store.engine.run, args=(operation,))
    thread.start()
    assert is_under_way.wait(HANG_LIMIT)
    threading.Timer(0.1, may_end.set).start()
    assert in_child(lambda: [store.write_messages("history", [user()]), store.count_messages("history")]) == [1, 2]
    may_end.set()
    thread.join()
    assert store.count_messages("history") == 1


@forks
def test_a_fork_that_waits_for_one_file_does_not_hold_up_the_first_use_of_another(new_sqlite_store):
    store, other = new_sqlite_store(timeout=1), new_sqlite_store("other.db")
    is_used = threading.Event()

    def use_other():
        while not connections.databases.get(store.engine.settings)._forks:
            time.sleep(0.001)
        other.write_messages("history", [ChatMessage.from_user("Hi!")])
        is_used.set()

    with lent(store, until=is_used):
        thread = threading.Thread(target=use_other)
        thread.start()
        assert in_child(lambda: "forked") == "forked"
        was_held_up = thread.is_alive() and not is_used.is_set()
        thread.join()
    assert not was_held_up


# ---------------------------------------------------------------------- what JSON has no form for


def stored(store, meta):
    store.write_messages("history", [user(**meta)])
    return store.retrieve_messages("history")[-1].meta


def test_an_error_of_a_models_own_serializer_is_named_by_its_path_and_not_quoted(caplog):
    store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex, strict=True)

    class Account(BaseModel):
        password: str

        @field_serializer("password")
        def _refuse(self, value):
            raise RuntimeError(value)

        def __repr__(self):
            raise RuntimeError(self.password)

    with pytest.raises(MessageEncodingError) as caught:
        store.write_messages("history", [user(), user(account=[Account(password=SECRET)])])
    assert "messages[1].meta['account'][0]" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert store.count_messages("history") == 0

    loose = InMemoryChatMessageStore(namespace=store.namespace)
    assert "Account object at" in stored(loose, {"account": [Account(password=SECRET)]})["account"][0]
    assert "messages[0].meta['account'][0]" in caplog.text
    assert SECRET not in caplog.text


def test_a_long_integer_in_the_key_of_a_dict_is_stored_with_all_its_digits(store):
    assert stored(store, {"seen": {(10**4000, 1): "yes"}})["seen"] == {f"[1{'0' * 4000},1]": "yes"}


def test_a_memoryview_with_gaps_is_stored(store):
    assert base64.b64decode(stored(store, {"bytes": memoryview(b"a-b-c-")[::2]})["bytes"]) == b"abc"


@pytest.fixture
def few_digits():
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    yield
    sys.set_int_max_str_digits(before)


@pytest.mark.parametrize("digits", [639, 640, 641, 4300])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_integers_are_stored_with_all_their_digits_where_python_converts_few(store, few_digits, digits, sign):
    number = sign * (10**digits - 7)
    is_equal = stored(store, {"number": number, "in_a_list": [number]})["in_a_list"][0] == number
    assert is_equal  # two steps, for pytest shows what it compares, which Python refuses here


class OddText(str):
    """Text whose methods say something else than it does."""

    __slots__ = ()

    def encode(self, *arguments):
        return b""

    def isascii(self):
        return True

    def __str__(self):
        return "odd"


class OddlyEncodedText(str):
    __slots__ = ()

    def encode(self, *arguments):
        return b""


@pytest.mark.parametrize("kind", [OddText, OddlyEncodedText])
def test_text_of_a_subclass_is_stored_as_plain_text_whatever_its_methods_say(store, kind):
    text = "Grüße 💬"
    store.write_messages(kind(text), [ChatMessage.from_user(kind(text), meta={"text": kind(text)})])
    (message,) = store.retrieve_messages(text)
    assert (message.text, message.meta["text"]) == (text, text)


def test_an_id_of_a_subclass_of_text_is_checked_as_plain_text(store):
    with pytest.raises(ValueError, match="lone surrogates"):
        store.count_messages(OddText("\ud800"))


# ---------------------------------------------------------------------- large batches


@pytest.mark.parametrize(
    "make_message",
    [
        lambda rows: user(rows=[{"at": datetime(2026, 1, 1, tzinfo=timezone.utc)} for _ in rows]),
        lambda rows: user(nested={"rows": rows}),
        lambda rows: user(texts=[f"{number}" * 100 for number in range(len(rows) // 5)]),
        lambda rows: ChatMessage.from_assistant(tool_calls=[ToolCall("tool", {"rows": rows})]),
        lambda rows: ChatMessage.from_tool([TextContent("part")] * (len(rows) // 2), ToolCall("tool", {})),
    ],
    ids=["list", "nested", "texts", "arguments", "parts"],
)
def test_encoding_much_does_not_hold_up_the_event_loop(store, make_message):
    messages = [make_message([{"n": number} for number in range(100_000)])] * 3
    assert_loop_goes_on_beside(lambda: store.write_messages_async("history", messages))
    assert store.count_messages("history") in range(3, 18, 3)


def test_a_call_in_memory_does_not_hold_up_the_event_loop_while_another_looks_at_every_message():
    store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex, search=True, last_k=1)
    store.write_messages("history", [ChatMessage.from_user("the same words") for _ in range(20_000)])
    assert store.search_messages("same") != []  # makes the index

    async def use():
        searching = asyncio.create_task(store.search_messages_async("same"))
        while not searching.done():
            await asyncio.sleep(0.001)
            await asyncio.gather(
                store.count_messages_async("history"),
                store.retrieve_messages_async("history"),
                store.write_messages_async("another", [ChatMessage.from_user("Hi!")]),
            )

    assert_loop_goes_on_beside(use)
    store.delete_all_messages()


def test_an_asynchronous_call_in_memory_waits_for_one_that_has_just_begun_in_a_thread():
    store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex)
    has_begun, may_end = threading.Event(), threading.Event()

    def call_of_another_thread():
        with _memory.lock:
            has_begun.set()
            return may_end.wait(HANG_LIMIT)

    async def main():
        other = asyncio.create_task(asyncio.to_thread(call_of_another_thread))
        while not has_begun.is_set():
            await asyncio.sleep(0.001)
        call = asyncio.create_task(store.count_messages_async("history"))
        await asyncio.sleep(0.01)
        assert not call.done()
        may_end.set()
        return [await other, await call]

    assert asyncio.run(main()) == [True, 0]


@pytest.mark.parametrize("change", ["write", "import", "delete"])
def test_a_call_that_is_cancelled_as_it_waits_in_memory_changes_nothing_later(change):
    store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex)
    store.write_messages("history", [user("first")])
    has_begun, may_end = threading.Event(), threading.Event()
    calls = {
        "write": lambda: store.write_messages_async("history", [user("cancelled")]),
        "import": lambda: store.copy_messages_async("history", "copy"),
        "delete": lambda: store.delete_messages_async("history"),
    }

    def call_of_another_thread():
        with _memory.lock:
            has_begun.set()
            return may_end.wait(HANG_LIMIT)

    async def main():
        other = asyncio.create_task(asyncio.to_thread(call_of_another_thread))
        while not has_begun.is_set():
            await asyncio.sleep(0.001)
        cancelled = asyncio.create_task(calls[change]())
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        written = asyncio.create_task(store.write_messages_async("history", [user("last")]))
        await asyncio.sleep(0.01)
        may_end.set()
        await asyncio.gather(other, written)

    asyncio.run(main())  # which waits for the threads
    assert texts(store.retrieve_messages("history")) == ["first", "last"]
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["history"]


def test_an_edit_in_memory_leaves_nothing_for_the_next_append_to_make_up_for():
    store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex)
    store.write_messages("history", [user(chat_message_id=str(number)) for number in range(50_000)])

    def took(call):
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    edit = took(lambda: store.delete_messages("history", message_ids=["25000"]))
    append = took(lambda: store.write_messages("history", [user(chat_message_id="new")]))
    store.delete_all_messages()
    assert append < edit / 2


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_message_turns_no_conflict_into_another_error(tmp_path, content):
    with closing(SQLiteChatMessageStore(tmp_path / "chat.db")) as store:
        store.write_messages("chat", [with_id("a", "Hi!")])
        with closing(sqlite3.connect(tmp_path / "chat.db")) as connection, connection:
            connection.execute("UPDATE haystack_chat_messages SET content = ?", [content])
        with pytest.raises(ChatHistoryChangedError):
            store.write_messages("chat", [with_id("a", "Hi!")], expected_revision=99)
