# SPDX-License-Identifier: Apache-2.0
"""
Histories as Markdown and HTML, in which nothing that was said can do harm, and as examples to fine-tune models with.
"""

import io
import json
import re
import uuid
from html.parser import HTMLParser
from itertools import groupby

import pytest
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transferred import moved
from versions import SENDS_REFUSALS

from haystack_chat_store import Fault, InMemoryChatMessageStore
from haystack_chat_store.display import harmless, shown_parts, shown_time
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.testing.kit import number_of_examples
from haystack_chat_store.testing.messages import conversation, sample_messages, texts, user
from haystack_chat_store.testing.messages import messages as any_messages
from haystack_chat_store.transfer import export_to

ATTACKS = [
    "# heading",
    "heading\n===",
    "heading\n---",
    "- item",
    "+ item",
    "* item",
    "1. item\n2) item",
    "> quote",
    "    code",
    "\tcode",
    "```\nfence",
    "~~~\nfence",
    "`code`",
    "***",
    "___",
    "**bold** __bold__ *it* _it_ ~~gone~~",
    "[link](http://example.com)",
    "[link]: http://example.com",
    "[link][1]\n\n[1]: javascript:alert(1)",
    "![image](http://example.com/a.png)",
    "<http://example.com>",
    "http://example.com www.example.com",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</p></article></body><script>",
    "<!-- ",
    "&lt;b&gt; &amp; &#60;",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "$x$ $$y$$",
    "end\\",
    "\\*not bold\\*",
    "line\\\nline",
    "two  \nspaces",
    '"quotes\' and "more',
    "ada@example.com, mailto:ada@example.com, xmpp:ada@example.com/x",
    "@ada and @_@ and a@-b.c_d and <!-- -->@b",
    "a\n\n\n\nb",
]
HARMFUL = "\x00\x07\x1b[31m\x7f\x9b\u202e\u2066\u200b\u2028\ufeff"


def exported(store, name):
    stream = io.BytesIO()
    export_to(store, stream, format=name)
    return stream.getvalue().decode()


def everywhere(text):
    """A conversation with a text in all places that have one."""
    call = ToolCall(text, {text: text}, id=text)
    parts = [text, ImageContent("AAAA", text, validation=False), FileContent("AAAA", text, text, validation=False)]
    return [
        ChatMessage.from_user(content_parts=parts, name=text),
        ChatMessage.from_assistant(text, tool_calls=[call], reasoning=text),
        ChatMessage.from_tool(text, origin=call),
        ChatMessage.from_tool([TextContent(text)], origin=call, error=True),
    ]


# ---------------------------------------------------------------------- HTML


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.shown = set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add((tag, *sorted(name for name, _ in attributes)))

    def handle_data(self, data):
        self.shown.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)


@pytest.fixture(scope="module")
def harmless_tags():
    store = InMemoryChatMessageStore(namespace=uuid.uuid4().hex)
    store.write_messages("a", everywhere("harmless"))
    return Page(exported(store, "html")).tags


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_is_taken_for_html(store, harmless_tags, attack):
    store.write_messages(attack, everywhere(attack))
    store.update_chat_history(attack, title=attack)

    page = Page(exported(store, "html"))

    assert page.tags == harmless_tags
    assert page.shown.count(attack) >= 2
    assert sum(attack.replace("\n", "\\n").replace("\t", "\\t") in shown for shown in page.shown) >= 6


@settings(max_examples=number_of_examples(50), deadline=None, suppress_health_check=list(HealthCheck))
@given(texts())
def test_any_text_is_shown_in_html_as_it_is(store, harmless_tags, text):
    store.delete_all_messages()
    store.write_messages("a", [*everywhere("harmless"), user(text)])
    page = Page(exported(store, "html"))
    assert page.tags == harmless_tags
    if text.isascii() and text.isprintable() and text:
        assert text in page.shown


def test_a_page_needs_nothing_else_and_runs_nothing(store):
    store.write_messages("a", everywhere("harmless"))
    page = exported(store, "html")
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert "color-scheme: light dark" in page
    for word in ("<script", "href", "src=", "url(", "@import", "http:", "https:"):
        assert word not in page


# ---------------------------------------------------------------------- Markdown

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


# What stands in an address to keep its parts apart: it is invisible, and no text.
NOTHING = "<!-- -->"


def rendered(text):
    """Which elements Markdown has, and the texts in each block of it."""
    kinds, shown = set(), []
    for token in RENDERER.parse(text):
        if token.type == "inline":
            parts = [part for part in token.children if (part.type, part.content) != ("html_inline", NOTHING)]
            kinds.update(part.type for part in parts)
            shown.append("".join("\n" if part.type.endswith("break") else part.content for part in parts))
        else:
            kinds.add(token.type)
            if token.type == "fence":
                shown.append(token.content.removesuffix("\n"))
    return kinds, shown


