# SPDX-License-Identifier: Apache-2.0
"""Messages can carry ids before they are written."""

import pytest
from haystack.dataclasses import ChatMessage

from haystack_chat_store import InMemoryChatMessageStore, with_message_ids
from haystack_chat_store.ids import MESSAGE_ID_KEY
from haystack_chat_store.testing.kit import ids, without_ids
from haystack_chat_store.testing.messages import sample_messages, with_id


def test_copies_carry_new_ids_and_the_messages_stay_as_they_are():
    messages = [message for message in sample_messages().values() if MESSAGE_ID_KEY not in message.meta]
    before = [message.to_dict() for message in messages]
    copies = with_message_ids(iter(messages))
    assert len(set(ids(copies))) == len(messages)
    assert without_ids(copies) == messages
    assert [message.to_dict() for message in messages] == before
    assert not any(copy is message or copy.meta is message.meta for copy, message in zip(copies, messages, strict=True))


def test_a_message_that_has_an_id_keeps_it():
    message = with_id("mine", "Hi!")
    message.meta["other"] = 1
    (copy,) = with_message_ids([message])
    assert copy == message
    assert copy is not message
    assert ids(with_message_ids(with_message_ids([with_id("a"), ChatMessage.from_user("Hi!")])))[0] == "a"


def test_an_id_that_is_none_is_no_id():
    (copy,) = with_message_ids([ChatMessage.from_user("Hi!", meta={MESSAGE_ID_KEY: None})])
    assert copy.meta[MESSAGE_ID_KEY]


def test_a_repeated_write_stores_once():
    store = InMemoryChatMessageStore(namespace="with ids")
    turn = with_message_ids([ChatMessage.from_user("Hi!"), ChatMessage.from_assistant("Hello!")])
    assert [store.write_messages("chat", turn, expected_revision=0) for _ in range(2)] == [2, 0]
    assert store.retrieve_messages("chat") == turn
    store.delete_all_messages()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("text", "messages"),
        ([ChatMessage.from_user("Hi!"), "text"], r"messages\[1\]"),
        ([ChatMessage.from_user("Hi!"), with_id(7)], r"messages\[1\]\.meta\['chat_message_id'\]"),
        ([with_id("")], r"messages\[0\]\.meta\['chat_message_id'\]"),
    ],
)
def test_wrong_messages_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        with_message_ids(wrong)
