# SPDX-License-Identifier: Apache-2.0
"""Clients that send their whole transcript with each request, without ids: nothing is doubled, nothing is lost."""

import asyncio
import itertools
import json
import random
import time
import uuid
from functools import partial

import pytest
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent, TextContent
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.hooks.chat_store import chat_history_hooks
from turn_pipelines import CrashError, FailingEngine, Moments

from haystack_chat_store import (
    ChatHistoryChangedError,
    InMemoryChatMessageStore,
    SQLiteChatMessageStore,
    TranscriptError,
    match_transcript,
    match_transcript_async,
)
from haystack_chat_store.conversation import transcripts
from haystack_chat_store.conversation.rounds import question_groups
from haystack_chat_store.testing.concurrency import in_threads
from haystack_chat_store.turn_writer import TurnWriter

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="

user = ChatMessage.from_user
assistant = ChatMessage.from_assistant
numbers = itertools.count()


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    if request.param == "memory":
        store = InMemoryChatMessageStore(last_k=None, namespace=uuid.uuid4().hex)
    else:
        store = SQLiteChatMessageStore(tmp_path / "h.db", durability="normal", last_k=None)
    yield store
    store.close()


@pytest.fixture(params=["sync", "async"])
def match(request):
    if request.param == "sync":
        return match_transcript
    return lambda *arguments, **options: asyncio.run(match_transcript_async(*arguments, **options))


def transcript_of(*texts):
    """Questions and answers in turn. An answer that is `None` is missing."""
    roles = itertools.cycle([user, assistant])
    return [role(text) for role, text in zip(roles, texts, strict=False) if text is not None]


def write(store, messages, answer=None, chat_history_id="h"):
    """Store a turn as the components do: the question first, then the answer."""
    writer = TurnWriter(store, DuplicatePolicy.SKIP)
    given = writer.write(chat_history_id, messages, []).messages
    return [] if answer is None else writer.write(chat_history_id, given, [assistant(answer)]).replies


def texts(store, chat_history_id="h"):
    return [message.text for message in store.retrieve_messages(chat_history_id)]


def branches(store, chat_history_id="h"):
    found = store.list_chat_histories(branches=True, limit=1000).items
    return {info.chat_history_id for info in found if info.meta.get("branch_of") == chat_history_id}


def stored_turns(store, *turns):
    for place in range(0, len(turns), 2):
        asked = match_transcript(store, "h", transcript_of(*turns[: place + 1]))
        write(store, asked.messages, turns[place + 1])


