# SPDX-License-Identifier: Apache-2.0
"""
A turn, exactly once: what the writer says that it stored, which question a reply names, and what a model is shown of a
conversation in which others speak, too.
"""

import asyncio
import uuid

import pytest
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from test_retriever import MinimalStore

from haystack_chat_store import (
    DuplicateMessageError,
    InMemoryChatMessageStore,
    MessageNotFoundError,
    with_message_ids,
)
from haystack_chat_store.conversation.turns import answer_of
from haystack_chat_store.ids import reply_id

USER, ASSISTANT, SYSTEM = ChatMessage.from_user, ChatMessage.from_assistant, ChatMessage.from_system
CALL = ToolCall("weather", {"city": "Rome"}, id="call_1")
CALLING, SUNNY = ASSISTANT(tool_calls=[CALL]), ChatMessage.from_tool("sunny", CALL)


def run_sync(component, *arguments, **options):
    return component.run(*arguments, **options)


def run_async(component, *arguments, **options):
    return asyncio.run(component.run_async(*arguments, **options))


@pytest.fixture(params=[run_sync, run_async], ids=["sync", "async"])
def run(request):
    return request.param


@pytest.fixture(params=["round", "message"])
def store(request):
    return InMemoryChatMessageStore(last_k=None, last_k_unit=request.param, namespace=uuid.uuid4().hex)


@pytest.fixture
def writer(store):
    return ChatMessageWriter(store)


@pytest.fixture
def retriever(store):
    return ChatMessageRetriever(store)


def question(text, message_id=None):
    return USER(text, meta={"chat_message_id": message_id or text})


def texts(messages):
    return [message.text for message in messages]


def ids(messages):
    return [message.meta.get("chat_message_id") for message in messages]


def history(store):
    return texts(store.retrieve_messages("h"))


class TestIds:
    @pytest.mark.parametrize("replies", [[], [ASSISTANT("a1")]], ids=["question first", "with its reply"])
    def test_a_question_with_the_id_of_a_reply_is_refused(self, run, writer, store, replies):
        run(writer, "h", [question("q0", "r1")], [ASSISTANT("a0")])
        with pytest.raises(DuplicateMessageError, match=r"'user' has the id 'r1:reply:0'.*role 'assistant'"):
            run(writer, "h", [question("q1", "r1:reply:0")], replies)
        assert history(store)[:2] == ["q0", "a0"]

    def test_messages_get_ids_before_they_are_written(self, store):
        messages = [USER("q0"), question("q1", "1")]
        identified = with_message_ids(messages)
        assert identified[1] == messages[1]
        assert messages == [USER("q0"), question("q1", "1")]
        for _ in range(2):
            store.write_messages("h", identified)
        assert ids(store.retrieve_messages("h")) == ids(identified)

    def test_the_id_of_a_reply_is_made_from_its_question_and_number(self):
        assert reply_id("q", 0) == reply_id("q", 0)
        long_ids = ["x" * 512, "x" * 511 + "y"]
        made = {reply_id(question_id, number) for question_id in ("q", "q:reply:0", *long_ids) for number in range(3)}
        assert len(made) == 12
        assert max(map(len, made)) <= 512


