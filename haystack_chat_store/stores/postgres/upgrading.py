# SPDX-License-Identifier: Apache-2.0
"""Creates the tables, upgrades them, and turns search on."""

from collections.abc import Awaitable, Callable

import psycopg
from haystack import logging

from haystack_chat_store.errors import SchemaVersionError, StoreConfigurationError
from haystack_chat_store.stores.postgres.failures import SchemaPermissionError
from haystack_chat_store.stores.postgres.schema import HAS_SCHEMA, MIGRATIONS
from haystack_chat_store.stores.postgres.session import Session
from haystack_chat_store.stores.postgres.statements import Statement

_VERSION = Statement("SELECT max(version) FROM {version}")

logger = logging.getLogger(__name__)

# Processes that make or change the tables at the same time wait for each other here. The number is "chat" in ASCII.
_UPGRADE_LOCK = "SELECT pg_advisory_xact_lock(1667785076)"
# An upgrade that waits for a lock makes writers wait, too. It gives up and tries again, before the server looks for a
# deadlock, which it does after a second.
_LOCK_TIMEOUT = "SET LOCAL lock_timeout = 500"
# Looked up in the catalog, because to_regclass may answer from a cache that another session's commit has outdated.
_FIND_RELATIONS = """
    SELECT array_agg(relname::text)
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = %s AND relname = ANY (%s)
"""


class NoTablesError(Exception):
    """There is nothing to read: the tables were not made yet."""


async def prepare(session: Session, *, reads: bool) -> None:
    """
    Look at the database when a connection is new. Make or upgrade the tables, if the first one finds it necessary.

    :param reads: Whether the call only reads, and so changes nothing.
    :raises NoTablesError: If the call only reads, and there are no tables.
    :raises SchemaVersionError: If the call only reads, and the tables are those of an earlier version.
    """
    has_tables = await look(session)
    if not session.database.is_current:
        version = await _version(session) if has_tables else 0
        if version < len(MIGRATIONS):
            if reads and version == 0:
                raise NoTablesError
            if reads:
                raise SchemaVersionError(
                    f"The database has schema version {version}, of an earlier version of haystack-chat-store, and "
                    "reading it changes nothing. Upgrade it: write to it, or run `haystack-chat-store doctor --repair`."
                )
            await _change_schema(session, _bring_up_to_date)
        session.database.is_current = True


async def check_encoding(session: Session) -> None:
    """
    Check that the database can hold every text.

    :raises StoreConfigurationError: If it is not encoded in UTF-8.
    """
    encoding = session.connection.info.parameter_status("server_encoding")
    if encoding is None:  # a pooler may leave it out
        ((encoding,),) = await session.fetch("SHOW server_encoding")
    if encoding != "UTF8":
        raise StoreConfigurationError(
            f"The encoding of the database {session.connection.info.dbname!r} is {encoding}, which cannot hold every "
            "text. Nothing was stored. Use a database that was made with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE "
            "template0."
        )


async def look(session: Session) -> bool:
    """Find out whether search is on, and whether the tables exist. Return the latter."""
    database, tables = session.database, session.database.tables
    names = [tables.version_table, tables.search_index, tables.unindexed]
    ((found,),) = await session.fetch(_FIND_RELATIONS, [database.schema_name, names])
    has_tables, has_search_index, has_unindexed = (name in (found or ()) for name in names)
    database.has_search = database.has_search or has_search_index
    database.is_indexed = database.is_indexed or has_unindexed
    return has_tables


async def turn_search_on(session: Session) -> None:
    """Create the index that turns search on, if it does not exist."""
    await look(session)
    if not session.database.has_search:
        await _change_schema(session, _create_search_index)
        await look(session)
        logger.info("Turned search on in the tables {name}.", name=session.database.tables.name)


async def finish_index(session: Session) -> None:
    """Record that all messages have their terms, but for those of writers that do not know yet that search is on."""
    await _change_schema(session, _create_unindexed)
    session.database.is_indexed = True
    logger.info("Indexed all messages in the tables {name}.", name=session.database.tables.name)


async def _change_schema(session: Session, change: Callable[[Session], Awaitable[None]]) -> None:
    try:
        await session.in_transaction(change, is_result=lambda _: False)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaPermissionError(error.diag.message_primary or "") from error


async def _bring_up_to_date(session: Session) -> None:
    tables = session.database.tables
    await session.run(_UPGRADE_LOCK)
    version = await _version(session) if await look(session) else 0
    if version == len(MIGRATIONS):
        return
    if version == 0 and not await session.fetch(HAS_SCHEMA, [session.database.schema_name]):
        await session.run(tables.create_schema())
    if version > 0:
        await session.run(_LOCK_TIMEOUT)
        await session.run(tables.lock)
    for statement in tables.upgrade(version):
        await session.run_however_long_it_takes(statement)
    if version == 0:
        logger.info("Made the tables {name}.", name=tables.name)
    else:
        logger.info("Upgraded the tables {name} to version {new}.", name=tables.name, new=len(MIGRATIONS))


async def _create_search_index(session: Session) -> None:
    await session.run(_UPGRADE_LOCK)
    await session.run(_LOCK_TIMEOUT)
    await session.run_however_long_it_takes(session.database.tables.create_search_index)
    await session.run_however_long_it_takes(session.database.tables.create_title_index)
    if await session.fetch(session.database.tables.has_messages) == [(False,)]:
        await session.run(session.database.tables.create_unindexed)


async def _create_unindexed(session: Session) -> None:
    await session.run(_UPGRADE_LOCK)
    await session.run(_LOCK_TIMEOUT)
    await session.run_however_long_it_takes(session.database.tables.create_unindexed)


async def _version(session: Session) -> int:
    try:
        ((version,),) = await session.fetch(_VERSION)
    except psycopg.errors.UndefinedColumn as error:
        name = session.database.tables.version_table
        raise StoreConfigurationError(
            f"The table {name!r} is not one of this package. It was left untouched. Choose another table_prefix or "
            "schema_name."
        ) from error
    if version is not None and version > len(MIGRATIONS):
        raise SchemaVersionError(
            f"The database has schema version {version}, but this version of haystack-chat-store knows only "
            f"versions up to {len(MIGRATIONS)}. It was left untouched. Upgrade haystack-chat-store to use it."
        )
    return int(version or 0)
