# SPDX-License-Identifier: Apache-2.0
"""
Measure our stores beside haystack-experimental's and beside the least that an engine can cost. Never fails on a time.
"""

import argparse
import json
import os
import platform
import signal
import sqlite3
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from engines import ENGINES
from experiments import Medians, Plan, bulk_write, codec, read_and_append
from report import report

FULL = Plan(sizes=[10, 100, 1000, 10_000, 100_000, 1_000_000], repetitions=600, bulk_repetitions=9, appends_before=5000)
QUICK = Plan(sizes=[10, 100, 1000, 10_000], repetitions=50, bulk_repetitions=3, appends_before=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", help="numbers of stored messages, such as 10,1000,100000")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians in microseconds to this file")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.sizes:
        plan = plan._replace(sizes=sorted({int(size) for size in arguments.sizes.split(",")}))

    # Leave as Ctrl-C does, so that the temporary folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    results = measure(plan)
    print("# Benchmarks", environment(), report(plan, results), sep="\n\n")
    print(f"\n{time.monotonic() - started:.0f} seconds.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "medians_us": results}, indent=2) + "\n")


def measure(plan: Plan) -> dict[str, Medians]:
    results: dict[str, Medians] = {"read": {}, "append": {}, "bulk": {}, "codec": {}}
    for engine in ENGINES:
        print(f"{engine.name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="chat-store-benchmark-") as name:
            folder = Path(name)
            results["bulk"] |= bulk_write(engine, plan, folder)
            reads, appends = read_and_append(engine, plan, folder)
            results["read"] |= reads
            results["append"] |= appends
    print("codec …", file=sys.stderr, flush=True)
    results["codec"] = codec(plan)
    return results


def environment() -> str:
    return (
        f"{platform.python_implementation()} {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"haystack-ai {version('haystack-ai')}, haystack-experimental {version('haystack-experimental')}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    )


if __name__ == "__main__":
    main()
