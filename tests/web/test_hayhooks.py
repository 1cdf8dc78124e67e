# SPDX-License-Identifier: Apache-2.0
"""The examples for Hayhooks, driven by the `openai` package and by curl. The server is killed between turns."""

import json
import re
import subprocess
from contextlib import closing

import httpx
import openai
import pytest
from apps import EXAMPLES, App
from servers import wait_until
from versions import READS_PARTS

from haystack_chat_store import SQLiteChatMessageStore

COMMAND = ["hayhooks", "run", "--host", "127.0.0.1", "--port", "{port}", "--pipelines-dir", EXAMPLES / "hayhooks"]
# Importing Haystack in two threads at once fails now and then.
SETTINGS = {"ready": "/status", "HAYHOOKS_STARTUP_DEPLOY_STRATEGY": "sequential"}
ADA = {"X-OpenWebUI-User-Id": "ada", "X-OpenWebUI-Chat-Id": "trip"}


@pytest.fixture(scope="module")
def app():
    """One server for the tests that do not stop it. Each takes conversations of its own."""
    with App(*COMMAND, **SETTINGS) as running:
        yield running


@pytest.fixture
def connect():
    """A function that returns a client of OpenAI's interface."""
    clients = []

    def client_of(app, **headers):
        clients.append(openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", default_headers=headers, max_retries=0))
        return clients[-1]

    yield client_of
    for client in clients:
        client.close()


class Chat:
    """A client that keeps the whole conversation, and sends it with each question."""

    def __init__(self, client, *, is_streaming=False):
        self.client, self.is_streaming, self.messages = client, is_streaming, []

    def ask(self, text, **options):
        self.messages.append({"role": "user", "content": text})
        answer = self.answer(**options)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def answer(self, **options):
        request = {"model": "chat", "messages": self.messages, **options}
        if not self.is_streaming:
            return self.client.chat.completions.create(**request).choices[0].message.content
        with self.client.chat.completions.create(**request, stream=True) as chunks:
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def texts(app, user_and_chat):
    """The messages of a user's conversation."""
    user, chat = user_and_chat.split("/")
    with closing(SQLiteChatMessageStore(app.folder / "chat_history.db", last_k=None)) as store:
        return [message.text for message in store.for_user(user).retrieve_messages(chat)]


def histories(app):
    with closing(SQLiteChatMessageStore(app.folder / "chat_history.db")) as store:
        return {info.chat_history_id for info in store.list_chat_histories(branches=True).items}


def seen(number, last):
    return f"I have seen {number} questions. The last one was: {last}"


def curl(url, body, *headers, options=()):
    command = ["curl", "--silent", "--fail-with-body", "--no-buffer", *options, url, "--json", json.dumps(body)]
    for header in headers:
        command += ["--header", header]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole", "streamed"])
def test_a_conversation_is_stored_once_and_survives_the_server(start, connect, is_streaming):
    app = start(*COMMAND, **SETTINGS)
    chat = Chat(connect(app, **ADA), is_streaming=is_streaming)
    chat.messages.append({"role": "system", "content": "Be terse."})
    assert chat.ask("Hello.") == seen(1, "Hello.")
    app.kill()
    app.start()
    assert chat.ask("Which sights are there?") == seen(2, "Which sights are there?")
    app.kill()
    app.start()
    chat.ask("Thank you.")

    assert texts(app, "ada/trip") == [message["content"] for message in chat.messages[1:]]


@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole", "streamed"])
def test_a_request_that_is_sent_again_gets_the_stored_answer(app, connect, is_streaming):
    headers = {**ADA, "X-OpenWebUI-Chat-Id": f"again {is_streaming}"}
    chat = Chat(connect(app, **headers), is_streaming=is_streaming)
    chat.ask("Hello.")
    chat.messages.pop()

    answer = chat.answer(extra_headers={"x-stainless-retry-count": "1"})

    assert answer == seen(1, "Hello.")
    assert texts(app, f"ada/again {is_streaming}") == ["Hello.", answer]


def test_an_answer_is_given_anew_and_a_question_edited(app, connect):
    chat = Chat(connect(app, **{**ADA, "X-OpenWebUI-Chat-Id": "edit"}))
    chat.ask("Hello.")
    chat.ask("A joke, please.")
    chat.messages.pop()
    chat.messages.append({"role": "assistant", "content": chat.answer()})  # "regenerate" in the client
    assert len(texts(app, "ada/edit")) == 4

    chat.messages[2:] = []
    chat.ask("A story, please.")
    assert texts(app, "ada/edit") == [message["content"] for message in chat.messages]
    kept = {history for history in histories(app) if history.startswith("edit~")}
    assert len(kept) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"X-LibreChat-User-Id": "bob", "X-LibreChat-Conversation-Id": "libre"},
        {"X-OpenWebUI-User-Id": "bob", "X-OpenWebUI-Chat-Id": "libre"},
        {},
    ],
    ids=["LibreChat", "Open WebUI", "body"],
)
def test_ids_come_from_headers_or_from_the_body(app, connect, headers):
    name = next(iter(headers), "body")[:12].lower()
    headers = {key: f"{value} {name}" for key, value in headers.items()}
    in_body = {} if headers else {"user": f"bob {name}", "metadata": {"chat_history_id": f"libre {name}"}}
    Chat(connect(app, **headers)).ask("Hello.", **in_body)

    assert texts(app, f"bob {name}/libre {name}") == ["Hello.", seen(1, "Hello.")]


