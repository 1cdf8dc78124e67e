# SPDX-License-Identifier: Apache-2.0
"""Rule 25: a store of one user sees and changes only this user's histories."""

import hashlib
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import transcript_matcher
from haystack_chat_store.errors import (
    ChatHistoryAccessError,
    ChatHistoryExistsError,
    ChatHistoryNotFoundError,
    ChatMessageStoreError,
    MessageNotFoundError,
)
from haystack_chat_store.ids import MAX_ID_LENGTH, MESSAGE_ID_KEY
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing.contract_directory import listed
from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    number_of_examples,
    only_where,
    texts,
)
from haystack_chat_store.testing.messages import user, with_id
from haystack_chat_store.transfer import export_histories, import_histories
from haystack_chat_store.types import SearchHit

_LATER = datetime(9999, 1, 1, tzinfo=timezone.utc)


def answer(message_id: str, text: str = "Hi", **meta: Any) -> ChatMessage:
    """Make an assistant message with an id."""
    return ChatMessage.from_assistant(text, meta={MESSAGE_ID_KEY: message_id, **meta})


def imported(calls: Calls, store: Any, history: HistoryRow, rows: list[MessageRow]) -> Any:
    """Import a new history."""
    return calls.call(_Engine(store), "import_history", history, [rows], 0)


