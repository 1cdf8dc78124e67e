# SPDX-License-Identifier: Apache-2.0
"""What is stored of an agent's run, under which history, and what it sees of it again."""

import copy
import threading
from dataclasses import replace

import pytest
from agent_programs import HISTORY, ids, questions, run_sync, tool
from agent_runs import EARLIER, agent_with, asked, call, reply, result, says, stored_in, user
from haystack.components.agents import Agent, State
from haystack.components.agents.state import replace_values
from haystack.dataclasses import ChatMessage, ChatRole
from haystack.hooks import hook
from haystack.token_counters import ApproximateTokenCounter
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.hooks.chat_store import ChatHistorySaver

from haystack_chat_store import ChatMessageStoreError
from haystack_chat_store.conversation.shown import GO_ON, INTERRUPTED, UNANSWERED
from haystack_chat_store.errors import ChatHistoryChangedError, MessageNotFoundError
from haystack_chat_store.ids import MESSAGE_ID_KEY

# ---------------------------------------------------------------------- what is stored, and seen again


def test_a_run_is_stored_whole_and_seen_by_the_next_one(store, run):
    agent = agent_with(
        store,
        reply("Let me see.", call("a"), call("b", "measure")),
        reply("It is a."),
        reply("As I said."),
        system_prompt="Be brief.",
    )
    first = run(agent, [user("What is it?")])
    assert first["exit_reason"] == "text"
    expected = says(
        [
            user("What is it?"),
            reply("Let me see.", call("a"), call("b", "measure")),
            result("a"),
            result("b", "measure"),
        ]
    )
    expected += says([reply("It is a.")])
    assert says(stored_in(store)) == expected

    second = run(agent, [user("Really?")])
    system = says([ChatMessage.from_system("Be brief.")])
    assert asked(agent) == system + expected + says([user("Really?")])
    assert says(stored_in(store)) == expected + says([user("Really?"), reply("As I said.")])
    assert says(second["messages"]) == asked(agent) + says([reply("As I said.")])


def test_what_a_run_produces_names_its_question_and_what_it_was_given_does_not(store, run):
    run(agent_with(store, reply(None, call("a")), reply("Done.")), [user("Hi"), reply("Hello!"), user("Look!")])
    stored = stored_in(store)
    question = stored[2].meta[MESSAGE_ID_KEY]
    assert questions(stored) == [None, None, None, question, question, question]


def test_the_question_is_stored_before_the_model_is_asked(store, run):
    def look(messages):
        assert says(stored_in(store)) == says([user("Hi")])
        return reply("Hello!")

    run(agent_with(store, look), [user("Hi")])


def test_every_step_is_stored_before_the_next_one_begins(store, run):
    seen = []

    def look_and_tell(key: str) -> str:
        seen.append(says(stored_in(store)))
        return f"value of {key}"

    def answer(messages):
        seen.append(says(stored_in(store)))
        return reply("Done.")

    agent = agent_with(store, reply(None, call("a")), answer, tools=[tool("look_up", look_and_tell)])
    run(agent, [user("Hi")])
    assert seen == [says([user("Hi"), reply(None, call("a"))]), says([user("Hi"), reply(None, call("a")), result("a")])]


def test_only_the_end_of_the_history_is_loaded(store, run):
    for number in range(5):
        store.write_messages("h", [user(f"question {number}"), reply(f"answer {number}")])
    agent = agent_with(store, reply("Yes."), hook_options={"last_k": 2})
    run(agent, [user("Really?")])
    window = [user("question 3"), reply("answer 3"), user("question 4"), reply("answer 4"), user("Really?")]
    assert asked(agent) == says(window)


def test_what_is_loaded_fits_the_tokens(store, run):
    for number in range(50):
        store.write_messages("h", [user(f"question {number}"), reply("blah " * 50)])
    counter = ApproximateTokenCounter()
    agent = agent_with(store, reply("Yes."), hook_options={"last_k": None, "max_tokens": 500, "token_counter": counter})
    run(agent, [user("Really?")])
    (seen,) = agent.chat_generator.asked
    assert 400 < counter.count(seen) <= 500


