# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.memo_keys [--seed N] [--programs N] [--pairs N]``: wrong hits, needless misses, collisions."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time

from ci.memo_keys import pairs, programs


def main() -> int:
    """Try programs and pairs, and give the account; 1 if there was a wrong hit or a collision."""
    parser = argparse.ArgumentParser(prog="python -m ci.memo_keys")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, metavar="N")
    parser.add_argument("--programs", type=int, default=300, metavar="N")
    parser.add_argument("--pairs", type=int, default=5000, metavar="N")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as place:
        account = programs.run(place, options.programs, options.seed)
    print(f"{account.programs} programs, {account.calls} calls: {len(account.wrong)} wrong")
    for line in account.wrong:
        print(f"  wrong: {line}")
    for cause, count in account.needless.most_common():
        print(f"  needless miss: {count} × {cause}")
    differed, collisions, needless = pairs.differing(random.Random(options.seed), options.pairs)  # noqa: S311
    print(f"{differed} pairs that differ: {len(collisions)} with one digest; {len(needless)} equal ones with two")
    for line in [*collisions, *needless]:
        print(f"  {line}")
    return int(bool(account.wrong or collisions))


if __name__ == "__main__":
    sys.exit(main())
