# SPDX-License-Identifier: Apache-2.0
"""
A turn that fails at any moment, and comes again: its question is stored once, and its answer once.

The pipeline stores the question first. What fails is the store or the model, before or after it has done its work; the
process may end, or the task may be cancelled. Then the same request comes again, often enough to get an answer.
"""

import asyncio
import os
import random
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from haystack.core.errors import PipelineRuntimeError
from haystack.dataclasses import ChatMessage
from turn_pipelines import (
    ENGINES,
    CrashError,
    FailingEngine,
    Model,
    Moments,
    ask,
    ask_async,
    store_of,
    turn_pipeline,
)

from haystack_chat_store import (
    SQLiteChatMessageStore,
    StoreUnavailableError,
)
from haystack_chat_store.conversation.rounds import question_groups
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.testing.fork_server import run_python

# A turn that comes again has this many moments: six calls of the store and one of the model.
MOMENTS = 14
FAILURES = [RuntimeError, StoreUnavailableError, CrashError, None]

#: The number of random turns of an engine, in the fast suite and in the full one. They fail more often than that.
TURNS = {
    "memory": (40, 600),
    "sqlite": (30, 600),
    "postgres": (15, 600),
    "redis": (15, 600),
    "redis_cluster": (0, 600),
}


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def store(request, engine, tmp_path, monkeypatch):
    store = store_of(engine, request, tmp_path, monkeypatch)
    yield store
    store.close()


def failing_copy(store, moments):
    copy = type(store).from_dict(store.to_dict())
    copy.engine = FailingEngine(copy.engine, moments)
    return copy


def take_turn(store, way, moments, query, request_id):
    """Run a turn, with all objects made anew. Return what it returned and how often the model was asked."""
    model = Model(moments)
    pipeline = turn_pipeline(failing_copy(store, moments), model)

    async def take_turn_async():
        moments.task = asyncio.current_task()
        return await ask_async(pipeline, query, request_id)

    if way == "sync":
        return ask(pipeline, query, request_id), model.asked
    return asyncio.run(take_turn_async()), model.asked


def failed_turn(store, way, rng, query, request_id):
    failure = rng.choice(FAILURES)
    if way == "sync" and failure is None:
        failure = CrashError
    moments = Moments(rng.randrange(1, MOMENTS + 5), failure)
    try:
        return take_turn(store, way, moments, query, request_id)
    except (Exception, CrashError, asyncio.CancelledError):
        return None


def stored_rounds(store):
    return [[message.text for message in group] for group in question_groups(store.retrieve_messages("h")) if group]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_turn_that_fails_anywhere_and_comes_again_is_stored_once(request, store, engine, way):
    number = TURNS[engine][request.config.getoption("--full")] // 2
    rng = random.Random(f"{engine} {way}")
    failed = repeated = 0
    answers = []
    for turn in range(number):
        query, request_id = f"question {turn}", f"request {turn}"
        while failed_turn(store, way, rng, query, request_id) is None:
            failed += 1
            assert failed < 50 * number, "The turn never succeeds."
        if rng.random() < 0.3 and turn:  # somebody repeats an older request
            older = rng.randrange(turn)
            result, asked = take_turn(store, way, Moments(), f"question {older}", f"request {older}")
            assert (asked, result["messages_written"]) == (0, 0)
            assert [reply.text for reply in result["replies"]] == [answers[older]]
            repeated += 1
        result, asked = take_turn(store, way, Moments(), query, request_id)
        assert asked == 0
        answers.append(result["replies"][0].text)
        assert [message.text for message in result["messages"]] == ["Be brief.", query, answers[-1]]
        assert result["messages"][1:] == store.retrieve_messages("h", last_k=1)

    assert stored_rounds(store) == [[f"question {turn}", answer] for turn, answer in enumerate(answers)]
    assert all(answer.startswith(f"question {turn} (") for turn, answer in enumerate(answers))
    print(failed, "failed and came again")
    assert failed > number // 2
    assert repeated or number < 10


@pytest.mark.parametrize("engine", ["memory", "sqlite"], indirect=True)  # the moments are the same on all engines
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("moment", range(1, MOMENTS + 1))
def test_at_each_moment_the_question_is_there_or_the_model_was_not_asked(store, way, moment):
    moments = Moments(moment, CrashError)
    try:
        take_turn(store, way, moments, "question", "request")
    except CrashError:
        stored = [message.text for message in store.retrieve_messages("h")]
        assert stored[:1] == ["question"] or moment <= 2
    else:
        assert moment > moments.passed
    assert take_turn(store, way, Moments(), "question", "request")[0]["replies"]
    assert [len(group) for group in stored_rounds(store)] == [2]


