# SPDX-License-Identifier: Apache-2.0
"""
The terms of messages as the index has them, which depend on the versions of this package and of Python's Unicode.

Processes of several versions may use one file. The terms in its index are those of one version; another one adds and
takes away only terms that it knows to be the same.
"""

import re
import threading
import unicodedata
from functools import lru_cache

from haystack_chat_store.search_text import searchable_text_of_content, terms
from haystack_chat_store.stores.sqlite.texts import readable

#: To be raised whenever the terms of any message change.
TERMS_VERSION = 1
#: Which terms this process makes. What normal forms and classes of characters are depends on Python's version.
OWN_TERMS = f"{TERMS_VERSION}/{unicodedata.unidata_version}"
#: Those of an index that nobody has begun to fill.
NO_TERMS = ""

#: The Ctrl-C that came while SQLite was calling a function of ours, in this thread.
interruption = threading.local()


def terms_of_content(content: bytes) -> str:
    """
    Return the terms of a stored message as the index gets them, whatever has become of its content.
    """
    try:
        return " ".join(terms(searchable_text_of_content(readable(content))))
    except KeyboardInterrupt as interrupt:  # SQLite only says that a function has failed
        interruption.last = interrupt
        raise


def has_same_terms(version: str, content: bytes) -> bool:
    """
    Whether a stored message has the terms that `terms_of_content` returns in a process of another version, too.
    """
    if version == OWN_TERMS:
        return True
    try:
        is_alike = _numbers(version)[:1] == _numbers(OWN_TERMS)[:1]
        return is_alike and all(map(_folds_alike, set(searchable_text_of_content(readable(content)))))
    except KeyboardInterrupt as interrupt:
        interruption.last = interrupt
        raise


def can_search(version: str) -> bool:
    """
    Whether this process finds what is in an index of a version. Of one with newer Unicode, all but what it cannot know.
    """
    return _numbers(version)[:1] == _numbers(OWN_TERMS)[:1] and _numbers(version) >= _numbers(OWN_TERMS)


def are_older(version: str) -> bool:
    """
    Whether the terms of a version are older than those this process makes.
    """
    return _numbers(version) < _numbers(OWN_TERMS)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", version)))


@lru_cache(10_000)
def _folds_alike(character: str) -> bool:
    """
    Whether a character stands for the same in the terms of every Python that this package runs on.

    Unicode does not change what it has defined. A character that it has not had for long is a blank to who does not
    know it, and so for everyone if it is one to who does, such as an emoji.
    """
    is_old = unicodedata.ucd_3_2_0.category(character) != "Cn"
    is_known_blank = unicodedata.category(character) != "Cn" and terms(f"a{character}b") == ["a", "b"]
    return is_old or is_known_blank
