# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.fleet [--small] [--seed N]``: what a fleet compiles while holders and the server die."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ci.fleet.account import Account, Plan, simulate
from ci.fleet.server import why_no_server

#: What happens, by the name of a row.
SCENES = {
    "nothing happens": Plan(),
    "12 holders are killed": Plan(kills=12),
    "the server is killed, and back after 0.3 s": Plan(restarts=1),
    "it is away for 3 s": Plan(restarts=1, away=3.0),
    "it comes back empty": Plan(restarts=1, lasting=False),
    "12 holders and the server, twice": Plan(kills=12, restarts=2),
}
_COLUMNS = ("compiles", "extra", "most_by_host", "killed", "lost", "wrong", "failed")


def main(arguments: list[str] | None = None) -> int:
    """Print the account; 1 where something was lost, wrong, or compiled too often."""
    parser = argparse.ArgumentParser(prog="python -m ci.fleet", description=__doc__)
    parser.add_argument("--small", action="store_true", help="16 processes and 40 programs, as the test has them")
    parser.add_argument("--seed", type=int, default=0, help="of the orders, and of who is killed")
    options = parser.parse_args(arguments)
    if (reason := why_no_server()) is not None:
        print(reason, file=sys.stderr)
        return 2
    faults = []
    for name, scene in SCENES.items():
        plan = scene._replace(processes=16, keys=40, kills=scene.kills // 4) if options.small else scene
        with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
            account = simulate(plan, Path(folder), options.seed)
        if not faults and name == next(iter(SCENES)):
            print(f"{plan.processes} processes on {plan.hosts} hosts, {plan.keys} programs of {plan.seconds} s each")
        print(f"{name}: {_told(account)}", flush=True)
        faults += [f"{name}: {fault}" for fault in account.faults(plan)]
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


def _told(account: Account) -> str:
    counts = ", ".join(f"{getattr(account, column)} {column.replace('_', ' ')}" for column in _COLUMNS)
    return f"{account.seconds:.1f} s; {counts}"


if __name__ == "__main__":
    sys.exit(main())
