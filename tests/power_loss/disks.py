# SPDX-License-Identifier: Apache-2.0
"""A disk that loses what was not flushed when the power goes: in any part, as drives and file systems may."""

import random
from collections.abc import Iterator
from pathlib import Path

from recording import Call

# A drive writes a sector whole or not at all. A file system writes pages.
SECTOR, PAGE = 512, 4096
MODES = ("nothing", "everything", "pages", "sectors", "zeros")


class _File:
    def __init__(self) -> None:
        self.durable = bytearray()
        self.pending: list[Call] = []

    def flush(self) -> None:
        for call in self.pending:
            _apply(self.durable, call)
        self.pending = []

    def after_the_cut(self, mode: str, chance: random.Random) -> bytes:
        content = bytearray(self.durable)
        for call in self.pending if mode != "nothing" else ():
            if mode == "everything" or (call.kind == "truncate" and chance.random() < 0.5):
                _apply(content, call)
            elif call.kind == "write":
                size = PAGE if mode == "pages" else SECTOR
                for start in range(0, len(call.data), size):
                    part = call.data[start : start + size]
                    fate = chance.random()
                    if fate < 0.5:
                        _apply(content, call._replace(offset=call.offset + start, data=part))
                    elif mode == "zeros" and fate < 0.8:
                        _apply(content, call._replace(offset=call.offset + start, data=bytes(len(part))))
        return bytes(content)


def _apply(content: bytearray, call: Call) -> None:
    end = call.offset
    if call.kind == "truncate":
        del content[end:]
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if call.kind == "write":
        content[end : end + len(call.data)] = call.data


class Disk:
    """
    The files of a folder: what is safe, and what only the system knows yet.

    Contents are safe when the file is flushed, and names when the folder is. Names become safe in the order in which
    they were given, as on file systems with a journal. Nothing more is promised to a program.
    """

    def __init__(self, skips_flushes: bool = False) -> None:
        """
        Make an empty disk.

        :param skips_flushes: Whether nothing is ever flushed: a drive that lies.
        """
        self._skips_flushes = skips_flushes
        self._names: dict[str, _File] = {}
        self._safe_names: dict[str, _File] = {}
        self._pending_names: list[tuple[str, _File | None]] = []

    def do(self, call: Call) -> None:
        """Do what the program did."""
        if call.kind == "create":
            if call.place not in self._names:
                self._name(call.place, _File())
        elif call.kind in ("write", "truncate"):
            if call.place in self._names:  # else the file has no name, and is gone after the cut
                self._names[call.place].pending.append(call)
        elif call.kind == "link":
            self._name(call.target, self._names[call.place])
        elif call.kind == "rename":
            self._name(call.target, self._names[call.place])
            self._name(call.place, None)
        elif call.kind == "unlink":
            self._name(call.place, None)
        elif not self._skips_flushes:
            if call.place in self._names:
                self._names[call.place].flush()
            else:
                self._safe_names, self._pending_names = dict(self._names), []

    def after_the_cut(self, mode: str, chance: random.Random) -> Iterator[tuple[str, bytes]]:
        """Yield the names and contents of a folder that may be found afterwards."""
        names = dict(self._safe_names)
        safe = {"nothing": 0, "everything": len(self._pending_names)}
        for name, file in self._pending_names[: safe.get(mode, chance.randint(0, len(self._pending_names)))]:
            _set(names, name, file)
        for name, file in names.items():
            yield name, file.after_the_cut(mode, chance)

    def _name(self, name: str, file: _File | None) -> None:
        _set(self._names, name, file)
        self._pending_names.append((name, file))


def _set(names: dict[str, _File], name: str, file: _File | None) -> None:
    if file is None:
        names.pop(name, None)
    else:
        names[name] = file


def written(contents: Iterator[tuple[str, bytes]], folder: Path) -> Path:
    """Write what is found after the cut to a folder. The shared memory of SQLite's log is gone with the power."""
    folder.mkdir()
    for name, content in contents:
        if not name.endswith("-shm"):
            (folder / Path(name).name).write_bytes(content)
    return folder