class TestWriterSaysWhatItStored:
    def test_messages_and_replies_as_the_history_has_them(self, run, store, writer):
        written = run(writer, "h", [USER("q0")], [ASSISTANT("a0")])
        assert written["messages_written"] == 2
        assert written["messages"] == store.retrieve_messages("h")
        assert written["replies"] == written["messages"][1:]

    def test_a_stored_question_comes_back_as_it_is_stored(self, run, store, writer):
        run(writer, "h", [question("first", "1")])
        again = run(writer, "h", [question("second", "1")], [ASSISTANT("a")])
        assert again["messages_written"] == 1
        assert again["messages"] == store.retrieve_messages("h")
        assert texts(again["messages"]) == ["first", "a"]

    def test_system_messages_are_carried_as_they_came(self, run, store, writer):
        system = SYSTEM("Be brief.")
        written = run(writer, "h", [system, USER("q0")])
        assert written["messages"][0] is system
        assert history(store) == ["q0"]
        again = run(writer, "h", written["messages"], [ASSISTANT("a0")])
        assert texts(again["messages"]) == ["Be brief.", "q0", "a0"]
        assert history(store) == ["q0", "a0"]

    def test_a_store_that_keeps_system_messages_gives_them_ids(self, run):
        store = InMemoryChatMessageStore(skip_system_messages=False, namespace=uuid.uuid4().hex)
        written = run(ChatMessageWriter(store), "h", [SYSTEM("Be brief."), USER("q0")], [ASSISTANT("a0")])
        assert written["messages"] == store.retrieve_messages("h")

    def test_without_replies_there_are_none(self, run, writer):
        assert run(writer, "h", [USER("q0")])["replies"] == []

    def test_a_turn_far_back_is_found(self, run, store, writer):
        first = run(writer, "h", [question("q0", "0")], [ASSISTANT("a0")])
        store.write_messages("h", [USER(f"q{number}") for number in range(1, 100)])
        again = run(writer, "h", [question("q0", "0")], [ASSISTANT("another")])
        assert (again["messages_written"], again["messages"]) == (0, first["messages"])

    def test_a_store_of_another_package_says_what_was_written(self, run):
        store = MinimalStore()
        written = run(ChatMessageWriter(store), "h", [USER("q0")], [ASSISTANT("a0")])
        assert (written["messages_written"], written["messages"]) == (2, store.messages)


class TestRepliesNameTheirQuestion:
    def test_the_last_one_of_the_batch(self, run, store, writer):
        run(writer, "h", [question("q0"), question("q1")], [ASSISTANT("a"), ASSISTANT("b")])
        *_, first, second = store.retrieve_messages("h")
        assert [each.meta["chat_question_id"] for each in (first, second)] == ["q1", "q1"]
        assert ids([first, second]) == [reply_id("q1", 0), reply_id("q1", 1)]

    @pytest.mark.parametrize("messages", [[], [SYSTEM("Be brief.")]], ids=["none", "a system message"])
    def test_without_messages_the_last_one_of_the_history(self, run, store, writer, messages):
        store.write_messages("h", [question("q0"), question("q1"), USER("   ")])
        written = run(writer, "h", messages, [ASSISTANT("a")])
        assert written["replies"] == store.retrieve_messages("h")[-1:]
        assert written["replies"][0].meta["chat_question_id"] == "q1"

    def test_without_any_question_none(self, run, store, writer):
        run(writer, "h", [], [ASSISTANT("Welcome!")])
        assert "chat_question_id" not in store.retrieve_messages("h")[0].meta

    def test_so_do_calls_and_results_among_the_messages(self, run, store, writer):
        for _ in range(2):
            run(writer, "h", [question("q0"), CALLING, SUNNY], [ASSISTANT("a0")])
        stored = store.retrieve_messages("h")
        assert ids(stored) == ["q0", *(reply_id("q0", number) for number in range(3))]
        assert {message.meta["chat_question_id"] for message in stored[1:]} == {"q0"}

    def test_a_reply_that_has_the_meta_of_its_question_is_a_reply_all_the_same(self, run, store, writer):
        run(writer, "h", [question("q0")], [ASSISTANT("a0", meta={"chat_message_id": "q0"})])
        assert ids(store.retrieve_messages("h")) == ["q0", reply_id("q0", 0)]

    @pytest.mark.parametrize("named", ["q0", "nothing", 7, ["q1"]], ids=str)
    @pytest.mark.parametrize("own", [{}, {"chat_message_id": reply_id("q0", 0)}], ids=["without id", "an earlier id"])
    def test_a_reply_that_names_another_question_is_a_reply_all_the_same(self, run, store, writer, named, own):
        """A generator may give its reply the meta of an answer that it was shown."""
        run(writer, "h", [question("q0")], [ASSISTANT("Yes.")])
        for text in ("Yes.", "No."):
            meta = {"chat_question_id": named, **own}
            written = run(writer, "h", [question("q1")], [ASSISTANT(text, meta=meta)])
            assert [reply.text for reply in written["replies"]] == ["Yes."]
        assert ids(store.retrieve_messages("h")) == ["q0", reply_id("q0", 0), "q1", reply_id("q1", 0)]
        replies = run(ChatMessageRetriever(store), "h", current_messages=[question("q1")])["replies"]
        assert replies == store.retrieve_messages("h")[-1:]

    def test_a_reply_with_an_id_of_its_own_keeps_it(self, run, store, writer):
        run(writer, "h", [question("q0")], [ASSISTANT("a0", meta={"chat_message_id": "mine"})])
        reply = store.retrieve_messages("h")[1]
        assert (reply.meta["chat_message_id"], reply.meta["chat_question_id"]) == ("mine", "q0")

    def test_a_reply_with_an_id_of_its_own_is_stored_although_the_question_is_answered(self, run, store, writer):
        turn = [question("q0", "q0")]
        run(writer, "h", turn, [ASSISTANT("a0")])
        again = run(writer, "h", turn, [ASSISTANT("another", meta={"chat_message_id": "mine"})])
        assert (again["messages_written"], texts(again["replies"])) == (1, ["another"])
        assert texts(store.retrieve_messages("h")) == ["q0", "a0", "another"]

    def test_without_messages_a_reply_names_the_question_that_it_was_given_for(self, run, store, writer):
        store.write_messages("h", [question("q0"), question("q1")])
        run(writer, "h", [], [ASSISTANT("a0", meta={"chat_question_id": "q0"})])
        assert store.retrieve_messages("h")[-1].meta["chat_question_id"] == "q0"

    def test_what_is_passed_in_is_not_changed(self, run, writer):
        messages, replies = [USER("q0"), CALLING], [ASSISTANT("a0")]
        run(writer, "h", messages, replies)
        assert (messages, replies) == ([USER("q0"), CALLING], [ASSISTANT("a0")])
        assert CALLING.meta == {}


