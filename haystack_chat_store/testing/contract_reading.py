# SPDX-License-Identifier: Apache-2.0
"""Reading never writes: rule 24."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haystack_chat_store import doctor, transfer
from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, only_where
from haystack_chat_store.testing.messages import conversation, user

#: Returns everything that is in the database, in any form that can be compared.
DatabaseState = Callable[[], Any]


class Rule24ReadingTest(ContractTest):
    """Rule 24: calls that read change nothing in the database."""

    #: Override it with a fixture that returns a function. The function returns everything that is in the database: its
    #: tables, keys or files, in any form that can be compared. Tests that need it exist only where it is overridden.
    database_state: Any = None

    @only_where("database_state")
    def test_calls_that_read_change_nothing(
        self, new_store: StoreFactory, calls: Calls, database_state: DatabaseState, tmp_path: Path
    ) -> None:
        fill(new_store(), calls).close()
        before = database_state()
        for search in {False, self.searches}:
            store = new_store(search=search)
            for _ in range(2):  # the second time, what the first has opened is used
                read = read_all(store, calls, tmp_path)
                assert (read["retrieved"], read["counted"], read["walked"], read["checked"]) == (4, 4, 4, 0)
                assert (read["listed"], read["exported"]) == (2, 2)
                assert database_state() == before
            store.close()
            assert database_state() == before

    @only_where("database_state")
    def test_what_was_never_written_reads_as_empty_and_is_not_made(
        self, new_store: StoreFactory, calls: Calls, database_state: DatabaseState, tmp_path: Path
    ) -> None:
        before = database_state()
        for search in {False, self.searches}:
            store = new_store(search=search)
            assert not any(read_all(store, calls, tmp_path).values())
            if search:
                assert calls.call(store, "search_messages", "needle") == []
            store.close()
        assert database_state() == before
        fill(new_store(), calls)
        assert calls.count(new_store(), "chat") == 4

    @only_where("searches")
    def test_search_does_not_index(self, new_store: StoreFactory, calls: Calls) -> None:
        calls.write(new_store(), "chat", [user("needle")])
        searching = new_store(search=True)
        for _ in range(2):
            try:  # an engine may search without an index
                hits = calls.call(searching, "search_messages", "needle")
            except UnsupportedOperationError as error:
                assert "index_messages()" in str(error)
            else:
                assert len(hits) == 1
        calls.call(searching, "index_messages")
        assert len(calls.call(searching, "search_messages", "needle")) == 1


def fill(store: ClosableStore, calls: Calls) -> ClosableStore:
    """Write two histories, one of which has a title and had a message deleted."""
    messages = conversation("uauau")
    calls.write(store, "chat", messages)
    calls.write(store, "other", [user("needle")])
    last = calls.retrieve(store, "chat")[-1].meta["chat_message_id"]
    calls.delete(store, "chat", message_ids=[last])
    calls.call(store, "update_chat_history", "chat", title="A title")
    return store


def read_all(store: Any, calls: Calls, folder: Path) -> dict[str, int]:
    """Read in every way, and return how much each found."""
    with open(os.devnull, "wb") as nowhere:
        exported = transfer.export_to(store, nowhere).chat_histories
    exported += transfer.export_histories(store, folder / "export.jsonl").chat_histories - exported
    if store.search:
        try:
            calls.call(store, "search_messages", "needle")
        except UnsupportedOperationError as error:
            assert "index_messages()" in str(error)
    return {
        "retrieved": len(calls.retrieve(store, "chat", last_k=None)),
        "counted": calls.count(store, "chat"),
        "named": int(calls.call(store, "get_chat_history", "chat") is not None),
        "listed": len(calls.call(store, "list_chat_histories").items),
        "with prefix": len(calls.call(store, "list_chat_histories", prefix="ch").items),
        "messages": len(calls.call(store, "list_messages", "chat")),
        "walked": len(calls.iterate(store, "chat")),
        "counted in all": calls.call(store, "statistics").messages,
        "exported": exported,
        "checked": len(doctor.check(store)),
    }
