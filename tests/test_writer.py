# SPDX-License-Identifier: Apache-2.0
"""ChatMessageWriter: the messages of a turn, and the replies to them, as one batch."""

import asyncio
import copy
import re
import threading
import uuid

import pytest
from haystack import DeserializationError
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.document_stores.types import DuplicatePolicy
from haystack_experimental.chat_message_stores.in_memory import InMemoryChatMessageStore as ExperimentalStore
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from test_retriever import MinimalStore, cannot_be_loaded, texts

from haystack_chat_store import InMemoryChatMessageStore, SQLiteChatMessageStore, with_message_ids
from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    DuplicateMessageError,
    MessageEncodingError,
    MessageNotFoundError,
)

USER, ASSISTANT = ChatMessage.from_user, ChatMessage.from_assistant


def run_sync(writer, *arguments, **options):
    return writer.run(*arguments, **options)["messages_written"]


def run_async(writer, *arguments, **options):
    return asyncio.run(writer.run_async(*arguments, **options))["messages_written"]


@pytest.fixture(params=[run_sync, run_async], ids=["sync", "async"])
def run(request):
    return request.param


@pytest.fixture
def store():
    return InMemoryChatMessageStore(namespace=uuid.uuid4().hex)


@pytest.fixture
def writer(store):
    return ChatMessageWriter(store)


