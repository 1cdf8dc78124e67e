# SPDX-License-Identifier: Apache-2.0
"""The chatbot for the browser, in a real one: headless Chromium types, clicks, reloads, and looks at the page."""

import base64
import os
import re
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
from apps import EXAMPLES, App
from haystack.dataclasses import ChatMessage, ToolCall
from playwright.sync_api import expect, sync_playwright

from haystack_chat_store import SQLiteChatMessageStore

COMMAND = ["streamlit", "run", EXAMPLES / "web_chatbot.py", "--server.port", "{port}", "--server.headless", "true"]
COMMAND += ["--browser.gatherUsageStats", "false", "--client.toolbarMode", "minimal", "--"]
# One red pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
STARTED = {"ready": "/_stcore/health"}
PATIENCE = 60_000  # milliseconds; the machine may be busy
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def chromium():
    """Debian's browser or, where there is none, the one that `playwright install chromium` brings."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def window(chromium):
    """A function that opens a window of the chatbot."""
    contexts = []

    def open_window(app, path="", **options):
        context = chromium.new_context(viewport={"width": 1100, "height": 720}, **options)
        contexts.append(context)
        return Window(context.new_page(), app.url + path)

    yield open_window
    for context in contexts:
        context.close()


class Window:
    """The chatbot, as a user sees it."""

    def __init__(self, page, url):
        self.page = page
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        self.wait()

    def wait(self):
        """Wait until nothing is under way, and what is on the page stays there."""
        expect(self.page.get_by_test_id("stChatInputTextArea")).to_be_enabled()
        seen, since = None, time.monotonic()
        while time.monotonic() - since < 0.5:
            is_idle = self.page.locator("[data-testid=stApp][data-test-script-state=notRunning]").count() == 1
            now = (self.texts(), self.listed()) if is_idle else None
            if now is None or now != seen:
                seen, since = now, time.monotonic()
            self.page.wait_for_timeout(50)

    def until(self, condition):
        """Wait until what a click has asked for is there."""
        give_up = time.monotonic() + PATIENCE / 1000
        while not condition():
            assert time.monotonic() < give_up, (self.texts(), self.listed())
            self.page.wait_for_timeout(50)
        self.wait()

    def send(self, text):
        box = self.page.get_by_test_id("stChatInputTextArea")
        box.fill(text)
        box.press("Enter")

    def ask(self, text):
        """Ask a question, and return the answer when it is there."""
        self.send(text)
        expect(self.messages.filter(has_text=text).last).to_be_visible()
        self.wait()
        return self.texts()[-1]

    def click(self, name):
        named = re.compile(rf"(^|\s){re.escape(name)}$")  # before it may stand the name of an icon
        self.page.get_by_role("button", name=named).last.click()

    def type(self, label, text):
        box = self.page.get_by_label(label, exact=True).last
        box.fill(text)
        box.press("Control+Enter" if label == "Question" else "Enter")

    def open_menu(self):
        """Open what can be done with a conversation, unless it is open."""
        if self.page.get_by_role("button", name="Fork", exact=True).count() == 0:
            self.page.get_by_test_id("stPopover").first.get_by_role("button").click()

    def reload(self):
        self.page.reload()
        self.wait()

    @property
    def messages(self):
        return self.page.get_by_test_id("stChatMessage")

    def texts(self):
        return [re.sub(r"^(face|smart_toy)\s+", "", text).strip() for text in self.messages.all_inner_texts()]

    def listed(self):
        """The conversations on the left."""
        buttons = self.page.get_by_test_id("stSidebar").get_by_test_id("stButton").all_inner_texts()
        return [text.strip() for text in buttons if "New chat" not in text]

    def picture(self, name):
        if folder := os.environ.get("PICTURES"):
            self.page.screenshot(path=Path(folder) / name)


@pytest.fixture(scope="module")
def app():
    """One server for the tests that do not stop it. It is shared, so each test looks at conversations of its own."""
    with App(*COMMAND, **STARTED) as running:
        yield running


def test_an_answer_is_streamed_and_kept_over_reload_and_restart(start, window, model):
    app = start(*COMMAND, "--llm", "openai", **STARTED, **model.environment)
    ada = window(app)
    model.hold()
    ada.send("My name is Ada.")
    expect(ada.messages.last).to_contain_text("You said:")
    assert "This is answer" not in ada.messages.last.inner_text()
    model.go_on()
    expect(ada.messages.last).to_contain_text("This is answer 1.")
    ada.wait()
    said = ada.texts()
    assert said == ["My name is Ada.", "You said: My name is Ada. This is answer 1."]

    ada.reload()
    assert ada.texts() == said
    app.kill()
    app.start()
    ada.reload()
    assert ada.texts() == said
    ada.ask("What is my name?")
    assert [message["content"] for message in model.requests[-1]["messages"][1:]] == [*said, "What is my name?"]


def test_a_page_that_is_reloaded_while_an_answer_comes_shows_all_of_it(start, window, model):
    ada = window(start(*COMMAND, "--llm", "openai", **STARTED, **model.environment))
    model.hold()
    ada.send("Are you still there?")
    expect(ada.messages.last).to_contain_text("You said:")
    ada.page.reload()
    expect(ada.page.get_by_test_id("stChatInputTextArea")).to_have_count(0)  # it waits
    model.go_on()

    expect(ada.messages.last).to_contain_text("This is answer 1.")
    ada.wait()
    assert len(ada.texts()) == 2
    assert len(model.requests) == 1


def test_a_second_window_has_the_list_and_opens_the_same_conversation(app, window):
    first = window(app)
    first.ask("I live in Kyoto.")
    second = window(app)
    assert second.texts() == []

    second.click("I live in Kyoto.")
    second.until(lambda: second.texts() == first.texts())
    assert second.page.url == first.page.url
    second.ask("I like tea.")
    first.reload()
    assert first.texts() == second.texts()
    assert len(first.texts()) == 4


def test_an_error_is_shown_and_the_question_can_be_asked_again(start, window, model):
    ada = window(start(*COMMAND, "--llm", "openai", **STARTED, **model.environment))
    ada.send("Please refuse.")
    expect(ada.page.get_by_text("BadRequestError").first).to_be_visible()
    ada.reload()
    assert ada.texts() == ["Please refuse."]

    model.refuses = False
    ada.click("Ask again")
    expect(ada.messages.last).to_contain_text("You said: Please refuse.")
    ada.wait()
    assert len(ada.texts()) == 2
    assert ada.listed() == ["Please refuse."]


def test_conversations_are_found_renamed_forked_and_deleted(app, window):
    ada = window(app)
    ada.ask("Do penguins fly?")
    ada.type("Search", "pengu")
    ada.until(lambda: ada.listed() == ["Do penguins fly?"])
    ada.type("Search", "")

    ada.open_menu()
    ada.type("Title", "Birds")
    ada.until(lambda: "Birds" in ada.listed())
    assert "Do penguins fly?" not in ada.listed()

    ada.open_menu()
    ada.click("Fork")
    ada.until(lambda: {"Birds", "Birds (fork)"} <= set(ada.listed()))
    ada.ask("And ostriches?")
    assert len(ada.texts()) == 4
    ada.open_menu()
    ada.click("Delete")
    ada.until(lambda: ada.texts() == [])
    assert "Birds (fork)" not in ada.listed()
    ada.click("Birds")
    ada.until(lambda: len(ada.texts()) == 2)


def test_an_archived_conversation_is_listed_apart(app, window):
    ada = window(app)
    ada.ask("Is this old?")
    ada.open_menu()
    ada.click("Archive")
    ada.until(lambda: "Is this old?" not in ada.listed())

    ada.page.get_by_text("Archive", exact=True).first.click()
    ada.until(lambda: ada.listed() == ["Is this old?"])
    ada.open_menu()
    ada.click("Bring back")
    ada.wait()
    assert ada.listed() == []


def test_a_question_is_edited_and_an_answer_given_anew(start, window, model):
    ada = window(start(*COMMAND, "--llm", "openai", **STARTED, **model.environment))
    ada.ask("My color is red.")
    ada.ask("What is my color?")
    ada.click("Edit")
    ada.type("Question", "What is my colour?")
    ada.until(lambda: ada.texts()[2:] == ["What is my colour?", "You said: What is my colour? This is answer 3."])
    assert len(model.requests[-1]["messages"]) == len(["system", "question", "answer", "edited question"])

    ada.click("Ask again")
    ada.until(lambda: ada.texts()[2:] == ["What is my colour?", "You said: What is my colour? This is answer 4."])
    ada.reload()
    assert ada.texts()[::3] == ["My color is red.", "You said: What is my colour? This is answer 4."]


def test_a_tool_call_is_folded_and_an_image_is_shown(app, window):
    ada = window(app)
    assert ada.ask("What is 12 * 3?") == "It is 36."
    call = ada.messages.filter(has_text="calculate")
    expect(call.get_by_text("36")).to_be_hidden()
    call.get_by_text("calculate").click()
    expect(call.get_by_text("36")).to_be_visible()

    ada.page.locator("input[type=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": PNG})
    ada.ask("Look at this.")
    expect(ada.messages.filter(has_text="Look at this.").locator("img")).to_be_visible()
    ada.reload()
    expect(ada.messages.filter(has_text="Look at this.").locator("img")).to_be_visible()


def test_each_call_is_shown_with_its_own_result_also_if_ids_are_used_again(app, window):
    def call_of(city, id_="call"):
        return ToolCall("weather", {"city": city}, id=id_)

    sequence = [
        ChatMessage.from_user("Porto?"),
        ChatMessage.from_assistant(tool_calls=[call_of("Porto")]),
        ChatMessage.from_tool("Sun.", origin=call_of("Porto")),
        ChatMessage.from_user("Leeds, Oslo and Nara?"),
        ChatMessage.from_assistant(tool_calls=[call_of("Leeds"), call_of("Oslo"), call_of("Nara", None)]),
        ChatMessage.from_tool("Snow.", origin=call_of("Oslo")),
        ChatMessage.from_tool("Rain.", origin=call_of("Leeds")),
    ]
    with closing(SQLiteChatMessageStore(app.folder / "chat_history.db")) as store:
        store.for_user("me").write_messages("calls", sequence)
    ada = window(app, "/?chat=calls")

    calls = ada.page.get_by_test_id("stExpander").all_text_contents()
    assert [re.findall(r"Porto|Leeds|Oslo|Nara|Sun|Snow|Rain|no result", text) for text in calls] == [
        ["Porto", "Sun"],
        ["Leeds", "Rain"],
        ["Oslo", "Snow"],
        ["Nara", "no result"],
    ]


def test_the_end_of_a_long_turn_is_shown_without_its_question(app, window):
    call = ToolCall("weather", {"city": "Porto"}, id="call")
    steps = [ChatMessage.from_assistant(tool_calls=[call]), ChatMessage.from_tool("Sun.", origin=call)] * 30
    with closing(SQLiteChatMessageStore(app.folder / "chat_history.db")) as store:
        turn = [ChatMessage.from_user("Is it warm?"), *steps, ChatMessage.from_assistant("Yes.")]
        store.for_user("me").write_messages("steps", turn)
    ada = window(app, "/?chat=steps")
    assert ada.texts()[-1] == "Yes."
    expect(ada.page.get_by_text("Ask again")).to_have_count(0)

    ada.click("Earlier messages")
    ada.until(lambda: ada.texts()[0] == "Is it warm?")
    ada.click("Ask again")
    ada.until(lambda: len(ada.texts()) == 2)


def test_markup_in_a_message_is_text(app, window):
    ada = window(app)
    ada.ask("<script>document.title = 'stolen'</script><img src=x onerror=\"document.title = 'stolen'\"> **bold**")
    ada.reload()

    assert ada.texts()[0].startswith("<script>document.title")
    assert "<script>" in ada.texts()[1]  # the answer repeats it
    assert ada.page.locator("[data-testid=stChatMessage] script, [data-testid=stChatMessage] img").count() == 0
    assert ada.page.title() != "stolen"


def test_another_user_s_conversation_is_not_opened_by_its_address(app, window):
    with closing(SQLiteChatMessageStore(app.folder / "chat_history.db")) as store:
        store.for_user("other").write_messages("secret", [ChatMessage.from_user("The code is 1234.")])
    ada = window(app, "/?chat=secret")
    assert ada.texts() == []
    assert "The code is 1234." not in ada.listed()
    ada.send("What is the code?")
    expect(ada.page.get_by_text("ChatHistoryAccessError").first).to_be_visible()


def test_a_conversation_of_20000_messages_opens_at_once(app, window):
    turns = [(ChatMessage.from_user(f"Question {n}"), ChatMessage.from_assistant(f"Answer {n}")) for n in range(10_000)]
    with closing(SQLiteChatMessageStore(app.folder / "chat_history.db")) as store:
        store.for_user("me").write_messages("long", [message for turn in turns for message in turn])
    short = window(app)
    short.ask("This is short.")

    def seconds_to_open(path):
        started = time.monotonic()
        opened = window(app, path)
        return time.monotonic() - started, opened

    short_time, _ = seconds_to_open(f"/?{short.page.url.split('?')[1]}")
    long_time, long = seconds_to_open("/?chat=long")
    assert long.texts()[-1] == "Answer 9999"
    assert len(long.texts()) == 50
    assert long_time < short_time + 5, (long_time, short_time)
    long.click("Earlier messages")
    long.until(lambda: len(long.texts()) == 100)
    assert long.ask("Are you still quick?").startswith("Before this you have told me")
