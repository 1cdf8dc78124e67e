# SPDX-License-Identifier: Apache-2.0
"""One pipeline, and one agent, serve many users: each sees and changes only their own conversations."""

import asyncio
import inspect
import threading
from dataclasses import replace

import pytest
from haystack import Pipeline
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage, ToolCall
from haystack_integrations.components.retrievers.chat_store import ChatMessageRetriever
from haystack_integrations.components.titlers.chat_store import ChatHistoryTitler
from haystack_integrations.components.writers.chat_store import ChatMessageWriter
from haystack_integrations.hooks.chat_store import ChatHistoryLoader, ChatHistorySaver, chat_history_hooks

from haystack_chat_store import (
    BaseChatMessageStore,
    ChatHistoryAccessError,
    InMemoryChatMessageStore,
    SQLiteChatMessageStore,
    UnsupportedOperationError,
    match_transcript,
    match_transcript_async,
)
from haystack_chat_store.doctor import check
from haystack_chat_store.stores.in_memory.engine import InMemoryEngine

SECRET = "The code is 4711."


@pytest.fixture
def store(tmp_path):
    store = SQLiteChatMessageStore(tmp_path / "chat.db", durability="normal")
    store.for_user("ada").write_messages(
        "hers",
        [
            ChatMessage.from_user(SECRET, meta={"chat_message_id": "q"}),
            ChatMessage.from_assistant("Noted.", meta={"chat_message_id": "a"}),
        ],
    )
    return store


@pytest.fixture(params=["sync", "async"])
def run(request):
    def run(component, *arguments, **inputs):
        if request.param == "sync":
            return component.run(*arguments, **inputs)
        return asyncio.run(component.run_async(*arguments, **inputs))

    return run


def state_of(store):
    return store.get_chat_history("hers"), store.list_messages("hers"), len(store.list_chat_histories().items)


def test_retriever_shows_another_user_nothing(store, run):
    retriever = ChatMessageRetriever(store)
    assert run(retriever, "hers", user_id="ada")["messages"][0].text == SECRET
    for user_id in ("bob", "nobody"):
        found = run(retriever, "hers", user_id=user_id)
        assert found == {"messages": [], "revision": 0, "omitted_rounds": 0}
    # Not even by the id of a message: a stored question does not find its answer.
    question = [ChatMessage.from_user(SECRET, meta={"chat_message_id": "q"})]
    assert "replies" in run(retriever, "hers", user_id="ada", current_messages=question)
    found = run(retriever, "hers", user_id="bob", current_messages=question)
    assert [message.text for message in found["messages"]] == [SECRET]
    assert "replies" not in found


def test_writer_writes_nothing_to_the_history_of_another_user(store, run):
    writer, before = ChatMessageWriter(store), state_of(store)
    message = [ChatMessage.from_user("Hi!", meta={"chat_message_id": "q"})]
    for inputs in ({}, {"expected_revision": 0}, {"replace_from_message_id": "a"}):
        with pytest.raises(ChatHistoryAccessError):
            run(writer, "hers", messages=message, user_id="bob", **inputs)
    with pytest.raises(ChatHistoryAccessError):
        run(writer, "hers", messages=[], replies=[ChatMessage.from_assistant("Hi!")], user_id="bob")
    assert state_of(store) == before
    assert run(writer, "his", messages=message, user_id="bob")["messages_written"] == 1
    assert store.get_chat_history("his").user_id == "bob"


@pytest.mark.parametrize("user_id", [None, "bob"])
def test_agent_of_another_user_is_shown_nothing_and_saves_nothing(store, run, user_id):
    seen = []

    def reply(messages):
        seen.extend(message.text for message in messages)
        return "Hello!"

    agent = Agent(
        chat_generator=MockChatGenerator(response_fn=reply),
        hooks=chat_history_hooks(store, require_user_id=True, raise_on_failure=False),
    )
    before = state_of(store)
    context = {"chat_history_id": "hers"} if user_id is None else {"chat_history_id": "hers", "user_id": user_id}
    with pytest.raises(ValueError if user_id is None else ChatHistoryAccessError):
        run(agent, [ChatMessage.from_user("What is the code?")], hook_context=context)
    assert SECRET not in seen
    assert state_of(store) == before


