# SPDX-License-Identifier: Apache-2.0
"""What reports errors with the values of local variables sends no password along."""

import asyncio

import pytest
from haystack.utils import Secret
from servers import HOST, unused_port

from haystack_chat_store import ChatMessageStoreError, PostgresChatMessageStore, RedisChatMessageStore

PASSWORD = "never-repeat-me"


def variables_with_the_password(error):
    """Return the local variables of this package's functions, in all tracebacks of an error."""
    found, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        trace = error.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            if frame.f_globals.get("__name__", "").startswith("haystack_chat_store"):
                found += [
                    f"{frame.f_code.co_name}: {name}"
                    for name, value in frame.f_locals.items()
                    if PASSWORD in repr(value)
                ]
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return found


def fail(kind, url, way):
    """Return the error of a call to a store with this URL."""
    with pytest.raises((ChatMessageStoreError, ValueError)) as caught:
        store = kind(Secret.from_token(url), timeout=1)
        if way == "sync":
            store.count_messages("history")
        else:
            asyncio.run(store.count_messages_async("history"))
    return caught.value


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("option", ["", "?wrong=1", "?sslmode=wrong"])
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (PostgresChatMessageStore, "postgresql"),
        (RedisChatMessageStore, "redis"),
        (RedisChatMessageStore, "redis+cluster"),
        (RedisChatMessageStore, "redis+sentinel"),
    ],
)
def test_no_local_variable_shows_a_password(kind, scheme, option, way):
    error = fail(kind, f"{scheme}://user:{PASSWORD}@{HOST}:{unused_port()}/0{option}", way)
    assert variables_with_the_password(error) == []


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("hosts", [HOST, f"{HOST},"])
@pytest.mark.parametrize("option", ["service=main", "service=", "service=main&wrong=1"])
def test_no_local_variable_shows_the_password_of_the_sentinels(hosts, option, way):
    url = f"redis+sentinel://{hosts}:{unused_port()}/0?{option}&sentinel_password={PASSWORD}"
    assert variables_with_the_password(fail(RedisChatMessageStore, url, way)) == []
