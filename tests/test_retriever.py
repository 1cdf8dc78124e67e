# SPDX-License-Identifier: Apache-2.0
"""ChatMessageRetriever: the end of a history with the messages of this turn around it, as a model accepts it."""

import asyncio
import copy
import threading
import uuid

import pytest
from conversations import any_conversations, untimed
from haystack import DeserializationError
from haystack.dataclasses import ChatMessage, ChatRole, ToolCall, ToolCallResult
from haystack.token_counters import ApproximateTokenCounter
from haystack_experimental.chat_message_stores.in_memory import InMemoryChatMessageStore as ExperimentalStore
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from hypothesis import given
from hypothesis import strategies as st
from strict_model import problems

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore
from haystack_chat_store.conversation.shown import INTERRUPTED, UNANSWERED
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY
from haystack_chat_store.store_requests import Retrieve

USER, ASSISTANT, SYSTEM = ChatMessage.from_user, ChatMessage.from_assistant, ChatMessage.from_system
CALL = ToolCall("weather", {"city": "Rome"}, id="call_1")


def run_sync(retriever, *arguments, **options):
    return retriever.run(*arguments, **options)["messages"]


def run_async(retriever, *arguments, **options):
    return asyncio.run(retriever.run_async(*arguments, **options))["messages"]


@pytest.fixture(params=[run_sync, run_async], ids=["sync", "async"])
def run(request):
    return request.param


@pytest.fixture
def store():
    return InMemoryChatMessageStore(skip_system_messages=False, namespace=uuid.uuid4().hex)


@pytest.fixture
def rounds(store):
    """Four rounds of one question and one answer each."""
    for number in range(4):
        store.write_messages("h", [USER(f"q{number}"), ASSISTANT(f"a{number}")])


def texts(messages):
    return [message.text for message in messages]


class MinimalStore:
    """What the protocol asks for and no more. Keeps one history."""

    def __init__(self, messages=()):
        self.messages = list(messages)
        self.asked = []

    def to_dict(self):
        return {"type": "test_retriever.MinimalStore", "init_parameters": {}}

    @classmethod
    def from_dict(cls, data):
        return cls()

    def count_messages(self, chat_history_id):
        return len(self.messages)

    def write_messages(self, chat_history_id, messages):
        self.messages += messages
        return len(messages)

    def retrieve_messages(self, chat_history_id, last_k=None):
        self.asked.append((chat_history_id, last_k, threading.current_thread()))
        return list(self.messages)

    def delete_messages(self, chat_history_id):
        self.messages.clear()

    def delete_all_messages(self):
        self.messages.clear()


@pytest.mark.parametrize("window_step", [2, 3])
@pytest.mark.parametrize("last_k", [0, None], ids=["the call's", "the store's"])
def test_none_of_a_store_of_another_package_is_none(last_k, window_step):
    store = MinimalStore([ChatMessage.from_user("q0"), ChatMessage.from_user("q1")])
    store.last_k = 0
    assert Retrieve(last_k, window_step).run(store, "h").messages == []
    assert asyncio.run(Retrieve(last_k, window_step).run_async(store, "h")).messages == []
    retriever = ChatMessageRetriever(store, last_k, window_step=window_step)
    assert retriever.run("h")["messages"] == []


cannot_be_loaded = pytest.mark.parametrize(
    "replacement",
    [
        {"chat_message_store": {"type": "haystack_chat_store.stores.nowhere.Store", "init_parameters": {}}},
        {"chat_message_store": {"type": "haystack_chat_store.stores.in_memory.Nobody", "init_parameters": {}}},
        {"chat_message_store": {"type": "os.path.Store", "init_parameters": {}}},
        {"chat_message_store": {"init_parameters": {}}},
        {},
    ],
    ids=["unknown module", "unknown class", "untrusted module", "no type", "no store"],
)


