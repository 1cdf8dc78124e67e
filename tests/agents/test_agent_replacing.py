# SPDX-License-Identifier: Apache-2.0
"""A run that takes the place of what was said: the model is asked first, and replaces the old turn in one step."""

import itertools

import pytest
from agent_programs import WAYS
from agent_runs import agent_with, asked, call, reply, says, user
from haystack.components.agents import State
from haystack.dataclasses import ChatMessage
from haystack.hooks import hook
from haystack_experimental.chat_message_stores.in_memory import InMemoryChatMessageStore as ExperimentalStore
from turn_pipelines import ENGINES, CrashError, FailingEngine, Moments, store_of

from haystack_chat_store.conversation.shown import INTERRUPTED
from haystack_chat_store.errors import ChatHistoryChangedError, MessageNotFoundError, StoreUnavailableError
from haystack_chat_store.ids import MESSAGE_ID_KEY

OLD = ["q0", "a0", "q1", "a1"]


@pytest.fixture(params=ENGINES)
def store(request, tmp_path, monkeypatch):
    """A store with a history of two answered questions."""
    store = store_of(request.param, request, tmp_path, monkeypatch)
    agent = agent_with(store, reply("a0"), reply("a1"))
    for number in range(2):
        agent.run([user(f"q{number}", chat_message_id=f"id{number}")], hook_context={"chat_history_id": "h"})
    yield store
    store.close()


@pytest.fixture(params=WAYS)
def run(request):
    return WAYS[request.param]


def texts(store):
    return [message.text for message in store.retrieve_messages("h")]


def last_id(store):
    return store.retrieve_messages("h")[-1].meta[MESSAGE_ID_KEY]


def context(**options):
    return {"hook_context": {"chat_history_id": "h", **options}}


class FailingModelError(Exception):
    pass


def fail(messages):
    raise FailingModelError


class TestRegenerate:
    @pytest.mark.parametrize("messages", [[], [user("q1", chat_message_id="id1")]], ids=["no messages", "the question"])
    @pytest.mark.parametrize("until", [{}, {"until_message_id": "id1"}], ids=["before it", "until the question"])
    def test_the_new_answer_takes_the_place_of_the_old_one_once(self, store, run, messages, until):
        agent = agent_with(store, reply("new"), reply("never"))
        revision = store.get_chat_history("h").revision
        options = context(replace_from_message_id=last_id(store), expected_revision=revision, **until)
        for number in range(2):
            result = run(agent, messages, **options)
            assert result["last_message"].text == "new"
            assert result["step_count"] == (number == 0)
            assert texts(store) == ["q0", "a0", "q1", "new"]
        assert asked(agent) == says([user("q0"), reply("a0"), user("q1")])
        assert len(agent.chat_generator.asked) == 1
        assert store.retrieve_messages("h")[-1].meta["chat_question_id"] == "id1"

    def test_again_and_again(self, store, run):
        for number in range(3):
            run(agent_with(store, reply(f"new {number}")), [], **context(replace_from_message_id=last_id(store)))
            assert texts(store) == ["q0", "a0", "q1", f"new {number}"]

    def test_steps_after_the_first_are_appended(self, store, run):
        seen = []

        def second(messages):
            seen.append(texts(store))
            return reply("new")

        agent = agent_with(store, reply("Let me look.", call("a")), second)
        run(agent, [], **context(replace_from_message_id=last_id(store)))
        assert seen == [["q0", "a0", "q1", "Let me look.", None]]
        assert texts(store) == ["q0", "a0", "q1", "Let me look.", None, "new"]

    def test_in_the_middle_of_the_history(self, store, run):
        first = store.retrieve_messages("h")[1].meta[MESSAGE_ID_KEY]
        agent = agent_with(store, reply("new"))
        run(agent, [], **context(replace_from_message_id=first))
        assert asked(agent) == says([user("q0")])
        assert texts(store) == ["q0", "new"]

    def test_a_repeated_run_finds_its_turn_though_others_have_asked_since(self, store, run):
        options = context(replace_from_message_id=last_id(store))
        run(agent_with(store, reply("new")), [], **options)
        run(agent_with(store, reply("a2")), [user("q2")], **context())
        result = run(agent_with(store), [], **options)
        assert result["last_message"].text == "new"
        assert texts(store) == ["q0", "a0", "q1", "new", "q2", "a2"]


