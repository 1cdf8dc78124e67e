# SPDX-License-Identifier: Apache-2.0
"""Real terminals, for commands to run in."""

import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from filled_stores import command

from haystack_chat_store.testing.fork_server import start_python


class Terminal:
    """A program that runs in its own terminal: a command of this package, or any other."""

    def __init__(self, *arguments, program=None, columns=80, stdout=None, **environment):
        self.screen = b""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        clean_environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
        }
        start, line = (subprocess.Popen, program) if program else (start_python, command(*arguments))
        self.process = start(
            line,
            stdin=slave,
            stdout=stdout or slave,
            stderr=slave,
            start_new_session=True,
            env={**clean_environment, "TERM": "xterm-256color", "PYTHONUTF8": "1", **environment},
        )
        os.close(slave)

    def read_until(self, text=None):
        """Read until some text has come, or to the end."""
        give_up = time.monotonic() + 120
        while text is None or text.encode() not in self.screen:
            assert select.select([self._master], [], [], give_up - time.monotonic())[0], self.screen
            try:
                read = os.read(self._master, 65536)
            except OSError:  # how Linux says that nobody has the terminal open any more
                read = b""
            if not read:
                assert text is None, self.screen
                break
            self.screen += read

    def type(self, text):
        os.write(self._master, text.encode())

    def interrupt(self):
        """Press Ctrl-C, again if need be: Python overlooks one that comes just when it begins to wait for a key."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)

    def end(self):
        """Wait for the end; returns the exit status and what was printed."""
        self.read_until()
        os.close(self._master)
        return self.process.wait(60), self.screen.decode().replace("\r\n", "\n")


# ---------------------------------------------------------------------- in a shell

# What a shell runs as `haystack-chat-store`: it hands everything to the test process, and waits for the status.
_SHIM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    connection.shutdown(socket.SHUT_WR)
    status = int(connection.makefile().read())
os._exit(status)
"""


@contextmanager
def forked_commands():
    """A folder for PATH whose `haystack-chat-store` is forked, so that a shell need not wait for imports."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        program, address = Path(folder, "haystack-chat-store"), os.path.join(folder, "requests")
        program.write_text(_SHIM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        listener.bind(address)
        listener.listen()
        threading.Thread(target=_fork_for_all, args=(listener,), daemon=True).start()
        yield folder
        listener.shutdown(socket.SHUT_RDWR)


def _fork_for_all(listener):
    with suppress(OSError):  # the listener is closed
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_fork_for, args=(connection,), daemon=True).start()


def _fork_for(connection):
    with connection:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        arguments, folder, environment = json.loads(connection.makefile("rb").read())
        command = ["-m", "haystack_chat_store", *arguments]
        stdin, stdout, stderr = streams
        with start_python(command, cwd=folder, env=environment, stdin=stdin, stdout=stdout, stderr=stderr) as process:
            for stream in streams:
                os.close(stream)
            connection.sendall(str(process.wait() % 256).encode())
