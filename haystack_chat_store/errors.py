# SPDX-License-Identifier: Apache-2.0
"""
The errors of haystack-chat-store.

```
ChatMessageStoreError            the base of all errors below
├── StoreUnavailableError        the engine cannot be reached, read or written now (also a ConnectionError)
│   └── StoreTimeoutError        the engine did not become free, or did not answer, in time (also a TimeoutError)
├── StoreConfigurationError      the store is set up wrongly; a retry does not help
├── SchemaVersionError           a newer version of this package wrote the database; the database was not touched
├── MessageEncodingError         a message contains a value that cannot be stored (also a ValueError)
├── MessageDecodingError         a stored message cannot be read back
├── ConflictError                the stored data is not what the call expects; nothing was changed
│   ├── DuplicateMessageError    the history or the batch already has a message's id, and the policy is FAIL
│   ├── ChatHistoryChangedError  the history has another revision than expected
│   └── ChatHistoryExistsError   the history to make already exists, or the target already has other messages
├── ChatHistoryAccessError       a write to a history of another user, or what one user's store may not do
├── ChatHistoryNotFoundError     the history does not exist (also a LookupError)
├── MessageNotFoundError         the message does not exist in the history (also a LookupError)
├── TranscriptError              a transcript has no question, or nothing in common with the history (also a ValueError)
├── UnsupportedOperationError    the store or its engine does not support the operation
└── DamagedFileError             an import file was changed or cut off (also a ValueError); nothing was imported
```

An argument that is wrong in itself (an empty `chat_history_id`, a negative `last_k`, a list item that is not a
`ChatMessage`) raises a plain `ValueError`, as everywhere in Haystack.

If a driver raised an exception, it is the `__cause__` of the error. The text of an error contains neither the text of
chat messages nor passwords.
"""


class ChatMessageStoreError(Exception):
    """The base class of all errors of chat message stores."""


class StoreUnavailableError(ChatMessageStoreError, ConnectionError):
    """
    The engine cannot be reached, read or written now. The cause may go away by itself.

    A failed write stored nothing, or the whole batch if only the engine's confirmation was lost. Messages that have ids
    can safely be written again.
    """


class StoreTimeoutError(StoreUnavailableError, TimeoutError):
    """The engine did not become free, or did not answer, within the store's `timeout` (in seconds)."""


class StoreConfigurationError(ChatMessageStoreError):
    """
    The store is set up wrongly. A retry does not help.

    Examples are a file that is not a database, a folder that does not exist, a table of another program, a refused
    password, a missing right, and an environment variable that is not set.
    """


class SchemaVersionError(ChatMessageStoreError):
    """A newer version of this package wrote the database. The database was not touched."""


class MessageEncodingError(ChatMessageStoreError, ValueError):
    """
    A message contains a value that cannot be stored. The error names the value's path. Nothing of the batch was stored.
    """


class MessageDecodingError(ChatMessageStoreError):
    """
    A stored message cannot be read back, or parts of its history are missing: another program changed or damaged it.
    """


class ConflictError(ChatMessageStoreError):
    """The stored data is not what the call expects. Nothing was changed."""


class DuplicateMessageError(ConflictError):
    """
    The history, or the batch itself, already has a message's id, and the policy is `DuplicatePolicy.FAIL`.

    Nothing was written.
    """


class ChatHistoryChangedError(ConflictError):
    """
    The history has another revision than the call expects: another writer changed it.

    Nothing was changed. Read the history again, then decide again.
    """


class ChatHistoryExistsError(ConflictError):
    """
    The history that is to be made or renamed to already exists, or the target of a copy or import has other messages.

    Nothing was changed.
    """


class ChatHistoryAccessError(ChatMessageStoreError):
    """
    A store of one user was asked to write to a history that is not this user's, or for what concerns other users.

    Nothing was changed. The error says nothing about the history.
    """


class ChatHistoryNotFoundError(ChatMessageStoreError, LookupError):
    """No history has this id."""


class MessageNotFoundError(ChatMessageStoreError, LookupError):
    """No message of the history has this id. Nothing was changed."""


class TranscriptError(ChatMessageStoreError, ValueError):
    """
    A transcript has no question, or nothing in common with the history that it was sent for. Nothing was changed.

    It belongs to another conversation, or is a request beside it, such as one for a title.
    """


class UnsupportedOperationError(ChatMessageStoreError):
    """
    The store does not support the operation: its engine does not have it, or a setting does not allow it.

    :param operation: The name of the operation that the engine does not have, such as `"search"`, or `None` if it has
        the operation.
    """

    def __init__(self, message: str, operation: str | None = None) -> None:
        """Keep the name of the operation beside the message."""
        super().__init__(message)
        self.operation = operation


class DamagedFileError(ChatMessageStoreError, ValueError):
    """An import file was changed or cut off, or has another format. Nothing of it was imported."""
