# SPDX-License-Identifier: Apache-2.0
"""Group commit: appends that wait for each other go as one statement, and each call hears what became of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import psycopg
import pytest
from gateways import Gateway
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from postgres_stores import execute, said, say, stores_on
from servers import wait_until
from stopwatch import Stopwatch

from haystack_chat_store.doctor import check
from haystack_chat_store.errors import (
    ChatHistoryAccessError,
    ChatHistoryChangedError,
    DuplicateMessageError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.postgres import turns
from haystack_chat_store.stores.postgres.connections import pools
from haystack_chat_store.testing.messages import with_id

HANG_LIMIT = 50.0
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"


@pytest.fixture
def gateway(server):
    with Gateway(server.port) as gateway:
        yield gateway


@pytest.fixture(params=["threads", "tasks"])
def kind(request):
    return request.param


class Crowd:
    """Calls that wait for each other. The first has the turn and waits for the history, the others come after it."""

    def __init__(self, server, store, kind):
        self.server = server
        self.store = store
        self.calls = []
        self._is_async = kind == "tasks"
        self._executor = ThreadPoolExecutor(100)
        self.loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self.loop.run_forever)
        self._loop_thread.start()

    @property
    def turns(self):
        pool = pools.get(self.store.engine.settings)
        return pool._loops[self.loop].turns if self._is_async else pool.turns

    def waiting(self):
        return sum(map(len, self.turns._waiting.values()))

    def say(self, text, history="history"):
        return self.write(history, [ChatMessage.from_user(text)])

    def write(self, history, messages, *, store=None, comes=True, **options):
        """Begin a call that writes, and wait until it waits."""
        before = self.waiting() if self.calls else 0
        store = store or self.store
        if self._is_async:
            writing = store.write_messages_async(history, messages, **options)
            call = asyncio.run_coroutine_threadsafe(writing, self.loop)
        else:
            call = self._executor.submit(store.write_messages, history, messages, **options)
        if not self.calls:
            wait_until(lambda: self.server.execute(WAITING) == [(1,)], "the first to wait for the history's lock")
        elif comes:
            wait_until(lambda: self.waiting() == before + 1, "another one to wait for its turn")
        self.calls.append(call)
        return call

    def results(self):
        return [outcome_of(call) for call in self.calls]

    def close(self):
        wait(self.calls, HANG_LIMIT)
        self._executor.shutdown()
        asyncio.run_coroutine_threadsafe(self.store.close_async(), self.loop).result(HANG_LIMIT)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._loop_thread.join()
        self.loop.close()


@contextmanager
def crowded(server, store, kind, history="history"):
    """Have the row of a history locked, so that calls queue up, until the end."""
    crowd = Crowd(server, store, kind)
    try:
        with psycopg.connect(server.url) as connection:
            connection.execute(
                f"SELECT FROM {store.schema_name}.haystack_chat_histories WHERE chat_history_id = %s FOR UPDATE",
                [history],
            )
            yield crowd
            connection.commit()
        wait(crowd.calls, HANG_LIMIT)
        assert not crowd.turns._waiting
    finally:
        crowd.close()


def named(text):
    """A message whose text is its id."""
    return with_id(text, text)


def outcome_of(call):
    try:
        return call.result(HANG_LIMIT)
    except BaseException as error:
        return type(error)


def transactions(server, store, history="history"):
    """How many transactions have written the messages of a history."""
    table = f"{store.schema_name}.haystack_chat_messages"
    keys = f"SELECT history_key FROM {store.schema_name}.haystack_chat_histories WHERE chat_history_id = '{history}'"
    ((count,),) = server.execute(f"SELECT count(DISTINCT xmin::text) FROM {table} WHERE history_key = ({keys})")
    return count


# ---------------------------------------------------------------------- which go together


def test_appends_that_wait_go_as_one_statement(server, store, kind):
    say(store, "before")
    with crowded(server, store, kind) as crowd:
        for number in range(9):
            crowd.write(
                "history",
                [named(f"{number}a"), named(f"{number}b")] if number % 2 else [ChatMessage.from_user(f"{number}")],
            )
    assert crowd.results() == [1, 2] * 4 + [1]
    assert said(store) == ["before", "0", *"1a 1b 2 3a 3b 4 5a 5b 6 7a 7b 8".split()]
    assert [each.position for each in store.list_messages("history")] == list(range(14))
    assert transactions(server, store) == 3
    info = store.get_chat_history("history")
    assert (info.message_count, info.round_count, info.last_message.text) == (14, 14, "8")
    assert check(store) == []


def test_a_group_has_a_greatest_number_and_a_greatest_size(server, store, kind, monkeypatch):
    say(store, "before")
    expected = 1
    for name, limit, statements in (("_MAX_APPENDS", 4, 4), ("MAX_CHARACTERS", 1000, 7), ("_MAX_APPENDS", 64, 2)):
        with monkeypatch.context() as patched, crowded(server, store, kind) as crowd:
            patched.setattr(turns, name, limit)
            for _ in range(13):
                crowd.say("x" * 300)
        assert crowd.results() == [1] * 13
        expected += statements
        assert transactions(server, store) == expected, name


def test_what_is_large_and_what_expects_something_does_not_wait_for_a_turn(server, store, kind, monkeypatch):
    monkeypatch.setattr("haystack_chat_store.stores.postgres.engine.MAX_CHARACTERS", 1000)
    store.write_messages("history", [named("a")])
    revision = store.get_chat_history("history").revision
    with crowded(server, store, kind) as crowd:
        crowd.say("first")
        crowd.write("history", [ChatMessage.from_user("x" * 2000)], comes=False)
        crowd.write("history", [named("a")], policy=DuplicatePolicy.FAIL, comes=False)
        crowd.write("history", [named("c")], expected_revision=revision + 99, comes=False)
        wait_until(lambda: server.execute(WAITING) == [(4,)], "all to wait for the history's lock")
    assert crowd.results() == [1, 1, DuplicateMessageError, ChatHistoryChangedError]


def test_histories_do_not_wait_for_each_other(server, store, kind):
    say(store, "before")
    with crowded(server, store, kind) as crowd:
        crowd.say("first")
        assert crowd.write("another", [named("a")], comes=False).result(HANG_LIMIT) == 1
        assert crowd.waiting() == 0


def test_a_writer_alone_takes_one_transaction_for_each_turn(server, store):
    say(store, "main thread")
    with ThreadPoolExecutor(1) as executor:
        assert [executor.submit(say, store, text).result(HANG_LIMIT) for text in ("1", "2")] == [1, 1]
    asyncio.run(store.write_messages_async("history", [named("3")]))
    assert transactions(server, store) == 4


def test_the_main_thread_waits_for_no_turn(server, store):
    say(store, "before")

    def let_go():
        wait_until(lambda: server.execute(WAITING) == [(2,)], "both to wait for the history's lock")
        connection.commit()

    with psycopg.connect(server.url) as connection, ThreadPoolExecutor(2) as executor:
        connection.execute(f"SELECT FROM {store.schema_name}.haystack_chat_histories FOR UPDATE")
        first = executor.submit(say, store, "thread")
        wait_until(lambda: server.execute(WAITING) == [(1,)], "the thread to wait for the history's lock")
        letting_go = executor.submit(let_go)
        assert say(store, "main thread") == 1
        assert (letting_go.result(HANG_LIMIT), first.result(HANG_LIMIT)) == (None, 1)


# ---------------------------------------------------------------------- each hears of its own


def test_a_message_that_is_stored_already_is_written_once(server, store, kind):
    store.write_messages("history", [named("a")])
    with crowded(server, store, kind) as crowd:
        crowd.write("history", [named("b")])
        crowd.write("history", [named("a"), named("c")])  # partly stored
        crowd.write("history", [named("a")])  # stored
        crowd.write("history", [named("b")])  # of the one before
        crowd.write("history", [named("d"), named("e")])
        crowd.write("history", [named("e"), named("f")])  # partly in the same group
        crowd.write("history", [named("d"), named("e")])  # in the same group
    assert crowd.results() == [1, 1, 0, 0, 2, 1, 0]
    assert sorted(said(store)) == list("abcdef")
    assert check(store) == []


def test_replies_that_come_with_a_question_that_is_stored_go_as_one_statement(server, store, kind):
    for number in range(6):
        store.write_messages("history", [named(f"question {number}")])
    with crowded(server, store, kind) as crowd:
        for number in range(6):
            crowd.write("history", [named(f"question {number}"), named(f"reply {number}")])
    assert crowd.results() == [1] * 6
    assert said(store)[6:] == [f"reply {number}" for number in range(6)]
    assert transactions(server, store) == 6 + 2
    assert check(store) == []


def test_a_history_that_is_new_or_has_expired_or_is_another_users_is_found_out_by_each(server, make_store, kind):
    store, expires = make_store(), make_store(ttl=100)
    make_store(ttl=0.01).write_messages("expired", [named("old")])
    store.for_user("eve").write_messages("hers", [named("a")])
    with crowded(server, store, kind, "hers") as crowd:
        crowd.say("no user: sees all", "hers")
        for number in range(3):
            crowd.write("hers", [named(f"{number}")], store=store.for_user("ada"), comes=False)
        for number in range(4):
            crowd.write("new", [named(f"{number}")], comes=False)
            crowd.write("expired", [named(f"{number}")], store=expires, comes=False)
    assert crowd.results() == [1] + [ChatHistoryAccessError] * 3 + [1] * 8
    assert said(store, "hers") == ["a", "no user: sees all"]
    assert sorted(said(store, "new")) == sorted(said(store, "expired")) == list("0123")
    assert check(store) == []


def refuse(server, store, text="bad"):
    """Let the server refuse a message."""
    name = f"{store.schema_name}.refuse"
    execute(
        server.url,
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$",
        f"CREATE TRIGGER refusal BEFORE INSERT ON {store.schema_name}.haystack_chat_messages FOR EACH ROW "
        f"WHEN (new.message_id = '{text}') EXECUTE FUNCTION {name}()",
    )


def test_an_append_that_fails_fails_alone(server, store, kind):
    say(store, "before")
    refuse(server, store)
    with crowded(server, store, kind) as crowd:
        crowd.say("1")
        bad = [crowd.write("history", [named("half"), named("bad")])]  # which leads the next group
        good = [crowd.say("2"), crowd.write("history", [named("3")])]
        bad.append(crowd.write("history", [named("half"), named("bad")]))
        good.append(crowd.say("4"))
    assert [outcome_of(call) for call in bad] == [StoreUnavailableError] * 2
    assert bad[0].exception() is not bad[1].exception()
    assert [outcome_of(call) for call in good] == [1] * 3
    assert sorted(said(store)) == ["1", "2", "3", "4", "before"]
    assert check(store) == []


def test_a_commit_that_fails_fails_alone(server, store, kind):
    say(store, "before")
    name = f"{store.schema_name}.refuse"
    execute(
        server.url,
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$",
        f"CREATE CONSTRAINT TRIGGER refusal AFTER INSERT ON {store.schema_name}.haystack_chat_messages "
        f"DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (new.message_id = 'bad') EXECUTE FUNCTION {name}()",
    )
    with crowded(server, store, kind) as crowd:
        crowd.say("1")
        crowd.say("2")
        crowd.write("history", [named("bad")])
        crowd.say("3")
    assert crowd.results() == [1, 1, StoreUnavailableError, 1]
    assert sorted(said(store)) == ["1", "2", "3", "before"]


def test_if_the_answer_to_a_group_is_lost_each_is_stored_once(server, gateway, kind):
    with stores_on(gateway.url(server.url), last_k=None) as make:
        store = make()
        say(store, "before")
        lost = []
        with crowded(server, store, kind) as crowd:
            crowd.say("first")
            for number in range(6):
                crowd.say(f"in a group {number}")

            def is_answered(request):
                is_group = all(f"in a group {number}".encode() in request for number in range(6))
                if is_group:
                    lost.append(request)
                return not is_group

            gateway.is_answered = is_answered
        assert crowd.results() == [1] * 7
        assert len(lost) == 1
        assert sorted(said(store)) == sorted(["before", "first", *(f"in a group {number}" for number in range(6))])
        assert check(store) == []


# ---------------------------------------------------------------------- time, cancelling, processes


def test_each_hears_in_time_that_the_history_is_busy(server, make_store, kind):
    store = make_store(timeout=1)
    say(store, "before")
    with crowded(server, store, kind) as crowd, Stopwatch() as seconds:
        crowd.say("first")
        crowd.say("second")
        third = crowd.say("third")
        assert crowd.results() == [StoreTimeoutError] * 3
        assert seconds() < 2.5
    assert "did not answer in time" in str(third.exception())
    assert say(store, "after") == 1
    assert said(store) == ["before", "after"]


def test_a_task_that_is_cancelled_while_it_waits_writes_nothing(server, store):
    say(store, "before")
    with crowded(server, store, "tasks") as crowd:
        crowd.say("first")
        waits, last = crowd.say("cancelled"), crowd.say("last")
        waits.cancel()
        wait_until(lambda: crowd.waiting() == 1, "the task to be cancelled")
    assert last.result(HANG_LIMIT) == 1
    assert said(store) == ["before", "first", "last"]


def test_if_the_task_that_has_the_turn_is_cancelled_the_others_are_written(server, store):
    say(store, "before")
    with crowded(server, store, "tasks") as crowd:
        leader = crowd.say("first")
        crowd.say("second")
        crowd.say("third")
        leader.cancel()
        with suppress(BaseException):
            leader.result(HANG_LIMIT)
    assert [outcome_of(call) for call in crowd.calls[1:]] == [1, 1]
    assert [text for text in said(store) if text != "first"] == ["before", "second", "third"]


def test_if_the_leader_of_a_group_is_cancelled_each_of_the_others_is_stored_once(server, store):
    say(store, "before")
    with crowded(server, store, "tasks") as crowd:
        first = crowd.say("first")
        leader = crowd.write("history", [named("leader")])
        others = [crowd.say("1"), crowd.write("history", [named("2")]), crowd.say("3")]
        first.cancel()  # now the leader waits for the lock with all others
        wait_until(lambda: crowd.waiting() == 0, "the group to be taken")
        wait_until(lambda: server.execute(WAITING) == [(1,)], "the group to wait for the history's lock")
        leader.cancel()
        wait_until(lambda: server.execute(WAITING) == [(3,)], "the others to look for their messages")
    assert [outcome_of(call) for call in others] == [1] * 3
    stored = said(store)
    assert stored[0] == "before"
    assert sorted(set(stored) - {"first", "leader"}) == ["1", "2", "3", "before"]
    assert len(stored) == len(set(stored))
    assert check(store) == []


def test_a_task_that_is_cancelled_when_it_gets_the_turn_passes_it_on(server, store, monkeypatch):
    say(store, "before")
    begin, wake = turns.AppendOfTask.__init__, turns.AppendOfTask.wake
    tasks, cancelled = {}, []

    def noted(append, messages):
        begin(append, messages)
        tasks[append] = asyncio.current_task()

    def cancelling(append):
        wake(append)
        if not cancelled:
            cancelled.append(tasks[append])
            tasks[append].cancel()

    monkeypatch.setattr(turns.AppendOfTask, "__init__", noted)
    monkeypatch.setattr(turns.AppendOfTask, "wake", cancelling)
    with crowded(server, store, "tasks") as crowd:
        for text in ("first", "cancelled", "last"):
            crowd.say(text)
    assert [outcome_of(call) for call in (crowd.calls[0], crowd.calls[2])] == [1, 1]
    assert crowd.calls[1].cancelled()
    assert said(store) == ["before", "first", "last"]


def test_a_task_that_is_cancelled_in_a_group_keeps_no_turn(server, store):
    say(store, "before")
    with crowded(server, store, "tasks") as crowd:
        first, leader = crowd.say("first"), crowd.say("leader")
        last = crowd.say("cancelled")
        first.cancel()
        wait_until(lambda: crowd.waiting() == 0, "the group to be taken")
        wait_until(lambda: server.execute(WAITING) == [(1,)], "the group to wait for the history's lock")
        last.cancel()
    assert leader.result(HANG_LIMIT) == 1
    assert [text for text in said(store) if text != "first"] == ["before", "leader", "cancelled"]


def test_threads_and_the_tasks_of_several_loops_write_to_one_history(store):
    async def write_in_tasks(loop):
        async def write(task):
            for number in range(10):
                assert await store.write_messages_async("history", [named(f"loop {loop}.{task} {number}")]) == 1

        await asyncio.gather(*map(write, range(5)))
        await store.close_async()

    def write(number):
        if number < 2:
            asyncio.run(write_in_tasks(number))
        else:
            for index in range(10):
                assert say(store, f"thread {number} {index}") == 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    numbers = defaultdict(list)
    for text in said(store):
        writer, _, number = text.rpartition(" ")
        numbers[writer].append(int(number))
    assert len(numbers) == 16
    assert all(found == list(range(10)) for found in numbers.values())
    assert [each.position for each in store.iterate_messages("history")] == list(range(160))
    assert check(store) == []


CROWD = """
import os, sys, threading
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
store = PostgresChatMessageStore(Secret.from_token(sys.argv[1]), schema_name=sys.argv[2])
told = threading.Lock()
def write(writer):
    for number in range(10**6):
        store.write_messages("history", [ChatMessage.from_user(f"{writer} {number} {part}") for part in "ab"])
        with told:
            os.write(1, f"{writer} {number}\\n".encode())