class TestOrder:
    def test_system_messages_then_the_history_then_the_rest(self, run, store, rounds):
        current = [USER("q4"), SYSTEM("s0"), ASSISTANT("a4"), SYSTEM("s1")]
        messages = run(ChatMessageRetriever(store), "h", last_k=1, current_messages=current)
        assert texts(messages) == ["s0", "s1", "q3", "a3", "q4", "a4"]

    @pytest.mark.parametrize("current", [None, []])
    def test_without_current_messages_the_history_alone(self, run, store, rounds, current):
        messages = run(ChatMessageRetriever(store), "h", last_k=2, current_messages=current)
        assert texts(messages) == ["q2", "a2", "q3", "a3"]

    def test_a_history_that_does_not_exist_is_empty(self, run, store):
        assert run(ChatMessageRetriever(store), "h") == []
        assert run(ChatMessageRetriever(store), "h", current_messages=[USER("q0")]) == [USER("q0")]

    def test_current_messages_are_passed_on_unchanged_and_stored_nowhere(self, run, store):
        current = [SYSTEM("s0"), USER("q0")]
        messages = run(ChatMessageRetriever(store), "h", current_messages=current)
        assert [*map(id, messages)] == [*map(id, current)]
        assert current == [SYSTEM("s0"), USER("q0")]
        assert store.count_messages("h") == 0

    def test_messages_brought_with_their_ids_are_not_repeated(self, run, store, rounds):
        retriever = ChatMessageRetriever(store)
        transcript = run(retriever, "h")
        assert run(retriever, "h", current_messages=transcript) == transcript
        assert texts(run(retriever, "h", current_messages=[*transcript[4:], USER("q4")])) == [
            *("q0", "a0", "q1", "a1", "q2", "a2", "q3", "a3", "q4")
        ]

    def test_of_a_whole_transcript_brought_back_only_what_is_new_comes_after_the_history(self, run, store, rounds):
        transcript = store.retrieve_messages("h")
        current = [*transcript, USER("q4")]
        messages = run(ChatMessageRetriever(store, last_k=2), "h", current_messages=current)
        assert texts(messages) == ["q2", "a2", "q3", "a3", "q4"]

    def test_a_question_that_was_stored_and_is_sent_again_stands_where_it_was_stored(self, run, store):
        question = USER("q0", meta={MESSAGE_ID_KEY: "1"})
        store.write_messages("h", [question, ASSISTANT(tool_calls=[CALL]), ChatMessage.from_tool("sunny", CALL)])
        messages = run(ChatMessageRetriever(store), "h", current_messages=[SYSTEM("s0"), question])
        assert [message.role.value for message in messages] == ["system", "user", "assistant", "tool"]

    def test_of_agents_that_ran_at_the_same_time_one_comes_after_the_other(self, run, store):
        questions = [USER(f"q{number}", meta={MESSAGE_ID_KEY: str(number)}) for number in range(2)]
        answers = [ASSISTANT(f"a{number}", meta={QUESTION_ID_KEY: str(number)}) for number in range(2)]
        store.write_messages("h", [*questions, *answers])
        assert texts(run(ChatMessageRetriever(store), "h")) == ["q0", "a0", "q1", "a1"]
        assert texts(run(ChatMessageRetriever(store), "h", last_k=1)) == ["q1", "a1"]

    def test_a_system_message_that_is_stored_and_brought_comes_once_and_first(self, run, store):
        store.write_messages("h", [USER("q0"), SYSTEM("s0")])
        _, system = run(ChatMessageRetriever(store), "h")
        assert texts(run(ChatMessageRetriever(store), "h", current_messages=[system])) == ["s0", "q0"]