def test_agent_serves_each_user(store, run):
    agent = Agent(chat_generator=MockChatGenerator("Hello!"), hooks=chat_history_hooks(store, require_user_id=True))
    for user_id, chat in (("ada", "hers"), ("bob", "his")):
        context = {"chat_history_id": chat, "user_id": user_id}
        run(agent, [ChatMessage.from_user("Hi!")], hook_context=context)
    assert [store.get_chat_history(chat).user_id for chat in ("hers", "his")] == ["ada", "bob"]
    assert [store.count_messages(chat) for chat in ("hers", "his")] == [4, 2]


@pytest.mark.parametrize("matched", [match_transcript, match_transcript_async])
def test_transcript_of_another_user_is_a_first_one(store, matched):
    transcript = [ChatMessage.from_user(SECRET), ChatMessage.from_assistant("Noted."), ChatMessage.from_user("And?")]

    def match(user_id):
        turn = matched(store, "hers", transcript, user_id=user_id)
        return asyncio.run(turn) if inspect.iscoroutine(turn) else turn

    assert (match("ada").outcome, match("bob").outcome) == ("append", "first")
    with pytest.raises(ChatHistoryAccessError):
        ChatMessageWriter(store).run("hers", match("bob").messages, user_id="bob")


def test_a_run_without_a_user_is_refused_if_one_is_required(store, run):
    for component, inputs in (
        (ChatMessageRetriever(store, require_user_id=True), {}),
        (ChatMessageWriter(store, require_user_id=True), {"messages": [ChatMessage.from_user("Hi!")]}),
        (ChatHistoryTitler(store, MockChatGenerator("x"), require_user_id=True), {}),
    ):
        with pytest.raises(ValueError, match="user_id"):
            run(component, "hers", **inputs)
        with pytest.raises(ValueError, match="user_id"):
            run(component, "hers", user_id="", **inputs)
        again = type(component).from_dict(component.to_dict())
        assert again.require_user_id is True
    for kind in (ChatHistoryLoader, ChatHistorySaver):
        assert kind.from_dict(kind(store, require_user_id=True).to_dict()).require_user_id is True


@pytest.mark.parametrize("kind", [ChatMessageRetriever, ChatMessageWriter, ChatHistoryTitler])
def test_both_runs_take_the_same(kind):
    signatures = [inspect.signature(method).parameters for method in (kind.run, kind.run_async)]
    assert list(signatures[0].items()) == list(signatures[1].items())
    assert "user_id" in signatures[0]


def test_a_store_without_users_is_refused_with_a_user(run):
    class Engine(InMemoryEngine):
        keeps_users = False
        keeps_expiry = False

    store = BaseChatMessageStore(Engine(), namespace="without users")
    for call in (
        lambda: store.for_user("ada"),
        lambda: store.list_chat_histories(user_id="ada"),
        lambda: store.create_chat_history("chat", user_id="ada"),
        lambda: BaseChatMessageStore(Engine(), user_id="ada"),
        lambda: BaseChatMessageStore(Engine(), ttl=1),
    ):
        with pytest.raises(UnsupportedOperationError, match="does not support"):
            call()
    with pytest.raises(ValueError, match="has no users"):
        run(ChatMessageRetriever(store), "chat", user_id="ada")


def test_what_concerns_all_users_is_refused_to_one(store, tmp_path):
    ada = store.for_user("ada")
    with pytest.raises(ChatHistoryAccessError):
        ada.backup(tmp_path / "copy.db")
    with pytest.raises(ChatHistoryAccessError):
        asyncio.run(ada.backup_async(tmp_path / "copy.db"))
    with pytest.raises(ChatHistoryAccessError):
        check(ada)
    assert not (tmp_path / "copy.db").exists()


