# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.elsewhere [--bounded] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ci.elsewhere.account import Account, prove
from ci.elsewhere.programs import BOUNDED, PROGRAMS


def main(arguments: list[str] | None = None) -> int:
    """Print what was found in each place; 1 where an answer was wrong or a miss was needless."""
    parser = argparse.ArgumentParser(prog="python -m ci.elsewhere", description=__doc__)
    parser.add_argument("--bounded", action="store_true", help="only the programs that the test compiles")
    parser.add_argument("--json", metavar="FILE", help="write the whole account there")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="elsewhere-"))
    os.chmod(folder, 0o711)  # noqa: S103 - for the second user
    try:
        account = prove(folder, BOUNDED if options.bounded else PROGRAMS, say=_say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _print(account)
    if options.json:
        Path(options.json).write_text(json.dumps(account.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0 if account.good else 1


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print(account: Account) -> None:
    for name, seconds in account.deploy.seconds.items():
        print(f"deploy: {name} took {seconds:.2f} s")
    for visit in account.visits:
        print(f"{visit.where}: {visit.summary()}")
        for judged in visit.judged:
            if judged.verdict != "hit":
                print(f"    {judged.verdict:14} {judged.name}: {judged.why}")


if __name__ == "__main__":
    sys.exit(main())