EXPECTED = {
    "heading_open",
    "heading_close",
    "paragraph_open",
    "paragraph_close",
    "blockquote_open",
    "blockquote_close",
    "fence",
    "text",
    "text_special",
    "strong_open",
    "strong_close",
    "hardbreak",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_is_taken_for_markdown(store, attack):
    store.write_messages(attack, everywhere(attack))
    store.update_chat_history(attack, title=attack)

    kinds, shown = rendered(exported(store, "markdown"))

    assert kinds <= EXPECTED
    for line in filter(str.strip, attack.split("\n")):
        expected = line.expandtabs(4).replace("    ", "\xa0" * 4).strip(" ")
        assert sum(expected in text for text in shown) >= 2
    assert sum(attack in text for text in shown) >= 2  # in the fences
    assert len([text for text in shown if text.startswith(("User", "Assistant", "Tool,"))]) == 4


# How GitHub's renderer, cmark-gfm, finds addresses: when all escapes and entities have been resolved, it puts together
# what is text, looks for an @, and then at what stands before and after it.
ADDRESS = re.compile(r"[a-z0-9.+_-]+@[a-z0-9_.-]", re.IGNORECASE | re.ASCII)


def texts_between_elements(text):
    for token in RENDERER.parse(text):
        for is_text, parts in groupby(token.children or (), lambda part: part.type in ("text", "text_special")):
            if is_text:
                yield "".join(part.content for part in parts)


@pytest.mark.parametrize("escaped", ["ada@b.com", "ada\\@b.com", "ada&#64;b.com", "ada@b\\.com"])
def test_escaping_alone_does_not_keep_an_address_from_becoming_a_link(escaped):
    assert any(map(ADDRESS.search, texts_between_elements(escaped)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_address_becomes_a_link(store, attack):
    store.write_messages(attack, everywhere(attack))
    store.update_chat_history(attack, title=attack)
    shown = list(texts_between_elements(exported(store, "markdown")))
    assert not any(map(ADDRESS.search, shown))
    assert not any(re.search(r"@\w", text) for text in shown)  # which names somebody


def test_headings_are_the_titles_and_the_speakers_alone(store):
    for index, attack in enumerate(ATTACKS):
        store.write_messages("chat", [user(attack, chat_message_id=str(index))])
    store.update_chat_history("chat", title="Title\n# Another")
    headings = [line for line in exported(store, "markdown").split("\n") if line.startswith("#")]
    assert headings[0] == "# Title\\\\n\\# Another"
    assert all(heading.startswith("## User, 2") for heading in headings[1:])
    assert len(headings) == 1 + len(ATTACKS)


@settings(max_examples=number_of_examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from("ab \n\t#*_`~[]()<>!|\\-+=.:1&$>@"), max_size=30))
def test_any_marks_are_shown_in_markdown_as_they_are(store, text):
    store.delete_all_messages()
    store.write_messages("a", [ChatMessage.from_assistant(text, reasoning=text)])
    kinds, shown = rendered(exported(store, "markdown"))
    assert kinds <= EXPECTED
    lines = [line.split() for line in text.split("\n") if line.strip()]
    blocks = [line.split() for block in shown[3:] for line in block.split("\n") if line]
    assert [line for line in blocks if line != ["Reasoning"]] == lines * 2


# ---------------------------------------------------------------------- both


@pytest.mark.parametrize("name", ["markdown", "html"])
def test_characters_that_do_harm_are_shown_as_escape_sequences(store, name):
    store.write_messages("a", everywhere(f"a{HARMFUL}b"))
    text = exported(store, name)
    assert not set(HARMFUL.replace("[31m", "")) & set(text)
    escaped = text.replace("\\\\", "\\").replace("\\[", "[")
    for shown in (r"a\x00\x07\x1b[31m\x7f\x9b\u202e\u2066\u200b\u2028\ufeffb",):
        assert escaped.count(shown) >= 6


INVISIBLE = [
    *"\u00ad\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00\uffa0",
    *map(chr, range(0x180B, 0x1810)),
    *map(chr, range(0x1BCA0, 0x1BCA4)),
    *map(chr, range(0x1D173, 0x1D17B)),
    *map(chr, range(0xE0000, 0xE1000)),
]


def test_characters_that_cannot_be_seen_are_shown_as_escape_sequences_too():
    for character in INVISIBLE:
        assert harmless(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"


def test_what_emoji_and_scripts_are_made_of_stays():
    for text in (
        "👩\u200d💻",
        "❤\ufe0f",
        "☎\ufe0e",
        "\u0645\u06cc\u200c\u062e",
        "क्\u200dष",
        "🏳️\u200d🌈",
        "a b\u00a0c\u3000d",
    ):
        assert harmless(text) == text


@pytest.mark.parametrize("name", ["markdown", "html"])
def test_everything_that_was_said_can_be_read(store, name):
    store.write_messages("user_456", list(sample_messages().values()))
    store.update_chat_history("user_456", title="Weather in Zürich")
    text = exported(store, name)
    for shown in (
        "Weather in Zürich",
        "Grüezi 👋",
        "Be kind.",
        "Image: image/png, 70 bytes",
        "File: Bericht №1.pdf, application/pdf, 14 bytes",
        "Reasoning",
        "First, …",
        "Tool call: weather",
        "Zürich",
        "Result of weather",
        "22 °C",
        "Error of weather",
        "User (Ada)",
    ):
        assert shown in text
    assert "iVBOR" not in text


needs_refusals = pytest.mark.skipif(not SENDS_REFUSALS, reason="Haystack sends refusals since 3.4")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("markdown", "**Refusal**\n\nI cannot *help* <b>."),
        ("html", "<figcaption>Refusal</figcaption><p>I cannot *help* &lt;b&gt;.</p>"),
        pytest.param(
            "openai",
            '{"role":"assistant","content":[{"type":"refusal","refusal":"I cannot *help* <b>."}]}',
            marks=needs_refusals,
        ),
    ],
)
def test_a_refusal_can_be_read(store, name, expected):
    refusal = ChatMessage.from_assistant(meta={"refusal": "I cannot *help* <b>."})
    store.write_messages("a", [user("Do it"), refusal])
    text = exported(store, name)
    assert expected in (re.sub(r"\\(?=[*<>])", "", text) if name == "markdown" else text)


@pytest.mark.parametrize("name", ["markdown", "html", pytest.param("openai", marks=needs_refusals)])
def test_a_refusal_after_a_text_can_be_read(store, name):
    answer = ChatMessage.from_assistant("This much.", meta={"refusal": "The rest I cannot say."})
    store.write_messages("a", [user("Tell me"), answer])
    text = exported(store, name)
    assert "This much." in text
    assert "The rest I cannot say." in text


@settings(max_examples=number_of_examples(20), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(any_messages(), max_size=4))
def test_any_conversation_can_be_read(store, messages):
    store.delete_all_messages()
    store.write_messages("a", [*messages, user("the end", big=10**4000)])
    for name in ("markdown", "html"):
        assert "the end" in exported(store, name)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (1, "1 bytes"), (2, "2 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2_500_000, "2.5 MB")],
)
def test_the_size_of_an_attachment_is_that_of_its_bytes(store, size, shown):
    file = FileContent("A" * ((size * 4 + 2) // 3) + "=" * (-size % 3), "text/plain", validation=False)
    store.write_messages("a", [ChatMessage.from_user(content_parts=[file])])
    assert f"File: text/plain, {shown}" in exported(store, "markdown")


def test_times_are_those_of_the_messages(store):
    content = '{"role":"user","meta":{"chat_message_id":"m"},"name":null,"content":[{"text":"Hi"}]}'
    row = MessageRow(position=0, created_at=1_767_225_601_500_000, message_id="m", role="user", content=content)
    store.engine.run(
        store.engine.import_history,
        store.scope,
        HistoryRow(
            chat_history_id="a",
            message_count=0,
            round_count=0,
            created_at=1_767_225_600_000_000,
            updated_at=1_767_225_602_000_000,
            title=None,
            meta=None,
        ),
        [[row]],
        0,
    )
    for name in ("markdown", "html"):
        text = exported(store, name)
        assert "a, created 2026-01-01 00:00:00 UTC, changed 2026-01-01 00:00:02 UTC" in text
        assert "2026-01-01 00:00:01 UTC" in text


def parts_of(*content):
    return list(shown_parts(ChatMessage(ChatRole.ASSISTANT, list(content))))


def test_arguments_of_a_call_are_on_one_line_if_it_is_short():
    for arguments, lines in (({}, 1), ({"a": 1, "b": [2]}, 1), ({"a": "x" * 80}, 3), ({"a": "x\ny"}, 3)):
        (part,) = parts_of(ToolCall("f", arguments))
        assert json.loads(part.text) == arguments
        assert len(part.text.split("\n")) == lines


def test_a_result_and_what_a_tool_has_made_are_parts_of_their_own():
    image = sample_messages()["image"].images[0]
    call = ToolCall("camera", {}, id="1")
    result, shown_image = parts_of(ToolCallResult([TextContent("two"), image, TextContent("lines")], call, True))
    assert (result.label, result.text) == ("Error of camera (1)", "two\nlines")
    assert (shown_image.label, shown_image.text) == ("Image: image/png, 70 bytes", "")


def test_what_something_else_has_left_in_a_message_can_be_shown_too():
    odd = ToolCall(5, [10**4000], [], None)
    call, result = parts_of(odd, ToolCallResult(7, odd, None), ReasoningContent(None))
    # The process decides whether it prints so long a number, and so whether it can be set out on lines.
    assert (call.label, "".join(call.text.split())) == ("Tool call: 5", f"[1{'0' * 4000}]")
    assert (result.label, result.text) == ("Result of 5", "7")
    assert shown_time(None) == shown_time(2**63) == "1970-01-01 00:00:00 UTC"


# ---------------------------------------------------------------------- OpenAI's format


def examples(store):
    stream = io.BytesIO()
    transferred = export_to(store, stream, format="openai")
    return transferred, [json.loads(line)["messages"] for line in stream.getvalue().split(b"\n")[:-1]]


def test_an_example_is_what_haystack_would_send(store):
    store.write_messages("a", conversation("s ua ucta udtta"))
    transferred, (example,) = examples(store)
    assert transferred == moved(1, 12, 0, ())
    roles = "system user assistant user assistant tool assistant user assistant tool tool assistant"
    assert " ".join(message["role"] for message in example) == roles
    assert example == [message.to_openai_dict_format() for message in store.retrieve_messages("a")]


def test_an_example_ends_with_what_the_assistant_said(store):
    store.write_messages("a", conversation("ua u"))
    store.write_messages("b", conversation("ua uct"))
    transferred, (first, second) = examples(store)
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert [message["role"] for message in second] == ["user", "assistant", "user", "assistant"]
    assert second[-1]["tool_calls"][0]["function"]["name"] == "search"
    assert transferred == moved(2, 6, 2, ())


def test_what_a_model_provider_rejects_is_left_out_or_repaired(store):
    store.write_messages("a", conversation("a uca ut a e"))
    transferred, (example,) = examples(store)
    assert [message["role"] for message in example] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert "interrupted" in example[2]["content"]
    assert transferred == moved(1, 5, 3, ())


def test_histories_in_which_nobody_answered_are_left_out(store):
    store.write_messages("a", conversation("u"))
    store.write_messages("b", conversation("us"))
    store.write_messages("c", conversation("ua"))
    assert examples(store)[0] == moved(1, 2, 3, ())


def test_answers_of_interleaved_questions_come_together(store):
    first, second = user("first?", chat_message_id="1"), user("second?", chat_message_id="2")
    answers = [ChatMessage.from_assistant(f"{n}!", meta={"chat_question_id": n}) for n in ("1", "2")]
    store.write_messages("a", [first, second, *answers])
    _, (example,) = examples(store)
    assert [message["content"] for message in example] == ["first?", "1!", "second?", "2!"]


def test_several_texts_and_several_results_are_all_there(store):
    calls = [ToolCall("now", {}, id=name) for name in ("1", "2")]
    results = [ChatMessage.from_tool(f"result {call.id}", origin=call)._content[0] for call in calls]
    said = ChatMessage(ChatRole.ASSISTANT, [TextContent("one"), *calls, TextContent("two")])
    store.write_messages("a", [user(), said, ChatMessage(ChatRole.TOOL, results), ChatMessage.from_assistant("end")])
    _, (example,) = examples(store)
    assert example[1]["content"] == "one\n\ntwo"
    assert [(m["tool_call_id"], m["content"]) for m in example[2:4]] == [("1", "result 1"), ("2", "result 2")]


def test_what_the_format_has_no_form_for_is_reported(store):
    call = ToolCall("camera", {}, id="1")
    image = ChatMessage.from_tool([sample_messages()["image"].images[0]], origin=call)
    store.write_messages("a", [user(), ChatMessage.from_assistant(tool_calls=[call]), image, *conversation("a")])
    store.write_messages("b", conversation("ua"))
    fault = Fault(
        chat_history_id="a",
        position=None,
        description="It was left out: OpenAI's format has no form for one of its tool calls or results.",
        is_repaired=False,
    )
    assert examples(store)[0] == moved(1, 2, 4, (fault,))


@settings(max_examples=number_of_examples(20), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(any_messages(), max_size=6))
def test_every_example_is_one_line_that_haystack_reads(store, messages):
    store.delete_all_messages()
    store.write_messages("a", [user(), *messages, ChatMessage.from_assistant("end")])
    for example in examples(store)[1]:
        assert example[-1]["role"] == "assistant"
