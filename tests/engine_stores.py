# SPDX-License-Identifier: Apache-2.0
"""Stores on engines that a test changes."""

import uuid

from haystack_chat_store import BaseChatMessageStore


def store_on(engine, **settings):
    """A store on an engine, in a namespace of its own."""
    return BaseChatMessageStore(engine, **{"namespace": uuid.uuid4().hex, **settings})
