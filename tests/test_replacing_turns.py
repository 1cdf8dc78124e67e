# SPDX-License-Identifier: Apache-2.0
"""Rules 26 and 27 in components: an answer given anew, or an edited question, takes the place of the old one."""

import asyncio
import itertools
import json
import os
import random
import signal
from urllib.parse import urlsplit

import pytest
from gateways import Gateway
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from test_retriever import MinimalStore
from turn_pipelines import ENGINES, CrashError, FailingEngine, Model, Moments, store_of, turn_pipeline

from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.errors import ChatHistoryChangedError, MessageNotFoundError
from haystack_chat_store.testing.fork_server import run_python

USER, ASSISTANT = ChatMessage.from_user, ChatMessage.from_assistant


def run_sync(component, *arguments, **options):
    return component.run(*arguments, **options)


def run_async(component, *arguments, **options):
    return asyncio.run(component.run_async(*arguments, **options))


@pytest.fixture(params=[run_sync, run_async], ids=["sync", "async"])
def run(request):
    return request.param


@pytest.fixture(params=ENGINES)
def store(request, tmp_path, monkeypatch):
    store = store_of(request.param, request, tmp_path, monkeypatch)
    yield store
    store.close()


def question(text, message_id):
    return USER(text, meta={"chat_message_id": message_id})


def texts(messages):
    return [message.text for message in messages]


def history(store):
    return texts(store.retrieve_messages("h"))


def ids(messages):
    return [message.meta["chat_message_id"] for message in messages]


@pytest.mark.parametrize("options", [{}, {"expected_revision": "read"}], ids=["any revision", "expected revision"])
@pytest.mark.parametrize("is_edit", [False, True], ids=["regenerate", "edit"])
def test_answers_to_other_questions_stay_though_they_were_stored_later(store, run, is_edit, options):
    writer = ChatMessageWriter(store)
    left = run(writer, "h", [question("left?", "left")])["messages"]
    right = run(writer, "h", [question("right?", "right")])["messages"]
    (old,) = run(writer, "h", right, [ASSISTANT("right!")])["replies"]
    run(writer, "h", left, [ASSISTANT("left!")])
    run(writer, "h", [question("later?", "later")], [ASSISTANT("later!")])
    store.update_message_meta("h", "left:reply:0", merge={"rating": "up"})

    current = [question("edited?", "edited")] if is_edit else right
    options = {name: store.get_chat_history("h").revision for name in options}
    replaced = "right" if is_edit else old.meta["chat_message_id"]
    turn = run(writer, "h", current, [ASSISTANT("anew!")], replace_from_message_id=replaced, **options)
    assert texts(turn["replies"]) == ["anew!"]
    assert turn["messages_written"] == len(current) + len(turn["replies"]) - (not is_edit)
    shown = texts(ChatMessageRetriever(store).run("h")["messages"])
    assert shown == ["left?", "left!", "edited?" if is_edit else "right?", "anew!"]
    stored = store.retrieve_messages("h")
    again = run(writer, "h", current, [ASSISTANT("once more!")], replace_from_message_id=replaced, **options)
    assert (again["messages_written"], texts(again["replies"])) == (0, ["anew!"])
    assert store.retrieve_messages("h") == stored
    assert next(each for each in stored if each.text == "left!").meta["rating"] == "up"


@pytest.fixture
def writer(store):
    """A writer to a history with two answered questions."""
    writer = ChatMessageWriter(store)
    for number in range(2):
        writer.run("h", [question(f"q{number}", f"id{number}")], [ASSISTANT(f"a{number}")])
    return writer


