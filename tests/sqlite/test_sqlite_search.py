# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001  (these are letters that look alike)
"""SQLite's index of words matches the messages, whichever process writes them and whenever search is turned on."""

import json
import random
import sqlite3
import threading
from contextlib import ExitStack, closing
from functools import partial

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_stores import connections_of_stores

from haystack_chat_store import SQLiteChatMessageStore, search_text
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.search_text import parsed_query, terms
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.sqlite import search, term_index
from haystack_chat_store.testing.kit import message_rows
from haystack_chat_store.testing.processes import Program

WORDS = ["fox", "quick", "brown", "東京都", "Straße", "déjà", "x²"]


@pytest.fixture
def new_store(path):
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(closing(SQLiteChatMessageStore(path, **settings)))


@pytest.fixture
def searching(new_store):
    return new_store(search=True)


def execute(path, statement, *values):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def user(text, message_id=None):
    return ChatMessage.from_user(text, meta={} if message_id is None else {MESSAGE_ID_KEY: message_id})


def found(store, query, **where):
    return sorted((hit.chat_history_id, hit.position) for hit in store.search_messages(query, **where))


def index_says_what_messages_say(path):
    """Whether each message's terms are in the index, at their places, and no others."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE VIRTUAL TABLE temp.v USING fts5vocab (main, haystack_chat_terms, instance)")
        indexed = connection.execute("SELECT doc, offset, term FROM temp.v").fetchall()
    stored = execute(path, "SELECT message_key, json_extract(content, '$.content[0].text') FROM haystack_chat_messages")
    said = [(key, offset, term) for key, text in stored for offset, term in enumerate(terms(text))]
    keys = [key for (key,) in execute(path, "SELECT rowid FROM haystack_chat_terms")]
    return sorted(indexed) == sorted(said) and sorted(keys) == sorted(key for key, _ in stored)


def indexed_terms(path):
    return sorted(term for (text,) in execute(path, "SELECT terms FROM haystack_chat_terms") for term in text.split())


# ---------------------------------------------------------------------- being on


def test_a_database_is_not_indexed_before_a_store_wants_to_search(new_store, path):
    store = new_store()
    store.write_messages("chat", [user("fox")])
    names = {name for (name,) in execute(path, "SELECT name FROM sqlite_master")}
    assert not [name for name in names if "term" in name or "index" in name.removeprefix("sqlite_autoindex")]


def test_in_a_new_database_messages_are_indexed_as_they_are_written(searching, path):
    searching.write_messages("chat", [user("fox")])
    assert indexed_terms(path) == ["fox"]
    assert found(searching, "fox") == [("chat", 0)]


def test_what_is_there_is_indexed_when_it_is_asked_for(new_store, path):
    before = new_store()
    for number in range(30):
        before.write_messages(f"chat {number % 7}", [user(f"fox {number}")])
    searching = new_store(search=True)
    assert searching.engine.run(searching.engine.search, searching.scope, parsed_query("fox"), None, "", 20) is None
    with pytest.raises(UnsupportedOperationError, match=r"index_messages\(\).*haystack-chat-store index"):
        searching.search_messages("fox")
    searching.index_messages()
    assert len(found(searching, "fox", limit=1000)) == 30
    assert index_says_what_messages_say(path)


def test_whoever_writes_keeps_the_index(new_store, searching, path):
    other = new_store(namespace="other")
    unsearching = new_store()
    unsearching.write_messages("chat", [user("early fox")])  # before the index is there
    searching.write_messages("chat", [user("fox")])
    searching.index_messages()
    unsearching.write_messages("chat", [user("later fox")])
    other.write_messages("chat", [user("their fox")])
    assert found(searching, "fox") == [("chat", 0), ("chat", 1), ("chat", 2)]
    unsearching.delete_messages("chat")
    assert found(searching, "fox") == []
    assert index_says_what_messages_say(path)


def import_some(store, history, count, words):
    rows = []
    for number in range(count):
        message = user(" ".join(words), f"{history} {number} {random.random()}")
        rows.append(
            MessageRow(
                position=number,
                created_at=0,
                message_id=message.meta[MESSAGE_ID_KEY],
                role="user",
                content=json.dumps(message.to_dict()),
            )
        )
    stored = store.get_chat_history(history)
    store.engine.run(
        store.engine.import_history,
        store.scope,
        HistoryRow(chat_history_id=history, created_at=1, updated_at=1),
        [rows[:1], rows[1:]],
        0 if stored is None else stored.revision,
    )


def rewind(store, history, message_id):
    if any(each.message.meta[MESSAGE_ID_KEY] == message_id for each in store.list_messages(history)):
        store.delete_messages(history, from_message_id=message_id)


def fork(store, history, other):
    if store.count_messages(history) and not store.count_messages(other):
        store.copy_messages(history, other)


def change_at_random(store, chance, steps):
    """Do whatever changes messages."""
    for _ in range(steps):
        history, other = chance.sample(["a", "a/1", "b", "東"], 2)
        words = chance.choices(WORDS, k=chance.randrange(4))
        message_id = str(chance.randrange(8))
        message = user(" ".join(words), message_id)
        change, *arguments = chance.choice(
            [
                (store.write_messages, history, [user(" ".join(words)), user("fox", message_id)]),
                (partial(store.write_messages, policy=DuplicatePolicy.OVERWRITE), history, [message]),
                (partial(store.write_messages, policy=DuplicatePolicy.OVERWRITE), history, [message, user("x")]),
                (partial(store.delete_messages, message_ids=[message_id, "1"]), history),
                (rewind, store, history, message_id),
                (fork, store, history, other),
                (store.delete_messages, other),
                (partial(store.delete_chat_histories, prefix=other),),
                (import_some, store, history, 3, words),
                (store.engine.run, store.engine.remove, store.scope, history, message_rows(store, history, [0, 3])),
            ]
        )
        change(*arguments)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("indexed", ["from the beginning", "in the middle", "bit by bit"])
def test_after_any_changes_the_index_says_what_the_messages_say(new_store, path, seed, indexed):
    chance = random.Random(seed)
    store = new_store(search=indexed == "from the beginning")
    change_at_random(store, chance, 150)
    if indexed != "from the beginning":
        store = new_store(search=True)
    if indexed == "bit by bit":
        while store.engine.run(store.engine.index_some, store.scope, 3):
            change_at_random(store, chance, 10)
            assert store.count_messages("b") < 100
    store.index_messages()
    assert index_says_what_messages_say(path)
    change_at_random(store, chance, 50)
    assert index_says_what_messages_say(path)
    assert store.engine.run(store.engine.check, store.scope) == []


def test_a_write_that_fails_leaves_nothing_in_the_index(searching, path):
    searching.write_messages("chat", [user("fox", "1")])

    def batches():
        yield [
            MessageRow(
                position=0, created_at=0, message_id="2", role="user", content='{"content": [{"text": "brown"}]}'
            )
        ]
        raise RuntimeError("a torn file")

    with pytest.raises(RuntimeError):
        searching.engine.run(
            searching.engine.import_history,
            searching.scope,
            HistoryRow(chat_history_id="new", created_at=1, updated_at=1),
            batches(),
            0,
        )
    with pytest.raises(Exception, match="already has"):
        searching.write_messages("chat", [user("brown"), user("brown", "1")], policy=DuplicatePolicy.FAIL)
    assert found(searching, "brown") == []
    assert index_says_what_messages_say(path)


@pytest.mark.parametrize("content", ["no JSON", '{"content": 1}', b"\xff\x80", "", 4711, '{"content": [{"text": 1}]}'])
def test_a_damaged_message_neither_stops_a_write_nor_the_indexing(new_store, path, content):
    store = new_store()
    store.write_messages("chat", [user("fox"), user("fox"), user("fox")])
    text = "CAST(? AS TEXT)" if isinstance(content, bytes) else "?"
    execute(path, f"UPDATE haystack_chat_messages SET content = {text} WHERE message_key & 0xffffffff = 1", content)
    searching = new_store(search=True)
    searching.index_messages()
    assert found(searching, "fox") == [("chat", 0), ("chat", 2)]
    searching.copy_messages("chat", "copy")
    searching.engine.run(searching.engine.remove, searching.scope, "chat", message_rows(searching, "chat", [1]))
    assert found(searching, "fox") == [("chat", 0), ("chat", 2), ("copy", 0), ("copy", 2)]
    searching.delete_messages("copy")
    assert index_says_what_messages_say(path)


# ---------------------------------------------------------------------- others at the same time


def write_and_delete(store, report, name, count):
    """Write, overwrite and delete in histories of the same names as others do."""
    import random

    from haystack.dataclasses import ChatMessage
    from haystack.document_stores.types import DuplicatePolicy

    chance = random.Random(name)
    for number in range(count):
        history = f"chat {chance.randrange(12)}"
        message = ChatMessage.from_user(f"fox {name} {number}", meta={"chat_message_id": f"{chance.randrange(6)}"})
        store.write_messages(history, [message, ChatMessage.from_user("fox")], policy=DuplicatePolicy.OVERWRITE)
        if number % 5 == 0:
            store.delete_messages(f"chat {chance.randrange(12)}")
    report("done")


def test_what_is_written_while_the_index_is_made_is_indexed_exactly_once(new_store, path):
    before = new_store(durability="normal")
    for number in range(1000):
        before.write_messages(f"chat {number % 12}", [user(f"fox {number}")])
    searching = new_store(search=True)
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(write_and_delete, before, name, 60)) for name in "ab"]
        Program.begin(*programs)
        threads = [threading.Thread(target=index_all, args=(searching,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for program in programs:
            assert program.reports_to_the_end() == ["done"]
        for thread in threads:
            thread.join()
    assert found(searching, "fox", limit=1)
    assert index_says_what_messages_say(path)


def index_all(store):
    while store.engine.run(store.engine.index_some, store.scope, 20):
        pass


def index_until_killed(store, report):
    """Index in small batches, and say after each that it is done."""
    while store.engine.run(store.engine.index_some, store.scope, 20):
        report("batch")


def test_indexing_that_was_killed_goes_on(new_store, path):
    before = new_store(durability="normal")
    before.write_messages("chat", [user(f"fox {number}") for number in range(2000)])
    searching = new_store(search=True)
    with Program(index_until_killed, searching) as program:
        program.begin()
        for _ in range(5):
            assert next(program.reports()) == "batch"
        program.kill()
    ((indexed,),) = execute(path, "SELECT count(*) FROM haystack_chat_terms")
    assert 100 <= indexed < 2000
    searching.index_messages()
    assert len(found(searching, "fox", limit=1000)) == 1000
    assert index_says_what_messages_say(path)


# ---------------------------------------------------------------------- searching


def test_many_histories_are_searched_like_few(searching, new_store, monkeypatch):
    theirs = new_store(search=True, namespace="other")
    for number in range(30):
        searching.write_messages(f"chat {number}", [user("fox " * (number % 3 + 1) + "and more " * number)])
        theirs.write_messages(f"chat {number}", [user("fox")])
    few = [searching.search_messages("fox", limit=7, prefix=prefix) for prefix in ("", "chat 1", "chat 2")]
    monkeypatch.setattr("haystack_chat_store.stores.sqlite.search._FEW_HISTORIES", 3)
    many = [searching.search_messages("fox", limit=7, prefix=prefix) for prefix in ("", "chat 1", "chat 2")]
    assert few == many
    assert [len(hits) for hits in few] == [7, 7, 7]


@given(
    said=st.lists(st.lists(st.sampled_from("fox foxes f 東京 京 c＋＋".split()), min_size=1).map(" ".join), min_size=1),
    query=st.sampled_from(["fox", "f", '"fox fox" f', "東京", "c++ fox", "京"]),
    match_prefix=st.booleans(),
)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_scores_are_those_of_the_rule(searching, said, query, match_prefix):
    searching.delete_all_messages()
    searching.write_messages("chat", [user(text) for text in said])
    phrases = search_text.parsed_query(query, match_prefix=match_prefix)
    hits = searching.search_messages(query, match_prefix=match_prefix, limit=1000)
    scores = [search_text.relevance(phrases, search_text.terms(said[hit.position])) for hit in hits]
    assert [hit.score for hit in hits] == scores == sorted(scores, reverse=True)
    assert not scores or min(scores) > 0


def test_neither_way_to_search_sorts_or_scans_more_than_it_must(searching, path):
    values = ["fox", "default", None, 0, "", "", 1, 1, 1, " fox "]
    searching.write_messages("chat", [user("fox")])
    with closing(sqlite3.connect(path)) as connection:
        plans = [
            [step for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {search._scored(query, 1)}", values)]
            for query in (search._SEARCH_FEW, search._SEARCH_FEW_OF_USER, search._SEARCH_MANY)
        ]
    for plan in plans:
        scans = [step for step in plan if step.startswith("SCAN") and "SUBQUERY" not in step and "(" not in step]
        assert [step for step in scans if "VIRTUAL TABLE" not in step] == []
        assert not any("AUTOMATIC" in step for step in plan)


def steps_of_search(store, path, *query, **where):
    """How much SQLite has to do for a search, in instructions of its virtual machine."""
    store.search_messages(*query, **where)  # FTS5 has to prepare itself first
    (connection,) = connections_of_stores(path)
    steps = 0

    def count():
        nonlocal steps
        steps += 1

    connection.set_progress_handler(count, 1)
    store.search_messages(*query, **where)
    connection.set_progress_handler(None, 0)
    return steps


@pytest.mark.parametrize("where", [{"chat_history_id": "chat 1"}, {"prefix": "chat "}], ids=str)
def test_to_search_few_histories_takes_no_longer_the_more_others_have_the_word(searching, path, where):
    for number in range(3):
        searching.write_messages(f"chat {number}", [user(f"fox {number}") for number in range(5)])
    alone = steps_of_search(searching, path, "fox", **where)
    searching.write_messages("another", [user(f"fox {number}") for number in range(2_000)])
    assert 0 < steps_of_search(searching, path, "fox", **where) < 2 * alone


def test_a_build_of_sqlite_without_fts5_is_an_error_that_says_so(searching, path):
    searching.write_messages("chat", [user("fox")])
    searching.close()
    execute_all = [
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'fts5 (', 'fts9 (') WHERE name = 'haystack_chat_terms'",
    ]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in execute_all:  # such as a build without FTS5 sees it: a table of a module that is not there
            connection.execute(statement)
    for call in (lambda: searching.search_messages("fox"), lambda: searching.write_messages("chat", [user("x")])):
        with pytest.raises(UnsupportedOperationError, match=r"FTS5.*no such module"):
            call()
    assert searching.count_messages("chat") == 1


# ---------------------------------------------------------------------- other programs


def test_other_programs_can_change_and_delete_messages(searching, path):
    searching.write_messages("chat", [user("fox"), user("red fox"), user("cat"), user("owl")])
    execute(path, "DELETE FROM haystack_chat_messages WHERE message_key & 0xffffffff = 0")
    changed = "replace(content, 'cat', 'dog')"
    execute(path, f"UPDATE haystack_chat_messages SET content = {changed} WHERE message_key & 0xffffffff = 2")
    assert found(searching, "fox") == [("chat", 1)]
    assert found(searching, "fox", limit=1) == [("chat", 1)]
    searching.engine.run(searching.engine.repair, searching.scope)
    assert found(searching, "dog") == [("chat", 2)]
    assert found(searching, "cat") == []
    assert index_says_what_messages_say(path)


def test_a_message_of_another_program_is_found_after_a_repair(searching, path):
    searching.write_messages("chat", [user("fox")])
    execute(
        path,
        """
        INSERT INTO haystack_chat_messages (message_key, message_id, role, created_at, revision, content)
        SELECT message_key + 1, 'theirs', role, created_at, 1, replace(content, 'fox', 'cat')
        FROM haystack_chat_messages
        """,
    )
    assert found(searching, "cat") == []
    faults = searching.engine.run(searching.engine.repair, searching.scope)
    assert "The search index says something else than its messages." in [fault.description for fault in faults]
    assert found(searching, "cat") == [("chat", 1)]
    assert searching.engine.run(searching.engine.check, searching.scope) == []


@pytest.mark.parametrize("deleted", ["its row", "all of it"])
def test_the_key_of_a_history_that_another_program_deleted_is_not_used_again(searching, path, deleted):
    searching.write_messages("chat", [user("old fox"), user("old fox")])
    ((key,),) = execute(path, "SELECT history_key FROM haystack_chat_histories")
    execute(path, "DELETE FROM haystack_chat_histories")
    if deleted == "all of it":
        execute(path, "DELETE FROM haystack_chat_messages")
    searching.close()
    searching.write_messages("new", [user("cat")])
    assert searching.count_messages("new") == 1
    assert [each.message.text for each in searching.list_messages("new")] == ["cat"]
    assert found(searching, "fox") == []
    ((new_key,),) = execute(path, "SELECT history_key FROM haystack_chat_histories")
    assert new_key > key
    searching.engine.run(searching.engine.repair, searching.scope)
    assert index_says_what_messages_say(path)


# ---------------------------------------------------------------------- other terms


@pytest.fixture
def become(monkeypatch):
    """Make this process one of a version that makes other terms, or one of this version again, when called."""

    def become(version):
        monkeypatch.setattr(term_index, "TERMS_VERSION", version)
        is_later = version > 1
        monkeypatch.setattr(
            term_index, "terms", (lambda text: [f"new{term}" for term in terms(text)]) if is_later else terms
        )

    return become


def version_of_index(path):
    ((version,),) = execute(path, "SELECT terms_version FROM haystack_chat_search")
    return version


def test_a_later_version_makes_the_index_anew_when_it_is_asked_for(new_store, path, become):
    with closing(new_store(search=True)) as before:
        before.write_messages("chat", [user("fox", "1"), user("fox", "2"), user("fox", "3")])
    become(2)
    later = new_store(search=True)
    later.delete_messages("chat", message_ids=["1"])
    later.write_messages("chat", [user("late fox", "2")], policy=DuplicatePolicy.OVERWRITE)
    assert version_of_index(path) == 1
    assert later.engine.run(later.engine.check, later.scope) == []
    with pytest.raises(UnsupportedOperationError, match="index_messages"):
        later.search_messages("newfox")
    assert version_of_index(path) == 1
    later.index_messages()
    assert found(later, "newfox") == [("chat", 1), ("chat", 2)]
    assert indexed_terms(path) == ["newfox", "newfox", "newlate"]
    assert version_of_index(path) == 2
    assert later.engine.run(later.engine.check, later.scope) == []


@pytest.mark.parametrize("searches", [False, True], ids=["without search", "with search"])
def test_what_an_earlier_version_writes_is_found_once_a_later_one_has_indexed_it(new_store, path, become, searches):
    become(2)
    later = new_store(search=True)
    later.write_messages("chat", [user("fox", "1"), user("cat", "2"), user("dog", "3")])
    later.write_messages("other chat", [user("fox")])
    become(1)
    earlier = new_store(search=searches, timeout=20)
    earlier.write_messages("chat", [user("red fox", "2")], policy=DuplicatePolicy.OVERWRITE)
    earlier.write_messages("chat", [user("late fox", "4")])
    earlier.delete_messages("chat", message_ids=["3"])
    earlier.copy_messages("chat", "copy")
    assert not {"newcat", "newdog"} & set(indexed_terms(path))
    become(2)
    later.index_messages()
    assert found(later, "newfox", chat_history_id="chat") == [("chat", 0), ("chat", 1), ("chat", 3)]
    assert len(found(later, "newfox")) == 7
    assert found(later, "newcat") == []
    assert later.engine.run(later.engine.check, later.scope) == []


def test_an_earlier_version_neither_searches_nor_spoils_the_index_of_a_later_one(new_store, path, become):
    become(2)
    with closing(new_store(search=True)) as later:
        later.write_messages("chat", [user("fox")])
    become(1)
    earlier, unsearching = new_store(search=True), new_store()
    with pytest.raises(UnsupportedOperationError, match="newer version"):
        earlier.search_messages("fox")
    assert unsearching.engine.run(unsearching.engine.repair, unsearching.scope) == []
    assert version_of_index(path) == 2
    assert [fault.is_repaired for fault in earlier.engine.run(earlier.engine.repair, earlier.scope)] == [True]
    assert found(earlier, "fox") == [("chat", 0)]
    assert version_of_index(path) == 1


def test_an_index_of_the_same_terms_is_kept(new_store):
    with closing(new_store(search=True)) as before:
        before.write_messages("chat", [user("fox")])
    again = new_store(search=True)
    assert again.engine.run(again.engine.search, again.scope, parsed_query("fox"), None, "", 20)


def open_and_write(store, report, name):
    """Open a database whose index has other terms, write, index and search."""
    from haystack.dataclasses import ChatMessage

    store.write_messages(name, [ChatMessage.from_user(f"fox {name}")])
    store.index_messages()
    report(len(store.search_messages("early fox")))
    store.close()


def test_of_processes_that_start_together_one_begins_the_index_anew(new_store, path):
    store = new_store(search=True)
    store.write_messages("chat", [user("early fox")] * 50)
    store.close()
    execute(path, "UPDATE haystack_chat_search SET terms_version = 0")
    names = "012345"
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(open_and_write, store, name)) for name in names]
        Program.begin(*programs)
        for program in programs:
            assert program.reports_to_the_end() == [20]
    assert index_says_what_messages_say(path)
    assert len(found(store, "fox", limit=1000)) == 56


def test_ctrl_c_while_words_are_indexed_is_ctrl_c(path, monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    with closing(SQLiteChatMessageStore(path, search=True)) as store:
        store.write_messages("chat", [ChatMessage.from_user("before")])
        monkeypatch.setattr(term_index, "terms", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.write_messages("chat", [ChatMessage.from_user("during")])
        monkeypatch.undo()
        store.write_messages("chat", [ChatMessage.from_user("after")])
        assert [len(store.search_messages(word)) for word in ("before", "during", "after")] == [1, 0, 1]
        assert store.count_messages("chat") == 2