class TestSentAgain:
    def test_a_turn_is_stored_once_and_its_first_answer_stays(self, run, store, writer):
        first = run(writer, "h", [question("q0")], [ASSISTANT("a0")])
        again = run(writer, "h", [question("q0")], [ASSISTANT("another")])
        assert again == {**first, "messages_written": 0}
        assert history(store) == ["q0", "a0"]

    def test_replies_alone_are_stored_once(self, run, store, writer):
        store.write_messages("h", [question("q0")])
        first = run(writer, "h", [], [ASSISTANT("a0")])
        again = run(writer, "h", [], [ASSISTANT("another")])
        assert (first["messages_written"], again["messages_written"]) == (1, 0)
        assert first["replies"] == again["replies"] == store.retrieve_messages("h")[1:]

    def test_overwriting_puts_the_new_answer_in_its_place(self, run, store):
        writer = ChatMessageWriter(store, DuplicatePolicy.OVERWRITE)
        run(writer, "h", [question("q0")], [ASSISTANT("a0")])
        written = run(writer, "h", [question("q0")], [ASSISTANT("better")])
        assert texts(written["replies"]) == ["better"]
        assert history(store) == ["q0", "better"]

    @pytest.mark.parametrize("brought", [[SUNNY], [question("q0"), SUNNY], [question("q0"), CALLING, SUNNY]])
    def test_a_call_that_the_application_runs_is_answered_in_the_next_run(self, run, store, writer, retriever, brought):
        run(writer, "h", [question("q0")], [CALLING])
        assert run(retriever, "h", current_messages=[question("q0")])["replies"] == store.retrieve_messages("h")[1:]
        assert run(retriever, "h", current_messages=brought)["messages"][-1].tool_call_results
        for _ in range(2):
            written = run(writer, "h", brought, [ASSISTANT("It is sunny.")])
            assert texts(written["replies"]) == ["It is sunny."]
            stored = store.retrieve_messages("h")
            assert [message.role.value for message in stored] == ["user", "assistant", "tool", "assistant"]

    def test_a_result_that_was_stored_already_does_not_hide_the_answer(self, run, store, writer):
        run(writer, "h", [question("q0")], [CALLING])
        run(writer, "h", [SUNNY])
        written = run(writer, "h", [question("q0")], [ASSISTANT("It is sunny.")])
        assert written["messages_written"] == 1
        assert history(store)[-1] == "It is sunny."

    def test_a_step_whose_number_is_taken_out_of_turn_is_in_nobodys_way(self, run, store, writer):
        cloudy = ChatMessage.from_tool("cloudy", CALL)
        run(writer, "h", [question("q0"), CALLING, SUNNY, CALLING, cloudy])
        store.delete_messages("h", message_ids=[reply_id("q0", 1)])
        written = run(writer, "h", [question("q0")], [ASSISTANT("It is cloudy.")])
        assert texts(written["replies"]) == history(store)[-1:] == ["It is cloudy."]

    @pytest.mark.parametrize("message_id", ["", "a\x00b", 5, ["list"], "x" * 513])
    def test_an_id_that_no_store_takes_is_refused(self, run, store, writer, retriever, message_id):
        wrong = USER("q0", meta={"chat_message_id": message_id})
        assert run(retriever, "h", current_messages=[wrong])["messages"] == [wrong]
        for messages in ([wrong], [wrong, CALLING]):
            with pytest.raises(ValueError, match=r"^messages\[0\]\.meta"):
                run(writer, "h", messages, [ASSISTANT("a0")])
        assert history(store) == []

    def test_an_empty_reply_is_no_answer(self, run, store, writer, retriever):
        run(writer, "h", [question("q0")], [ASSISTANT("")])
        assert "messages" in run(retriever, "h", current_messages=[question("q0")])
        assert texts(run(writer, "h", [question("q0")], [ASSISTANT("a0")])["replies"]) == ["a0"]
        assert history(store) == ["q0", "", "a0"]


