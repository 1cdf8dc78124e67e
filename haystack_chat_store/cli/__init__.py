# SPDX-License-Identifier: Apache-2.0
"""The command line: list, show, search, move and repair chat histories."""

import os
import sys
from collections.abc import Sequence

from haystack_chat_store.cli.process import COMPLETION_VARIABLE, FAILED, INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command line, and exit with its status.

    :param arguments: The arguments after the command's name. Defaults to those of the process.
    :raises SystemExit: Always, with the exit status.
    """
    try:
        status = _run_if_installed(arguments)
    except KeyboardInterrupt:  # Ctrl-C during the imports, before `run` can handle it
        if COMPLETION_VARIABLE not in os.environ:
            print(file=sys.stderr)  # noqa: T201  (rich may not be imported yet)
        status = INTERRUPTED
    sys.exit(status)


def _run_if_installed(arguments: Sequence[str] | None) -> int:
    try:
        import rich  # noqa: F401  (only to check that it is installed)
        import typer  # noqa: F401  (only to check that it is installed)
    except ImportError:
        print(  # noqa: T201  (the usual output needs rich, which may be missing)
            "The command line needs typer and rich. They come with the extra 'cli': "
            'pip install "haystack-chat-store[cli]", or "typer>=0.26.8" "rich>=13.8"',
            file=sys.stderr,
        )
        return FAILED
    from haystack_chat_store.cli.running import run

    return run(arguments)
