# SPDX-License-Identifier: Apache-2.0
"""From SQLite to a server: one line of code or one block of YAML, as the documentation says, and nothing else."""

import os
import re
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from haystack import Pipeline
from servers import PostgresServer, RedisCluster, RedisServer

from haystack_chat_store import store_from_url
from haystack_chat_store.testing.fork_server import run_python

ROOT = Path(__file__).parent.parent
QUICK_START = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
CHOOSING = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
SERVERS = {"postgresql": PostgresServer, "redis": RedisServer, "redis+cluster": RedisCluster}

# What the documentation shows, by what it leads to.
LINES = {
    line.partition('"')[2].partition(":")[0]: line
    for line in re.findall(r"^store = store_from_url\(.*\)$", QUICK_START, re.MULTILINE)
}
BLOCKS = {
    " ".join([block["type"].rpartition(".")[2], *(["cluster"] if "cluster" in block["init_parameters"] else [])]): block
    for block in (
        yaml.safe_load(text)["chat_message_store"] for text in re.findall(r"```yaml\n(.*?)```", CHOOSING, re.DOTALL)
    )
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request):
    with SERVERS[request.param]() as server:
        server.kind = request.param
        yield server


def run(code, folder):
    environment = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "False"}
    result = run_python(["-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_quick_start_moves_to_a_server_by_one_line(server, tmp_path):
    quick_start, printed = re.search(r"```python\n(.*?)```.*?```output\n(.*?)```", QUICK_START, re.DOTALL).groups()
    assert LINES["sqlite"] in quick_start
    moved = quick_start.replace(LINES["sqlite"], re.sub(r'"[^"]+"', repr(server.url), LINES[server.kind]))

    assert run(moved, tmp_path) == printed
    assert list(tmp_path.iterdir()) == []
    with closing(store_from_url(server.url)) as store:
        assert store.count_messages("user_456") == 4
        store.delete_messages("user_456")


def test_the_chatbot_remembers_on_a_server(server, tmp_path):
    command = [ROOT / "examples" / "terminal_chatbot.py", "--store", server.url, "--say"]
    for said, answer in (("My name is Ada.", "Nice to meet you!"), ("What is my name?", "Your name is Ada.")):
        result = run_python([*command, said], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert answer in result.stdout


@pytest.mark.parametrize(
    ("server", "name"),
    [
        ("postgresql", "PostgresChatMessageStore"),
        ("redis", "RedisChatMessageStore"),
        ("redis+cluster", "RedisChatMessageStore cluster"),
    ],
    indirect=["server"],
)
def test_the_yaml_pipeline_moves_to_a_server_by_one_block(server, name, monkeypatch):
    assert_remembers_with(
        BLOCKS[name], monkeypatch, PG_CONN_STR=server.url, REDIS_URL=server.url.replace("+cluster", "")
    )


@pytest.mark.parametrize("name", ["SQLiteChatMessageStore", "InMemoryChatMessageStore"])
def test_the_yaml_pipeline_takes_the_stores_without_a_server_likewise(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_remembers_with(BLOCKS[name], monkeypatch)


def assert_remembers_with(block, monkeypatch, **environment):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    definition = yaml.safe_load((ROOT / "examples" / "chat_pipeline.yaml").read_text(encoding="utf-8"))
    for component in ("question_writer", "retriever", "answer_writer"):
        definition["components"][component]["init_parameters"]["chat_message_store"] = block
    answers = []
    for query in ("I am Ada.", "Who am I?"):
        pipeline = Pipeline.loads(yaml.safe_dump(definition))
        result = pipeline.run({"query": query, "chat_history_id": "yaml"}, include_outputs_from={"retriever"})
        answers.append([message.text for message in result["retriever"]["messages"]][1:])
        for component in ("question_writer", "retriever", "answer_writer"):
            pipeline.get_component(component).close()
    assert answers == [["I am Ada."], ["I am Ada.", "I am Ada.", "Who am I?"]]
