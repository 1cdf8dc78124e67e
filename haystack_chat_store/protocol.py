# SPDX-License-Identifier: Apache-2.0
"""
What components can ask of any store that follows the protocol, also of a store of another package.

The protocol requires no asynchronous methods, and no `close`, `window_step`, `policy`, `expected_revision`,
`retrieve_window` or `replace_messages`.
"""

import asyncio
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar, cast

from haystack import DeserializationError, default_from_dict
from haystack.document_stores.types import DuplicatePolicy

from haystack_chat_store.conversation.rounds import LastKUnit
from haystack_chat_store.errors import DuplicateMessageError, MessageEncodingError, UnsupportedOperationError
from haystack_chat_store.types import AsyncChatMessageStore, ChatMessageStore
from haystack_chat_store.validation import validated_id, validated_policy

ComponentT = TypeVar("ComponentT")

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


def is_asynchronous(store: ChatMessageStore) -> TypeGuard[AsyncChatMessageStore]:
    """Whether a store has asynchronous methods."""
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


def takes(method: Callable[..., Any], name: str) -> bool:
    """Whether a method takes a keyword argument. One that takes any, such as that of a wrapper, is taken to."""
    parameters = inspect.signature(method).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


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
        if not takes(store.write_messages, name):
            raise ValueError(f"write_messages of {type(store).__name__} does not take {name}.")
    return options


def takes_revisions(store: ChatMessageStore) -> bool:
    """Whether a store says which revision it has read, and can refuse a write to a history that has another one."""
    return hasattr(store, "retrieve_window") and takes(store.write_messages, "expected_revision")


def validate_replaces(store: ChatMessageStore) -> None:
    """
    Check that a store can replace messages.

    :raises ValueError: If it has no `replace_messages`.
    """
    if not hasattr(store, "replace_messages"):
        raise ValueError(
            f"{type(store).__name__} has no replace_messages, so replace_from_message_id cannot be given with it."
        )


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