class RecordingStore(MinimalStore):
    """Keeps the batches it is given apart."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def write_messages(self, chat_history_id, messages):
        self.batches.append([chat_history_id, *texts(messages)])
        return super().write_messages(chat_history_id, messages)


class TestBatch:
    def test_messages_come_before_replies_in_one_write(self, run):
        store = RecordingStore()
        assert run(ChatMessageWriter(store), "h", [USER("q0"), USER("q1")], [ASSISTANT("a0"), ASSISTANT("a1")]) == 4
        assert store.batches == [["h", "q0", "q1", "a0", "a1"]]

    @pytest.mark.parametrize("replies", [None, [], iter(())], ids=["none", "empty", "empty iterator"])
    def test_there_need_be_no_replies(self, run, replies):
        store = RecordingStore()
        assert run(ChatMessageWriter(store), "h", [USER("q0")], replies) == 1
        assert store.batches == [["h", "q0"]]

    def test_replies_alone_will_do(self, run, store, writer):
        assert run(writer, "h", [], [ASSISTANT("a0")]) == 1
        assert texts(store.retrieve_messages("h")) == ["a0"]

    def test_nothing_is_nothing(self, run, store, writer):
        assert run(writer, "h", []) == 0
        assert store.count_messages("h") == 0

    def test_generators_are_written_whole(self, run, store, writer):
        questions, answers = (USER(f"q{i}") for i in range(2)), (ASSISTANT(f"a{i}") for i in range(2))
        assert run(writer, "h", questions) == 2
        assert run(writer, "h", (USER(f"q{i}") for i in (2,)), answers) == 3
        assert texts(store.retrieve_messages("h")) == ["q0", "q1", "q2", "a0", "a1"]

    def test_the_lists_passed_in_are_not_changed(self, run, writer):
        messages, replies = [USER("q0")], [ASSISTANT("a0")]
        run(writer, "h", messages, replies)
        assert (messages, replies) == ([USER("q0")], [ASSISTANT("a0")])

    def test_system_messages_are_not_counted_where_the_store_skips_them(self, run, writer):
        assert run(writer, "h", [ChatMessage.from_system("Be brief."), USER("q0")], [ASSISTANT("a0")]) == 2

    def test_the_whole_output_of_the_retriever_is_not_stored_again(self, run, store, writer):
        run(writer, "h", [USER("q0")], [ASSISTANT("a0")])
        retrieved = ChatMessageRetriever(store).run("h", current_messages=[USER("q1")])["messages"]
        assert run(writer, "h", retrieved, [ASSISTANT("a1")]) == 2
        assert texts(store.retrieve_messages("h")) == ["q0", "a0", "q1", "a1"]

    def test_what_the_retriever_has_added_for_the_model_is_not_stored(self, run, store, writer):
        call = ChatMessage.from_assistant(tool_calls=[ToolCall("weather", {}, id="call_1")])
        store.write_messages("h", [USER("q0"), call])  # the tool was interrupted
        shown = ChatMessageRetriever(store).run("h", current_messages=[USER("q1")])["messages"]
        assert [message.role.value for message in shown] == ["user", "assistant", "tool", "assistant", "user"]
        assert run(writer, "h", [*shown, ASSISTANT("a1")]) == 2
        assert texts(store.retrieve_messages("h")) == ["q0", None, "q1", "a1"]


class TestStoredQuestion:
    """The writer is told that another one has stored the question."""

    @pytest.mark.parametrize("messages", [[], [ChatMessage.from_system("Be brief.")]], ids=["nothing", "instructions"])
    def test_where_nothing_is_said_no_question_is_missing(self, run, store, messages):
        assert run(ChatMessageWriter(store, question_is_stored=True), "h", messages) == 0
        assert store.get_chat_history("h") is None

    def test_a_reply_to_a_history_without_a_question_is_refused(self, run, store):
        with pytest.raises(MessageNotFoundError, match="has no question that this could answer"):
            run(ChatMessageWriter(store, question_is_stored=True), "h", [], [ASSISTANT("a0")])
        assert store.get_chat_history("h") is None


class TestWrongArguments:
    @pytest.mark.parametrize("replies", [None, [ASSISTANT("a0")]], ids=["no replies", "replies"])
    @pytest.mark.parametrize(
        "messages",
        [None, "Hi!", USER("q0"), {"role": "user"}, 5, [USER("q0"), "Hi!"], [None]],
        ids=["none", "text", "one message", "dict", "number", "text in a list", "none in a list"],
    )
    def test_messages_that_are_none_are_refused_and_nothing_is_written(self, run, store, writer, messages, replies):
        with pytest.raises(ValueError, match="messages"):
            run(writer, "h", messages, replies)
        assert store.count_messages("h") == 0

    @pytest.mark.parametrize(
        "replies", ["Hi!", ASSISTANT("a0"), 5, ["Hi!"]], ids=["text", "one message", "number", "text in a list"]
    )
    def test_replies_that_are_no_messages_are_refused_and_nothing_is_written(self, run, store, writer, replies):
        with pytest.raises(ValueError, match=r"^replies(\[0\])? must be"):
            run(writer, "h", [USER("q0")], replies)
        assert store.count_messages("h") == 0

    def test_what_cannot_be_stored_is_named_by_its_place_in_its_argument(self, run, store, writer):
        shown, wrong = USER("q0", meta={"chat_shown": True}), ASSISTANT("a0", meta={"x": 10**4300})
        for messages, replies, name in (
            ([USER("q0"), wrong], [], "messages[1]"),
            ([shown, wrong], [ASSISTANT("a1")], "messages[1]"),
            ([USER("q0")], [wrong], "replies[0]"),
            ([shown], [ASSISTANT("a1"), wrong], "replies[1]"),
        ):
            with pytest.raises(MessageEncodingError, match=f"^{re.escape(name)}\\.meta\\['x'\\]"):
                run(writer, "h", messages, replies)
        with pytest.raises(ValueError, match=r"^replies\[0\]\.meta\['chat_message_id'\] must be text"):
            run(writer, "h", [USER("q0")], [ASSISTANT("a0", meta={"chat_message_id": 5})])
        assert store.count_messages("h") == 0

    def test_an_id_twice_in_the_batch_is_named_by_its_place_in_its_argument(self, run, store):
        writer, meta = ChatMessageWriter(store, policy=DuplicatePolicy.FAIL), {"chat_message_id": "a"}
        shown = USER("q", meta={"chat_shown": True})
        with pytest.raises(DuplicateMessageError, match=r"^messages\[2\] has the id 'a' of a message before it"):
            run(writer, "h", [shown, USER("q0", meta=meta), USER("q1", meta=meta)])
        assert store.count_messages("h") == 0

    @pytest.mark.parametrize("chat_history_id", ["", None, 5, "a\x00b", "\ud800", "x" * 513])
    def test_an_id_that_cannot_be_one_is_refused(self, run, writer, chat_history_id):
        with pytest.raises(ValueError, match="chat_history_id must"):
            run(writer, chat_history_id, [USER("q0")])


class TestWhatAModelWasShown:
    @pytest.mark.parametrize("replaces", [False, True])
    def test_a_question_after_an_unanswered_one_is_stored_where_user_and_model_speak_in_turns(
        self, run, store, writer, replaces
    ):
        (q0,) = with_message_ids([USER("q0")])
        store.write_messages("h", [q0, *([USER("old", meta={"chat_message_id": "old"})] if replaces else [])])
        retriever = ChatMessageRetriever(store, merge_consecutive=True)
        until = {"until_message_id": q0.meta["chat_message_id"]}
        shown = retriever.run("h", current_messages=[USER("q1")], **(until if replaces else {}))["messages"]
        assert [each.text for each in shown] == ["q0", "Please go on.", "q1"]
        run(writer, "h", shown, [ASSISTANT("a")], replace_from_message_id="old" if replaces else None)
        stored = store.retrieve_messages("h")
        assert texts(stored) == ["q0", "q1", "a"]
        assert stored[2].meta["chat_question_id"] == stored[1].meta["chat_message_id"]


class TestOtherStores:
    def test_the_store_of_haystack_experimental(self, run):
        store, history = ExperimentalStore(), uuid.uuid4().hex
        assert run(ChatMessageWriter(store), history, [USER("q0")], [ASSISTANT("a0")]) == 2
        assert texts(store.retrieve_messages(history)) == ["q0", "a0"]
        store.delete_messages(history)

    def test_one_without_asynchronous_methods_does_not_block_the_loop(self):
        class SlowStore(MinimalStore):
            def write_messages(self, chat_history_id, messages):
                assert loop_went_on.wait(60), "the event loop was blocked"
                return super().write_messages(chat_history_id, messages)

        async def main():
            writing = asyncio.ensure_future(ChatMessageWriter(SlowStore()).run_async("h", [USER("q0")]))
            await asyncio.sleep(0.01)
            loop_went_on.set()
            return await writing

        loop_went_on = threading.Event()
        assert asyncio.run(main())["messages_written"] == 1


class TestSerialization:
    def test_goes_through_the_stores_own_and_comes_back_equal(self, tmp_path):
        for store in (
            InMemoryChatMessageStore(False, 3, last_k_unit="message", namespace="n"),
            SQLiteChatMessageStore(tmp_path / "h.db", durability="normal"),
            ExperimentalStore(last_k=3),
        ):
            data = ChatMessageWriter(store).to_dict()
            assert data == {
                "type": "haystack_integrations.components.writers.chat_store.chat_message_writer.ChatMessageWriter",
                "init_parameters": {
                    "chat_message_store": store.to_dict(),
                    "policy": "SKIP",
                    "require_user_id": False,
                    "question_is_stored": False,
                },
            }
            loaded = ChatMessageWriter.from_dict(data)
            assert type(loaded.chat_message_store) is type(store)
            assert loaded.to_dict() == data
        assert list(tmp_path.iterdir()) == []

    def test_does_not_change_its_input_so_it_can_be_used_again(self, store, writer):
        data = writer.to_dict()
        before = copy.deepcopy(data)
        first, second = ChatMessageWriter.from_dict(data), ChatMessageWriter.from_dict(data)
        assert data == before
        assert first.chat_message_store == second.chat_message_store == store

    @cannot_be_loaded
    def test_a_store_that_cannot_be_loaded_is_an_error(self, writer, replacement):
        data = writer.to_dict()
        data["init_parameters"] = replacement
        with pytest.raises(DeserializationError):
            ChatMessageWriter.from_dict(data)


class TestClose:
    @pytest.mark.parametrize("close", [ChatMessageWriter.close, ChatMessageWriter.close_async])
    def test_releases_the_store_until_its_next_use(self, run, close, tmp_path):
        writer = ChatMessageWriter(SQLiteChatMessageStore(tmp_path / "h.db"))
        for _ in range(2):
            assert run(writer, "h", [USER("q0")]) == 1
            assert (tmp_path / "h.db-wal").exists()
            done = close(writer)
            if done is not None:
                asyncio.run(done)
            assert not (tmp_path / "h.db-wal").exists()

    def test_of_a_store_that_has_nothing_to_close_does_nothing(self):
        ChatMessageWriter(MinimalStore()).close()
        asyncio.run(ChatMessageWriter(MinimalStore()).close_async())


def with_id(message_id, text):
    return USER(text, meta={"chat_message_id": message_id})


class TestPolicy:
    def test_messages_that_are_there_are_skipped_unless_told_otherwise(self, run, store, writer):
        run(writer, "h", [with_id("1", "first")])
        assert run(writer, "h", [with_id("1", "again")]) == 0
        assert texts(store.retrieve_messages("h")) == ["first"]

    def test_overwriting_puts_them_in_their_place(self, run, store):
        writer = ChatMessageWriter(store, policy=DuplicatePolicy.OVERWRITE)
        run(writer, "h", [with_id("1", "first"), with_id("2", "second")])
        assert run(writer, "h", [with_id("1", "edited")], [ASSISTANT("third")]) == 2
        assert texts(store.retrieve_messages("h")) == ["edited", "second", "third"]

    def test_failing_writes_nothing(self, run, store):
        writer = ChatMessageWriter(store, policy=DuplicatePolicy.FAIL)
        run(writer, "h", [with_id("1", "first")])
        with pytest.raises(DuplicateMessageError):
            run(writer, "h", [with_id("1", "again")], [ASSISTANT("second")])
        assert texts(store.retrieve_messages("h")) == ["first"]

    def test_unexpected_revision_writes_nothing(self, run, store, writer):
        assert run(writer, "h", [USER("first")], expected_revision=0) == 1
        with pytest.raises(ChatHistoryChangedError):
            run(writer, "h", [USER("second")], expected_revision=0)
        assert texts(store.retrieve_messages("h")) == ["first"]

    @pytest.mark.parametrize("policy", DuplicatePolicy)
    def test_policy_survives_serialization(self, store, policy):
        data = ChatMessageWriter(store, policy=policy).to_dict()
        before = copy.deepcopy(data)
        assert data["init_parameters"]["policy"] == policy.name
        assert ChatMessageWriter.from_dict(data).policy is policy
        assert data == before

    def test_definition_without_a_policy_skips(self, store):
        data = ChatMessageWriter(store).to_dict()
        del data["init_parameters"]["policy"]
        assert ChatMessageWriter.from_dict(data).policy is DuplicatePolicy.SKIP

    def test_unknown_policy_cannot_be_loaded(self, store):
        data = ChatMessageWriter(store).to_dict()
        data["init_parameters"]["policy"] = "REPLACE"
        with pytest.raises(DeserializationError, match="policy"):
            ChatMessageWriter.from_dict(data)

    @pytest.mark.parametrize("policy", ["skip", None])
    def test_policy_must_be_one(self, store, policy):
        with pytest.raises(ValueError, match="policy"):
            ChatMessageWriter(store, policy=policy)

    def test_store_that_takes_no_policy_is_refused_one(self, run):
        assert run(ChatMessageWriter(MinimalStore(), policy=DuplicatePolicy.NONE), "h", [USER("first")]) == 1
        with pytest.raises(ValueError, match="MinimalStore does not take policy"):
            ChatMessageWriter(MinimalStore(), policy=DuplicatePolicy.OVERWRITE)
        with pytest.raises(ValueError, match="MinimalStore does not take expected_revision"):
            run(ChatMessageWriter(MinimalStore()), "h", [USER("first")], expected_revision=0)
