# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder put into a store, and look for there."""

import sqlite3
from contextlib import closing

from haystack.dataclasses import ChatMessage

from haystack_chat_store import match_transcript, store_from_url
from haystack_chat_store.testing.messages import conversation

DAMAGED = '{"no": "message"}'


def filled(url, **settings):
    """A store with the histories `ada:1` (4 messages), `ada:2` (2) and `bob:1` (1), which changed in this order."""
    store = store_from_url(url, last_k=None, **settings)
    store.write_messages("ada:1", conversation("uaua"))
    store.update_chat_history("ada:1", title="Zürich", meta={"a": 1})
    store.write_messages(
        "ada:2", [ChatMessage.from_user("Why a chrysanthemum?"), ChatMessage.from_assistant("It *blooms*.")]
    )
    store.write_messages("bob:1", [ChatMessage.from_user("Hi")])
    return store


def branched(url):
    """A store with the history `h` and its branch, which has the question that was taken back; and the branch's id."""
    store = store_from_url(url, last_k=None)
    user, assistant = ChatMessage.from_user, ChatMessage.from_assistant
    for question in ("lavender", "rosemary"):
        turn = match_transcript(store, "h", [user("first"), assistant("one"), user(question)])
        store.write_messages("h", [*turn.messages, assistant("two")])
    return store, turn.branch_id


def names(store):
    return {info.chat_history_id for info in store.list_chat_histories().items}


def change(path, statement, *values):
    """Change a database behind its store's back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, values)


def damage(path, content=DAMAGED):
    change(path, "UPDATE haystack_chat_messages SET content = ? WHERE role = 'assistant'", content)


def age(path, days, *chat_history_ids):
    """Have histories be unchanged for so many days."""
    for chat_history_id in chat_history_ids:
        statement = "UPDATE haystack_chat_histories SET updated_at = updated_at - ? WHERE chat_history_id = ?"
        change(path, statement, days * 86_400_000_000, chat_history_id)


def moved(chat_histories, messages, skipped=0):
    return {"chat_histories": chat_histories, "messages": messages, "skipped": skipped, "faults": []}


def command(*arguments):
    """What stands behind `python` to run a command."""
    return ["-m", "haystack_chat_store", *map(str, arguments)]
