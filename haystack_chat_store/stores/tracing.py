# SPDX-License-Identifier: Apache-2.0
"""
Traces the operations of engines with Haystack's tracer, under the names of OpenTelemetry's conventions.

`gen_ai.*` are the conventions for generative AI, in which a chat history is a conversation and its messages are records
of a memory. `db.*` and `error.type` are the general ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from typing import Any

from haystack.document_stores.types import DuplicatePolicy
from haystack.tracing.tracer import NullTracer, tracer

from haystack_chat_store.stores.rows import EncodedMessage, FoundRow, MessageRow

# The operations for which the conventions have a name. Any other one is traced under its own name.
_CONVENTIONAL_NAMES = {
    "append": "create_memory",
    "copy": "create_memory",
    "import_history": "create_memory",
    "import_histories": "create_memory",
    "replace": "update_memory",
    "update_message": "update_memory",
    "read": "search_memory",
    "page": "search_memory",
    "search": "search_memory",
    "delete": "delete_memory",
    "delete_messages": "delete_memory",
    "delete_all": "delete_memory",
    "erase_some": "delete_memory",
    "remove": "delete_memory",
}
# The parameters in which operations are told what to create or delete.
_RECORDS = ("messages", "message_ids", "positions")


def is_tracing_enabled() -> bool:
    """Whether Haystack has a tracer. Unlike Haystack's own function, this costs next to nothing."""
    return type(tracer.actual_tracer) is not NullTracer


@contextmanager
def traced(
    system: str | None, operation: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> Iterator[Callable[[Any], None]]:
    """
    Open a span around an operation of an engine.

    :param system: The name of the database system.
    :param operation: The operation.
    :param arguments: Its positional arguments after the session.
    :param options: Its keyword arguments.
    :returns: In the `with` statement, a function that takes the operation's result.
    """
    named = {**dict(zip(_parameters(operation), arguments, strict=False)), **options}
    operation_name = operation.__name__
    name = _CONVENTIONAL_NAMES.get(operation_name, operation_name)
    if named.get("policy") is DuplicatePolicy.OVERWRITE:
        name = "upsert_memory"
    tags: dict[str, Any] = {"gen_ai.operation.name": name, "db.operation.name": operation_name}
    if system is not None:
        tags["db.system.name"] = system
    if (scope := named.get("scope")) is not None:
        tags["gen_ai.memory.store.id"] = scope.namespace
    if (conversation := _conversation(named)) is not None:
        tags["gen_ai.conversation.id"] = conversation
    given = next((named[each] for each in _RECORDS if named.get(each) is not None), None)
    if given is not None:
        tags["gen_ai.memory.record.count"] = len(given)

    with tracer.trace(name, tags=tags) as span:

        def finish(result: Any) -> None:
            records = given if given is not None else _returned(operation_name, result)
            if given is None and (count := _count(operation_name, records, result)) is not None:
                span.set_tag("gen_ai.memory.record.count", count)
            if contents := [_record(operation_name, each) for each in records or () if not isinstance(each, int)]:
                span.set_content_tag("gen_ai.memory.records", contents)

        try:
            yield finish
        except BaseException as error:
            span.set_tag("error.type", type(error).__qualname__)
            raise


def _parameters(operation: Callable[..., Any]) -> tuple[str, ...]:
    return _parameters_of_function(getattr(operation, "__func__", operation))


@lru_cache(maxsize=200)
def _parameters_of_function(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of an operation's parameters after the session."""
    names = tuple(signature(function).parameters)
    return names[names.index("session") + 1 :] if "session" in names else ()


def _conversation(named: Mapping[str, Any]) -> str | None:
    found = named.get("chat_history_id") or named.get("source_id")
    return found or getattr(named.get("history"), "chat_history_id", None)


def _returned(operation_name: str, result: Any) -> Sequence[Any] | None:
    """Return the messages in the result of an operation that reads messages."""
    if operation_name == "read":
        contents: list[str] = result[0]
        return contents
    return result if operation_name in ("page", "search") else None


def _count(operation_name: str, records: Sequence[Any] | None, result: Any) -> int | None:
    if records is not None:
        return len(records)
    return result if operation_name in ("copy", "import_history", "import_histories") else None


def _record(operation_name: str, record: "str | EncodedMessage | MessageRow | FoundRow") -> dict[str, Any]:
    """Return a message in the form of a record: its `content` and its `id`, as far as they are known."""
    if isinstance(record, str):
        return {"id" if operation_name == "delete_messages" else "content": record}
    return {"id": record.message_id, "content": record.content}
