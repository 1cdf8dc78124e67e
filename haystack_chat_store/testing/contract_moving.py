# SPDX-License-Identifier: Apache-2.0
"""Rule 23: moving histories."""

import asyncio
import dataclasses
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haystack_chat_store import transfer
from haystack_chat_store.errors import ChatHistoryExistsError, DamagedFileError
from haystack_chat_store.stores.in_memory import InMemoryChatMessageStore
from haystack_chat_store.testing.contract_isolation import HOSTILE_IDS
from haystack_chat_store.testing.kit import (
    Calls,
    ClosableStore,
    ContractTest,
    StoreFactory,
    exactly,
    ids,
    number_of_examples,
)
from haystack_chat_store.testing.messages import conversation, sample_messages, user, with_id
from haystack_chat_store.testing.messages import messages as any_messages
from haystack_chat_store.transfer import TransferResult
from haystack_chat_store.types import ChatHistoryPage


class Rule23MovingTest(ContractTest):
    """Rule 23: an export and import keeps histories equal, on any engine."""

    @pytest.fixture(params=["sync", "async"])
    def moving(self, request: pytest.FixtureRequest) -> Any:
        """Return a function that calls a function of `transfer` by its name, synchronously or asynchronously."""

        def call(name: str, *arguments: Any, **options: Any) -> Any:
            if request.param == "sync":
                return getattr(transfer, name)(*arguments, **options)
            return asyncio.run(getattr(transfer, f"{name}_async")(*arguments, **options))

        return call

    @pytest.fixture
    def elsewhere(self) -> Any:
        """Return a store on another engine: in memory."""
        store = InMemoryChatMessageStore(namespace=f"moving {datetime.now(timezone.utc)}")
        yield store
        store.delete_all_messages()

    def test_everything_comes_back_equal(
        self, new_store: StoreFactory, moving: Any, elsewhere: InMemoryChatMessageStore, tmp_path: Path
    ) -> None:
        calls = Calls(is_async=False)
        store = new_store(skip_system_messages=False)
        _fill(calls, store)
        file = tmp_path / "histories.jsonl"
        exported = moving("export_histories", store, file)
        there = calls.call(store, "statistics")
        assert (exported.chat_histories, exported.messages) == (there.chat_histories, there.messages)
        assert exported.chat_histories == len(HOSTILE_IDS) + 4
        for target in (elsewhere, new_store(namespace="other")):
            assert moving("import_histories", target, file) == exported
            assert _contents(calls, target) == _contents(calls, store)
            assert moving("import_histories", target, file).messages == 0
            assert _contents(calls, target) == _contents(calls, store)

    def test_copying_from_engine_to_engine_is_the_same(
        self, new_store: StoreFactory, moving: Any, elsewhere: InMemoryChatMessageStore
    ) -> None:
        calls = Calls(is_async=False)
        store = new_store(skip_system_messages=False)
        _fill(calls, elsewhere)
        assert moving("copy_histories", elsewhere, store).chat_histories == len(HOSTILE_IDS) + 4
        assert _contents(calls, store) == _contents(calls, elsewhere)
        calls.call(store, "delete_chat_histories", prefix="l")
        assert moving("copy_histories", elsewhere, store).chat_histories >= 1
        assert _contents(calls, store) == _contents(calls, elsewhere)

    def test_any_message_survives(self, store: ClosableStore, elsewhere: InMemoryChatMessageStore) -> None:
        calls = Calls(is_async=False)
        # Where the engine lacks an operation, the test is skipped here: hypothesis would look for the least example.
        calls.write(elsewhere, "chat", [user()])
        transfer.copy_histories(elsewhere, store)  # type: ignore[arg-type]  # a protocol
        written = 0

        @settings(
            max_examples=number_of_examples(25),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(any_messages(), min_size=1, max_size=4))
        def move(batch: list[Any]) -> None:
            nonlocal written
            written += 1
            name = f"chat {written}"
            calls.write(elsewhere, name, batch)
            transfer.copy_histories(elsewhere, store, chat_history_ids=[name])  # type: ignore[arg-type]  # a protocol
            assert exactly(calls.retrieve(store, name, last_k=99)) == exactly(
                calls.retrieve(elsewhere, name, last_k=99)
            )

        move()

    def test_windows_and_writing_go_on_after_an_import(
        self, store: ClosableStore, moving: Any, elsewhere: InMemoryChatMessageStore
    ) -> None:
        calls = Calls(is_async=False)
        calls.write(elsewhere, "chat", conversation("ua ucta ua"))
        moving("copy_histories", elsewhere, store)
        known = ids(calls.retrieve(store, "chat"))
        assert calls.write(store, "chat", [with_id(known[3]), with_id("new")]) == 1
        assert ids(calls.retrieve(store, "chat", last_k=2)) == [*known[6:], "new"]
        info = calls.call(store, "get_chat_history", "chat")
        assert (info.message_count, info.round_count) == (9, 4)

    def test_history_that_went_on_is_completed(
        self, store: ClosableStore, moving: Any, elsewhere: InMemoryChatMessageStore
    ) -> None:
        calls = Calls(is_async=False)
        calls.write(elsewhere, "chat", conversation("uaua"))
        moving("copy_histories", elsewhere, store)
        calls.write(elsewhere, "chat", conversation("ua"))
        assert moving("copy_histories", elsewhere, store).messages == 2
        assert ids(calls.retrieve(store, "chat")) == ids(calls.retrieve(elsewhere, "chat"))

    def test_emptied_histories_are_imported_once(
        self, store: ClosableStore, moving: Any, elsewhere: InMemoryChatMessageStore
    ) -> None:
        calls = Calls(is_async=False)
        for name in "ab":
            calls.write(elsewhere, name, [with_id("1")])
            calls.delete(elsewhere, name, from_message_id="1")
        assert _counts(moving("copy_histories", elsewhere, store))[:2] == (2, 0)
        before = _contents(calls, store)
        assert _counts(moving("copy_histories", elsewhere, store))[:2] == (0, 0)
        assert _contents(calls, store) == before

    def test_of_several_histories_only_the_new_ones_are_counted(
        self, store: ClosableStore, moving: Any, elsewhere: InMemoryChatMessageStore
    ) -> None:
        calls = Calls(is_async=False)
        for name in "abc":
            calls.write(elsewhere, name, conversation("ua"))
        moving("copy_histories", elsewhere, store, chat_history_ids=["c"])
        assert _counts(moving("copy_histories", elsewhere, store))[:3] == (2, 4, 2)

    def test_history_that_has_something_else_stays_as_it_is(
        self, store: ClosableStore, moving: Any, elsewhere: InMemoryChatMessageStore
    ) -> None:
        calls = Calls(is_async=False)
        for name in "abc":
            calls.write(elsewhere, name, conversation("ua"))
        calls.write(store, "b", [user("mine")])
        with pytest.raises(ChatHistoryExistsError, match="'b'"):
            moving("copy_histories", elsewhere, store)
        assert [calls.count(store, name) for name in "abc"] == [2, 1, 2]

    @pytest.mark.parametrize("damage", ["cut", "changed", "nothing"])
    def test_damaged_file_changes_nothing(
        self, new_store: StoreFactory, moving: Any, tmp_path: Path, damage: str
    ) -> None:
        calls = Calls(is_async=False)
        store, target = new_store(), new_store(namespace="other")
        for name in "abc":
            calls.write(store, name, conversation("ua"))
        file = tmp_path / "histories.jsonl"
        moving("export_histories", store, file)
        data = file.read_bytes()
        middle = len(data) // 2
        damaged = {"cut": data[:middle], "changed": data[:middle] + b"#" + data[middle + 1 :], "nothing": b""}
        file.write_bytes(damaged[damage])
        with pytest.raises(DamagedFileError):
            moving("import_histories", target, file)
        assert calls.call(target, "list_chat_histories") == ChatHistoryPage(items=[], cursor=None)