def test_pipeline_from_yaml_serves_each_user():
    store = InMemoryChatMessageStore(namespace="users from yaml")
    pipeline = Pipeline()
    pipeline.add_component("retriever", ChatMessageRetriever(store, require_user_id=True))
    pipeline.add_component("llm", MockChatGenerator("Hello!"))
    pipeline.add_component("writer", ChatMessageWriter(store, require_user_id=True))
    pipeline.connect("retriever.messages", "llm.messages")
    pipeline.connect("llm.replies", "writer.replies")
    pipeline = Pipeline.loads(pipeline.dumps())
    for user_id in ("ada", "bob"):
        question, turn = [ChatMessage.from_user("Hi!")], {"chat_history_id": user_id, "user_id": user_id}
        pipeline.run({"retriever": {"current_messages": question, **turn}, "writer": {"messages": question, **turn}})
    assert [info.user_id for info in store.list_chat_histories().items] == ["bob", "ada"]
    store.delete_all_messages()


# ------------------------------------------------------------------ titles


def test_titler_titles_a_conversation_once(store, run):
    asked = []

    def title(messages):
        asked.append(messages[-1].text)
        return '"A secret code"\n'

    titler = ChatHistoryTitler(store, MockChatGenerator(response_fn=title))
    assert run(titler, "hers", user_id="ada", messages_written=2) == {"title": "A secret code"}
    assert SECRET in asked[0]
    assert run(titler, "hers") == {"title": "A secret code"}
    assert len(asked) == 1
    assert run(titler, "hers", user_id="bob") == run(titler, "nothing") == {"title": None}
    assert store.get_chat_history("hers").title == "A secret code"


def test_title_that_somebody_gives_meanwhile_stays(store, run):
    def title(messages):
        store.update_chat_history("hers", title="Mine")
        return "The model's"

    assert run(ChatHistoryTitler(store, MockChatGenerator(response_fn=title)), "hers") == {"title": "Mine"}
    assert store.get_chat_history("hers").title == "Mine"


def test_title_that_somebody_gives_in_the_last_moment_stays(run):
    class Raced(InMemoryChatMessageStore):
        def update_chat_history(self, chat_history_id, **change):
            super().update_chat_history(chat_history_id, title="Mine")
            return super().update_chat_history(chat_history_id, **change)

        async def update_chat_history_async(self, chat_history_id, **change):
            return self.update_chat_history(chat_history_id, **change)

    store = Raced(namespace="raced")
    store.write_messages("hers", [ChatMessage.from_user("Rome?"), ChatMessage.from_assistant("Sunny.")])
    assert run(ChatHistoryTitler(store, MockChatGenerator("The model's")), "hers") == {"title": "Mine"}
    assert store.get_chat_history("hers").title == "Mine"
    store.delete_all_messages()


def test_history_that_is_deleted_meanwhile_gets_no_title(store, run):
    def title(messages):
        store.delete_chat_history("hers")
        return "The model's"

    assert run(ChatHistoryTitler(store, MockChatGenerator(response_fn=title)), "hers") == {"title": None}
    assert store.get_chat_history("hers") is None


def test_conversation_without_an_answer_is_not_titled(store, run):
    def fail(messages):
        raise AssertionError

    titler = ChatHistoryTitler(store, MockChatGenerator(response_fn=fail))
    store.create_chat_history("new")
    assert run(titler, "new") == {"title": None}
    store.write_messages("new", [ChatMessage.from_assistant("Welcome!"), ChatMessage.from_user("Hi!")])
    assert run(titler, "new") == {"title": None}


def test_failing_model_raises_and_an_empty_title_is_none(store, run):
    def fail(messages):
        raise RuntimeError("down")

    with pytest.raises(RuntimeError, match="down"):
        run(ChatHistoryTitler(store, MockChatGenerator(response_fn=fail)), "hers")
    assert run(ChatHistoryTitler(store, MockChatGenerator(' "" ')), "hers") == {"title": None}
    long = run(ChatHistoryTitler(store, MockChatGenerator("word " * 100)), "hers")["title"]
    assert len(long) <= 100