class TestOutcomes:
    """What a transcript means, case by case."""

    def check(self, matched, outcome, *said):
        assert (matched.outcome, [message.text for message in matched.messages]) == (outcome, [*said])

    def test_first_transcript_is_new_as_a_whole(self, store, match):
        past = [assistant("Welcome!"), *transcript_of("a", "1", "b")]
        matched = match(store, "h", [ChatMessage.from_system("Be brief."), *past])
        self.check(matched, "first", "Welcome!", "a", "1", "b")
        assert matched.branch_id is None
        for _ in range(2):
            write(store, matched.messages)
        assert texts(store) == ["Welcome!", "a", "1", "b"]
        assert [len(group) for group in question_groups(store.retrieve_messages("h"))] == [1, 2, 1]

    def test_what_goes_on_is_appended(self, store, match):
        stored_turns(store, "a", "1")
        self.check(match(store, "h", transcript_of("a", "1", "b")), "append", "b")
        self.check(match(store, "h", transcript_of(" a\n", "1 (shortened)", "b", None, "c")), "append", "b", "c")
        assert texts(store) == ["a", "1"]

    def test_several_questions_in_a_row_are_all_new(self, store, match):
        stored_turns(store, "a", "1")
        write(store, match(store, "h", [*transcript_of("a", "1"), user("b"), user("c")]).messages, "2")
        assert texts(store) == ["a", "1", "b", "c", "2"]

    def test_question_without_an_answer_is_resumed(self, store, match):
        stored_turns(store, "a", "1", "b", None)
        for is_retry in (False, True):
            matched = match(store, "h", transcript_of("a", "1", "b"), is_retry=is_retry)
            self.check(matched, "resume", "b")
            assert matched.messages == store.retrieve_messages("h", last_k=1)

    def test_retry_of_an_answered_question_repeats_its_answer(self, store, match):
        stored_turns(store, "a", "1", "b", "2")
        matched = match(store, "h", transcript_of("a", "1", "b"), is_retry=True)
        self.check(matched, "repeat", "b")
        assert [reply.text for reply in write(store, matched.messages, "another")] == ["2"]
        assert not branches(store)

    def test_same_transcript_asks_for_another_answer(self, store, match):
        stored_turns(store, "a", "1", "b", "2")
        revision = store.get_chat_history("h").revision
        matched = match(store, "h", transcript_of("a", "1", "b"))
        self.check(matched, "regenerate", "b")
        assert matched.branch_id == f"h~{revision}"
        assert store.get_chat_history(matched.branch_id).meta == {"branch_of": "h"}
        assert texts(store, matched.branch_id) == ["a", "1", "b", "2"]
        write(store, matched.messages, "3")
        assert texts(store) == ["a", "1", "b", "3"]

    def test_shorter_transcript_goes_back(self, store, match):
        stored_turns(store, "a", "1", "b", "2", "c", "3")
        matched = match(store, "h", transcript_of("a", "1", "b"))
        self.check(matched, "rewind", "b")
        assert texts(store) == ["a", "1", "b"]
        assert texts(store, matched.branch_id) == ["a", "1", "b", "2", "c", "3"]

    def test_edit_in_the_middle_goes_back(self, store, match):
        stored_turns(store, "a", "1", "b", "2", "c", "3", "d", "4")
        matched = match(store, "h", transcript_of("a", "1", "B", "2", "c", "3", "d", "4", "e"))
        self.check(matched, "rewind", "B", "2", "c", "3", "d", "4", "e")
        assert texts(store) == ["a", "1"]
        write(store, matched.messages, "5")
        assert texts(store) == ["a", "1", "B", "2", "c", "3", "d", "4", "e", "5"]

    def test_without_branches_what_is_taken_back_is_gone(self, store, match):
        stored_turns(store, "a", "1", "b", "2")
        matched = match(store, "h", transcript_of("a", "1", "c"), keep_branches=False)
        assert (matched.outcome, matched.branch_id, texts(store)) == ("rewind", None, ["a", "1"])
        assert [info.chat_history_id for info in store.list_chat_histories(branches=True).items] == ["h"]

    @pytest.mark.parametrize("other", [transcript_of("### Task: a title"), transcript_of("x", "1", "b"), []])
    def test_what_has_nothing_in_common_is_refused(self, store, match, other):
        stored_turns(store, "a", "1", "b", "2")
        before = store.get_chat_history("h")
        with pytest.raises(TranscriptError, match="Nothing was changed"):
            match(store, "h", other)
        assert store.get_chat_history("h") == before

    @pytest.mark.parametrize(
        ("stored", "other"),
        [(("b\0c", "d"), ("b", "c\0d")), (('\1"b"', "c"), ("b", "c")), (("\ud800", "c"), ("?", "c"))],
    )
    def test_questions_with_any_characters_are_told_apart(self, store, match, stored, other):
        stored_turns(store, "a", "1", stored[0], "2", stored[1], "3")
        assert match(store, "h", transcript_of("a", "1", stored[0], "2", stored[1], "3", "new")).outcome == "append"
        assert match(store, "h", transcript_of("a", "1", other[0], "2", other[1], "3", "new")).outcome == "rewind"

    def test_question_in_a_row_that_is_the_same_is_another_one(self, store, match):
        stored_turns(store, "yes", "1", "yes", "2")
        for number in (3, 4):
            matched = match(store, "h", transcript_of(*texts(store), "yes"))
            self.check(matched, "append", "yes")
            write(store, matched.messages, str(number))
        assert texts(store) == ["yes", "1", "yes", "2", "yes", "3", "yes", "4"]

    def test_answer_that_was_never_stored_is_taken_from_the_client(self, store, match):
        stored_turns(store, "a", "1", "b", None)
        matched = match(store, "h", transcript_of("a", "1", "b", "the part before Stop", "c"))
        self.check(matched, "append", "the part before Stop", "c")
        write(store, matched.messages, "3")
        write(store, store.retrieve_messages("h")[2:3], "the whole answer, later")
        assert texts(store) == ["a", "1", "b", "the part before Stop", "c", "3"]


