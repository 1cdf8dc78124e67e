# SPDX-License-Identifier: Apache-2.0
"""
How texts of the database are read that something else may have damaged.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


def readable(text: bytes) -> str:
    """
    Return a text that may be damaged. What is no UTF-8 becomes something that is no JSON either.
    """
    return text.decode(errors="backslashreplace")


@contextmanager
def all_readable(connection: sqlite3.Connection) -> Iterator[None]:
    """
    Have a connection read damaged texts too: one must not hide the others.
    """
    connection.text_factory = readable
    try:
        yield
    finally:
        connection.text_factory = str


def is_readable(text: bytes | None) -> bool:
    """
    Whether a text, if there is one, is not damaged.
    """
    try:
        return text is None or text.decode() is not None
    except UnicodeDecodeError:
        return False
