# SPDX-License-Identifier: Apache-2.0
"""
Moving over from haystack-experimental: its examples run with only their imports changed, its defects are gone.

Each defect is shown on its store too, so that the test is known to be able to fail. A test whose part on
haystack-experimental fails says that the defect was mended there.
"""

import copy
import inspect
import re
import threading
import uuid
from types import SimpleNamespace

import pytest
from haystack.dataclasses import ChatMessage, ToolCall
from haystack_experimental.chat_message_stores.in_memory import InMemoryChatMessageStore as ExperimentalStore
from haystack_experimental.components.retrievers import ChatMessageRetriever as ExperimentalRetriever
from haystack_experimental.components.writers import ChatMessageWriter as ExperimentalWriter
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter

from haystack_chat_store import InMemoryChatMessageStore
from haystack_chat_store.ids import MESSAGE_ID_KEY

USER, ASSISTANT = ChatMessage.from_user, ChatMessage.from_assistant

THEIRS = SimpleNamespace(store=ExperimentalStore, retriever=ExperimentalRetriever, writer=ExperimentalWriter)
OURS = SimpleNamespace(store=InMemoryChatMessageStore, retriever=ChatMessageRetriever, writer=ChatMessageWriter)


@pytest.fixture(autouse=True)
def empty_stores():
    """Both keep histories as long as the process, and the examples write to the default ones."""
    yield
    ExperimentalStore().delete_all_messages()
    InMemoryChatMessageStore().delete_all_messages()


IMPORTS = {
    "haystack_experimental.chat_message_stores.in_memory": "haystack_chat_store",
    "haystack_experimental.components.retrievers": "haystack_integrations.components.retrievers.chat_store",
    "haystack_experimental.components.writers": "haystack_integrations.components.writers.chat_store",
}


class TestExamples:
    QUESTION = "Hi, I have a question about Python. What is a Protocol?"

    def run_example(self, documented):
        (example,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(documented), re.DOTALL)
        for theirs, ours in IMPORTS.items():
            example = example.replace(f"from {theirs} import", f"from {ours} import")
        assert "haystack_experimental" not in example
        variables = {}
        exec(example, variables)
        assert type(variables["message_store"]) is InMemoryChatMessageStore
        return variables

    def test_of_the_store(self, capsys):
        retrieved = self.run_example(ExperimentalStore)["retrieved_messages"]
        assert [message.text for message in retrieved] == ["Hello, how can I help you?", self.QUESTION]
        assert self.QUESTION in capsys.readouterr().out

    def test_of_the_retriever(self, capsys):
        retrieved = self.run_example(ExperimentalRetriever)["result"]["messages"]
        assert [message.text for message in retrieved] == [self.QUESTION]  # a model wants the user to speak first
        assert self.QUESTION in capsys.readouterr().out

    def test_of_the_writer(self):
        store = self.run_example(ExperimentalWriter)["message_store"]
        greeting, question = store.retrieve_messages("user_456_session_123")
        assert (greeting.text, question.text) == ("Hello, how can I help you?", "I have a question about Python.")


class MetAtTheDoor(list):
    """Messages that are read only once all threads have begun to read theirs."""

    def __init__(self, messages, door):
        super().__init__(messages)
        self.door = door

    def __iter__(self):
        self.door.wait(60)
        return super().__iter__()


