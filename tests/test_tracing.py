# SPDX-License-Identifier: Apache-2.0
"""What OpenTelemetry's own SDK sees of the calls of stores, through Haystack's tracer for it."""

import asyncio
import json
import sys

import pytest
from haystack import tracing
from haystack.dataclasses import ChatMessage
from haystack.document_stores.types import DuplicatePolicy
from haystack_integrations.tracing.opentelemetry import OpenTelemetryTracer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from turn_pipelines import ENGINES, store_of

from haystack_chat_store import ChatHistoryChangedError, InMemoryChatMessageStore
from haystack_chat_store.stores import engine as engine_module
from haystack_chat_store.stores.tracing import _CONVENTIONAL_NAMES, is_tracing_enabled
from haystack_chat_store.testing.messages import conversation, user

SYSTEMS = {"memory": None, "sqlite": "sqlite", "postgres": "postgresql", "redis": "redis", "redis_cluster": "redis"}


@pytest.fixture
def spans():
    """What was traced so far. Tracing is on."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.enable_tracing(OpenTelemetryTracer(provider.get_tracer("test")))
    try:
        yield exporter.get_finished_spans
    finally:
        tracing.disable_tracing()
        provider.shutdown()


@pytest.fixture(params=["sync", "async"])
def call(request):
    """Calls a method of a store, or its asynchronous twin."""

    def run(store, method, *arguments, **options):
        if request.param == "sync":
            return getattr(store, method)(*arguments, **options)

        async def calls():
            try:
                return await getattr(store, f"{method}_async")(*arguments, **options)
            finally:
                await store.close_async()

        return asyncio.run(calls())

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_each_call_of_a_store_is_a_span(engine, spans, call, request, tmp_path, monkeypatch):
    store = store_of(engine, request, tmp_path, monkeypatch)
    call(store, "write_messages", "user_456", conversation("uaua"))
    assert len(call(store, "retrieve_messages", "user_456", 1)) == 2
    assert len(call(store, "list_messages", "user_456", limit=3)) == 3
    call(store, "delete_messages", "user_456")

    system = {} if SYSTEMS[engine] is None else {"db.system.name": SYSTEMS[engine]}
    always = {"gen_ai.conversation.id": "user_456", "gen_ai.memory.store.id": store.namespace, **system}
    assert [(span.name, dict(span.attributes)) for span in spans()] == [
        (name, {"gen_ai.operation.name": name, "db.operation.name": operation, **count, **always})
        for name, operation, count in (
            ("create_memory", "append", {"gen_ai.memory.record.count": 4}),
            ("search_memory", "read", {"gen_ai.memory.record.count": 2}),
            ("search_memory", "page", {"gen_ai.memory.record.count": 3}),
            ("delete_memory", "delete", {}),
        )
    ]


def test_a_failed_call_names_its_error(spans, call):
    store = InMemoryChatMessageStore(namespace="failing")
    store.delete_all_messages()
    with pytest.raises(ChatHistoryChangedError):
        call(store, "write_messages", "user_456", [user("secret")], expected_revision=7)
    span = spans()[-1]
    assert span.attributes["error.type"] == "ChatHistoryChangedError"
    assert span.attributes["gen_ai.memory.record.count"] == 1
    assert span.status.status_code is StatusCode.ERROR
    assert "secret" not in span.to_json()


def test_content_is_traced_only_if_haystack_is_told_to(spans, call, monkeypatch):
    store = InMemoryChatMessageStore(namespace="content")
    store.delete_all_messages()
    call(store, "write_messages", "user_456", [user("secret")])
    call(store, "retrieve_messages", "user_456")
    assert not any("secret" in span.to_json() for span in spans())

    monkeypatch.setattr(tracing.tracer, "is_content_tracing_enabled", True)
    call(store, "write_messages", "user_456", [ChatMessage.from_user("secret", meta={"chat_message_id": "id-2"})])
    call(store, "retrieve_messages", "user_456", 1)
    written, read = (json.loads(span.attributes["gen_ai.memory.records"]) for span in spans()[-2:])
    assert [record["id"] for record in written] == ["id-2"]
    assert [json.loads(record["content"]) for record in written] == [json.loads(each["content"]) for each in read]
    assert json.loads(read[0]["content"])["content"] == [{"text": "secret"}]
    call(store, "delete_messages", "user_456", message_ids=["id-2"])
    assert json.loads(spans()[-1].attributes["gen_ai.memory.records"]) == [{"id": "id-2"}]


def test_spans_of_a_call_lie_in_the_span_around_it(spans, call):
    store = InMemoryChatMessageStore(namespace="nested")
    with tracing.tracer.trace("turn"):
        call(store, "count_messages", "user_456")
    inner, outer = spans()
    assert (inner.name, outer.name) == ("count", "turn")
    assert inner.parent.span_id == outer.context.span_id


def test_a_write_that_overwrites_is_an_upsert(spans, call):
    store = InMemoryChatMessageStore(namespace="overwriting")
    call(store, "write_messages", "user_456", [user()], policy=DuplicatePolicy.OVERWRITE)
    assert spans()[-1].name == "upsert_memory"


def test_operations_with_a_conventional_name_are_operations_of_engines():
    assert all(callable(getattr(engine_module.Engine, name)) for name in _CONVENTIONAL_NAMES)


def test_copies_and_imports_are_spans_with_their_number_of_messages(spans):
    store = InMemoryChatMessageStore(namespace="copies")
    store.delete_all_messages()
    store.write_messages("source", conversation("uaua"))
    store.copy_messages("source", "target")
    copy = spans()[-1]
    assert copy.attributes["gen_ai.conversation.id"] == "source"
    assert copy.attributes["gen_ai.memory.record.count"] == 4


def test_without_a_tracer_a_call_only_asks_whether_there_is_one(monkeypatch):
    """Two calls of Python functions are all that tracing adds: `Engine.run`, and the question."""

    def never(*_):
        raise AssertionError("Something was traced.")

    store = InMemoryChatMessageStore(namespace="off")
    engine = store.engine
    monkeypatch.setattr(engine_module, "traced", never)

    def functions(function):
        called = []
        sys.setprofile(lambda frame, event, _: called.append(frame.f_code) if event == "call" else None)
        try:
            function(engine.count, store.scope, "user_456")
        finally:
            sys.setprofile(None)
        return called

    added = [code for code in functions(engine.run) if code not in functions(engine.execute)]
    assert added == [engine_module.Engine.run.__code__, is_tracing_enabled.__code__]
    plain = engine.run_async(engine.count, store.scope, "user_456")
    assert plain.cr_code is type(engine).execute_async.__code__
    assert asyncio.run(_awaited(plain)) == 0


async def _awaited(coroutine):
    return await coroutine
