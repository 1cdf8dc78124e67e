# SPDX-License-Identifier: Apache-2.0
"""What a model is shown of a history: repaired, portable, and never taken for what is stored."""

import asyncio
import base64
import copy
import random
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
from conversations import (
    ANSWER,
    GREETING,
    NAMELESS,
    OSLO,
    QUESTION,
    ROME,
    SYSTEM,
    after_a_question,
    any_conversations,
    calling,
    marked_histories,
    pairs,
    result_of,
    same_objects,
    untimed,
    valid_conversations,
    with_id,
)
from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)
from hypothesis import given
from hypothesis import strategies as st
from strict_model import StrictChatGenerator, problems, problems_when_asked

from haystack_chat_store.conversation.media import MAX_FILE_TEXT
from haystack_chat_store.conversation.parts import split_system_history_current
from haystack_chat_store.conversation.rounds import said_parts
from haystack_chat_store.conversation.shown import (
    GO_ON,
    INTERRUPTED,
    UNANSWERED,
    messages_for_model,
)
from haystack_chat_store.ids import MESSAGE_ID_KEY, QUESTION_ID_KEY, SHOWN_KEY

MADE_UP = (UNANSWERED, GO_ON)
PDF = "application/pdf"
DAMAGED = [FileContent(data, PDF, validation=False) for data in ("!", "", "aGk")]


class TestParted:
    def test_system_messages_come_first_then_the_history_then_the_rest(self):
        current = [QUESTION, SYSTEM, ANSWER]
        history = [SYSTEM, GREETING]
        parts = split_system_history_current(history, current)
        assert parts == ([SYSTEM], history, [QUESTION, ANSWER])
        assert same_objects(parts.history + parts.current, [*history, QUESTION, ANSWER])

    def test_what_the_history_has_is_not_repeated_after_it(self):
        history = [with_id(QUESTION, "1"), with_id(ANSWER, "2")]
        assert split_system_history_current(history, [with_id(QUESTION, "1")]) == ([], history, [])
        assert split_system_history_current(history, [*history, QUESTION]) == ([], history, [QUESTION])

    def test_of_a_transcript_that_is_longer_than_the_history_only_what_is_new_comes(self):
        transcript = [with_id(QUESTION, str(number)) for number in range(6)]
        new = [*transcript[5:], ANSWER]
        assert split_system_history_current(transcript[2:5], [*transcript, ANSWER]) == ([], transcript[2:5], new)

    def test_messages_without_an_id_are_new_wherever_they_stand(self):
        history = [with_id(QUESTION, "1"), with_id(ANSWER, "2")]
        assert split_system_history_current(history, [GREETING, *history]).current == [GREETING]

    def test_a_system_message_comes_first_even_if_the_history_has_it(self):
        history = [with_id(QUESTION, "1"), with_id(SYSTEM, "2"), with_id(ANSWER, "3")]
        assert split_system_history_current(history, [with_id(SYSTEM, "2")]) == (
            [history[1]],
            [history[0], history[2]],
            [],
        )

    @pytest.mark.parametrize("no_id", [None, ""])
    def test_messages_without_an_id_are_all_different(self, no_id):
        assert len(split_system_history_current([with_id(QUESTION, no_id)], [with_id(QUESTION, no_id)]).current) == 1

    def test_an_id_that_could_be_none_of_ours_does_no_harm(self):
        assert len(split_system_history_current([with_id(QUESTION, "1")], [with_id(ANSWER, ["1"])]).current) == 1


def stored(messages):
    """The messages as a store returns them, each with an id."""
    return [
        replace(message, _meta={**message.meta, MESSAGE_ID_KEY: f"m{number}"})
        for number, message in enumerate(messages)
    ]


def unmarked(messages):
    return [
        replace(message, _meta={key: value for key, value in message.meta.items() if key != SHOWN_KEY})
        for message in messages
    ]


def as_stored(history, current=()):
    """What the model of a round that is under way is shown, without the marks of what differs."""
    return unmarked(messages_for_model(history, current, portable=False))


def interrupted(call):
    return ChatMessage.from_tool(INTERRUPTED, origin=call, error=True)


UNANSWERED_TURN = ChatMessage.from_assistant(UNANSWERED)


def said_of(messages):
    """The text of each message, or the arguments of a result's call and the result."""
    return [
        [(result.origin.arguments.get("city"), result.result) for result in message.tool_call_results] or message.text
        for message in messages
    ]


def answer_to(call, text="done", **settings):
    return ChatMessage.from_tool(text, origin=call, **settings)