class TestLastK:
    @pytest.mark.parametrize(
        ("of_run", "of_component", "of_store", "expected"),
        [
            (1, 2, 3, 1),
            (None, 2, 3, 2),
            (None, None, 3, 3),
            (None, None, None, 4),
            (3, None, 1, 3),
            (2, 0, 3, 2),
            (None, 0, 3, 0),
            (0, 2, 3, 0),
            (None, None, 0, 0),
        ],
    )
    def test_the_runs_goes_before_the_components_and_that_before_the_stores(
        self, run, store, rounds, of_run, of_component, of_store, expected
    ):
        store = InMemoryChatMessageStore(last_k=of_store, namespace=store.namespace)
        messages = run(ChatMessageRetriever(store, last_k=of_component), "h", last_k=of_run)
        assert texts(messages) == [f"{who}{number}" for number in range(4 - expected, 4) for who in "qa"]

    def test_is_ten_if_nobody_says(self, run, store):
        store.write_messages("h", [USER(str(number)) for number in range(12)])
        assert texts(run(ChatMessageRetriever(store), "h")) == [str(number) for number in range(2, 12)]

    def test_zero_gives_only_the_current_messages_in_their_order(self, run, store, rounds):
        current = [USER("q4"), SYSTEM("s0")]
        assert texts(run(ChatMessageRetriever(store), "h", last_k=0, current_messages=current)) == ["s0", "q4"]
        assert run(ChatMessageRetriever(store, last_k=0), "h") == []

    def test_of_zero_does_not_even_ask_the_store(self, run):
        store = MinimalStore([USER("q0")])
        assert run(ChatMessageRetriever(store), "h", last_k=0) == []
        assert store.asked == []

    @pytest.mark.parametrize("last_k", [-1, 1.5, True, "3"])
    def test_is_refused_if_it_is_no_count(self, run, store, last_k):
        with pytest.raises(ValueError, match="last_k must be"):
            ChatMessageRetriever(store, last_k=last_k)
        with pytest.raises(ValueError, match="last_k must be"):
            run(ChatMessageRetriever(store), "h", last_k=last_k)


@pytest.mark.parametrize("last_k", [1, 2, 3, 4])
def test_of_a_store_that_counts_messages_a_long_turn_is_shown_from_its_question(run, last_k):
    store = InMemoryChatMessageStore(last_k_unit="message", namespace=uuid.uuid4().hex)
    turn = [USER("q1"), *[ASSISTANT(f"step {number}") for number in range(30)], ASSISTANT("a1")]
    store.write_messages("h", [USER("q0"), ASSISTANT("a0"), *turn])
    messages = run(ChatMessageRetriever(store, last_k=last_k), "h", current_messages=[USER("q2")])
    assert texts(messages) == [*texts(turn), "q2"]


def test_settings_are_attributes_that_may_be_changed(run, store, rounds):
    retriever = ChatMessageRetriever(store, last_k=3)
    assert (retriever.last_k, retriever.max_tokens, retriever.token_counter, retriever.window_step) == (
        3,
        None,
        None,
        1,
    )
    retriever.last_k = 1
    assert texts(run(retriever, "h")) == ["q3", "a3"]
    retriever.last_k, retriever.window_step = 2, 4
    assert len(run(retriever, "h")) == 8
    retriever.max_tokens, retriever.token_counter = 3, CharacterCounter()
    assert texts(run(retriever, "h")) == ["q3"]
    assert retriever.to_dict()["init_parameters"]["max_tokens"] == 3


