# SPDX-License-Identifier: Apache-2.0
"""Where the server is, or the nodes of a cluster: the settings, and which node serves which slot."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from haystack.utils import Secret
from redis.connection import Connection, parse_url
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from haystack_chat_store.errors import StoreConfigurationError
from haystack_chat_store.stores.connection_registry import resolved
from haystack_chat_store.stores.redis.failures import Address

# The share of the timeout in which a node of a cluster must answer. The rest is for asking which node replaces it.
_NODE_TIMEOUT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of connections. Engines with equal ones share their connections."""

    url: Secret
    cluster: bool
    timeout: float

    def location(self) -> str:
        """Return the URL."""
        return resolved(self.url, "url")


class Nodes:
    """The server that the URL names, and the other nodes of its cluster."""

    def __init__(self, settings: Settings) -> None:
        """
        Ask nothing yet.

        :param settings: The settings of the connections.
        :raises StoreConfigurationError: If the URL cannot be used.
        """
        self.settings = settings
        self.location = settings.location()
        self.start = _address_of(self.location)
        #: How long a synchronous call waits for each answer, and any call for a node of a cluster, in seconds.
        self.timeout = settings.timeout * (_NODE_TIMEOUT_SHARE if settings.cluster else 1)
        #: The node that serves each slot, or `None` if that has to be asked.
        self.slots: list[Address] | None = None
        #: The nodes that did not answer when they were last asked.
        self.silent: set[Address] = set()
        self._others: list[Address] = []

    def to_ask(self) -> list[Address]:
        """Return the addresses of nodes to ask about the cluster: those that were silent come last."""
        return sorted([self.start, *self._others], key=self.silent.__contains__)

    def learn(self, rows: list[Any], asked: Address) -> list[Address]:
        """
        Remember which node serves which slot.

        :param rows: The answer to CLUSTER SLOTS: first slot, last slot, master, replicas.
        :param asked: The node that gave it. It may leave out its own host.
        """
        self.silent.discard(asked)
        slots = [asked] * REDIS_CLUSTER_HASH_SLOTS  # it answers CLUSTERDOWN for slots that no node serves
        others = []
        for first, last, *nodes in rows:
            addresses = [Address(host or asked.host, port) for host, port, *_ in nodes]
            slots[first : last + 1] = [addresses[0]] * (last + 1 - first)
            others += addresses
        self._others = [address for address in dict.fromkeys(others) if address != self.start]
        self.slots = slots
        return slots


def _address_of(url: str) -> Address:
    try:
        parts = urlsplit(url)
        if parts.fragment or "@" in parts.path + parts.query:  # the end of a password that is not percent-encoded
            raise ValueError
        options = parse_url(url)  # type: ignore[no-untyped-call]  # redis-py has no types for it
        options.pop("max_connections", None)
        connection_class: Any = options.pop("connection_class", Connection)
        connection = connection_class(**options)  # refuses options that connections do not have
        path = getattr(connection, "path", None)
        return Address(path) if path else Address(connection.host, connection.port)
    except (ValueError, TypeError):  # which may quote the password
        raise StoreConfigurationError(
            "The url cannot be used. It must be like redis://user:password@host:6379/0 (rediss:// for TLS), "
            "perhaps with options that redis-py's connections have. Percent-encode what is not a letter or a digit "
            "in the user name and the password."
        ) from None
