# SPDX-License-Identifier: Apache-2.0
"""The declaration and the measurement of benchmarks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

OURS, PEER = "ours", "cuda.core"

Side = Callable[[], object]


class Refused:
    """A side that can't do this at all; its own error message is the reason."""

    def __init__(self, attempt: Side, *expected: type[Exception]) -> None:
        try:
            attempt()
        except expected as error:
            self.reason = " ".join(str(error).split())
        else:
            raise AssertionError("the peer was expected to refuse this, and did not: give it a side")


Sides = Mapping[str, "Side | Refused"]


@dataclass(frozen=True)
class Goal:
    """A goal of a benchmark.

    Attributes
    ----------
    text : str
        The goal as the table shows it.
    met : callable
        Takes the medians, in seconds by side, and returns whether the goal is reached.
    """

    text: str
    met: Callable[[Mapping[str, float]], bool]


def ratio(most: float, to: str = PEER) -> Goal:
    """Return the goal that ours takes at most ``most`` times as long as another side."""
    return Goal(f"≤ {most:g}× {to}", lambda medians: medians[OURS] <= most * medians[to])


def at_most(seconds: float) -> Goal:
    """Return the goal that ours takes at most so many seconds."""
    return Goal(f"≤ {duration(seconds)}", lambda medians: medians[OURS] <= seconds)


def over(side: str, seconds: float, share: float = 0.0) -> Goal:
    """Return the goal that ours takes at most ``seconds`` longer than a side, or ``share`` of its time if greater."""
    text = f"≤ {side} + {duration(seconds)}" + (f" or {share:.0%}" if share else "")
    return Goal(text, lambda medians: medians[OURS] - medians[side] <= max(seconds, share * medians[side]))


@dataclass(frozen=True)
class Benchmark:
    """The description of a benchmark.

    Attributes
    ----------
    name : str
        ``room.what``; ``--only`` matches it.
    what : str
        A line of text for the table.
    goal : Goal
        The goal to reach.
    sides : callable or None
        Takes an empty directory; returns a context manager that yields the functions to call, by side (ours first).
    rounds : int
        The number of rounds. Each calls every side ``calls`` times, so that a slow moment of the machine affects all.
    calls : int
        Calls of a side in a round.
    samples : callable or None
        Replaces ``sides`` for work that can't be repeated in turns: takes an empty directory (those of other benchmarks
        of the run are beside it) and the effort, and returns the seconds of each call, by side.
    statistic : {"median", "mean", "p99"}
        The statistic of the calls' times that is compared with the goal.
    beside : str, optional
        A side; the table shows how much longer ours takes, by the least, the 10th percentile and the median.
    """

    name: str
    what: str
    goal: Goal
    sides: Callable[[Path], AbstractContextManager[Sides]] | None = None
    rounds: int = 60
    calls: int = 50
    samples: Callable[[Path, float], Mapping[str, Sequence[float]]] | None = None
    statistic: str = "median"
    beside: str | None = None


@dataclass(frozen=True)
class Measured:
    """The times of a side, in seconds per call.

    Attributes
    ----------
    median, low, high : float
        The median and the quartiles.
    mean, p99 : float
        The mean and the 99th percentile.
    least, p10 : float
        The shortest time and the 10th percentile: on a machine that is busy with other work, they are the closest to
        what a call takes by itself.
    calls : int
        The number of calls that were timed.
    """

    median: float
    low: float
    high: float
    mean: float
    p99: float
    least: float
    p10: float
    calls: int


@dataclass(frozen=True)
class Result:
    """The outcome of a benchmark.

    Attributes
    ----------
    benchmark : Benchmark
        The benchmark that was run.
    measured : mapping
        The times, by side.
    refused : mapping
        The reasons, by side that can't do this.
    """

    benchmark: Benchmark
    measured: Mapping[str, Measured]
    refused: Mapping[str, str]

    @property
    def times(self) -> dict[str, float]:
        """The median of each side in seconds, or the benchmark's statistic instead."""
        return {side: getattr(measured, self.benchmark.statistic) for side, measured in self.measured.items()}

    @property
    def ratio(self) -> float | None:
        """Our time divided by the peer's; None if the peer refuses."""
        times = self.times
        return times[OURS] / times[PEER] if PEER in times else None

    @property
    def extra(self) -> str:
        """How much longer ours takes than the side beside it, as text; empty if there is no such side."""
        beside = self.benchmark.beside
        if beside is None or beside not in self.measured:
            return ""
        ours, theirs = self.measured[OURS], self.measured[beside]
        told = [
            f"{name} {'-' if extra < 0 else '+'}{duration(abs(extra))}"
            for name in ("least", "p10", "median")
            for extra in [getattr(ours, name) - getattr(theirs, name)]
        ]
        return f"over {beside}: {', '.join(told)}"

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.benchmark.goal.met(self.times)

    def to_dict(self) -> dict[str, object]:
        """Return the outcome for JSON; times are in seconds."""
        return {
            "name": self.benchmark.name,
            "what": self.benchmark.what,
            "goal": self.benchmark.goal.text,
            "met": self.met,
            "statistic": self.benchmark.statistic,
            "ratio": self.ratio,
            "sides": {
                side: {
                    "median": m.median,
                    "quartiles": [m.low, m.high],
                    "mean": m.mean,
                    "p99": m.p99,
                    "least": m.least,
                    "p10": m.p10,
                    "calls": m.calls,
                }
                for side, m in self.measured.items()
            },
            "refused": dict(self.refused),
        }


def measure(benchmark: Benchmark, directory: Path, effort: float = 1.0) -> Result:
    """Run a benchmark.

    Parameters
    ----------
    benchmark : Benchmark
        The benchmark to run.
    directory : Path
        An empty directory for its files.
    effort : float
        A factor on the number of rounds; at least two are run.
    """
    if benchmark.samples is not None:
        taken = benchmark.samples(directory, effort)
        return Result(benchmark, {name: _summary(values) for name, values in taken.items()}, {})
    if benchmark.sides is None:
        raise TypeError(f"{benchmark.name} has neither sides nor samples")
    with benchmark.sides(directory) as sides:
        run = {name: side for name, side in sides.items() if not isinstance(side, Refused)}
        refused = {name: side.reason for name, side in sides.items() if isinstance(side, Refused)}
        seconds: dict[str, list[float]] = {name: [] for name in run}
        for side in run.values():
            side()  # imports, first uses and memos happen before the measurement
        order = list(run)
        gc.collect()
        gc.disable()
        try:
            for _ in range(max(2, round(benchmark.rounds * effort))):
                for name in order:
                    _time(run[name], benchmark.calls, seconds[name])
                order.reverse()
                gc.collect()
        finally:
            gc.enable()
    return Result(benchmark, {name: _summary(values) for name, values in seconds.items()}, refused)


def _time(side: Side, calls: int, into: list[float]) -> None:
    clock = time.perf_counter_ns
    for _ in range(calls):
        start = clock()
        side()
        into.append((clock() - start) * 1e-9)


def _summary(values: Sequence[float]) -> Measured:
    low, median, high = statistics.quantiles([*values, *values], n=4, method="inclusive")  # twice: maybe there is one
    ordered, last = sorted(values), len(values) - 1
    p99, p10 = (ordered[min(last, len(values) * percent // 100)] for percent in (99, 10))
    return Measured(median, low, high, statistics.fmean(values), p99, ordered[0], p10, len(values))


def duration(seconds: float) -> str:
    """Return a time as text with three digits and its unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