class TestAnswered:
    @pytest.mark.parametrize("last_k", [0, 1, 10])
    @pytest.mark.parametrize("later", [0, 1, 40])
    def test_the_stored_answer_comes_out_and_no_messages(self, run, store, writer, retriever, last_k, later):
        run(writer, "h", [question("q0")], [ASSISTANT("a0")])
        for number in range(1, later + 1):
            run(writer, "h", [question(f"q{number}")], [ASSISTANT(f"a{number}")])
        outputs = run(retriever, "h", last_k=last_k, current_messages=[SYSTEM("s"), question("q0")])
        assert "messages" not in outputs
        assert outputs["replies"] == store.retrieve_messages("h")[1:2]

    def test_also_if_it_does_not_fit_the_tokens(self, run, store, writer):
        run(writer, "h", [question("q0")], [ASSISTANT("a0")])
        outputs = run(ChatMessageRetriever(store, max_tokens=1), "h", current_messages=[question("q0")])
        assert texts(outputs["replies"]) == ["a0"]

    def test_a_question_that_nobody_answered_is_asked(self, run, store, writer, retriever):
        run(writer, "h", [question("q0")])
        outputs = run(retriever, "h", current_messages=[question("q0")])
        assert "replies" not in outputs
        assert texts(outputs["messages"]) == ["q0"]

    def test_the_answer_is_found_between_what_others_say(self, run, store, writer, retriever):
        for number in range(3):
            run(writer, "h", [question(f"q{number}")])
        for number in (2, 0, 1):
            run(writer, "h", [question(f"q{number}")], [ASSISTANT(f"a{number}")])
        for number in range(3):
            outputs = run(retriever, "h", current_messages=[question(f"q{number}")])
            assert texts(outputs["replies"]) == [f"a{number}"]

    def test_an_agents_step_is_no_answer_and_its_last_reply_is(self):
        named = [ASSISTANT(tool_calls=[CALL], meta={"chat_question_id": "q0"}), SUNNY, ASSISTANT("It is sunny.")]
        turns = [[question("q0"), *named[:length]] for length in range(4)]
        assert [answer_of(turn) for turn in turns] == [None, None, None, named[2]]

    def test_of_alternatives_the_first_is_the_answer(self, run, writer, retriever):
        replies = [ASSISTANT("a", meta={"index": 0}), ASSISTANT("b", meta={"index": 1})]
        run(writer, "h", [question("q0")], replies)
        assert texts(run(retriever, "h", current_messages=[question("q0")])["replies"]) == ["a"]

    def test_a_store_of_another_package_is_read_whole(self, run):
        messages = [question("q0"), ASSISTANT("a0"), *(USER(f"q{number}") for number in range(1, 30))]

        class CountingStore(MinimalStore):
            def retrieve_messages(self, chat_history_id, last_k=None):
                return super().retrieve_messages(chat_history_id)[-last_k:]

        retriever = ChatMessageRetriever(CountingStore(messages))
        assert run(retriever, "h", current_messages=[question("q0")])["replies"] == messages[1:2]
        assert len(run(retriever, "h", current_messages=[question("new")])["messages"]) == 11