def test_a_question_stays_if_its_answer_never_comes(store):
    for turn in range(3):
        with pytest.raises(PipelineRuntimeError):
            ask(turn_pipeline(store, Model(Moments(1, RuntimeError))), f"question {turn}")
    assert stored_rounds(store) == [["question 0"], ["question 1"], ["question 2"]]


class TestTwoAtOnce:
    """Requests on one conversation at the same moment: a double click, or two tabs."""

    def test_different_questions_end_as_rounds_of_their_own(self, store):
        together = threading.Barrier(6)

        def tab(number):
            pipeline = turn_pipeline(failing_copy(store, Moments()), Model())
            for turn in range(3):
                together.wait(60)
                query = f"question {turn} of tab {number}"
                result = ask(pipeline, query)
                assert result["messages_written"] == 1
                assert result["replies"][0].text.startswith(f"{query} (")

        in_threads(*(partial(tab, number) for number in range(6)))
        rounds = stored_rounds(store)
        assert len(rounds) == 18
        assert all(answer.startswith(f"{query} (") for query, answer in rounds)

    def test_the_same_request_twice_ends_as_one_round(self, store):
        together = threading.Barrier(2)
        results = {}

        def click(number):
            pipeline = turn_pipeline(failing_copy(store, Moments()), Model())
            for turn in range(10):
                together.wait(60)
                results[number, turn] = ask(pipeline, f"question {turn}", f"request {turn}")

        in_threads(partial(click, 0), partial(click, 1))
        rounds = stored_rounds(store)
        assert [query for query, _ in rounds] == [f"question {turn}" for turn in range(10)]
        for turn, (_, answer) in enumerate(rounds):
            assert [results[number, turn]["replies"][0].text for number in range(2)] == [answer, answer]
        assert sum(result["messages_written"] for result in results.values()) == 10

    def test_as_tasks_of_one_loop(self, store):
        pipeline = turn_pipeline(store, Model())

        async def main():
            asked = [ask_async(pipeline, f"question {number % 5}", f"request {number % 5}") for number in range(10)]
            return await asyncio.gather(*asked)

        results = asyncio.run(main())
        rounds = dict(stored_rounds(store))
        assert len(rounds) == 5
        for number, result in enumerate(results):
            assert result["replies"][0].text == rounds[f"question {number % 5}"]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_every_engine_looks_up_where_a_message_is(store, way):
    def position(message_id, chat_history_id="h", scope=store.scope):
        place = (store.engine.position, scope, chat_history_id, message_id)
        return store.engine.run(*place) if way == "sync" else asyncio.run(store.engine.run_async(*place))

    store.write_messages(
        "h", [ChatMessage.from_user(each, meta={"chat_message_id": each}) for each in ("a", "b", "ß 🌍")]
    )
    assert [position(message_id) for message_id in ("a", "b", "ß 🌍", "A", "nowhere")] == [0, 1, 2, None, None]
    assert position("a", "another history") is None
    assert position("a", scope=replace(store.scope, namespace="another")) is None
    store.delete_messages("h", message_ids=["b"])
    assert [position(message_id) for message_id in ("b", "ß 🌍")] == [None, 2]


KILLED = """
import os, signal, sys
from turn_pipelines import FailingEngine, Model, Moments, ask, turn_pipeline
from haystack_chat_store import SQLiteChatMessageStore

class KillingMoments(Moments):
    def next(self):
        if self.begins():
            os.kill(os.getpid(), signal.SIGKILL)

path, moment = sys.argv[1], int(sys.argv[2])
moments = KillingMoments(moment)
store = SQLiteChatMessageStore(path, last_k=None)
store.engine = FailingEngine(store.engine, moments)
print(ask(turn_pipeline(store, Model(moments)), "question", "request")["replies"][0].text)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "moment", [each if each in (2, 5, 8) else pytest.param(each, marks=pytest.mark.full) for each in range(1, 11)]
)
def test_a_process_that_is_killed_anywhere_leaves_a_turn_that_can_be_sent_again(tmp_path, moment):
    path = tmp_path / "h.db"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    killed = run_python(["-c", KILLED, str(path), str(moment)], **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_python(["-c", KILLED, str(path), "0"], **options)
    assert again.returncode == 0, again.stderr

    store = SQLiteChatMessageStore(path, last_k=None)
    assert [message.text for message in store.retrieve_messages("h")] == ["question", again.stdout.strip()]
    store.close()