class TestContents:
    """Questions are compared by what they say."""

    def test_images_are_compared(self, store, match):
        image = ImageContent(PNG, mime_type="image/png")
        other = ImageContent(PNG.replace("AAAAE", "AAAAI"), mime_type="image/png", validation=False)
        write(store, match(store, "h", [user(content_parts=["Look", image])]).messages, "1")
        again = user(content_parts=[" Look ", ImageContent(PNG, mime_type="image/png", meta={"name": "x"})])
        assert match(store, "h", [again], is_retry=True).outcome == "repeat"
        with pytest.raises(TranscriptError):
            match(store, "h", [user(content_parts=["Look", other])], is_retry=True)
        with pytest.raises(TranscriptError):
            match(store, "h", [user("Look")], is_retry=True)

    def test_an_image_is_kept_in_the_digest_by_a_digest_of_its_own(self, store, match):
        """The JSON of a photo takes several milliseconds to make, in each turn that sends it again."""
        image = ImageContent("A" * 4_000_000, mime_type="image/png", validation=False)
        other = ImageContent("A" * 3_999_996 + "BBBB", mime_type="image/png", validation=False)
        assert len(json.dumps(transcripts.transcript_of([user(content_parts=["Look", image])]).keys)) < 1000
        write(store, match(store, "h", [user(content_parts=["Look", image])]).messages, "1")
        with pytest.raises(TranscriptError):
            match(store, "h", [user(content_parts=["Look", other]), assistant("1"), user("b")])

    def test_blank_messages_and_hooks_messages_are_not_questions(self, store, match):
        write(store, match(store, "h", [user("a")]).messages, "1")
        question_id = store.retrieve_messages("h")[0].meta["chat_message_id"]
        nudge = ChatMessage.from_user("Use a tool!", meta={"chat_question_id": question_id})
        store.write_messages("h", [nudge, assistant("2")])
        matched = match(store, "h", [user("a"), user(" "), assistant("1"), user("b")])
        assert (matched.outcome, [message.text for message in matched.messages]) == ("append", ["b"])

    def test_history_that_was_stored_without_transcripts_is_matched(self, store, match):
        store.write_messages("h", [assistant("Welcome!"), *transcript_of("a", "1", "b", "2")])
        matched = match(store, "h", transcript_of("a", "1", "b", "2", "c"))
        assert (matched.outcome, len(matched.messages)) == ("append", 1)
        write(store, matched.messages, "3")
        assert texts(store) == ["Welcome!", "a", "1", "b", "2", "c", "3"]
        assert match(store, "h", transcript_of("a", "1", "x")).outcome == "rewind"
        assert texts(store) == ["Welcome!", "a", "1"]


class TestWindows:
    """A client that cuts off the beginning of a long conversation."""

    def test_window_goes_on_and_asks_again(self, store, match):
        stored_turns(store, "a", "1", "b", "2", "c", "3")
        matched = match(store, "h", transcript_of("b", "2", "c", "3", "d"))
        assert (matched.outcome, [message.text for message in matched.messages]) == ("append", ["d"])
        write(store, matched.messages, "4")
        assert match(store, "h", transcript_of("c", "3", "d"), is_retry=True).outcome == "repeat"
        assert match(store, "h", transcript_of("c", "3", "d")).outcome == "regenerate"
        assert texts(store) == ["a", "1", "b", "2", "c", "3", "d"]

    def test_answers_decide_where_questions_do_not(self, store, match):
        stored_turns(store, *itertools.chain(*(("yes", str(n)) for n in range(5))))
        assert match(store, "h", transcript_of("yes", "3", "yes", "4", "yes")).outcome == "append"
        assert match(store, "h", transcript_of("yes", "3", "yes"), is_retry=True).outcome == "repeat"
        matched = match(store, "h", [*transcript_of("yes", "4", "yes"), *map(user, ["yes"] * 4)])
        assert (matched.outcome, len(matched.messages)) == ("append", 5)
        assert match(store, "h", transcript_of("yes", "0", "yes")).outcome == "rewind"
        assert texts(store) == ["yes", "0", "yes"]

    def test_window_of_the_newest_question_alone_is_refused(self, store, match):
        stored_turns(store, "a", "1", "b", "2")
        with pytest.raises(TranscriptError):
            match(store, "h", transcript_of("b"))


