# SPDX-License-Identifier: Apache-2.0
"""
A disk with a real file system on it, and what may be found on it after a power cut.

The disk is a file behind FUSE (see block_device.py). A loop device lies on it, and ext4 on that. What the kernel writes
and flushes is recorded, with the acknowledgements of the program that is tested. Afterwards the power is cut at any
point of the record. The disk has what was flushed, and of all else any part. The file system is mounted, and mends
itself from its journal.
"""

import importlib.util
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

WRITE, FLUSH, ACKNOWLEDGEMENT = b"w", b"f", b"a"
# What the file system writes whole or not at all: its own blocks, and the pages of the kernel.
BLOCK = 4096
MODES = ("nothing", "everything", "beginning", "blocks")
_HEAD = struct.Struct("<cQQ")
_CAP_SYS_ADMIN = 1 << 21


class Operation(NamedTuple):
    """Something that the disk was told: to write, to flush, or that a call has returned."""

    kind: bytes
    offset: int
    data: bytes


class DoesNotMountError(Exception):
    """The file system on a disk is beyond repair."""


def missing() -> str:
    """Say what this machine does not have that a disk needs, or nothing."""
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(device, os.R_OK | os.W_OK):
            return f"needs {device}"
    rights = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if not (rights and int(rights[1], 16) & _CAP_SYS_ADMIN):
        return "needs CAP_SYS_ADMIN, to mount a file system"
    for program, package in (("fusermount3", "fuse3"), ("mkfs.ext4", "e2fsprogs")):
        if shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin") is None:
            return f"needs {program}, which Debian has in the package {package}"
    if importlib.util.find_spec("mfusepy") is None:
        return "needs the dependency group powerloss: `nox -s powerloss`"
    return ""


# ---------------------------------------------------------------------- mounting

# Unmounts what lies below a folder, and removes the folder, when the tests have ended, in whatever way.
_CLEANER = """
    cat >/dev/null
    sleep 2
    grep -F " $0/" /proc/mounts | cut -d" " -f2 | tac | while read -r place; do umount -l "$place"; done
    rm -rf --one-file-system "$0"
"""