class TestValidForTheModel:
    def test_calls_without_results_and_results_without_calls_stay_in_the_store(self, run, store):
        other = ChatMessage.from_tool("done", ToolCall("time", {}, id="call_2"))
        store.write_messages("h", [USER("q0"), ASSISTANT("Let me look.", tool_calls=[CALL]), USER("q1"), other])
        assert texts(run(ChatMessageRetriever(store), "h")) == ["q0", "Let me look.", None, UNANSWERED, "q1"]
        assert problems(run(ChatMessageRetriever(store), "h")) == []
        stored = store.retrieve_messages("h")
        assert (stored[1].tool_calls, stored[3].tool_call_results) == ([CALL], other.tool_call_results)

    def test_results_in_the_current_messages_count_as_answers(self, run, store):
        store.write_messages("h", [USER("q0"), ASSISTANT(tool_calls=[CALL])])
        answer = ChatMessage.from_tool("sunny", CALL)
        messages = run(ChatMessageRetriever(store), "h", current_messages=[answer, SYSTEM("s0")])
        assert [message.role for message in messages] == [
            ChatRole.SYSTEM,
            ChatRole.USER,
            ChatRole.ASSISTANT,
            ChatRole.TOOL,
        ]
        assert problems(messages) == []

    def test_current_messages_are_made_valid_too(self, run, store):
        current = [ChatMessage.from_tool("sunny", CALL), USER("q0"), ASSISTANT(tool_calls=[CALL])]
        for last_k in (0, 1):
            asked, called, answered = run(ChatMessageRetriever(store), "h", last_k=last_k, current_messages=current)
            assert (asked, called) == (current[1], current[2])
            assert answered.tool_call_result.result == INTERRUPTED

    def test_current_messages_with_a_text_that_is_none_are_refused(self, run, store):
        with pytest.raises(ValueError, match=r"current_messages\[1\] has a text that is a int"):
            run(ChatMessageRetriever(store), "h", current_messages=[USER("q0"), USER(5)])

    @untimed
    @given(any_conversations, any_conversations, st.integers(0, 4), st.sampled_from(["round", "message"]))
    def test_whatever_is_stored_what_comes_out_is_accepted_by_a_strict_model(self, stored, current, last_k, unit):
        store = InMemoryChatMessageStore(False, last_k=None, last_k_unit=unit, namespace="any conversations")
        store.delete_all_messages()
        store.write_messages("h", stored)
        retriever = ChatMessageRetriever(store, last_k=None)
        for current_messages in ([], [USER("q"), *current]):  # who speaks first in these is up to the caller
            assert problems(run_sync(retriever, "h", last_k=last_k, current_messages=current_messages)) == []
            assert problems(run_sync(retriever, "h", current_messages=current_messages)) == []

    def test_a_greeting_stays_in_the_store_and_out_of_sight_of_the_model(self, run, store):
        store.write_messages("h", [ASSISTANT("Hello!"), USER("q0")])
        assert texts(run(ChatMessageRetriever(store), "h")) == ["q0"]
        assert texts(store.retrieve_messages("h")) == ["Hello!", "q0"]


class TestBudget:
    """What is counted here are characters; what fits is for the tests of the window reader to say."""

    def test_the_newest_rounds_that_fit_beside_the_current_messages(self, run, store, rounds):
        retriever = ChatMessageRetriever(store, max_tokens=10, token_counter=CharacterCounter())
        assert texts(run(retriever, "h")) == ["q2", "a2", "q3", "a3"]
        assert texts(run(retriever, "h", current_messages=[SYSTEM("s0")])) == ["s0", "q2", "a2", "q3", "a3"]
        assert texts(run(retriever, "h", current_messages=[USER("longer than ten")])) == ["longer than ten"]

    def test_without_a_counter_is_counted_approximately(self, run, store, rounds):
        count = ApproximateTokenCounter().count
        two_rounds = count(store.retrieve_messages("h", 2))
        assert two_rounds < count(store.retrieve_messages("h", 3))
        messages = run(ChatMessageRetriever(store, max_tokens=two_rounds), "h")
        assert texts(messages) == ["q2", "a2", "q3", "a3"]

    def test_warms_up_a_counter_that_wants_it(self, store):
        class ColdCounter(CharacterCounter):
            warm = False

            def warm_up(self):
                self.warm = True

        counter = ColdCounter()
        ChatMessageRetriever(store, max_tokens=10, token_counter=counter).warm_up()
        assert counter.warm
        ChatMessageRetriever(store).warm_up()
        ChatMessageRetriever(store, max_tokens=10, token_counter=CharacterCounter()).warm_up()

    @pytest.mark.parametrize(
        "setting",
        [
            {"max_tokens": 0},
            {"max_tokens": True},
            {"max_tokens": 1.5},
            {"token_counter": 4},
            {"window_step": 0},
            {"window_step": None},
            {"model": ""},
            {"model": " "},
            {"model": 4},
        ],
    )
    def test_settings_that_cannot_be_are_refused(self, store, setting):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
            ChatMessageRetriever(store, **setting)