class TestRevision:
    def test_the_retriever_says_which_revision_it_read(self, run, store):
        retriever = ChatMessageRetriever(store)
        assert run(retriever, "h")["revision"] == 0
        for number in range(12):
            store.write_messages("h", [USER(f"q{number}"), ASSISTANT("a")])
            assert run(retriever, "h")["revision"] == store.get_chat_history("h").revision

    def test_it_is_never_newer_than_what_was_read(self, run, store, writer, monkeypatch):
        before, retrieve = store.get_chat_history("h").revision, store.retrieve_window

        def retrieve_and_write(*arguments, **options):
            found = retrieve(*arguments, **options)
            store.write_messages("h", [USER("by another")])
            return found

        async def retrieve_and_write_async(*arguments, **options):
            return retrieve_and_write(*arguments, **options)

        monkeypatch.setattr(store, "retrieve_window", retrieve_and_write)
        monkeypatch.setattr(store, "retrieve_window_async", retrieve_and_write_async)
        revision = run(ChatMessageRetriever(store), "h")["revision"]
        assert revision == before
        with pytest.raises(ChatHistoryChangedError):
            run(writer, "h", [USER("q2")], expected_revision=revision)

    def test_a_store_without_revisions_has_none(self, run):
        assert "revision" not in run(ChatMessageRetriever(MinimalStore()), "h")


class TestRegenerate:
    def test_the_new_answer_takes_the_place_of_the_old_one(self, run, store, writer):
        old = ids(store.retrieve_messages("h"))[-1]
        turn = run(writer, "h", [question("q1", "id1")], [ASSISTANT("new")], replace_from_message_id=old)
        assert (turn["messages_written"], texts(turn["messages"]), texts(turn["replies"])) == (
            1,
            ["q1", "new"],
            ["new"],
        )
        assert history(store) == ["q0", "a0", "q1", "new"]
        assert turn["messages"] == store.retrieve_messages("h")[-2:]
        assert ids(turn["replies"]) != [old]
        assert turn["replies"][0].meta["chat_question_id"] == "id1"

    def test_a_repeated_call_stores_it_once_whatever_the_model_says_then(self, run, store, writer):
        old = ids(store.retrieve_messages("h"))[-1]
        revision = store.get_chat_history("h").revision
        for number, said in enumerate(["new", "new", "newer"]):
            options = {"replace_from_message_id": old, "expected_revision": revision}
            turn = run(writer, "h", [question("q1", "id1")], [ASSISTANT(said)], **options)
            assert turn["messages_written"] == (number == 0)
            assert texts(turn["messages"]) == ["q1", "new"]
            assert texts(turn["replies"]) == ["new"]
        assert history(store) == ["q0", "a0", "q1", "new"]

    def test_again_and_again(self, run, store, writer):
        seen = set(ids(store.retrieve_messages("h")))
        for number in range(5):
            last = ids(store.retrieve_messages("h"))[-1]
            (reply,) = run(writer, "h", [], [ASSISTANT(f"new {number}")], replace_from_message_id=last)["replies"]
            assert reply.text == f"new {number}"
            assert reply.meta["chat_question_id"] == "id1"
            assert reply.meta["chat_message_id"] not in seen
            seen.add(reply.meta["chat_message_id"])
        assert history(store) == ["q0", "a0", "q1", "new 4"]

    def test_without_the_question_a_repeated_call_stores_it_once_too(self, run, store, writer):
        old = ids(store.retrieve_messages("h"))[-1]
        for said in ("new", "newer"):
            turn = run(writer, "h", [], [ASSISTANT(said)], replace_from_message_id=old)
            assert texts(turn["replies"]) == ["new"]
        assert history(store) == ["q0", "a0", "q1", "new"]

    def test_several_replies_and_steps_of_a_tool(self, run, store, writer):
        call = ToolCall("look_up", {}, id="c")
        steps = [ASSISTANT(tool_calls=[call]), ChatMessage.from_tool("found", origin=call)]
        old = ids(store.retrieve_messages("h"))[-1]
        for _ in range(2):
            turn = run(
                writer,
                "h",
                [question("q1", "id1"), *steps],
                [ASSISTANT("x"), ASSISTANT("y")],
                replace_from_message_id=old,
            )
            assert texts(turn["replies"]) == ["x", "y"]
            assert history(store) == ["q0", "a0", "q1", None, None, "x", "y"]
        # Only the last step is given anew.
        last = ids(store.retrieve_messages("h"))[-2]
        for _ in range(2):
            run(writer, "h", [question("q1", "id1"), *steps], [ASSISTANT("z")], replace_from_message_id=last)
            assert history(store) == ["q0", "a0", "q1", None, None, "z"]

    def test_a_message_in_the_middle_takes_back_all_after_it(self, run, store, writer):
        first = ids(store.retrieve_messages("h"))[1]
        turn = run(writer, "h", [question("q0", "id0")], [ASSISTANT("new")], replace_from_message_id=first)
        assert texts(turn["messages"]) == ["q0", "new"]
        assert history(store) == ["q0", "new"]

    def test_the_next_turn_goes_on_with_the_new_answer(self, run, store, writer):
        old = ids(store.retrieve_messages("h"))[-1]
        run(writer, "h", [question("q1", "id1")], [ASSISTANT("new")], replace_from_message_id=old)
        assert texts(run(ChatMessageRetriever(store), "h", current_messages=[question("q1", "id1")])["replies"]) == [
            "new"
        ]
        run(writer, "h", [question("q2", "id2")], [ASSISTANT("a2")])
        assert history(store) == ["q0", "a0", "q1", "new", "q2", "a2"]


