# SPDX-License-Identifier: Apache-2.0
"""
Medians as tables that read well as plain text and as Markdown.
"""

from collections.abc import Sequence
from typing import NamedTuple

import experiments
from engines import ENGINES, EXPERIMENTAL, IN_MEMORY, SQLITE_FULL, Engine
from experiments import BULK, DECODE, DECODE_HAYSTACK, ENCODE, ENCODE_HAYSTACK, MIX, Medians, Plan

#: How much longer than with the smallest history an operation may take for its cost to count as flat.
FLAT = 1.3

_NOTES = {
    "append": """
"{after}": one turn a call, by this process, to a history of 1,000 messages. "{many}":
a turn to each of these histories in turn, so that the rows of one are no longer written side by side; not among the
targets' sizes. haystack-experimental goes through the whole history at each append, so that a conversation costs the
square of its length: it is measured up to {limit:,} messages only (-).
""",
    "read": """
10 messages are only 5 rounds; what is flat or not is compared between windows of 20 messages.
haystack-experimental goes through the whole history at each read, too.
""",
}


class BySize:
    """
    What one operation took, by store and by number of messages stored before.

    :param medians: In microseconds.
    :param columns: The numbers of stored messages, smallest first.
    :param first: The one that those after it are compared with.
    """

    def __init__(self, medians: Medians, columns: list[str], first: str) -> None:
        self._medians = medians
        self._columns = columns
        self._first = first

    def __str__(self) -> str:
        rows = []
        for engine in ENGINES:
            if engine.open_floor is not None:
                rows.append(self._row(engine.floor_name, self._medians[engine.floor_name], 1))
            rows.append(self._row(engine.name, self._medians[engine.name], 1))
            if engine.open_floor is not None:
                rows.append(self._row("- x its floor", self.over_floor(engine), 2))
            rows.append(self._row(f"- x at {self._first}", self.over_first(engine), 2))
            if engine is IN_MEMORY:
                rows.append(self._row("- times as fast as haystack-experimental's", self.times_as_fast(), 0))
        return markdown(["stored messages", *self._columns], rows)

    def over_floor(self, engine: Engine) -> dict[str, float]:
        return self._ratios(engine.name, engine.floor_name)

    def over_first(self, engine: Engine) -> dict[str, float]:
        taken = self._medians[engine.name]
        compared = self._columns[self._columns.index(self._first) :]
        return {column: taken[column] / taken[self._first] for column in compared if column in taken}

    def times_as_fast(self) -> dict[str, float]:
        return self._ratios(EXPERIMENTAL.name, IN_MEMORY.name)

    def _ratios(self, row: str, by: str) -> dict[str, float]:
        taken, units = self._medians[row], self._medians[by]
        return {column: taken[column] / units[column] for column in self._columns if column in taken}

    def _row(self, name: str, values: dict[str, float], digits: int) -> list[str]:
        return [name, *(f"{values[column]:,.{digits}f}" if column in values else "-" for column in self._columns)]


class Target(NamedTuple):
    text: str
    measured: float | None
    limit: float
    is_at_most: bool = True

    def row(self) -> list[str]:
        limit = f"{'<=' if self.is_at_most else '>='} {self.limit:g} x"
        if self.measured is None:
            return [self.text, limit, "-", "not measured"]
        is_met = self.measured <= self.limit if self.is_at_most else self.measured >= self.limit
        return [self.text, limit, f"{self.measured:.2f} x", "met" if is_met else "NOT met"]


