# SPDX-License-Identifier: Apache-2.0
"""Maps exceptions of `sqlite3` to this package's exceptions, which say what to do."""

import sqlite3

from haystack_chat_store.errors import (
    ChatMessageStoreError,
    MessageDecodingError,
    MessageEncodingError,
    StoreConfigurationError,
    StoreTimeoutError,
    StoreUnavailableError,
    UnsupportedOperationError,
)

# A part of SQLite's message, and the error and the advice for it.
_ADVICE: dict[str, tuple[type[ChatMessageStoreError], str]] = {
    "unable to open": (StoreUnavailableError, "It must be a file that this process may read and write."),
    "not a database": (StoreConfigurationError, "Choose another path for the chat histories."),
    "already exists": (StoreConfigurationError, "Another program has a table of this name here. Choose another path."),
    "readonly": (StoreUnavailableError, "Give this process write access to the file and its folder."),
    "is full": (StoreUnavailableError, "Make room on the disk."),
    "I/O error": (StoreUnavailableError, "Look at its disk, quota and limits."),
    "too big": (MessageEncodingError, "One of these texts is larger than the gigabyte that SQLite can hold."),
    "malformed": (
        StoreUnavailableError,
        "The file is damaged. Restore it from a backup, or recover what is readable with SQLite's own tools.",
    ),
    "no such table: haystack_chat_terms": (
        StoreUnavailableError,
        "The search index has been deleted. `haystack-chat-store doctor --repair` makes it again.",
    ),
    "no such table": (StoreUnavailableError, "A table has been deleted. Restore the file from a backup."),
    "no such index": (
        StoreUnavailableError,
        "It has been deleted. `haystack-chat-store doctor --repair` makes it again.",
    ),
}


def explained(error: sqlite3.Error, path: str, timeout: float) -> ChatMessageStoreError:
    """
    Return this package's exception for one of `sqlite3`.

    :param path: The file.
    :param timeout: The number of seconds that the failed call waited for locks.
    """
    text = str(error)
    if is_of_damaged_text(error):  # its message quotes the text
        return MessageDecodingError("A stored text is damaged, so the messages with it cannot be read.")
    if "locked" in text:
        return timed_out(path, timeout, "another process or connection")
    if "no such module" in text:
        return UnsupportedOperationError(
            f"Search needs FTS5, which the SQLite of this Python was built without ({text}). Use another build, or "
            "another file for a store without search."
        )
    kind, advice = next((found for sign, found in _ADVICE.items() if sign in text), (StoreUnavailableError, ""))
    return kind(f"SQLite failed on {path}: {text}. {advice}".rstrip())


def cause_of_explained(error: sqlite3.Error) -> sqlite3.Error | None:
    """Return the cause to give to the exception for an error: the message about a damaged text quotes it."""
    return None if is_of_damaged_text(error) else error


def is_of_damaged_text(error: sqlite3.Error) -> bool:
    """Whether SQLite could not decode a text. Its message quotes the text."""
    return "Could not decode" in str(error)


def in_the_middle_of_a_write(path: str) -> StoreUnavailableError:
    """Return the error of a write that would wait for another one of its own thread."""
    return StoreUnavailableError(
        f"This thread is in the middle of another write to {path}, which called this one: a finalizer (`__del__`), a "
        "callback of a weak reference, or the source of an import. This one stored nothing. Make it in another thread."
    )


def timed_out(path: str, timeout: float, holder: str) -> StoreTimeoutError:
    """Return the error of a call that waited for a lock in vain."""
    return StoreTimeoutError(
        f"{path} stayed locked by {holder} for more than {timeout} seconds. "
        "Try again, or give the store a longer timeout."
    )
