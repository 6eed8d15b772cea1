# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.bench [--only PATTERN] [--effort FACTOR|full] [--json FILE] [--list]``."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ci.bench import (
    batches,
    cache_file,
    memo,
    processes,
    programs,
    scaling,
    stores,
    template_cache,
    templates,
    tiers,
    waiters,
)
from ci.bench.harness import OURS, PEER, Benchmark, Result, duration, measure
from cuda_progcache._util.parallel import for_each

BENCHMARKS: tuple[Benchmark, ...] = (
    *stores.BENCHMARKS,
    *programs.BENCHMARKS,
    *batches.BENCHMARKS,
    *waiters.BENCHMARKS,
    *processes.BENCHMARKS,
    *templates.BENCHMARKS,
    *template_cache.BENCHMARKS,
    *memo.BENCHMARKS,
    *cache_file.BENCHMARKS,
    *tiers.BENCHMARKS,
)
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write the JSON; return 1 with ``--strict`` if a goal isn't reached."""
    options = _parser().parse_args(arguments)
    full = options.effort == "full"
    effort = 1.0 if full else float(options.effort)
    known = (*BENCHMARKS, *scaling.benchmarks(scaling.FULL_SIZES if full else scaling.SIZES))
    chosen = [b for b in known if not options.only or any(_fits(b.name, pattern) for pattern in options.only)]
    if not chosen:
        print(f"no benchmark fits {' or '.join(options.only)}; --list shows them", file=sys.stderr)
        return 2
    if options.list:
        for benchmark in chosen:
            print(f"{benchmark.name:32} {benchmark.what}")
        return 0
    started, before = time.perf_counter(), _load()
    with _directory() as directory:
        results = [_run(benchmark, directory, effort) for benchmark in chosen]
    report = _report(results, effort, time.perf_counter() - started, before)
    _print(results, report)
    target = options.json or str(RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json")
    if target == "-":
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {target}", file=sys.stderr)
        plot = scaling.plot(results, Path(target).with_suffix(".png"))
        if plot is not None:
            print(f"plot in {plot}", file=sys.stderr)
    return 1 if options.strict and not all(result.met for result in results) else 0


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or pattern in name


@contextmanager
def _directory() -> Iterator[Path]:
    """Make a directory for the whole run, beside the results: if the temporary directory is in memory, fsync is free.

    The benchmarks share it, and it is emptied at the end. For a while after files were removed, ext4 without a journal
    looks at each of their inodes when it makes a new one, and the next benchmark's files would cost ten times as much.
    """
    RESULTS.mkdir(exist_ok=True)
    directory = tempfile.mkdtemp(prefix="run-", dir=RESULTS)
    try:
        yield Path(directory)
    finally:
        for folder, folders, files in os.walk(directory, topdown=False):
            for_each([os.path.join(folder, name) for name in files], os.unlink)
            for name in folders:
                os.rmdir(os.path.join(folder, name))
        os.rmdir(directory)


def _run(benchmark: Benchmark, directory: Path, effort: float) -> Result:
    print(f"{benchmark.name} …", file=sys.stderr, flush=True)
    own = directory / benchmark.name
    own.mkdir()
    return measure(benchmark, own, effort)


def _load() -> float | None:
    """Return the load average of the last minute; None if the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _report(results: list[Result], effort: float, seconds: float, before: float | None) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in (
        "cuda-core",
        "cuda-bindings",
        "nvidia-cuda-nvrtc",
        "nvidia-cuda-cccl",
        "msgspec",
        "xxhash",
        "diskcache",
        "joblib",
        "fleche",
        "redis",
        "urllib3",
        "obstore",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "machine": {"system": platform.platform(), "cpu": _cpu(), "cpus": os.cpu_count()},
        "versions": versions,
        "effort": effort,
        "seconds": seconds,
        "load": None if before is None else [before, _load()],
        "benchmarks": [result.to_dict() for result in results],
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _print(results: list[Result], report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Nothing may be cut off if the output is no terminal, and stdout is reserved for --json -.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
    table = Table(title=f"medians of calls in turns, Python {report['python']}, {report['machine']['cpu']}")
    for heading in ("benchmark", OURS, PEER, "ratio", "other sides", "goal", "met"):
        table.add_column(heading, justify="right" if heading in {OURS, PEER, "ratio"} else "left")
    for result in results:
        times = result.times
        peer = duration(times[PEER]) if PEER in times else "refused" if PEER in result.refused else "—"
        others = ", ".join(f"{side} {duration(took)}" for side, took in times.items() if side not in {OURS, PEER})
        extra = f"\n[dim]{result.extra}[/dim]" if result.extra else ""
        table.add_row(
            f"{result.benchmark.name}\n[dim]{result.benchmark.what}[/dim]{extra}",
            duration(times[OURS]),
            peer,
            "" if result.ratio is None else f"{result.ratio:.2f}×",
            others,
            result.benchmark.goal.text,
            "[green]yes[/green]" if result.met else "[red]no[/red]",
        )
    console.print(table)
    for result in results:
        for side, reason in result.refused.items():
            console.print(f"[dim]{result.benchmark.name}: {side} refuses: {reason[:160]}[/dim]", highlight=False)
    reached = sum(result.met for result in results)
    console.print(f"{reached} of {len(results)} figures reached in {report['seconds']:.0f} s")
    if report["load"] is not None:
        console.print(f"[dim]load {report['load'][0]:.1f} before, {report['load'][1]:.1f} after[/dim]")


def _effort(text: str) -> str:
    if text != "full":
        float(text)  # argparse turns its ValueError into a message
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ci.bench", description="This cache beside cuda.core's.")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="part of a name, or a glob; repeatable")
    parser.add_argument(
        "--effort",
        type=_effort,
        default="1",
        metavar="FACTOR",
        help="factor on the rounds (default: 1); full: 1, and stores of 1,000,000 entries, too",
    )
    parser.add_argument("--json", metavar="FILE", help="where to write (default: ci/bench/results/; - is stdout)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a figure is not reached")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
