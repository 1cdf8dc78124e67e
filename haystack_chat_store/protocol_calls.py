# SPDX-License-Identifier: Apache-2.0
"""
Calls of components to any store that follows the protocol, also to stores of other packages.

The protocol requires no asynchronous methods, and no `close`, `window_step`, `policy`, `expected_revision`,
`retrieve_window` or `replace_messages`.
"""

import asyncio
import inspect
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeGuard, TypeVar, cast

from haystack import DeserializationError, default_from_dict
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.conversation.rounds import LastKUnit, Window, last_rounds
from haystack_chat_store.conversation.turns import answers_to_others
from haystack_chat_store.errors import (
    ChatHistoryChangedError,
    DuplicateMessageError,
    MessageEncodingError,
    UnsupportedOperationError,
)
from haystack_chat_store.ids import message_id_of, question_id_of
from haystack_chat_store.types import AsyncChatMessageStore, ChatMessageStore, HistoryWindow
from haystack_chat_store.validation import validated_id, validated_policy

ComponentT = TypeVar("ComponentT")

# A `last_k` that is larger than any history, and small enough for any database.
_LARGE_LAST_K = 2**31 - 1

#: How often a write is tried again because others have written to the history meanwhile.
MOST_ATTEMPTS = 100

# If a page does not have what is looked for, the next page is larger by this factor.
_PAGE_GROWTH = 8

# How the errors of a write begin that concern one message of the batch, and their types.
_ITEM = re.compile(r"messages\[(\d+)\]")
_RENAMED_ERRORS = (ValueError, MessageEncodingError, DuplicateMessageError)


def component_from_dict(kind: type[ComponentT], data: dict[str, Any]) -> ComponentT:
    """
    Create a component with its store from the result of `to_dict`.

    :param kind: The component's class.
    :param data: The serialized component. It is not changed.
    :raises DeserializationError: If the store is missing, or its class cannot be imported or is not trusted.
    """
    store = (data.get("init_parameters") or {}).get("chat_message_store")
    if not isinstance(store, dict) or "type" not in store:
        raise DeserializationError("init_parameters must have a 'chat_message_store' with the 'type' of the store.")
    try:
        return default_from_dict(kind, data)
    except ImportError as error:
        raise DeserializationError(f"The store's class {store['type']} cannot be imported: {error}") from error


def _follows(store: object, protocol: type) -> bool:
    """Whether a store has a protocol's methods. Since Python 3.12, `isinstance` overlooks those of `__getattr__`."""
    return all(callable(getattr(store, name, None)) for name in dir(protocol) if not name.startswith("_"))


def _is_asynchronous(store: ChatMessageStore) -> TypeGuard[AsyncChatMessageStore]:
    return _follows(store, AsyncChatMessageStore)


def validated_store(store: Any) -> ChatMessageStore:
    """
    Return the store if it follows the protocol.

    :raises ValueError: If it does not, or if it is a class.
    """
    if isinstance(store, type) or not _follows(store, ChatMessageStore):
        got = f"the class {store.__name__}" if isinstance(store, type) else type(store).__name__
        raise ValueError(f"chat_message_store must be a ChatMessageStore such as SQLiteChatMessageStore(), got {got}.")
    return cast(ChatMessageStore, store)


def for_user(store: ChatMessageStore, user_id: str | None, *, is_required: bool = False) -> ChatMessageStore:
    """
    Return a store for the user of a run: the same store, which sees and changes only this user's histories.

    :param user_id: The user, or `None`: then the store is returned as it is.
    :param is_required: Whether a run without a user is refused.
    :raises ValueError: If there is no user though one is required, or the store has no users.
    :raises ChatHistoryAccessError: If it is the store of another user.
    """
    if user_id is None:
        if is_required:
            raise ValueError("This run has no user_id, and require_user_id=True. Pass the id of the user.")
        return store
    user = validated_id(user_id, "user_id")
    try:
        if hasattr(store, "for_user"):
            narrowed: ChatMessageStore = store.for_user(user)
            return narrowed
    except UnsupportedOperationError:
        pass
    raise ValueError(f"{type(store).__name__} has no users, so user_id cannot be given with it.")


def last_k_unit(store: ChatMessageStore) -> LastKUnit:
    """Return the unit of a store's `last_k`. A store without `last_k_unit` is treated as one that counts messages."""
    return "round" if getattr(store, "last_k_unit", None) == "round" else "message"


def default_last_k(store: ChatMessageStore) -> int | None:
    """Return a store's own `last_k`. A store without `last_k` is treated as one that returns whole histories."""
    last_k: int | None = getattr(store, "last_k", None)
    return last_k


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


def retrieve(store: ChatMessageStore, chat_history_id: str, last_k: int | None, window_step: int = 1) -> Retrieved:
    """
    Call a store's `retrieve_window` or, if it has none, its `retrieve_messages`.

    If that does not take `window_step`, read the whole history and cut out the window, in rounds.
    """
    if hasattr(store, "retrieve_window"):
        return _retrieved(store.retrieve_window(chat_history_id, last_k, window_step=window_step))
    last_k, options, window = _read_of(store, last_k, window_step)
    if last_k == 0:
        return Retrieved([])  # a store of another package may slice with `messages[-0:]`, which is the whole history
    return _cut(store.retrieve_messages(chat_history_id, last_k, **options), window)


