# SPDX-License-Identifier: Apache-2.0
"""
The base of all tests of the contract.

It has the fixtures, the two ways of calling a store, the attributes that describe an engine, and the exact comparison
of messages.
"""

import asyncio
import functools
import threading
from collections.abc import Callable, Container, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import pytest
from haystack.dataclasses import ChatMessage
from hypothesis import settings

from haystack_chat_store.errors import UnsupportedOperationError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.stores.rows import MessageRow
from haystack_chat_store.types import AsyncChatMessageStore

TestT = TypeVar("TestT", bound=Callable[..., Any])


class ClosableStore(AsyncChatMessageStore, Protocol):
    """A store that the contract is checked on: it has all calls, both ways, and can be closed."""

    def close(self) -> None:
        """Release the store's connections."""
        ...

    async def close_async(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        ...


#: Makes a store from the settings of all stores: `skip_system_messages`, `last_k`, `last_k_unit`,
#: `namespace`, `search`, `strict`, `user_id`, `ttl`, `renew_ttl_on_read`.
StoreFactory = Callable[..., ClosableStore]


class Calls:
    """
    One of the two ways of calling a store: its methods, or their asynchronous twins.

    The thread of the test makes all its asynchronous calls in one event loop. Every other thread has its own loop.
    """

    def __init__(self, *, is_async: bool) -> None:
        """
        Choose between the methods and their asynchronous twins.

        :param is_async: Whether to call the asynchronous twins.
        """
        self._loop = asyncio.new_event_loop() if is_async else None
        self._thread = threading.get_ident()

    def end(self) -> None:
        """Close the event loop."""
        if self._loop is not None:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def write(self, store: ClosableStore, chat_history_id: Any, messages: Any, **options: Any) -> int:
        """Call `write_messages`."""
        written: int = self.call(store, "write_messages", chat_history_id, messages, **options)
        return written

    def retrieve(self, store: ClosableStore, chat_history_id: Any, **window: Any) -> list[ChatMessage]:
        """Call `retrieve_messages`, with `last_k` and `window_step` only if they are given."""
        messages: list[ChatMessage] = self.call(store, "retrieve_messages", chat_history_id, **window)
        return messages

    def count(self, store: ClosableStore, chat_history_id: Any) -> int:
        """Call `count_messages`."""
        count: int = self.call(store, "count_messages", chat_history_id)
        return count

    def delete(self, store: ClosableStore, chat_history_id: Any, **options: Any) -> None:
        """Call `delete_messages`."""
        self.call(store, "delete_messages", chat_history_id, **options)

    def delete_all(self, store: ClosableStore) -> None:
        """Call `delete_all_messages`."""
        self.call(store, "delete_all_messages")

    def close(self, store: ClosableStore) -> None:
        """Call `close`."""
        self.call(store, "close")

    def iterate(self, store: ClosableStore, chat_history_id: str) -> list[Any]:
        """Return all messages that `iterate_messages` yields."""
        if self._loop is None:
            return list(store.iterate_messages(chat_history_id))  # type: ignore[attr-defined]  # not in the protocol

        async def walked() -> list[Any]:
            found = store.iterate_messages_async(chat_history_id)  # type: ignore[attr-defined]  # likewise
            return [stored async for stored in found]

        return self._loop.run_until_complete(walked())

    def call(self, store: Any, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of a store, or of what uses one, by its name without `_async`."""
        if self._loop is None:
            return getattr(store, method)(*arguments, **options)

        async def call() -> Any:
            return await getattr(store, f"{method}_async")(*arguments, **options)

        return self._loop.run_until_complete(call()) if threading.get_ident() == self._thread else asyncio.run(call())


def only_where(stated: str) -> Callable[[TestT], TestT]:
    """
    Mark a test that exists only for engines with a certain attribute.

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


def _skipped_without(lacks: AbstractSet[str], test: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test that is skipped when it comes to an operation that the engine does not have."""

    @functools.wraps(test)
    def skipping(*arguments: Any, **fixtures: Any) -> Any:
        try:
            return test(*arguments, **fixtures)
        except UnsupportedOperationError as error:
            if error.operation not in lacks:
                raise
            pytest.skip(f"The engine lacks the operation {error.operation!r}.")

    return skipping


class ContractTest:
    """
    The base of all tests of the contract. It has the attributes that a store's author sets, and the fixtures.

    Only `make_store` must be provided. The defaults of the other attributes suit most engines.
    """

    #: Whether histories outlive the process, so that other processes can read them. False for a store in memory.
    durable = True

    #: The longest `chat_history_id` and message id that the store takes, in characters.
    max_id_length = 512

    #: The longest `namespace` that the store takes, in characters.
    max_namespace_length = 128

    #: Whether the engine can search, so that stores can be made with `search=True`.
    searches = True

    #: Whether `retrieve_messages` accepts `window_step`, which is not part of the published protocol.
    takes_window_step = True

    #: Whether `write_messages` accepts `policy` and `expected_revision`, which are not part of the published protocol.
    takes_policy = True

    #: The names of the optional operations that the engine does not have, such as `{"search", "index_some"}`. A test
    #: that comes to one of them is skipped. `ManagementContract` fails if the engine has one of them.
    lacks: AbstractSet[str] = frozenset()

    #: Override it with a fixture like `make_store` whose stores use an engine that does not answer: a server that does
    #: not exist, or a file in a folder that does not exist. Tests that need it exist only where it is overridden.
    make_unreachable_store: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Remove the tests marked with `only_where` that do not apply to this engine."""
        super().__init_subclass__(**options)
        # Sorted, because pytest runs tests in the order in which they are set.
        for name in sorted(set(dir(cls)).difference(vars(cls))):
            definitions = [vars(base)[name] for base in cls.__mro__[1:] if vars(base).get(name) is not None]
            stated = getattr(definitions[0], "only_where", None) if definitions else None
            if stated is not None:
                setattr(cls, name, definitions[0] if getattr(cls, stated) else None)
            if cls.lacks and name.startswith("test_") and callable(test := getattr(cls, name)):
                setattr(cls, name, _skipped_without(cls.lacks, test))

    @pytest.fixture
    def make_store(self) -> StoreFactory:
        """
        Return a function that makes a store with the given settings. Every test class must override this fixture.

        All stores of one test use the same database, which is empty when the test begins.
        """
        raise NotImplementedError("Override the fixture make_store: it returns a function that makes a store.")

    @pytest.fixture
    def new_store(self, make_store: StoreFactory) -> Iterator[StoreFactory]:
        """Return a function like `make_store`. The stores it makes are closed at the end of the test."""
        made: list[ClosableStore] = []

        def new(**settings: Any) -> ClosableStore:
            made.append(make_store(**settings))
            return made[-1]

        yield new
        for store in made:
            store.close()

    @pytest.fixture
    def store(self, new_store: StoreFactory) -> ClosableStore:
        """Return a store with default settings on an empty database."""
        return new_store()

    @pytest.fixture(params=["sync", "async"])
    def calls(self, request: pytest.FixtureRequest) -> Iterator[Calls]:
        """Return one of the two ways of calling a store. A test that uses this fixture runs once for each."""
        calls = Calls(is_async=request.param == "async")
        yield calls
        calls.end()


def ids(messages: list[ChatMessage]) -> list[str]:
    """Return the ids of retrieved messages."""
    return [message.meta[MESSAGE_ID_KEY] for message in messages]


def message_rows(store: Any, chat_history_id: str, positions: Container[int]) -> list[MessageRow]:
    """Return what is stored of a history's messages at some positions."""
    rows: list[MessageRow] = store.engine.run(store.engine.page, store.scope, chat_history_id, None, None, 1000)
    return [row for row in rows if row.position in positions]


def texts(messages: list[ChatMessage]) -> list[str | None]:
    """Return the first text of each message."""
    return [message.text for message in messages]


def exactly(value: Any) -> Any:
    """
    Return a form of a value that compares types and signs too: the forms of 1, 1.0 and True differ.

    :param value: A message, a list of messages, or data of lists, dicts and scalars.
    """
    if isinstance(value, ChatMessage):
        return exactly(value.to_dict())
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exactly(item) for item in value]
    return type(value), repr(value) if isinstance(value, float) else value


def without_ids(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return copies of retrieved messages without ids, to compare them with the written messages."""
    return [
        replace(message, _meta={key: value for key, value in message.meta.items() if key != MESSAGE_ID_KEY})
        for message in messages
    ]
