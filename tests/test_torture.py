# SPDX-License-Identifier: Apache-2.0
"""The program that tortures stores finds what went wrong, and a little of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torture
from torture import Batch, findings

ACKNOWLEDGED = [Batch("h", "p0.t0", 0, 2), Batch("h", "p0.t0", 3, 1), Batch("h", "p1.a0", 0, 2)]
STORED = ["p0.t0 0 0 2", "p0.t0 0 1 2", "p1.a0 0 0 2", "p1.a0 0 1 2", "p0.t0 3 0 1", "p0.t0 2 0 1"]


def found(stored):
    return {kind: len(batches) for kind, batches in vars(findings(ACKNOWLEDGED, {"h": stored})).items() if batches}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (STORED, {}),
        (STORED[2:], {"lost": 1}),
        (STORED[:2] + STORED, {"doubled": 1}),
        (STORED[:1] + STORED[2:4] + STORED[1:2] + STORED[4:], {"split": 2}),
        (STORED[1:2] + STORED[:1] + STORED[2:], {"split": 2}),
        (STORED[4:5] + STORED[:4] + STORED[5:], {"reordered": 1}),
    ],
    ids=["right", "lost", "doubled", "split", "turned round", "reordered"],
)
def test_what_is_lost_doubled_split_or_reordered_is_found(stored, expected):
    assert found(stored) == expected


@pytest.mark.full
@pytest.mark.servers
@pytest.mark.parametrize("engine", torture.ENGINES)
def test_killed_writers_and_restarted_servers_lose_nothing(engine):
    command = [sys.executable, Path(torture.__file__), "--writes", "1000", "--engines", engine]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 lost, 0 doubled, 0 split, 0 reordered; 0 miscounted, 0 faults" in run.stdout