def test_the_windows_start_moves_in_steps(store, run):
    starts = []
    for number in range(12):
        agent = agent_with(store, reply("Yes."), hook_options={"last_k": 2, "window_step": 3})
        run(agent, [user(str(number))])
        starts.append(agent.chat_generator.asked[0][0].text)
    assert starts == ["0"] * 5 + ["3"] * 3 + ["6"] * 3 + ["9"]


# ---------------------------------------------------------------------- which history


def test_the_history_may_come_from_the_state(store, run):
    agent = agent_with(store, reply("Hello!"), state_schema={"chat_history_id": {"type": str}})
    run(agent, [user("Hi")], hook_context=None, chat_history_id="from the state")
    assert says(stored_in(store, "from the state")) == says([user("Hi"), reply("Hello!")])


def test_the_history_of_the_hook_context_goes_first(store, run):
    agent = agent_with(store, reply("Hello!"), state_schema={"chat_history_id": {"type": str}})
    run(agent, [user("Hi")], hook_context={"chat_history_id": "from the context"}, chat_history_id="from the state")
    assert store.count_messages("from the context") == 2
    assert store.count_messages("from the state") == 0


@pytest.mark.parametrize(
    "context", [None, {}, {"chat_history_id": None}, {"chat_history_id": ""}, {"chat_history_id": 7}]
)
def test_without_a_history_the_run_fails_before_the_model_is_asked(store, run, context):
    agent = agent_with(store, reply("Hello!"))
    with pytest.raises(ValueError, match="chat_history_id"):
        run(agent, [user("Hi")], hook_context=context)
    assert agent.chat_generator.asked == []


@pytest.mark.parametrize("history", ["\ud800", "NUL \x00", "x" * 513])
@pytest.mark.parametrize("last_k", [10, 0])
def test_with_an_id_that_cannot_be_one_the_run_fails_before_the_model_is_asked(store, run, history, last_k):
    agent = agent_with(store, reply("Hello!"), hook_options={"last_k": last_k})
    with pytest.raises(ValueError, match="chat_history_id"):
        run(agent, [user("Hi")], hook_context={"chat_history_id": history})
    assert agent.chat_generator.asked == []


def test_a_message_with_an_id_that_cannot_be_one_fails_before_the_model_is_asked(store, run):
    agent = agent_with(store, reply("Hello!"))
    with pytest.raises(ValueError, match="chat_message_id"):
        run(agent, [user("Hi", chat_message_id=["not", "text"])])
    assert agent.chat_generator.asked == []


# ---------------------------------------------------------------------- what is the caller's


def test_the_state_of_a_run_can_be_serialized_and_goes_on(failing_store, run):
    @hook
    def serialize(state: State) -> None:
        data = State.from_dict(state.to_dict()).data
        assert data["messages"] == state.data["messages"]
        assert data["hook_context"] == state.data["hook_context"]
        state.data.update(data)

    # The question is not saved when the state is serialized.
    failing_store.failures.append(ChatMessageStoreError("The disk is full."))
    hooks = {"before_llm": [serialize], "on_exit": [serialize]}
    options = {"hooks": hooks, "hook_options": {"raise_on_failure": False}, "tools": []}
    run(agent_with(failing_store, reply("Hello!"), **options), [user("Hi")])
    assert says(stored_in(failing_store)) == says([user("Hi"), reply("Hello!")])


