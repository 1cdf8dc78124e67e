# SPDX-License-Identifier: Apache-2.0
"""Measure the stores, haystack-experimental's store, and the floors of the engines. A missed target is not an error."""

import argparse
import json
import os
import platform
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import experiments
from engines import KEYS, SERVERS, Engine, chosen
from experiments import Medians, Plan
from report import report

FULL = Plan(
    sizes=[10, 100, 1000, 10_000, 100_000, 1_000_000],
    repetitions=600,
    bulk_repetitions=9,
    appends_before=5000,
    writers_repetitions=25,
    long_history=20_000,
    short_histories=1000,
)
QUICK = Plan(
    sizes=[10, 100, 1000, 10_000],
    repetitions=50,
    bulk_repetitions=3,
    appends_before=200,
    writers_repetitions=3,
    long_history=1000,
    short_histories=20,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", help="numbers of stored messages, such as 10,1000,100000")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians in microseconds to this file")
    parser.add_argument(
        "--engines", default=",".join(KEYS), help=f"which to measure, of {', '.join(KEYS)}; default: all"
    )
    for key in SERVERS:
        parser.add_argument(f"--{key}", metavar="URL", help="measure against this server; default: start a private one")
    arguments = parser.parse_args()
    keys = arguments.engines.split(",")
    if not set(keys) <= set(KEYS):
        parser.error(f"--engines must be some of {', '.join(KEYS)}.")
    plan = QUICK if arguments.quick else FULL
    if arguments.sizes:
        plan = plan._replace(sizes=sorted({int(size) for size in arguments.sizes.split(",")}))

    # End like Ctrl-C, so that the temporary folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    with ExitStack() as running:
        engines = chosen(keys, {key: getattr(arguments, key) for key in SERVERS}, running)
        results = measure(engines, plan)
    print("# Benchmarks", environment(engines), report(plan, engines, results), sep="\n\n")
    print(f"\n{time.monotonic() - started:.0f} seconds.")
    if arguments.json:
        found = {"environment": environment(engines), "medians_us": results}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(engines: list[Engine], plan: Plan) -> dict[str, Medians]:
    names = ["append", "read", "retrieve", "count", "bulk", "writers", "bytes"]
    results: dict[str, Medians] = {name: {} for name in names}
    for engine in engines:
        print(f"{engine.name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="chat-store-benchmark-") as name:
            folder = Path(name)
            found = {
                "bulk": experiments.bulk(engine, plan, folder),
                "bytes": experiments.stored_bytes(engine, plan, folder),
                # This runs before the histories of every size, which keep the disk busy afterwards.
                "writers": experiments.writers(engine, plan, folder) if engine.server else {},
                **experiments.by_size(engine, plan, folder),
            }
            for measurement, medians in found.items():
                results[measurement] |= medians
    print("codec …", file=sys.stderr, flush=True)
    return {**results, "codec": experiments.codec(plan)}


def environment(engines: list[Engine]) -> str:
    return environment_of(*(engine.server for engine in engines if engine.server))


def environment_of(*servers: str) -> str:
    programs = [
        f"{platform.python_implementation()} {platform.python_version()}",
        f"SQLite {sqlite3.sqlite_version}",
        *servers,
        *(f"{name} {version(name)}" for name in ("haystack-ai", "haystack-experimental")),
    ]
    return f"{', '.join(programs)}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


if __name__ == "__main__":
    main()
