# SPDX-License-Identifier: Apache-2.0
"""Every command does on every engine what it says."""

import json

from filled_stores import DAMAGED, filled, moved

from haystack_chat_store import HistoryRow, MessageRow, store_from_url
from haystack_chat_store.codec import encode_message
from haystack_chat_store.testing.messages import sample_messages, user


def import_of_long_ago(store, chat_history_id, *contents):
    rows = [
        MessageRow(position=position, created_at=1, message_id="ab"[position], role="user", content=text)
        for position, text in enumerate(contents)
    ]
    store.engine.run(
        store.engine.import_history,
        store.scope,
        HistoryRow(
            chat_history_id=chat_history_id,
            message_count=len(rows),
            round_count=len(rows),
            created_at=1,
            updated_at=1,
            title=None,
            meta=None,
        ),
        [rows],
        0,
    )


def test_every_command_works_on_every_engine(any_url, run, run_json, tmp_path, request):
    at = ("--store", any_url)
    store = filled(any_url, namespace="default")
    store.write_messages("every kind", list(sample_messages().values()))
    total = store.count_messages("every kind") + 7

    assert [line["chat_history_id"] for line in run_json("ls", *at)] == ["every kind", "bob:1", "ada:2", "ada:1"]
    assert [line["position"] for line in run_json("show", "ada:1", "-n", 2, *at)] == [2, 3]
    assert run_json("stats", *at)[0]["messages"] == total
    assert run_json("title", "bob:1", "Greeting", *at)[0]["title"] == "Greeting"
    if "redis" in request.node.name:  # a server without a search of its own
        assert run("search", "chrysanthemum", *at)[:2] == (1, "")
    else:
        assert "haystack-chat-store index" in run("search", "chrysanthemum", *at)[2]
        assert run("index", *at) == (0, "All messages are indexed.\n", "")
        assert [line["chat_history_id"] for line in run_json("search", "chrysanthemum", *at)] == ["ada:2"]
    assert run_json("export", "--output", tmp_path / "all.jsonl", *at) == [moved(4, total)]
    assert run_json("copy", "--to-namespace", "copy", *at) == [moved(4, total)]
    assert run_json("delete", "bob:1", "--yes", *at) == [{"chat_histories": 1}]
    assert run_json("import", tmp_path / "all.jsonl", *at) == [moved(1, 1, skipped=total - 1)]
    assert run_json("delete", "--prefix", "ada:", "--yes", *at) == [{"chat_histories": 2}]
    assert run_json("doctor", *at) == []
    import_of_long_ago(store, "old", encode_message(user(), "a"))
    assert run_json("purge", "--older-than", "1d", "--yes", *at) == [{"chat_histories": 1}]
    assert [line["chat_history_id"] for line in run_json("ls", *at)] == ["every kind", "bob:1"]

    assert [line["message_count"] for line in run_json("ls", "--namespace", "copy", "--prefix", "ada", *at)] == [2, 4]
    assert run("delete", "--prefix", "ada", "--yes", "--vacuum", "--namespace", "copy", *at)[0] == 0


def test_a_damaged_message_is_found_saved_and_removed_on_every_engine(any_url, run_json, tmp_path):
    store = store_from_url(any_url)
    import_of_long_ago(store, "chat", DAMAGED, encode_message(user(), "b"))
    at = ("--store", any_url)

    assert [line["fault"] is None for line in run_json("show", "chat", *at)] == [False, True]
    assert [fault["position"] for fault in run_json("doctor", *at, status=1)] == [0]
    run_json("doctor", "--repair", "--salvage", tmp_path / "salvage.jsonl", *at)

    assert json.loads(json.loads((tmp_path / "salvage.jsonl").read_text())["content"]) == json.loads(DAMAGED)
    assert [line["position"] for line in run_json("show", "chat", *at)] == [1]
    assert store.count_messages("chat") == 1
    assert run_json("doctor", *at) == []
