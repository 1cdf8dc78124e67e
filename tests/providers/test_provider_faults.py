# SPDX-License-Identifier: Apache-2.0
"""Histories that broke conversations, in this package or in others: one test for each."""

import pytest
from cases import ALTERNATING, Case, explained, fails, judged, show
from damages import with_text
from haystack.dataclasses import ChatMessage, FileContent, ImageContent, ReasoningContent, TextContent, ToolCall
from histories import PDF, PIXEL, model_of
from judging import Asked, problems_of
from receiving import RECEIVE
from replies import Call, Reply
from sending import OUTLINE, REQUEST
from windows import WHOLE, Window

WITH_IDS = ["openai", "responses", "anthropic", "bedrock", "mistral", "cohere", "openrouter"]
EVERY = [*WITH_IDS, "gemini", "ollama"]

U, A, T = ChatMessage.from_user, ChatMessage.from_assistant, ChatMessage.from_tool


def check(provider, stored, current=None, *, window=WHOLE, thinking=False, gone=(), model=None):
    """Show the history to a model of the provider, and fail with what is wrong with the request."""
    asked = Asked(provider, model or model_of(provider, thinking), thinking)
    current = [U("And now?")] if current is None else current
    case = Case("a known fault", asked, stored, current, window, merges=provider in ALTERNATING, gone=list(gone))
    broken = [problem.rule for problem in judged(case) if fails(provider, problem.rule)]
    assert not broken, explained(case, broken[0])


def received(provider, number, *keys, model=None, **fields):
    """Return an assistant message as the provider's generator makes it."""
    calls = tuple(Call("look_up", key) for key in keys)
    reply = Reply(number, calls=calls, ends=fields.pop("ends", "tool_calls" if keys else "stop"), **fields)
    return RECEIVE[provider](reply, model or model_of(provider, bool(fields.get("thinking"))))


def results(message, *keys):
    by_key = {call.arguments["key"]: call for call in message.tool_calls}
    return [T(Call("look_up", key).value, origin=by_key[key]) for key in keys or by_key]


def called(key, id_, **extra):
    return ToolCall("look_up", {"key": key}, id=id_, extra=extra or None)


def answered(call):
    return T(Call("look_up", call.arguments["key"]).value, origin=call)


# ---------------------------------------------------------------------- content of one provider


@pytest.mark.provider("anthropic")
@pytest.mark.parametrize("arrived", [(), ("k1",), ("k2",)])
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_tool_ran_beside_calls_that_were_not_all_answered(arrived, goes_on, streamed):
    message = received("anthropic", 1, "k1", "k2", searches=True, streamed=streamed)
    assert message.meta["raw_content_for_server_tools"]
    stored = [U("Book it"), message, *(results(message, *arrived) if arrived else ())]
    check("anthropic", stored, [] if goes_on else None)


@pytest.mark.provider("anthropic")
def test_raw_blocks_are_counted_as_tokens():
    stored = []
    for number in range(10):
        stored += [U(f"Question {number}"), received("anthropic", number, text=f"Answer {number}.", searches=True)]
    check("anthropic", stored, window=Window("max_tokens", max_tokens=1000))


@pytest.mark.parametrize("provider", ["responses", "anthropic", "bedrock", "mistral", "ollama", "openrouter"])
def test_thoughts_are_counted_as_tokens(provider):
    thought = "I think about it. " * 1000
    stored = [U("Question"), received(provider, 1, text="Answer.", thinking=thought), U("Again"), A("Answer again.")]
    check(provider, stored, window=Window("max_tokens", max_tokens=500), thinking=True)


@pytest.mark.provider("anthropic")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_paused_reply_is_sent_back_as_it_is(resumed):
    paused = received("anthropic", 1, searches=True, ends="pause")
    stored = [U("Search for it"), paused]
    if resumed:
        stored.append(received("anthropic", 2, text="Found it.", continues=True))
    check("anthropic", stored, None if resumed else [])
    if not resumed:
        shown = show(Case("paused", Asked("anthropic", model_of("anthropic", False)), stored, []))
        assert shown[-1].meta["raw_content_for_server_tools"] == paused.meta["raw_content_for_server_tools"]


@pytest.mark.provider("anthropic")
def test_the_user_asks_anew_after_a_paused_reply():
    check("anthropic", [U("Search for it"), received("anthropic", 1, searches=True, ends="pause")])


