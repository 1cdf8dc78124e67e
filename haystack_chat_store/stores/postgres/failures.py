# SPDX-License-Identifier: Apache-2.0
"""Maps exceptions of psycopg to this package's exceptions."""

from typing import Any

import psycopg

from haystack_chat_store.errors import StoreTimeoutError, StoreUnavailableError


class SchemaPermissionError(psycopg.errors.InsufficientPrivilege):
    """The role may not create or change the tables."""


def store_error(error: psycopg.Error, address: str, password: Any, timeout: float) -> StoreUnavailableError:
    """
    Return the exception that says what has failed, where, and what to do.

    :param error: What psycopg has raised.
    :param address: Where the server is.
    :param password: The password, if it is known. No text that contains it is repeated.
    :param timeout: The timeout of a call, in seconds.
    """
    server = f"PostgreSQL at {address}"
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return StoreTimeoutError(f"{server}, did not answer in time. The timeout is {timeout} seconds.")
    said = type(error).__name__
    if isinstance(error, (psycopg.OperationalError, psycopg.ProgrammingError, psycopg.InterfaceError)):
        text = (error.diag.message_primary if error.sqlstate else None) or str(error)
        # A mask in the password's place would show which word, or which letter, it is.
        said = said if password and password in text else text
    if isinstance(error, SchemaPermissionError):
        return StoreUnavailableError(
            f"{server}, refused: {said}. If this role may not create or change tables, let an "
            "administrator run what create_schema_sql() returns."
        )
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return StoreUnavailableError(
            f"{server}, refused: {said}. Let an administrator grant this role SELECT, INSERT, UPDATE and DELETE on "
            "the histories and messages, SELECT on the version, and USAGE on the schema."
        )
    return StoreUnavailableError(f"{server}, failed: {said}")
