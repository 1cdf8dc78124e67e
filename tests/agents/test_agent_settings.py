# SPDX-License-Identifier: Apache-2.0
"""Saving that fails; settings, YAML, and the life of the hooks."""

import asyncio
import copy
import itertools
import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
from agent_programs import ScriptedModel, run_sync
from agent_runs import agent_with, asked, call, reply, result, says, stored_in, user
from haystack import DeserializationError, Pipeline
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.components.generators.utils import print_streaming_chunk
from haystack.hooks.tool_result_offloading import AlwaysOffload, FileSystemToolResultStore, ToolResultOffloadHook
from haystack.token_counters import ApproximateTokenCounter
from haystack_integrations.hooks.chat_store import ChatHistoryLoader, ChatHistorySaver, chat_history_hooks
from versions import STRICTLY

from haystack_chat_store import (
    ChatMessageStoreError,
    InMemoryChatMessageStore,
    SQLiteChatMessageStore,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.errors import MessageEncodingError

# ---------------------------------------------------------------------- saving fails


def test_a_run_fails_if_saving_does(failing_store, run):
    failing_store.failures.append(ChatMessageStoreError("The disk is full."))
    agent = agent_with(failing_store, reply("Hello!"))
    with pytest.raises(ChatMessageStoreError, match="disk is full"):
        run(agent, [user("Hi")])
    assert agent.chat_generator.asked == []


@pytest.mark.parametrize("times", range(1, 5))
def test_a_run_can_go_on_though_saving_fails_and_saves_later(failing_store, run, times, caplog):
    failing_store.failures += [ChatMessageStoreError("The disk is full."), RuntimeError("Secret: Look!")] * 2
    del failing_store.failures[times:]
    agent = agent_with(failing_store, reply(None, call("a")), reply("Done."), hook_options={"raise_on_failure": False})
    with caplog.at_level(logging.ERROR):
        assert run(agent, [user("Look!")])["last_message"].text == "Done."
    assert says(stored_in(failing_store)) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == times
    for number, text in enumerate(logged):
        assert ("RuntimeError" if number % 2 else "The disk is full.") in text
    assert "Look!" not in caplog.text


class LosingStore(InMemoryChatMessageStore):
    """A store whose writes fail, or are done and lose their answer, as they are told to."""

    outcomes = ()

    def write_messages(self, *arguments, **options):
        outcome, *self.outcomes = self.outcomes or [None]
        if outcome == "fails":
            raise StoreUnavailableError("The server is away.")
        written = super().write_messages(*arguments, **options)
        if outcome == "is lost":
            raise StoreTimeoutError("The server did not answer.")
        return written

    async def write_messages_async(self, *arguments, **options):
        return self.write_messages(*arguments, **options)


@pytest.mark.parametrize("context", [{}, {"expected_revision": 0}])
def test_a_run_that_goes_on_though_saving_fails_takes_its_own_lost_writes_for_its_own(run, context):
    question, steps = user("Look!", chat_message_id="q"), [reply(None, call("a")), result("a"), reply("Done.")]
    for number, outcomes in enumerate(itertools.product(["is done", "fails", "is lost"], repeat=4)):
        store = LosingStore(namespace=f"losing {number}")
        store.delete_all_messages()
        store.outcomes = outcomes
        agent = agent_with(store, steps[0], steps[2], hook_options={"raise_on_failure": False})
        outcome = run(agent, [question], hook_context={"chat_history_id": "h", **context})
        assert outcome["last_message"].text == "Done.", outcomes
        assert says(stored_in(store)) == says([question, *steps]), outcomes


def test_a_run_whose_own_question_was_lost_still_finds_the_answer_of_another(run):
    store = LosingStore(namespace="losing")
    store.delete_all_messages()
    question = user("Look!", chat_message_id="q")

    def while_another_answers(_messages):
        run(agent_with(store, reply("Theirs.")), [])
        return reply("Ours.")

    store.outcomes = ["is lost"]
    agent = agent_with(store, while_another_answers, hook_options={"raise_on_failure": False})
    assert run_sync(agent, [question])["last_message"].text == "Theirs."
    assert says(stored_in(store)) == says([question, reply("Theirs.")])


def test_what_cannot_be_stored_is_left_out_if_the_run_shall_go_on(store, run, caplog):
    replies = [reply(None, call("a")), reply("Done.")]
    agent = agent_with(store, *replies, hook_options={"raise_on_failure": False})
    unclear = [user("Look!"), reply("At what?", clock=10**4300), user("At a. Secret!")]
    with caplog.at_level(logging.ERROR):
        run(agent, unclear)
    expected = [unclear[0], unclear[2], reply(None, call("a")), result("a"), reply("Done.")]
    assert says(stored_in(store)) == says(expected)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1
    assert "cannot be saved" in logged[0]
    assert "clock" in logged[0]
    assert "At what?" not in caplog.text


def test_a_message_with_an_id_that_no_store_takes_is_left_out_and_costs_no_other(store, run, caplog):
    agent = agent_with(store, reply("Done.", chat_message_id="y" * 600), hook_options={"raise_on_failure": False})
    with caplog.at_level(logging.ERROR):
        run(agent, [user("Look!")])
    assert says(stored_in(store)) == says([user("Look!")])
    assert "chat_message_id" in caplog.text


def test_if_saving_fails_after_a_message_was_left_out_the_rest_is_saved_later(failing_store, run):
    agent = agent_with(failing_store, reply("Done."), hook_options={"raise_on_failure": False})
    failing_store.failures += [MessageEncodingError("No form."), MessageEncodingError("No form.")]
    failing_store.failures += [ChatMessageStoreError("The disk is full.")]
    run(agent, [user("1"), user("2"), user("3")])
    assert says(stored_in(failing_store)) == says([user("2"), user("3"), reply("Done.")])


def test_what_could_not_be_saved_is_saved_whole_though_it_was_offloaded_meanwhile(failing_store, run, tmp_path):
    offloading = ToolResultOffloadHook(FileSystemToolResultStore(str(tmp_path / "results")), {"*": AlwaysOffload()})
    agent = agent_with(
        failing_store,
        reply(None, call("a")),
        reply("Done."),
        hooks={"after_tool": [offloading]},
        hook_options={"raise_on_failure": False},
    )
    failing_store.failures += [ChatMessageStoreError("The disk is full.")] * 3
    run(agent, [user("Look!")])
    assert says(stored_in(failing_store)) == says([user("Look!"), reply(None, call("a")), result("a"), reply("Done.")])


def test_a_run_fails_if_loading_does(tmp_path, run):
    store = SQLiteChatMessageStore(tmp_path / "no folder" / "h.db")
    agent = agent_with(store, reply("Hello!"), hook_options={"raise_on_failure": False})
    with pytest.raises(ChatMessageStoreError):
        run(agent, [user("Hi")])
    assert agent.chat_generator.asked == []


# ---------------------------------------------------------------------- settings, YAML, life


@pytest.mark.parametrize(
    "settings",
    [
        {"last_k": -1},
        {"last_k": "2"},
        {"max_tokens": 0},
        {"token_counter": object()},
        {"window_step": 0},
        {"model": ""},
        {"raise_on_failure": "never"},
        {"exit_conditions": "book"},
        {"exit_conditions": [1]},
        {"chat_message_store": object()},
        {"chat_message_store": SQLiteChatMessageStore},
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        chat_history_hooks(**{"chat_message_store": SQLiteChatMessageStore(tmp_path / "h.db"), **settings})


def test_the_hooks_stand_only_where_they_make_sense(tmp_path):
    store = SQLiteChatMessageStore(tmp_path / "h.db")
    for point, one in (("before_llm", ChatHistorySaver(store)), ("after_run", ChatHistoryLoader(store))):
        with pytest.raises(ValueError, match=point):
            Agent(chat_generator=ScriptedModel(), hooks={point: [one]})


def test_the_hooks_are_serialized_with_their_store_and_all_settings(tmp_path):
    store = SQLiteChatMessageStore(tmp_path / "h.db", namespace="n")
    loader = ChatHistoryLoader(
        store,
        5,
        max_tokens=900,
        token_counter=ApproximateTokenCounter(),
        window_step=3,
        exit_conditions=["look_up"],
    )
    saver = ChatHistorySaver(store, raise_on_failure=False)
    for one in (loader, saver):
        data = one.to_dict()
        before = copy.deepcopy(data)
        again = type(one).from_dict(data)
        assert data == before
        assert again.to_dict() == data == json.loads(json.dumps(data))
        assert again.chat_message_store == store
    parameters = loader.to_dict()["init_parameters"]
    assert (parameters["last_k"], parameters["max_tokens"], parameters["window_step"]) == (5, 900, 3)
    assert parameters["exit_conditions"] == ["look_up"]
    assert saver.to_dict()["init_parameters"]["raise_on_failure"] is False


@pytest.mark.parametrize("kind", [ChatHistoryLoader, ChatHistorySaver])
def test_without_a_store_nothing_is_made(kind):
    name = f"{kind.__module__}.{kind.__name__}"
    with pytest.raises(DeserializationError, match="chat_message_store"):
        kind.from_dict({"type": name, "init_parameters": {}})


# Nothing of ours is imported here.
SCRIPT = """
import sys
from haystack import Pipeline
from haystack.dataclasses import ChatMessage

pipeline = Pipeline.loads(sys.stdin.read())
data = {"messages": [ChatMessage.from_user(sys.argv[1])], "hook_context": {"chat_history_id": "h"}}
print(len(pipeline.run({"agent": data})["agent"]["messages"]))
pipeline.close()
"""


def test_an_agent_with_a_memory_loads_from_yaml_in_a_process_that_knows_nothing_of_us(tmp_path):
    store = SQLiteChatMessageStore(tmp_path / "h.db", last_k=None)
    pipeline = Pipeline()
    agent = Agent(
        chat_generator=MockChatGenerator("Hello!"),
        hooks=chat_history_hooks(store, max_tokens=1000, window_step=2, exit_conditions=["text"]),
        streaming_callback=print_streaming_chunk,
    )
    pipeline.add_component("agent", agent)
    numbers = []
    for question in ("Hi", "Really?"):
        command = [sys.executable, *STRICTLY, "-c", SCRIPT, question]
        finished = subprocess.run(
            command, input=pipeline.dumps(), capture_output=True, text=True, check=False, timeout=300
        )
        assert finished.returncode == 0, finished.stderr
        numbers.append(int(finished.stdout.split()[-1]))
    assert numbers == [2, 4]
    assert [message.text for message in stored_in(store)] == ["Hi", "Hello!", "Really?", "Hello!"]
    store.close()


def test_closing_the_agent_closes_the_store_and_the_next_run_opens_it(store, run):
    agent = agent_with(store, reply("Hello!"), reply("Yes."))
    run(agent, [user("Hi")])
    agent.close()
    asyncio.run(agent.close_async())
    run(agent, [user("Really?")])
    assert store.count_messages("h") == 4


def test_the_token_counter_is_warmed_up(tmp_path):
    class Counter(ApproximateTokenCounter):
        is_warm = False

        def warm_up(self):
            self.is_warm = True

    counter = Counter()
    agent = agent_with(
        SQLiteChatMessageStore(tmp_path / "h.db"), hook_options={"max_tokens": 9, "token_counter": counter}
    )
    agent.warm_up()
    assert counter.is_warm


@pytest.mark.parametrize("keeps_meta", [True, False])
def test_a_store_that_only_follows_the_protocol_is_enough(run, keeps_meta):
    class ListStore:
        def __init__(self):
            self.messages = {}

        def to_dict(self):
            return {}

        @classmethod
        def from_dict(cls, data):
            return cls()

        def count_messages(self, chat_history_id):
            return len(self.messages.get(chat_history_id, []))

        def write_messages(self, chat_history_id, messages):
            kept = messages if keeps_meta else [replace(message, _meta={}) for message in messages]
            self.messages.setdefault(chat_history_id, []).extend(kept)
            return len(messages)

        def retrieve_messages(self, chat_history_id, last_k=None):
            return list(self.messages.get(chat_history_id, []))

        def delete_messages(self, chat_history_id):
            del self.messages[chat_history_id]

        def delete_all_messages(self):
            self.messages.clear()

    store = ListStore()
    agent = agent_with(store, reply(None, call("a")), reply("Done."), reply("Yes."))
    run(agent, [user("Look!")])
    run(agent, [user("Really?")])
    turn = [user("Look!"), reply(None, call("a")), result("a"), reply("Done.")]
    assert asked(agent) == says([*turn, user("Really?")])
    assert says(store.messages["h"]) == says([*turn, user("Really?"), reply("Yes.")])
