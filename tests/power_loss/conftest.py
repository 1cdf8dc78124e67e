# SPDX-License-Identifier: Apache-2.0
"""What the tests of power cuts take."""

import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def memory(tmp_path):
    """A folder in memory, where there is one: thousands of disks are made in it."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)


@pytest.fixture
def report(record_property, capsys):
    def say(text):
        record_property("disks", text)
        with capsys.disabled():
            print(f"\n{text}")

    return say
