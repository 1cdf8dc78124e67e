# SPDX-License-Identifier: Apache-2.0
"""
The components in pipelines: connected in Python, dumped and loaded, and as YAML in a process that knows nothing of us.
"""

import asyncio
import json
import uuid

import pytest
from haystack import Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage, ToolCall
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from strict_model import StrictChatGenerator
from versions import STRICTLY

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.testing.fork_server import run_python

YAML = """
components:
  prompt_builder:
    type: haystack.components.builders.chat_prompt_builder.ChatPromptBuilder
    init_parameters:
      template:
        - role: system
          content:
            - text: Be brief.
        - role: user
          content:
            - text: "{{ question }}"
  retriever:
    type: haystack_integrations.components.retrievers.chat_store.chat_message_retriever.ChatMessageRetriever
    init_parameters:
      last_k: 2
      chat_message_store: &store
        type: %(store_type)s
        init_parameters: %(settings)s
  llm:
    type: haystack.components.generators.chat.mock.MockChatGenerator
    init_parameters: {}
  writer:
    type: haystack_integrations.components.writers.chat_store.chat_message_writer.ChatMessageWriter
    init_parameters:
      chat_message_store: *store
connections:
  - {sender: prompt_builder.prompt, receiver: retriever.current_messages}
  - {sender: prompt_builder.prompt, receiver: writer.messages}
  - {sender: retriever.messages, receiver: llm.messages}
  - {sender: llm.replies, receiver: writer.replies}
"""

# Nothing of ours is imported here. It reads the YAML text, asks, and prints for each question what the model was sent.
SCRIPT = """
import json, sys
from haystack import Pipeline

pipeline = Pipeline.loads(sys.stdin.read())
for question in sys.argv[1:]:
    inputs = {
        "prompt_builder": {"question": question},
        "retriever": {"chat_history_id": "h"},
        "writer": {"chat_history_id": "h"},
    }
    outputs = pipeline.run(inputs, include_outputs_from={"retriever"})
    print(json.dumps([message.text for message in outputs["retriever"]["messages"]]))
pipeline.close()
"""


def sqlite_yaml(path):
    store_type = "haystack_chat_store.stores.sqlite.SQLiteChatMessageStore"
    return YAML % {"store_type": store_type, "settings": json.dumps({"path": str(path)})}


def in_memory_yaml(namespace):
    store_type = "haystack_chat_store.stores.in_memory.InMemoryChatMessageStore"
    return YAML % {"store_type": store_type, "settings": json.dumps({"namespace": namespace})}


def asked_in_another_process(yaml_text, *questions):
    finished = run_python(
        [*STRICTLY, "-c", SCRIPT, *questions],
        input=yaml_text,
        capture_output=True,
        text=True,
        timeout=300,
        preload=["haystack"],
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def chat_pipeline(store, llm):
    pipeline = Pipeline()
    template = [ChatMessage.from_system("Be brief."), ChatMessage.from_user("{{ question }}")]
    pipeline.add_component("prompt_builder", ChatPromptBuilder(template, required_variables=["question"]))
    pipeline.add_component("retriever", ChatMessageRetriever(store, last_k=2))
    pipeline.add_component("llm", llm)
    pipeline.add_component("writer", ChatMessageWriter(store))
    pipeline.connect("prompt_builder.prompt", "retriever.current_messages")
    pipeline.connect("prompt_builder.prompt", "writer.messages")
    pipeline.connect("retriever.messages", "llm.messages")
    pipeline.connect("llm.replies", "writer.replies")
    return pipeline


def inputs(question, chat_history_id="h"):
    return {
        "prompt_builder": {"question": question},
        "retriever": {"chat_history_id": chat_history_id},
        "writer": {"chat_history_id": chat_history_id},
    }


def run_sync(pipeline, *arguments, **options):
    return pipeline.run(*arguments, **options)


def run_async(pipeline, *arguments, **options):
    return asyncio.run(pipeline.run_async(*arguments, **options))


@pytest.fixture(params=[run_sync, run_async], ids=["sync", "async"])
def run(request):
    return request.param


@pytest.fixture(params=["in memory", "sqlite"])
def store(request, tmp_path):
    if request.param == "in memory":
        store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex)
    else:
        store = SQLiteChatMessageStore(tmp_path / "h.db")
    yield store
    store.close()


def texts(messages):
    return [message.text for message in messages]


def stored_in(path):
    store = SQLiteChatMessageStore(path, last_k=None)
    try:
        return texts(store.retrieve_messages("h"))
    finally:
        store.close()


