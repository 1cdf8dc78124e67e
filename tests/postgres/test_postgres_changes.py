# SPDX-License-Identifier: Apache-2.0
"""What several do to the same histories at once: edits, forks, erasing."""

import threading
from contextlib import ExitStack

import psycopg
import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from imported import assert_sound
from postgres_stores import DIRECTLY_OR_POOLED, NEWEST_AND_OLDEST, say, statements_of, stores_on
from servers import wait_until

from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    ChatHistoryExistsError,
    DuplicateMessageError,
    MessageNotFoundError,
)
from haystack_chat_store.stores.postgres.schema import history_key
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.messages import with_id
from haystack_chat_store.testing.processes import Program

VERSIONS = NEWEST_AND_OLDEST
WAYS = DIRECTLY_OR_POOLED


# ---------------------------------------------------------------------- beside each other


def test_copies_in_both_directions_at_once_disturb_each_other_not(server, make_store):
    store = make_store()

    def copy(source, target):
        for _ in range(60):
            try:
                store.copy_messages(source, target)
                store.delete_messages(target, message_ids=[f"{number}" for number in range(5)])
            except ChatHistoryExistsError:
                pass

    store.write_messages("a", [with_id(f"{number}") for number in range(5)])
    store.write_messages("b", [with_id("x")])
    store.delete_messages("b", message_ids=["x"])
    in_threads(*[lambda: copy("a", "b"), lambda: copy("b", "a")] * 2)
    assert_sound(server, store)


def change_at_random(store, report, seed):
    import random

    from haystack.dataclasses import ChatMessage
    from haystack.document_stores.types import DuplicatePolicy

    from haystack_chat_store.errors import ConflictError, MessageNotFoundError

    choose = random.Random(seed)
    done = 0
    for number in range(150):
        history, other = choose.choice("abc"), choose.choice("abc")
        some = [f"{choose.randrange(30)}" for _ in range(3)]
        role = choose.choice([ChatMessage.from_user, ChatMessage.from_assistant])
        messages = [role(f"{seed} {number}", meta={"chat_message_id": message_id}) for message_id in some]
        info = store.get_chat_history(history)
        revision = 0 if info is None else info.revision
        try:
            choose.choice(
                [
                    lambda history=history, messages=messages: store.write_messages(history, messages),
                    lambda history=history, messages=messages: store.write_messages(
                        history, messages, policy=DuplicatePolicy.OVERWRITE
                    ),
                    lambda history=history, messages=messages, revision=revision: store.write_messages(
                        history, messages, expected_revision=revision
                    ),
                    lambda history=history, messages=messages, some=some: store.replace_messages(
                        history, some[0], messages
                    ),
                    lambda history=history, some=some: store.delete_messages(history, message_ids=some),
                    lambda history=history, some=some: store.delete_messages(history, from_message_id=some[0]),
                    lambda history=history, other=other: store.copy_messages(history, other),
                    lambda history=history: store.delete_messages(history),
                    lambda: store.search_messages(f"{seed}"),
                ]
            )()
            done += 1
        except (ConflictError, MessageNotFoundError, LookupError):
            pass
    report(done)


def test_processes_that_change_the_same_histories_at_once_leave_them_sound(server, make_store):
    store = make_store(search=True)
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(change_at_random, store, seed)) for seed in range(4)]
        Program.begin(*programs)
        assert all(program.reports_to_the_end()[0] > 50 for program in programs)
    assert_sound(server, store)
    for seed in range(4):
        hits = store.search_messages(f"{seed}", limit=1000)
        assert {(hit.chat_history_id, hit.message_id) for hit in hits} == {
            (history, message.meta["chat_message_id"])
            for history in "abc"
            for message in store.retrieve_messages(history)
            if f"{seed}" in message.text.split()
        }


def test_of_two_who_expect_the_same_revision_one_writes(server, make_store):
    store = make_store()
    say(store, "question")
    outcomes = []

    def answer():
        try:
            outcomes.append(store.write_messages("history", [ChatMessage.from_user("answer")], expected_revision=1))
        except ChatHistoryChangedError:
            outcomes.append(None)

    in_threads(*[answer] * 8)
    assert sorted(outcomes, key=str) == [1, *[None] * 7]