async def retrieve_async(
    store: ChatMessageStore, chat_history_id: str, last_k: int | None, window_step: int = 1
) -> Retrieved:
    """Do what `retrieve` does, without blocking the event loop: methods that are not asynchronous run in a thread."""
    if hasattr(store, "retrieve_window_async"):
        return _retrieved(await store.retrieve_window_async(chat_history_id, last_k, window_step=window_step))
    if hasattr(store, "retrieve_window") or not _is_asynchronous(store):
        return await asyncio.to_thread(retrieve, store, chat_history_id, last_k, window_step)
    last_k, options, window = _read_of(store, last_k, window_step)
    if last_k == 0:
        return Retrieved([])
    return _cut(await store.retrieve_messages_async(chat_history_id, last_k, **options), window)


def _retrieved(window: HistoryWindow) -> Retrieved:
    return Retrieved(window.messages, window.revision, window.round_count)


class _Read(NamedTuple):
    """
    The arguments of a store's `retrieve_messages`, and the window to cut out of its result, or `None` for all of it.
    """

    last_k: int | None
    options: dict[str, Any]
    window: Window | None


def _read_of(store: ChatMessageStore, last_k: int | None, window_step: int) -> _Read:
    if window_step == 1:
        return _Read(last_k, {}, None)
    if _takes(store.retrieve_messages, "window_step"):
        return _Read(last_k, {"window_step": window_step}, None)
    count = default_last_k(store) if last_k is None else last_k
    return _Read(_LARGE_LAST_K, {}, Window("round", count, window_step))


def _takes(method: Callable[..., Any], name: str) -> bool:
    """Whether a method takes a keyword argument. One that takes any, such as that of a wrapper, is taken to."""
    parameters = inspect.signature(method).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _cut(messages: list[ChatMessage], window: Window | None) -> Retrieved:
    if window is None:
        return Retrieved(messages)
    return Retrieved([] if window.count == 0 else last_rounds(messages, window))


def has_message(store: ChatMessageStore, chat_history_id: str, message_id: str) -> bool:
    """
    Whether a history has a message. This is a look into an index.

    If the store's engine has no such operation, or the store has no engine, read the whole history.
    """
    engine: Any = getattr(store, "engine", None)
    try:
        if hasattr(engine, "position"):
            scope = store.scope  # type: ignore[attr-defined]  # what has an engine has a scope
            return engine.run(engine.position, scope, chat_history_id, message_id) is not None
    except UnsupportedOperationError:
        pass
    return message_id in map(message_id_of, store.retrieve_messages(chat_history_id, _LARGE_LAST_K))


async def has_message_async(store: ChatMessageStore, chat_history_id: str, message_id: str) -> bool:
    """Do what `has_message` does, without blocking the event loop."""
    engine: Any = getattr(store, "engine", None)
    try:
        if hasattr(engine, "position"):
            scope = store.scope  # type: ignore[attr-defined]  # what has an engine has a scope
            return await engine.run_async(engine.position, scope, chat_history_id, message_id) is not None
    except UnsupportedOperationError:
        pass
    return message_id in map(message_id_of, (await retrieve_async(store, chat_history_id, _LARGE_LAST_K)).messages)


def write_options(store: ChatMessageStore, policy: DuplicatePolicy, expected_revision: int | None) -> dict[str, Any]:
    """
    Return the keyword arguments of a store's `write_messages` that differ from their defaults.

    :raises ValueError: If `policy` is wrong, or the store does not take one of these arguments.
    """
    options: dict[str, Any] = {}
    if validated_policy(policy) is not DuplicatePolicy.SKIP:
        options["policy"] = policy
    if expected_revision is not None:
        options["expected_revision"] = expected_revision
    for name in options:
        if not _takes(store.write_messages, name):
            raise ValueError(f"write_messages of {type(store).__name__} does not take {name}.")
    return options


def takes_revisions(store: ChatMessageStore) -> bool:
    """Whether a store says which revision it has read, and can refuse a write to a history that has another one."""
    return hasattr(store, "retrieve_window") and _takes(store.write_messages, "expected_revision")


async def write_async(
    store: ChatMessageStore, chat_history_id: str, messages: list[ChatMessage], **options: Any
) -> int:
    """Await a store's `write_messages_async`. If the store has none, run `write_messages` in a thread."""
    if _is_asynchronous(store):
        return await store.write_messages_async(chat_history_id, messages, **options)
    return await asyncio.to_thread(store.write_messages, chat_history_id, messages, **options)


def validate_replaces(store: ChatMessageStore) -> None:
    """
    Check that a store can replace messages.

    :raises ValueError: If it has no `replace_messages`.
    """
    if not hasattr(store, "replace_messages"):
        raise ValueError(
            f"{type(store).__name__} has no replace_messages, so replace_from_message_id cannot be given with it."
        )