class TestCost:
    """The usual turn reads the last round, whatever the length of the history."""

    @pytest.fixture
    def reads(self, store, monkeypatch):
        reads = []
        retrieve = store.retrieve_messages

        def noted(chat_history_id, last_k=None):
            messages = retrieve(chat_history_id, last_k)
            reads.append(len(messages))
            return messages

        monkeypatch.setattr(store, "retrieve_messages", noted)
        return reads

    def test_turn_that_goes_on_reads_the_last_round(self, store, reads):
        said = transcript_of(*map(str, range(400)))
        write(store, match_transcript(store, "h", said).messages)
        reads.clear()
        for options in ({}, {"is_retry": True}, {"is_retry": False}):
            matched = match_transcript(store, "h", [*said, user("new")], **options)
            assert reads == [2]
            write(store, matched.messages, "answer")
            reads.clear()
        assert matched.outcome == "regenerate"

    def test_edit_in_the_middle_is_found(self, store, reads):
        said = transcript_of(*map(str, range(400)))
        write(store, match_transcript(store, "h", said).messages)
        said[100] = user("edited")
        matched = match_transcript(store, "h", [*said, user("new")])
        assert (matched.outcome, matched.messages[0].text) == ("rewind", "edited")

    def test_messages_of_hooks_do_not_make_it_read_more_for_long(self, store, reads):
        said = transcript_of(*map(str, range(100)))
        write(store, match_transcript(store, "h", said).messages)
        question_id = store.retrieve_messages("h", 1)[0].meta["chat_message_id"]
        store.write_messages("h", [ChatMessage.from_user("Use a tool!", meta={"chat_question_id": question_id})] * 3)
        reads.clear()
        for number in range(2):
            said.append(user(f"new {number}"))
            matched = match_transcript(store, "h", said)
            assert (matched.outcome, len(matched.messages)) == ("append", 1)
            assert sum(reads) < 50
            write(store, matched.messages, "answer")
            said.append(assistant("answer"))
            reads.clear()


class TestIds:
    """What is new has ids, so that it is stored once."""

    def test_newest_question_gets_the_id_that_the_client_names(self, store, match):
        matched = match(store, "h", transcript_of("a", "1", "b"), question_id="mine")
        assert [message.meta["chat_message_id"] == "mine" for message in matched.messages] == [False, False, True]
        write(store, matched.messages, "2")
        matched = match(store, "h", transcript_of("a", "1", "b", "2", "c"), question_id="mine too")
        assert matched.messages[0].meta["chat_message_id"] == "mine too"

    def test_request_that_comes_twice_at_the_same_moment_is_stored_once(self, store):
        stored_turns(store, "a", "1")
        twice = [match_transcript(store, "h", transcript_of("a", "1", "b")) for _ in range(2)]
        for number, matched in enumerate(twice):
            write(store, matched.messages, str(number))
        assert texts(store) == ["a", "1", "b", "0"]

    def test_transcript_is_not_changed(self, store):
        transcript = transcript_of("a", "1", "b")
        match_transcript(store, "h", transcript, question_id="q")
        assert transcript == transcript_of("a", "1", "b")

    @pytest.mark.parametrize("chat_history_id", ["h" * 509, "h" * 512])
    def test_branch_of_a_history_with_a_long_id_has_an_id(self, store, chat_history_id):
        write(store, [user("a")], "1", chat_history_id)
        matched = match_transcript(store, chat_history_id, [user("a")])
        assert texts(store, matched.branch_id) == ["a", "1"]
        assert branches(store, chat_history_id) == {matched.branch_id}