def _fill(calls: Calls, store: Any) -> None:
    for name in HOSTILE_IDS:
        calls.write(store, name, [user(name)])
    calls.write(store, "long", [*conversation("ucta" * 376)])
    calls.write(store, "of all kinds", list(sample_messages().values()))
    calls.call(store, "update_chat_history", "long", title="Grüße\n👋", meta={"a": [1, {"\ud800": 2**70}]})
    calls.write(store, "with gaps", [with_id(str(number)) for number in range(13)])
    calls.delete(store, "with gaps", message_ids=["0", "5"])
    calls.write(store, "emptied", [with_id("1")])
    calls.call(store, "update_chat_history", "emptied", title="kept")
    calls.delete(store, "emptied", from_message_id="1")


def _contents(calls: Calls, store: Any) -> Any:
    """Return all histories with their messages, without positions and revisions, which an import assigns anew."""
    found = {}
    page = calls.call(store, "list_chat_histories", limit=1000)
    for info in page.items:
        stored = calls.iterate(store, info.chat_history_id)
        times = [each.created_at for each in stored]
        messages = exactly([each.message for each in stored])
        found[info.chat_history_id] = (dataclasses.replace(info, revision=0), messages, times)
    return found


def _counts(result: TransferResult) -> tuple[int, int, int]:
    return result.chat_histories, result.messages, result.skipped
