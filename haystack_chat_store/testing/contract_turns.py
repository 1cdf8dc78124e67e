# SPDX-License-Identifier: Apache-2.0
"""Rule 26: a turn, once. The calls are those of the components and hooks that write and show turns."""

from typing import Any

import pytest
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.errors import MessageNotFoundError, UnsupportedOperationError
from haystack_chat_store.ids import QUESTION_ID_KEY
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, ids, texts
from haystack_chat_store.testing.messages import user, with_id
from haystack_chat_store.turn_writer import TurnWriter, WrittenTurn
from haystack_chat_store.window_reader import TurnWindow, WindowReader


def _reply(text: str) -> ChatMessage:
    return ChatMessage.from_assistant(text)


class Rule26TurnsTest(ContractTest):
    """Rule 26: a turn that is sent again is stored once."""

    def _write(
        self, store: ClosableStore, calls: Calls, messages: Any, replies: Any = (), **options: Any
    ) -> WrittenTurn:
        turn: WrittenTurn = calls.call(
            TurnWriter(store, DuplicatePolicy.SKIP, **options), "write", "chat", messages, list(replies)
        )
        return turn

    def _read(self, store: ClosableStore, calls: Calls, current: Any, last_k: int = 2, **until: Any) -> TurnWindow:
        window: TurnWindow = calls.call(WindowReader(last_k), "read_turn", store, "chat", current, **until)
        return window

    def test_turn_that_is_written_again_is_stored_once_with_its_first_answer(
        self, store: ClosableStore, calls: Calls
    ) -> None:
        first = self._write(store, calls, [with_id("q", "question")], [_reply("answer")])
        again = self._write(store, calls, [with_id("q", "question")], [_reply("another answer")])
        stored = calls.retrieve(store, "chat")
        assert (first.messages_written, again.messages_written) == (2, 0)
        assert first.messages == again.messages == stored
        assert first.replies == again.replies == stored[1:]
        assert stored[1].meta["chat_question_id"] == "q"

    @pytest.mark.parametrize("text", ["", " \n"])
    def test_question_that_says_nothing_is_refused_and_the_turn_before_stays(
        self, store: ClosableStore, calls: Calls, text: str
    ) -> None:
        stored = self._write(store, calls, [with_id("q", "question")], [_reply("answer")]).messages
        blank = with_id("blank", text)
        for call in (
            lambda: self._write(store, calls, [blank]),
            lambda: self._write(store, calls, [blank], [_reply("answer to nothing")]),
            lambda: self._read(store, calls, [blank]),
        ):
            with pytest.raises(ValueError, match=r"messages\[0\] says nothing"):
                call()
        assert calls.retrieve(store, "chat") == stored
        answer = self._read(store, calls, [with_id("q")]).answer([with_id("q")])
        assert answer == stored[1]

    def test_question_may_be_an_image_alone(self, store: ClosableStore, calls: Calls) -> None:
        picture = ChatMessage.from_user(
            content_parts=[ImageContent("cGl4ZWxz", mime_type="image/png")], meta={"chat_message_id": "picture"}
        )
        self._write(store, calls, [with_id("q", "question")], [_reply("answer")])
        (reply,) = self._write(store, calls, [picture], [_reply("a cat")]).replies
        assert reply.meta["chat_question_id"] == "picture"

    @pytest.mark.parametrize("other_turns", [0, 1, 30])
    def test_question_is_written_first_and_its_answer_later(
        self, store: ClosableStore, calls: Calls, other_turns: int
    ) -> None:
        question = self._write(store, calls, [user("question")]).messages
        for number in range(other_turns):
            self._write(store, calls, [user(f"question {number}")], [_reply(f"answer {number}")])
        assert self._write(store, calls, question, [_reply("answer")]).messages_written == 1
        turn = self._read(store, calls, question).turn
        assert texts(turn) == ["question", "answer"]
        assert ids(turn)[:1] == ids(question)

    @pytest.mark.parametrize("other_turns", [0, 30])
    def test_answer_is_written_only_as_long_as_its_question_is_stored(
        self, store: ClosableStore, calls: Calls, other_turns: int
    ) -> None:
        question = self._write(store, calls, [user("question")]).messages
        for number in range(other_turns):
            self._write(store, calls, [user(f"question {number}")], [_reply(f"answer {number}")])
        for _ in range(2):
            answer = self._write(store, calls, question, [_reply("answer")], question_is_stored=True).replies
            assert texts(self._read(store, calls, question).turn) == ["question", "answer"]
        assert answer[0].meta["chat_question_id"] == ids(question)[0]

    @pytest.mark.parametrize("is_deleted_whole", [True, False])
    def test_answer_to_a_question_that_is_gone_is_refused(
        self, store: ClosableStore, calls: Calls, is_deleted_whole: bool
    ) -> None:
        self._write(store, calls, [with_id("kept", "kept")], [_reply("answer")])
        question = self._write(store, calls, [with_id("gone", "gone")]).messages
        try:
            calls.delete(store, "chat", **({} if is_deleted_whole else {"message_ids": ["gone"]}))
        except UnsupportedOperationError:
            pytest.skip("The engine cannot delete single messages.")
        stored = calls.retrieve(store, "chat")
        for messages in (question, []) if is_deleted_whole else (question,):
            with pytest.raises(MessageNotFoundError, match="deleted while the model answered"):
                self._write(store, calls, messages, [_reply("answer")], question_is_stored=True)
        assert calls.retrieve(store, "chat") == stored

    def test_reply_without_messages_names_the_last_question(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("a", "first"), with_id("b", "second")])
        for _ in range(2):
            self._write(store, calls, [], [_reply("answer")])
        assert [message.meta.get("chat_question_id") for message in calls.retrieve(store, "chat")] == [None, None, "b"]

    @pytest.mark.parametrize("other_turns", [0, 1, 30])
    def test_what_others_say_after_a_question_is_left_out(
        self, store: ClosableStore, calls: Calls, other_turns: int
    ) -> None:
        for number in range(3):
            self._write(store, calls, [with_id(f"q{number}", f"q{number}")], [_reply(f"a{number}")])
        calls.write(store, "chat", [with_id("mine", "mine")])
        for number in range(other_turns):
            calls.write(store, "chat", [user(f"other question {number}")])
        window = self._read(store, calls, [with_id("mine", "mine")])
        assert texts(window.before) == ["q1", "a1", "q2", "a2"]
        assert texts(window.turn) == ["mine"]
        assert window.rounds_after == other_turns
        assert window.answer([with_id("mine", "mine")]) is None

    def test_window_has_no_answer_without_its_question(self, store: ClosableStore, calls: Calls) -> None:
        left = self._write(store, calls, [with_id("left", "left?")]).messages
        right = self._write(store, calls, [with_id("right", "right?")], [_reply("right!")]).messages
        self._write(store, calls, left, [_reply("left!")])
        assert texts(calls.call(WindowReader(1), "read", store, "chat")) == ["right?", "right!"]
        assert texts(calls.call(WindowReader(2), "read", store, "chat")) == ["left?", "left!", "right?", "right!"]
        assert texts(self._read(store, calls, right[:1], last_k=0).turn) == ["right?", "right!"]
        of_deleted = ChatMessage.from_assistant("gone!", meta={QUESTION_ID_KEY: "deleted"})
        calls.write(store, "chat", [of_deleted])
        assert texts(calls.call(WindowReader(1), "read", store, "chat")) == ["right?", "right!", "gone!"]

    def test_stored_answer_is_found_outside_the_window(self, store: ClosableStore, calls: Calls) -> None:
        for number in range(40):
            self._write(store, calls, [with_id(f"q{number}", f"q{number}")], [_reply(f"a{number}")])
        for number in (0, 20, 39):
            answer = self._read(store, calls, [with_id(f"q{number}")]).answer([with_id(f"q{number}")])
            assert answer is not None
            assert answer.text == f"a{number}"
        assert self._read(store, calls, [with_id("new")]).turn == []

    @pytest.mark.parametrize("unit", ["round", "message"])
    def test_conversation_is_read_until_a_message(self, new_store: StoreFactory, calls: Calls, unit: str) -> None:
        store = new_store(last_k_unit=unit)
        for number in range(20):
            self._write(store, calls, [with_id(f"q{number}", f"q{number}")], [_reply(f"a{number}")])
        for number in (1, 10, 19):
            window = self._read(store, calls, [], until_message_id=f"q{number}")
            assert texts(window.before)[-3:] == [f"q{number - 1}", f"a{number - 1}", f"q{number}"]
            assert window.rounds_after == 19 - number
            window = self._read(store, calls, [], before_message_id=f"q{number}")
            assert texts(window.before)[-2:] == [f"q{number - 1}", f"a{number - 1}"]
            assert window.rounds_after == 20 - number
