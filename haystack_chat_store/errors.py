# SPDX-License-Identifier: Apache-2.0
"""
The errors of haystack-chat-store.

```
ChatMessageStoreError            everything below; catch this one to catch all
├── StoreUnavailableError        the engine cannot be reached, read or written now (also a ConnectionError)
│   └── StoreTimeoutError        the engine did not become free, or did not answer, in time (also a TimeoutError)
├── StoreConfigurationError      the store is set up wrongly: trying again does not help
├── SchemaVersionError           a newer version of this package wrote the database; it was left untouched
├── MessageEncodingError         a message holds something that cannot be stored (also a ValueError)
├── MessageDecodingError         a stored message cannot be read back
├── ConflictError                what is stored is not what the call expects; nothing was changed
│   ├── DuplicateMessageError    an id is there already, and the policy is FAIL
│   ├── ChatHistoryChangedError  the history has another number of messages than expected
│   └── ChatHistoryExistsError   the history to copy or import to has other messages already
├── ChatHistoryNotFoundError     there is no such history (also a LookupError)
├── MessageNotFoundError         the history has no such message (also a LookupError)
├── UnsupportedOperationError    this store, or its engine, cannot do that
└── DamagedFileError             a file to import was changed or cut off (also a ValueError); nothing was imported
```

Arguments that are wrong in themselves (an empty `chat_history_id`, a negative `last_k`, a list item that is not a
`ChatMessage`) raise a plain `ValueError`, as everywhere in Haystack.

A driver's exception is the `__cause__` of ours. No message says what a chat message contained, and none shows a
password.
"""


class ChatMessageStoreError(Exception):
    """
    Something went wrong in a chat message store.
    """


class StoreUnavailableError(ChatMessageStoreError, ConnectionError):
    """
    The engine behind the store cannot be reached, read or written now. This may pass by itself.

    A failed write stored nothing, or all of its batch if only the engine's confirmation was lost. Messages that carry
    ids can safely be written again.
    """


class StoreTimeoutError(StoreUnavailableError, TimeoutError):
    """
    The engine did not become free, or did not answer, within the store's `timeout`.
    """


class StoreConfigurationError(ChatMessageStoreError):
    """
    The store is set up wrongly: trying again does not help.

    Examples are a file that is no database, a folder that does not exist, and a table of another program.
    """


class SchemaVersionError(ChatMessageStoreError):
    """
    The database was written by a newer version of this package. It was left untouched.
    """


class MessageEncodingError(ChatMessageStoreError, ValueError):
    """
    A message holds a value that has no form in JSON, at the path the error names. Nothing of its batch was stored.
    """


class MessageDecodingError(ChatMessageStoreError):
    """
    A stored message cannot be read back, or parts of its history are missing: something else has changed or damaged it.
    """


class ConflictError(ChatMessageStoreError):
    """
    What is stored is not what the call took it for. Nothing was changed.
    """


class DuplicateMessageError(ConflictError):
    """
    A message's id is there already, and the policy of the write is `DuplicatePolicy.FAIL`. Nothing was written.
    """


class ChatHistoryChangedError(ConflictError):
    """
    The history does not have the number of messages that the call expects: another writer changed it.

    Nothing was written. Read what is new, then decide again.
    """


class ChatHistoryExistsError(ConflictError):
    """
    The history to copy or import to has messages already that are not those. Nothing was changed.
    """


class ChatHistoryNotFoundError(ChatMessageStoreError, LookupError):
    """
    There is no history with this id.
    """


class MessageNotFoundError(ChatMessageStoreError, LookupError):
    """
    The history has no message with this id. Nothing was changed.
    """


class UnsupportedOperationError(ChatMessageStoreError):
    """
    This store cannot do what was asked: its engine has no means for it, or it was opened without.
    """


class DamagedFileError(ChatMessageStoreError, ValueError):
    """
    A file to import was changed or cut off, or is of another format. Nothing of it was imported.
    """
