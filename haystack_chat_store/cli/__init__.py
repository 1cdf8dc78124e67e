# SPDX-License-Identifier: Apache-2.0
"""
The command line: look into a store of chat histories, move it, mend it.
"""

import os
import sys
from collections.abc import Sequence

# What a shell sets when it asks how a word can be completed.
COMPLETION_VARIABLE = "_HAYSTACK_CHAT_STORE_COMPLETE"

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command line, and exit with its status.

    :param arguments: What stands behind the command's name. Defaults to what the process was started with.
    """
    try:
        status = _run(arguments)
    except KeyboardInterrupt:  # while that is imported which would have known what to do
        if COMPLETION_VARIABLE not in os.environ:
            print(file=sys.stderr)  # noqa: T201  (rich may not be imported yet)
        status = INTERRUPTED
    sys.exit(status)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        import rich  # noqa: F401  (only to see whether it is there)
        import typer  # noqa: F401  (only to see whether it is there)
    except ImportError:
        print(  # noqa: T201  (what prints otherwise needs what is missing)
            "The command line needs typer and rich. Install them: pip install 'haystack-chat-store[cli]'",
            file=sys.stderr,
        )
        return 1
    from haystack_chat_store.cli.running import run

    return run(arguments)