class TestAsStored:
    """With `portable=False`, and in the round under way."""

    @pytest.mark.parametrize(
        "conversation",
        [
            [],
            [SYSTEM, QUESTION, ANSWER],
            [QUESTION, calling(ROME, OSLO), result_of(ROME), result_of(OSLO), ANSWER],
            [QUESTION, calling(ROME, text="Let me look.", reasoning="I need the weather."), result_of(ROME)],
        ],
        ids=["empty", "plain", "exchange", "all parts"],
    )
    def test_what_is_valid_is_shown_as_it_is(self, conversation):
        assert problems(conversation) == []
        assert same_objects(messages_for_model(conversation, portable=False), conversation)

    @pytest.mark.parametrize(
        ("conversation", "expected"),
        [
            ([calling(ROME)], [calling(ROME), interrupted(ROME)]),
            (
                [calling(ROME, reasoning="Hm."), QUESTION],
                [calling(ROME, reasoning="Hm."), interrupted(ROME), UNANSWERED_TURN, QUESTION],
            ),
            (
                [calling(ROME, OSLO), result_of(OSLO)],
                [calling(ROME, OSLO), interrupted(ROME), result_of(OSLO)],
            ),
            (
                [calling(ROME), QUESTION, result_of(ROME)],
                [calling(ROME), interrupted(ROME), UNANSWERED_TURN, QUESTION],
            ),
            (
                [calling(ROME), GREETING],
                [calling(ROME), interrupted(ROME), GREETING],
            ),
        ],
        ids=[
            "last",
            "before a question",
            "one of two",
            "result too late",
            "before an answer",
        ],
    )
    def test_a_call_without_a_result_is_answered(self, conversation, expected):
        assert as_stored([QUESTION, *conversation]) == [QUESTION, *expected]

    @pytest.mark.parametrize(
        ("conversation", "expected"),
        [
            ([result_of(ROME), QUESTION], [QUESTION]),
            ([QUESTION, result_of(ROME)], [QUESTION]),
            ([calling(ROME), result_of(ROME), result_of(ROME)], [calling(ROME), result_of(ROME)]),
            ([calling(ROME), result_of(OSLO, ROME)], [calling(ROME), result_of(ROME)]),
            ([QUESTION, ChatMessage(ChatRole.TOOL, [TextContent("done")])], [QUESTION]),
        ],
        ids=["first", "after a user", "twice", "two in a message", "no result at all"],
    )
    def test_a_result_without_a_call_is_left_out(self, conversation, expected):
        assert as_stored([QUESTION, *conversation]) == [QUESTION, *expected]

    def test_results_stand_in_the_order_of_the_calls_one_a_message(self):
        lima = ToolCall("weather", {"city": "Lima"}, id="call_3")
        calls = [ROME, OSLO, lima]
        for answers in ([result_of(OSLO, lima, ROME)], [result_of(lima), result_of(ROME), result_of(OSLO)]):
            shown = as_stored([QUESTION, calling(*calls), *answers])
            assert shown == [QUESTION, calling(*calls), *map(result_of, calls)]

    def test_results_come_before_what_was_said_between_the_call_and_them(self):
        shown = as_stored([QUESTION, calling(ROME), GREETING, result_of(ROME)])
        assert shown == [QUESTION, calling(ROME, text=GREETING.text), result_of(ROME)]

    def test_parts_of_one_reply_that_were_stored_apart_are_joined(self):
        parts = [calling(ROME, text="I look.", reasoning="Hm."), calling(OSLO)]
        shown = as_stored([QUESTION, *parts, result_of(ROME), result_of(OSLO), ANSWER])
        joined = calling(ROME, OSLO, text="I look.", reasoning="Hm.")
        assert shown[1]._content == joined._content
        assert shown == [QUESTION, joined, result_of(ROME), result_of(OSLO), ANSWER]

    @pytest.mark.parametrize("portable", [True, False])
    @pytest.mark.parametrize("after", [[], [ChatMessage.from_user("Thanks!")]], ids=["last", "earlier"])
    def test_an_answer_after_an_interrupted_call_stays_the_answer(self, portable, after):
        answered = [QUESTION, calling(ROME, reasoning="Hm."), ChatMessage.from_assistant("It is sunny.")]
        shown = messages_for_model(answered, after, portable=portable)
        assert shown[4:] == after
        assert [each.role.value for each in shown[:4]] == ["user", "assistant", "tool", "assistant"]
        assert shown[1].text is None
        assert shown[2].tool_call_result.result == INTERRUPTED
        assert shown[3].text == "It is sunny."

    def test_replies_with_reasoning_of_their_own_stay_apart_each_with_its_results(self):
        first, second = calling(ROME, reasoning="Hm."), calling(OSLO, reasoning="Ah.")
        shown = as_stored([QUESTION, first, second, result_of(ROME), result_of(OSLO)])
        assert shown == [QUESTION, first, result_of(ROME), second, result_of(OSLO)]

    def test_a_call_without_an_id_gets_one(self):
        shown = as_stored([QUESTION, calling(NAMELESS, NAMELESS), result_of(NAMELESS)])
        ids = [call.id for call in shown[1].tool_calls]
        assert len(set(ids)) == 2
        assert None not in ids
        results = [(result.origin.id, result.result) for message in shown for result in message.tool_call_results]
        assert results == [(ids[0], "done"), (ids[1], INTERRUPTED)]

    def test_an_id_that_comes_again_in_a_later_reply_becomes_another(self):
        again = ToolCall("weather", {"city": "Lima"}, id=ROME.id)
        shown = as_stored([QUESTION, calling(ROME), result_of(ROME), calling(again), result_of(again)])
        assert problems(shown) == []
        assert said_of(shown)[2:] == [[("Rome", "done")], None, [("Lima", "done")]]
        assert shown[1] == calling(ROME)
        assert len({call.id for message in shown for call in message.tool_calls}) == 2

    @pytest.mark.parametrize("role", [ChatRole.USER, ChatRole.ASSISTANT, ChatRole.SYSTEM])
    @pytest.mark.parametrize(
        "parts",
        [[], [ReasoningContent("Hm.")], [TextContent(" \n")], [ReasoningContent("Hm."), TextContent("")]],
        ids=["empty", "reasoning", "blank", "reasoning and blank"],
    )
    def test_messages_that_say_nothing_are_left_out(self, role, parts):
        for portable in (True, False):
            conversation = [QUESTION, ChatMessage(role, parts), ANSWER]
            assert messages_for_model(conversation, portable=portable) == [QUESTION, ANSWER]

    @pytest.mark.parametrize(
        ("before", "expected"),
        [
            ([GREETING], []),
            ([SYSTEM, GREETING], [SYSTEM]),
            ([calling(ROME), result_of(ROME), ANSWER], []),
            ([ChatMessage.from_user(""), ANSWER], []),
            ([ChatMessage(ChatRole.USER, [ROME]), ANSWER], []),
        ],
        ids=["greeting", "system message", "exchange", "user who says nothing", "user who only calls"],
    )
    def test_the_user_speaks_first_in_a_history(self, before, expected):
        assert messages_for_model([*before, QUESTION, ANSWER]) == [*expected, QUESTION, ANSWER]
        assert messages_for_model(before) == expected

    def test_the_current_messages_go_around_the_history(self):
        assert messages_for_model([GREETING, QUESTION], [ANSWER, SYSTEM]) == [SYSTEM, QUESTION, ANSWER]

    def test_who_speaks_first_in_the_current_messages_is_up_to_the_caller(self):
        assert messages_for_model([], [GREETING, QUESTION]) == [GREETING, QUESTION]

    def test_results_in_the_current_messages_answer_calls_in_the_history(self):
        conversation = [QUESTION, calling(ROME), result_of(ROME)]
        assert messages_for_model(conversation[:2], conversation[2:]) == conversation
        assert messages_for_model([calling(ROME)], [result_of(ROME), QUESTION]) == [QUESTION]

    def test_of_alternative_replies_the_first_is_shown(self):
        replies = [ChatMessage.from_assistant(f"{number}", meta={"index": number}) for number in range(3)]
        assert messages_for_model([QUESTION, *replies, QUESTION]) == [QUESTION, replies[0], QUESTION]
        assert messages_for_model([QUESTION, replies[2]]) == [QUESTION, replies[2]]


