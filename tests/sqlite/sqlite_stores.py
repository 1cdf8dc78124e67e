# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder ask a database file themselves."""

import gc
import os
import re
import sqlite3
import time
import traceback
from contextlib import closing, contextmanager, suppress

from haystack.dataclasses import ChatMessage

from haystack_chat_store.stores.sqlite.connections import databases
from haystack_chat_store.testing.kit import texts

# Put together, so that it stands in no line of source that a traceback shows.
SECRET = " ".join(["my", "password", "is", "4711"])
SIDE_FILES = ("-wal", "-shm")
#: After so many seconds, a test that waits has failed.
HANG_LIMIT = 50.0


def until(is_so):
    """Wait until something is so."""
    gives_up_at = time.monotonic() + HANG_LIMIT
    while not is_so():
        assert time.monotonic() < gives_up_at
        time.sleep(0.001)


def database_of(store):
    """What a store's engine keeps of its file."""
    return databases.get(store.engine.settings)


def say(store, text, history="history"):
    return store.write_messages(history, [ChatMessage.from_user(text)])


def said(store, history="history"):
    return texts(store.retrieve_messages(history))


@contextmanager
def opened(path):
    """A connection that knows nothing of our stores."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def rows(path, query, *values):
    with opened(path) as connection:
        return connection.execute(query, values).fetchall()


def connections_of_stores(path):
    """Every connection to the file that is open in this process."""
    found = []
    for connection in (thing for thing in gc.get_objects() if isinstance(thing, sqlite3.Connection)):
        with suppress(sqlite3.ProgrammingError, FileNotFoundError):  # closed, or to a file that is gone
            if os.path.samefile(connection.execute("PRAGMA database_list").fetchone()[2], path):
                found.append(connection)
    return found


def assert_says(error, path, says):
    shown = "".join(traceback.format_exception(error))
    assert path in str(error)
    assert re.search(says, str(error)), str(error)
    assert SECRET not in shown
