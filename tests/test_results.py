# SPDX-License-Identifier: Apache-2.0
"""What stores return, and the errors they raise, as programs meet them."""

import json
import pickle
from dataclasses import FrozenInstanceError, fields
from datetime import datetime, timezone

import pytest
from haystack.dataclasses import ChatMessage

import haystack_chat_store
from haystack_chat_store import InMemoryChatMessageStore, errors, types
from haystack_chat_store.testing.messages import conversation, with_id
from haystack_chat_store.transfer import TransferResult


@pytest.fixture
def store(request):
    store = InMemoryChatMessageStore(namespace=request.node.name, search=True)
    store.write_messages("trip", [with_id("q", "Where to?"), *conversation("a")])
    store.update_chat_history("trip", title="Trip", meta={"pinned": True})
    return store


def as_json(result):
    return json.loads(json.dumps(result.to_dict()))


def test_a_page_of_histories_is_ready_for_json(store):
    page = store.list_chat_histories()
    (info,) = page.items
    assert as_json(page) == {
        "items": [
            {
                "chat_history_id": "trip",
                "message_count": 2,
                "round_count": 1,
                "revision": 1,
                "created_at": info.created_at.isoformat(),
                "updated_at": info.updated_at.isoformat(),
                "title": "Trip",
                "meta": {"pinned": True},
                "user_id": None,
                "preview": "Where to?",
                "last_message": {
                    "role": "assistant",
                    "text": info.last_message.text,
                    "created_at": info.last_message.created_at.isoformat(),
                },
            }
        ],
        "cursor": None,
    }
    assert datetime.fromisoformat(as_json(info)["created_at"]) == info.created_at


def test_stored_messages_hits_and_statistics_are_ready_for_json(store):
    (stored, _) = store.list_messages("trip")
    assert ChatMessage.from_dict(as_json(stored)["message"]) == stored.message
    (hit,) = store.search_messages("where")
    assert as_json(hit) == {name: getattr(hit, name) for name in ("chat_history_id", "message_id", "position")} | {
        "snippet": hit.snippet,
        "score": hit.score,
        "role": "user",
        "created_at": hit.created_at.isoformat(),
    }
    today = datetime.now(timezone.utc).date().isoformat()
    assert as_json(store.statistics())["messages_per_day"] == {today: 2}


def test_faults_and_transfers_are_ready_for_json():
    fault = types.Fault(chat_history_id="trip", position=1, description="It is damaged.")
    moved = TransferResult(chat_histories=1, messages=2, faults=(fault,))
    assert as_json(moved) == {
        "chat_histories": 1,
        "messages": 2,
        "skipped": 0,
        "faults": [
            {
                "chat_history_id": "trip",
                "position": 1,
                "description": "It is damaged.",
                "is_repaired": False,
                "count": 1,
            }
        ],
    }


def test_results_are_frozen_and_take_names_only(store):
    info = store.get_chat_history("trip")
    with pytest.raises(FrozenInstanceError):
        info.title = "Another"
    with pytest.raises(TypeError):
        type(info)(*(getattr(info, field.name) for field in fields(info)))
    assert pickle.loads(pickle.dumps(info)) == info


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.StoreUnavailableError, ConnectionError),
        (errors.StoreTimeoutError, TimeoutError),
        (errors.MessageEncodingError, ValueError),
        (errors.ChatHistoryNotFoundError, LookupError),
    ],
)
def test_errors_are_also_of_pythons_kinds(error, kind):
    raised = error("what is wrong")
    assert isinstance(raised, kind)
    assert str(raised) == "what is wrong"
    assert str(pickle.loads(pickle.dumps(raised))) == "what is wrong"


def test_a_wrong_configuration_is_nothing_to_wait_for():
    assert not issubclass(errors.StoreConfigurationError, OSError)


def test_stores_are_equal_by_what_they_are_made_with():
    store = InMemoryChatMessageStore(last_k=3)
    assert store == InMemoryChatMessageStore(last_k=3)
    assert store == InMemoryChatMessageStore.from_dict(store.to_dict())
    assert store != InMemoryChatMessageStore(last_k=4)
    assert store != InMemoryChatMessageStore(last_k=3, strict=True)
    assert hash(store) == hash(InMemoryChatMessageStore(last_k=3))


def test_the_package_says_its_version():
    assert haystack_chat_store.__version__ == "0.1.0"