class TestPairing:
    """The id of a call is a hint. No result is shown under the arguments of another call."""

    def shown_results(self, calls, results):
        shown = messages_for_model([QUESTION, calling(*calls), *results], portable=False)
        return [
            (result.origin.arguments["city"], result.result)
            for message in shown
            for result in message.tool_call_results
        ]

    @pytest.mark.parametrize("call_id", ["get_weather", "", None])
    @pytest.mark.parametrize("order", [["Oslo", "Rome"], ["Rome", "Oslo"], ["Rome"], ["Oslo"]])
    def test_calls_that_share_an_id_are_told_apart_by_their_arguments(self, call_id, order):
        calls = [ToolCall("weather", {"city": city}, id=call_id) for city in ("Oslo", "Rome")]
        results = [
            answer_to(call, call.arguments["city"])
            for city in order
            for call in calls
            if call.arguments["city"] == city
        ]
        for city, result in self.shown_results(calls, results):
            assert result == (city if city in order else INTERRUPTED)

    def test_a_foreign_id_is_told_by_the_arguments(self):
        renamed = [replace(call, id=f"x_{call.id}") for call in (OSLO, ROME)]
        assert self.shown_results([ROME, OSLO], [answer_to(call, call.arguments["city"]) for call in renamed]) == [
            *(("Rome", "Rome"), ("Oslo", "Oslo"))
        ]

    def test_an_id_that_only_one_call_has_is_enough(self):
        origins = [ToolCall("", {}, id=call.id) for call in (OSLO, ROME)]
        results = [answer_to(origin, name) for origin, name in zip(origins, ("Oslo", "Rome"), strict=True)]
        assert self.shown_results([ROME, OSLO], results) == [("Rome", "Rome"), ("Oslo", "Oslo")]

    def test_an_id_that_several_calls_have_tells_nothing_without_their_arguments(self):
        calls = [replace(call, id="same") for call in (OSLO, ROME)]
        results = [answer_to(ToolCall("weather", {"city": "Paris"}, id="same"), "Paris")]
        assert self.shown_results(calls, results) == [("Oslo", INTERRUPTED), ("Rome", INTERRUPTED)]

    def test_where_nothing_is_known_the_order_counts(self):
        results = [answer_to(ToolCall("", {}), name) for name in ("first", "second")]
        assert self.shown_results([ROME, OSLO], results) == [("Rome", "first"), ("Oslo", "second")]

    def test_a_second_result_of_a_call_does_not_answer_an_equal_call(self):
        twin = replace(ROME, id="call_9")
        results = [answer_to(ROME, "one"), answer_to(ROME, "two")]
        assert self.shown_results([ROME, twin], results) == [("Rome", "one"), ("Rome", INTERRUPTED)]


