# SPDX-License-Identifier: Apache-2.0
"""Runs a command, and reports errors as a line of text and an exit status."""

import io
import os
import sys
from collections.abc import Sequence

import typer

from haystack_chat_store.cli.app import app
from haystack_chat_store.cli.completion import complete
from haystack_chat_store.cli.process import COMPLETION_VARIABLE, DONE, FAILED, INTERRUPTED, READER_GONE, WRONG_USE
from haystack_chat_store.cli.terminal import error
from haystack_chat_store.errors import ChatMessageStoreError

_NAME = "haystack-chat-store"

# If this variable is set, unexpected errors show a traceback.
_DEBUG_VARIABLE = "HAYSTACK_CHAT_STORE_DEBUG"

# The base of all errors about arguments. typer contains a private copy of click, so click may not be installed, and its
# `click.UsageError` would be another class. typer exports only this subclass.
_UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # its base is never None


def run(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command, and return its exit status.

    :param arguments: The arguments after the command's name. Defaults to those of the process.
    """
    if COMPLETION_VARIABLE in os.environ:
        return complete(lambda: app(prog_name=_NAME))
    _escape_unencodable_output()
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as failure:  # typer raises the latter if the reader has closed the pipe
        if not isinstance(failure, BrokenPipeError) and not isinstance(failure.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
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
    except ImportError as failure:  # the driver of an engine is not installed
        error(failure)
    except BrokenPipeError:
        raise
    except OSError as failure:
        _print_file_error(failure)
    except _UsageError as failure:
        _print_usage_error(failure)
        return WRONG_USE
    except ValueError as failure:
        error(failure)
        return WRONG_USE
    except Exception as failure:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        error(f"{type(failure).__name__}: {failure}\nUnexpected error. For a traceback, set {_DEBUG_VARIABLE}=1.")
    return FAILED


def _print_file_error(failure: OSError) -> None:
    folder = os.path.dirname(os.path.abspath(os.fsdecode(failure.filename or "")))
    if isinstance(failure, FileNotFoundError) and failure.filename and not os.path.isdir(folder):
        error(f"The folder {folder} does not exist. Create it, or choose another path.")
    else:
        error(f"{failure.filename}: {failure.strerror}" if failure.filename else failure)


def _print_usage_error(failure: Exception) -> None:
    """Print what is wrong with the arguments, and how to get help."""
    context = getattr(failure, "ctx", None)
    command = context.command_path if context is not None else _NAME
    message = str(failure.format_message())  # type: ignore[attr-defined]  # all click errors have it
    error(f"{message.removeprefix('Invalid value: ')}\nHelp: {command} --help")


def _escape_unencodable_output() -> None:
    """Print characters that the output's encoding lacks as escape sequences, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
