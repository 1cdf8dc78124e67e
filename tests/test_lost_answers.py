# SPDX-License-Identifier: Apache-2.0
"""No call that writes is missing among those whose answers get lost in the tests of the engines with a server."""

import inspect

import pytest
from lost_answers import CHANGES, READS, Call, begin, made

import haystack_chat_store
from haystack_chat_store import Engine, InMemoryChatMessageStore, SQLiteChatMessageStore, doctor, transfer
from haystack_chat_store.stores.engine import is_marked, reads_only
from haystack_chat_store.stores.postgres import PostgresChatMessageStore
from haystack_chat_store.stores.redis import RedisChatMessageStore
from haystack_chat_store.testing.kit import Calls

STORES = (InMemoryChatMessageStore, SQLiteChatMessageStore, PostgresChatMessageStore, RedisChatMessageStore)
MODULES = (haystack_chat_store, doctor, transfer)
# What they write is a file, from what they read.
WRITE_FILES = {"backup", "export_histories"}


def with_twin(owner):
    """The names of the functions of a module or a class that also have an asynchronous form."""
    names = {name for name, _ in inspect.getmembers(owner, inspect.isroutine)}
    return {name for name in names if f"{name}_async" in names and not name.startswith("_")}


@pytest.fixture
def store(monkeypatch):
    """A store that notes the operations of its engine that are run."""
    store = InMemoryChatMessageStore(namespace="lost answers", search=True, last_k=None)
    run = store.engine.run
    store.operations = set()

    def noted(operation, *arguments, **options):
        store.operations.add(operation)
        return run(operation, *arguments, **options)

    monkeypatch.setattr(store.engine, "run", noted)
    yield store
    store.delete_all_messages()


def begin_anew(calls, store):
    store.delete_all_messages()
    begin(calls, store)


def test_each_call_either_writes_or_reads(store):
    calls, call = Calls(is_async=False), Call(Calls(is_async=False), store)
    begin_anew(calls, store)
    for change in CHANGES.values():
        begin_anew(calls, store)
        change(call)
    methods = set.union(*map(with_twin, STORES)) - WRITE_FILES
    functions = set.union(*map(with_twin, MODULES)) - WRITE_FILES
    assert call.made == (methods | functions) - set(READS)
    assert set(READS) < methods


def test_each_operation_that_writes_is_run(store):
    calls = Calls(is_async=False)
    begin_anew(calls, store)
    store.operations.clear()
    for change in CHANGES:
        begin_anew(calls, store)
        made(calls, store, change)
    functions = dict(inspect.getmembers(Engine, inspect.isfunction))
    operations = [each for each in functions.values() if "session" in inspect.signature(each).parameters]
    assert {each.__name__ for each in operations if not is_marked(each, reads_only)} <= {
        operation.__name__ for operation in store.operations
    }


@pytest.mark.parametrize("read", READS)
def test_what_reads_runs_no_operation_that_writes(store, read):
    calls = Calls(is_async=False)
    begin_anew(calls, store)
    store.operations.clear()
    READS[read](Call(calls, store))
    assert all(is_marked(operation, reads_only) for operation in store.operations)


@pytest.mark.parametrize("change", CHANGES)
def test_each_call_succeeds_on_a_store_in_memory(store, change):
    calls = Calls(is_async=False)
    begin_anew(calls, store)
    made(calls, store, change)