class TestEdit:
    @pytest.mark.parametrize("new_id", ["edited", "id1"], ids=["a new id", "the same id"])
    def test_the_edited_question_and_its_answer_take_the_place_of_the_old_ones(self, run, store, writer, new_id):
        for number in range(2):
            edited = [question("q1, edited", new_id)]
            turn = run(writer, "h", edited, [ASSISTANT("new")], replace_from_message_id="id1")
            assert turn["messages_written"] == (2 if number == 0 else 0)
            assert texts(turn["messages"]) == ["q1, edited", "new"]
            assert texts(turn["replies"]) == ["new"]
            assert history(store) == ["q0", "a0", "q1, edited", "new"]

    def test_a_repeated_edit_gets_the_first_answer(self, run, store, writer):
        for said in ("new", "newer"):
            edited = [ChatMessage.from_system("s"), question("edited", "new id")]
            turn = run(writer, "h", edited, [ASSISTANT(said)], replace_from_message_id="id0")
            assert texts(turn["messages"]) == ["s", "edited", "new"]
        assert history(store) == ["edited", "new"]

    def test_a_question_that_was_stored_at_the_end_moves(self, run, store, writer):
        store.write_messages("h", [question("edited", "new id")])
        run(writer, "h", [question("edited", "new id")], [ASSISTANT("new")], replace_from_message_id="id1")
        assert history(store) == ["q0", "a0", "edited", "new"]


class TestRefused:
    def test_if_others_have_written(self, run, store, writer):
        revision = run(ChatMessageRetriever(store), "h")["revision"]
        store.write_messages("h", [USER("by another")])
        with pytest.raises(ChatHistoryChangedError):
            run(
                writer,
                "h",
                [question("edited", "new id")],
                [ASSISTANT("new")],
                replace_from_message_id="id1",
                expected_revision=revision,
            )
        assert history(store) == ["q0", "a0", "q1", "a1", "by another"]

    @pytest.mark.parametrize("messages", [[], [question("q1", "id1")], [question("edited", "new id")]])
    def test_if_the_message_was_never_there(self, run, store, writer, messages):
        for expected in (None, 1):
            with pytest.raises((MessageNotFoundError, ChatHistoryChangedError)):
                options = {"replace_from_message_id": "other", "expected_revision": expected}
                run(writer, "h", messages, [ASSISTANT("new")], **options)
        assert history(store) == ["q0", "a0", "q1", "a1"]

    def test_wrong_arguments(self, run, store, writer):
        with pytest.raises(ValueError, match="replace_from_message_id must be"):
            run(writer, "h", [], [ASSISTANT("new")], replace_from_message_id=5)
        with pytest.raises(ValueError, match="another policy than SKIP"):
            overwriting = ChatMessageWriter(store, policy=DuplicatePolicy.OVERWRITE)
            run(overwriting, "h", [], [ASSISTANT("new")], replace_from_message_id="id1")
        with pytest.raises(ValueError, match=r"^replies\[0\]"):
            run(writer, "h", [], [ASSISTANT("new", meta={"chat_message_id": 5})], replace_from_message_id="id1")
        assert history(store) == ["q0", "a0", "q1", "a1"]

    def test_by_a_store_that_cannot_replace(self, run):
        writer = ChatMessageWriter(MinimalStore())
        with pytest.raises(ValueError, match="MinimalStore has no replace_messages"):
            run(writer, "h", [], [ASSISTANT("new")], replace_from_message_id="id1")


