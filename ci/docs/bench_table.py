# SPDX-License-Identifier: Apache-2.0
"""Write the table of ci/docs/reference/benchmarks.md: ``python ci/docs/bench_table.py [RESULTS.json]``.

Without an argument the newest file in ``ci/bench/results`` is taken, where ``make bench`` leaves one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = "ci/docs/reference/benchmarks.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def duration(seconds: float) -> str:
    """Write a time with three figures: ``8.41 µs``, ``412 ms``."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3), ("s", 1.0)):
        value = seconds * scale
        if value < 1000 or unit == "s":
            return f"{value:.3g} {unit}"
    raise AssertionError("unreachable")


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2g}×"


def table(report: dict[str, Any]) -> str:
    """Make the Markdown table of a report of ``python -m ci.bench``."""
    lines = ["| what | ours | cuda.core | ratio |", "|---|---:|---:|---:|"]
    for benchmark in report["benchmarks"]:
        sides, what = dict(benchmark["sides"]), benchmark["what"]
        statistic = benchmark["statistic"]
        ours, peer = sides.pop("ours")[statistic], sides.pop("cuda.core", None)
        if peer is not None:
            theirs, ratio = duration(peer[statistic]), _ratio(ours, peer[statistic])
        elif "cuda.core" in benchmark["refused"]:
            theirs, ratio = "refused", ""
        else:
            name, other = next(iter(sides.items()), ("", None))
            theirs = f"({name}: {duration(other[statistic])})" if other else ""
            ratio = _ratio(ours, other[statistic]) if other else ""
        lines.append(f"| {what} | {duration(ours)} | {theirs} | {ratio} |")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    machine = report["machine"]
    where = f"{machine['cpu'] or 'unknown processor'}, {machine['cpus']} CPUs, no GPU, Python {report['python']}"
    return "\n".join((*lines, "", f"Medians, both sides in turns, on {report['created'][:10]}: {where}; {versions}."))


def main(arguments: list[str]) -> int:
    """Replace what lies between the markers in ci/docs/reference/benchmarks.md."""
    if arguments:
        source = Path(arguments[0])
    else:
        results = sorted((REPOSITORY / "ci" / "bench" / "results").glob("*.json"))
        if not results:
            print("there are no results yet: run make bench, or name a JSON file", file=sys.stderr)
            return 2
        source = results[-1]
    page = REPOSITORY / PAGE
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{PAGE} lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 1
    made = table(json.loads(source.read_text(encoding="utf-8")))
    page.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
    print(f"{PAGE}: table written from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