def test_nothing_of_the_callers_is_changed(store, run):
    class Connection:
        def __deepcopy__(self, memo):
            raise TypeError("A connection cannot be copied.")

    connection = Connection()
    messages = [user("Hi", mine=True), reply("Hello!"), user("Look!", chat_message_id="own")]
    before = copy.deepcopy(messages)
    answer = reply("Done.", model="m")
    answer_before = copy.deepcopy(answer)
    context = {**HISTORY, "connection": connection}
    same_messages, same_context = list(messages), dict(context)

    run(agent_with(store, answer), messages, hook_context=context)

    assert all(one is other for one, other in zip(messages, same_messages, strict=True))
    assert (messages, answer, context) == (before, answer_before, same_context)


def test_an_object_that_is_said_twice_is_stored_twice(store, run):
    yes = user("Yes.")
    run(agent_with(store, reply("Good.")), [yes, reply("Really?"), yes])
    assert says(stored_in(store)) == says([yes, reply("Really?"), yes, reply("Good.")])


def test_other_hooks_find_what_the_caller_put_into_the_context(store, run):
    found = []

    @hook
    def look(state: State) -> None:
        found.append(state.data["hook_context"]["connection"])

    connection = threading.Lock()  # which cannot be copied
    agent = agent_with(store, reply("Hello!"), hooks={"before_run": [look], "after_run": [look]})
    run(agent, [user("Hi")], hook_context={**HISTORY, "connection": connection})
    assert found == [connection, connection]


# ---------------------------------------------------------------------- ids, and messages that come back


def test_messages_keep_the_ids_that_they_bring(store, run):
    agent = agent_with(store, reply("Hello!", chat_message_id="answer"))
    run(agent, [user("Hi", chat_message_id="question")])
    assert ids(stored_in(store)) == ["question", "answer"]
    assert questions(stored_in(store)) == [None, "question"]


def test_a_message_that_brings_an_id_is_not_thereby_stored(store, run):
    run(agent_with(store, reply("Hello!")), [user("Hi", chat_message_id="own")])
    run(agent_with(store, reply("Hello!")), [user("Hi", chat_message_id="own")], hook_context={"chat_history_id": "i"})
    assert says(stored_in(store, "i")) == says([user("Hi"), reply("Hello!")])


@pytest.mark.parametrize("last_k", [10, 1, None])
def test_feeding_the_whole_transcript_back_stores_nothing_twice(store, run, last_k):
    agent = agent_with(store, hook_options={"last_k": last_k}, system_prompt="Be brief.")
    transcript = []
    for number in range(4):
        agent.chat_generator.replies += [reply(None, call(str(number))), reply(f"answer {number}")]
        transcript = run(agent, [*transcript, user(f"question {number}")])["messages"]
        transcript = [message for message in transcript if message.role is not ChatRole.SYSTEM]
    expected = [
        message
        for number in range(4)
        for message in (
            user(f"question {number}"),
            reply(None, call(str(number))),
            result(str(number)),
            reply(f"answer {number}"),
        )
    ]
    assert says(stored_in(store)) == says(expected)
    seen = [text for _, text, _, _ in asked(agent) if text and text.startswith("question")]
    assert seen == [f"question {number}" for number in range({10: 0, 1: 2, None: 0}[last_k], 4)]


def test_a_transcript_that_is_longer_than_the_window_is_not_doubled(store, run):
    agent = agent_with(store, hook_options={"last_k": 1})
    whole = []
    for number in range(4):
        agent.chat_generator.replies.append(reply(f"answer {number}"))
        whole.append(user(f"question {number}", chat_message_id=f"q{number}"))
        whole.append(run(agent, whole)["last_message"])
    assert says(stored_in(store)) == says(whole)
    assert asked(agent) == says(whole[4:7])


def test_a_transcript_without_anything_new_costs_no_call_of_the_model(store, run):
    whole = []
    for number in range(3):
        agent = agent_with(store, reply(f"answer {number}"))
        whole = run(agent, [*whole, user(f"question {number}")])["messages"]
    again = agent_with(store, hook_options={"last_k": 1})
    assert run(again, whole)["last_message"].text == "answer 2"
    assert again.chat_generator.asked == []
    assert store.count_messages("h") == 6


