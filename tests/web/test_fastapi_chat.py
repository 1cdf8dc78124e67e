# SPDX-License-Identifier: Apache-2.0
"""The example of a chat service, over HTTP: turns that are sent again or cut off, several workers, errors."""

import asyncio
import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import httpx
import pytest
from apps import EXAMPLES, App
from servers import HOST, unused_port, wait_until

from haystack_chat_store import MessageDecodingError, SQLiteChatMessageStore

COMMAND = ["uvicorn", "--app-dir", EXAMPLES, "fastapi_chat:app", "--port", "{port}"]


class Client:
    """The service, as a user's browser sees it."""

    def __init__(self, app, user="ada"):
        self._http = httpx.Client(base_url=app.url, headers={"X-User": user}, timeout=60)

    def ask(self, chat, text, request_id):
        return self.turn("POST", f"/chats/{chat}/messages", {"text": text, "request_id": request_id})

    def turn(self, method, path, body):
        """Return the tokens of the answer, joined, and the answer as it is stored."""
        headers = {"Content-Type": "application/json"}  # in ASCII, as browsers send half an emoji
        with self._http.stream(method, path, content=json.dumps(body), headers=headers) as response:
            assert response.status_code == 200, response.read()
            events = [(name, json.loads(data)) for name, data in read_events(response)]
        assert [name for name, _ in events if name != "token"] == ["question", "done"], events
        return "".join(data for name, data in events if name == "token"), events[-1][1][0]["content"][0]["text"]

    def texts(self, chat):
        return [text_of(stored) for stored in self.get(f"/chats/{chat}/messages")]

    def ids(self, chat):
        return [stored["message"]["meta"]["chat_message_id"] for stored in self.get(f"/chats/{chat}/messages")]

    def get(self, path, **parameters):
        response = self.send("GET", path, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()

    def close(self):
        self._http.close()

    def send(self, method, path, **options):
        return self._http.request(method, path, **options)

    def stream(self, chat, text, request_id):
        body = {"text": text, "request_id": request_id}
        return self._http.stream("POST", f"/chats/{chat}/messages", json=body)


def read_events(response):
    name = None
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, line.removeprefix("data: ")


def text_of(stored):
    return stored["message"]["content"][0]["text"]


@pytest.fixture
def connect():
    """A function that returns a client of a service."""
    with ExitStack() as clients:
        yield lambda app, user="ada": clients.enter_context(closing(Client(app, user)))


@pytest.fixture(scope="module")
def service():
    """One service for the tests that do not stop it. Each takes users of its own."""
    with App(*COMMAND) as app:
        yield app


def test_a_conversation_is_streamed_kept_and_found(service, connect):
    ada = connect(service)
    ada.ask("trip", "My name is Ada.", "1")
    streamed, stored = ada.ask("trip", "What is my name?", "2")
    assert streamed == stored == "Your name is Ada. You told me."
    assert [ada.texts("trip")[place] for place in (0, 2, 3)] == ["My name is Ada.", "What is my name?", stored]

    newest = ada.get("/chats/trip/messages", limit=1)
    older = ada.get("/chats/trip/messages", limit=2, before=newest[0]["position"])
    assert [text_of(each) for each in [*older, *newest]] == ada.texts("trip")[1:]

    assert ada.send("PATCH", "/chats/trip", json={"title": "Who I am"}).json()["title"] == "Who I am"
    (listed,) = ada.get("/chats")["items"]
    assert (listed["title"], listed["message_count"]) == ("Who I am", 4)
    assert [hit["snippet"] for hit in ada.get("/search", q="what nam")] == ["What is my name?"]

    assert ada.send("POST", "/chats/trip/fork/other", params={"until": ada.ids("trip")[1]}).status_code == 201
    assert ada.texts("other") == ada.texts("trip")[:2]
    assert ada.send("DELETE", "/chats/trip").status_code == 204
    assert (ada.texts("trip"), len(ada.texts("other"))) == ([], 2)


@pytest.mark.parametrize("text", ["", " "])
def test_a_question_that_says_nothing_is_refused_before_it_is_stored(service, connect, text):
    ada, chat = connect(service), f"blank{len(text)}"
    ada.ask(chat, "My name is Ada.", "1")
    before = ada.texts(chat)
    for method, path in (("POST", f"/chats/{chat}/messages"), ("PUT", f"/chats/{chat}/messages/1")):
        refused = ada.send(method, path, json={"text": text, "request_id": "2"})
        assert (refused.status_code, refused.json()["error"]) == (422, "ValueError")
    assert ada.texts(chat) == before
    assert ada.ask(chat, "My name is Ada.", "1")[1] == before[1]


def test_half_an_emoji_that_a_client_has_cut_can_be_read(service, connect):
    ada, cut = connect(service), "Hi \ud83d"
    ada.ask("cut", cut, "1")
    assert ada.texts("cut")[0] == cut
    assert ada.get("/chats")["items"][0]["preview"].startswith("Hi ")
    assert ada.send("PATCH", "/chats/cut", json={"title": "Trip"}).status_code == 200


@pytest.mark.parametrize("name", ["fastapi_chat.py", "fastapi_turn.py"])
def test_the_example_is_short(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 110


def test_users_see_only_their_own_conversations(service, connect):
    grace, mallory = connect(service, "grace"), connect(service, "mallory")
    grace.ask("secret", "The code is 1234.", "1")

    assert mallory.texts("secret") == []
    question = {"text": "What is the code?", "request_id": "2"}
    assert mallory.send("POST", "/chats/secret/messages", json=question).status_code == 404
    assert mallory.get("/chats")["items"] == []
    assert mallory.get("/search", q="code") == []
    refused = [mallory.send("PATCH", f"/chats/{chat}", json={"title": "Mine"}) for chat in ("secret", "missing")]
    assert [response.status_code for response in refused] == [404, 404]
    assert refused[0].json() == refused[1].json()
    assert mallory.send("POST", "/chats/secret/fork/mine").status_code == 404
    assert [mallory.send("DELETE", f"/chats/{chat}").status_code for chat in ("secret", "missing")] == [204, 204]
    assert len(grace.texts("secret")) == 2


def test_a_question_that_is_sent_again_is_answered_once(service, connect):
    bob = connect(service, "bob")
    _, first = bob.ask("bob's chat", "I like tea.", "1")
    _, again = bob.ask("bob's chat", "I like tea.", "1")

    assert again == first
    assert bob.texts("bob's chat") == ["I like tea.", first]


def test_an_edited_question_takes_the_place_of_the_old_one_once(service, connect):
    carol = connect(service, "carol")
    carol.ask("carol's chat", "My name is Carol.", "1")
    carol.ask("carol's chat", "What is my name?", "2")
    edited = {"text": "Where do I live?", "request_id": "3"}
    for _ in range(2):
        carol.turn("PUT", "/chats/carol's chat/messages/2", edited)
        assert carol.texts("carol's chat")[2] == "Where do I live?"
        assert len(carol.texts("carol's chat")) == 4

    streamed, _ = carol.turn("PUT", "/chats/carol's chat/messages/1", {"text": "I am Eve.", "request_id": "4"})
    assert "Nice to meet you!" in streamed  # nothing of before is shown
    assert carol.texts("carol's chat") == ["I am Eve.", streamed]


def test_an_answer_is_given_anew_once_and_a_failing_model_leaves_the_old_one(start, model, connect):
    dave = connect(start(*COMMAND, **model.environment))
    dave.ask("chat", "Hello.", "1")
    regenerate = "/chats/chat/messages/1/regenerate"
    old_id = dave.ids("chat")[1]
    for answer_id in (old_id, old_id, "one that was replaced before"):
        assert dave.turn("POST", regenerate, {"answer_id": answer_id})[1] == "You said: Hello. This is answer 2."
    assert dave.texts("chat") == ["Hello.", "You said: Hello. This is answer 2."]
    assert len(model.requests) == 2
    missing = dave.send("POST", "/chats/chat/messages/2/regenerate", json={"answer_id": old_id})
    assert missing.status_code == 404

    body = {"text": "Please refuse.", "request_id": "2"}
    with dave._http.stream("PUT", "/chats/chat/messages/1", json=body) as response:
        events = dict(read_events(response))
    assert json.loads(events["error"])["status"] == 500
    assert dave.texts("chat") == ["Hello.", "You said: Hello. This is answer 2."]


def test_a_client_that_goes_away_finds_its_answer(start, model, connect):
    app = start(*COMMAND, **model.environment)
    ada = connect(app)
    model.hold()
    with ada.stream("chat", "Are you there?", "1") as response:
        events = read_events(response)
        assert [next(events)[0], next(events)[0]] == ["question", "token"]
    model.go_on()
    wait_until(lambda: len(ada.texts("chat")) == 2, "the answer")

    assert ada.ask("chat", "Are you there?", "1")[1] == "You said: Are you there? This is answer 1."
    assert len(model.requests) == 1


def test_an_answer_that_is_stopped_is_what_the_user_has_seen(start, model, connect):
    ada = connect(start(*COMMAND, **model.environment))
    model.hold()
    with ada.stream("chat", "Are you there?", "1") as response:
        events = read_events(response)
        assert [next(events)[0], next(events)[0]] == ["question", "token"]
        stopped = ada.send("POST", "/chats/chat/messages/1/stop", json={"text": "You sa"})
        assert stopped.json()[0]["content"] == [{"text": "You sa"}]
        model.go_on()
        assert [json.loads(data)[0]["content"] for name, data in events if name == "done"] == [[{"text": "You sa"}]]
    assert ada.texts("chat") == ["Are you there?", "You sa"]
    assert ada.send("POST", "/chats/chat/messages/2/stop", json={"text": "?"}).status_code == 404


def test_stop_cancels_the_model_also_from_another_worker(start, model, connect):
    app = start(*COMMAND, **model.environment)
    other = start(*COMMAND, HAYSTACK_CHAT_STORE_URL=f"sqlite:///{app.folder / 'chat_history.db'}")
    ada = connect(app)
    model.hold()
    with ada.stream("chat", "Are you there?", "1") as response:
        events = read_events(response)
        assert [next(events)[0], next(events)[0]] == ["question", "token"]
        connect(other).send("POST", "/chats/chat/messages/1/stop", json={"text": "You sa"})
    wait_until(lambda: len(model.cancelled) == 1, "the model to be cancelled")

    assert ada.texts("chat") == ["Are you there?", "You sa"]
    assert ada.ask("chat", "Are you there?", "1") == ("", "You sa")
    assert ada.texts("chat") == ["Are you there?", "You sa"]
    assert len(model.requests) == 1


def test_a_turn_survives_the_death_of_the_server(start, model, connect):
    app = start(*COMMAND, **model.environment)
    ada = connect(app)
    model.hold()
    with ada.stream("chat", "Are you there?", "1") as response:
        next(read_events(response))
        app.kill()
    model.go_on()
    app.start()
    assert ada.texts("chat") == ["Are you there?"]

    answer = ada.ask("chat", "Are you there?", "1")[1]
    assert ada.texts("chat") == ["Are you there?", answer]


def test_a_server_that_is_stopped_finishes_the_turns_of_clients_that_have_gone(start, model, connect):
    app = start(*COMMAND, **model.environment)
    model.hold()
    with connect(app).stream("chat", "Are you there?", "1") as response:
        next(read_events(response))
    with ThreadPoolExecutor() as threads:
        stopped = threads.submit(app.stop)
        wait_until(lambda: "Waiting for application shutdown" in app.log.read_text(), "the server to stop")
        model.go_on()
        stopped.result()

    store = SQLiteChatMessageStore(app.folder / "chat_history.db")
    assert len(store.retrieve_messages("chat")) == 2


def test_several_workers_answer_a_question_once(start, connect):
    app = start(*COMMAND, "--workers", 2)
    clients = [connect(app) for _ in range(12)]
    with ThreadPoolExecutor(len(clients)) as threads:
        same = list(threads.map(lambda client: client.ask("chat", "My name is Ada.", "1")[1], clients))
        others = list(threads.map(lambda n: clients[n].ask(f"chat {n}", "I am here.", f"{n}")[1], range(len(clients))))

    assert len(set(same)) == 1
    assert clients[0].texts("chat") == ["My name is Ada.", same[0]]
    assert all(clients[0].texts(f"chat {n}") == ["I am here.", answer] for n, answer in enumerate(others))
    assert app.log.read_text().count("Started server process") == 2


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("PATCH", "/chats/missing", {"json": {"title": "A title"}}, 404),
        ("PUT", "/chats/missing/messages/1", {"json": {"text": "Hi", "request_id": "1"}}, 404),
        ("POST", "/chats/missing/messages/1/regenerate", {"json": {"answer_id": "2"}}, 404),
        ("POST", "/chats/taken/messages/2/regenerate", {"json": {"answer_id": "2"}}, 409),
        ("POST", "/chats/taken/messages/2/regenerate", {"json": {"answer_id": "1"}}, 409),
        ("POST", "/chats/taken/fork/taken", {}, 409),
        ("POST", "/chats/taken/messages", {"json": {"text": "Hi", "request_id": ""}}, 422),
        ("GET", "/chats?limit=0", {}, 422),
    ],
)
def test_errors_have_a_status(service, method, path, options, status, connect):
    erin = connect(service, "erin")
    erin.ask("taken", "Hello.", "1")
    erin.ask("taken", "Hello again.", "2")

    response = erin.send(method, path, **options)

    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("text", "cause"), [("Please refuse.", "refused"), ("Please garble.", "JSONDecodeError")])
