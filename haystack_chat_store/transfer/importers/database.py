# SPDX-License-Identifier: Apache-2.0
"""Reads SQLite databases of other libraries, most of which have a row for each message, with the id of its session."""

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from haystack.dataclasses import ChatMessage
from typing_extensions import Self

from haystack_chat_store import validation
from haystack_chat_store.display import harmless_line
from haystack_chat_store.errors import DamagedFileError, MessageEncodingError
from haystack_chat_store.json_values import MAX_DEPTH, encode_meta, parse_json
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.transfer.histories import Faults, Histories, batched, invalid_id_fault
from haystack_chat_store.transfer.importers.conversations import ImportedMessage, Report, message_rows, time_of
from haystack_chat_store.types import Fault


class ForeignRow(NamedTuple):
    """
    A row of a library's table.

    :param key: The primary key.
    :param created_at: The time it was written, in microseconds since 1970.
    :param data: The JSON object that the library keeps in it.
    """

    key: int
    created_at: int
    data: dict[str, Any]


class ForeignMessage(NamedTuple):
    """A message made of one or several rows. `row` is the last of them."""

    row: ForeignRow
    message: ChatMessage


class Layout(NamedTuple):
    """
    Where a library keeps its messages, and how they are converted.

    :param library: The library's name. Message ids begin with it.
    :param table: The library's default name for the table.
    :param session: The column with the id of the session.
    :param data: The column with the message as JSON.
    :param time: The column with the time, or `None`.
    :param messages: Converts the rows of a session to messages.
    """

    library: str
    table: str
    session: str
    data: str
    time: str | None
    messages: Callable[[Iterable[ForeignRow], Report], Iterator[ForeignMessage]]


