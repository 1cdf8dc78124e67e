# SPDX-License-Identifier: Apache-2.0
"""The disks that are made for a power cut have what was flushed, and nothing that came later than the cut."""

import os
from collections import Counter

from blocks import ACKNOWLEDGEMENT, BLOCK, FLUSH, WRITE, Operation, disks_after_the_cut

ROUNDS = 40


def recorded():
    """Each round writes two blocks, flushes them, and acknowledges. The last block is written anew in each round."""
    operations = []
    for number in range(1, ROUNDS + 1):
        content = bytes([number]) * BLOCK
        operations += [
            Operation(WRITE, (number - 1) * BLOCK, content),
            Operation(WRITE, ROUNDS * BLOCK, content),
            Operation(FLUSH, 0, b""),
            Operation(ACKNOWLEDGEMENT, 0, b"0"),
        ]
    return operations


def test_disk_has_what_was_flushed_and_of_the_rest_any_part(tmp_path):
    image, found = tmp_path / "image", Counter()
    for returned in disks_after_the_cut(bytes((ROUNDS + 1) * BLOCK), recorded(), image, 100, seed=0):
        blocks = [image.read_bytes()[n * BLOCK : (n + 1) * BLOCK] for n in range(ROUNDS + 1)]
        assert all(block == bytes([block[0]]) * BLOCK for block in blocks)
        *rounds, last = [block[0] for block in blocks]
        whole = next((n for n in range(ROUNDS) if rounds[n] != n + 1), ROUNDS)
        assert rounds == [*range(1, whole + 1), *[0] * (ROUNDS - whole)]
        assert whole - returned[0] in (0, 1)
        assert last - returned[0] in (0, 1)
        found[whole - returned[0], last - returned[0]] += 1
    assert sum(found.values()) == 100
    assert set(found) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_each_disk_is_a_new_file(tmp_path):
    """A loop device that still lies on the last disk would show what it remembers of it."""
    image, opened, numbers = tmp_path / "image", [], set()
    for _ in disks_after_the_cut(bytes((ROUNDS + 1) * BLOCK), recorded(), image, 5, seed=0):
        opened.append(image.open("rb"))
        numbers.add(os.fstat(opened[-1].fileno()).st_ino)
    for file in opened:
        file.close()
    assert len(numbers) == 5
