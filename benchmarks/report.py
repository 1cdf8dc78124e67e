# SPDX-License-Identifier: Apache-2.0
"""Medians as tables that read well as plain text and as Markdown."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import experiments
from engines import EXPERIMENTAL, IN_MEMORY, Engine
from experiments import (
    BULK_READ,
    BULK_WRITE,
    DECODE,
    DECODE_HAYSTACK,
    ENCODE,
    ENCODE_HAYSTACK,
    ENCODED,
    MANY_HISTORIES,
    MIX,
    ONE_HISTORY,
    Medians,
    Plan,
)

#: The cost is flat if an operation takes at most this many times as long as with the smallest history.
FLAT = 1.3
#: The retriever may take at most this many times as long as with a history just longer than its token limit.
BUDGET = 2
#: The share of the floor's throughput that writers at the same time must reach.
THROUGHPUT = 0.5

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
    "bytes": """
Everything that the engine keeps for them: indexes, counters, free space in pages. Of the in-memory stores, Python's
objects. "{one}" has {long:,} messages; of "{short}" there are {histories:,}, with {window} messages each, which grew
side by side.
""",
}


class BySize:
    """
    The times of one operation, by store and by the number of stored messages.

    :param engines: The engines that were measured.
    :param medians: The medians in microseconds.
    :param columns: The numbers of stored messages, smallest first.
    :param first: The column that later columns are compared with.
    """

    def __init__(self, engines: list[Engine], medians: Medians, columns: list[str], first: str) -> None:
        self._engines = engines
        self._medians = medians
        self._columns = columns
        self._first = first

    def __str__(self) -> str:
        rows = []
        for engine in self._engines:
            for form in engine.forms:
                over_floor = self.over_floor(engine, form)
                if over_floor:
                    rows.append(self._row(engine.floor_row(form), self._medians[engine.floor_row(form)], 1))
                rows.append(self._row(engine.row(form), self._medians[engine.row(form)], 1))
                if over_floor:
                    rows.append(self._row("- x its floor", over_floor, 2))
                rows.append(self._row(f"- x at {self._first}", self.over_first(engine, form), 2))
            if engine is IN_MEMORY and EXPERIMENTAL in self._engines:
                rows.append(self._row("- times as fast as haystack-experimental's", self.times_as_fast(), 0))
        return markdown(["stored messages", *self._columns], rows)

    def over_floor(self, engine: Engine, form: str) -> dict[str, float]:
        return self._ratios(engine.row(form), engine.floor_row(form))

    def over_first(self, engine: Engine, form: str) -> dict[str, float]:
        taken = self._medians[engine.row(form)]
        compared = self._columns[self._columns.index(self._first) :]
        return {column: taken[column] / taken[self._first] for column in compared if column in taken}

    def times_as_fast(self) -> dict[str, float]:
        return self._ratios(EXPERIMENTAL.name, IN_MEMORY.name)

    def taken(self, engine: Engine, column: str) -> float:
        return self._medians[engine.name][column]

    def _ratios(self, row: str, by: str) -> dict[str, float]:
        taken, units = self._medians.get(row, {}), self._medians.get(by, {})
        return {
            column: taken[column] / units[column] for column in self._columns if column in taken and column in units
        }

    def _row(self, name: str, values: dict[str, float], digits: int) -> list[str]:
        return [name, *(f"{values[column]:,.{digits}f}" if column in values else "-" for column in self._columns)]


class Target(NamedTuple):
    text: str
    measured: float | None
    limit: float
    is_at_most: bool = True
    unit: str = "x"

    def row(self) -> list[str]:
        limit = f"{'<=' if self.is_at_most else '>='} {self.limit:g} {self.unit}"
        if self.measured is None:
            return [self.text, limit, "-", "not measured"]
        is_met = self.measured <= self.limit if self.is_at_most else self.measured >= self.limit
        return [self.text, limit, f"{self.measured:.2f} {self.unit}", "met" if is_met else "NOT met"]


def report(plan: Plan, engines: list[Engine], results: dict[str, Medians]) -> str:
    """
    Return the tables and the targets.

    :param results: Medians in microseconds by measurement: append, read, count, bulk, writers, codec; bytes a message.
    """
    *sizes, after, many = [case.label for case in experiments.cases(plan)]
    whole_windows = [f"{size:,}" for size in plan.sizes if size >= experiments.WINDOW]
    append = BySize(engines, results["append"], [*sizes, after, many], sizes[0])
    read = BySize(engines, results["read"], [*sizes, after], (whole_windows or [after])[0])
    enough = [f"{size:,}" for size in plan.sizes if size >= experiments.ENOUGH]
    retrieve = BySize(engines, results["retrieve"], [*sizes, after], (enough or [after])[0])
    others = [engine for engine in engines if engine is not EXPERIMENTAL]
    count = BySize(others, results["count"], [*sizes, after], sizes[0])
    notes = {
        key: note.strip().format(
            after=after,
            many=many,
            limit=EXPERIMENTAL.max_size,
            one=ONE_HISTORY,
            short=MANY_HISTORIES,
            long=plan.long_history,
            histories=plan.short_histories,
            window=experiments.WINDOW,
        )
        for key, note in _NOTES.items()
    }
    targets = [
        *(target for engine in engines for target in _targets(engine, append, read, retrieve, results, many)),
        *_codec_targets(results["codec"][MIX]),
    ]
    return "\n\n".join(
        [
            "## Append one turn: user 120 characters, assistant 600 (median, µs)",
            str(append),
            notes["append"],
            f"## Read the last {experiments.ROUNDS} rounds: {experiments.WINDOW} messages (median, µs)",
            str(read),
            notes["read"],
            f"## Retrieve what fits {experiments.MAX_TOKENS:,} tokens, with ChatMessageRetriever (median, µs)",
            str(retrieve),
            "## Count the messages (median, µs)",
            str(count),
            f"## Write and read {experiments.BATCH:,} messages in one call (median)",
            _bulk_table(engines, results["bulk"]),
            f"## Append one turn, {experiments.WRITERS} writers at the same time (turns a second)",
            _writers_table(engines, results["writers"]),
            "## Bytes a message",
            _bytes_table(engines, results["bytes"]),
            notes["bytes"],
            "## Messages a second, one call after the other",
            _speed_table(engines, append, read, results["bulk"], f"{max(plan.sizes):,}"),
            "## Codec (median, µs a message)",
            _codec_table(results["codec"]),
            "## Targets",
            markdown(["target", "limit", "measured", ""], [target.row() for target in targets]),
        ]
    )


def _targets(
    engine: Engine, append: BySize, read: BySize, retrieve: BySize, results: dict[str, Medians], many: str
) -> Iterator[Target]:
    def worst(ratios: dict[str, float]) -> float:
        return max(ratio for column, ratio in ratios.items() if column != many)

    def spread(ratios: dict[str, float]) -> float:
        return worst(ratios) / min(ratio for column, ratio in ratios.items() if column != many)

    if engine.limits is None:
        return
    operations = {"append": ("append a turn", append), "read": ("read last 10 rounds", read)}
    for form in engine.forms:
        for key, (operation, by_size) in operations.items():
            text = f"{engine.row(form)}: {operation}"
            if key in engine.limits:
                over_floor = worst(by_size.over_floor(engine, form))
                yield Target(f"{text}, over its floor, worst size", over_floor, engine.limits[key])
            yield Target(f"{text}, slowest over fastest size", spread(by_size.over_first(engine, form)), FLAT)
        over_first = retrieve.over_first(engine, form)
        text = f"{engine.row(form)}: retrieve {experiments.MAX_TOKENS:,} tokens"
        yield Target(f"{text}, worst size over {next(iter(over_first))}", worst(over_first), BUDGET)
    if engine is IN_MEMORY:
        at = f"{EXPERIMENTAL.max_size:,}"
        for operation, by_size in operations.values():
            text = f"{engine.name}: {operation}, times as fast as haystack-experimental's at {at}"
            yield Target(text, by_size.times_as_fast().get(at), 50, is_at_most=False)
    for column, share in _shares(engine, results["writers"]).items():
        yield Target(f"{engine.name}: throughput of {column}", share, THROUGHPUT, is_at_most=False)
    found = results["bytes"][engine.name]
    limit = round(1.3 * found[ENCODED] + 150)
    yield Target(f"{engine.name}: bytes a message", found[ONE_HISTORY], limit, unit="bytes")


def _codec_targets(mix: dict[str, float]) -> list[Target]:
    return [
        Target("codec, the mix: encode, times as fast", mix[ENCODE_HAYSTACK] / mix[ENCODE], 2, False),
        Target("codec, the mix: decode a window of 20, times as fast", mix[DECODE_HAYSTACK] / mix[DECODE], 2, False),
    ]


def _bulk_table(engines: list[Engine], bulk: Medians) -> str:
    rows = []
    for engine in engines:
        taken, floor = bulk[engine.name], bulk.get(engine.floor_name)
        if floor:
            rows.append([engine.floor_name, *(cell for column in taken for cell in [*_bulk_cells(floor[column]), "-"])])
        over_floor = {column: f"{taken[column] / floor[column]:.2f}" if floor else "-" for column in taken}
        rows.append(
            [engine.name, *(cell for column in taken for cell in [*_bulk_cells(taken[column]), over_floor[column]])]
        )
    columns = [f"{what}: {unit}" for what in ("write", "read") for unit in ("ms", "µs a message", "x its floor")]
    return markdown(["", *columns], rows)


def _bulk_cells(microseconds: float) -> list[str]:
    return [f"{microseconds / 1000:,.1f}", f"{microseconds / experiments.BATCH:.2f}"]


def _writers_table(engines: list[Engine], writers: Medians) -> str:
    rows, columns = [], list(next(iter(writers.values()), {}))
    for engine in engines:
        shares = _shares(engine, writers)
        if shares:
            for name in (engine.floor_name, engine.name):
                rows.append([name, *(f"{1e6 / writers[name][column]:,.0f}" for column in columns)])
            rows.append(["- x its floor", *(f"{shares[column]:.2f}" for column in columns)])
    return markdown(["", *columns], rows)


def _shares(engine: Engine, writers: Medians) -> dict[str, float]:
    taken = writers.get(engine.name, {})
    return {column: writers[engine.floor_name][column] / taken[column] for column in taken}


def _bytes_table(engines: list[Engine], found: Medians) -> str:
    columns = [ENCODED, ONE_HISTORY, MANY_HISTORIES]
    rows = [[engine.name, *(f"{found[engine.name][column]:,.0f}" for column in columns)] for engine in engines]
    return markdown(["", *columns], rows)


def _speed_table(engines: list[Engine], append: BySize, read: BySize, bulk: Medians, size: str) -> str:
    rows = []
    for engine in engines:
        at = size if engine.max_size is None else f"{engine.max_size:,}"
        taken = bulk[engine.name]
        speeds = [
            2e6 / append.taken(engine, at),
            experiments.WINDOW * 1e6 / read.taken(engine, at),
            experiments.BATCH * 1e6 / taken[BULK_WRITE],
            experiments.BATCH * 1e6 / taken[BULK_READ],
        ]
        rows.append([engine.name, *(f"{speed:,.0f}" for speed in speeds)])
    in_one_call = f"{experiments.BATCH:,} in one call"
    columns = [f"{which}, {how}" for how in ("window", in_one_call) for which in ("written", "read")]
    columns[0] = "written, turn by turn"
    return markdown(["", *columns], rows)


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
    """Return a table, aligned: text in the first column, numbers in the others."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
