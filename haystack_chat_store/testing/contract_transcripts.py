# SPDX-License-Identifier: Apache-2.0
"""Rule 26 for clients that send the whole transcript with each request."""

from typing import Any

import pytest
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store import transcript_matcher
from haystack_chat_store.errors import TranscriptError
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, texts
from haystack_chat_store.testing.messages import user, with_id
from haystack_chat_store.turn_writer import TurnWriter
from haystack_chat_store.types import MatchedTranscript


def _reply(text: str) -> ChatMessage:
    return ChatMessage.from_assistant(text)


class Rule29TranscriptsTest(ContractTest):
    """Rule 26: what comes again in a transcript is stored once, and what the transcript leaves out is kept."""

    def _write(self, store: ClosableStore, calls: Calls, messages: Any, replies: Any) -> None:
        calls.call(TurnWriter(store, DuplicatePolicy.SKIP), "write", "chat", messages, replies)

    def _match(self, store: ClosableStore, calls: Calls, transcript: Any) -> MatchedTranscript:
        matched: MatchedTranscript = calls.call(transcript_matcher, "match_transcript", store, "chat", transcript)
        return matched

    def test_transcript_that_goes_on_is_stored_once(self, store: ClosableStore, calls: Calls) -> None:
        transcript = [user("a")]
        for number in range(3):
            matched = self._match(store, calls, transcript)
            assert texts(matched.messages) == texts(transcript[-1:])
            for _ in range(2):
                self._write(store, calls, matched.messages, [_reply(str(number))])
            transcript += [_reply(str(number)), user("a")]
        assert texts(calls.retrieve(store, "chat")) == ["a", "0", "a", "1", "a", "2"]
        with pytest.raises(TranscriptError):
            self._match(store, calls, [user("### Task: a title")])

    def test_what_a_transcript_takes_back_is_kept_in_a_branch(self, store: ClosableStore, calls: Calls) -> None:
        transcript = [user("a"), _reply("1"), user("b"), _reply("2"), user("c")]
        self._write(store, calls, self._match(store, calls, transcript).messages, [_reply("3")])
        again = self._match(store, calls, transcript)
        assert texts(calls.retrieve(store, "chat")) == ["a", "1", "b", "2", "c"]
        assert texts(calls.retrieve(store, again.branch_id)) == ["a", "1", "b", "2", "c", "3"]
        edited = self._match(store, calls, [user("a"), _reply("1"), user("B")])
        assert texts(calls.retrieve(store, "chat")) == ["a", "1"]
        assert texts(calls.retrieve(store, edited.branch_id)) == ["a", "1", "b", "2", "c"]
        assert calls.call(store, "get_chat_history", edited.branch_id).meta == {"branch_of": "chat"}

    def test_late_answer_to_an_earlier_question_is_not_taken_back(self, store: ClosableStore, calls: Calls) -> None:
        questions = [with_id("a", "a"), with_id("b", "b")]
        calls.write(store, "chat", questions)
        for question, answer in zip(questions, "12", strict=True):
            self._write(store, calls, [question], [_reply(answer)])
        assert self._match(store, calls, [user("a"), _reply("1"), user("c")]).outcome == "rewind"
        assert texts(calls.retrieve(store, "chat")) == ["a", "1"]
