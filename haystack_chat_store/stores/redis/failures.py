# SPDX-License-Identifier: Apache-2.0
"""Maps error replies of Redis, and exceptions of redis-py, to the exceptions of this package."""

import re
from typing import NamedTuple

from redis import exceptions

from haystack_chat_store.errors import (
    ChatMessageStoreError,
    MessageDecodingError,
    SchemaVersionError,
    StoreConfigurationError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from haystack_chat_store.stores.redis.schema import SCHEMA_VERSION


class Address(NamedTuple):
    """Where a server is: host and port, or the path of a socket."""

    host: str
    port: int | None = None

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


# Redis 6 puts this before the error reply to a command of a script.
_OF_SCRIPT = re.compile(r"Error running script .*?@user_script: ?\d+: -?")
_REDIRECTION = re.compile(r"(MOVED|ASK) \d+ (\S*):(\d+)$")
# Put before a redirection that the store does not follow.
_UNFOLLOWED = "UNFOLLOWED "
# Put before the error of a script that looks for a key in a slot that is moving. It does so before its first write.
_NOT_LOCAL = "NOTLOCAL "
_IS_NOT_LOCAL = re.compile("script attempted to access a non local key", re.IGNORECASE)
_PASSING = ("LOADING", "BUSYLOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", _NOT_LOCAL)
# What can be wrong with TLS, as OpenSSL says it.
_TLS_REASONS = {
    "CERTIFICATE_VERIFY_FAILED|certificate verify failed": (
        "shows a certificate that this machine does not trust, or that is for another host (ssl_ca_certs in the url)."
    ),
    "WRONG_VERSION_NUMBER|wrong version number|RECORD_LAYER_FAILURE": (
        "does not speak TLS at this port. Write redis:// instead of rediss://."
    ),
    "CERTIFICATE_REQUIRED|certificate required": (
        "asks for a certificate of the client (ssl_certfile and ssl_keyfile in the url)."
    ),
}


class SlotsDifferError(StoreConfigurationError):
    """A cluster refuses a script, because its keys belong to different hash slots."""


def contradicting(chat_history_id: str) -> MessageDecodingError:
    """Return the error for a history whose keys contradict each other, also when they are read again."""
    return MessageDecodingError(
        f"The keys of the chat history {chat_history_id!r} in Redis contradict each other: another program has changed "
        "them. They were left untouched. haystack-chat-store doctor --repair rebuilds it from what is left."
    )


def changed_each_time(chat_history_id: str) -> StoreUnavailableError:
    """Return the error for a history that others have deleted and begun anew at each attempt of a change."""
    return StoreUnavailableError(
        f"Others changed the chat history {chat_history_id!r} in Redis each time while it was being changed. Try again."
    )


class StagedLostError(StoreUnavailableError):
    """Messages that waited to become part of a history are gone, so nothing was changed."""


# What an error means, by how `_reply` begins.
_REASONS = {
    ("NEWERSCHEMA",): (
        "has histories of a newer schema version; this version of haystack-chat-store knows only versions up to "
        f"{SCHEMA_VERSION}. They were left untouched. Upgrade haystack-chat-store to use them."
    ),
    ("DAMAGED",): (
        "holds only parts of this chat history: another program has changed its keys, or the server has evicted "
        "some. They were left untouched. haystack-chat-store doctor --repair rebuilds it from what is left; set "
        "maxmemory-policy to noeviction."
    ),
    ("WRONGTYPE",): "has something else under a key of this history. Choose another key_prefix.",
    ("AUTHENTICATION", "AUTHORIZATION", "NOAUTH", "WRONGPASS", "Protocol error: unauthenticated"): (
        "refused the user name or password in the url."
    ),
    ("SELECT is not allowed in cluster mode", "ERR SELECT is not allowed in cluster mode"): (
        "is a cluster, which has only database 0. Leave the database out of the url."
    ),
    ("DB index is out of range", "ERR DB index is out of range", "invalid DB index", "ERR invalid DB index"): (
        "does not have the database that the url names."
    ),
    ("Cannot create index on db", "ERR Cannot create index on db"): (
        "can search only database 0. Leave the database out of the url, or make the store without search=True."
    ),
    ("DENIED",): "admits only clients of its own machine (protected-mode). Give it a password.",
    ("NOPERM", "The user executing the script can't", "ACL failure in script"): (
        "does not permit this user what the store has to do. See docs/redis.md for the commands."
    ),
    ("OUTOFMEMORY", "OOM"): "has reached its maxmemory. Nothing of the call was stored. Give it more memory, or a ttl.",
    ("string exceeds maximum",): (
        "takes no more messages into this history, which has as many as its proto-max-bulk-len allows. Nothing of the "
        "call was stored."
    ),
    ("STAGEDLOST",): (
        "no longer has the messages that waited to become part of a history: the call took longer than ten minutes, or "
        "another client has taken it over. Nothing was changed. Try again."
    ),
    ("READONLY",): "is a replica, which may not be written to. Connect to its master.",
    ("MISCONF",): "cannot save to its disk and therefore accepts no writes. Its log says why.",
    ("NOREPLICAS",): "accepts no writes, since too few replicas follow it (min-replicas-to-write).",
    ("LOADING", "BUSYLOADING"): "is still loading its data.",
    ("BUSY ",): "is busy with a script that takes long.",
    ("CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN"): "is part of a cluster that is not complete.",
    (_UNFOLLOWED,): (
        "is one node of a cluster, and another node has this history. Nothing of the call was done. Give the store "
        "cluster=True, or make it by store_from_url with redis+cluster:// in the url."
    ),
    ("CLUSTERCROSSSLOT", "CROSSSLOT"): "is part of a cluster in which the keys of this call have different slots.",
    ("MOVED ", "ASK ", _NOT_LOCAL): "does not have this history: it is part of a cluster that is moving it now.",
    ("This instance has cluster support disabled",): "is not a cluster. Leave out cluster=True.",
    ("max number of clients", "CONNECTION max number of clients"): "accepts no more connections (maxclients).",
}
# The exceptions for errors that are no `StoreUnavailableError`, by how `_reply` begins.
_EXCEPTIONS = {
    "NEWERSCHEMA": SchemaVersionError,
    "DAMAGED": MessageDecodingError,
    **dict.fromkeys(
        (
            *("AUTHENTICATION", "AUTHORIZATION", "NOAUTH", "WRONGPASS", "Protocol error: unauthenticated", "NOPERM"),
            *("The user executing the script can't", "ACL failure in script", "DENIED", "WRONGTYPE"),
            *("SELECT is not", "ERR SELECT is not", "DB index", "ERR DB index", "invalid DB", "ERR invalid DB"),
        ),
        StoreConfigurationError,
    ),
    "STAGEDLOST": StagedLostError,
    "This instance has cluster support disabled": StoreConfigurationError,
    _UNFOLLOWED: StoreConfigurationError,
    **dict.fromkeys(("CLUSTERCROSSSLOT", "CROSSSLOT"), SlotsDifferError),
    **dict.fromkeys(("Cannot create index on db", "ERR Cannot create index on db"), StoreConfigurationError),
}


class UnknownServiceError(exceptions.RedisError):
    """The Sentinels do not know the name of the service."""

    def __init__(self, service: str) -> None:
        """Say which name."""
        super().__init__(f"The Sentinels do not know the service {service!r} that the url names.")


class SentinelRefusalError(exceptions.RedisError):
    """A Sentinel refuses the user name or password."""

    def __init__(self, address: Address) -> None:
        """Say which Sentinel."""
        super().__init__(
            f"The Sentinel at {address} refused the user name or password. Its own are sentinel_username and "
            "sentinel_password in the url."
        )


def redirection(error: Exception, host: str) -> "tuple[Address, bool] | None":
    """
    Return the node to which a node of a cluster redirects a call, and whether for this call only (ASK).

    :param error: The error reply.
    :param host: The host that replied. Redis leaves it out of the reply if it stays the same.
    """
    found = _REDIRECTION.match(_reply(error))
    return (Address(found[2] or host, int(found[3])), found[1] == "ASK") if found else None


def has_run_nothing(error: Exception) -> bool:
    """Whether an error reply says that a call was refused before it changed anything."""
    return _reply(error).startswith((*_PASSING, "READONLY", "MOVED ", "ASK "))


def may_pass(error: Exception, *, in_cluster: bool = False) -> bool:
    """
    Whether the same call may succeed soon: the server is starting, or a master is being replaced.

    :param in_cluster: Whether there are other servers, one of which may become the master.
    """
    if in_cluster and isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError)):
        return not isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError))
    return _reply(error).startswith((*_PASSING, "READONLY") if in_cluster else _PASSING)


