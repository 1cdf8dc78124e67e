# SPDX-License-Identifier: Apache-2.0
"""
Which histories are exported, imported and copied, that nothing of them is lost, and what becomes of those there.

That every engine moves everything is part of the contract: rule 23.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise

import pytest
from engine_stores import store_on
from haystack.dataclasses import ChatMessage, FileContent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transferred import everything, moved, put

from haystack_chat_store import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    SQLiteChatMessageStore,
    UnsupportedOperationError,
    store_from_url,
)
from haystack_chat_store.stores.engine import Engine
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine
from haystack_chat_store.testing.contract_isolation import HOSTILE_IDS
from haystack_chat_store.testing.kit import number_of_examples
from haystack_chat_store.testing.messages import conversation, json_objects, sample_messages, user, with_id
from haystack_chat_store.testing.messages import messages as any_messages
from haystack_chat_store.transfer import (
    EXPORT_FORMATS,
    copy_histories,
    export_histories,
    import_histories,
)

# ---------------------------------------------------------------------- nothing is lost


def test_all_kinds_of_messages_and_ids_come_back_equal(store, target, sqlite, file):
    for chat_history_id in HOSTILE_IDS:
        store.write_messages(chat_history_id, list(sample_messages().values()))
    store.update_chat_history(HOSTILE_IDS[0], title="a\u2028b 👋", meta={"big": 2**70, "": [None, "\ud800"]})
    store.write_messages("titled", [user()])
    store.update_chat_history("titled", title="no messages any more")
    store.delete_messages("titled", message_ids=[store.retrieve_messages("titled")[0].meta["chat_message_id"]])

    exported = export_histories(store, file)
    assert import_histories(sqlite, file) == exported
    assert copy_histories(sqlite, target) == exported
    assert everything(target) == everything(sqlite) == everything(store)


@settings(max_examples=number_of_examples(25), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(any_messages(), max_size=5), json_objects(), st.text(max_size=20))
def test_any_conversation_comes_back_equal(memory, file, messages, meta, title):
    store, target = memory(), memory()
    store.write_messages("a", [*messages, user()])
    store.update_chat_history("a", title=title.replace("\0", "").encode("utf-8", "replace").decode(), meta=meta)

    export_histories(store, file)
    import_histories(target, file)

    assert everything(target) == everything(store)


def test_twenty_megabytes_come_back_equal(store, target, file):
    part = FileContent("A" * 20_000_000, "application/pdf", validation=False)
    store.write_messages("a", [ChatMessage.from_user(content_parts=[part]), user("\x00\ud800", big=10**4000)])

    export_histories(store, file)
    import_histories(target, file)

    assert everything(target) == everything(store)


def test_exporting_again_writes_the_same_file(store, sqlite, tmp_path):
    store.write_messages("b", conversation("uctta"))
    store.write_messages("a", conversation("ua"))
    copy_histories(store, sqlite)
    files = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]

    for file, each in zip(files, (store, store, sqlite), strict=True):
        export_histories(each, file)

    assert len({file.read_bytes() for file in files}) == 1


def test_a_move_through_every_engine_ends_as_it_began(store, target, sqlite, postgres, redis_server, redis_cluster):
    store.write_messages("all", list(sample_messages().values()))
    store.write_messages("long", [user(str(number)) for number in range(2_500)])
    store.update_chat_history("long", title="T", meta={"a": 1})

    namespace = uuid.uuid4().hex
    with ExitStack() as stack:
        on_servers = [
            stack.enter_context(closing(store_from_url(url, last_k=None, namespace=namespace)))
            for url in (postgres.create_database(), redis_server.url, redis_cluster.url)
        ]
        for here, there in pairwise([store, sqlite, *on_servers, target]):
            assert copy_histories(here, there) == moved(2, 2_500 + len(sample_messages()), 0, ())

    assert everything(target) == everything(store)


def test_namespaces_of_one_database_copy_to_each_other(tmp_path):
    here, there = (SQLiteChatMessageStore(tmp_path / "chat.db", namespace=name) for name in ("here", "there"))
    here.write_messages("a", [user(str(number)) for number in range(1_500)])

    assert copy_histories(here, there).messages == 1_500
    assert everything(there) == everything(here)
    assert copy_histories(here, here) == moved(0, 0, 1_500, ())


# ---------------------------------------------------------------------- which histories


def test_histories_are_chosen_by_id_or_prefix(several, memory):
    for chosen, expected in (
        ({}, ["a/1", "a/2", "b/1"]),
        ({"prefix": "a/"}, ["a/1", "a/2"]),
        ({"chat_history_ids": ["b/1", "a/1", "b/1"]}, ["a/1", "b/1"]),
        ({"chat_history_ids": iter(["b/1"])}, ["b/1"]),
        ({"chat_history_ids": []}, []),
        ({"prefix": "A"}, []),
    ):
        target = memory()
        assert copy_histories(several, target, **chosen) == moved(len(expected), 2 * len(expected), 0, ())
        assert [row.chat_history_id for row, _ in everything(target)] == expected


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_a_wrong_choice_is_refused_and_leaves_no_file(several, file, name):
    for chosen, error in (
        ({"chat_history_ids": ["a/1", "nobody"]}, ChatHistoryNotFoundError),
        ({"chat_history_ids": ["a/1"], "prefix": "a"}, ValueError),
        ({"chat_history_ids": "a/1"}, ValueError),
        ({"chat_history_ids": [1]}, ValueError),
        ({"prefix": "\0"}, ValueError),
    ):
        with pytest.raises(error):
            export_histories(several, file, format=name, **chosen)
    assert list(file.parent.iterdir()) == []


def test_unknown_formats_are_refused(store, file):
    for name in ("csv", None, ""):
        with pytest.raises(ValueError, match="format must be one of 'jsonl'"):
            export_histories(store, file, format=name)
        with pytest.raises(ValueError, match="format must be one of 'jsonl'"):
            import_histories(store, file, format=name)
    with pytest.raises(ValueError, match="got 'markdown'"):
        import_histories(store, file, format="markdown")


def test_what_is_no_store_of_ours_is_refused(store, file):
    for call in (export_histories, import_histories):
        file.write_bytes(b"")
        export_histories(store, file)
        for path in (file, file.with_name("missing")):
            with pytest.raises(ValueError, match="BaseChatMessageStore, got object"):
                call(object(), path)
    with pytest.raises(ValueError, match="BaseChatMessageStore"):
        copy_histories(store, None)


def test_a_store_that_cannot_import_says_so(several, file):
    class Bare(InMemoryEngine):
        import_history = Engine.import_history
        import_histories = Engine.import_histories
        histories_by_id = Engine.histories_by_id

    bare = store_on(Bare())
    export_histories(several, file)
    with pytest.raises(UnsupportedOperationError, match="Bare does not support importing"):
        import_histories(bare, file)
    with pytest.raises(UnsupportedOperationError, match="Bare does not support the directory"):
        export_histories(bare, file.with_name("other"))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# ---------------------------------------------------------------------- again, and into what is there


def test_importing_again_adds_nothing(several, target, file):
    export_histories(several, file)
    import_histories(target, file)
    before = everything(target)

    assert import_histories(target, file) == moved(0, 0, 6, ())
    assert everything(target) == before


def test_a_history_that_was_continued_in_the_file_gets_what_is_new(store, target, file):
    store.write_messages("a", [user(str(number)) for number in range(1_500)])
    copy_histories(store, target)
    store.write_messages("a", [user(str(number)) for number in range(1_200)])
    export_histories(store, file)

    assert import_histories(target, file) == moved(1, 1_200, 1_500, ())
    assert everything(target) == everything(store)


def test_a_history_that_was_continued_in_the_store_stays(store, target, file):
    store.write_messages("a", conversation("ua"))
    export_histories(store, file)
    copy_histories(store, target)
    target.write_messages("a", conversation("ua"))

    assert import_histories(target, file) == moved(0, 0, 2, ())
    assert target.count_messages("a") == 4


def test_title_and_meta_of_a_history_that_is_there_stay(store, target):
    put(store, "a", "zero", "one", title="theirs", meta='{"a":1}')
    put(target, "a", "zero", title="mine")

    assert copy_histories(store, target).messages == 1
    assert target.get_chat_history("a").title == "mine"
    assert target.get_chat_history("a").meta == {}


def test_a_history_without_messages_is_filled(store, target):
    put(store, "a", "zero", title="theirs")
    put(target, "a", title="mine")

    assert copy_histories(store, target) == moved(1, 1, 0, ())
    assert target.get_chat_history("a").title == "mine"


def test_histories_that_differ_are_named_and_left_alone_while_all_others_come(several, target, file):
    target.write_messages("a/1", [user("mine")])
    target.write_messages("b/1", [*several.retrieve_messages("b/1")[:1], user("mine")])
    before = [target.retrieve_messages(name) for name in ("a/1", "b/1")]
    export_histories(several, file)

    with pytest.raises(
        ChatHistoryExistsError, match=r"^2 histories have other .* to 'a/1', 'b/1'\. .* Added messages: 2,"
    ):
        import_histories(target, file)

    assert [target.retrieve_messages(name) for name in ("a/1", "b/1")] == before
    assert target.retrieve_messages("a/2") == several.retrieve_messages("a/2")
    with pytest.raises(
        ChatHistoryExistsError, match=r"^1 history has other messages in the store already\..* to 'b/1'\."
    ):
        copy_histories(several, target, prefix="b/")


@pytest.mark.parametrize(
    ("count", "ending"), [(10, "'chat 09'. "), (11, "'chat 09' and 1 more. "), (1_234, " and 1,224 more. ")]
)
def test_an_error_names_ten_of_the_histories_that_differ(store, target, count, ending):
    for number in range(count):
        store.write_messages(f"chat {number:02}", [user()])
        target.write_messages(f"chat {number:02}", [user("mine")])
    with pytest.raises(ChatHistoryExistsError) as raised:
        copy_histories(store, target)
    assert ending in str(raised.value)
    assert str(raised.value).count("'chat ") == 10
    assert len(str(raised.value)) < 500


def test_a_long_history_that_differs_hides_none_that_comes_after_it(store, target, file):
    put(store, "a", *["x"] * 2_500)
    put(store, "b", "zero")
    target.write_messages("a", [user("mine")])
    export_histories(store, file)

    with pytest.raises(ChatHistoryExistsError, match="'a'"):
        import_histories(target, file)
    assert (target.count_messages("a"), target.count_messages("b")) == (1, 1)


def test_system_messages_come_along_whatever_the_store_skips(store, sqlite):
    store.write_messages("a", conversation("sua"))
    assert copy_histories(store, sqlite).messages == 3


def test_two_imports_at_once_bring_everything_once(store, sqlite, file):
    for number in range(20):
        store.write_messages(f"chat {number}", conversation("uaua"))
    export_histories(store, file)

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: import_histories(sqlite, file), range(4)))

    assert everything(sqlite) == everything(store)
    assert (sum(each.messages for each in done), sum(each.skipped for each in done)) == (80, 240)


def test_an_import_gives_up_on_a_history_that_changes_all_the_time(store, file):
    class Busy(InMemoryEngine):
        def import_history(self, *arguments):
            raise ChatHistoryChangedError("changed")

    put(store, "a", "zero")
    export_histories(store, file)
    with pytest.raises(ChatHistoryChangedError, match="'a' was written to all the time"):
        import_histories(store_on(Busy()), file)


class WrittenToMeanwhile(InMemoryEngine):
    """Another writer comes just before an import."""

    meanwhile = None

    def import_history(self, *arguments):
        if self.meanwhile is not None:
            work, self.meanwhile = self.meanwhile, None
            work()
        return super().import_history(*arguments)


def test_what_is_written_to_a_history_just_before_it_is_imported_is_not_mixed_with_it(store, file):
    put(store, "a", "zero", "one", "two")
    export_histories(store, file)
    target = store_on(WrittenToMeanwhile())
    target.engine.meanwhile = lambda: target.write_messages("a", [with_id("m0"), with_id("mine")])

    with pytest.raises(ChatHistoryExistsError, match="'a'"):
        import_histories(target, file)
    assert [message.meta["chat_message_id"] for message in target.retrieve_messages("a")] == ["m0", "mine"]

    target.delete_all_messages()
    target.engine.meanwhile = lambda: target.write_messages("a", [with_id("m0")])
    assert import_histories(target, file) == moved(1, 2, 1, ())
    target.delete_all_messages()

    def write_each_time(number=0):
        target.write_messages("a", [with_id(("m0", "m1", "m2")[number])] if number < 3 else [user()])
        target.engine.meanwhile = lambda: write_each_time(number + 1)

    target.engine.meanwhile = write_each_time
    assert import_histories(target, file) == moved(0, 0, 3, ())

    target.delete_all_messages()
    target.engine.meanwhile = lambda: import_histories(target, file)
    assert import_histories(target, file) == moved(0, 0, 3, ())