class TestOwnQuestionIsLast:
    @pytest.mark.parametrize("answered", [False, True])
    def test_whatever_others_have_asked_meanwhile(self, run, writer, retriever, answered):
        run(writer, "h", [question("q0")], [ASSISTANT("a0")])
        run(writer, "h", [question("mine")])
        for number in range(30):
            run(writer, "h", [question(f"other {number}")], [ASSISTANT("a")] if answered else [])
        outputs = run(retriever, "h", last_k=1, current_messages=[SYSTEM("s"), question("mine")])
        assert texts(outputs["messages"]) == ["s", "q0", "a0", "mine"]

    def test_a_stored_question_takes_no_place_in_the_window(self, run, store, writer):
        for number in range(5):
            run(writer, "h", [question(f"q{number}")], [ASSISTANT(f"a{number}")])
        retriever = ChatMessageRetriever(store, last_k=4 if store.last_k_unit == "message" else 2)
        expected = ["q3", "a3", "q4", "a4", "q5"]
        assert texts(run(retriever, "h", current_messages=[question("q5")])["messages"]) == expected
        run(writer, "h", [question("q5")])
        assert texts(run(retriever, "h", current_messages=[question("q5")])["messages"]) == expected

    def test_it_is_shown_as_this_turn_has_it(self, run, store, writer, retriever):
        run(writer, "h", [question("What is that?", "1")])
        prompt = question("Documents: …\nQuestion: What is that?", "1")
        messages = run(retriever, "h", current_messages=[prompt])["messages"]
        assert messages == [prompt]
        assert history(store) == ["What is that?"]

    def test_the_steps_of_its_turn_come_after_it(self, run, store, retriever):
        named = {"chat_question_id": "q0"}
        store.write_messages(
            "h",
            [
                question("q0"),
                ASSISTANT(tool_calls=[CALL], meta=named),
                question("other"),
                ChatMessage.from_tool("sunny", CALL, meta=named),
                ASSISTANT("to the other", meta={"chat_question_id": "other"}),
            ],
        )
        messages = run(retriever, "h", current_messages=[question("q0")])["messages"]
        assert [message.role.value for message in messages] == ["user", "assistant", "tool"]

    @pytest.mark.parametrize("last_k", [1, 2, 3])
    def test_an_answer_to_an_older_question_passes_for_nobody_elses(self, run, store, writer, retriever, last_k):
        for text in ("older", "other", "mine"):
            run(writer, "h", [question(text)])
        run(writer, "h", [question("older")], [ASSISTANT("to the older")])
        outputs = run(retriever, "h", last_k=last_k, current_messages=[question("mine")])
        shown = texts(outputs["messages"])
        assert shown[-1] == "mine"
        assert "to the older" not in shown or shown[shown.index("to the older") - 1] == "older"
        run(writer, "h", [question("mine")], [ASSISTANT("to me")])
        assert texts(run(retriever, "h", last_k=last_k, current_messages=[question("mine")])["replies"]) == ["to me"]