class TestEdit:
    @pytest.mark.parametrize("first", ["id0", "id1"])
    def test_the_edited_question_and_its_answer_take_the_place_of_the_old_ones_once(self, store, run, first):
        agent = agent_with(store, reply("new"), reply("never"))
        for _ in range(2):
            result = run(agent, [user("edited", chat_message_id="new id")], **context(replace_from_message_id=first))
            assert result["last_message"].text == "new"
        before = OLD[: 2 * int(first[-1])]
        assert texts(store) == [*before, "edited", "new"]
        assert [message.text for message in agent.chat_generator.asked[-1]] == [*before, "edited"]
        assert len(agent.chat_generator.asked) == 1

    def test_a_question_with_the_same_id(self, store, run):
        run(
            agent_with(store, reply("new")),
            [user("edited", chat_message_id="id1")],
            **context(replace_from_message_id="id1"),
        )
        assert texts(store) == ["q0", "a0", "edited", "new"]

    def test_a_repeated_edit_without_an_id_is_refused(self, store, run):
        options = context(replace_from_message_id="id1")
        run(agent_with(store, reply("new")), [user("edited")], **options)
        with pytest.raises(MessageNotFoundError, match="give its question an id"):
            run(agent_with(store), [user("edited")], **options)
        assert texts(store) == ["q0", "a0", "edited", "new"]


class TestFailures:
    def test_a_failing_model_leaves_the_old_answer(self, store, run):
        for first, messages in ((last_id(store), []), ("id1", [user("edited", chat_message_id="new id")])):
            with pytest.raises(FailingModelError):
                run(agent_with(store, fail), messages, **context(replace_from_message_id=first))
            assert texts(store) == OLD

    def test_a_model_that_fails_after_a_step_leaves_the_new_turn_which_goes_on(self, store, run):
        options = context(replace_from_message_id=last_id(store))
        with pytest.raises(FailingModelError):
            run(agent_with(store, reply("Let me look.", call("a")), fail), [], **options)
        assert texts(store) == ["q0", "a0", "q1", "Let me look.", None]
        agent = agent_with(store, reply("new"))
        assert run(agent, [], **options)["last_message"].text == "new"
        assert texts(store) == ["q0", "a0", "q1", "Let me look.", None, "new"]

    def test_what_hooks_add_before_the_run_is_no_reply(self, store, run):
        @hook
        def add(state: State) -> None:
            state.set("messages", [reply("Documents, perhaps?"), user("Yes.")])

        options = context(replace_from_message_id=last_id(store))
        with pytest.raises(FailingModelError):
            run(agent_with(store, fail, hooks={"before_run": [add]}), [], **options)
        assert texts(store) == OLD
        run(agent_with(store, reply("new"), hooks={"before_run": [add]}), [], **options)
        assert texts(store) == ["q0", "a0", "q1", "Documents, perhaps?", "Yes.", "new"]


