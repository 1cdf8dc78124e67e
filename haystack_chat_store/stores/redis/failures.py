# SPDX-License-Identifier: Apache-2.0
"""
What the answers mean that are no results, and which error of ours says so.
"""

import re
from typing import NamedTuple

from redis import exceptions

from haystack_chat_store.errors import (
    ChatMessageStoreError,
    SchemaVersionError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.redis.scripts import SCHEMA_VERSION


class Address(NamedTuple):
    """
    Where a server is: host and port, or the path of a socket.
    """

    host: str
    port: int | None = None

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


# Some versions of redis-py take the first word of an answer for the class of the exception, others leave it in the
# text. Redis 6 puts the answer to a command of a script behind a text of its own.
_REDIRECTION = re.compile(r"(?:ResponseError )?(Moved|Ask)(?:Error)? \d+ (\S*):(\d+)$", re.IGNORECASE)
_PASSING = re.compile(
    r"(BusyLoading|TryAgain|ClusterDown|MasterDown)Error |ResponseError (TRYAGAIN|CLUSTERDOWN|MASTERDOWN) "
)
_REASONS = {
    r"NEWERSCHEMA": (
        "has histories of a newer schema version; this version of haystack-chat-store knows only versions up to "
        f"{SCHEMA_VERSION}. They were left untouched. Upgrade haystack-chat-store to use them."
    ),
    r"DAMAGED": (
        "holds only parts of this history: something else has changed or evicted its keys. They were left untouched. "
        "Set maxmemory-policy to noeviction; delete the history to write to it again."
    ),
    r"WRONGTYPE": "has something else under a key of this history. Choose another key_prefix.",
    r"^Authentication|^Authorization|NOAUTH|WRONGPASS|unauthenticated": "refused the user name or password in the url.",
    r"^NoPermission|NOPERM": "does not permit this user what the store has to do. See docs/redis.md for the commands.",
    r"^OutOfMemory|OOM": "has reached its maxmemory. Nothing of the call was stored. Give it more memory, or a ttl.",
    r"^ReadOnly|READONLY": "is a replica, which may not be written to. Connect to its master.",
    r"MISCONF": "cannot save to its disk and therefore accepts no writes. Its log says why.",
    r"NOREPLICAS": "accepts no writes, since too few replicas follow it (min-replicas-to-write).",
    r"^BusyLoading": "is still loading its data.",
    r"BUSY ": "is busy with a script that takes long.",
    r"^ClusterDown|CLUSTERDOWN|^MasterDown|MASTERDOWN|^TryAgain|TRYAGAIN": "is part of a cluster that is not whole.",
    r"^Moved|MOVED|^Ask|ASK": (
        "does not have this history: it is part of a cluster that is just moving it, or the store lacks cluster=True."
    ),
    r"cluster support disabled": "is no cluster. Leave out cluster=True.",
    r"max number of clients": "has as many connections as it takes (maxclients).",
}


def redirection(error: Exception, host: str) -> "tuple[Address, bool] | None":
    """
    Return where a node of a cluster sends a call, and whether for this once only (ASK).

    :param error: Its answer.
    :param host: The host that answered. Redis leaves it out if it is the same.
    """
    found = _REDIRECTION.match(f"{type(error).__name__} {error}")
    return (Address(found[2] or host, int(found[3])), found[1].upper() == "ASK") if found else None


def passes_by_itself(error: Exception, *, in_cluster: bool = False) -> bool:
    """
    Whether the same call can be expected to succeed soon: the server is starting, or a cluster replaces a master.
    """
    if in_cluster and isinstance(error, exceptions.ConnectionError):
        return not isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError))
    return _PASSING.match(f"{type(error).__name__} {error}") is not None


def explained(error: Exception, address: Address, timeout: float) -> ChatMessageStoreError:
    """
    Turn an exception of redis-py, or of a timeout, into one of ours that says what to do.

    :param error: The exception.
    :param address: Of the server that was asked last.
    :param timeout: The store's, in seconds.
    """
    server = f"Redis at {address}"
    if not isinstance(error, exceptions.RedisError) or isinstance(error, exceptions.TimeoutError):
        return StoreTimeoutError(
            f"{server} did not answer within {timeout} seconds. If this was a write, all or nothing of it was stored."
        )
    said = f"{type(error).__name__} {error}"
    for pattern, reason in _REASONS.items():
        if re.search(pattern, said):
            kind = SchemaVersionError if pattern == "NEWERSCHEMA" else StoreUnavailableError
            return kind(f"{server} {reason}")
    if isinstance(error, exceptions.ConnectionError):
        return StoreUnavailableError(
            f"{server} cannot be reached, or closed the connection. Check the url, and whether the server runs. {error}"
        )
    return StoreUnavailableError(f"{server} failed: {error}")
