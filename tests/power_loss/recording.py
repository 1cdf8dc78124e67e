# SPDX-License-Identifier: Apache-2.0
"""What a program did to the files of a folder, as the system saw it: `strace` writes it down."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

_CALLS = "openat,pwrite64,write,ftruncate,fsync,fdatasync,link,unlink,rename"
_LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (\d+)")
_STARTED, _RESUMED = (
    re.compile(r"^(\d+) +(\w+\(.*) <unfinished \.\.\.>$"),
    re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$"),
)
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_OPEN_FILE = re.compile(r"^\d+<((?:\\x[0-9a-f]{2})*)>")


class Call(NamedTuple):
    """
    A call that changed something.

    :param kind: "create", "write", "truncate", "sync", "link", "unlink" or "rename".
    :param place: The file. A folder, for a "sync" of its names.
    :param offset: Where a "write" begins, or the new size of a "truncate".
    :param data: What is written.
    :param target: The new name, for a "link" and a "rename".
    """

    kind: str
    place: str
    offset: int = 0
    data: bytes = b""
    target: str = ""


def recorded(program: str, folder: Path, *arguments: str) -> list[Call]:
    """
    Run a Python program, and return what it did to files in a folder.

    A file whose name ends in `.ack` is only written to at its end, and counts as written at once.
    """
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace, which Debian has as a package")
    record = folder.with_suffix(".strace")
    options = ["-f", "--seccomp-bpf", "-y", "-xx", "-s", str(1 << 22), "-e", f"trace={_CALLS}", "-o", str(record)]
    environment = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "False"}
    command = [strace, *options, sys.executable, "-c", program, *arguments]
    subprocess.run(command, check=True, env=environment)
    return [call for line in _whole_lines(record) if (call := _call(line)) and call.place.startswith(str(folder))]


def _whole_lines(record: Path) -> list[str]:
    """Put together what was printed in two parts, because another thread was faster."""
    whole, begun = [], {}
    with record.open() as lines:
        for line in map(str.strip, lines):
            if started := _STARTED.match(line):
                begun[started[1]] = started[2]
            elif resumed := _RESUMED.match(line):
                whole.append(f"{resumed[1]} {begun.pop(resumed[1])}{resumed[2]}")
            else:
                whole.append(line)
    return whole


def _call(line: str) -> Call | None:
    found = _LINE.match(line)
    if not found:
        return None  # it failed
    name, arguments, returned = found[1], found[2], int(found[3])
    texts = [bytes.fromhex(text.replace("\\x", "")) for text in _BYTES.findall(arguments)]
    opened = _OPEN_FILE.match(arguments)
    place = bytes.fromhex(opened[1].replace("\\x", "")).decode() if opened else ""
    last = arguments.rsplit(", ", 1)[-1]
    if name == "openat":
        return Call("create", texts[0].decode()) if "O_CREAT" in arguments else None
    if name in ("link", "rename"):
        return Call(name, texts[0].decode(), target=texts[1].decode())
    if name == "unlink":
        return Call(name, texts[0].decode())
    if name in ("fsync", "fdatasync"):
        return Call("sync", place)
    if name == "ftruncate":
        return Call("truncate", place, int(last))
    assert len(texts[0]) == returned, "the record is cut off"
    return Call("write", place, int(last) if name == "pwrite64" else 0, texts[0])