class TestRefused:
    def test_if_others_have_written_meanwhile(self, store, run):
        def answer(messages):
            store.write_messages("h", [ChatMessage.from_user("by another")])
            return reply("new")

        revision = store.get_chat_history("h").revision
        options = context(replace_from_message_id=last_id(store), expected_revision=revision)
        for raises in (True, False):
            with pytest.raises(ChatHistoryChangedError):
                run(agent_with(store, answer, hook_options={"raise_on_failure": raises}), [], **options)
        assert texts(store) == [*OLD, "by another", "by another"]

    def test_a_question_is_refused_before_the_model_is_asked_if_others_have_written(self, store, run):
        revision = store.get_chat_history("h").revision
        store.write_messages("h", [ChatMessage.from_user("by another")])
        agent = agent_with(store, reply("never"))
        with pytest.raises(ChatHistoryChangedError):
            run(agent, [user("q2")], **context(expected_revision=revision))
        assert not agent.chat_generator.asked
        assert texts(store) == [*OLD, "by another"]

    def test_a_question_that_comes_again_is_no_conflict_with_itself(self, store, run):
        revision = store.get_chat_history("h").revision
        for model, failure in ((fail, FailingModelError), (reply("a2"), None), (reply("never"), None)):
            agent = agent_with(store, model)
            question, options = [user("q2", chat_message_id="id2")], context(expected_revision=revision)
            if failure is None:
                assert run(agent, question, **options)["last_message"].text == "a2"
            else:
                with pytest.raises(failure):
                    run(agent, question, **options)
        assert texts(store) == [*OLD, "q2", "a2"]

    def test_what_others_have_stored_while_the_model_answers_is_not_replaced(self, store, run):
        def answer(_):
            store.write_messages("h", [user("q2"), reply("a2")])
            return reply("too late")

        with pytest.raises(ChatHistoryChangedError):
            run(agent_with(store, answer), [], **context(replace_from_message_id=last_id(store)))
        assert texts(store) == [*OLD, "q2", "a2"]

    def test_an_answer_to_another_question_stays(self, store, run):
        other, replaced = user("q2", chat_message_id="id2"), last_id(store)
        store.replace_messages(
            "h", "id1", [other, *store.retrieve_messages("h")[2:], reply("a2", chat_question_id="id2")]
        )
        run(agent_with(store, reply("new")), [], **context(replace_from_message_id=replaced))
        assert sorted(texts(store)) == ["a0", "a2", "new", "q0", "q1", "q2"]

    def test_if_the_message_was_never_there(self, store, run):
        agent = agent_with(store, reply("never"))
        with pytest.raises(MessageNotFoundError, match="'other'"):
            run(agent, [], **context(replace_from_message_id="other"))
        assert not agent.chat_generator.asked

    def test_if_nothing_is_asked(self, store, run):
        agent = agent_with(store, reply("never"))
        with pytest.raises(ValueError, match="nothing to answer"):
            run(agent, [], **context(replace_from_message_id="id1"))
        assert not agent.chat_generator.asked
        assert texts(store) == OLD

    @pytest.mark.parametrize("wrong", [{"replace_from_message_id": 5}, {"expected_revision": "1"}])
    def test_wrong_values(self, store, run, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            run(agent_with(store), [], **context(**wrong))


@pytest.mark.parametrize("option", [{"replace_from_message_id": "id"}, {"expected_revision": 0}])
def test_a_store_that_cannot_is_named_before_the_model_is_asked(run, option):
    store = ExperimentalStore()
    store.write_messages("other store", [user("q", chat_message_id="id"), reply("a")])
    agent = agent_with(store, reply("never"))
    with pytest.raises(ValueError, match="InMemoryChatMessageStore"):
        run(agent, [user("edited")], hook_context={"chat_history_id": "other store", **option})
    assert not agent.chat_generator.asked
    store.delete_all_messages()


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)  # the moments are the same on all engines
@pytest.mark.parametrize("failure", [CrashError, StoreUnavailableError])
@pytest.mark.parametrize("is_edit", [False, True], ids=["regenerate", "edit"])
def test_a_run_that_fails_at_any_moment_and_comes_again_leaves_the_old_or_the_new(store, run, failure, is_edit):
    messages = [user("edited", chat_message_id="new id")] if is_edit else []
    kept = ["q0", "a0"] if is_edit else ["q0", "a0", "q1"]
    added = ["edited"] if is_edit else []
    new = [*kept, *added, "Let me look.", None, "new"]
    old_messages = store.retrieve_messages("h")
    options = context(replace_from_message_id="id1" if is_edit else last_id(store))
    outcomes = set()
    for moment in itertools.count(1):
        copy, moments = type(store).from_dict(store.to_dict()), Moments(moment, failure)
        copy.engine = FailingEngine(copy.engine, moments)
        try:
            run(agent_with(copy, reply("Let me look.", call("a")), reply("new")), messages, **options)
        except failure:
            stored = texts(store)
            assert stored == OLD or (stored[: len(kept) + len(added) + 1] == new[: len(kept) + len(added) + 1])
            outcomes.add(stored == OLD)
        else:
            assert moments.passed < moment
            break
        # The first attempt may have left a step. Then the model goes on with it, otherwise it begins.
        replies = [reply("Let me look.", call("a"))] if texts(store) == OLD else []
        if texts(store) != new:
            run(agent_with(store, *replies, reply("new")), messages, **options)
        stored = [text for text in texts(store) if text != INTERRUPTED]
        assert [text for text in stored if text is not None] == [text for text in new if text is not None]
        store.delete_messages("h")
        store.write_messages("h", old_messages)
    assert outcomes == {True, False}


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
def test_a_run_that_goes_on_though_saving_fails_replaces_at_the_next_hook_point(store, run, caplog):
    old_messages, options = store.retrieve_messages("h"), context(replace_from_message_id=last_id(store))
    for moment in itertools.count(1):
        options["hook_context"]["expected_revision"] = store.get_chat_history("h").revision
        copy, moments = type(store).from_dict(store.to_dict()), Moments(moment, StoreUnavailableError("It is away."))
        copy.engine = FailingEngine(copy.engine, moments)
        agent = agent_with(
            copy, reply("Let me look.", call("a")), reply("new"), hook_options={"raise_on_failure": False}
        )
        caplog.clear()
        try:
            run(agent, [], **options)
        except StoreUnavailableError:
            assert texts(store) == OLD  # loading always raises
        else:
            assert texts(store) == ["q0", "a0", "q1", "Let me look.", None, "new"]
            if moments.passed < moment:
                break
            assert "are not saved yet" in caplog.text
        store.delete_messages("h")
        store.write_messages("h", old_messages)