@pytest.mark.provider("anthropic")
def test_an_edited_answer_is_sent_as_it_was_edited():
    message = received("anthropic", 2, text="Old words.", searches=True)
    check("anthropic", [U("Question"), with_text(message, "New words.")], gone=["Old words."])


@pytest.mark.parametrize("provider", EVERY)
def test_a_refusal_is_shown(provider):
    refusal = ChatMessage.from_openai_dict_format({"role": "assistant", "content": None, "refusal": "I cannot help."})
    check(provider, [U("Do the bad thing"), refusal], [U("Why not?")])


@pytest.mark.parametrize(
    ("provider", "mark"),
    [("anthropic", {"cache_control": {"type": "ephemeral"}}), ("bedrock", {"cachePoint": {"type": "default"}})],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_cache_marks_of_old_turns_do_not_add_up(provider, mark, everywhere):
    stored = []
    for number in range(6):
        stored += [U(f"Question {number}", meta=mark), A(f"Answer {number}.", meta=mark if everywhere else None)]
    now = [ChatMessage.from_system("Be brief.", meta=mark), U("And now?", meta=mark)]
    check(provider, stored, now)


@pytest.mark.provider("anthropic")
def test_a_parallel_turn_whose_messages_are_marked():
    mark = {"cache_control": {"type": "ephemeral"}}
    calls = [called(f"k{number}", f"toolu_{number}") for number in range(3)]
    stored = [U("Question", meta=mark), A(tool_calls=calls, meta=mark)]
    stored += [T(answered(call).tool_call_results[0].result, origin=call, meta=mark) for call in calls]
    check("anthropic", [*stored, A("Answer.", meta=mark)])


@pytest.mark.provider("gemini")
@pytest.mark.parametrize("lost", ["k1", "k2"])
def test_a_result_was_lost_in_the_turn_under_way(lost):
    message = received("gemini", 1, "k1", "k2", thinking="Let me see.")
    check("gemini", [U("Question"), message, *results(message, {"k1": "k2", "k2": "k1"}[lost])], [], thinking=True)


@pytest.mark.provider("gemini")
@pytest.mark.parametrize("goes_on", [False, True])
def test_parallel_calls_of_which_only_the_first_is_signed(goes_on):
    message = received("gemini", 1, "k1", "k2", thinking="Let me see.")
    answer = [] if goes_on else [received("gemini", 2, text="Answer.", thinking="I see.")]
    check("gemini", [U("Question"), message, *results(message), *answer], [] if goes_on else None, thinking=True)


@pytest.mark.provider("bedrock")
@pytest.mark.parametrize("name", [None, "report.pdf", "\u5831\u544a.pdf", "x" * 300 + ".pdf"])
def test_files_with_one_name_or_without(name):
    def file():
        return FileContent(PDF, mime_type="application/pdf", filename=name, validation=False)

    stored = [U(content_parts=["One", file()]), A("Read."), U(content_parts=["Two", file(), file()]), A("Read.")]
    now = U(content_parts=["And this?", file()])
    asked = Asked("bedrock", model_of("bedrock", False))
    request = REQUEST["bedrock"](show(Case("files", asked, stored, [now], portable=True)))
    assert not problems_of(request, OUTLINE["bedrock"](request), asked)
    blocks = [
        block["document"] for message in request["messages"] for block in message["content"] if "document" in block
    ]
    assert len(blocks) == 4
    assert all(len(block["name"]) <= 200 for block in blocks[:-1])


MIME_TYPES = [
    *(
        "text/plain",
        "text/csv",
        "application/json",
        "audio/mpeg",
        "video/mp4",
        "application/zip",
        "application/pdf",
        None,
    ),
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
]


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("mime_type", MIME_TYPES)
@pytest.mark.parametrize("data", [PDF, "", "damaged"])
@pytest.mark.parametrize("text", [["Question"], []])
def test_a_file_in_an_earlier_round_that_the_next_model_may_not_take(provider, mime_type, data, text):
    file = FileContent(data, mime_type=mime_type, filename="report", validation=False)
    check(provider, [U(content_parts=[*text, file]), A("Answer.")])


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("mime_type", ["image/png", "image/gif", "image/jpg", "image/heic", "image/svg+xml", None])
@pytest.mark.parametrize("data", [PIXEL, "", "damaged"])
@pytest.mark.parametrize("text", [["Question"], []])
def test_an_image_in_an_earlier_round_that_the_next_model_may_not_take(provider, mime_type, data, text):
    image = ImageContent(data, mime_type=mime_type, validation=False)
    check(provider, [U(content_parts=[*text, image]), A("Answer.")])


@pytest.mark.provider("ollama")
def test_a_question_with_an_image_between_its_texts():
    image = ImageContent(PIXEL, mime_type="image/png", validation=False)
    check("ollama", [U(content_parts=["Compare", image, "with", image, "please."]), A("They are equal.")])


@pytest.mark.parametrize("provider", ["anthropic", "bedrock"])
def test_another_model_resumes_a_round_with_a_file_that_it_does_not_take(provider):
    file = FileContent(PDF, mime_type="audio/mpeg", validation=False)
    call = received("gemini", 1, "k1", thinking="Let me see.")
    stored = [U(content_parts=["Question", file]), call, *results(call)]
    asked = Asked(provider, model_of(provider, True), True)
    case = Case("resumed", asked, stored, [], merges=provider in ALTERNATING, portable=True, model=asked.model)
    assert not [problem for problem in judged(case) if fails(provider, problem.rule)]


@pytest.mark.provider("ollama")
def test_a_question_was_a_file_only_and_the_next_model_takes_none():
    file = FileContent(PDF, mime_type="application/pdf", filename="report.pdf", validation=False)
    check("ollama", [U(content_parts=[file]), A("It is about 2025.")])


# ---------------------------------------------------------------------- ids


@pytest.mark.parametrize("provider", EVERY)
def test_ids_are_counted_anew_in_each_reply(provider):
    call_id = {"mistral": "call00000", "responses": "fc_0"}.get(provider, "call_0")
    stored = []
    for number in range(3):
        call = called(f"k{number}", call_id, call_id="call_0")
        stored += [U(f"Question {number}"), A(tool_calls=[call]), answered(call), A(f"Answer {number}.")]
    check(provider, stored)


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("arrived", [("k1", "k2"), ("k2", "k1"), ("k2",), ("k1",)])
def test_parallel_calls_share_an_id(provider, arrived):
    calls = {key: called(key, "look_up", call_id="look_up") for key in ("k1", "k2")}
    check(provider, [U("Both?"), A(tool_calls=list(calls.values())), *(answered(calls[key]) for key in arrived)])


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("call_id", [None, ""])
def test_calls_without_ids(provider, call_id):
    calls = {key: called(key, call_id) for key in ("k1", "k2")}
    stored = [U("Both?"), A(tool_calls=list(calls.values())), answered(calls["k2"]), answered(calls["k1"])]
    check(provider, [*stored, A("Answer.")])


@pytest.mark.parametrize("provider", EVERY)
def test_results_in_another_order(provider):
    message = received(provider, 1, "k1", "k2", has_ids=False)
    check(provider, [U("Both?"), message, *results(message, "k2", "k1"), A("Answer.")])


@pytest.mark.parametrize("provider", EVERY)
def test_parallel_calls_stored_as_a_message_each(provider):
    first, second = received(provider, 1, "k1"), received(provider, 2, "k2")
    check(provider, [U("Both?"), first, second, *results(first), *results(second), A("Answer.")])


@pytest.mark.provider("responses")
@pytest.mark.parametrize("goes_on", [False, True])
def test_calls_that_reasoning_led_to_stored_as_a_message_each(goes_on):
    whole = received("responses", 1, "k1", "k2", thinking="Let me see.")
    first = A(tool_calls=whole.tool_calls[:1], reasoning=whole.reasoning)
    stored = [U("Both?"), first, A(tool_calls=whole.tool_calls[1:]), *results(whole)]
    check("responses", stored, [] if goes_on else None, thinking=True)


@pytest.mark.parametrize("provider", EVERY)
def test_a_turn_stored_twice(provider):
    call = received(provider, 1, "k1", thinking="Let me see.")
    turn = [U("Question"), call, *results(call), received(provider, 2, text="Answer.", thinking="I see.")]
    check(provider, turn * 2, thinking=True)


@pytest.mark.parametrize("provider", EVERY)
def test_the_process_died_before_the_answer(provider):
    message = received(provider, 1, "k1")
    check(provider, [U("Question"), message, *results(message)])


@pytest.mark.parametrize("provider", EVERY)
def test_two_assistant_messages_after_a_deleted_question(provider):
    message = received(provider, 1, "k1")
    check(provider, [U("Question"), A("Answer."), message, *results(message), A("Answer again.")])


# ---------------------------------------------------------------------- another model


@pytest.mark.parametrize("second", EVERY)
@pytest.mark.parametrize("first", EVERY)
@pytest.mark.parametrize("thinks", [False, True])
def test_another_provider_goes_on(first, second, thinks):
    thinking = "Let me see." if thinks else ""
    call = received(first, 1, "k1", "k2", thinking=thinking, has_ids=False)
    answer = received(first, 2, text="Answer.", thinking=thinking)
    model = model_of(second, thinks, other=first == second)
    check(second, [U("Question"), call, *results(call, "k2", "k1"), answer], thinking=thinks, model=model)


@pytest.mark.parametrize("second", EVERY)
def test_an_id_that_only_some_providers_take(second):
    call = called("k1", "functions.look_up:0")
    check(second, [U("Question"), A(tool_calls=[call]), answered(call), A("Answer.")])


@pytest.mark.parametrize("second", EVERY)
def test_a_long_id(second):
    call = called("k1", "call_" + "x" * 80)
    check(second, [U("Question"), A(tool_calls=[call]), answered(call), A("Answer.")])


@pytest.mark.parametrize("second", EVERY)
def test_an_image_in_a_tool_result(second):
    call = called("k1", "call_1")
    image = ImageContent(base64_image=PIXEL, mime_type="image/png", validation=False)
    result = T([TextContent(Call("look_up", "k1").value), image], origin=call)
    check(second, [U("Question"), A(tool_calls=[call]), result, A("Answer.")])


@pytest.mark.parametrize("second", EVERY)
def test_a_list_of_texts_as_a_tool_result(second):
    call = called("k1", "call_1")
    result = T([TextContent(Call("look_up", "k1").value)], origin=call)
    check(second, [U("Question"), A(tool_calls=[call]), result, A("Answer.")])


@pytest.mark.parametrize("second", EVERY)
def test_thoughts_without_anything_that_a_provider_could_check(second):
    thoughts = ReasoningContent(reasoning_text="Let me see.")
    check(second, [U("Question"), A("Answer.", reasoning=thoughts)], thinking=True)


@pytest.mark.parametrize("provider", ["anthropic", "bedrock", "openrouter", "responses"])
def test_stored_reasoning_that_is_no_longer_accepted(provider):
    old = f"{provider}-model-of-last-year"
    stored = [U("Question"), received(provider, 1, text="Answer.", thinking="Let me see.", model=old)]
    check(provider, stored, thinking=True)


@pytest.mark.parametrize("second", EVERY)
@pytest.mark.parametrize("first", EVERY)
def test_a_round_that_was_interrupted_before_the_switch(first, second):
    call = received(first, 1, "k1", "k2", thinking="Let me see.")
    stored = [U("Question"), call, *results(call, "k1")]
    check(second, stored, thinking=True, model=model_of(second, True, other=first == second))


@pytest.mark.parametrize("provider", ["anthropic", "bedrock", "openrouter", "responses"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("gpt-4o", "gpt-4o-mini"),
        ("gpt-4o-mini", "gpt-4o"),
        ("gpt-4", "gpt-4.1"),
        ("claude-opus-4", "claude-opus-4-1"),
        ("claude-opus-4-5-20250101", "claude-opus-4-5-20250601"),
        ("openai/gpt-4o", "openai/gpt-4o-mini"),
        ("openai/gpt-4o", "gpt-4o"),
    ],
)
def test_a_model_with_a_similar_name_resumes_an_interrupted_round(provider, first, second):
    call = received(provider, 1, "k1", "k2", thinking="Let me see.", model=first)
    check(provider, [U("Question"), call, *results(call, "k1")], thinking=True, model=second)


@pytest.mark.parametrize("second", EVERY)
def test_a_refusal_after_a_text(second):
    reply = A("That is all that I can say.", meta={"refusal": "I cannot help with the rest."})
    check(second, [U("Question"), reply, U("Why?"), A("Because.")])


@pytest.mark.parametrize("second", EVERY)
def test_a_hook_added_a_message_after_results(second):
    question, call = {"chat_question_id": "q"}, called("k1", "abc123def")
    added = [A(tool_calls=[call], meta=question), answered(call), U("Use metric units.", meta=question)]
    check(second, [U("Question", meta={"chat_message_id": "q"}), *added, A("Answer.", meta=question)])


@pytest.mark.parametrize("second", EVERY)
def test_a_history_with_names(second):
    stored = [U("Question", name="Ada Lovelace <ada@example.org>"), A("Answer.", name="the bot"), U("And?", name="Bob")]
    check(second, [*stored, A("Answer.")])
