# SPDX-License-Identifier: Apache-2.0
"""The examples for durable execution with Hayhooks. The server is killed during runs, and goes on with them."""

import os
import select
import sqlite3
import time
import uuid
from contextlib import closing, contextmanager

import httpx
import pytest
from apps import EXAMPLES, App
from servers import wait_until

from haystack_chat_store import SQLiteChatMessageStore, store_from_url

FOLDER = EXAMPLES / "hayhooks_durable"
COMMAND = ["hayhooks", "run", "--host", "127.0.0.1", "--port", "{port}", "--pipelines-dir", FOLDER]
# A run whose server has died goes on when its lease has ended.
SETTINGS = {
    "ready": "/status",
    "HAYHOOKS_DURABLE_MODE": "true",
    "HAYHOOKS_DURABLE_LEASE_DURATION_MS": "3000",
    "HAYHOOKS_DURABLE_MAINTENANCE_INTERVAL_SECONDS": "0.2",
    "HAYHOOKS_DURABLE_POLL_INTERVAL_SECONDS": "0.2",
}
ENDS = ("completed", "failed", "canceled")


def settings_of(server):
    """The settings of a server of Hayhooks that shares a Redis server with others."""
    prefix = f"runs:{uuid.uuid4().hex}"
    return {**SETTINGS, "HAYHOOKS_DURABLE_REDIS_URL": server.url, "HAYHOOKS_DURABLE_REDIS_KEY_PREFIX": prefix}


@pytest.fixture
def serve(start, redis_server):
    """A function that starts the examples as a server that can be killed."""
    return lambda **settings: start(*COMMAND, **settings_of(redis_server), **settings)


@pytest.fixture(scope="module")
def app(redis_server):
    """One server for the tests that do not stop it. Each takes conversations of its own."""
    with App(*COMMAND, **settings_of(redis_server)) as running:
        yield running


class Client:
    """A client that submits runs, and asks what has become of them."""

    def __init__(self, app, name="agent", user="ada"):
        self._app, self._name, self._user = app, name, user

    def submit(self, chat, text, key=None):
        """Return the id of the run."""
        body = {"chat_history_id": chat, "text": text}
        return self._send("POST", "run-durable", json=body, headers={"Idempotency-Key": key or uuid.uuid4().hex})

    def state(self, run):
        return self._send("GET", f"executions/{run}", whole=True)

    def resume(self, run, **said):
        return self._send("POST", f"executions/{run}/resume", json=said)

    def cancel(self, run):
        return self._send("POST", f"executions/{run}/cancel")

    def wait_for(self, run, *statuses):
        wait_until(lambda: self.state(run)["status"] in (*ENDS, *statuses), "the run")
        return self.state(run)

    def ask(self, chat, text, key=None):
        """Submit a run, and return its answer."""
        return self.answer(self.submit(chat, text, key))

    def answer(self, run):
        state = self.wait_for(run)
        assert state["status"] == "completed", (state, self._app.log.read_text())
        return state["result"]["answer"]

    def _send(self, method, path, *, whole=False, headers=(), **options):
        headers = {"X-User": self._user, **dict(headers)}
        response = httpx.request(method, f"{self._app.url}/{self._name}/{path}", headers=headers, timeout=60, **options)
        assert response.is_success, response.text
        return response.json() if whole else response.json()["execution_id"]


def history(app, chat, user="ada"):
    """What the conversation holds: texts, calls and results, each as a text."""
    with closing(SQLiteChatMessageStore(app.folder / "chat_history.db", last_k=None)) as store:
        return shown(store.for_user(user).retrieve_messages(chat))


def shown(messages):
    return [text for message in messages for text in (*message.texts, *calls_of(message), *results_of(message))]


def calls_of(message):
    return [f"{call.tool_name}({', '.join(call.arguments.values())})" for call in message.tool_calls]


def results_of(message):
    return [f"-> {result.result}" for result in message.tool_call_results]


def notes(app, user="ada"):
    return (app.folder / f"notes-{user}.txt").read_text().split()


