# SPDX-License-Identifier: Apache-2.0
"""Every call that writes, to be cut off after it has done its work, whose answer gets lost on the way."""

from datetime import datetime, timedelta, timezone

from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.testing.kit import texts
from haystack_chat_store.testing.messages import user, with_id

LATER = datetime.now(timezone.utc) + timedelta(days=1)
OVERWRITE, FAIL = DuplicatePolicy.OVERWRITE, DuplicatePolicy.FAIL

#: By a name, what makes a call: it gets a function that calls a method of the store by its name.
CHANGES = {
    "write": lambda call: call("write_messages", "history", [with_id("b"), with_id("c")]),
    "write without ids": lambda call: call("write_messages", "history", [user("c"), user("d")]),
    "write a new history": lambda call: call("write_messages", "new", [user("c")]),
    "write with a revision": lambda call: call("write_messages", "new", [with_id("c")], expected_revision=0),
    "overwrite": lambda call: call("write_messages", "history", [with_id("b"), with_id("c")], policy=OVERWRITE),
    "fail": lambda call: call("write_messages", "history", [with_id("c"), with_id("d")], policy=FAIL),
    "replace": lambda call: call("replace_messages", "history", "b", [user("c"), with_id("d")]),
    "replace by nothing": lambda call: call("replace_messages", "history", "b", []),
    "delete messages": lambda call: call("delete_messages", "history", message_ids=["a"]),
    "delete from a message on": lambda call: call("delete_messages", "history", from_message_id="b"),
    "delete a history": lambda call: call("delete_messages", "history"),
    "delete all": lambda call: call("delete_all_messages"),
    "delete by prefix": lambda call: call("delete_chat_histories", prefix="hist"),
    "purge": lambda call: call("purge", older_than=LATER),
    "copy": lambda call: call("copy_messages", "history", "copy"),
    "rename": lambda call: call("rename_chat_history", "history", "renamed").chat_history_id,
    "update": lambda call: call("update_chat_history", "history", title="new", meta={"a": 1}).title,
}


def begin(calls, store):
    """Put the histories into the store that the calls change."""
    calls.delete_all(store)
    calls.write(store, "history", [with_id("a"), with_id("b")])
    calls.write(store, "another", [with_id("x")])


def made(calls, store, change):
    """Make a call, and return its result."""
    return CHANGES[change](lambda name, *arguments, **options: calls.call(store, name, *arguments, **options))


def left(calls, store):
    """Return what the store has: by its id, the texts and the title of each history."""
    histories = calls.call(store, "list_chat_histories").items
    return {
        info.chat_history_id: (info.title, info.message_count, texts(calls.retrieve(store, info.chat_history_id)))
        for info in histories
    }
