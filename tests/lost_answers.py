# SPDX-License-Identifier: Apache-2.0
"""
Every call that writes, to be cut off after it has done its work, whose answer gets lost on the way.

`test_lost_answers.py` checks that none is missing here.
"""

import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.components.titlers.chat_store import ChatHistoryTitler
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from haystack_integrations.hooks.chat_store import chat_history_hooks

import haystack_chat_store
from haystack_chat_store import ChatHistoryInfo, InMemoryChatMessageStore, StoredMessage, doctor, transfer
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.messages import user, with_id
from haystack_chat_store.types import MatchedTranscript

LATER = datetime.now(timezone.utc) + timedelta(days=1)
OVERWRITE, FAIL = DuplicatePolicy.OVERWRITE, DuplicatePolicy.FAIL


class Call:
    """Makes a call on a store, one of the two ways, and notes which it was."""

    def __init__(self, calls, store):
        self.store = store
        self.made = set()
        self._calls = calls

    def __call__(self, method, *arguments, **options):
        """Call a method of the store by its name."""
        self.made.add(method)
        return self._calls.call(self.store, method, *arguments, **options)

    def of_user(self, user_id, method, *arguments, **options):
        """Call a method of the store of a user."""
        self.made.add(method)
        return self._calls.call(self.store.for_user(user_id), method, *arguments, **options)

    def iterate(self, chat_history_id):
        """Walk through a history."""
        return self._calls.iterate(self.store, chat_history_id)

    def function(self, module, name, *arguments, **options):
        """Call a function of a module by its name."""
        self.made.add(name)
        return self._calls.call(module, name, *arguments, **options)

    def operation(self, operation, *arguments):
        """Run an operation of the store's engine, in a scope in which histories expire."""
        scope = replace(self.store.scope, lifetime=10**12)
        return self._calls.call(self.store.engine, "run", getattr(self.store.engine, operation), scope, *arguments)

    def run(self, component, *arguments, **options):
        """Run a component."""
        return self._calls.call(component, "run", *arguments, **options)


def named(message_id, text=None):
    """A question with an id, whose text is the same unless another one is given."""
    return with_id(message_id, text or message_id)


def _said(*texts):
    return [(LATER, ChatMessage.from_user(text)) for text in texts]


def _filled(*histories):
    store = InMemoryChatMessageStore(namespace="source of copies")
    store.delete_all_messages()
    for history in histories:
        store.write_messages(history, [named("a"), named(history)])
    return store


def _import(call, *histories):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "histories.jsonl"
        transfer.export_histories(_filled(*histories), path)
        return call.function(transfer, "import_histories", call.store, path)


def _title(call):
    return call.run(ChatHistoryTitler(call.store, MockChatGenerator("The answer")), "answered")


def _turn(call):
    written = call.run(ChatMessageWriter(call.store), "new", [named("q")], [ChatMessage.from_assistant("Yes.")])
    return written["messages_written"], [message.text for message in written["replies"]]


def _agent_run(call):
    agent = Agent(chat_generator=MockChatGenerator("Yes."), hooks=chat_history_hooks(call.store))
    found = call.run(agent, [named("q")], hook_context={"chat_history_id": "new"})
    return [message.text for message in found["messages"]]