class _Engine:
    """Calls operations of a store's engine like methods of a store."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        engine, scope = self._store.engine, self._store.scope
        if name.endswith("_async"):
            operation = getattr(engine, name.removesuffix("_async"))
            return lambda *arguments: engine.run_async(operation, scope, *arguments)
        return lambda *arguments: engine.run(getattr(engine, name), scope, *arguments)


# Calls that read a history. Through the store of another user, each returns what it returns for one that is not there.
_READS: dict[str, Callable[[Calls, Any, str], Any]] = {
    "retrieve_messages": lambda calls, store, chat: calls.retrieve(store, chat),
    "retrieve_messages(last_k)": lambda calls, store, chat: calls.retrieve(store, chat, last_k=1, window_step=2),
    "count_messages": lambda calls, store, chat: calls.count(store, chat),
    "list_messages": lambda calls, store, chat: calls.call(store, "list_messages", chat),
    "list_messages(after)": lambda calls, store, chat: calls.call(store, "list_messages", chat, after=-1),
    "list_messages(before)": lambda calls, store, chat: calls.call(store, "list_messages", chat, before=1),
    "iterate_messages": lambda calls, store, chat: calls.iterate(store, chat),
    "get_chat_history": lambda calls, store, chat: calls.call(store, "get_chat_history", chat),
    "list_chat_histories": lambda calls, store, chat: calls.call(store, "list_chat_histories", prefix=chat),
    "statistics": lambda calls, store, chat: calls.call(store, "statistics", prefix=chat),
    "histories_by_id": lambda calls, store, chat: calls.call(_Engine(store), "histories_by_id", chat, "", 9),
    "position": lambda calls, store, chat: calls.call(_Engine(store), "position", chat, "q"),
    "copy_messages": lambda calls, store, chat: _error(lambda: calls.call(store, "copy_messages", chat, "copy")),
    "delete_chat_histories": lambda calls, store, chat: calls.call(store, "delete_chat_histories", prefix=chat),
    "purge": lambda calls, store, chat: calls.call(store, "purge", older_than=_LATER, prefix=chat),
    "delete_all_messages": lambda calls, store, chat: calls.delete_all(store),
}
# Calls that write to a history. Through the store of another user, each is refused.
_WRITES: dict[str, Callable[[Calls, Any, str], Any]] = {
    "write_messages": lambda calls, store, chat: calls.write(store, chat, [user("Hello?")]),
    "write_messages(known)": lambda calls, store, chat: calls.write(store, chat, [with_id("q", "Secret?")]),
    "write_messages(known, new)": lambda calls, store, chat: calls.write(store, chat, [with_id("q"), user("x")]),
    "write_messages(OVERWRITE)": lambda calls, store, chat: calls.write(
        store, chat, [with_id("q", "x")], policy=DuplicatePolicy.OVERWRITE
    ),
    "write_messages(FAIL)": lambda calls, store, chat: calls.write(
        store, chat, [with_id("q", "x")], policy=DuplicatePolicy.FAIL
    ),
    "write_messages(0)": lambda calls, store, chat: calls.write(store, chat, [user("x")], expected_revision=0),
    "write_messages(1)": lambda calls, store, chat: calls.write(store, chat, [user("x")], expected_revision=1),
    "write_messages([])": lambda calls, store, chat: calls.write(store, chat, [], expected_revision=1),
    "replace_messages": lambda calls, store, chat: calls.call(store, "replace_messages", chat, "a", [user("x")]),
    "replace_messages(unknown)": lambda calls, store, chat: calls.call(store, "replace_messages", chat, "?", []),
    "delete_messages": lambda calls, store, chat: calls.delete(store, chat),
    "delete_messages(revision)": lambda calls, store, chat: calls.delete(store, chat, expected_revision=99),
    "delete_messages(ids)": lambda calls, store, chat: calls.delete(store, chat, message_ids=["q"]),
    "delete_messages(from)": lambda calls, store, chat: calls.delete(store, chat, from_message_id="a"),
    "delete_messages(unknown)": lambda calls, store, chat: calls.delete(store, chat, from_message_id="?"),
    "delete_chat_history": lambda calls, store, chat: calls.call(store, "delete_chat_history", chat),
    "update_chat_history": lambda calls, store, chat: calls.call(store, "update_chat_history", chat, title="mine"),
    "update_chat_history(meta)": lambda calls, store, chat: calls.call(
        store, "update_chat_history", chat, merge_meta={"mine": True}
    ),
    "update_message_meta": lambda calls, store, chat: calls.call(
        store, "update_message_meta", chat, "a", merge={"rating": 1}
    ),
    "update_message_meta(unknown)": lambda calls, store, chat: calls.call(
        store, "update_message_meta", chat, "?", merge={"rating": 1}
    ),
    "create_chat_history": lambda calls, store, chat: calls.call(store, "create_chat_history", chat),
    "create_chat_history(exist_ok)": lambda calls, store, chat: calls.call(
        store, "create_chat_history", chat, exist_ok=True
    ),
    "rename_chat_history": lambda calls, store, chat: calls.call(store, "rename_chat_history", chat, "other"),
    "rename_chat_history(to)": lambda calls, store, chat: calls.call(store, "rename_chat_history", "own", chat),
    "copy_messages(to)": lambda calls, store, chat: calls.call(store, "copy_messages", "own", chat),
    "import_history": lambda calls, store, chat: imported(calls, store, _row(chat), []),
    "import_histories": lambda calls, store, chat: calls.call(_Engine(store), "import_histories", [(_row(chat), [])]),
}


def branch_of(calls: Calls, store: Any, chat_history_id: str) -> str:
    """Write a turn to a history, ask for another answer, and return the id of the branch that keeps the first one."""
    calls.write(store, chat_history_id, [user("question"), answer("an answer", "kept")])
    matched = calls.call(transcript_matcher, "match_transcript", store, chat_history_id, [user("question")])
    calls.write(store, chat_history_id, [answer("another answer", "shown")])
    return str(matched.branch_id)


def skip_without(test: ContractTest, attribute: str) -> None:
    """Skip a test that needs what the engine does not keep: `"keeps_users"`, for example."""
    if attribute in test.lacks:
        pytest.skip(f"The engine lacks {attribute!r}.")


class Rule25UsersTest(ContractTest):
    """Rule 25: a history belongs to one user or to none, and is absent for all other users."""

    @pytest.fixture
    def users(self, new_store: StoreFactory) -> tuple[Any, Any, Any]:
        """Return the store of all, and those of Ada and Bob. Ada has a history "hers", Bob "own", and no one "free"."""
        skip_without(self, "keeps_users")
        store: Any = new_store(**({"search": True} if self.searches else {}))
        ada, bob = store.for_user("ada"), store.for_user("bob")
        ada.write_messages("hers", [with_id("q", "Secret?"), answer("a", "Secret!")])
        bob.write_messages("own", [with_id("q", "Mine?"), answer("a", "Mine!")])
        store.write_messages("free", [with_id("q", "Secret free?"), answer("a", "Free!")])
        return store, ada, bob

    @pytest.mark.parametrize("chat", ["hers", "free"])
    @pytest.mark.parametrize("read", _READS)
    def test_for_what_reads_a_history_of_another_user_is_not_there(
        self, users: tuple[Any, Any, Any], calls: Calls, read: str, chat: str
    ) -> None:
        store, _, bob = users
        before = _state(calls, store, chat)
        _READS[read](calls, bob, "nothing")
        found = _READS[read](calls, bob, chat)
        assert found == _READS[read](calls, bob, "nothing")
        assert _state(calls, store, chat) == before

    @pytest.mark.parametrize("chat", ["hers", "free"])
    @pytest.mark.parametrize("write", _WRITES)
    def test_a_write_to_a_history_of_another_user_is_refused(
        self, users: tuple[Any, Any, Any], calls: Calls, write: str, chat: str
    ) -> None:
        store, _, bob = users
        before = [_state(calls, store, each) for each in (chat, "own", "other")]
        with pytest.raises(ChatHistoryAccessError) as refused:
            _WRITES[write](calls, bob, chat)
        for word in ("ada", "Secret", "Free", chat):
            assert word not in str(refused.value)
        assert [_state(calls, store, each) for each in (chat, "own", "other")] == before

    def test_lists_search_and_numbers_have_only_the_users_own(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, bob = users
        assert listed(calls, ada) == listed(calls, store, user_id="ada") == ["hers"]
        assert listed(calls, bob) == ["own"]
        assert listed(calls, store) == ["free", "own", "hers"]
        counts = [calls.call(each, "statistics").messages for each in (store, ada, bob)]
        assert counts == [6, 2, 2]
        assert calls.call(store, "statistics", user_id="ada").chat_histories == 1
        assert calls.call(store, "statistics", user_id="nobody").messages == 0
        assert calls.call(ada, "statistics").size is None
        if self.searches:
            calls.call(store, "index_messages")
            hits = [calls.call(each, "search_messages", "secret") for each in (store, ada, bob)]
            assert [{hit.chat_history_id for hit in found} for found in hits] == [{"hers", "free"}, {"hers"}, set()]
            assert calls.call(bob, "search_messages", "secret", chat_history_id="hers") == []
            assert len(calls.call(store, "search_messages", "secret", user_id="ada")) == 2

    @only_where("searches")
    def test_score_says_nothing_of_what_others_have(self, new_store: StoreFactory, calls: Calls) -> None:
        store: Any = new_store(search=True)
        scopes: list[Any] = [new_store(search=True, namespace="own namespace")]
        if "keeps_users" not in self.lacks:
            scopes.append(store.for_user("bob"))
        queries = ["merger", '"pin is 4711"', "mer", "merger talk"]
        for own in scopes:
            calls.write(own, "of bob", [user("merger talk"), user("my pin is 4711, merger"), user("no talk, merger")])
            calls.call(own, "update_chat_history", "of bob", title="merger")

        def found() -> list[list[SearchHit]]:
            return [calls.call(own, "search_messages", query, match_prefix=True) for own in scopes for query in queries]

        before = found()
        assert [len(hits) for hits in before[:4]] == [4, 1, 4, 2]
        for number in range(20):
            calls.write(store, f"of others {number}", [user("my pin is 4711"), user("the merger"), user("talk " * 50)])
            assert found() == before
        calls.call(store, "delete_chat_histories", prefix="of others")
        assert found() == before

    def test_what_is_made_through_it_is_the_users(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, _ = users
        calls.write(ada, "written", [user()])
        calls.call(ada, "create_chat_history", "made")
        calls.call(ada, "copy_messages", "hers", "copied")
        calls.call(store, "copy_messages", "hers", "copied by all")
        imported(calls, ada, _row("imported", user_id="bob"), [])
        imported(calls, store, _row("brought", user_id="ada"), [])
        for chat in ("written", "made", "copied", "copied by all", "imported", "brought"):
            assert calls.call(store, "get_chat_history", chat).user_id == "ada"
        assert calls.call(store, "get_chat_history", "free").user_id is None
        calls.write(store, "hers", [user("of all")])
        assert calls.call(store, "get_chat_history", "hers").user_id == "ada"

    def test_all_ids_may_be_as_long_as_they_can_be(self, new_store: StoreFactory, calls: Calls) -> None:
        def name(length: int) -> str:  # of characters of four bytes, which no compression makes shorter
            digits = hashlib.shake_256(str(length).encode()).digest(2 * length)
            return "".join(
                chr(0x20000 + 256 * (one % 64) + other) for one, other in zip(digits[::2], digits[1::2], strict=True)
            )

        store: Any = new_store(namespace=name(128))
        own, chat = store.for_user(name(MAX_ID_LENGTH)), name(MAX_ID_LENGTH - 1)
        assert calls.write(own, chat, [with_id(name(MAX_ID_LENGTH - 2), "Hi!")]) == 1
        assert listed(calls, own) == listed(calls, store) == [chat]
        assert texts(calls.retrieve(own, chat)) == ["Hi!"]

    @pytest.mark.parametrize("chat", ["hers", "free"])
    def test_history_that_is_made_for_a_user_is_none_of_another(
        self, users: tuple[Any, Any, Any], calls: Calls, chat: str
    ) -> None:
        store, _, _ = users
        for exist_ok in (False, True):
            with pytest.raises(ChatHistoryAccessError):
                calls.call(store, "create_chat_history", chat, user_id="bob", exist_ok=exist_ok)
        assert calls.call(store, "create_chat_history", "own", user_id="bob", exist_ok=True).user_id == "bob"

    @pytest.mark.parametrize("name", ["rename_chat_history", "copy_messages"])
    def test_source_that_is_not_there_is_not_found_whatever_the_target_is(
        self, users: tuple[Any, Any, Any], calls: Calls, name: str
    ) -> None:
        store, _, bob = users
        for each in (store, bob):
            for target in ("hers", "free", "nothing", "own"):
                with pytest.raises(ChatHistoryNotFoundError):
                    calls.call(each, name, "not there", target)

    def test_messages_of_a_user_are_not_given_to_another(
        self, users: tuple[Any, Any, Any], calls: Calls, tmp_path: Path
    ) -> None:
        store, ada, _ = users
        export_histories(ada, tmp_path / "hers.jsonl")
        calls.call(store, "create_chat_history", "of bob", user_id="bob")
        calls.call(store, "create_chat_history", "of none")
        for target in ("of bob", "of none"):
            before = _state(calls, store, target)
            with pytest.raises(ChatHistoryAccessError, match="different users"):
                calls.call(store, "copy_messages", "hers", target)
            assert _state(calls, store, target) == before
        assert calls.call(store, "copy_messages", "free", "of bob") == 2  # what belongs to no user can be given
        for user_id in ("bob", None):
            calls.delete(store, "hers")
            calls.call(store, "create_chat_history", "hers", user_id=user_id)
            calls.write(store, "hers", [with_id("q", "Secret?")])
            before = _state(calls, store, "hers")
            with pytest.raises(ChatHistoryAccessError, match="different users"):
                import_histories(store, tmp_path / "hers.jsonl")
            assert _state(calls, store, "hers") == before
        calls.call(store, "update_chat_history", "hers", user_id="ada")
        assert import_histories(store, tmp_path / "hers.jsonl").messages == 1

    def test_a_store_of_a_user_stays_with_this_user(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        _, ada, _ = users
        assert ada.for_user("ada") == ada
        refused: list[Callable[[], Any]] = [
            lambda: ada.for_user("bob"),
            lambda: calls.call(ada, "list_chat_histories", user_id="bob"),
            lambda: calls.call(ada, "statistics", user_id="bob"),
            lambda: calls.call(ada, "purge", older_than=_LATER, user_id="bob"),
            lambda: calls.call(ada, "delete_user", "bob"),
            lambda: calls.call(ada, "create_chat_history", "new", user_id="bob"),
            lambda: calls.call(ada, "update_chat_history", "hers", user_id="bob"),
            lambda: calls.call(ada, "update_chat_history", "hers", user_id=None),
            lambda: calls.call(ada, "update_chat_history", "free", user_id="ada"),
            lambda: calls.call(ada, "delete_chat_histories", prefix="hers", vacuum=True),
            lambda: calls.call(ada, "delete_user", "ada", vacuum=True),
            lambda: calls.call(ada, "purge", older_than=_LATER, vacuum=True),
            lambda: calls.call(ada, "index_messages"),
        ]
        if self.searches:
            refused.append(lambda: calls.call(ada, "search_messages", "x", user_id="bob"))
        for call in refused:
            with pytest.raises(ChatHistoryAccessError):
                call()
        assert listed(calls, ada, user_id="ada") == ["hers"]

    def test_the_user_is_a_setting(self, new_store: StoreFactory, calls: Calls) -> None:
        skip_without(self, "keeps_users")
        store: Any = new_store()
        ada = store.for_user("ada")
        assert ada.to_dict()["init_parameters"]["user_id"] == "ada"
        again = type(ada).from_dict(ada.to_dict())
        assert again == ada != store
        calls.write(again, "hers", [user()])
        assert calls.count(new_store(user_id="ada"), "hers") == 1
        assert calls.count(new_store(user_id="bob"), "hers") == 0
        for wrong in ("", 1, None, "\x00", "x" * 513):
            with pytest.raises(ValueError, match="user_id"):
                store.for_user(wrong)

    def test_a_conversation_is_claimed_and_handed_over(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, bob = users
        before = calls.call(store, "get_chat_history", "free")
        info = calls.call(store, "update_chat_history", "free", user_id="ada")
        assert (info.user_id, info.revision, info.updated_at) == ("ada", before.revision, before.updated_at)
        assert listed(calls, ada) == ["free", "hers"]
        calls.call(store, "update_chat_history", "hers", user_id="bob", title="given")
        assert (listed(calls, ada), listed(calls, bob)) == (["free"], ["own", "hers"])
        assert texts(calls.retrieve(bob, "hers")) == ["Secret?", "Secret!"]
        calls.call(store, "update_chat_history", "hers", user_id=None)
        assert (listed(calls, ada), listed(calls, bob)) == (["free"], ["own"])
        assert calls.count(store, "hers") == 2

    def test_branches_have_the_user_of_their_history(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, bob = users
        branch = branch_of(calls, ada, "chat")
        family = ["chat", branch, branch_of(calls, ada, branch)]
        calls.call(store, "update_chat_history", "chat", user_id="bob", title="given")
        assert listed(calls, ada, branches=True) == ["hers"]
        assert sorted(listed(calls, bob, branches=True)) == sorted([*family, "own"])
        assert [calls.call(store, "get_chat_history", each).user_id for each in family] == ["bob"] * 3
        assert calls.count(ada, branch) == 0
        calls.call(store, "update_chat_history", "chat", user_id=None)
        assert listed(calls, bob, branches=True) == ["own"]
        calls.call(store, "update_chat_history", "chat", user_id="ada")
        assert sorted(listed(calls, ada, branches=True)) == sorted([*family, "hers"])
        assert calls.call(store, "delete_user", "ada") == 4
        assert sorted(listed(calls, store, branches=True)) == ["free", "own"]

    def test_history_of_another_user_is_no_branch(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, bob = users
        calls.call(bob, "create_chat_history", "chat~spy", meta={"branch_of": "chat"})
        branch = branch_of(calls, ada, "chat")
        before = _state(calls, store, "chat~spy")
        calls.call(store, "update_chat_history", "chat", user_id="eve")
        calls.call(store, "update_chat_history", "chat", user_id="ada")
        calls.call(store, "rename_chat_history", "chat", "renamed")
        assert _state(calls, store, "chat~spy") == before
        renamed = ["renamed", branch.replace("chat", "renamed")]
        assert sorted(listed(calls, store, prefix="renamed", branches=True)) == renamed
        calls.call(store, "rename_chat_history", "renamed", "chat")
        calls.call(store, "delete_chat_history", "chat")
        assert _state(calls, store, "chat~spy") == before
        assert listed(calls, store, prefix="chat", branches=True) == ["chat~spy"]

    def test_branches_follow_a_history_to_an_id_whose_branches_another_user_has(
        self, users: tuple[Any, Any, Any], calls: Calls
    ) -> None:
        store, ada, bob = users
        branch = branch_of(calls, ada, "chat")
        squatted, own = branch.replace("chat", "new"), branch.replace("chat", "newer")
        calls.write(bob, squatted, [user("mine")])
        calls.write(ada, own, [user("mine")])
        before = [_state(calls, store, each) for each in (squatted, own)]
        for old, new in (("chat", "new"), ("new", "newer")):
            calls.call(ada, "rename_chat_history", old, new)
            (renamed,) = set(listed(calls, ada, prefix=f"{new}~", branches=True)) - {own}
            assert renamed not in (squatted, own)
            assert calls.call(ada, "get_chat_history", renamed).meta == {"branch_of": new}
            assert texts(calls.retrieve(ada, renamed)) == ["question", "kept"]
            assert listed(calls, ada, prefix=f"{old}~", branches=True) == []
        assert [_state(calls, store, each) for each in (squatted, own)] == before
        calls.call(ada, "delete_chat_history", "newer")
        assert sorted(listed(calls, ada, branches=True)) == sorted(["hers", own])

    def test_what_is_taken_back_is_kept_if_another_user_has_the_id_of_the_branch(
        self, users: tuple[Any, Any, Any], calls: Calls
    ) -> None:
        store, ada, bob = users
        for revision in range(1, 5):
            calls.write(bob, f"chat~{revision}", [user("question"), answer("an answer", "mine")])
        branch = branch_of(calls, ada, "chat")
        assert texts(calls.retrieve(ada, branch)) == ["question", "kept"]
        assert texts(calls.retrieve(ada, "chat")) == ["question", "shown"]
        by_all = branch_of(calls, store, "chat of all")
        assert calls.call(store, "get_chat_history", branch).user_id == "ada"
        calls.call(ada, "delete_chat_history", "chat")
        assert [calls.count(store, each) for each in (branch, by_all, "chat~1")] == [0, 2, 2]

    def test_a_person_is_erased(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, bob = users
        calls.write(ada, "more", [user()])
        assert calls.call(store, "delete_user", "ada") == 2
        assert calls.call(store, "delete_user", "ada") == 0
        assert listed(calls, store) == ["free", "own"]
        assert calls.call(bob, "delete_user", "bob") == 1
        assert listed(calls, store) == ["free"]

    def test_purge_takes_only_a_users_old_histories(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, _ = users
        calls.write(ada, "more/1", [user()])
        assert calls.call(store, "purge", older_than=_LATER, user_id="ada", prefix="more/") == 1
        changed = calls.call(store, "get_chat_history", "hers").updated_at
        assert calls.call(store, "purge", older_than=changed, user_id="ada") == 0
        assert calls.call(store, "purge", older_than=changed + timedelta(microseconds=1), user_id="ada") == 1
        assert calls.call(store, "purge", older_than=_LATER, user_id="nobody") == 0
        assert listed(calls, store) == ["free", "own"]

    def test_pages_of_a_user_go_on(self, users: tuple[Any, Any, Any], calls: Calls) -> None:
        store, ada, _ = users
        for number in range(7):
            calls.write(ada, f"chat/{number}", [user()])
            calls.write(store, f"other/{number}", [user()])
        newest_first = [f"chat/{number}" for number in reversed(range(7))]
        assert listed(calls, store, user_id="ada", limit=3) == [*newest_first, "hers"]
        assert listed(calls, ada, prefix="chat/", limit=2) == newest_first

    def test_users_with_hostile_names_are_kept_apart(self, new_store: StoreFactory, calls: Calls) -> None:
        skip_without(self, "keeps_users")
        store: Any = new_store()
        names = ["a", "A", "a ", "a:b", "a}", "{a}", "%", "_", "history", "東京", "\U0010ffff", "a" * 512]
        for name in names:
            calls.write(store.for_user(name), f"of {name[:200]}", [user(name)])
        for name in names:
            assert listed(calls, store, user_id=name) == [f"of {name[:200]}"]
            assert calls.call(store.for_user(name), "statistics").messages == 1

    def test_walk_through_the_stores_of_users_does_what_each_does_alone(
        self, new_store: StoreFactory, request: pytest.FixtureRequest
    ) -> None:
        skip_without(self, "keeps_users")
        if self.lacks:
            pytest.skip("The walk needs all operations.")
        options = {"search": True} if self.searches else {}
        shared: Any = new_store(**options)
        alone: Any = {name: new_store(namespace=f"only {name}", **options) for name in ("ada", "bob")}
        ways = [Calls(is_async=False), Calls(is_async=True)]
        request.addfinalizer(ways[1].end)
        for store in (shared, *alone.values()):
            if self.searches:
                store.index_messages()
        walk = _Walk(shared, alone, ways, searches=self.searches)
        for _ in range(number_of_examples(300)):
            walk.step()
        assert walk.refused > walk.steps // 20
        faults = [shared.engine.run(shared.engine.check, shared.scope)]
        assert faults == [[]]


class _Walk:
    """Does each call of a user twice: beside the other user, and in a namespace where the user is alone."""

    def __init__(self, shared: Any, alone: dict[str, Any], ways: list[Calls], *, searches: bool) -> None:
        self.steps = self.refused = 0
        self._shared, self._alone, self._ways, self._searches = shared, alone, ways, searches
        self._owners: dict[str, str] = {}
        self._random = random.Random(25)

    def step(self) -> None:
        name, calls = self._random.choice(sorted(self._alone)), self._ways[self.steps % 2]
        view, alone = self._shared.for_user(name), self._alone[name]
        call, written = self._call()
        foreign = any(self._owners.get(chat, name) != name for chat in written)
        self.steps += 1
        time.sleep(0.001)  # makes the times differ, so that they give the order of the calls
        if foreign:
            before = _comparable(self._everything(calls, self._alone))
            with pytest.raises((ChatHistoryAccessError, ChatHistoryNotFoundError, MessageNotFoundError)) as error:
                call(calls, view)
            self.refused += isinstance(error.value, ChatHistoryAccessError)
            assert before == _comparable(self._everything(calls, self._views()))
        else:
            assert _comparable(_result(call, calls, view)) == _comparable(_result(call, calls, alone))
        self._owners = {
            row.chat_history_id: each
            for each in self._alone
            for row in calls.call(self._shared.for_user(each), "list_chat_histories").items
        }

    def _views(self) -> dict[str, Any]:
        return {name: self._shared.for_user(name) for name in self._alone}

    @staticmethod
    def _everything(calls: Calls, stores: dict[str, Any]) -> Any:
        return [
            (info, calls.call(store, "list_messages", info.chat_history_id))
            for _, store in sorted(stores.items())
            for info in calls.call(store, "list_chat_histories").items
        ]

    def _call(self) -> tuple[Callable[[Calls, Any], Any], list[str]]:
        """Return a call, and the ids of the histories that it writes to."""
        chance = self._random
        chat, other = chance.sample(["a", "a/1", "b", "c"], 2)
        ids = [chance.choice("0123456789") for _ in range(chance.randint(1, 4))]
        batch = [
            with_id(each, f"fox {each}") if chance.random() < 0.5 else answer(each, f"owl {each}", usage={})
            for each in dict.fromkeys(ids)
        ]
        writes: list[tuple[Callable[[Calls, Any], Any], list[str]]] = [
            (lambda calls, store: calls.write(store, chat, batch), [chat]),
            (lambda calls, store: calls.write(store, chat, batch, policy=DuplicatePolicy.OVERWRITE), [chat]),
            (lambda calls, store: calls.call(store, "replace_messages", chat, ids[0], batch), [chat]),
            (lambda calls, store: calls.delete(store, chat, message_ids=ids), [chat]),
            (lambda calls, store: calls.delete(store, chat, from_message_id=ids[0]), [chat]),
            (lambda calls, store: calls.delete(store, chat), [chat]),
            (lambda calls, store: calls.call(store, "create_chat_history", chat, title="new"), [chat]),
            (lambda calls, store: calls.call(store, "update_chat_history", chat, title=ids[0]), [chat]),
            (lambda calls, store: calls.call(store, "update_chat_history", chat, merge_meta={ids[0]: 1}), [chat]),
            (lambda calls, store: calls.call(store, "update_message_meta", chat, ids[0], merge={"x": 1}), [chat]),
            (lambda calls, store: calls.call(store, "rename_chat_history", chat, other), [chat, other]),
        ]
        reads: list[Callable[[Calls, Any], Any]] = [
            lambda calls, store: calls.retrieve(store, chat, last_k=chance.randint(1, 3)),
            lambda calls, store: calls.count(store, chat),
            lambda calls, store: calls.call(store, "list_messages", chat, limit=3),
            lambda calls, store: calls.call(store, "get_chat_history", chat),
            lambda calls, store: calls.call(store, "list_chat_histories", prefix="a"),
            lambda calls, store: calls.call(store, "list_chat_histories", meta={ids[0]: 1}),
            lambda calls, store: calls.call(store, "statistics"),
            lambda calls, store: calls.call(_Engine(store), "histories_by_id", "", "", 9),
            lambda calls, store: calls.call(store, "delete_chat_histories", prefix="a/"),
            lambda calls, store: calls.call(store, "purge", older_than=_LATER, prefix="c"),
        ]
        if self._searches:
            reads.append(lambda calls, store: _best_first(calls.call(store, "search_messages", "fox", limit=1000)))
        if chance.random() < 0.02:
            return lambda calls, store: calls.delete_all(store), []
        if chance.random() < 0.6:
            return chance.choice(writes)
        if chance.random() < 0.1:
            return lambda calls, store: calls.call(store, "copy_messages", chat, other), [other]
        read = chance.choice(reads)
        state = chance.getstate()

        def repeatable(calls: Calls, store: Any) -> Any:
            chance.setstate(state)
            return read(calls, store)

        return repeatable, []


def _best_first(hits: list[SearchHit]) -> list[SearchHit]:
    """Sort hits by their scores. An engine may order equal ones by the namespace, too."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.chat_history_id, str(hit.position)))


