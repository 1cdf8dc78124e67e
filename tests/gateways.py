# SPDX-License-Identifier: Apache-2.0
"""What stands between a client and a server, such as a balancer: it forgets connections, or loses answers."""

import select
import socket
import threading
from contextlib import suppress

from servers import HOST, unused_port


class Gateway:
    """
    Passes on what clients and a server send to each other.

    :param port: The port of the server.
    """

    def __init__(self, port):
        self.port = port  # where new connections lead
        self.is_answered = lambda _request: (
            True
        )  # whether the answer to a request is passed on; else the connection ends
        self.connections = 0
        self._forgotten_before = self._cut_before = 0
        self._listener = socket.create_server((HOST, unused_port()), backlog=128)
        self.own_port = self._listener.getsockname()[1]
        self._ends = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ends.set()
        self._listener.close()

    def forget(self):
        """From now on, swallow everything on the connections that there are, and tell neither side."""
        self._forgotten_before = self.connections

    def cut(self):
        """
        End all connections that there are, forgotten ones as well.

        A server at work on a request does not notice before its answer.
        """
        self._cut_before = self.connections

    def url(self, url):
        """Return a server's URL by way of this gateway."""
        return url.replace(f":{self.port}", f":{self.own_port}")

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._pass_on, args=(client, self.connections), daemon=True).start()

    def _pass_on(self, client, number):
        request = b""
        with client, suppress(OSError), socket.create_connection((HOST, self.port)) as server:
            while not self._ends.is_set():
                if number <= self._cut_before:
                    return
                for ready in select.select([client, server], [], [], 0.2)[0]:
                    data = ready.recv(1 << 20)
                    if number <= self._forgotten_before:
                        while number > self._cut_before and not self._ends.wait(0.02):
                            pass  # neither end hears of anything
                        return
                    if not data:
                        return
                    if ready is client:
                        request += data
                        server.sendall(data)
                        continue
                    if not self.is_answered(request):
                        return
                    request = b""
                    client.sendall(data)