def test_what_went_wrong_inside_is_logged_and_not_shown(start, model, connect, text, cause):
    app = start(*COMMAND, **model.environment)
    with connect(app).stream("chat", text, "1") as response:
        *_, (name, data) = read_events(response)

    shown = {"status": 500, "error": "ServerError", "text": "Something went wrong in the server."}
    assert (name, json.loads(data)) == ("error", shown)
    assert cause in app.log.read_text()


@pytest.mark.parametrize("kind", [KeyError, OSError, MessageDecodingError])
def test_only_errors_that_the_user_can_act_upon_are_shown(monkeypatch, caplog, kind):
    monkeypatch.syspath_prepend(EXAMPLES)
    failed = importlib.import_module("fastapi_turn").failed

    answered = asyncio.run(failed(None, kind("a secret")))

    assert answered.status_code == 500
    assert b"secret" not in answered.body
    assert "a secret" in caplog.text


def test_a_store_that_is_away_or_cannot_search_has_a_status(start, connect):
    app = start(*COMMAND, HAYSTACK_CHAT_STORE_URL=f"redis://{HOST}:{unused_port()}/0")
    client = connect(app)

    question = {"text": "Hi", "request_id": "1"}
    away = client.send("POST", "/chats/chat/messages", json=question)
    assert away.status_code == 503
    assert HOST not in away.text
    assert "StoreUnavailableError" in app.log.read_text()
    assert client.send("GET", "/search", params={"q": "Hi"}).status_code == 501


@pytest.mark.parametrize("server", ["postgres", "redis_server"])
def test_the_store_may_be_on_a_server(start, connect, request, server):
    server = request.getfixturevalue(server)
    url = server.create_database() if hasattr(server, "create_database") else server.url
    first, second = (connect(start(*COMMAND, HAYSTACK_CHAT_STORE_URL=url)) for _ in range(2))
    first.ask("on a server", "My name is Ada.", "1")

    assert second.ask("on a server", "What is my name?", "2")[1] == "Your name is Ada. You told me."
    assert first.texts("on a server") == second.texts("on a server")
    assert [each["chat_history_id"] for each in first.get("/chats")["items"]].count("on a server") == 1