class TestConnected:
    def test_each_turn_sees_the_last_rounds_and_is_stored_question_first(self, run, store):
        pipeline = chat_pipeline(store, StrictChatGenerator())
        for question in ("q0", "q1", "q2", "q3"):
            outputs = run(pipeline, inputs(question), include_outputs_from={"llm"})
            assert outputs["writer"]["messages_written"] == 2
            assert texts(outputs["writer"]["messages"]) == ["Be brief.", question, outputs["llm"]["replies"][0].text]
        assert outputs["llm"]["replies"][0].text == "You said: q1, q2, q3."
        expected = ["q2", "You said: q0, q1, q2.", "q3", "You said: q1, q2, q3."]
        assert texts(store.retrieve_messages("h", last_k=2)) == expected

    def test_histories_do_not_mix(self, run, store):
        pipeline = chat_pipeline(store, StrictChatGenerator())
        run(pipeline, inputs("q0", "someone"))
        outputs = run(pipeline, inputs("q1", "someone else"), include_outputs_from={"llm"})
        assert outputs["llm"]["replies"][0].text == "You said: q1."

    def test_a_call_that_nobody_answered_does_not_spoil_the_history(self, run, store):
        call = ChatMessage.from_assistant(tool_calls=[ToolCall("weather", {}, id="call_1")])
        run(chat_pipeline(store, MockChatGenerator(call)), inputs("q0"))
        outputs = run(chat_pipeline(store, StrictChatGenerator()), inputs("q1"), include_outputs_from={"llm"})
        assert outputs["llm"]["replies"][0].text == "You said: q0, q1."
        assert store.retrieve_messages("h")[1].tool_calls == call.tool_calls

    def test_last_k_can_be_given_with_a_run(self, run, store):
        pipeline = chat_pipeline(store, StrictChatGenerator())
        run(pipeline, inputs("q0"))
        data = inputs("q1")
        data["retriever"]["last_k"] = 0
        outputs = run(pipeline, data, include_outputs_from={"llm"})
        assert outputs["llm"]["replies"][0].text == "You said: q1."


class TestDumped:
    def test_loads_equal_and_goes_on_where_it_was(self, run, store):
        pipeline = chat_pipeline(store, MockChatGenerator("a"))
        run(pipeline, inputs("q0"))
        loaded = Pipeline.loads(pipeline.dumps())
        assert loaded.to_dict()["components"] == pipeline.to_dict()["components"]
        assert Pipeline.loads(loaded.dumps()) == loaded
        outputs = run(loaded, inputs("q1"), include_outputs_from={"retriever"})
        assert texts(outputs["retriever"]["messages"]) == ["Be brief.", "q0", "a", "q1"]

    def test_can_be_loaded_from_one_dict_twice(self, store):
        data = chat_pipeline(store, MockChatGenerator("a")).to_dict()
        assert Pipeline.from_dict(data) == Pipeline.from_dict(data)

    def test_loading_opens_nothing(self, tmp_path):
        pipeline = Pipeline.loads(sqlite_yaml(tmp_path / "h.db"))
        Pipeline.loads(pipeline.dumps())
        pipeline.close()
        assert list(tmp_path.iterdir()) == []
        Pipeline.loads(sqlite_yaml(tmp_path / "no such folder" / "h.db"))

    def test_the_two_in_memory_stores_of_a_loaded_pipeline_see_each_other(self, run):
        pipeline = Pipeline.loads(in_memory_yaml(uuid.uuid4().hex))
        run(pipeline, inputs("q0"))
        outputs = run(pipeline, inputs("q1"), include_outputs_from={"retriever"})
        assert texts(outputs["retriever"]["messages"]) == ["Be brief.", "q0", "q0", "q1"]

    def test_the_two_sqlite_stores_of_a_loaded_pipeline_see_each_other(self, run, tmp_path):
        pipeline = Pipeline.loads(sqlite_yaml(tmp_path / "h.db"))
        run(pipeline, inputs("q0"))
        outputs = run(pipeline, inputs("q1"), include_outputs_from={"retriever"})
        assert texts(outputs["retriever"]["messages"]) == ["Be brief.", "q0", "q0", "q1"]
        pipeline.close()


class TestClosed:
    def test_releases_the_file_until_the_next_run(self, run, tmp_path):
        pipeline = chat_pipeline(SQLiteChatMessageStore(tmp_path / "h.db"), MockChatGenerator("a"))
        for close in (pipeline.close, lambda: asyncio.run(pipeline.close_async())):
            run(pipeline, inputs("q"))
            assert (tmp_path / "h.db-wal").exists()
            close()
            assert [path.name for path in tmp_path.iterdir()] == ["h.db"]
        assert stored_in(tmp_path / "h.db") == ["q", "a", "q", "a"]


class TestYamlInAnotherProcess:
    def test_loads_with_a_plain_loads_and_nothing_of_ours_imported(self):
        assert asked_in_another_process(in_memory_yaml("n"), "q0", "q1") == [
            ["Be brief.", "q0"],
            ["Be brief.", "q0", "q0", "q1"],
        ]

    def test_two_processes_one_after_the_other_continue_one_conversation(self, tmp_path):
        yaml_text = sqlite_yaml(tmp_path / "h.db")
        assert asked_in_another_process(yaml_text, "q0") == [["Be brief.", "q0"]]
        assert asked_in_another_process(yaml_text, "q1", "q2", "q3") == [
            ["Be brief.", "q0", "q0", "q1"],
            ["Be brief.", "q0", "q0", "q1", "q1", "q2"],
            ["Be brief.", "q1", "q1", "q2", "q2", "q3"],
        ]
        assert stored_in(tmp_path / "h.db") == ["q0", "q0", "q1", "q1", "q2", "q2", "q3", "q3"]

    def test_what_python_dumped_is_read_too_while_python_goes_on(self, tmp_path):
        pipeline = chat_pipeline(SQLiteChatMessageStore(tmp_path / "h.db"), MockChatGenerator())
        pipeline.run(inputs("q0"))
        assert asked_in_another_process(pipeline.dumps(), "q1") == [["Be brief.", "q0", "q0", "q1"]]
        pipeline.run(inputs("q2"))
        pipeline.close()
        assert stored_in(tmp_path / "h.db") == ["q0", "q0", "q1", "q1", "q2", "q2"]
