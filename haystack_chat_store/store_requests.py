# SPDX-License-Identifier: Apache-2.0
"""
Work on a history that is written once for both ways to call a store.

A generator yields requests to the store, and receives what they find. `run` carries them out by the store's synchronous
methods, `run_async` by its asynchronous ones. An error is raised where the request was made, so the generator can
handle it.

The store may be any that follows the protocol, also that of another package. The protocol requires no asynchronous
methods, and no `window_step`, `retrieve_window` or `replace_messages`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from haystack.dataclasses import ChatMessage

from haystack_chat_store.conversation.rounds import Window, last_rounds
from haystack_chat_store.conversation.turns import answers_to_others
from haystack_chat_store.errors import ChatHistoryChangedError, MessageNotFoundError, UnsupportedOperationError
from haystack_chat_store.ids import message_id_of, question_id_of
from haystack_chat_store.protocol import default_last_k, is_asynchronous, takes, takes_revisions
from haystack_chat_store.types import ChatMessageStore, HistoryWindow

# How often a write is tried because others have written to the history meanwhile.
_MOST_ATTEMPTS = 100

# A `last_k` that is larger than any history, and small enough for any database.
_LARGE_LAST_K = 2**31 - 1
# If a page does not have what is looked for, the next page is larger by this factor.
_PAGE_GROWTH = 8

ResultT = TypeVar("ResultT")


class Request(ABC):
    """A request to a store about a history."""

    @abstractmethod
    def run(self, store: Any, chat_history_id: str) -> Any:
        """Carry out the request, and return what it finds."""

    @abstractmethod
    async def run_async(self, store: Any, chat_history_id: str) -> Any:
        """Do what `run` does, without blocking the event loop."""


#: A generator that yields requests, receives what they find, and returns the result of the work.
Requests: TypeAlias = Generator[Request, Any, ResultT]


def run(requests: Requests[ResultT], store: ChatMessageStore, chat_history_id: str) -> ResultT:
    """
    Carry out requests one after the other, and return the result of the work.

    :param store: The store that keeps the history.
    :param chat_history_id: The history's id.
    :raises Exception: What a request raises and the generator does not handle.
    """
    step = _next(requests)
    while isinstance(step, Request):
        try:
            found = step.run(store, chat_history_id)
        except Exception as error:
            step = _next(requests, error=error)
        else:
            step = _next(requests, found)
    return step.value


async def run_async(
    requests: Requests[ResultT], store: ChatMessageStore, chat_history_id: str, *, computes_in_thread: bool = False
) -> ResultT:
    """
    Do what `run` does, without blocking the event loop. A store without asynchronous methods runs in a thread.

    :param store: The store that keeps the history.
    :param chat_history_id: The history's id.
    :param computes_in_thread: Whether what the generator does between its requests may take long, and so runs in a
        thread. Defaults to False.
    """

    async def next_step(found: Any = None, error: Exception | None = None) -> "Request | _Result[ResultT]":
        if computes_in_thread:
            return await asyncio.to_thread(_next, requests, found, error)
        return _next(requests, found, error)

    step = await next_step()
    while isinstance(step, Request):
        try:
            found = await step.run_async(store, chat_history_id)
        except Exception as error:
            step = await next_step(error=error)
        else:
            step = await next_step(found)
    return step.value


@dataclass(frozen=True)
class _Result(Generic[ResultT]):
    """The result of the work, after the last request."""

    value: ResultT


def _next(requests: Requests[ResultT], found: Any = None, error: Exception | None = None) -> Request | _Result[ResultT]:
    """Pass on what was found, or the error, and return the next request or the result."""
    try:
        return requests.send(found) if error is None else requests.throw(error)
    except StopIteration as done:
        return _Result(done.value)


class Retrieved(NamedTuple):
    """
    A window of a history.

    :param messages: The messages, oldest first.
    :param revision: The history's revision, 0 if it does not exist, or `None` if the store does not say.
    :param round_count: The number of rounds in the whole history, or `None` if the store does not say.
    """

    messages: list[ChatMessage]
    revision: int | None = None
    round_count: int | None = None


@dataclass(frozen=True)
class Retrieve(Request):
    """
    A request for the last rounds or messages of a history: a `Retrieved`.

    It calls the store's `retrieve_window` or, if the store has none, its `retrieve_messages`. If that does not take
    `window_step`, the whole history is read and the window is cut out, in rounds.

    :param last_k: The number of rounds or messages, in the store's unit, or `None` for the store's own.
    :param window_step: The start of the window moves in steps of this many rounds. Defaults to 1.
    """

    last_k: int | None
    window_step: int = 1

    def run(self, store: ChatMessageStore, chat_history_id: str) -> Retrieved:
        """Read the rounds or messages."""
        if hasattr(store, "retrieve_window"):
            return _retrieved(store.retrieve_window(chat_history_id, self.last_k, window_step=self.window_step))
        last_k, options, window = self._arguments(store)
        if last_k == 0:
            return Retrieved([])  # another package's store may slice with `messages[-0:]`, which is the whole history
        return _cut(store.retrieve_messages(chat_history_id, last_k, **options), window)

    async def run_async(self, store: ChatMessageStore, chat_history_id: str) -> Retrieved:
        """Do what `run` does, without blocking the event loop."""
        if hasattr(store, "retrieve_window_async"):
            return _retrieved(
                await store.retrieve_window_async(chat_history_id, self.last_k, window_step=self.window_step)
            )
        if hasattr(store, "retrieve_window") or not is_asynchronous(store):
            return await asyncio.to_thread(self.run, store, chat_history_id)
        last_k, options, window = self._arguments(store)
        if last_k == 0:
            return Retrieved([])
        return _cut(await store.retrieve_messages_async(chat_history_id, last_k, **options), window)

    def _arguments(self, store: ChatMessageStore) -> tuple[int | None, dict[str, Any], Window | None]:
        """Return `last_k` and the options of `retrieve_messages`, and the window to cut out of what it returns."""
        if self.window_step == 1:
            return self.last_k, {}, None
        if takes(store.retrieve_messages, "window_step"):
            return self.last_k, {"window_step": self.window_step}, None
        count = default_last_k(store) if self.last_k is None else self.last_k
        return _LARGE_LAST_K, {}, Window("round", count, self.window_step)


def _retrieved(window: HistoryWindow) -> Retrieved:
    return Retrieved(window.messages, window.revision, window.round_count)


def _cut(messages: list[ChatMessage], window: Window | None) -> Retrieved:
    if window is None:
        return Retrieved(messages)
    return Retrieved([] if window.count == 0 else last_rounds(messages, window))


@dataclass(frozen=True)
class HasMessage(Request):
    """
    The question whether a history has a message. This is a look into an index.

    If the store's engine has no such operation, or the store has no engine, the whole history is read.
    """

    message_id: str

    def run(self, store: Any, chat_history_id: str) -> bool:
        """Look the message up."""
        engine: Any = getattr(store, "engine", None)
        try:
            if hasattr(engine, "position"):
                return engine.run(engine.position, store.scope, chat_history_id, self.message_id) is not None
        except UnsupportedOperationError:
            pass
        return self._is_in(Retrieve(_LARGE_LAST_K).run(store, chat_history_id))

    async def run_async(self, store: Any, chat_history_id: str) -> bool:
        """Do what `run` does, without blocking the event loop."""
        engine: Any = getattr(store, "engine", None)
        try:
            if hasattr(engine, "position"):
                position = await engine.run_async(engine.position, store.scope, chat_history_id, self.message_id)
                return position is not None
        except UnsupportedOperationError:
            pass
        return self._is_in(await Retrieve(_LARGE_LAST_K).run_async(store, chat_history_id))

    def _is_in(self, history: Retrieved) -> bool:
        return self.message_id in map(message_id_of, history.messages)


@dataclass(frozen=True)
class Write(Request):
    """A request to append messages: the number of messages written. `options` are arguments of `write_messages`."""

    messages: list[ChatMessage]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, store: ChatMessageStore, chat_history_id: str) -> int:
        """Append the messages."""
        return store.write_messages(chat_history_id, self.messages, **self.options)

    async def run_async(self, store: ChatMessageStore, chat_history_id: str) -> int:
        """Do what `run` does, without blocking the event loop."""
        if is_asynchronous(store):
            return await store.write_messages_async(chat_history_id, self.messages, **self.options)
        return await asyncio.to_thread(self.run, store, chat_history_id)


@dataclass(frozen=True)
class _Replace(Request):
    """A request to replace messages: the number of messages written. `options` are arguments of `replace_messages`."""

    from_message_id: str
    messages: list[ChatMessage]
    options: dict[str, Any]

    def run(self, store: Any, chat_history_id: str) -> int:
        written: int = store.replace_messages(chat_history_id, self.from_message_id, self.messages, **self.options)
        return written

    async def run_async(self, store: Any, chat_history_id: str) -> int:
        if not hasattr(store, "replace_messages_async"):
            return await asyncio.to_thread(self.run, store, chat_history_id)
        written: int = await store.replace_messages_async(
            chat_history_id, self.from_message_id, self.messages, **self.options
        )
        return written


def read_until(is_enough: Callable[[Sequence[ChatMessage]], bool], rounds: int = 1) -> Requests[Retrieved]:
    """
    Read the end of a history, in growing pages, until it is enough or the whole history.

    :param is_enough: Whether a page has what is looked for.
    :param rounds: The size of the first page, in rounds. Defaults to 1.
    """
    while True:
        page: Retrieved = yield Retrieve(rounds)
        if is_enough(page.messages) or len(page.messages) < rounds:
            return page
        rounds *= _PAGE_GROWTH


def append_answer(
    store: ChatMessageStore, messages: list[ChatMessage], question_id: str | int | None, options: dict[str, Any]
) -> Requests[int]:
    """
    Append messages only as long as the history has the question that they answer.

    :param store: The store that the requests go to. It is asked what it can do.
    :param messages: The messages.
    :param question_id: The id of their question, or `None` if there is none.
    :param options: Further arguments of `write_messages`.
    :returns: The number of messages written.
    :raises MessageNotFoundError: If the history does not have the question. Nothing was written.
    :raises ChatHistoryChangedError: If the history has another revision than `expected_revision`. Without it, if others
        change the history before each of 100 attempts.
    """
    names_revision = "expected_revision" in options or not takes_revisions(store)
    attempts = 0
    while True:
        page: Retrieved = yield Retrieve(1)
        is_stored = question_id is not None and question_id in map(message_id_of, page.messages)
        if not is_stored and (question_id is None or not (yield HasMessage(str(question_id)))):
            raise question_is_gone(question_id)
        try:
            return int(
                (yield Write(messages, options if names_revision else {**options, "expected_revision": page.revision}))
            )
        except ChatHistoryChangedError:
            attempts += 1
            if names_revision or attempts == _MOST_ATTEMPTS:
                raise


def question_is_gone(question_id: str | int | None) -> MessageNotFoundError:
    """Return the error of an answer to a question that the history does not have, or not any more."""
    if question_id is None:
        return MessageNotFoundError(
            "The history has no question that this could answer: there was none, or it was deleted while the model "
            "answered. Nothing was written."
        )
    return MessageNotFoundError(
        f"The history has no question with the id {question_id!r}: it was deleted while the model answered. Nothing "
        "was written."
    )


def replace_keeping_others(
    store: ChatMessageStore, from_message_id: str, messages: list[ChatMessage], options: dict[str, Any]
) -> Requests[int]:
    """
    Replace a message and all after it by a batch, and keep later answers to other questions.

    A message after the replaced one may answer an earlier question. It is written again, before the batch, and so
    stays. What answers the same question as the replaced message goes.

    :param store: The store that the requests go to. It is asked what it can do.
    :param from_message_id: The id of the first message to replace.
    :param messages: The batch that takes its place.
    :param options: Further arguments of `replace_messages`, such as `expected_revision`.
    :returns: The number of messages of the batch that were appended.
    :raises MessageNotFoundError: If the history does not have `from_message_id`.
    :raises ChatHistoryChangedError: If the history has another revision than `expected_revision`. Without it, if others
        change the history before each of 100 attempts.
    """
    if not takes_revisions(store):
        return int((yield _Replace(from_message_id, messages, options)))
    attempts = 0
    while True:
        page = yield from read_until(lambda read: from_message_id in map(message_id_of, read))
        staying: list[ChatMessage] = []
        others = answers_to_others(page.messages, from_message_id)
        for question_id in {str(question_id_of(each)) for each in others}:
            if (yield HasMessage(question_id)):
                staying += [each for each in others if question_id_of(each) == question_id]
        at = {"expected_revision": page.revision, **options}
        try:
            written: int = yield _Replace(from_message_id, [*staying, *messages], at)
            return max(written - len(staying), 0)
        except ChatHistoryChangedError:
            attempts += 1
            if "expected_revision" in options or attempts == _MOST_ATTEMPTS:
                raise
