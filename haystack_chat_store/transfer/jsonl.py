# SPDX-License-Identifier: Apache-2.0
"""
Chat histories as JSON lines: the format for backups and for moving, without loss.

The file is UTF-8 text. Each line ends with a line feed and has exactly this form, without blanks between tokens:

```
{"format":"haystack-chat-store","version":1}
{"chat_history":{"id":"…","title":null,"meta":null,"created_at":"2026-01-31T08:30:00.000000+00:00","updated_at":"…"}}
{"created_at":"2026-01-31T08:30:00.000000+00:00","message":{"role":"user","meta":{"chat_message_id":"…"},"name":null,…}}
{"end_of_chat_history":{"messages":1,"sha256":"…"}}
{"end_of_file":{"chat_histories":1,"messages":1,"sha256":"…"}}
```

Lines two to four are repeated for each history, line three for each of its messages. A history that belongs to a user
has `"user_id":"…",` after its id. A message is what `ChatMessage.to_dict()` returns. Each SHA-256 is that of all bytes
before its line. The ids of histories are unique in the file, and the ids of messages are unique in their history.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from haystack_chat_store import validation
from haystack_chat_store.errors import DamagedFileError, MessageDecodingError
from haystack_chat_store.json_values import encode_plain, parse_json
from haystack_chat_store.stores.rows import HistoryRow, MessageRow
from haystack_chat_store.stores.times import datetime_of
from haystack_chat_store.transfer.histories import Histories, Progress, Rows, TransferResult, batched, row_from_json
from haystack_chat_store.transfer.seen_ids import SeenIds
from haystack_chat_store.transfer.times import parsed_time

_FORMAT = "haystack-chat-store"
_VERSION = 1
_MESSAGE_LINE = re.compile(r'\{"created_at":"([^"]*)","message":(\{.*\})\}\n')


def write(histories: Iterable[tuple[HistoryRow, Rows]], stream: BinaryIO) -> TransferResult:
    """
    Write histories as JSON lines.

    :returns: The numbers of histories and messages written.
    """
    output = _HashedOutput(stream)
    output.write(f'{{"format":"{_FORMAT}","version":{_VERSION}}}\n')
    chat_histories = total = 0
    for history, rows in histories:
        output.write(_history_line(history))
        messages = 0
        for batch in rows:
            output.write("".join(map(_message_line, batch)))
            messages += len(batch)
        output.write_end("end_of_chat_history", messages=messages)
        chat_histories += 1
        total += messages
    output.write_end("end_of_file", chat_histories=chat_histories, messages=total)
    return TransferResult(chat_histories=chat_histories, messages=total)


class _HashedOutput:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, hashlib.sha256()

    def write(self, text: str) -> None:
        data = text.encode()
        self._digest.update(data)
        self._stream.write(data)

    def write_end(self, of_what: str, **counts: int) -> None:
        self.write(encode_plain({of_what: {**counts, "sha256": self._digest.hexdigest()}}) + "\n")


def _history_line(history: HistoryRow) -> str:
    title = "null" if history.title is None else encode_plain(history.title)
    meta = "null" if history.meta is None else _on_one_line(history.meta)
    user = "" if history.user_id is None else f'"user_id":{encode_plain(history.user_id)},'
    return (
        f'{{"chat_history":{{"id":{encode_plain(history.chat_history_id)},{user}"title":{title},"meta":{meta},'
        f'"created_at":"{_time_text(history.created_at)}","updated_at":"{_time_text(history.updated_at)}"}}}}\n'
    )


def _message_line(row: MessageRow) -> str:
    return f'{{"created_at":"{_time_text(row.created_at)}","message":{_on_one_line(row.content)}}}\n'


def _on_one_line(text: str) -> str:
    # A JSON string has no line feeds, but another program may have stored indented JSON.
    return text.replace("\n", " ") if "\n" in text else text


# All messages of a write have the same time.
@lru_cache(maxsize=100)
def _time_text(microseconds: int) -> str:
    return datetime_of(microseconds).isoformat(timespec="microseconds")


@lru_cache(maxsize=100)
def _microseconds(text: str) -> int:
    """
    Return the time of a text, in microseconds since 1970.

    :raises ValueError, TypeError: If the text is not a time, or `datetime` cannot hold it in UTC.
    """
    return validation.microseconds(parsed_time(text), "a time")


def verify(file: BinaryIO, name: str, progress: Progress) -> int:
    """
    Read a whole file, and check everything that an import relies on.

    :param name: The file's name in errors.
    :param progress: Called after each batch. The numbers are not known yet.
    :returns: The number of messages.
    :raises DamagedFileError: If the file is damaged or has another format.
    """
    messages = 0
    for _, rows in read(file, name):
        for batch in rows:
            messages += len(batch)
            progress(0, None)
    return messages


def read(file: BinaryIO, name: str) -> Histories:
    """
    Yield the histories of a file. The checksum of a history is verified before its last batch is yielded.

    :param file: A seekable binary file.
    :param name: The file's name in errors.
    :raises DamagedFileError: If the file is damaged or has another format.
    """
    lines = _Lines(file, name)
    _check_header(lines)
    chat_histories = messages = 0
    with SeenIds() as ids:
        while (entry := lines.parsed()).keys() != {"end_of_file"}:
            history = _history(lines, entry)
            if not ids.add(history.chat_history_id):
                raise lines.damaged("there is a second chat history with the same id")
            rows = _HistoryRows(lines)
            yield history, rows
            messages += rows.read_to_end()
            chat_histories += 1
    lines.check_end(entry["end_of_file"], chat_histories=chat_histories, messages=messages)
    if file.readline():
        raise lines.damaged("there is more text after the end of the file")


class _Place(NamedTuple):
    """A place in a file: its offset in bytes, the number of lines before it, and their digest."""

    offset: int
    number: int
    digest: "hashlib._Hash"


class _Lines:
    """The lines of a file."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.go_to(_Place(0, 0, hashlib.sha256()))

    def place(self) -> _Place:
        """Return the place after the last line read."""
        digest = self._before.copy()
        digest.update(self._line)
        return _Place(self._offset, self._number, digest)

    def go_to(self, place: _Place) -> None:
        self._offset, self._number, digest = place
        self._before, self._line = digest.copy(), b""  # the digest of all lines before this one
        self._file.seek(self._offset)

    def next(self) -> str:
        self._before.update(self._line)
        self._line = self._file.readline()
        self._offset += len(self._line)
        self._number += 1
        if not self._line.endswith(b"\n"):
            raise self.damaged("the file ends too early: it was cut off")
        try:
            return self._line.decode()
        except UnicodeDecodeError:
            raise self.damaged("the text is not UTF-8") from None

    def parsed(self) -> dict[str, Any]:
        """Read the next line, and return the JSON object in it."""
        return self.object_in(self.next())

    def object_in(self, line: str) -> dict[str, Any]:
        try:
            entry = parse_json(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise self.damaged("there should be a JSON object")
        return entry

    def check_end(self, stated: Any, **counts: int) -> None:
        """Compare the counts and the checksum of the last line with the lines before it."""
        if stated != {**counts, "sha256": self._before.hexdigest()}:
            raise self.damaged("the counts or the checksum do not agree with the lines before it")

    def damaged(self, description: str) -> DamagedFileError:
        return DamagedFileError(f"{self._name} was damaged or changed. In line {self._number}, {description}.")

    def refused(self, description: str) -> DamagedFileError:
        return DamagedFileError(f"{self._name} {description}.")


def _check_header(lines: _Lines) -> None:
    try:
        header = lines.parsed()
    except DamagedFileError:
        header = {}
    if header.get("format") != _FORMAT or type(header.get("version")) is not int or header["version"] < 1:
        raise lines.refused("is not an export of haystack-chat-store in the format jsonl")
    if header["version"] > _VERSION:
        raise lines.refused(
            f"has version {header['version']} of the format, and this version of haystack-chat-store reads {_VERSION}. "
            "Upgrade haystack-chat-store"
        )


def _history(lines: _Lines, entry: dict[str, Any]) -> HistoryRow:
    try:
        ((kind, fields),) = entry.items()
        if kind != "chat_history":
            raise KeyError(kind)
        title, meta = validation.validated_title(fields["title"]), validation.validated_meta(fields["meta"])
        user_id = fields.get("user_id")
        return HistoryRow(
            chat_history_id=validation.validated_id(fields["id"], "id"),
            created_at=_microseconds(fields["created_at"]),
            updated_at=_microseconds(fields["updated_at"]),
            title=title if isinstance(title, str) else None,
            meta=meta if isinstance(meta, str) else None,
            user_id=None if user_id is None else validation.validated_id(user_id, "user_id"),
        )
    except (ValueError, OverflowError, KeyError, TypeError):
        raise lines.damaged("there should be a chat history") from None


class _HistoryRows:
    """The messages of a history in a file."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self._start = lines.place()
        self._read: int | None = None

    def __iter__(self) -> Iterator[Sequence[MessageRow]]:
        self._lines.go_to(self._start)
        self._read = None
        return batched(self._rows())

    def read_to_end(self) -> int:
        """Skip to the end of this history, and return the number of its messages."""
        if self._read is None:
            for _ in self:
                pass
        return self._read or 0

    def _rows(self) -> Iterator[MessageRow]:
        messages = 0
        with SeenIds() as ids:
            while (message := _MESSAGE_LINE.fullmatch(line := self._lines.next())) is not None:
                try:
                    row = row_from_json(_microseconds(message[1]), message[2])
                except (ValueError, OverflowError, MessageDecodingError):
                    raise self._lines.damaged("there should be a message with an id") from None
                if not ids.add(row.message_id):
                    raise self._lines.damaged("there is a second message with the same id")
                messages += 1
                yield row
        end = self._lines.object_in(line)
        self._lines.check_end(end.get("end_of_chat_history"), messages=messages)
        self._read = messages