class TestOthers:
    """Two requests at once, and histories that others change."""

    @pytest.mark.parametrize("changed", ["a question", "an answer"])
    def test_what_another_tab_has_said_meanwhile_is_not_taken_back(self, store, monkeypatch, changed):
        stored_turns(store, "a", "1", "b", "2")

        def meanwhile(*arguments, **options):
            monkeypatch.undo()
            store.write_messages("h", [user("from another tab")] if changed == "a question" else [assistant("more")])
            return store.delete_messages(*arguments, **options)

        monkeypatch.setattr(store, "delete_messages", meanwhile)
        with pytest.raises(ChatHistoryChangedError):
            match_transcript(store, "h", transcript_of("a", "1", "b"))
        assert texts(store)[:4] == ["a", "1", "b", "2"]
        assert len(texts(store)) == 5

    def test_branch_has_what_was_read_and_nothing_that_came_later(self, store, monkeypatch):
        stored_turns(store, "a", "1", "b", "2")
        revision = store.get_chat_history("h").revision

        def meanwhile(*arguments, **options):
            monkeypatch.undo()
            store.write_messages("h", [user("from another tab")])
            return store.copy_messages(*arguments, **options)

        monkeypatch.setattr(store, "copy_messages", meanwhile)
        with pytest.raises(ChatHistoryChangedError):
            match_transcript(store, "h", transcript_of("a", "1", "b"))
        assert texts(store, f"h~{revision}") == ["a", "1", "b", "2"]

    @pytest.mark.parametrize("known", [("a", "1"), ("a", "1", "b", "2")])
    def test_round_that_another_adds_meanwhile_is_not_taken_for_the_whole_history(self, store, monkeypatch, known):
        stored_turns(store, *known)
        find = store.get_chat_history

        def meanwhile(chat_history_id):
            monkeypatch.undo()
            info = find(chat_history_id)
            stored_turns(store, *known, "from another tab", "3")
            return info

        monkeypatch.setattr(store, "get_chat_history", meanwhile)
        with pytest.raises(ChatHistoryChangedError):
            match_transcript(store, "h", transcript_of(*known, "new"))
        assert texts(store) == [*known, "from another tab", "3"]

    def test_two_that_ask_for_another_answer_at_once_get_one(self, store, monkeypatch):
        stored_turns(store, "a", "1", "b", "2")

        def meanwhile(*arguments, **options):
            monkeypatch.undo()
            assert match_transcript(store, "h", transcript_of("a", "1", "b")).outcome == "regenerate"
            return store.delete_messages(*arguments, **options)

        monkeypatch.setattr(store, "delete_messages", meanwhile)
        assert match_transcript(store, "h", transcript_of("a", "1", "b")).outcome == "resume"
        assert texts(store) == ["a", "1", "b"]
        assert len(branches(store)) == 1

    def test_many_at_once_neither_lose_nor_double(self, store):
        stored_turns(store, "a", "1", "b", "2")

        def client(number):
            for turn in range(3):
                try:
                    matched = match_transcript(store, "h", transcript_of("a", "1", f"{number} {turn % 2}"))
                    write(store, matched.messages, f"answer {number} {turn}")
                except ChatHistoryChangedError:
                    time.sleep(0.001)

        in_threads(*(partial(client, number) for number in range(4)))
        kept = [texts(store, each) for each in ("h", *branches(store))]
        assert ["a", "1", "b", "2"] in kept
        for history in kept:
            assert len(set(history)) == len(history)

    def test_history_with_the_branchs_id_is_not_taken_for_it(self, store):
        stored_turns(store, "a", "1", "b", "2")
        revision = store.get_chat_history("h").revision
        store.write_messages(f"h~{revision}", transcript_of("x", "1", "y", "2"))
        branch = match_transcript(store, "h", transcript_of("a", "1", "b")).branch_id
        assert branch != f"h~{revision}"
        assert branches(store, "h") == {branch}
        assert texts(store, branch) == ["a", "1", "b", "2"]
        assert texts(store, f"h~{revision}") == ["x", "1", "y", "2"]

    def test_late_answer_to_a_question_that_stays_stays(self, store):
        write(store, [ChatMessage.from_user("a", meta={"chat_message_id": "a"})])
        write(store, [ChatMessage.from_user("b", meta={"chat_message_id": "b"})])
        write(store, store.retrieve_messages("h")[:1], "1")
        write(store, store.retrieve_messages("h")[1:2], "2")
        matched = match_transcript(store, "h", transcript_of("a", "1", "c"))
        assert (matched.outcome, texts(store)) == ("rewind", ["a", "1"])

    def test_question_that_was_deleted_meanwhile_is_noticed(self, store, match):
        stored_turns(store, "a", "1", "b", "2", "c", "3")
        second = store.retrieve_messages("h")[2]
        store.delete_messages("h", message_ids=[second.meta["chat_message_id"]])
        assert match(store, "h", transcript_of("a", "1", "b", "2", "c", "3", "d")).outcome == "rewind"


def test_arguments_are_checked(store, match):
    for wrong in (
        {"transcript": ["a"]},
        {"transcript": [user("a"), "a"]},
        {"transcript": [user("a"), ChatMessage("user", [])]},
        {"transcript": [user("a"), user(5)]},
        {"transcript": [user("a"), ChatMessage.from_user(content_parts=["a", TextContent([{"type": "text"}])])]},
        {"transcript": "a"},
        {"transcript": [user("a")], "question_id": ""},
        {"transcript": [user("a")], "is_retry": "no"},
        {"transcript": [user("a")], "keep_branches": None},
    ):
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            match(store, "h", **wrong)
    with pytest.raises(ValueError, match="store must be"):
        match({}, "h", [user("a")])


