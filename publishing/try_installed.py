# SPDX-License-Identifier: Apache-2.0
"""Uses the installed package as a new user would: without extras, in an empty folder."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import metadata

from haystack import Pipeline
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from haystack_integrations.hooks.chat_store import chat_history_hooks

from haystack_chat_store import store_from_url

os.chdir(tempfile.mkdtemp())
store = store_from_url("sqlite:///chat_history.db")
agent = Agent(chat_generator=MockChatGenerator(), hooks=chat_history_hooks(store))
agent.run([ChatMessage.from_user("Hello!")], hook_context={"chat_history_id": "ada"})

pipeline = Pipeline()
pipeline.add_component("retriever", ChatMessageRetriever(store))
pipeline.add_component("llm", MockChatGenerator())
pipeline.add_component("writer", ChatMessageWriter(store))
pipeline.connect("retriever.messages", "llm.messages")
pipeline.connect("llm.replies", "writer.replies")
question = [ChatMessage.from_user("Still there?")]
data = {"retriever": {"current_messages": question}, "writer": {"messages": question}}
Pipeline.loads(pipeline.dumps()).run({name: {"chat_history_id": "ada", **inputs} for name, inputs in data.items()})
assert [message.text for message in store.retrieve_messages("ada")] == ["Hello!", "Hello!", *["Still there?"] * 2]
store.close()

# What needs an extra says which.
for url, extra in (("postgresql://host/db", "psycopg[binary]"), ("redis://host", "redis>=")):
    try:
        store_from_url(url)
    except ImportError as error:
        assert extra in str(error), error
        assert ".." not in str(error), error
    else:
        raise AssertionError(f"{url} needs no driver")
command = os.path.join(os.path.dirname(sys.executable), "haystack-chat-store")
result = subprocess.run([command, "ls"], capture_output=True, text=True, check=False)
assert (result.returncode, "haystack-chat-store[cli]" in result.stderr) == (1, True), result

description = metadata("haystack-chat-store").json["description"]
assert "](docs/" not in description, "A relative link leads nowhere on the package index."
assert "](https://example.org/repository/blob/main/docs/agents.md)" in description
print(sys.version.split()[0], metadata("haystack-chat-store")["Version"], "works")