for writer in range(8):
    threading.Thread(target=write, args=[writer]).start()
"""


def test_what_was_acknowledged_when_the_process_was_killed_is_there_whole(server, store):
    say(store, "before")
    run = subprocess.Popen([sys.executable, "-c", CROWD, server.url, store.schema_name], stdout=subprocess.PIPE)
    told = [run.stdout.readline() for _ in range(100)]
    os.kill(run.pid, signal.SIGKILL)
    told += run.communicate()[0].splitlines(keepends=True)
    whole = [line.decode().split() for line in told if line.endswith(b"\n")]
    wait_until(lambda: server.execute(CLIENTS) == [(0,)], "the server to end what the process had begun")
    stored = [text for text in said(store) if text != "before"]
    assert {f"{writer} {number} {part}" for writer, number in whole for part in "ab"} <= set(stored)
    assert len(stored) == len(set(stored))
    assert [text[:-1] for text in stored[::2]] == [text[:-1] for text in stored[1::2]]
    assert check(store) == []


CLIENTS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE state <> 'idle' AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_waits_for_no_turn_of_its_parent(server, store):
    say(store, "before")
    with crowded(server, store, "threads") as crowd:
        crowd.say("first")
        crowd.say("second")
        child = os.fork()
        if child == 0:
            written = 0
            with suppress(BaseException), ThreadPoolExecutor(1) as executor:
                written = executor.submit(say, store, "child", history="another").result(HANG_LIMIT)
            os._exit(0 if written == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert crowd.results() == [1, 1]
    assert said(store) == ["before", "first", "second"]