@contextmanager
def work_folder() -> Iterator[Path]:
    """
    Provide a folder for disks, in memory where there is room.

    Nothing stays mounted below it, and it goes. If the test process is killed, a process of its own sees to that.
    """
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="chat-store-disks-", dir=in_memory))
    folder.chmod(0o711)  # a server runs as another user
    cleaner = subprocess.Popen(["sh", "-c", _CLEANER, folder], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        left = mounted_below(folder)
        if not left:
            shutil.rmtree(folder)
            cleaner.kill()
        cleaner.communicate()
    assert not left, f"still mounted: {left}"


def mounted_below(folder: Path) -> list[str]:
    """Name what is mounted below a folder."""
    places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [place for place in places if place.startswith(f"{folder}/")]


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """
    Mount the ext4 on a disk by a loop device, which goes when it is unmounted.

    :raises DoesNotMountError: If the file system is beyond repair.
    """
    folder.mkdir(exist_ok=True)
    loop = _loop_device(image)
    done = subprocess.run(["mount", "-t", "ext4", loop, folder], check=False, capture_output=True, text=True)
    subprocess.run(["losetup", "--detach", loop], check=True)  # as soon as nothing is mounted from it
    if done.returncode:
        raise DoesNotMountError(done.stderr)
    try:
        yield folder
    finally:
        _unmount(folder)


def _loop_device(image: Path) -> str:
    """Lay a loop device on a disk. Another program may take the free device at the same moment; then look again."""
    give_up = time.monotonic() + 30
    command = ["losetup", "--find", "--show", image]
    while (done := subprocess.run(command, check=False, capture_output=True, text=True)).returncode:
        if time.monotonic() > give_up:
            raise RuntimeError(done.stderr)
        time.sleep(0.05)
    return done.stdout.strip()


def _unmount(folder: Path) -> None:
    """Unmount. A process that has just ended, or a loop device, may hold it for another moment."""
    give_up = time.monotonic() + 30
    while (done := subprocess.run(["umount", folder], check=False, capture_output=True, text=True)).returncode:
        if time.monotonic() > give_up:
            raise RuntimeError(done.stderr)
        time.sleep(0.05)


# ---------------------------------------------------------------------- recording


def record_of(kind: bytes, offset: int, data: bytes) -> bytes:
    """Return an operation as bytes of the record."""
    return _HEAD.pack(kind, offset, len(data)) + data


class RecordedDisk:
    """
    A disk whose file system is mounted.

    :ivar folder: Where it is mounted.
    :ivar mark: The file to which acknowledgements are written, one in each call.
    """

    def __init__(self, work: Path, size: int) -> None:
        """
        Prepare a disk.

        :param work: A folder for its files.
        :param size: Its size in bytes.
        """
        self.folder, self._device = work / "mounted", work / "device"
        self.mark = self._device / "mark"
        self._size, self._contents, self._record = size, work / "contents", work / "record"

    def __enter__(self) -> "RecordedDisk":
        with ExitStack() as stack:
            stack.enter_context(self._running_device())
            command = ["mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-E", "nodiscard", self._device / "disk"]
            path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
            subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            stack.enter_context(mounted(self._device / "disk", self.folder))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _running_device(self) -> Iterator[None]:
        self._device.mkdir()
        program = Path(__file__).with_name("block_device.py")
        command = [sys.executable, program, self._device, str(self._size), self._contents, self._record]
        process = subprocess.Popen(command)
        try:
            give_up = time.monotonic() + 30
            while not self.mark.exists():
                if process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError("The disk did not start.")
                time.sleep(0.02)
            yield
        finally:
            if os.path.ismount(self._device):
                _unmount(self._device)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the disk is told. All that was written before is flushed."""
        subprocess.run(["sync", "-f", self.folder], check=True)
        self._tell(b"begin")
        try:
            yield
        finally:
            self._tell(b"end")

    def _tell(self, mark: bytes) -> None:
        file = os.open(self.mark, os.O_WRONLY)
        try:
            os.write(file, mark)
        finally:
            os.close(file)

    def recorded(self) -> tuple[bytes, list[Operation]]:
        """Return the contents of the disk when the record began, and what it was told from then on."""
        record, operations, place = self._record.read_bytes(), [], 0
        while place < len(record):
            kind, offset, size = _HEAD.unpack_from(record, place)
            place += _HEAD.size
            operations.append(Operation(kind, offset, record[place : place + size]))
            place += size
        return self._contents.read_bytes(), operations


# ---------------------------------------------------------------------- the cut


class _Cut(NamedTuple):
    """A power cut: after which operation, after which flush before it, and what survives of what came between."""

    point: int
    flushed: int
    surviving: list[tuple[int, bytes]]


def _cuts(operations: list[Operation], count: int, chance: random.Random) -> list[_Cut]:
    """Choose different power cuts, half of them just after an acknowledgement, in the order of time."""
    flushed, returned, last, calls = [], [], -1, 0
    for number, operation in enumerate(operations):
        last = number if operation.kind == FLUSH else last
        calls += operation.kind == ACKNOWLEDGEMENT
        flushed.append(last)
        returned.append(calls)
    after_calls = [number for number, operation in enumerate(operations) if operation.kind == ACKNOWLEDGEMENT]
    chosen: dict[tuple[object, ...], _Cut] = {}
    for draw in range(20 * count):
        if len(chosen) < count:
            point = chance.choice(after_calls) if draw % 2 else chance.randrange(len(operations))
            pending = operations[flushed[point] + 1 : point + 1]
            surviving = _surviving(list(_blocks(each for each in pending if each.kind == WRITE)), chance)
            key = (flushed[point], returned[point], *(offset for offset, _ in surviving))
            chosen.setdefault(key, _Cut(point, flushed[point], surviving))
    return sorted(chosen.values(), key=lambda cut: cut.point)


def disks_after_the_cut(
    contents: bytes, operations: list[Operation], image: Path, count: int, seed: int
) -> Iterator[Counter[int]]:
    """
    Cut the power at random points, and write the disk that is found then. No two disks are the same.

    Of what was not flushed there is nothing, or everything, or the beginning up to some block, or any blocks.

    :param contents: What was on the disk when the record began.
    :param operations: The record.
    :param image: The file that becomes the disk.
    :param count: The number of disks.
    :param seed: What chance begins with.
    :returns: For each disk, how many calls of each thread had returned.
    """
    disk, flushed, told = bytearray(contents), -1, -1
    returned: Counter[int] = Counter()
    for cut in _cuts(operations, count, random.Random(seed)):
        for write in operations[flushed + 1 : cut.flushed + 1]:
            if write.kind == WRITE:
                disk[write.offset : write.offset + len(write.data)] = write.data
        returned.update(int(each.data) for each in operations[told + 1 : cut.point + 1] if each.kind == ACKNOWLEDGEMENT)
        flushed, told = cut.flushed, cut.point
        # A new file: a loop device that still lies on the last one would show what it remembers of it.
        image.unlink(missing_ok=True)
        image.write_bytes(disk)
        with image.open("r+b") as file:
            for offset, data in cut.surviving:
                file.seek(offset)
                file.write(data)
        yield returned


def _blocks(writes: Iterable[Operation]) -> Iterator[tuple[int, bytes]]:
    for write in writes:
        for start in range(0, len(write.data), BLOCK):
            yield write.offset + start, write.data[start : start + BLOCK]


def _surviving(blocks: list[tuple[int, bytes]], chance: random.Random) -> list[tuple[int, bytes]]:
    mode = chance.choice(MODES)
    if mode == "beginning":
        return blocks[: chance.randint(0, len(blocks))]
    share = {"nothing": 0.0, "everything": 1.0}.get(mode, chance.random())
    return [block for block in blocks if chance.random() < share]


def verdicts(
    disk: RecordedDisk, work: Path, count: int, judge: Callable[[Path, Mapping[int, int]], str], seed: int = 0
) -> Counter[str]:
    """
    Count how the disks are that may be found after a power cut.

    :param disk: The disk, after its record has ended.
    :param work: A folder for files.
    :param count: The number of power cuts.
    :param judge: Says what it finds in a mounted folder, given how many calls of each thread had returned.
    """
    contents, operations = disk.recorded()
    image, counts = work / "image", Counter()
    for returned in disks_after_the_cut(contents, operations, image, count, seed):
        try:
            with mounted(image, work / "found") as folder:
                counts[judge(folder, returned)] += 1
        except DoesNotMountError:
            counts["damaged"] += 1
    image.unlink(missing_ok=True)
    return counts
