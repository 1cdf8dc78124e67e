# SPDX-License-Identifier: Apache-2.0
"""Rules 1, 2 and 15: signatures, validation of arguments, and errors."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest
from haystack.dataclasses import ChatMessage, ToolCall

from haystack_chat_store import errors
from haystack_chat_store.errors import ChatMessageStoreError, MessageEncodingError
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.kit import Calls, ClosableStore, ContractTest, StoreFactory, only_where, texts
from haystack_chat_store.testing.messages import TOO_LONG, conversation, positions, user, with_id
from haystack_chat_store.types import AsyncChatMessageStore, ChatMessageStore

#: Values that every store refuses as a `chat_history_id`, a message's id or a namespace.
BAD_IDS: dict[str, Any] = {
    "empty": "",
    "number": 7,
    "bytes": b"chat",
    "list": ["chat"],
    "dict": {"id": "chat"},
    "NUL": "a\x00b",
    "high surrogate": "a\ud83db",
    "low surrogate": "\ude00",
}
BAD_LAST_K: dict[str, Any] = {"negative": -1, "float": 2.0, "text": "2", "True": True, "False": False, "list": [2]}
NOT_MESSAGES: dict[str, Any] = {
    "None": None,
    "text": "Hello",
    "dict": user().to_dict(),
    "list": [user()],
    "number as text": ChatMessage.from_user(5),  # type: ignore[arg-type]
}
NOT_LISTS: dict[str, Any] = {
    "None": None,
    "text": "Hello",
    "empty text": "",
    "bytes": b"",
    "dict": {"a": user()},
    "empty dict": {},
    "number": 3,
    "one message": user(),
}

# No error may contain this text.
_SECRET = "the patient's name is Zacharias"


def _cases(values: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bad", list(values.values()), ids=list(values))


class _MidwayError(Exception):
    pass


def _failing_generator() -> Iterator[ChatMessage]:
    yield user()
    raise _MidwayError


async def _async_generator() -> AsyncIterator[ChatMessage]:
    yield user()


class Rule01SignaturesTest(ContractTest):
    """Rule 1: the API of the published ChatMessageStore, each call with an asynchronous twin."""

    def test_store_follows_both_protocols(self, store: ClosableStore) -> None:
        assert isinstance(store, ChatMessageStore)
        assert isinstance(store, AsyncChatMessageStore)

    @pytest.mark.parametrize(
        "method",
        ["write_messages", "retrieve_messages", "count_messages", "delete_messages", "delete_all_messages", "close"],
    )
    def test_asynchronous_twin_takes_and_returns_the_same(self, store: ClosableStore, method: str) -> None:
        call, twin = getattr(store, method), getattr(store, f"{method}_async")
        assert inspect.signature(twin) == inspect.signature(call)
        assert inspect.iscoroutinefunction(twin)
        assert not inspect.iscoroutinefunction(call)

    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            ("write_messages", ["chat_history_id", "messages"]),
            ("retrieve_messages", ["chat_history_id", "last_k"]),
            ("count_messages", ["chat_history_id"]),
            ("delete_messages", ["chat_history_id"]),
            ("delete_all_messages", []),
            ("to_dict", []),
            ("from_dict", ["data"]),
        ],
    )
    def test_arguments_have_the_published_names(self, store: ClosableStore, method: str, arguments: list[str]) -> None:
        parameters = inspect.signature(getattr(store, method)).parameters.values()
        # A store may have more parameters, by name.
        assert [parameter.name for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY] == arguments

    @pytest.mark.parametrize(
        ("setting", "default"),
        [("skip_system_messages", True), ("last_k", 10), ("last_k_unit", "round"), ("namespace", "default")],
    )
    def test_constructor_has_the_settings_of_every_store(
        self, store: ClosableStore, setting: str, default: Any
    ) -> None:
        parameters: dict[str, inspect.Parameter] = {}
        for base in reversed(type(store).__mro__):  # a store may pass **settings on to its base class
            parameters.update(inspect.signature(base.__init__).parameters)  # type: ignore[misc]  # of classes, not of an instance
        assert parameters[setting].default == default

    def test_system_messages_are_skipped_by_default(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", conversation("s u s a s")) == 2
        assert positions(calls.retrieve(store, "chat")) == [1, 3]
        assert calls.write(store, "only system", conversation("ss")) == 0
        assert calls.count(store, "only system") == 0

    def test_system_messages_are_kept_on_request(self, new_store: StoreFactory, calls: Calls) -> None:
        store = new_store(skip_system_messages=False)
        assert calls.write(store, "chat", conversation("s u s a s")) == 5
        assert positions(calls.retrieve(store, "chat")) == [0, 1, 2, 3, 4]

    def test_unknown_history_is_empty(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.retrieve(store, "nobody") == []
        assert calls.count(store, "nobody") == 0
        calls.delete(store, "nobody")

    def test_deleting_a_history_begins_it_anew(self, store: ClosableStore, calls: Calls) -> None:
        calls.write(store, "chat", [with_id("a", "old"), user("old, too")])
        calls.delete(store, "chat")
        assert calls.retrieve(store, "chat") == []
        assert calls.count(store, "chat") == 0
        assert calls.write(store, "chat", [with_id("a", "new")]) == 1
        assert texts(calls.retrieve(store, "chat")) == ["new"]

    def test_deleting_all_deletes_every_history(self, store: ClosableStore, calls: Calls) -> None:
        for chat_history_id in ("a", "b", "c"):
            calls.write(store, chat_history_id, conversation("ua"))
        calls.delete_all(store)
        assert [calls.count(store, chat_history_id) for chat_history_id in ("a", "b", "c")] == [0, 0, 0]
        assert calls.retrieve(store, "a") == []
        calls.delete_all(store)


class Rule02ValidationTest(ContractTest):
    """Rule 2: wrong arguments raise a `ValueError` that names them, before any I/O, and write nothing."""

    @_cases(NOT_LISTS)
    def test_messages_that_are_no_list_are_refused(self, store: ClosableStore, calls: Calls, bad: Any) -> None:
        with pytest.raises(ValueError, match="messages"):
            calls.write(store, "chat", bad)
        assert calls.count(store, "chat") == 0

    @pytest.mark.parametrize("iterable", [list, tuple, iter], ids=["list", "tuple", "iterator"])
    @_cases(NOT_MESSAGES)
    def test_item_that_is_no_message_is_named(
        self, store: ClosableStore, calls: Calls, bad: Any, iterable: Callable[[list[Any]], Iterable[Any]]
    ) -> None:
        calls.write(store, "chat", [user("before")])
        with pytest.raises(ValueError, match=r"messages\[2\]" if iterable is list else "messages"):
            calls.write(store, "chat", iterable([user(), user(), bad, user()]))
        assert texts(calls.retrieve(store, "chat")) == ["before"]

    @pytest.mark.parametrize("iterable", [tuple, iter, lambda messages: (m for m in messages)])
    def test_iterable_is_written_whole_or_refused(
        self, store: ClosableStore, calls: Calls, iterable: Callable[[list[ChatMessage]], Any]
    ) -> None:
        written = conversation("uaua")
        try:
            assert calls.write(store, "chat", iterable(written)) == 4
        except ValueError:
            written = []
        assert positions(calls.retrieve(store, "chat")) == positions(written)

    def test_generator_that_fails_midway_writes_nothing(self, store: ClosableStore, calls: Calls) -> None:
        with pytest.raises((_MidwayError, ValueError)):
            calls.write(store, "chat", _failing_generator())
        assert calls.count(store, "chat") == 0

    def test_asynchronous_generator_is_refused(self, store: ClosableStore, calls: Calls) -> None:
        with pytest.raises(ValueError, match="messages"):
            calls.write(store, "chat", _async_generator())
        assert calls.count(store, "chat") == 0

    def test_empty_batch_writes_nothing(self, store: ClosableStore, calls: Calls) -> None:
        assert calls.write(store, "chat", []) == 0
        assert calls.retrieve(store, "chat") == []

    @_cases({**BAD_IDS, "None": None})
    def test_bad_chat_history_id_is_refused_by_every_call(self, store: ClosableStore, calls: Calls, bad: Any) -> None:
        with pytest.raises(ValueError, match="chat_history_id"):
            calls.write(store, bad, [user()])
        with pytest.raises(ValueError, match="chat_history_id"):
            calls.write(store, bad, [])
        for call in (calls.retrieve, calls.count, calls.delete):
            with pytest.raises(ValueError, match="chat_history_id"):
                call(store, bad)
        with pytest.raises(ValueError, match="chat_history_id"):
            calls.retrieve(store, bad, last_k=0)

    @_cases(BAD_IDS)
    def test_bad_message_id_is_refused_and_named(self, store: ClosableStore, calls: Calls, bad: Any) -> None:
        with pytest.raises(ValueError, match=rf"messages\[1\].*{MESSAGE_ID_KEY}"):
            calls.write(store, "chat", [user(), with_id(bad)])
        assert calls.count(store, "chat") == 0

    @_cases({**BAD_IDS, "None": None})
    def test_bad_namespace_is_refused(self, make_store: StoreFactory, bad: Any) -> None:
        with pytest.raises(ValueError, match="namespace"):
            make_store(namespace=bad)

    @pytest.mark.parametrize("character", ["x", "é", "😀"])
    def test_ids_have_a_stated_greatest_length(self, new_store: StoreFactory, calls: Calls, character: str) -> None:
        longest = character * self.max_id_length
        store = new_store(namespace=character * self.max_namespace_length)
        assert calls.write(store, longest, [with_id(longest)]) == 1
        assert calls.retrieve(store, longest)[0].meta[MESSAGE_ID_KEY] == longest
        assert calls.write(store, longest, [with_id(longest)]) == 0
        for call in (calls.retrieve, calls.count, calls.delete):
            with pytest.raises(ValueError, match="chat_history_id"):
                call(store, longest + character)
        with pytest.raises(ValueError, match="chat_history_id"):
            calls.write(store, longest + character, [user()])
        with pytest.raises(ValueError, match=MESSAGE_ID_KEY):
            calls.write(store, longest, [with_id(longest + character)])
        with pytest.raises(ValueError, match="namespace"):
            new_store(namespace=character * (self.max_namespace_length + 1))

    @_cases(BAD_LAST_K)
    def test_bad_last_k_is_refused_by_call_and_constructor(
        self, store: ClosableStore, make_store: StoreFactory, calls: Calls, bad: Any
    ) -> None:
        with pytest.raises(ValueError, match="last_k"):
            calls.retrieve(store, "chat", last_k=bad)
        with pytest.raises(ValueError, match="last_k"):
            make_store(last_k=bad)

    @pytest.mark.parametrize("bad", ["token", "", None, 1])
    def test_unknown_last_k_unit_is_refused(self, make_store: StoreFactory, bad: Any) -> None:
        with pytest.raises(ValueError, match="last_k_unit"):
            make_store(last_k_unit=bad)

    def test_last_k_none_stands_for_the_stores_own(self, new_store: StoreFactory, calls: Calls) -> None:
        calls.write(new_store(), "chat", conversation("ua" * 12))
        for own, first_position in ((None, 0), (0, 24), (1, 22), (3, 18), (10, 4), (12, 0), (10**30, 0)):
            store = new_store(last_k=own)
            expected = list(range(first_position, 24))
            assert positions(calls.retrieve(store, "chat")) == expected
            assert positions(calls.retrieve(store, "chat", last_k=None)) == expected
        assert positions(calls.retrieve(new_store(), "chat")) == list(range(4, 24))

    @only_where("make_unreachable_store")
    def test_arguments_are_checked_before_the_engine_is_reached(
        self, make_unreachable_store: StoreFactory, calls: Calls
    ) -> None:
        store = make_unreachable_store()
        wrong: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
            (calls.write, ("", [user()]), {}),
            (calls.write, ("chat", None), {}),
            (calls.write, ("chat", [user(), "Hello"]), {}),
            (calls.write, ("chat", [with_id("")]), {}),
            (calls.write, ("chat", [user(bad=TOO_LONG)]), {}),
            (calls.retrieve, ("",), {}),
            (calls.retrieve, ("chat",), {"last_k": -1}),
            (calls.count, ("",), {}),
            (calls.delete, ("",), {}),
        ]
        for call, arguments, options in wrong:
            with pytest.raises(ValueError):
                call(store, *arguments, **options)


class Rule15ErrorsTest(ContractTest):
    """Rule 15: errors form one tree, and never contain the text of messages."""

    def test_errors_form_one_tree(self) -> None:
        ours = [error for _, error in inspect.getmembers(errors, inspect.isclass)]
        assert all(issubclass(error, ChatMessageStoreError) for error in ours)
        assert issubclass(MessageEncodingError, ValueError)

    @pytest.mark.parametrize(
        "bad",
        [
            _SECRET,
            {"text": _SECRET},
            ChatMessage.from_user(_SECRET, meta={"bad": TOO_LONG, "good": _SECRET}),
            ChatMessage.from_assistant(_SECRET, tool_calls=[ToolCall(_SECRET, {"bad": print, "good": _SECRET})]),
            ChatMessage.from_user(_SECRET, meta={"bad": [_SECRET, {1: _SECRET, "1": _SECRET}]}),
            ChatMessage.from_user(_SECRET, meta={"bad": float("nan"), "worse": TOO_LONG}),
            ChatMessage.from_user(_SECRET, meta={MESSAGE_ID_KEY: [_SECRET]}),
            ChatMessage.from_user(_SECRET, meta={MESSAGE_ID_KEY: f"{_SECRET}\x00"}),
        ],
        ids=["text", "dict", "integer", "arguments", "colliding keys", "NaN", "id", "NUL in id"],
    )
    def test_refusals_do_not_repeat_what_was_said(self, store: ClosableStore, calls: Calls, bad: Any) -> None:
        with pytest.raises(ValueError, match=r"messages\[1\]") as raised:
            calls.write(store, "chat", [user(_SECRET), bad])
        assert _SECRET not in _everything_an_error_says(raised.value)

    def test_value_that_cannot_be_stored_is_our_error(self, store: ClosableStore, calls: Calls) -> None:
        with pytest.raises(MessageEncodingError):
            calls.write(store, "chat", [user(bad=TOO_LONG)])

    @only_where("make_unreachable_store")
    def test_unreachable_engine_is_our_error(self, make_unreachable_store: StoreFactory, calls: Calls) -> None:
        store = make_unreachable_store()
        for call, *arguments in (
            (calls.write, "chat", [user(_SECRET)]),
            (calls.retrieve, "chat"),
            (calls.count, "chat"),
            (calls.delete, "chat"),
            (calls.delete_all,),
        ):
            with pytest.raises(ChatMessageStoreError) as raised:
                call(store, *arguments)
            assert _SECRET not in _everything_an_error_says(raised.value)
        calls.close(store)


def _everything_an_error_says(error: BaseException | None) -> str:
    """Return the texts of an error and all its causes, as a log shows them."""
    said = ""
    while error is not None:
        said += f"{error!r} {error}"
        error = error.__cause__ or error.__context__
    return said
