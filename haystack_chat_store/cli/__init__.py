# SPDX-License-Identifier: Apache-2.0
"""
The command line: look into a store of chat histories, move it, mend it.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command line, and exit with its status.

    :param arguments: What stands behind the command's name. Defaults to what the process was started with.
    """
    try:
        import rich  # noqa: F401  (only to see whether it is there)
        import typer  # noqa: F401  (likewise)
    except ImportError:
        print(  # noqa: T201  (what prints otherwise needs what is missing)
            "The command line needs typer and rich. Install them: pip install 'haystack-chat-store[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    from haystack_chat_store.cli.running import run

    sys.exit(run(arguments))
