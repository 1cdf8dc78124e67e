# SPDX-License-Identifier: Apache-2.0
"""
What all tests of the contract stand on.

The fixtures, the two ways of calling a store, what an engine states about itself, and exact comparison of messages.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import pytest
from haystack.dataclasses import ChatMessage
from hypothesis import settings

from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.types import AsyncChatMessageStore

TestT = TypeVar("TestT", bound=Callable[..., Any])


class ClosableStore(AsyncChatMessageStore, Protocol):
    """
    What the contract is checked on: a store with all calls, both ways, that can be closed.
    """

    def close(self) -> None:
        """
        Release what the store holds open.
        """
        ...

    async def close_async(self) -> None:
        """
        Do what `close` does, without blocking the event loop.
        """
        ...


#: Makes a store. Takes the settings that all stores have: `skip_system_messages`, `last_k`, `last_k_unit`, `namespace`.
StoreFactory = Callable[..., ClosableStore]


class Calls:
    """
    One of the two ways of calling a store: its methods, or their asynchronous twins.

    The test's own thread makes all asynchronous calls in one event loop, other threads each in a loop of its own.
    """

    def __init__(self, *, is_async: bool) -> None:
        """
        Choose the way.

        :param is_async: Whether to call the asynchronous twins.
        """
        self._loop = asyncio.new_event_loop() if is_async else None
        self._thread = threading.get_ident()

    def end(self) -> None:
        """
        Close the event loop.
        """
        if self._loop is not None:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def write(self, store: ClosableStore, chat_history_id: Any, messages: Any, **options: Any) -> int:
        """
        Call `write_messages`.
        """
        written: int = self.call(store, "write_messages", chat_history_id, messages, **options)
        return written

    def retrieve(self, store: ClosableStore, chat_history_id: Any, **window: Any) -> list[ChatMessage]:
        """
        Call `retrieve_messages`, with `last_k` and `window_step` only if they are given.
        """
        messages: list[ChatMessage] = self.call(store, "retrieve_messages", chat_history_id, **window)
        return messages

    def count(self, store: ClosableStore, chat_history_id: Any) -> int:
        """
        Call `count_messages`.
        """
        count: int = self.call(store, "count_messages", chat_history_id)
        return count

    def delete(self, store: ClosableStore, chat_history_id: Any, **options: Any) -> None:
        """
        Call `delete_messages`.
        """
        self.call(store, "delete_messages", chat_history_id, **options)

    def delete_all(self, store: ClosableStore) -> None:
        """
        Call `delete_all_messages`.
        """
        self.call(store, "delete_all_messages")

    def close(self, store: ClosableStore) -> None:
        """
        Call `close`.
        """
        self.call(store, "close")

    def iterate(self, store: ClosableStore, chat_history_id: str) -> list[Any]:
        """
        Walk through what `iterate_messages` yields.
        """
        if self._loop is None:
            return list(store.iterate_messages(chat_history_id))  # type: ignore[attr-defined]  # not in the protocol

        async def walked() -> list[Any]:
            found = store.iterate_messages_async(chat_history_id)  # type: ignore[attr-defined]  # likewise
            return [stored async for stored in found]

        return self._loop.run_until_complete(walked())

    def call(self, store: ClosableStore, method: str, *arguments: Any, **options: Any) -> Any:
        """
        Call a method by its name, without `_async`.
        """
        if self._loop is None:
            return getattr(store, method)(*arguments, **options)

        async def call() -> Any:
            return await getattr(store, f"{method}_async")(*arguments, **options)

        return self._loop.run_until_complete(call()) if threading.get_ident() == self._thread else asyncio.run(call())


def only_where(stated: str) -> Callable[[TestT], TestT]:
    """
    Mark a test that makes sense only for engines that state something about themselves; for others it does not exist.

    :param stated: The name of a class attribute that must be true, such as `"durable"`.
    """

    def mark(test: TestT) -> TestT:
        test.only_where = stated  # type: ignore[attr-defined]  # a mark for pytest's collection
        return test

    return mark


def number_of_examples(usual: int) -> int:
    """
    Return how many examples a hypothesis test tries: in proportion to the `max_examples` of the loaded profile.

    :param usual: The number with hypothesis' default profile, which has 100.
    """
    return max(1, usual * settings().max_examples // 100)


class ContractTest:
    """
    The base of all tests of the contract: what a store's author provides, and the fixtures built on it.

    Only `make_store` has to be provided. The other attributes have defaults that suit most engines.
    """

    #: Whether histories outlive the process, so that other processes see them. False for a store in memory.
    durable = True

    #: The longest `chat_history_id` and message id that the store takes, in characters.
    max_id_length = 512

    #: The longest `namespace` that the store takes, in characters.
    max_namespace_length = 128

    #: Whether the engine can search: whether stores may be made with `search=True`.
    searches = True

    #: Whether `retrieve_messages` takes `window_step`, which the published protocol does not have.
    takes_window_step = True

    #: Override it with a fixture like `make_store`, whose stores lead to an engine that does not answer: a server that
    #: is not there, a file in a folder that does not exist. Tests that need it exist only where it is overridden.
    make_unreachable_store: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        """
        Leave out the tests marked with `only_where` that make no sense for this engine.
        """
        super().__init_subclass__(**options)
        for name in sorted(set(dir(cls)).difference(vars(cls))):  # pytest runs tests in the order they are set
            definitions = [vars(base)[name] for base in cls.__mro__[1:] if vars(base).get(name) is not None]
            stated = getattr(definitions[0], "only_where", None) if definitions else None
            if stated is not None:
                setattr(cls, name, definitions[0] if getattr(cls, stated) else None)

    @pytest.fixture
    def make_store(self) -> StoreFactory:
        """
        Return a function that makes a store with the given settings. Every test class has to override this.

        All stores that it makes within one test lead to the same database, which is empty when the test begins.
        """
        raise NotImplementedError("Override the fixture make_store: it returns a function that makes a store.")

    @pytest.fixture
    def new_store(self, make_store: StoreFactory) -> Iterator[StoreFactory]:
        """
        Return `make_store`, but close at the end of the test what it made.
        """
        made: list[ClosableStore] = []

        def new(**settings: Any) -> ClosableStore:
            made.append(make_store(**settings))
            return made[-1]

        yield new
        for store in made:
            store.close()

    @pytest.fixture
    def store(self, new_store: StoreFactory) -> ClosableStore:
        """
        Return a store with default settings on an empty database.
        """
        return new_store()

    @pytest.fixture(params=["sync", "async"])
    def calls(self, request: pytest.FixtureRequest) -> Iterator[Calls]:
        """
        Return each of the two ways of calling a store. A test that uses this fixture runs both ways.
        """
        calls = Calls(is_async=request.param == "async")
        yield calls
        calls.end()


def ids(messages: list[ChatMessage]) -> list[str]:
    """
    Return the ids of retrieved messages.
    """
    return [message.meta[MESSAGE_ID_KEY] for message in messages]


def texts(messages: list[ChatMessage]) -> list[str | None]:
    """
    Return the first text of each message.
    """
    return [message.text for message in messages]


def exactly(value: Any) -> Any:
    """
    Return what is equal for two values only if they are the same in type and sign, too: not for 1, 1.0 and True.

    :param value: A message, a list of messages, or anything made of lists, dicts and scalars.
    """
    if isinstance(value, ChatMessage):
        return exactly(value.to_dict())
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exactly(item) for item in value]
    return type(value), repr(value) if isinstance(value, float) else value


def without_ids(messages: list[ChatMessage]) -> list[ChatMessage]:
    """
    Return copies of retrieved messages without the ids that the store gave them, to compare with what was written.
    """
    return [
        replace(message, _meta={key: value for key, value in message.meta.items() if key != MESSAGE_ID_KEY})
        for message in messages
    ]
