# SPDX-License-Identifier: Apache-2.0
"""Rules 17, 21, 22 and 23 for branches: what `match_transcript` keeps of what it takes back."""

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import transcript_matcher
from haystack_chat_store.errors import ChatHistoryChangedError, StoreUnavailableError
from haystack_chat_store.ids import MAX_ID_LENGTH, branch_prefix
from haystack_chat_store.testing.contract_directory import listed
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, only_where
from haystack_chat_store.testing.messages import user
from haystack_chat_store.transfer import export_histories, import_histories


class Rule17BranchesTest(ContractTest):
    """Rules 17, 21, 22, 23: branches are left out of what is looked at, unless asked for, and go with their history."""

    def _branch(self, store: ClosableStore, calls: Calls, chat_history_id: str) -> str:
        """Write a turn, ask for another answer, and return the id of the branch that keeps the first one."""
        calls.write(store, chat_history_id, [user("question"), ChatMessage.from_assistant("kept")])
        branch: Any = calls.call(
            transcript_matcher, "match_transcript", store, chat_history_id, [user("question")]
        ).branch_id
        calls.write(store, chat_history_id, [ChatMessage.from_assistant("shown")])
        return str(branch)

    def test_lists_and_statistics_leave_branches_out_unless_asked(self, store: ClosableStore, calls: Calls) -> None:
        branch = self._branch(store, calls, "chat")
        calls.write(store, "another", [user("b")])
        assert listed(calls, store) == listed(calls, store, limit=1) == ["another", "chat"]
        assert listed(calls, store, prefix="chat") == ["chat"]
        assert listed(calls, store, prefix=branch) == []
        for limit in (1, 50):
            assert sorted(listed(calls, store, branches=True, limit=limit)) == sorted(["another", "chat", branch])
        assert listed(calls, store, branches=True, prefix=branch) == [branch]
        assert calls.call(store, "get_chat_history", branch).meta == {"branch_of": "chat"}
        cases: list[tuple[dict[str, Any], int, int]] = [
            ({}, 2, 3),
            ({"branches": True}, 3, 5),
            ({"prefix": "chat"}, 1, 2),
        ]
        for options, histories, messages in cases:
            found = calls.call(store, "statistics", **options)
            assert (found.chat_histories, found.messages) == (histories, messages)
            assert sum(found.messages_per_day.values()) == messages
        for name in ("list_chat_histories", "statistics"):
            with pytest.raises(ValueError, match="branches"):
                calls.call(store, name, branches="yes")

    def test_history_is_no_branch_of_itself_however_long_its_id(self, store: ClosableStore, calls: Calls) -> None:
        """The ids of branches have only the beginning of a long id."""
        old, new = (f"{branch_prefix('p' * MAX_ID_LENGTH)}{name}" for name in ("a", "new"))
        calls.write(store, old, [user("a")])
        calls.call(store, "update_chat_history", old, meta={"branch_of": old})
        assert listed(calls, store) == [old]
        calls.call(store, "rename_chat_history", old, new)
        assert listed(calls, store) == listed(calls, store, branches=True) == [new]
        assert calls.count(store, new) == 1

    def test_copy_is_a_branch_from_its_first_moment(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [user("question"), ChatMessage.from_assistant("kept")])
        calls.call(store, "create_chat_history", "chat~2", title="given", meta={"old": True})
        calls.call(store, "create_chat_history", "chat~3", meta={"old": True})
        branch = {"branch_of": "chat", "more": [None, "é"]}
        for target, meta in (("chat~1", branch), ("chat~2", branch), ("chat~3", None), ("fork", {"from": "chat"})):
            assert calls.call(store, "copy_messages", "chat", target, meta=meta) == 2
        infos = {each: calls.call(store, "get_chat_history", each) for each in ("chat~1", "chat~2", "chat~3", "fork")}
        assert [each.meta for each in infos.values()] == [branch, branch, {"old": True}, {"from": "chat"}]
        assert infos["chat~2"].title == "given"
        assert sorted(listed(calls, store)) == ["chat", "chat~3", "fork"]
        calls.write(store, "empty", [user("a")])
        calls.call(store, "delete_messages", "empty", from_message_id=self._first_id(store, calls, "empty"))
        assert calls.call(store, "copy_messages", "empty", "empty~1", meta={"branch_of": "empty"}) == 0
        assert calls.call(store, "get_chat_history", "empty~1") is None
        for wrong in ("chat", ["chat"], {1: object()}):
            with pytest.raises(ValueError, match="meta"):
                calls.call(store, "copy_messages", "chat", "another", meta=wrong)
        calls.call(store, "delete_chat_history", "chat")
        assert sorted(listed(calls, store, branches=True)) == ["chat~3", "empty", "fork"]

    @staticmethod
    def _first_id(store: ClosableStore, calls: Calls, chat_history_id: str) -> Any:
        return calls.retrieve(store, chat_history_id)[0].meta["chat_message_id"]

    def test_match_transcript_makes_no_branch_in_two_steps(
        self, store: ClosableStore, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise StoreUnavailableError("The process has ended.")

        for name in ("update_chat_history", "update_chat_history_async", "delete_messages", "delete_messages_async"):
            monkeypatch.setattr(store, name, refuse)
        calls.write(store, "chat", [user("question"), ChatMessage.from_assistant("kept")])
        with pytest.raises(StoreUnavailableError):
            calls.call(transcript_matcher, "match_transcript", store, "chat", [user("question")])
        assert listed(calls, store) == ["chat"]
        (branch,) = set(listed(calls, store, branches=True)) - {"chat"}
        assert calls.call(store, "get_chat_history", branch).meta == {"branch_of": "chat"}

    def test_history_is_renamed_with_its_branches_by_one_operation(
        self, store: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        branch = self._branch(store, calls, "chat")
        self._branch(store, calls, branch)
        operations: list[str] = []
        for name in ("run", "run_async"):
            run = getattr(store.engine, name)

            def noted(operation: Any, *arguments: Any, run: Any = run) -> Any:
                operations.append(operation.__name__)
                return run(operation, *arguments)

            monkeypatch.setattr(store.engine, name, noted)
        calls.call(store, "rename_chat_history", "chat", "trip")
        assert operations == ["rename_history"]
        monkeypatch.undo()
        assert [each for each in listed(calls, store, branches=True) if not each.startswith("trip")] == []

    def test_branches_follow_a_history_that_is_renamed(self, store: ClosableStore, calls: Calls) -> None:
        branch = self._branch(store, calls, "chat")
        of_branch = self._branch(store, calls, branch)
        calls.call(store, "rename_chat_history", "chat", "trip")
        renamed = [each.replace("chat", "trip", 1) for each in ("chat", branch, of_branch)]
        assert listed(calls, store) == ["trip"]
        assert sorted(listed(calls, store, branches=True)) == sorted(renamed)
        calls.call(store, "delete_chat_history", "trip")
        assert listed(calls, store, branches=True) == []

    def test_branch_that_came_before_its_history_goes_with_it(self, store: ClosableStore, calls: Calls) -> None:
        calls.call(store, "create_chat_history", "chat~1", meta={"branch_of": "chat"})
        calls.write(store, "chat", [user("a")])
        calls.call(store, "delete_chat_history", "chat")
        assert listed(calls, store, branches=True) == []

    def test_history_is_a_branch_by_its_id_and_its_meta(self, store: ClosableStore, calls: Calls) -> None:
        for name in ("chat", "main~3", "chat~3"):
            calls.write(store, name, [user("a")])
        calls.call(store, "update_chat_history", "chat", meta={"branch_of": "main"})  # another application's meta
        calls.call(store, "update_chat_history", "main~3", meta={"branch_of": 3})
        assert sorted(listed(calls, store)) == ["chat", "chat~3", "main~3"]
        calls.call(store, "update_chat_history", "chat~3", meta={"branch_of": "chat", "more": [None]})
        assert sorted(listed(calls, store)) == ["chat", "main~3"]
        calls.call(store, "update_chat_history", "chat~3", title="a title")
        assert sorted(listed(calls, store)) == ["chat", "main~3"]
        calls.call(store, "update_chat_history", "chat~3", meta=None)
        assert sorted(listed(calls, store)) == ["chat", "chat~3", "main~3"]
        calls.delete(store, "chat")
        assert sorted(listed(calls, store)) == ["chat~3", "main~3"]

    def test_branches_go_with_their_history(self, store: ClosableStore, calls: Calls) -> None:
        for name in ("chat", "chat~", "chat~1", "chat~2"):
            calls.write(store, name, [user("another one")])
        branch = self._branch(store, calls, "a/chat")
        of_branch = self._branch(store, calls, branch)
        other = self._branch(store, calls, "a/chat 2")
        long_id = "l" * MAX_ID_LENGTH
        of_long = self._branch(store, calls, long_id)
        revision = calls.call(store, "get_chat_history", "a/chat").revision
        with pytest.raises(ChatHistoryChangedError):
            calls.call(store, "delete_messages", "a/chat", expected_revision=revision + 1)
        assert [calls.count(store, each) > 0 for each in (branch, of_branch)] == [True, True]
        calls.call(store, "delete_messages", "a/chat", expected_revision=revision)
        assert [calls.count(store, each) for each in ("a/chat", branch, of_branch)] == [0, 0, 0]
        calls.call(store, "delete_chat_history", long_id)
        left = ["a/chat 2", other, "chat", "chat~", "chat~1", "chat~2"]
        assert sorted(listed(calls, store, branches=True)) == sorted(left)
        assert calls.count(store, of_long) == 0
        calls.delete(store, other)
        assert calls.count(store, "a/chat 2") == 2

    def test_branches_that_are_left_go_when_the_deletion_is_repeated(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat~5", [user("a")])
        calls.call(store, "update_chat_history", "chat~5", meta={"branch_of": "chat"})
        calls.call(store, "delete_chat_history", "chat")
        assert listed(calls, store, branches=True) == []

    def test_branches_are_erased_with_a_prefix_by_age_and_with_everything(
        self, store: ClosableStore, calls: Calls
    ) -> None:
        self._branch(store, calls, "a/chat")
        self._branch(store, calls, "b/chat")
        assert calls.call(store, "delete_chat_histories", prefix="a/") == 2
        assert len(listed(calls, store, branches=True)) == 2
        later = datetime.now(timezone.utc) + timedelta(minutes=1)
        assert calls.call(store, "purge", older_than=later) == 2
        self._branch(store, calls, "c/chat")
        calls.call(store, "delete_all_messages")
        assert listed(calls, store, branches=True) == []

    @only_where("searches")
    def test_search_leaves_branches_out_unless_asked(self, new_store: StoreFactory, calls: Calls) -> None:
        store: Any = new_store(search=True)
        branch = self._branch(store, calls, "chat")

        def found(query: str, **options: Any) -> set[str]:
            return {hit.chat_history_id for hit in calls.call(store, "search_messages", query, **options)}

        assert found("question") == found("question", prefix="chat") == {"chat"}
        assert found("kept") == found("kept", chat_history_id="chat") == set()
        assert found("question", branches=True) == {"chat", branch}
        assert found("kept", branches=True) == found("kept", chat_history_id=branch) == {branch}
        with pytest.raises(ValueError, match="branches"):
            calls.call(store, "search_messages", "kept", branches=None)
        with pytest.raises(ValueError, match="branches"):
            calls.call(store, "search_messages", "kept", chat_history_id="chat", branches="x")

    def test_exports_have_branches(self, store: ClosableStore, calls: Calls, tmp_path: Path) -> None:
        branch = self._branch(store, calls, "chat")
        exported: Any = store
        assert export_histories(exported, tmp_path / "histories.jsonl").chat_histories == 2
        calls.delete(store, "chat")
        import_histories(exported, tmp_path / "histories.jsonl")
        assert listed(calls, store) == ["chat"]
        assert sorted(listed(calls, store, branches=True)) == ["chat", branch]
        calls.delete(store, "chat")
        assert listed(calls, store, branches=True) == []