class TestPortable:
    """Completed rounds hold what every provider takes."""

    CALLED = ToolCall("weather", {"city": "Rome"}, id="functions.look_up:0", extra={"call_id": "call_77", "more": 1})
    SIGNED = ReasoningContent("Hm.", {"reasoning_contents": [{"signature": "x"}], "id": "rs_1"})

    def test_content_of_one_provider_is_left_out(self):
        meta = {
            "raw_content_for_server_tools": [{"type": "text", "text": "I look."}],
            "thought_signatures": [{"has_text": True, "signature": "x"}],
            "model": "x",
        }
        reply = ChatMessage(ChatRole.ASSISTANT, [self.SIGNED, TextContent("I look."), TextContent("Now.")], _meta=meta)
        shown = messages_for_model([QUESTION, reply], [QUESTION])
        assert unmarked(shown)[1] == ChatMessage.from_assistant("I look.\n\nNow.", meta={"model": "x"})
        assert messages_for_model([QUESTION, reply], portable=True)[1]._content[0] == self.SIGNED  # under way

    def test_call_ids_are_ids_that_every_provider_takes_and_stay_the_same_from_prompt_to_prompt(self):
        history = stored([QUESTION, calling(self.CALLED), answer_to(self.CALLED, "Sun."), ANSWER, QUESTION, ANSWER])
        shown = messages_for_model(history, [QUESTION])
        (call,) = shown[1].tool_calls
        assert call.id.startswith("fc")
        assert len(call.id) == 9
        assert call.id.isalnum()
        assert call.extra == {"call_id": call.id, "more": 1}
        assert shown[2].tool_call_results[0].origin == call
        assert messages_for_model([*history, *stored([QUESTION, ANSWER])], [QUESTION])[: len(history)] == shown[:-1]
        assert len(messages_for_model(history[:4], [QUESTION])[1].tool_calls[0].id) == 9

    def test_the_ids_of_a_store_that_keeps_no_message_ids_differ_too(self):
        history = [QUESTION, *[calling(ROME), result_of(ROME)] * 3, ANSWER]
        ids = [call.id for message in messages_for_model(history, [QUESTION]) for call in message.tool_calls]
        assert len(set(ids)) == 3

    def test_images_and_files_that_only_some_take_become_text(self):
        image, file = ImageContent("aGk=", "image/png"), FileContent("aGk=", "text/plain", filename="notes.txt")
        results = [[TextContent("Look:"), image, file], "", [image]]
        calls = [replace(ROME, id=f"{number}") for number in range(3)]
        answers = [answer_to(call, result) for call, result in zip(calls, results, strict=True)]
        picture = ChatMessage(ChatRole.ASSISTANT, [TextContent("Here."), image])
        user = ChatMessage(ChatRole.USER, [TextContent("See."), image])
        shown = messages_for_model([user, calling(*calls), *answers, picture], [QUESTION])
        assert shown[0] is user
        assert [message.tool_call_results[0].result for message in shown[2:5]] == [
            "Look:\n\n[image: image/png, 2 bytes]\n\n[file: notes.txt, text/plain, 2 bytes]\nhi\n[end of the file]",
            "(no output)",
            "[image: image/png, 2 bytes]",
        ]
        assert shown[5].text == "Here.\n\n[image: image/png, 2 bytes]"

    @staticmethod
    def shown_first(*parts, replies=(ANSWER,), current=(QUESTION,), **settings):
        """Return what is shown of a question with parts in an earlier round."""
        question = ChatMessage.from_user(content_parts=list(parts), meta={MESSAGE_ID_KEY: "q"})
        return messages_for_model([question, *replies], current, **settings)[0]

    @pytest.mark.parametrize("mime_type", ["image/gif", "image/heic", "image/svg+xml", None])
    def test_an_image_that_a_provider_does_not_take_is_named(self, mime_type):
        shown = self.shown_first("See.", ImageContent("aGk=", mime_type, validation=False))
        assert shown.text == f"See.\n\n[image: {mime_type or 'unknown type'}, 2 bytes]"
        assert not shown.images
        assert shown.meta[SHOWN_KEY]

    def test_an_image_under_another_name_of_its_type_has_the_name_that_all_providers_know(self):
        (image,) = self.shown_first("See.", ImageContent("aGk=", "image/jpg")).images
        assert (image.mime_type, image.base64_image) == ("image/jpeg", "aGk=")

    @pytest.mark.parametrize("part", [ImageContent("!", "image/png", validation=False), *DAMAGED])
    def test_data_that_is_damaged_is_named(self, part):
        shown = self.shown_first("See.", part)
        assert not shown.images
        assert not shown.files
        assert str(shown.text).startswith("See.\n\n[")

    def test_a_short_text_file_is_shown_as_its_text(self):
        file = FileContent.from_file_path(__file__.replace("test_shown.py", "event_loops.py"))
        for text_file in (replace(file, mime_type="text/markdown"), replace(file, mime_type=None, validation=False)):
            text = self.shown_first("Read.", text_file).text
            assert "SPDX-License-Identifier: Apache-2.0" in text
            assert text.startswith("Read.\n\n[file: event_loops.py, ")
            assert text.endswith("\n[end of the file]")

    @pytest.mark.parametrize("text", ["x" * (MAX_FILE_TEXT + 1), "x" * 10 * MAX_FILE_TEXT, "a\0b", " \n", "caf\u00e9"])
    def test_a_file_that_is_long_or_no_text_is_named(self, text):
        data = base64.b64encode(text.encode("latin-1")).decode()
        file = FileContent(data, "text/plain", filename="a ] [\nb.txt", validation=False)
        assert self.shown_first("Read.", file).text == f"Read.\n\n[file: a b.txt, text/plain, {len(text)} bytes]"

    @pytest.mark.parametrize("mime_type", ["audio/wav", "video/mp4", "application/pdf"])
    def test_the_bytes_of_a_file_of_another_type_are_not_taken_for_a_text(self, mime_type):
        file = FileContent("aGk=", mime_type)
        reply = ChatMessage(ChatRole.ASSISTANT, [file])
        assert self.shown_first("Hear.", file).text == f"Hear.\n\n[file: {mime_type}, 2 bytes]"
        assert messages_for_model([QUESTION, reply], [QUESTION])[1].text == f"[file: {mime_type}, 2 bytes]"

    def test_a_pdf_stays_a_file_and_has_a_name_of_its_own(self):
        file = FileContent("aGk=", PDF, filename="report.pdf", extra={"citations": {"enabled": True}})
        shown = self.shown_first("Read.", file, file)
        text, first, second = shown._content
        assert text.text.split("\n\n") == ["Read.", *["[file: report.pdf, application/pdf, 2 bytes]"] * 2]
        assert first.filename != second.filename
        assert {each.filename[:8] for each in shown.files} == {"report ["}
        assert (first.base64_data, first.mime_type, first.extra) == ("aGk=", PDF, {})
        assert shown.meta[SHOWN_KEY]
        assert self.shown_first("Read.", file, file, replies=[ANSWER, QUESTION, ANSWER]) == shown

    def test_texts_around_an_image_are_one_text_before_it(self):
        image = ImageContent("aGk=", "image/png")
        shown = self.shown_first("Compare", image, "with", image)
        assert shown._content == [TextContent("Compare\n\n[image: image/png, 2 bytes]\n\nwith"), image, image]

    def test_files_that_the_asked_model_has_taken_before_are_shown_as_they_are_stored(self):
        file = FileContent("aGk=", "audio/mpeg", filename="talk.mp3")
        replies = [replace(ANSWER, _meta={"model": "gemini-3-pro-001"})]
        assert self.shown_first("Hear.", file, replies=replies, model="gemini-3-pro").files == [file]
        assert self.shown_first("Hear.", file, replies=replies, portable=False).files == [file]
        assert not self.shown_first("Hear.", file, replies=replies).files
        assert not self.shown_first("Hear.", file, replies=replies, model="claude-opus-5").files
        assert not self.shown_first("Hear.", file, model="gemini-3-pro").files  # which model has answered is not known
        assert not self.shown_first("Hear.", file, replies=[], model="gemini-3-pro").files
        other = replace(ANSWER, _meta={"model": "gpt-4o"})
        assert not self.shown_first("Hear.", file, replies=[other, *replies], model="gemini-3-pro").files

    def test_files_of_the_round_under_way_are_shown_as_they_are_stored(self):
        file = FileContent("aGk=", "audio/mpeg", filename="talk.mp3")
        question = ChatMessage.from_user(content_parts=["Hear.", file])
        assert messages_for_model([], [question]) == [question]
        own = [replace(calling(ROME), _meta={"model": "one"}), result_of(ROME)]
        assert self.shown_first("Hear.", file, replies=own, current=()).files == [file]
        assert self.shown_first("Hear.", file, replies=own, current=(), model="one").files == [file]
        assert not self.shown_first("Hear.", file, replies=own, current=(), model="two").files
        theirs = [*own, replace(calling(OSLO), _meta={"model": "two"}), result_of(OSLO)]
        assert not self.shown_first("Hear.", file, replies=theirs, current=(), model="two").files

    def test_steps_of_another_model_in_the_round_under_way_are_shown_as_an_interrupted_round(self):
        first = replace(calling(self.CALLED, reasoning="Hm."), _meta={"model": "one"})
        second = replace(calling(OSLO, reasoning="Ah."), _meta={"model": "two"})
        shown = messages_for_model([QUESTION, first, answer_to(self.CALLED), second, result_of(OSLO)])
        assert shown[1].reasoning is None
        assert shown[1].tool_calls[0].id != self.CALLED.id
        assert [message.text for message in shown[3:5]] == [UNANSWERED, GO_ON]
        assert all(message.meta[SHOWN_KEY] for message in shown[3:5])
        assert shown[5] is second

    def test_another_model_begins_where_nothing_was_said(self):
        thought = replace(ChatMessage.from_assistant(None, reasoning="Hm."), _meta={"model": "one"})
        assert messages_for_model([], [thought], model="two") == []

    @pytest.mark.parametrize("portable", [True, False])
    def test_ids_of_any_kind_in_provider_content_are_taken(self, portable):
        block = {"type": "server_tool_use", "id": ["l"]}
        reasoning = ReasoningContent("Hm.", extra={"id": ["l"]})
        meta = {"raw_content_for_server_tools": [block]}
        replies = [
            ChatMessage.from_assistant("So.", reasoning=reasoning),
            ChatMessage.from_assistant("Yes.", meta=meta),
        ]
        shown = messages_for_model([QUESTION, *replies, QUESTION], portable=portable)
        assert [message.text for message in shown] == [QUESTION.text, "So.", "Yes.", QUESTION.text]

    def test_between_an_answer_and_the_steps_to_a_deleted_question_stands_another(self):
        step = replace(calling(ROME, reasoning="Hm."), _meta={"model": "one"})
        shown = messages_for_model([QUESTION, ANSWER, step, result_of(ROME)], [QUESTION], portable=False)
        assert [message.text for message in shown[1:3]] == [ANSWER.text, GO_ON]
        assert shown[3] is step

    def test_another_model_resumes_the_round_under_way_if_it_is_named(self):
        step = [replace(calling(self.CALLED, reasoning="Hm."), _meta={"model": "gpt-9-2026-11-01"}), result_of(ROME)]
        assert messages_for_model([QUESTION, step[0]], model="gpt-9")[1] is step[0]
        shown = messages_for_model([QUESTION, step[0]], model="claude-9")
        assert shown[1].reasoning is None
        assert [message.tool_call_results[0].result for message in shown if message.tool_call_results] == [INTERRUPTED]
        assert [message.text for message in shown[-2:]] == [UNANSWERED, GO_ON]
        followed = messages_for_model([QUESTION, step[0], QUESTION], model="claude-9")
        assert [message.text for message in followed[-2:]] == [UNANSWERED, QUESTION.text]

    @pytest.mark.parametrize(
        ("stored_name", "asked", "is_same"),
        [
            ("gpt-4o-2024-08-06", "gpt-4o", True),
            ("gpt-4o", "gpt-4o-2024-08-06", True),
            ("gpt-4-0613", "GPT-4", True),
            ("claude-opus-4-5-20250101", "claude-opus-4-5", True),
            ("claude-opus-4-5@20250101", "claude-opus-4-5-20250101", True),
            ("claude-3-5-sonnet-20241022", "claude-3-5-sonnet-latest", True),
            ("mistral-small-2503", "mistral-small-latest", True),
            ("command-r-08-2024", "command-r", True),
            ("qwen3:latest", "qwen3", True),
            ("openai/gpt-4o", "openai/gpt-4o", True),
            ("gpt-4o-mini", "gpt-4o", False),
            ("gpt-4o", "gpt-4o-mini", False),
            ("gpt-4o-mini-2024-07-18", "gpt-4o", False),
            ("gpt-4", "gpt-4.1", False),
            ("claude-opus-4-1", "claude-opus-4", False),
            ("claude-opus-4-5-20250101", "claude-opus-4-5-20250601", False),
            ("gemini-2.5-flash", "gemini-2.5-flash-lite", False),
            ("qwen3:4b", "qwen3:8b", False),
            ("openai/gpt-4o", "gpt-4o", False),
            ("openai/gpt-4o", "openai/gpt-4o-mini", False),
            ("us.anthropic.claude-opus-4-v1:0", "claude-opus-4", False),
        ],
    )
    def test_names_with_and_without_a_version_are_the_same_model(self, stored_name, asked, is_same):
        step = replace(calling(self.CALLED, reasoning="Hm."), _meta={"model": stored_name})
        shown = messages_for_model([QUESTION, step], model=asked)
        assert (shown[1] is step) == is_same
        assert (shown[1].reasoning is not None) == is_same


