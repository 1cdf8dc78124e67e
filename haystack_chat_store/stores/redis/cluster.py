# SPDX-License-Identifier: Apache-2.0
"""Finds the server for a call: the node of a cluster that has its keys now, or the master that Sentinels name."""

import time
from typing import Any

from haystack import logging
from redis import exceptions
from redis.crc import key_slot

from haystack_chat_store.stores import idle_connections
from haystack_chat_store.stores.redis.failures import (
    Address,
    SentinelRefusalError,
    UnknownServiceError,
    may_pass,
    redirection,
)
from haystack_chat_store.stores.redis.session import Call, Session

logger = logging.getLogger(__name__)


class ClusterSession(Session):
    """A session that knows the nodes of a cluster, or the master that Sentinels name, if there are any."""

    async def masters(self) -> list[Address]:
        """Return the addresses of the servers that hold keys. A cluster is asked: no redirection tells of a new one."""
        if not self._nodes.are_asked:
            return await super().masters()
        find = self._discover if self._nodes.target.service is None else self._slots
        return sorted(set(await self._translated(self._call(None, (), self._nodes.start), find)))

    async def _run_script(self, call: Call) -> Any:
        return await (self._run_in_cluster if self._nodes.are_asked else self._run)(call)

    async def _run_in_cluster(self, call: Call) -> Any:
        slot = key_slot(call.arguments[1].encode())
        redirections = 0
        unanswered: exceptions.RedisError | None = None
        while True:
            if not redirections:
                call.address = (await self._slots(call, unanswered))[slot]
            try:
                return await self._run_once(call)
            except exceptions.RedisError as error:
                if isinstance(error, exceptions.TimeoutError):  # it hangs: the cluster may have replaced it
                    self._nodes.silent.add(call.address)
                    await self._close_idle_since(call.idle_since, call.address)
                    unanswered = error
                if self._is_late(call):
                    raise (unanswered or error) from None
                redirected = redirection(error, call.address.host)
                # The node that is taking the slot over may not have all keys yet that the script makes the names of.
                has_to_wait = redirected is not None and redirected[1] and call.names_keys
                if redirected is not None and not has_to_wait:
                    redirections += 1
                    call.address, call.is_asking = redirected
                elif has_to_wait or may_pass(error, in_cluster=True):
                    redirections, call.is_asking = 0, False
                    logger.debug("Trying a call at another node of Redis again.")
                else:
                    raise
                if not call.is_asking and not has_to_wait:
                    self._nodes.slots = None
                if redirections != 1:  # nodes that disagree redirect a call to each other without end
                    await self.pause()

    async def _slots(self, call: Call, unanswered: exceptions.RedisError | None = None) -> list[Address]:
        if self._nodes.is_outdated:
            deadline = time.monotonic() + idle_connections.probe_seconds(self._nodes.settings.timeout)
            try:
                return await self._discover(Call(None, (), self._nodes.start, deadline))
            except exceptions.RedisError:
                self._nodes.rely_on_master()
        return self._nodes.slots or await self._discover(call, unanswered)

    async def _discover(self, call: Call, unanswered: exceptions.RedisError | None = None) -> list[Address]:
        """
        Ask the nodes, one after the other, which node serves which slot.

        :param call: The call to run afterwards.
        :param unanswered: The error of an earlier attempt of the call that may have been executed. It is reported then.
        """
        failure: exceptions.RedisError = exceptions.ClusterDownError("No node knows which nodes serve the slots.")
        service = self._nodes.target.service
        for address in self._nodes.to_ask():
            try:
                connection = await self._connected(address, call.deadline, is_sentinel=service is not None)
                try:
                    if service is None:
                        rows = await self._ask(connection, call.deadline, "CLUSTER", "SLOTS")
                        if rows:
                            return self._nodes.learn(rows, address)
                    else:
                        question = "SENTINEL", "GET-MASTER-ADDR-BY-NAME", service
                        where = await self._ask(connection, call.deadline, *question)
                        if where:
                            return self._nodes.learn_master(Address(where[0], int(where[1])), address)
                        failure = UnknownServiceError(service)
                finally:
                    await self._disconnect(connection)
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                is_refusal = service is not None and isinstance(error, exceptions.AuthenticationError)
                failure = SentinelRefusalError(address) if is_refusal else error
                self._nodes.silent.add(address)
                if self._is_late(call):
                    break
        raise unanswered or failure