class ReadOnlyDatabase:
    """
    An SQLite database of another library, read in one transaction. No statement changes it.

    SQLite may make the files of a write-ahead log beside it while it is open, and removes them on closing. If its
    application writes at the same time, closing may move what that has written from the log to the database.

    Opening it checks the tables that are read, with their indexes, because SQLite may leave out rows of a damaged file
    without an error. This takes about twice as long as reading them.
    """

    def __init__(self, file: "str | os.PathLike[str]") -> None:
        """
        Open the database for reading only.

        :raises DamagedFileError: If the file is damaged, or not a database of the library.
        :raises OSError: If the file cannot be read.
        """
        path = Path(file).resolve()
        mode = _mode(path)
        self._name = os.fspath(file)
        self._opened_at = time.time_ns() // 1000
        self._connection = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None)
        self._connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        try:
            self._query("PRAGMA query_only = ON")
            self._query("BEGIN")
            for table in self._find_tables():
                self._check(table)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _find_tables(self) -> list[str]:
        """
        Find the tables of the library.

        :returns: The quoted names of the tables that are read.
        :raises DamagedFileError: If they are not there.
        """
        raise NotImplementedError

    def _check(self, table: str) -> None:
        count = 0
        for (found,) in self._query(f"PRAGMA integrity_check({table})"):
            self._refuse_damage(found)
            count += 1
        if count >= _MAX_FOUND:  # SQLite has stopped there: only a check of all tables takes another limit
            for (found,) in self._query(f"PRAGMA integrity_check({2**31 - 1})"):
                self._refuse_damage(found)

    def _refuse_damage(self, found: str) -> None:
        if found != "ok" and not _COSTS_NO_ROW.match(found):
            raise DamagedFileError(
                f"{self._name} is damaged, and SQLite may not find all of its rows: {harmless_line(found)}. Nothing "
                "was imported. Import a copy that is whole, such as one that `sqlite3 FILE .recover` makes."
            )

    def _columns(self, table: str) -> set[str]:
        """Return the names of a table's columns, none if there is no such table."""
        return {name for (name,) in self._query("SELECT name FROM pragma_table_info(?)", table)}

    def _query(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Run a query at once, and return an iterator over its rows."""
        parameters = [_parameter(value) for value in values]
        return self._fetched(self._run(lambda: self._connection.execute(sql, parameters)))

    def _fetched(self, cursor: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
        while (row := self._run(cursor.fetchone)) is not None:
            yield row

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except sqlite3.Error as error:  # distinguishes it from an error of the store
            raise DamagedFileError(f"{self._name} cannot be read as an SQLite database: {error}.") from error


# What a check finds where rows do not keep to what the schema declares, and queries find them all the same. With
# duplicates in a unique index, or values of another type in a column that is compared, they do not.
_COSTS_NO_ROW = re.compile(r"NULL value in |CHECK constraint failed in ")
# The check of a table ends after this many findings.
_MAX_FOUND = 100


def _mode(path: Path) -> str:
    """
    Return the mode in which reading a database leaves its folder as it was.

    Reading a database with a write-ahead log makes files beside it. SQLite removes them on closing, unless others use
    them, but only if it may write. If there is a log already, closing must not write it to the database.

    :raises OSError: If the file cannot be read. This error is clearer than SQLite's.
    """
    with path.open("rb") as file:
        versions = file.read(_VERSIONS.stop)[_VERSIONS]
    has_log = path.with_name(f"{path.name}-wal").exists()
    return "rw" if versions == _WRITE_AHEAD and not has_log else "ro"


# The place in a database's header of the versions that are needed to write and to read it, and what they are in the
# write-ahead mode.
_VERSIONS, _WRITE_AHEAD = slice(18, 20), b"\2\2"


def _parameter(value: Any) -> Any:
    """Return a value for a query. Text that is not UTF-8 becomes the bytes that it was made of."""
    try:
        if isinstance(value, str):
            value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")


class ForeignDatabase(ReadOnlyDatabase):
    """A library's database with a row for each message."""

    def __init__(self, file: "str | os.PathLike[str]", layout: Layout) -> None:
        """
        Open the database for reading only.

        :raises DamagedFileError: If the file does not have the library's table.
        :raises OSError: If the file cannot be read.
        """
        self._layout = layout
        super().__init__(file)

    def _find_tables(self) -> list[str]:
        self._table = self._table_name()
        return [self._table]

    def message_count(self) -> int:
        """Return the number of rows in the table."""
        ((count,),) = self._query(f"SELECT count(*) FROM {self._table}")  # noqa: S608  (quoted)
        return int(count)

    def histories(self, faults: Faults) -> Histories:
        """
        Yield each session as a history.

        :param faults: Receives the faults of sessions and rows that are left out.
        """
        for chat_history_id, first, last, meta in self._history_rows():
            try:
                validation.validated_id(chat_history_id, "the id of a session")
            except ValueError as error:
                faults.add(invalid_id_fault(chat_history_id, error))
                continue
            times = self._time(first), self._time(last)
            yield (
                HistoryRow(chat_history_id=chat_history_id, created_at=times[0], updated_at=times[1], meta=meta),
                _SessionRows(self, chat_history_id, faults),
            )

    def _history_rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield a row for each history: its id, the times of its first and last message, and its meta."""
        session, moment = self._layout.session, self._layout.time or "NULL"
        return self._query(
            f"SELECT {session}, min({moment}), max({moment}), NULL FROM {self._table} "  # noqa: S608  (quoted)
            f"GROUP BY {session} ORDER BY {session}"
        )

    def rows(self, chat_history_id: str, faults: Faults) -> Iterator[MessageRow]:
        """Yield the messages of a session as rows."""

        def report(description: str) -> None:
            faults.add(Fault(chat_history_id=chat_history_id, description=description))

        messages = (
            ImportedMessage(str(row.key), message, row.created_at)
            for row, message in self._layout.messages(self._parsed(chat_history_id, report), report)
        )
        return message_rows(self._layout.library, messages, self._opened_at, report, "row")

    def _parsed(self, chat_history_id: str, report: Report) -> Iterator[ForeignRow]:
        for key, text, created_at in self._stored(chat_history_id):
            try:
                parsed = parse_json(text)
                if str(text).count("[") + str(text).count("{") > MAX_DEPTH:
                    encode_meta(parsed)  # refuses data that is nested too deeply
            except MessageEncodingError as error:
                report(f"Row {key} was left out: {error}")
                continue
            except (ValueError, TypeError, RecursionError):
                parsed = None
            if isinstance(parsed, dict):
                yield ForeignRow(key, self._time(created_at), parsed)
            else:
                report(f"Row {key} is not a JSON object, and was left out.")

    def _stored(self, chat_history_id: str) -> Iterator[tuple[Any, ...]]:
        """Yield key, data and time of each row of a session, in order."""
        _, _, session, data, moment, _ = self._layout
        return self._query(
            f"SELECT id, {data}, {moment or 'NULL'} FROM {self._table} WHERE {session} = ? ORDER BY id",  # noqa: S608
            chat_history_id,
        )

    def _time(self, value: Any) -> int:
        """Return a time in microseconds, or the time of the import for what is no time."""
        found = time_of(value)
        return self._opened_at if found is None else found

    def _table_name(self) -> str:
        """
        Return the quoted name of the library's table.

        It is the table with the default name, or else the only table with the same columns.

        :raises DamagedFileError: If there is no such table, or several.
        """
        wanted = {"id", self._layout.session, self._layout.data, *filter(None, [self._layout.time])}
        tables = [name for (name,) in self._query("SELECT name FROM sqlite_master WHERE type = 'table'")]
        alike = [table for table in tables if self._columns(table) == wanted]
        if self._layout.table in alike:
            alike = [self._layout.table]
        columns = f"the columns {', '.join(sorted(wanted))}"
        if not alike:
            raise DamagedFileError(
                f"{self._name} is not a database of the format {self._layout.library}: it has no table "
                f"{self._layout.table} with {columns}."
            )
        if len(alike) > 1:
            raise DamagedFileError(
                f"{self._name} has {len(alike)} tables with {columns}: {', '.join(sorted(map(repr, alike)))}. Name the "
                f"one to import {self._layout.table}, in a copy of the file."
            )
        quoted: str = alike[0].replace('"', '""')
        return f'"{quoted}"'


class _SessionRows:
    """The messages of a session, in batches."""

    def __init__(self, database: ForeignDatabase, chat_history_id: str, faults: Faults) -> None:
        self._database, self._id, self._faults = database, chat_history_id, faults

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        return batched(self._database.rows(self._id, self._faults))