def test_step_of_an_agent_is_no_answer(store, run):
    step = ChatMessage.from_assistant("Let me see.", tool_calls=[ToolCall("look", {}, "1")])
    store.write_messages("agents", [ChatMessage.from_user("Rome?"), step])
    asked = []
    titler = ChatHistoryTitler(store, MockChatGenerator(response_fn=lambda messages: asked.append(messages) or "Rome"))
    assert run(titler, "agents") == {"title": None}
    result = ChatMessage.from_tool("Sun", origin=step.tool_calls[0])
    store.write_messages("agents", [result, ChatMessage.from_assistant("It is sunny.")])
    assert run(titler, "agents") == {"title": "Rome"}
    assert asked[0][-1].text == "User: Rome?\n\nAssistant: It is sunny."


class Synchronous:
    """A store without asynchronous methods."""

    def __init__(self, store):
        self._store = store
        self.threads = set()

    def __getattr__(self, name):
        if name.endswith("_async"):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.threads.add(threading.get_ident())
            return method(*arguments, **options)

        method = getattr(self._store, name)
        return call


def test_titler_runs_a_store_without_asynchronous_methods_in_a_thread(store):
    synchronous = Synchronous(store)
    titler = ChatHistoryTitler(synchronous, MockChatGenerator("A secret code"))
    assert asyncio.run(titler.run_async("hers")) == {"title": "A secret code"}
    assert threading.get_ident() not in synchronous.threads
    assert store.get_chat_history("hers").title == "A secret code"


class Warmed(MockChatGenerator):
    """A generator that notes what is done to it besides asking."""

    def __init__(self):
        super().__init__("x")
        self.done = []

    def warm_up(self):
        self.done.append("warm_up")

    def close(self):
        self.done.append("close")


class WarmedAsynchronously(Warmed):
    async def warm_up_async(self):
        self.done.append("warm_up_async")

    async def close_async(self):
        self.done.append("close_async")


def test_titler_warms_up_and_closes_its_generator(store):
    async def warm_up_and_close(titler):
        await titler.warm_up_async()
        await titler.close_async()

    for generator, done in (
        (Warmed(), ["warm_up", "close"]),
        (WarmedAsynchronously(), ["warm_up_async", "close_async"]),
    ):
        titler = ChatHistoryTitler(store, generator)
        titler.warm_up()
        titler.close()
        asyncio.run(warm_up_and_close(titler))
        assert generator.done == ["warm_up", "close", *done]


def test_titler_closes_its_store_though_its_generator_fails_to_close(tmp_path):
    class Stuck(MockChatGenerator):
        def close(self):
            raise RuntimeError("stuck")

    store = SQLiteChatMessageStore(tmp_path / "h.db")
    for close in (ChatHistoryTitler.close, lambda titler: asyncio.run(titler.close_async())):
        store.write_messages("h", [ChatMessage.from_user("Rome?")])
        assert (tmp_path / "h.db-wal").exists()
        with pytest.raises(RuntimeError, match="stuck"):
            close(ChatHistoryTitler(store, Stuck("x")))
        assert not (tmp_path / "h.db-wal").exists()


def test_titler_comes_after_the_writer_in_a_pipeline():
    store = InMemoryChatMessageStore(namespace="titler")
    pipeline = Pipeline()
    pipeline.add_component("titler", ChatHistoryTitler(store, MockChatGenerator("Rome")))
    pipeline.add_component("writer", ChatMessageWriter(store))
    pipeline.connect("writer.messages_written", "titler.messages_written")
    pipeline = Pipeline.loads(pipeline.dumps())
    messages = [ChatMessage.from_user("Rome?"), ChatMessage.from_assistant("Sunny.")]
    found = pipeline.run(
        {"writer": {"chat_history_id": "chat", "messages": messages}, "titler": {"chat_history_id": "chat"}}
    )
    assert found["titler"] == {"title": "Rome"}
    store.delete_all_messages()


def test_store_that_keeps_no_titles_is_refused(store):
    class Plain:
        to_dict = from_dict = count_messages = write_messages = retrieve_messages = replace
        delete_messages = delete_all_messages = replace

    with pytest.raises(ValueError, match="keeps no titles"):
        ChatHistoryTitler(Plain(), MockChatGenerator("x"))