def pipeline_of(store, model, is_edit):
    """The pipeline of docs/turns.md, with the revision connected. An edit has no writer before the model."""
    pipeline = turn_pipeline(store, model)
    if is_edit:
        pipeline.remove_component("question_writer")
        pipeline.connect("prompt_builder.prompt", "retriever.current_messages")
        pipeline.connect("prompt_builder.prompt", "answer_writer.messages")
    pipeline.connect("retriever.revision", "answer_writer.expected_revision")
    return pipeline


def turn_of(is_edit, replaced_id):
    query, request_id = ("edited", "new id") if is_edit else ("q1", "id1")
    return {
        "prompt_builder": {"query": query, "request_id": request_id},
        **({} if is_edit else {"question_writer": {"chat_history_id": "h"}}),
        "retriever": {"chat_history_id": "h", "before_message_id": replaced_id},
        "answer_writer": {"chat_history_id": "h", "replace_from_message_id": replaced_id},
    }


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)  # the moments are the same on all engines
@pytest.mark.parametrize("is_edit", [False, True], ids=["regenerate", "edit"])
def test_a_pipeline_that_fails_at_any_moment_and_comes_again_leaves_the_old_or_the_new(store, writer, run, is_edit):
    old = store.retrieve_messages("h")
    replaced_id = "id1" if is_edit else ids(old)[-1]
    question = "edited" if is_edit else "q1"
    outcomes = set()
    for moment in itertools.count(1):
        copy, moments = type(store).from_dict(store.to_dict()), Moments(moment, CrashError)
        copy.engine = FailingEngine(copy.engine, moments)
        try:
            run(pipeline_of(copy, Model(moments), is_edit), turn_of(is_edit, replaced_id))
        except CrashError:
            outcomes.add(texts(old) == history(store))
        else:
            assert moments.passed < moment
            break
        stored = history(store)
        turn = run(pipeline_of(store, Model(), is_edit), turn_of(is_edit, replaced_id))["answer_writer"]
        assert history(store) == ["q0", "a0", question, turn["replies"][0].text]
        assert turn["replies"][0].text.startswith(f"{question} (answer")
        assert stored in (texts(old), history(store))
        store.delete_messages("h")
        store.write_messages("h", old)
    assert outcomes == {True, False}


#: How often an answer is asked for again, in the fast suite and in the full one. It fails more often than that.
REGENERATED = {
    "memory": (10, 500),
    "sqlite": (10, 500),
    "postgres": (5, 500),
    "redis": (5, 500),
    "redis_cluster": (0, 500),
}


def test_an_answer_that_is_given_anew_through_failures_is_there_once(request, store, writer, run):
    """The process ends at any moment, also when the store has replaced the answer and its caller does not know yet."""
    engine, way = request.node.callspec.params["store"], run.__name__
    number = REGENERATED[engine][request.config.getoption("--full")] // 2
    rng = random.Random(f"{engine} {way}")
    failed = 0
    for _ in range(number):
        before = store.retrieve_messages("h")
        turn = None
        while turn is None:
            copy, moments = type(store).from_dict(store.to_dict()), Moments(rng.randrange(1, 28), CrashError)
            copy.engine = FailingEngine(copy.engine, moments)
            try:
                turn = run(pipeline_of(copy, Model(moments), False), turn_of(False, ids(before)[-1]))["answer_writer"]
            except CrashError:
                failed += 1
            stored = history(store)
            assert stored[:-1] == ["q0", "a0", "q1"]
            assert stored == texts(before) or stored[-1].startswith("q1 (answer")
        assert stored[-1] == turn["replies"][0].text
        assert stored != texts(before)
    print(failed, "failed and came again")
    assert failed > number // 3