@pytest.fixture
def rounds(store):
    for number in range(30):
        store.write_messages(
            "h", [question(f"q{number}"), ASSISTANT(f"a{number}", meta={"chat_message_id": f"a{number}"})]
        )


class TestUntil:
    @pytest.mark.parametrize(
        ("until", "expected"),
        [("a29", ["q28", "a28", "q29", "a29"]), ("q29", ["q28", "a28", "q29"]), ("a3", ["q2", "a2", "q3", "a3"])],
    )
    def test_the_conversation_ends_with_the_message(self, run, store, rounds, until, expected):
        last_k = len(expected) if store.last_k_unit == "message" else 2
        outputs = run(ChatMessageRetriever(store, last_k), "h", until_message_id=until)
        assert texts(outputs["messages"]) == expected
        expected_rounds = [*range(30)][: int(expected[-1][1:]) + 1]
        assert outputs["omitted_rounds"] == len(expected_rounds) - 2

    def test_all_of_it_if_it_is_short(self, run, retriever, rounds):
        outputs = run(retriever, "h", until_message_id="q1")
        assert (texts(outputs["messages"]), outputs["omitted_rounds"]) == (["q0", "a0", "q1"], 0)

    @pytest.mark.parametrize("current", [[], [question("q20")]], ids=["nothing", "the question"])
    def test_an_answer_is_regenerated_by_asking_its_question_again(self, run, store, rounds, current):
        last_k = 2 if store.last_k_unit == "message" else 1
        retriever = ChatMessageRetriever(store, last_k + (0 if current else 1))
        outputs = run(retriever, "h", until_message_id="q20", current_messages=current)
        assert texts(outputs["messages"])[-3:] == ["q19", "a19", "q20"]

    @pytest.mark.parametrize("message_id", ["q20", None, "new"], ids=["the same id", "no id", "a new id"])
    def test_a_question_is_edited_by_asking_another_after_what_was_before_it(self, run, store, rounds, message_id):
        edited = USER("edited", meta={"chat_message_id": message_id})
        retriever = ChatMessageRetriever(store, 2 if store.last_k_unit == "message" else 1)
        outputs = run(retriever, "h", until_message_id="a19", current_messages=[edited])
        assert texts(outputs["messages"]) == ["q19", "a19", "edited"]

    @pytest.mark.parametrize("last_k", [0, 2])
    def test_the_step_of_the_window_goes_on(self, run, store, rounds, last_k):
        if store.last_k_unit == "message":
            return
        retriever = ChatMessageRetriever(store, last_k, window_step=4)
        for until in range(30):
            outputs = run(retriever, "h", until_message_id=f"q{until}")
            shown = texts(outputs["messages"])[::2]
            assert outputs["omitted_rounds"] == until + 1 - len(shown)
            if last_k:
                assert int(shown[0][1:]) == max(until + 1 - last_k, 0) // 4 * 4

    def test_tokens_are_counted_up_to_there(self, run, store, rounds):
        retriever = ChatMessageRetriever(store, None, max_tokens=30)
        outputs = run(retriever, "h", until_message_id="a9")
        assert texts(outputs["messages"])[-1] == "a9"
        assert outputs["omitted_rounds"] == 10 - len(outputs["messages"]) // 2 > 0

    @pytest.mark.parametrize("last_k", [0, 1, None])
    def test_a_message_that_is_not_there_is_an_error(self, run, retriever, rounds, last_k):
        with pytest.raises(MessageNotFoundError, match="nowhere"):
            run(retriever, "h", last_k=last_k, until_message_id="nowhere")
        with pytest.raises(ValueError, match="until_message_id must"):
            run(retriever, "h", last_k=last_k, until_message_id="")


