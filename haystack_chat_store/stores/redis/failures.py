# SPDX-License-Identifier: Apache-2.0
"""
What the answers mean that are no results, and which error of ours says so.
"""

import re
from typing import NamedTuple

from redis import exceptions

from haystack_chat_store.errors import (
    ChatMessageStoreError,
    MessageDecodingError,
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


# Redis 6 puts the answer to a command of a script behind a text of its own.
_OF_SCRIPT = re.compile(r"Error running script .*?@user_script: ?\d+: -?")
_REDIRECTION = re.compile(r"(MOVED|ASK) \d+ (\S*):(\d+)$")
_PASSING = ("LOADING", "BUSYLOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")
# By the beginnings of what `_said` returns.
_REASONS = {
    ("NEWERSCHEMA",): (
        "has histories of a newer schema version; this version of haystack-chat-store knows only versions up to "
        f"{SCHEMA_VERSION}. They were left untouched. Upgrade haystack-chat-store to use them."
    ),
    ("DAMAGED",): (
        "holds only parts of this chat history: something else has changed or evicted keys of it. They were left "
        "untouched. haystack-chat-store doctor --repair rebuilds it from what there is of it; set maxmemory-policy to "
        "noeviction."
    ),
    ("WRONGTYPE",): "has something else under a key of this history. Choose another key_prefix.",
    ("AUTHENTICATION", "AUTHORIZATION", "NOAUTH", "WRONGPASS", "Protocol error: unauthenticated"): (
        "refused the user name or password in the url."
    ),
    ("NOPERM", "The user executing the script can't", "ACL failure in script"): (
        "does not permit this user what the store has to do. See docs/redis.md for the commands."
    ),
    ("OUTOFMEMORY", "OOM"): "has reached its maxmemory. Nothing of the call was stored. Give it more memory, or a ttl.",
    ("string exceeds maximum",): (
        "takes no more messages into this history, which has as many as its proto-max-bulk-len allows. Nothing of the "
        "call was stored."
    ),
    ("READONLY",): "is a replica, which may not be written to. Connect to its master.",
    ("MISCONF",): "cannot save to its disk and therefore accepts no writes. Its log says why.",
    ("NOREPLICAS",): "accepts no writes, since too few replicas follow it (min-replicas-to-write).",
    ("LOADING", "BUSYLOADING"): "is still loading its data.",
    ("BUSY ",): "is busy with a script that takes long.",
    ("CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN"): "is part of a cluster that is not whole.",
    ("MOVED ", "ASK "): (
        "does not have this history: it is part of a cluster that is just moving it, or the store lacks cluster=True."
    ),
    ("This instance has cluster support disabled",): "is no cluster. Leave out cluster=True.",
    ("max number of clients", "CONNECTION max number of clients"): "has as many connections as it takes (maxclients).",
}
# What is no matter of the server being unavailable.
_KINDS = {"NEWERSCHEMA": SchemaVersionError, "DAMAGED": MessageDecodingError}


def redirection(error: Exception, host: str) -> "tuple[Address, bool] | None":
    """
    Return where a node of a cluster sends a call, and whether for this once only (ASK).

    :param error: Its answer.
    :param host: The host that answered. Redis leaves it out if it is the same.
    """
    found = _REDIRECTION.match(_said(error))
    return (Address(found[2] or host, int(found[3])), found[1] == "ASK") if found else None


def passes_by_itself(error: Exception, *, in_cluster: bool = False) -> bool:
    """
    Whether the same call can be expected to succeed soon: the server is starting, or a cluster replaces a master.
    """
    if in_cluster and isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError)):
        return not isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError))
    return _said(error).startswith(_PASSING)


def of_logging_in(error: exceptions.ResponseError, password: str | None) -> exceptions.ResponseError:
    """
    Return what to raise instead of an unexpected answer to logging in, which may quote, and cut, the password.

    :param error: The answer.
    :param password: The password.
    """
    said = re.split("[\"'`]", str(error))[0]
    is_shown = not password or password not in said
    return exceptions.ResponseError(said if is_shown else "the answer to logging in cannot be shown.")


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
    said = _said(error)
    for beginnings, reason in _REASONS.items():
        if said.startswith(beginnings):
            kind = next((kind for word, kind in _KINDS.items() if said.startswith(word)), StoreUnavailableError)
            return kind(f"{server} {reason}{_history(said)}")
    if isinstance(error, exceptions.ConnectionError):
        return StoreUnavailableError(
            f"{server} cannot be reached, or closed the connection. Check the url, and whether the server runs. {error}"
        )
    return StoreUnavailableError(f"{server} failed: {error}")


def _history(said: str) -> str:
    """
    Name the keys of a damaged history, if the answer does: they contain its id.
    """
    word, _, key = said.partition(" ")
    return f" Its keys begin with {key.removesuffix('history')!r}." if word == "DAMAGED" and key else ""


def _said(error: Exception) -> str:
    """
    Return what a server answered, or happened to a connection: first the word that says which error it is.

    Some versions of redis-py take it for the class of the exception, others leave it in the text.
    """
    if type(error) is exceptions.ResponseError:
        return _OF_SCRIPT.sub("", str(error), count=1)
    return f"{type(error).__name__.removesuffix('Error').upper()} {error}"
