# SPDX-License-Identifier: Apache-2.0
"""
When an idle connection to a server is taken for dead.

Balancers, firewalls and NAT gateways forget idle connections, many after 4 to 10 minutes, and tell neither side. What
is sent on such a connection vanishes. Keepalive packets prevent most of this. A connection that was idle is probed
before a call uses it, so that a call waits for the probe and not for its whole timeout. When one connection has died,
all that were idle for as long are closed.
"""

# Shorter than the four minutes after which the strictest of the large clouds forgets a connection.
KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_INTERVAL_SECONDS = 10
KEEPALIVE_COUNT = 3
#: A connection that was idle for longer is probed before use. A probe is one round trip.
PROBED_AFTER_SECONDS = 10.0
#: The longest time that a probe waits for an answer.
PROBE_SECONDS = 1.0


def probe_seconds(timeout: float) -> float:
    """
    Return how long a probe waits for an answer, in seconds. The rest of the timeout is for a new connection.

    :param timeout: The timeout of a call, in seconds.
    """
    return min(PROBE_SECONDS, timeout / 4)