class TestBefore:
    @pytest.mark.parametrize("message_id", ["q20", None, "new"], ids=["the same id", "no id", "a new id"])
    @pytest.mark.parametrize(("last_k", "expected"), [(0, []), (1, ["q19", "a19"])])
    def test_a_question_is_edited_by_asking_another_before_it(self, run, store, rounds, message_id, last_k, expected):
        edited = USER("edited", meta={"chat_message_id": message_id})
        retriever = ChatMessageRetriever(store, len(expected) if store.last_k_unit == "message" else last_k)
        outputs = run(retriever, "h", before_message_id="q20", current_messages=[edited])
        assert texts(outputs["messages"]) == [*expected, "edited"]
        assert outputs["omitted_rounds"] == 20 - last_k
        assert outputs["revision"] == store.get_chat_history("h").revision

    @pytest.mark.parametrize("last_k", [0, 3])
    def test_nothing_stands_before_the_first_message(self, run, retriever, rounds, last_k):
        outputs = run(retriever, "h", last_k=last_k, before_message_id="q0", current_messages=[question("new")])
        assert (texts(outputs["messages"]), outputs["omitted_rounds"]) == (["new"], 0)

    @pytest.mark.parametrize("last_k", [0, 1, None])
    @pytest.mark.parametrize("replaced", ["q29", "q3"])
    def test_a_turn_that_has_taken_its_place_before_gets_the_stored_answer(self, run, store, rounds, last_k, replaced):
        retriever, edited = ChatMessageRetriever(store, last_k), question("new")
        writer = ChatMessageWriter(store)
        for answer in ("first", "second"):
            shown = run(retriever, "h", before_message_id=replaced, current_messages=[edited])
            replies = shown.get("replies", [ASSISTANT(answer)])
            end = {"replace_from_message_id": replaced, "expected_revision": shown["revision"]}
            assert texts(writer.run("h", [edited], replies, **end)["replies"]) == ["first"]
        assert texts(shown["replies"]) == ["first"]
        assert texts(store.retrieve_messages("h", 1000))[-3:] == [f"a{int(replaced[1:]) - 1}", "new", "first"]

    @pytest.mark.parametrize("last_k", [0, 1, None])
    @pytest.mark.parametrize("current", [[], [question("new")], [USER("without an id")]])
    def test_a_message_that_is_not_there_is_an_error(self, run, retriever, rounds, last_k, current):
        with pytest.raises(MessageNotFoundError, match="nowhere"):
            run(retriever, "h", last_k=last_k, before_message_id="nowhere", current_messages=current)

    def test_wrong_arguments_are_refused(self, run, retriever, rounds):
        with pytest.raises(ValueError, match="before_message_id must"):
            run(retriever, "h", before_message_id="")
        with pytest.raises(ValueError, match="cannot be given together"):
            run(retriever, "h", before_message_id="q1", until_message_id="a0")


class TestOmittedRounds:
    @pytest.mark.parametrize(("last_k", "omitted"), [(0, 30), (1, 29), (29, 1), (30, 0), (31, 0)])
    def test_are_those_that_are_not_shown(self, run, store, rounds, last_k, omitted):
        if store.last_k_unit == "round":
            assert run(ChatMessageRetriever(store), "h", last_k=last_k)["omitted_rounds"] == omitted

    @pytest.mark.parametrize("last_k", [0, 3])
    def test_do_not_count_this_turn_nor_those_after_it(self, run, store, writer, rounds, last_k):
        if store.last_k_unit == "round":
            for messages in ([question("mine")], [question("other")]):
                run(writer, "h", messages)
            outputs = run(ChatMessageRetriever(store), "h", last_k=last_k, current_messages=[question("mine")])
            assert outputs["omitted_rounds"] == 30 - last_k

    def test_are_none_of_a_history_that_does_not_exist(self, run, retriever):
        assert run(retriever, "h", current_messages=[question("q0")])["omitted_rounds"] == 0

    def test_are_not_told_if_a_store_of_another_package_cannot(self, run):
        store = MinimalStore([USER("q0"), USER("q1")])
        assert "omitted_rounds" not in run(ChatMessageRetriever(store), "h", last_k=1)
        assert run(ChatMessageRetriever(store), "h", last_k=3)["omitted_rounds"] == 0