def written_by_threads(kind, threads=4, turns=25):
    """Return all messages of a history that several threads wrote to at the same time, one message at a time each."""
    store, door = kind.store(last_k=None), threading.Barrier(threads)

    def write(name):
        for turn in range(turns):
            store.write_messages("h", MetAtTheDoor([USER(f"{name} {turn}")], door))

    writers = [threading.Thread(target=write, args=(name,)) for name in range(threads)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    return list(store.retrieve_messages("h"))


def ids(messages):
    return {message.meta[MESSAGE_ID_KEY] for message in messages}


def test_no_message_is_lost_and_no_id_given_twice_when_threads_write():
    theirs, ours = written_by_threads(THEIRS), written_by_threads(OURS)
    assert len(ids(theirs)) < 100
    assert len(ids(ours)) == len(ours) == 100
    assert {message.text for message in ours} == {f"{name} {turn}" for name in range(4) for turn in range(25)}


def test_a_new_message_is_never_taken_for_a_stored_one():
    def texts_after_writing_beside_ids_of_ones_own(kind):
        store = kind.store()
        store.write_messages("h", [USER("first", meta={MESSAGE_ID_KEY: "1"})])
        store.write_messages("h", [USER("second")])
        return [message.text for message in store.retrieve_messages("h")]

    assert texts_after_writing_beside_ids_of_ones_own(THEIRS) == ["first"]
    assert texts_after_writing_beside_ids_of_ones_own(OURS) == ["first", "second"]


def test_last_k_of_zero_retrieves_nothing():
    def retrieved(kind):
        store = kind.store()
        store.write_messages("h", [USER("stored")])
        messages = kind.retriever(store).run("h", last_k=0, current_messages=[USER("current")])["messages"]
        return [message.text for message in messages]

    assert retrieved(THEIRS) == ["stored", "current"]
    assert retrieved(OURS) == ["current"]


def test_what_was_handed_out_can_be_changed_without_changing_what_is_stored():
    def count_after_clearing_what_was_retrieved(kind):
        store = kind.store(last_k=None)
        store.write_messages("h", [USER("stored")])
        store.retrieve_messages("h").clear()
        return store.count_messages("h")

    assert count_after_clearing_what_was_retrieved(THEIRS) == 0
    assert count_after_clearing_what_was_retrieved(OURS) == 1


def test_what_was_written_can_be_changed_without_changing_what_is_stored():
    def stored_after_changing_what_was_written(kind):
        store, call = kind.store(), ToolCall("weather", {"city": "Rome"})
        store.write_messages("h", [ASSISTANT(tool_calls=[call])])
        call.arguments["city"] = "Oslo"
        return store.retrieve_messages("h")[0].tool_call.arguments["city"]

    assert stored_after_changing_what_was_written(THEIRS) == "Oslo"
    assert stored_after_changing_what_was_written(OURS) == "Rome"


CALL = ToolCall("weather", {"city": "Rome"}, id="call_1")


@pytest.mark.parametrize(
    "first_round",
    [
        [USER("q0"), ASSISTANT(tool_calls=[CALL]), ChatMessage.from_tool("sunny", CALL)],
        [USER("q0"), ASSISTANT("")],
        [USER("q0"), ASSISTANT(reasoning="Hm.")],
        [USER("q0")],
    ],
    ids=["tool result", "reply without text", "reasoning only", "no reply"],
)
def test_a_round_ends_at_the_next_user_message_however_it_went(first_round):
    def last_round(kind):
        store = kind.store()
        store.write_messages("h", [*first_round, USER("q1"), ASSISTANT("a1")])
        return [message.text for message in store.retrieve_messages("h", last_k=1)]

    assert last_round(THEIRS) == [*(message.text for message in first_round), "q1", "a1"]
    assert last_round(OURS) == ["q1", "a1"]


def test_a_reply_in_several_messages_is_one_round():
    def last_round(kind):
        store = kind.store()
        store.write_messages("h", [USER("q0"), ASSISTANT("a0"), ASSISTANT("and more")])
        return [message.text for message in store.retrieve_messages("h", last_k=1)]

    assert last_round(THEIRS) == ["and more"]
    assert last_round(OURS) == ["q0", "a0", "and more"]


@pytest.mark.parametrize("component", ["retriever", "writer"])
def test_from_dict_does_not_change_its_input(component):
    def is_changed(kind):
        data = getattr(kind, component)(kind.store()).to_dict()
        before = copy.deepcopy(data)
        getattr(kind, component).from_dict(data)
        return data != before

    assert is_changed(THEIRS)
    assert not is_changed(OURS)


@pytest.mark.parametrize(
    "write",
    [lambda kind: kind.store().write_messages, lambda kind: kind.writer(kind.store()).run],
    ids=["store", "writer"],
)
def test_a_generator_is_written(write):
    def count_after_writing_a_generator(kind):
        write(kind)("h", (USER(text) for text in ("q0", "q1")))
        return kind.store().count_messages("h")

    assert count_after_writing_a_generator(THEIRS) == 0
    assert count_after_writing_a_generator(OURS) == 2


def test_our_store_works_in_their_components_and_theirs_in_ours():
    for store, kind in ((InMemoryChatMessageStore(), THEIRS), (ExperimentalStore(), OURS)):
        history = uuid.uuid4().hex
        kind.writer(store).run(history, [USER("q0"), ASSISTANT("a0")])
        loaded = kind.retriever.from_dict(kind.retriever(store).to_dict())
        messages = loaded.run(history, current_messages=[USER("q1")])["messages"]
        assert [message.text for message in messages] == ["q0", "a0", "q1"]
