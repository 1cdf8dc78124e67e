# SPDX-License-Identifier: Apache-2.0
"""
The example of a store of one's own keeps the contract, apart from what it says it does not: it is for one process.
"""

import os
from pathlib import Path

import pytest
from breadth import ONCE
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter

from haystack_chat_store import (
    ChatHistoryChangedError,
    InMemoryChatMessageStore,
    MessageNotFoundError,
    StoreUnavailableError,
    store_from_url,
)
from haystack_chat_store.cli import main
from haystack_chat_store.testing import ChatMessageStoreContract, ManagementContract
from haystack_chat_store.testing.messages import conversation, with_id

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def _registered(monkeypatch, tmp_path):
    """A project that registers the store, as an installer leaves it."""
    metadata = tmp_path / "own_store-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-store\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[haystack_chat_store.engines]\nfolder = own_store_directory:SearchableFolderChatMessageStore\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


class TestFolderChatMessageStore(ChatMessageStoreContract):
    breadth = ONCE

    @pytest.fixture
    def make_store(self, tmp_path):
        from own_store import FolderChatMessageStore

        return lambda **settings: FolderChatMessageStore(str(tmp_path), **settings)


class TestSearchableFolderChatMessageStore(ChatMessageStoreContract, ManagementContract):
    breadth = ONCE
    lacks = frozenset(
        "copy delete_messages replace erase_some import_histories import_history index_some check repair remove "
        "namespaces statistics update_history vacuum create_history rename_history update_message renew "
        "keeps_users keeps_previews keeps_expiry".split()
    )

    @pytest.fixture
    def make_store(self, tmp_path):
        from own_store_directory import SearchableFolderChatMessageStore

        return lambda **settings: SearchableFolderChatMessageStore(str(tmp_path), **settings)


def test_folder_that_cannot_be_used_is_an_error_of_this_package(tmp_path):
    from own_store import FolderChatMessageStore

    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError, match="The folder cannot be used: Not a directory"):
        FolderChatMessageStore(str(tmp_path / "file")).write_messages("chat", conversation("u"))


@pytest.mark.usefixtures("_registered")
def test_registered_store_is_made_from_its_url(tmp_path):
    store = store_from_url(f"folder:///{tmp_path}/chats", namespace="mine", search=True)
    assert type(store).__name__ == "SearchableFolderChatMessageStore"
    assert store.write_messages("first", conversation("uaua")) == 4
    assert store.write_messages("second", conversation("u")) == 1
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["second", "first"]
    assert [stored.position for stored in store.list_messages("first", after=0, limit=2)] == [1, 2]
    (hit, *_) = store.search_messages(store.list_messages("first")[2].message.text, chat_history_id="first")
    assert (hit.chat_history_id, hit.position) == ("first", 2)


@pytest.mark.usefixtures("_registered")
def test_writing_nothing_makes_no_history_and_what_a_crash_left_hides_none(tmp_path):
    store = store_from_url(f"folder:///{tmp_path}/chats")
    assert store.write_messages("empty", [], expected_revision=0) == 0
    assert list(store.list_chat_histories().items) == []
    store.write_messages("chat", conversation("ua"))
    (file,) = [path for path in (tmp_path / "chats").rglob("*") if path.is_file()]
    file.with_suffix(".new").write_text('["half')
    assert [info.chat_history_id for info in store.list_chat_histories().items] == ["chat"]


def test_history_is_never_changed_before_its_last_message(tmp_path):
    """The clock of files may be behind."""
    from own_store_directory import SearchableFolderChatMessageStore

    store = SearchableFolderChatMessageStore(str(tmp_path))
    store.write_messages("chat", conversation("ua"))
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        os.utime(file, (0, 0))
    info = store.get_chat_history("chat")
    assert info.created_at <= info.updated_at


@pytest.mark.usefixtures("_registered")
def test_command_line_works_on_a_registered_store(tmp_path, capsys):
    url = f"folder:///{tmp_path}/chats"
    store_from_url(url).write_messages("trip", conversation("ua"))
    with pytest.raises(SystemExit) as ended:
        main(["ls", "--store", url])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("trip\t\t2\t1\t")


def test_unknown_scheme_names_the_known_ones():
    with pytest.raises(ValueError, match=r"sqlite://.*postgresql://.*redis://.*memory://"):
        store_from_url("folder:///chats")


class Wrapped:
    """What traces or counts the calls of a store: it takes all arguments, and passes them on."""

    def __init__(self, store):
        self._store = store
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return method(*arguments, **options)

        method = getattr(self._store, name)
        return call


class PublishedProtocol(Wrapped):
    """The same with the methods of the published protocol alone."""

    def __getattr__(self, name):
        if name in ("retrieve_window", "replace_messages", "for_user", "engine") or name.endswith("_async"):
            raise AttributeError(name)
        return super().__getattr__(name)


@pytest.mark.parametrize("kind", [Wrapped, PublishedProtocol])
def test_wrapper_that_passes_on_all_arguments_can_do_what_its_store_can(kind):
    store = InMemoryChatMessageStore(namespace="wrapped")
    store.delete_all_messages()
    store.write_messages("chat", conversation("ua" * 30))
    wrapped = kind(store)
    assert len(ChatMessageRetriever(wrapped, 3, window_step=4).run("chat")["messages"]) == 12
    assert all(2**31 - 1 not in arguments for _, arguments, _ in wrapped.calls)
    revision = store.get_chat_history("chat").revision
    writer = ChatMessageWriter(wrapped, policy=DuplicatePolicy.FAIL)
    assert writer.run("chat", conversation("u"), expected_revision=revision)["messages_written"] == 1
    with pytest.raises(ChatHistoryChangedError):
        writer.run("chat", conversation("u"), expected_revision=revision)
    store.delete_all_messages()


class WrappedWhileAnotherDeletes(Wrapped):
    """A wrapper of a store whose history is deleted directly before each write."""

    def write_messages(self, *arguments, **options):
        self._store.delete_all_messages()
        return self._store.write_messages(*arguments, **options)


def test_writes_through_a_wrapper_are_as_atomic_as_without_it():
    store = InMemoryChatMessageStore(namespace="wrapped")
    store.write_messages("chat", [with_id("q")])
    writer = ChatMessageWriter(WrappedWhileAnotherDeletes(store), question_is_stored=True)
    with pytest.raises(MessageNotFoundError, match="deleted while the model answered"):
        writer.run("chat", [with_id("q")], [ChatMessage.from_assistant("Too late.")])
    assert store.get_chat_history("chat") is None