class Pipe:
    """Ada's notes are in a named pipe. So a call of the tool goes on only when the test reads what it notes."""

    def __init__(self, app):
        self._app, self._path = app, app.folder / "notes-ada.txt"
        os.mkfifo(self._path)

    def wait_for(self, chat, text):
        wait_until(lambda: history(self._app, chat)[-1:] == [f"note({text})"], "the call of the tool")

    def let_go_on(self, chat, text):
        """Let the call with this text go on. The next call waits again."""
        self.wait_for(chat, text)
        with write_lock(self._app):  # the result is not stored before the pipe is closed, so no other call begins
            self.take(text)

    def take(self, text):
        """Take what the tool notes, after it has found that nothing is noted yet."""
        os.close(os.open(self._path, os.O_WRONLY))
        reader = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        select.select([reader], [], [], 30)
        noted = os.read(reader, 1000).decode()
        os.close(reader)
        assert noted == f"{text}\n"

    def become_a_file(self, text):
        """Become a file with what was noted."""
        self._path.unlink()
        self._path.write_text(f"{text}\n")


@contextmanager
def write_lock(app):
    """Nothing can be stored."""
    with closing(sqlite3.connect(app.folder / "chat_history.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def test_a_run_is_answered_and_its_conversation_stored_once(app):
    ada = Client(app)
    assert ada.ask("once", "Note milk, eggs") == "Noted: eggs I have seen 1 questions."
    assert ada.ask("once", "Hello.") == "I have seen 2 questions."

    step = ["note(milk)", "-> Noted: milk", "note(eggs)", "-> Noted: eggs", "Noted: eggs I have seen 1 questions."]
    assert history(app, "once") == ["Note milk, eggs", *step, "Hello.", "I have seen 2 questions."]


@pytest.mark.parametrize("name", ["agent", "chat"])
def test_a_request_that_is_sent_again_is_answered_once(app, name):
    ada, chat = Client(app, name), f"again {name}"
    first = ada.submit(chat, "Hello.", f"key {name}")
    answer = ada.answer(first)

    assert ada.submit(chat, "Hello.", f"key {name}") == first
    assert ada.ask(chat, "Hello.", f"key {name}") == answer
    assert history(app, chat) == ["Hello.", answer]


@pytest.mark.parametrize("name", ["agent", "chat"])
def test_users_see_only_their_own_runs_and_conversations(app, name):
    chat = f"secret {name}"
    run = Client(app, name).submit(chat, "The code is 1234.", "the same key")
    Client(app, name).answer(run)
    bob = Client(app, name, "bob")

    with pytest.raises(AssertionError, match="not found"):
        bob.state(run)
    other = bob.submit(chat, "The code is 5678.", "the same key")
    assert other != run
    assert bob.wait_for(other)["status"] == "failed"
    assert history(app, chat, "bob") == []


def test_a_server_that_is_killed_in_a_tool_goes_on_after_the_last_step(serve):
    app = serve()
    ada, pipe = Client(app), Pipe(app)
    run = ada.submit("killed", "Note milk, eggs")
    pipe.let_go_on("killed", "milk")
    pipe.wait_for("killed", "eggs")
    app.kill()
    app.start()
    wait_until(lambda: history(app, "killed").count("note(eggs)") == 2, "the call to be made again")
    pipe.let_go_on("killed", "eggs")

    answer = ada.answer(run)
    assert ada.state(run)["attempt"] == 2
    # The call that was interrupted stays. The model was told so, and has called the tool again.
    interrupted = ["note(eggs)", "note(eggs)", "-> Noted: eggs"]
    assert history(app, "killed") == ["Note milk, eggs", "note(milk)", "-> Noted: milk", *interrupted, answer]
    assert ada.ask("killed", "Hello.") == "I have seen 2 questions."
    assert history(app, "killed")[-2:] == ["Hello.", "I have seen 2 questions."]


def test_a_tool_that_runs_again_after_a_crash_notes_once(serve):
    app = serve()
    ada, pipe = Client(app), Pipe(app)
    run = ada.submit("noted", "Note milk")
    pipe.wait_for("noted", "milk")
    with write_lock(app):  # the tool has run, and its result is not stored
        pipe.take("milk")
        app.kill()
    pipe.become_a_file("milk")
    app.start()

    assert ada.answer(run) == "Noted: milk I have seen 1 questions."
    assert history(app, "noted").count("note(milk)") == 2
    assert notes(app) == ["milk"]


def test_each_user_has_notes_of_its_own(app):
    for user, thing in (("carol", "milk"), ("../dave", "eggs")):
        Client(app, user=user).ask(f"notes of {user}", f"Note {thing}")

    assert (notes(app, "carol"), notes(app, "..%2Fdave")) == (["milk"], ["eggs"])


@pytest.mark.parametrize("name", ["agent", "chat"])
def test_a_server_that_is_killed_before_the_first_checkpoint_keeps_the_question_once(serve, model, name):
    app = serve(**model.environment)
    ada = Client(app, name)
    ada.ask("early", "My name is Ada.")
    model.hold()
    run = ada.submit("early", "Hello.")
    # A slow server may ask twice for the first answer.
    wait_until(lambda: model.requests[-1]["messages"][-1]["content"] == "Hello.", "the model to be asked")
    app.kill()
    assert history(app, "early")[2:] == ["Hello."]
    model.go_on()
    app.start()

    answer = ada.answer(run)
    assert history(app, "early")[2:] == ["Hello.", answer]
    seen = [message["content"] for message in model.requests[-1]["messages"]]
    assert [*seen, answer] == history(app, "early")  # the model has seen each message once


@pytest.mark.parametrize(("name", "requests"), [("agent", 2), ("chat", 1)])
def test_a_server_that_is_killed_before_the_answer_is_stored_stores_one(serve, model, name, requests):
    app = serve(**model.environment)
    ada = Client(app, name)
    model.hold()
    run = ada.submit("late", "Hello.")
    wait_until(lambda: model.requests, "the model to be asked")
    with write_lock(app):
        model.go_on()
        if name == "chat":
            wait_until(lambda: ada.state(run)["progress"], "the checkpoint with the answer")
        app.kill()
    app.start()

    answer = ada.answer(run)
    assert history(app, "late") == ["Hello.", answer]
    assert len(model.requests) == requests  # the pipeline's checkpoint has the model's answer


@pytest.mark.parametrize("approved", [True, False])
def test_a_tool_runs_when_a_person_has_approved_it_also_after_a_crash(serve, approved):
    app = serve()
    ada = Client(app)
    ada.ask("approval", "Note milk")
    run = ada.submit("approval", "Delete my notes.")
    waiting = ada.wait_for(run, "waiting")["waiting"]
    assert waiting == {"kind": "approval", "message": "delete_notes({})"}
    assert notes(app) == ["milk"]
    app.kill()
    app.start()
    assert ada.state(run)["waiting"] == waiting
    ada.resume(run, approved=approved)

    answer = ada.answer(run)
    assert (app.folder / "notes-ada.txt").exists() is not approved
    question, call, result, *rest = history(app, "approval")[4:]
    assert (question, call, rest) == ("Delete my notes.", "delete_notes()", [answer])
    assert ("All notes are deleted." in result) is approved


def test_a_run_that_is_cancelled_keeps_what_was_said_and_the_conversation_goes_on(serve):
    app = serve()
    ada, pipe = Client(app), Pipe(app)
    run = ada.submit("cancelled", "Note milk, eggs")
    pipe.wait_for("cancelled", "milk")
    ada.cancel(run)
    time.sleep(2)  # longer than between two heartbeats, with which the run hears of it
    pipe.let_go_on("cancelled", "milk")
    assert ada.wait_for(run)["status"] == "canceled"

    assert history(app, "cancelled") == ["Note milk, eggs", "note(milk)", "-> Noted: milk"]
    assert ada.ask("cancelled", "Hello.") == "I have seen 2 questions."
    assert history(app, "cancelled")[3:] == ["Hello.", "I have seen 2 questions."]


@pytest.mark.parametrize("server", ["postgres", "redis_server"])
def test_the_conversation_may_be_on_a_server(serve, request, server):
    server = request.getfixturevalue(server)
    url = server.create_database() if hasattr(server, "create_database") else server.url
    app = serve(HAYSTACK_CHAT_STORE_URL=url)
    chat = uuid.uuid4().hex
    answers = [Client(app, name).ask(chat, f"Hello, {name}.") for name in ("agent", "chat")]

    with closing(store_from_url(url)) as store:
        stored = shown(store.for_user("ada").retrieve_messages(chat))
    assert stored == ["Hello, agent.", answers[0], "Hello, chat.", answers[1]]


def test_the_examples_are_short():
    lengths = {path.parent.name: len(path.read_text().splitlines()) for path in FOLDER.rglob("pipeline_wrapper.py")}
    assert lengths["agent"] <= 120
    assert lengths["chat"] <= 70