def test_tasks_and_requests_without_a_conversation_are_answered_and_not_stored(app, connect):
    chat = Chat(connect(app, **{**ADA, "X-OpenWebUI-Chat-Id": "tasks"}))
    chat.ask("Hello.")
    before = histories(app)
    title = "### Task:\nGenerate a concise title for this conversation."
    assert Chat(chat.client).ask(title) == seen(1, title)
    other_title = "Provide a title of five words or less."
    assert Chat(chat.client).ask(other_title) == seen(1, other_title)
    tagged = {**ADA, "X-OpenWebUI-Chat-Id": "new", "X-OpenWebUI-Task": "title_generation"}
    assert Chat(connect(app, **tagged)).ask("Name it.") == seen(1, "Name it.")
    assert Chat(connect(app)).ask("Who am I?") == seen(1, "Who am I?")

    assert histories(app) == before
    assert texts(app, "ada/tasks") == ["Hello.", seen(1, "Hello.")]
    assert chat.ask("And now?") == seen(2, "And now?")


def test_a_client_that_goes_away_finds_its_answer(app):
    body = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "Are you there? " * 2000}]}
    headers = {**ADA, "X-OpenWebUI-Chat-Id": "away"}
    with httpx.stream("POST", f"{app.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
        next(response.iter_lines())

    wait_until(lambda: len(texts(app, "ada/away")) == 2, "the answer")


@pytest.mark.skipif(not READS_PARTS, reason="Haystack reads parts of OpenAI's format since 3.4")
def test_what_cannot_be_understood_is_refused(app, connect):
    client = connect(app, **ADA)
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="chat", messages=[{"role": "user", "content": [image]}])
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="chat", input="Hello.", previous_response_id="resp_1")
    assert "conversation" in refused.value.response.text


