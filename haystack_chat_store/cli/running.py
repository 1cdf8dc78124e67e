# SPDX-License-Identifier: Apache-2.0
"""
Runs a command, and turns what goes wrong into a line of text and an exit status.

| status | means |
|---|---|
| 0 | done |
| 1 | it failed, or the doctor found what is not repaired |
| 2 | wrong use |
| 130 | interrupted with Ctrl-C |
"""

import io
import os
import sys
from collections.abc import Sequence

import typer

from haystack_chat_store.cli import COMPLETION_VARIABLE, INTERRUPTED
from haystack_chat_store.cli.app import app
from haystack_chat_store.cli.completion import complete
from haystack_chat_store.cli.terminal import error
from haystack_chat_store.errors import ChatMessageStoreError

_NAME = "haystack-chat-store"

DONE, FAILED, WRONG_USE = 0, 1, 2

# Set it to have unexpected errors end with a traceback.
_DEBUG_VARIABLE = "HAYSTACK_CHAT_STORE_DEBUG"

# What typer raises for wrong arguments of any kind. The class has no public name of its own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command, and return its exit status.

    :param arguments: What stands behind the command's name. Defaults to what the process was started with.
    """
    if COMPLETION_VARIABLE in os.environ:
        return complete(lambda: app(prog_name=_NAME))
    _accept_any_text()
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return status


def _run(arguments: Sequence[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        returned = app(given or ["--help"], prog_name=_NAME, standalone_mode=False)
        return returned if isinstance(returned, int) else DONE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except ChatMessageStoreError as failure:  # some of these are ValueErrors too
        error(failure)
    except ImportError as failure:  # the driver of an engine
        error(failure)
    except BrokenPipeError:
        raise
    except OSError as failure:
        _explain_file(failure)
    except _UsageError as failure:
        _explain(failure)
        return WRONG_USE
    except ValueError as failure:
        error(failure)
        return WRONG_USE
    except Exception as failure:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        error(f"{type(failure).__name__}: {failure}\nThis was not expected. For a traceback, set {_DEBUG_VARIABLE}=1.")
    return FAILED


def _explain_file(failure: OSError) -> None:
    folder = os.path.dirname(os.path.abspath(os.fsdecode(failure.filename or "")))
    if isinstance(failure, FileNotFoundError) and failure.filename and not os.path.isdir(folder):
        error(f"The folder {folder} does not exist. Create it, or choose another path.")
    else:
        error(f"{failure.filename}: {failure.strerror}" if failure.filename else failure)


def _explain(failure: Exception) -> None:
    """
    Say what is wrong with the arguments, and where they are explained.
    """
    context = getattr(failure, "ctx", None)
    command = context.command_path if context is not None else _NAME
    message = str(failure.format_message())  # type: ignore[attr-defined]  # every usage error has it
    error(f"{message.removeprefix('Invalid value: ')}\nHelp: {command} --help")


def _accept_any_text() -> None:
    """
    Have the process print characters that the terminal's encoding has not, and integers of any length.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