def test_a_window_step_moves_the_start_only_by_whole_steps(run, store, rounds):
    retriever = ChatMessageRetriever(store, last_k=1, window_step=3)
    assert texts(run(retriever, "h"))[0] == "q3"
    assert texts(run(retriever, "h", last_k=2))[0] == "q0"


class CharacterCounter:
    """Counts characters instead of tokens."""

    def count(self, messages, tools=None):
        return sum(len(message.text or "") for message in messages)

    def to_dict(self):
        return {"type": "test_retriever.CharacterCounter", "init_parameters": {}}


class TestOtherStores:
    def test_the_store_of_haystack_experimental(self, run):
        store, history = ExperimentalStore(), uuid.uuid4().hex
        store.write_messages(history, [USER("q0"), ASSISTANT("a0"), USER("q1"), ASSISTANT(tool_calls=[CALL])])
        messages = run(ChatMessageRetriever(store), history, last_k=1, current_messages=[SYSTEM("s0"), USER("q2")])
        assert texts(messages) == ["s0", "q1", None, None, UNANSWERED, "q2"]
        assert messages[3].tool_call_result.result == INTERRUPTED
        assert run(ChatMessageRetriever(store), history, last_k=0) == []
        store.delete_messages(history)

    @pytest.mark.parametrize(("last_k", "asked"), [(3, 3), (None, None)])
    def test_any_object_that_follows_the_protocol(self, run, last_k, asked):
        store = MinimalStore([USER("q0")])
        assert run(ChatMessageRetriever(store, last_k=last_k), "h", current_messages=[USER("q1")]) == [
            USER("q0"),
            USER("q1"),
        ]
        assert [call[:2] for call in store.asked] == [("h", asked)]

    def test_one_that_knows_no_window_step_is_read_whole_and_cut_alike(self, run):
        messages = [message for number in range(5) for message in (USER(f"q{number}"), ASSISTANT(f"a{number}"))]
        minimal, experimental, history = MinimalStore(messages), ExperimentalStore(last_k=2), uuid.uuid4().hex
        experimental.write_messages(history, messages)
        for store in (minimal, experimental):
            assert texts(run(ChatMessageRetriever(store, last_k=2, window_step=2), history))[0] == "q2"
            assert texts(run(ChatMessageRetriever(store, last_k=3, window_step=2), history))[0] == "q2"
        assert texts(run(ChatMessageRetriever(minimal, last_k=None, window_step=2), history))[0] == "q0"
        assert texts(run(ChatMessageRetriever(experimental, last_k=None, window_step=2), history))[0] == "q2"
        experimental.delete_messages(history)

    def test_one_without_asynchronous_methods_does_not_block_the_loop(self):
        class SlowStore(MinimalStore):
            def retrieve_messages(self, chat_history_id, last_k=None):
                assert loop_went_on.wait(60), "the event loop was blocked"
                return super().retrieve_messages(chat_history_id, last_k)

        async def main():
            retrieval = asyncio.ensure_future(ChatMessageRetriever(SlowStore([USER("q0")])).run_async("h"))
            await asyncio.sleep(0.01)
            loop_went_on.set()
            return await retrieval

        loop_went_on = threading.Event()
        assert asyncio.run(main()) == {"messages": [USER("q0")], "omitted_rounds": 0}

    def test_one_that_hands_out_its_own_list_gets_it_back_unchanged(self, run):
        class OpenStore(MinimalStore):
            def retrieve_messages(self, chat_history_id, last_k=None):
                return self.messages

        store = OpenStore([USER("q0"), ASSISTANT(tool_calls=[CALL])])
        before = copy.deepcopy(store.messages)
        messages = run(ChatMessageRetriever(store), "h", current_messages=[USER("q1")])
        messages.clear()
        assert store.messages == before

    def test_messages_without_an_id_are_not_taken_for_each_other(self, run):
        no_id = {MESSAGE_ID_KEY: None}
        store, current = MinimalStore([USER("q0"), USER("q1", meta=no_id)]), [USER("q2", meta=no_id)]
        assert texts(run(ChatMessageRetriever(store), "h", current_messages=current)) == ["q0", "q1", "q2"]


