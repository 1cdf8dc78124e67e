# SPDX-License-Identifier: Apache-2.0
"""
A program that is a disk: a file behind FUSE, on which a loop device lies. It writes down what it is told to do.

The folder shows two files. `disk` is the disk. What is written to `mark` are the marks of the test: "begin" has the
contents saved and begins the record, "end" ends it, and all else is recorded as an acknowledgement.
"""

import errno
import stat
import sys
from pathlib import Path
from typing import Any

import mfusepy
from blocks import ACKNOWLEDGEMENT, FLUSH, WRITE, record_of


class Device(mfusepy.Operations):
    """The two files."""

    use_ns = True

    def __init__(self, size: int, contents: Path, record: Path) -> None:
        self._disk = bytearray(size)
        self._contents = contents
        self._record = record.open("wb")
        self._is_recording = False

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Say what a file is."""
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if path in ("/disk", "/mark"):
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": len(self._disk) * (path == "/disk")}
        raise mfusepy.FuseOSError(errno.ENOENT)

    def readdir(self, path: str, fh: int) -> list[str]:
        """Name the files."""
        return [".", "..", "disk", "mark"]

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Keep the size of a disk."""
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read from the disk."""
        return bytes(self._disk[offset : offset + size]) if path == "/disk" else b""

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Write to the disk, or make a mark."""
        if path == "/disk":
            self._disk[offset : offset + len(data)] = data
            self._note(WRITE, offset, data)
        elif data == b"begin":
            self._contents.write_bytes(self._disk)
            self._is_recording = True
        elif data == b"end":
            self._is_recording = False
            self._record.flush()
        else:
            self._note(ACKNOWLEDGEMENT, 0, data)
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """Flush what was written."""
        self._note(FLUSH, 0, b"")
        return 0

    def _note(self, kind: bytes, offset: int, data: bytes) -> None:
        if self._is_recording:
            self._record.write(record_of(kind, offset, bytes(data)))


if __name__ == "__main__":
    folder, size, contents, record = sys.argv[1:]
    mfusepy.FUSE(Device(int(size), Path(contents), Path(record)), folder, foreground=True, nothreads=True)