class TestProviderContent:
    RAW = (
        {"type": "text", "text": "Let me look."},
        {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": []},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
    )

    def searching(self, text="Let me look.", calls=(ROME,), raw=RAW):
        meta = {"raw_content_for_server_tools": [dict(block) for block in raw]}
        return ChatMessage.from_assistant(text, tool_calls=list(calls), meta=meta)

    @pytest.mark.parametrize("portable", [True, False])
    def test_a_refusal_after_a_text_is_shown_with_it(self, portable):
        answer = ChatMessage.from_assistant("This much.", meta={"refusal": "The rest I cannot say."})
        shown = messages_for_model([QUESTION, answer], [QUESTION], portable=portable)
        if portable:
            assert shown[1].text == "This much.\n\nThe rest I cannot say."
        else:
            assert shown[1] is answer

    @pytest.mark.parametrize("portable", [True, False])
    def test_a_refusal_is_an_answer(self, portable):
        refusal = ChatMessage.from_assistant(None, meta={"refusal": "I cannot help with that."})
        shown = messages_for_model([QUESTION, refusal], [QUESTION], portable=portable)
        assert len(shown) == 3
        assert (shown[1].text == "I cannot help with that.") == portable
        assert ("refusal" in shown[1].meta) != portable

    def test_a_paused_reply_is_sent_back_as_it_is(self):
        paused = self.searching(None, [], self.RAW[1:2])
        assert messages_for_model([QUESTION, paused]) == [QUESTION, paused]
        assert messages_for_model([QUESTION, paused], [QUESTION]) == [QUESTION, QUESTION]

    def test_raw_blocks_stay_with_a_call_that_is_answered_as_interrupted(self):
        reply = self.searching()
        assert as_stored([QUESTION, reply]) == [QUESTION, reply, interrupted(ROME)]

    @pytest.mark.parametrize("change", ["text", "no call", "another call"])
    def test_raw_blocks_of_a_reply_that_was_edited_are_left_out(self, change):
        calls = {"text": [ROME], "no call": [], "another call": [OSLO]}[change]
        edited = self.searching("I do not look." if change == "text" else "Let me look.", calls)
        shown = messages_for_model([QUESTION, edited], portable=False)[1]
        assert "raw_content_for_server_tools" not in shown.meta
        assert shown.text == edited.text
        assert shown.tool_calls == calls

    def test_an_id_that_comes_again_becomes_another_in_the_raw_blocks_too(self):
        twice = [self.searching(), result_of(ROME)] * 2
        shown = messages_for_model([QUESTION, *twice], portable=False)
        assert shown[1].meta["raw_content_for_server_tools"] == list(self.RAW)
        (call,) = shown[3].tool_calls
        assert call.id != ROME.id
        assert shown[3].meta["raw_content_for_server_tools"][-1]["id"] == call.id

    def test_parts_without_a_signature_of_gemini_get_an_entry(self):
        signed = {"part_index": 0, "has_function_call": True, "signature": "x"}
        reply = replace(calling(ROME, OSLO, text="I look."), _meta={"thought_signatures": [signed]})
        shown = messages_for_model([QUESTION, reply, result_of(ROME), result_of(OSLO)])[1]
        entries = [(bool(entry.get("has_text")), entry["signature"]) for entry in shown.meta["thought_signatures"]]
        assert entries == [(True, None), (False, "x"), (False, None)]

    def test_signatures_of_more_calls_than_there_are_go(self):
        signed = [{"has_function_call": True, "signature": "x"}] * 2
        reply = replace(calling(ROME), _meta={"thought_signatures": signed, "model": "x"})
        assert messages_for_model([QUESTION, reply, result_of(ROME)])[1].meta == {"model": "x", SHOWN_KEY: True}

    @pytest.mark.parametrize("key", ["cache_control", "cachePoint"])
    @pytest.mark.parametrize("portable", [True, False])
    def test_stored_marks_for_prompt_caches_are_not_sent_again(self, key, portable):
        mark = {key: {"type": "ephemeral"}}
        history = [
            *(ChatMessage.from_user("one", meta=mark), ChatMessage.from_assistant("two", meta=mark)),
            *(calling(ROME), answer_to(ROME, meta=mark), ChatMessage.from_assistant("three")),
        ]
        now = [ChatMessage.from_system("Be brief.", meta=mark), ChatMessage.from_user("four", meta=mark)]
        shown = messages_for_model(history, now, portable=portable)
        assert [message.text for message in shown if key in message.meta] == ["Be brief.", "four"]
        assert same_objects([shown[0], shown[-1]], now)

    def test_a_stored_question_that_is_sent_again_has_the_marks_of_now(self):
        mark = {"cache_control": {"type": "ephemeral"}}
        question = with_id(QUESTION, "q1")
        now = replace(question, _meta={**question.meta, **mark})
        (shown,) = messages_for_model([question], [now])
        assert shown.meta["cache_control"] == mark["cache_control"]


class TestShownIsNotStored:
    def test_only_what_differs_from_what_is_stored_is_marked(self):
        history = stored([QUESTION, calling(ROME, text="Hm."), ANSWER, QUESTION, calling(OSLO), result_of(OSLO)])
        shown = messages_for_model(history, portable=False)
        assert [SHOWN_KEY in message.meta for message in shown] == [False, False, True, False, False, False, False]

    def test_what_this_turn_brings_is_never_marked(self):
        current = ChatMessage(ChatRole.USER, [TextContent("Hi!"), TextContent(" ")])
        (shown,) = messages_for_model([], [current])
        assert shown == ChatMessage.from_user("Hi!")

    def test_a_message_that_was_shown_is_not_taken_for_a_new_one(self):
        (shown,) = [m for m in messages_for_model([QUESTION, calling(ROME)]) if m.role is ChatRole.TOOL]
        assert split_system_history_current([], [shown, QUESTION]).current == [QUESTION]


def test_the_texts_of_a_stored_question_become_one_also_where_it_is_not_answered():
    """Ollama's converter takes only one. What this turn brings along is the caller's own."""
    question = ChatMessage(ChatRole.USER, [TextContent("Where?"), TextContent("When?")])
    (shown,) = messages_for_model([question])
    assert (shown._content, SHOWN_KEY in shown.meta) == ([TextContent("Where?\n\nWhen?")], True)
    for options in ({"history": [question], "portable": False}, {"history": [], "current_messages": [question]}):
        assert messages_for_model(**options) == [question]


class TestMergeConsecutive:
    def test_neighbours_of_a_role_are_joined(self):
        history = [QUESTION, ChatMessage.from_user("Please."), ANSWER, ChatMessage.from_assistant("Really."), QUESTION]
        shown = messages_for_model(history, merge_consecutive=True)
        assert said_of(shown) == [f"{QUESTION.text}\n\nPlease.", f"{ANSWER.text}\n\nReally.", QUESTION.text]
        assert [SHOWN_KEY in message.meta for message in shown] == [True, True, False]

    def test_texts_become_one_because_some_providers_take_only_one(self):
        image = ImageContent("aGk=", "image/png")
        history = [ChatMessage(ChatRole.USER, [TextContent("This:"), image]), ChatMessage.from_user("What is it?")]
        (shown,) = messages_for_model(history, merge_consecutive=True)
        assert shown._content == [TextContent("This:\n\nWhat is it?"), image]

    def test_calls_and_results_stay_apart(self):
        history = [QUESTION, calling(ROME), result_of(ROME), calling(OSLO), result_of(OSLO), SYSTEM, SYSTEM]
        assert messages_for_model(history, portable=False, merge_consecutive=True) == history

    @pytest.mark.parametrize("portable", [True, False])
    @pytest.mark.parametrize("last", [QUESTION, ANSWER])
    def test_what_this_turn_brings_is_not_joined_and_so_is_stored_as_it_was_said(self, last, portable):
        history, current = (
            [QUESTION, last],
            [replace(last), ChatMessage(last.role, [TextContent("A"), TextContent(" ")])],
        )
        shown = messages_for_model(history, current, portable=portable, merge_consecutive=True)
        assert all(one.role is not other.role for one, other in pairwise(shown))
        assert [each.text for each in shown if SHOWN_KEY not in each.meta][-2:] == [last.text, "A"]
        assert [each.text for each in shown if each.text == GO_ON and SHOWN_KEY in each.meta] == [GO_ON, GO_ON]

    def test_messages_of_two_names_have_none_together(self):
        ada, bob = replace(QUESTION, _name="Ada"), replace(QUESTION, _name="Bob")
        options = {"portable": False, "merge_consecutive": True}
        assert [each.name for each in messages_for_model([ada, bob], **options)] == [None]
        assert [each.name for each in messages_for_model([ada, ada], **options)] == ["Ada"]


class TestNames:
    ADA = replace(QUESTION, _name="Ada Lovelace")

    def test_stand_in_the_text_of_completed_rounds(self):
        answer, image = replace(ANSWER, _name="bot"), ImageContent("aGk=", "image/png")
        pictured = replace(self.ADA, _content=[image])
        shown = messages_for_model([self.ADA, answer, pictured, answer, self.ADA])
        assert [each.name for each in shown] == [None, None, None, None, "Ada Lovelace"]
        assert said_of(shown[:2]) == [f"Ada Lovelace: {QUESTION.text}", ANSWER.text]
        assert shown[2]._content == [TextContent("Ada Lovelace:"), image]
        assert [SHOWN_KEY in each.meta for each in shown] == [True, True, True, True, False]

    def test_are_kept_where_messages_are_shown_as_they_are_stored_or_are_of_this_turn(self):
        history = [self.ADA, ANSWER, QUESTION]
        assert same_objects(messages_for_model(history, portable=False), history)
        assert same_objects(messages_for_model([], history), history)

    def test_of_blanks_are_left_out(self):
        shown = messages_for_model([replace(QUESTION, _name="  "), ANSWER, QUESTION])
        assert [(each.name, each.text) for each in shown] == [
            (None, each.text) for each in (QUESTION, ANSWER, QUESTION)
        ]


class TestStrictModel:
    @pytest.mark.parametrize(
        "conversation",
        [
            [calling(ROME)],
            [calling(ROME), QUESTION],
            [calling(ROME, OSLO), result_of(OSLO), QUESTION],
            [result_of(ROME)],
            [calling(ROME), result_of(ROME), result_of(ROME)],
            [calling(ROME), GREETING, result_of(ROME)],
            [calling(ROME, ROME), result_of(ROME), result_of(ROME)],
            [calling(NAMELESS), result_of(ROME)],
            [ChatMessage(ChatRole.TOOL, [TextContent("done")])],
            [ChatMessage(ChatRole.ASSISTANT, [])],
            [ChatMessage(ChatRole.ASSISTANT, [ReasoningContent("Hm.")])],
            [ChatMessage(ChatRole.USER, [TextContent(" ")])],
            [ChatMessage(ChatRole.USER, [ROME]), result_of(ROME)],
            [calling(ROME), ChatMessage(ChatRole.USER, [ToolCallResult("done", ROME, False)])],
        ],
    )
    def test_refuses_what_providers_refuse(self, conversation):
        conversation = [QUESTION, *conversation]
        assert problems(conversation) != []
        for run in (StrictChatGenerator().run, lambda messages: asyncio.run(StrictChatGenerator().run_async(messages))):
            with pytest.raises(ValueError, match="refuses the conversation"):
                run(conversation)

    @pytest.mark.parametrize("first", [GREETING, calling(ROME)])
    def test_refuses_a_conversation_in_which_the_user_does_not_speak_first(self, first):
        assert problems([SYSTEM, QUESTION, ANSWER]) == []
        assert problems([SYSTEM, first, QUESTION, ANSWER]) != []

    @pytest.mark.parametrize("conversation", [[], [SYSTEM], [QUESTION, ANSWER], [QUESTION, GREETING]])
    def test_refuses_to_answer_where_it_is_not_asked(self, conversation):
        assert problems(conversation) == []
        assert problems_when_asked(conversation) != []
        assert problems_when_asked([*conversation, QUESTION]) == []
        with pytest.raises(ValueError, match="refuses the conversation"):
            StrictChatGenerator().run(conversation)


# ---------------------------------------------------------------------- properties


@untimed
@given(any_conversations, st.booleans())
def test_what_is_shown_is_valid(conversation, portable):
    assert problems(messages_for_model(conversation, portable=portable)) == []


@untimed
@given(valid_conversations)
def test_a_valid_conversation_is_shown_as_it_is(conversation):
    shown = messages_for_model(conversation, portable=False)
    changed = [message for message in shown if SHOWN_KEY in message.meta]
    # Results that stand in another order than their calls, and a call after a text of the same side.
    follows = {id(after) for before, after in pairwise(conversation) if before.role is after.role}
    apart = [message for message in conversation if message.role is not ChatRole.TOOL]
    has_ids = all(call.id for message in conversation for call in message.tool_calls)
    if has_ids and not problems(conversation) and not any(m.tool_calls and id(m) in follows for m in conversation):
        found = [message for message in shown if message.role is not ChatRole.TOOL and message.text != UNANSWERED]
        assert same_objects(found, apart)
        assert all(message.role is ChatRole.TOOL or message.text == UNANSWERED for message in changed)


@untimed
@given(after_a_question, st.booleans())
def test_what_people_and_models_said_is_never_lost_or_reordered(conversation, portable):
    def spoken(messages):
        texts = [text for message in messages for text in message.texts if text.strip() and text not in MADE_UP]
        return "\n\n".join(texts)

    shown = messages_for_model(conversation, portable=portable)
    assert spoken(shown) == spoken(conversation)


@untimed
@given(any_conversations, st.booleans())
def test_the_conversation_passed_in_is_not_changed(conversation, portable):
    before, objects = copy.deepcopy(conversation), list(conversation)
    messages_for_model(conversation, portable=portable)
    assert conversation == before
    assert same_objects(conversation, objects)


@untimed
@given(after_a_question, st.booleans())
def test_all_calls_are_shown_and_no_result_that_was_given_to_a_call_is_lost(conversation, portable):
    shown = messages_for_model(conversation, portable=portable)

    def work(messages):
        return [(call.tool_name, call.arguments) for message in messages for call in message.tool_calls]

    assert work(shown) == work(message for message in conversation if message.role is ChatRole.ASSISTANT)
    results = [result for message in shown for result in message.tool_call_results]
    assert len(results) == len(work(shown))
    said = [message for message in conversation if said_parts(message) or message.tool_call_results]
    steps = [list(step) for is_reply, step in groupby(said, lambda each: each.role is ChatRole.ASSISTANT) if is_reply]
    ids = [[call.id for reply in step for call in reply.tool_calls] for step in steps]
    if all(len(set(of_step)) == len(of_step) for of_step in ids):  # else the arguments decide
        assert sum(result.result != INTERRUPTED for result in results) >= len(pairs(conversation))


@untimed
@given(st.integers(0, 10**6))
def test_no_result_is_shown_under_the_arguments_of_another_call(seed):
    """Ids are missing, shared or foreign; results come in any order, some never. Each says what it is the result of."""
    rng = random.Random(seed)
    calls = [ToolCall("weather", {"city": f"{n}"}, id=rng.choice([None, "", "a", "b", f"c{n}"])) for n in range(5)]
    origins = [replace(call, id=rng.choice([call.id, None, f"x{rng.random()}"])) for call in calls]
    answers = [answer_to(origin, origin.arguments["city"]) for origin in rng.sample(origins, rng.randint(0, 5))]
    shown = messages_for_model([QUESTION, calling(*calls), *answers], portable=rng.random() < 0.5)
    found = {r.origin.arguments["city"]: r.result for message in shown for r in message.tool_call_results}
    given_results = {answer.tool_call_results[0].result for answer in answers}
    assert found == {f"{n}": f"{n}" if f"{n}" in given_results else INTERRUPTED for n in range(5)}


@untimed
@given(marked_histories(), marked_histories())
def test_whatever_comes_with_the_history_is_valid_and_no_new_message_is_lost(history, current):
    current = [QUESTION, *current]
    system, shown, new = split_system_history_current(history, current)
    merged = [*system, *shown, *new]
    assert problems(messages_for_model(history, current)) == []
    kept = {*map(id, merged)}
    assert {id(message) for message in current if MESSAGE_ID_KEY not in message.meta} <= kept
    assert same_objects([m for m in merged if id(m) in {*map(id, history)}], [m for m in history if id(m) in kept])


class TestAddedByAHook:
    ADDED = ChatMessage.from_user("Use metric units.", meta={QUESTION_ID_KEY: "m0"})

    def test_a_reply_stands_between_results_and_a_user_message(self):
        history = [*stored([QUESTION]), calling(ROME), result_of(ROME), self.ADDED, ANSWER, QUESTION]
        assert [each.text for each in messages_for_model(history)][2:5] == [None, UNANSWERED, self.ADDED.text]

    def test_but_not_in_the_round_under_way_of_a_model_that_takes_it(self):
        history = [*stored([QUESTION]), calling(ROME), result_of(ROME), self.ADDED]
        assert messages_for_model(history) == history
