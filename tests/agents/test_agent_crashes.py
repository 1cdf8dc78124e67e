# SPDX-License-Identifier: Apache-2.0
"""
Agents that end at any moment: what they have saved stays, once, and the next run goes on where they stopped.

One turn is killed with its process, by SIGKILL, at every moment it has. Then many turns crash hundreds of times, at
random moments; these crashes are exceptions that nothing handles, and all objects are made anew after each.
"""

import random

import pytest
from agent_programs import WAYS, Moments, completed, databases, ids, planned_agent, run_sync, said
from haystack.dataclasses import ChatMessage

from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.processes import Program


@pytest.fixture(scope="module")
def make_store():
    with databases() as make:
        yield make


@pytest.fixture
def new_store(request, make_store, tmp_path):
    return lambda: make_store(request.param, tmp_path)


def copy_of(store):
    return type(store).from_dict(store.to_dict())


def transcript(messages):
    return [said(message) for message in messages]


# ---------------------------------------------------------------------- killed


def killed_everywhere(store, report, way, plan, number_of_moments):
    """
    Fork one child after the other. Each goes on with the turn of the one before, reports its answer, and begins a turn
    of its own, of which it reports what is acknowledged, until it is killed: the first at the first moment, and so on.
    """
    import json
    import os
    import signal
    import traceback

    from agent_programs import WAYS, Moments, planned_agent
    from haystack.dataclasses import ChatMessage

    from haystack_chat_store.ids import MESSAGE_ID_KEY

    def take_turn(moment, moments, is_new):
        question = [ChatMessage.from_user(plan, meta={MESSAGE_ID_KEY: "q"})] if is_new else []
        context = {"chat_history_id": f"killed at {moment}"}
        return WAYS[way](planned_agent(store, moments), question, hook_context=context)["last_message"].text

    def live(moment, is_saved, output):
        def tell(value):
            os.write(output, (json.dumps(value) + "\n").encode())

        class Telling(list):
            def __iadd__(self, saved):
                tell(saved)
                return self

        if moment > 1:
            # Who does not know that the question is saved asks it again.
            tell(take_turn(moment - 1, Moments(), is_new=not is_saved))
        moments = Moments([moment], lambda: os.kill(os.getpid(), signal.SIGKILL))
        moments.acknowledged = Telling()
        if moment <= number_of_moments:
            take_turn(moment, moments, is_new=True)

    is_saved = False
    for moment in range(1, number_of_moments + 2):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                live(moment, is_saved, write_end)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(write_end)
        with os.fdopen(read_end) as reported:
            told = [json.loads(line) for line in reported]
        is_saved = ["q"] in told
        report([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told])


@pytest.mark.parametrize(
    ("new_store", "way"),
    [
        ("sqlite", "sync"),
        pytest.param("postgres", "async", marks=pytest.mark.servers),
        pytest.param("sqlite", "async", marks=pytest.mark.full),
        pytest.param("postgres", "sync", marks=[pytest.mark.servers, pytest.mark.full]),
    ],
    indirect=["new_store"],
)
def test_a_process_killed_at_any_moment_loses_and_doubles_nothing(new_store, way):
    plan, moments, undisturbed = "plan 2 3 check", Moments(), new_store()
    result = WAYS[way](planned_agent(copy_of(undisturbed), moments), [ChatMessage.from_user(plan)])
    expected = transcript(undisturbed.retrieve_messages("h"))
    # The question, a call and two results, a call and three results, the answer, what a hook said to it, the answer.
    assert len(expected) == 11

    store = new_store()
    number = len(moments.names)
    with Program(killed_everywhere, store, way, plan, number) as program:
        program.begin()
        exit_codes, told = zip(*program.reports_to_the_end(), strict=True)
    assert exit_codes == (-9,) * number + (0,)
    for moment in range(1, number + 1):
        stored = store.retrieve_messages(f"killed at {moment}")
        acknowledged = {saved for batch in told[moment - 1][moment > 1 :] for saved in batch}
        assert told[moment][0] == result["last_message"].text, moment
        assert acknowledged <= set(ids(stored)), moment
        assert len(set(ids(stored))) == len(stored), moment
        assert transcript(completed(stored)) == expected, moment


# ---------------------------------------------------------------------- many turns


class Crash(BaseException):
    """Ends a run as the end of its process would: nothing handles it, and what is not stored is forgotten."""


def crash():
    raise Crash


PLANS = [[], [2], [1, 2], [3, 1], [1, 1, 1], [1, "check"]]


def planned_turns(seed, number):
    plans = random.Random(seed)
    return [" ".join(["plan", *map(str, plans.choice(PLANS))]) for _ in range(number)]


def chat_that_crashes(store, turns, seed):
    """
    Have a conversation whose runs crash at random moments. After each crash everything is made anew but the database.

    :returns: At how many moments it crashed, and the ids of what the store has acknowledged.
    """
    randomly = random.Random(seed)
    crashes, acknowledged = 0, []
    for number, turn in enumerate(turns):
        question = ChatMessage.from_user(turn, meta={MESSAGE_ID_KEY: f"question {number}"})
        is_done = False
        while not is_done:
            moments = Moments([randomly.randint(1, 24)], crash)
            agent = planned_agent(copy_of(store), moments, has_call_ids=bool(number % 2))
            # A client that knows of its question tries again with it; one that was started anew just goes on.
            is_known = question.meta[MESSAGE_ID_KEY] in acknowledged
            messages = [] if is_known and randomly.random() < 0.5 else [question]
            try:
                randomly.choice([*WAYS.values()])(agent, messages)
                is_done = True
            except Crash:
                crashes += 1
            acknowledged += moments.acknowledged
    return crashes, acknowledged


@pytest.mark.parametrize(
    ("new_store", "seed"),
    [
        ("sqlite", 6),
        *(
            pytest.param(engine, 6, marks=[pytest.mark.servers, pytest.mark.full])
            for engine in ("postgres", "redis", "redis_cluster")
        ),
    ],
    indirect=["new_store"],
)
def test_turns_with_ten_crashes_each_say_the_same_as_without(new_store, seed, is_full):
    turns, undisturbed, store = planned_turns(seed, 50 if is_full else 25), new_store(), new_store()
    for turn in turns:
        run_sync(planned_agent(copy_of(undisturbed)), [ChatMessage.from_user(turn)])

    crashes, acknowledged = chat_that_crashes(store, turns, seed)

    print(crashes, "failed and came again")
    assert crashes >= 10 * len(turns)
    stored = store.retrieve_messages("h")
    assert len(set(ids(stored))) == len(stored)
    assert set(acknowledged) <= set(ids(stored))
    expected = transcript(undisturbed.retrieve_messages("h"))
    assert transcript(completed(stored)) == expected
    # What remains are steps that were begun, each by a run that crashed.
    assert 0 < len(stored) - len(expected) <= crashes