def _result(call: Callable[[Calls, Any], Any], calls: Calls, store: Any) -> Any:
    try:
        return call(calls, store)
    except (ChatHistoryExistsError, ChatHistoryNotFoundError, MessageNotFoundError) as error:
        return type(error).__name__


# The moments of two calls differ, the revisions of a namespace depend on what others delete, and only the shared store
# has users.
_DIFFERING = ("created_at", "updated_at", "revision", "user_id", "size", "last_message", "last_at")


def _comparable(value: Any) -> Any:
    if isinstance(value, ChatMessage):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_comparable(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        names = [name for name in value.__dataclass_fields__ if name not in _DIFFERING]
        last = getattr(value, "last_message", None)
        texts = [getattr(last, "role", None), getattr(last, "text", None)] if not isinstance(last, str) else []
        return [type(value).__name__, *texts, *(_comparable(getattr(value, name)) for name in names)]
    return value


def _error(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ChatMessageStoreError as error:
        return type(error).__name__


def _row(chat_history_id: str, user_id: str | None = None) -> HistoryRow:
    return HistoryRow(chat_history_id=chat_history_id, created_at=5, updated_at=5, user_id=user_id)


def _state(calls: Calls, store: ClosableStore, chat: str) -> Any:
    messages = calls.call(store, "list_messages", chat)
    return calls.call(store, "get_chat_history", chat), [(each.position, each.message) for each in messages]