def test_an_agent_stores_a_conversation_of_transcripts_once(store):
    model = MockChatGenerator(["1", "2", "3", "4"])
    agent = Agent(chat_generator=model, hooks=chat_history_hooks(store))
    outcomes = []
    for transcript in (
        transcript_of("a"),
        transcript_of("a", "1", "b"),
        transcript_of("a", "1", "b"),
        transcript_of("a", "1", "b", "3", "c"),
    ):
        matched = match_transcript(store, "h", transcript)
        outcomes.append(matched.outcome)
        result = agent.run(messages=matched.messages, hook_context={"chat_history_id": "h"})
    assert outcomes == ["first", "append", "regenerate", "append"]
    assert result["last_message"].text == "4"
    assert texts(store) == ["a", "1", "b", "3", "c", "4"]


# ---------------------------------------------------------------------- random clients


class Client:
    """A client that keeps its own transcript and does anything, and a plain model of what should be stored."""

    def __init__(self, seed, store, way="sync"):
        self.rng, self.store, self.way = random.Random(seed), store, way
        self.rounds = []  # [question, answer or None], as the client shows them
        self.taken_back = []  # what was shown before something was taken back

    def step(self):
        rng, rounds = self.rng, self.rounds
        action = rng.choice(["ask", "ask", "ask", "retry", "regenerate", "edit", "back"]) if rounds else "ask"
        first = 0
        if action == "ask":
            asked = [*rounds, [self.question(), None]]
            if rng.random() < 0.1:
                asked.append([self.question(), None])
            if rng.random() < 0.3:
                first = rng.randrange(max(len(rounds), 1))
        elif action in ("retry", "regenerate"):
            asked = [*rounds[:-1], [rounds[-1][0], None]]
            if rng.random() < 0.3:
                first = rng.randrange(max(len(rounds) - 1, 1))
        elif action == "edit":
            place = rng.randrange(1, len(rounds)) if len(rounds) > 1 else None
            if place is None:
                return
            asked = [*rounds[:place], [f"edited {next(numbers)}", None]]
        else:
            asked = rounds[: rng.randrange(len(rounds)) + 1]
            asked = [*asked[:-1], [asked[-1][0], None]]
        if not any(answer for _, answer in asked[first:]):  # a window without answers may be anywhere
            first = 0
        self.send(asked, first, is_retry=action == "retry")

    def question(self):
        return self.rng.choice(["yes", "no", f"question {next(numbers)}"])

    def send(self, asked, first, *, is_retry):
        before = texts(self.store)
        transcript = transcript_of(*itertools.chain(*asked[first:]))
        shown = ChatMessage.from_system("Be brief.")
        for attempt in range(4):
            fails = attempt < 3 and self.rng.random() < 0.4
            try:
                matched = self.match(fails, [shown, *transcript], is_retry=is_retry)
            except CrashError:
                continue
            break
        if matched.branch_id is not None or matched.outcome in ("regenerate", "rewind"):
            self.taken_back.append(before)
        answer = f"answer {next(numbers)}"
        if self.rng.random() < 0.15:  # the model fails, and the client shows the question without an answer
            write(self.store, matched.messages)
            replies = self.last_round()[1:]
        else:
            replies = write(self.store, matched.messages, answer)
        self.rounds = [[*each] for each in asked]
        self.rounds[-1][1] = replies[-1].text if replies else None

    def last_round(self):
        return question_groups(self.store.retrieve_messages("h"))[-1]

    def match(self, fails, transcript, **options):
        store = self.store
        if fails:
            store = type(store).from_dict(store.to_dict())
            store.engine = FailingEngine(self.store.engine, Moments(self.rng.randrange(1, 14), CrashError))
        if self.way == "sync":
            return match_transcript(store, "h", transcript, **options)
        return asyncio.run(match_transcript_async(store, "h", transcript, **options))

    def check(self):
        stored = texts(self.store)
        assert stored == [text for each in self.rounds for text in each if text is not None]
        kept = [texts(self.store, branch) for branch in branches(self.store)]
        for state in self.taken_back:
            assert state in kept or state == stored[: len(state)]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_any_client_finds_its_conversation_stored_once(is_full, way):
    clients = {"sync": (150, 10_000), "async": (20, 500)}[way][is_full]
    for seed in range(clients):
        client = Client(f"{way} {seed}", InMemoryChatMessageStore(last_k=None, namespace=uuid.uuid4().hex), way)
        for _ in range(10):
            client.step()
            client.check()
