# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.schedules [--at-most N] [--only TEXT] [--walks N] [--kills]``: the schedules tried, and what broke."""

from __future__ import annotations

import argparse
import sys
import time

from ci.schedules.explore import Count
from ci.schedules.scenarios import (
    BEFORE,
    OPERATIONS,
    PAIRS,
    TRIPLES,
    Simulation,
    random_triples,
    try_killed,
    try_pair,
    walk,
)


def main() -> int:
    """Try every pair of operations from every state; 1 if an invariant broke."""
    parser = argparse.ArgumentParser(prog="python -m ci.schedules")
    parser.add_argument("--at-most", type=int, default=None, metavar="N", help="schedules of a pair (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="pairs whose name has this in it")
    parser.add_argument("--walks", type=int, default=200, metavar="N", help="random schedules of each three")
    parser.add_argument("--kills", action="store_true", help="kill the first of each pair at each of its calls, too")
    options = parser.parse_args()
    broken = total = pruned = limited = 0
    timer = time.perf_counter  # the clock that the simulation leaves alone
    started = timer()
    simulation = Simulation()
    with simulation.running():
        for before in BEFORE:
            for names in PAIRS:
                title = f"{' | '.join(names)} on {before}"
                if options.only not in title:
                    continue
                count = Count()
                found = try_pair(simulation, before, names, count, at_most=options.at_most)
                if found is None and options.kills:
                    found = try_killed(simulation, before, names, count, at_most=options.at_most)
                total, pruned, limited = total + count.complete, pruned + count.pruned, limited + (not count.exhausted)
                print(f"{title:50} {count.complete:7,}{'' if count.exhausted else ' (not all)'}", flush=True)
                if found is not None:
                    broken += 1
                    print(found, flush=True)
        if not options.only:
            found_walking, walked = walk(simulation, [*TRIPLES, *random_triples(list(OPERATIONS), 30)], options.walks)
            total += walked
            for violation in found_walking:
                broken += 1
                print(violation, flush=True)
    print(f"{total:,} schedules tried, {pruned:,} given up as equal to one of them, in {timer() - started:.0f} s;"
          f" {limited} pairs not exhausted; {broken} broke an invariant")  # fmt: skip
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