def explained(
    error: Exception, address: Address, timeout: float, *, is_tls: bool = False, in_cluster: bool = True
) -> ChatMessageStoreError:
    """
    Return the exception of this package for an exception of redis-py, or for a timeout.

    :param error: The exception.
    :param address: The address of the server that was asked last.
    :param timeout: The store's timeout, in seconds.
    :param is_tls: Whether the URL asks for TLS, and no connection has come about yet.
    :param in_cluster: Whether the store follows the redirections of a cluster.
    """
    server = f"Redis at {address}"
    advice = " If its port has no TLS, write redis:// instead of rediss://." if is_tls else ""
    if isinstance(error, (UnknownServiceError, SentinelRefusalError)):
        return StoreConfigurationError(str(error))
    if not isinstance(error, exceptions.RedisError) or isinstance(error, exceptions.TimeoutError):
        return StoreTimeoutError(
            f"{server} did not answer within {timeout} seconds. A write was stored whole or not at all.{advice}"
        )
    is_lost = not in_cluster and redirection(error, address.host) is not None
    reply = f"{_UNFOLLOWED if is_lost else ''}{_reply(error)}"
    for beginnings, reason in _REASONS.items():
        if reply.startswith(beginnings):
            exceptions_found = (kind for beginning, kind in _EXCEPTIONS.items() if reply.startswith(beginning))
            return next(exceptions_found, StoreUnavailableError)(f"{server} {reason}{_history(reply)}")
    if isinstance(error, exceptions.ConnectionError):
        for pattern, reason in _TLS_REASONS.items():
            if re.search(pattern, str(error)):
                return StoreConfigurationError(f"{server} {reason}")
        return StoreUnavailableError(
            f"{server} cannot be reached, or closed the connection. Check the url (rediss:// if its port wants TLS), "
            f"and whether the server runs.{advice} {error}"
        )
    return StoreUnavailableError(f"{server} failed: {error}")


def _history(reply: str) -> str:
    """Name the keys of a damaged history, which contain its id, if the reply names them."""
    word, _, key = reply.partition(" ")
    return f" Its keys begin with {key.removesuffix('history')!r}." if word == "DAMAGED" and key else ""


def _reply(error: Exception) -> str:
    """
    Return an error reply, or a description of a failed connection, with the word first that names the error.

    Some versions of redis-py turn that word into the class of the exception, others leave it in the text.
    """
    if type(error) is exceptions.ResponseError:
        if _IS_NOT_LOCAL.search(str(error)):
            return f"{_NOT_LOCAL}{error}"
        return _OF_SCRIPT.sub("", str(error), count=1)
    return f"{type(error).__name__.removesuffix('Error').upper()} {error}"