def test_a_new_message_is_seen_wherever_it_stands(store, run):
    hello = user("Hello!", chat_message_id="known")
    store.write_messages("h", [hello, reply("Hi!")])
    agent = agent_with(store, reply("Well."))
    run(agent, [user("This is new."), hello])
    assert asked(agent) == says([hello, reply("Hi!"), user("This is new.")])
    stored = stored_in(store)
    assert says(stored) == asked(agent) + says([reply("Well.")])
    assert questions(stored)[-1] == ids(stored)[-2]


def test_messages_of_another_transcript_are_not_lost(store, run):
    store.write_messages("h", [user("Hi", chat_message_id="known"), reply("Hello!")])
    # The second stands before a stored one, and is not.
    messages = [user("Elsewhere", chat_message_id="new"), user("Hi", chat_message_id="known"), user("So?")]
    agent = agent_with(store, reply("Well."))
    run(agent, messages)
    assert sorted(says(stored_in(store))) == sorted(
        says([user("Hi"), reply("Hello!"), user("Elsewhere"), user("So?"), reply("Well.")])
    )


def test_what_the_model_must_not_see_of_the_question_is_stored(store, run):
    orphan = result("z")
    agent = agent_with(store, reply("Well."))
    run(agent, [user("Hi"), reply("Wait.", call("y")), user(" "), orphan, user("So?")])
    interrupted = ChatMessage.from_tool(INTERRUPTED, origin=call("y"), error=True)
    assert asked(agent) == says([user("Hi"), reply("Wait.", call("y")), interrupted, reply(UNANSWERED), user("So?")])
    everything = [user("Hi"), reply("Wait.", call("y")), user(" "), orphan, user("So?"), reply("Well.")]
    assert says(stored_in(store)) == says(everything)


MERGING = {"merge_consecutive": True}


def test_questions_of_a_run_are_stored_each_where_user_and_model_speak_in_turns(store, run):
    agent = agent_with(store, reply("Both."), hook_options=MERGING)
    run(agent, [user("A"), reply("One."), reply("Two."), user("B", chat_message_id="b"), user("C")])
    turns = [user("A"), reply("One."), user(GO_ON), reply("Two."), user("B"), reply(GO_ON), user("C")]
    assert asked(agent) == says(turns)
    stored = stored_in(store)
    assert says(stored) == says([user("A"), reply("One."), reply("Two."), user("B"), user("C"), reply("Both.")])
    assert stored[-1].meta["chat_question_id"] == stored[-2].meta[MESSAGE_ID_KEY]
    assert all("chat_shown" not in message.meta for message in stored)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_question_after_one_whose_model_failed_is_stored_where_user_and_model_speak_in_turns(store, run, failures):
    with pytest.raises(RuntimeError, match="busy"):
        run(agent_with(store, RuntimeError("busy"), hook_options=MERGING), [user("A", chat_message_id="a")])
    again = [user("B", chat_message_id="b")]
    for _ in range(failures):
        with pytest.raises(RuntimeError, match="busy"):
            run(agent_with(store, RuntimeError("busy"), hook_options=MERGING), again)
        assert says(stored_in(store)) == says([user("A"), user("B")])
    for messages in ([], again):
        agent = agent_with(store, *([] if messages else [reply("Both.")]), hook_options=MERGING)
        assert run(agent, messages)["last_message"].text == "Both."
        assert messages or asked(agent) == says([user("A\n\nB")])
    assert says(stored_in(store)) == says([user("A"), user("B"), reply("Both.")])
    assert stored_in(store)[-1].meta["chat_question_id"] == "b"