class _LastRounds(NamedTuple):
    """A request for the last rounds of the history."""

    last_k: int


class _IsStored(NamedTuple):
    """The question whether the history has a message."""

    message_id: str


class _Replace(NamedTuple):
    """A request to replace messages by a batch. If the store refuses it, the error is sent back as the result."""

    messages: list[ChatMessage]
    options: dict[str, Any]


# Yields requests, receives what they ask for, and returns the number of messages that were appended.
_Replacing: TypeAlias = Generator[_LastRounds | _IsStored | _Replace, Any, int]


def replace_keeping_other_answers(
    store: ChatMessageStore, chat_history_id: str, from_message_id: str, messages: list[ChatMessage], **options: Any
) -> int:
    """
    Call a store's `replace_messages`, and keep later answers to other questions.

    A message after the replaced one may answer an earlier question. It is written again, before the batch, and so
    stays. What answers the same question as the replaced message goes.

    :param from_message_id: The id of the first message to replace.
    :param messages: The batch that takes its place.
    :param options: Further arguments of `replace_messages`, such as `expected_revision`.
    :returns: The number of messages of the batch that were appended.
    :raises MessageNotFoundError: If the history does not have `from_message_id`.
    :raises ChatHistoryChangedError: If the history has another revision than `expected_revision`. Without it, if others
        change the history before each of `MOST_ATTEMPTS` attempts.
    """
    requests = _replacing(store, from_message_id, messages, options)
    found: Any = None
    while True:
        try:
            request = requests.send(found)
        except StopIteration as done:
            return int(done.value)
        if isinstance(request, _LastRounds):
            found = retrieve(store, chat_history_id, request.last_k)
        elif isinstance(request, _IsStored):
            found = has_message(store, chat_history_id, request.message_id)
        else:
            try:
                found = store.replace_messages(  # type: ignore[attr-defined]  # see validate_replaces
                    chat_history_id, from_message_id, request.messages, **request.options
                )
            except ChatHistoryChangedError as error:
                found = error


async def replace_keeping_other_answers_async(
    store: ChatMessageStore, chat_history_id: str, from_message_id: str, messages: list[ChatMessage], **options: Any
) -> int:
    """
    Do what `replace_keeping_other_answers` does.

    If the store has no `replace_messages_async`, run it in a thread.
    """
    if not hasattr(store, "replace_messages_async"):
        return await asyncio.to_thread(
            replace_keeping_other_answers, store, chat_history_id, from_message_id, messages, **options
        )
    requests = _replacing(store, from_message_id, messages, options)
    found: Any = None
    while True:
        try:
            request = requests.send(found)
        except StopIteration as done:
            return int(done.value)
        if isinstance(request, _LastRounds):
            found = await retrieve_async(store, chat_history_id, request.last_k)
        elif isinstance(request, _IsStored):
            found = await has_message_async(store, chat_history_id, request.message_id)
        else:
            try:
                found = await store.replace_messages_async(
                    chat_history_id, from_message_id, request.messages, **request.options
                )
            except ChatHistoryChangedError as error:
                found = error


def _replacing(
    store: ChatMessageStore, from_message_id: str, messages: list[ChatMessage], options: dict[str, Any]
) -> _Replacing:
    is_expected, takes = "expected_revision" in options, takes_revisions(store)
    for _ in range(MOST_ATTEMPTS):
        staying: list[ChatMessage] = []
        at: dict[str, Any] = options
        if takes:
            rounds = 1
            page: Retrieved = yield _LastRounds(rounds)
            while from_message_id not in map(message_id_of, page.messages) and len(page.messages) >= rounds:
                rounds *= _PAGE_GROWTH
                page = yield _LastRounds(rounds)
            others = answers_to_others(page.messages, from_message_id)
            for question_id in {str(question_id_of(each)) for each in others}:
                if (yield _IsStored(question_id)):
                    staying += [each for each in others if question_id_of(each) == question_id]
            at = options if is_expected else {**options, "expected_revision": page.revision}
        written = yield _Replace([*staying, *messages], at)
        if isinstance(written, int):
            return max(written - len(staying), 0)
        if is_expected or not takes:
            break
    raise written


@contextmanager
def arguments_named(names: Sequence[str]) -> Iterator[None]:
    """
    Make the errors of a write name the arguments that the user gave, not the items of the batch made of them.

    :param names: The name of each message of the batch, such as `replies[0]`.
    """
    try:
        yield
    except (ValueError, DuplicateMessageError) as error:
        item = _ITEM.match(str(error))
        if item is None or int(item[1]) >= len(names) or type(error) not in _RENAMED_ERRORS:
            raise
        raise type(error)(names[int(item[1])] + str(error)[item.end() :]) from error.__cause__


def close(store: ChatMessageStore) -> None:
    """Close a store, if it has `close`."""
    if hasattr(store, "close"):
        store.close()


async def close_async(store: ChatMessageStore) -> None:
    """Close a store, if it has `close` or `close_async`, without blocking the event loop."""
    if hasattr(store, "close_async"):
        await store.close_async()
    else:
        await asyncio.to_thread(close, store)
