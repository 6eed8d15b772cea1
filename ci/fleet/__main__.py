# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.fleet [--small] [--json FILE]``: what a fleet compiles while holders and the server are killed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from ci.fleet.account import Account, Plan, simulate
from ci.fleet.server import why_no_server
from ci.fleet.verdicts import Extra

#: The scenes, by the name of their row.
SCENES = {
    "nothing happens": Plan(),
    "12 holders are killed": Plan(kills=12),
    "the server is killed, and back after 0.3 s": Plan(restarts=1),
    "it is away for 3 s": Plan(restarts=1, away=3.0),
    "it comes back empty": Plan(restarts=1, lasting=False),
    "12 holders and the server, twice": Plan(kills=12, restarts=2),
}
#: The scenes of the test, a few seconds long: holders and the server are killed together, and NVRTC compiles a little.
SMALL = {
    "nothing happens": Plan(processes=12, keys=30, seconds=0.02),
    "holders and the server": Plan(processes=12, keys=30, seconds=0.05, kills=3, restarts=1),
    "NVRTC": Plan(hosts=2, processes=4, keys=3, real=True),
}
_COLUMNS = ("most_by_host", "killed", "lost", "wrong", "failed", "unpublished")


def main(arguments: list[str] | None = None) -> int:
    """Print the account; return 1 if something was lost, wrong, or compiled too often."""
    parser = argparse.ArgumentParser(prog="python -m ci.fleet", description=__doc__)
    parser.add_argument("--small", action="store_true", help="of few processes and programs, as the test has them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the account there")
    parser.add_argument("--seed", type=int, default=0, help="of the orders, and of who is killed")
    options = parser.parse_args(arguments)
    if (reason := why_no_server()) is not None:
        print(reason, file=sys.stderr)
        return 2
    faults: list[str] = []
    told = {}
    for name, plan in (SMALL if options.small else SCENES).items():
        with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
            account = simulate(plan, Path(folder), options.seed)
        size = f"{plan.processes} processes on {plan.hosts} hosts, {plan.keys} programs"
        print(f"{name} ({size}): {_told(account)}", flush=True)
        told[name] = account._asdict()
        faults += [f"{name}: {fault}" for fault in account.faults(plan)]
    for fault in faults:
        print(f"FAULT: {fault}")
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 1 if faults else 0


def _told(account: Account) -> str:
    extra = ", ".join(f"{getattr(account, why)} {why}" for why in Extra._fields)
    counts = ", ".join(f"{getattr(account, column)} {column.replace('_', ' ')}" for column in _COLUMNS)
    return (
        f"{account.seconds:.1f} s after a start of {account.start:.1f} s, {account.busy:.1f} s of processors; "
        f"{account.compiles} compiles, {account.extra} extra ({extra}), {counts}"
    )


if __name__ == "__main__":
    sys.exit(main())
