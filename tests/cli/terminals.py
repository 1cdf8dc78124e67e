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
import sys
import termios
import time

COMMAND_LINE = (sys.executable, "-m", "haystack_chat_store")


class Terminal:
    """
    A command in a terminal of its own, ours unless another is given.
    """

    def __init__(self, *arguments, program=COMMAND_LINE, columns=80, stdout=None, **environment):
        self.screen = b""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        clean_environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
        }
        self.process = subprocess.Popen(
            [*program, *arguments],
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