#: By a name, what makes a call. It gets a `Call`.
CHANGES: dict[str, Callable[[Call], Any]] = {
    "write": lambda call: call("write_messages", "history", [named("b"), named("c")]),
    "write without ids": lambda call: call("write_messages", "history", [user("c"), user("d")]),
    "write a new history": lambda call: call("write_messages", "new", [user("c")]),
    "write a user's": lambda call: call.of_user("ada", "write_messages", "hers", [user("c")]),
    "write a new history of a user": lambda call: call.of_user("ada", "write_messages", "new", [user("c")]),
    "write with a revision": lambda call: call("write_messages", "new", [named("c")], expected_revision=0),
    "overwrite": lambda call: call("write_messages", "history", [named("b", "another"), named("c")], policy=OVERWRITE),
    "fail": lambda call: call("write_messages", "history", [named("c"), named("d")], policy=FAIL),
    "replace": lambda call: call("replace_messages", "history", "b", [user("c"), named("d")]),
    "replace by nothing": lambda call: call("replace_messages", "history", "b", []),
    "update a message": lambda call: call("update_message_meta", "history", "a", merge={"rating": 1, "old": None}),
    "delete messages": lambda call: call("delete_messages", "history", message_ids=["a"]),
    "delete from a message on": lambda call: call("delete_messages", "history", from_message_id="b"),
    "delete a history": lambda call: call("delete_messages", "history"),
    "delete a history with branches": lambda call: call("delete_chat_history", "history"),
    "delete all": lambda call: call("delete_all_messages"),
    "delete all of a user": lambda call: call.of_user("ada", "delete_all_messages"),
    "delete by prefix": lambda call: call("delete_chat_histories", prefix="hist"),
    "delete a user": lambda call: call("delete_user", "ada"),
    "purge": lambda call: call("purge", older_than=LATER),
    "purge of a user": lambda call: call("purge", older_than=LATER, user_id="ada"),
    "purge and vacuum": lambda call: call("purge", older_than=LATER, prefix="hist", vacuum=True),
    "copy": lambda call: call("copy_messages", "history", "copy"),
    "copy a part": lambda call: call("copy_messages", "history", "copy", until_message_id="a"),
    "update": lambda call: call("update_chat_history", "history", title="new", meta={"a": 1}),
    "merge the meta": lambda call: call("update_chat_history", "history", merge_meta={"a": 1, "old": None}),
    "set a default title": lambda call: call("update_chat_history", "history", default_title="new"),
    "make a branch": lambda call: call("update_chat_history", "history~y", meta={"branch_of": "history"}),
    "claim": lambda call: call("update_chat_history", "history", user_id="eve"),
    "hand over": lambda call: call("update_chat_history", "hers", user_id="eve"),
    "give up": lambda call: call("update_chat_history", "hers", user_id=None),
    "create": lambda call: call("create_chat_history", "new", title="new", meta={"a": 1}, user_id="ada"),
    "create a branch": lambda call: call("create_chat_history", "another~z", meta={"branch_of": "another"}),
    "create what is there": lambda call: call("create_chat_history", "history", title="new", exist_ok=True),
    "rename": lambda call: call("rename_chat_history", "history", "renamed"),
    "rename a user's": lambda call: call.of_user("ada", "rename_chat_history", "hers", "renamed"),
    "index": lambda call: call("index_messages") if call.store.search else None,
    "import messages": lambda call: call.function(
        transfer, "import_messages", call.store, "new", _said("c", "d"), title="new", meta={"a": 1}
    ),
    "import messages that go on": lambda call: call.function(
        transfer, "import_messages", call.store, "another", [(LATER, named("x")), (LATER, named("y"))]
    ),
    "import a file": lambda call: _import(call, "one"),
    "import a file of several": lambda call: _import(call, "one", "two", "three"),
    "copy to another store": lambda call: call.function(transfer, "copy_histories", _filled("one", "two"), call.store),
    "check and repair": lambda call: call.function(doctor, "check", call.store, repair=True),
    "remove what is damaged": lambda call: call.operation(
        "remove", "history", call.operation("page", "history", None, None, 9)[1:2]
    ),
    "renew": lambda call: call.operation("renew", "history"),
    "match a transcript": lambda call: call.function(
        haystack_chat_store, "match_transcript", call.store, "history", [user("a"), user("c")]
    ),
    "match a transcript without a branch": lambda call: call.function(
        haystack_chat_store, "match_transcript", call.store, "history", [user("a"), user("c")], keep_branches=False
    ),
    "give a title": _title,
    "write a turn": _turn,
    "run an agent": _agent_run,
}

#: What the fast suite also cuts off when it is called asynchronously: one of each kind.
BOTH_WAYS = {"write", "write without ids", "replace", "purge", "import a file of several", "run an agent"}
#: What goes from slot to slot on a cluster. The fast suite cuts off nothing else there.
FROM_SLOT_TO_SLOT = {
    "delete a history with branches",
    "delete all",
    "delete a user",
    "purge",
    "copy",
    "make a branch",
    "claim",
    "rename",
    "import a file of several",
}


