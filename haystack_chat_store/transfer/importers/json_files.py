# SPDX-License-Identifier: Apache-2.0
"""Reads conversations from JSON files, one after the other, so that a large file is never held in memory."""

import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import Any, BinaryIO, NamedTuple, TextIO, TypeAlias

from typing_extensions import Self

from haystack_chat_store.errors import DamagedFileError
from haystack_chat_store.json_values import MAX_DIGITS
from haystack_chat_store.transfer.histories import Faults, Histories
from haystack_chat_store.transfer.importers.conversations import Conversation, Report, history_of
from haystack_chat_store.transfer.seen_ids import SeenIds
from haystack_chat_store.types import Fault

_CHUNK = 1 << 16
_BLANK = re.compile(r"[ \t\r\n]*")
# The flag of a file in an archive that is encrypted.
_IS_ENCRYPTED = 1
# The conversations in the archives that ChatGPT and Claude hand out: one file, or several numbered ones.
_MEMBER = re.compile(r"(?:.*/)?conversations(?:-\d+)?\.json")


class Item(NamedTuple):
    """
    A JSON value in a file.

    :param place: Where it stands, for reports, such as `conversation 3 of conversations.json`.
    :param number: Its number in the file, 1 for the first.
    :param value: The value.
    """

    place: str
    number: int
    value: Any


#: Makes conversations of the items of a file. The second argument is the file's name without folder and ending.
Conversations: TypeAlias = Callable[[Iterator[Item], str, Report], Iterator[Conversation]]


class JsonLayout(NamedTuple):
    """
    What the JSON file of a program looks like.

    :param library: The program's name. Message ids begin with it.
    :param conversations: Makes conversations of the items of a file. It raises a ValueError if the file is of another
        kind.
    :param takes_archive: Whether the file may be the ZIP archive that the program hands out.
    """

    library: str
    conversations: Conversations
    takes_archive: bool = False


class JsonFile:
    """A JSON file of another program: a list of values, or values one after the other, such as JSON lines."""

    def __init__(self, file: "str | os.PathLike[str]", layout: JsonLayout) -> None:
        """
        Read the file once, to see that it is whole.

        :raises DamagedFileError: If it is not JSON, or not of this program.
        :raises OSError: If the file cannot be read.
        """
        self._path, self._name, self._layout = file, os.fspath(file), layout
        for _ in self._conversations(lambda _: None):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def message_count(self) -> int | None:
        """Return `None`: the number of messages is not known before they are converted."""
        return None

    def histories(self, faults: Faults) -> Histories:
        """
        Yield each conversation as a history.

        :param faults: Receives what is left out.
        """
        with SeenIds() as ids:
            for conversation in self._conversations(lambda text: faults.add(Fault(description=text))):
                history = history_of(self._layout.library, conversation, faults)
                if history is None:
                    continue
                if ids.add(conversation.chat_history_id):
                    yield history
                else:
                    description = "Another conversation with the same id was left out."
                    faults.add(Fault(chat_history_id=conversation.chat_history_id, description=description))

    def _conversations(self, report: Report) -> Iterator[Conversation]:
        with self._streams() as streams:
            for name, stream in streams:
                stem = os.path.splitext(os.path.basename(name))[0]
                text = io.TextIOWrapper(stream, encoding="utf-8-sig")
                try:
                    yield from self._layout.conversations(_items(text, os.path.basename(name)), stem, report)
                except UnicodeDecodeError:
                    raise DamagedFileError(f"{self._name} was damaged or changed: it is not UTF-8 text.") from None
                except (ValueError, RecursionError) as error:
                    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
                    raise DamagedFileError(
                        f"{self._name} cannot be read as a file of the format {self._layout.library}: {reason}."
                    ) from None

    @contextmanager
    def _streams(self) -> Iterator[Iterator[tuple[str, BinaryIO]]]:
        """Open the file or, of an archive, the files in it that have conversations."""
        with ExitStack() as opened:
            file = opened.enter_context(open(self._path, "rb"))
            if not (self._layout.takes_archive and zipfile.is_zipfile(file)):
                file.seek(0)
                yield iter([(self._name, file)])
                return
            try:
                archive = opened.enter_context(zipfile.ZipFile(file))
                names = sorted(name for name in archive.namelist() if _MEMBER.fullmatch(name))
                if not names:
                    raise DamagedFileError(f"{self._name} has no file conversations.json in it.")
                if any(archive.getinfo(name).flag_bits & _IS_ENCRYPTED for name in names):
                    raise DamagedFileError(f"{self._name} is encrypted. Unpack it, and import its conversations.json.")
                yield ((name, opened.enter_context(archive.open(name))) for name in names)  # type: ignore[misc]
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise DamagedFileError(f"{self._name} cannot be read as an archive: {error}.") from None


def _items(text: TextIO, name: str) -> Iterator[Item]:
    """Yield the values of a list, or the values that stand one after the other."""
    for number, value in enumerate(_values(text), start=1):
        yield Item(f"{number} of {name}", number, value)


def _values(text: TextIO) -> Iterator[Any]:
    buffer = _Buffer(text)
    is_list = buffer.take("[")
    if not is_list:
        while not buffer.is_at_end():
            yield buffer.value()
        return
    if not buffer.take("]"):
        yield buffer.value()
        while buffer.take(","):
            yield buffer.value()
        if not buffer.take("]"):
            raise ValueError(f"it is not JSON after its character {buffer.offset:,}")
    if not buffer.is_at_end():
        raise ValueError(f"there is more text after its end, at character {buffer.offset:,}")


class _Buffer:
    """The part of a text that is being parsed."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._buffer, self._position, self._is_complete = text, "", 0, False
        self._decoder = json.JSONDecoder(parse_int=_integer)
        self._before = 0

    @property
    def offset(self) -> int:
        return self._before + self._position

    def is_at_end(self) -> bool:
        self._skip_blanks()
        return self._position >= len(self._buffer)

    def take(self, character: str) -> bool:
        """Whether this character is the next one. Then it is skipped."""
        self._skip_blanks()
        found = self._buffer.startswith(character, self._position)
        self._position += found
        return found

    def value(self) -> Any:
        self._skip_blanks()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
                if end < len(self._buffer) or self._is_complete:  # a number may go on
                    self._position = end
                    return value
            except json.JSONDecodeError:
                if self._is_complete:
                    raise ValueError(f"it is not JSON at its character {self.offset:,}, or was cut off") from None
            self._read(max(_CHUNK, len(self._buffer) - self._position))

    def _skip_blanks(self) -> None:
        while True:
            found = _BLANK.match(self._buffer, self._position)
            self._position = found.end() if found else self._position
            if self._position < len(self._buffer) or self._is_complete:
                return
            self._read(_CHUNK)

    def _read(self, characters: int) -> None:
        more = self._text.read(characters)
        self._is_complete = not more
        self._before += self._position
        self._buffer, self._position = self._buffer[self._position :] + more, 0


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS:,} digits")
    return int(Decimal(digits))
