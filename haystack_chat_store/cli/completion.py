# SPDX-License-Identifier: Apache-2.0
"""
Completes words for a shell: offers what is harmless and right there, and says nothing else.
"""

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from haystack_chat_store.cli import COMPLETION_VARIABLE

# Shells expand what they are offered like what was typed, and each quotes in its own way. To none of them do these
# characters mean anything but themselves.
_plain_word = re.compile(r"[\w./][\w./:=@%+-]*")
# Where bash cuts words, whatever is quoted or not.
_bash_cut = re.compile("[:=@]+")


def is_plain(word: str) -> bool:
    """
    Return whether a word means itself in every shell, so that it needs no quotation marks.
    """
    return _plain_word.fullmatch(word) is not None


def complete(answer: Callable[[], Any]) -> int:
    """
    Answer a shell; rather nothing than an error, for it has nowhere to show one. Returns the exit status.

    :param answer: Prints what a shell is offered, and exits.
    """
    status, offered, cut = 0, io.StringIO(), ""
    try:
        if os.environ[COMPLETION_VARIABLE] == "complete_bash":
            cut = _whole_words()
        with redirect_stdout(offered), redirect_stderr(io.StringIO()):
            answer()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 0
    except Exception:  # whatever it is, a prompt is no place for it
        return 1
    for line in offered.getvalue().splitlines():
        sys.stdout.write(f"{line.removeprefix(cut)}\n")
    return status


def _whole_words() -> str:
    """
    Put together what bash has cut: `sqlite`, `:` and `///chat.db`, or `ada@example`, typed as `ada`, `@` and `example`.

    :returns: What stands before the part of the last word that bash replaces.
    """
    words: list[str] = []
    given = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    for before, word in zip(["", *given], given, strict=False):
        if word and len(words) > 1 and (_bash_cut.fullmatch(before) or _bash_cut.fullmatch(word)):
            words[-1] += word
        else:
            words.append(word)
    os.environ.update(COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))
    replaced = "" if _bash_cut.fullmatch(given[-1]) else given[-1]
    return words[-1].removesuffix(replaced).removesuffix("@")  # bash replaces an @, too: it may begin a host's name