def both_ways(left_out: Collection[str] = (), *, sync: Collection[str] = CHANGES, async_: Collection[str] = BOTH_WAYS):
    """
    Mark a test that makes each change, synchronously and asynchronously.

    :param left_out: Changes that it does not make.
    :param sync: The changes that it makes synchronously in the fast suite.
    :param async_: Those that it makes asynchronously there.
    """
    cases = [
        pytest.param(way, change, marks=[] if change in in_fast_suite else pytest.mark.full)
        for way, in_fast_suite in (("sync", sync), ("async", async_))
        for change in CHANGES
        if change not in left_out
    ]
    return pytest.mark.parametrize(("calls", "change"), cases, indirect=["calls"])


#: By its name, each method of a store that only reads.
READS: dict[str, Callable[[Call], Any]] = {
    "retrieve_messages": lambda call: call("retrieve_messages", "history"),
    "retrieve_window": lambda call: call("retrieve_window", "history"),
    "count_messages": lambda call: call("count_messages", "history"),
    "list_messages": lambda call: call("list_messages", "history"),
    "iterate_messages": lambda call: call.iterate("history"),
    "search_messages": lambda call: call("search_messages", "a"),
    "list_chat_histories": lambda call: call("list_chat_histories"),
    "get_chat_history": lambda call: call("get_chat_history", "history"),
    "list_namespaces": lambda call: call("list_namespaces"),
    "statistics": lambda call: call("statistics"),
    "close": lambda call: call("close"),
}


def attempts(*, is_full):
    """Return which answer of a call gets lost, one attempt after the other: the first ones, then fewer and fewer."""
    if is_full:
        return [*range(12), *range(12, 30, 3), *range(30, 100, 10), *range(100, 1000, 100)]
    return [0, 1, 2, 4, 16, 64, 256, 800]


def begin(calls, store):
    """Put the histories into an empty store that the calls change. Return their revisions."""
    first = named("a")
    calls.write(store, "history", [ChatMessage.from_user(first.text, meta={**first.meta, "old": 1}), named("b")])
    calls.call(store, "update_chat_history", "history", meta={"old": 1, "kept": 2})
    for name in "xy":
        calls.write(store, f"history~{name}", [named("a")])
    calls.call(store, "update_chat_history", "history~x", meta={"branch_of": "history"})
    calls.write(store, "another", [named("x")])
    calls.write(store, "answered", [named("q"), ChatMessage.from_assistant("Yes.", meta={MESSAGE_ID_KEY: "r"})])
    calls.write(store.for_user("ada"), "hers", [named("a")])
    return {each.chat_history_id: each.revision for each in _histories(calls, store)}


def made(calls, store, change):
    """Make a call, and return what its result says, apart from times and from ids that are new in each attempt."""
    return _said_by(CHANGES[change](Call(calls, store)))


def left(calls, store, revisions):
    """Return what the store has, apart from the same. Revisions are compared with those of before."""
    return {
        _same(info.chat_history_id): (
            _said_by(info),
            info.revision - revisions.get(info.chat_history_id, info.revision),
            [_said_by(each) for each in calls.call(store, "list_messages", info.chat_history_id)],
        )
        for info in _histories(calls, store)
    }


def _histories(calls, store):
    return calls.call(store, "list_chat_histories", branches=True, limit=1000).items


def _same(chat_history_id):
    """Return an id without the revision that `match_transcript` gives a branch."""
    return re.sub(r"~\d+", "~revision", chat_history_id)


def _said_by(result):
    if isinstance(result, ChatHistoryInfo):
        last = result.last_message and (result.last_message.role, result.last_message.text)
        counts = result.message_count, result.round_count
        return _same(result.chat_history_id), result.title, result.meta, result.user_id, counts, result.preview, last
    if isinstance(result, StoredMessage):
        meta = {key: value for key, value in result.message.meta.items() if key != MESSAGE_ID_KEY}
        return result.position, result.message.role, result.message.text, meta
    if isinstance(result, MatchedTranscript):
        branch = result.branch_id and _same(result.branch_id)
        return [message.text for message in result.messages], result.outcome, branch
    return result
