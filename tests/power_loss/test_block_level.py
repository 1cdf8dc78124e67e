# SPDX-License-Identifier: Apache-2.0
"""
A power cut, below the file system: nothing that a call has acknowledged is lost, on SQLite, PostgreSQL and Redis.

A program writes with several threads. The files of the database lie on a disk that records what the kernel writes and
flushes. The power is then cut at random points. What was flushed is on the disk, and of all else any part. The kernel
mounts the disk, the server, if there is one, starts on it, and a store opens it. Of each thread it must have the turns
that were acknowledged, or one more, whole and in order.

A test that cannot fail shows nothing: an engine that is told not to flush before it answers must lose turns.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import blocks
import crowd
import pytest
from servers import PostgresServer, RedisServer, postgres_binaries, redis_binaries, require

from haystack_chat_store import store_from_url
from haystack_chat_store.errors import ChatMessageStoreError

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(blocks.missing()), reason=blocks.missing()),
]
WRITERS, TURNS = 8, 60
MEGABYTE = 1 << 20
# Checkpoints and short files of the log: the power is cut in the midst of them, too.
POSTGRES = {"max_wal_size": "32MB", "min_wal_size": "32MB", "checkpoint_timeout": "30s", "shared_buffers": "4MB"}


def write_in_a_crowd(disk, url, **settings):
    """Run the program, which says on the disk which calls have returned."""
    program = [sys.executable, crowd.__file__, *crowd.arguments(url, disk.mark, WRITERS, TURNS, **settings)]
    subprocess.run(program, check=True)


def verdict_on_server(server, returned):
    """What a store finds on a server that starts with what is on the disk."""
    try:
        with server, closing(store_from_url(server.url, last_k=None)) as store:
            return crowd.verdict(store, returned, WRITERS)
    except (RuntimeError, ChatMessageStoreError):  # it does not start, or its data cannot be read
        return "damaged"


@pytest.fixture
def work():
    with blocks.work_folder() as folder:
        yield folder


@pytest.mark.parametrize(
    ("durability", "cuts", "possible"),
    [("full", 420, {"sound"}), ("normal", 60, {"sound", "lost"}), ("off", 60, {"sound", "lost", "damaged"})],
)
def test_sqlite(work, durability, cuts, possible, report):
    with blocks.RecordedDisk(work, 64 * MEGABYTE) as disk:
        with disk.recording():
            write_in_a_crowd(disk, f"sqlite:///{disk.folder}/chat.db", durability=durability)

    def judge(folder, returned):
        return crowd.verdict_on_file(folder / "chat.db", returned, WRITERS)

    counts = blocks.verdicts(disk, work, cuts, judge)
    report(f"SQLite on a disk, {durability}: {counts.total()} disks, {dict(counts)}")
    assert set(counts) <= possible
    if durability == "full":
        assert counts["sound"] >= 400
    else:
        assert counts["lost"] > 0


@pytest.mark.parametrize(
    ("settings", "cuts", "possible"),
    [
        ({}, 70, {"sound"}),
        ({"synchronous_commit": "off"}, 25, {"sound", "lost"}),
        ({"fsync": "off"}, 25, {"sound", "lost", "damaged"}),
    ],
    ids=["as it comes", "synchronous_commit=off", "fsync=off"],
)
def test_postgres(work, settings, cuts, possible, report):
    binaries = require(postgres_binaries(), "PostgreSQL")
    with blocks.RecordedDisk(work, 256 * MEGABYTE) as disk:
        with PostgresServer(binaries, disk.folder / "server", **POSTGRES, **settings) as server:
            with disk.recording():
                write_in_a_crowd(disk, server.url)
                server.execute("CHECKPOINT")

    def judge(folder, returned):
        return verdict_on_server(PostgresServer(binaries, folder / "server", **POSTGRES), returned)

    counts = blocks.verdicts(disk, work, cuts, judge)
    report(f"PostgreSQL on a disk, {settings or 'as it comes'}: {counts.total()} disks, {dict(counts)}")
    assert set(counts) <= possible
    assert counts["lost"] > 0 if settings else counts["sound"] >= 60


@pytest.mark.parametrize(
    ("appendfsync", "cuts", "possible"),
    [("always", 80, {"sound"}), ("no", 25, {"sound", "lost"})],
)
def test_redis(work, appendfsync, cuts, possible, report):
    binary = require(redis_binaries(), "Redis")
    # The file is written anew many times, while turns come in.
    settings = {"auto_aof_rewrite_min_size": "256kb", "auto_aof_rewrite_percentage": 30}
    with blocks.RecordedDisk(work, 64 * MEGABYTE) as disk:
        with RedisServer(binary, disk.folder / "server", appendfsync=appendfsync, **settings) as server:
            with disk.recording():
                write_in_a_crowd(disk, server.url)

    def judge(folder, returned):
        return verdict_on_server(RedisServer(binary, folder / "server"), returned)

    counts = blocks.verdicts(disk, work, cuts, judge)
    report(f"Redis on a disk, appendfsync {appendfsync}: {counts.total()} disks, {dict(counts)}")
    assert set(counts) <= possible
    assert counts["lost"] > 0 if appendfsync == "no" else counts["sound"] >= 60


def test_nothing_stays_mounted_after_a_failure():
    with pytest.raises(ZeroDivisionError), blocks.work_folder() as work:
        with blocks.RecordedDisk(work, 16 * MEGABYTE) as disk, disk.recording():
            (disk.folder / "file").write_text("x")
            assert len(blocks.mounted_below(work)) == 2
            raise ZeroDivisionError
    assert blocks.mounted_below(work) == []
    assert not work.exists()
    assert str(work) not in subprocess.run(["losetup", "-a"], check=True, capture_output=True, text=True).stdout


def test_nothing_stays_mounted_after_the_tests_are_killed():
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(blocks.__file__).parent)!r})
import blocks
with blocks.work_folder() as work, blocks.RecordedDisk(work, 16 << 20):
    print(work, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    work = Path(run.stdout.strip())  # the disk's program and the cleaner, which have ended, held this output open
    assert work.name
    assert not work.exists()
    assert blocks.mounted_below(work) == []


def test_disks_are_mounted_beside_others(work):
    """Other programs take loop devices at the same moment. That is no damage of a disk."""
    empty = work / "empty"
    empty.write_bytes(bytes(16 * MEGABYTE))
    subprocess.run(["mkfs.ext4", "-q", "-F", empty], check=True)

    def mount_often(name):
        for number in range(10):
            image = work / f"{name} {number}"
            image.write_bytes(empty.read_bytes())
            with blocks.mounted(image, work / f"place {name}") as folder:
                assert not (folder / "name").exists()
                (folder / "name").write_text(name)
            image.unlink()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(mount_often, "abcdef"))
