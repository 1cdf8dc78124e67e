# SPDX-License-Identifier: Apache-2.0
"""
What the databases of other libraries have in common: a table with a row for each message, and a column for its session.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from haystack.dataclasses import ChatMessage
from typing_extensions import Self

from haystack_chat_store import validation
from haystack_chat_store.codec import encode_message
from haystack_chat_store.errors import DamagedFileError, MessageEncodingError
from haystack_chat_store.json_values import MAX_DEPTH, encode_meta, parse_json
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.transfer.histories import Faults, Histories, arrived_row, batched, unnamed
from haystack_chat_store.transfer.seen_ids import SeenIds
from haystack_chat_store.transfer.times import parsed_time
from haystack_chat_store.types import Fault

#: Is told what of a session cannot be a message here.
Report: TypeAlias = Callable[[str], None]


class ForeignRow(NamedTuple):
    """
    A row of a library's table.

    :param key: Its primary key.
    :param created_at: When it was written, in microseconds since 1970.
    :param data: What the library keeps in it as JSON.
    """

    key: int
    created_at: int
    data: dict[str, Any]


class ForeignMessage(NamedTuple):
    """
    A message made of one row or several, of which `row` is the last.
    """

    row: ForeignRow
    message: ChatMessage


class Layout(NamedTuple):
    """
    Where a library keeps its messages, and what becomes of them.

    :param library: Its name, which message ids begin with.
    :param table: The table, by the name that the library gives it unless told another.
    :param session: The column with the id of the session.
    :param data: The column with the message as JSON.
    :param time: The column with the time, or `None`.
    :param messages: Turns the rows of a session into messages.
    """

    library: str
    table: str
    session: str
    data: str
    time: str | None
    messages: Callable[[Iterable[ForeignRow], Report], Iterator[ForeignMessage]]


class ForeignDatabase:
    """
    A library's database, as of one moment.
    """

    def __init__(self, file: "str | os.PathLike[str]", layout: Layout) -> None:
        """
        Open it for reading only.

        :raises DamagedFileError: If it does not have the library's table.
        :raises OSError: If it cannot be read.
        """
        path = Path(file).resolve()
        with path.open("rb"):  # says better than SQLite why that is not possible
            pass
        self._name, self._layout = os.fspath(file), layout
        self._opened_at = time.time_ns() // 1000
        self._connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        self._connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        try:
            self._query("BEGIN")
            self._table = self._table_name()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def message_count(self) -> int:
        """
        Return how many rows there are, of which messages are made.
        """
        ((count,),) = self._query(f"SELECT count(*) FROM {self._table}")  # noqa: S608  (quoted)
        return int(count)

    def histories(self, faults: Faults) -> Histories:
        """
        Yield each session as a history.

        :param faults: Gets what cannot be one, or cannot be a message.
        """
        session, moment = self._layout.session, self._layout.time or "NULL"
        for chat_history_id, first, last in self._query(
            f"SELECT {session}, min({moment}), max({moment}) FROM {self._table} "  # noqa: S608  (quoted)
            f"GROUP BY {session} ORDER BY {session}"
        ):
            try:
                validation.validated_id(chat_history_id, "the id of a session")
            except ValueError as error:
                faults[unnamed(chat_history_id, error)] = None
                continue
            times = self._microseconds(first), self._microseconds(last)
            yield (
                HistoryRow(chat_history_id=chat_history_id, created_at=times[0], updated_at=times[1]),
                _SessionRows(self, chat_history_id, faults),
            )

    def rows(self, chat_history_id: str, faults: Faults) -> Iterator[MessageRow]:
        """
        Yield the messages of a session.
        """

        def report(what: str) -> None:
            faults[Fault(chat_history_id=chat_history_id, description=what)] = None

        library = self._layout.library
        with SeenIds() as ids:
            for row, message in self._layout.messages(self._parsed(chat_history_id, report), report):
                message_id = f"{library}:{row.key}"
                try:
                    arrived = arrived_row(row.created_at, encode_message(message, message_id, f"row {row.key}"))
                except ValueError as error:  # which a MessageEncodingError is
                    report(f"{error} The message was left out.")
                    continue
                if ids.add(message_id):
                    yield arrived
                else:
                    report(f"A second row {row.key} was left out.")

    def _parsed(self, chat_history_id: str, report: Report) -> Iterator[ForeignRow]:
        _, _, session, data, moment, _ = self._layout
        for key, text, created_at in self._query(
            f"SELECT id, {data}, {moment or 'NULL'} FROM {self._table} WHERE {session} = ? ORDER BY id",  # noqa: S608
            chat_history_id,
        ):
            try:
                parsed = parse_json(text)
                if str(text).count("[") + str(text).count("{") > MAX_DEPTH:
                    encode_meta(parsed)  # refuses what is so deep that one step further it could not be worked with
            except MessageEncodingError as error:
                report(f"Row {key} was left out: {error}")
                continue
            except (ValueError, TypeError, RecursionError):
                parsed = None
            if isinstance(parsed, dict):
                yield ForeignRow(key, self._microseconds(created_at), parsed)
            else:
                report(f"Row {key} is not a JSON object, and was left out.")

    def _microseconds(self, text: Any) -> int:
        """
        Return a time as SQLite writes it, in UTC unless it says otherwise; without one, the time of the import.
        """
        try:
            time = parsed_time(text)
            return validation.microseconds(time if time.tzinfo else time.replace(tzinfo=timezone.utc), "time")
        except (TypeError, ValueError):
            return self._opened_at

    def _table_name(self) -> str:
        """
        Return the library's table, quoted: that with its usual name, or the only one that looks like it.
        """
        wanted = {"id", self._layout.session, self._layout.data, *filter(None, [self._layout.time])}
        tables = [name for (name,) in self._query("SELECT name FROM sqlite_master WHERE type = 'table'")]
        alike = [
            table
            for table in tables
            if {name for (name,) in self._query("SELECT name FROM pragma_table_info(?)", table)} == wanted
        ]
        if self._layout.table in alike:
            alike = [self._layout.table]
        if len(alike) != 1:
            raise DamagedFileError(
                f"{self._name} is not a database of the format {self._layout.library}: it has no table "
                f"{self._layout.table} with the columns {', '.join(sorted(wanted))}."
            )
        quoted: str = alike[0].replace('"', '""')
        return f'"{quoted}"'

    def _query(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """
        Run a query, here, and return an iterator over its rows.
        """
        return self._fetched(self._run(lambda: self._connection.execute(sql, values)))

    def _fetched(self, cursor: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
        while (row := self._run(cursor.fetchone)) is not None:
            yield row

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except sqlite3.Error as error:  # not to be taken for one of the store's
            raise DamagedFileError(f"{self._name} cannot be read as an SQLite database: {error}.") from error


class _SessionRows:
    """
    The messages of a session, in batches.
    """

    def __init__(self, database: ForeignDatabase, chat_history_id: str, faults: Faults) -> None:
        self._database, self._id, self._faults = database, chat_history_id, faults

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        return batched(self._database.rows(self._id, self._faults))
