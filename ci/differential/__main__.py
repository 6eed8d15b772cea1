# SPDX-License-Identifier: Apache-2.0
"""Run the differential test: ``python -m ci.differential [--templates N] [--seed S]``.

Prints the seed, each difference, and an account. The exit status is 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import jinja2

from ci.differential.features import FEATURES, LIBRARY, SHAPES
from ci.differential.grammar import Grammar
from ci.differential.ways import Case, Difference, Workplace

#: Seeds that once showed a difference; they are run again each time, with few templates.
SEEDS: tuple[int, ...] = ()


def cases(count: int, seed: int) -> list[Case]:
    """Return random templates, each with options of its own."""
    random = Random(seed)  # noqa: S311  (nothing secret)
    grammar = Grammar(random)
    made = []
    for _ in range(count):
        options = {"autoescape": random.random() < 0.5}
        if random.random() < 0.4:
            options["undefined"] = jinja2.StrictUndefined  # type: ignore[assignment]
        made.append(Case(grammar.template(), options))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Make, render, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--templates", type=int, default=200, help="how many random ones")
    parser.add_argument("--seed", type=int, help="of the random ones; without it a fresh one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further template is begun")
    parser.add_argument("--no-features", action="store_true", help="random templates only")
    parser.add_argument("--share", type=float, default=1.0, help="of the templates, for each group of costly ways")
    parser.add_argument("--most", type=int, default=20, help="how many differences are printed")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else secrets.randbelow(2**32)
    print(f"seed {seed}", flush=True)
    warnings.simplefilter("ignore")
    chosen = cases(options.templates, seed)
    for old in SEEDS:
        chosen += cases(30, old)
    if not options.no_features:
        chosen += [*FEATURES, *SHAPES]
    with tempfile.TemporaryDirectory(prefix="differential-") as folder:
        workplace = Workplace(Path(folder), LIBRARY)
        found, end = 0, time.monotonic() + options.seconds
        done: list[Case] = []
        chance = Random(seed)  # noqa: S311  (nothing secret)

        def in_share() -> bool:
            return bool(chance.random() < options.share)

        def differences() -> Iterator[Difference]:
            for case in chosen:
                if time.monotonic() > end:
                    break
                yield from workplace.differences(case, in_share)
                done.append(case)
            yield from workplace.kernel_differences(done, in_share)
            yield from workplace.process_differences(done, in_share)

        for difference in differences():
            found += 1
            if found <= options.most:
                print(difference, flush=True)
    ways, renders = len(workplace.ways), workplace.renders
    print(f"{len(done)} templates, {ways} ways, {renders} renders, {found} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