class TestSerialization:
    def stores(self, tmp_path):
        return [
            InMemoryChatMessageStore(False, 3, last_k_unit="message", namespace="n"),
            SQLiteChatMessageStore(tmp_path / "h.db", durability="normal"),
            ExperimentalStore(last_k=3),
        ]

    def test_goes_through_the_stores_own_and_comes_back_equal(self, tmp_path):
        for store in self.stores(tmp_path):
            counter = ApproximateTokenCounter(chars_per_token=3)
            data = ChatMessageRetriever(
                store,
                last_k=7,
                max_tokens=4000,
                token_counter=counter,
                window_step=5,
                portable=False,
                merge_consecutive=True,
                model="gpt-9",
                require_user_id=True,
            ).to_dict()
            assert data == {
                "type": "haystack_integrations.components.retrievers.chat_store"
                ".chat_message_retriever.ChatMessageRetriever",
                "init_parameters": {
                    "chat_message_store": store.to_dict(),
                    "last_k": 7,
                    "max_tokens": 4000,
                    "token_counter": counter.to_dict(),
                    "window_step": 5,
                    "portable": False,
                    "merge_consecutive": True,
                    "model": "gpt-9",
                    "require_user_id": True,
                },
            }
            loaded = ChatMessageRetriever.from_dict(data)
            assert type(loaded.chat_message_store) is type(store)
            assert type(loaded.token_counter) is ApproximateTokenCounter
            assert loaded.to_dict() == data
        assert list(tmp_path.iterdir()) == []

    def test_does_not_change_its_input_so_it_can_be_used_again(self, store):
        data = ChatMessageRetriever(store).to_dict()
        before = copy.deepcopy(data)
        first, second = ChatMessageRetriever.from_dict(data), ChatMessageRetriever.from_dict(data)
        assert data == before
        assert first.chat_message_store == second.chat_message_store == store
        assert first.chat_message_store is not second.chat_message_store

    @cannot_be_loaded
    def test_a_store_that_cannot_be_loaded_is_an_error(self, store, replacement):
        data = ChatMessageRetriever(store).to_dict()
        data["init_parameters"] = replacement
        with pytest.raises(DeserializationError):
            ChatMessageRetriever.from_dict(data)


class TestClose:
    @pytest.mark.parametrize("close", [ChatMessageRetriever.close, ChatMessageRetriever.close_async])
    def test_releases_the_store_until_its_next_use(self, run, close, tmp_path):
        store = SQLiteChatMessageStore(tmp_path / "h.db")
        retriever = ChatMessageRetriever(store)
        for _ in range(2):
            store.write_messages("h", [USER("q0", meta={"chat_message_id": "q0"})])
            assert texts(run(retriever, "h")) == ["q0"]
            assert (tmp_path / "h.db-wal").exists()
            done = close(retriever)
            if done is not None:
                asyncio.run(done)
            assert not (tmp_path / "h.db-wal").exists()

    @pytest.mark.parametrize("store", [MinimalStore(), ExperimentalStore()], ids=["minimal", "experimental"])
    def test_of_a_store_that_has_nothing_to_close_does_nothing(self, store):
        ChatMessageRetriever(store).close()
        asyncio.run(ChatMessageRetriever(store).close_async())

    def test_of_a_store_with_only_one_of_the_two_uses_that(self):
        class Closable(MinimalStore):
            closed = 0

            def close(self):
                self.closed += 1

        store = Closable()
        ChatMessageRetriever(store).close()
        asyncio.run(ChatMessageRetriever(store).close_async())
        assert store.closed == 2


def test_a_result_that_a_tool_message_repeats_does_not_double_the_answer(run, store):
    call = ASSISTANT(tool_calls=[CALL])
    doubled = ChatMessage(ChatRole.TOOL, [ToolCallResult("sunny", CALL, False)] * 2)
    store.write_messages("h", [USER("q0"), call, doubled])
    messages = run(ChatMessageRetriever(store), "h")
    assert [len(message.tool_call_results) for message in messages] == [0, 0, 1]
