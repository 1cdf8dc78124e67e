# SPDX-License-Identifier: Apache-2.0
"""What pages of SQLite's directory cost: counted in steps of SQLite's virtual machine, which no other load changes."""

import random
import sqlite3
from contextlib import closing
from itertools import product

import pytest
from sqlite_stores import connections_of_stores

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.stores.sqlite import directory
from haystack_chat_store.testing.messages import user

INSERT = """
    INSERT INTO haystack_chat_histories
        (namespace, chat_history_id, revision, next_position, message_count, round_count, created_at, updated_at, title,
        meta)
    VALUES ('default', ?, 1, 1, 1, 1, 0, ?, ?, ?)
"""


@pytest.fixture
def store(path):
    with closing(SQLiteChatMessageStore(path, durability="normal")) as store:
        yield store


def fill(path, store, names):
    """Make histories without messages, updated one after the other in a mixed-up order. Return the last one first."""
    store.delete_all_messages()
    names = list(names)
    random.Random(0).shuffle(names)
    values = [(name, time, "A title", '{"a": 1}' if time % 9 == 0 else None) for time, name in enumerate(names)]
    with closing(sqlite3.connect(path)) as connection:
        connection.executemany(INSERT, values)
        connection.commit()
    return names[::-1]


def steps(path, call):
    count = 0

    def count_ten():
        nonlocal count
        count += 10

    (connection,) = connections_of_stores(path)
    connection.set_progress_handler(count_ten, 10)
    call()
    connection.set_progress_handler(None, 0)
    return count


def several_users(count, histories_of_each=20):
    return [f"user {number // histories_of_each:05}/{number % histories_of_each}" for number in range(count)]


def test_any_page_costs_the_same_however_many_histories_there_are(store, path):
    counts = {}
    for histories in (2_000, 10_000):
        fill(path, store, several_users(histories))
        for page in product(["", "user 00003/", "user ", "nobody"], [None, (500, "z"), (1500, "z"), (2, "z")]):
            taken = steps(path, lambda page=page: store.engine.run(store.engine.histories, store.scope, *page, 50))
            counts.setdefault(page, []).append(taken)
    for page, (of_few, of_many) in counts.items():
        assert of_many < 1.5 * of_few + 200, page


def test_a_page_with_any_prefix_costs_little_more_than_the_better_way_to_find_it(store, path):
    names = fill(path, store, (f"{number:05}" for number in range(10_000)))

    page_of = store.engine.histories

    def rename(before, after, chosen):
        with closing(sqlite3.connect(path)) as connection:
            connection.executemany(
                "UPDATE haystack_chat_histories SET chat_history_id = ? "
                "WHERE namespace = 'default' AND chat_history_id = ?",
                [(after + name, before + name) for name in chosen],
            )
            connection.commit()

    for share in (30, 100, 300, 1000, 3000):
        for chosen in map(set, (random.Random(1).sample(names, share), names[2000 : 2000 + share], names[-share:])):
            rename("", "mine ", chosen)
            found = []
            page = store.scope, "mine ", None, 50
            taken = steps(path, lambda found=found, page=page: found.extend(store.engine.run(page_of, *page)))
            expected = [f"mine {name}" for name in names if name in chosen][:50]
            assert [row.chat_history_id for row in found] == expected
            place_of_last = names.index(found[-1].chat_history_id.removeprefix("mine "))
            assert taken < 100 * min(share, place_of_last) + 80 * directory._TRIED_AT_FIRST, (share, place_of_last)
            rename("mine ", "", chosen)


@pytest.mark.parametrize("count", [255, 256, 257, 1024, 1025, 3000])
def test_pages_put_together_are_the_whole_whichever_way_they_were_found(store, path, count):
    names = fill(path, store, [*(f"a/{n}" for n in range(count)), *(f"b/{n}" for n in range(100)), "c", "ab"])
    for limit, prefix in product([1, 7, 100, 1000], ["a/", "b/", "", "a/1", "c", "d"]):
        found, cursor = [], None
        for _ in range(10 if limit == 1 else 10_000):
            page = store.list_chat_histories(prefix=prefix, limit=limit, cursor=cursor)
            found += page.items
            cursor = page.cursor
            if cursor is None:
                break
        expected = [name for name in names if name.startswith(prefix)]
        assert [info.chat_history_id for info in found] == (expected[:10] if limit == 1 else expected), (limit, prefix)


def test_a_walk_by_id_costs_the_same_everywhere(store, path):
    names = sorted(fill(path, store, several_users(5_000)))
    counts = []
    for start in (0, 50, 4900):
        found = []
        after = names[start - 1] if start else ""
        counts.append(
            steps(
                path,
                lambda found=found, after=after: found.extend(
                    store.engine.run(store.engine.histories_by_id, store.scope, "user", after, 50)
                ),
            )
        )
        assert [row.chat_history_id for row in found] == names[start : start + 50]
    assert max(counts) < 1.2 * min(counts)


def test_what_is_old_is_found_without_looking_at_what_is_not(store, path):
    counts = []
    for histories in (400, 10_000):
        fill(path, store, several_users(histories))
        counts.append(steps(path, lambda: store.engine.run(store.engine.erase_some, store.scope, "", 100, 50)))
        assert store.statistics().chat_histories == histories - 50
        counts.append(steps(path, lambda: store.engine.run(store.engine.erase_some, store.scope, "", 10, 50)))
        assert store.statistics().chat_histories == histories - 50
    assert counts[2] < 1.5 * counts[0]
    assert counts[3] < 1.5 * counts[1] + 100


@pytest.mark.parametrize("erase", ["by prefix", "by age"])
def test_no_step_of_erasing_deletes_many_messages(store, path, monkeypatch, erase):
    for number in range(7):
        store.write_messages(f"chat {number}", [user()] * (50 if number == 3 else 4))
    monkeypatch.setattr(directory, "_MESSAGES_PER_STEP", 10)
    prefix, before = ("chat", None) if erase == "by prefix" else ("", 2**62)
    erased = []
    while not erased or erased[-1]:
        erased.append(store.engine.run(store.engine.erase_some, store.scope, prefix, before, 100))
    assert erased == [2, 1, 1, 2, 1, 0]
    assert store.statistics().messages == 0


def test_a_page_shows_titles_and_meta_as_they_are_now(store, path):
    for number in range(3):
        store.write_messages(f"chat {number}", [user()])
    for title, meta in (("A title", {"a": 1}), ("Another", {}), (None, {"b": [2]})):
        store.update_chat_history("chat 1", title=title, meta=meta)
        for prefix in ("", "chat", "chat 1"):
            items = store.list_chat_histories(prefix=prefix).items
            assert [(i.title, i.meta) for i in items if i.chat_history_id == "chat 1"] == [(title, meta)]
            assert {(i.title, len(i.meta)) for i in items if i.chat_history_id != "chat 1"} <= {(None, 0)}