HELLO = [{"role": "user", "content": "Hello."}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": []}),
        ("chat/completions", {"messages": [], "metadata": {"chat_history_id": "odd"}}),
        ("chat/completions", {"messages": [{"role": "system", "content": "Be terse."}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": " "}]}),
        ("chat/completions", {"messages": HELLO, "metadata": "odd"}),
        ("chat/completions", {"messages": HELLO, "metadata": ["odd"]}),
        ("chat/completions", {"messages": HELLO, "metadata": {"chat_history_id": 5}}),
        ("chat/completions", {"messages": HELLO, "metadata": {"chat_history_id": ""}}),
        ("chat/completions", {"messages": HELLO, "metadata": {"chat_history_id": "x" * 600}}),
        ("chat/completions", {"messages": HELLO, "metadata": {"chat_history_id": "odd"}, "user": 5}),
        ("responses", {"input": ""}),
        ("responses", {"input": [], "conversation": "odd"}),
        ("responses", {"input": " ", "conversation": "odd"}),
        ("responses", {"input": "Hello.", "conversation": 5}),
        ("responses", {"input": "Hello.", "conversation": ["odd"]}),
        ("responses", {"input": "Hello.", "conversation": {}}),
        ("responses", {"input": "Hello.", "conversation": {"id": None}}),
        ("responses", {"input": "Hello.", "conversation": ""}),
    ],
)
@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole", "streamed"])
def test_an_odd_request_is_refused_with_a_reason_and_stores_nothing(app, path, body, is_streaming):
    before = histories(app)

    request = {"model": "chat", "user": "ada", "stream": is_streaming, **body}
    response = httpx.post(f"{app.url}/v1/{path}", json=request, timeout=60)

    assert response.status_code == 400, response.text
    assert re.search(r"must|no message|says nothing", response.json()["detail"])
    assert histories(app) == before


@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_conversation_is_remembered_only_for_its_user(app, path, is_streaming):
    chat = f"private {path.split('/')[0]} {is_streaming}"
    body = {"model": "chat", "stream": is_streaming}
    body |= {"input": "Hello.", "conversation": chat} if path == "responses" else {"messages": HELLO}
    body |= {"metadata": {"chat_history_id": chat}} if path == "chat/completions" else {}

    def send(**user):
        return httpx.post(f"{app.url}/v1/{path}", json={**body, **user}, timeout=60)

    without_user = send()
    assert (without_user.status_code, chat in histories(app)) == (400, False)
    assert "needs a user" in without_user.json()["detail"]
    assert send(user="ada").status_code == 200
    stored = texts(app, f"ada/{chat}")
    mallory = send(user="mallory")
    assert (mallory.status_code, mallory.json()["detail"]) == (404, "There is no such conversation.")
    assert texts(app, f"ada/{chat}") == stored


@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole", "streamed"])
def test_the_responses_api_remembers_a_conversation(start, connect, is_streaming):
    app = start(*COMMAND, **SETTINGS)
    client = connect(app, **{"X-OpenWebUI-User-Id": "ada"})

    def ask(text, **options):
        request = {"model": "chat", "conversation": "conv_1", "input": text, "instructions": "Be terse.", **options}
        if not is_streaming:
            return client.responses.create(**request).output_text
        with client.responses.create(**request, stream=True) as events:
            return "".join(event.delta for event in events if event.type == "response.output_text.delta")

    assert ask("Hello.") == seen(1, "Hello.")
    app.kill()
    app.start()
    assert ask("And now?") == seen(2, "And now?")
    assert ask("And now?", extra_headers={"x-stainless-retry-count": "1"}) == seen(2, "And now?")
    assert texts(app, "ada/conv_1") == ["Hello.", seen(1, "Hello."), "And now?", seen(2, "And now?")]


def test_the_yaml_pipeline_remembers_without_python(start):
    app = start(*COMMAND, **SETTINGS)

    def ask(query, request_id):
        body = {"query": query, "request_id": request_id, "chat_history_id": "yaml", "user_id": "ada"}
        result = json.loads(curl(f"{app.url}/remember/run", body))["result"]
        return result["answer_writer"]["replies"][0]["_content"][0]["text"]

    assert ask("Hello.", "1") == "Hello."  # the mock repeats the last message
    app.kill()
    app.start()
    assert ask("And now?", "2") == ask("And now?", "2") == "And now?"
    assert texts(app, "ada/yaml") == ["Hello.", "Hello.", "And now?", "And now?"]


def test_curl_sees_the_same_conversation(app):
    messages = [{"role": "user", "content": "Hello."}]
    headers = [f"{name}: {value}" for name, value in {**ADA, "X-OpenWebUI-Chat-Id": "curl"}.items()]
    url = f"{app.url}/v1/chat/completions"
    answer = json.loads(curl(url, {"model": "chat", "messages": messages}, *headers))["choices"][0]["message"][
        "content"
    ]
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    streamed = curl(url, {"model": "chat", "messages": messages, "stream": True}, *headers)

    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(
        chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"][0]["delta"]
    )
    assert text == seen(2, "And now?")
    assert texts(app, "ada/curl") == ["Hello.", answer, "And now?", text]
