# SPDX-License-Identifier: Apache-2.0
"""
The errors of haystack-chat-store.

```
ChatMessageStoreError            everything below; catch this one to catch all
├── StoreUnavailableError        the engine cannot be opened, reached, read or written
│   └── StoreTimeoutError        the engine did not become free, or did not answer, in time
├── SchemaVersionError           the database was written by a newer version of this package; it was left untouched
├── MessageEncodingError         a message holds something that cannot be stored (also a ValueError)
└── MessageDecodingError         a stored message cannot be read back
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


class StoreUnavailableError(ChatMessageStoreError):
    """
    The engine behind the store cannot be opened, reached, read or written.

    Of a failed write nothing was stored, or all of it if only the engine's confirmation was lost. It is safe to write
    again what carries ids.
    """


class StoreTimeoutError(StoreUnavailableError):
    """
    The engine did not become free, or did not answer, within the store's `timeout`.
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
    A stored message cannot be read back: it was changed by something else, or damaged.
    """