def test_a_question_after_others_is_stored_where_it_replaces_messages(store, run):
    store.write_messages("h", [user("A"), user("B", chat_message_id="b"), reply("Yes.")])
    agent = agent_with(store, reply("No."), hook_options=MERGING)
    run(agent, [user("C")], hook_context={"chat_history_id": "h", "replace_from_message_id": "b"})
    assert asked(agent) == says([user("A"), reply(GO_ON), user("C")])
    assert says(stored_in(store)) == says([user("A"), user("C"), reply("No.")])


@pytest.mark.parametrize("hides", [False, True])
def test_a_question_that_a_retriever_shows_after_an_unanswered_one_is_stored(store, run, hides):
    """What a hook of the application hides in the question is not stored either."""

    @hook
    def hide(state: State) -> None:
        hidden = [
            replace(each, _content=user(each.text.replace("4929", "*"))._content) for each in state.data["messages"]
        ]
        state.set("messages", hidden, handler_override=replace_values)

    store.write_messages("h", [user("A")])
    retriever = ChatMessageRetriever(store, merge_consecutive=True)
    shown = retriever.run("h", current_messages=[user("My card is 4929.")])["messages"]
    agent = agent_with(store, reply("Both."), hook_options=MERGING)
    if hides:
        saves = ChatHistorySaver(store)
        agent = Agent(chat_generator=agent.chat_generator, hooks={"before_run": [hide, saves], "after_run": [saves]})
    run(agent, shown)
    question = user("My card is *." if hides else "My card is 4929.")
    assert asked(agent) == says([user("A"), reply(GO_ON), question])
    assert says(stored_in(store)) == says([user("A"), question, reply("Both.")])
    assert stored_in(store)[-1].meta["chat_question_id"] == stored_in(store)[1].meta[MESSAGE_ID_KEY]


def test_the_same_question_again_gets_the_stored_answer(store, run):
    run(agent_with(store, reply("Hello!")), [user("Hi", chat_message_id="own")])
    again = agent_with(store)
    outcome = run(again, [user("Hi", chat_message_id="own")])
    assert again.chat_generator.asked == []
    assert outcome["last_message"].text == "Hello!"
    assert outcome["exit_reason"] == "text"
    assert outcome["step_count"] == 0
    assert store.count_messages("h") == 2


def test_an_older_question_again_gets_its_own_answer(store, run):
    for number in range(3):
        run(agent_with(store, reply(f"answer {number}")), [user(f"question {number}", chat_message_id=f"q{number}")])
    outcome = run(agent_with(store), [user("question 1", chat_message_id="q1")])
    assert outcome["last_message"].text == "answer 1"
    assert store.count_messages("h") == 6


@pytest.mark.parametrize("raise_on_failure", [True, False])
def test_a_question_from_before_the_window_gets_its_own_answer(store, run, raise_on_failure):
    for number in range(3):
        run(agent_with(store, reply(f"answer {number}")), [user(f"question {number}", chat_message_id=f"q{number}")])
    agent = agent_with(store, hook_options={"last_k": 1, "raise_on_failure": raise_on_failure})
    outcome = run(agent, [user("question 0", chat_message_id="q0")])
    assert agent.chat_generator.asked == []
    assert outcome["last_message"].text == "answer 0"
    assert store.count_messages("h") == 6


def test_a_question_that_another_run_has_begun_to_answer_meanwhile_is_not_answered_twice(store, run):
    question = user("Look!", chat_message_id="q")

    @hook
    def ask_elsewhere(state: State) -> None:
        store.write_messages("h", [question])

    agent = agent_with(store, hooks={"before_run": [ask_elsewhere]})
    with pytest.raises(ValueError, match="and is answering it"):
        run(agent, [question])
    assert agent.chat_generator.asked == []


def during(agent_run, *replies):
    """Replies of a model. While it gives the first of them, another run takes place."""
    first, *rest = replies

    def answer(_):
        agent_run()
        return first

    return [answer, *rest]


def sent_again(store):
    """The same request once more, in a process of its own: with another model, and with other ids of calls."""
    agent = agent_with(store, reply("the first to be stored"))
    return lambda: run_sync(agent, [user("Look!", chat_message_id="q")])


