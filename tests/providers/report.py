# SPDX-License-Identifier: Apache-2.0
"""
Counts what providers refuse of generated conversations: `python tests/providers/report.py --cases 20000 --seed 1`.

Prints the refusals by provider, rule and damage, with the smallest failing example of each provider and rule.
"""

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore", "Mutating attribute")

from cases import explained, fails, is_offered, judged, same_provider, switched  # noqa: E402
from histories import installed  # noqa: E402
from judging import rule_of  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="of the same provider (default: 20000)")
    parser.add_argument("--switches", type=int, default=0, help="in which another model goes on (default: 0)")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--providers", nargs="*", default=installed())
    parser.add_argument("--examples", type=int, default=1, help="failing examples of each provider and rule")
    parser.add_argument("--rule", help="show examples of this rule only")
    parser.add_argument("--unsure", action="store_true", help="count rules that fail no test, too")
    options = parser.parse_args()

    for setting in ("portable", "merge_consecutive"):
        print(f"The retriever {'has' if is_offered(setting) else 'does not have'} the setting {setting}.")
    same, switches = {}, {}
    report("same provider", same_provider(options.seed, options.providers), options.cases, options, same)
    report("switch", switched(options.seed, options.providers), options.switches, options, switches)
    for smallest in (same, switches):
        for (_, rule), found in sorted(smallest.items()):
            for _, _, case in found if options.rule in (None, rule) else ():
                print(f"\n{explained(case, rule)}")
    return bool(same or switches)


def report(title, cases, number, options, smallest) -> None:
    if not number:
        return
    refusals: Counter = Counter()
    damages: Counter = Counter()
    totals: Counter = Counter()
    portables: Counter = Counter()
    bad = 0
    started = time.perf_counter()
    for index, case in enumerate(islice(cases, number)):
        totals[case.provider] += 1
        rules = {p.rule for p in judged(case)}
        if not options.unsure:
            rules = {rule for rule in rules if fails(case.provider, rule)}
        bad += bool(rules)
        for rule in rules:
            key = (case.provider, rule)
            refusals[key] += 1
            damages[(*key, case.name)] += 1
            portables[case.portable] += 1
            kept = smallest.setdefault(key, [])
            kept.append((len(case.stored), index, case))
            kept.sort(key=lambda found: found[:2])
            del kept[options.examples :]
    seconds = time.perf_counter() - started
    print(f"\n== {title}: {number} cases in {seconds:.1f} s, {bad} refused ==")
    if set(portables) - {None}:
        print(f"broken rules with portable=True: {portables[True]}, with portable=False: {portables[False]}")
    for provider in options.providers:
        found = {rule: n for (p, rule), n in refusals.items() if p == provider}
        print(f"{provider}: {totals[provider]} cases, {sum(found.values())} broken rules")
        for rule, n in sorted(found.items(), key=lambda item: -item[1]):
            where = Counter({name: n for (p, r, name), n in damages.items() if (p, r) == (provider, rule)})
            names = ", ".join(f"{name} {n}" for name, n in where.most_common(6))
            print(f"  {rule} ({rule_of(provider, rule).level}): {n}   [{names}]")


if __name__ == "__main__":
    sys.exit(main())