@pytest.mark.parametrize("expected", [None, 0], ids=["any", "none"])
def test_a_history_that_is_deleted_while_a_write_waits_begins_anew_with_a_greater_revision(
    server, make_store, expected
):
    store = make_store()
    for _ in range(5):
        say(store, "question")
    revision = store.get_chat_history("history").revision
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with psycopg.connect(server.url) as other:
        other.execute(
            statements_of(store)["delete_histories"], {"keys": [history_key(store.scope, "history")], "user": None}
        )
        other.execute(statements_of(store)["delete_messages"], [[history_key(store.scope, "history")]])

        def delete():
            wait_until(lambda: server.execute(waiting) == [(1,)], "the write to wait")
            other.commit()

        def write():
            return store.write_messages("history", [with_id("a")], expected_revision=expected)

        assert in_threads(write, delete)[0] == 1
    assert store.count_messages("history") == 1
    assert store.get_chat_history("history").revision > revision
    assert_sound(server, store)


def test_of_two_who_begin_the_same_history_one_does(server, make_store):
    store = make_store()
    outcomes = []

    def begin(number):
        try:
            store.write_messages(f"history {number}", [ChatMessage.from_user("Hi!")], expected_revision=0)
            outcomes.append(number)
        except ChatHistoryChangedError:
            pass

    for number in range(20):
        in_threads(*[lambda number=number: begin(number)] * 3)
    assert sorted(outcomes) == list(range(20))


def test_a_batch_beside_a_rewind_is_there_whole_or_from_where_it_was_rewound_on_gone(server, make_store):
    """What a writer found to be there may be gone when it writes the rest."""
    store = make_store()
    done = threading.Event()

    def write():
        for number in range(150):
            store.write_messages("history", [with_id(f"first {number}")])
            store.write_messages("history", [with_id(f"first {number}"), with_id(f"second {number}")])
            found = [message.meta["chat_message_id"] for message in store.retrieve_messages("history")]
            assert (f"first {number}" in found) >= (f"second {number}" in found)
        done.set()

    def rewind():
        while not done.is_set():
            for stored in store.list_messages("history", limit=1):
                try:
                    store.delete_messages("history", from_message_id=stored.message.meta["chat_message_id"])
                except MessageNotFoundError:
                    pass

    in_threads(write, rewind)
    assert_sound(server, store)


async def process_of(session):
    return session.connection.info.backend_pid


def test_what_is_refused_costs_no_connection(server):
    with stores_on(server.url, last_k=None) as make:
        store = make()
        store.write_messages("history", [with_id("a")])
        before = store.engine.run(process_of)
        for _ in range(3):
            with pytest.raises(DuplicateMessageError):
                store.write_messages("history", [with_id("a")], policy=DuplicatePolicy.FAIL)
            with pytest.raises(ChatHistoryChangedError):
                store.write_messages("other", [with_id("a")], expected_revision=5)
            with pytest.raises(MessageNotFoundError):
                store.delete_messages("history", from_message_id="none")
        assert store.engine.run(process_of) == before
        assert store.get_chat_history("other") is None


# ---------------------------------------------------------------------- forking


def test_a_fork_of_nothing_changes_nothing(server, make_store):
    store = make_store()
    for history in ("empty", "another"):
        store.write_messages(history, [with_id("a")])
        store.delete_messages(history, message_ids=["a"])
    before = store.engine.run(store.engine.history, store.scope, "another")
    assert store.copy_messages("empty", "another") == store.copy_messages("empty", "new") == 0
    assert store.get_chat_history("new") is None
    assert store.engine.run(store.engine.history, store.scope, "another") == before


def test_the_positions_of_a_fork_go_on_where_its_target_ended_without_the_gaps_of_its_source(server, make_store):
    store = make_store()
    store.write_messages("source", [with_id(f"{number}") for number in range(6)])
    store.delete_messages("source", message_ids=["0", "3"])
    store.write_messages("target", [with_id("a"), with_id("b")])
    store.delete_messages("target", message_ids=["a", "b"])
    assert store.copy_messages("source", "target") == 4
    assert [stored.position for stored in store.list_messages("target")] == [2, 3, 4, 5]
    assert_sound(server, store)