def test_of_two_answers_to_the_same_request_one_is_stored_and_both_runs_return_it(store, run):
    agent = agent_with(store, *during(sent_again(store), reply("too late")))
    for _attempt in range(2):
        assert run(agent, [user("Look!", chat_message_id="q")])["last_message"].text == "the first to be stored"
        assert says(stored_in(store)) == says([user("Look!"), reply("the first to be stored")])


def test_a_step_of_a_request_that_another_run_has_answered_is_not_stored(store, run):
    agent = agent_with(store, *during(sent_again(store), reply(None, call("a")), reply("too late")))
    with pytest.raises(ChatHistoryChangedError, match="has stored a step of it before"):
        run(agent, [user("Look!", chat_message_id="q")])
    assert says(stored_in(store)) == says([user("Look!"), reply("the first to be stored")])
    assert run(agent, [user("Look!", chat_message_id="q")])["last_message"].text == "the first to be stored"


@pytest.mark.parametrize("raise_on_failure", [True, False])
@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_history_that_is_deleted_while_the_model_answers_stays_deleted(store, run, raise_on_failure, is_resumed):
    store.write_messages("h", EARLIER if is_resumed else [])
    if is_resumed:
        store.write_messages("h", [user("Look!", chat_message_id="q")])
    replies = during(lambda: store.delete_chat_history("h"), reply(None, call("a")), reply("too late"))
    agent = agent_with(store, *replies, hook_options={"raise_on_failure": raise_on_failure})
    with pytest.raises(MessageNotFoundError, match="deleted while the model answered"):
        run(agent, [user("Look!", chat_message_id="q")])
    assert store.get_chat_history("h") is None


def test_an_answer_is_not_stored_after_a_step_of_another_run(store, run):
    other = agent_with(store, reply(None, call("a")), RuntimeError("The model is down."))

    def begin():
        with pytest.raises(RuntimeError):
            run_sync(other, [user("Look!", chat_message_id="q")])

    agent = agent_with(store, *during(begin, reply("too late")), reply("together"))
    with pytest.raises(ChatHistoryChangedError):
        run(agent, [user("Look!", chat_message_id="q")])
    assert run(agent, [user("Look!", chat_message_id="q")])["last_message"].text == "together"
    assert says(stored_in(store)) == says([user("Look!"), reply(None, call("a")), result("a"), reply("together")])


def test_a_reply_with_the_meta_of_its_question_is_stored_all_the_same(store, run):
    question = user("Hi", chat_message_id="q")
    run(agent_with(store, ChatMessage.from_assistant("Hello!", meta=question.meta)), [question])
    assert says(stored_in(store)) == says([question, reply("Hello!")])


def test_a_transcript_that_is_longer_than_the_window_may_come_without_a_new_question(store, run):
    messages = []
    for number in range(3):
        outcome = run(agent_with(store, reply(f"answer {number}")), [*messages, user(f"question {number}")])
        messages = outcome["messages"]
    agent = agent_with(store, hook_options={"last_k": 1})
    assert run(agent, messages)["last_message"].text == "answer 2"
    assert agent.chat_generator.asked == []


def test_an_older_question_whose_answer_failed_is_answered_at_its_place(store, run):
    failing = agent_with(store, RuntimeError("The model is down."))
    with pytest.raises(RuntimeError):
        run(failing, [user("first", chat_message_id="q1")])
    run(agent_with(store, reply("second answer")), [user("second", chat_message_id="q2")])
    retry = agent_with(store, reply("first answer"))
    run(retry, [user("first", chat_message_id="q1")])
    assert asked(retry) == says([user("first")])

    later = agent_with(store, reply("Yes."))
    run(later, [user("third")])
    expected = [user("first"), reply("first answer"), user("second"), reply("second answer"), user("third")]
    assert asked(later) == says(expected)
