# SPDX-License-Identifier: Apache-2.0
"""Maps exceptions of psycopg to this package's exceptions."""

import re
from typing import Any

import psycopg

from haystack_chat_store.errors import (
    ChatMessageStoreError,
    StoreConfigurationError,
    StoreTimeoutError,
    StoreUnavailableError,
)

# Classes of SQLSTATE that a retry does not change: the login, the database.
_CONFIGURATION_STATES = ("28", "3D")
# The SQLSTATEs of a server that ends a connection.
_ENDING_STATES = ("08", "57P01", "57P02", "57P05")
# libpq hands out no SQLSTATE for what fails while it connects. What these texts mean, and what to do.
_CONNECTING = {
    "authentication failed for user": "refused the user name or the password of the connection string",
    "no password supplied": "asks for a password, and the connection string has none",
    "no pg_hba.conf entry|pg_hba.conf rejects": "does not admit this user from here to this database (pg_hba.conf)",
    "database .* does not exist": "does not have the database of the connection string",
    "role .* does not exist": "does not have the user of the connection string",
    "permission denied for database|is not permitted to log in": "does not let this user into the database",
    "server does not support SSL": "has no TLS, for which the connection string asks (sslmode)",
    "SSL connection is required|no encryption": "asks for TLS (sslmode=require)",
    "certificate|sslmode|SSL error: wrong version": (
        "cannot be reached with the TLS settings of the connection string (sslmode, sslrootcert, …)"
    ),
    "unrecognized configuration parameter|invalid value for parameter|invalid command-line argument": (
        "refused the options of the connection string"
    ),
    "invalid (connection option|port number|integer value|.* value)": (
        "cannot be reached with this connection string, one of whose values is wrong"
    ),
}


class SchemaPermissionError(psycopg.errors.InsufficientPrivilege):
    """The role may not create or change the tables."""


def is_lost_connection(error: psycopg.OperationalError) -> bool:
    """Whether the server, or something on the way to it, has ended the connection, while there was time left."""
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return False
    return error.sqlstate is None or error.sqlstate.startswith(_ENDING_STATES)


def store_error(error: psycopg.Error, address: str, password: Any, timeout: float) -> ChatMessageStoreError:
    """
    Return the exception that says what has failed, where, and what to do.

    :param error: The error that psycopg has raised.
    :param address: Where the server is.
    :param password: The password, if it is known. No text that contains it is repeated.
    :param timeout: The timeout of a call, in seconds.
    """
    server = f"PostgreSQL at {address}"
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return StoreTimeoutError(f"{server}, did not answer in time. The timeout is {timeout} seconds.")
    said = _said(error, password)
    if isinstance(error, SchemaPermissionError):
        return StoreConfigurationError(
            f"{server}, refused: {said}. If this role may not create or change tables, let an "
            "administrator run what create_schema_sql() returns."
        )
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return StoreConfigurationError(
            f"{server}, refused: {said}. Let an administrator grant this role SELECT, INSERT, UPDATE and DELETE on "
            "the histories, messages and namespaces, SELECT on the version, and USAGE on the schema."
        )
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return StoreUnavailableError(
            f"{server}, takes no writes: it is a standby, or its transactions are read-only by default. Connect to the "
            "primary, or with several hosts and target_session_attrs=read-write."
        )
    if error.sqlstate is None:
        for pattern, reason in _CONNECTING.items():
            if re.search(pattern, str(error)):
                return StoreConfigurationError(f"{server}, {reason}: {said}")
    is_configuration = (error.sqlstate or "").startswith(_CONFIGURATION_STATES)
    return (StoreConfigurationError if is_configuration else StoreUnavailableError)(f"{server}, failed: {said}")


def _said(error: psycopg.Error, password: Any) -> str:
    """Return what went wrong, in words without data and without the password."""
    if isinstance(error, (psycopg.OperationalError, psycopg.ProgrammingError, psycopg.InterfaceError)):
        text = (error.diag.message_primary if error.sqlstate else None) or str(error)
        if not (password and password in text):
            return text
        # A mask in the password's place would show which word, or which letter, it is.
        return "its message is not repeated here, because it contains the password"
    # The message may quote data. The name of the error does not.
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return f"{words} (SQLSTATE {error.sqlstate})" if error.sqlstate else words
