# SPDX-License-Identifier: Apache-2.0
"""Asynchronous calls parse large messages in a thread."""

import asyncio
import threading

import pytest
from haystack.dataclasses import ChatMessage
from imported import NEW

from haystack_chat_store import codec
from haystack_chat_store.codec import encode_message
from haystack_chat_store.stores import previews, usage
from haystack_chat_store.stores.rows import MessageRow
from haystack_chat_store.stores.sync_async import MAX_CHARACTERS_ON_LOOP
from haystack_chat_store.testing.messages import with_id

# PostgreSQL cannot look into a message that has a NUL, so the call parses the whole of it.
LARGE = "\x00" + "words " * MAX_CHARACTERS_ON_LOOP


def reply(message_id):
    used = {"model": "gpt", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    return ChatMessage.from_assistant(LARGE, meta={"chat_message_id": message_id, **used})


def import_large(store):
    rows = [
        MessageRow(position=0, created_at=0, message_id=each, role="user", content=encode_message(reply(each), each))
        for each in "ab"
    ]
    return store.engine.run_async(store.engine.import_history, store.scope, NEW, [rows], 0)


CALLS = {
    "update a message": lambda store: store.update_message_meta_async("history", "b", merge={"rating": 1}),
    "delete messages": lambda store: store.delete_messages_async("history", message_ids=["c"]),
    "replace": lambda store: store.replace_messages_async("history", "c", [with_id("d")]),
    "copy": lambda store: store.copy_messages_async("history", "copy"),
    "import": import_large,
    "statistics": lambda store: store.statistics_async(),
}


@pytest.fixture
def parsing_threads(monkeypatch):
    """The threads that have parsed large messages."""
    threads = []

    def noting(parse):
        def parse_and_note(text):
            if len(text) > MAX_CHARACTERS_ON_LOOP:
                threads.append(threading.get_ident())
            return parse(text)

        return parse_and_note

    for module in (codec, previews, usage):
        monkeypatch.setattr(module, "parse_json", noting(module.parse_json))
    return threads


@pytest.mark.parametrize("call", CALLS)
def test_large_messages_are_parsed_beside_the_event_loop(make_store, parsing_threads, call):
    store = make_store()
    if call != "import":
        store.write_messages("history", [with_id("a", LARGE), reply("b"), with_id("c"), reply("last")])
    asyncio.run(CALLS[call](store))
    assert parsing_threads
    assert threading.get_ident() not in parsing_threads
