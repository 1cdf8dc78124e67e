# SPDX-License-Identifier: Apache-2.0
"""
Real terminals, for commands to run in.
"""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time

from filled_stores import command

from haystack_chat_store.testing.fork_server import start_python


class Terminal:
    """
    A command of ours, or another program, in a terminal of its own.
    """

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
        """
        Read until some text has come, or to the end.
        """
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

    def end(self):
        """
        Wait for the end; returns the exit status and what was printed.
        """
        self.read_until()
        os.close(self._master)
        return self.process.wait(60), self.screen.decode().replace("\r\n", "\n")
