# SPDX-License-Identifier: Apache-2.0
"""Where the server is, or the nodes of a cluster: the settings, and which node serves which slot."""

import math
import time
from dataclasses import dataclass
from typing import Any

from haystack.utils import Secret
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from haystack_chat_store.stores.connection_registry import fingerprint_of, read_hidden, resolved
from haystack_chat_store.stores.redis.failures import Address
from haystack_chat_store.stores.redis.target import parsed

# The share of the timeout in which one of several nodes must answer. The rest is for asking which node replaces it.
_NODE_TIMEOUT_SHARE = 0.25

#: How long a store relies on what a Sentinel has said about the master. A master that was replaced in good order takes
#: writes, which get lost, for up to ten seconds, until a Sentinel makes it a replica.
MASTER_KNOWN_SECONDS = 1.0
# How long it relies on it when no Sentinel has answered.
_WITHOUT_SENTINELS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of connections. Engines with equal ones share their connections."""

    url: Secret
    cluster: bool
    timeout: float

    def location(self) -> str:
        """Return the URL."""
        return resolved(self.url, "url")

    def fingerprint(self) -> bytes:
        """Return what changes when the URL does."""
        return fingerprint_of(self.location())


class Nodes:
    """The server that the URL names, the other nodes of its cluster, or the master that its Sentinels name."""

    def __init__(self, settings: Settings) -> None:
        """
        Ask nothing yet.

        :param settings: The settings of the connections.
        :raises StoreConfigurationError: If the URL cannot be used.
        """
        self.settings = settings
        self.fingerprint = settings.fingerprint()
        self.target = read_hidden(lambda: parsed(settings.location(), cluster=settings.cluster))
        self.start = self.target.addresses[0]
        #: Whether other servers have to be asked which one serves a slot: nodes of a cluster, or Sentinels.
        self.are_asked = settings.cluster or self.target.service is not None
        #: How long a synchronous call waits for each answer, and any call for one of several nodes, in seconds.
        self.timeout = settings.timeout * (_NODE_TIMEOUT_SHARE if self.are_asked else 1)
        #: The node that serves each slot, or `None` if that has to be asked.
        self.slots: list[Address] | None = None
        #: The nodes that did not answer when they were last asked.
        self.silent: set[Address] = set()
        self._others: list[Address] = []
        self._known_until = math.inf

    @property
    def is_outdated(self) -> bool:
        """Whether the Sentinels have to be asked again which server is the master."""
        return self.slots is not None and time.monotonic() > self._known_until

    def rely_on_master(self) -> None:
        """Go on with the master that is known, since no Sentinel answers. The next call asks those that are left."""
        if self.silent.issuperset(self.target.addresses):
            self._known_until = time.monotonic() + _WITHOUT_SENTINELS_SECONDS

    def to_ask(self) -> list[Address]:
        """Return the addresses of nodes to ask about the cluster, or of Sentinels: those that were silent come last."""
        return sorted(dict.fromkeys([*self.target.addresses, *self._others]), key=self.silent.__contains__)

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

    def learn_master(self, master: Address, asked: Address) -> list[Address]:
        """
        Remember which server is the master, as a Sentinel says.

        :param master: The master.
        :param asked: The Sentinel.
        """
        self.silent.discard(asked)
        self._known_until = time.monotonic() + MASTER_KNOWN_SECONDS
        self.slots = [master] * REDIS_CLUSTER_HASH_SLOTS
        return self.slots
