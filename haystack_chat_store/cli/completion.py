# SPDX-License-Identifier: Apache-2.0
"""Shell completion: offers words that need no quotation marks, and prints nothing else."""

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from haystack_chat_store.cli.process import COMPLETION_VARIABLE, DONE, FAILED

# Shells expand an offered word like a typed one, and each shell quotes in its own way. These characters have no special
# meaning in any of them.
_PLAIN_WORD = re.compile(r"[\w./][\w./:=@%+-]*")
# Bash splits words at these characters, even inside quotation marks.
_BASH_WORD_BREAK = re.compile("[:=@]+")


def is_plain(word: str) -> bool:
    """Whether a word needs no quotation marks in any shell."""
    return _PLAIN_WORD.fullmatch(word) is not None


def complete(answer: Callable[[], Any]) -> int:
    """
    Print completions for a shell. Errors are swallowed, because a shell cannot show them while it completes a word.

    :param answer: Prints the completions, and exits.
    :returns: The exit status.
    """
    status, offered, kept = DONE, io.StringIO(), ""
    try:
        if os.environ[COMPLETION_VARIABLE] == "complete_bash":
            kept = _rejoin_words()
        with redirect_stdout(offered), redirect_stderr(io.StringIO()):
            answer()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else DONE
    except Exception:  # errors must not appear at the prompt
        return FAILED
    for line in offered.getvalue().splitlines():
        sys.stdout.write(f"{line.removeprefix(kept)}\n")
    return status


def _rejoin_words() -> str:
    """
    Rejoin words that bash has split, such as `sqlite`, `:` and `///chat.db`, or `ada`, `@` and `example`.

    :returns: The beginning of the last word, which bash keeps. It replaces only the rest.
    """
    words: list[str] = []
    given = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    for before, word in zip(["", *given], given, strict=False):
        if word and len(words) > 1 and (_BASH_WORD_BREAK.fullmatch(before) or _BASH_WORD_BREAK.fullmatch(word)):
            words[-1] += word
        else:
            words.append(word)
    os.environ.update(COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))
    replaced = "" if _BASH_WORD_BREAK.fullmatch(given[-1]) else given[-1]
    return words[-1].removesuffix(replaced).removesuffix("@")  # bash replaces an @ too: it may begin a host name
