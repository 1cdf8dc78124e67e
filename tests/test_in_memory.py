# SPDX-License-Identifier: Apache-2.0
"""Histories in memory: what only this engine can get wrong."""

import asyncio
import itertools
import sys
import threading
import time
from contextlib import closing
from datetime import datetime, timezone

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import InMemoryChatMessageStore
from haystack_chat_store.errors import ConflictError, StoreUnavailableError
from haystack_chat_store.stores.in_memory import engine, histories
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing.kit import texts


@pytest.fixture
def new_store(request):
    made = []

    def new(**settings):
        made.append(InMemoryChatMessageStore(last_k=None, namespace=request.node.name, **settings))
        return made[-1]

    yield new
    for store in made:
        store.delete_all_messages()


def interrupted(call, step):
    """Whether Ctrl-C came at this step of a call, counted in lines of the data structures."""
    left = step

    def trace(frame, event, _):
        nonlocal left
        # Not where the lock is taken and given back: an exception of the tracing itself would skip that.
        if frame.f_code.co_filename != histories.__file__ or frame.f_code.co_name == "run":
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_in_a_renaming_loses_no_history(new_store):
    store = new_store()
    for step in itertools.count():
        old, new = f"{step} old", f"{step} new"
        store.write_messages(old, [ChatMessage.from_user("Hi!")])
        is_interrupted = interrupted(lambda old=old, new=new: store.rename_chat_history(old, new), step)
        found = [texts(store.retrieve_messages(each)) for each in (old, new)]
        assert ["Hi!"] in found, step
        if not is_interrupted:
            break
    assert step > 10
    assert found == [[], ["Hi!"]]


def test_deleting_all_of_a_user_leaves_no_history_of_theirs_in_memory(new_store):
    store = new_store(ttl=0.05)
    ada = store.for_user("ada")
    ada.write_messages("expires", [ChatMessage.from_user("secret")])
    new_store().for_user("bob").write_messages("stays", [ChatMessage.from_user("Hi!")])
    time.sleep(0.1)
    ada.delete_all_messages()
    assert list(engine._memory.of(store.scope).histories) == ["stays"]


def imported(store, *rows):
    message = MessageRow(0, 1, "1", "user", '{"role":"user","meta":{},"name":null,"content":[{"text":"Hi!"}]}')
    return store.engine.run(store.engine.import_histories, store.scope, [(row, [message]) for row in rows])


def test_an_import_of_the_same_history_twice_stores_nothing(new_store):
    store = new_store()
    with pytest.raises(ConflictError):
        imported(store, HistoryRow("other", 1, 1), HistoryRow("twice", 1, 1), HistoryRow("twice", 1, 1))
    assert list(store.list_chat_histories().items) == []


def test_an_import_keeps_a_time_before_1970(new_store):
    store = new_store()
    imported(store, HistoryRow("old", -5_000_000, -4_000_000))
    assert store.get_chat_history("old").updated_at == datetime(1969, 12, 31, 23, 59, 56, tzinfo=timezone.utc)


def test_a_call_for_which_no_thread_can_be_started_says_so_and_is_not_made(new_store, monkeypatch):
    store = new_store()

    def start(_):
        raise RuntimeError("can't start new thread")

    is_held, ends = threading.Event(), threading.Event()

    def hold():
        with engine._lock:
            is_held.set()
            ends.wait(5)

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    is_held.wait(50)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with (
            closing(asyncio.new_event_loop()) as loop,  # `asyncio.run` ends with a thread of its own
            pytest.raises(StoreUnavailableError, match="can't start new thread"),
        ):
            loop.run_until_complete(store.write_messages_async("history", [ChatMessage.from_user("refused")]))
        ends.set()
    holder.join()
    assert store.count_messages("history") == 0