def report(plan: Plan, results: dict[str, Medians]) -> str:
    """
    Return the tables and the targets.

    :param results: Medians in microseconds by measurement: append, read, bulk, codec.
    """
    *sizes, after, many = [case.label for case in experiments.cases(plan)]
    whole_windows = [f"{size:,}" for size in plan.sizes if size >= experiments.WINDOW]
    append = BySize(results["append"], [*sizes, after, many], sizes[0])
    read = BySize(results["read"], [*sizes, after], (whole_windows or [after])[0])
    targets = [target.row() for target in _targets(append, read, results["codec"][MIX], many)]
    notes = {
        key: note.strip().format(after=after, many=many, limit=EXPERIMENTAL.max_size) for key, note in _NOTES.items()
    }
    return "\n\n".join(
        [
            "## Append one turn: user 120 characters, assistant 600 (median, µs)",
            str(append),
            notes["append"],
            f"## Read the last {experiments.ROUNDS} rounds: {experiments.WINDOW} messages (median, µs)",
            str(read),
            notes["read"],
            f"## Write {experiments.BATCH:,} messages in one call (median)",
            _bulk_table(results["bulk"]),
            "## Codec (median, µs a message)",
            _codec_table(results["codec"]),
            "## Targets",
            markdown(["target", "limit", "measured", ""], targets),
        ]
    )


def _targets(append: BySize, read: BySize, mix: dict[str, float], many: str) -> list[Target]:
    def worst(ratios: dict[str, float]) -> float:
        return max(ratio for column, ratio in ratios.items() if column != many)

    def spread(ratios: dict[str, float]) -> float:
        return worst(ratios) / min(ratio for column, ratio in ratios.items() if column != many)

    at = f"{EXPERIMENTAL.max_size:,}"
    faster = f"times as fast as haystack-experimental's at {at}"
    return [
        Target("append a turn, SQLite full: over its floor, worst size", worst(append.over_floor(SQLITE_FULL)), 1.6),
        Target("append a turn, SQLite full: slowest over fastest size", spread(append.over_first(SQLITE_FULL)), FLAT),
        Target("read last 10 rounds, SQLite: over its floor, worst size", worst(read.over_floor(SQLITE_FULL)), 8),
        Target("read last 10 rounds, SQLite: slowest over fastest size", spread(read.over_first(SQLITE_FULL)), FLAT),
        Target("append a turn, in memory: slowest over fastest size", spread(append.over_first(IN_MEMORY)), FLAT),
        Target(f"append a turn, in memory: {faster}", append.times_as_fast().get(at), 50, False),
        Target("read last 10 rounds, in memory: slowest over fastest size", spread(read.over_first(IN_MEMORY)), FLAT),
        Target(f"read last 10 rounds, in memory: {faster}", read.times_as_fast().get(at), 50, False),
        Target("codec, the mix: encode, times as fast", mix[ENCODE_HAYSTACK] / mix[ENCODE], 2, False),
        Target("codec, the mix: decode a window of 20, times as fast", mix[DECODE_HAYSTACK] / mix[DECODE], 2, False),
    ]


def _bulk_table(bulk: Medians) -> str:
    rows = []
    for engine in ENGINES:
        taken, over_floor = bulk[engine.name][BULK], "-"
        if engine.open_floor is not None:
            floor = bulk[engine.floor_name][BULK]
            rows.append([engine.floor_name, *_bulk_cells(floor), "-"])
            over_floor = f"{taken / floor:.2f}"
        rows.append([engine.name, *_bulk_cells(taken), over_floor])
    return markdown(["", "ms", "µs a message", "x its floor"], rows)


def _bulk_cells(microseconds: float) -> list[str]:
    return [f"{microseconds / 1000:,.1f}", f"{microseconds / experiments.BATCH:.2f}"]


def _codec_table(codec: Medians) -> str:
    columns = [ENCODE_HAYSTACK, ENCODE, "times as fast", DECODE_HAYSTACK, DECODE, "times as fast"]
    rows = [
        [
            name,
            *(
                cell
                for theirs, ours in ((ENCODE_HAYSTACK, ENCODE), (DECODE_HAYSTACK, DECODE))
                for cell in (f"{row[theirs]:.2f}", f"{row[ours]:.2f}", f"{row[theirs] / row[ours]:.2f}")
            ),
        ]
        for name, row in codec.items()
    ]
    return markdown(["message", *columns], rows)


def markdown(header: list[str], rows: Sequence[list[str]]) -> str:
    """
    Return a table, aligned: text in the first column, numbers in the others.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
