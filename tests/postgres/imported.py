# SPDX-License-Identifier: Apache-2.0
"""Rows to import, and what must hold afterwards."""

import json

from haystack.dataclasses import ChatMessage

from haystack_chat_store.stores.rows import HistoryRow, MessageRow

NEW = HistoryRow(
    chat_history_id="history", created_at=1_000_000, updated_at=2_000_000, title="a title", meta='{"a": 1}'
)


def rows(start, end, created_at=1_500_000, text="imported"):
    contents = [ChatMessage.from_user(text, meta={"chat_message_id": f"{n}"}).to_dict() for n in range(start, end)]
    return [
        MessageRow(position=0, created_at=created_at, message_id=f"{number}", role="user", content=json.dumps(content))
        for number, content in enumerate(contents, start)
    ]


def import_rows(store, *batches, history=NEW, expected_revision=0):
    return store.engine.run(store.engine.import_history, store.scope, history, batches, expected_revision)


def assert_sound(server, store):
    """The counters say what there is, and no position is twice or to come."""
    assert store.engine.run(store.engine.check, store.scope) == []
    counted = f"SELECT history_key, count(DISTINCT position) FROM {store.schema_name}.haystack_chat_messages GROUP BY 1"
    counters = (
        f"SELECT history_key, message_count FROM {store.schema_name}.haystack_chat_histories WHERE message_count > 0"
    )
    assert sorted(server.execute(counted)) == sorted(server.execute(counters))