KILLED = """
import os, signal, sys
from haystack.dataclasses import ChatMessage
from haystack_chat_store import SQLiteChatMessageStore
from haystack_chat_store.stores.sqlite import connections

path, moment = sys.argv[1], int(sys.argv[2])
store = SQLiteChatMessageStore(path, last_k=None)
opened, passed = connections.sqlite3.connect, 0

def killing(statement):
    global passed
    passed += 1
    if passed == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def connect(*arguments, **options):
    connection = opened(*arguments, **options)
    connection.set_trace_callback(killing)
    return connection

connections.sqlite3.connect = connect
answer = ChatMessage.from_assistant("new", meta={"chat_message_id": "new"})
print(store.replace_messages("h", "old", [answer]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.full), 7])
def test_a_process_killed_at_any_statement_of_a_replacement_leaves_the_old_or_the_new(tmp_path, step):
    path, options = str(tmp_path / "h.db"), {"capture_output": True, "text": True, "timeout": 120}
    store = SQLiteChatMessageStore(path, last_k=None)
    number = 0
    for moment in itertools.count(1, step):
        store.delete_messages("h")
        store.write_messages("h", [question("q", "q"), ASSISTANT("old", meta={"chat_message_id": "old"})])
        store.close()
        killed = run_python(["-c", KILLED, path, str(moment)], **options)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        number += 1
        assert history(store) in (["q", "old"], ["q", "new"])
        store.close()
        again = run_python(["-c", KILLED, path, "0"], **options)
        assert again.stdout.strip() in ("0", "1"), again.stderr
        assert history(store) == ["q", "new"]
        assert store.engine.run(store.engine.check, store.scope) == []
    store.close()
    assert number * step >= 7


KILLED_ON_A_SERVER = """
import json, os, sys
from haystack.core.serialization import import_class_by_name
from haystack.dataclasses import ChatMessage

stored, path = json.loads(sys.argv[1]), sys.argv[2]
with open(path, "w") as file:
    file.write(str(os.getpid()))
store = import_class_by_name(stored["type"]).from_dict(stored)
answer = ChatMessage.from_assistant("new", meta={"chat_message_id": "new"})
print(store.replace_messages("h", "old", [answer]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "store", [pytest.param(name, marks=pytest.mark.servers) for name in ("postgres", "redis")], indirect=True
)
def test_a_process_killed_at_any_answer_of_the_server_leaves_the_old_or_the_new(store, tmp_path, is_full):
    url = os.environ["CHAT_STORE_URL"]
    arguments = ["-c", KILLED_ON_A_SERVER, json.dumps(store.to_dict()), str(tmp_path / "pid")]
    outcomes = []
    with Gateway(urlsplit(url).port) as gateway:
        options = {"capture_output": True, "text": True, "timeout": 120}
        options["env"] = {**os.environ, "CHAT_STORE_URL": gateway.url(url)}
        for moment in itertools.count(1, 1 if is_full else 7):
            store.delete_messages("h")
            store.write_messages("h", [question("q", "q"), ASSISTANT("old", meta={"chat_message_id": "old"})])
            answers = itertools.count(1)

            def is_heard(_request, moment=moment, answers=answers):
                if next(answers) == moment:
                    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
                    return False
                return True

            gateway.is_answered = is_heard
            killed = run_python(arguments, **options)
            if killed.returncode == 0:
                break
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            outcomes.append(history(store))
            assert outcomes[-1] in (["q", "old"], ["q", "new"])
            gateway.is_answered = lambda _request: True
            again = run_python(arguments, **options)
            assert again.stdout.strip() in ("0", "1"), again.stderr
            assert history(store) == ["q", "new"]
            assert store.engine.run(store.engine.check, store.scope) == []
    print(len(outcomes), "killed")
    assert ["q", "old"] in outcomes
    assert not is_full or ["q", "new"] in outcomes
